"""Batch statistics from and to sbx's `BatchRenorm` (CrossQ)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp


def from_sbx(variables: Mapping) -> dict[str, Any]:
    """Converts variables of a model with sbx's `BatchRenorm` to ours.

    sbx stores the limits and the number of training calls in each layer, as `r_max`,
    `d_max` and `steps`. In ours the limits are arguments, and the calls are `step`:

        layer = jbn.linen.BatchRenorm(warmup_steps=100_000, epsilon=1e-3)

    has sbx's defaults, and the same names in a model.

    Args:
        variables: Variables with `batch_stats`, or a train state's `batch_stats` in a
            dict.

    Returns:
        The same tree with our names; other collections and layers are unchanged.

    Raises:
        ValueError: If there is no such layer.

    Example:
        >>> theirs = {"mean": 0.0, "var": 1.0, "r_max": 3, "d_max": 5, "steps": 7}
        >>> new = from_sbx({"batch_stats": {"BatchRenorm_0": theirs}})
        >>> sorted(new["batch_stats"]["BatchRenorm_0"])
        ['mean', 'step', 'var']
    """
    return _converted("from_sbx", variables, {"r_max", "d_max", "steps"}, _ours)


def to_sbx(
    variables: Mapping, *, r_max: float | int = 3.0, d_max: float | int = 5.0
) -> dict[str, Any]:
    """The inverse of `from_sbx`.

    Args:
        variables: Variables with `batch_stats`, whose `BatchRenorm` layers count steps.
        r_max: The limit `r_max` for sbx's layers.
        d_max: Likewise.

    Returns:
        The same tree with sbx's names.

    Raises:
        ValueError: If no layer has a `step`.

    Example:
        >>> ours = {"mean": 0.0, "var": 1.0, "step": 7}
        >>> new = to_sbx({"batch_stats": {"BatchRenorm_0": ours}})
        >>> sorted(new["batch_stats"]["BatchRenorm_0"])
        ['d_max', 'mean', 'r_max', 'steps', 'var']
    """

    def theirs(node: Mapping) -> dict[str, Any]:
        own = {k: v for k, v in node.items() if k != "step"}
        # One per step count: `vmap` over critics gives one per critic.
        limits = {"r_max": r_max, "d_max": d_max}
        shape = jnp.shape(node["step"])
        own |= {name: jnp.full(shape, value) for name, value in limits.items()}
        return {**own, "steps": node["step"]}

    return _converted("to_sbx", variables, {"step"}, theirs)


def _ours(node: Mapping) -> dict[str, Any]:
    own = {k: v for k, v in node.items() if k not in ("r_max", "d_max", "steps")}
    # (Before the first call sbx has a Python number here.)
    return {**own, "step": jnp.asarray(node["steps"], jnp.int32)}


def _converted(caller: str, variables: Mapping, names: set[str], convert: Any) -> dict:
    found = 0

    def walk(tree: Any) -> Any:
        nonlocal found
        if not isinstance(tree, Mapping):
            return tree
        if {"mean", "var", *names} <= set(tree):
            found += 1
            return convert(tree)
        return {name: walk(value) for name, value in tree.items()}

    new = {**variables, "batch_stats": walk(variables.get("batch_stats", {}))}
    if not found:
        wanted = ", ".join(f"`{name}`" for name in sorted({"mean", "var", *names}))
        raise ValueError(f"`{caller}` found no layer with the statistics {wanted}.")
    return new
