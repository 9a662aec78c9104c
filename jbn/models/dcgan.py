"""DCGAN: a generator of images, and a discriminator of real and generated ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jbn.linen import BatchNorm, DomainBatchNorm
from jbn.models.inputs import without_masked
from jbn.models.norms import activated
from jbn.ops import numeric
from jbn.typing import ArrayLike, DType


_normal = nn.initializers.normal(0.02)


def _near_one(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    return 1 + _normal(key, shape, dtype)


class Generator(nn.Module):
    """Generates images from random numbers.

        x = relu(norm(dense(latent))) 4x4 pixels
        x = relu(norm(transposed_conv(x)))          doubles the size, halves the width
        images = tanh(transposed_conv(x))           doubles the size

    Attributes:
        image_size: Height and width of the images: 8, 16, 32, 64 and so on.
        channels: Channels of the images.
        width: Width of the last hidden layer. Each layer is twice as wide as the next.
        norm: Norm class, or a partial of one (`partial(BatchNorm, momentum=0.9)`). The
            layer is called with `use_running_average` and `mask`.
        dtype: Dtype to compute in, such as `jnp.bfloat16`; by default that of
            parameters and latents, float32. Parameters, statistics and images are
            float32 in any case.

    Example:
        >>> model = Generator(image_size=16, channels=1, width=4)
        >>> init = partial(model.init_with_output, jax.random.key(0), train=False)
        >>> images, variables = jax.eval_shape(init, jnp.zeros((2, 8)))
        >>> images.shape
        (2, 16, 16, 1)
        >>> list(variables["params"])
        ['conv1', 'conv2', 'norm1', 'norm2', 'project']

    References:
        Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep
        Convolutional Generative Adversarial Networks", 2015.
        https://arxiv.org/abs/1511.06434
    """

    image_size: int = 64
    channels: int = 3
    width: int = 64
    norm: Callable[..., Any] = BatchNorm
    dtype: DType | None = None

    @nn.compact
    def __call__(
        self, latents: ArrayLike, *, train: bool, mask: ArrayLike | None = None
    ) -> jax.Array:
        """Returns the images of a batch of latents.

        Args:
            latents: Random numbers, of shape `(batch, latent_size)`.
            train: Whether to normalize by the batch (and update the running statistics)
                or by the running statistics.
            mask: Of shape `(batch,)`. Rows that are `False` affect neither the
                statistics nor the gradients of other rows, even if they are NaN. Their
                own images are those of a latent of zeros.

        Returns:
            Images in -1..1, of shape `(batch, image_size, image_size, channels)`.

        Raises:
            ValueError: If `image_size` is not 4 times a power of two, from 8.
        """
        count = _doublings(self.image_size)
        if count < 1:
            raise ValueError(
                "`image_size` must be 8, 16, 32 or another power of two from there;"
                f" got {self.image_size}."
            )
        y, rows = without_masked(jnp.asarray(latents), mask)
        if rows is not None:
            rows = rows[..., None, None]
        width = self.width * 2 ** (count - 1)
        y = nn.Dense(
            4 * 4 * width,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=_normal,
            name="project",
        )(y)
        y = y.reshape(-1, 4, 4, width)
        for i in range(1, count + 1):
            norm = activated(self.norm, nn.relu, name=f"norm{i}", scale_init=_near_one)
            y = norm(y, use_running_average=not train, mask=rows)
            last = i == count
            width //= 2
            y = nn.ConvTranspose(
                self.channels if last else width,
                (4, 4),
                strides=(2, 2),
                use_bias=last,
                dtype=self.dtype,
                kernel_init=_normal,
                name=f"conv{i}",
            )(y)
        return jnp.tanh(numeric.wide(y))


class Discriminator(nn.Module):
    """Distinguishes real images from generated ones.

        x = leaky_relu(conv(images))                halves the size
        x = leaky_relu(norm(conv(x)))               halves the size, doubles the width
        logits = dense(x)                           of 4x4 pixels

    Convolutions are 4x4, with stride 2. Real and generated images may be passed in one
    batch or in two: with `domain`, and a norm that supports it (as the default does),
    each kind is normalized by its own statistics.

    Integer images are first scaled from 0..255 to -1..1, the generator's range.

    Attributes:
        width: Width of the first layer.
        norm: Norm class, or a partial of one. The layer is called with
            `use_running_average` and `mask`, and with `domain` if it is given.
        dtype: Dtype to compute in, such as `jnp.bfloat16`; by default that of
            parameters and images, float32. Parameters, statistics and logits are
            float32 in any case.

    Example:
        >>> model = Discriminator(width=4)
        >>> images = jnp.zeros((2, 16, 16, 1), jnp.uint8)
        >>> init = partial(model.init_with_output, jax.random.key(0), train=False)
        >>> logits, variables = jax.eval_shape(
        ...     partial(init, domain=jnp.array([0, 1])), images
        ... )
        >>> logits.shape
        (2,)
        >>> list(variables["params"])
        ['conv1', 'conv2', 'head', 'norm2']
        >>> variables["batch_stats"]["norm2"]["mean"].shape
        (2, 8)

    References:
        Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep
        Convolutional Generative Adversarial Networks", 2015.
        https://arxiv.org/abs/1511.06434
    """

    width: int = 64
    norm: Callable[..., Any] = partial(DomainBatchNorm, num_domains=2)
    dtype: DType | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        train: bool,
        mask: ArrayLike | None = None,
        domain: ArrayLike | int | None = None,
    ) -> jax.Array:
        """Returns the logits that images are real.

        Args:
            x: Images, of shape `(batch, size, size, channels)`, with size 8, 16, 32 and
                so on; in -1..1 unless they are integers.
            train: Whether to normalize by the batch (and update the running statistics)
                or by the running statistics.
            mask: Of shape `(batch,)`. Images that are `False` affect neither the
                statistics nor the gradients of other images, even if they are NaN.
                Their own logits are those of a gray image.
            domain: 0 for real and 1 for generated images: one integer, or one for each
                image, of shape `(batch,)`. Passed to the norms; `None` for norms
                without domains.

        Returns:
            Logits, of shape `(batch,)`.

        Raises:
            ValueError: If the images are not square, of 4 times a power of two, from 8.
        """
        y = jnp.asarray(x)
        count = _doublings(y.shape[1])
        if count < 1 or y.shape[1] != y.shape[2]:
            raise ValueError(
                "Images must be square, of size 8, 16, 32 or another power of two from"
                f" there; got {y.shape[1]}x{y.shape[2]}."
            )
        if jnp.issubdtype(y.dtype, jnp.integer):
            y = y.astype(jnp.float32) / 127.5 - 1.0
        y, rows = without_masked(y, mask)
        call: dict[str, Any] = {"use_running_average": not train, "mask": rows}
        if domain is not None:
            call["domain"] = domain
        for i in range(1, count + 1):
            y = nn.Conv(
                self.width * 2 ** (i - 1),
                (4, 4),
                strides=(2, 2),
                use_bias=i == 1,
                dtype=self.dtype,
                kernel_init=_normal,
                name=f"conv{i}",
            )(y)
            if i == 1:
                y = _leaky_relu(y)
            else:
                norm = activated(
                    self.norm, _leaky_relu, name=f"norm{i}", scale_init=_near_one
                )
                y = norm(y, **call)
        y = numeric.wide(y).reshape(y.shape[0], -1)
        return nn.Dense(1, kernel_init=_normal, name="head")(y)[:, 0]


def _leaky_relu(y: jax.Array) -> jax.Array:
    return nn.leaky_relu(y, 0.2)


def _doublings(size: int) -> int:
    """How often to double 4 to get `size`; 0 if that is impossible."""
    count = size.bit_length() - 3
    return count if count > 0 and size == 4 << count else 0
