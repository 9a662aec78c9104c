"""Data sets: the digits, MNIST's format, and what is said when there is nothing."""

import gzip
import hashlib
import http.server
import io
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.utils import Size

from jbn.training import data, idx
from jbn.training.batches import plan_epoch
from jbn.training.data import InMemory, OnDisk, load_dataset, read_images
from jbn.training.errors import UsageError
from jbn.training.images import Preparation
from jbn.training.loader import load
from jbn.training.png import encode_png


MNIST_FILES = Path(__file__).parents[3] / "shared" / "data" / "mnist"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfds")


def in_memory(name: str, **options: Any) -> InMemory:
    """The training split."""
    split = load_dataset(name, **options).train
    assert isinstance(split, InMemory)
    return split


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim])
    shape = np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + shape + values.tobytes()))


@pytest.fixture
def files(tmp_path: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Four small files in MNIST's format, in `tmp_path / "files"`."""
    arrays = {
        "train-images-idx3-ubyte.gz": rng.integers(0, 256, (9, 28, 28), np.uint8),
        "train-labels-idx1-ubyte.gz": np.arange(9, dtype=np.uint8),
        "t10k-images-idx3-ubyte.gz": rng.integers(0, 256, (5, 28, 28), np.uint8),
        "t10k-labels-idx1-ubyte.gz": np.arange(5, dtype=np.uint8)[::-1],
    }
    (tmp_path / "files").mkdir()
    for name, values in arrays.items():
        write_idx(tmp_path / "files" / name, values)
    return arrays


def expect_files(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str) -> None:
    """Makes TFDS expect `folder`'s files as those of `kmnist`, at `url`."""
    infos = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        infos[f"{url}/{path.name}"] = UrlInfo(
            size=Size(len(content)),
            checksum=hashlib.sha256(content).hexdigest(),
            filename=path.name,
        )
    monkeypatch.setattr(idx.builder_class("kmnist"), "url_infos", infos)


def assert_holds(split: Any, images: np.ndarray, labels: np.ndarray) -> None:
    """TFDS shuffles what it writes; the labels say which is which."""
    assert split.image.dtype == np.uint8
    assert split.label.dtype == np.int32
    order = np.argsort(split.label)
    np.testing.assert_array_equal(split.label[order], np.sort(labels))
    np.testing.assert_array_equal(
        split.image[order].squeeze(-1), images[np.argsort(labels)]
    )


def test_digits_are_those_of_scikit_learn(data_dir: Path):
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    dataset = load_dataset("digits", data_dir=data_dir)
    assert list(dataset.classes) == [str(digit) for digit in range(10)]
    assert dataset.image_shape == (8, 8, 1)
    assert isinstance(dataset.train, InMemory)
    assert isinstance(dataset.test, InMemory)
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.train.image.shape[1:] == (8, 8, 1)

    def sorted_rows(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        rows = np.column_stack([labels, images.reshape(len(labels), -1)])
        return rows[np.lexsort(rows.T)]

    images = np.concatenate([dataset.train.image, dataset.test.image])
    labels = np.concatenate([dataset.train.label, dataset.test.label])
    np.testing.assert_array_equal(
        sorted_rows(np.rint(images / (255 / 16)), labels),
        sorted_rows(bunch.images, bunch.target),
    )
    # Every class has its fifth in the test split.
    share = np.bincount(dataset.test.label) / np.bincount(labels)
    np.testing.assert_allclose(share, 0.2, atol=0.005)


def test_digits_are_read_without_tensorflow_in_the_same_order(data_dir: Path):
    """In a new process, which reads what this one may have written."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jbn.training.data import load_dataset\n"
        f"dataset = load_dataset('digits', data_dir=Path({str(data_dir)!r}))\n"
        "assert 'tensorflow' not in sys.modules\n"
        "print(*dataset.train.label)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    labels = in_memory("digits", data_dir=data_dir).label
    np.testing.assert_array_equal(np.array(run.stdout.split(), int), labels)


def test_images_are_resized(data_dir: Path):
    image = in_memory("digits", data_dir=data_dir, image_size=6).image
    assert image.shape == (1437, 6, 6, 1)
    assert image.std() > 50


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another size is another file; and what is prepared anew is decoded anew."""
    decode, decoded = data._decode, []

    def counted(*args: Any) -> Any:
        decoded.append(args[-1])
        return decode(*args)

    monkeypatch.setattr(data, "_decode", counted)
    first = load_dataset("digits", data_dir=tmp_path)
    again = load_dataset("digits", data_dir=tmp_path)
    assert decoded == [f"the split `{s}` of `digits`" for s in ("train", "test")]
    assert again.image_shape == (8, 8, 1)
    for name in ("train", "test"):
        for key in ("image", "label"):
            value = getattr(getattr(first, name), key)
            read = getattr(getattr(again, name), key)
            assert read.dtype == value.dtype
            np.testing.assert_array_equal(read, value)
    assert in_memory("digits", data_dir=tmp_path, image_size=6).image.shape[1] == 6
    assert in_memory("digits", data_dir=tmp_path, target=None).label.sum() == 0
    assert len(decoded) == 6
    in_memory("digits", data_dir=tmp_path)
    assert len(decoded) == 6
    shutil.rmtree(tmp_path / "digits")
    in_memory("digits", data_dir=tmp_path)
    assert len(decoded) == 8


def test_files_at_hand(
    tmp_path: Path, files: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    """Prepared from --manual-dir, and then there without it."""
    expect_files(monkeypatch, tmp_path / "files", "http://nowhere.invalid")
    for manual_dir in (tmp_path / "files", None):
        dataset = load_dataset("kmnist", data_dir=tmp_path, manual_dir=manual_dir)
        train_images, train_labels, test_images, test_labels = files.values()
        assert_holds(dataset.train, train_images, train_labels)
        assert_holds(dataset.test, test_images, test_labels)
    assert (tmp_path / "kmnist" / "3.0.1" / "dataset_info.json").exists()


def test_other_files_are_refused(
    tmp_path: Path, files: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    expect_files(monkeypatch, tmp_path / "files", "http://nowhere.invalid")
    labels = tmp_path / "files" / "t10k-labels-idx1-ubyte.gz"
    write_idx(labels, files[labels.name] // 2)
    with pytest.raises(UsageError, match=r"[Cc]hecksum"):
        load_dataset("kmnist", data_dir=tmp_path, manual_dir=labels.parent)
    assert not (tmp_path / "kmnist" / "3.0.1").exists()


def test_files_from_a_server(
    tmp_path: Path,
    files: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    folder = str(tmp_path / "files")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any):
            super().__init__(*args, directory=folder)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            expect_files(monkeypatch, tmp_path / "files", url)
            dataset = load_dataset("kmnist", data_dir=tmp_path)
        finally:
            server.shutdown()
            thread.join()
    train_images, train_labels, *_ = files.values()
    assert_holds(dataset.train, train_images, train_labels)
    assert "WARNING" not in capfd.readouterr().err


def test_nothing_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No answer within seconds, where TFDS itself tries for minutes."""
    url = "http://127.0.0.1:9/train-images-idx3-ubyte.gz"  # Nobody listens there.
    info = UrlInfo(size=Size(1), checksum="0", filename="train.gz")
    monkeypatch.setattr(idx.builder_class("kmnist"), "url_infos", {url: info})
    start = time.perf_counter()
    with pytest.raises(UsageError) as raised:
        load_dataset("kmnist", data_dir=tmp_path)
    assert time.perf_counter() - start < 8
    message = str(raised.value)
    assert str(tmp_path / "kmnist" / "3.0.1") in message
    assert url in message
    assert "--manual-dir" in message


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("nonesuch", "TFDS knows no data set called `nonesuch`"),
        ("emnist/nonesuch", "--dataset=emnist/nonesuch: .*not found"),
    ],
)
def test_unknown_names(tmp_path: Path, name: str, match: str):
    with pytest.raises(UsageError, match=match):
        load_dataset(name, data_dir=tmp_path)


def test_manual_dir_must_exist(tmp_path: Path):
    with pytest.raises(UsageError, match="is not a folder"):
        load_dataset("mnist", data_dir=tmp_path, manual_dir=tmp_path / "nonesuch")


def test_not_an_idx_file(tmp_path: Path):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 7])))
    with pytest.raises(ValueError, match="is not a gzipped idx file"):
        idx.read_idx(path)


def mock(name: str, features: dict[str, Any], examples: dict[str, list[Any]]) -> type:
    """A builder called `name` of the given features and splits."""

    class Mock(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(split) for split in examples}

        def _generate_examples(self, split: str) -> Any:
            yield from enumerate(examples[split])

    Mock.name = name
    Mock.__module__ = "jbn.mock"
    return Mock


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets `load_dataset` find sets that are described by features and examples."""
    from jbn.training import tfds_source

    builders: dict[str, Any] = {}
    monkeypatch.setattr(
        tfds_source,
        "make_builder",
        lambda name, folder: builders[name](data_dir=folder),
    )
    monkeypatch.setattr(
        "tensorflow_datasets.core.dataset_builder.FileReaderBuilder.url_infos", None
    )

    def add(name: str, features: dict[str, Any], examples: dict[str, list[Any]]) -> Any:
        builders[name] = mock(name, features, examples)
        return lambda **kwargs: load_dataset(name, data_dir=tmp_path, **kwargs)

    return add


IMAGE = tfds.features.Image(shape=(None, None, 1))
LABEL = tfds.features.ClassLabel(names=["cat", "dog"])
BOTH = {"image": IMAGE, "label": LABEL}
SMALL = {"image": encode_png(np.zeros((4, 4), np.uint8)), "label": 0}
LARGE = {"image": encode_png(np.zeros((6, 5), np.uint8)), "label": 1}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def sizes(dataset: Any) -> tuple[int, int]:
    return len(dataset.train), len(dataset.test)


def test_other_splits(sets: Any):
    only_train = sets("only_train", BOTH, {"train": [SMALL] * 10})()
    assert sizes(only_train) == (8, 2)
    assert list(only_train.classes) == ["cat", "dog"]
    validated = {"train": [SMALL], "validation": [SMALL]}
    assert sizes(sets("validated", BOTH, validated)()) == (1, 1)
    with pytest.raises(UsageError, match="has no split called `train`, only extra"):
        sets("no_train", BOTH, {"extra": [SMALL]})()


def test_images_of_different_sizes(sets: Any):
    load_uneven = sets("uneven", BOTH, {"train": [SMALL, LARGE] * 5})
    with pytest.raises(UsageError, match="pass --image-size"):
        load_uneven()
    dataset = load_uneven(image_size=4)
    assert sizes(dataset) == (8, 2)
    assert dataset.image_shape == (4, 4, 1)
    with pytest.raises(UsageError, match=r"read from disk.*pass --image-size"):
        load_uneven(loader="grain")
    with pytest.raises(UsageError, match="--crop needs a set that is read with"):
        load_uneven(image_size=4, crop=True)
    dataset = load_uneven(image_size=3, loader="grain")
    assert isinstance(dataset.train, OnDisk)
    assert dataset.image_shape == (3, 3, 1)


# ---- Targets -------------------------------------------------------------------------


def test_sets_without_what_is_to_be_learnt(sets: Any):
    """The message names what there is, and what is needed."""
    load_images = sets(
        "no_label", {"image": IMAGE}, {"train": [{"image": SMALL["image"]}]}
    )
    with pytest.raises(UsageError, match="is not an image classification set: it has"):
        load_images()
    load_labels = sets("labels", BOTH, {"train": [SMALL] * 5})
    with pytest.raises(UsageError, match=r"is not a segmentation set: .* image, label"):
        load_labels(target="segmentation_mask")
    text = {"text": tfds.features.Text()}
    load_text = sets("text", text, {"train": [{"text": "a"}]})
    with pytest.raises(UsageError, match="is not a set of images"):
        load_text(target=None)


@pytest.mark.parametrize("loader", ["memory", "grain"])
def test_images_alone(sets: Any, loader: Any):
    examples = [{"image": SMALL["image"]}] * 5
    load_images = sets(
        "images", {"image": IMAGE}, {"train": examples, "test": examples}
    )
    dataset = load_images(target=None, loader=loader, image_size=4)
    assert (sizes(dataset), list(dataset.classes)) == ((5, 5), [])
    rows = dataset.train.rows(np.arange(3))
    np.testing.assert_array_equal(rows["label"], [0, 0, 0])
    assert rows["image"].shape == (3, 4, 4, 1)


def test_no_labels(sets: Any):
    """As test splits have that are for a competition."""
    hidden = {"train": [SMALL], "test": [{**SMALL, "label": -1}]}
    with pytest.raises(UsageError, match="The split `test` of `hidden` has no labels"):
        sets("hidden", BOTH, hidden)(loader="memory")


def test_segmentation_masks(sets: Any, rng: np.random.Generator):
    """Trimaps count from 1, 255 is no label, and masks are resized with images."""
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "segmentation_mask": tfds.features.Image(
            shape=(None, None, 1), use_colormap=True
        ),
        "label": LABEL,
    }
    image = rng.integers(0, 256, (6, 6, 3), np.uint8)
    mask = rng.integers(1, 4, (6, 6, 1), np.uint8)
    mask[:2, :2] = 1
    mask[2:4, :2] = 255
    mask[4:, :2], mask[:2, 2:4] = 3, 2
    example = {
        "image": png(image),
        "segmentation_mask": png(mask[..., 0]),
        "label": 1,
    }
    load_masks = sets("masks", features, {"train": [example] * 4, "test": [example]})
    dataset = load_masks(target="segmentation_mask")
    assert list(dataset.classes) == ["1", "2", "3"]
    assert (dataset.train.label.shape, dataset.train.label.dtype) == (
        (4, 6, 6),
        np.int32,
    )
    known = np.where(mask == 255, 0, mask).astype(np.int32)[..., 0] - 1
    np.testing.assert_array_equal(dataset.test.label[0], known)
    np.testing.assert_array_equal(dataset.test.image[0], image)
    # Nothing is mixed from the labels of neighbors.
    halved = load_masks(target="segmentation_mask", image_size=3)
    found = halved.test.label[0]
    assert halved.test.image.shape == (1, 3, 3, 3)
    np.testing.assert_array_equal(found[:, 0], [0, -1, 2])
    assert found[0, 1] == 1
    # The same set has images with labels, too.
    assert list(load_masks(target="label").train.label) == [1] * 4
    with pytest.raises(
        UsageError, match="has labels of pixels, and such sets are read"
    ):
        load_masks(target="segmentation_mask", loader="grain", image_size=3)


@pytest.mark.slow
def test_digit_trimaps(data_dir: Path):
    dataset = load_dataset(
        "digit_trimaps", data_dir=data_dir, target="segmentation_mask"
    )
    assert list(dataset.classes) == ["1", "2", "3"]
    assert isinstance(dataset.train, InMemory)
    assert set(np.unique(dataset.train.label)) <= {-1, 0, 1, 2}
    assert dataset.train.label.shape[1:] == dataset.image_shape[:2]


# ---- From disk -----------------------------------------------------------------------


def test_from_disk_as_from_memory(data_dir: Path):
    """The same images, and the same labels, with or without a size."""
    pytest.importorskip("grain")
    whole = load_dataset("digits", data_dir=data_dir, image_size=7)
    same = load_dataset("digits", data_dir=data_dir, loader="grain")
    assert same.image_shape == (8, 8, 1)
    disk = load_dataset("digits", data_dir=data_dir, loader="grain", image_size=7)
    assert isinstance(whole.train, InMemory)
    assert isinstance(disk.train, OnDisk)
    assert disk.image_shape == (7, 7, 1)
    assert list(disk.classes) == list(whole.classes)
    for split in ("train", "test"):
        memory, other = getattr(whole, split), getattr(disk, split)
        assert len(other) == len(memory)
        plan = plan_epoch(np.arange(0, len(memory), 9), 16, multiple=1)
        for (count, found), (n, expected) in zip(
            load(other, plan, 2), load(memory, plan, 2), strict=True
        ):
            assert count == n
            for name in ("image", "label", "index", "weight"):
                np.testing.assert_array_equal(found[name], expected[name])


def gradient_source(sizes: list[tuple[int, int]]) -> list[Any]:
    """Images in which the value of a pixel says where it is."""
    found = []
    for i, (height, width) in enumerate(sizes):
        y, x = np.mgrid[:height, :width]
        image = np.stack([255 * y / (height - 1), 255 * x / (width - 1), 0 * x], -1)
        found.append({"image": np.rint(image).astype(np.uint8), "label": i})
    return found


def test_the_middle_part():
    source = gradient_source([(160, 320), (320, 160)])
    split = OnDisk(source, Preparation((14, 14, 3), "middle"))
    for i, image in enumerate(split.rows(np.array([0, 1]))["image"]):
        assert image.shape == (14, 14, 3)
        values = image.astype(float) / 255
        for axis, size in ((0, (160, 320)[i]), (1, (320, 160)[i])):
            line = values[..., axis].mean(axis=1 - axis)
            # 140 pixels around the middle; the outermost of 14 are 65 from there.
            np.testing.assert_allclose(line.mean(), 0.5, atol=0.01)
            np.testing.assert_allclose(line[-1] - line[0], 130 / size, atol=0.02)


def test_random_parts():
    """Follow from seed, epoch and number; of all sizes, in all places."""
    source = gradient_source([(60, 80)] * 200)
    split = OnDisk(source, Preparation((10, 10, 3)), crop=True, seed=5)
    for epoch in (1, 2):
        first, again = (split.row(3, epoch)["image"] for _ in range(2))
        np.testing.assert_array_equal(first, again)
    same = OnDisk(source, Preparation((10, 10, 3)), crop=True, seed=5).row(3, 2)[
        "image"
    ]
    np.testing.assert_array_equal(split.row(3, 2)["image"], same)
    different = [split.row(3, 1), split.row(3, 2), split.row(4, 1)]
    different.append(
        OnDisk(source, Preparation((10, 10, 3)), crop=True, seed=6).row(3, 1)
    )
    for i, one in enumerate(different):
        for other in different[:i]:
            assert (one["image"] != other["image"]).any()

    spans, middles = [], []
    for i in range(200):
        values = split.row(i, 1)["image"].astype(float) / 255
        assert values.shape == (10, 10, 3)
        y, x = values[..., 0].mean(1), values[..., 1].mean(0)
        # The outermost of ten are nine tenths of the part from each other.
        spans.append([(y[-1] - y[0]) / 0.9 * 59, (x[-1] - x[0]) / 0.9 * 79])
        middles.append([y.mean(), x.mean()])
    height, width = np.array(spans).T
    area, ratio = height * width / 4800, width / height
    assert area.min() > 0.05
    assert area.max() < 1.1
    assert np.quantile(area, 0.1) < 0.25
    assert np.quantile(area, 0.9) > 0.7
    assert ratio.min() > 0.65
    assert ratio.max() < 1.5
    assert np.std(middles, axis=0).min() > 0.05
    np.testing.assert_allclose(np.mean(middles, axis=0), 0.5, atol=0.05)


def test_parts_of_narrow_images():
    """No part of an aspect ratio up to 4/3 has half the area: the middle is taken."""
    source = gradient_source([(4, 400)])
    split = OnDisk(source, Preparation((5, 5, 3)), crop=True)
    for epoch in range(20):
        assert split.row(0, epoch)["image"].shape == (5, 5, 3)


# ---- Files ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_image_files(tmp_path: Path, rng: np.random.Generator, channels: int):
    pixels = rng.integers(0, 256, (6, 5, 3), np.uint8)
    color, gray = tmp_path / "color.png", tmp_path / "gray.png"
    Image.fromarray(pixels).save(color)
    Image.fromarray(pixels[..., 0]).save(gray)
    found = read_images([color, gray], (6, 5, channels))
    assert (found.shape, found.dtype) == ((2, 6, 5, channels), np.uint8)
    np.testing.assert_array_equal(found[1], pixels[..., :1].repeat(channels, -1))
    if channels == 3:
        np.testing.assert_array_equal(found[0], pixels)
    assert read_images([gray], (3, 4, channels)).shape == (1, 3, 4, channels)
    other = tmp_path / "text.png"
    other.write_text("no image")
    for path in (other, tmp_path / "nowhere.png"):
        with pytest.raises(UsageError, match=f"{path} is not an image that can be"):
            read_images([path], (6, 5, channels))


@pytest.mark.slow
@pytest.mark.skipif(not MNIST_FILES.exists(), reason="needs the files of MNIST")
def test_mnist(tmp_path: Path):
    dataset = load_dataset("mnist", data_dir=tmp_path, manual_dir=MNIST_FILES)
    for split, (images, labels) in {
        "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    }.items():
        got = getattr(dataset, split)
        with gzip.open(MNIST_FILES / labels) as file:
            expected = np.frombuffer(file.read()[8:], np.uint8)
        np.testing.assert_array_equal(np.bincount(got.label), np.bincount(expected))
        with gzip.open(MNIST_FILES / images) as file:
            pixels = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28, 1)
        assert got.image.shape == pixels.shape
        np.testing.assert_array_equal(
            got.image.astype(int).sum(axis=0), pixels.astype(int).sum(axis=0)
        )
