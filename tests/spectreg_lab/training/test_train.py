import copy

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from spectreg.weights.selection import named_weights
from spectreg_lab.data import Images, Split, batches, load
from spectreg_lab.settings.config import (
    NIN,
    VGG,
    Adversarial,
    Augmentation,
    Data,
    Decay,
    DenseNet,
    Jacobian,
    LayerwiseJacobian,
    Spectral,
    Vanilla,
)
from spectreg_lab.training.evaluation import evaluate, read, spectral_norms
from spectreg_lab.training.train import NonFiniteLossError, Training, learning_rate, train

pytestmark = pytest.mark.portable

METHODS = [Vanilla(), Decay(strength=0.01), Adversarial(), Spectral(strength=0.1)]
JACOBIAN = [Jacobian(), LayerwiseJacobian()]


def numbers(epoch):
    return {key: value for key, value in epoch.metrics.items() if key != "seconds"}


@pytest.mark.parametrize("method", METHODS + JACOBIAN, ids=lambda method: method.name)
@pytest.mark.parametrize(
    "model",
    [NIN(width=12), DenseNet(depth=7, growth=4), VGG(width=4, stages=(1, 1), hidden=8, dropout=0.3)],
    ids=lambda model: model.name,
)
def test_going_on_from_an_epoch_gives_the_very_numbers_of_never_having_stopped(tiny, fabric, method, model):
    data = Data(train_size=64, test_size=20, augmentation=Augmentation(pad=1, flip=True))
    config = tiny(method, model=model, data=data, batch_size=16, evaluate_every=2)
    images = load(config.data)
    whole = list(train(config, images, fabric, None))
    for done in (1, 2):
        rest = list(train(config, images, fabric, (done, whole[done - 1].tensors)))
        for epoch, again in zip(whole[done:], rest, strict=True):
            assert numbers(epoch) == numbers(again)
            assert epoch.tensors.keys() == again.tensors.keys()
            assert all(torch.equal(epoch.tensors[key], again.tensors[key]) for key in epoch.tensors)


def test_the_learning_rate_is_divided_by_ten_at_one_half_and_three_quarters(tiny):
    config = tiny(learning_rate=0.5, epochs=8)
    expected = [0.5] * 4 + [0.05] * 2 + [0.005] * 2
    np.testing.assert_allclose([learning_rate(config, epoch) for epoch in range(1, 9)], expected, rtol=1e-12)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 10, 150, 199, 200])
def test_the_rate_of_every_epoch_is_that_of_the_epochs_done_before_it_counted_in_whole_numbers(tiny, epochs):
    config = tiny(learning_rate=0.1, epochs=epochs)
    for done in range(epochs):
        divisor = 100 if 4 * done >= 3 * epochs else 10 if 2 * done >= epochs else 1
        assert learning_rate(config, done + 1) == pytest.approx(0.1 / divisor, rel=1e-12), done


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("micro_batch", [7, 16, 32])
def test_micro_batches_give_the_gradient_of_the_whole_batch_without_batch_normalization(
    tiny, fabric, method, micro_batch
):
    model = VGG(width=4, stages=(1, 1), hidden=8, batch_norm=False)
    data = load(tiny().data)
    weights = []
    for size in (micro_batch, 1000):
        config = tiny(method, model=model, micro_batch=size, precision="64-true")
        training = Training(config, data, fabric)
        for x, y in batches(training.train, 32, 0, 1):
            training.step(x, y)
        weights.append(training.tensors())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-9, atol=1e-12)


def test_three_epochs_of_nesterov_equal_the_formula_written_out(tiny, fabric):
    config = tiny(Vanilla(), model=VGG(width=2, stages=(1,), hidden=4, batch_norm=False), precision="64-true")
    training = Training(config, load(config.data), fabric)
    ours = copy.deepcopy(training.model)
    momentum = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    for epoch in (1, 2, 3):
        training.epoch(epoch)
        for x, y in batches(training.train, config.batch_size, config.seed, epoch):
            ours.zero_grad()
            cross_entropy(ours(x), y).backward()
            with torch.no_grad():
                for name, p in ours.named_parameters():
                    momentum[name] = 0.9 * momentum[name] + p.grad
                    p -= learning_rate(config, epoch) * (p.grad + 0.9 * momentum[name])
    for name, p in ours.named_parameters():
        torch.testing.assert_close(training.model.get_parameter(name), p, rtol=1e-9, atol=1e-12)


def test_loss_and_accuracy_are_those_of_the_whole_split_in_evaluation_mode(tiny, fabric):
    config = tiny()
    training = Training(config, load(config.data), fabric)
    training.epoch(1)
    loss, correct = evaluate(training.model, training.test, 7, fabric)
    assert not training.model.training
    scores = training.model(training.test.images)
    assert loss.item() == pytest.approx(cross_entropy(scores, training.test.labels, reduction="sum").item(), rel=1e-5)
    assert correct.item() == (scores.argmax(1) == training.test.labels).sum().item()


def test_evaluating_less_often_leaves_out_evaluations_and_changes_nothing_else(tiny, fabric):
    images = load(tiny().data)
    often, seldom = (list(train(tiny(epochs=5, evaluate_every=n), images, fabric, None)) for n in (1, 3))
    evaluated = {"train_loss", "train_accuracy", "test_loss", "test_accuracy"}
    assert [evaluated & set(epoch.metrics) for epoch in seldom] == [set(), set(), evaluated, set(), evaluated]
    for epoch, other in zip(seldom, often, strict=True):
        assert numbers(epoch) == {key: value for key, value in numbers(other).items() if key in epoch.metrics}
        assert all(torch.equal(epoch.tensors[key], other.tensors[key]) for key in other.tensors)


def test_an_epoch_tells_loss_accuracy_rate_seconds_and_the_true_norm_of_every_layer(tiny, fabric):
    config = tiny(epochs=1)
    (epoch,) = train(config, load(config.data), fabric, None)
    assert {"epoch", "objective", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds"} < set(
        epoch.metrics
    )
    for name, sigma in epoch.metrics["sigma"].items():
        weight = epoch.tensors[f"model/{name}"]
        assert sigma == pytest.approx(np.linalg.svd(weight.flatten(1).double().numpy(), compute_uv=False)[0], rel=1e-5)
    assert len(epoch.metrics["sigma"]) == 4


def weights_of_many_shapes():
    model = nn.ModuleDict(
        {
            "wide": nn.Linear(9, 4),
            "tall": nn.Linear(4, 9),
            "same": nn.Linear(7, 4),
            "kernel": nn.Conv2d(3, 5, 3),
            "grouped": nn.Conv2d(4, 6, 3, groups=2),
            "transposed": nn.ConvTranspose2d(3, 5, 2),
            "zero": nn.Linear(3, 3),
        }
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
        model["zero"].weight.zero_()
    return model


def test_the_norms_of_an_epoch_are_those_of_an_svd_of_every_block():
    model = weights_of_many_shapes()
    found = read(spectral_norms(model))
    assert list(found) == [weight.name for weight in named_weights(model)]
    for weight in named_weights(model):
        blocks = weight.map.matrices(weight.tensor.detach()).double().numpy()
        assert found[weight.name] == pytest.approx(np.linalg.svd(blocks, compute_uv=False).max(), rel=1e-12, abs=1e-30)


def test_the_norm_of_a_weight_that_is_not_finite_is_not_a_number_and_the_others_keep_theirs():
    model = weights_of_many_shapes()
    before = read(spectral_norms(model))
    with torch.no_grad():
        model["same"].weight[0, 0] = torch.inf
    after = read(spectral_norms(model))
    assert np.isnan(after.pop("same.weight"))
    assert all(after[name] == before[name] for name in after)


def test_spectral_records_its_own_estimates_beside_the_exact_norms(tiny, fabric):
    images = load(tiny().data)
    still = {"learning_rate": 1e-12, "epochs": 8}  # the weights stay where they are, so that estimates can converge
    (*_, last) = train(tiny(Spectral(), **still), images, fabric, None)
    exact, estimates = last.metrics["sigma"], last.metrics["sigma_estimate"]
    assert list(estimates) == list(exact)
    for name in exact:
        assert 0.98 * exact[name] < estimates[name] < exact[name] * (1 + 1e-6), name
    (*_, other) = train(tiny(Vanilla(), **still), images, fabric, None)
    assert "sigma_estimate" not in other.metrics


def test_spectral_lowers_every_norm_below_those_of_vanilla(tiny, fabric):
    images = load(Data(train_size=96, test_size=40))
    ends = [
        list(train(tiny(m, epochs=6), images, fabric, None))[-1].metrics["sigma"]
        for m in (Vanilla(), Spectral(strength=0.1))
    ]
    assert all(ends[1][name] < ends[0][name] for name in ends[0])


def test_a_loss_that_is_not_finite_ends_the_run_with_epoch_and_cause(tiny, fabric):
    config = tiny(learning_rate=1e30)
    with pytest.raises(
        NonFiniteLossError, match=r"epoch 1: the training (objective|loss) is (nan|inf); the learning rate 1e\+30"
    ):
        list(train(config, load(config.data), fabric, None))


def test_a_weight_that_is_not_finite_ends_the_run_though_no_evaluation_is_due(tiny, fabric, monkeypatch):
    def epoch(training, number):
        training.model[0][0].weight.data.fill_(torch.nan)
        return torch.ones(())

    monkeypatch.setattr(Training, "epoch", epoch)
    config = tiny(epochs=4, evaluate_every=4)
    with pytest.raises(NonFiniteLossError, match=r"epoch 1: the spectral norm of 0\.0\.weight is nan; the learning"):
        list(train(config, load(config.data), fabric, None))


class Reads(TorchDispatchMode):
    """Notes every operation that a device would have to stop for: a value, or a size that depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(self.NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS + JACOBIAN, ids=lambda method: method.name)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_step_of_an_epoch_reads_a_value_back(tiny, fabric, method, momentum):
    data = Data(train_size=96, test_size=40, augmentation=Augmentation(pad=1, flip=True))
    model = VGG(width=4, stages=(1, 1), hidden=8, dropout=0.3)
    config = tiny(method, model=model, data=data, momentum=momentum, micro_batch=20)
    training = Training(config, load(data), fabric)
    with Reads() as reads:
        total = training.epoch(1)
    assert reads.seen == []
    with Reads() as reads:
        assert total.item() > 0
    assert reads.seen == ["_local_scalar_dense"]


@pytest.mark.parametrize("method", [Vanilla(), Spectral(strength=0.1)], ids=lambda method: method.name)
def test_what_an_epoch_tells_is_read_from_the_device_in_one_piece(tiny, fabric, method):
    images = load(tiny().data)
    with Reads() as reads:
        epochs = list(train(tiny(method, epochs=2), images, fabric, None))
    assert len(epochs) == 2
    assert reads.seen == ["_local_scalar_dense"] * 2  # the end of the steps, for the clock; `read` takes a whole tensor


def noise(train, test):
    """Images without two equal pixels: a tie in a pooling may be broken either way."""
    draws = torch.Generator().manual_seed(0)
    splits = (Split(torch.randn(n, 1, 8, 8, generator=draws), torch.arange(n) % 10) for n in (train, test))
    return Images(*splits, 10)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_compiled_network_is_trained_to_the_same_numbers_to_rounding(tiny, fabric, method):
    images = noise(64, 32)
    eager, compiled = (
        list(train(tiny(method, compile=choice, epochs=2, precision="64-true", micro_batch=32), images, fabric, None))
        for choice in (False, True)
    )
    for epoch, other in zip(eager, compiled, strict=True):
        assert epoch.tensors.keys() == other.tensors.keys()
        for name, tensor in epoch.tensors.items():
            torch.testing.assert_close(other.tensors[name], tensor, rtol=1e-9, atol=1e-12)
        for name in ("objective", "train_loss", "test_loss", "train_accuracy", "test_accuracy"):
            assert other.metrics[name] == pytest.approx(epoch.metrics[name], rel=1e-9), name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_mixed_precision_keeps_weights_in_float32_and_trains_to_the_same_numbers_to_its_own_rounding(tiny, method):
    images, ends = noise(96, 32), []
    for precision in ("32-true", "bf16-mixed"):
        fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
        config = tiny(method, epochs=2, learning_rate=0.01, precision=precision)
        ends.append(list(train(config, images, fabric, None))[-1])
    full, mixed = ends
    assert all(tensor.dtype == full.tensors[name].dtype for name, tensor in mixed.tensors.items())
    assert mixed.metrics["train_loss"] == pytest.approx(full.metrics["train_loss"], rel=0.02)
    assert mixed.metrics["train_loss"] != full.metrics["train_loss"]
    for name, sigma in full.metrics["sigma"].items():
        assert mixed.metrics["sigma"][name] == pytest.approx(sigma, rel=0.02)
