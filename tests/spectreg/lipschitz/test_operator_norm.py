import math

import numpy as np
import pytest
import torch
from altered import ALTERED, AS_THEIR_ATTRIBUTES_SAY, OF_TWO_MINDS, snapshot
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import nn

from spectreg.linalg.directions import gaussian_like
from spectreg.linalg.lanczos import Goal, lanczos_largest
from spectreg.lipschitz.convolution_bound import kernel_phases, norm_bound, quick_norm_bound
from spectreg.lipschitz.operator_norm import operator_norm
from spectreg.lipschitz.plane_wave import top_waves
from spectreg.maps.convolution import OperatorMap

pytestmark = pytest.mark.portable

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}


def dense(layer: nn.Module, input_shape: tuple[int, ...]) -> torch.Tensor:
    """The layer as a matrix, column by column from the unit inputs."""
    eye = torch.eye(math.prod(input_shape), dtype=torch.float64).unflatten(1, input_shape)
    with torch.no_grad():
        return (layer(eye) - layer(torch.zeros_like(eye[:1]))).flatten(1).T


def singular_values(layer, input_shape):
    return np.linalg.svd(dense(layer, input_shape).numpy(), compute_uv=False)


def layer_of(kind, inputs, outputs, kernel, *, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    return kind(inputs, outputs, kernel, dtype=dtype, **options)


CASES = [
    (nn.Conv1d, (3, 9), 4, 3, {}),
    (nn.Conv1d, (2, 8), 3, 2, {"padding": "same"}),
    (nn.Conv2d, (2, 6, 5), 3, 3, {"padding": 1}),
    (nn.Conv2d, (2, 6, 6), 3, (3, 1), {"padding": (1, 0)}),
    (nn.Conv2d, (2, 7, 7), 3, 3, {"stride": 2, "padding": 1}),
    (nn.Conv2d, (2, 7, 7), 3, 2, {"stride": 3}),
    (nn.Conv2d, (2, 8, 8), 3, 3, {"dilation": 2, "padding": 2}),
    (nn.Conv2d, (2, 8, 8), 3, 3, {"dilation": 2, "padding": 1, "stride": 2}),
    (nn.Conv2d, (4, 6, 6), 6, 3, {"groups": 2, "padding": 1}),
    (nn.Conv2d, (4, 6, 6), 4, 3, {"groups": 4}),
    (nn.Conv2d, (2, 6, 6), 3, 3, {"padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, (2, 6, 6), 3, 3, {"padding": 2, "padding_mode": "circular"}),
    (nn.Conv2d, (2, 6, 6), 3, 3, {"padding": 1, "padding_mode": "reflect"}),
    (nn.Conv2d, (2, 6, 6), 3, 3, {"padding": 2, "padding_mode": "replicate", "stride": 2}),
    (nn.Conv3d, (2, 4, 3, 4), 2, 2, {"padding": 1, "stride": (1, 2, 1)}),
    (nn.ConvTranspose1d, (3, 5), 2, 4, {"stride": 2, "padding": 1}),
    (nn.ConvTranspose2d, (2, 4, 4), 3, 3, {"stride": 2, "padding": 1, "output_padding": 1}),
    (nn.ConvTranspose2d, (4, 4, 4), 6, 3, {"groups": 2, "dilation": 2}),
    (nn.ConvTranspose3d, (2, 2, 3, 2), 2, 2, {"stride": 2}),
    (nn.Linear, (5,), 7, None, {}),
    (nn.Linear, (3, 5), 7, None, {}),
]


def build(kind, input_shape, outputs, kernel, options, **more):
    if kind is nn.Linear:
        return nn.Linear(input_shape[-1], outputs, dtype=torch.float64)
    return layer_of(kind, input_shape[0], outputs, kernel, **options, **more)


@pytest.fixture
def by_iteration(monkeypatch):
    """Small layers, too, are iterated on."""
    monkeypatch.setattr("spectreg.lipschitz.layer_map.DENSE", 0)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize(("kind", "input_shape", "outputs", "kernel", "options"), CASES)
def test_the_value_is_the_norm_of_the_dense_matrix_and_the_bound_is_above(
    kind, input_shape, outputs, kernel, options, tight, by_iteration
):
    layer = build(kind, input_shape, outputs, kernel, options)
    truth = singular_values(layer, input_shape)[0]
    norm = operator_norm(layer, input_shape, tolerance=1e-7, max_products=1000, tight=tight)
    assert norm.converged
    assert norm.value == pytest.approx(truth, rel=1e-12)
    assert norm.upper >= truth
    assert norm.residual <= 1e-7 * norm.value


WIDE = [  # inputs so large that the iteration starts from a wave
    (nn.Conv1d, (3, 80), 4, 3, {"padding": 1}),
    (nn.Conv1d, (3, 60), 2, 5, {}),
    (nn.Conv1d, (2, 50), 3, 4, {"padding": 6}),
    (nn.Conv1d, (2, 160), 3, 5, {"stride": 3, "padding": 2}),
    (nn.Conv1d, (2, 200), 3, 2, {"stride": 4}),
    (nn.Conv1d, (2, 90), 3, 3, {"dilation": 2, "padding": 2}),
    (nn.Conv1d, (4, 60), 6, 3, {"groups": 2, "padding": 1}),
    (nn.Conv1d, (5, 60), 5, 3, {"groups": 5, "padding": 1}),
    (nn.Conv1d, (3, 60), 4, 1, {}),
    (nn.Conv1d, (3, 60), 2, 3, {"padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, (1, 28, 28), 2, 3, {"padding": 1}),
    (nn.Conv2d, (2, 3, 60), 2, (1, 3), {"stride": (2, 1)}),
    (nn.Conv3d, (2, 3, 50, 2), 2, (1, 3, 1), {"padding": (0, 1, 0)}),
    (nn.ConvTranspose1d, (3, 60), 2, 4, {"stride": 2, "padding": 1}),
    (nn.ConvTranspose1d, (4, 60), 6, 3, {"groups": 2, "dilation": 2}),
    (nn.ConvTranspose2d, (2, 3, 60), 2, (1, 3), {}),
]


@pytest.mark.parametrize(("kind", "input_shape", "outputs", "kernel", "options"), WIDE)
def test_on_a_wide_input_too_the_value_is_the_norm_of_the_dense_matrix(
    kind, input_shape, outputs, kernel, options, by_iteration
):
    layer = build(kind, input_shape, outputs, kernel, options)
    sigma = singular_values(layer, input_shape)
    truth = sigma[0]
    exact = operator_norm(layer, input_shape, tolerance=1e-7, max_products=2000)
    assert exact.converged
    assert np.abs(sigma - exact.value).min() <= exact.residual + 1e-12 * truth
    assert exact.value == pytest.approx(truth, rel=1e-6)  # waves of ±ω differ by as little as 6e-7 here
    assert truth * (1 - 2e-3) <= operator_norm(layer, input_shape).value <= truth * (1 + 1e-12)


@pytest.mark.parametrize(("kind", "input_shape", "outputs", "kernel", "options"), WIDE)
def test_the_wave_is_nearly_the_top_vector(kind, input_shape, outputs, kernel, options):
    layer = build(kind, input_shape, outputs, kernel, options)
    matrix, truth = dense(layer, input_shape), singular_values(layer, input_shape)[0]
    transposed = layer.transposed
    matrix = matrix if transposed else matrix.T
    size = input_shape[1:] if transposed else OperatorMap.of(layer, input_shape[1:]).output_shape[1:]
    waves = top_waves(kernel_phases(layer, layer.weight.detach()), size, torch.Generator().manual_seed(0), 2).flatten(1)
    best, second = ((matrix @ waves.T).norm(dim=0) / waves.norm(dim=1)).tolist()
    assert 0.97 * truth <= best <= truth * (1 + 1e-12)
    assert second <= 1.03 * best


@pytest.mark.parametrize("mode", ["replicate", "reflect"])
def test_where_padding_repeats_entries_the_border_is_not_missed(mode, by_iteration):
    layer = layer_of(nn.Conv1d, 3, 2, 3, padding=4, padding_mode=mode)
    truth = singular_values(layer, (3, 60))[0]
    assert operator_norm(layer, (3, 60)).value == pytest.approx(truth, rel=1e-3)


def test_the_wave_saves_most_of_the_products():
    layer = layer_of(nn.Conv2d, 8, 8, 3, padding=1, dtype=torch.float32)
    W, A = layer.weight.detach(), OperatorMap.of(layer, (40, 40))
    start = gaussian_like(W.new_empty(A.inputs), torch.Generator().manual_seed(0))
    random = lanczos_largest(lambda v: A.adjoint(W, A.forward(W, v)), start, Goal(1, 1e-2, 200))
    assert 4 * operator_norm(layer, (8, 40, 40), tolerance=1e-2).products <= random.products


def test_a_constant_kernel_does_not_hide_among_frequencies_that_rounding_left():
    layer = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    nn.init.uniform_(layer.weight, 0.9, 1.0, generator=torch.Generator().manual_seed(0))
    assert operator_norm(layer, (8, 32, 32)).products <= 3


@given(seed=st.integers(0, 9999), taps=st.integers(1, 5), channels=st.integers(1, 4), n=st.integers(48, 70))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_value_lies_within_its_residual_of_a_singular_value_and_never_above(by_iteration, seed, taps, channels, n):
    layer = layer_of(nn.Conv1d, channels, channels, taps, seed=seed, padding=taps // 2)
    norm, truth = operator_norm(layer, (channels, n), tolerance=0.05), singular_values(layer, (channels, n))
    assert norm.value <= truth[0] * (1 + 1e-12)
    assert np.abs(truth - norm.value).min() <= norm.residual + 1e-12 * truth[0]


def test_the_bound_is_that_of_the_weight_that_was_measured():
    layer = layer_of(nn.Conv2d, 2, 3, 3)
    norm, expected = operator_norm(layer, (2, 6, 6)), operator_norm(layer, (2, 6, 6)).upper
    nn.init.zeros_(layer.weight)
    assert norm.upper == expected


@st.composite
def convolutions(draw):
    dimensions = draw(st.sampled_from([1, 1, 2, 2, 2, 3]))
    largest_side = {1: 12, 2: 6, 3: 3}[dimensions]
    transposed = draw(st.booleans())
    groups = draw(st.integers(1, 2))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    kernel, stride, dilation = each(1, 4 if dimensions < 3 else 2), each(1, 3), each(1, 2)
    size, padding = each(1, largest_side), each(0, 2)
    modes = ["zeros"] if transposed else ["zeros", "zeros", "circular", "replicate", "reflect"]
    mode = draw(st.sampled_from(modes))
    options = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "padding_mode": mode}
    return CONVOLUTIONS[dimensions][transposed], (inputs, *size), outputs, kernel, options, draw(st.integers(0, 9999))


@pytest.mark.slow
@given(case=convolutions(), grid=st.sampled_from([4, 8, 40]))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_the_certified_bounds_are_never_below_the_truth(case, grid):
    kind, input_shape, outputs, kernel, options, seed = case
    try:
        layer = layer_of(kind, input_shape[0], outputs, kernel, seed=seed, **options)
        truth = singular_values(layer, input_shape)[0]
    except RuntimeError:  # a kernel or border larger than the input: torch refuses the layer
        reject()
    assert norm_bound(layer, input_shape[1:], grid=grid) >= truth
    assert quick_norm_bound(layer, input_shape[1:]) >= truth


def test_the_tight_bound_comes_close_where_the_border_matters_little():
    layer = layer_of(nn.Conv2d, 3, 4, 3, padding=1)
    truth = singular_values(layer, (3, 16, 16))[0]
    tight = operator_norm(layer, (3, 16, 16), tight=True).upper
    assert truth <= tight <= 1.03 * truth
    assert tight <= operator_norm(layer, (3, 16, 16)).upper


def test_a_circular_convolution_is_bounded_by_its_norm_exactly():
    layer = layer_of(nn.Conv2d, 3, 4, 3, padding=1, padding_mode="circular")
    truth = singular_values(layer, (3, 8, 8))[0]
    assert operator_norm(layer, (3, 8, 8), tight=True).upper == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_tolerance_gives_three_digits_in_low_precision_too(dtype, by_iteration):
    layer = layer_of(nn.Conv2d, 8, 8, 3, padding=1, dtype=dtype)
    norm = operator_norm(layer, (8, 10, 10))
    assert norm.converged
    assert norm.value == pytest.approx(singular_values(layer.double(), (8, 10, 10))[0], rel=1e-3)


@pytest.mark.parametrize("size", [5, 40])
def test_a_zero_kernel_has_norm_zero(size, by_iteration):
    layer = layer_of(nn.Conv2d, 2, 2, 3)
    nn.init.zeros_(layer.weight)
    norm = operator_norm(layer, (2, size, size))
    assert (norm.value, norm.upper, norm.converged) == (0.0, 0.0, True)


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    return layer


def nan_conv():
    layer = nn.Conv2d(2, 2, 1)
    nn.init.constant_(layer.weight, float("nan"))
    return layer


@pytest.mark.parametrize(
    ("layer", "input_shape", "message"),
    [
        (nn.ReLU(), (3,), "ReLU is not a linear map plus a constant, .*Use jacobian_norm or lipschitz_bound"),
        (nn.Embedding(3, 2), (4,), r"Embedding fails on input_shape \(4,\), without the batch"),
        (nn.Flatten(0), (4,), "Flatten does not give one tensor .* an example a row"),
        (hooked(nn.Linear(3, 2).half()), (3,), r"its weights are torch\.float16: measure copy.deepcopy\(layer\).float"),
        (nn.Linear(3, 2), (4,), r"input_shape \(4,\) does not fit .* it takes \(…, 3\)"),
        (nn.Conv2d(3, 2, 3), (2, 8, 8), r"input_shape \(2, 8, 8\) does not fit .* it takes \(3, n, n\)"),
        (nn.Conv2d(3, 2, 3), (3, 8), r"input_shape \(3, 8\) does not fit"),
        (nan_conv(), (2, 4, 4), "NaN or infinite"),
        (nn.Linear(4, 3, device="meta"), (4,), "'weight' of Linear is on the meta device and has no values"),
        (nn.Conv2d(2, 3, 3, device="meta"), (2, 4, 4), "'weight' of Conv2d is on the meta device"),
    ],
)
def test_a_wrong_layer_or_shape_is_named(layer, input_shape, message):
    with pytest.raises(ValueError, match=message):
        operator_norm(layer, input_shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tolerance": 0.0}, r"tolerance is 0\.0"), ({"max_products": 0}, "max_products 0")],
)
def test_a_wrong_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        operator_norm(nn.Conv2d(1, 1, 3), (1, 8, 8), **options)


def test_what_did_not_converge_says_so():
    norm = operator_norm(layer_of(nn.Conv2d, 4, 4, 3), (4, 14, 14), tolerance=1e-6, max_products=2)
    assert not norm.converged
    assert norm.products == 2
    assert norm.residual > 1e-6 * norm.value


@pytest.mark.parametrize(
    ("seeds", "build", "shape"),
    [
        ([1959, 2826], lambda: nn.Conv2d(1, 2, 5), (1, 5, 5)),
        (range(40), lambda: nn.Conv2d(8, 8, 3, groups=8), (8, 8, 8)),
        (range(40), lambda: nn.Conv2d(4, 8, 3), (4, 8, 8)),
    ],
)
def test_a_small_layer_is_measured_exactly(seeds, build, shape):
    for seed in seeds:
        torch.manual_seed(seed)
        layer = build()
        norm = operator_norm(layer, shape)
        assert (norm.residual, norm.converged) == (0.0, True)
        assert norm.value == pytest.approx(singular_values(layer.double(), shape)[0], rel=1e-12)


@given(seed=st.integers(0, 9999), groups=st.sampled_from([1, 2, 4]), n=st.integers(3, 7), padding=st.integers(0, 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_start_and_no_block_stops_short(by_iteration, seed, groups, n, padding):
    layer = layer_of(nn.Conv2d, 4, 8, 3, seed=seed, groups=groups, padding=padding)
    norm, truth = operator_norm(layer, (4, n, n)), singular_values(layer, (4, n, n))[0]
    assert norm.converged
    assert truth * (1 - 5e-3) <= norm.value <= truth * (1 + 1e-12)


@pytest.mark.parametrize("exponent", [-30, -15, 0, 15, 30])
@pytest.mark.parametrize("size", [6, 14, 40])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d, "own forward"])
def test_everything_scales_with_the_weight(kind, size, exponent):
    layer, shape = nn.Linear(size, 5), (size,)
    if kind is not nn.Linear:
        layer, shape = layer_of(nn.Conv2d, 4, 8, 3, dtype=torch.float32), (4, size, size)
    if kind == "own forward":
        hooked(layer)
    base = operator_norm(layer, shape, tight=True)
    layer.weight.data *= 10.0**exponent
    norm = operator_norm(layer, shape, tight=True)
    assert (norm.converged, base.converged) == (True, True)
    assert norm.value == pytest.approx(base.value * 10.0**exponent, rel=1e-5)
    assert norm.residual == pytest.approx(base.residual * 10.0**exponent, rel=1e-2, abs=1e-6 * norm.value)
    assert norm.upper == pytest.approx(base.upper * 10.0**exponent, rel=1e-5)


@pytest.mark.parametrize("name", ALTERED)
def test_a_layer_with_a_forward_of_its_own_is_measured_by_it_and_not_certified(name, monkeypatch):
    shape = (2, 5, 6)
    layer = ALTERED[name]()
    before = snapshot(layer)
    found = [operator_norm(layer, shape)]
    monkeypatch.setattr("spectreg.lipschitz.layer_map.DENSE", 0)
    found.append(operator_norm(layer, shape, tolerance=1e-7, max_products=1000))
    assert snapshot(layer) == before
    truth = singular_values(layer, shape)[0]
    for norm in found:
        assert norm.value == pytest.approx(truth, rel=1e-9)
        assert norm.converged
        assert norm.upper == math.inf


@pytest.mark.parametrize("name", AS_THEIR_ATTRIBUTES_SAY)
def test_a_layer_that_only_looks_altered_is_certified(name):
    layer = AS_THEIR_ATTRIBUTES_SAY[name]().train()
    before = snapshot(layer)
    norm = operator_norm(layer, (2, 5, 6), tight=True)
    assert snapshot(layer) == before
    truth = singular_values(layer.eval(), (2, 5, 6))[0]
    assert norm.value == pytest.approx(truth, rel=1e-9)
    assert truth <= norm.upper < 2 * truth


@pytest.mark.parametrize("name", OF_TWO_MINDS)
def test_a_layer_whose_gradient_is_not_that_of_its_value_is_refused(name):
    with pytest.raises(ValueError, match="is not a linear map plus a constant, by its outputs and gradients"):
        operator_norm(OF_TWO_MINDS[name](), (2, 5, 6))


def test_a_chain_of_linear_modules_is_measured_as_the_map_it_is():
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    truth = singular_values(chain.eval(), (2, 6, 6))[0]
    assert operator_norm(chain.train(), (2, 6, 6)).value == pytest.approx(truth, rel=1e-9)
    assert chain.training


def test_in_inference_mode_the_norms_are_the_same():
    layers = [hooked(nn.Linear(4, 3)), nn.Linear(4, 3)]
    expected = [operator_norm(layer, (4,)).value for layer in layers]
    with torch.inference_mode():
        assert [operator_norm(layer, (4,)).value for layer in layers] == expected
        assert operator_norm(nn.Conv2d(2, 2, 3), (2, 5, 5)).value > 0


@pytest.mark.parametrize("shape", [(0,), (3, -1)])
def test_a_shape_that_is_none_is_refused_with_what_one_looks_like(shape):
    with pytest.raises(ValueError, match=r"input_shape is .*: give the shape of one example, such as \(3, 32, 32\)"):
        operator_norm(nn.Linear(4, 3), shape)


def test_a_layer_without_entries_has_no_norm_and_says_so():
    with pytest.raises(ValueError, match="has a parameter without entries: it has no norm"):
        operator_norm(nn.Linear(0, 3), (1,))


class Centred(nn.Linear):
    """Takes the mean of the batch off, which of one example is all of it."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


def test_a_layer_whose_examples_influence_each_other_is_refused():
    with pytest.raises(ValueError, match="Centred gives an example another output beside others"):
        operator_norm(Centred(5, 4), (3, 5))


@pytest.mark.parametrize("seed", range(12))
def test_a_network_that_is_linear_on_one_side_of_zero_is_refused(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 1), nn.ReLU(), nn.Linear(1, 3))
    with pytest.raises(ValueError, match="is not a linear map plus a constant"):
        operator_norm(model, (5,))


@pytest.mark.parametrize("seed", range(12))
def test_a_hook_that_changes_one_side_of_zero_is_noticed(seed):
    torch.manual_seed(seed)
    layer = nn.Linear(5, 1)
    layer.register_forward_hook(lambda module, inputs, output: output.relu())
    with pytest.raises(ValueError, match="is not a linear map plus a constant"):
        operator_norm(layer, (5,))


def test_complex_layers_are_refused():
    for layer in (nn.Linear(3, 3, dtype=torch.complex64), nn.Conv1d(1, 1, 1, dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"weight of .* is complex"):
            operator_norm(layer, (3,) if isinstance(layer, nn.Linear) else (1, 3))


def test_a_layer_of_buffers_alone_is_measured_in_their_precision():
    layer = nn.BatchNorm2d(3, affine=False).double()
    layer.running_var.copy_(torch.tensor([1.0, 0.25, 4.0]))
    assert operator_norm(layer, (3, 4, 4)).value == pytest.approx((0.25 + layer.eps) ** -0.5)
