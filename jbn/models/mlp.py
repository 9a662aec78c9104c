"""The multilayer perceptron of the article: Dense, ReLU, batch norm, twice."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jbn.linen import BatchNorm


class MLP(nn.Module):
    """Classifies images with a stack of Dense, ReLU and norm layers.

        x = norm(relu(dense(x)))      once for each of `features`
        logits = dense(x)

    Images are flattened. Integer images are first scaled from 0..255 to 0..1, so that
    they can stay 8 bits wide until they are on the device.

    Attributes:
        features: Width of each hidden layer.
        num_classes: Width of the last layer.
        norm: Makes a norm layer, which is called with `use_running_average` and `mask`:
            a norm class, or a partial of one (`partial(BatchNorm, momentum=0.9)`).

    Example:
        >>> model = MLP(features=(8,), num_classes=3)
        >>> images = jnp.zeros((2, 4, 4, 1), jnp.uint8)
        >>> variables = model.init(jax.random.key(0), images, train=False)
        >>> model.apply(variables, images, train=False).shape
        (2, 3)
    """

    features: Sequence[int] = (64, 64)
    num_classes: int = 10
    norm: Callable[..., Any] = BatchNorm

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Returns the logits of a batch of images.

        Args:
            x: Images, the batch first.
            train: Whether to normalize by the batch (and update the running statistics)
                or by the running statistics.
            mask: Of shape `(batch,)`; rows that are `False` take no part in the
                statistics of the batch.

        Returns:
            Logits, of shape `(batch, num_classes)`.
        """
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = x.astype(jnp.float32) / 255.0
        x = x.reshape(x.shape[0], -1)
        rows = None if mask is None else mask[:, None]
        for width in self.features:
            x = nn.relu(nn.Dense(width)(x))
            x = self.norm()(x, use_running_average=not train, mask=rows)
        return nn.Dense(self.num_classes)(x)
