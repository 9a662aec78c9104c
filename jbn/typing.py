"""The nouns: arrays, axes, and the three small records that functions pass around."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.export import register_namedtuple_serialization
from jaxtyping import Array, Float, Inexact


# What comes in may be NumPy's; what goes out is always JAX's.
ArrayLike: TypeAlias = jax.Array | np.ndarray
Axes: TypeAlias = int | Sequence[int]
AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
AxisIndexGroups: TypeAlias = Sequence[Sequence[int]]
DType: TypeAlias = Any
Activation: TypeAlias = Callable[[jax.Array], jax.Array]
MaskedOutput: TypeAlias = Literal["normalized", "zero", "input"]


class Params(NamedTuple):
    """What is learned: `y = scale * xh + bias`. A field that is `None` is left out.

    `Params(**d)` and `p._asdict()` convert from and to Flax's `params` dict.
    """

    scale: Inexact[Array, "*features"] | None = None
    bias: Inexact[Array, "*features"] | None = None


class Moments(NamedTuple):
    """What was seen: a weighted, mergeable summary of rows, one entry per feature.

    `weight` is the total weight of the rows, their number where nothing is weighted.
    `mean` is complex if the data is, and `var` is the biased weighted variance,
    `sum(w * abs(x - mean)**2) / sum(w)`. Both are 0 where the weight is.
    """

    weight: Float[Array, "*features"]
    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]


class BatchStats(NamedTuple):
    """What is remembered: the running mean and (biased, by default) variance.

    `weight` is there only for the running rules that need it (see
    `jbn.update_batch_stats`): how much data the statistics have seen. `None` means a
    plain exponential average, whose state is Flax's: `mean` and `var` alone.

    `pending` is there only where gradients are accumulated (see `jbn.commit`): the
    moments of the microbatches that the running statistics have yet to take up.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    weight: Float[Array, "*features"] | None = None
    pending: Moments | None = None


# So that an exported function that takes or returns them can be serialized.
for _record in (Params, Moments, BatchStats):
    register_namedtuple_serialization(
        _record, serialized_name=f"jbn.{_record.__name__}"
    )
