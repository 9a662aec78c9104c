"""Merge the statistics of replicas, hosts or clients into those of all rows."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from jbn import axes
from jbn.ops import numeric
from jbn.tools.layers import Where, chosen, few, key_name, what_matches
from jbn.tools.norms import Also, Norms, check_statistics, warn_of_unknown
from jbn.typing import ArrayLike, Moments


def merge(
    batch_stats: Sequence[Mapping] | Mapping,
    *,
    weights: Sequence[float | int | ArrayLike] | ArrayLike | None = None,
    also: Also = None,
) -> dict:
    """Merges several `batch_stats` into the statistics of all rows together.

    For each layer and feature, with a_k the share of part k in the weights,

        mean = sum_k a_k * mean_k
        var = sum_k a_k * (var_k + abs(mean_k - mean)**2)

    which are the statistics of the mixture. An average of the variances would miss the
    scatter of the means: four replicas with means 0, 1, 2, 3 and variance 1 have a
    variance of 2.25, not 1.

    Args:
        batch_stats: Collections of the same layers, or `nnx.state(model,
            nnx.BatchStat)` of each model; or one whose arrays stack the parts
            along a leading axis, as returned by `jax.pmap` and
            `multihost_utils.process_allgather`.
        weights: The weight of each part, such as its number of rows: numbers, or arrays
            of the leading axes of its statistics (such as one per domain). Equal by
            default. A part of weight 0 does not count; if all weights are 0, the first
            part is kept.
        also: Foreign batch norms, as for `convert`, found by the names of their
            statistics.

    Returns:
        One collection. `weight`, if layers have it, is the sum over the parts, and
        `pending` moments are merged.

    Raises:
        TypeError: If `batch_stats` is neither.
        ValueError: If there are no parts, if they have different layers or no batch
            norm, if the number of weights differs, or if weights are known to be
            negative.

    Warns:
        UserWarning: If there are means and variances under other names, which are taken
            from the first part.

    Example:
        >>> parts = [{"norm": {"mean": jnp.array([m]), "var": jnp.array([1.0])}}
        ...          for m in (0.0, 1.0, 2.0, 3.0)]
        >>> merged = merge(parts)
        >>> print(merged["norm"]["mean"], merged["norm"]["var"])
        [1.5] [2.25]
    """
    if isinstance(batch_stats, Mapping):
        leaves = jax.tree.leaves(batch_stats)
        sizes = {np.shape(leaf)[:1] for leaf in leaves}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                "A single `batch_stats` must hold parts stacked along a first axis of"
                f" the same size in all arrays; got sizes {sorted(sizes)}. Pass a list"
                " of collections if they are not stacked."
            )
        count = sizes.pop()[0]
        parts = [
            jax.tree.map(operator.itemgetter(k), batch_stats) for k in range(count)
        ]
    elif isinstance(batch_stats, Sequence):
        parts = list(batch_stats)
    else:
        raise TypeError(
            "`batch_stats` must be a list of collections, or one with stacked arrays;"
            f" got {type(batch_stats).__name__}."
        )
    for part in parts:
        if not isinstance(part, Mapping):
            raise TypeError(
                "`merge` takes `batch_stats`, or `nnx.state(model, nnx.BatchStat)` of"
                f" NNX models; got {type(part).__name__}."
            )
    if not parts:
        raise ValueError("`merge` takes at least one `batch_stats`; got none.")
    if len({jax.tree.structure(part) for part in parts}) > 1:
        raise ValueError(
            "`merge` takes `batch_stats` of the same layers; got different trees."
        )
    shares = _weights(weights, len(parts))
    norms = Norms(also)
    nodes = [norms.nodes(part) for part in parts]
    unknown = norms.unknown(parts[0])
    if not nodes[0]:
        leaves = jax.tree.leaves_with_path(dict(parts[0]))
        paths = ["/".join(map(key_name, path)) for path, _ in leaves]
        text = (
            "`merge` found no batch norm layer, which has `mean` and `var`; the"
            f" statistics are {few(paths)}."
        )
        fix = ['Pass `variables["batch_stats"]` of each part.']
        raise ValueError(" ".join([text, *(unknown.values() or fix)]))
    warn_of_unknown("merge", unknown)
    merged = {}
    for path, first in nodes[0].items():
        layers = [found[path] for found in nodes]
        moments = jbn.merge(
            *(_moments(node, share) for node, share in zip(layers, shares, strict=True))
        )
        some = moments.weight > 0
        merged[path] = {
            **first,
            "mean": jnp.where(some, moments.mean, first["mean"]),
            "var": jnp.where(some, moments.var, first["var"]),
        }
        if "weight" in first:
            merged[path]["weight"] = sum(node["weight"] for node in layers)
        if "pending" in first:
            pending = jbn.merge(*(Moments(**node["pending"]) for node in layers))
            merged[path]["pending"] = pending._asdict()
    return norms.with_nodes(parts[0], merged)


def average(
    trees: Sequence[Any],
    *,
    weights: Sequence[float | int | ArrayLike] | ArrayLike | None = None,
) -> Any:
    """The weighted mean of trees of parameters (federated averaging).

    For parameters; use `merge` for `batch_stats`.

    Args:
        trees: Trees of the same structure.
        weights: The weight of each tree; equal by default. If all are 0, the first is
            kept.

    Returns:
        One tree. Arrays that are not floats, such as counters, are those of the first.

    Raises:
        ValueError: If there are no trees, or not as many weights.

    References:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from
        Decentralized Data", 2017.
    """
    if not trees:
        raise ValueError("`average` takes at least one tree; got none.")
    shares = _weights(weights, len(trees))
    total = sum(shares[1:], shares[0])
    shares = [share * numeric.reciprocal(total) for share in shares]

    def mean(*leaves):
        first = jnp.asarray(leaves[0])
        if not jnp.issubdtype(first.dtype, jnp.inexact):
            return first
        parts = [
            numeric.wide(jnp.asarray(leaf))
            * share.astype(numeric.wide_dtype(first.dtype))
            for leaf, share in zip(leaves, shares, strict=True)
        ]
        averaged = sum(parts[1:], parts[0]).astype(first.dtype)
        return jnp.where(total > 0, averaged, first)

    return jax.tree.map(mean, *trees)


def fed_bn(
    merged: Mapping, own: Mapping, *, where: Where = None, also: Also = None
) -> dict:
    """A client's variables for the next round: the shared ones, with its own norms.

    Clients with different data keep their own scale, bias and statistics (FedBN).

    Args:
        merged: `params` and `batch_stats` that clients share: dicts of Linen, or
            `nnx.state(model, nnx.Param)` and `nnx.state(model, nnx.BatchStat)`.
        own: The client's variables, of the same structure.
        where: The batch norm layers that stay the client's own; by default all.
        also: Foreign batch norms, as for `merge`.

    Returns:
        Variables of the same structure.

    Raises:
        TypeError: If one of the two is no dict.
        ValueError: If no batch norm layer matches.

    Warns:
        UserWarning: If there are statistics of a mean and a variance by other names.

    References:
        Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch
        Normalization", 2021. https://arxiv.org/abs/2102.07623
    """
    norms = Norms(also)
    for variables in (merged, own):
        if not isinstance(variables, Mapping):
            raise TypeError(
                "`fed_bn` takes dicts with `params` and `batch_stats`; got"
                f" {type(variables).__name__}. Of an NNX model pass `nnx.state(model,"
                " nnx.Param)` and `nnx.state(model, nnx.BatchStat)` as these."
            )
        check_statistics("fed_bn", variables)
    found = norms.nodes(own["batch_stats"])
    unknown = norms.unknown(own["batch_stats"])
    paths = {path for path in found if chosen("/".join(path), where)}
    if not paths and where != []:  # An empty list means none.
        has = ["/".join(path) for path in found]
        text = f"`fed_bn` found no batch norm layer that matches; {where=}, and the"
        text += f" variables have {has or 'none'}."
        raise ValueError(" ".join([text, *(unknown.values() or [what_matches(has)])]))
    warn_of_unknown("fed_bn", unknown, where)

    def pick(key_path, shared, local):
        keys = tuple(map(key_name, key_path))[1:]
        # Any beginning: pending moments lie deeper, and so do values in an `nnx.State`.
        within = any(keys[:n] in paths for n in range(len(keys)))
        return local if within else shared

    return jax.tree_util.tree_map_with_path(pick, dict(merged), dict(own))


def _moments(node: Mapping, share: jax.Array) -> Moments:
    var = jnp.asarray(node["var"])
    extra = var.ndim - share.ndim
    share = jnp.expand_dims(share, range(share.ndim, share.ndim + extra))
    weight = jnp.broadcast_to(share.astype(var.dtype), var.shape)
    return Moments(weight, jnp.asarray(node["mean"]), var)


def _weights(weights: Any, count: int) -> list[jax.Array]:
    if weights is None:
        return [jnp.ones(()) for _ in range(count)]
    if len(weights) != count:
        raise ValueError(
            f"`weights` must have one entry per part; got {len(weights)} for {count}."
        )
    for w in weights:
        value = axes.known(w)
        if value is not None and not (value >= 0).all():
            raise ValueError(f"`weights` must not be negative; got {value}.")
    return [jnp.asarray(w, jnp.float32) for w in weights]
