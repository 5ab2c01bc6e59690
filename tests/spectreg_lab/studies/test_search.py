import json
import re

import pandas as pd
import pytest
from folders import foreign
from small_study import STUDY
from typer.testing import CliRunner

from spectreg_lab.cli import app
from spectreg_lab.settings.config import VGG, Config, Decay, Spectral, Vanilla
from spectreg_lab.settings.studies import StudyError, read_study
from spectreg_lab.storage import run_folder, store
from spectreg_lab.studies.search import check, choose, gather, judge, keep, own_strengths
from spectreg_lab.tables import search

# (method, learning rate): (training, validation) accuracies
GRID = {
    (Vanilla(), 0.1): (1.0, 0.80),
    (Vanilla(), 1.0): (1.0, 0.85),
    (Decay(strength=0.1), 0.1): (1.0, 0.82),
    (Decay(strength=0.1), 1.0): (0.5, 0.99),  # the best, but it does not fit
    (Decay(strength=0.2), 0.1): (1.0, 0.84),
    (Decay(strength=0.2), 1.0): (0.5, 0.50),
    (Spectral(strength=0.3), 0.1): (1.0, 0.81),
    (Spectral(strength=0.3), 1.0): (1.0, 0.99),
}


@pytest.fixture
def folder(tmp_path):
    points = []
    for (method, rate), (training, validation) in GRID.items():
        config = Config(model=VGG(), method=method, batch_size=64, learning_rate=rate, epochs=1)
        run = run_folder.RunFolder(tmp_path / "runs" / config.name)
        run.path.mkdir(parents=True)
        run.begin(config, {})
        run.append({"epoch": 1, "train_accuracy": training, "test_accuracy": validation})
        run.end("finished")
        points.append({"setting": "vgg", "regime": "small", "method": method.name, "seed": 0, "run": config.name})
    study = {"name": "search", "epochs": 1, "settings": {}, "regimes": {}, "methods": {}}
    store.begin_study(tmp_path, study, points, "spectreg search")
    return tmp_path


def test_the_rate_chosen_is_the_best_at_which_every_method_fits_the_training_images(folder):
    assert choose(folder).rates["learning_rate"].tolist() == [0.1]


def test_the_strength_chosen_is_the_best_at_the_chosen_rate(folder):
    strengths = choose(folder).strengths.set_index("method")["strength"].to_dict()
    assert strengths == {"vanilla": 0.0, "decay": 0.2, "spectral": 0.3}


def test_every_combination_is_in_the_table_and_on_disk(folder):
    assert len(choose(folder).tried) == len(GRID)
    assert len((folder / "search.csv").read_text().splitlines()) == len(GRID) + 1


def another(folder, seed, begun=True):
    """One more run of the grid's best combination."""
    best = Config(model=VGG(), method=Spectral(strength=0.3), batch_size=64, learning_rate=0.1, epochs=1)
    config = best.model_copy(update={"seed": seed})
    run = run_folder.RunFolder(folder / "runs" / config.name)
    if begun:
        run.path.mkdir(parents=True)
        run.begin(config, {})
    plan = json.loads((folder / store.STUDY).read_text())
    label = {"setting": "vgg", "regime": "small", "method": "spectral", "seed": seed, "run": config.name}
    plan["points"].append(label)
    (folder / store.STUDY).write_text(json.dumps(plan))
    return run


def test_a_run_that_failed_learned_nothing(folder):
    before = choose(folder).tried
    another(folder, 1).end("failed", error="NonFiniteLossError: of nan")
    after = choose(folder).tried
    assert len(after) == len(before)
    row = (after.method == "spectral") & (after.learning_rate == 0.1)
    assert after[row][["n", "validation"]].to_numpy().tolist() == [[2, 0.81 / 2]]


def test_nothing_is_chosen_while_runs_are_at_another_process_or_not_begun(folder):
    at_work = another(folder, 1)
    another(folder, 2, begun=False)
    another(folder, 3).end("failed", error="NonFiniteLossError: of nan")
    with pytest.raises(StudyError, match=r"2 of 11 runs are still at work or not begun.*give the same command"):
        choose(folder)
    assert not (folder / store.SEARCH).exists()
    (at_work.path / run_folder.CONFIG).write_text("[]")
    with pytest.raises(StudyError, match=r"2 of 11 runs .*of one is recorded: .*config\.json holds no JSON object"):
        choose(folder)


def test_a_failed_run_that_a_process_tries_once_more_is_at_work(folder):
    tried = another(folder, 1)
    tried.end("failed", error="NonFiniteLossError: of nan")
    foreign(tried.path)
    with pytest.raises(StudyError, match=r"1 of 9 runs are still at work"):
        choose(folder)


def test_a_run_that_failed_before_it_began_is_no_part_of_a_choice(folder):
    died = another(folder, 1, begun=False)
    died.path.mkdir(parents=True)
    died.end("failed", error="its process died")
    with pytest.raises(StudyError, match=r"1 of 9 runs are still at work or not begun.*its process died"):
        choose(folder)


def test_the_table_says_which_combinations_were_chosen(folder):
    choose(folder)
    table = pd.read_csv(folder / "search.csv")
    assert sorted(table.method[table.chosen]) == ["decay", "spectral", "vanilla"]
    assert set(table.learning_rate[table.chosen]) == {0.1}


def test_the_tables_of_several_searches_stand_in_the_study_as_one(folder, tmp_path):
    table = choose(folder).tried
    for name in ("study", "other"):
        (tmp_path / name).mkdir()
    keep(table.assign(setting="nin", strength=table["strength"] * 2), tmp_path / "other")
    keep(gather([folder / "search.csv", tmp_path / "other" / "search.csv"]), tmp_path / "study")
    assert len(pd.read_csv(tmp_path / "study" / "search.csv")) == 2 * len(GRID)
    record = store.StudyRecord(
        tmp_path, {"settings": {}, "methods": {}}, [], (tmp_path / "study/search.csv").read_text()
    )
    assert len(search.exhibit(record, search.values(record)).tables) == 3


TWICE = {
    "a combination that both have": lambda table: table,
    "another strength of another regime": lambda table: table.assign(regime="large", strength=table["strength"] * 2),
}


@pytest.mark.parametrize("changed", TWICE.values(), ids=TWICE)
def test_two_searches_of_one_setting_are_refused_with_their_files_before_the_first_run(folder, changed):
    keep(changed(choose(folder).tried), folder / "runs")
    searched = 'searched = ["search.csv", "runs/search.csv"]\nepochs'
    (folder / "small.toml").write_text(STUDY.replace("epochs", searched, 1))
    for words in (["--out", str(folder / "out")], ["--dry-run"]):
        result = CliRunner().invoke(app, ["reproduce", str(folder / "small.toml"), *words])
        assert isinstance(result.exception, StudyError)
        said = r"small\.toml: searched: .*search\.csv and .*runs.search\.csv both have the setting 'vgg'"
        assert re.search(said, str(result.exception))
    assert not (folder / "out").exists()


@pytest.mark.parametrize("changed", TWICE.values(), ids=TWICE)
def test_a_table_of_two_searches_of_one_setting_beside_a_study_is_refused_in_its_report(folder, changed):
    table = choose(folder).tried
    keep(pd.concat([table, changed(table)]), folder)
    with pytest.raises(StudyError, match=r"search\.csv .*more than one .* of vgg \w+ \w+, as of two searches"):
        search.values(store.read_study(folder))


def test_the_report_shows_every_combination_with_those_chosen_in_bold(folder):
    choose(folder)
    (study := json.loads((folder / "study.json").read_text()))["study"] |= {
        "settings": {},
        "regimes": {},
        "methods": {},
    }
    (folder / "study.json").write_text(json.dumps(study))
    record = store.read_study(folder)
    own, table = search.exhibit(record, search.values(record)).tables
    shown = {(cells[0].text, cell.text) for cells in table.rows for cell in cells[1:] if cell.bold}
    assert shown == {("vanilla", "0.800"), ("decay 0.2", "0.840"), ("spectral 0.3", "0.810")}
    assert len(table.rows) == 4
    assert [cell.text for cell in own.rows[0]] == ["vgg", "0.2: 0.840", "0.3: 0.810"]


def test_a_networks_own_strength_is_the_best_for_it_alone_and_stands_beside_the_one_for_all():
    accuracies = {("a", 0.1): 0.7, ("a", 0.2): 0.6, ("b", 0.1): 0.5, ("b", 0.2): 0.9}
    tried = judge(
        pd.DataFrame(
            {"setting": s, "regime": "small", "method": "decay", "learning_rate": 0.1, "strength": strength}
            | {"training": 1.0, "validation": validation}
            for (s, strength), validation in accuracies.items()
        )
    ).tried
    own = own_strengths(tried).set_index("setting")
    assert own.strength.to_dict() == {"a": 0.1, "b": 0.2}
    assert own.validation_shared.to_dict() == {"a": 0.6, "b": 0.9}


def test_the_report_says_where_a_study_departs_from_its_search(folder):
    choose(folder)
    (study := json.loads((folder / "study.json").read_text()))["study"] |= {
        "methods": {"decay": {"strength": 0.1}, "spectral": {"strength": 0.3}, "vanilla": {}},
        "settings": {"vgg": {"learning_rate": {"small": 0.5}}},
    }
    (folder / "study.json").write_text(json.dumps(study))
    record = store.read_study(folder)
    found = search.departures(record, search.values(record))
    assert found == ["rate of vgg, small batch, 0.5 (chosen: 0.1)", "decay 0.1 (chosen: 0.2)"]


def test_a_table_that_is_no_searchs_is_refused_with_what_it_lacks(tmp_path):
    (tmp_path / "search.csv").write_text("setting,regime\nvgg,small\n")
    with pytest.raises(StudyError, match=r"has no column chosen, learning_rate.*`spectreg search` writes"):
        gather([tmp_path / "search.csv"])


@pytest.mark.parametrize("content", ["", "\n", "setting,regime,method,learning_rate,strength,n,training,validation\n"])
def test_a_report_beside_a_broken_table_of_a_search_is_refused_with_its_remedy(folder, content):
    (folder / "search.csv").write_text(content)
    with pytest.raises(StudyError, match=r"search.csv is not the table of a search.*`spectreg search` writes it anew"):
        search.values(store.read_study(folder))


def test_a_study_without_a_search_table_is_not_searched(tmp_path):
    (tmp_path / "small.toml").write_text(STUDY)
    with pytest.raises(StudyError, match=r"'small' has no \[search\] table.*`spectreg reproduce`"):
        check(read_study(tmp_path / "small.toml"))


def test_names_that_look_like_numbers_or_like_nothing_are_names(tmp_path):
    table = pd.DataFrame({"setting": ["1", "None"], "regime": ["10", "NA"], "method": ["None", "decay"],
                          "learning_rate": [0.1, 0.1], "strength": [0.0, 0.1], "n": [1, 1], "training": [1.0, 1.0],
                          "validation": [0.5, 0.5], "chosen": [True, False]})  # fmt: skip
    keep(table, tmp_path)
    again = gather([tmp_path / store.SEARCH])
    assert again[["setting", "regime", "method"]].to_dict() == table[["setting", "regime", "method"]].to_dict()
    assert again.learning_rate.tolist() == [0.1, 0.1]
