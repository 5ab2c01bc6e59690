import json
import math
import os
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from spectreg.checkpoints.files import Stored
from spectreg.measures.spectra import singular_values, spectrum_of

pytestmark = pytest.mark.portable


def gaussian(*shape: int, seed: int = 0, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def true_values(W):
    return torch.from_numpy(np.linalg.svd(W.double().flatten(1).numpy(), compute_uv=False))


@given(
    shape=st.sampled_from([(3, 5), (5, 3), (1, 4), (7, 7), (4, 3, 3, 3), (40, 2, 3), (150, 160)]),
    decay=st.floats(0, 8),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_the_values_are_those_of_numpy_to_the_promised_digits(shape, decay, scale, dtype):
    W = gaussian(*shape).flatten(1).double()
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    W = (scale * U @ torch.diag(S * torch.logspace(0, -decay, len(S), dtype=torch.float64)) @ V).view(shape).to(dtype)
    (spectrum,) = singular_values({"weight": W}).values()
    truth = true_values(W)
    assert spectrum.sigma == pytest.approx(truth[0].item(), rel=1e-12)
    assert (spectrum.values[0] - truth).abs().max() <= 1e-7 * truth[0]


def test_ranks_and_norms_follow_their_definitions():
    W = gaussian(4, 6)
    (spectrum,) = singular_values({"weight": W}).values()
    S = true_values(W)
    p = S / S.sum()
    assert spectrum.frobenius == pytest.approx(W.double().norm().item(), rel=1e-12)
    assert spectrum.stable_rank == pytest.approx(((S**2).sum() / S[0] ** 2).item(), rel=1e-6)
    assert spectrum.effective_rank == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


def test_the_identity_has_full_rank_and_zero_has_none():
    spectra = singular_values({"eye": torch.eye(5), "zero": torch.zeros(2, 3)})
    assert spectra["eye"].stable_rank == pytest.approx(5)
    assert spectra["eye"].effective_rank == pytest.approx(5)
    assert spectra["zero"].values.tolist() == [[0.0, 0.0]]
    assert math.isnan(spectra["zero"].stable_rank)
    assert math.isnan(spectra["zero"].effective_rank)


def test_weights_whose_squares_overflow_are_no_error():
    spectrum = singular_values({"weight": torch.diag(torch.tensor([2e200, 1e200], dtype=torch.float64))})["weight"]
    assert spectrum.values.tolist() == [[2e200, 1e200]]


def test_each_group_of_a_convolution_is_a_block():
    conv = nn.Conv2d(4, 6, 3, groups=2)
    (spectrum,) = singular_values(conv).values()
    assert spectrum.name == "weight"
    assert spectrum.shape == (2, 3, 18)
    for group, values in zip(conv.weight.detach().chunk(2), spectrum.values, strict=True):
        torch.testing.assert_close(values, true_values(group), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(90, 200), (200, 90)])
def test_the_top_values_of_a_large_matrix_match_and_say_how_well(shape):
    W = gaussian(*shape, dtype=torch.float64)
    (spectrum,) = singular_values({"weight": W}, top=3).values()
    truth = true_values(W)[:3]
    assert spectrum.converged
    assert not spectrum.complete
    assert math.isnan(spectrum.effective_rank)
    assert spectrum.products > 0
    assert (spectrum.values[0] - truth).abs().max() <= spectrum.residual
    torch.testing.assert_close(spectrum.values[0], truth, rtol=1e-6, atol=0)


def test_the_top_values_of_a_small_matrix_are_the_first_of_all():
    W = gaussian(10, 12)
    few, every = singular_values({"W": W}, top=4)["W"], singular_values({"W": W})["W"]
    assert few.values.tolist() == every.values[:, :4].tolist()
    assert not few.complete
    assert every.complete


def state():
    return {
        "features.0.weight": gaussian(4, 3, 3, 3),
        "features.0.bias": gaussian(4),
        "head.weight": gaussian(5, 4, seed=1, dtype=torch.bfloat16),
        "position_ids": torch.arange(6).view(1, 6),
    }


def write_safetensors(folder):
    save_file(state(), folder / "model.safetensors")
    return folder / "model.safetensors"


def write_shards(folder):
    tensors, files = state(), {}
    for i, name in enumerate(tensors):
        files[name] = f"model-{i}.safetensors"
        save_file({name: tensors[name]}, folder / files[name])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def write_torch(folder, content=None, **options):
    torch.save(state() if content is None else content, folder / "model.pt", **options)
    return folder / "model.pt"


def write_training(folder):
    return write_torch(folder, {"epoch": 3, "model": state(), "optimizer": {"momentum": gaussian(9, 9)}})


def write_legacy(folder):
    return write_torch(folder, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [write_safetensors, write_shards, write_torch, write_training, write_legacy])
def test_every_kind_of_file_gives_the_spectra_of_its_state_dict(tmp_path, write):
    measured, expected = singular_values(write(tmp_path)), singular_values(state())
    assert list(expected) == ["features.0.weight", "head.weight"]
    assert sorted(measured) == sorted(expected)
    for name, spectrum in expected.items():
        assert measured[name].values.tolist() == spectrum.values.tolist()


def test_one_weight_of_a_file_is_in_memory_at_a_time(tmp_path, monkeypatch):
    path, read, alive = write_safetensors(tmp_path), [], []

    class Watched(Stored):
        def __getitem__(self, name):
            read.append(weakref.ref(tensor := super().__getitem__(name)))
            return tensor

    def watched(*arguments):
        alive.append(sum(ref() is not None for ref in read))
        return spectrum_of(*arguments)

    monkeypatch.setattr("spectreg.measures.spectra.Stored", Watched)
    monkeypatch.setattr("spectreg.measures.spectra.spectrum_of", watched)
    assert len(singular_values(path)) == 2
    assert len(read) >= 4
    assert alive == [1, 1]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_never_executed(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = write_torch(tmp_path, {"weight": torch.eye(2), "x": Bomb()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model.pt' is refused, it would call posix.system"):
        singular_values(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("write", [write_safetensors, write_torch, write_legacy])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_file_is_named(tmp_path, write, share):
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{path.name}' is (truncated|not a checkpoint)"):
        singular_values(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"", r"a.pt' is truncated or not a checkpoint"),
        ("a.pt", b"hello, this is no checkpoint", r"a.pt' is (truncated or )?not a checkpoint"),
        ("a.safetensors", b"hello, this is no checkpoint", "truncated or not a safetensors file"),
        ("a.index.json", b"{}", "has no 'weight_map'"),
        ("a.index.json", b"[", "has no 'weight_map'"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        singular_values(tmp_path / name)


def test_a_checkpoint_without_a_state_dict_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=r"holds the keys \['epoch'\]: no tensors"):
        singular_values(write_torch(tmp_path, {"epoch": 3}))
    with pytest.raises(ValueError, match="holds a Tensor: no tensors"):
        singular_values(write_torch(tmp_path, torch.eye(2)))


def test_a_missing_file_and_a_missing_shard_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt' is not a file"):
        singular_values(tmp_path / "nowhere.pt")
    index = write_shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors"):
        singular_values(index)


def test_a_shard_without_its_tensor_is_named(tmp_path):
    index = write_shards(tmp_path)
    save_file({"other": torch.eye(2)}, tmp_path / "model-0.safetensors")
    with pytest.raises(ValueError, match=r"'model-0.safetensors' lacks 'features.0.weight'"):
        singular_values(index)


def test_without_the_safetensors_package_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    path = write_safetensors(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        singular_values(path)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"w": torch.tensor([[1.0, float("nan")]])}, {}, "weight 'w' has 1 entries that are NaN"),
        ({"w": torch.ones(2)}, {}, "dict has no weight to measure"),
        (nn.ReLU(), {}, "ReLU has no weight"),
        ({"w": torch.eye(2)}, {"select": lambda name, w: False}, "dict has no weight to measure"),
        ({"w": torch.eye(2)}, {"top": 0}, "top is 0"),
    ],
)
def test_a_wrong_argument_is_named(source, options, message):
    with pytest.raises(ValueError, match=message):
        singular_values(source, **options)


def test_the_residual_of_the_largest_values_alone_is_in_the_units_of_the_weight():
    W = torch.randn(1, 100, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = (spectrum_of("w", c * W, 3, 1e-3, torch.Generator().manual_seed(1)) for c in (1.0, 1024.0))
    assert 0 < one.residual < 1e-3 * one.values.max()
    assert other.residual == 1024 * one.residual
