"""Labels of parameters for optimizers: frozen, of a norm, with weight decay."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jbn.tools.layers import Where, check_variables, chosen, few, key_name
from jbn.tools.norms import Also, Norms, warn_of_unknown


def freeze(variables: Any, where: Where) -> Any:
    """Labels each parameter `"frozen"` or `"trainable"`, by its path.

        labels = freeze(variables, "backbone/*")
        optimizer = optax.multi_transform(
            {"trainable": optax.adam(1e-3), "frozen": optax.set_to_zero()}, labels
        )

    Then nothing changes a frozen parameter, not even weight decay. This only concerns
    parameters: to also keep a batch norm's running statistics, and normalize by them,
    use `jbn.tools.convert(model, FrozenBatchNorm, where=...)`. To unfreeze, create a
    new optimizer with other labels.

    Args:
        variables: Linen's variables or their `params`; or an NNX model.
        where: The parameters to freeze: patterns of paths such as `"backbone/*"`, or a
            function of the path (`"backbone/Dense_0/kernel"`).

    Returns:
        A tree like the parameters (for NNX, like `nnx.state(model, nnx.Param)`, with
        labels instead of variables, as `nnx.Optimizer` needs it).

    Raises:
        TypeError: If `variables` is neither.
        ValueError: If no parameter matches.

    Example:
        >>> params = {"a": {"kernel": 1.0}, "b": {"kernel": 2.0}}
        >>> freeze(params, "a/*")
        {'a': {'kernel': 'frozen'}, 'b': {'kernel': 'trainable'}}
    """
    labels = _label(
        variables, lambda path: "frozen" if chosen(path, where) else "trainable"
    )
    if "frozen" not in jax.tree.leaves(labels):
        paths: list[str] = []
        _label(variables, paths.append)
        raise ValueError(
            f"`freeze` found no parameter whose path matches {where!r}; the parameters"
            f' are {few(paths)}. Pass such paths, or patterns such as "backbone/*".'
        )
    return labels


def kinds(variables: Any, *, also: Also = None) -> Any:
    """Labels each parameter by its kind: `"norm"`, `"bias"` or `"weight"`.

    A parameter belongs to a norm if its layer also has running statistics, whatever its
    name or rank (in a scanned layer a scale has two axes). Other parameters named
    `bias` are biases, and all others weights. (A LayerNorm has no statistics; its
    `scale` is recognized by name.)

    Args:
        variables: Linen's variables with `params` and `batch_stats`; or an NNX model.
        also: Foreign batch norms, as for `convert`. In Linen's variables they are found
            by the names of their statistics.

    Returns:
        A tree like the parameters, for `optax.multi_transform`.

    Raises:
        TypeError: If `variables` is neither.

    Warns:
        UserWarning: If there are means and variances under other names.

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
    """Labels each parameter by whether to decay it: all except norms and biases.

        optimizer = optax.adamw(1e-3, weight_decay=0.05, mask=decays(variables))

    A batch norm after a weight undoes any change of its scale, so weight decay there
    only acts on the effective learning rate. Decay of the norm's own scale changes the
    output.

    Args:
        variables: As for `kinds`.
        also: As for `kinds`.

    Returns:
        A tree of booleans, like the parameters.

    Raises:
        TypeError: As `kinds` does.

    Warns:
        UserWarning: As `kinds` does.
    """
    found = _kinds("decays", variables, Norms(also))
    return jax.tree.map(lambda kind: kind == "weight", found)


def _kinds(caller: str, variables: Any, known: Norms) -> Any:
    check_variables(variables)
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
    """A tree like the parameters, with a label for each path."""
    check_variables(variables)
    if isinstance(variables, nnx.Module):
        tree = nnx.state(variables, nnx.Param)
        is_leaf = lambda v: isinstance(v, nnx.Variable)
    else:
        tree = variables["params"] if "params" in variables else variables
        is_leaf = lambda v: not isinstance(v, Mapping)

    return jax.tree_util.tree_map_with_path(
        lambda path, _: label("/".join(map(key_name, path))), tree, is_leaf=is_leaf
    )
