"""Fold one batch norm at inference into one linear layer: the arithmetic.

In NumPy's float64 or complex128, rounded once.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jbn import axes
from jbn._normalize import check_epsilon
from jbn.typing import ArrayLike, Axes, BatchStats, Params


def fold_into_previous(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: Params | None,
    batch_stats: BatchStats,
    *,
    epsilon: float | int | ArrayLike = 1e-5,
    output_axis: Axes = -1,
    input_axis: Axes = -2,
    feature_group_count: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm, for inference, into the linear layer before it.

    For each output feature, with `gain = scale / sqrt(var + epsilon)`,

        kernel = kernel * gain
        bias = (bias - mean) * gain + batch norm's bias

    in float64, rounded once. This holds for dense layers, and for (transposed)
    convolutions with any stride, dilation, padding and number of groups.

    Args:
        kernel: In any layout. Flax has the output features last, or last but one with
            `transpose_kernel` (`output_axis=-2, input_axis=-1`). PyTorch has them first
            (`output_axis=0, input_axis=1`), or second for transposed convolutions
            (`output_axis=1, input_axis=0`).
        bias: One entry per output feature; `None` for a layer without a bias.
        params: Scale and bias of the batch norm; `None` if it has none.
        batch_stats: Running mean and variance.
        epsilon: Added to the variance, inside the square root.
        output_axis: Axis or axes of `kernel` that hold the output features.
        input_axis: Axis or axes of `kernel` that hold the input features. Only used for
            groups along this axis, as in PyTorch's transposed convolutions.
        feature_group_count: Number of groups.

    Returns:
        The new kernel and bias, in the dtypes of the old ones. A new bias has the dtype
        of the kernel.

    Raises:
        TypeError: If an array is traced: folding is done once, outside of `jit`.
        ValueError: If shapes or axes do not fit, or `epsilon` is negative.

    Example:
        >>> kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> params = Params(jnp.array([2.0, 6.0]), jnp.array([0.0, 1.0]))
        >>> stats = BatchStats(jnp.array([1.0, 2.0]), jnp.array([4.0, 9.0]))
        >>> kernel, bias = fold_into_previous(kernel, None, params, stats, epsilon=0.0)
        >>> print(kernel, bias)
        [[1. 4.]
         [3. 8.]] [-1. -3.]

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", 2018, section 3.2.
        https://arxiv.org/abs/1712.05877
    """
    layer = _described(kernel, output_axis, input_axis, feature_group_count)
    gain, shift = _check_norm(params, batch_stats, epsilon)
    return _rounded_like(
        into_previous(*_wide_layer(kernel, bias), gain, shift, layer), kernel, bias
    )


def fold_into_next(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: Params | None,
    batch_stats: BatchStats,
    *,
    epsilon: float | int | ArrayLike = 1e-5,
    output_axis: Axes = -1,
    input_axis: Axes = -2,
    feature_group_count: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm, for inference, into the linear layer after it.

    For each input feature, with `gain = scale / sqrt(var + epsilon)` and
    `shift = batch norm's bias - mean * gain`,

        bias = bias + sum of (kernel * shift)
        kernel = kernel * gain

    in float64, rounded once. Exact for dense layers, and for convolutions that do not
    pad with zeros: the zeros are padded after the batch norm, so they must not be
    shifted.

    Args:
        kernel: In any layout; with groups it holds the input features of one group.
        bias: As for `fold_into_previous`, like the other arguments.
        params: Scale and bias of the batch norm.
        batch_stats: Running mean and variance.
        epsilon: Added to the variance, inside the square root.
        output_axis: Axis or axes of `kernel` that hold the output features.
        input_axis: Axis or axes of `kernel` that hold the input features.
        feature_group_count: Number of groups.

    Returns:
        The new kernel and bias, as `fold_into_previous`.

    Raises:
        TypeError: As `fold_into_previous` does.
        ValueError: As `fold_into_previous` does.

    Example:
        >>> kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> params = Params(jnp.array([2.0, 6.0]), jnp.array([0.0, 1.0]))
        >>> stats = BatchStats(jnp.array([1.0, 2.0]), jnp.array([4.0, 9.0]))
        >>> kernel, bias = fold_into_next(kernel, None, params, stats, epsilon=0.0)
        >>> print(kernel, bias)
        [[1. 2.]
         [6. 8.]] [-10. -14.]
    """
    layer = _described(kernel, output_axis, input_axis, feature_group_count)
    gain, shift = _check_norm(params, batch_stats, epsilon)
    if set(layer.kernel_in) & set(layer.kernel_out):
        raise ValueError(
            "`input_axis` and `output_axis` must name different axes of `kernel`; got"
            f" {input_axis!r} and {output_axis!r} for shape {kernel.shape}."
        )
    if feature_group_count > 1 and kernel.shape[layer.kernel_in[0]] == gain.size:
        raise ValueError(
            "`kernel` must hold the input features of one group along `input_axis`; got"
            f" shape {kernel.shape} for {gain.size} features in {feature_group_count}"
            " groups."
        )
    return _rounded_like(
        into_next(*_wide_layer(kernel, bias), gain, shift, layer), kernel, bias
    )


@dataclasses.dataclass(frozen=True)
class Linear:
    """The feature axes of a linear layer, in its arrays and in the kernel."""

    out_axes: tuple[int, ...]
    kernel_out: tuple[int, ...]
    in_axes: tuple[int, ...]
    kernel_in: tuple[int, ...]
    groups: int = 1


def into_previous(kernel, bias, gain, shift, layer: Linear):
    """Kernel and bias that also multiply the output by `gain` and add `shift`."""
    scaled = kernel * spread(gain, kernel.shape, layer, forward=False)
    _check_bias(bias, gain.shape)
    return scaled, shift if bias is None else bias * gain + shift


def into_next(kernel, bias, gain, shift, layer: Linear, mask=None):
    """Kernel and bias that first do so to the input; `mask` is the layer's."""
    moved = kernel * spread(shift, kernel.shape, layer, forward=True)
    if mask is not None:
        moved = moved * mask
    others = [a for a in range(kernel.ndim) if a not in layer.kernel_out]
    moved = moved.sum(tuple(others)).transpose(np.argsort(layer.kernel_out).argsort())
    _check_bias(bias, moved.shape)
    scaled = kernel * spread(gain, kernel.shape, layer, forward=True)
    return scaled, moved if bias is None else bias + moved


def spread(vector, shape, layer: Linear, *, forward: bool) -> np.ndarray:
    """One entry per feature, output or (`forward`) input, along a kernel of `shape`."""
    out, into = layer.kernel_out, layer.kernel_in
    if forward:
        return _along(vector, shape, into, out, layer.groups, "input_axis")
    return _along(vector, shape, out, into, layer.groups, "output_axis")


def _check_bias(bias, features: tuple[int, ...]) -> None:
    if bias is not None and bias.shape != features:
        raise ValueError(
            "`bias` must have one entry per output feature; got shape"
            f" {bias.shape} for features of shape {features}."
        )


def _along(vector, shape, own, other, groups, name):
    """Reshapes `vector`, one entry per feature, to broadcast to a kernel of `shape`.

    If the axis `own` of the kernel only holds the features of one group, the groups are
    consecutive along the axis `other`.
    """
    sizes = tuple(shape[a] for a in own)
    if sizes == vector.shape:
        return at(vector, own, len(shape))
    one = len(own) == len(other) == vector.ndim == 1
    if not one or sizes[0] * groups != vector.size or shape[other[0]] % groups:
        raise ValueError(
            f"`kernel` must have one entry per feature along `{name}`; got shape"
            f" {tuple(shape)}, with {sizes} along it"
            f"{f' in {groups} groups' if groups > 1 else ''}, for a batch norm of"
            f" features of shape {vector.shape}."
        )
    each = np.repeat(vector.reshape(groups, -1), shape[other[0]] // groups, axis=0)
    return at(each, (*other, *own), len(shape))


def at(array: np.ndarray, places: Sequence[int], rank: int) -> np.ndarray:
    """`array` at rank `rank`: its axes at the given places, size 1 elsewhere."""
    array = array.transpose(np.argsort(places))
    return np.expand_dims(array, [a for a in range(rank) if a not in places])


def affine(scale, bias, mean, var, epsilon) -> tuple[np.ndarray, np.ndarray]:
    """The gain and the shift of a batch norm."""
    total = var + epsilon
    zero = total == 0  # a constant feature without epsilon: 0 / 0 is 0, as in `gain`
    gain = np.where(zero, 0, 1 / np.sqrt(np.where(zero, 1, total)))
    if scale is not None:
        gain = gain * scale
    shift = -mean * gain
    return gain, shift if bias is None else shift + bias


def wide_array(array: Any, name: str) -> np.ndarray:
    """An array as float64 or complex128."""
    check_known(array, name)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(f"`{name}` must be of a floating dtype; got {array.dtype}.")
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    return np.asarray(array).astype(np.complex128 if is_complex else np.float64)


def check_known(array: Any, name: str) -> None:
    """Raises if the values are not known."""
    if isinstance(array, Tracer):
        raise TypeError(
            f"`{name}` must be known; got a traced array. Fold once, outside of `jit`"
            " and other transformations, and use the result inside."
        )
    if isinstance(array, jax.ShapeDtypeStruct):
        raise TypeError(f"`{name}` must be known; got only its shape.")


def _wide_layer(kernel, bias) -> tuple[np.ndarray, np.ndarray | None]:
    return wide_array(kernel, "kernel"), None if bias is None else wide_array(
        bias, "bias"
    )


def rounded(wide: np.ndarray, like: Any) -> jax.Array:
    """An array in the dtype of `like`, or a complex one if it must be."""
    dtype = jax.dtypes.canonicalize_dtype(like.dtype)
    if np.iscomplexobj(wide) and not jnp.issubdtype(dtype, jnp.complexfloating):
        dtype = jnp.promote_types(dtype, jnp.complex64)
    return jnp.asarray(wide.astype(dtype))


def _rounded_like(new, kernel, bias) -> tuple[jax.Array, jax.Array]:
    return rounded(new[0], kernel), rounded(new[1], kernel if bias is None else bias)


def _described(kernel, output_axis, input_axis, groups) -> Linear:
    check_known(kernel, "kernel")
    out_axes = _kernel_axes(kernel, output_axis, "output_axis")
    in_axes = _kernel_axes(kernel, input_axis, "input_axis")
    return Linear((), out_axes, (), in_axes, groups)


def _check_norm(params, batch_stats, epsilon) -> tuple[np.ndarray, np.ndarray]:
    axes.check_record(batch_stats, "batch_stats", BatchStats)
    if params is not None:
        axes.check_record(params, "params", Params)
    params = params or Params()
    found = {f"params.{name}": v for name, v in params._asdict().items()}
    found |= {
        f"batch_stats.{name}": batch_stats._asdict()[name] for name in ("mean", "var")
    }
    wide = {k: None if v is None else wide_array(v, k) for k, v in found.items()}
    for name, v in wide.items():
        if v is not None and v.shape != batch_stats.var.shape:
            raise ValueError(
                f"`{name}` must have one entry per feature; got shape {v.shape}, and"
                f" `batch_stats.var` has {batch_stats.var.shape}."
            )
    scale, bias, mean, var = wide.values()
    check_epsilon(epsilon)
    return affine(scale, bias, mean, var, float(epsilon))


def _kernel_axes(kernel: ArrayLike, axis: Axes, name: str) -> tuple[int, ...]:
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    given = tuple(map(operator.index, given))
    bad = any(not -kernel.ndim <= a < kernel.ndim for a in given)
    resolved = tuple(a % max(kernel.ndim, 1) for a in given)
    if bad or not given or len(set(resolved)) < len(resolved):
        raise ValueError(
            f"`{name}` must name axes of `kernel`, which has shape {kernel.shape}; got"
            f" {axis!r}."
        )
    return resolved
