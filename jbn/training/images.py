"""Prepares images: the only path from a file to the input of a model."""

import dataclasses
import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from jbn.training.errors import UsageError


Encoded = bytes | Path | np.ndarray
Box = tuple[int, int, int, int]
Part = Literal["whole", "middle"]

_MIDDLE = 0.875  # Fraction of the shorter side, as usual for ImageNet.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_WITH_RGBA = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")

# Images that Pillow warns about are refused below, with our message.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Turns an image into the input of a model, for evaluation and prediction.

    Attributes:
        shape: Height, width and channels of the result.
        part: `whole` resizes the whole image to `shape`, whatever its aspect ratio;
            `middle` resizes the central square of 87.5 % of the shorter side.
    """

    shape: tuple[int, int, int]
    part: Part = "whole"

    def __call__(self, image: Encoded, name: str = "an image") -> np.ndarray:
        """Decodes and resizes an image.

        Args:
            image: A file, its content, or an array from `decode`.
            name: Its name in messages.

        Returns:
            uint8 of the shape `shape`.

        Raises:
            UsageError: If the image cannot be read (see `decode`).
        """
        pixels = decode(image, self.shape[-1], name)
        box = middle_box(*pixels.shape[:2]) if self.part == "middle" else None
        return resize(pixels, self.shape[:2], box)


def decode(
    image: Encoded, channels: int, name: str = "an image"
) -> UInt8[np.ndarray, "height width channels"]:
    """Decodes an image to 8 bits per channel.

    16-bit samples are rounded to 8 bits, EXIF orientation is applied, palettes and
    other color spaces are converted to RGB, and color to gray for one channel.
    Transparent images are laid over white, unless there are four channels (the last is
    alpha). Of several frames, the first is used.

    Args:
        image: A file, its content, or pixels of shape (height, width, `channels`).
        channels: 1 (gray), 3 (RGB) or 4 (RGBA).
        name: Its name in messages.

    Returns:
        The pixels.

    Raises:
        UsageError: If the image is damaged, too large, or has 32-bit or other samples
            without a defined black and white.
    """
    if isinstance(image, np.ndarray):
        return as_uint8(image, name)
    mode = _MODES.get(channels)
    if mode is None:
        raise UsageError(
            f"{name} cannot be read for a model of images with {channels} channels: "
            "image files have 1, 3 or 4."
        )
    found = _open(image, name, mode)
    return np.asarray(found).reshape(found.height, found.width, channels)


def decode_labels(
    image: Encoded, name: str = "a mask"
) -> Int[np.ndarray, "height width"]:
    """Decodes an image whose pixels are class numbers.

    Args:
        image: A file, its content, or an array of shape (height, width, 1).
        name: Its name in messages.

    Returns:
        The values of a gray image, or the indices of one with a palette.

    Raises:
        UsageError: If it is damaged, too large, or in color.
    """
    if isinstance(image, np.ndarray):
        return image.reshape(image.shape[:2])
    return np.asarray(_open(image, name, None)).astype(np.int32)


def as_uint8(pixels: np.ndarray, name: str) -> np.ndarray:
    """Converts pixels of 1, 8 or 16 bits to 8 bits; refuses others.

    Args:
        pixels: Of any shape.
        name: Their name in messages.

    Returns:
        uint8 of the same shape; 16 bits are rounded, as value / 257.

    Raises:
        UsageError: If they are of another dtype.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    raise UsageError(
        f"{name} has pixels of dtype {pixels.dtype}, in which black and white are not "
        "defined: convert them to uint8 (0 to 255) or uint16 (0 to 65535)."
    )


def resize(
    pixels: np.ndarray,
    size: tuple[int, int],
    box: Box | None = None,
    *,
    nearest: bool = False,
) -> np.ndarray:
    """Resizes an image, or the part in `box`.

    Args:
        pixels: uint8 of shape (height, width, channels), or, with `nearest`, labels of
            shape (height, width).
        size: The new height and width.
        box: Left, upper, right and lower edge of the part.
        nearest: Whether to use the nearest pixel instead of interpolating.

    Returns:
        An array of the same rank and dtype.
    """
    whole = (0, 0, pixels.shape[1], pixels.shape[0])
    if pixels.shape[:2] == tuple(size) and box in (None, whole):
        return pixels
    height, width = size
    if nearest:
        image = Image.fromarray(pixels.astype(np.int32))
        resized = image.resize((width, height), Image.Resampling.NEAREST, box)
        return np.asarray(resized).astype(pixels.dtype)
    channels = pixels.shape[-1]
    # Pillow supports 1, 3 and 4 channels; otherwise resize each channel separately.
    parts = (
        [pixels.squeeze(-1) if channels == 1 else pixels]
        if channels in _MODES
        else list(np.moveaxis(pixels, -1, 0))
    )
    resized = [
        np.asarray(
            Image.fromarray(part).resize(
                (width, height), Image.Resampling.BILINEAR, box
            )
        )
        for part in parts
    ]
    return np.stack(resized, -1).reshape(height, width, channels)


def middle_box(height: int, width: int) -> Box:
    """The central square of 87.5 % of the shorter side."""
    side = max(1, round(_MIDDLE * min(height, width)))
    return _centered(height, width, side)


def random_box(rng: np.random.Generator, height: int, width: int) -> Box:
    """A random box of 8 to 100 % of the area, with an aspect ratio of 3/4 to 4/3.

    As for training on ImageNet (Szegedy et al., 2015).
    """
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return int(left), int(top), int(left + w), int(top + h)
    return _centered(height, width, min(height, width))


def _centered(height: int, width: int, side: int) -> Box:
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _open(image: bytes | Path, name: str, mode: str | None) -> Image.Image:
    """Opens and decodes an image in `mode`, or as labels for `None`."""
    try:
        source = io.BytesIO(image) if isinstance(image, bytes) else image
        with Image.open(source) as file:
            most = Image.MAX_IMAGE_PIXELS
            if most and file.width * file.height > most:
                raise Image.DecompressionBombError
            if file.format == "EPS":  # Pillow would run Ghostscript on it.
                raise UsageError(f"{name} is PostScript, a program and not an image.")
            if mode is None:
                return _labels(file, name)
            upright = ImageOps.exif_transpose(file)
            return _converted(upright, file.format, name, mode)
    except UsageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(
            f"{name} is too large to be read: it has more than "
            f"{Image.MAX_IMAGE_PIXELS:,} pixels. Make it smaller."
        ) from error
    except IsADirectoryError as error:
        raise UsageError(
            f"{name} is a folder: name the image files in it, as {name}/*.png."
        ) from error
    except Exception as error:  # For a damaged file, decoders may raise anything.
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            text = "it is of no format that Pillow knows, such as PNG or JPEG"
        raise UsageError(
            f"{name} is not an image that can be read: {' '.join(text.split())}"
        ) from error


def _converted(
    image: Image.Image, file_format: str | None, name: str, mode: str
) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _eight_bits(image, file_format, name)
    elif image.mode in ("F", "LAB"):
        kind = {"F": "32-bit floating-point", "LAB": "L*a*b*"}[image.mode]
        raise UsageError(
            f"{name} has {kind} samples, which have no defined conversion to 8 bits: "
            "save it as an 8-bit or 16-bit gray or RGB image."
        )
    elif image.mode in ("La", "RGBa"):  # Premultiplied.
        image = image.convert(image.mode.upper())
    if image.has_transparency_data or mode == "RGBA":
        if image.mode not in _WITH_RGBA:
            image = image.convert("RGB")
        image = image.convert("RGBA")
        if mode == "RGBA":
            return image
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    # From gray or RGB: other modes have no conversion to gray.
    image = image.convert("RGB" if image.mode not in ("1", "L") else "L")
    return image.convert(mode)


def _eight_bits(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """Converts a gray image of 16-bit samples to 8 bits."""
    values = np.asarray(image)
    if image.mode == "I" and file_format not in ("PNG", "PPM"):
        raise UsageError(
            f"{name} has 32-bit samples, in which black and white are not defined: "
            "save it with 8 or 16 bits."
        )
    if "transparency" in image.info:
        raise UsageError(
            f"{name} has 16-bit samples and a transparent gray value: save it with an "
            "alpha channel, or without transparency."
        )
    return Image.fromarray(as_uint8(values.astype(np.uint16), name))


def _labels(image: Image.Image, name: str) -> Image.Image:
    if not (image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16")):
        raise UsageError(
            f"{name} is a mask of mode {image.mode}: it must be gray or have a "
            "palette, with the number of a class in each pixel."
        )
    image.load()
    return image.copy()
