"""The common part of the ports: matches our arrays with another library's."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jbn.tools.layers import Where, chosen
from jbn.tools.norms import Norms
from jbn.typing import BatchStats, Params


# The other library's name of one of our layers, by its path. A path that is not in the
# dict keeps its name, as all do without a dict.
Names = Mapping[str, str] | Callable[[str], str] | None

# For each of their names, the other names of the same array.
Aliases = Mapping[str, Sequence[str]]
_NO_ALIASES: Aliases = MappingProxyType({})

# State of ours without a counterpart.
_OWN = ("weight", "step", "pending")


class Leaf(NamedTuple):
    """The name of one of our arrays."""

    layer: str
    name: str
    is_stat: bool

    def __str__(self):
        return f"{self.layer}/{self.name}" if self.layer else self.name


class Dialect(NamedTuple):
    """The names and layouts of another library's arrays.

    Attributes:
        library: Its name, in `from_...` and `to_...`.
        words: The possible names in the library of each of our leaves' names. Without
            an entry, the name is the same.
        separator: Separates the parts of names.
        read: Converts their value to our layout; also takes the shape of ours.
        write: Converts our value to their layout; also takes the shape of theirs.
        spare: Suffixes of their names that have no counterpart here.
    """

    library: str
    words: Mapping[str, Sequence[str]]
    separator: str
    read: Callable[[Leaf, np.ndarray, tuple[int, ...]], np.ndarray]
    write: Callable[[Leaf, np.ndarray, tuple[int, ...]], np.ndarray]
    spare: tuple[str, ...] = ()


def fill(
    dialect: Dialect,
    source: Mapping[str, np.ndarray],
    variables: Any,
    names: Names,
    skip: Where,
    weight: Callable[[str], float | int],
    aliases: Aliases = _NO_ALIASES,
) -> Any:
    """`variables` with the values of `source`; `from_...` without its conventions.

    Args:
        dialect: The dialect of the source.
        source: Their arrays, by name.
        variables: As `leaves` takes them.
        names: Their names of our layers.
        skip: Which of our leaves to leave unchanged.
        weight: The new `weight` of a layer, as a function of its name there.
        aliases: Their names of the same array.

    Returns:
        A new structure like `variables`.

    Raises:
        ValueError: As `match` does.
    """
    ours = leaves(variables)
    caller = f"from_{dialect.library}"
    pairs = match(caller, dialect, ours, source, names, skip, aliases)
    new: dict[Leaf, Any] = {
        leaf: dialect.read(leaf, source[key], ours[leaf].shape)
        for leaf, key in pairs.items()
    }
    for leaf, value in ours.items():
        if leaf.is_stat and leaf.name == "weight" and not chosen(str(leaf), skip):
            new[leaf] = np.full(value.shape, weight(their_name(leaf.layer, names)))
    # Copies: a view of PyTorch's memory would change when its model is trained.
    values = {k: jnp.array(v, ours[k].dtype) for k, v in new.items()}
    return with_leaves(variables, values)


def spell(
    dialect: Dialect,
    variables: Any,
    target: Mapping[str, np.ndarray],
    names: Names,
    skip: Where,
    aliases: Aliases = _NO_ALIASES,
) -> dict[str, np.ndarray]:
    """`target` with the values of `variables`; `to_...` without its conventions.

    Args:
        dialect: The dialect of the target.
        variables: As `leaves` takes them.
        target: Their arrays, by name.
        names: Their names of our layers.
        skip: Which of our leaves to leave out.
        aliases: Their names of the same array.

    Returns:
        New arrays for the target; its own where ours have no value.

    Raises:
        ValueError: As `match` does.
    """
    ours = leaves(variables)
    caller = f"to_{dialect.library}"
    pairs = match(caller, dialect, ours, target, names, skip, aliases)
    new, written = dict(target), {}
    for leaf, key in pairs.items():
        value = np.asarray(ours[leaf])
        if value.dtype.kind == "V":  # bfloat16, which plain NumPy does not have
            value = value.astype(np.float32)
        value = dialect.write(leaf, value, target[key].shape)
        for name in {key, *aliases.get(key, ())}:
            if name in written and not np.array_equal(new[name], value, equal_nan=True):
                raise ValueError(
                    f"`{caller}`: {name!r} is one array under several names, and our"
                    f" {str(written[name])!r} and {str(leaf)!r} differ. `skip` one."
                )
            new[name], written[name] = value, leaf
    return new


def match(
    caller: str,
    dialect: Dialect,
    ours: Mapping[Leaf, Any],
    theirs: Mapping[str, np.ndarray],
    names: Names,
    skip: Where,
    aliases: Aliases = _NO_ALIASES,
) -> dict[Leaf, str]:
    """Finds the other library's name of each of our leaves.

    Args:
        caller: The name of the public function.
        dialect: The dialect of their names.
        ours: Our arrays, or their shapes.
        theirs: Their arrays.
        names: Their names of our layers.
        skip: The arrays to leave out, by our name or theirs.
        aliases: Their names of the same array, by each of them.

    Returns:
        Their names, one for each leaf that is not left out.

    Raises:
        ValueError: If an array is missing, has another shape, or is used twice or
            never.
    """
    pairs: dict[Leaf, str] = {}
    missing, shapes, twice, used, other_names = [], [], [], set(), set()
    for leaf, value in ours.items():
        if leaf.is_stat and leaf.name in _OWN:
            continue
        prefix = their_name(leaf.layer, names, dialect.separator)
        prefix += dialect.separator if prefix else ""
        words = dialect.words.get(leaf.name, (leaf.name,))
        found = [prefix + w for w in words if prefix + w in theirs]
        if chosen(str(leaf), skip) or any(chosen(key, skip) for key in found):
            used.update(found)
            continue
        if not found:
            options = " or ".join(repr(prefix + w) for w in words)
            missing.append(f"{options} (our {str(leaf)!r})")
            continue
        (key, *_) = found
        if key in used:
            twice.append(f"{key!r} (also for our {str(leaf)!r})")
            continue
        used.add(key)
        pairs[leaf] = key
        other_names.update(aliases.get(key, ()))
        shape = tuple(dialect.read(leaf, theirs[key], value.shape).shape)
        if shape != tuple(value.shape):
            there = tuple(theirs[key].shape)
            as_ours = "" if shape == there else f", in our layout {shape}"
            shapes.append(
                f"{key!r} has {there}{as_ours}, and our {str(leaf)!r} has"
                f" {tuple(value.shape)}"
            )
    unused = [
        repr(key)
        for key in theirs
        if key not in used | other_names
        and not key.endswith(dialect.spare)
        and not chosen(key, skip)
    ]
    problems = {
        "Not there": missing,
        "Of another shape": shapes,
        "Used twice": twice,
        "Not used": unused,
    }
    if any(problems.values()):
        text = " ".join(f"{k}: {_some(v)}." for k, v in problems.items() if v)
        raise ValueError(
            f"`{caller}` needs exactly one array of theirs for each of ours, with the"
            f" same shape. {text} Pass `names` to map names of layers; pass `skip` to"
            " leave out arrays, ours or theirs."
        )
    return pairs


def their_name(layer: str, names: Names, separator: str = "/") -> str:
    """Their name of our layer at the path `layer`."""
    if callable(names):
        return names(layer)
    if names is not None and layer in names:
        return names[layer]
    return layer.replace("/", separator)


def leaves(variables: Any) -> dict[Leaf, Any]:
    """Our arrays by name.

    Args:
        variables: Linen's variables with `params` and `batch_stats`, of one layer or of
            a model; an NNX module; or a pair of `jbn.Params` and `jbn.BatchStats`.

    Returns:
        Arrays. Pending moments and step counters are not included.

    Raises:
        TypeError: If `variables` are none of these.
    """
    found: dict[Leaf, Any] = {}

    def add(path: tuple[str, ...], value: Any, is_stat: bool) -> None:
        if not (is_stat and ("pending" in path or path[-1] == "step")):
            found[Leaf("/".join(path[:-1]), path[-1], is_stat)] = value

    def walk(tree: Mapping, path: tuple[str, ...], is_stat: bool) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, (*path, name), is_stat)
            else:
                add((*path, name), value, is_stat)

    if isinstance(variables, nnx.Module):
        for path, variable in nnx.iter_graph(variables):
            if isinstance(variable, nnx.Param | nnx.BatchStat):
                is_stat = isinstance(variable, nnx.BatchStat)
                add(tuple(map(str, path)), variable[...], is_stat)
    elif _is_pair(variables):
        for part, is_stat in zip(variables, (False, True), strict=True):
            for name, value in (part._asdict() if part else {}).items():
                if value is not None:
                    add((name,), value, is_stat)
    elif isinstance(variables, Mapping) and {"params", "batch_stats"} & set(variables):
        walk(variables.get("params", {}), (), False)
        walk(variables.get("batch_stats", {}), (), True)
    else:
        raise TypeError(
            "`variables` must be Linen's variables, a dict with `params` and"
            " `batch_stats`; an NNX module; or a pair of `jbn.Params` and"
            f" `jbn.BatchStats`, as of `jbn.init`; got {type(variables).__name__}."
        )
    return found


def with_leaves(variables: Any, new: Mapping[Leaf, jax.Array]) -> Any:
    """`variables` with the given values replaced."""
    if isinstance(variables, nnx.Module):
        model = nnx.clone(variables)
        for path, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Param | nnx.BatchStat):
                (*layer, name) = map(str, path)
                is_stat = isinstance(variable, nnx.BatchStat)
                leaf = Leaf("/".join(layer), name, is_stat)
                if leaf in new:
                    variable[...] = new[leaf]
        return model
    if _is_pair(variables):
        params, batch_stats = variables
        of = lambda stats: {k.name: v for k, v in new.items() if k.is_stat is stats}
        if params is not None:
            params = params._replace(**of(False))
        return params, batch_stats._replace(**of(True))

    def walk(tree: Mapping, path: tuple[str, ...], is_stat: bool) -> dict:
        return {
            name: walk(value, (*path, name), is_stat)
            if isinstance(value, Mapping)
            else new.get(Leaf("/".join(path), name, is_stat), value)
            for name, value in tree.items()
        }

    kinds = {"params": False, "batch_stats": True}
    return {
        name: walk(tree, (), kinds[name]) if name in kinds else tree
        for name, tree in variables.items()
    }


def compare(
    caller: str,
    variables: Any,
    theirs: Mapping[str, Mapping[str, Any]],
    names: Names,
    norm: Any,
    separator: str = "/",
) -> None:
    """Warns of norm layers whose options differ from their counterparts.

    Args:
        caller: The name of the public function.
        variables: For an NNX module, its layers are compared.
        theirs: The options that our layers must have to be like theirs, by the layer's
            name there.
        names: Their names of our layers.
        norm: Otherwise, the norm to compare: a layer, a class or partial, or a dict of
            options. With `None` nothing is compared.
        separator: Separates the parts of names.
    """
    if isinstance(variables, nnx.Module):
        there = functools.partial(their_name, names=names, separator=separator)
        norms = Norms().in_nnx(variables)
        own = {there(p): rule(norm.equivalent(m)) for p, (m, norm) in norms.items()}
    elif norm is not None:
        own = dict.fromkeys(theirs, rule(norm))
    else:
        return
    differences: dict[tuple[str, str, bool], list[str]] = {}
    for name in own.keys() & theirs.keys():
        ours, other = own[name], theirs[name]
        wrong = [k for k in other if k in ours and not _same(ours[k], other[k])]
        if wrong:
            key = (_call(ours, wrong), _call(other, wrong), "epsilon" in wrong)
            differences.setdefault(key, []).append(name)
    for (ours, other, in_outputs), layers in differences.items():
        what = "outputs" if in_outputs else "the next running statistics"
        where = _some(
            [repr(name) if name else "the layer" for name in sorted(layers)], 1
        )
        warnings.warn(
            f"`{caller}`: {where} needs `{other}` here, but our layer has `{ours}`:"
            f" {what} will differ. Make our layer with `{other}`.",
            stacklevel=4,
        )


def rule(norm: Any) -> dict[str, Any]:
    """The options of a norm layer that other libraries also have.

    Args:
        norm: A layer, a class or partial, or a dict of options.

    Returns:
        `epsilon` and, unless it is frozen, `momentum`, `unbiased` and `debias`.
    """
    defaults = {"epsilon": 1e-5, "momentum": 0.99, "unbiased": False, "debias": False}
    if isinstance(norm, Mapping):
        return {name: norm.get(name, value) for name, value in defaults.items()}
    layer = norm if isinstance(norm, nn.Module | nnx.Module) else norm()
    found = {k: getattr(layer, k, default) for k, default in defaults.items()}
    if getattr(layer, "freeze_stats", False):
        return {"epsilon": found["epsilon"]}
    return found


def unchanged(leaf: Leaf, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """For libraries whose arrays have the same layout."""
    return value


def _is_pair(variables: Any) -> bool:
    return (
        isinstance(variables, tuple)
        and len(variables) == 2
        and isinstance(variables[0], Params | None)
        and isinstance(variables[1], BatchStats)
    )


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=1e-6)


def _call(options: Mapping[str, Any], wanted: Iterable[str]) -> str:
    def text(value: Any) -> str:
        # One minus 0.3 is 0.7, up to the last bit.
        return f"{value:.6g}" if type(value) is float else repr(value)

    return ", ".join(f"{name}={text(options[name])}" for name in wanted)


def _some(items: Sequence[str], count: int = 3) -> str:
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")
