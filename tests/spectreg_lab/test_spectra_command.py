import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from spectreg_lab.cli import app, main


@pytest.fixture
def checkpoint(tmp_path):
    draws = torch.Generator().manual_seed(0)
    weights = {"conv.weight": torch.randn(4, 3, 3, 3, generator=draws), "fc.weight": torch.randn(5, 7, generator=draws)}
    save_file({**weights, "fc.bias": torch.zeros(5)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", weights


def test_spectra_of_a_checkpoint_are_a_table_a_csv_and_a_plot(checkpoint, tmp_path):
    path, weights = checkpoint
    out = ["--csv", str(tmp_path / "spectra.csv"), "--plot", str(tmp_path / "spectra.svg")]
    result = CliRunner().invoke(app, ["spectra", str(path), *out])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "spectra.csv").open()))
    for name, weight in weights.items():
        found = [float(row["value"]) for row in rows if row["weight"] == name]
        expected = np.linalg.svd(weight.flatten(1).double().numpy(), compute_uv=False)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert f"{expected[0]:.4g}" in result.output
    assert "<svg" in (tmp_path / "spectra.svg").read_text()
    assert "fc.bias" not in result.output


def test_what_is_no_checkpoint_is_one_line_and_a_pickle_with_code_is_never_executed(tmp_path, capsys, monkeypatch):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"weight": Code()}, tmp_path / "code.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing of the kind")
    for name in ("code.pt", "broken.safetensors", "absent.safetensors"):
        monkeypatch.setattr("sys.argv", ["spectreg", "spectra", str(tmp_path / name)])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert name in err
        assert len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "executed").exists()


def test_only_the_largest_are_shown_on_request(checkpoint, tmp_path):
    result = CliRunner().invoke(app, ["spectra", str(checkpoint[0]), "--top", "1", "--csv", str(tmp_path / "top.csv")])
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "top.csv").read_text().splitlines()) == 1 + 2


def test_the_table_of_the_largest_says_how_good_they_are(tmp_path):
    weight = torch.randn(90, 120, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    result = CliRunner().invoke(app, ["spectra", str(tmp_path / "model.safetensors"), "--top", "2"])
    head, line = (text.split() for text in result.output.splitlines()[-2:])
    assert head[-2:] == ["residual", "converged"]
    assert line[-1] == "yes"
    truth = np.linalg.svd(weight.double().numpy(), compute_uv=False)[0]
    assert abs(float(line[2]) - truth) <= float(line[-2]) + 1e-3 * truth


def test_a_weight_that_is_not_finite_is_named_in_one_line(tmp_path, capsys, monkeypatch):
    save_file({"a.weight": torch.eye(2), "b.weight": torch.full((2, 2), float("inf"))}, tmp_path / "model.safetensors")
    monkeypatch.setattr("sys.argv", ["spectreg", "spectra", str(tmp_path / "model.safetensors")])
    with pytest.raises(SystemExit):
        main()
    assert "weight 'b.weight' has 4 entries that are NaN or infinite" in capsys.readouterr().err
