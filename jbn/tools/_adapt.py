"""Adapt to shifted data: mix the statistics of the target with those of the source."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from flax import nnx

import jbn
from jbn.tools._recalibrate import State, moments_by_layer, with_moments
from jbn.tools.layers import Where
from jbn.tools.norms import Also, Norms
from jbn.typing import BatchStats, Moments


def adapt(
    apply: Callable[[Any, Any], Any],
    variables: State,
    batches: Iterable[Any],
    *,
    prior: float | int,
    where: Where = None,
    also: Also = None,
) -> State:
    """Mixes the statistics of new data into those of the source, without labels.

    With n rows of the target at a layer and a = n / (n + prior),

        mean = (1 - a) * source_mean + a * target_mean
        var = (1 - a) * source_var + a * target_var
              + a * (1 - a) * abs(source_mean - target_mean)**2

    which are the statistics of `prior` rows of the source and all rows of the target.
    (Published methods that blend variances omit the last term.) `prior=0` uses only the
    target (Nado et al., 2020; `recalibrate`), and infinity only the source.
    Rows are what a layer averages over: for images, n is their number times their
    pixels at that layer, so a prior of one image is often hundreds of rows.

    For a stream, adapt each batch from the source; or from the previous result, where
    the share of the source decays by a factor prior / (n + prior) per batch.

    To train scale and bias by the entropy of the predictions as well (TENT, Wang et
    al., 2021), start from the result, and only train the parameters that `kinds` labels
    `"norm"`.

    Args:
        apply: As for `recalibrate`, running the model in training mode.
        variables: Linen's variables, or an NNX model.
        batches: Target data. The input of each layer is normalized by the mixture of
            its own batch and the source.
        prior: Weight of the source, in rows of a layer.
        where: The layers; by default all.
        also: Other people's batch norms, as for `convert`.

    Returns:
        New variables, or a copy of the model, to be used in inference mode.

    Raises:
        TypeError: As `recalibrate` does.
        ValueError: If `prior` is negative, or as `recalibrate` does.

    Example:
        >>> import jax
        >>> import jbn.linen
        >>> layer = jbn.linen.BatchNorm(use_running_average=False)
        >>> x = jnp.array([[3.0], [5.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> apply = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])
        >>> new = adapt(apply, variables, [x], prior=2)
        >>> print(new["batch_stats"]["mean"], new["batch_stats"]["var"])
        [2.] [5.]

    References:
        Schneider et al., "Improving robustness against common corruptions by covariate
        shift adaptation", 2020. https://arxiv.org/abs/2006.16971
        Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness
        under Covariate Shift", 2020. https://arxiv.org/abs/2006.10963
        Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", 2021.
        https://arxiv.org/abs/2006.10726
    """
    prior = float(prior)
    if not prior >= 0:
        raise ValueError(f"`prior` must not be negative; got {prior}.")
    norms = Norms(also)
    found = moments_by_layer(
        "adapt", apply, variables, batches, where, norms, {"tau": prior}
    )
    source = running(variables, norms)
    mixed = {path: _mixed(m, source[path], prior) for path, m in found.items()}
    return with_moments(variables, mixed, norms)


def _mixed(target: Moments, source: BatchStats, prior: float) -> Moments:
    mixed = jbn.shrink(target, source, tau=jnp.float32(prior))
    if math.isinf(prior):
        return mixed._replace(weight=jnp.zeros_like(mixed.weight))
    weight = jnp.where(mixed.weight > 0, mixed.weight + prior, 0)
    return mixed._replace(weight=weight)


def running(variables: Any, norms: Norms) -> dict[str, BatchStats]:
    """The running statistics of each layer by its path."""
    if isinstance(variables, nnx.Module):
        found = {}
        for path, (layer, norm) in norms.in_nnx(variables).items():
            there = norm.variables(layer)
            found[path] = BatchStats(there["mean"][...], there["var"][...])
        return found
    return {
        "/".join(path): BatchStats(jnp.asarray(node["mean"]), jnp.asarray(node["var"]))
        for path, node in norms.nodes(variables["batch_stats"]).items()
    }
