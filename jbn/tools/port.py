"""What the ports have in common: our arrays by path, matched with theirs by name."""

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


# What a layer of ours, by its path, is called there. Paths that a dict lacks, and all
# paths where there is none, are called there as here.
Names = Mapping[str, str] | Callable[[str], str] | None

# For each name of theirs the other names of the same array.
Aliases = Mapping[str, Sequence[str]]
_NO_ALIASES: Aliases = MappingProxyType({})

# Our state that others have no array for.
_OWN = ("weight", "step", "pending")


class Leaf(NamedTuple):
    """Names an array of ours."""

    layer: str
    name: str
    is_stat: bool

    def __str__(self):
        return f"{self.layer}/{self.name}" if self.layer else self.name


class Dialect(NamedTuple):
    """How another library calls its arrays, and lays them out.

    Attributes:
        library: Its name, in `from_...` and `to_...`.
        words: For each name of a leaf the names it may have there. A leaf without an
            entry has the same name there.
        separator: What stands between the parts of names.
        read: A value of theirs in our layout; also given the shape of ours.
        write: A value of ours in their layout; also given the shape of theirs.
        spare: Ends of the names of theirs that nothing of ours corresponds to.
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
        dialect: Whose the source is.
        source: Their arrays, by name.
        variables: As `leaves` takes them.
        names: What our layers are called there.
        skip: Which of our leaves stay as they are.
        weight: What a layer's `weight` becomes, by the layer's name there.
        aliases: Names of theirs for one array.

    Returns:
        What `variables` are, anew.

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
    # Copies: a view of PyTorch's memory would change as its model trains on.
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
        dialect: Whose the target is.
        variables: As `leaves` takes them.
        target: Their arrays, by name.
        names: What our layers are called there.
        skip: Which of our leaves are left out.
        aliases: Names of theirs for one array.

    Returns:
        Their arrays, anew; those of `target` where ours have no value for them.

    Raises:
        ValueError: As `match` does.
    """
    ours = leaves(variables)
    caller = f"to_{dialect.library}"
    pairs = match(caller, dialect, ours, target, names, skip, aliases)
    new, written = dict(target), {}
    for leaf, key in pairs.items():
        value = np.asarray(ours[leaf])
        if value.dtype.kind == "V":  # bfloat16, which others' NumPy does not know
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
    """Finds for each of our leaves its name among theirs.

    Args:
        caller: Who asks.
        dialect: How they are called.
        ours: Our arrays, or their shapes.
        theirs: Their arrays.
        names: What our layers are called there.
        skip: What to leave out, by our name or theirs.
        aliases: Names of theirs for one array, by each of them.

    Returns:
        Names of theirs, one for each leaf that is not left out.

    Raises:
        ValueError: If one is not there, of another shape, used twice or not at all.
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
            f"`{caller}` needs exactly one array of theirs for each of ours, of the"
            f" same shape. {text} `names` says what layers are called there; `skip`"
            " names arrays, ours or theirs, that are to be left out."
        )
    return pairs


def their_name(layer: str, names: Names, separator: str = "/") -> str:
    """What the layer of ours at the path `layer` is called there."""
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
        Arrays. Pending moments and steps are none of a port's business.

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
    """What `variables` are, with other values in place of those named."""
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
    """Warns of norm layers whose options are not those of their counterparts.

    Args:
        caller: Who asks.
        variables: An NNX module's layers are asked themselves.
        theirs: The options that layers of ours must have to be like theirs, by the
            name of the layer there.
        names: What our layers are called there.
        norm: Else what to compare: a layer, what makes one, or a dict of options. With
            `None` nothing is compared.
        separator: What stands between the parts of names.
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
            f"`{caller}`: {where} needs `{other}` here, and our layer has `{ours}`:"
            f" {what} will differ. Make our layer with `{other}`.",
            stacklevel=4,
        )


def rule(norm: Any) -> dict[str, Any]:
    """The options of a norm layer that other libraries have, too.

    Args:
        norm: A layer, what makes one, or a dict of options.

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
    """For libraries whose arrays are laid out as ours."""
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
        # One minus 0.3 is 0.7, whatever the last bit says.
        return f"{value:.6g}" if type(value) is float else repr(value)

    return ", ".join(f"{name}={text(options[name])}" for name in wanted)


def _some(items: Sequence[str], count: int = 3) -> str:
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")
