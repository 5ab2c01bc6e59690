"""The GPU's benchmark: its checks on the CPU and, where there is one, on a GPU; the command; the page."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu, gpu_checks, gpu_cost, gpu_networks

CPU = torch.device("cpu")
CHECKS = gpu_checks.checks()
QUICKEST = ("one step, add_gradient(), float32", "k = 2, penalty(), bfloat16", "attached to a fused AdamW")
# Of each form both ways are checked, and both precisions, but on a CPU not each way in each precision.
TWICE = ("add_gradient(), bfloat16", "penalty(), float32")
LINE = {
    "what": "cost",
    "case": "VGG-16, B=64",
    "way": "add_gradient",
    "added_ms": 0.25,
    "device": "a card",
    "driver": "1.2",
    "cuda": "13.0",
    "torch": "2.13.0",
    "commit": "abc",
}


@pytest.mark.parametrize("name", QUICKEST)
def test_the_checks_hold_on_this_cpu(name):
    CHECKS[name](CPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in QUICKEST and not name.endswith(TWICE)])
def test_the_other_checks_hold_on_this_cpu(name):
    CHECKS[name](CPU)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", [*CHECKS, *gpu_checks.CUDA_ONLY])
def test_the_checks_hold_on_a_gpu(name):
    (CHECKS | gpu_checks.CUDA_ONLY)[name](torch.device("cuda"))


def test_a_check_notices_a_gradient_that_is_wrong(monkeypatch):
    right = gpu_checks.SpectralNormRegularizer.add_gradient

    def wrong(regularizer):
        right(regularizer)
        if regularizer.weights[0].tensor.dtype is torch.float32:
            regularizer.weights[0].tensor.grad.mul_(1.01)

    monkeypatch.setattr(gpu_checks.SpectralNormRegularizer, "add_gradient", wrong)
    with pytest.raises(AssertionError, match=r"0\.weight: 1\.0e-02 from the truth, above 1e-03"):
        CHECKS["one step, add_gradient(), float32"](CPU)


def test_the_penalties_of_the_other_ways_are_the_one_that_is_compared():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    for layer in model:
        layer.weight.data += torch.outer(*(torch.randn(n) for n in layer.weight.shape)) * 3
    truth = 0.5e-9 * sum(torch.linalg.matrix_norm(m.weight, 2).square() for m in model).item()
    term = gpu_cost.by_autograd(model)
    for _ in range(200):
        value = term()
    assert value.item() == pytest.approx(truth, rel=1e-4)
    assert gpu_cost.by_svd_lowrank(model)().item() == pytest.approx(truth, rel=1e-2)


def test_images_that_cannot_be_read_are_replaced_by_a_stand_in_that_says_so(tmp_path):
    for folder, reason in ((None, "no --data was given"), (tmp_path, "has no train")):
        data = gpu_networks.pictures(folder, (20, 10), CPU)
        assert data.x.shape == (20, 3, 32, 32)
        assert data.source.startswith("a synthetic stand-in")
        assert reason in data.source


@pytest.mark.slow
def test_the_command_writes_a_line_for_each_thing_as_it_is_known(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(gpu.QUICK, "slice", 2)  # seconds, shared by all methods
    out = tmp_path / "gpu.jsonl"
    words = ["--device", "cpu", "--quick", "--out", str(out), "--parts", "measures", "slice"]
    assert gpu.main(words) == 0
    lines = gpu.read(out)
    assert {"largest singular values", "Jacobian norms", "spectral, B=64"} < {line["case"] for line in lines}
    assert all(line["device"] == "the CPU" and line["torch"] and line["commit"] for line in lines)
    assert all(line["apart"] < 1e-6 for line in lines if line["what"] == "measures")
    assert "0 failed" in capsys.readouterr().out


def test_without_a_gpu_the_command_says_what_can_be_tried(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no CUDA device is here: `--device cpu --quick`" in capsys.readouterr().err


def test_the_page_says_not_run_yet_until_a_gpu_has_and_then_shows_where_and_what(tmp_path):
    cpu = LINE | {"device": "the CPU", "cuda": None}
    assert "**Not run yet**" in gpu.page([]) == gpu.page([cpu])
    text = gpu.page([LINE, LINE | {"case": "GPT", "failed": "RuntimeError: a | b"}])
    assert "Not run yet" not in text
    assert "- a card, driver 1.2, torch 2.13.0, commit abc" in text
    assert "| VGG-16, B=64, add_gradient | added ms 0.25 |" in text
    assert "failed RuntimeError: a / b |" in text
    (tmp_path / "cut.jsonl").write_text(json.dumps(LINE) + "\n" + json.dumps(LINE)[:20])
    assert gpu.read(tmp_path / "cut.jsonl") == [LINE]


def test_the_page_in_docs_is_the_one_that_the_record_makes():
    assert gpu.PAGE.read_text() == gpu.page(gpu.read(gpu.RESULTS))
