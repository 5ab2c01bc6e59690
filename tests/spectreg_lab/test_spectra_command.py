import csv
import json
import re
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
    assert "left out, 1 dimension: 1 in number" in result.output


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


def fails(arguments, monkeypatch, capsys) -> str:
    """The one line that the command gives for arguments it cannot use."""
    monkeypatch.setattr("sys.argv", ["spectreg", "spectra", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_an_output_never_replaces_an_input(checkpoint, tmp_path, monkeypatch, capsys):
    path, weights = checkpoint
    before = path.read_bytes()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*weights, "fc.bias"], path.name)}))
    (tmp_path / "link.csv").symlink_to(path)
    for source, option, out in [
        (path, "--csv", path),
        (path, "--plot", path),
        (path, "--csv", tmp_path / "." / "link.csv"),
        (index, "--csv", path),
        (index, "--csv", index),
    ]:
        assert "an output never replaces an input" in fails([source, option, out], monkeypatch, capsys)
    other = tmp_path / "other.safetensors"
    save_file(weights, other)
    assert "an output never replaces" in fails([path, other, "--csv", other], monkeypatch, capsys)
    assert "an output never replaces" in fails([path, "--base", other, "--csv", other], monkeypatch, capsys)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "x.foo"], r"--plot x\.foo: its name must end in one of .*png"),
        (["--csv", "nowhere/x.csv"], "--csv nowhere/x.csv: its folder does not exist"),
        (["--csv", "x.svg", "--plot", "x.svg"], "give each a file of its own"),
        (["--base", "model.safetensors"], "--base is for a checkpoint of adapters .*: leave it out"),
        (["--map", "other"], "map 'other' does not fit"),
        (["--map", "nothing*=each"], "map: no weight matches 'nothing\\*'"),
        (["--map", "each", "--map", "fc*=2"], "--map: give one value for all weights, or PATTERN=VALUE"),
        (["--map", "fc*=2", "--map", "fc*=3"], r"--map: fc\* is given more than once"),
    ],
)
def test_an_option_that_cannot_be_used_is_one_line_and_writes_nothing(
    options, message, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails([checkpoint[0], *options], monkeypatch, capsys))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_full_disk_is_a_failure_and_a_device_stays_one(checkpoint, monkeypatch, capsys):
    assert "No space left on device (/dev/full)" in fails([checkpoint[0], "--csv", "/dev/full"], monkeypatch, capsys)
    assert Path("/dev/full").is_char_device()


def test_two_checkpoints_are_compared_weight_by_weight(checkpoint, tmp_path):
    path, weights = checkpoint
    change = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    after = {"fc.weight": weights["fc.weight"] + change, "conv.weight": weights["conv.weight"], "new": torch.eye(2)}
    save_file(after, tmp_path / "after.safetensors")
    out = ["--csv", str(tmp_path / "both.csv"), "--plot", str(tmp_path / "both.svg")]
    result = CliRunner().invoke(app, ["spectra", str(path), str(tmp_path / "after.safetensors"), *out])
    assert result.exit_code == 0, result.output
    lines = [
        line.split() for line in result.output.splitlines() if line.strip().startswith(("fc.weight", "conv.weight"))
    ]
    compared = {line[0]: [float(x) for x in line[1:]] for line in lines[-2:]}
    truth = [np.linalg.norm(w.double().numpy(), 2) for w in (weights["fc.weight"], after["fc.weight"], change)]
    assert compared["fc.weight"][:3] == pytest.approx([*truth[:2], truth[1] / truth[0]], rel=1e-3)
    assert compared["fc.weight"][-1] == pytest.approx(truth[2], rel=1e-3)
    assert compared["conv.weight"][2] == 1
    assert compared["conv.weight"][-1] == 0
    assert "only in B: new" in result.output
    rows = list(csv.DictReader((tmp_path / "both.csv").open()))
    assert {row["checkpoint"] for row in rows} == {str(path), str(tmp_path / "after.safetensors")}


def test_the_ten_largest_and_the_ten_flattest_are_set_apart(tmp_path):
    draws = torch.Generator().manual_seed(0)
    weights = {f"layer{i:02}": (i + 1) * torch.randn(6, 6, generator=draws) for i in range(12)}
    weights["flat"] = 0.01 * torch.eye(6)
    save_file(weights, tmp_path / "model.safetensors")
    output = CliRunner().invoke(app, ["spectra", str(tmp_path / "model.safetensors")]).output
    largest, flattest = output.split("the 10 largest\n")[1].split("the 10 flattest\n")
    names = [line.split()[0] for line in largest.splitlines()[1:11]]
    assert names == sorted(weights, key=lambda name: -np.linalg.norm(weights[name].numpy(), 2))[:10]
    assert flattest.splitlines()[1].split()[0] == "flat"


def test_experts_and_adapters_are_read_as_they_act(tmp_path):
    draws = torch.Generator().manual_seed(0)
    A, B, W = (torch.randn(*shape, generator=draws) for shape in [(2, 6), (5, 2), (5, 6)])
    stack = torch.randn(2, 3, 3, generator=draws)
    lora = {"fc.lora_down.weight": A, "fc.lora_up.weight": B, "fc.alpha": torch.tensor(4.0), "stack": stack}
    save_file(lora, tmp_path / "lora.safetensors")
    save_file({"fc.weight": W}, tmp_path / "base.safetensors")
    out = tmp_path / "spectra.csv"
    options = ["--base", str(tmp_path / "base.safetensors"), "--map", "stack=each", "--csv", str(out)]
    result = CliRunner().invoke(app, ["spectra", str(tmp_path / "lora.safetensors"), *options])
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(out.open()))
    largest = [float(row["value"]) for row in rows if row["index"] == "1"]
    truth = [np.linalg.norm(w.double().numpy(), 2) for w in (W + 2 * B @ A, *stack)]
    assert sorted(largest) == pytest.approx(sorted(truth), rel=1e-6)
    assert "a factor of an adapter, measured as its product: fc.lora_up.weight" in result.output


def test_a_checkpoint_and_its_adapter_are_compared_by_what_they_act_as_and_cut_as_told(tmp_path):
    draws = torch.Generator().manual_seed(0)
    A, B, W = (torch.randn(*shape, generator=draws) for shape in [(2, 6), (8, 2), (8, 6)])
    save_file({"fc.weight": W}, tmp_path / "base.safetensors")
    save_file(
        {"fc.lora_down.weight": A, "fc.lora_up.weight": B, "fc.alpha": torch.tensor(4.0)}, tmp_path / "b.safetensors"
    )
    files = [str(tmp_path / name) for name in ("base.safetensors", "b.safetensors")]
    for cut, parts in ((["--map", "fc*=2"], 2), ([], 1)):
        result = CliRunner().invoke(app, ["spectra", *files, "--base", files[0], *cut])
        assert result.exit_code == 0, result.output
        compared = [float(x) for x in result.output.splitlines()[-1].split()[1:]]
        top = [
            max(np.linalg.norm(w.double().numpy(), 2) for w in x.chunk(parts)) for x in (W, W + 2 * B @ A, 2 * B @ A)
        ]
        assert compared[:2] == pytest.approx(top[:2], rel=1e-3)
        assert compared[-1] == pytest.approx(top[2], rel=1e-3)
