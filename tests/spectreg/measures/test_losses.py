"""What the loss of several batches is: the loss of all their examples together, whatever it is the mean of."""

import copy
import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from cases import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import spectreg
from spectreg import (
    BatchLoss,
    adversarial_loss,
    hessian_top_eigenvalues,
    input_gradient_norm,
    jacobian_norm,
    perturbation_curve,
)


def randn(*shape: int, seed: int = 0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def classes(*shape: int, seed: int = 0):
    return torch.randint(3, shape, generator=torch.Generator().manual_seed(seed))


def linear(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)).double()


class Rows(nn.Module):
    """Token outputs as rows, as language models flatten them."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).flatten(0, 1)


class Recurrent(nn.Module):
    """Time first, as ``nn.RNN`` has it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.RNN(4, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class FromMapping(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, given):
        return {"logits": self.inner(given["x"]), "name": "outputs"}


def by_token(output, y):
    return F.cross_entropy(output.flatten(0, 1), y.flatten())


def masked(output, y):
    """A mask with a branch of its own, which vmap cannot follow."""
    keep = y >= 0
    return F.cross_entropy(output[keep], y[keep]) if keep.any() else output.sum() * 0


def squared_hinge(output, y):
    """Flat for about half of the examples."""
    return (output[:, 0] * y - 0.1).relu().square().mean()


WEIGHT = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
ignored = torch.where(torch.arange(12) % 4 == 1, -100, classes(12))
padded = torch.where(torch.arange(5) < torch.tensor([[1], [2], [3], [4], [5], [5], [2], [3]]), classes(8, 5), -100)
# Model, loss, inputs, targets, and the dimension along which batches are cut.
CASES = {
    "classes": (linear(), F.cross_entropy, randn(12, 4), classes(12), 0),
    "class weights": (linear(), nn.CrossEntropyLoss(weight=WEIGHT), randn(12, 4), classes(12), 0),
    "ignored targets": (linear(), F.cross_entropy, randn(12, 4), ignored, 0),
    "both": (linear(), nn.CrossEntropyLoss(weight=WEIGHT), randn(12, 4), ignored, 0),
    "a mask": (linear(), masked, randn(12, 4), ignored, 0),
    "label smoothing": (linear(), nn.CrossEntropyLoss(label_smoothing=0.1), randn(12, 4), classes(12), 0),
    "soft labels": (linear(), F.cross_entropy, randn(12, 4), randn(12, 3, seed=1).softmax(1), 0),
    "one-hot labels": (linear(), F.cross_entropy, randn(12, 4), F.one_hot(classes(12), 3).double(), 0),
    "one logit": (
        linear(1), nn.BCEWithLogitsLoss(pos_weight=WEIGHT[:1]), randn(12, 4), (classes(12) > 0).double()[:, None], 0
    ),
    "regression": (linear(2), F.mse_loss, randn(12, 4), randn(12, 2, seed=1), 0),
    "an exact fit": (linear(2), F.mse_loss, randn(12, 4), linear(2)(randn(12, 4)).detach(), 0),
    "hinge": (linear(1), squared_hinge, randn(12, 4), classes(12).double() - 1, 0),
    "tokens": (linear(), by_token, randn(8, 5, 4), classes(8, 5), 0),
    "tokens with padding": (linear(), by_token, randn(8, 5, 4), padded, 0),
    "flat rows": (Rows(linear()), lambda o, y: F.cross_entropy(o, y.flatten()), randn(8, 5, 4), classes(8, 5), 0),
    "time first": (Recurrent(), by_token, randn(5, 8, 4), classes(5, 8), 1),
    "several outputs": (
        FromMapping(linear()), lambda o, y: F.cross_entropy(o["logits"], y), {"x": randn(12, 4)}, classes(12), 0
    ),
}  # fmt: skip


def cut(x, sizes, dim):
    if isinstance(x, dict):
        return [{key: part} for key, value in x.items() for part in cut(value, sizes, dim)]
    return x.split(sizes, dim)


def batches_of(x, y, dim, cuts):
    n = len(cuts) and y.shape[dim]
    edges = sorted({0, n, *(c % n for c in cuts)}) if n else []
    sizes = [b - a for a, b in itertools.pairwise(edges)] or [y.shape[dim]]
    return list(zip(cut(x, sizes, dim), cut(y, sizes, dim), strict=True))


def largest_eigenvalue(model, loss_fn, x, y):
    """Of the dense Hessian of the loss of all examples as one batch."""
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    sizes = [shape.numel() for shape in shapes]

    def loss(flat):
        parts = flat.split(sizes)
        values = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return loss_fn(torch.func.functional_call(model, values, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    H = torch.autograd.functional.hessian(loss, flat)
    return torch.linalg.eigvalsh((H + H.T) / 2)[-1].item()


@functools.cache
def largest_eigenvalue_of(name):
    model, loss_fn, x, y, _ = CASES[name]
    return largest_eigenvalue(model, loss_fn, x, y)


@pytest.mark.parametrize("name", CASES)
@given(cuts=st.lists(st.integers(1, 11), max_size=3))
@settings(max_examples=4, deadline=None)
def test_the_hessian_is_that_of_the_loss_of_all_examples_however_they_are_cut(name, cuts):
    model, loss_fn, x, y, dim = CASES[name]
    measured = hessian_top_eigenvalues(model, loss_fn, batches_of(x, y, dim, cuts), tolerance=1e-8)
    assert measured.values[0] == pytest.approx(largest_eigenvalue_of(name), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "several outputs"])
@given(cuts=st.lists(st.integers(1, 11), max_size=3))
@settings(max_examples=4, deadline=None)
def test_the_input_gradient_sums_the_lengths_of_the_gradient_of_the_loss_of_all(name, cuts):
    model, loss_fn, x, y, dim = CASES[name]
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_fn(model(leaf), y), leaf)
    truth = g.movedim(dim, 0).flatten(1).norm(dim=1).sum().item()
    measured = input_gradient_norm(model, loss_fn, batches_of(x, y, dim, cuts))
    assert measured.value == pytest.approx(truth, rel=1e-9, abs=1e-15)
    left_out = int((y == -100).sum()) if y.ndim == 1 else 0
    assert measured.examples == x.shape[dim] - left_out


ROWS = [name for name in CASES if name not in ("several outputs", "flat rows", "time first")]


@pytest.mark.parametrize("name", ROWS)
@given(cuts=st.lists(st.integers(1, 11), max_size=3))
@settings(max_examples=4, deadline=None)
def test_at_radius_zero_the_perturbed_loss_is_that_of_all_examples(name, cuts):
    model, loss_fn, x, y, dim = CASES[name]
    (point,) = perturbation_curve(model, loss_fn, batches_of(x, y, dim, cuts), [0.0], "pgd", steps=1)
    assert point.loss == pytest.approx(loss_fn(model(x), y).item(), rel=1e-9, abs=1e-15)


def test_the_accuracy_is_that_of_the_examples_that_count():
    model, x = linear(), randn(12, 4)
    (point,) = perturbation_curve(model, F.cross_entropy, [(x, ignored)], [0.0])
    assert point.accuracy == (model(x).argmax(1) == ignored)[ignored >= 0].double().mean()
    assert point.examples == 9


@pytest.mark.parametrize("label", [lambda y: F.one_hot(y, 3), lambda y: 0.9 * F.one_hot(y, 3) + 0.1 / 3])
def test_rows_that_add_up_to_one_are_classes(label):
    model, x, y = linear(), randn(12, 4), classes(12)
    (point,) = perturbation_curve(model, F.cross_entropy, [(x, label(y).double())], [0.0])
    assert point.accuracy == (model(x).argmax(1) == y).double().mean()


@pytest.mark.parametrize("shape", [(12, 1), (12,)])
@pytest.mark.parametrize(
    ("loss_fn", "last"),
    [
        (nn.BCEWithLogitsLoss(), nn.Identity()),
        (nn.BCELoss(), nn.Sigmoid()),
        (lambda o, y: F.soft_margin_loss(o, 2 * y - 1), nn.Identity()),
    ],
)
def test_a_single_output_answers_with_the_class_of_the_smaller_loss(shape, loss_fn, last):
    net = linear(1)
    model, x, y = (
        nn.Sequential(net, last, nn.Flatten(0) if len(shape) == 1 else nn.Identity()),
        randn(12, 4),
        classes(12) > 0,
    )
    (point,) = perturbation_curve(model, loss_fn, [(x, y.double().view(shape))], [0.0])
    assert point.accuracy == ((net(x)[:, 0] > 0) == y).double().mean()


def test_a_sum_is_divided_by_its_targets():
    model, x, y = linear(), randn(12, 4), classes(12)
    loss = nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum")
    truth = largest_eigenvalue(model, lambda o, t: loss(o, t) / 12, x, y)
    parts = list(zip(x.split([5, 4, 3]), y.split([5, 4, 3]), strict=True))
    assert hessian_top_eigenvalues(model, loss, parts, tolerance=1e-8).values[0] == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("ignored", [255, 1])
def test_a_sum_that_leaves_out_targets_is_refused_and_one_whose_terms_are_flat_here_is_not(ignored):
    model, x, y = linear(), randn(12, 4), classes(12)
    y[:5] = ignored
    loss = nn.CrossEntropyLoss(ignore_index=ignored, reduction="sum")
    with pytest.raises(ValueError, match=r"a sum that leaves out some targets .* reduction='mean'"):
        input_gradient_norm(model, loss, [(x, y)])
    easy = lambda o, y: F.multi_margin_loss(100 * o, y, reduction="sum")  # noqa: E731
    leaf, y = x.clone().requires_grad_(), model(x).argmax(1)
    (g,) = torch.autograd.grad(easy(model(leaf), y), leaf)
    truth = g.norm(dim=1).mean().item()
    assert (g.norm(dim=1) == 0).any()
    assert input_gradient_norm(model, easy, [(x, y)]).value == pytest.approx(truth, rel=1e-9)


def test_a_loss_without_a_second_derivative_is_named():
    with pytest.raises(ValueError, match=r"no second derivative, so there is no Hessian: .*multi_margin_loss"):
        hessian_top_eigenvalues(linear(), F.multi_margin_loss, [(randn(4, 4), classes(4))])


def test_a_loss_that_cannot_take_one_example_alone_is_named_with_the_cure():
    loss, batch = lambda o, y: F.binary_cross_entropy_with_logits(o.squeeze(), y), (randn(5, 4), randn(5).sign().relu())
    with pytest.raises(ValueError, match=r"fails on one example by itself .*squeeze\(1\)"):
        input_gradient_norm(linear(1), loss, [batch])


CONTRASTIVE = lambda o, y: torch.logsumexp(o @ o.T, 1).mean()  # noqa: E731
MEASURES = {
    "hessian": lambda model, loss, batches: hessian_top_eigenvalues(model, loss, batches),
    "input gradient": lambda model, loss, batches: input_gradient_norm(model, loss, batches),
    "perturbation": lambda model, loss, batches: perturbation_curve(model, loss, batches, [1.0], "gradient"),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize(
    "loss_fn",
    [
        CONTRASTIVE,
        lambda o, y: F.cross_entropy(o, y).sqrt(),
        lambda o, y: F.cross_entropy(o, y, reduction="none").amax(),
        lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(o) ** 0.5,
    ],
    ids=["contrastive", "root", "maximum", "half a mean"],
)
def test_a_loss_that_is_no_mean_and_no_sum_is_refused(measure, loss_fn):
    x, y = randn(12, 4), classes(12)
    with pytest.raises(ValueError, match=r"neither the mean nor the sum of terms .* spectreg\.BatchLoss"):
        measure(linear(), loss_fn, list(zip(x.split(5), y.split(5), strict=True)))


class Own(nn.Module):
    """Gives its loss itself."""

    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        return self.inner(x).square().mean()


def test_a_model_that_gives_its_loss_is_right_on_one_batch_and_refused_on_several():
    def given(output, y):
        return output

    x, y = randn(12, 4), classes(12)
    truth = largest_eigenvalue(Own(), given, x, y)
    assert hessian_top_eigenvalues(Own(), given, [(x, y)], tolerance=1e-8).values[0] == pytest.approx(truth, rel=1e-9)
    with pytest.raises(
        ValueError,
        match=r"no output with rows does anything to the loss, so that batches cannot be weighed: .*BatchLoss",
    ):
        hessian_top_eigenvalues(Own(), given, [(x[:5], y[:5]), (x[5:], y[5:])])


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = linear()

    def forward(self, x):
        output = self.inner(x)
        return output, 2 * output, output.sum()


def test_outputs_of_several_shapes_are_weighed_by_those_with_rows():
    def loss(output, y):
        return F.cross_entropy(output[0], y) + 0.4 * F.cross_entropy(output[1], y)

    x, y = randn(12, 4), classes(12)
    truth = largest_eigenvalue(Auxiliary(), loss, x, y)
    measured = hessian_top_eigenvalues(Auxiliary(), loss, [(x[:5], y[:5]), (x[5:], y[5:])], tolerance=1e-8)
    assert measured.values[0] == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_data_in_which_no_target_counts_is_refused(measure):
    with pytest.raises(ValueError, match="no target counts in it"):
        measure(linear(), F.cross_entropy, [(randn(4, 4), torch.full((4,), -100))])


def test_a_batch_in_which_no_target_counts_changes_nothing():
    model, x, y = linear(), randn(12, 4), classes(12)
    nothing = (randn(5, 4, seed=3), torch.full((5,), -100))
    for batches in ([nothing, (x, y)], [(x, y), nothing], [(x[:5], y[:5]), nothing, (x[5:], y[5:])]):
        for name, measure in MEASURES.items():
            ours, alone = measure(model, F.cross_entropy, batches), measure(model, F.cross_entropy, [(x, y)])
            ours, alone = (vars(r[0] if name == "perturbation" else r) for r in (ours, alone))
            assert ours == {key: pytest.approx(value, rel=1e-9, nan_ok=True) for key, value in alone.items()}


def test_padded_batches_of_several_lengths_are_refused_and_right_once_counted():
    model = linear()
    batches = [(randn(3, 5, 4), classes(3, 5)), (randn(2, 7, 4, seed=1), classes(2, 7, seed=1))]
    with pytest.raises(ValueError, match=r"cannot be weighed against each other: .*BatchLoss"):
        hessian_top_eigenvalues(model, by_token, batches)
    loss = BatchLoss(lambda model, batch: (by_token(model(batch[0]), batch[1]), batch[1].numel()))
    x, y = (torch.cat([batch[i].flatten(0, 1) for batch in batches]) for i in (0, 1))
    truth = largest_eigenvalue(model, F.cross_entropy, x, y)
    assert hessian_top_eigenvalues(model, loss, batches, tolerance=1e-8).values[0] == pytest.approx(truth, rel=1e-9)


def counted(model, batch):
    loss = F.cross_entropy(model(batch["x"]), batch["y"], weight=WEIGHT)
    return loss, WEIGHT[batch["y"][batch["y"] >= 0]].sum()


def mappings(x, y, size=5):
    return [{"x": a, "y": b} for a, b in zip(x.split(size), y.split(size), strict=True)]


@pytest.mark.parametrize("y", [classes(12), ignored], ids=["all", "some"])
def test_a_loss_of_model_and_batch_gives_what_the_loss_of_outputs_gives(y):
    model, x = linear(), randn(12, 4)
    loss_fn = nn.CrossEntropyLoss(weight=WEIGHT)
    for name, measure in MEASURES.items():
        ours = measure(model, BatchLoss(counted), mappings(x, y))
        pairs = measure(model, loss_fn, [(x, y)])
        if name == "hessian":
            assert ours.values == pytest.approx(pairs.values, rel=1e-3)
        elif name == "input gradient":
            assert ours.value == pytest.approx(pairs.value, rel=1e-12)
        else:
            assert ours[0].loss == pytest.approx(pairs[0].loss, rel=1e-12)
            assert ours[0].stretch == pytest.approx(pairs[0].stretch, rel=1e-12)
            assert ours[0].examples == pairs[0].examples
            assert math.isnan(ours[0].accuracy)
    whole = {"x": x, "y": y}
    ours = adversarial_loss(model, BatchLoss(counted), whole)
    torch.testing.assert_close(ours, adversarial_loss(model, loss_fn, x, y))
    assert whole["x"] is x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, b: F.cross_entropy(m(b["x"]), b["y"]), "several batches the function must return"),
        (lambda m, b: (F.cross_entropy(m(b["x"]), b["y"], reduction="sum"), 5), "returns the sum of its terms"),
        (lambda m, b: (F.cross_entropy(m(b["x"]), b["y"]), -1), "the count is -1.0"),
        (lambda m, b: (F.cross_entropy(m(b["x"]), b["y"]), 1, 2), "gave 3 values"),
        (lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none"), "must be a scalar"),
    ],
)
def test_a_wrong_batch_loss_is_named(function, message):
    def halves(m, b):
        result = function(m, b)
        return (result[0], len(b["x"])) if isinstance(result, tuple) and result[1] == 5 else result

    with pytest.raises(ValueError, match=message):
        hessian_top_eigenvalues(linear(), BatchLoss(halves), mappings(randn(12, 4), classes(12)))


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize(
    "function",
    [
        lambda m, b: (F.cross_entropy(m(b["x"]), b["y"]), len(b["y"])),
        lambda m, b: (F.cross_entropy(m(b["x"]), b["y"], weight=WEIGHT), (b["y"] >= 0).sum()),
        lambda m, b: (F.mse_loss(m(b["x"]), m(b["x"]).mean(0).expand(len(b["x"]), -1)), len(b["x"])),
    ],
    ids=["ignored targets counted", "class weights not counted", "a spread"],
)
def test_counts_that_are_not_those_of_the_mean_are_refused_on_several_batches(measure, function):
    x = randn(12, 4)
    batches = mappings(x, ignored.where(torch.arange(12) > 2, 0))
    with pytest.raises(
        ValueError, match=r"BatchLoss: .*(not their mean by these counts|the mean over its examples by)"
    ):
        measure(linear(), BatchLoss(function), batches)


class Named(NamedTuple):
    x: torch.Tensor
    target: torch.Tensor


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_a_batch_may_be_a_named_tuple(measure):
    loss = BatchLoss(lambda model, batch: (F.cross_entropy(model(batch.x), batch.target), len(batch.x)))
    ours, plain = (
        measure(linear(), loss, [Named(randn(8, 4), classes(8))]),
        measure(
            linear(),
            BatchLoss(lambda model, batch: (F.cross_entropy(model(batch[0]), batch[1]), len(batch[0]))),
            [(randn(8, 4), classes(8))],
        ),
    )
    assert repr(ours) == repr(plain)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(zip(randn(12, 4), classes(12), strict=True))


@pytest.mark.parametrize("size", [5, 12])
def test_a_loader_without_a_length_has_a_hessian(size):
    loader = torch.utils.data.DataLoader(Stream(), batch_size=size)
    truth = largest_eigenvalue(linear(), F.cross_entropy, randn(12, 4), classes(12))
    measured = hessian_top_eigenvalues(linear(), F.cross_entropy, loader, tolerance=1e-8)
    assert measured.values[0] == pytest.approx(truth, rel=1e-7)


def test_counts_of_batches_with_time_first_are_compared_along_their_examples():
    model, x, y = Recurrent(), randn(4, 6, 4), classes(4, 6)
    loss = BatchLoss(lambda m, b: (by_token(m(b["x"]), b["y"]), b["y"].numel()))
    batches = [{"x": a, "y": b} for a, b in zip(x.split((2, 4), 1), y.split((2, 4), 1), strict=True)]
    ours = hessian_top_eigenvalues(model, loss, batches, tolerance=1e-8)
    assert ours.values[0] == pytest.approx(largest_eigenvalue(model, by_token, x, y), rel=1e-8)


def test_of_a_single_batch_the_count_does_not_matter():
    wrong = BatchLoss(lambda m, b: (F.cross_entropy(m(b["x"]), b["y"]), len(b["y"])))
    x = randn(12, 4)
    ours = hessian_top_eigenvalues(linear(), wrong, mappings(x, ignored, 12), tolerance=1e-8)
    assert ours.values[0] == pytest.approx(largest_eigenvalue(linear(), F.cross_entropy, x, ignored), rel=1e-9)


def test_the_input_of_a_batch_with_several_candidates_has_to_be_named():
    batch = {"x": randn(4, 4), "z": randn(4, 4)}
    function = lambda model, b: (model(b["x"] + 2 * b["z"]).square().mean(), 4)  # noqa: E731
    with pytest.raises(ValueError, match=r"2 floating point tensors \(x, z\)"):
        input_gradient_norm(linear(), BatchLoss(function), [batch])
    x, z = (input_gradient_norm(linear(), BatchLoss(function, input=name), [batch]).value for name in "xz")
    assert z == pytest.approx(2 * x)


def test_a_perturbation_of_time_first_inputs_is_refused_and_the_adversarial_loss_finds_their_examples():
    model, loss_fn, x, y, _ = CASES["time first"]
    with pytest.raises(ValueError, match="along the second dimension"):
        perturbation_curve(model, loss_fn, [(x, y)], [1.0])
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_fn(model(leaf), y), leaf)
    eta = 0.3 * g / g.norm(dim=(0, 2), keepdim=True)
    truth = (loss_fn(model(x), y) + loss_fn(model(x + eta), y)) / 2
    torch.testing.assert_close(adversarial_loss(model, loss_fn, x, y, 0.3), truth)


class Sums(nn.Module):
    """Time first: sums what it finds at each time."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(2)).tanh().sum(0)


class Turned(nn.Sequential):
    def forward(self, x):
        return super().forward(x.T)


@pytest.mark.parametrize(
    ("model", "shape"),
    [(Sums(nn.Linear(6, 3)), (4, 4, 2, 3)), (Sums(nn.Linear(6, 3)), (3, 4, 2, 3)), (Turned(linear()), (4, 5))],
    ids=["as long as wide", "time, examples, two more", "features first"],
)
def test_the_adversarial_loss_finds_examples_along_the_second_dimension(model, shape):
    model, x, y = model.double(), randn(*shape), classes(shape[1])
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    eta = 0.3 * g / torch.linalg.vector_norm(g, dim=[d for d in range(x.ndim) if d != 1], keepdim=True)
    truth = (F.cross_entropy(model(x), y) + F.cross_entropy(model(x + eta), y)) / 2
    torch.testing.assert_close(adversarial_loss(model, F.cross_entropy, x, y, 0.3), truth)


class Coupled(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("name", ["input gradient", "perturbation"])
def test_examples_that_influence_each_other_have_no_gradient_of_their_own(name):
    with pytest.raises(ValueError, match="depends on more than one example of its batch"):
        MEASURES[name](nn.Sequential(Coupled(), linear()), F.cross_entropy, [(randn(6, 4), classes(6))])


def hinge(output, y):
    return (1 - (2 * y - 1) * output.squeeze(1)).relu().mean()


def sure(x: int, outputs: int = 2, scale: float = 1.0):
    """A linear model of the first of ``x`` inputs, sure of itself where that is large."""
    model = nn.Linear(x, outputs, bias=False)
    model.weight.data.zero_()
    model.weight.data[:, 0] = scale * torch.tensor([-1.0, 1.0])[-outputs:]
    return model


def doubtless(margin: float):
    """Inputs and targets, a third of which are wrong, and 10 rows whose logits are ``2·margin`` apart."""
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()
    x[:10, 0], y[:10], y[20:50] = margin, 1, 1 - y[20:50]
    return x, y


@pytest.mark.parametrize(
    ("loss_fn", "model", "x", "y"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 20.0])), sure(2, scale=400.0), *doubtless(1.0)),
        (F.cross_entropy, sure(2), *doubtless(60.0)),
        (F.cross_entropy, sure(2).half(), *doubtless(20.0)),
        (hinge, sure(2, 1).bfloat16(), *doubtless(3.0)),
        (lambda o, y: F.multi_margin_loss(100 * o, y, weight=torch.tensor([1.0, 20.0])), sure(2), *doubtless(3.0)),
    ],
    ids=["class weights", "classes", "half precision", "hinge", "margins"],
)
def test_examples_whose_loss_is_flat_count_as_the_others(loss_fn, model, x, y):
    x = x.to(model.weight.dtype)
    xi = F.normalize(torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)), dim=1)
    for radius in (0.0, 1.0):
        (point,) = perturbation_curve(model, loss_fn, [(x, y)], [radius])
        output = model(x + radius * xi).float()
        rounding = 1e-5 if x.dtype == torch.float32 else 1e-2
        assert point.loss == pytest.approx(loss_fn(output, y).item(), rel=rounding)
        assert point.examples == 100
        if model.out_features == 2:
            assert point.accuracy == pytest.approx((output.argmax(1) == y).double().mean().item())


def test_a_loss_that_takes_no_outputs_near_one_half_is_measured():
    def far(output, y):
        if output.abs().min() < 1:
            raise RuntimeError("out of range")
        return hinge(output, y)

    x = torch.tensor([[-3.0], [3.0], [4.0], [-5.0]])
    y = torch.tensor([0.0, 0.0, 1.0, 1.0])
    (point,) = perturbation_curve(sure(1, 1), far, [(x, y)], [0.0])
    assert (point.loss, point.examples) == (pytest.approx((4 + 6) / 4), 4)


def test_weights_that_nothing_tells_are_refused():
    def loss(output, y):  # flat wherever the target is 0
        weight = 1 + torch.arange(3)[y]
        return (weight * y * output.squeeze(1)).sum() / weight.sum()

    with pytest.raises(ValueError, match="where their loss is flat it cannot be told"):
        input_gradient_norm(linear(1), loss, [(randn(12, 4), classes(12))])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MEASURES)
def test_a_root_is_refused_in_every_precision(name, dtype):
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1).to(dtype), torch.randn(16, 3), torch.randn(16, 1)
    x[8:] *= 2.5
    x, y = x.to(dtype), y.to(dtype)
    with pytest.raises(ValueError, match="neither the mean nor the sum of terms"):
        MEASURES[name](model, lambda o, t: F.mse_loss(o, t).sqrt(), [(x[:8], y[:8]), (x[8:], y[8:])])


@pytest.mark.parametrize("name", MEASURES)
def test_a_loss_with_weights_in_half_precision_is_taken_in_half_precision(name):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([2.0, 1.0, 0.5], dtype=torch.bfloat16))
    MEASURES[name](nn.Linear(4, 3).bfloat16(), loss, [(torch.randn(8, 4).bfloat16(), classes(8))])


class LastStep(nn.Module):
    """Time first; about half of the outputs are zero and have no slope."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1]).relu()


@pytest.mark.parametrize("seed", range(30))
def test_examples_are_found_where_many_outputs_are_zero(seed):
    torch.manual_seed(seed)
    model = LastStep().double()
    x, y = randn(6, 8, 4), randn(8, 5, seed=1)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.mse_loss(model(leaf), y), leaf)
    truth = g.norm(dim=(0, 2)).sum().item()
    assert input_gradient_norm(model, F.mse_loss, [(x, y)]).value == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_examples_that_influence_each_other_are_refused_where_many_outputs_are_zero(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU()).double()
    x, y = randn(8, 4), randn(8, 6)
    for measure in (MEASURES["input gradient"], MEASURES["perturbation"], lambda m, *_: jacobian_norm(m, x)):
        with pytest.raises(ValueError, match="depends on more than one example"):
            measure(model, F.mse_loss, [(x, y)])


class Fields(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, ids, mask=None):
        return self.inner(ids)


def test_a_mapping_becomes_the_arguments_of_a_model_that_takes_them_so():
    x, y = randn(12, 4), classes(12)
    batches = [({"ids": x, "mask": torch.ones(12)}, y)]
    ours = hessian_top_eigenvalues(Fields(linear()), F.cross_entropy, batches, tolerance=1e-8)
    assert ours.values[0] == pytest.approx(largest_eigenvalue(linear(), F.cross_entropy, x, y), rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_measures_work_in_inference_mode(measure):
    model, x, y = linear(), randn(12, 4), classes(12)
    expected = repr(measure(model, F.cross_entropy, [(x, y)]))
    with torch.inference_mode():
        assert repr(measure(model, F.cross_entropy, [(x + 0, y + 0)])) == expected
        assert torch.is_inference_mode_enabled()
        assert spectreg.jacobian_norm(model, x + 0).converged.all()


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_weights_that_are_not_there_are_named(measure):
    model, batches = linear().to("meta"), [(randn(12, 4), classes(12))]
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is on the meta device and has no values: offloaded"):
        measure(model, F.cross_entropy, batches)
    partly = linear()
    partly[2].to("meta")
    with pytest.raises(ValueError, match=r"parameter '2\.weight' is on the meta device"):
        measure(partly, F.cross_entropy, batches)
    with torch.inference_mode():
        model = linear()
    with pytest.raises(ValueError, match=r"parameter '0\.weight' was made in torch\.inference_mode"):
        measure(model, F.cross_entropy, batches)


@pytest.mark.parametrize(
    "parametrize",
    [
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=1),
        lambda layer: nn.utils.weight_norm(layer),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_second_derivative_that_is_not_symmetric_is_refused_and_its_parametrization_named(parametrize, dtype):
    model = copy.deepcopy(linear())
    parametrize(model[0])
    x, y = randn(12, 4).to(dtype), classes(12)
    with pytest.raises(ValueError, match=r"second derivative is not symmetric .*look at the parametrization of 0\."):
        hessian_top_eigenvalues(model.to(dtype), F.cross_entropy, [(x[:6], y[:6]), (x[6:], y[6:])])


@pytest.mark.parametrize("margin", [12, 14])
def test_the_hessian_of_a_network_that_fits_well_is_measured_though_rounding_makes_it_unequal(margin):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)), torch.randn(2000, 4)
    with torch.no_grad():
        model[2].weight.mul_(24)
        output = model(x)
        best, second = output.topk(2, 1).values.unbind(1)
        sure = (best - second - margin).abs().argsort()[:4]
        x, y = x[sure], output[sure].argmax(1)
    truth = hessian_top_eigenvalues(copy.deepcopy(model).double(), F.cross_entropy, [(x.double(), y)]).values[0]
    top = hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)])
    assert top.values[0] == pytest.approx(truth, rel=1e-2)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("scale", [28, 32, 40])
def test_a_hessian_that_float32_cannot_hold_is_refused_and_measured_in_float64(scale):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)), torch.randn(2000, 4)
    with torch.no_grad():
        model[2].weight.mul_(scale)
        best, second = (output := model(x)).topk(2, 1).values.unbind(1)
        sure = (best - second).argsort()[-4:]
        x, y = x[sure], output[sure].argmax(1)
    with pytest.raises(ValueError, match=r"lost in rounding .*model\.double"):
        hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)])
    model, x = model.double(), x.double()
    truth = largest_eigenvalue(model, F.cross_entropy, x, y)
    assert hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)]).values[0] == pytest.approx(truth, rel=1e-3)


class Length(nn.Module):
    """Weight normalization in plain operations, whose second derivative is right."""

    def forward(self, v):
        return v / v.norm(dim=1, keepdim=True)


def test_a_parametrization_with_a_right_second_derivative_is_measured():
    model = copy.deepcopy(linear())
    nn.utils.parametrize.register_parametrization(model[0], "weight", Length())
    x, y = randn(12, 4), classes(12)
    truth = largest_eigenvalue(model, F.cross_entropy, x, y)
    assert hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)]).values[0] == pytest.approx(truth, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_units_of_the_loss_only_scale_what_is_measured(scale):
    model, x, y = linear().float(), randn(12, 4).float(), classes(12)
    scaled = lambda o, t: F.cross_entropy(o, t) * scale  # noqa: E731
    for k in (1, 2):
        ours, plain = (hessian_top_eigenvalues(model, f, [(x, y)], k) for f in (scaled, F.cross_entropy))
        assert ours.converged
        assert ours.values == pytest.approx([scale * value for value in plain.values], rel=1e-4)
    ours, plain = (input_gradient_norm(model, f, [(x[:5], y[:5]), (x[5:], y[5:])]) for f in (scaled, F.cross_entropy))
    assert ours.value == pytest.approx(scale * plain.value, rel=1e-5)
    ours, plain = (perturbation_curve(model, f, [(x, y)], [1.0], "pgd")[0] for f in (scaled, F.cross_entropy))
    assert ours.loss == pytest.approx(scale * plain.loss, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_units_of_the_output_only_scale_the_jacobian(scale):
    model, x = linear(20).float(), randn(6, 4).float()
    larger = copy.deepcopy(model)
    larger[2].weight.data *= scale
    for exact in (True, False):
        ours, plain = (spectreg.jacobian_norm(m, x, exact=exact) for m in (larger, model))
        torch.testing.assert_close(ours.value, scale * plain.value, rtol=1e-3, atol=0)
        assert ours.converged.all()
    for projections in (None, 3):
        ours, plain = (spectreg.jacobian_frobenius_norm(m, x, projections=projections) for m in (larger, model))
        torch.testing.assert_close(ours.value, scale * plain.value, rtol=1e-4, atol=0)
        torch.testing.assert_close(ours.standard_error, scale * plain.standard_error, rtol=1e-3, atol=0)


def measure_sharded() -> None:
    model = linear()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is sharded .*get_model_state_dict"):
        hessian_top_eigenvalues(model, F.cross_entropy, [(randn(12, 4), classes(12))])


@pytest.mark.slow
def test_the_hessian_of_a_sharded_model_is_refused_with_the_way_to_a_whole_one():
    on_ranks(1, measure_sharded)


def distances(output, y):
    """Between the outputs of a batch: of one example there are none."""
    return torch.pdist(output).sum()


def standardized(output, y):
    return F.cross_entropy((output - output.mean(0)) / (1 + output.std(0, correction=0)), y)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("loss_fn", [distances, standardized])
def test_batches_of_one_example_do_not_hide_that_a_loss_compares_examples(measure, loss_fn):
    x, y = randn(4, 4), classes(4)
    with pytest.raises(ValueError, match="neither the mean nor the sum"):
        measure(linear(), loss_fn, list(zip(x.split(1), y.split(1), strict=True)))


def test_a_loss_that_only_compares_examples_has_none_of_one_example():
    with pytest.raises(ValueError, match="examples by themselves do nothing to it"):
        perturbation_curve(linear(), standardized, [(randn(4, 4), classes(4))], [0.0])


class Steps(nn.Module):
    """One linear layer at every place: nothing tells time from examples."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        return self.inner(x).tanh()


@pytest.mark.parametrize("build", [Steps, Recurrent])
def test_a_single_step_that_may_be_a_single_example_is_refused(build):
    x, y = randn(1, 5, 4), classes(1, 5)
    for call in (
        lambda: input_gradient_norm(build(), by_token, [(x, y)]),
        lambda: perturbation_curve(build(), by_token, [(x, y)], [1.0]),
        lambda: adversarial_loss(build(), by_token, x, y),
    ):
        with pytest.raises(ValueError, match=r"\(1, 5, 4\) may be one example or, with time first, 5 of them"):
            call()


@pytest.mark.parametrize("sizes", [(1, 3), (3, 1)])
def test_a_batch_of_one_example_is_one_where_another_batch_tells(sizes):
    model, x, y = Steps(), randn(4, 5, 4), classes(4, 5)
    cut = list(zip(x.split(sizes), y.split(sizes), strict=True))
    value = input_gradient_norm(model, by_token, [(x, y)]).value
    assert input_gradient_norm(model, by_token, cut).value == pytest.approx(value)
    (point,), (whole,) = (perturbation_curve(model, by_token, batches, [0.0]) for batches in (cut, [(x, y)]))
    assert point.loss == pytest.approx(whole.loss)


def test_a_step_of_several_examples_among_longer_ones_is_refused():
    x, y = randn(3, 5, 4), classes(3, 5)
    with pytest.raises(ValueError, match=r"\(1, 5, 4\) may be one example or, with time first, 5 of them"):
        input_gradient_norm(Recurrent(), by_token, [(x[:1], y[:1]), (x[1:], y[1:])])


def test_one_example_whose_places_are_mixed_is_one():
    model = nn.Sequential(Steps(), nn.Flatten(), nn.Linear(15, 2, dtype=torch.float64))
    x, y = randn(1, 5, 4), classes(1) % 2
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
    assert input_gradient_norm(model, F.cross_entropy, [(x, y)]).value == pytest.approx(g.norm().item())


def test_a_loss_that_cannot_be_tried_on_joined_batches_is_refused_with_the_way_out():
    weights, y = torch.rand(5), classes(5)

    def captured(output, y):
        return (weights * F.cross_entropy(output, y, reduction="none")).mean()

    with pytest.raises(ValueError, match=r"joined with another.*must match.*BatchLoss"):
        hessian_top_eigenvalues(linear(), captured, [(randn(5, 4), y)])


def test_targets_that_are_true_or_false_are_classes():
    def loss(output, y):
        return F.binary_cross_entropy_with_logits(output[:, 0], y.to(output))

    x, y = randn(6, 4), randn(6, seed=1) > 0
    of_bools, of_numbers = (perturbation_curve(linear(1), loss, [(x, t)], [0.1]) for t in (y, y.double()))
    assert of_bools == of_numbers


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("measure", [input_gradient_norm, hessian_top_eigenvalues,
                                     lambda *given: perturbation_curve(*given, [0.1])])  # fmt: skip
def test_data_that_are_not_finite_are_named_as_the_cause(measure, reduction):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(6, 4)
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match="the loss is not finite"):
        measure(model, nn.CrossEntropyLoss(reduction=reduction), [(x, torch.tensor([0, 1, 2, 0, 1, 2]))])


@dataclasses.dataclass(frozen=True)
class Answer:
    logits: torch.Tensor
    note: str = "kept"


class Answering(nn.Module):
    def __init__(self, layer, answer):
        super().__init__()
        self.layer, self.answer = layer, answer

    def forward(self, x):
        return self.answer(self.layer(x))


def pairs(shape=(8,), classes=3, width=5):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, shape, generator=generator)
    return torch.randn(*shape, width, generator=generator, dtype=torch.float64), y


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_an_output_that_is_a_dataclass_is_measured_as_its_tensors_are(reduction):
    layer = seeded(lambda: nn.Linear(5, 3))
    x, y = pairs()
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    model = Answering(layer, Answer)

    def loss(output, y):
        return F.cross_entropy(getattr(output, "logits", output), y, reduction=reduction)

    for measure in (
        lambda model: hessian_top_eigenvalues(model, loss, batches).values,
        lambda model: input_gradient_norm(model, loss, batches).value,
        lambda model: perturbation_curve(model, loss, batches, [0.1])[0].loss,
    ):
        assert measure(model) == pytest.approx(measure(layer), rel=1e-6)


class Opaque:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("measure", [hessian_top_eigenvalues, input_gradient_norm])
def test_an_output_in_which_no_tensor_is_seen_is_refused_by_name(measure):
    x, y = pairs()
    model = Answering(seeded(lambda: nn.Linear(5, 3)), Opaque)
    with pytest.raises(ValueError, match="the model gives a Opaque, in which no"):
        measure(model, lambda output, y: F.cross_entropy(output.logits, y, reduction="sum"), [(x, y)])


def test_several_batches_of_a_loss_that_the_model_gives_beside_its_outputs_are_refused():
    x, y = pairs((8, 6))
    model = Answering(seeded(lambda: nn.Linear(5, 3)), lambda z: {"logits": z, "loss": z.square().mean()})
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    with pytest.raises(ValueError, match="so that batches cannot be weighed"):
        hessian_top_eigenvalues(model, lambda output, y: output["loss"], batches)
    assert hessian_top_eigenvalues(model, lambda output, y: output["loss"], [(x, y)]).values


def test_a_batch_is_left_out_only_where_all_of_its_tensors_are_empty():
    x, y = pairs()
    layer = seeded(lambda: nn.Linear(5, 3))
    loss = BatchLoss(lambda model, b: (F.cross_entropy(model(b["x"]), b["y"]), len(b["y"])), input="x")
    batches = [{"x": x[:3], "y": y[:3]}, {"x": x[3:], "y": y[3:]}]
    boxes = [{"boxes": torch.zeros(n, 2)} | batch for n, batch in zip((2, 0), batches, strict=True)]
    assert input_gradient_norm(layer, loss, boxes) == input_gradient_norm(layer, loss, batches)


def test_a_sum_that_leaves_out_targets_is_refused_whatever_the_shape_of_the_outputs():
    x, y = pairs((8, 6))
    y[:, 2:] = 0

    def loss(output, y):
        return F.cross_entropy(output, y.flatten(), ignore_index=0, reduction="sum")

    model = Answering(seeded(lambda: nn.Linear(5, 3)), lambda z: z.flatten(0, 1))
    with pytest.raises(ValueError, match="a sum that leaves out some targets"):
        hessian_top_eigenvalues(model, loss, [(x, y)])


def test_a_sum_over_several_targets_an_example_is_divided_by_them_under_perturbations_too():
    x, y = pairs((8, 6))
    layer = seeded(lambda: nn.Linear(5, 3))
    curves = [
        perturbation_curve(
            layer,
            lambda output, y, reduction=reduction: F.cross_entropy(
                output.flatten(0, 1), y.flatten(), reduction=reduction
            ),
            [(x[:3], y[:3]), (x[3:], y[3:])],
            [0.0, 0.5],
        )
        for reduction in ("sum", "mean")
    ]
    assert [point.loss for point in curves[0]] == pytest.approx([point.loss for point in curves[1]], rel=1e-6)


def test_hooks_on_gradients_change_no_measure_and_stay():
    x, y = pairs()
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))

    def measured():
        return (
            hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)]).values,
            input_gradient_norm(model, F.cross_entropy, [(x, y)]).value,
            jacobian_norm(model, x).value.tolist(),
        )

    before, called = measured(), []
    for p in model.parameters():
        p.register_hook(lambda g: called.append(1) or 0.1 * g)
    model[1].register_full_backward_hook(lambda module, gi, go: (0.1 * gi[0],))
    assert measured() == before
    assert not called
    model(x).sum().backward()
    assert len(called) == 4


@pytest.mark.parametrize("first", [1, 4])
def test_examples_that_depend_on_each_other_are_refused_whatever_the_first_batch(first):
    x, y = pairs()
    model = Answering(seeded(lambda: nn.Linear(5, 3)), lambda z: z - 0.9 * z.mean(0))
    with pytest.raises(ValueError, match="an output depends on more than one example"):
        input_gradient_norm(model, F.cross_entropy, [(x[:first], y[:first]), (x[first:], y[first:])])


def test_batches_whose_examples_lie_along_different_dimensions_are_refused():
    x, _ = pairs()
    model = Answering(nn.Identity(), lambda z: z - 0.9 * z.mean(0))
    with pytest.raises(ValueError, match=r"a batch of shape \(7, 5\) has its examples along another dimension"):
        input_gradient_norm(model, F.mse_loss, [(x[:1], 0 * x[:1]), (x[1:], 0 * x[1:])])


def test_lists_and_dictionaries_of_a_model_are_left_as_found():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen, self.last = nn.Linear(5, 3, dtype=torch.float64), [], {}

        def forward(self, x):
            z = self.layer(x)
            self.seen.append(z)
            self.last["z"] = z
            return z

    x, y = pairs()
    model = Remembering()
    hessian_top_eigenvalues(model, F.cross_entropy, [(x, y)])
    assert (model.seen, model.last) == ([], {})


def test_a_dictionary_with_tensors_for_keys_is_no_hindrance():
    x, y = pairs()
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 3)))
    model.masks = {model[0].weight: torch.ones(3, 5)}
    assert input_gradient_norm(model, F.cross_entropy, [(x, y)]).value > 0
    (key,) = model.masks
    assert key is model[0].weight


def test_a_sum_in_which_no_target_has_one_of_the_classes_leaves_nothing_out():
    x, y = pairs((4, 6), classes=3)

    def loss(output, y, reduction="sum"):
        return F.nll_loss(output.flatten(0, 1), y.flatten(), reduction=reduction)

    model = Answering(seeded(lambda: nn.Linear(5, 4)), lambda z: z.log_softmax(-1))
    summed = hessian_top_eigenvalues(model, loss, [(x, y)]).values
    mean = hessian_top_eigenvalues(model, functools.partial(loss, reduction="mean"), [(x, y)]).values
    assert summed == pytest.approx(mean, rel=1e-6)


def measure_and_train() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    x, y = pairs()
    (point,) = perturbation_curve(model, F.cross_entropy, [(x, y)], [0.0])
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    assert point.loss == pytest.approx(loss.item())


@pytest.mark.slow
def test_a_sharded_model_trains_on_after_a_measure():
    on_ranks(1, measure_and_train)
