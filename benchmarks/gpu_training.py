"""The paper's VGG on its device: a slice of the comparison at full size, and the measures beside those of the CPU."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import spectreg
from benchmarks import gpu_networks as networks
from benchmarks.gpu_cost import wait
from benchmarks.gpu_networks import Pictures
from spectreg import SpectralNormRegularizer, adversarial_loss

METHODS = ("vanilla", "decay", "adversarial", "spectral")
RATES = {64: 0.01, 4096: 0.1}
EPOCHS, SEEDS = 200, 5  # of studies/paper.toml
TIMED = 5


class Trained(NamedTuple):
    """A network and what is said of its training."""

    model: nn.Module
    record: dict[str, Any]


def network(device: torch.device, quick: bool) -> nn.Module:
    torch.manual_seed(0)
    model = networks.vgg(8, (1, 1), 16) if quick else networks.vgg()
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def loss_of(method: str, forward: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    if method == "adversarial":
        return lambda x, y: adversarial_loss(forward, cross_entropy, x, y, 1.0, 0.5)
    return lambda x, y: cross_entropy(forward(x), y)


def optimizer_of(method: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    weights = [weight.tensor for weight in spectreg.named_weights(model)]
    chosen = {id(weight) for weight in weights}
    groups = [
        {"params": weights, "weight_decay": 1e-4 if method == "decay" else 0.0},
        {"params": [p for p in model.parameters() if id(p) not in chosen]},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True)
    if method == "spectral":
        SpectralNormRegularizer(model, 0.01).attach(optimizer)
    return optimizer


def order(n: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of numbers of images, epoch after epoch, the remainder dropped."""
    while True:
        yield from torch.randperm(n, device=device)[: n // size * size].split(size)


def train(method: str, size: int, data: Pictures, budget: float, compiled: bool, quick: bool) -> Trained:
    """As many steps as take ``budget`` seconds, the rate divided by ten after one half and after three quarters."""
    device, start = data.x.device, time.perf_counter()
    model = network(device, quick)
    optimizer = optimizer_of(method, model, RATES[4096 if size > 64 else 64])
    loss_fn = loss_of(method, torch.compile(model) if compiled else model)  # type: ignore[arg-type]
    batches = order(len(data.y), size, device)

    def step() -> Tensor:
        chosen = next(batches)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_fn(data.x[chosen], data.y[chosen])
        loss.backward()
        optimizer.step()
        return loss.detach()

    model.train()
    step()
    wait(device)
    begin = time.perf_counter()
    for _ in range(TIMED):
        step()
    wait(device)
    each = (time.perf_counter() - begin) / TIMED
    an_epoch = len(data.y) // size
    total = max(min(int((budget - (time.perf_counter() - start)) / each), EPOCHS * an_epoch), 1)
    begin = time.perf_counter()
    for number in range(total):
        if number in (total // 2, 3 * total // 4) and number:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        step()
    wait(device)
    taken = time.perf_counter() - begin
    rate = total * size / taken
    hours = EPOCHS * an_epoch * size / rate / 3600
    return Trained(
        model,
        {
            "images_a_second": rate,
            "epochs": total * size / len(data.y),
            "hours_of_200_epochs": hours,
            "compiled": compiled,
            **accuracies(model, data),
            "sigma": {name: s.sigma for name, s in spectreg.singular_values(model).items()},
        },
    )


@torch.inference_mode()
def accuracies(model: nn.Module, data: Pictures) -> dict[str, float]:
    model.eval()
    shares = []
    for x, y in ((data.x, data.y), (data.test_x, data.test_y)):
        correct = sum((model(a).argmax(1) == b).sum() for a, b in zip(x.split(1024), y.split(1024), strict=True))
        shares.append(float(correct) / len(y))
    return {"train_accuracy": shares[0], "test_accuracy": shares[1], "gap": shares[0] - shares[1]}


def a_slice(data: Pictures, end: float, quick: bool) -> Iterator[dict[str, Any]]:
    """All methods at both batch sizes, each with an equal share of what is left of the time."""
    torch._functorch.config.donated_buffer = False  # adversarial training goes back through a graph twice
    points = [(size, method) for size in (min(4096, len(data.y)), 64) for method in METHODS]
    hours = 0.0
    for number, (size, method) in enumerate(points):
        label = {"what": "a slice", "case": f"{method}, B={size}", "data": data.source}
        budget = max(end - time.monotonic(), 0.0) / (len(points) - number)
        try:
            try:
                done = train(method, size, data, budget, data.x.is_cuda, quick)
            except Exception as error:
                if not data.x.is_cuda:
                    raise
                label["compiling"] = f"{type(error).__name__}: {error}"[:200]
                done = train(method, size, data, budget, False, quick)
        except Exception as error:
            yield label | {"failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        hours += SEEDS * done.record["hours_of_200_epochs"]
        yield label | done.record
    yield {"what": "a slice", "case": "the VGG of studies/paper.toml, 5 seeds, without evaluations", "hours": hours}


def measures(data: Pictures, quick: bool) -> Iterator[dict[str, Any]]:
    """Each measure on the device and on the CPU."""
    device, model, count = data.x.device, network(data.x.device, quick).eval(), 8 if quick else 64
    x, y = data.test_x[:count].contiguous(), data.test_y[:count]
    kinds: dict[str, Callable[[nn.Module, Tensor, Tensor], list[float]]] = {
        "largest singular values": lambda m, x, y: [s.sigma for s in spectreg.singular_values(m).values()],
        "top Hessian eigenvalue": lambda m, x, y: list(
            spectreg.hessian_top_eigenvalues(m, cross_entropy, [(x, y)], tolerance=0.01, max_products=100).values
        ),
        "Jacobian norms": lambda m, x, y: spectreg.jacobian_norm(m, x, tolerance=0.01).value.tolist(),
        "operator norm of the first convolution": lambda m, x, y: [
            float(spectreg.operator_norm(next(k for k in m.modules() if isinstance(k, nn.Conv2d)), (3, 32, 32)).value)
        ],
    }
    host = copy.deepcopy(model).cpu()
    for name, kind in kinds.items():
        label: dict[str, Any] = {"what": "measures", "case": name}
        try:
            begin = time.perf_counter()
            found = kind(model, x, y)
            seconds = time.perf_counter() - begin
            truth = kind(host, x.cpu(), y.cpu())
        except Exception as error:
            yield label | {"failed": f"{type(error).__name__}: {error}"[:300]}
            continue
        apart = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, truth, strict=True))
        yield label | {"value": max(found), "cpu": max(truth), "apart": apart, "seconds": seconds, "on": device.type}
