"""U-Net: segments images, with a skip connection at each size."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jbn.linen import BatchNorm
from jbn.models.inputs import as_unit, dropped, without_masked
from jbn.models.norms import activated
from jbn.ops import numeric
from jbn.typing import ArrayLike, DType


# Normal, of variance 2 / fan-in: section 3 of the paper.
_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class UNet(nn.Module):
    """Classifies each pixel of an image with an encoder and a decoder.

        x = level(x); skips += [x]; x = max_pool(x)   down, for each width but the last
        x = level(x)                                  the last width
        x = level(concatenate([skip, up(x)]))         up, for each skip
        logits = conv1x1(x)

    where `level` is `relu(norm(conv3x3(x)))`, twice, and `up` a transposed convolution
    that doubles the size.

    Images may have any size. Convolutions pad ("SAME"), so that logits have the size of
    the image; in the paper they are smaller. Halving rounds up (an odd row or column is
    pooled by itself), and doubling crops the additional row or column.

    Integer images are first scaled from 0..255 to 0..1, so that they can stay 8 bits
    wide until they are on the device.

    Attributes:
        widths: Width of each level, from full resolution to the lowest; each level
            halves the resolution. The paper has (64, 128, 256, 512, 1024), for large
            images.
        num_classes: Width of the last layer; the three of a trimap by default.
        norm: Norm class, or a partial of one (`partial(BatchNorm, momentum=0.9)`). The
            layer is called with `use_running_average` and `mask`.
        dropout: Fraction of the units that are set to zero at the smallest size,
            in training, if the call gives `keys`.
        dtype: Dtype to compute in, such as `jnp.bfloat16`; by default that of
            parameters and images, float32. Parameters, statistics and logits are
            float32 in any case.

    Example:
        >>> from functools import partial
        >>> model = UNet(widths=(4, 8))
        >>> images = jnp.zeros((2, 9, 6, 3), jnp.uint8)
        >>> init = partial(model.init_with_output, jax.random.key(0), train=False)
        >>> logits, variables = jax.eval_shape(init, images)
        >>> logits.shape
        (2, 9, 6, 3)
        >>> list(variables["params"])
        ['decoder1', 'encoder1', 'encoder2', 'head', 'up1']

    References:
        Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical
        Image Segmentation", 2015. https://arxiv.org/abs/1505.04597
    """

    widths: Sequence[int] = (16, 32, 64)
    num_classes: int = 3
    norm: Callable[..., Any] = BatchNorm
    dtype: DType | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        train: bool,
        mask: ArrayLike | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits of each pixel of a batch of images.

        Args:
            x: Images, of shape `(batch, height, width, channels)`.
            train: Whether to normalize by the batch (and update the running statistics)
                or by the running statistics.
            mask: Of shape `(batch,)`. Images that are `False` affect neither the
                statistics nor the gradients of other images, even if they are NaN.
                Their own logits are those of a black image.
            keys: A key for each image, of shape `(batch,)`, for dropout in training;
                `None` for none.

        Returns:
            Logits, of shape `(batch, height, width, num_classes)`.

        Raises:
            ValueError: If there are no `widths`.
        """
        if not self.widths:
            raise ValueError("`widths` must have one entry per level; got none.")
        y, rows = without_masked(as_unit(x), mask)

        def level(width: int, name: str) -> Callable[[jax.Array], jax.Array]:
            layer = _Level(width, self.norm, self.dtype, name=name)
            return lambda y: layer(y, train=train, mask=rows)

        skips = []
        for i, width in enumerate(self.widths[:-1], start=1):
            y = level(width, f"encoder{i}")(y)
            skips.append(y)
            # "SAME" rounds up, and pads with values that are never the maximum.
            y = nn.max_pool(y, (2, 2), strides=(2, 2), padding="SAME")
        y = level(self.widths[-1], f"encoder{len(self.widths)}")(y)
        y = dropped(y, self.dropout, keys)
        for i, skip in reversed(list(enumerate(skips, start=1))):
            width = self.widths[i - 1]
            y = nn.ConvTranspose(
                width,
                (2, 2),
                strides=(2, 2),
                dtype=self.dtype,
                kernel_init=_normal,
                name=f"up{i}",
            )(y)
            y = y[:, : skip.shape[1], : skip.shape[2]]
            y = jnp.concatenate([skip.astype(y.dtype), y], -1)
            y = level(width, f"decoder{i}")(y)
        return nn.Conv(self.num_classes, (1, 1), name="head")(numeric.wide(y))


class _Level(nn.Module):
    """3x3 convolution, norm and ReLU, twice.

    Attributes:
        width: Channels of both.
        norm: Makes a norm layer.
        dtype: Dtype of the convolutions.
    """

    width: int
    norm: Callable[..., Any]
    dtype: DType | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None
    ) -> jax.Array:
        """Returns images with `width` channels."""
        for i in (1, 2):
            x = nn.Conv(
                self.width,
                (3, 3),
                use_bias=False,
                dtype=self.dtype,
                kernel_init=_normal,
                name=f"conv{i}",
            )(x)
            norm = activated(self.norm, nn.relu, name=f"norm{i}")
            x = norm(x, use_running_average=not train, mask=mask)
        return x
