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
    """The parameters in `y = scale * xh + bias`. A field that is `None` is left out.

    `Params(**d)` and `p._asdict()` convert from and to Flax's `params` dict.
    """

    scale: Inexact[Array, "*features"] | None = None
    bias: Inexact[Array, "*features"] | None = None


class Moments(NamedTuple):
    """A weighted, mergeable summary of rows, one entry per feature.

    `weight` is the total weight of the rows, or their number without weights.
    `mean` is complex if the data is, and `var` is the biased weighted variance,
    `sum(w * abs(x - mean)**2) / sum(w)`. Both are 0 where the weight is 0.
    """

    weight: Float[Array, "*features"]
    mean: Inexact[Array, "*features"]
    var: Float[Array, "*features"]


class BatchStats(NamedTuple):
    """The running mean and (by default biased) variance.

    `weight` is how much data the statistics have seen, for the update rules that need
    it (see `jbn.update_batch_stats`). `None` means a plain exponential average, whose
    state is only `mean` and `var`, as in Flax.

    `pending` is `None` unless gradients are accumulated (see `jbn.commit`): the moments
    of the microbatches since the last update of the running statistics.
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
