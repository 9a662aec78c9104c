"""Recalibrate: population statistics in place of running averages ("precise BN")."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jbn.nnx import _assign
from jbn.running import widened
from jbn.tools._convert import convert_nnx, swapping
from jbn.tools.layers import Where, check_variables, chosen
from jbn.tools.norms import Also, Norms, check_statistics
from jbn.typing import Moments


State = TypeVar("State", bound=Mapping | nnx.Module)
T = TypeVar("T")


def recalibrate(
    apply: Callable[[Any, Any], Any],
    variables: State,
    batches: Iterable[Any],
    *,
    where: Where = None,
    also: Also = None,
    passes: int | None = 1,
) -> State:
    """Replaces running statistics by the exact statistics of the data ("precise BN").

    Running averages lag behind the parameters, weight all batches equally, and forget
    old ones. Statistics of a few thousand examples, taken with the current parameters,
    close much of the gap between training and evaluation: after a run with few steps,
    for averaged weights (SWA, EMA), or for a new domain. The moments of all batches are
    merged, so a partial batch counts by its rows.

    With `apply` in training mode one pass is enough: layers normalize by the batch, as
    in training. So the inputs of all layers after the first, and their statistics,
    depend on how the data is split into batches. With `apply` in inference mode they do
    not: each pass normalizes by the statistics of the previous pass, and makes one more
    layer exact. After as many passes as the longest chain of layers has norms, the
    result does not depend on order, batch size or partition. `passes=None` repeats
    until nothing changes, which takes one more pass.

    Args:
        apply: For Linen, a function of variables and a batch that returns the result of
            `model.apply(variables, ..., mutable=["batch_stats"])`. For NNX, a function
            of a model and a batch that calls the model. It passes masks, weights and
            domains to the model as usual. It is compiled once per batch shape, and must
            not be jitted itself.
        variables: Linen's variables, with `batch_stats`; or an NNX model.
        batches: The data; iterated `passes` times.
        where: The layers, as for `convert`; by default all.
        also: Other people's batch norms, as for `convert`.
        passes: Number of passes over the data. `None`, with `apply` in inference mode:
            until the statistics do not change.

    Returns:
        New variables, or a copy of the model, where only the running statistics differ.
        A layer used several times has the statistics of all its inputs. Features
        without any row, and frozen layers, keep their statistics.

    Raises:
        TypeError: If `variables` is neither.
        ValueError: If `apply` does not return updated variables, if no layer matches,
            if there are no batches or they cannot be iterated again, or if `passes` is
            below 1.

    Example:
        >>> import jbn.linen
        >>> layer = jbn.linen.BatchNorm(use_running_average=False)
        >>> data = [jnp.array([[0.0], [2.0]]), jnp.array([[4.0]])]
        >>> variables = layer.init(jax.random.key(0), data[0])
        >>> apply = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])
        >>> new = recalibrate(apply, variables, data)
        >>> print(new["batch_stats"]["mean"], new["batch_stats"]["var"].round(3))
        [2.] [2.667]

    References:
        Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
        https://arxiv.org/abs/2105.07576
    """
    make = recalibrator(apply, where=where, also=also, passes=passes)
    return make(variables, batches)


def recalibrator(
    apply: Callable[[Any, Any], Any],
    *,
    where: Where = None,
    also: Also = None,
    passes: int | None = 1,
) -> Callable[[State, Iterable[Any]], State]:
    """Makes a function like `recalibrate` that compiles only once.

    Args:
        apply: As for `recalibrate`, like the rest.
        where: The layers.
        also: Other people's batch norms.
        passes: How many passes over the data.

    Returns:
        A function of variables and batches that returns new variables. The variables of
        all calls must have the same structure.

    Raises:
        ValueError: As `recalibrate` does, here or in the function.
    """
    if passes is not None and passes < 1:
        raise ValueError(f"`passes` must be at least 1; got {passes}.")
    made: list[Any] = []
    norms = Norms(also)

    def run(variables: State, batches: Iterable[Any]) -> State:
        if passes != 1 and isinstance(batches, Iterator):
            raise ValueError(
                "`batches` must be iterated once per pass; got an iterator, which is"
                " empty after one. Pass a list, or an object that makes new iterators."
            )
        if not made:
            made.append(_gatherer("recalibrate", apply, variables, where, norms, {}))
        (gather,) = made
        done = 0
        while passes is None or done < passes:
            new = with_moments(variables, gather(variables, iter(batches)), norms)
            settled = passes is None and _same(new, variables)
            variables, done = new, done + 1
            if settled:
                break
        return variables

    return run


def population(
    apply: Callable[[Any, Any], Any],
    variables: Mapping | nnx.Module,
    batches: Iterable[Any],
    *,
    where: Where = None,
    also: Also = None,
    **options: Any,
) -> dict[str, Moments]:
    """The moments of the input of each batch norm layer, merged over all batches.

    Args:
        apply: As for `recalibrate`, like the rest.
        variables: Linen's variables, or an NNX model; not changed.
        batches: The data.
        where: The layers.
        also: Other people's batch norms.
        **options: Arguments that override those of the layers, such as `tau`.

    Returns:
        Moments by the path of the layer, such as `encoder/norm`.

    Raises:
        TypeError: As `recalibrate` does.
        ValueError: As `recalibrate` does.
    """
    return moments_by_layer(
        "population", apply, variables, batches, where, Norms(also), options
    )


def moments_by_layer(
    caller: str,
    apply: Callable[[Any, Any], Any],
    variables: Mapping | nnx.Module,
    batches: Iterable[Any],
    where: Where,
    norms: Norms,
    options: Mapping[str, Any],
) -> dict[str, Moments]:
    """`population`, for the public function named `caller`."""
    gather = _gatherer(caller, apply, variables, where, norms, options)
    return gather(variables, iter(batches))


def with_moments(variables: State, found: Mapping[str, Moments], norms: Norms) -> State:
    """Variables, or a copy of a model, with the statistics in `found`."""
    if isinstance(variables, nnx.Module):
        model = nnx.clone(variables)
        layers = norms.in_nnx(model)
        for path, moments in found.items():
            layer, norm = layers[path]
            there = norm.variables(layer)
            old = {n: there[n][...] for n in Moments._fields if n in there}
            for name, value in _settled(old, moments).items():
                _assign(there[name], value)
        return model
    stats = variables["batch_stats"]
    nodes = norms.nodes(stats)
    new = {}
    for path, moments in found.items():
        key = tuple(path.split("/")) if path else ()
        new[key] = {**nodes[key], **_settled(nodes[key], moments)}
    return {**variables, "batch_stats": norms.with_nodes(stats, new)}  # pyright: ignore[reportReturnType]


def _settled(old: Mapping, moments: Moments) -> dict[str, jax.Array]:
    """The new statistics; the old ones where the moments have weight zero."""
    settled = {}
    for name, new in moments._asdict().items():
        if name in old:
            stat = widened(old[name], new)
            settled[name] = jnp.where(moments.weight > 0, new.astype(stat.dtype), stat)
    return settled


def _same(new: Any, old: Any) -> bool:
    """Whether all statistics are bitwise equal."""
    trees = [
        nnx.state(v, nnx.BatchStat) if isinstance(v, nnx.Module) else v["batch_stats"]
        for v in (new, old)
    ]
    pairs = zip(*map(jax.tree.leaves, trees), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def unjitted(apply: Any) -> Any:
    """The function under `jit`, whose cache does not know of replaced layers."""
    if isinstance(apply, jax.stages.Wrapped) and hasattr(apply, "__wrapped__"):
        return apply.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]
    return apply


def _gatherer(
    caller: str,
    apply: Callable[[Any, Any], Any],
    variables: Any,
    where: Where,
    norms: Norms,
    options: Mapping,
) -> Callable[[Any, Iterator[Any]], dict[str, Moments]]:
    """Makes a function of variables and batches that returns the layers' moments.

    It traces `apply` once per batch shape, however often it is called.
    """
    apply = unjitted(apply)
    check_variables(variables)
    if isinstance(variables, nnx.Module):
        gather = _nnx_gatherer(caller, apply, where, norms, options)
    else:
        check_statistics(caller, variables)
        gather = _linen_gatherer(caller, apply, where, norms, options)

    def gather_some(variables, batches):
        found = gather(variables, batches)
        if not found:
            raise ValueError(
                f"`{caller}` found no batch norm layer that updates its statistics;"
                f' {where=}. With Linen `apply` must pass `mutable=["batch_stats"]`'
                " and return the result, without `jit` inside."
            )
        return found

    return gather_some


def batch_stats_of(result: Any) -> Mapping:
    """The statistics in what `apply` returns for Linen's variables."""
    if not (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[1], Mapping)
        and "batch_stats" in result[1]
    ):
        raise ValueError(
            "`apply` must return what Linen's `model.apply(variables, ...,"
            ' mutable=["batch_stats"])` returns: the output and the updated'
            f" variables; got {type(result).__name__}."
        )
    return result[1]["batch_stats"]


def _linen_gatherer(caller, apply, where, norms, options):
    options = {"accumulate": True, "update_stats": True, **options}

    def run(variables, batch):
        with swapping(caller, None, where, norms, options, ("epsilon",)):
            return batch_stats_of(apply(variables, batch))

    step = jax.jit(run)
    empty: dict[tuple[str, ...], Any] = {}

    def gather(variables, batches):
        first = _first(batches)
        # Nothing pending from before, and a structure that does not change.
        nodes = {
            path: {k: v for k, v in node.items() if k != "pending"}
            for path, node in norms.nodes(variables["batch_stats"]).items()
        }
        stats = norms.with_nodes(variables["batch_stats"], nodes)
        if not empty:
            # (A new function, so that the trace does not come from a cache.)
            shapes = jax.eval_shape(
                lambda *args: run(*args), {**variables, "batch_stats": stats}, first
            )
            for path, node in norms.nodes(shapes).items():
                if "pending" in node:
                    zeros = lambda v: jnp.zeros(v.shape, v.dtype)
                    empty[path] = jax.tree.map(zeros, node["pending"])
        nodes = {path: {**nodes[path], "pending": empty[path]} for path in empty}
        stats = norms.with_nodes(stats, nodes)
        stats = reduce_batches(
            lambda stats, batch: step({**variables, "batch_stats": stats}, batch),
            stats,
            itertools.chain([first], batches),
        )
        return {
            "/".join(path): Moments(**node["pending"])
            for path, node in norms.nodes(stats).items()
            if "pending" in node
        }

    return gather


def _nnx_gatherer(caller, apply, where, norms, options):
    options = {"accumulate": True, "update_stats": True, **options}
    step = nnx.jit(lambda model, batch: (apply(model, batch), None)[1])

    def gather(model, batches):
        copy = convert_nnx(model, None, where, norms, options, caller, ("epsilon",))
        paths = [path for path in norms.in_nnx(model) if chosen(path, where)]
        layers = {path: layer for path, (layer, _) in Norms().in_nnx(copy).items()}
        for path in paths:
            for variable in layers[path].pending.values():
                variable[...] = jnp.zeros_like(variable[...])

        def pending(_, batch):
            step(copy, batch)
            return {
                path: Moments(**{k: v[...] for k, v in layers[path].pending.items()})
                for path in paths
            }

        return reduce_batches(
            pending, None, itertools.chain([_first(batches)], batches)
        )

    return gather


def reduce_batches(step: Callable[[T, Any], T], start: T, batches: Iterable[Any]) -> T:
    """`functools.reduce` that waits for the step before the last.

    Otherwise, batches that arrive faster than they are processed would all be on the
    devices, and virtual CPU devices hang with more than 32 programs in flight.
    """
    for batch in batches:
        before, start = start, step(start, batch)
        jax.block_until_ready(before)
    return start


def _first(batches: Iterator[Any]) -> Any:
    for batch in batches:
        return batch
    raise ValueError("`batches` must hold at least one batch; got none.")
