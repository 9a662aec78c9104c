"""The multilayer perceptron of the article: Dense, ReLU, batch norm, twice."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from jbn.linen import BatchNorm
from jbn.models.inputs import as_unit, dropped, key_of_layer, without_masked
from jbn.ops import numeric
from jbn.typing import ArrayLike, DType


class MLP(nn.Module):
    """Classifies images with a stack of Dense, ReLU and norm layers.

        x = norm(relu(dense(x))) once for each of `features`
        logits = dense(x)

    Images are flattened. Integer images are first scaled from 0..255 to 0..1, so that
    they can stay 8 bits wide until they are on the device.

    Attributes:
        features: Width of each hidden layer.
        num_classes: Width of the last layer.
        norm: Norm class, or a partial of one (`partial(BatchNorm, momentum=0.9)`). The
            layer is called with `use_running_average` and `mask`.
        dropout: Fraction of the units that are set to zero after each norm,
            in training, if the call gives `keys`.
        dtype: Dtype to compute in, such as `jnp.bfloat16`; by default that of
            parameters and images, float32. Parameters, statistics and logits are
            float32 in any case.

    Example:
        >>> import jax.numpy as jnp
        >>> model = MLP(features=(8,), num_classes=3)
        >>> images = jnp.zeros((2, 4, 4, 1), jnp.uint8)
        >>> variables = model.init(jax.random.key(0), images, train=False)
        >>> model.apply(variables, images, train=False).shape
        (2, 3)
    """

    features: Sequence[int] = (64, 64)
    num_classes: int = 10
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
        """Returns the logits of a batch of images.

        Args:
            x: Images, the batch first.
            train: Whether to normalize by the batch (and update the running statistics)
                or by the running statistics.
            mask: Of shape `(batch,)`. Images that are `False` affect neither the
                statistics nor the gradients of other images, even if they are NaN.
                Their own logits are those of a black image.
            keys: A key for each image, of shape `(batch,)`, for dropout in training;
                `None` for none.

        Returns:
            Logits, of shape `(batch, num_classes)`.
        """
        y = as_unit(x)
        y, rows = without_masked(y.reshape(y.shape[0], -1), mask)
        for i, width in enumerate(self.features):
            y = nn.relu(nn.Dense(width, dtype=self.dtype)(y))
            # A name that does not depend on the class, so any norm fits the same
            # variables.
            norm = self.norm(name=f"BatchNorm_{i}")
            y = norm(y, use_running_average=not train, mask=rows)
            y = dropped(y, self.dropout, key_of_layer(keys, i))
        return nn.Dense(self.num_classes)(numeric.wide(y))
