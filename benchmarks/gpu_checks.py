"""Whether a device computes what the CPU does in float64: each check is a function of the device that raises if not."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from spectreg import SpectralNormRegularizer
from spectreg.penalties import Square

STRENGTH, STEPS = 0.1, 5
FORMS: dict[str, dict[str, Any]] = {
    "one step": {},
    "half steps": {"steps": 0.5},
    "k = 2": {"k": 2},
    "a hinge": {"penalty": "hinge"},
    "tracked = 4": {"tracked": 4},
    "a target of each shape": {"penalty": Square("shape")},
    "parts, heads, groups each": {"map": {"0.weight": 2, "2.weight": "each", "4.in_proj_weight": "heads"}},
    "joint matrices": {"map": {"2.weight": "joint", "4.in_proj_weight": "joint", "5.*": "joint"}},
    "operators": {"map": {"1.*": "operator"}, "input_size": (6, 6)},
}
Check = Callable[[torch.device], None]


class Stack(nn.Module):
    """Matrices of experts, in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 4, 5))


class InputsFirst(nn.Module):
    """A linear layer stored as inputs × outputs, as those of GPT-2 are."""

    nx, nf = 4, 7

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(self.nx, self.nf))


def layers() -> nn.ModuleList:
    """One layer of each kind, each weight with singular values well apart, so that few steps find them."""
    draws = torch.Generator().manual_seed(0)
    made = nn.ModuleList(
        [nn.Linear(8, 6), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 2)]
    ).double()
    others = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.LSTM(4, 3), Stack(), InputsFirst()]).double()
    for parameter in others.parameters():
        parameter.detach().normal_(generator=draws)
    for layer in made:
        weight = layer.weight.detach()
        weight.normal_(generator=draws).mul_(0.05)
        for i, value in enumerate((3.0, 1.5)):
            weight.view(len(weight), -1)[i::2, i::2] += value / weight[0].numel() ** 0.5
    return made.extend(others)


def gradients(model: nn.Module, as_term: bool = False, **form: Any) -> dict[str, Tensor]:
    """What the regularizer adds to each gradient, in float64 on the CPU."""
    regularizer = SpectralNormRegularizer(model, STRENGTH, warmup=200, **form)
    if as_term:
        regularizer.penalty().backward()
    else:
        regularizer.add_gradient()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """Raise for the tensor that is farther from the truth than ``tolerance``, relative to its norm."""
    if found.keys() != truth.keys():
        raise AssertionError(f"{sorted(found.keys() ^ truth.keys())} are there on one side only")
    for name in truth:
        apart = float((found[name] - truth[name]).norm() / truth[name].norm().clamp_min(1e-12))
        if not apart <= tolerance:
            raise AssertionError(f"{name}: {apart:.1e} from the truth, above {tolerance:.0e}")


def form_check(form: dict[str, Any], as_term: bool, dtype: torch.dtype, tolerance: float) -> Check:
    def check(device: torch.device) -> None:
        model = layers()
        truth = gradients(copy.deepcopy(model).to(dtype).double(), **form)
        close(gradients(model.to(device, dtype), as_term, **form), truth, tolerance)

    return check


def network(device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    for p in model.parameters():
        p.data.normal_(generator=draws).mul_(0.3)
    x, y = torch.randn(32, 12, generator=draws), torch.randint(4, (32,), generator=draws)
    return model.to(device), x.to(device), y.to(device)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().cpu() for name, p in model.named_parameters()}


def adam(model: nn.Module, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4, **how)


def by_hand(device: torch.device, steps: int = STEPS) -> dict[str, Tensor]:
    """Weights after some steps with the gradient added before each, in eager mode."""
    model, x, y = network(device)
    optimizer, regularizer = adam(model), SpectralNormRegularizer(model, STRENGTH)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        regularizer.add_gradient()
        optimizer.step()
    return state(model)


def attached(device: torch.device, compiled: bool = False, decoupled: bool = False, **how: Any) -> nn.Module:
    model, x, y = network(device)
    optimizer = adam(model, **how)
    SpectralNormRegularizer(model, STRENGTH, decoupled=decoupled).attach(optimizer)
    forward = torch.compile(model) if compiled else model
    for _ in range(STEPS):
        optimizer.zero_grad()
        cross_entropy(forward(x), y).backward()
        optimizer.step()
    return model


def attach_check(compiled: bool = False, **how: Any) -> Check:
    return lambda device: close(state(attached(device, compiled, **how)), by_hand(torch.device("cpu")), 1e-4)


def decoupled(device: torch.device) -> None:
    """The weights that the decoupled form moves, as on a CPU."""
    close(state(attached(device, decoupled=True)), state(attached(torch.device("cpu"), decoupled=True)), 1e-4)


def scaled(device: torch.device) -> None:
    """A gradient scaler with float16: attached, and added after unscaling."""
    ends = []
    for attach in (True, False):
        model, x, _ = network(device)
        optimizer, regularizer = adam(model), SpectralNormRegularizer(model, STRENGTH)
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        if attach:
            regularizer.attach(optimizer)
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.float16):
                loss = mse_loss(model(x).float(), x[:, :4])
            scaler.scale(loss).backward()
            if not attach:
                scaler.unscale_(optimizer)
                regularizer.add_gradient()
            scaler.step(optimizer)
            scaler.update()
        ends.append(state(model))
    close(ends[0], ends[1], 1e-3)


def captured(device: torch.device) -> None:
    """A step with an attached regularizer as a CUDA graph, replayed."""
    model, x, y = network(device)
    optimizer = adam(model, capturable=True)
    SpectralNormRegularizer(model, STRENGTH).attach(optimizer)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(model(x), y).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(STEPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(STEPS):
        graph.replay()
    torch.cuda.synchronize()
    close(state(model), by_hand(torch.device("cpu"), 2 * STEPS), 1e-3)


def unread(device: torch.device) -> None:
    """Steps in which any read back to the host is an error, after a first one that sets things up."""
    model, x, y = network(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    SpectralNormRegularizer(model, STRENGTH).attach(optimizer)
    for number in range(STEPS):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def checks() -> dict[str, Check]:
    """All checks that make sense on every device, by what they show."""
    found: dict[str, Check] = {}
    for name, form in FORMS.items():
        for as_term in (False, True):
            way = "penalty()" if as_term else "add_gradient()"
            found[f"{name}, {way}, float32"] = form_check(form, as_term, torch.float32, 1e-3)
            found[f"{name}, {way}, bfloat16"] = form_check(form, as_term, torch.bfloat16, 3e-2)
    found["attached to AdamW"] = attach_check()
    found["attached to a fused AdamW"] = attach_check(fused=True)
    found["attached, decoupled"] = decoupled
    found["float16 with a gradient scaler"] = scaled
    return found


CUDA_ONLY: dict[str, Check] = {
    "attached to a capturable AdamW": attach_check(capturable=True),
    "a network compiled by torch.compile": attach_check(compiled=True),
    "a step captured as a CUDA graph and replayed": captured,
    "no read back during a step": unread,
}
