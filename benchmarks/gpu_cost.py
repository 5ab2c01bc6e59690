"""What the penalty adds to a training step on this device, in each of the ways to have one."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks import gpu_networks as networks
from spectreg import SpectralNormRegularizer

WAYS: dict[str, dict[str, Any]] = {
    "add_gradient": {},
    "half steps": {"steps": 0.5},
    "every=8": {"every": 8},
    "k=4": {"k": 4},
    "decoupled": {"decoupled": True},
}
RIVALS = ("autograd penalty", "torch.svd_lowrank", "torch's spectral_norm")
Step = Callable[[], None]


class Case(NamedTuple):
    """A network, its batch, type of weights and optimizer."""

    name: str
    make: Callable[[], nn.Module]
    batch: int
    dtype: torch.dtype = torch.float32
    optimizer: str = "SGD"


def cases(quick: bool) -> list[Case]:
    bf16 = torch.bfloat16
    if quick:
        return [
            Case("VGG, narrow", lambda: networks.vgg(8, (1, 1), 16), 8),
            Case("DenseNet, shallow", lambda: networks.densenet(7, 4), 4),
            Case("ResNet, narrow", lambda: networks.resnet(8, (1, 1)), 4),
            *(Case("GPT 2 × 64", lambda: networks.GPT(2, 64, 128, 16), 2, bf16, o) for o in ("AdamW", "Muon")),
        ]
    return [
        *(Case("VGG-16", networks.vgg, b) for b in (64, 512)),
        *(Case("DenseNet-40", networks.densenet, b) for b in (64, 512)),
        Case("ResNet-50's convolutions", networks.resnet, 64),
        *(Case("GPT 12 × 768", networks.GPT, 8, bf16, o) for o in ("AdamW", "Muon")),
    ]


def optimizers(model: nn.Module, case: Case, **how: Any) -> list[torch.optim.Optimizer]:
    """Muon takes the matrices alone; the others are left to AdamW."""
    parameters = list(model.parameters())
    if case.optimizer == "SGD":
        return [torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, fused=True)]
    if case.optimizer == "AdamW":
        return [torch.optim.AdamW(parameters, lr=1e-6, fused=True, **how)]
    hidden = [p for p in parameters if p.ndim == 2 and p.shape[0] < 10_000]
    chosen = {id(p) for p in hidden}
    others = [p for p in parameters if id(p) not in chosen]
    return [torch.optim.Muon(hidden, lr=1e-6), torch.optim.AdamW(others, lr=1e-6, fused=True)]


def batch(model: nn.Module, case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    if isinstance(model, networks.GPT):
        x = torch.randint(model.words, (case.batch, model.length), generator=draws).to(device)
        return x, x.flatten()
    x = torch.randn(case.batch, 3, 32, 32, generator=draws).to(device, memory_format=torch.channels_last)
    return x, torch.randint(10, (case.batch,), generator=draws).to(device)


def matrices(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.ndim > 1]


def by_autograd(model: nn.Module) -> Callable[[], Tensor]:
    """A power step without a graph, then σ = uᵀWv with one, squared, summed."""
    weights = matrices(model)
    vectors = [F.normalize(torch.randn_like(W.detach().flatten(1)[0]), dim=0) for W in weights]

    def term() -> Tensor:
        total = torch.zeros((), device=weights[0].device)
        for W, v in zip(weights, vectors, strict=True):
            flat = W.flatten(1)
            with torch.no_grad():
                u = F.normalize(flat @ v, dim=0)
                v.copy_(F.normalize(flat.T @ u, dim=0))
            total = total + torch.dot(u, flat @ v).float().square()
        return 0.5e-9 * total

    return term


def by_svd_lowrank(model: nn.Module) -> Callable[[], Tensor]:
    """As Demucs has it: the first singular value of each weight from a randomized SVD, in float32."""
    weights = matrices(model)

    def term() -> Tensor:
        largest = [torch.svd_lowrank(W.flatten(1).float(), q=1, niter=2)[1][0] for W in weights]
        return 0.5e-9 * torch.stack(largest).square().sum()

    return term


def train_step(case: Case, device: torch.device, way: str | None) -> Step:
    """A whole training step with ``way``, without a penalty if it is None."""
    torch.manual_seed(0)
    model = case.make().to(device, case.dtype)
    if device.type == "cuda" and not isinstance(model, networks.GPT):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = batch(model, case, device)
    term: Callable[[], Tensor] | None = None
    if way == "torch's spectral_norm":
        for module in list(model.modules()):
            if isinstance(module, nn.Linear | nn.Conv2d):
                spectral_norm(module)
    made = optimizers(model, case)
    if way in WAYS:
        SpectralNormRegularizer(model, 1e-9, **WAYS[way]).attach(*made)
    elif way in ("autograd penalty", "torch.svd_lowrank"):
        term = (by_autograd if way == "autograd penalty" else by_svd_lowrank)(model)
    mixed = device.type == "cuda" and case.dtype is torch.float32

    def step() -> None:
        for optimizer in made:
            optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = F.cross_entropy(model(x).float(), y)
        (loss if term is None else loss + term()).backward()
        for optimizer in made:
            optimizer.step()

    return step


def captured(step: Step) -> Step:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(step: Step, device: torch.device, steps: int) -> float:
    """Of one step, over ``steps`` of them."""
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return (time.perf_counter() - start) / steps


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(case: Case, device: torch.device, quick: bool, end: float) -> Iterator[dict[str, Any]]:
    """One record for each way: a step with it and one without, in turn."""
    plain, rounds = train_step(case, device, None), 2 if quick else 7
    graphs = {"captured: add_gradient": None} if device.type == "cuda" and case.optimizer == "SGD" else {}
    for way in [*WAYS, *RIVALS, *graphs]:
        label = {"what": "cost", "case": f"{case.name}, B={case.batch}, {case.optimizer}", "way": way}
        if time.monotonic() > end:
            yield label | {"skipped": "the part's time was up"}
            continue
        try:
            graph = way in graphs
            step = train_step(case, device, way.removeprefix("captured: "))
            pair = [captured(train_step(case, device, None)), captured(step)] if graph else [plain, step]
            steps = 8 if not quick or way == "every=8" else 1
            for call in pair:
                seconds(call, device, 1 if quick else 8)
            times = [[seconds(call, device, steps) for call in pair] for _ in range(rounds)]
        except Exception as error:
            yield label | {"failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        without, with_ = (statistics.median(t) for t in zip(*times, strict=True))
        added = statistics.median(b - a for a, b in times)
        yield (
            label
            | {"ms": 1e3 * without, "with_ms": 1e3 * with_, "added_ms": 1e3 * added}
            | ({} if graph else {"kernels": kernels(step, device) - kernels(plain, device)})
        )
    yield floor(case, device)


def kernels(step: Step, device: torch.device) -> int:
    """Kernels launched in a step; operators on a CPU."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=kinds) as seen:
        step()
        wait(device)
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    return sum(event.device_type == wanted for event in seen.events())


def bandwidth(device: torch.device, quick: bool) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.zeros(2**22 if quick else 2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device, 4) for _ in range(3))


def floor(case: Case, device: torch.device) -> dict[str, Any]:
    """One read of each W and one read-modify-write of its gradient, at the measured bandwidth."""
    size = sum(W.numel() for W in matrices(copy.copy(case.make()))) * torch.finfo(case.dtype).bits // 8
    rate = bandwidth(device, device.type == "cpu")
    label = {"what": "cost", "case": f"{case.name}, B={case.batch}, {case.optimizer}", "way": "floor"}
    return label | {"added_ms": 1e3 * 3 * size / rate, "bandwidth": rate}
