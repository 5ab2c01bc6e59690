"""A study's costs: each method of the paper beside vanilla, two cores of small networks, and the report.

The methods take turns a training step at a time, through the lab's own loop, on the paper's VGG at batch 64. The report
is that of the study in results/cpu with its curves drawn out to 200 epochs.
"""

import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
from lightning_fabric import Fabric

from benchmarks.harness import ROUNDS, Row, in_turn, ratio, record, spread
from spectreg_lab.data import Images, Split
from spectreg_lab.page import report
from spectreg_lab.settings.config import VGG, Adversarial, Config, Data, Decay, DenseNet, Method, Spectral, Vanilla
from spectreg_lab.storage.run_folder import METRICS, RunFolder
from spectreg_lab.storage.store import find_run, read_study
from spectreg_lab.studies.local import LocalEngine
from spectreg_lab.studies.worker import Job
from spectreg_lab.training.train import Training

NAME = "a study"
SECONDS = 240
STUDY = Path(__file__).parents[1] / "results" / "cpu"
EPOCHS = 200
BATCH = 64
PAPERS: dict[str, tuple[Method, float]] = {
    "weight decay": (Decay(strength=1e-4), 1.01),
    "adversarial": (Adversarial(epsilon=1.0, alpha=0.5), 3.0),
    "spectral": (Spectral(strength=0.01), 1.01),
}
WHY = "What spectral adds is told more exactly by the training step above; a whole step varies by more than that."


def methods() -> None:
    """A step of each method over one of vanilla."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32, generator=generator)
    y = torch.randint(10, (BATCH,), generator=generator)
    fabric = Fabric(accelerator="cpu", devices=1)

    def step(method: Method) -> Training:
        setting = Config(model=VGG(), data=Data(), method=method, batch_size=BATCH, learning_rate=0.01, epochs=1)
        return Training(setting, Images(Split(x, y), Split(x, y), 10), fabric)

    trainings = {"vanilla": step(Vanilla())} | {name: step(method) for name, (method, _) in PAPERS.items()}
    times = in_turn({name: lambda t=t: t.step(x, y) for name, t in trainings.items()}, 2 * ROUNDS + 1)  # type: ignore[misc]
    for name, (_, most) in PAPERS.items():
        goal = f"a study: a step of {name} at most {most:g} × one of vanilla"
        case = "the paper's VGG, B=64"
        record(ratio(NAME, case, name, "vanilla", times, at_most=most, goal=goal, why=WHY))


def cores() -> None:
    """How busy a study of many small networks keeps the cores."""
    jobs, count = [], len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(8 * count):
            setting = Config(
                model=DenseNet(depth=10, growth=8),
                data=Data(train_size=640),
                method=Spectral(strength=0.01),
                batch_size=16,
                learning_rate=0.03,
                epochs=6,
                seed=seed,
            )
            jobs.append(Job(setting, find_run(Path(folder), setting.name)))
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with LocalEngine.for_machine(None, None, "cpu") as engine:
            ended = [outcome for outcome in engine.run(iter(jobs)) if outcome is not None]
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert len(ended) == len(jobs)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    goal = "a study: small networks keep the cores over 90 % busy"
    case = f"{len(jobs)} runs of a small DenseNet, {count} processes of one thread"
    record(Row(NAME, case, "busy", f"{count} cores", "%", 100 * taken / wall / count, at_least=90, goal=goal,
                seconds=wall))  # fmt: skip


def long_study(folder: Path) -> int:
    """A copy of the study in ``folder`` whose runs have `EPOCHS` epochs; returns how many runs that are."""
    shutil.copytree(STUDY, folder)
    runs = sorted((folder / "runs").iterdir())
    for run in runs:
        epochs = RunFolder(run).metrics()
        more = [epochs[n % len(epochs)] | {"epoch": n + 1} for n in range(EPOCHS)]
        (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in more))
    assert all(run.status == "finished" for run in read_study(folder).runs), "a run is not in the report"
    return len(runs)


def page() -> None:
    """The report's time and the size of its page."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "study"
        count, times = long_study(folder), []
        for _ in range(3):
            start = time.process_time()
            written = report.write(folder)
            times.append((time.process_time() - start) * 100 / count)
        size = written.stat().st_size / 1e6
    case = f"the report of {count} runs × {EPOCHS} epochs"
    goal = "a study: the report of 100 runs × 200 epochs within 20 s"
    record(spread(NAME, case, "100 runs", "", "s", times, at_most=20, goal=goal))
    record(Row(NAME, case, "the page", "", "MB", size, at_most=12, goal="a study: the page under 12 MB"))


def main() -> None:
    methods()
    cores()
    page()
