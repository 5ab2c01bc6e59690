"""Sharded weights on two and three processes, against the same model unsharded in each of them."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from cases import mlp, seeded
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from spectreg import SpectralNormRegularizer

pytestmark = pytest.mark.slow


def attention_and_convolution() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.MultiheadAttention(6, 2), nn.Conv2d(4, 6, 3, groups=2), nn.Linear(7, 1)))


def train(model: nn.Module, regularizer: SpectralNormRegularizer, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    regularizer.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def assert_equal_to_unsharded(plain: nn.Module, sharded: nn.Module) -> None:
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(getattr(q, "full_tensor", lambda q=q: q)(), p, msg=lambda m, n=name: f"{n}: {m}")


def fsdp_training(variants: list[dict]) -> None:
    for settings in variants:
        plain = mlp()
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
    on_ranks(ranks, fsdp_training, [{}, {"steps": 0.5}, {"k": 2}, {"decoupled": True}, {"penalty": "hinge"}])


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
    on_ranks(2, tensor_parallel_training, [{}, {"steps": 0.5}, {"k": 2}])


def hybrid_training() -> None:
    plain = mlp(widths=(5, 8, 6, 6))
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(sharded, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(sharded, mesh=mesh["data"])
    ours, truth = (SpectralNormRegularizer(m, 0.1, warmup=2) for m in (sharded, plain))
    train(plain, truth)
    train(sharded, ours)
    assert_equal_to_unsharded(plain, sharded)


def test_training_on_a_hybrid_mesh_of_data_and_tensor_parallel_equals_the_unsharded_training():
    on_ranks(4, hybrid_training)


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


def counted_collectives() -> None:
    sharded = mlp()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    regularizer = SpectralNormRegularizer(sharded, 0.1)
    regularizer.add_gradient()
    sizes, all_reduce = [], dist.all_reduce

    def noting(message, **keywords):
        sizes.append(message.numel())
        return all_reduce(message, **keywords)

    dist.all_reduce = noting
    with CommDebugMode() as collectives:
        regularizer.add_gradient()
    dist.all_reduce = all_reduce
    assert collectives.get_total_counts() == len(sizes) == 1
    assert sizes[0] <= sum(sum(w.tensor.shape) for w in regularizer.weights)


def test_all_layers_share_one_all_reduce_of_vectors_in_a_step_and_nothing_else_is_sent():
    on_ranks(2, counted_collectives)


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
        ours._memories["2.weight"].v[0, 0, 0] += 1e-12
    with pytest.raises(RuntimeError, match=r"rank 1 differs from rank 0 in 2.weight. Build the model alike"):
        ours.check_ranks()


@pytest.mark.parametrize("ranks", [2, 3])
def test_data_parallel_ranks_stay_identical_and_the_check_names_the_one_that_does_not(ranks):
    on_ranks(ranks, data_parallel_training)


def write_or_go_on(folder: str, write: bool) -> None:
    plain = mlp()
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ours, truth = (SpectralNormRegularizer(m, 0.1, steps=0.5, seed=0 if write else 9) for m in (sharded, plain))
    if write:
        ours.add_gradient()
        checkpoint.save({"regularizer": ours.state_dict()}, checkpoint_id=folder)
        return
    state = {"regularizer": ours.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    ours.load_state_dict(state["regularizer"])
    truth = SpectralNormRegularizer(plain, 0.1, steps=0.5)
    truth.add_gradient()
    truth.add_gradient()
    ours.add_gradient()
    for name, sigma in truth.sigma().items():
        torch.testing.assert_close(ours.sigma()[name], sigma)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_a_distributed_checkpoint_of_some_ranks_goes_on_on_others(before, after, tmp_path):
    on_ranks(before, write_or_go_on, str(tmp_path), True)
    on_ranks(after, write_or_go_on, str(tmp_path), False)


def refusals() -> None:
    sharded = nn.Sequential(nn.ConvTranspose2d(2, 2, 3), nn.Linear(2, 2))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with pytest.raises(NotImplementedError, match="of a transposed convolution: only matrix views"):
        SpectralNormRegularizer(sharded, 0.1).add_gradient()
    with pytest.raises(RuntimeError, match=r"weight '1.weight' is sharded: use add_gradient\(\) or attach\(\)"):
        SpectralNormRegularizer(sharded, 0.1, select=lambda name, _: name == "1.weight").penalty()
    flat = FullyShardedDataParallel(nn.Linear(3, 3), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="flat parameter of FSDP1"):
        SpectralNormRegularizer(flat, 0.1)


def test_what_cannot_be_sharded_is_refused_by_name():
    on_ranks(2, refusals)
