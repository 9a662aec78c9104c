"""Which layers are batch norms, and the names of their fields and variables."""

import dataclasses
import difflib
import functools
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax import nnx

import jbn.linen
import jbn.nnx
from jbn.options import CallOptions, LayerOptions, options_of
from jbn.tools.layers import Where, chosen


LINEN_NORMS = (jbn.linen.BatchNorm, nn.BatchNorm)
NNX_NORMS = (jbn.nnx.BatchNorm, nnx.BatchNorm)
FLAX_NORMS = (nn.BatchNorm, nnx.BatchNorm)

# Foreign classes of batch norms; or a dict from a class to its names for our `mean`,
# `var`, `scale`, `bias`, `epsilon`, `momentum`, ... For a field, the entry may also be
# its value, or a function of the layer; for an argument of the call such as `mask`, a
# function of the arguments of their call.
Also = type | Sequence[type] | Mapping[type, Mapping[str, Any]] | None

VARIABLES = ("mean", "var", "scale", "bias")
# Statistics that only our layers have.
OWN_STATISTICS = ("weight", "step", "pending")
# Fields that set the mode, and their value at inference.
_MODES = {
    "use_running_average": True,
    "deterministic": True,
    "inference": True,
    "train": False,
    "training": False,
    "is_training": False,
}
_OTHERWISE = {"epsilon": ("epsilon", "eps")}
# Fields of Flax's layers; copies of these use them with the same meaning.
_OF_FLAX = {
    *(field.name for field in dataclasses.fields(nn.BatchNorm)),
    *inspect.signature(nnx.BatchNorm.__init__).parameters,
}
_HARMLESS = {*_OF_FLAX, *_MODES, "eps", "features"}
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Norm:
    """The names of a batch norm's fields and variables.

    Attributes:
        names: From our names to theirs, where they differ; see `Also`.
        is_foreign: Whether the class is neither ours nor Flax's.
        is_translated: Whether calls have the arguments of a foreign class.
    """

    names: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_foreign: bool = False
    is_translated: bool = False

    def name(self, ours: str) -> str:
        """The layer's name of one of our variables."""
        return self.names.get(ours, ours)

    def variables(self, layer: Any) -> dict[str, Any]:
        """Scale, bias and statistics by our names, except missing ones.

        Returns values for a Linen layer, which must be bound, and variables for an NNX
        layer.
        """
        if isinstance(layer, nn.Module):
            params, stats = _linen_variables(layer)
        else:
            params = stats = vars(layer)
        found = {}
        for ours in (*VARIABLES, *OWN_STATISTICS):
            # A foreign `weight` is not the weight of statistics.
            if self.is_foreign and ours not in VARIABLES:
                continue
            tree = params if ours in ("scale", "bias") else stats
            value = tree.get(self.name(ours))
            if value is not None:
                found[ours] = value
        return found

    def field(self, layer: Any, name: str) -> Any:
        """The value of a field, or `None` if it is missing."""
        value = self._field(layer, name)
        return None if value is _MISSING else value

    def _field(self, layer: Any, name: str) -> Any:
        if name in self.names:
            given = self.names[name]
            if isinstance(given, str):
                return getattr(layer, given, _MISSING)
            return given(layer) if callable(given) else given
        for other in _OTHERWISE.get(name, (name,)):
            if hasattr(layer, other):
                return getattr(layer, other)
        return _MISSING

    def arguments(
        self, layer: Any, cls: type, needed: Iterable[str] = ()
    ) -> dict[str, Any]:
        """Constructor arguments that make a layer of `cls` as similar as possible.

        Args:
            layer: The layer to imitate; a foreign Linen layer must be bound.
            cls: A class of ours.
            needed: Arguments that must not have their defaults.

        Returns:
            Keyword arguments.

        Raises:
            ValueError: If a foreign layer lacks a needed field.
        """
        names = _arguments_of(cls)
        if not self.is_foreign:
            return {n: getattr(layer, n) for n in names if hasattr(layer, n)}
        there = self.variables(layer)
        found: dict[str, Any] = {f"use_{n}": n in there for n in ("scale", "bias")}
        for name in (names & _OF_FLAX) | (names & set(self.names) - set(VARIABLES)):
            value = self._field(layer, name)
            if value is not _MISSING:
                found.setdefault(name, value)
        for name in needed:
            if name not in found:
                theirs = type(layer).__name__
                raise ValueError(
                    f"`{theirs}` has no field `{name}`. Pass `also={{{theirs}:"
                    f' {{"{name}": ...}}}}` with the name of the field, its value, or'
                    " a function of the layer."
                )
        if isinstance(layer, nnx.Module):
            shape = there["mean"].shape
            found["num_features"] = getattr(
                layer, "num_features", shape[0] if len(shape) == 1 else shape
            )
            found |= {"use_running_average": bool(self.mode(layer, {}))}
        else:
            found.pop("use_running_average", None)
        return {name: value for name, value in found.items() if name in names}

    def mode(self, layer: Any, given: Mapping[str, Any]) -> bool | None:
        """Whether a foreign layer normalizes by its running statistics.

        Args:
            layer: The layer.
            given: Arguments of its call.

        Returns:
            The mode from the call, else from the fields, else (in Linen) whether
            `batch_stats` is immutable. `None` if it is unknown.
        """
        own = self.names.get("use_running_average")
        if own is not None and not isinstance(own, str):
            return bool(own(layer) if callable(own) else own)
        flags = _MODES if own is None else {own: _MODES.get(own, True)}
        for read in (given.get, self._mode_fields(layer).get):
            for name, at_inference in flags.items():
                value = read(name)
                if value is not None:
                    return bool(value) is at_inference
        if isinstance(layer, nn.Module):
            return not layer.is_mutable_collection("batch_stats")
        return None

    def _mode_fields(self, layer: Any) -> dict[str, Any]:
        """The fields that set the mode of a layer."""
        own = self.names.get("use_running_average")
        names = [own] if isinstance(own, str) else _MODES
        found = {n: getattr(layer, n) for n in names if hasattr(layer, n)}
        # (`train` is a method of every NNX module.)
        return {name: v for name, v in found.items() if not callable(v)}

    def copy_mode(self, layer: Any, new: Any) -> None:
        """Gives an NNX layer `new` the fields that set the mode of a foreign layer."""
        own = self.names.get("use_running_average")
        foreign = self.is_foreign or self.is_translated
        if not foreign or not (own is None or isinstance(own, str)):
            return
        fields = self._mode_fields(layer)
        for name, value in fields.items():
            setattr(new, name, value)
        if fields and "use_running_average" not in fields:
            new.use_running_average = None

    def call(
        self,
        layer: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        cls: type | None = None,
    ) -> tuple[Any, bool | None, dict[str, Any]]:
        """Translates the call of a foreign layer to one of ours.

        Args:
            layer: The layer.
            args: Its positional arguments, the input first.
            kwargs: Its keyword arguments.
            cls: Its class, if different from that of `layer`.

        Returns:
            The input, the mode, and the other arguments.

        Raises:
            ValueError: If there are arguments that ours does not have.
        """
        cls = cls or type(layer)
        signature = inspect.signature(cls.__call__)
        bound = signature.bind(layer, *args, **kwargs)
        bound.apply_defaults()
        ((_, x), *others) = list(bound.arguments.items())[1:]
        given: dict[str, Any] = {}
        for name, value in others:
            kind = signature.parameters[name].kind
            given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        mode = self.mode(layer, given)
        own = {n: self.names[n] for n in options_of(CallOptions) if n in self.names}
        if own:
            read = lambda how: how(given) if callable(how) else given.get(how)
            return x, mode, {n: how and read(how) for n, how in own.items()}
        rest = {}
        for name, value in given.items():
            absent = value is None or value is False
            empty = isinstance(value, tuple | dict) and not value
            if name in _MODES or name == self.names.get("use_running_average"):
                continue
            if name in options_of(CallOptions):
                rest[name] = value
            elif not (absent or empty):
                theirs = cls.__name__
                raise ValueError(
                    f"`{theirs}` is called with `{name}`, which our layers do not have."
                    f' Pass `also={{{theirs}: {{"mask": lambda call: ...}}}}` with what'
                    " the arguments of its call mean (`None`: nothing), or leave the"
                    " layer out with `where=`."
                )
        return x, mode, rest

    def equivalent(self, layer: Any) -> Any:
        """Our layer with the fields of a foreign `layer`; any other unchanged."""
        if not self.is_foreign:
            return layer
        cls = ours(layer)
        options = {"momentum": None, **self.arguments(layer, cls, ["epsilon"])}
        if isinstance(layer, nn.Module):
            return cls(**options, parent=None)
        return cls(**options, rngs=nnx.Rngs(0))


# Container modules. Flax before 0.12 has none.
_CONTAINERS = tuple(getattr(nnx, n) for n in ("Dict", "List") if hasattr(nnx, n))
_KNOWN = Norm()


@functools.cache
def known_names(cls: type) -> Norm:
    """The names of ours, of Flax's, or of a subclass with other call arguments."""
    of = lambda c: inspect.signature(c.__call__).parameters
    for base in FLAX_NORMS:
        if issubclass(cls, base) and not issubclass(cls, jbn.nnx.BatchNorm):
            own = of(cls)
            passing = any(p.kind is p.VAR_POSITIONAL for p in own.values())
            return Norm({}, False, list(own) != list(of(base)) and not passing)
    return _KNOWN


def is_flax(layer: Any) -> bool:
    """Whether a layer is Flax's; ours are subclasses, or take its place."""
    own = isinstance(layer, jbn.nnx.BatchNorm) or hasattr(type(layer), "jbn_place")
    return isinstance(layer, FLAX_NORMS) and not own


class Norms:
    """Finds the batch norms of models: ours, Flax's, and foreign ones.

    A foreign class is recognized if it is built like Flax's: its only statistics are
    `mean` and `var`, its only parameters `scale` and `bias`, all have the same shape,
    and it has no other fields than Flax's. Classes in `also` are always batch norms.
    """

    def __init__(self, also: Also = None):
        if isinstance(also, type):
            also = (also,)
        if not isinstance(also, Mapping):
            also = {cls: {} for cls in also or ()}
        for cls, names in also.items():
            _check_also(cls, names)
        self._also = also

    def of(self, layer: Any) -> Norm | str | None:
        """The names of a layer, if it is a batch norm.

        Args:
            layer: Any module; in Linen a bound one.

        Returns:
            The names; or the reason why a layer with running statistics is not
            recognized; or `None`.
        """
        place = getattr(type(layer), "jbn_place", None)
        if place is not None:
            return place.norm
        for cls, names in self._also.items():
            if isinstance(layer, cls):
                norm = Norm(names, True)
                lack = [norm.name(n) for n in ("mean", "var")]
                lack = [n for n in lack if n not in _statistics(layer)]
                return f"no {_listed(lack)} in them" if lack else norm
        if isinstance(layer, (*LINEN_NORMS, *NNX_NORMS)):
            return known_names(type(layer))
        if isinstance(layer, _CONTAINERS):  # such as our pending moments
            return None
        why = _why_not(layer)
        return why if why is None or why else Norm({}, True)

    def of_class(self, layer: Any) -> Norm | None:
        """The same, only by the class, for a layer that may have no variables yet."""
        for cls, names in self._also.items():
            if isinstance(layer, cls):
                return Norm(names, True)
        known = isinstance(layer, (*LINEN_NORMS, *NNX_NORMS))
        return known_names(type(layer)) if known else None

    def in_nnx(self, model: nnx.Module) -> dict[str, tuple[Any, Norm]]:
        """The batch norms of an NNX model by path; a shared one only once."""
        seen = self._seen_in_nnx(model)
        return {path: (v, norm) for path, v, norm in seen if isinstance(norm, Norm)}

    def unknown_in_nnx(self, model: nnx.Module) -> dict[str, str]:
        """Why layers of an NNX model with statistics are not recognized, by path."""
        seen = self._seen_in_nnx(model)
        return {path: unrecognized(v, s) for path, v, s in seen if isinstance(s, str)}

    def _seen_in_nnx(self, model: nnx.Module) -> Iterator[tuple[str, Any, Any]]:
        """Path, module, and its names or why they are unknown."""
        for path, layer in nnx.iter_graph(model):
            if isinstance(layer, nnx.Module):
                yield "/".join(map(str, path)), layer, self.of(layer)

    def nodes(self, batch_stats: Mapping) -> dict[tuple[str, ...], dict[str, Any]]:
        """The statistics of each layer in `batch_stats`, by our names.

        Paths are names: those of layers in an `nnx.List` would be numbers.
        """
        found: dict[tuple[str, ...], dict[str, Any]] = {}

        def walk(tree: Any, path: tuple[str, ...]) -> None:
            if not isinstance(tree, Mapping):
                return
            for theirs in self._words():
                if set(theirs) <= set(tree) and not any(
                    isinstance(tree[name], Mapping) for name in theirs
                ):
                    found[path] = {theirs.get(k) or k: v for k, v in tree.items()}
                    return
            for name, value in tree.items():
                walk(value, (*path, str(name)))

        walk(batch_stats, ())
        return found

    def with_nodes(
        self, batch_stats: Mapping, nodes: Mapping[tuple[str, ...], Mapping]
    ) -> dict:
        """`batch_stats` with the layers at the given paths replaced."""

        def walk(tree: Any, path: tuple[str, ...]) -> Any:
            if path in nodes:
                for theirs in self._words():
                    if set(theirs) <= set(tree):
                        back = {ours: name for name, ours in theirs.items()}
                        return {back.get(k, k): v for k, v in nodes[path].items()}
            if not isinstance(tree, Mapping):
                return tree
            return {
                name: walk(value, (*path, str(name))) for name, value in tree.items()
            }

        return walk(batch_stats, ())

    def unknown(self, batch_stats: Mapping) -> dict[str, str]:
        """Parts of `batch_stats` that look like a batch norm with other names."""
        known, found = self.nodes(batch_stats), {}

        def walk(tree: Any, path: tuple[str, ...]) -> None:
            if not isinstance(tree, Mapping) or path in known:
                return
            own = [k for k, v in tree.items() if not isinstance(v, Mapping)]
            if _like_a_norm(own):
                found["/".join(path)] = (
                    f"{'/'.join(path)!r} has statistics {_listed(own)}: pass"
                    ' `also={CLASS: {"mean": ..., "var": ...}}` with their names.'
                )
            for name, value in tree.items():
                walk(value, (*path, str(name)))

        walk(batch_stats, ())
        return found

    def _words(self) -> list[dict[str, str]]:
        """The known names of statistics, as dicts from our names."""
        pairs = [{"mean": "mean", "var": "var"}]
        for names in self._also.values():
            pair = {names.get(n, n): n for n in ("mean", "var")}
            if pair not in pairs:
                pairs.append(pair)
        return pairs


def check_statistics(caller: str, variables: Mapping) -> None:
    """Refuses variables of Linen without running statistics."""
    if not variables.get("batch_stats"):
        raise ValueError(
            f"`{caller}` needs variables with `batch_stats`, the running statistics of"
            f" batch norms; got {sorted(variables)}. Pass all variables of a model that"
            " has batch norms."
        )


def unrecognized(layer: Any, why: str) -> str:
    """The message why a layer is not recognized, and what to do about it."""
    if isinstance(layer, nn.Module):
        scope: Any = layer.scope
        name = "/".join(scope.path) or type(layer).__name__
    else:
        name = type(layer).__name__
    cls = type(layer).__name__
    return (
        f"{name!r} has statistics, but {why}; pass `also={cls}`, or a dict from it to"
        " its names."
    )


def warn_of_unknown(
    caller: str, unknown: Mapping[str, str], where: Where = None
) -> None:
    """Warns of skipped layers with statistics, with the reason, by path."""
    for path, why in unknown.items():
        if why and chosen(path, where):
            warnings.warn(f"`{caller}` skips a layer: {why}", stacklevel=4)


def ours(layer: Any) -> type:
    """Our class of a layer, or the one that replaces its class."""
    if isinstance(layer, jbn.linen.BatchNorm | jbn.nnx.BatchNorm):
        return plain(type(layer))
    return jbn.linen.BatchNorm if isinstance(layer, nn.Module) else jbn.nnx.BatchNorm


def plain(cls: Any) -> Any:
    """A class without the one whose place it takes."""
    return cls.jbn_place.cls if hasattr(cls, "jbn_place") else cls


def _arguments_of(cls: type) -> set[str]:
    if issubclass(cls, nn.Module):
        return {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
    names: set[str] = set()
    for base in cls.__mro__[:-1]:
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)
    return {n for n in names if n[0] != "_"} - {"self", "rngs", "options"}


def _linen_variables(layer: nn.Module) -> tuple[Mapping, Mapping]:
    found = layer.variables
    return found.get("params", {}), found.get("batch_stats", {})


def _statistics(layer: Any) -> dict[str, Any]:
    """The statistics of a layer, without those of its children."""
    if isinstance(layer, nn.Module):
        tree = _linen_variables(layer)[1]
        return {k: v for k, v in tree.items() if not isinstance(v, Mapping)}
    return {k: v for k, v in vars(layer).items() if isinstance(v, nnx.Variable)}


def _why_not(layer: Any) -> str | None:
    """Why a layer with statistics is not built like Flax's; empty if it is."""
    if isinstance(layer, nn.Module):
        params, stats = _linen_variables(layer)
        params, stats = nn.meta.unbox((dict(params), dict(stats)))
        stats = {k: v for k, v in stats.items() if not isinstance(v, Mapping)}
        params = {k: v for k, v in params.items() if not isinstance(v, Mapping)}
        fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
    else:
        own = {k: v for k, v in vars(layer).items() if k[0] != "_"}
        stats = {k: v for k, v in own.items() if isinstance(v, nnx.BatchStat)}
        params = {k: v for k, v in own.items() if isinstance(v, nnx.Param)}
        fields = {k: v for k, v in own.items() if not isinstance(v, nnx.Variable)}
        fields = {k: v for k, v in fields.items() if not isinstance(v, nnx.Module)}
    if not _like_a_norm(stats):
        return None
    if set(stats) - set(OWN_STATISTICS) != {"mean", "var"}:
        return f"calls them {_listed(stats)}, not `mean` and `var`"
    more = set(params) - {"scale", "bias"}
    if more:
        return f"also has the parameters {_listed(more)}"
    stats = {name: stats[name] for name in ("mean", "var")}
    shapes = {tuple(v.shape) for v in (*stats.values(), *params.values())}
    if len(shapes) > 1:
        return f"has variables of different shapes, {sorted(shapes)}"
    more = {k for k, v in fields.items() if v is not None and v is not False}
    more = {name for name in more - _HARMLESS if not name.endswith("_init")}
    if more:
        return f"has fields that Flax's does not have, {_listed(more)}"
    if not {"epsilon", "eps"} & set(fields):
        return "no field `epsilon`"
    return ""


def _like_a_norm(statistics: Iterable[str]) -> bool:
    found = " ".join(statistics)
    return "mean" in found and any(word in found for word in ("var", "std"))


def _check_also(cls: Any, names: Any) -> None:
    if not isinstance(cls, type) or not issubclass(cls, nn.Module | nnx.Module):
        raise TypeError(
            "`also` takes classes of Linen or NNX modules, or a dict from such classes"
            f" to names; got {cls!r}."
        )
    if not isinstance(names, Mapping):
        raise TypeError(
            f"`also` must map `{cls.__name__}` to a dict of names, such as"
            f' {{"mean": "running_mean"}}; got {names!r}.'
        )
    calls = options_of(CallOptions)
    known = {*VARIABLES, "use_running_average", *options_of(LayerOptions), *calls}
    arguments = inspect.signature(cls.__call__).parameters.values()
    for name, theirs in names.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"`also` maps our names to those of `{cls.__name__}`, but {name!r} is"
                f" not one of ours.{hint}"
            )
        if name in VARIABLES and not isinstance(theirs, str):
            raise TypeError(
                f"`also` must map {name!r} to the name of a variable of"
                f" `{cls.__name__}`; got {theirs!r}."
            )
        if name not in calls or theirs is None or callable(theirs):
            continue
        passing = any(p.kind is p.VAR_KEYWORD for p in arguments)
        if not passing and theirs not in {p.name for p in arguments}:
            raise ValueError(
                f"`also` must map {name!r} to an argument of the call of"
                f" `{cls.__name__}`, a function of the dict of these arguments, or"
                f" `None`; got {theirs!r}."
            )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
