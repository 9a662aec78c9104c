"""Adapt while predicting: statistics that follow a stream, balanced by class."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jbn
from jbn._moments import merge_stacked
from jbn.ops import numeric
from jbn.running import make_rule, update
from jbn.tools._adapt import running
from jbn.tools._convert import convert_nnx, swapping
from jbn.tools._recalibrate import batch_stats_of, unjitted, with_moments
from jbn.tools.layers import Where, check_variables, chosen
from jbn.tools.norms import Also, Norms, check_statistics
from jbn.typing import ArrayLike, BatchStats, Moments


# A layer that has too few rows for any statistics is normalized by the running ones,
# in training mode too, and `accumulate` gathers the moments of these rows nevertheless.
_OPTIONS = {"accumulate": True, "update_stats": True, "min_weight": np.inf}


# A number, one for each feature, or these by the path of the layer.
Tau = float | int | ArrayLike | Mapping[str, Any]
TauRule = Callable[[Mapping[str, Moments], Mapping[str, BatchStats]], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """What `stream` carries from batch to batch; a pytree of arrays.

    Attributes:
        variables: What the next batch is predicted with: Linen's variables, or the
            state of an NNX model.
        source: Statistics of the trained network, by the path of the layer.
        classes: Those of each class, of shape (classes, *features).
        seen: How many examples each class has had, of shape (classes,).
        graph: The NNX model without its arrays; `None` for Linen.
    """

    variables: Any
    source: dict[str, BatchStats]
    classes: dict[str, BatchStats]
    seen: jax.Array
    graph: Any = dataclasses.field(metadata={"static": True})


class Stream(NamedTuple):
    """The functions that `stream` makes.

    Attributes:
        init: From variables (or an NNX model) and a batch, of which only the shapes
            matter, to the first state.
        step: From state and batch to the new state and the outputs for the batch. Pure:
            it may be jitted, and scanned over batches.
        variables: From a state to Linen's variables, or an NNX model, to be used in
            inference mode.
    """

    init: Callable[[Any, Any], StreamState]
    step: Callable[[StreamState, Any], tuple[StreamState, Any]]
    variables: Callable[[StreamState], Any]


def empirical_bayes(
    now: Mapping[str, Moments], source: Mapping[str, BatchStats]
) -> jax.Array:
    """Computes `tau` for `stream` from the distance between stream and source.

    With d the distance of the mixture from the source, in standard deviations,

        d**2 = average over layers of
               sum(abs(mean - mean_source)**2 + (std - std_source)**2) / sum(var_source)
        tau = 1 / d**2

    where sums are over features; it is the squared Wasserstein distance of normal
    distributions. The mean of n examples has a squared error of about 1 / n variances.
    If shifts have a variance of d**2, the best estimate gives the stream a weight of
    n / (n + 1 / d**2). So the source's statistics change little if the stream differs
    from it only by chance.

    Args:
        now: Mean and variance of the mixture, by the path of the layer.
        source: The same of the source.

    Returns:
        `tau`, a scalar; infinite if nothing has moved.

    Example:
        >>> now = {"norm": jbn.Moments(jnp.ones(2), jnp.full(2, 0.5), jnp.ones(2))}
        >>> source = {"norm": jbn.BatchStats(jnp.zeros(2), jnp.ones(2))}
        >>> empirical_bayes(now, source).item()
        4.0

    References:
        Efron and Morris, "Stein's Estimation Rule and Its Competitors: An Empirical
        Bayes Approach", 1973. https://doi.org/10.1080/01621459.1973.10481350
    """
    distances = []
    for path, (_, mean, var) in now.items():
        old = source[path]
        moved = numeric.abs_square(mean - old.mean)
        moved += numeric.abs_square(jnp.sqrt(var) - jnp.sqrt(old.var))
        # A layer without any variance has no scale to measure by.
        total = old.var.sum()
        distances.append(moved.sum() / jnp.where(total > 0, total, jnp.inf))
    return len(distances) / jnp.sum(jnp.stack(distances))


def stream(
    apply: Callable[[Any, Any], Any],
    *,
    momentum: float | int | ArrayLike = 0.99,
    tau: Tau | TauRule = empirical_bayes,
    shares: Callable[[Any], jax.Array] = jax.nn.softmax,
    where: Where = None,
    also: Also = None,
) -> Stream:
    """Adapts a network to a stream of data without labels, batch by batch.

    A batch of a stream may hold one class only, so its statistics are not those of the
    data. Here each class has running statistics in every layer, which start as the
    source's, and a layer is normalized by their mixture, in which classes count alike.
    With p the shares of an example in the classes, which are the predicted
    probabilities, and n the sum of p for a class over the batch,

        mean_class = momentum**n * mean_class + (1 - momentum**n) * (mean of the batch
                     with weights p), and the variance with the scatter of both means
        mean = average of mean_class
        var = average of (var_class + abs(mean_class - mean)**2)

    So a stream that is sorted by class moves one class at a time, and the others are
    not forgotten. NOTE and RoTTA balance a memory of examples by predicted class; here
    the memory holds moments, which takes one forward pass a batch and no further one.

    A batch is predicted with the statistics of the batches before it.

    Args:
        apply: As for `recalibrate`, running the model in inference mode. It is given
            one example at a time, as a batch of one, under `vmap`. Its output (for
            Linen, the first of the two that it returns) has the batch in front.
        momentum: Weight of the old statistics of a class after one more example of it.
            The memory is some `1 / (1 - momentum)` examples of each class.
        tau: Weight of the source's statistics, in examples. The weight of the mixture
            is the number of examples so far, or that of the memory if it is smaller;
            see `jbn.shrink`. A number, one for each feature, or a dict of these by the
            path of the layer. Or a function that returns one of these; it is called
            with the statistics of the mixture and of the source, both by path. May be
            traced. By default, the further the stream is from the source, the smaller
            is `tau`; see `empirical_bayes`.
        shares: Function of the outputs for a batch: the shares of the examples in the
            classes, non-negative and of shape (batch, classes). By default the outputs
            are logits. `lambda y: jax.nn.one_hot(y.argmax(-1), 10)` counts an example
            for the predicted class alone; `lambda y: jnp.ones((len(y), 1))` has no
            classes, for other tasks than classification. An example without shares, or
            with one that is not finite, does not count.
        where: Which layers, as for `convert`; by default all.
        also: Other people's batch norms, as for `convert`.

    Returns:
        `Stream(init, step, variables)`. `init` raises a `TypeError` if the variables
        are neither Linen's nor an NNX model, and a `ValueError` if no layer is meant,
        if `apply` does not return updated variables, or if the shapes of outputs,
        shares or `tau` do not fit.

    Raises:
        ValueError: If `momentum` is known to be outside of 0 to 1.

    Example:
        >>> import jbn.linen
        >>> layer = jbn.linen.BatchNorm(use_running_average=True)
        >>> data = 4 + jax.random.normal(jax.random.key(0), (32, 16, 2))
        >>> variables = layer.init(jax.random.key(1), data[0])
        >>> apply = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])
        >>> adapter = stream(apply)
        >>> state = adapter.init(variables, data[0])
        >>> state, outputs = jax.lax.scan(adapter.step, state, data)
        >>> outputs.shape, adapter.variables(state)["batch_stats"]["mean"].round()
        ((32, 16, 2), Array([4., 4.], dtype=float32))

    References:
        Gong et al., "NOTE: Robust Continual Test-time Adaptation Against Temporal
        Correlation", 2022. https://arxiv.org/abs/2208.05117
        Yuan, Xie and Li, "Robust Test-Time Adaptation in Dynamic Scenarios", 2023.
        https://arxiv.org/abs/2303.13899
    """
    # Per example, so that batches of all sizes are alike. The variance of a class is
    # that of all its rows.
    rule = make_rule((), momentum, False, 1.0, True, tracked=False)
    apply, norms = unjitted(apply), Norms(also)

    def forward(graph, variables, batch):
        """Outputs for a batch, and each example's moments by layer."""
        gather = _from_linen if graph is None else _from_nnx

        def one(example):
            example = jax.tree.map(lambda v: v[None], example)
            model = _model(graph, variables)
            return gather(apply, model, example, where, norms)

        outputs, found = jax.vmap(one)(batch)
        for v in jax.tree.leaves(outputs):
            if v.shape[1:2] != (1,):
                raise ValueError(
                    "`apply` must return outputs with the batch in front; for a batch"
                    f" of one example it returned shape {v.shape[1:]}."
                )
        return jax.tree.map(lambda v: v[:, 0], outputs), found

    def init(variables, batch):
        check_variables(variables)
        if isinstance(variables, Mapping):
            check_statistics("stream", variables)
        source, graph = running(variables, norms), None
        if isinstance(variables, nnx.Module):
            graph, variables = nnx.split(variables)
        outputs, found = jax.eval_shape(
            lambda variables, batch: forward(graph, variables, batch), variables, batch
        )
        if not found:
            raise ValueError(
                "`stream` found no batch norm layer that updates its statistics;"
                f' {where=}. With Linen `apply` must pass `mutable=["batch_stats"]`'
                " and return the result, and nothing in it may be jitted."
            )
        shape = jax.eval_shape(shares, outputs).shape
        examples = jax.tree.leaves(batch)[0].shape[0]
        if len(shape) != 2 or shape[0] != examples:
            raise ValueError(
                "`shares` must return a row for each example and a column for each"
                f" class, shape ({examples}, classes); got {shape}. By default outputs"
                " are logits of this shape."
            )
        source = {
            path: BatchStats(
                source[path].mean.astype(moments.mean.dtype),
                source[path].var.astype(moments.var.dtype),
            )
            for path, moments in found.items()
        }
        each_class = lambda v: jnp.broadcast_to(v, (shape[1], *v.shape))
        classes = jax.tree.map(each_class, source)
        return mixed(
            StreamState(variables, source, classes, jnp.zeros(shape[1]), graph)
        )

    def step(state, batch):
        outputs, found = forward(state.graph, state.variables, batch)
        p = shares(outputs).astype(jnp.float32)
        p = jnp.where(jnp.isfinite(p).all(1, keepdims=True), p, 0)
        classes = {}
        for path, moments in found.items():
            by_class = jax.vmap(_pooled, (None, 1))(moments, p)
            classes[path] = update(state.classes[path], by_class, rule)
        new = dataclasses.replace(state, classes=classes, seen=state.seen + p.sum(0))
        return mixed(new), outputs

    def mixed(state):
        """The state with the mixture of its classes in the variables."""
        # A class is remembered by so many examples at most.
        memory = jnp.minimum(state.seen, 1 / (1 - jnp.asarray(momentum, jnp.float32)))
        now = {}
        for path, classes in state.classes.items():
            share = jnp.full(classes.mean.shape, 1 / len(state.seen))
            now[path] = merge_stacked(Moments(share, classes.mean, classes.var))
        towards = tau(now, state.source) if callable(tau) else tau
        found = {
            path: jbn.shrink(
                moments,
                state.source[path],
                tau=_of_layer(towards, path),
                effective_weight=jnp.full(moments.mean.shape, memory.sum()),
            )
            for path, moments in now.items()
        }
        model = with_moments(_model(state.graph, state.variables), found, norms)
        if state.graph is not None:
            _, model = nnx.split(model)
        return dataclasses.replace(state, variables=model)

    def variables(state):
        return _model(state.graph, state.variables)

    return Stream(init, step, variables)


def _model(graph: Any, variables: Any) -> Any:
    """Linen's variables as they are; of NNX a model."""
    return variables if graph is None else nnx.merge(graph, variables, copy=True)


def _from_linen(apply, variables, example, where, norms):
    """Outputs of a Linen model, and the moments of each layer's input."""
    nodes = {
        path: {k: v for k, v in node.items() if k != "pending"}
        for path, node in norms.nodes(variables["batch_stats"]).items()
    }
    stats = norms.with_nodes(variables["batch_stats"], nodes)
    with swapping("stream", None, where, norms, _OPTIONS, ("epsilon",)):
        result = apply({**variables, "batch_stats": stats}, example)
    found = norms.nodes(batch_stats_of(result))
    return result[0], {
        "/".join(path): Moments(**node["pending"])
        for path, node in found.items()
        if "pending" in node
    }


def _from_nnx(apply, model, example, where, norms):
    """The same of an NNX model."""
    paths = [path for path in norms.in_nnx(model) if chosen(path, where)]
    copy = convert_nnx(model, None, where, norms, _OPTIONS, "stream", ("epsilon",))
    outputs = apply(copy, example)
    layers = Norms().in_nnx(copy)
    pending = {path: layers[path][0].pending for path in paths}
    return outputs, {
        path: Moments(**{k: v[...] for k, v in variables.items()})
        for path, variables in pending.items()
    }


def _of_layer(tau: Any, path: str) -> Any:
    """The `tau` of a layer."""
    if not isinstance(tau, Mapping):
        return tau
    if path not in tau:
        raise ValueError(
            f"`tau` has no entry for {path!r}; it has {[*tau]}. Give one for each"
            " layer that is meant, 0 for no shrinkage."
        )
    return tau[path]


def _pooled(parts: Moments, weights: jax.Array) -> Moments:
    """Parts along the first axis as one, each with a weight if it has any rows."""
    weights = weights.reshape(-1, *(1,) * (parts.mean.ndim - 1))
    weights = jnp.where(parts.weight > 0, weights, 0)
    return merge_stacked(parts._replace(weight=weights))
