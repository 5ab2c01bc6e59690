from pathlib import Path

import pytest
from small_study import SEARCH, STUDY

from spectreg_lab.settings.config import Decay
from spectreg_lab.settings.studies import StudyError, read_study

SHIPPED = sorted((Path(__file__).parents[3] / "studies").glob("*.toml"))


@pytest.fixture
def study_file(tmp_path):
    def make(*changes, text=STUDY):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "small.toml"
        path.write_text(text)
        return path

    return make


def test_a_study_is_every_setting_with_every_regime_method_and_seed(study_file):
    points = read_study(study_file()).points()
    assert len(points) == 1 * 2 * 3 * 2
    assert len({point.config.name for point in points}) == len(points)
    assert [point.seed for point in points] == [0] * 6 + [1] * 6
    large = next(p for p in points if (p.regime, p.method) == ("large", "strong-decay"))
    assert (large.config.batch_size, large.config.learning_rate) == (64, 0.1)
    assert large.config.method == Decay(strength=0.1)
    assert large.label() == {
        "setting": "vgg",
        "regime": "large",
        "method": "strong-decay",
        "seed": 0,
        "run": large.config.name,
    }


def test_a_setting_may_have_its_own_batch_size_in_a_regime(study_file):
    points = read_study(study_file(("learning_rate = {", "batch_size = { large = 8 }\nlearning_rate = {"))).points()
    assert {(point.regime, point.config.batch_size) for point in points} == {("small", 16), ("large", 8)}


def test_a_search_is_every_rate_with_every_strength_on_held_out_training_images(study_file):
    points = read_study(study_file(text=STUDY + SEARCH)).points()
    assert len(points) == 2 * (2 + 1) * (1 + 3 + 1)
    assert {point.config.data.validation for point in points} == {0.2}
    tried = {(p.config.learning_rate, p.config.method.strength) for p in points if p.method == "decay"}
    assert tried == {(rate, strength) for rate in (0.1, 0.2, 0.3) for strength in (1e-3, 1e-2, 1e-1)}


def test_a_setting_with_rates_of_its_own_is_searched_at_these(study_file):
    own = ("learning_rate = {", "searched_rates = { small = [0.7] }\nlearning_rate = {")
    points = read_study(study_file(own, text=STUDY + SEARCH)).points()
    assert {p.config.learning_rate for p in points if p.regime == "small"} == {0.7}
    assert {p.config.learning_rate for p in points if p.regime == "large"} == {0.3}
    with pytest.raises(StudyError, match=r"settings.vgg.searched_rates is for a study with a \[search\] table"):
        read_study(study_file(own))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_study_that_is_shipped_can_be_read(path):
    assert read_study(path).points()


def test_the_papers_study_has_its_regimes_learning_rates_and_thresholds():
    study = read_study(next(path for path in SHIPPED if path.stem == "paper"))
    assert [regime.batch_size for regime in study.regimes.values()] == [64, 4096]
    assert {case.paper: (*case.learning_rate.values(), *case.alpha.values()) for case in study.settings.values()} == {
        "vgg/cifar10": (0.01, 0.1, 0.88, 0.85),
        "nin/cifar100": (0.1, 1.0, 0.62, 0.59),
        "densenet40/cifar100": (0.1, 1.0, 0.67, 0.63),
        "densenet22/stl10": (0.01, 0.1, 0.70, 0.67),
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 2", "epochs = 'two'", r"small.toml: epochs: Input should be a valid integer.*got 'two'"),
        ("epochs = 2", "epochs = 2\nsedes = [1]", "sedes: unknown key, did you mean 'seeds'"),
        (
            "[methods.vanilla]",
            "[methods.adversarial]\nstrength = 1",
            r"strength: unknown key; known: alpha, epsilon, name",
        ),
        ("[methods.vanilla]", "[methods.vanilla]\nstrength = 1", "vanilla.strength: unknown key; known: name$"),
        (
            "[methods.vanilla]",
            "[measure]\nbatch_size = 1\n[methods.vanilla]",
            "measure.batch_size: unknown key; known: cu",
        ),
        ("train_size = 96", "augmentation = { name = 1 }", "augmentation.name: unknown key; known: flip, pad"),
        ("batch_size = 16", "batch_size = 16\nepochs = 1", "small.epochs: unknown key; known: batch_size"),
        ("width = 4", "widht = 4", r"settings.vgg.model.vgg.widht: unknown key, did you mean 'width'"),
        ('name = "vgg"', 'name = "vgk"', r"settings.vgg.model: unknown name 'vgk', did you mean 'vgg'"),
        (
            "[methods.vanilla]",
            "[methods.spectrum]",
            r"methods.spectrum: unknown name 'spectrum', did you mean 'spectral'",
        ),
        (
            "strength = 0.1",
            "strength = -0.1",
            r"methods.strong-decay.decay.strength: .*greater than or equal to 0, got -0.1",
        ),
        ("strength = 0.1", "strength = inf", "strength: .*finite number, got inf"),
        ("batch_size = 16", "batch_size = 0", r"regimes.small.batch_size: .*greater than 0, got 0"),
        ("[methods.vanilla]", "batch_size = { huge = 8 }\n[methods.vanilla]", r"batch_size is given for \['huge'\]"),
        ("epochs = 2", "epochs = 2\nsearched = ['none.csv']", "there is no file none.csv; `spectreg search` writes"),
        ("large = 0.1", "huge = 0.1", r"learning_rate is given for \['huge', 'small'\], but the regimes are"),
        ("seeds = [0, 1]", "", "seeds: Field required"),
        ("seeds = [0, 1]", "seeds = []", "seeds: .*at least 1 item"),
        ("epochs = 2", "epochs = = 2", "cannot be read: Invalid value"),
    ],
)
def test_a_wrong_study_file_is_refused_with_file_field_and_what_was_given(study_file, old, new, message):
    with pytest.raises(StudyError, match=message):
        read_study(study_file((old, new)))


def test_a_precision_replaces_the_files_and_a_training_that_is_no_table_is_refused_with_it_too(study_file):
    assert read_study(study_file(), "64-true").training.precision == "64-true"
    with pytest.raises(StudyError, match=r"training\.precision: .*got 'foo'"):
        read_study(study_file(), "foo")
    with pytest.raises(StudyError, match=r"training: .*got 3"):
        read_study(study_file(("epochs = 2", "epochs = 2\ntraining = 3")), "64-true")


def test_compiling_is_part_of_the_setting_and_refused_with_methods_that_cannot_be_compiled(study_file):
    study = read_study(study_file(), compile=True)
    assert {point.config.compile for point in study.points()} == {True}
    names = [{point.config.name for point in s.points()} for s in (study, read_study(study_file()))]
    assert not names[0] & names[1]
    path = study_file(("[methods.vanilla]", "[methods.jacobian]\n[methods.vanilla]"))
    with pytest.raises(StudyError, match="compile = true, but the penalty of jacobian is differentiated twice"):
        read_study(path, compile=True)


def test_a_strength_for_a_method_that_is_not_there_is_refused(study_file):
    with pytest.raises(StudyError, match=r"search.strength is given for \['spectral'\]"):
        read_study(study_file(("decay = [", "spectral = ["), text=STUDY + SEARCH))


def test_a_study_file_that_is_not_there_is_refused_with_the_nearest(study_file):
    path = study_file()
    with pytest.raises(StudyError, match=r"does not exist: did you mean .*small\.toml"):
        read_study(path.with_name("smal.toml"))
