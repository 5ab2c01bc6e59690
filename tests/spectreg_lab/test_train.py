import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from spectreg_lab.data import batches, load
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
from spectreg_lab.training.train import NonFiniteLossError, Training, evaluate, learning_rate, train

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
    config = tiny(method, model=model, data=data, batch_size=16)
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
    loss, accuracy = evaluate(training.model, training.test, 7, fabric)
    training.model.eval()
    scores = training.model(training.test.images)
    assert loss == pytest.approx(cross_entropy(scores, training.test.labels).item(), rel=1e-5)
    assert accuracy == (scores.argmax(1) == training.test.labels).double().mean().item()


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
