"""The training loop: a generator that yields after every epoch.

Everything random in an epoch follows from the run's seed and the epoch's number (`spectreg_lab.data.batches`): a
run goes on exactly from its weights, momentum, the method's vectors and the number of epochs done.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from spectreg_lab import methods, models
from spectreg_lab.data import Images, batches, generator, steps_per_epoch
from spectreg_lab.settings.config import Config
from spectreg_lab.training.evaluation import evaluate, portion, read, spectral_norms


class NonFiniteLossError(Exception):
    """The loss, or a weight, left the finite numbers: the run has failed."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch of training left: its numbers, the network, and all that a run needs to go on from here.

    ``model`` is the one in training: it changes with the next epoch. ``images`` lie on its device.
    """

    number: int
    metrics: dict[str, Any]
    tensors: dict[str, Tensor]
    model: nn.Module
    images: Images


class Training:
    """A network in training: model, method and optimizer, all of them rebuilt from the setting."""

    def __init__(self, config: Config, images: Images, fabric: Fabric) -> None:
        self.config, self.fabric = config, fabric
        if (size := min(config.batch_size, len(images.train))) < fabric.world_size:
            raise ValueError(
                f"a batch of {size} images cannot be shared out among {fabric.world_size} processes: use at most {size}"
            )
        dtype = torch.float64 if config.precision == "64-true" else torch.float32
        self.train, self.test = (split.to(fabric.device, dtype) for split in (images.train, images.test))
        self.model = models.build(config.model, images.shape, images.classes, config.seed)
        self.model.to(fabric.device, dtype)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU
        self.method = methods.build(config, self.model)
        if config.compile:
            torch._functorch.config.donated_buffer = False  # adversarial training goes back through a graph twice
            self.method.forward = cast(nn.Module, torch.compile(self.model))
        self.optimizer = torch.optim.SGD(
            self.method.parameter_groups(),
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            fused=True,
        )

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step with the gradient of the whole batch, whatever its micro-batches and the number of processes.

        Batch normalization takes its statistics over each micro-batch of each process. Returns this process's share of
        the batch's mean loss.
        """
        self.optimizer.zero_grad()
        total, size, most = torch.zeros((), device=x.device), len(y), self.config.micro_batch
        fabric = self.fabric
        if fabric.world_size > 1:
            x, y = x[fabric.global_rank :: fabric.world_size], y[fabric.global_rank :: fabric.world_size]
        parts = zip(x.split(most), y.split(most), strict=True) if len(y) > most else ((x, y),)  # splitting takes time
        for part, labels in parts:
            with fabric.autocast():
                loss = self.method.loss(part, labels)
            if len(labels) < size:
                loss = loss * (len(labels) / size)
            loss.backward()
            total += loss.detach()
        if fabric.world_size > 1:
            self._sum_gradients()
        self.method.after_backward()
        self.optimizer.step()
        return total

    def _sum_gradients(self) -> None:
        """One all-reduce for the gradients of all parameters."""
        parameters = list(self.model.parameters())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = self._reduced(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), "sum")
        for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(summed.view(parameter.shape))

    def epoch(self, number: int) -> Tensor:
        """One pass over the training data; returns the mean of the objective over its steps, on the device."""
        rate = learning_rate(self.config, number)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(generator(self.config.seed, number, "dropout").initial_seed() + self.fabric.global_rank)
        self.model.train()
        total = torch.zeros((), device=self.fabric.device)
        for x, y in batches(
            self.train, self.config.batch_size, self.config.seed, number, self.config.data.augmentation
        ):
            total += self.step(x, y)
        if self.fabric.world_size > 1:
            total = self._reduced(total, "sum")
            self._average_buffers()
        return total / steps_per_epoch(len(self.train), self.config.batch_size)

    def _average_buffers(self) -> None:
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self._reduced(buffer, "mean"))

    def _reduced(self, tensor: Tensor, how: Literal["sum", "mean"]) -> Tensor:
        reduced = self.fabric.all_reduce(tensor, reduce_op=how)
        assert isinstance(reduced, Tensor)
        return reduced

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the weights, the momentum and the method's vectors, by ``part/name``."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum/{name}"] = momentum
        tensors |= {f"method/{name}": value for name, value in self.method.state().items()}
        return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "momentum": {}, "method": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = value.to(self.fabric.device)
        self.model.load_state_dict(parts["model"])
        for name, parameter in self.model.named_parameters():
            if name in parts["momentum"]:
                momentum = torch.empty_like(parameter).copy_(
                    parts["momentum"][name]
                )  # in the parameter's memory format
                self.optimizer.state[parameter]["momentum_buffer"] = momentum
        self.method.load_state(parts["method"])


def train(
    config: Config, images: Images, fabric: Fabric, resume: tuple[int, dict[str, Tensor]] | None
) -> Iterator[Epoch]:
    """Train the run of ``config``, from the beginning or after the epoch of ``resume``; yields after every epoch.

    Args:
        resume: The number and the ``tensors`` of the last finished epoch.

    Raises:
        NonFiniteLossError: the objective of an epoch, or the training loss after it, was not finite.
    """
    training = Training(config, images, fabric)
    done = 0
    if resume is not None:
        done, tensors = resume
        training.load(tensors)
    for number in range(done + 1, config.epochs + 1):
        start = time.perf_counter()
        objective = training.epoch(number)
        objective.item()  # waits for the device: what follows is not training
        seconds = time.perf_counter() - start
        metrics = {"epoch": number, **_metrics(training, number, objective), "seconds": seconds}
        on_device = Images(training.train, training.test, images.classes)
        yield Epoch(number, metrics, training.tensors(), training.model, on_device)


def _metrics(training: Training, number: int, objective: Tensor) -> dict[str, Any]:
    config = training.config
    due = number % config.evaluate_every == 0 or number == config.epochs
    splits = {"train": training.train, "test": training.test} if due else {}
    values, size = {"objective": objective}, portion(config.micro_batch, training.fabric)
    for side, split in splits.items():
        totals = evaluate(training.method.forward, split, size, training.fabric)
        values[f"{side}_loss"], values[f"{side}_accuracy"] = totals
    parts = {"sigma": spectral_norms(training.model), "sigma_estimate": training.method.estimates()}
    values |= {f"{part}/{name}": norm for part, norms in parts.items() for name, norm in norms.items()}
    numbers = read(values)
    _check_finite(config, number, numbers)
    metrics: dict[str, Any] = {"objective": numbers["objective"]}
    for side, split in splits.items():
        metrics |= {key: numbers[key] / len(split) for key in (f"{side}_loss", f"{side}_accuracy")}
    metrics["learning_rate"] = learning_rate(config, number)
    return metrics | {
        part: {name: numbers[f"{part}/{name}"] for name in norms} for part, norms in parts.items() if norms
    }


def _check_finite(config: Config, number: int, numbers: dict[str, float]) -> None:
    names = {"objective": "training objective", "train_loss": "training loss"}
    names |= {key: f"spectral norm of {key.removeprefix('sigma/')}" for key in numbers if key.startswith("sigma/")}
    for key, name in names.items():
        if not math.isfinite(numbers.get(key, 0.0)):
            raise NonFiniteLossError(
                f"epoch {number}: the {name} is {numbers[key]}; the learning rate {config.learning_rate} is probably "
                "too large for this network and batch size"
            )


def learning_rate(config: Config, epoch: int) -> float:
    """The learning rate of an epoch, counted from 1: a tenth after half of the training, a hundredth after ¾ of it."""
    done = (epoch - 1) / config.epochs
    return config.learning_rate * 0.1 ** ((done >= 0.5) + (done >= 0.75))
