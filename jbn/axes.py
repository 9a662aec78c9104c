"""Which axes hold features, which are reduced, and every message about shapes."""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jbn.typing import ArrayLike, Axes, AxisIndexGroups, AxisName, DType


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shape of an input, and its feature axes in increasing order."""

    shape: tuple[int, ...]
    feature_axes: tuple[int, ...]

    @property
    def reduction_axes(self) -> tuple[int, ...]:
        """The axes to take statistics over: all but the feature axes."""
        return tuple(a for a in range(len(self.shape)) if a not in self.feature_axes)

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of a statistic or a parameter."""
        return tuple(self.shape[a] for a in self.feature_axes)

    @property
    def rows(self) -> tuple[int, ...]:
        """The shape of one value per row: the input's, without the feature axes."""
        return tuple(self.shape[a] for a in self.reduction_axes)

    def expand(self, stat: jax.Array) -> jax.Array:
        """Reshapes `features` so that it broadcasts against the input.

        Leading axes, such as that of domains, stay in front.
        """
        extra = stat.ndim - len(self.feature_axes)
        axes = [extra + a for a in self.reduction_axes]
        return lax.expand_dims(stat, axes) if axes else stat

    def squeeze(self, stat: jax.Array) -> jax.Array:
        """Undoes `expand`, and broadcasts along feature axes of size 1."""
        extra = stat.ndim - len(self.shape)
        shape = (*stat.shape[:extra], *self.features)
        stat = lax.squeeze(stat, [extra + a for a in self.reduction_axes])
        if stat.shape == shape:
            return stat
        return lax.broadcast_in_dim(stat, shape, range(stat.ndim))


@dataclasses.dataclass(frozen=True)
class Rows:
    """The set of rows that share one mean: local array axes, and mapped axes.

    Static and hashable, so that it can parametrize a derivative rule.
    """

    axes: tuple[int, ...]
    axis_name: AxisName | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None


def layout(x: ArrayLike | jax.ShapeDtypeStruct, axis: Axes) -> Layout:
    """Resolves `axis` against the shape of `x`."""
    if x.ndim == 0:
        raise ValueError(
            "`x` must have at least one axis, the features; got a scalar. Pass an"
            " array of shape (..., num_features)."
        )
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    resolved = []
    for a in given:
        try:
            a = operator.index(a)
        except TypeError:
            raise TypeError(
                f"`axis` must be an integer or a sequence of integers; got {axis!r}."
            ) from None
        if not -x.ndim <= a < x.ndim:
            raise ValueError(
                f"`axis` must name axes of `x`, which has shape {x.shape}; got"
                f" axis={axis!r}. Pass values from {-x.ndim} to {x.ndim - 1}."
            )
        resolved.append(a % x.ndim)
    if not resolved:
        raise ValueError(
            "`axis` must name at least one feature axis; got an empty sequence. Keep"
            " an axis of size 1 for statistics over everything."
        )
    if len(set(resolved)) < len(resolved):
        raise ValueError(
            f"`axis` must not name an axis of `x` twice; got axis={axis!r} for shape"
            f" {x.shape}. Remove the repeated one."
        )
    return Layout(tuple(x.shape), tuple(sorted(resolved)))


def check_features(
    stat: ArrayLike,
    name: str,
    lay: Layout,
    axis: Axes,
    front: tuple[str, int] | None = None,
) -> None:
    """Raises unless `stat` has one entry per feature.

    With `front=("domain", 3)`, it must have one entry per domain and feature.
    """
    if front is not None:
        what, number = front
        if tuple(stat.shape) != (number, *lay.features):
            raise ValueError(
                f"`{name}` must have one entry per {what} and feature: it has shape"
                f" {tuple(stat.shape)}, and not {(number, *lay.features)}, for {number}"
                f" of the one and, along axis={axis!r} of `x`, of shape {lay.shape},"
                f" {lay.features} of the other. Make it by `init(({number}, ...))`."
            )
        return
    if tuple(stat.shape) != lay.features:
        raise ValueError(
            f"`{name}` must have one entry per feature: it has shape"
            f" {tuple(stat.shape)}, but `x`, of shape {lay.shape}, has features of"
            f" shape {lay.features} along axis={axis!r}. If the features of `x` are"
            " elsewhere, pass `axis` (channels-first images: axis=1)."
        )


def check_record(record: Any, name: str, kind: type) -> None:
    """Raises if `record` is not of `kind`, such as one of Flax's dicts."""
    if not hasattr(record, kind._fields[0]):
        raise TypeError(
            f"`{name}` must be a `jbn.{kind.__name__}`; got {type(record).__name__}."
            f" Make one of a dict by `jbn.{kind.__name__}(**{name})`."
        )


def check_real(stat: ArrayLike, name: str, real: bool) -> None:
    """Raises if `stat` has an integer dtype, or a complex one where `real`."""
    allowed = jnp.floating if real else jnp.inexact
    if not jnp.issubdtype(stat.dtype, allowed):
        raise TypeError(
            f"`{name}` must be of a floating dtype"
            f"{', since `x` is not complex' if real else ''}; got {stat.dtype}."
        )


@overload
def check_inexact(x: ArrayLike) -> jax.Array: ...
@overload
def check_inexact(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct: ...
def check_inexact(x: Any) -> Any:
    """Converts `x` to an array, refusing integers and booleans.

    A `ShapeDtypeStruct`, which describes a sparse array, is checked and returned.
    """
    x = as_array(x, "x")
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"`x` must be of a floating or complex dtype; got {x.dtype}. Convert it"
            " first, for example with `x.astype(jnp.float32)`."
        )
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)


def output_dtype(dtype: DType | None, of_x: np.dtype, name: str = "dtype") -> np.dtype:
    """The requested dtype, or that of `x`; refused if it cannot hold the output."""
    if dtype is None:
        return of_x
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"`{name}` must be a dtype; got {dtype!r}.") from None
    is_complex = jnp.issubdtype(of_x, jnp.complexfloating)
    if not jnp.issubdtype(dtype, jnp.complexfloating if is_complex else jnp.inexact):
        kind = "complex, like `x`" if is_complex else "a floating or complex dtype"
        raise TypeError(f"`{name}` must be {kind}; got {dtype}.")
    return dtype


def as_inexact(x: ArrayLike, dtype: DType | None) -> jax.Array:
    """Converts `x` to an array; integers and booleans to `dtype`, or float32."""
    x = jnp.asarray(as_array(x, "x"))
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return x.astype(dtype or jnp.float32)


def is_count(flag: Any) -> bool:
    """Whether a flag is really an integer, such as a number of features."""
    return isinstance(flag, int | np.integer | Sequence) and not isinstance(flag, bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AtRank:
    """A checked array, and its shape at the rank of the input.

    Checks run outside of the compiled program of a call. The reshape runs inside.
    """

    value: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def array(self) -> jax.Array:
        """The array at the rank of the input."""
        return jnp.asarray(self.value).reshape(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights(AtRank):
    """A mask, or weights, that broadcast to the input."""

    is_mask: bool = dataclasses.field(metadata={"static": True})

    def array(self) -> jax.Array:
        """Boolean or floating weights at the rank of the input."""
        weights = super().array()
        if weights.dtype == bool or jnp.issubdtype(weights.dtype, jnp.inexact):
            return weights
        return weights != 0 if self.is_mask else weights.astype(jnp.float32)


def element_weights(
    mask: ArrayLike | None, weights: ArrayLike | None, lay: Layout
) -> Weights | None:
    """Checks `mask` or `weights`; `None` if all elements count the same."""
    if mask is not None and weights is not None:
        raise ValueError(
            "`mask` and `weights` both say which elements count; got both. Pass"
            " `weights=weights * mask`."
        )
    if mask is not None:
        mask = _boolean(as_array(mask, "mask"))
        return Weights(mask, _weights_shape(mask, "mask", lay), is_mask=True)
    if weights is None:
        return None
    given = as_array(weights, "weights")
    if jnp.issubdtype(given.dtype, jnp.complexfloating):
        raise TypeError(f"`weights` must be real; got {given.dtype}.")
    values = known(given)
    if values is not None and not np.all((values >= 0) & (values < np.inf)):
        raise ValueError(
            "`weights` must be non-negative and finite; those given go from"
            f" {values.min()} to {values.max()}. A weight of 0 leaves an element out."
        )
    if values is not None and values.size and is_static(lay.shape):
        rows = math.prod(lay.rows)
        most = float(values.max()) * rows
        total = float(values.mean(dtype=np.float64)) * rows
        if min(most, total) > float(np.finfo(np.float32).max):
            raise ValueError(
                "`weights` must have a finite sum in float32; those given go up to"
                f" {values.max():g} for {rows} rows. Only their ratios matter: divide"
                " them by their largest."
            )
    return Weights(given, _weights_shape(given, "weights", lay), is_mask=False)


def _boolean(mask: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """A mask as booleans; a numeric one is accepted if it only holds 0 and 1."""
    if mask.dtype == bool:
        return mask
    values = known(mask)
    if values is None:
        # Traced: its values are unknown. Weights of 0 and 1 act like a mask.
        return mask
    if not np.all((values == 0) | (values == 1)):
        raise ValueError(
            "`mask` must be boolean: which elements count. Got numbers other than 0"
            " and 1. To let elements count more or less, pass them as `weights`."
        )
    return values != 0


def _weights_shape(weights: Any, name: str, lay: Layout) -> tuple[int, ...]:
    """The shape of `weights` at the rank of the input; each size is the input's or 1.

    A lower rank may mean one entry per row, or NumPy broadcasting against the last
    axes, as in Flax. It is accepted if only one of the two fits.
    """
    shape, rank = tuple(weights.shape), len(lay.shape)
    wanted, whose = _row_shape(lay), "a row"
    if len(shape) < len(lay.rows) and shape == lay.rows[: len(shape)]:
        wanted, whose = _leading(lay, shape), "for each of the leading axes"
    fix = (
        " Give it the rank of `x`, with 1 where it does not vary: for one entry"
        f" {whose} give it the shape {wanted}."
    )

    def fits(candidate: tuple[int, ...]) -> bool:
        return len(candidate) == rank and all(
            c in (1, s) for c, s in zip(candidate, lay.shape, strict=True)
        )

    if len(shape) == rank or not shape:
        readings = [shape or (1,) * rank]
    else:
        readings = [(1,) * (rank - len(shape)) + shape]
        if shape == lay.rows:
            readings.append(_row_shape(lay))
    readings = list(dict.fromkeys(r for r in readings if fits(r)))
    if not readings:
        raise ValueError(
            f"`{name}` must broadcast to `x`: it has shape {shape}, and `x` has shape"
            f" {lay.shape}.{fix}"
        )
    if len(readings) > 1:
        raise ValueError(
            f"`{name}` of shape {shape} is ambiguous for `x` of shape {lay.shape}: it"
            f" could hold one entry a row, or be broadcast along the last axes.{fix}"
        )
    return readings[0]


def size(value: Any, name: str) -> int:
    """A static integer, at least 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer; got {value!r}.") from None
    if number < 1:
        raise ValueError(f"`{name}` must be at least 1; got {number}.")
    return number


def row_ids(ids: Any, name: str, lay: Layout) -> AtRank:
    """Checks integer ids, one per row.

    They may have only the leading axes of the rows, such as one id per image.
    """
    ids = as_array(ids, name)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be of integers; got {ids.dtype}.")
    shape, rank = tuple(ids.shape), len(lay.shape)
    if len(shape) == rank:
        fits = _broadcasts(shape, _row_shape(lay))
    else:
        fits = shape == lay.rows[: len(shape)]
    if not fits:
        raise ValueError(
            f"`{name}` must have one entry for each row of `x`, or for each entry of"
            f" its leading axes: it has shape {shape}, and the rows of `x`, of shape"
            f" {lay.shape}, have shape {lay.rows}."
        )
    if len(shape) < rank:
        shape = _leading(lay, shape)
    return AtRank(ids, shape)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(n in (1, m) for n, m in zip(shape, to, strict=True))


def row_shares(shares: Any, name: str, lay: Layout, number: int) -> AtRank:
    """Checks `number` real shares per row, along one more axis."""
    shape, rank = tuple(shares.shape), len(lay.shape)
    if not shape or shape[-1] != number:
        raise ValueError(
            f"`{name}` of a floating dtype must hold shares, one per {name} ({number}),"
            f" along its last axis; got shape {shape}. Ids must be of an integer dtype."
        )
    values = known(shares)
    if values is not None and not np.all((values >= 0) & (values < np.inf)):
        raise ValueError(
            f"`{name}` of a floating dtype holds shares, which must be non-negative and"
            f" finite; those given go from {values.min()} to {values.max()}."
        )
    front = shape[:-1]
    at_rank = front if len(front) == rank else _leading(lay, front)
    if len(front) == len(lay.rows):
        fits = _broadcasts(front, lay.rows)
    elif len(front) == rank:
        fits = _broadcasts(front, _row_shape(lay))
    else:
        fits = front == lay.rows[: len(front)]
    if not fits:
        raise ValueError(
            f"`{name}` must have shares for each row of `x`, or for each entry of its"
            f" leading axes: it has shape {shape}, and the rows of `x`, of shape"
            f" {lay.shape}, have shape {lay.rows}."
        )
    return AtRank(shares, (*at_rank, number))


def check_number(
    value: Any,
    name: str,
    least: float | int,
    why: str,
    features: tuple[int, ...] | None = None,
) -> Any:
    """Refuses a value that is not one number, or known to be below `least` or NaN.

    With `features` it may also be an array of that shape.
    """
    value = as_number(value, name)
    if np.shape(value) and np.shape(value) != features:
        raise ValueError(
            f"`{name}` must be one number; got an array of shape {np.shape(value)}."
        )
    number = known(value)
    if number is not None and not np.all(number >= least):
        raise ValueError(f"`{name}` must be at least {least:g}; got {number}. {why}")
    return value


def check_word(value: Any, name: str, words: tuple[str, ...]) -> None:
    """Refuses a value that is none of `words`."""
    if value not in words:
        raise ValueError(f"`{name}` must be one of {words}; got {value!r}.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Number:
    """A checked number. A Python number becomes a constant of the program.

    Use it for numbers that do not change during training: each value needs its own
    program.
    """

    traced: Any
    constant: float | int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, value: Any) -> "Number":
        """Makes one of a Python number, or of anything like a scalar array."""
        if isinstance(value, bool | int | float):
            return cls(None, value)
        return cls(value, None)

    def array(self, dtype: np.dtype) -> jax.Array:
        """The number as an array."""
        value = self.traced if self.constant is None else self.constant
        return jnp.asarray(value, dtype)

    def may_be_below(self, limit: float) -> bool:
        """Whether it is below `limit`, or unknown."""
        if self.constant is not None:
            return self.constant < limit
        number = known(self.traced)
        return number is None or bool(number < limit)


def as_number(value: Any, name: str) -> Any:
    """Refuses a value that is neither a real number nor an array of real numbers."""
    if isinstance(value, bool | int | float):
        return value
    value = as_array(value, name, "a number")
    if not jnp.issubdtype(value.dtype, jnp.number) or jnp.issubdtype(
        value.dtype, jnp.complexfloating
    ):
        raise TypeError(f"`{name}` must be a real number; got {value.dtype}.")
    return value


def as_array(value: Any, name: str, what: str = "an array") -> Any:
    """`value` if it has a shape and a dtype, else a NumPy array of it."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        array = None
    if array is None or array.dtype.kind not in "biufcV":
        given = f"{value!r}" if isinstance(value, str) else type(value).__name__
        raise TypeError(f"`{name}` must be {what}; got {given}.")
    return array


def _leading(lay: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, at the rank of the input, of one entry per image (leading axes)."""
    sizes = iter(shape)
    return tuple(
        1 if a in lay.feature_axes else next(sizes, 1) for a in range(len(lay.shape))
    )


def _row_shape(lay: Layout) -> tuple[int, ...]:
    return tuple(1 if a in lay.feature_axes else n for a, n in enumerate(lay.shape))


def rows(
    lay: Layout,
    axis_name: AxisName | None,
    axis_index_groups: AxisIndexGroups | None,
) -> Rows:
    """Names the rows that share one mean, checking that the mapped axes exist."""
    if axis_name is None:
        if axis_index_groups is not None:
            raise ValueError(
                "`axis_index_groups` partitions the mapped axis `axis_name`, which is"
                " None. Pass `axis_name`, or drop `axis_index_groups`."
            )
        return Rows(lay.reduction_axes)
    try:
        size = int(jax.lax.axis_size(axis_name))
    except NameError:
        raise NameError(
            f"`axis_name` must be an axis that is mapped around this call; got"
            f" {axis_name!r}, which is not. Check the spelling in `shard_map`, `pmap`"
            " or `vmap`. Under plain `jit` leave it None: the statistics of a sharded"
            " `x` are already those of the whole batch."
        ) from None
    if axis_index_groups is None:
        return Rows(lay.reduction_axes, axis_name)
    groups = tuple(tuple(operator.index(i) for i in g) for g in axis_index_groups)
    members = sorted(i for g in groups for i in g)
    if members != list(range(size)):
        raise ValueError(
            "`axis_index_groups` must split the indices of the mapped axis"
            f" {axis_name!r}, 0 to {size - 1}, into groups; got"
            f" {axis_index_groups!r}. Name each index exactly once."
        )
    return Rows(lay.reduction_axes, axis_name, groups)


def is_static(shape: Sequence[Any]) -> bool:
    """Whether all sizes are known; an export may have symbolic ones."""
    return all(isinstance(n, int) for n in shape)


def known(value: Any) -> np.ndarray | None:
    """The value of a concrete array or number; `None` if it is traced."""
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)
