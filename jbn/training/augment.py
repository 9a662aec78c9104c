"""Augmentation on the device: an image and its labels change in the same way."""

import jax
import jax.numpy as jnp
from jax import lax


def augment(
    batch: dict[str, jax.Array], keys: jax.Array, shift: int, flip: bool
) -> dict[str, jax.Array]:
    """Shifts and mirrors each image.

    Args:
        batch: With `image`, of shape (batch, height, width, channels), and perhaps a
            `label` of shape (batch, height, width), which moves along.
        keys: One for each image.
        shift: Most pixels to move by, in either direction. New pixels at the border are
            zero, with label -1.
        flip: Whether to mirror left and right, with probability 1/2.

    Returns:
        The batch with other images.
    """

    def one(image: jax.Array, label: jax.Array, key: jax.Array):
        for_shift, for_flip = jax.random.split(key)
        y, x = jax.random.randint(for_shift, (2,), 0, 2 * shift + 1)
        mirrored = flip & jax.random.bernoulli(for_flip)

        def move(v: jax.Array, outside: int) -> jax.Array:
            widths = [(shift, shift)] * 2 + [(0, 0)] * (v.ndim - 2)
            fill = jnp.asarray(outside, v.dtype)
            padded = jnp.pad(v, widths, constant_values=fill)
            zeros = [0] * (v.ndim - 2)
            v = lax.dynamic_slice(padded, [y, x, *zeros], v.shape)
            return jnp.where(mirrored, jnp.flip(v, 1), v)

        return move(image, 0), move(label, -1) if label.ndim == 2 else label

    image, label = jax.vmap(one)(batch["image"], batch["label"], keys)
    return {**batch, "image": image, "label": label}


def mixup(
    batch: dict[str, jax.Array], keys: jax.Array, alpha: float
) -> dict[str, jax.Array]:
    """Mixes each image with another one of the batch.

        share ~ Beta(alpha, alpha), or one minus that, whichever is larger
        image = share * image + (1 - share) * other

    Row i is mixed with row n - 1 - i of the n rows of this device. Rows of weight zero
    are not mixed in.

    Args:
        batch: With `image`, integers of shape (batch, height, width, channels), and
            `label` and `weight` of shape (batch,).
        keys: One for each image.
        alpha: Above 0; the larger, the more equal the two shares.

    Returns:
        The batch with other images, and with the labels `other_label` and the `share`
        of the first label, both of shape (batch,).

    References:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018.
        https://arxiv.org/abs/1710.09412
    """
    image = batch["image"]
    share = jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)
    share = jnp.maximum(share, 1 - share)
    share = jnp.where(jnp.flip(batch["weight"]) > 0, share, jnp.ones_like(share))
    first = share[:, None, None, None]
    values = image.astype(jnp.float32)
    mixed = first * values + (1 - first) * jnp.flip(values, axis=0)
    return {
        **batch,
        "image": jnp.round(mixed).astype(image.dtype),
        "other_label": jnp.flip(batch["label"]),
        "share": share,
    }
