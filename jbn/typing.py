"""Types: arrays, axes, and the records `Params`, `Moments` and `BatchStats`."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.export import register_namedtuple_serialization
from jaxtyping import Array, Float, Inexact


# Arguments may be NumPy arrays; results are always JAX arrays.
ArrayLike: TypeAlias = jax.Array | np.ndarray
Axes: TypeAlias = int | Sequence[int]
AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
AxisIndexGroups: TypeAlias = Sequence[Sequence[int]]
DType: TypeAlias = Any
Activation: TypeAlias = Callable[[jax.Array], jax.Array]
MaskedOutput: TypeAlias = Literal["normalized", "zero", "input"]


class Params(NamedTuple):
    """The parameters in `y = scale * xh + bias`.

    `Params(**d)` and `p._asdict()` convert from and to Flax's `params` dict.

    Attributes:
        scale: An array of shape `(*features,)`, or `None` for no scale.
        bias: An array of shape `(*features,)`, or `None` for no bias.
    """

    scale: Inexact[Array, "*features"] | None = None
    bias: Inexact[Array, "*features"] | None = None


class Moments(NamedTuple):
    """A weighted, mergeable summary of rows, one entry per feature.

    All fields have the shape `(*features,)` and at least float32 precision.

    Attributes:
        weight: The total weight of the rows, or their number without weights.
        mean: Their weighted mean, complex if the data is; 0 where the weight is 0.
        var: Their biased weighted variance, `sum(w * abs(x - mean)**2) / sum(w)`;
            0 where the weight is 0.
    """

    weight: Float[Array, "*features"]
    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]


class BatchStats(NamedTuple):
    """The running statistics, one entry per feature.

    All fields have the shape `(*features,)` and at least float32 precision. A
    plain exponential average only has `mean` and `var`, as in Flax.

    Attributes:
        mean: The running mean, complex if the data is.
        var: The running variance, biased by default.
        weight: How much data the statistics have seen, for the update rules that need
            it (see `jbn.update_batch_stats`), or `None`.
        pending: The moments of the microbatches since the last update, if gradients
            are accumulated (see `jbn.commit`), or `None`.
    """

    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]
    weight: Float[Array, "*features"] | None = None
    pending: Moments | None = None


# Exported functions that take or return them can then be serialized.
for _record in (Params, Moments, BatchStats):
    register_namedtuple_serialization(
        _record, serialized_name=f"jbn.{_record.__name__}"
    )
