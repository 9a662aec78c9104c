"""Measure the running statistics of each layer against the moments of data."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.tools._recalibrate import moments_by_layer, reduce_batches, unjitted
from jbn.tools.layers import Where, check_variables, chosen
from jbn.tools.norms import Norm, Norms
from jbn.typing import Moments


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """The numbers of one layer, or of one domain of it.

    Attributes:
        layer: Path of the layer.
        domain: The domain, for layers with several.
        module: The layer, for its options.
        mean: Running mean of each feature; float64, like all other arrays.
        var: Running variance.
        scale: Scale of each feature, or the largest of a table by label; `None`
            without.
        bias: Likewise.
        batches: Number of batches with rows for it.
        rows: Mean weight of these batches; without weights, their mean number of rows.
        least_rows: The smallest weight of a batch.
        effective_rows: The number of independent rows in all batches, estimated from
            the scatter of the batches' means. Pixels of one image are not independent.
        updates: Estimated number of updates of the running statistics: from `step` or
            `weight` if the layer has them (with `debias` a lower bound, as the weight
            reaches 1), else from `initial`.
        initial: The share of the initial mean 0 and variance 1 in the running
            statistics, if that explains the difference.
        data_mean: Mean of the data.
        data_var: Variance of the data.
        within: Mean variance within batches.
        drift: Distance of the data's mean from the running mean, in running standard
            deviations (with epsilon): the error of the normalized output.
        ratio: Variance of the data divided by the running variance, both with epsilon.
        kl: Kullback-Leibler divergence in nats of N(data) from N(running), with these
            variances. 0 if and only if both agree.
        noise: The divergence expected by chance.
        running_noise: The part of `noise` due to the running average.
        finite: Features with finite statistics on both sides.
        dead: Constant features.
        judged: Features whose divergence is reliable.
    """

    layer: str
    domain: int | None
    module: Any
    mean: np.ndarray
    var: np.ndarray
    scale: np.ndarray | None
    bias: np.ndarray | None
    batches: int
    rows: float
    least_rows: float
    effective_rows: float
    updates: float | None
    initial: float | None
    data_mean: np.ndarray
    data_var: np.ndarray
    within: np.ndarray
    drift: np.ndarray
    ratio: np.ndarray
    kl: np.ndarray
    noise: np.ndarray
    running_noise: np.ndarray
    finite: np.ndarray
    dead: np.ndarray
    judged: np.ndarray

    @property
    def name(self) -> str:
        """Path and domain."""
        name = self.layer or "(the model)"
        return name if self.domain is None else f"{name}[{self.domain}]"

    def summary(self) -> dict[str, Any]:
        """Summary over the features, except dead and non-finite ones."""
        alive = self.finite & ~self.dead
        some = bool(alive.any())
        drift, kl = np.abs(self.drift[alive]), self.kl[alive]
        return {
            "layer": self.layer,
            "domain": self.domain,
            "num_features": len(self.kl),
            "num_dead": int(self.dead.sum()),
            "batches": self.batches,
            "rows": self.rows,
            "least_rows": self.least_rows,
            "effective_rows": self.effective_rows,
            "updates": self.updates,
            "drift_rms": float(np.sqrt(np.mean(drift**2))) if some else None,
            "drift_max": float(drift.max()) if some else None,
            "ratio_median": float(np.median(self.ratio[alive])) if some else None,
            "kl_mean": float(kl.mean()) if some else None,
            "kl_max": float(kl.max()) if some else None,
        }


def divergence(
    mean: np.ndarray, var: np.ndarray, other_mean: np.ndarray, other_var: np.ndarray
) -> np.ndarray:
    """KL(N(mean, var) || N(other_mean, other_var)) in nats, for each feature.

    (For complex means: of circular normal distributions, whose divergence is doubled.)

    Example:
        >>> one, two = np.array([1.0]), np.array([2.0])
        >>> print(divergence(two, one, one, one), divergence(one, two, one, two))
        [0.5] [0.]
    """
    half = 1.0 if np.iscomplexobj(mean) or np.iscomplexobj(other_mean) else 0.5
    # (Infinite if only one of the variances is zero.)
    with np.errstate(all="ignore"):
        ratio = var / other_var
        moved = np.abs(mean - other_mean) ** 2 / other_var
        return np.maximum(half * (ratio - 1 - np.log(ratio) + moved), 0)


def measure(
    apply: Callable[[Any, Any], Any],
    variables: Mapping | nnx.Module,
    batches: Iterable[Any],
    where: Where,
    norms: Norms,
) -> tuple[list[Measured], int]:
    """Runs the model on the batches; see `inspect`.

    Returns the layers in the order in which they run (NNX: are defined), with those
    that did not run at the end; and the number of batches.
    """
    check_variables(variables)
    iterator = iter(batches)
    some = list(itertools.islice(iterator, 1))
    if not some:
        raise ValueError("`batches` must hold at least one batch; got none.")
    if isinstance(variables, nnx.Module):
        graph, leaves = nnx.split(variables)
        rebuild = lambda leaves: nnx.merge(graph, leaves)
    else:
        leaves, rebuild = variables, lambda leaves: leaves

    def moments_of(leaves, batch):
        model = rebuild(leaves)
        return moments_by_layer("inspect", apply, model, [batch], where, norms, {})

    @jax.jit
    def step(seen, leaves, batch):
        found = moments_of(leaves, batch)
        return {path: _take_up(seen[path], found[path]) for path in found}

    # Traced again, without compiling, for the structure to start from.
    shapes = jax.eval_shape(moments_of, leaves, some[0])
    seen = {path: _nothing(moments) for path, moments in shapes.items()}

    def take_up(so_far, batch):
        seen, count = so_far
        return step(seen, leaves, batch), count + 1

    every = itertools.chain(some, iterator)
    seen, count = reduce_batches(take_up, (seen, 0), every)
    seen = jax.device_get(seen)
    layers = []
    for layer in _layers(apply, variables, some[0], where, norms):
        shape = layer.stats["var"].shape
        # Frozen layers have no pending moments.
        found = seen.get(layer.path) or _nothing(Moments(*[jnp.zeros(shape)] * 3))
        for domain in range(shape[0]) if isinstance(layer.module, _DOMAINS) else [None]:
            layers.append(_measured(layer, domain, found))
    return layers, count


_DOMAINS = (jbn.linen.DomainBatchNorm, jbn.nnx.DomainBatchNorm)


# The statistics of the batches.


def _nothing(like: Moments) -> dict[str, Any]:
    zeros = jax.tree.map(jnp.zeros_like, like)
    real = zeros.var
    return {
        "means": zeros,
        "vars": Moments(real, real, real),
        "squares": real,
        "least": jnp.full_like(real, jnp.inf),
        "batches": real,
    }


def _take_up(seen: dict[str, Any], moments: Moments) -> dict[str, Any]:
    """Adds one batch to the summary of earlier ones.

    Batches are summarized like rows. The variance of the batches' means and the mean of
    their variances add up to the variance of all rows, and the scatter of both gives
    their uncertainty.
    """
    weight, mean, var = moments
    none = jnp.zeros_like(var)
    some = weight > 0
    return {
        "means": jbn.merge(seen["means"], Moments(weight, mean, none)),
        "vars": jbn.merge(seen["vars"], Moments(weight, var, none)),
        "squares": seen["squares"] + jnp.square(weight),
        "least": jnp.minimum(seen["least"], jnp.where(some, weight, jnp.inf)),
        "batches": seen["batches"] + some.astype(var.dtype),
    }


# The variables of the model.


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A batch norm of either API; `module` is `None` if it did not run."""

    path: str
    module: Any
    stats: Mapping[str, np.ndarray]
    params: Mapping[str, np.ndarray]


_NAMES = ("mean", "var", "weight", "step", "scale", "bias")


def _layers(
    apply: Any, variables: Any, batch: Any, where: Where, norms: Norms
) -> list[_Layer]:
    if isinstance(variables, nnx.Module):
        found = []
        for path, (layer, norm) in norms.in_nnx(variables).items():
            if chosen(path, where):
                there = norm.variables(layer)
                values = {n: np.asarray(there[n][...]) for n in _NAMES if n in there}
                found.append(_Layer(path, norm.equivalent(layer), values, values))
        return found
    modules, words = {}, {}

    def record(next_call, args, kwargs, context):
        layer = context.module
        norm = norms.of(layer) if context.method_name == "__call__" else None
        if isinstance(norm, Norm):
            scope: Any = layer.scope
            path = tuple(scope.path)
            modules[path], words[path] = norm.equivalent(layer), norm
        return next_call(*args, **kwargs)

    apply = unjitted(apply)
    with nn.intercept_methods(record):
        # A new function, because JAX does not run a cached one again.
        jax.eval_shape(lambda *args: apply(*args), variables, batch)
    nodes = norms.nodes(variables.get("batch_stats", {}))
    found = []
    for path in [*modules, *(path for path in nodes if path not in modules)]:
        if path in nodes and chosen("/".join(path), where):
            params = variables.get("params", {})
            for name in path:
                params = params.get(name, {})
            norm = words.get(path, Norm())
            there = {n: params.get(norm.name(n)) for n in ("scale", "bias")}
            params = {n: value for n, value in there.items() if value is not None}
            # Metadata boxes, such as axes for sharding, are not needed here.
            both = nn.meta.unbox((nodes[path], params))
            stats, params = (
                {k: np.asarray(v) for k, v in tree.items() if k in _NAMES}
                for tree in both
            )
            found.append(_Layer("/".join(path), modules.get(path), stats, params))
    return found


# The comparison.

# Below this fraction of the layer's median variance a feature counts as constant.
_DEAD = 1e-10
# A variance that is not known within a factor of about two is not judged.
_UNSURE = 0.25
# The most that an explanation may leave, in nats, and a tenth of the total.
_EXPLAINED = 0.02


def _measured(layer: _Layer, domain: int | None, seen: Mapping[str, Any]) -> Measured:
    take = lambda value: _flat(value, domain)
    mean, var = take(layer.stats["mean"]), take(layer.stats["var"])
    epsilon = float(getattr(layer.module, "epsilon", 1e-5))
    momentum = getattr(layer.module, "momentum", None)
    total, squares = take(seen["means"].weight), take(seen["squares"])
    data_mean, between = take(seen["means"].mean), take(seen["means"].var)
    within, scatter = take(seen["vars"].mean), take(seen["vars"].var)
    data_var = within + between
    batches = int(take(seen["batches"]).max(initial=0))

    finite = np.isfinite(mean) & np.isfinite(var) & (var >= 0) & (total > 0)
    finite &= np.isfinite(data_mean) & np.isfinite(data_var)
    positive = data_var[finite & (data_var > 0)]
    least = _DEAD * np.median(positive) if positive.size else 0.0
    dead = finite & (data_var <= least)
    alive = finite & ~dead
    with np.errstate(all="ignore"):
        moved = (data_mean - mean) / np.sqrt(var + epsilon)
        drift = np.abs(moved) if np.iscomplexobj(moved) else moved
        ratio = (data_var + epsilon) / (var + epsilon)
        kl = divergence(data_mean, data_var + epsilon, mean, var + epsilon)
    drift, ratio, kl = (np.where(finite, v, np.nan) for v in (drift, ratio, kl))

    # The uncertainty of a batch's mean, and the relative one of its variance: from
    # their scatter over batches, `count` of equal weight, but at least that of
    # independent rows of a normal distribution.
    count = _ratio(total**2, squares)
    bessel = np.where(count > 1.5, _ratio(count, count - 1), 0)
    rows = _ratio(total, count)
    of_mean = between * bessel
    design = _ratio(of_mean * rows, data_var)[alive]
    design = max(1.0, float(design.mean())) if design.size else 1.0
    of_mean = np.maximum(of_mean, _ratio(data_var, rows))
    of_var = _ratio(scatter * bessel, within**2)
    of_var = np.maximum(of_var, _ratio(2 * design, rows))
    # The fraction of one batch's noise in an average of many with this momentum.
    share = 0.0 if momentum is None else (1 - momentum) / (1 + momentum)
    noise = _ratio(of_mean, var + epsilon) / 2 + of_var / 4
    judged = alive & (of_var * (share + _ratio(1, count)) < _UNSURE)

    initial = _initial(mean, var, data_mean, data_var, epsilon, judged)
    total_rows = float(np.median(total[finite])) if finite.any() else 0.0
    mean_rows = total_rows / max(batches, 1)
    affine = {n: _affine(layer, n) for n in ("scale", "bias")}
    return Measured(
        layer=layer.path,
        domain=domain,
        module=layer.module,
        mean=mean,
        var=var,
        scale=None if affine["scale"] is None else take(affine["scale"]),
        bias=None if affine["bias"] is None else take(affine["bias"]),
        batches=batches,
        rows=mean_rows,
        least_rows=float(take(seen["least"]).min(initial=math.inf)) if batches else 0.0,
        effective_rows=total_rows / design,
        updates=_updates(layer, momentum, mean_rows, initial),
        initial=initial,
        data_mean=data_mean,
        data_var=data_var,
        within=within,
        drift=drift,
        ratio=ratio,
        kl=kl,
        noise=noise * (share + _ratio(1, count)),
        running_noise=noise * share,
        finite=finite,
        dead=dead,
        # For a constant feature only the mean can be wrong, and it has no noise.
        judged=judged | dead,
    )


def _flat(value: Any, domain: int | None) -> np.ndarray:
    value = np.asarray(value)
    wide = np.complex128 if np.iscomplexobj(value) else np.float64
    return (value if domain is None else value[domain]).ravel().astype(wide)


def _ratio(a: Any, b: Any) -> np.ndarray:
    """`a / b`, 0 where `b` is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.divide(a, b, out=np.zeros(b.shape), where=b != 0)


def _affine(layer: _Layer, name: str) -> np.ndarray | None:
    """Scale or bias in the shape of the statistics; the largest of a table by label."""
    value, shape = layer.params.get(name), layer.stats["var"].shape
    if value is None:
        return None
    if name == "scale" and getattr(layer.module, "one_plus", False):
        value = 1 + value
    while value.ndim > len(shape):
        value = np.abs(value).max(0)
    return np.broadcast_to(value, shape)


def _initial(mean, var, data_mean, data_var, epsilon, judged) -> float | None:
    """The share of the initial mean 0 and variance 1, if it explains the statistics."""
    mean, var, data_mean, data_var = (
        v[judged] for v in (mean, var, data_mean, data_var)
    )
    # The smaller a variance, the larger the share of the initial 1.
    unit = data_var + epsilon
    distance = lambda m, v: np.concatenate(
        [(m - data_mean).real / np.sqrt(unit), (v - data_var) / unit]
    )
    whole = distance(0.0, 1.0)
    share = float(_ratio(whole @ distance(mean, var), whole @ whole))
    if not 1e-5 < share <= 1:
        return None
    rest = ((1 - share) * data_mean, (1 - share) * data_var + share + epsilon)
    left = divergence(*rest, mean, var + epsilon).mean()
    there = divergence(data_mean, data_var + epsilon, mean, var + epsilon).mean()
    return share if left < min(0.1 * there, _EXPLAINED) else None


def _updates(layer: _Layer, momentum, rows: float, initial) -> float | None:
    """The number of updates; see `Measured`."""
    if "step" in layer.stats:
        return float(layer.stats["step"].max())
    weight = layer.stats.get("weight")
    if momentum is None:
        return None if weight is None or not rows else float(weight.max()) / rows
    # In the last bits of float32, it may be any larger number.
    left = initial if weight is None else max(1 - float(weight.max()), 2.0**-22)
    if left is None or not 0 < momentum < 1:
        return None
    return float(round(math.log(left) / math.log(momentum)))
