"""Random shifts and mirrors, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.training.augment import augment, mixup
from jbn.training.step import by_row


def keys(count: int, seed: int = 0) -> jax.Array:
    return by_row(jax.random.key(seed), {"index": jnp.arange(count)})


def moved(image: np.ndarray, dy: int, dx: int, mirrored: bool, outside: int):
    """`image` seen through a window moved by (dy, dx)."""
    height, width = image.shape[:2]
    result = np.full_like(image, outside)
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                result[y, x] = image[y + dy, x + dx]
    return result[:, ::-1] if mirrored else result


def make(rng: np.random.Generator, count: int, *, pixels: bool = False):
    # (From 1: no pixel looks like one from outside.)
    image = rng.integers(1, 256, (count, 5, 4, 2), np.uint8)
    shape = (count, 5, 4) if pixels else (count,)
    label = rng.integers(0, 3, shape, np.int32)
    weight = np.ones(count, np.float32)
    return {"image": image, "label": label, "weight": weight}


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize(("shift", "flip"), [(0, True), (2, False), (1, True)])
def test_each_is_moved_by_some_pixels(
    rng: np.random.Generator, shift: int, flip: bool, pixels: bool
):
    """By each possible move about as often as by another, labels of pixels along."""
    count = 300
    batch = make(rng, count, pixels=pixels)
    device = {k: jnp.asarray(v) for k, v in batch.items()}
    found = jax.device_get(augment(device, keys(count), shift, flip))
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in batch.items()
    }
    moves = [
        (dy, dx, mirrored)
        for dy in range(-shift, shift + 1)
        for dx in range(-shift, shift + 1)
        for mirrored in ([False, True] if flip else [False])
    ]
    counts = dict.fromkeys(moves, 0)
    for i in range(count):
        fits = [
            move
            for move in moves
            if np.array_equal(found["image"][i], moved(batch["image"][i], *move, 0))
        ]
        assert len(fits) == 1
        counts[fits[0]] += 1
        label = batch["label"][i]
        expected = moved(label, *fits[0], -1) if pixels else label
        np.testing.assert_array_equal(found["label"][i], expected)
    mean = count / len(moves)
    assert min(counts.values()) > mean - 5 * np.sqrt(mean)
    assert max(counts.values()) < mean + 5 * np.sqrt(mean)


def test_follows_from_the_key_of_the_row_alone(rng: np.random.Generator):
    batch = {k: jnp.asarray(v) for k, v in make(rng, 40).items()}
    whole = augment(batch, keys(40), 2, True)["image"]
    rows = jnp.array([7, 3, 31])
    some = augment({k: v[rows] for k, v in batch.items()}, keys(40)[rows], 2, True)
    np.testing.assert_array_equal(some["image"], whole[rows])
    other = augment(batch, keys(40, seed=1), 2, True)["image"]
    assert (other != whole).any(axis=(1, 2, 3)).mean() > 0.8


def test_mixup(rng: np.random.Generator):
    """Shares of this image and of another, of both labels alike."""
    image = rng.integers(0, 256, (400, 2, 2, 1), np.uint8)
    label = rng.integers(0, 9, 400).astype(np.int32)
    weight = np.ones(400, np.float32)
    weight[-3:] = 0
    batch = {"image": image, "label": label, "weight": weight}
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    found = jax.device_get(mixup(arrays, keys(400), 0.4))
    share = found["share"].astype(np.float64)
    # What only fills up the batch is not mixed into others.
    np.testing.assert_array_equal(share[:3], 1)
    assert share.min() >= 0.5
    # |Beta(a, a) - 1/2| has the second moment 1 / (4 (2 a + 1)).
    moment = np.mean((share[3:] - 0.5) ** 2)
    assert moment == pytest.approx(1 / (4 * 1.8), rel=0.1)
    s = share[:, None, None, None]
    expected = s * image + (1 - s) * image[::-1]
    np.testing.assert_allclose(found["image"].astype(int), expected, atol=0.51)
    assert found["image"].dtype == np.uint8
    np.testing.assert_array_equal(found["other_label"], label[::-1])
    np.testing.assert_array_equal(found["label"], label)
