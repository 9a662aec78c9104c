"""Recalibrate: population statistics in place of running averages ("precise BN")."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jbn.tools.convert import convert, converting
from jbn.tools.layers import Where, chosen, nnx_norms, stats_nodes, with_nodes
from jbn.typing import Moments


State = TypeVar("State", bound=Mapping | nnx.Module)


def recalibrate(
    apply: Callable[[Any, Any], Any],
    variables: State,
    batches: Iterable[Any],
    *,
    where: Where = None,
    passes: int | None = 1,
) -> State:
    """Replaces running statistics by those of the data, exactly ("precise BN").

    Running averages trail the parameters, weigh batches alike and forget. The
    statistics of the parameters as they are, over all rows of some thousand examples,
    close much of the gap between training and evaluation: after a run with few steps,
    for averaged weights (SWA, EMA), for a new domain. The moments of all batches are
    merged, so a partial batch counts by its rows.

    With `apply` in training mode one pass does: every layer's input is normalized by
    its batch, as in training. That input, and with it the statistics of all layers but
    the first, depends on how the data is cut into batches. With `apply` in inference
    mode it does not: each pass normalizes by the statistics of the pass before, and
    makes one more layer exact. After as many passes as there are layers one behind the
    other (`passes=None`) the result is independent of order, batch size and partition.

    Args:
        apply: For Linen, a function of variables and a batch that returns what
            `model.apply(variables, ..., mutable=["batch_stats"])` returns. For NNX, a
            function of a model and a batch that calls the model. Masks, weights, mapped
            axes and domains are those of the model's own calls. Is jitted.
        variables: Linen's variables, with `batch_stats`; or an NNX model.
        batches: The data; iterated `passes` times.
        where: Which layers, as for `convert`; by default all.
        passes: How many passes over the data; `None`: one for each layer.

    Returns:
        New variables, or a copy of the model, with other running statistics and all the
        rest as it was. A layer used several times has the statistics of all its
        inputs. A feature that has seen nothing keeps its own. Frozen layers do, too.

    Raises:
        TypeError: If `variables` are neither.
        ValueError: If `apply` does not return updated variables, if no layer is meant,
            if there are no batches, or they cannot be iterated again.

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
    if passes is None:
        passes = max(1, len(layer_paths(apply, variables, batches, where=where)))
    if passes > 1 and iter(batches) is batches:
        raise ValueError(
            "`batches` must be iterated once for each pass; got an iterator, which is"
            " then empty. Pass a list, or an object that makes a new iterator."
        )
    for _ in range(passes):
        found = population(apply, variables, batches, where=where)
        variables = with_moments(variables, found)
    return variables


def population(
    apply: Callable[[Any, Any], Any],
    variables: Mapping | nnx.Module,
    batches: Iterable[Any],
    *,
    where: Where = None,
    **options: Any,
) -> dict[str, Moments]:
    """The moments of what each batch norm layer sees, merged over all batches.

    Args:
        apply: As for `recalibrate`, like the rest.
        variables: Linen's variables, or an NNX model; not changed.
        batches: The data.
        where: Which layers.
        **options: Arguments of the layers in place of their own, such as `tau`.

    Returns:
        Moments by the path of the layer, as `encoder/norm`.

    Raises:
        TypeError: As `recalibrate` does.
        ValueError: As `recalibrate` does.
    """
    gather = _gather_nnx if isinstance(variables, nnx.Module) else _gather_linen
    found = gather(apply, variables, iter(batches), where, options)
    if not found:
        raise ValueError(
            f"No batch norm layer was found that updates its statistics; {where=}. With"
            ' Linen `apply` must pass `mutable=["batch_stats"]` and return the result.'
        )
    return found


def layer_paths(
    apply: Callable[[Any, Any], Any],
    variables: Mapping | nnx.Module,
    batches: Iterable[Any],
    *,
    where: Where = None,
) -> list[str]:
    """The layers meant, in the order of their calls (NNX: of their definition)."""
    if isinstance(variables, nnx.Module):
        return [p for p in nnx_norms(variables) if chosen(p, where)]
    batch = _first(iter(batches))
    with converting(where=where) as paths:
        jax.eval_shape(apply, variables, batch)
    return paths


def with_moments(variables: State, found: Mapping[str, Moments]) -> State:
    """Variables, or a copy of a model, with the statistics in `found`."""
    if isinstance(variables, nnx.Module):
        model = nnx.clone(variables)
        layers = nnx_norms(model)
        for path, moments in found.items():
            layer = layers[path]
            old = {name: getattr(layer, name)[...] for name in ("mean", "var")}
            for name, value in _settled(old, moments).items():
                getattr(layer, name)[...] = value
            if getattr(layer, "weight", None) is not None:
                layer.weight[...] = moments.weight
        return model
    nodes = stats_nodes(variables["batch_stats"])
    new = {}
    for path, moments in found.items():
        key = tuple(path.split("/")) if path else ()
        new[key] = {**nodes[key], **_settled(nodes[key], moments)}
        if "weight" in nodes[key]:
            new[key]["weight"] = moments.weight
    return {**variables, "batch_stats": with_nodes(variables["batch_stats"], new)}  # pyright: ignore[reportReturnType]


def _settled(old: Mapping, moments: Moments) -> dict[str, jax.Array]:
    """Mean and variance, the old ones where the moments have no weight."""
    return {
        name: jnp.where(
            moments.weight > 0,
            getattr(moments, name).astype(old[name].dtype),
            old[name],
        )
        for name in ("mean", "var")
    }


def _gather_linen(apply, variables, batches, where, options) -> dict[str, Moments]:
    if not isinstance(variables, Mapping):
        raise TypeError(
            "`variables` must be Linen's variables, a dict with `params` and"
            f" `batch_stats`, or an NNX model; got {type(variables).__name__}."
        )

    @jax.jit
    def step(variables, batch):
        with converting(where=where, accumulate=True, update_stats=True, **options):
            result = apply(variables, batch)
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

    current = dict(variables)
    batch = _first(batches)
    current["batch_stats"] = step(current, batch)
    for batch in batches:
        current["batch_stats"] = step(current, batch)
    return {
        "/".join(path): Moments(**node["pending"])
        for path, node in stats_nodes(current["batch_stats"]).items()
        if "pending" in node
    }


def _gather_nnx(apply, model, batches, where, options) -> dict[str, Moments]:
    paths = [p for p in nnx_norms(model) if chosen(p, where)]
    if not paths:
        return {}
    model = convert(model, where=where, accumulate=True, update_stats=True, **options)
    step = nnx.jit(lambda model, batch: (apply(model, batch), None)[1])
    step(model, _first(batches))
    for batch in batches:
        step(model, batch)
    layers = nnx_norms(model)
    return {
        path: Moments(**{k: v[...] for k, v in layers[path].pending.items()})
        for path in paths
    }


def _first(batches) -> Any:
    try:
        return next(iter(batches))
    except StopIteration:
        raise ValueError("`batches` must hold at least one batch; got none.") from None
