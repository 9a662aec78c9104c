"""Labels for optimizers: what is frozen, what is a norm's, what decays."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jbn.tools.layers import Where, chosen, key_name
from jbn.tools.norms import Also, Norms, warn_of_unknown


def freeze(variables: Any, where: Where) -> Any:
    """Labels each parameter `"frozen"` or `"trainable"`, by its path.

        labels = freeze(variables, "backbone/*")
        optimizer = optax.multi_transform(
            {"trainable": optax.adam(1e-3), "frozen": optax.set_to_zero()}, labels
        )

    Nothing moves a frozen parameter then, weight decay included. This is about
    parameters. That a batch norm layer normalizes by its running statistics and does
    not update them is its own matter: `jbn.tools.convert(model, FrozenBatchNorm,
    where=...)`. To unfreeze, make the optimizer anew with other labels.

    Args:
        variables: Linen's variables or their `params`; or an NNX model.
        where: Which parameters: patterns of their paths such as `"backbone/*"`, or a
            function of the path (`"backbone/Dense_0/kernel"`).

    Returns:
        A tree like the parameters (for NNX, like `nnx.state(model, nnx.Param)`, with
        labels in place of variables, as `nnx.Optimizer` wants it).

    Raises:
        ValueError: If no parameter is meant.

    Example:
        >>> params = {"a": {"kernel": 1.0}, "b": {"kernel": 2.0}}
        >>> freeze(params, "a/*")
        {'a': {'kernel': 'frozen'}, 'b': {'kernel': 'trainable'}}
    """
    labels = _label(
        variables, lambda path: "frozen" if chosen(path, where) else "trainable"
    )
    if "frozen" not in jax.tree.leaves(labels):
        raise ValueError(f"`freeze` found no parameter whose path fits {where!r}.")
    return labels


def kinds(variables: Any, *, also: Also = None) -> Any:
    """Labels each parameter by what it is: `"norm"`, `"bias"` or `"weight"`.

    A parameter is a norm's if its layer has running statistics beside it, whatever its
    name or rank; so this holds for layers that are scanned over, whose scales have two
    axes. Parameters called `bias` elsewhere are biases, and all others weights. (A
    LayerNorm has no statistics. Its `scale` is told by its name.)

    Args:
        variables: Linen's variables with `params` and `batch_stats`; or an NNX model.
        also: Other people's batch norms, as for `convert`. In Linen's variables they
            are found by the names of their statistics.

    Returns:
        A tree like the parameters, for `optax.multi_transform`.

    Warns:
        UserWarning: If there are statistics of a mean and a variance by other names.

    Example:
        >>> variables = {
        ...     "params": {"bn": {"scale": 1.0, "bias": 0.0}, "fc": {"kernel": 1.0}},
        ...     "batch_stats": {"bn": {"mean": 0.0, "var": 1.0}},
        ... }
        >>> kinds(variables)
        {'bn': {'bias': 'norm', 'scale': 'norm'}, 'fc': {'kernel': 'weight'}}
    """
    return _kinds("kinds", variables, Norms(also))


def decays(variables: Any, *, also: Also = None) -> Any:
    """Says of each parameter whether weight decay is for it: all but norms and biases.

        optimizer = optax.adamw(1e-3, weight_decay=0.05, mask=decays(variables))

    A batch norm after a weight undoes any change of its size, so that decay of the
    weight acts as a learning rate; decay of the norm's own scale has no such excuse.

    Args:
        variables: As for `kinds`.
        also: As for `kinds`.

    Returns:
        A tree of booleans, like the parameters.

    Warns:
        UserWarning: As `kinds` does.
    """
    found = _kinds("decays", variables, Norms(also))
    return jax.tree.map(lambda kind: kind == "weight", found)


def _kinds(caller: str, variables: Any, known: Norms) -> Any:
    if isinstance(variables, nnx.Module):
        norms = set(known.in_nnx(variables))
        unknown = known.unknown_in_nnx(variables)
    else:
        stats = variables.get("batch_stats", {})
        norms = {"/".join(path) for path in known.nodes(stats)}
        unknown = known.unknown(stats)
    warn_of_unknown(caller, unknown)

    def kind(path: str) -> str:
        layer, _, name = path.rpartition("/")
        if layer in norms or name == "scale":
            return "norm"
        return "bias" if name == "bias" else "weight"

    return _label(variables, kind)


def _label(variables: Any, label: Callable[[str], Any]) -> Any:
    """A tree like the parameters, of the labels of their paths."""
    if isinstance(variables, nnx.Module):
        tree = nnx.state(variables, nnx.Param)
        is_leaf = lambda v: isinstance(v, nnx.Variable)
    else:
        tree = variables["params"] if "params" in variables else variables
        is_leaf = lambda v: not isinstance(v, Mapping)

    return jax.tree_util.tree_map_with_path(
        lambda path, _: label("/".join(map(key_name, path))), tree, is_leaf=is_leaf
    )
