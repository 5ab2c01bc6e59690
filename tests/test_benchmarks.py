"""The harness of the benchmarks, at sizes where nothing is measured."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import alone, page, penalties
from benchmarks.harness import Row, in_turn, quartiles, ratio, record, same


def model_with_a_clear_first_singular_value() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 6, bias=False)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
            p.view(-1)[0] += 10
    return model


def test_the_floor_every_rival_and_ours_add_the_same_gradient_of_the_svd():
    model = model_with_a_clear_first_singular_value()
    weights = penalties.matrices(model)
    U, S, Vh = zip(*(torch.linalg.svd(W.detach()) for W in weights), strict=True)
    truth = torch.cat([(0.3 * s[0] * torch.outer(u[:, 0], vh[0])).flatten() for u, s, vh in zip(U, S, Vh, strict=True)])
    vectors = [vh[0].clone() for vh in Vh]
    ways = penalties.ways(model, 0.3, vectors, warmup=60)
    names = ("add_gradient", "penalty()", "floor", "torch calls by hand", "autograd penalty", "SVD penalty")
    for name in names:
        penalties.with_gradients(model)
        ways[name]()
        found = torch.cat([W.grad.flatten() for W in weights])
        torch.testing.assert_close(found, truth)


def test_calls_take_turns_and_warmup_rounds_do_not_count():
    order: list[str] = []
    times = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert {name: len(t) for name, t in times.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_of_the_paired_ratios():
    row = ratio("b", "case", "ours", "peer", {"ours": [1.0, 2.0, 9.0], "peer": [1.0, 4.0, 3.0]}, at_most=0.9)
    assert (row.low, row.value, row.high) == quartiles([1.0, 0.5, 3.0]) == (0.75, 1.0, 2.0)
    assert row.met is False


def test_two_sides_that_compute_different_things_stop_the_benchmark():
    with pytest.raises(AssertionError, match=r"σ: the two sides differ by 1.0e\+00 relative, above 1e-03"):
        same("σ", torch.tensor([2.0]), torch.tensor([1.0]), 1e-3)


def test_a_row_is_behind_above_one_unless_more_is_better():
    assert Row("b", "c", "ours", "peer", "×", 1.1).behind
    assert not Row("b", "c", "ours", "peer", "×", 0.9).behind
    assert not Row("b", "c", "peer", "ours", "×", 1.1, at_least=20.0).behind
    assert Row("b", "c", "peer", "ours", "×", 0.9, at_least=20.0).behind
    assert not Row("b", "c", "ours", "peer", "ms", 3.0).behind


def test_parametrized_weights_leave_the_gradient_that_a_backward_pass_would():
    model = penalties.normalized(model_with_a_clear_first_singular_value())
    act = penalties.parametrized_weights(model)
    penalties.with_gradients(model)
    act()
    weights = [p for p in model.parameters() if p.ndim == 2]
    assert len(weights) == 2
    assert all(W.grad.norm() > 0 for W in weights)
    for W in weights:  # σ(W/σ) is 1 whatever the length of W: the gradient is at right angles to W
        assert abs(torch.sum(W * W.grad)) < 1e-6 * W.norm() * W.grad.norm()


def test_peak_memory_is_that_of_the_tensors_alive_at_once():
    def two_after_each_other_then_two_together():
        torch.zeros(1000)
        torch.zeros(1000)
        return torch.zeros(1000), torch.zeros(1000)

    assert alone.peak(two_after_each_other_then_two_together) == 2 * 4000


def test_the_page_shows_every_line_and_says_which_limits_are_missed_and_why(tmp_path):
    lines, target = tmp_path / "benchmarks.jsonl", tmp_path / "benchmarks.md"
    limit = {"at_most": 1.5}
    rows = [
        Row("a step", "small", "ours", "peer", "×", 1.25, 1.0, 1.5, 15, error=1e-6, why="it checks", **limit),
        Row("a step", "large", "ours", "peer", "×", 7.0, 6.0, 8.0, 15, note="a note", why="it waits", **limit),
        Row("a step", "large", "ours", "another", "×", 0.5, 0.4, 0.6, 15, why="not to be seen"),
        Row("a step", "large", "absent peer", "ours", "×", note="ModuleNotFoundError: No module named 'peer'"),
        Row("norms", "16", "FFT and SVD", "truth", "ms", 3.0, error=1e-3),
    ]
    for row in rows:
        record(row, lines)
    page.write(lines, target, tmp_path / "every-row.md")
    text = (tmp_path / "every-row.md").read_text()
    assert "1 of 2 limits are met.\n\n- large, ours beside peer: 7 ×, ≤ 1.5: **missed**\n" in text
    assert "| ours | peer | 7 × | 6 to 8 | 15 | ≤ 1.5: **missed** | a note; ◄ it waits |" in text
    assert "≤ 1.5: met | error +1.0e-06; ◄ it checks |" in text
    assert "not to be seen" not in text
    assert "did not run" in text
    assert "No module named 'peer'" in text
    assert (tmp_path / "benchmarks.svg").read_text().count("<svg") == 1
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [{key: line[key] for key in asdict(row)} for line, row in zip(written, rows, strict=True)] == list(
        map(asdict, rows)
    )
    assert all(line["commit"] and line["threads"] and line["torch"] and line["peers"]["scipy"] for line in written)


def test_the_pages_kept_are_those_that_the_records_make(tmp_path):
    page.write(target=tmp_path / "short.md", full=tmp_path / "full.md")
    assert page.PAGE.read_text() == (tmp_path / "short.md").read_text()
    assert page.EVERY_ROW.read_text() == (tmp_path / "full.md").read_text()
    assert len(page.PAGE.read_text().split()) < 600
