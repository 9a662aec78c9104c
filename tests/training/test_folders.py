"""Data of one's own: folders of images, pairs with masks, and files of arrays."""

import functools
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jbn.training.data import (
    Dataset,
    Description,
    InMemory,
    OnDisk,
    load_dataset,
    read_images,
)
from jbn.training.errors import UsageError


def draw(path: Path, value: int, size: tuple[int, int] = (4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, np.uint8)).save(path)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Three classes, in a training and a test split; the value of pixels is theirs."""
    for split, count in (("train", 5), ("test", 2)):
        for k, name in enumerate(("bird", "cat", "dog")):
            for i in range(count):
                draw(tmp_path / "pets" / split / name / f"{i}.png", 100 * k + i)
    return tmp_path / "pets"


def memory(dataset: Dataset, split: str = "train") -> InMemory:
    found = getattr(dataset, split)
    assert isinstance(found, InMemory)
    return found


def test_class_folders(pets: Path):
    dataset = load_dataset(str(pets))
    assert list(dataset.classes) == ["bird", "cat", "dog"]
    assert dataset.image_shape == (4, 4, 3)
    assert (len(dataset.train), len(dataset.test)) == (15, 6)
    train = memory(dataset)
    np.testing.assert_array_equal(train.label, np.repeat([0, 1, 2], 5))
    expected = 100 * train.label + np.tile(np.arange(5), 3)
    np.testing.assert_array_equal(train.image[:, 0, 0, 0], expected)


def test_what_is_no_image_is_left_out(pets: Path):
    (pets / "train" / "cat" / "notes.txt").write_text("of cats")
    (pets / "train" / "cat" / "._0.png").write_bytes(b"of a Macintosh")
    (pets / "train" / ".cache").mkdir()
    assert len(load_dataset(str(pets)).train) == 15


def test_from_disk(pets: Path):
    with pytest.raises(UsageError, match=r"is read from disk.* pass --image-size"):
        load_dataset(str(pets), loader="grain")
    dataset = load_dataset(str(pets), loader="grain", image_size=4)
    assert isinstance(dataset.train, OnDisk)
    rows = np.arange(15)
    expected = memory(load_dataset(str(pets))).rows(rows)
    for name, value in dataset.train.rows(rows).items():
        np.testing.assert_array_equal(value, expected[name])


def test_the_same_files_are_split_off_wherever_they_lie(tmp_path: Path):
    for k, name in enumerate(("a", "b")):
        for i in range(20):
            draw(tmp_path / "one" / name / f"{i}.png", 100 * k + i)
    first = load_dataset(str(tmp_path / "one"), test_fraction=0.25)
    assert (len(first.train), len(first.test)) == (30, 10)
    # Of each class the same part.
    np.testing.assert_array_equal(np.bincount(memory(first, "test").label), [5, 5])

    def values(dataset: Dataset, split: str) -> set[int]:
        return set(memory(dataset, split).image[:, 0, 0, 0].tolist())

    assert not values(first, "train") & values(first, "test")
    shutil.copytree(tmp_path / "one", tmp_path / "deep" / "other")
    again = load_dataset(str(tmp_path / "deep" / "other"), test_fraction=0.25)
    assert values(again, "test") == values(first, "test")
    # One more file moves at most one.
    draw(tmp_path / "one" / "a" / "new.png", 99)
    more = load_dataset(str(tmp_path / "one"), test_fraction=0.25)
    assert len(values(more, "test") - {99} - values(first, "test")) <= 1


@pytest.mark.parametrize("loader", ["memory", "grain"])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_predict_is_fed_what_evaluation_is(
    tmp_path: Path, rng: np.random.Generator, loader: Any, size: tuple[int, int]
):
    """Bit for bit, of any kind of file."""
    noise = lambda *shape: rng.integers(0, 256, (*size, *shape), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    wide = rng.integers(0, 65536, size).astype(np.uint16)
    images: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "gray.png": (Image.fromarray(noise()), {}),
        "rgb.png": (Image.fromarray(noise(3)), {}),
        "rgba.png": (Image.fromarray(noise(4)), {}),
        "la.png": (Image.fromarray(noise(2), "LA"), {}),
        "wide.png": (Image.fromarray(wide), {}),
        "bits.png": (Image.fromarray(noise() > 99), {}),
        "palette.gif": (Image.fromarray(noise(3)).convert("P"), {}),
        "clear.png": (Image.fromarray(noise(3)).convert("P"), {"transparency": 1}),
        "turned.jpg": (Image.fromarray(noise(3)), {"exif": exif}),
        "cmyk.jpg": (Image.fromarray(noise(3)).convert("CMYK"), {}),
    }
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for file, (image, options) in images.items():
                image.save(folder / file, **options)
    dataset = load_dataset(str(tmp_path / "set"), loader=loader, image_size=6)
    folders = [tmp_path / "set" / "train" / name for name in ("a", "b")]
    files = [folder / name for folder in folders for name in sorted(images)]
    fed = dataset.train.rows(np.arange(len(files)))["image"]
    found = read_images(files, dataset.image_shape, dataset.part)
    np.testing.assert_array_equal(found, fed)


def test_crops_are_for_training_and_middle_parts_for_the_rest(pets: Path):
    dataset = load_dataset(str(pets), loader="grain", image_size=3, crop=True)
    assert dataset.part == "middle"
    files = sorted((pets / "test").rglob("*.png"))
    found = read_images(files, dataset.image_shape, dataset.part)
    fed = dataset.test.rows(np.arange(len(files)))["image"]
    np.testing.assert_array_equal(found, fed)


def test_a_different_size_is_told_at_once(pets: Path):
    """And not after all the others have been decoded."""
    (pets / "train" / "dog" / "4.png").write_text("is never reached")
    draw(pets / "train" / "bird" / "1.png", 1, (5, 4))
    with pytest.raises(UsageError, match=r"1\.png is 5x4, the first 4x4\): pass --im"):
        load_dataset(str(pets))


def test_a_large_folder_is_not_read_into_memory(
    pets: Path, monkeypatch: pytest.MonkeyPatch
):
    from jbn.training import data

    monkeypatch.setattr(data, "_MOST_IN_MEMORY", 21 * 4 * 4 * 3 - 1)
    with pytest.raises(UsageError, match="is read from disk, image by image"):
        load_dataset(str(pets))
    assert isinstance(load_dataset(str(pets), image_size=4).train, OnDisk)
    monkeypatch.setattr(data, "_MOST_IN_MEMORY", 21 * 4 * 4 * 3)
    assert isinstance(load_dataset(str(pets)).train, InMemory)


# ---- Like the data set of a run ------------------------------------------------------


def test_numbers_of_classes_are_those_of_the_run(pets: Path, tmp_path: Path):
    """Also where some are missing, and where there is nothing to train on."""
    described = load_dataset(str(pets)).describe()
    for name in ("dog", "cat"):
        shutil.copytree(pets / "test" / name, tmp_path / "new" / "test" / name)
    found = load_dataset(str(tmp_path / "new"), like=described)
    np.testing.assert_array_equal(memory(found, "test").label, [1, 1, 2, 2])
    with pytest.raises(UsageError, match="has no folder `train`"):
        _ = found.train
    draw(tmp_path / "new" / "test" / "emu" / "0.png", 3)
    with pytest.raises(UsageError, match="emu is not of a class that there is: bird"):
        _ = load_dataset(str(tmp_path / "new"), like=described).test


def test_images_get_the_shape_of_the_run(pets: Path, tmp_path: Path):
    described = load_dataset(str(pets), image_size=6).describe()
    found = load_dataset(str(pets), like=described)
    assert found.image_shape == (6, 6, 3)
    expected = memory(load_dataset(str(pets), image_size=6), "test").image
    np.testing.assert_array_equal(memory(found, "test").image, expected)


def test_a_set_is_recognized_in_another_place(pets: Path, tmp_path: Path):
    described = load_dataset(str(pets)).describe()
    described.save(tmp_path / "a.json")
    described = Description.load(tmp_path / "a.json")

    def difference(name: str, change: Callable[[Path], Any]) -> str | None:
        shutil.copytree(pets, tmp_path / name)
        change(tmp_path / name)
        return described.difference(load_dataset(str(tmp_path / name)).describe())

    def swap(path: Path) -> None:
        (path / "train" / "cat").rename(path / "train" / "other")
        (path / "train" / "dog").rename(path / "train" / "cat")
        (path / "train" / "other").rename(path / "train" / "dog")

    assert difference("moved", lambda p: None) is None
    # As if decoded by another library.
    assert (
        difference("near", lambda p: draw(p / "train" / "cat" / "1.png", 102)) is None
    )
    for name, change, match in (
        (
            "more",
            lambda p: draw(p / "train" / "cat" / "9.png", 0),
            "16 training images",
        ),
        ("less", lambda p: (p / "test" / "cat" / "1.png").unlink(), "5 test images"),
        (
            "named",
            lambda p: [(s / "cat").rename(s / "emu") for s in p.iterdir()],
            "emu",
        ),
        ("swapped", swap, "examples, or their order, are others"),
        ("redrawn", lambda p: draw(p / "test" / "dog" / "1.png", 9), "are others"),
    ):
        assert re.search(match, difference(name, change) or "")


def test_classes_of_prepared_sets_are_compared(tmp_path: Path):
    digits = load_dataset("digits", data_dir=tmp_path)
    described = digits.describe()
    turned = type(described)(**{**vars(described), "classes": described.classes[::-1]})
    found = load_dataset("digits", data_dir=tmp_path, like=turned)
    np.testing.assert_array_equal(
        memory(found, "test").label, 9 - memory(digits, "test").label
    )
    fewer = type(described)(**{**vars(described), "classes": described.classes[:9]})
    with pytest.raises(UsageError, match="has the class 9, which the run does not ha"):
        load_dataset("digits", data_dir=tmp_path, like=fewer)


# ---- Pairs with masks ----------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path: Path, rng: np.random.Generator) -> Path:
    root = tmp_path / "pairs"
    for split, count in (("train", 4), ("test", 2)):
        for i in range(count):
            draw(root / split / "images" / f"{i}.jpg", 50 * i)
            mask = rng.integers(1, 4, (4, 4), np.uint8)
            mask[0, :3] = 1, 2, 3
            mask[1, 1] = 255
            (root / split / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    return root


def test_masks(pairs: Path):
    dataset = load_dataset(str(pairs), target="segmentation_mask")
    assert list(dataset.classes) == ["1", "2", "3"]
    train = memory(dataset)
    for i in range(4):
        with Image.open(pairs / "train" / "masks" / f"{i}.png") as file:
            mask = np.asarray(file).astype(int)
        expected = np.where(mask == 255, -1, mask - 1)
        np.testing.assert_array_equal(train.label[i], expected)
    np.testing.assert_allclose(train.image[:, 0, 0, 0], [0, 50, 100, 150], atol=1)


def test_black_and_white_masks(pairs: Path):
    """Of two values, 255 is the object, as most tools draw it."""
    mask = np.zeros((4, 4), np.uint8)
    mask[1:3, 1:3] = 255
    for path in pairs.rglob("*.png"):
        Image.fromarray(mask).save(path)
    dataset = load_dataset(str(pairs), target="segmentation_mask")
    assert list(dataset.classes) == ["0", "255"]
    np.testing.assert_array_equal(memory(dataset).label[0], mask // 255)
    # Alike where a split is of one class alone.
    described = dataset.describe()
    for path in (pairs / "test").rglob("*.png"):
        draw(path, 255)
    again = load_dataset(str(pairs), target="segmentation_mask", like=described)
    assert (memory(again, "test").label == 1).all()
    draw(pairs / "test" / "masks" / "1.png", 7)
    again = load_dataset(str(pairs), target="segmentation_mask", like=described)
    with pytest.raises(
        UsageError, match=r"Mask 1 of .* has the value 7, which is no c"
    ):
        _ = again.test


def pair_fault(change: Callable[[Path], Any], match: str) -> Any:
    return pytest.param(change, match, id=match[:20])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pair_fault(
            lambda p: (p / "train" / "masks" / "1.png").unlink(),
            r"1\.jpg has no counterpart 1\.\* in .*masks",
        ),
        pair_fault(
            lambda p: (p / "train" / "images" / "1.jpg").unlink(),
            r"1\.png has no counterpart 1\.\* in .*images",
        ),
        pair_fault(
            lambda p: draw(p / "train" / "masks" / "1.png", 1, (5, 4)),
            r"1\.jpg is 4x4 and its mask 5x4: they must have one size",
        ),
        pair_fault(
            lambda p: draw(p / "train" / "masks" / "1.gif", 1),
            "differ in their suffix alone",
        ),
        pair_fault(
            lambda p: shutil.rmtree(p / "train" / "masks"),
            "has no folders `images` and `masks`",
        ),
        pair_fault(
            lambda p: [draw(f, 7) for f in p.rglob("*.png")],
            "The masks have no other values than 7: at least two classes",
        ),
    ],
)
def test_pairs_that_do_not_fit(pairs: Path, change: Any, match: str):
    change(pairs)
    with pytest.raises(UsageError, match=match):
        load_dataset(str(pairs), target="segmentation_mask")


# ---- Arrays in a file ----------------------------------------------------------------


@pytest.fixture
def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "train_images": rng.integers(0, 256, (9, 4, 4), np.uint8),
        "train_labels": np.arange(9) % 3,
        "test_images": rng.integers(0, 256, (6, 4, 4), np.uint8),
        "test_labels": np.arange(6)[:, None] % 3,
    }


def saved(path: Path, arrays: dict[str, Any]) -> str:
    np.savez(path, allow_pickle=True, **arrays)
    return str(path)


KERAS = ("x_train", "y_train", "x_test", "y_test")


@pytest.mark.parametrize("names", [None, KERAS])
def test_npz(tmp_path: Path, arrays: dict[str, np.ndarray], names: Any):
    values = dict(zip(names or arrays, arrays.values(), strict=True))
    dataset = load_dataset(saved(tmp_path / "a.npz", values))
    assert dataset.image_shape == (4, 4, 1)
    assert list(dataset.classes) == ["0", "1", "2"]
    for split in ("train", "test"):
        found = memory(dataset, split)
        expected = arrays[f"{split}_images"][..., None]
        np.testing.assert_array_equal(found.image, expected)
        np.testing.assert_array_equal(found.label, arrays[f"{split}_labels"].ravel())
        assert found.label.dtype == np.int32


def test_npz_without_splits(tmp_path: Path, rng: np.random.Generator):
    wide = rng.integers(0, 65536, (20, 3, 3, 2)).astype(np.uint16)
    values = {"images": wide, "labels": np.arange(20), "classes": list("abcdefghijklm")}
    with pytest.raises(UsageError, match="labels from 0 to 19 and 13 classes"):
        load_dataset(saved(tmp_path / "a.npz", values))
    values["labels"] = values["labels"] % 13
    dataset = load_dataset(saved(tmp_path / "a.npz", values), test_fraction=0.3)
    assert list(dataset.classes) == list("abcdefghijklm")
    assert (len(dataset.train), len(dataset.test)) == (14, 6)
    both = np.concatenate([memory(dataset).image, memory(dataset, "test").image])
    order = lambda x: x[np.lexsort(x.reshape(20, -1).T)]
    np.testing.assert_array_equal(order(both), order(np.rint(wide / 257).astype(int)))
    resized = load_dataset(str(tmp_path / "a.npz"), image_size=5)
    assert resized.image_shape == (5, 5, 2)


def test_npz_of_masks(tmp_path: Path, arrays: dict[str, np.ndarray]):
    masks = {n: x % 3 if "images" in n else x for n, x in arrays.items()}
    masks = {
        "train_labels": masks["train_images"],
        "test_labels": masks["test_images"],
    }
    path = saved(tmp_path / "a.npz", arrays | masks)
    dataset = load_dataset(path, target="segmentation_mask")
    np.testing.assert_array_equal(memory(dataset).label, masks["train_labels"])
    again = load_dataset(path, target="segmentation_mask", like=dataset.describe())
    np.testing.assert_array_equal(memory(again).label, masks["train_labels"])
    with pytest.raises(UsageError, match="has no labels of images"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train_images": np.zeros((9, 4, 4))}, "has pixels of dtype float64"),
        ({"train_images": np.zeros((9, 16), np.uint8)}, r"have shape \(9, 16\)"),
        ({"train_labels": np.zeros(8, int)}, r"labels int64 of shape \(8,\)"),
        ({"train_labels": np.zeros(9)}, r"labels float64 of shape.*labels.astype\(in"),
        ({"train_labels": np.eye(9)}, r"one-hot labels, save labels.argmax\(1\)"),
        ({"train_labels": np.full(9, "a")}, "labels <U1 .*For names, save `classes, l"),
        ({"train_labels": np.full(9, -1)}, "labels count from 0"),
        ({"train_labels": np.arange(9) * 10**6}, "number the classes from 0 without"),
        (
            {"train_labels": np.zeros(9, int), "test_labels": np.zeros(6, int)},
            "has the label 0 alone: at least two classes are needed",
        ),
        (
            {"train_images": np.zeros((9, 3, 8, 8), np.uint8)},
            r"looks like \(n, channels, height, width\); .*transpose\(0, 2, 3, 1\)",
        ),
        ({"test_images": np.zeros((6, 5, 4), np.uint8)}, "differ in shape"),
        ({"train_images": np.full((9, 4, 4), None)}, "is not an .npz file of arrays"),
    ],
)
def test_npz_that_does_not_fit(
    tmp_path: Path, arrays: dict[str, np.ndarray], change: Any, match: str
):
    with pytest.raises(UsageError, match=match) as raised:
        load_dataset(saved(tmp_path / "a.npz", arrays | change))
    assert "\n" not in str(raised.value)


def test_npz_classes_are_matched_by_name(tmp_path: Path, arrays: dict[str, np.ndarray]):
    named = arrays | {"classes": ["bird", "cat", "dog"]}
    described = load_dataset(saved(tmp_path / "a.npz", named)).describe()
    turned = saved(tmp_path / "b.npz", arrays | {"classes": ["dog", "bird", "cat"]})
    found = load_dataset(turned, like=described)
    assert list(found.classes) == ["bird", "cat", "dog"]
    expected = (arrays["test_labels"].ravel() - 1) % 3  # dog is 2, not 0.
    np.testing.assert_array_equal(memory(found, "test").label, expected)
    other = saved(tmp_path / "c.npz", arrays | {"classes": ["dog", "bird", "emu"]})
    with pytest.raises(UsageError, match="has the class emu, which the run does not"):
        load_dataset(other, like=described)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_labels_of_pixels_are_in_memory_once(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr("jbn.training.npz._BLOCK_BYTES", 2**16)
    images = rng.integers(0, 256, (400, 64, 64, 3), np.uint8)
    masks = rng.integers(1, 4, (400, 64, 64), np.uint8)
    if kind == "npz":
        wide = masks.astype(np.int64)
        path = saved(tmp_path / "a.npz", {"images": images, "labels": wide})
    else:
        path = str(tmp_path / "pairs")
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            for name, array in (("images", image), ("masks", mask)):
                (tmp_path / "pairs" / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / "pairs" / name / f"{i}.png")
    open_ = functools.partial(load_dataset, path, target="segmentation_mask")
    open_()  # Imports.
    tracemalloc.start()
    dataset = open_()
    splits = memory(dataset), memory(dataset, "test")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.1 * sum(x.image.nbytes + x.label.nbytes for x in splits)
    assert set(np.unique(splits[0].label)) == {0, 1, 2}


@pytest.mark.parametrize("kind", ["split", "whole", "wide", "resized"])
def test_npz_is_in_memory_once(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr("jbn.training.npz._BLOCK_BYTES", 2**16)
    image = rng.integers(0, 256, (2000, 32, 32, 3), np.uint8)
    wide = image.astype(np.uint16) * 257 if kind == "wide" else image
    label = np.arange(2000) % 10
    arrays = {"images": wide, "labels": label}
    if kind == "split":
        arrays = {"train_images": image, "test_images": image[:100]}
        arrays |= {"train_labels": label, "test_labels": label[:100]}
    path = saved(tmp_path / "a.npz", arrays)
    size = 24 if kind == "resized" else None
    load_dataset(path, image_size=size)  # Imports.
    tracemalloc.start()
    dataset = load_dataset(path, image_size=size)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    splits = memory(dataset), memory(dataset, "test")
    assert peak < 1.1 * sum(split.image.nbytes for split in splits)
    if kind == "wide":
        both = np.concatenate([split.image for split in splits])
        np.testing.assert_array_equal(np.sort(both.ravel()), np.sort(image.ravel()))


def test_npz_in_blocks(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    """In any order of axes, and with the rows of each split in their order."""
    monkeypatch.setattr("jbn.training.npz._BLOCK_BYTES", 100)
    image = rng.integers(0, 256, (23, 4, 4, 3), np.uint8)
    for name, stored in {"c": image, "f": np.asfortranarray(image)}.items():
        arrays = {"images": stored, "labels": np.arange(23)}
        dataset = load_dataset(saved(tmp_path / f"{name}.npz", arrays))
        for split in (memory(dataset), memory(dataset, "test")):
            np.testing.assert_array_equal(split.image, image[split.label])
            assert (np.diff(split.label) > 0).all()


def test_damaged_npz(tmp_path: Path, arrays: dict[str, np.ndarray]):
    path = Path(saved(tmp_path / "a.npz", arrays))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(
            UsageError, match=r"is not an \.npz file of arrays that can"
        ):
            load_dataset(str(path))
    path.write_bytes(whole)
    with pytest.raises(UsageError, match="leave --loader=grain and --crop out"):
        load_dataset(str(path), loader="grain")
    np.savez(path, pixels=np.zeros(3))
    with pytest.raises(UsageError, match="has the arrays pixels: it needs train_im"):
        load_dataset(str(path))


# ---- Paths ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: None, "is neither a folder nor an .npz file"),
        (lambda p: p.write_text("text"), "is neither a folder nor an .npz file"),
        (lambda p: p.mkdir(), "needs at least 2 class folders and has 0"),
        (
            lambda p: draw(p / "cat" / "1.png", 1),
            "needs at least 2 class folders and has 1",
        ),
        (
            lambda p: [draw(p / "a" / "1.png", 1), (p / "b").mkdir()],
            "The class folder .*b has no images",
        ),
        (
            lambda p: [draw(p / "test" / c / "1.png", 1) for c in "ab"],
            "has no folder `train`",
        ),
        (
            lambda p: [draw(p / c / "1.png", 1) for c in "ab"],
            "--test-fraction=0.2 of the 2 images .* leaves 0 to test on",
        ),
    ],
)
def test_folders_that_are_none(tmp_path: Path, make: Any, match: str):
    make(tmp_path / "set")
    with pytest.raises(UsageError, match=match):
        load_dataset(str(tmp_path / "set"))


def test_names_and_paths(pets: Path, monkeypatch: pytest.MonkeyPatch):
    """A name of TFDS stays one where there is such a folder; other names are paths."""
    from jbn.training.folders import find

    monkeypatch.chdir(pets.parent)
    Path("mnist").mkdir()
    assert find("mnist") is None
    assert find("./mnist") == Path("mnist")
    assert find("pets") == Path("pets")
    assert find("nonesuch") is None
    with pytest.raises(UsageError, match="is neither a folder nor an"):
        find("path/to/folder")


def test_images_alone(pets: Path):
    dataset = load_dataset(str(pets), target=None)
    assert (len(dataset.train), list(dataset.classes)) == (15, [])
