"""Data sets: the digits, MNIST's format, and what is said when there is nothing."""

import gzip
import hashlib
import http.server
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.utils import Size

from jbn.training import idx
from jbn.training.data import load_dataset
from jbn.training.errors import UsageError


MNIST_FILES = Path(__file__).parents[3] / "shared" / "data" / "mnist"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfds")


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
    assert dataset.num_classes == 10
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
    labels = load_dataset("digits", data_dir=data_dir).train.label
    np.testing.assert_array_equal(np.array(run.stdout.split(), int), labels)


def test_images_are_resized(data_dir: Path):
    dataset = load_dataset("digits", data_dir=data_dir, image_size=6)
    assert dataset.train.image.shape == (1437, 6, 6, 1)
    assert dataset.train.image.std() > 50


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


def test_other_splits_and_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from jbn.training import prepare
    from jbn.training.png import encode_png

    image = tfds.features.Image(shape=(None, None, 1))
    features = {"image": image, "label": tfds.features.ClassLabel(num_classes=2)}
    small = {"image": encode_png(np.zeros((4, 4), np.uint8)), "label": 0}
    large = {"image": encode_png(np.zeros((6, 5), np.uint8)), "label": 1}
    builders = {
        "only_train": mock("only_train", features, {"train": [small] * 10}),
        "validated": mock(
            "validated", features, {"train": [small], "validation": [small]}
        ),
        "uneven": mock("uneven", features, {"train": [small, large] * 5}),
        "no_train": mock("no_train", features, {"extra": [small]}),
        "no_label": mock(
            "no_label", {"image": image}, {"train": [{"image": small["image"]}]}
        ),
    }
    monkeypatch.setattr(
        prepare, "make_builder", lambda name, folder: builders[name](data_dir=folder)
    )
    monkeypatch.setattr(
        "tensorflow_datasets.core.dataset_builder.FileReaderBuilder.url_infos", None
    )

    def sizes(name: str, **kwargs: Any) -> tuple[int, int]:
        dataset = load_dataset(name, data_dir=tmp_path, **kwargs)
        return len(dataset.train), len(dataset.test)

    assert sizes("only_train") == (8, 2)
    assert sizes("validated") == (1, 1)
    with pytest.raises(UsageError, match="pass --image-size"):
        sizes("uneven")
    assert sizes("uneven", image_size=4) == (8, 2)
    with pytest.raises(UsageError, match="has no split called `train`, only extra"):
        sizes("no_train")
    with pytest.raises(UsageError, match="is not an image classification set"):
        sizes("no_label")


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
