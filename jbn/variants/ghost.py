"""Ghost batch norm (Hoffer, Hubara and Soudry, 2017), or virtual batches."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import axes, summary
from jbn._moments import as_moments
from jbn.axes import Layout, Rows
from jbn.call import Call, Stats, flag, prepare, run, thread
from jbn.options import Options, documented
from jbn.summary import Summary
from jbn.typing import ArrayLike, Moments, Params


AxisGroups = tuple[tuple[int, ...], ...]


@documented(Options)
def ghost_batch_norm(
    x: ArrayLike,
    params: Params | None,
    batch_stats: Stats,
    *,
    use_running_average: bool,
    num_groups: int,
    devices_per_group: int = 1,
    interleaved: bool = False,
    **options: Unpack[Options],
) -> tuple[jax.Array, Stats]:
    """Normalizes each of several groups of the batch by its own mean and variance.

    In training the batch is split into `num_groups` groups along its first axis, so
    that a large batch has the noise of a small one. The first axis is the first that is
    not a feature axis, and its entries (images, sequences) are not split. Groups are
    contiguous, with `ceil(n / num_groups)` entries each; if that does not divide the
    batch, the last groups have fewer, or none. If `interleaved`, a group is every
    `num_groups`-th entry instead, so that each group has a share of every part of a
    sorted or concatenated batch.

    Running statistics are those of the whole batch, exactly: the moments of the groups
    are merged, with the scatter of their means. At inference there are no groups.

    With `axis_name` each device splits its own rows, and groups do not cross devices.
    So normalization needs no communication, and one all-reduce merges the moments for
    the running statistics. With `devices_per_group`, groups cross devices: the first
    groups of that many consecutive devices form one group, their second groups another,
    and so on, which costs one more all-reduce each way. Under plain `jit` the groups
    are those of the whole batch. If their number is a multiple of the number of
    devices, each group stays on one device; any other number copies the batch to every
    device.

    Args:
        x: Input of shape (batch, ..., features, ...) and any floating or complex dtype.
        params: Scale and bias, one entry per feature; `None` leaves them out.
        batch_stats: Running mean and variance, one entry per feature, or `None`.
        use_running_average: `False` in training, `True` at inference.
        num_groups: Number of groups (on each device, with `axis_name`); static.
        devices_per_group: How many devices of `axis_name` share their groups; static.
            (`shard_map` has no groups of devices, so only 1 works there.)
        interleaved: Whether groups are interleaved along the axis; static. (Under plain
            `jit`, each group is then on all devices.)
        **options: As for `jbn.batch_norm`. A group of weight zero is normalized by the
            running statistics.

    Returns:
        The normalized array and the running statistics, as `jbn.batch_norm`.

    Raises:
        TypeError: If a number is not an integer, `interleaved` is not a boolean, or as
            `jbn.batch_norm` does.
        ValueError: If a number is below 1, if `x` has only feature axes, if
            `devices_per_group` does not divide the devices, or as `jbn.batch_norm`
            does.
        NameError: As `jbn.batch_norm` does.

    Example:
        >>> import jbn
        >>> x = jnp.array([[0.0], [2.0], [10.0], [30.0]])
        >>> _, stats = jbn.init(1)
        >>> y, stats = ghost_batch_norm(
        ...     x,
        ...     None,
        ...     stats,
        ...     use_running_average=False,
        ...     num_groups=2,
        ...     momentum=0.0,
        ... )
        >>> print(y.ravel().round(3), stats.mean, stats.var)
        [-1.  1. -1.  1.] [10.5] [140.75]

    References:
        Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the
        generalization gap in large batch training of neural networks", 2017, algorithm
        1 (where running statistics average those of the groups).
        https://arxiv.org/abs/1705.08741
    """
    num_groups = axes.size(num_groups, "num_groups")
    devices_per_group = axes.size(devices_per_group, "devices_per_group")
    interleaved = flag(interleaved, "interleaved")
    call = prepare(
        "ghost_batch_norm",
        x,
        params,
        batch_stats,
        use_running_average=use_running_average,
        **options,
    )
    if call.use_running_average:
        return run(thread, call)
    if not call.rows.axes:
        raise ValueError(
            "`ghost_batch_norm` splits the batch into groups along the first axis that"
            f" is not a feature axis, and `x`, of shape {call.lay.shape}, has none."
        )
    if not isinstance(call.lay.shape[call.rows.axes[0]], int):
        raise ValueError(
            "`ghost_batch_norm` splits the batch into groups, so its size must be known"
            f" in training; got shape {call.lay.shape}. Export with a fixed batch size."
        )
    over = _over_devices(call.rows, devices_per_group)
    return run(_ghosts, call, num_groups=num_groups, over=over, interleaved=interleaved)


def _ghosts(call: Call, *, num_groups: int, over: AxisGroups | None, interleaved: bool):
    """The body of ghost batch norm in training."""
    axis = call.rows.axes[0]
    grouped = _grouped(call, axis, num_groups, interleaved)
    groups = grouped.summarize()
    if over is None:
        y = grouped.by_batch(groups)
    else:
        here = Rows(grouped.rows.axes, call.rows.axis_name, over)
        shared = dataclasses.replace(grouped, rows=here)
        y = shared.by_batch(shared.summarize())
    if interleaved:
        y = jnp.swapaxes(y, axis, axis + 1)
    padded = y.shape[axis] * y.shape[axis + 1]
    y = y.reshape(*y.shape[:axis], padded, *y.shape[axis + 2 :])
    y = lax.slice_in_dim(y, 0, call.lay.shape[axis], axis=axis)
    if not call.update_stats:
        return y, None
    return y, call.updated(as_moments(_pooled(groups, call.rows, axis)))


def _grouped(call: Call, axis: int, num_groups: int, interleaved: bool) -> Call:
    """The call on an input with the groups as one more feature axis, at `axis`."""
    size = call.lay.shape[axis]
    group_size = -(-size // num_groups)
    padding = num_groups * group_size - size
    weights = call.weights
    if padding:
        shape = [size if a == axis else 1 for a in range(call.x.ndim)]
        if weights is None:
            weights = jnp.ones(shape, bool)
        elif weights.shape[axis] == 1:
            shape = jnp.broadcast_shapes(weights.shape, tuple(shape))
            weights = jnp.broadcast_to(weights, shape)

    def split(v: jax.Array) -> jax.Array:
        if v.shape[axis] != size:
            return jnp.expand_dims(v, axis)
        if padding:
            widths = [(0, padding if a == axis else 0) for a in range(v.ndim)]
            v = jnp.pad(v, widths)
        sizes = (group_size, num_groups) if interleaved else (num_groups, group_size)
        v = v.reshape((*v.shape[:axis], *sizes, *v.shape[axis + 1 :]))
        return jnp.swapaxes(v, axis, axis + 1) if interleaved else v

    x = split(call.x)
    moved = [a + (a >= axis) for a in call.lay.feature_axes]
    lay = Layout(tuple(x.shape), tuple(sorted([axis, *moved])))

    def among_groups(stat: jax.Array) -> jax.Array:
        return jnp.expand_dims(stat, axis)

    return dataclasses.replace(
        call,
        x=x,
        lay=lay,
        rows=Rows(lay.reduction_axes),
        weights=None if weights is None else split(weights),
        running=Moments(*map(among_groups, call.running)),
        scale=None if call.scale is None else among_groups(call.scale),
        bias=None if call.bias is None else among_groups(call.bias),
        tau=among_groups(call.tau) if np.ndim(call.tau) else call.tau,
        residual=None if call.residual is None else split(call.residual),
    )


def _over_devices(rows: Rows, size: int) -> AxisGroups | None:
    """Groups of `size` consecutive devices; `None` for one device each."""
    if size == 1:
        return None
    if rows.axis_name is None or rows.axis_index_groups is not None:
        raise ValueError(
            "`devices_per_group` splits the devices of `axis_name` into groups; got"
            f" axis_name={rows.axis_name!r} and"
            f" axis_index_groups={rows.axis_index_groups!r}."
        )
    devices = int(lax.axis_size(rows.axis_name))
    if devices % size:
        raise ValueError(
            f"`devices_per_group` must divide the number of devices, {devices}; got"
            f" {size}."
        )
    groups = np.arange(devices).reshape(-1, size).tolist()
    return tuple(map(tuple, groups))


def _pooled(groups: Summary, rows: Rows, axis: int) -> Summary:
    """Merges all groups on all devices."""
    # Weights that are the same in all groups have one entry.
    assert groups.weight is not None
    weight = jnp.broadcast_to(groups.weight, groups.var.shape)
    groups = groups._replace(weight=weight)
    whole = summary.merge(jax.tree.map(lambda v: jnp.moveaxis(v, axis, 0), groups))
    return summary.all_reduce(whole, rows)
