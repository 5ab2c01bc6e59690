"""Layers with the batch normalization after them, against the scaled weight formed in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectreg import normalized_norms


def drawn(model):
    """Trained statistics and scales, some negative."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.1)
            if module.affine:
                module.weight.data.copy_(torch.randn(module.num_features, generator=generator))
    return model.double()


def images(size=5):
    return torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scaled(W, norm):
    gamma = torch.ones(norm.num_features) if norm.weight is None else norm.weight
    return (gamma.double() / (norm.running_var + norm.eps).sqrt())[:, None] * W.double()


LAYERS = {
    "convolution": (nn.Conv2d(4, 6, 3), lambda W: [W.flatten(1)]),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), lambda W: W.flatten(1).chunk(2)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), lambda W: W.flatten(1).chunk(4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), lambda W: [W.transpose(0, 1).flatten(1)]),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_convolution_has_the_norm_of_its_kernel_with_scaled_rows(kind, affine):
    layer, matrices = LAYERS[kind]
    model = drawn(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels, affine=affine), nn.ReLU()))
    found = normalized_norms(model, images())["0.weight"]
    blocks = matrices(layer.weight.detach())
    rows = scaled(torch.eye(layer.out_channels), model[1]).diagonal().chunk(len(blocks))
    expected = max(torch.linalg.matrix_norm(s[:, None] * W, 2).item() for s, W in zip(rows, blocks, strict=True))
    assert found.converged
    assert found.normalization == "1"
    assert found.value == pytest.approx(expected, rel=1e-7)
    assert found.alone == pytest.approx(max(torch.linalg.matrix_norm(W, 2).item() for W in blocks), rel=1e-7)


def test_a_linear_layer_and_its_normalization_stretch_no_difference_further():
    model = drawn(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))).eval()
    found = normalized_norms(model, torch.zeros(1, 6, dtype=torch.float64))["0.weight"]
    J = torch.autograd.functional.jacobian(model, torch.zeros(1, 6, dtype=torch.float64))[0, :, 0]
    assert found.value == pytest.approx(torch.linalg.matrix_norm(J, 2).item(), rel=1e-7)


class Crossed(nn.Module):
    """Two branches whose normalizations are not in the order of their layers, and one layer with none."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.for_b, self.for_a, self.after_relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.for_a(self.a(x)) + self.for_b(self.b(x)) + self.after_relu(F.relu(self.c(x)))


def test_pairs_are_those_of_the_forward_pass():
    model = drawn(Crossed())
    found = normalized_norms(model, images())
    assert {name: norm.normalization for name, norm in found.items()} == {"a.weight": "for_a", "b.weight": "for_b"}
    expected = torch.linalg.matrix_norm(scaled(model.b.weight.flatten(1), model.for_b), 2).item()
    assert found["b.weight"].value == pytest.approx(expected, rel=1e-7)


def test_a_tensor_changed_in_place_on_the_way_is_no_output_of_the_layer():
    model = drawn(nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match="no batch normalization takes the output"):
        normalized_norms(model, images())


def test_training_mode_and_statistics_are_left_as_found():
    model = drawn(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    normalized_norms(model, images())
    assert model.training
    assert model[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_the_units_of_the_weight_do_not_matter(unit):
    model = drawn(nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)))
    x = torch.zeros(1, 6, dtype=torch.float64)
    before = normalized_norms(model, x)["0.weight"].value
    with torch.no_grad():
        model[0].weight *= unit
    assert normalized_norms(model, x)["0.weight"].value / unit == pytest.approx(before, rel=1e-9)


def hooked():
    layer = nn.Conv2d(4, 3, 1)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return nn.Sequential(layer, nn.BatchNorm2d(3))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.one(self.conv(x)) + self.two(self.conv(x))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), images(), "no running stat"),
        (hooked(), images(), "a forward or a hook of its own"),
        (Twice(), images(), "followed by 'one' and by 'two'"),
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), images()[0], "it scales no rows"),
        (nn.Sequential(nn.Linear(5, 4), nn.ReLU()), images(), "singular_values measures the weights alone"),
    ],
)
def test_what_is_no_product_is_refused(model, x, message):
    with pytest.raises(ValueError, match=message):
        normalized_norms(model.double(), x)
