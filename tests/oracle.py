"""Batch norm in float64 NumPy, one feature at a time. Imports nothing from jbn."""

import numpy as np


def moments(x, weights=None, axis: int | tuple[int, ...] = -1):
    """Weight, mean and biased variance of each feature, by their definitions."""
    columns, w, shape = _columns(x, weights, axis)
    result = np.zeros((3, len(columns)), columns[0].dtype if columns else float)
    for i, (column, weight) in enumerate(zip(columns, w, strict=True)):
        # An element of weight zero does not exist, whatever it holds.
        column, weight = column[weight > 0], weight[weight > 0]
        total = weight.sum()
        if total > 0:
            mean = (weight * column).sum() / total
            var = (weight * abs(column - mean) ** 2).sum() / total
            result[:, i] = total, mean, var
    weight, mean, var = (r.reshape(shape) for r in result)
    return np.real(weight), mean, np.real(var)


def normalize(
    x, mean, var, scale=None, bias=None, axis: int | tuple[int, ...] = -1, epsilon=1e-5
):
    """`scale * (x - mean) / sqrt(var + epsilon) + bias`, element by element."""
    x, mean, var = _wide(x), _wide(mean), _wide(var)
    scale, bias = (None if p is None else _wide(p) for p in (scale, bias))
    axes = _feature_axes(x, axis)
    y = np.empty_like(x)
    for index in np.ndindex(x.shape):
        f = tuple(index[a] for a in axes)
        y[index] = (x[index] - mean[f]) / np.sqrt(var[f] + epsilon)
        y[index] *= 1 if scale is None else scale[f]
        y[index] += 0 if bias is None else bias[f]
    return y


def batch_norm(
    x,
    scale=None,
    bias=None,
    weights=None,
    axis: int | tuple[int, ...] = -1,
    epsilon=1e-5,
):
    """The training-mode output, for features that have some weight."""
    _, mean, var = moments(x, weights, axis)
    return normalize(x, mean, var, scale, bias, axis, epsilon)


def input_gradient(
    x, dy, scale, weights=None, axis: int | tuple[int, ...] = -1, epsilon=1e-5
):
    """Gradients of `sum(dy * batch_norm(x))` by x, scale and bias, one by one.

    From the chain rule through mean and variance, term by term, as in Ioffe and
    Szegedy (2015), section 3, with weights.
    """
    x, dy = _wide(x), _wide(dy)
    columns, w, shape = _columns(x, weights, axis)
    dys, _, _ = _columns(dy, None, axis)
    dx = np.zeros_like(np.stack(columns))
    dscale, dbias = np.zeros(len(columns)), np.zeros(len(columns))
    for i, (column, weight, d) in enumerate(zip(columns, w, dys, strict=True)):
        total = weight.sum()
        mean = (weight * column).sum() / total
        var = (weight * (column - mean) ** 2).sum() / total
        rstd = 1 / np.sqrt(var + epsilon)
        dxh = d * scale.reshape(-1)[i]
        dvar = (dxh * (column - mean)).sum() * -0.5 * rstd**3
        dmean = -(dxh * rstd).sum()  # the variance's own dependence on it is zero
        share = weight / total
        dx[i] = dxh * rstd + dvar * 2 * share * (column - mean) + dmean * share
        dscale[i] = (d * (column - mean) * rstd).sum()
        dbias[i] = d.sum()
    axes = _feature_axes(x, axis)
    rest = [a for a in range(x.ndim) if a not in axes]
    full = dx.reshape([x.shape[a] for a in (*axes, *rest)])
    dx = np.transpose(full, np.argsort((*axes, *rest)))
    return dx, dscale.reshape(shape), dbias.reshape(shape)


def _wide(x):
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _feature_axes(x, axis):
    given = axis if isinstance(axis, tuple) else (axis,)
    return sorted(a % x.ndim for a in given)


def _columns(x, weights, axis):
    """The elements and weights of each feature, and the shape of the features."""
    x = _wide(x)
    w = np.ones(x.shape) if weights is None else np.broadcast_to(weights, x.shape)
    axes = _feature_axes(x, axis)
    shape = tuple(x.shape[a] for a in axes)
    rest = [a for a in range(x.ndim) if a not in axes]
    flat = int(np.prod(shape)), int(np.prod([x.shape[a] for a in rest]))
    columns = np.transpose(x, (*axes, *rest)).reshape(flat)
    w = np.transpose(w, (*axes, *rest)).reshape(flat).astype(np.float64)
    return list(columns), list(w), shape
