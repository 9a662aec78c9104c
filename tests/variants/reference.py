"""Every method by its definition, in plain JAX, for JAX to differentiate.

Imports nothing from jbn. A group or a domain is the whole batch with the weights of
all other rows at zero, and what has no weight is left out by multiplication, so that
`x` has to be finite: this is the textbook, to be run in float64.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient


class Affine(NamedTuple):
    """Scale and bias: of features, of domains or classes in front, or of elements."""

    scale: Any
    bias: Any


class Running(NamedTuple):
    mean: Any
    var: Any


def moments(x, weights, axis: int | tuple[int, ...] = -1):
    """Weight, mean and biased variance of each feature."""
    table = _Table(x.shape, axis)
    stats = _moments(table.elements(x), table.elements(weights))
    return tuple(stat.reshape(table.features) for stat in stats)


def batch_norm(x, affine, running, *, weights, epsilon, axis=-1, **settings):
    table = _Table(x.shape, axis)
    y, new = _batch_norm(
        table.elements(x),
        table.elements(weights),
        table.affine(affine),
        table.running(running),
        epsilon=epsilon,
        **settings,
    )
    return table.back(y), table.stats(new)


def batch_renorm(
    x, affine, running, *, weights, epsilon, r_max, d_max, axis=-1, **settings
):
    """Ioffe (2017), algorithm 1."""
    table = _Table(x.shape, axis)
    x, w = table.elements(x), table.elements(weights)
    affine, before = table.affine(affine), table.running(running)
    y, new = _batch_norm(x, w, affine, before, epsilon=epsilon, **settings)
    if settings.get("use_running_average"):
        return table.back(y), table.stats(new)
    before = stop_gradient(before)
    w = _trimmed(x, w, before, epsilon, settings.get("trim"))
    total, mean, var = _moments(x, w)
    sd, running_sd = jnp.sqrt(var + epsilon), jnp.sqrt(before.var + epsilon)
    r = stop_gradient(jnp.clip(sd / running_sd, 1 / r_max, r_max))
    d = stop_gradient(jnp.clip((mean - before.mean) / running_sd, -d_max, d_max))
    renormalized = ((x - mean) / sd * r + d) * affine.scale + affine.bias
    return table.back(jnp.where(total > 0, renormalized, y)), table.stats(new)


def ghost_batch_norm(
    x,
    affine,
    running,
    *,
    weights,
    epsilon,
    num_groups,
    devices=1,
    axis=-1,
    **settings,
):
    """Each group, on each device, is a batch; the running statistics see them all."""
    table = _Table(x.shape, axis)
    x, w = table.elements(x), table.elements(weights)
    affine, before = table.affine(affine), table.running(running)
    y, new = _batch_norm(x, w, affine, before, epsilon=epsilon, **settings)
    if not settings.get("use_running_average") and len(x):
        share = len(x) // devices
        size = -(-share // num_groups)
        device, place = np.divmod(np.arange(len(x)), share)
        ids = (device * num_groups + place // size)[:, None, None]
        num = devices * num_groups
        y, _ = _each(ids, x, w, affine, _repeated(before, num), epsilon, settings)
    return table.back(y), table.stats(new)


def domain_batch_norm(
    x, affine, running, *, weights, epsilon, domain, axis=-1, **settings
):
    """Each domain is a batch; a row of none is normalized as if of the last one."""
    table = _Table(x.shape, axis)
    num = len(running.mean)
    running = Running(*(v.reshape(num, 1, 1, -1) for v in running))
    scale, bias = (p.reshape(-1, 1, 1, table.table[-1]) for p in affine)
    y, new = _each(
        table.ids(domain),
        table.elements(x),
        table.elements(weights),
        Affine(*(jnp.broadcast_to(p, (num, *p.shape[1:])) for p in (scale, bias))),
        running,
        epsilon,
        settings,
    )
    stats = Running(*(v.reshape(num, *table.features) for v in new))
    return table.back(y), stats


def conditional_batch_norm(
    x,
    affine,
    running,
    *,
    weights,
    epsilon,
    labels=None,
    one_plus=False,
    axis=-1,
    **settings,
):
    """Scale and bias are looked up for each element first."""
    table = _Table(x.shape, axis)
    if labels is None:
        scale, bias = map(table.elements, affine)
    else:
        chosen = table.ids(labels)[:, :, 0]
        scale, bias = (p.reshape(len(p), -1)[chosen] for p in affine)
    y, new = _batch_norm(
        table.elements(x),
        table.elements(weights),
        Affine(1 + scale if one_plus else scale, bias),
        table.running(running),
        epsilon=epsilon,
        **settings,
    )
    return table.back(y), table.stats(new)


def frozen_batch_norm(
    x,
    affine,
    running,
    *,
    use_running_average=None,
    freeze_affine=True,
    freeze_stats=True,
    freeze_mode=True,
    **settings,
):
    return batch_norm(
        x,
        stop_gradient(affine) if freeze_affine else affine,
        running,
        use_running_average=freeze_mode or use_running_average,
        update_stats=not freeze_stats and use_running_average is False,
        **settings,
    )


class _Table:
    """Arrays of any shape, seen as images, places in them, and features."""

    def __init__(self, shape, axis):
        given = axis if isinstance(axis, tuple) else (axis,)
        self.shape = shape
        self.last = sorted(a % len(shape) for a in given)
        self.first = [a for a in range(len(shape)) if a not in self.last]
        self.features = tuple(shape[a] for a in self.last)
        self.rows = tuple(shape[a] for a in self.first)
        places = int(np.prod(self.rows[1:]))
        self.table = (self.rows[0], places, int(np.prod(self.features)))

    def elements(self, v):
        """One entry per element."""
        v = jnp.broadcast_to(v, self.shape)
        return v.transpose(*self.first, *self.last).reshape(self.table)

    def ids(self, v):
        """One integer per row, from one for each of its leading axes."""
        v = jnp.asarray(v)
        v = v.reshape(v.shape + (1,) * (len(self.rows) - v.ndim))
        return jnp.broadcast_to(v, self.rows).reshape(*self.table[:2], 1)

    def affine(self, affine):
        return Affine(*(p.reshape(1, 1, -1) for p in affine))

    def running(self, running):
        return Running(*(v.reshape(1, 1, -1) for v in running))

    def back(self, y):
        """From elements to the shape of the input."""
        y = y.reshape(*self.rows, *self.features)
        return y.transpose(*np.argsort([*self.first, *self.last]))

    def stats(self, stats):
        return Running(*(v.reshape(self.features) for v in stats))


def _each(ids, x, w, affine, running, epsilon, settings):
    """Every row by the statistics of its own kind; a row of none by the last kind's."""
    num = len(running.mean)
    kinds = jnp.arange(num)

    def one(kind, affine, running):
        own = jnp.where(ids == kind, w, 0)
        return _batch_norm(x, own, affine, running, epsilon=epsilon, **settings)

    shared = affine.scale.ndim == x.ndim
    outputs, new = jax.vmap(one, (0, None if shared else 0, 0))(kinds, affine, running)
    chosen = jnp.where((ids >= 0) & (ids < num), ids, num - 1)
    kinds = kinds.reshape(-1, 1, 1, 1)
    return jnp.where(chosen[None] == kinds, outputs, 0).sum(0), new


def _repeated(running, num):
    return Running(*(jnp.broadcast_to(v, (num, *v.shape)) for v in running))


def _batch_norm(
    x,
    w,
    affine,
    running,
    *,
    epsilon,
    use_running_average=False,
    update_stats=None,
    momentum=0.99,
    tau=0.0,
    trim=None,
    min_weight=0,
):
    if update_stats is None:
        update_stats = not use_running_average
    before = stop_gradient(running)
    w = _trimmed(x, w, before, epsilon, trim)
    total, mean, var = _moments(x, w)
    total = jnp.where(total > min_weight, total, 0)
    new = _folded(before, total, mean, var, momentum) if update_stats else running
    if use_running_average:
        return _normalize(x, running, affine, epsilon), new
    if tau:
        effective = total**2 / _or_one((w**2).sum((0, 1), keepdims=True))
        a = effective / (effective + tau)
        var = (1 - a) * before.var + a * var + a * (1 - a) * (mean - before.mean) ** 2
        mean = (1 - a) * before.mean + a * mean
    mean = jnp.where(total > 0, mean, before.mean)
    var = jnp.where(total > 0, var, before.var)
    return _normalize(x, Running(mean, var), affine, epsilon), new


def _moments(x, w):
    total = w.sum((0, 1), keepdims=True)
    mean = (w * x).sum((0, 1), keepdims=True) / _or_one(total)
    var = (w * (x - mean) ** 2).sum((0, 1), keepdims=True) / _or_one(total)
    return total, mean, var


def _normalize(x, stats, affine, epsilon):
    xh = (x - stats.mean) / jnp.sqrt(stats.var + epsilon)
    return xh * affine.scale + affine.bias


def _folded(before, total, mean, var, momentum):
    after = Running(
        momentum * before.mean + (1 - momentum) * mean,
        momentum * before.var + (1 - momentum) * var,
    )
    after = jax.tree.map(lambda a, b: jnp.where(total > 0, a, b), after, before)
    return stop_gradient(after)


def _trimmed(x, w, before, epsilon, trim):
    """Without what is far away, unless that is most of the weight of a feature."""
    if trim is None:
        return w
    near = abs(x - before.mean) <= trim * jnp.sqrt(before.var + epsilon)
    of_near = jnp.where(near, w, 0).sum((0, 1), keepdims=True)
    describes = 2 * of_near >= w.sum((0, 1), keepdims=True)
    return jnp.where(describes & ~near, 0, w)


def _or_one(total):
    return jnp.where(total > 0, total, 1)
