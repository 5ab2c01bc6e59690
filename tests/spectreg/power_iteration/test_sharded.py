"""Sharded weights on two and three processes, against the same model unsharded in each of them."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from cases import gpt2_projection, mlp, seeded
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from spectreg import SpectralNormCap, SpectralNormRegularizer
from spectreg.penalties import Square

pytestmark = pytest.mark.slow


def attention_and_convolution() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.MultiheadAttention(6, 2), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(7, 1)))


class Plain(nn.Linear):
    """A subclass that adds nothing."""


def train(model: nn.Module, regularizer: SpectralNormRegularizer, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    regularizer.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    regularizer.detach()


def assert_equal_to_unsharded(plain: nn.Module, sharded: nn.Module) -> None:
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(getattr(q, "full_tensor", lambda q=q: q)(), p, msg=lambda m, n=name: f"{n}: {m}")


def fsdp_training(variants: list[dict]) -> None:
    for settings in variants:
        plain = mlp(widths=(5, 8, 2, 3))  # of three ranks one has nothing of the second weight
        sharded = copy.deepcopy(plain)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in sharded:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        ours, truth = (SpectralNormRegularizer(m, 0.1, warmup=2, **settings) for m in (sharded, plain))
        train(plain, truth)
        train(sharded, ours)
        assert_equal_to_unsharded(plain, sharded)
        for name, sigma in truth.sigma().items():
            torch.testing.assert_close(ours.sigma()[name], sigma)
        ours.check_ranks()


@pytest.mark.parametrize("ranks", [2, 3])
def test_training_under_fully_shard_with_uneven_and_empty_shards_equals_the_unsharded_training(ranks):
    on_ranks(
        ranks, fsdp_training, [{}, {"steps": 0.5}, {"k": 2}, {"decoupled": True}, {"penalty": "hinge"}, {"every": 2}]
    )


def gathered_after_the_backward_pass() -> None:
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model.set_reshard_after_backward(False)
    plain, optimizer = mlp(), torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer, truth = SpectralNormRegularizer(model, 0.1).attach(optimizer), SpectralNormRegularizer(plain, 0.1)
    x = torch.ones(2, 5, dtype=torch.float64)
    model(x).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"weight '0.weight' is gathered, .* Call reshard\(\)"):
        optimizer.step()
    model.reshard()
    optimizer.step()
    plain(x).square().mean().backward()
    truth.add_gradient()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_equal_to_unsharded(plain, model)
    assert regularizer.sigma().keys() == truth.sigma().keys()


def test_a_weight_that_is_gathered_when_the_optimizer_steps_its_shard_is_refused_until_it_is_sharded_again():
    on_ranks(2, gathered_after_the_backward_pass)


def tensor_parallel_training(variants: list[dict]) -> None:
    for settings in variants:
        plain = mlp(widths=(5, 8, 6, 6))
        sharded = copy.deepcopy(plain)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(sharded, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        ours, truth = (SpectralNormRegularizer(m, 0.1, warmup=2, **settings) for m in (sharded, plain))
        train(plain, truth)
        train(sharded, ours)
        assert_equal_to_unsharded(plain, sharded)


def test_tensor_parallel_training_equals_the_unsharded_training():
    on_ranks(2, tensor_parallel_training, [{}, {"steps": 0.5}, {"k": 2}, {"decoupled": True}, {"penalty": "power"}])


def hybrid_training(variants: list[dict]) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for settings in variants:
        plain = mlp(widths=(5, 8, 6, 6))
        sharded = copy.deepcopy(plain)
        parallelize_module(sharded, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(sharded, mesh=mesh["data"])
        ours, truth = (SpectralNormRegularizer(m, 0.1, warmup=2, **settings) for m in (sharded, plain))
        train(plain, truth)
        train(sharded, ours)
        assert_equal_to_unsharded(plain, sharded)


def test_training_on_a_hybrid_mesh_of_data_and_tensor_parallel_equals_the_unsharded_training():
    on_ranks(4, hybrid_training, [{}, {"steps": 0.5}, {"k": 2}, {"decoupled": True}, {"penalty": "power"}])


def replicated_and_sharded_training() -> None:
    plain = mlp()
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    ours, truth = (SpectralNormRegularizer(m, 0.1, warmup=2) for m in (sharded, plain))
    train(plain, truth)
    train(sharded, ours)
    assert_equal_to_unsharded(plain, sharded)


def test_training_with_shards_replicated_over_a_second_dimension_equals_the_unsharded_training():
    on_ranks(4, replicated_and_sharded_training)


def blocks_across_shards() -> None:
    plain, sharded = attention_and_convolution(), attention_and_convolution()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ours, truth = (SpectralNormRegularizer(m, 0.1, map={"0.in*": "heads", "0.out*": 2}) for m in (sharded, plain))
    for _ in range(3):
        truth.add_gradient()
        ours.add_gradient()
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ranks", [2, 3])
def test_heads_and_groups_that_straddle_shards_give_the_unsharded_gradient(ranks):
    on_ranks(ranks, blocks_across_shards)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 3, 2, 2))


def every_kind_of_convolution_and_a_stack() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.ConvTranspose2d(5, 3, 3), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2, padding=1),
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.ConvTranspose2d(4, 4, 2, groups=4, stride=2),
            Experts(),
        )
    )  # fmt: skip


SIZES = {"0.weight": (3, 4), "1.weight": (5,), "2.weight": (4, 4), "3.weight": (4, 3), "4.weight": (2, 2)}


def sharded_by(dimension: int) -> None:
    for settings in (
        {},
        {"k": 2},
        {"map": "each"},
        {"map": "each", "k": 2},
        {"map": "operator", "input_size": SIZES},
        {"map": "operator", "input_size": SIZES, "k": 2},
    ):
        plain, sharded = every_kind_of_convolution_and_a_stack(), every_kind_of_convolution_and_a_stack()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in sharded:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(dimension)]))
        ours, truth = (SpectralNormRegularizer(m, 0.1, warmup=2, **settings) for m in (sharded, plain))
        for _ in range(2):
            truth.add_gradient()
            ours.add_gradient()
        for p, q in zip(plain, sharded, strict=True):
            torch.testing.assert_close(q.weight.grad.full_tensor(), p.weight.grad)
        for name, sigma in truth.sigma().items():
            torch.testing.assert_close(ours.sigma()[name], sigma)
            torch.testing.assert_close(ours.residual()[name], truth.residual()[name])


@pytest.mark.parametrize(("ranks", "dimension"), [(2, 0), (2, 1), (3, 0)])
def test_convolutions_operators_and_stacks_sharded_by_either_dimension_give_the_unsharded_gradient(ranks, dimension):
    on_ranks(ranks, sharded_by, dimension)


def penalties_as_a_loss() -> None:
    for settings in ({}, {"k": 2}, {"penalty": "hinge"}, {"strength": {"0.*": 0.3, "*": 0.1}}):
        settings = {"strength": 0.1} | settings
        added, differentiated = mlp(), mlp()
        for model in (added, differentiated):
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        a, b = (SpectralNormRegularizer(m, warmup=1, **settings) for m in (added, differentiated))
        truth = SpectralNormRegularizer(mlp(), warmup=1, **settings)
        for _ in range(2):
            added.zero_grad()
            differentiated.zero_grad()
            a.add_gradient()
            value = b.penalty()
            value.backward()
            torch.testing.assert_close(value, truth.penalty())
            for p, q in zip(added.parameters(), differentiated.parameters(), strict=True):
                if p.grad is not None:
                    assert q.grad.placements == q.placements
                    torch.testing.assert_close(q.grad.to_local(), p.grad.to_local())


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_penalty_of_sharded_weights_has_the_value_of_the_whole_and_the_gradient_that_is_added(ranks):
    on_ranks(ranks, penalties_as_a_loss)


def training_with_the_penalty_in_the_loss(before_the_forward: bool) -> None:
    plain = mlp()
    sharded = copy.deepcopy(plain)
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    for model in (plain, sharded):
        regularizer, optimizer = SpectralNormRegularizer(model, 0.1), torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            term = regularizer.penalty() if before_the_forward else None
            loss = model(x).square().mean()
            (loss + (regularizer.penalty() if term is None else term)).backward()
            optimizer.step()
    assert_equal_to_unsharded(plain, sharded)


@pytest.mark.parametrize("before_the_forward", [True, False])
def test_a_loss_with_the_penalty_in_it_trains_under_fully_shard_as_it_does_unsharded(before_the_forward):
    on_ranks(2, training_with_the_penalty_in_the_loss, before_the_forward)


def penalty_of_weights_that_are_gathered_for_a_moment() -> None:
    """By validation before the training pass, or after that as far as a part of the mesh."""
    flat, x = init_device_mesh("cpu", (dist.get_world_size(),)), torch.ones(2, 5, dtype=torch.float64)
    hybrid = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    for mesh, reshard, message in (
        (flat, False, r"was gathered when penalty\(\) was taken"),
        (flat, 2, "penalty.. before the forward pass"),
        (hybrid, 2, "penalty.. before the forward pass"),
    ):
        model = mlp()
        for layer in model[::2]:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)
        regularizer = SpectralNormRegularizer(model, 0.1)
        if reshard:
            loss = model(x).square().mean()
            with pytest.raises(RuntimeError, match=message):
                loss = loss + regularizer.penalty()
            continue
        with torch.no_grad():
            model(x)
        loss = regularizer.penalty() + model(x).square().mean()
        with pytest.raises(RuntimeError, match=message):
            loss.backward()


def penalty_between_two_forward_passes() -> None:
    plain = mlp()
    sharded = copy.deepcopy(plain)
    mesh, x = init_device_mesh("cpu", (dist.get_world_size(),)), torch.ones(2, 5, dtype=torch.float64)
    for layer in sharded[::2]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    fully_shard(sharded, mesh=mesh)
    for model in (plain, sharded):
        regularizer = SpectralNormRegularizer(model, 0.1)
        loss = model(x).square().mean()
        loss = loss + regularizer.penalty()
        (loss + model(x + 1).square().mean()).backward()
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad)


def test_a_penalty_between_two_forward_passes_has_its_gradient_whole():
    on_ranks(2, penalty_between_two_forward_passes)


def made_between_tensor_parallel_and_data_parallel_of_one() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    plain = mlp()
    model = parallelize_module(mlp(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    regularizer = SpectralNormRegularizer(model, 0.1)
    fully_shard(model, mesh=mesh["data"])
    train(model, regularizer)
    train(plain, SpectralNormRegularizer(plain, 0.1))
    assert_equal_to_unsharded(plain, model)


def test_a_regularizer_made_before_fully_shard_spreads_tensor_parallel_weights_over_the_same_ranks_acts():
    on_ranks(2, made_between_tensor_parallel_and_data_parallel_of_one)


def test_a_penalty_whose_gradient_fully_shard_would_drop_is_refused():
    on_ranks(4, penalty_of_weights_that_are_gathered_for_a_moment)


def steps_in_the_backward_pass() -> None:
    plain = mlp()
    sharded = copy.deepcopy(plain)
    mesh, x = init_device_mesh("cpu", (dist.get_world_size(),)), torch.ones(2, 5, dtype=torch.float64)
    for layer in sharded[::2]:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (plain, sharded):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
        SpectralNormRegularizer(model, 0.1).attach(*optimizers.values())
        cap = SpectralNormCap(model, 0.5).attach(*optimizers.values())

        def step(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            model(x).square().mean().backward()
        assert max(cap.sigma().values()) <= 0.5005
    assert_equal_to_unsharded(plain, sharded)


def test_optimizers_that_step_their_shards_in_the_backward_pass_train_as_unsharded_ones():
    on_ranks(2, steps_in_the_backward_pass)


def messages(regularizer: SpectralNormRegularizer) -> list[int]:
    """How many numbers each all-reduce of a step carries; nothing else may be sent."""
    regularizer.add_gradient()
    sizes, all_reduce = [], dist.all_reduce

    def noting(message, **keywords):
        sizes.append(message.numel())
        return all_reduce(message, **keywords)

    dist.all_reduce = noting
    try:
        with CommDebugMode() as collectives:
            regularizer.add_gradient()
    finally:
        dist.all_reduce = all_reduce
    assert collectives.get_total_counts() == len(sizes)
    numbers = sum(sum(w.tensor.shape) for w in regularizer.weights)
    assert sum(sizes) <= numbers * regularizer._state.tracked
    return sizes


def counted_messages() -> None:
    sharded = mlp()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    assert len(messages(SpectralNormRegularizer(sharded, 0.1))) == 1
    assert len(messages(SpectralNormRegularizer(sharded, 0.1, steps=0.5))) == 1
    assert len(messages(SpectralNormRegularizer(sharded, 0.1, k=3))) == 1


def test_all_layers_share_one_all_reduce_of_vectors_in_a_step_and_nothing_else_is_sent():
    on_ranks(2, counted_messages)


def counted_messages_of_a_hybrid_mesh() -> None:
    for plan, expected in (({"0": ColwiseParallel()}, 1), ({"0": ColwiseParallel(), "2": RowwiseParallel()}, 2)):
        model = mlp(widths=(5, 8, 6, 6))
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], plan)
        fully_shard(model, mesh=mesh["data"])
        assert len(messages(SpectralNormRegularizer(model, 0.1))) == expected
    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    assert len(messages(SpectralNormRegularizer(model, 0.1))) == 1


def test_on_a_hybrid_mesh_rows_take_one_all_reduce_and_columns_a_second_whatever_the_dimensions():
    on_ranks(4, counted_messages_of_a_hybrid_mesh)


def data_parallel_training() -> None:
    plain = mlp()
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    ours, truth = (SpectralNormRegularizer(m, 0.1, warmup=2) for m in (wrapped, plain))
    assert list(ours.sigma()) == list(truth.sigma())
    train(plain, truth)
    train(wrapped, ours)
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    ours.check_ranks()
    if dist.get_rank() == 1:
        ours._state.arrange()[0][0].vectors.vs[1][0, 0] += 1e-12
    with pytest.raises(RuntimeError, match=r"rank 1 differs from rank 0 in 2.weight. Build the model alike"):
        ours.check_ranks()


@pytest.mark.parametrize("ranks", [2, 3])
def test_data_parallel_ranks_stay_identical_and_the_check_names_the_one_that_does_not(ranks):
    on_ranks(ranks, data_parallel_training)


def write_or_go_on(folder: str, write: bool) -> None:
    """The first two of four steps, or the last two, beside an unsharded training of all four."""
    plain = mlp()
    settings = {"penalty": Square("start", factor=0.5), "steps": 0.5}
    truth = SpectralNormRegularizer(plain, 0.1, **settings)
    train(plain, truth, steps=2)
    sharded = copy.deepcopy(plain if not write else mlp())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ours = SpectralNormRegularizer(sharded, 0.1, seed=0 if write else 9, **settings)
    if write:
        train(sharded, ours, steps=2)
        checkpoint.save({"regularizer": ours}, checkpoint_id=folder)
        return
    checkpoint.load({"regularizer": ours}, checkpoint_id=folder)
    for name, saved in truth.state_dict()["vectors"].items():
        for key, value in saved.items():
            torch.testing.assert_close(ours.state_dict()["vectors"][name][key], value, rtol=1e-12, atol=1e-12)
    train(plain, truth, steps=2)
    train(sharded, ours, steps=2)
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p)


@pytest.mark.parametrize(("before", "after"), [(3, 2), (1, 2)])
def test_a_distributed_checkpoint_of_some_ranks_goes_on_on_others(before, after, tmp_path):
    on_ranks(before, write_or_go_on, str(tmp_path), True)
    on_ranks(after, write_or_go_on, str(tmp_path), False)


def layers_that_sharding_gives_another_class() -> None:
    def build():
        layers = nn.ModuleDict({"wide": nn.Linear(6, 1), "fused": gpt2_projection(), "sub": Plain(6, 1)})
        return seeded(lambda: layers)

    plain, sharded = build(), build()
    for layer in sharded.values():
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    assert type(sharded["fused"]) is not type(plain["fused"])
    for model in (plain, sharded):
        regularizer = SpectralNormRegularizer(model, 0.1, map={"fused.weight": 7}, warmup=100)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regularizer.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step()
        assert len(regularizer.sigma()) == 3
    assert_equal_to_unsharded(plain, sharded)


def test_layers_of_one_output_and_of_another_layout_count_alike_when_they_are_sharded():
    on_ranks(2, layers_that_sharding_gives_another_class)


def refusals() -> None:
    layer = nn.Conv1d(2, 2, 4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(2)]))
    with pytest.raises(NotImplementedError, match=r"placed S(hard)?\(.*2\): use Shard\(0\) or Shard\(1\)"):
        SpectralNormRegularizer(layer, 0.1).add_gradient()
    flat = FullyShardedDataParallel(nn.Linear(3, 3), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"wrapped in FSDP1 .* Use fully_shard"):
        SpectralNormRegularizer(flat, 0.1)
    for strategy in ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD:
        inner = FullyShardedDataParallel(
            nn.Linear(3, 3), device_id=torch.device("cpu"), use_orig_params=True, sharding_strategy=strategy
        )
        some = nn.Sequential(nn.Linear(3, 3), inner)  # whose other weights are plain, and would be all that is seen
        if strategy is ShardingStrategy.NO_SHARD:
            assert [w.name for w in SpectralNormRegularizer(some, 0.1).weights] == ["0.weight", "1.weight"]
            continue
        with pytest.raises(ValueError, match="module '1' is wrapped in FSDP1"):
            SpectralNormRegularizer(some, 0.1)


def test_what_cannot_be_sharded_is_refused_by_name():
    on_ranks(2, refusals)
