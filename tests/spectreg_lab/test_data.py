import numpy as np
import pytest
import torch
from PIL import Image

from spectreg_lab.data import DataError, Split, batches, load, steps_per_epoch
from spectreg_lab.data.batches import augmented
from spectreg_lab.data.images import global_contrast_normalization
from spectreg_lab.settings.config import Augmentation, Data


def write_parquet(folder, pictures, labels, split):
    """The schema of the hub's copies: ``img`` and ``label``."""
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"img": [Image.fromarray(p) for p in pictures], "label": labels}
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


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


def test_a_changed_file_is_read_anew_and_a_broken_cache_made_again(tmp_path, pictures, cache):
    for split in ("train", "test"):
        write_parquet(tmp_path, pictures, [0, 1] * 3, split)
    first = load(Data(name=str(tmp_path)))
    for path in cache.glob("*.safetensors"):
        start = path.read_bytes()[:40]
        path.unlink()  # tensors that are mapped from it keep it
        path.write_bytes(start)
    assert torch.equal(load(Data(name=str(tmp_path))).train.images, first.train.images)
    write_parquet(tmp_path, pictures[::-1].copy(), [0, 1] * 3, "train")
    assert torch.equal(load(Data(name=str(tmp_path))).train.images, first.train.images.flip(0))


def test_the_images_held_out_for_validation_are_training_images_and_disjoint_from_those_kept():
    everything = load(Data(train_size=200))
    split = load(Data(train_size=200, validation=0.25))
    assert (len(split.train), len(split.test)) == (150, 50)
    assert torch.equal(torch.cat([split.train.images, split.test.images]), everything.train.images)


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
        (Data(name="nothing-like-it"), "no such folder or name; known: digits, cifar10"),
        (Data(name="./absent"), "no such folder"),
        (Data(name="${SPECTREG_UNSET}/x"), "set the environment variable"),
        (Data(train_size=5000), "train_size = 5000, but there are 1400"),
        (Data(train_size=2, validation=0.1), "leaves none on one side"),
    ],
)
def test_data_that_cannot_be_had_are_refused_with_what_would_do(setting, message):
    with pytest.raises(DataError, match=message):
        load(setting)


def test_a_hub_name_that_cannot_be_reached_is_one_line_that_names_it():
    with pytest.raises(DataError, match=r"hub:uoft-cs/cifar10 cannot be read: \w+: .+"):
        load(Data(name="cifar10"))


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
    with pytest.raises(DataError, match=r"has the splits \['train'\]: train and test are needed"):
        load(Data(name=str(tmp_path)))


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
    for _ in range(20):
        for image in augmented(images, Augmentation(pad=2, flip=True), draws):
            assert tuple(image.flatten().tolist()) in windows


@pytest.mark.photographs
@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "shape", "sizes", "classes"),
    [
        ("cifar10-jpeg", (3, 32, 32), (50_000, 10_000), 10),
        ("tinyimagenet100-32px", (3, 32, 32), (50_000, 5_000), 100),
        ("tinyimagenet10-64px", (3, 64, 64), (3_500, 2_000), 10),
    ],
)
def test_real_photographs_are_read_whole_and_normalised(photographs, folder, shape, sizes, classes):
    images = load(Data(name=f"{photographs}/{folder}"))
    assert (images.shape, images.classes) == (shape, classes)
    assert (len(images.train), len(images.test)) == sizes
    assert images.test.images.mean((1, 2, 3)).abs().max() < 1e-4
    assert torch.bincount(images.train.labels).unique().numel() == 1  # as many of each class
