"""Images of every mode: what the pixels are, or why a file is refused."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jbn.training.data import read_images
from jbn.training.errors import UsageError
from jbn.training.images import Preparation, decode, decode_labels


HEIGHT, WIDTH = 6, 5


@pytest.fixture
def gray(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (HEIGHT, WIDTH), np.uint8)


@pytest.fixture
def color(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def read(path: Path, channels: int) -> np.ndarray:
    (image,) = read_images([path], (HEIGHT, WIDTH, channels))
    assert image.dtype == np.uint8
    return image


def luma(color: np.ndarray) -> np.ndarray:
    """Gray of ITU-R 601, as JPEG defines it."""
    return color @ np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled(tmp_path: Path, suffix: str, channels: int):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16)
    values = values.reshape(HEIGHT, WIDTH)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(path)
    found = read(path, channels)
    expected = np.rint(values / 257)[..., None].repeat(channels, -1)
    np.testing.assert_array_equal(found, expected)


def test_16_bits_in_either_byte_order(tmp_path: Path):
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 2000
    path = tmp_path / "a.tif"
    Image.frombytes("I;16B", (WIDTH, HEIGHT), values.astype(">u2").tobytes()).save(path)
    np.testing.assert_array_equal(read(path, 1)[..., 0], np.rint(values / 257))


def test_one_bit(tmp_path: Path, gray: np.ndarray):
    black_and_white = gray > 128
    Image.fromarray(black_and_white).save(tmp_path / "a.png")
    expected = 255 * black_and_white[..., None]
    np.testing.assert_array_equal(read(tmp_path / "a.png", 1), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_images_are_laid_over_white(
    tmp_path: Path, rng: np.random.Generator, color: np.ndarray, channels: int
):
    alpha = rng.integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)
    alpha[0] = 0
    path = tmp_path / "a.png"
    Image.fromarray(np.concatenate([color, alpha], -1)).save(path)
    share = alpha / 255
    expected = color * share + 255 * (1 - share)
    expected = luma(expected)[..., None] if channels == 1 else expected
    np.testing.assert_allclose(read(path, channels), expected, atol=1.6)


def test_gray_with_alpha(tmp_path: Path, gray: np.ndarray):
    alpha = np.full_like(gray, 255)
    alpha[1:3] = 0
    path = tmp_path / "a.png"
    Image.fromarray(np.stack([gray, alpha], -1), "LA").save(path)
    expected = np.where(alpha == 0, 255, gray)
    np.testing.assert_array_equal(read(path, 1)[..., 0], expected)
    both = read(path, 4)
    np.testing.assert_array_equal(both[..., 3], alpha)
    np.testing.assert_array_equal(both[..., 0], gray)


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes(tmp_path: Path, rng: np.random.Generator, transparent: bool):
    palette = rng.integers(0, 256, (4, 3), np.uint8)
    index = rng.integers(0, 4, (HEIGHT, WIDTH), np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(palette.tobytes())
    path = tmp_path / "a.png"
    options: dict[str, Any] = {"transparency": 2} if transparent else {}
    image.save(path, **options)
    if transparent:
        palette[2] = 255
    np.testing.assert_array_equal(read(path, 3), palette[index])


def test_a_transparent_color(tmp_path: Path, color: np.ndarray):
    path = tmp_path / "a.png"
    color[2, 3] = color[4, 1] = (10, 20, 30)
    Image.fromarray(color).save(path, transparency=(10, 20, 30))
    color[2, 3] = color[4, 1] = 255
    np.testing.assert_array_equal(read(path, 3), color)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_color_spaces(tmp_path: Path, mode: str):
    """A flat color survives, within the rounding of each space and of JPEG."""
    flat = np.full((HEIGHT, WIDTH, 3), (200, 60, 90), np.uint8)
    image = Image.fromarray(flat).convert(mode)
    path = tmp_path / ("a.tif" if mode != "HSV" else "a.png")
    if mode == "HSV":  # No file format has it; it is converted all the same.
        from jbn.training.images import _converted

        found = np.asarray(_converted(image, None, "a", "RGB"))
    else:
        image.save(path)
        found = read(path, 3)
    np.testing.assert_allclose(found.astype(int), flat, atol=3)
    if mode == "CMYK":
        image.save(tmp_path / "a.jpg", quality=100)
        np.testing.assert_allclose(read(tmp_path / "a.jpg", 3), flat, atol=4)
        np.testing.assert_allclose(
            read(path, 1)[..., 0], luma(flat.astype(float)), atol=3
        )
        assert (read(path, 4)[..., 3] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, gray: np.ndarray, orientation: int):
    """As of the EXIF standard: where the 0th row and the 0th column are."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    upright = {
        1: gray,
        2: gray[:, ::-1],
        3: gray[::-1, ::-1],
        4: gray[::-1],
        5: gray.T,
        6: gray.T[:, ::-1],
        7: gray.T[::-1, ::-1],
        8: gray.T[::-1],
    }[orientation]
    Image.fromarray(gray).save(path, exif=exif)
    (found,) = read_images([path], (*upright.shape, 1))
    np.testing.assert_array_equal(found[..., 0], upright)


def test_gray_and_color_models(tmp_path: Path, gray: np.ndarray, color: np.ndarray):
    Image.fromarray(color).save(tmp_path / "color.png")
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_allclose(
        read(tmp_path / "color.png", 1)[..., 0], luma(color), atol=1
    )
    expected = np.dstack([gray, gray, gray, np.full_like(gray, 255)])
    np.testing.assert_array_equal(read(tmp_path / "gray.png", 4), expected)
    with pytest.raises(UsageError, match="a model of images with 2 channels: image fi"):
        read(tmp_path / "gray.png", 2)


def test_the_middle_part(tmp_path: Path):
    image = np.zeros((16, 32), np.uint8)
    image[1:15, 9:23] = 200  # 87.5 % of 16.
    Image.fromarray(image).save(tmp_path / "a.png")
    (found,) = read_images([tmp_path / "a.png"], (14, 14, 1), "middle")
    assert (found == 200).all()
    prepare = Preparation((14, 14, 1), "middle")
    np.testing.assert_array_equal(prepare(tmp_path / "a.png"), found)
    np.testing.assert_array_equal(prepare((tmp_path / "a.png").read_bytes()), found)


# ---- What is refused -----------------------------------------------------------------


def save_tiff(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(path, format="TIFF")


def broken_png(path: Path) -> None:
    Image.new("L", (64, 64)).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[16:20] = b"\xff\xff\xff\xff"  # The width; the checksum is now wrong.
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(path, format="PNG")
    path.write_bytes(path.read_bytes()[:2000])


def bomb(path: Path) -> None:
    """A small file of 10,000 x 10,000 pixels."""
    Image.new("1", (10_000, 10_000)).save(path, format="PNG")


def larger_bomb(path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(path, format="PNG")


REFUSED: dict[str, tuple[Any, str]] = {
    "float": (
        lambda p: save_tiff(p, np.zeros((4, 4), np.float32)),
        "has 32-bit floating-point samples",
    ),
    "int32": (
        lambda p: save_tiff(p, np.zeros((4, 4), np.int32)),
        "has 32-bit samples, in which black and white are not defined",
    ),
    "lab": (
        lambda p: Image.new("LAB", (4, 4)).save(p, format="TIFF"),
        r"has L\*a\*b\* samples",
    ),
    "header": (broken_png, "is not an image that can be read"),
    "cut": (cut_short, "is not an image that can be read"),
    "empty": (lambda p: p.write_bytes(b""), "is not an image that can be read"),
    "text": (lambda p: p.write_text("hello"), "is of no format that Pillow knows"),
    "folder": (
        lambda p: p.mkdir(),
        r"is a folder: name the image files in it, as .*\*",
    ),
    "missing": (lambda p: None, "can be read: No such file or directory$"),
    "bomb": (bomb, "is too large to be read: it has more than 89,478,485 pixels"),
    "larger bomb": (larger_bomb, "is too large to be read"),
    "program": (
        lambda p: Image.new("RGB", (4, 4)).save(p, format="EPS"),
        "is PostScript, a program and not an image",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(tmp_path: Path, kind: str):
    make, match = REFUSED[kind]
    path = tmp_path / "image"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        make(path)
        with pytest.raises(UsageError, match=match) as raised:
            read_images([path], (4, 4, 3))
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damaged_files_are_one_line(tmp_path: Path, file_format: str):
    """Whatever bytes are changed: an image, or a sentence."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a"
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(
        path, format=file_format
    )
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(400):
        content = whole.copy()
        where = rng.integers(0, min(200, len(whole)), 3)
        content[where] = rng.integers(0, 256, 3)
        path.write_bytes(content.tobytes()[: rng.integers(1, len(whole) + 1)])
        message = ""
        try:
            assert read_images([path], (4, 4, 3)).shape == (1, 4, 4, 3)
        except UsageError as error:
            message = str(error)
        assert "\n" not in message


def test_arrays():
    values = np.arange(0, 65536, 7, dtype=np.uint16).reshape(-1, 1, 1)
    np.testing.assert_array_equal(decode(values, 1), np.rint(values / 257))
    with pytest.raises(UsageError, match="an image has pixels of dtype float32"):
        decode(np.zeros((2, 2, 1), np.float32), 1)


def test_masks(tmp_path: Path, rng: np.random.Generator):
    """The indices of a palette are the labels, and not its colors."""
    labels = rng.integers(0, 4, (HEIGHT, WIDTH), np.uint8)
    for mode, path in (("P", tmp_path / "p.png"), ("L", tmp_path / "l.png")):
        image = Image.fromarray(labels, mode)
        if mode == "P":
            image.putpalette(rng.integers(0, 256, 12, np.uint8).tobytes())
        image.save(path)
        np.testing.assert_array_equal(decode_labels(path), labels)
    wide = labels.astype(np.uint16) * 1000
    Image.fromarray(wide).save(tmp_path / "w.png")
    np.testing.assert_array_equal(decode_labels(tmp_path / "w.png"), wide)
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    with pytest.raises(UsageError, match="is a mask of mode RGB: it must be gray"):
        decode_labels(tmp_path / "c.png", "a mask")
