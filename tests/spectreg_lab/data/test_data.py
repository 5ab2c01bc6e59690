import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from spectreg_lab.data import DataError, Split, batches, generator, load, steps_per_epoch
from spectreg_lab.data.batches import Moves, augmented
from spectreg_lab.data.images import _held_out, global_contrast_normalization
from spectreg_lab.data.pictures import pixels
from spectreg_lab.settings.config import Augmentation, Data


def write_parquet(folder, pictures, labels, split):
    """The schema of the hub's copies: ``img`` and ``label``."""
    import datasets

    known = {int: datasets.Value("int64"), str: datasets.Value("string"), float: datasets.Value("float64")}
    known[list] = datasets.List(datasets.Value("int64"))
    kind = type(next(label for label in labels if label is not None))
    features = datasets.Features({"img": datasets.Image(), "label": known[kind]})
    rows = {"img": [Image.fromarray(p) for p in pictures], "label": labels}
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def labelled_folder(folder, pictures, labels):
    """Images beside a table of their labels."""
    folder.mkdir(exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i}.png")
    rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
    (folder / "metadata.csv").write_text(f"file_name,label\n{rows}")


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def test_digits_are_normalised_images_of_eight_by_eight_with_ten_classes():
    images = load(Data())
    assert images.shape == (1, 8, 8)
    assert (len(images.train), len(images.test), images.classes) == (1400, 397, 10)


def test_digits_equal_scikit_learns_normalised_by_numpy():
    from sklearn.datasets import load_digits

    raw = load_digits().images.reshape(1797, -1)
    expected = (raw - raw.mean(1, keepdims=True)) / raw.std(1, keepdims=True)
    found = load(Data())
    both = torch.cat([found.train.images, found.test.images]).reshape(1797, -1)
    np.testing.assert_allclose(both.numpy(), expected, atol=2e-5)


def test_global_contrast_normalization_equals_numpy_and_an_image_of_one_colour_becomes_zero(pictures):
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255
    images[0] = 0.3
    found = global_contrast_normalization(images)
    flat = images[1:].reshape(5, -1).numpy()
    expected = (flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True)
    np.testing.assert_allclose(found[1:].reshape(5, -1).numpy(), expected, atol=1e-12)
    assert found[0].abs().max() < 1e-9


def test_parquet_files_and_an_image_folder_of_the_same_pictures_give_the_same_tensors(tmp_path, pictures):
    labels = [0, 1, 0, 1, 0, 1]
    for split in ("train", "test"):
        write_parquet(tmp_path / "parquet", pictures, labels, split)
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            place = tmp_path / "folder" / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{i}.png")
    one, other = load(Data(name=str(tmp_path / "parquet"))), load(Data(name=str(tmp_path / "folder")))
    assert one.shape == other.shape == (3, 5, 4)
    assert one.classes == other.classes == 2
    for label in (0, 1):  # a folder lists its classes one after the other
        a, b = (x.test.images[x.test.labels == label] for x in (one, other))
        assert torch.equal(a, b)


def test_grey_pictures_among_coloured_ones_become_coloured(tmp_path, pictures):
    mixed = [pictures[0], pictures[1][..., 0]]
    for split in ("train", "test"):
        write_parquet(tmp_path, mixed, [0, 1], split)
    images = load(Data(name=str(tmp_path))).train.images
    assert images.shape == (2, 3, 5, 4)
    assert torch.equal(images[1, 0], images[1, 2])


def test_a_second_load_reads_the_cache_and_not_the_pictures(tmp_path, pictures, monkeypatch):
    for split in ("train", "test"):
        write_parquet(tmp_path, pictures, [0, 1] * 3, split)
    first = load(Data(name=str(tmp_path)))
    monkeypatch.setattr("spectreg_lab.data.images.decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load(Data(name=str(tmp_path))).train.images, first.train.images)


def test_a_changed_file_is_read_anew_and_a_broken_cache_made_again(tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("SPECTREG_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        write_parquet(tmp_path, pictures, [0, 1] * 3, split)
    first = load(Data(name=str(tmp_path)))
    for path in (tmp_path / "cache").glob("*.safetensors"):
        start = path.read_bytes()[:40]
        path.unlink()  # tensors that are mapped from it keep it
        path.write_bytes(start)
    assert torch.equal(load(Data(name=str(tmp_path))).train.images, first.train.images)
    write_parquet(tmp_path, pictures[::-1].copy(), [0, 1] * 3, "train")
    assert torch.equal(load(Data(name=str(tmp_path))).train.images, first.train.images.flip(0))


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_files_replaced_by_others_of_the_same_time_are_read_anew_and_no_copy_is_left(
    tmp_path, pictures, kind, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "readers")
    folder = tmp_path / "data"
    folder.mkdir()
    for labels, expected in (([0, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1]), ([1, 10, 11, 0, 0], [1, 2, 3, 0, 0])):
        for split in ("train", "test"):
            if kind == "parquet":
                write_parquet(folder, pictures[: len(labels)], labels, split)
            else:
                labelled_folder(folder / split, pictures[: len(labels)], labels)
        for path in folder.rglob("*.*"):
            os.utime(path, (10**9, 10**9))
        assert load(Data(name=str(folder))).train.labels.tolist() == expected
    assert not list((tmp_path / "readers").iterdir())


def test_the_images_held_out_for_validation_are_training_images_and_disjoint_from_those_kept():
    everything = load(Data(train_size=200))
    split = load(Data(train_size=200, validation=0.25))
    assert (len(split.train), len(split.test)) == (150, 50)
    both = [torch.cat([part.images.flatten(1), part.labels[:, None].float()], 1) for part in (split.train, split.test)]
    whole = torch.cat([everything.train.images.flatten(1), everything.train.labels[:, None].float()], 1)
    assert sorted(torch.cat(both).tolist()) == sorted(whole.tolist())
    assert torch.equal(split.test.images, load(Data(train_size=200, validation=0.25)).test.images)


@settings(max_examples=100, deadline=None)
@given(labels=st.lists(st.integers(0, 6), min_size=2, max_size=80), share=st.floats(0.05, 0.95))
def test_what_is_held_out_has_of_every_class_its_share(labels, share):
    labels, count = torch.tensor(labels), round(len(labels) * share)
    held = _held_out(labels, count)
    assert held.sum() == count
    sizes = labels.bincount()
    several = int((sizes > 1).sum())
    for label, size in enumerate(sizes.tolist()):
        out = int(held[labels == label].sum())
        if size > 1 and several <= count <= len(labels) - int((sizes > 0).sum()):
            assert 0 < out < size
            assert abs(out - size * count / len(labels)) <= 1 + several
    permuted = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    assert _held_out(labels[permuted], count).sum() == count


@pytest.mark.parametrize(("count", "of_few"), [(2, 1), (30, 1)])
def test_a_class_of_two_beside_one_of_thirty_is_on_either_side_of_few_or_nearly_all_held_out(count, of_few):
    labels = torch.tensor([0] * 30 + [1] * 2)
    held = _held_out(labels, count)
    assert (held.sum(), held[labels == 1].sum()) == (count, of_few)


@pytest.mark.parametrize("size", [None, 99])
def test_a_folder_sorted_by_class_is_judged_on_every_class(tmp_path, size):
    folder_of_classes(tmp_path, [f"class{c}" for c in range(5)], 20)
    held = load(Data(name=str(tmp_path), validation=0.2, train_size=size))
    assert held.test.labels.bincount().tolist() == pytest.approx([4] * 5, abs=1)
    assert held.train.labels.bincount().min() >= 12


def folder_of_classes(folder, names, each, splits=("train", "test"), ending="png"):
    for split in splits:
        for c, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (8, 8), (50 * c, 2 * i, 0)).save(folder / split / name / f"{i}.{ending}")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_lies_under_transparent_pixels_is_not_seen(mode):
    found = []
    for hidden in ((0, 0, 0), (90, 240, 10)):
        picture = Image.new("RGBA", (8, 8), (*hidden, 0))
        picture.paste((200, 200, 200, 255), (2, 2, 6, 6))
        if mode == "P":
            picture = Image.new("P", (8, 8), 0)
            picture.putpalette([*hidden, 200, 200, 200])
            picture.paste(1, (2, 2, 6, 6))
            picture.info["transparency"] = 0
        found.append(pixels(picture if mode in ("RGBA", "P") else picture.convert("LA").convert(mode)))
    assert np.array_equal(*found)
    assert found[0].shape == (8, 8, 3)
    assert (found[0][0, 0].tolist(), found[0][4, 4].tolist()) == ([255] * 3, [200] * 3)


def test_sixteen_bits_keep_their_order_and_a_picture_without_a_scale_is_refused():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    deep = pixels(Image.fromarray(values))
    np.testing.assert_allclose(deep[..., 0], values / 65535 * 255, rtol=1e-6)
    assert np.array_equal(pixels(Image.fromarray(values > 9000))[..., 0], (values > 9000) * 255)
    for picture in (Image.new("F", (8, 8)), Image.new("LAB", (8, 8)), Image.new("I", (8, 8), 70_000)):
        with pytest.raises(ValueError, match=r"has no black and white|at most sixteen bits"):
            pixels(picture)


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev"])
@pytest.mark.parametrize("kind", ["folder", "data/folder", "parquet", "data/parquet"])
def test_a_validation_split_counts_as_test_where_there_is_none(tmp_path, pictures, kind, name):
    place = tmp_path / "data" if kind.startswith("data/") else tmp_path
    if kind.endswith("folder"):
        folder_of_classes(place, ["a", "b"], 3, ("train", name))
    else:
        place.mkdir(exist_ok=True)
        for split in ("train-00000-of-00001", f"{name}-00000-of-00001"):
            write_parquet(place, pictures, [0, 1] * 3, split)
    images = load(Data(name=str(tmp_path)))
    assert (len(images.train), len(images.test), images.classes) == (6, 6, 2)


@pytest.mark.parametrize("labels", [[1, 2, 3] * 2, [10, 20, 40] * 2, ["cat", "dog", "eel"] * 2])
def test_labels_that_are_not_counted_from_zero_are_classes_in_their_order_and_that_is_said(tmp_path, pictures, labels):
    for split in ("train", "test"):
        write_parquet(tmp_path, pictures, labels, split)
    said = []
    images = load(Data(name=str(tmp_path)), said.append)
    assert (images.classes, images.train.labels.tolist()) == (3, [0, 1, 2] * 2)
    assert [text for text in said if "are classes 0 to 2, in this order" in text]


@pytest.mark.parametrize(
    ("labels", "test", "message"),
    [
        ([[0, 1], [1, 0]] * 3, None, "a label is a list, of zeros and ones perhaps"),
        ([0.5, 1.0] * 3, None, "labels must be integers or names, got float"),
        ([None, 1] * 3, None, "image 0 has no label, 3 of 6 in all"),
        ([0, 1] * 3, [0, 1, None], "test, column 'label': image 2 has no label, 1 of 3 in all"),
        ([0, 1] * 3, [0, 7] * 3, "the test images have labels that no training image has: 7"),
    ],
)
def test_labels_that_name_no_class_are_refused(tmp_path, pictures, labels, test, message):
    write_parquet(tmp_path, pictures, labels, "train")
    write_parquet(tmp_path, pictures[: len(test or labels)], test or labels, "test")
    with pytest.raises(DataError, match=message):
        load(Data(name=str(tmp_path)))


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp", "tiff", "gif", "ppm"])
def test_a_changed_image_of_any_type_is_read_anew(tmp_path, ending):
    folder_of_classes(tmp_path, ["a", "b"], 2, ending=ending)
    before = load(Data(name=str(tmp_path)))
    changed = tmp_path / "train" / "a" / f"0.{ending}"
    picture = Image.new("RGB", (8, 8), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 3, 8))
    picture.save(changed)
    os.utime(changed, (1, 1))
    assert not torch.equal(load(Data(name=str(tmp_path))).train.images, before.train.images)


def test_the_first_classes_alone_are_all_images_of_them_and_the_same_ones_as_among_all():
    everything, few = load(Data()), load(Data(classes=3))
    assert few.classes == 3
    for all_of, kept in ((everything.train, few.train), (everything.test, few.test)):
        assert torch.equal(kept.images, all_of.images[all_of.labels < 3])
    assert set(load(Data(classes=3, train_size=100)).train.labels.tolist()) == {0, 1, 2}


def test_smaller_images_are_means_over_squares_normalised_again():
    large, small = load(Data(test_size=5)), load(Data(test_size=5, shrink=2))
    means = large.test.images.numpy().reshape(5, 4, 2, 4, 2).mean(axis=(2, 4))
    expected = (means - means.mean((1, 2), keepdims=True)) / means.std((1, 2), keepdims=True)
    assert small.shape == (1, 4, 4)
    np.testing.assert_allclose(small.test.images[:, 0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Data(shrink=9), r"shrink = 9 leaves nothing of images of \(8, 8\) pixels"),
        (Data(classes=11), "classes = 11, but digits has 10"),
        (Data(name="digit"), "did you mean 'digits'"),
        (Data(name="nothing-like-it"), "no such folder or name; known: digits, few-digits, cifar10"),
        (Data(name="./absent"), "no such folder"),
        (Data(name="${SPECTREG_UNSET}/x"), "set the environment variable"),
        (Data(train_size=5000), "train_size = 5000, but there are 1400"),
        (Data(train_size=2, validation=0.1), "leaves none on one side"),
    ],
)
def test_data_that_cannot_be_had_are_refused_with_what_would_do(setting, message):
    with pytest.raises(DataError, match=message):
        load(setting)


def test_a_folder_that_a_variable_names_wrongly_is_named_and_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setenv("SPECTREG_TEST_DATA", "/nonexistent")
    with pytest.raises(DataError, match=r"there is no folder /nonexistent/cifar10-jpeg$"):
        load(Data(name="${SPECTREG_TEST_DATA}/cifar10-jpeg"))


def test_a_name_that_may_be_a_folder_or_of_the_hub_is_said_to_be_neither(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name: Path(name).read_bytes())
    with pytest.raises(
        DataError, match=r"^hub:no/folder cannot be read: .* \(and there is no folder no/folder here\)$"
    ):
        load(Data(name="no/folder"))


def test_a_hub_name_that_cannot_be_reached_is_one_line_that_names_it():
    with pytest.raises(DataError, match=r"hub:uoft-cs/cifar10 cannot be read: \w+: .+"):
        load(Data(name="cifar10"))


def test_a_photograph_held_as_bytes_is_turned_as_its_camera_says(tmp_path):
    import io

    import pyarrow
    import pyarrow.parquet

    values = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    content = []
    for picture in values:
        Image.fromarray(picture).save(file := io.BytesIO(), "PNG", exif=turned)
        content.append(file.getvalue())
    for split in ("train", "test"):
        table = pyarrow.table({"image": content, "label": [0, 1] * 3})
        (tmp_path / "turned").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "turned" / f"{split}.parquet")
        write_parquet(tmp_path / "upright", values[:, ::-1, ::-1], [0, 1] * 3, split)
    found, expected = (load(Data(name=str(path))) for path in (tmp_path / "turned", tmp_path / "upright"))
    assert torch.equal(found.train.images, expected.train.images)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_file_without_rows_holds_no_images(tmp_path, pictures, split):
    for each in ("train", "test"):
        write_parquet(tmp_path, pictures, [0, 1] * 3, each)
    import pyarrow.parquet

    path = tmp_path / f"{split}.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match=f"has no {'training' if split == 'train' else 'test'} images"):
        load(Data(name=str(tmp_path)))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_label_without_an_image_is_named(tmp_path, pictures, missing):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"img": [None if i == missing else Image.fromarray(p) for i, p in enumerate(pictures)], "label": [0, 1] * 3}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    write_parquet(tmp_path, pictures, [0, 1] * 3, "test")
    with pytest.raises(DataError, match=f"image {missing} cannot be decoded: there is no image"):
        load(Data(name=str(tmp_path)))


def test_pictures_of_differing_sizes_are_refused_with_the_first_that_differs(tmp_path, pictures):
    for split in ("train", "test"):
        write_parquet(tmp_path, [pictures[0], pictures[1][:3]], [0, 1], split)
    with pytest.raises(DataError, match=r"image 1 is \(3, 4\) where the first is \(5, 4\)"):
        load(Data(name=str(tmp_path)))


def test_labels_out_of_range_are_refused(tmp_path, pictures):
    for split in ("train", "test"):
        write_parquet(tmp_path, pictures, [0, 1, -1, 1, 0, 1], split)
    with pytest.raises(DataError, match="train labels run from -1 to 1"):
        load(Data(name=str(tmp_path)))


def test_an_unreadable_parquet_file_is_refused_by_name(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"nothing of the kind")
    (tmp_path / "test.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=f"parquet:{tmp_path} cannot be read"):
        load(Data(name=str(tmp_path)))


def test_a_folder_without_a_test_split_is_refused(tmp_path, pictures):
    write_parquet(tmp_path, pictures, [0, 1] * 3, "train")
    with pytest.raises(DataError, match=r"has no test images: they are looked for in train\.parquet, train-\*"):
        load(Data(name=str(tmp_path)))


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_files_whose_names_say_no_split_are_left_out_and_named(tmp_path, pictures, kind):
    if kind == "parquet":
        for name in ("train", "trainextra", "test-00000-of-00001"):
            write_parquet(tmp_path, pictures, [0, 1] * 3, name)
        left_out = "trainextra.parquet"
    else:
        folder_of_classes(tmp_path, ["a", "b"], 3, ("train", "test", "more"))
        left_out = "more/a/0.png, more/a/1.png, more/a/2.png, more/b/0.png, more/b/1.png and 1 more"
    said = []
    assert len(load(Data(name=str(tmp_path)), said.append).train) == 6
    assert f"{tmp_path}: left out, since their names say no split: {left_out}" in said


def test_a_file_that_is_no_training_file_by_its_name_is_named_where_there_is_no_other(tmp_path, pictures):
    for name in ("traindata", "test"):
        write_parquet(tmp_path, pictures, [0, 1] * 3, name)
    with pytest.raises(DataError, match=r"no training images: .*; of no split by their names: traindata\.parquet$"):
        load(Data(name=str(tmp_path)))


@pytest.mark.parametrize("name", ["train-00000-of-00001", "train_0", "Train.2", "train2024", "train/0", "train/extra"])
def test_the_first_word_of_a_file_or_of_its_folder_says_that_it_is_for_training(tmp_path, pictures, name):
    (tmp_path / "train").mkdir()
    for split in (name, "test"):
        write_parquet(tmp_path, pictures, [0, 1] * 3, split)
    said = []
    assert len(load(Data(name=str(tmp_path)), said.append).train) == 6
    assert not [text for text in said if "left out" in text]


def test_a_validation_split_beside_the_test_split_is_not_used_and_that_is_said(tmp_path, pictures):
    for split in ("train", "test", "validation"):
        write_parquet(tmp_path, pictures, [0, 1] * 3, split)
    said = []
    images = load(Data(name=str(tmp_path)), said.append)
    assert (len(images.train), len(images.test)) == (6, 6)
    assert f"parquet:{tmp_path}: the splits train and test are used, and not validation" in said


@pytest.fixture
def numbered():
    """Ten images, each filled with its own number."""
    return Split(torch.arange(10.0)[:, None, None, None].expand(10, 1, 2, 2), torch.arange(10))


def test_an_epoch_shows_each_image_at_most_once_and_drops_the_remainder(numbered):
    seen = [label for _, labels in batches(numbered, 4, seed=0, epoch=1) for label in labels.tolist()]
    assert len(seen) == 8 == 4 * steps_per_epoch(10, 4)
    assert len(set(seen)) == 8


def test_a_batch_larger_than_the_set_is_the_whole_set_once_an_epoch(numbered):
    (batch,) = batches(numbered, 4096, seed=0, epoch=1)
    assert sorted(batch[1].tolist()) == list(range(10))
    assert steps_per_epoch(10, 4096) == 1


def test_the_order_follows_from_seed_and_epoch_alone(numbered):
    def order(seed, epoch):
        return [y.tolist() for _, y in batches(numbered, 5, seed, epoch)]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)
    assert all(torch.equal(x[:, 0, 0, 0], y.float()) for x, y in batches(numbered, 5, 0, 3))


def test_a_crop_is_a_window_of_the_padded_image_and_a_mirror_image_is_one():
    images = torch.arange(1.0, 25).view(2, 1, 3, 4)
    draws = torch.Generator().manual_seed(0)
    padded = torch.nn.functional.pad(images, [2] * 4)
    windows = {
        tuple(w.flatten().tolist())
        for image in padded
        for top in range(5)
        for left in range(5)
        for w in (image[:, top : top + 3, left : left + 4], image[:, top : top + 3, left : left + 4].flip(2))
    }
    setting = Augmentation(pad=2, flip=True)
    for _ in range(20):
        for image in augmented(images, setting, Moves.draw([len(images)], setting, draws)):
            assert tuple(image.flatten().tolist()) in windows


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_image_of_an_epoch_is_moved_as_drawn_for_its_place_in_the_epoch_batch_by_batch(layout):
    images = torch.rand(10, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    setting, size = Augmentation(pad=1, flip=True), 4
    draws = generator(7, 2, "augmentation")
    order = torch.randperm(10, generator=generator(7, 2, "order")).tolist()
    for x, y in batches(Split(images, torch.arange(10)), size, 7, 2, setting):
        top, left = (torch.randint(3, (size,), generator=draws).tolist() for _ in range(2))
        mirrored = (torch.rand(size, generator=draws) < 0.5).tolist()
        for i in range(size):
            number = order.pop(0)
            padded = torch.nn.functional.pad(images[number], [1] * 4)
            crop = padded[:, top[i] : top[i] + 4, left[i] : left[i] + 5]
            assert y[i] == number
            assert torch.equal(x[i], crop.flip(2) if mirrored[i] else crop)
        assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.photographs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "shape", "sizes", "classes"),
    [
        (None, (3, 32, 32), (3_000, 1_000), 10),
        ("tinyimagenet10-64px", (3, 64, 64), (3_500, 2_000), 10),
    ],
)
def test_real_photographs_are_read_whole_and_normalised(photographs, few_photographs, folder, shape, sizes, classes):
    images = load(Data(name=str(photographs / folder if folder else few_photographs)))
    assert (images.shape, images.classes) == (shape, classes)
    assert (len(images.train), len(images.test)) == sizes
    assert images.test.images.mean((1, 2, 3)).abs().max() < 1e-4
    assert torch.bincount(images.train.labels).unique().numel() == 1  # as many of each class


def test_a_few_digits_are_tested_on_the_last_thousand_none_of_which_is_trained_on():
    few, all_ = load(Data(name="few-digits")), load(Data(name="digits"))
    assert (len(few.train), len(few.test)) == (797, 1000)
    assert torch.equal(few.train.images, all_.train.images[:797])
    assert torch.equal(few.test.images, torch.cat([all_.train.images[797:], all_.test.images]))


def test_pictures_that_a_parquet_file_holds_as_bytes_are_read(tmp_path, pictures):
    import io

    import pyarrow
    import pyarrow.parquet

    labels = [0, 1] * 3
    for split in ("train", "test"):
        write_parquet(tmp_path / "typed", pictures, labels, split)
        content = []
        for picture in pictures:
            Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
            content.append(file.getvalue())
        for name, column in (("plain", content), ("nested", [{"bytes": c, "path": None} for c in content])):
            (tmp_path / name).mkdir(exist_ok=True)
            pyarrow.parquet.write_table(
                pyarrow.table({"image": column, "label": labels}), tmp_path / name / f"{split}.parquet"
            )
    expected = load(Data(name=str(tmp_path / "typed")))
    for name in ("plain", "nested"):
        assert torch.equal(load(Data(name=str(tmp_path / name))).train.images, expected.train.images)


@pytest.mark.parametrize("names", [("Train", "TEST"), ("training", "testing"), ("train", "val")])
def test_labels_beside_the_images_are_read_in_splits_of_any_name(tmp_path, pictures, names):
    for split in names:
        labelled_folder(tmp_path / split, pictures, [1, 2, 3] * 2)
    images = load(Data(name=str(tmp_path)))
    assert (len(images.train), len(images.test), images.classes) == (6, 6, 3)
    expected = global_contrast_normalization(torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255)
    for label in range(3):
        torch.testing.assert_close(images.train.images[images.train.labels == label], expected[label::3])


def test_classes_that_are_links_count_and_hidden_files_and_links_in_a_circle_do_not(tmp_path):
    folder_of_classes(tmp_path / "elsewhere", ["a", "b", "c"], 2)
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in ("a", "b", "c"):
            (tmp_path / "data" / split / name).symlink_to(tmp_path / "elsewhere" / split / name)
    (tmp_path / "elsewhere" / "train" / "a" / "._0.png").write_bytes(b"no picture")
    hidden = tmp_path / "data" / "train" / ".ipynb_checkpoints"
    hidden.mkdir()
    Image.new("RGB", (8, 8)).save(hidden / "0.png")
    (tmp_path / "data" / "train" / "back").symlink_to(tmp_path / "data")
    images = load(Data(name=str(tmp_path / "data")))
    assert (len(images.train), len(images.test), images.classes) == (6, 6, 3)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("train/a/deeper/0.png", "is 2 folders below its split: an image lies in train/CLASS/"),
        ("train/0.png", "is in no folder of a class below its split"),
    ],
)
def test_an_image_whose_class_its_folder_does_not_say_is_refused(tmp_path, place, message):
    folder_of_classes(tmp_path, ["a", "b"], 2)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / place)
    with pytest.raises(DataError, match=f"{place} {message}"):
        load(Data(name=str(tmp_path)))


def test_folders_of_classes_without_a_split_are_told_where_images_are_looked_for(tmp_path):
    folder_of_classes(tmp_path, ["a", "b"], 2)
    (tmp_path / "train").rename(tmp_path / "flat")
    with pytest.raises(
        DataError, match=r"flat has no training and no test images: .* in train/CLASS/ .*: a/0\.png, a/1"
    ):
        load(Data(name=str(tmp_path / "flat")))


def test_an_image_of_another_size_or_that_is_damaged_is_named_by_its_file(tmp_path):
    folder_of_classes(tmp_path, ["a", "b"], 2)
    odd = sorted((tmp_path / "train" / "b").iterdir())[0]
    Image.new("RGB", (9, 8)).save(odd)
    with pytest.raises(DataError, match=rf"image 2 \({odd}\) is \(8, 9\) where the first is \(8, 8\)"):
        load(Data(name=str(tmp_path)))
    odd.write_bytes(b"no picture")
    with pytest.raises(DataError, match=rf"image 2 \({odd}\) cannot be decoded"):
        load(Data(name=str(tmp_path)))


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_single_class_is_refused(tmp_path, pictures, kind):
    if kind == "folder":
        folder_of_classes(tmp_path, ["a"], 2)
    else:
        for split in ("train", "test"):
            write_parquet(tmp_path, pictures, [0] * 6, split)
    with pytest.raises(DataError, match=r"all training images are of one class, [a0]$"):
        load(Data(name=str(tmp_path)))


def test_a_class_of_test_images_alone_is_refused_by_the_name_of_its_folder(tmp_path):
    folder_of_classes(tmp_path, ["b", "c"], 2)
    (tmp_path / "test" / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "a" / "0.png")
    with pytest.raises(DataError, match=r"the test images have labels that no training image has: a$"):
        load(Data(name=str(tmp_path)))


@pytest.mark.parametrize("names", [["dog [old]", "cat", "bird"], ["0[1]", "01"], ["a*", "ab", "?"]])
def test_names_that_look_like_patterns_are_names(tmp_path, names):
    folder = tmp_path / "photos [2020]"
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for file in ["1", "2", "x1", *(["x[1]"] if name == names[0] else [])]:
                picture = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / split / name / f"{file}.png")
    split = load(Data(name=str(folder)))
    counts = [4 if name == names[0] else 3 for name in sorted(names)]
    assert split.train.labels.bincount().tolist() == split.test.labels.bincount().tolist() == counts
    assert len(split.train.images.flatten(1).unique(dim=0)) == 3 * len(names) + 1


def test_a_folder_of_parquet_files_may_be_called_like_a_pattern(tmp_path, pictures):
    for split in ("train", "test"):
        write_parquet(tmp_path / "data [1]", pictures, [0, 1] * 3, split)
    assert len(load(Data(name=str(tmp_path / "data [1]"))).train.images) == 6


def test_splits_that_name_their_classes_in_another_order_are_refused(tmp_path, pictures):
    import datasets

    for split, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"img": [Image.fromarray(p) for p in pictures], "label": [0, 1] * 3}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=r"the label 0 is 'dog' in test.parquet and 'cat' in train.parquet"):
        load(Data(name=str(tmp_path)))
