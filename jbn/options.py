"""The options of all batch norms: type, default and text, each declared once.

Functions take `**options: Unpack[Options]`, so that type checkers know their names and
types. `documented` gives each function the signature and the text that `help` shows.
"""

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import (
    Annotated,
    Any,
    NamedTuple,
    TypedDict,
    TypeVar,
    get_args,
    get_type_hints,
)

import jax
import jax.numpy as jnp

from jbn.typing import (
    Activation,
    ArrayLike,
    Axes,
    AxisIndexGroups,
    AxisName,
    DType,
    MaskedOutput,
)


Number = float | int | ArrayLike
# A function of the number of training calls so far, such as an Optax schedule.
Schedule = Callable[[jax.Array], Any]
_F = TypeVar("_F", bound=Callable[..., Any])
_C = TypeVar("_C", bound=type)


class Option(NamedTuple):
    """Default and text of an option."""

    default: Any
    text: str


class RowSettings(TypedDict, total=False):
    """Settings of methods without running statistics."""

    axis: Annotated[
        Axes,
        Option(-1, "Feature axis or axes. Statistics are taken over all other axes."),
    ]
    epsilon: Annotated[
        Number, Option(1e-5, "Added to the variance, inside the square root.")
    ]
    dtype: Annotated[
        DType | None, Option(None, "Dtype of the output; that of `x` by default.")
    ]
    axis_name: Annotated[
        AxisName | None,
        Option(
            None,
            "Mapped axis or axes (of `shard_map`, `pmap` or `vmap`) to take the"
            " statistics over. Elements count the same on every device, so shards may"
            " be uneven or empty. Under plain `jit` leave this unset: the statistics"
            " of a sharded `x` are already those of the whole batch.",
        ),
    ]
    axis_index_groups: Annotated[
        AxisIndexGroups | None,
        Option(
            None,
            "Partition of the indices of `axis_name` into groups that each take their"
            " own statistics.",
        ),
    ]
    activation: Annotated[
        Activation | None,
        Option(
            None,
            "An elementwise function, such as `jax.nn.relu`, applied last. In the layer"
            " it saves no further array: the backward pass computes its slope from `x`"
            " (and `residual`). It is applied in float32 or wider, before the output"
            " is rounded. Arrays that it closes over are constants.",
        ),
    ]
    masked_output: Annotated[
        MaskedOutput,
        Option(
            "normalized",
            "What the elements that `mask` leaves out come out as, after `residual` and"
            ' `activation`: `"normalized"` like all others, `"zero"`, or `"input"`, the'
            " elements of `x` as they are. No gradient passes through a zero; the"
            " cotangent of an input goes to `x` as it is. Without `mask` this does"
            " nothing; elements of weight 0 are normalized.",
        ),
    ]


class Settings(RowSettings, total=False):
    """Options that a layer fixes when it is made."""

    momentum: Annotated[
        Number | None,
        Option(
            0.99,
            "Weight of the *old* running statistic, as in Flax and Keras; PyTorch's is"
            " one minus this. For `None`, see `jbn.update_batch_stats`.",
        ),
    ]
    unbiased: Annotated[
        bool,
        Option(
            False,
            "Update the running variance by the unbiased one, as PyTorch does.",
        ),
    ]
    reference_weight: Annotated[
        Number | None,
        Option(
            None,
            "The batch weight that `momentum` is meant for; batches of other weights"
            " count by theirs. See `jbn.update_batch_stats`, also for `second_moment`.",
        ),
    ]
    second_moment: Annotated[
        bool,
        Option(
            False,
            "Make the running variance that of all rows, including the scatter of the"
            " batches' means.",
        ),
    ]
    tau: Annotated[
        Number | Schedule,
        Option(
            0.0,
            "Shrinks the statistics used to normalize in training towards the running"
            " ones, which count as `tau` more rows: for batches, domains or groups so"
            " small that their own statistics are mostly noise. 0 is batch norm,"
            " infinity normalizes by the running statistics. One number or one per"
            " feature, traced or not; differentiable. The running statistics are"
            " updated by the batch alone. A layer also takes a schedule: a function of"
            " the number of training calls, which it counts in `step`. See"
            " `jbn.shrink`.",
        ),
    ]
    min_weight: Annotated[
        Number,
        Option(
            0.0,
            "A feature whose elements have at most this total weight is treated as if"
            " they had none. With 1, a batch of one row is normalized by the running"
            " statistics; otherwise its variance is 0, and its output all `bias`.",
        ),
    ]
    trim: Annotated[
        Number | None,
        Option(
            None,
            "Elements further than this many running standard deviations from the"
            " running mean do not count in the statistics, unless most elements are"
            " that far. So an outlier cannot move the statistics. Takes one more"
            " all-reduce, and saves a mask for the backward pass (with `weights`,"
            " weights of all elements). See `jbn.trimmed_weights`.",
        ),
    ]


class RowCallOptions(TypedDict, total=False):
    """Options of a call of methods without running statistics."""

    mask: Annotated[
        ArrayLike | None,
        Option(
            None,
            "Boolean; which elements count. Either of the rank of `x`, with size 1"
            " along axes where it does not vary, or one entry per row (the shape of"
            " `x` without its features). Masked elements do not affect the others,"
            " even if they are NaN. They are still normalized; the output of one that"
            " is not finite is `bias`.",
        ),
    ]
    weights: Annotated[
        ArrayLike | None,
        Option(
            None,
            "Non-negative real weight of each element, shaped like a mask; an integer"
            " weight is the same as repeating the row. Not together with `mask`.",
        ),
    ]
    residual: Annotated[
        ArrayLike | None,
        Option(
            None,
            "Added to the output, before `activation`; of the shape of `x`.",
        ),
    ]


class CallOptions(RowCallOptions, total=False):
    """Options that a layer takes in each call."""

    update_stats: Annotated[
        bool | None,
        Option(
            None,
            "Whether to update the running statistics by the batch; by default"
            " `not use_running_average`.",
        ),
    ]


class RowOptions(RowSettings, RowCallOptions, total=False):
    """All options of functions without running statistics."""


class LayerCallOptions(CallOptions, total=False):
    """Options of a call of a layer; some override its settings."""

    tau: Annotated[
        Number | None, Option(None, "In place of the layer's, for this call.")
    ]


class Options(Settings, CallOptions, total=False):
    """All options of the functions."""


class AffineSettings(TypedDict, total=False):
    """How layers make scale and bias."""

    param_dtype: Annotated[DType, Option(jnp.float32, "Dtype of scale and bias.")]
    use_bias: Annotated[bool, Option(True, "Whether to learn a bias.")]
    use_scale: Annotated[bool, Option(True, "Whether to learn a scale.")]
    bias_init: Annotated[
        Callable[..., Any],
        Option(jax.nn.initializers.zeros, "Initializer of the bias."),
    ]
    scale_init: Annotated[
        Callable[..., Any],
        Option(jax.nn.initializers.ones, "Initializer of the scale."),
    ]


class LayerOnly(AffineSettings, total=False):
    """Further settings of layers, in Linen and NNX."""

    use_fast_variance: Annotated[
        bool,
        Option(
            True,
            "Accepted, without effect: there is only one variance here, which costs as"
            " much as Flax's fast one and is accurate at any mean.",
        ),
    ]
    update_stats: Annotated[
        bool | None,
        Option(
            None,
            "Whether to update the running statistics; by default in training only."
            " Set it here or in the call.",
        ),
    ]
    debias: Annotated[
        bool,
        Option(
            False,
            "Keep running statistics without bias towards their initial values."
            " Adds the statistic `weight`, as `momentum=None` does.",
        ),
    ]
    accumulate: Annotated[
        bool,
        Option(
            False,
            "Only collect moments in training, for `jbn.commit` or `jbn.nnx.commit`."
            " Adds the statistics `pending`.",
        ),
    ]


class RowLayerOptions(RowSettings, AffineSettings, total=False):
    """All settings of layers without running statistics."""


class LayerOptions(Settings, LayerOnly, total=False):
    """All settings of layers."""


@functools.cache
def options_of(record: type) -> dict[str, tuple[Any, Option]]:
    """The type and the `Option` of each name of a record."""
    hints = get_type_hints(record, include_extras=True)
    return {name: get_args(hint) for name, hint in hints.items()}


@functools.cache
def defaults(record: type) -> dict[str, Any]:
    """The default of each name of a record."""
    return {name: option.default for name, (_, option) in options_of(record).items()}


def completed(record: type, given: Mapping[str, Any], function: str) -> dict[str, Any]:
    """The options of `record` given to `function`, with defaults for the others."""
    known = defaults(record)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise TypeError(f"`{function}` has no option `{name}`.{hint}")
    return {**known, **given}


def hashable(value: Any) -> Any:
    """An option, such as axes or groups of devices, with tuples in place of lists."""
    return tuple(map(hashable, value)) if isinstance(value, list | tuple) else value


def documented(record: type) -> Callable[[_F], _F]:
    """Spells out the `**options` of a function in its signature and docstring.

    A parameter that is in the signature already keeps its place and its default there.
    """

    def decorate(f: _F) -> _F:
        signature = inspect.signature(f)
        *parameters, last = signature.parameters.values()
        assert last.kind is last.VAR_KEYWORD
        parameters += [
            inspect.Parameter(
                name, last.KEYWORD_ONLY, default=option.default, annotation=kind
            )
            for name, (kind, option) in options_of(record).items()
            if name not in signature.parameters
        ]
        f.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportFunctionMemberAccess]
        f.__doc__ = _spelled_out(f.__doc__, record)
        return f

    return decorate


def described(record: type) -> Callable[[_C], _C]:
    """Spells out the `**settings` of a class in its docstring."""

    def decorate(cls: _C) -> _C:
        cls.__doc__ = _spelled_out(cls.__doc__, record)
        return cls

    return decorate


def _spelled_out(doc: str | None, record: type) -> str:
    """The docstring, with the entry `**options` replaced by one per option."""
    lines = inspect.cleandoc(doc or "").split("\n")
    start = next((i for i, v in enumerate(lines) if v.strip().startswith("**")), None)
    if start is None:
        return "\n".join(lines)
    indent = " " * (len(lines[start]) - len(lines[start].lstrip()))
    end = start + 1
    while end < len(lines) and lines[end].startswith(indent + " "):
        end += 1
    entries = [
        textwrap.fill(
            f"{name}: {option.text}",
            88,
            initial_indent=indent,
            subsequent_indent=indent + "    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, (_, option) in options_of(record).items()
    ]
    return "\n".join([*lines[:start], *entries, *lines[end:]])
