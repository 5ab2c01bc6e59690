"""A cache of its own for the tests, small runs, and the place of the photographs."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from lightning_fabric import Fabric

from spectreg_lab.settings.config import VGG, Config, Data, Method, Spectral

METHODS = ("vanilla", "decay", "adversarial", "spectral")


def without_torchmetrics(folder: Path) -> str:
    """A path to import from on which torchmetrics is missing.

    Lightning's Fabric imports it where it is installed, and with it transformers and much of scipy: half of the six
    seconds that a process takes to start.
    """
    lean = folder / "lean"
    lean.mkdir(exist_ok=True)
    (lean / "torchmetrics.py").write_text("raise ImportError")
    return str(lean)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that a test reads or writes lies in the user's cache, or need survive a power cut."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"  # of all workers: decoded once
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setenv("SPECTREG_CACHE", str(folder))
        paths = [without_torchmetrics(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        yield folder


@pytest.fixture(scope="session")
def fabric() -> Fabric:
    """One process on the CPU."""
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """A run of a second: ``tiny(method=…, epochs=…)``."""

    def make(method: Method | None = None, **settings: object) -> Config:
        defaults = {
            "model": VGG(width=4, stages=(1, 1), hidden=8),
            "data": Data(train_size=96, test_size=40),
            "method": method or Spectral(),
            "batch_size": 32,
            "learning_rate": 0.05,
            "epochs": 3,
        }
        return Config.model_validate({**defaults, **settings})

    return make


@pytest.fixture(scope="session")
def photographs() -> Path:
    """The folder of photographs; a test that needs it skips where it is absent."""
    place = os.environ.get("SPECTREG_TEST_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("SPECTREG_TEST_DATA does not name a folder of photographs")
    return Path(place)


@pytest.fixture(scope="session")
def few_photographs(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the 60,000 of CIFAR-10, 300 of each class to train on and 100 to test on, in files of the same kind."""
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("few-photographs")
    for split, of_each in (("train", 300), ("test", 100)):
        table = parquet.read_table(photographs / "cifar10-jpeg" / f"{split}.parquet")
        rows = pd.Series(range(len(table))).groupby(table["label"].to_pandas()).head(of_each)
        parquet.write_table(table.take(rows.to_list()), folder / f"{split}.parquet")
    return folder
