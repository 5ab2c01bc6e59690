"""Whatever stands in a study file: it is read, or refused in one line that names the file and the field."""

import copy
import tomllib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_study import SEARCH, STUDY

from spectreg_lab.settings.studies import Study, StudyError, read_study
from spectreg_lab.studies.execution import check
from spectreg_lab.studies.search import gather


class Silent:
    def note(self, text: str) -> None:
        pass


def read(tmp_path, text: str | bytes) -> Study:
    path = tmp_path / "small.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_study(path)


def changed(old: str, new: str, text: str = STUDY) -> str:
    assert old in text
    return text.replace(old, new, 1)


DATA = 'data = { name = "digits", train_size = 96, test_size = 40 }'
METHODS = "\n".join(f'[methods.m{i}]\nname = "decay"\nstrength = {i + 1}.0' for i in range(20))
BAD = {
    "a truth value for a number": (changed("epochs = 2", "epochs = true"), "epochs: .*valid integer, got True"),
    "a text for a number": (changed("epochs = 2", 'epochs = "2"'), "epochs: .*valid integer, got '2'"),
    "a fraction for a whole number": (changed("epochs = 2", "epochs = 2.0"), "epochs: .*valid integer, got 2.0"),
    "a number for a truth value": (changed("hidden = 8", "hidden = 8, batch_norm = 1"), "batch_norm: .*valid boolean"),
    "a number for a truth value of the training": (STUDY + "[training]\ncompile = 0\n", "training.compile: .*boolean"),
    "no commit": (changed("epochs = 2", 'epochs = 2\nregistered = "a\\nb"'), "registered: .*match pattern"),
    "a text for a rate": (changed("large = 0.1", 'large = "0.1"'), "learning_rate.large: .*valid number"),
    "no epochs at all": (changed("epochs = 2", "epochs = 0"), "epochs: .*greater than 0"),
    "epochs for ever": (changed("epochs = 2", "epochs = 1_000_000_000_000"), "epochs: .*less than or equal"),
    "a seed twice": (changed("[0, 1]", "[0, 1, 0]"), "seeds: 0 is there more than once"),
    "a seed near 2^63": (changed("[0, 1]", f"[{2**63 - 1}]"), "seeds.0: .*less than"),
    "a seed beyond 2^63": (changed("[0, 1]", f"[{2**64}]"), "seeds.0: .*less than"),
    "a batch of 2^70": (changed("batch_size = 16", f"batch_size = {2**70}"), "regimes.small.batch_size: .*less than"),
    "5,000 digits": (changed("epochs = 2", f"epochs = {'9' * 5000}"), "cannot be read: Exceeds the limit"),
    "4,000 digits": (changed("epochs = 2", f"epochs = {'9' * 4000}"), "epochs: .*less than or equal"),
    "a width beyond memory": (changed("width = 4", "width = 1_000_000_000"), "settings.vgg.model.vgg.width: .*less"),
    "hidden units beyond memory": (changed("hidden = 8", f"hidden = {10**12}"), "model.vgg.hidden: .*less"),
    "a DenseNet of depth 10^6": (
        changed('{ name = "vgg", width = 4, stages = [1, 1], hidden = 8 }', '{ name = "densenet", depth = 1000003 }'),
        "model.densenet.depth: .*less than or equal to 1000",
    ),
    "10^9 stages' convolutions": (changed("[1, 1]", "[1, 1000000000]"), "stages.1: .*less"),
    "10^9 projections": (
        changed("[methods.vanilla]", "[methods.jacobian]\nprojections = 1_000_000_000"),
        "methods.jacobian.jacobian.projections: .*less than or equal to 1000",
    ),
    "an empty name": (changed('name = "small"', 'name = ""'), "name: a name has letters"),
    "a name of 5,000 letters": (changed('"small"', f'"{"a" * 5000}"'), "name: .*at most 100 characters"),
    "a null byte in a name": (changed('"small"', '"a\\u0000b"'), "name: a name has letters"),
    "a null byte in the name of data": (changed('"digits"', '"a\\u0000b"'), "settings.vgg.data.name"),
    "markup for a setting": (changed("[settings.vgg]", '[settings."<b>x</b>"]'), "settings.'<b>x</b>': a name has"),
    "a path for a method": (changed("[methods.vanilla]", '[methods."../../x"]\nname = "vanilla"'), "methods.'../../x'"),
    "a control character in a regime": (
        changed("[regimes.small]", '[regimes."a\\u001b"]'),
        r"regimes.'a\\x1b': a name has",
    ),
    "two settings that are the same runs": (
        STUDY + "[settings.twin]\n" + STUDY.split("[settings.vgg]\n")[1].split("[methods")[0],
        "settings.vgg and settings.twin are the same runs",
    ),
    "two methods that are the same runs": (
        STUDY + '[methods.twin]\nname = "decay"\n',
        "methods.decay and methods.twin are the same runs",
    ),
    "two regimes that are the same runs": (
        changed("batch_size = 64", "batch_size = 16").replace("large = 0.1", "large = 0.05"),
        "regimes.small and regimes.large are the same runs",
    ),
    "names that differ in case": (
        STUDY + '[methods.Decay]\nname = "decay"\nstrength = 0.3\n',
        "methods.decay and methods.Decay differ in upper and lower case only",
    ),
    "α of NaN": (changed(DATA, f"{DATA}\nalpha = {{ small = nan }}"), "alpha.small: .*finite"),
    "α of 7": (changed(DATA, f"{DATA}\nalpha = {{ small = 7 }}"), "alpha.small: .*less than 1"),
    "α for another regime": (changed(DATA, f"{DATA}\nalpha = {{ huge = 0.5 }}"), r"alpha is given for \['huge'\]"),
    "a row that the paper lacks": (changed(DATA, f'{DATA}\npaper = "nothing"'), "settings.vgg.paper: .*got 'nothing'"),
    "no radii": (STUDY + "[measure]\nradii = []\n", "measure.radii: .*at least 1 item"),
    "a radius of infinity": (STUDY + "[measure]\nradii = [inf]\n", "measure.radii.0: .*finite"),
    "no perturbations": (STUDY + "[measure]\nperturbations = []\n", "measure.perturbations: .*at least 1"),
    "steps for ever": (STUDY + "[measure]\nsteps = 1000000000\n", "measure.steps: .*less"),
    "a strength beyond float32": (changed("strength = 0.1", "strength = 1e39"), "strength: .*less"),
    "no rates to search": (
        changed("small = [0.1, 0.2]", "small = []", STUDY + SEARCH),
        "search.learning_rate.small: .*at least 1",
    ),
    "a rate searched twice": (
        changed("small = [0.1, 0.2]", "small = [0.1, 0.1]", STUDY + SEARCH),
        "search: vgg small vanilla seed 0 is there twice",
    ),
    "no strengths to search": (
        changed("[1e-3, 1e-2, 1e-1]", "[]", STUDY + SEARCH),
        "search.strength.decay: .*at least 1",
    ),
    "more runs than anybody does": (
        changed("[0, 1]", str(list(range(9_000)))).replace("[methods.vanilla]", METHODS),
        "a study has at most 100000",
    ),
    "deep nesting": ("x = " + "[" * 50_000, "cannot be read: it is nested too deeply|cannot be read"),
    "deep tables": (changed("epochs = 2", "epochs = " + "{a=" * 300 + "1" + "}" * 300), "epochs: .*valid integer"),
    "no text": (b"\xff\xfe\x00name", "cannot be read"),
    "a null byte in the file": (STUDY.encode() + b"\0", "cannot be read"),
    "nothing": ("", "name: Field required"),
    "a megabyte and more": ("#" * 1_100_000, "is no file of at most"),
    "a misspelt key where all else is missing": (
        "epoch = 2",
        r"^study file \S+: epoch: unknown key, did you mean 'epochs'",
    ),
    "an unknown key with a line break": (changed("epochs = 2", 'epochs = 2\n"a\\nb" = 1'), r"'a\\nb': unknown key"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_a_study_that_cannot_be_meant_is_refused_in_one_line_with_file_and_field(tmp_path, text, message):
    with pytest.raises(StudyError, match=message) as refused:
        read(tmp_path, text)
    assert_one_line(refused.value)
    assert "small.toml" in str(refused.value)


def assert_one_line(error: StudyError) -> None:
    text = str(error)
    assert text.isprintable()
    assert len(text) < 3000


@pytest.mark.parametrize("width", [4000, 100_000])
def test_a_network_that_no_memory_holds_is_refused_before_it_is_allocated(tmp_path, width):
    text = changed("width = 4, stages = [1, 1]", f"width = {width}, stages = [8, 8]")
    with pytest.raises(StudyError, match=r"settings.vgg: the network has .* parameters and needs .* GiB"):
        check(read(tmp_path, text), Silent())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("empty", lambda text: ""),
        ("cut", lambda text: text[: len(text) // 2].rstrip("0123456789.") + '"'),
        ("binary", lambda text: "\0\1\2" * 100),
        ("no numbers", lambda text: text.replace("0.9", "high")),
        ("no truth values", lambda text: text.replace("False", "maybe")),
        ("another table", lambda text: "a,b\n1,2\n"),
    ],
)
def test_a_damaged_table_of_a_search_is_refused_by_name(tmp_path, name, damage):
    table = tmp_path / "search.csv"
    table.write_text(
        "setting,regime,method,learning_rate,strength,n,training,validation,chosen\n"
        "vgg,small,decay,0.1,0.01,2,0.9,0.9,False\n"
        "vgg,small,decay,0.1,0.02,2,0.9,0.95,True\n"
    )
    assert len(gather([table])) == 2
    table.write_text(damage(table.read_text()))
    with pytest.raises(StudyError, match=r"search\.csv is not the table of a search") as refused:
        gather([table])
    assert_one_line(refused.value)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**63, 2**64, 10**30, -1, 0])
    | st.floats(allow_nan=True)
    | st.text(max_size=20)
    | st.sampled_from(["", "..", "a/b", "\0", "=1+1", "x" * 300, "vgg", "digits", "decay"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def places(content: Any) -> list[tuple[Any, ...]]:
    """The path of everything in ``content``."""
    if isinstance(content, dict):
        return [(key, *rest) for key, value in content.items() for rest in [(), *places(value)]]
    if isinstance(content, list):
        return [(i, *rest) for i, value in enumerate(content) for rest in [(), *places(value)]]
    return []


CONTENT = tomllib.loads(STUDY + SEARCH + "[measure]\n[training]\nmomentum = 0.5\n")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.sampled_from(places(CONTENT)), value=VALUES, how=st.sampled_from(["replace", "remove", "add", "rename"])
)
def test_any_change_of_a_study_gives_a_study_or_one_line(tmp_path, monkeypatch, place, value, how):
    content = copy.deepcopy(CONTENT)
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    if how == "replace":
        inner[place[-1]] = value
    elif how == "remove":
        del inner[place[-1]]
    elif isinstance(inner, dict):
        kept = inner.pop(place[-1]) if how == "rename" else value
        inner[value if isinstance(value, str) else repr(value)] = kept
    path = tmp_path / "small.toml"
    path.write_text("")
    monkeypatch.setattr(tomllib, "loads", lambda text: copy.deepcopy(content))
    try:
        study = read_study(path)
    except StudyError as error:
        assert_one_line(error)
    else:
        points = study.points()
        assert len({(point.method, point.config.name) for point in points}) == len(points)
