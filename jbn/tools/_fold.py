"""Fold batch norms at inference into the linear layers before or after them."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.linen import dtypes as linen_dtypes
from flax.nnx.nn import dtypes as nnx_dtypes
from jax import lax

import jbn.linen
import jbn.nnx
from jbn import axes
from jbn.nnx import _assign
from jbn.ops import numeric
from jbn.tools import dataflow
from jbn.tools._convert import Converted
from jbn.tools.fold_into import (
    Linear,
    affine,
    at,
    check_known,
    into_next,
    into_previous,
    rounded,
    spread,
    wide_array,
)
from jbn.tools.in_place import in_place_of
from jbn.tools.layers import Where, chosen, is_linen, what_matches
from jbn.tools.norms import (
    FLAX_NORMS,
    LINEN_NORMS,
    OWN_STATISTICS,
    VARIABLES,
    Also,
    Norm,
    Norms,
    is_flax,
    plain,
    unrecognized,
)
from jbn.typing import Activation, ArrayLike


NNXModel = TypeVar("NNXModel", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, eq=False)
class Folded:
    """A Linen model with batch norms folded; made by `fold`.

    Attributes:
        model: The original model.
        variables: Its variables, as plain dicts, without those of folded batch norms
            and with changed linear layers.
        report: For each batch norm, by path, `folded into PATH` or `kept: REASON`.
        skips: By path, what remains to do at each folded batch norm.
        biased: Paths of the linear layers that got a bias.
    """

    model: nn.Module
    variables: dict[str, Any]
    report: dict[str, str]
    skips: Mapping[str, Callable[..., jax.Array]]
    biased: frozenset[str]

    def apply(self, variables: Mapping, *args: Any, **kwargs: Any) -> Any:
        """Applies the model, with the folded layers.

        Args:
            variables: `self.variables`, or a checkpoint of them.
            *args: As for `model.apply`.
            **kwargs: As for `model.apply`.

        Returns:
            What `model.apply` returns.

        Raises:
            ValueError: If `variables` are not folded, or if a folded batch norm should
                normalize by the batch, or with a mask.
        """
        with nn.intercept_methods(self._intercept):
            return self.model.apply(variables, *args, **kwargs)

    def _intercept(self, next_call, args, kwargs, context):
        layer: Any = context.module
        if context.method_name != "__call__":
            return next_call(*args, **kwargs)
        if isinstance(layer, Converted):  # It may have no norm left to replace.
            return layer.run(args, kwargs)[0]
        scope = layer.scope
        path = "/".join(scope.path)
        skip: Any = self.skips.get(path)
        if skip is not None and skip.is_for(layer):
            if scope.has_variable("batch_stats", skip.norm.name("mean")):
                raise _not_folded(path)
            return skip(layer, args, kwargs)
        is_linear = issubclass(type(layer), LINEAR)
        if path in self.biased and is_linear and not layer.use_bias:
            if not scope.has_variable("params", "bias"):
                raise _not_folded(path)
            # The call from here has the bias, so it passes.
            return layer.clone(parent=scope, use_bias=True)(*args, **kwargs)
        return next_call(*args, **kwargs)


def _not_folded(path: str) -> ValueError:
    return ValueError(
        f"`variables` are not those of the folded model: {path!r} has its old"
        " variables. Pass `folded.variables`."
    )


class FoldedNorm(nnx.Module):
    """Stands for a folded batch norm in an NNX model: returns its input.

    It has the constructor arguments of the batch norm, but no variables, and refuses to
    normalize by the batch. Code that asks by `isinstance` takes it for the batch norm.
    """

    use_running_average: bool | None
    skip: Callable[..., jax.Array]

    def __call__(self, x: ArrayLike, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns `x`, in the dtype of the batch norm's output."""
        return self.skip(self, (x, *args), kwargs)

    def set_view(self, use_running_average: bool | None = None):
        """Sets the mode; called by `nnx.view`.

        Args:
          use_running_average: Whether to normalize by the running statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


@overload
def fold(
    model: nn.Module,
    variables: Mapping,
    /,
    *inputs: Any,
    where: Where = None,
    also: Also = None,
    **kwargs: Any,
) -> Folded: ...
@overload
def fold(
    model: NNXModel,
    /,
    *inputs: Any,
    where: Where = None,
    also: Also = None,
    **kwargs: Any,
) -> NNXModel: ...
def fold(
    model: Any, /, *inputs: Any, where: Where = None, also: Also = None, **kwargs: Any
) -> Any:
    """Folds the batch norms of a model, for inference, into adjacent linear layers.

    At inference a batch norm multiplies by constants and adds constants. A dense layer
    or convolution before it can do this with its own kernel and bias, and so can one
    after it that does not pad with zeros. TensorFlow calls this "fold", PyTorch
    `fuse_conv_bn_eval` and `fuse_linear_bn_eval`. `fold` works on a whole model:

        folded = fold(model, variables, x, train=False)        # Linen
        y = folded.apply(folded.variables, x, train=False)

        folded = fold(model, x)                                # NNX, after model.eval()
        y = folded(x)

    The model is traced once, with the given arguments, to find which layers are
    adjacent; its code does not change. A batch norm is folded into the layer before it,
    or else into the layer after it, if there are only changes of shape and dtype
    between the two, the values between them are not used elsewhere, and both are called
    once. Otherwise it is kept, for example if a layer is shared, or runs inside `scan`,
    `vmap` or `cond`; if the kernel is computed (as in weight normalization) or also
    used elsewhere; if features are along other axes; if the next layer pads with zeros;
    or if scale and bias depend on the call. `foldable` and `Folded.report` give the
    reasons. A norm with an `activation` or a `residual` can only be folded into the
    layer before it, and still applies these.

    Folding is done in float64 and rounded once. Outputs differ by rounding errors: in
    float32 by about 1e-6 of their size, or more if a batch norm subtracts a mean far
    larger than the standard deviation; in 16 bits by the precision of the dtype. The
    folded model is about as accurate as the original.
    The result is for inference only: folded layers refuse to normalize by the batch. To
    load a checkpoint of folded variables, fold the model with any variables, such as
    newly initialized ones, and apply the result to the checkpoint's.

    Args:
        model: A Linen or NNX model, with Flax's `BatchNorm`, ours, or classes of ours
            that are equal at inference: `BatchRenorm`, `GhostBatchNorm`,
            `FrozenBatchNorm`.
        *inputs: For Linen, the variables and the arguments of `model.apply`; for NNX,
            the arguments of the model. Arrays may be given as `jax.ShapeDtypeStruct`,
            except variables.
        where: The batch norms to fold, as for `convert`; by default all.
        also: Foreign batch norms, as for `convert`. They are first run on sample
            inputs: one that is not `scale * (x - mean) / sqrt(var + epsilon) + bias` at
            inference is kept.
        **kwargs: Further arguments of `model.apply` or of the call. Include the
            argument that makes the model normalize by its running statistics.

    Returns:
        For Linen, a `Folded`. For NNX, a copy of the model in which a `FoldedNorm`
        replaces each folded batch norm.

    Raises:
        TypeError: If `model` is not a Flax model, if Linen's variables are missing, or
            if variables are traced: folding is done once, outside of `jit`.
        ValueError: If a batch norm normalizes by the batch or updates its statistics,
            if there is none, or if none can be folded (with the reasons).

    Example:
        >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
        >>> x = jnp.ones((1, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> folded = fold(model, variables, x)
        >>> folded.report
        {'layers_1': 'folded into layers_0'}
        >>> list(folded.variables), list(folded.variables["params"])
        (['params'], ['layers_0'])
        >>> y = folded.apply(folded.variables, x)
        >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-6))
        True

    References:
        As for `jbn.tools.fold_into_previous`.
    """
    plan = plan_of("fold", model, inputs, kwargs, where, Norms(also))
    if not plan.folded:
        reasons = "".join(f"\n  {path}: {text}" for path, text in plan.report.items())
        raise ValueError(f"`fold` cannot fold any batch norm of the model:{reasons}")
    if is_linen(model):
        return _fold_linen(model, inputs[0], plan)
    return _fold_nnx(model, plan)


def foldable(
    model: nn.Module | nnx.Module,
    /,
    *inputs: Any,
    where: Where = None,
    also: Also = None,
    **kwargs: Any,
) -> dict[str, str]:
    """Reports what `fold` would do with each batch norm of a model.

    Args:
        model: As for `fold`, like the other arguments.
        *inputs: For Linen the variables, then the arguments of the model.
        where: Which batch norms.
        also: Other people's batch norms.
        **kwargs: Further arguments of the call.

    Returns:
        For each batch norm, by path, `folded into PATH` or `kept: REASON`.

    Raises:
        TypeError: As `fold` does.
        ValueError: If a batch norm normalizes by the batch or updates its statistics,
            or if there is none.

    Example:
        >>> norm = nn.BatchNorm(use_running_average=True)
        >>> model = nn.Sequential([nn.Conv(3, (3, 3)), nn.relu, norm])
        >>> x = jnp.ones((1, 8, 8, 1))
        >>> print(foldable(model, model.init(jax.random.key(0), x), x)["layers_2"])
        kept: the operation before it is `max`; its output is that of the model
    """
    return plan_of("foldable", model, inputs, kwargs, where, Norms(also)).report


# What is known of layers.

_DENSE = (nn.Dense, nnx.Linear)
_GENERAL = (nn.DenseGeneral, nnx.LinearGeneral)
_CONV = (nn.Conv, nnx.Conv)
_TRANSPOSED = (nn.ConvTranspose, nnx.ConvTranspose)
LINEAR = (*_DENSE, *_GENERAL, *_CONV, *_TRANSPOSED)
# Those that all do the same at inference.
_NORMS = (
    *FLAX_NORMS,
    *(
        getattr(skin, name)
        for skin in (jbn.linen, jbn.nnx)
        for name in ("BatchNorm", "BatchRenorm", "GhostBatchNorm", "FrozenBatchNorm")
    ),
)
# Arguments that change what a layer computes, with their defaults.
_FUNCTIONS = {
    "dot_general": (None, lax.dot_general),
    "dot_general_cls": (None,),
    "conv_general_dilated": (None, lax.conv_general_dilated),
    "conv_general_dilated_cls": (None,),
    "promote_dtype": (linen_dtypes.promote_dtype, nnx_dtypes.promote_dtype),
}


def _names(layer: Any, norm: Norm | None) -> dict[str, tuple[str, str]] | None:
    """The collection and name of each variable that a layer reads, by our name."""
    if isinstance(layer, LINEAR):
        names = {"kernel": ("params", "kernel"), "bias": ("params", "bias")}
        return names if layer.use_bias else {"kernel": names["kernel"]}
    if norm is None:
        return None
    names = {"mean": "batch_stats", "var": "batch_stats"}
    for name in ("scale", "bias"):
        if norm.is_foreign or getattr(layer, f"use_{name}"):
            names[name] = "params"
    return {name: (kind, norm.name(name)) for name, kind in names.items()}


def _why_unknown(layer: Any) -> str | None:
    """Why a layer may not compute what its class usually does."""
    cls = plain(type(layer))
    known = [c for c in (*LINEAR, *_NORMS) if issubclass(cls, c)]
    if not any(cls.__call__ is c.__call__ for c in known):
        return f"is of a class that `fold` does not know, `{cls.__name__}`"
    if getattr(layer, "shared_weights", True) is not True:
        return "does not share its weights between pixels"
    for name, usual in _FUNCTIONS.items():
        if hasattr(layer, name) and getattr(layer, name) not in usual:
            return f"has a custom `{name}`"
    return None


@dataclasses.dataclass(frozen=True)
class _NormCall:
    """The call of a batch norm: its names, its mode, and other arguments."""

    norm: Norm
    mode: bool | None  # whether it normalizes by the running statistics
    updates: bool
    rest: Mapping[str, Any]

    @property
    def is_masked(self) -> bool:
        return any(self.rest.get(name) is not None for name in ("mask", "weights"))


def _norm_call(
    norm: Norm, layer: Any, args: Sequence[Any], kwargs: Mapping, cls: Any = None
) -> _NormCall:
    """Reads the call of a batch norm; `args` do not include the input."""
    if norm.is_translated and is_flax(layer):
        # A subclass with its own code is kept, whatever its arguments mean.
        return _NormCall(norm, None, False, {})
    if norm.is_foreign or norm.is_translated:
        _, mode, kwargs = norm.call(layer, (None, *args), kwargs, cls)
        if norm.is_foreign:
            return _NormCall(norm, mode, mode is False, kwargs)
        args = (mode,)
    mode = args[0] if args else kwargs.get("use_running_average")
    if mode is None:
        mode = layer.use_running_average
    update = kwargs.get("update_stats")
    if update is None:
        update = getattr(layer, "update_stats", None)
    if update is None:
        update = mode is not None and not mode
    if getattr(layer, "freeze_mode", False):
        mode = True
    if getattr(layer, "freeze_stats", False):
        update = False
    return _NormCall(norm, mode, bool(update), kwargs)


def _check_mode(path: str, call: _NormCall) -> None:
    if call.updates or (call.mode is not None and not call.mode):
        what = "updates its statistics" if call.mode else "normalizes by the batch"
        raise ValueError(
            f"`fold` is for inference, but {path!r} {what}. Call the model as at"
            " inference, with `use_running_average=True` (in many models `train=False`;"
            " `model.eval()` for NNX)."
        )


def _does_more(call: dataflow.Call) -> bool:
    """Whether a batch norm does more than multiply by and add constants."""
    activation = getattr(call.layer, "activation", None)
    return activation is not None or call.kwargs.get("residual") is not None


@dataclasses.dataclass(frozen=True)
class _Skip:
    """What remains of the call of a folded batch norm."""

    path: str
    norm: Norm
    cls: type
    classes: frozenset[str]  # names of the classes of the layers at this path
    dtype: Any  # of the output, if given
    promoting: tuple[Any, ...]  # otherwise, dtypes to promote the input with
    ignores_mask: bool
    is_frozen: bool  # always normalizes by the running statistics
    activation: Activation | None

    def is_for(self, layer: Any) -> bool:
        """Whether a Linen layer at the same path is the one that was folded."""
        # By name: `nn.remat` and others create a class of this name for each call.
        return isinstance(layer, LINEN_NORMS) or type(layer).__name__ in self.classes

    def __call__(self, layer: Any, args: Sequence[Any], kwargs: Mapping) -> jax.Array:
        kwargs = dict(kwargs)
        x = (
            args[0]
            if args
            else next(kwargs.pop(n) for n in ("x", "inputs") if n in kwargs)
        )
        x = axes.as_inexact(x, None)
        call = _norm_call(self.norm, layer, args[1:], kwargs, self.cls)
        if not call.mode and not self.is_frozen:
            raise ValueError(
                f"{self.path!r} is folded, for inference: it cannot normalize by the"
                " batch. Pass `use_running_average=True`, or train the model that was"
                " passed to `fold`."
            )
        if call.is_masked and not self.ignores_mask:
            raise ValueError(
                f"{self.path!r} is folded, for calls without `mask` or `weights`. Pass"
                " `fold` the same arguments as the model."
            )
        dtype = self.dtype
        if dtype is None:
            dtype = functools.reduce(jnp.promote_types, self.promoting, x.dtype)
        y, residual = numeric.wide(x), kwargs.get("residual")
        if residual is not None:
            y = y + numeric.wide(jnp.asarray(residual)).astype(y.dtype)
        if self.activation is not None:
            y = self.activation(y)
        return y.astype(dtype)


def _skip(call: dataflow.Call, norm: Norm, classes: Iterable[str]) -> _Skip:
    layer, promoting = call.layer, []
    if isinstance(layer, nn.BatchNorm):
        promoting = [layer.param_dtype] * (layer.use_scale or layer.use_bias)
    elif is_flax(layer):
        found = (layer.mean, layer.var, layer.scale, layer.bias)
        promoting = [v.dtype for v in found if v is not None]
    return _Skip(
        call.path,
        norm,
        type(layer),
        frozenset(classes),
        call.y_dtype if norm.is_foreign else layer.dtype,
        tuple(promoting),
        is_flax(layer),
        getattr(layer, "freeze_mode", False),
        None if norm.is_foreign else getattr(layer, "activation", None),
    )


def _describe(layer: Any, x_rank: int, y_rank: int, kernel_rank: int) -> Linear | str:
    """The feature axes of a linear layer, or why they are unknown."""
    if isinstance(layer, _GENERAL):
        given = layer.batch_dims if isinstance(layer, nn.Module) else layer.batch_axis
        if given:
            return "has a different kernel for each index of a batch axis"
        axis = layer.axis if isinstance(layer.axis, Sequence) else (layer.axis,)
        rank = len(axis)
        return Linear(
            tuple(range(y_rank - (kernel_rank - rank), y_rank)),
            tuple(range(rank, kernel_rank)),
            tuple(sorted(a % x_rank for a in axis)),  # as Flax does
            tuple(range(rank)),
        )
    out, into = kernel_rank - 1, kernel_rank - 2
    if isinstance(layer, _TRANSPOSED) and layer.transpose_kernel:
        out, into = into, out
    groups = layer.feature_group_count if isinstance(layer, _CONV) else 1
    return Linear((y_rank - 1,), (out,), (x_rank - 1,), (into,), groups)


def _why_not_next(layer: Any) -> str | None:
    """Why a batch norm cannot be folded into the linear layer after it."""
    if isinstance(layer, _TRANSPOSED):
        return "inserts zeros between and around its inputs"
    if not isinstance(layer, _CONV):
        return None
    if any(d not in (None, 1) for d in _flat(layer.input_dilation)):
        return "inserts zeros between its inputs"
    padding = layer.padding
    if isinstance(padding, str):
        # The padding of "SAME" depends on the input size, unless the kernel has size 1.
        one = all(k == 1 for k in _flat(layer.kernel_size))
        exact = one or padding in ("VALID", "CIRCULAR", "REFLECT")
    else:
        exact = all(p <= 0 for p in _flat(padding))
    return None if exact else "pads its input with zeros"


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Iterable):
        return [leaf for part in value for leaf in _flat(part)]
    return [value]


# The plan: which batch norms can be folded.


def plan_of(
    caller: str, model: Any, inputs: tuple, kwargs: Mapping, where: Where, norms: Norms
) -> "_Plan":
    linen = is_linen(model)
    if linen and not (
        inputs and isinstance(inputs[0], Mapping) and "params" in inputs[0]
    ):
        raise TypeError(
            "A Linen model needs its variables, a dict with `params`: `fold("
            "model, variables, *inputs)`."
        )
    for leaf in jax.tree.leaves(inputs[0] if linen else nnx.state(model)):
        check_known(leaf, "variables")
    known: dict[str, _NormCall] = {}
    unknown: dict[str, str] = {} if linen else norms.unknown_in_nnx(model)
    classes: dict[str, set[str]] = {}

    def names(layer: Any) -> dict[str, tuple[str, str]] | None:
        if isinstance(layer, LINEAR):
            return _names(layer, None)
        norm = norms.of(layer)
        if linen and norm is not None:
            path = "/".join(layer.scope.path)
            if isinstance(norm, str):
                unknown[path] = unrecognized(layer, norm)
            else:
                classes.setdefault(path, set()).add(type(layer).__name__)
        return _names(layer, norm if isinstance(norm, Norm) else None)

    def check(path: str, layer: Any, args: Sequence[Any], kwargs: Mapping) -> None:
        norm = None if isinstance(layer, LINEAR) else norms.of(layer)
        if not isinstance(norm, Norm):
            return
        try:
            known[path] = _norm_call(norm, layer, args, kwargs)
        except ValueError as error:  # arguments that our layers do not have
            unknown[path] = str(error)
            return
        if chosen(path, where):
            _check_mode(path, known[path])

    flow = dataflow.trace(model, inputs, kwargs, dataflow.Layers(names, check))
    report = {
        path: f"kept: {why}" for path, why in unknown.items() if path not in known
    }
    if not linen:
        called = {call.path for call in flow.calls.values()}
        uncalled = [path for path in norms.in_nnx(model) if path not in called]
        report |= dict.fromkeys(uncalled, "kept: it is not called")
    report = {path: text for path, text in report.items() if chosen(path, where)}
    variables = inputs[0] if linen else None
    plan = _Plan(flow, where, known, classes, report, variables)
    if not plan.report:
        raise ValueError(
            f"`{caller}` found no batch norm that the model calls and that matches;"
            f" {where=}, and the model has {list(known) or 'none'}."
            f" {what_matches(list(known))}"
        )
    return plan


class _Plan:
    """Which batch norms are folded, and the resulting kernels and biases.

    Attributes:
        report: For each batch norm that matches, by path, the result.
        folded: The calls of the folded ones, by path.
        changed: New kernel and bias, in wide dtypes, of linear layers by path.
        into: For each folded batch norm the path of the linear layer, and which
            feature each entry of its kernel belongs to (of a shape that broadcasts).
    """

    def __init__(
        self,
        flow: dataflow.Flow,
        where: Where,
        known: Mapping[str, _NormCall],
        classes: Mapping[str, Iterable[str]],
        report: Mapping[str, str],
        variables: Mapping | None,
    ):
        self.flow = flow
        self.known = known
        self.classes = classes
        self.variables = variables
        self.folded: dict[str, int] = {}
        self.changed: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.into: dict[str, tuple[str, np.ndarray]] = {}
        norms = {
            call.path: index
            for index, call in flow.calls.items()
            if call.path in known and chosen(call.path, where)
        }
        self.report = dict.fromkeys(norms, "") | dict(report)
        # Repeat until nothing changes: a batch norm next to one that has been folded
        # may now be next to a linear layer.
        before = -1
        while len(self.folded) > before:
            before = len(self.folded)
            for path, index in norms.items():
                if path not in self.folded:
                    self.report[path] = self._fold(index)

    def array(self, path: str, name: str) -> Any:
        """A variable of a layer, or `None`."""
        leaf = self.flow.leaves.get((path, name))
        return None if leaf is None else leaf.array

    def skips(self) -> dict[str, _Skip]:
        """What remains to do at each folded batch norm."""
        calls = self.flow.calls
        return {
            path: _skip(calls[i], self.known[path].norm, self.classes.get(path, ()))
            for path, i in self.folded.items()
        }

    def _fold(self, index: int) -> str:
        call = self.flow.calls[index]
        why = self._why_not(index)
        if why:
            return f"kept: it {why}"
        gain_and_shift = self._affine(call)
        if isinstance(gain_and_shift, str):
            return f"kept: {gain_and_shift}"
        norm = self.known[call.path].norm
        axis = norm.field(call.layer, "axis")
        axis = -1 if axis is None else axis
        axis = (axis,) if isinstance(axis, int) else tuple(axis)
        places = sorted(a % len(call.x_shape) for a in axis)
        if norm.is_foreign and not self._is_as_said(call, *gain_and_shift, places):
            return (
                "kept: its output is not scale * (x - mean) / sqrt(var + epsilon) +"
                " bias with its own values (see `also`)"
            )
        calls = self.flow.calls
        passing = {p for p, i in self.folded.items() if not _does_more(calls[i])}
        reasons = []
        for forward in (False, True):
            found = self.flow.neighbor(index, places, forward, passing)
            if forward and _does_more(call):
                found = "it applies an activation or residual before the next layer"
            if not isinstance(found, str):
                found = self._into(*gain_and_shift, *found, forward)
            if not isinstance(found, str):
                path, self.changed[path], features = found
                self.into[call.path] = path, features
                self.folded[call.path] = index
                return f"folded into {path}"
            reasons.append(found)
        return "kept: " + "; ".join(reasons)

    def _why_not(self, index: int) -> str | None:
        """Why a layer cannot be analyzed."""
        call = self.flow.calls[index]
        norm_call = self.known.get(call.path)
        why = self.flow.obstacle(index)
        if norm_call is None or not norm_call.norm.is_foreign:
            why = why or _why_unknown(call.layer)
        if norm_call and norm_call.is_masked and not is_flax(call.layer):
            return why or "is called with a mask or weights"
        return why

    def _is_as_said(self, call: dataflow.Call, gain, shift, places) -> bool:
        """Runs a foreign layer on sample inputs: whether it is `gain * x + shift`."""
        mean, var = (self.array(call.path, name) for name in ("mean", "var"))
        rank = len(call.x_shape)
        noise = np.random.default_rng(0).normal(size=call.x_shape)
        mean, sd = (at(np.asarray(v, float), places, rank) for v in (mean, var**0.5))
        x = jnp.asarray(mean + 2 * sd * noise, jnp.float32)
        if self.variables is None:
            y = nnx.clone(call.layer)(x, *call.args, **call.kwargs)
        else:
            path = call.path.split("/") if call.path else []
            own = {
                collection: dataflow.get(tree, path)
                for collection, tree in self.variables.items()
            }
            own = {k: v for k, v in own.items() if v is not None}
            layer = call.layer.clone(parent=None, name=None)
            y = layer.apply(own, x, *call.args, **call.kwargs)
        gain, shift = (at(v, places, rank) for v in (gain, shift))
        wanted = np.asarray(x, float) * gain + shift
        size = np.abs(wanted).max() + np.abs(mean * gain).max()
        unit = float(jnp.finfo(jnp.asarray(y).dtype).eps)
        return bool(np.abs(np.asarray(y, float) - wanted).max() <= 100 * unit * size)

    def _affine(self, call: dataflow.Call) -> tuple[np.ndarray, np.ndarray] | str:
        names = ("scale", "bias", "mean", "var")
        found = [self.array(call.path, name) for name in names]
        scale, bias, mean, var = (
            None if v is None else wide_array(v, "variables") for v in found
        )
        assert var is not None
        norm = self.known[call.path].norm
        epsilon = norm.field(call.layer, "epsilon")
        if epsilon is None:
            return "it has no field `epsilon` (see `also`)"
        epsilon = float(epsilon)
        total = var + epsilon
        flax = is_flax(call.layer)
        if not np.all(total > 0 if flax else total >= 0):
            return "its variance is not positive"
        gain, shift = affine(scale, bias, mean, var, epsilon)
        if not (np.isfinite(gain).all() and np.isfinite(shift).all()):
            return "its variables are not finite"
        return gain, shift

    def _into(self, gain, shift, other: int, places: Sequence[int], forward: bool):
        """The path of a linear layer, its new arrays, and `into`; or why not."""
        call = self.flow.calls[other]
        path, layer = call.path, call.layer
        if path in self.known:
            way = "after" if forward else "before"
            return f"the layer {way} it, {path!r}, is kept"
        why = self._why_not(other) or (_why_not_next(layer) if forward else None)
        if why:
            return f"{path!r} {why}"
        old = [self.array(path, name) for name in ("kernel", "bias")]
        for v in old:
            if v is not None and not jnp.issubdtype(v.dtype, jnp.inexact):
                return f"{path!r} has variables of dtype {v.dtype}"
        kernel, bias = self.changed.get(
            path, [None if v is None else wide_array(v, "variables") for v in old]
        )
        assert kernel is not None
        where = _describe(layer, len(call.x_shape), len(call.y_shape), kernel.ndim)
        if isinstance(where, str):
            return f"{path!r} {where}"
        own = where.in_axes if forward else where.out_axes
        if not set(places) <= set(own):
            has = "takes its input features" if forward else "has its output features"
            return (
                f"{path!r} {has} along {_listed(own)}, but the batch norm along"
                f" {_listed(places)} of the same array"
            )
        shape = call.x_shape if forward else call.y_shape
        sizes = tuple(shape[a] for a in own)
        each = [own.index(a) for a in places]
        number = np.arange(gain.size).reshape(gain.shape)
        gain, shift, number = (
            np.broadcast_to(at(v, each, len(own)), sizes) for v in (gain, shift, number)
        )
        if forward:
            mask = getattr(layer, "mask", None)
            mask = None if mask is None else np.asarray(mask).astype(np.float64)
            new = into_next(kernel, bias, gain, shift, where, mask)
        else:
            new = into_previous(kernel, bias, gain, shift, where)
        # The dtypes of the parameters and, if given, of the computation.
        dtypes = {jnp.dtype(v.dtype) for v in old if v is not None}
        for dtype in dtypes | ({jnp.dtype(layer.dtype)} if layer.dtype else set()):
            if not all(_finite_in(v, dtype) for v in new):
                return f"the kernel or bias of {path!r} would overflow in {dtype}"
        return path, new, spread(number, kernel.shape, where, forward=forward)


def _finite_in(wide: np.ndarray, dtype: Any) -> bool:
    with np.errstate(all="ignore"):
        parts = np.stack([np.real(wide), np.imag(wide)])
        return bool(np.isfinite(parts.astype(jnp.finfo(dtype).dtype)).all())


def _listed(numbers: Sequence[int]) -> str:
    word = "axis" if len(numbers) == 1 else "axes"
    return f"{word} {', '.join(map(str, numbers))}"


# The folded models.


def _fold_linen(model: nn.Module, variables: Mapping, plan: _Plan) -> Folded:
    keep = lambda path: tuple(path.split("/")) if path else ()
    gone = {
        (collection, *keep(path))
        for path in plan.folded
        for collection in ("params", "batch_stats")
    }

    def plain(tree: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        parts = {
            name: plain(value, (*path, name))
            for name, value in tree.items()
            if (*path, name) not in gone
        }
        full = lambda v: not isinstance(v, Mapping) or len(v) > 0
        return {name: v for name, v in parts.items() if full(v) or not tree[name]}

    new = plain(variables, ())
    biased = set()
    for path, (kernel, bias) in plan.changed.items():
        node = dataflow.get(new, ("params", *keep(path)))
        olds = {"kernel": node["kernel"], "bias": node.get("bias")}
        if plan.array(path, "bias") is None:
            biased.add(path)
            olds["bias"] = None
        for name, wide in (("kernel", kernel), ("bias", bias)):
            array = _placed(wide, olds[name], dataflow.unboxed(olds["kernel"]))
            node[name] = _boxed(array, olds[name])
    return Folded(model, new, plan.report, plan.skips(), frozenset(biased))


def _boxed(array: jax.Array, old: Any) -> Any:
    return old.replace_boxed(array) if isinstance(old, dataflow.BOXES) else array


def _placed(wide: np.ndarray, old: Any, kernel: Any) -> jax.Array:
    """`wide`, with the dtype and sharding of `old`, or of the kernel for a new bias."""
    is_new = old is None
    old = kernel if is_new else dataflow.unboxed(old)
    new = rounded(wide, old)
    if not isinstance(old, jax.Array) or not old.committed:
        return new
    sharding = old.sharding
    if is_new and isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(
            sharding.mesh, jax.sharding.PartitionSpec()
        )
    return jax.device_put(new, sharding)


def _fold_nnx(model: Any, plan: _Plan) -> Any:
    model = nnx.clone(model)
    layers = dataflow.nnx_layers(model)
    for path, (kernel, bias) in plan.changed.items():
        layer = layers[path]
        old = layer.kernel[...]
        if layer.bias is None:
            layer.bias = nnx.Param(_placed(bias, None, old))
            layer.use_bias = True
        else:
            bias = _placed(bias, layer.bias[...], old)
            _assign(layer.bias, bias)
        _assign(layer.kernel, _placed(kernel, old, old))
    skips = plan.skips()
    for path in plan.folded:
        layer = layers[path]
        layer.skip = skips[path]
        layer.use_running_average = True
        names = [plan.known[path].norm.name(n) for n in VARIABLES]
        for name in (*names, *OWN_STATISTICS):
            if hasattr(layer, name):
                delattr(layer, name)
        # Change the class of the layer in place: its containers may be immutable.
        cls = in_place_of(layer, plan.known[path].norm, FoldedNorm)
        object.__setattr__(layer, "__class__", cls)
    return model
