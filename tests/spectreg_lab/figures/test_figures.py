"""Figures from runs with every measure, with none, and with numbers that are not finite."""

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import folders
import pytest

from spectreg_lab.exhibits.exhibit import Exhibit, Line, Panel
from spectreg_lab.figures import jacobian, sigma
from spectreg_lab.figures.svg import INK, draw, sheet
from spectreg_lab.page import report
from spectreg_lab.page.exhibits import exhibits
from spectreg_lab.statistics import frames
from spectreg_lab.storage import store
from spectreg_lab.tables import cost

COLOURS = {"decay": "#0c7fc4"}
SVG = "{http://www.w3.org/2000/svg}"


def line(regime: str, method: str, seed: int, epoch: int) -> dict[str, Any]:
    return {
        "sigma": {"a.weight": 2.0 + seed, "b.weight": 8.0 * (2.0 + seed)},
        "input_gradient": {"train": 0.1 * epoch, "test": 0.2 * epoch},
        "hessian": {side: {"value": 3.0, "converged": seed != 1} for side in ("train", "test")},
        "seconds": {"adversarial": 2.5}.get(method, 1.0) * (1 + seed),
    }


LAYERS = {"conv": 5.0, "relu": 1.0, "head": 10.0}


def measures(regime: str, method: str, seed: int) -> dict[str, Any]:
    points = [{"radius": r, "accuracy": 0.8 - r / 2, "loss": 1.0, "ratio": 2.0} for r in (0.0, 0.5)]
    return {
        "spectra": {f"{name}.weight": [3.0, 2.0, 1.0] for name in "abcd"},
        "input_gradient": {"train": 0.1, "test": 0.2},
        "hessian": {side: {"value": 3.0, "residual": 0.25, "converged": True} for side in ("train", "test")},
        "jacobian": {"norms": [1.0, 2.0, 6.0], "bound": 50.0, "converged": seed != 1, "layers": LAYERS},
        "perturbation": dict.fromkeys(("random", "gradient", "pgd"), points),
    }


def shown(folder: Path) -> dict[str, Exhibit]:
    return {exhibit.name: exhibit for exhibit in exhibits(store.read_study(folder))}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with every measure."""
    return folders.write_study(tmp_path_factory.mktemp("measured") / "s", line=line, measures=measures)


@pytest.fixture(scope="module")
def drawn_of_measured(measured: Path) -> dict[str, Exhibit]:
    return shown(measured)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study without measures."""
    return folders.write_study(tmp_path_factory.mktemp("bare") / "s", seeds=(0,))


@pytest.fixture(scope="module")
def drawn_of_bare(bare: Path) -> dict[str, Exhibit]:
    return shown(bare)


FIGURES = ("figure1", "figure2", "figure3", "figure4", "sigma", "perturbation", "jacobian", "layers", "cost")


def test_every_figure_is_drawn_where_every_measure_is_there(drawn_of_measured: dict[str, Exhibit]) -> None:
    found = drawn_of_measured
    for name in FIGURES:
        assert not found[name].missing, name
        assert all(panel.lines for panel in found[name].panels), name
        assert found[name].panels, name
    assert [panel.folded for panel in found["figure4"].panels] == [False, True, False, False]
    assert len(found["perturbation"].panels) == 6


def test_the_norms_of_layers_stand_in_the_order_of_the_graph_without_those_that_are_one(tmp_path: Path) -> None:
    found = shown(folders.write_study(tmp_path / "s", measures=measures, methods=("decay",)))["layers"]
    assert list(found.frame.layer.unique()) == ["conv", "head"]
    for drawn in found.panels[0].lines:
        assert drawn.x == [1, 2]
        assert drawn.y == [5.0, 10.0]


@pytest.mark.parametrize("name", ["figure2", "figure3", "figure4", "perturbation", "jacobian", "layers"])
def test_a_figure_without_its_measure_says_so_and_names_the_command_that_makes_it(
    drawn_of_bare: dict[str, Exhibit], name: str
) -> None:
    assert not drawn_of_bare[name].panels
    assert "`spectreg measure STUDY_FOLDER`" in drawn_of_bare[name].missing


def test_a_page_of_runs_without_measures_is_written_and_shows_the_command(bare: Path) -> None:
    page = report.write(bare).read_text()
    assert "<code>spectreg measure STUDY_FOLDER</code>" in page


def test_numbers_that_are_not_finite_are_kept_in_the_csv_and_left_out_of_the_drawing(tmp_path: Path) -> None:
    def wild(regime: str, method: str, seed: int, epoch: int) -> dict[str, Any]:
        value = math.inf if method == "decay" else math.nan if method == "vanilla" else 1.0
        return {"input_gradient": {"train": value, "test": value}, "sigma": {"a.weight": value}}

    folder = folders.write_study(tmp_path / "s", line=wild, seeds=(0, 1))
    report.write(folder)
    assert "inf" in (folder / "report" / "figure2.csv").read_text()
    drawn = {line.method for panel in shown(folder)["figure2"].panels for line in panel.lines}
    assert drawn == {"adversarial", "spectral"}


def test_values_that_are_null_or_missing_in_a_line_are_read_as_not_measured(tmp_path: Path) -> None:
    folder = folders.write_study(
        tmp_path / "s",
        line=lambda *_: {"test_accuracy": None, "hessian": {"train": None}, "input_gradient": None, "sigma": None},
    )
    assert shown(folder)["figure3"].missing
    report.write(folder)


def test_the_csv_of_figure_3_has_the_residual_of_every_eigenvalue_measured_after_training(
    drawn_of_measured: dict[str, Exhibit],
) -> None:
    frame = drawn_of_measured["figure3"].frame
    ends = frame[frame.epoch == frame.epoch.max()]
    assert set(ends.hessian_train_residual) == set(ends.hessian_test_residual) == {0.25}
    assert frame[frame.epoch == 1].hessian_test_residual.isna().all()


def test_the_correlations_with_the_gap_are_shown_by_setting_with_their_n(tmp_path: Path) -> None:
    gap = {"vanilla": 0.4, "decay": 0.3, "adversarial": 0.2, "spectral": 0.1}

    def measured(regime: str, method: str, seed: int) -> dict[str, Any]:
        own = gap[method]
        return {"input_gradient": {"train": 1.0, "test": own}, "hessian": {"train": {"value": -own}, "test": None}}

    found = shown(
        folders.write_study(tmp_path / "s", lambda regime, method, seed: [(1.0, 1 - gap[method])], measures=measured)
    )["correlations"]
    cells = found.tables[0].rows[0][1:]
    assert [cell.text for cell in cells] == ["1.00 ± 0.00", "–", "–", "−1.00 ± 0.00"]
    assert cells[0].small == ["n = 3 seeds of 8 runs"]
    assert set(found.frame.seed) == {0, 1, 2}


def test_the_cost_is_relative_to_vanilla_with_the_same_seed(measured: Path) -> None:
    study = store.read_study(measured)
    ratios = cost.ratios(frames.runs(study)).groupby("method").relative.unique()
    assert {method: list(found) for method, found in ratios.items()} == {
        "vanilla": [1.0],
        "decay": [1.0],
        "adversarial": [2.5],
        "spectral": [1.0],
    }


def test_the_typical_norm_is_the_geometric_mean_over_the_weights(tmp_path: Path) -> None:
    study = store.read_study(folders.write_study(tmp_path / "s", line=line, seeds=(0,)))
    first = sigma.values(study).iloc[0]
    assert (first.typical, first.largest, first.weights) == (pytest.approx(math.sqrt(2 * 16)), 16.0, 2)


def test_local_norms_are_summed_up_by_their_median_and_largest_and_unconverged_ones_are_warned_of(
    measured: Path, drawn_of_measured: dict[str, Exhibit]
) -> None:
    first = jacobian.values(store.read_study(measured)).iloc[0]
    assert (first["median"], first.largest, first.bound, first.examples) == (2.0, 6.0, 50.0, 3)
    found = drawn_of_measured
    assert found["jacobian"].warnings == ["Local Jacobian: the norms of 8 runs had not converged."]
    assert "had not converged" in found["figure3"].warnings[0]


def test_a_local_norm_of_zero_is_counted_below_the_logarithmic_axis_and_not_drawn(tmp_path: Path) -> None:
    def dead(regime: str, method: str, seed: int) -> dict[str, Any]:
        return {"jacobian": {"norms": [0.0, 0.0, 1.0], "bound": 2.0}}

    found = shown(folders.write_study(tmp_path / "s", measures=dead, methods=("decay",), seeds=(0,)))["jacobian"]
    assert "2 norms are zero and below the logarithmic axis." in found.notes
    assert [line.name for line in found.panels[0].lines] == ["decay, largest", "decay, bound"]


def test_the_first_regime_is_solid_and_the_second_dashed(drawn_of_measured: dict[str, Exhibit]) -> None:
    found = drawn_of_measured
    for name in ("figure2", "figure3", "figure4"):
        dashes = {
            (line.name.split(", ")[1], line.dash)
            for panel in found[name].panels
            for line in panel.lines
            if not line.marker
        }
        assert dashes == {("small batch", "solid"), ("large batch", "dashed")}
    figure1 = {(line.name.split(", ")[1], line.dash) for panel in found["figure1"].panels for line in panel.lines}
    assert figure1 == {("test", "solid"), ("training", "dashed"), ("gap", "dotted")}


def test_the_curves_are_the_mean_over_seeds_with_a_band_of_one_standard_deviation(tmp_path: Path) -> None:
    tests = (0.6, 0.7, 0.8)
    folder = folders.write_study(tmp_path / "s", lambda regime, method, seed: [(0.9, tests[seed])])
    curve = shown(folder)["figure1"].panels[0].lines[0]
    assert (curve.x, curve.y) == ([1], [pytest.approx(0.7)])
    assert (curve.low, curve.high) == ([pytest.approx(0.6)], [pytest.approx(0.8)])


CURVE = Line("decay, test", "decay", [1, 2], [0.01, 1.0], [0.005, 0.9], [0.02, 1.1])


def test_the_drawing_of_a_panel_is_the_same_twice_with_its_text_as_text_and_no_date() -> None:
    panel = Panel("g", "singular <values>", "index", "σ", [CURVE], log=True)
    drawn = draw(panel, COLOURS, "a")
    assert drawn == draw(panel, COLOURS, "a")
    assert ">singular &lt;values&gt;<" in drawn
    assert "<dc:date>" not in drawn
    assert INK not in drawn


def test_a_curve_and_its_band_carry_the_method_by_which_the_page_hides_them() -> None:
    drawn = ElementTree.fromstring(draw(Panel("g", "t", "x", "y", [CURVE]), COLOURS, "a"))
    marked = drawn.findall(".//*[@data-method]")
    assert [element.get("data-method") for element in marked] == ["decay", "decay"]
    assert [element.findtext(f"{SVG}title") for element in marked] == ["decay, test", "decay, test"]


def test_values_that_are_not_finite_become_gaps() -> None:
    curve = Line("a", "decay", [1, 2, 3], [math.nan, math.inf, 0.5])
    assert "nan" not in draw(Panel("g", "t", "x", "y", [curve]), COLOURS, "a").lower().replace("nant", "")


def test_the_ids_of_two_panels_on_one_page_differ_and_every_reference_is_met() -> None:
    panel = Panel("g", "t", "x", "y", [CURVE])
    both = [draw(panel, COLOURS, name) for name in ("a", "b")]
    ids = [set(re.findall(r'id="([^"]+)"', text)) for text in both]
    assert ids[0].isdisjoint(ids[1])
    for text, known in zip(both, ids, strict=True):
        assert {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)} == known


def test_a_sheet_holds_every_panel_and_a_legend_of_methods_and_dashes() -> None:
    panels = [draw(Panel("g", f"panel {i}", "x", "y", [CURVE]), COLOURS, f"p{i}") for i in range(5)]
    found = ElementTree.fromstring(sheet(panels, {"decay": "#0072b2"}, {"dashed": "large batch"}))
    assert len(found.findall(f"{SVG}svg")) == 5
    words = [element.text for element in found.iter(f"{SVG}text")]
    assert {"decay", "large batch", *(f"panel {i}" for i in range(5))} <= set(words)


def test_ticks_and_names_keep_their_digits_and_a_dollar_is_no_mathematics() -> None:
    ticks = {0: "$x_{1}$ at 5$^$", 1: "0.0125"}
    lines = [Line("spectral-0.001", "spectral-0.001", [0.0, 1.0], [0.0125, 0.0375])]
    text = draw(Panel("g", "from $0.03 to $\\frac{", "x", "y", lines, ticks=ticks), {"spectral-0.001": "#112233"}, "p")
    words = " ".join(e.text or "" for e in ElementTree.fromstring(text).iter() if e.tag.endswith("text"))
    assert "from $0.03 to $\\frac{" in words
    assert "$x_{1}$ at 5$^$ 0.0125" in words
    assert "0.025" in words  # a tick
    assert 'data-method="spectral-0.001"' in text
    assert re.search(r' d="[^"]*\d\.\d{3}', text) is None
