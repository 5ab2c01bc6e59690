"""Every test runs with the shapes of the library's annotations checked, on one thread unless OMP_NUM_THREADS is set."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping

with jaxtyping.install_import_hook("spectreg", "beartype.beartype"):
    import spectreg  # noqa: F401

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
