"""PNG encoding: given an array, TFDS would call TensorFlow to encode it."""

import io

import numpy as np
from PIL import Image


def encode_png(image: np.ndarray) -> bytes:
    """Encodes an image of shape (height, width) or (height, width, 3), of uint8."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()
