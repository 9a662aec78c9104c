"""An Equinox module. It creates, reads and writes its state, and calls one function."""

from typing import Any, TypedDict, Unpack, get_type_hints

import equinox as eqx
import jax

from jbn import axes, options
from jbn.typing import ArrayLike, BatchStats, Params
from jbn.variants.batch_norm import batch_norm, init


_hints = get_type_hints(options.LayerOptions, include_extras=True)
_RENAMED = {"dtype", "epsilon", "param_dtype"}  # as Equinox calls them
_own: Any = {k: hint for k, hint in _hints.items() if k not in _RENAMED}
_Options: Any = TypedDict("_Options", _own)  # pyright: ignore[reportArgumentType]
_body = {name: eqx.field(static=True) for name in _hints}
_body |= {"__annotations__": dict.fromkeys(_hints, Any), "__module__": __name__}
_Fields: Any = type(eqx.Module)("_Fields", (eqx.nn.StatefulLayer,), _body)  # pyright: ignore[reportGeneralTypeIssues]


class BatchNorm(_Fields):
    """Normalizes each feature by the batch: `jbn.batch_norm` as an Equinox module.

    Replaces `equinox.nn.BatchNorm(..., mode="batch")`, with its arguments in the same
    order, its parameters `weight` and `bias`, `equinox.nn.State` and `inference_mode`.
    The differences: the output has the dtype of `x`, evaluation is right from the first
    update on, and `axis_name` may be omitted if the layer sees the whole batch.
    """

    weight: jax.Array | None
    bias: jax.Array | None
    batch_state_index: eqx.nn.StateIndex
    more_state_index: eqx.nn.StateIndex
    inference: bool
    input_size: int | tuple[int, ...] = eqx.field(static=True)

    @options.documented(_Options)
    def __init__(  # noqa: D417  # The record explains the others.
        self,
        input_size: int | tuple[int, ...],
        axis_name: Any = None,
        eps: float = 1e-5,
        channelwise_affine: bool = True,
        momentum: float | None = 0.99,
        inference: bool = False,
        dtype: Any = None,
        mode: str = "batch",
        *,
        axis: int | tuple[int, ...] = 0,
        debias: bool = True,
        output_dtype: Any = None,
        **settings: Any,
    ):
        """Makes the parameters and the initial state.

        Args:
            input_size: How many features; for several feature axes their sizes.
            eps: Added to the variance, inside the square root.
            channelwise_affine: Whether to learn `weight` and `bias`.
            inference: Whether to normalize by the running statistics.
            dtype: Dtype of `weight` and `bias`. Statistics are float32 or wider.
            mode: `"batch"` alone; Equinox's `"ema"` trains by running statistics.
            output_dtype: Dtype of the output; that of `x` by default.
            **settings: Replaced by one entry per option.
        """
        if mode != "batch":
            raise ValueError(f'`BatchNorm` takes `mode="batch"` alone; got {mode!r}.')
        given = options.completed(_Options, settings, "BatchNorm")
        given |= {"axis": axis, "axis_name": axis_name, "debias": debias}
        given |= {"dtype": output_dtype, "epsilon": eps, "momentum": momentum}
        given["param_dtype"] = jax.numpy.float32 if dtype is None else dtype
        if callable(given["tau"]):
            raise TypeError("`BatchNorm` counts no calls: give `tau` in each, traced.")
        for name, value in given.items():
            setattr(self, name, options.hashable(value))
        track = debias or momentum is None
        _, new = init(input_size, track_weight=track, accumulate=self.accumulate)
        for name, ours in (("weight", "scale"), ("bias", "bias")):
            value, make = None, given[f"{ours}_init"]
            if channelwise_affine and given[f"use_{ours}"]:
                value = make(jax.random.key(0), new.mean.shape, self.param_dtype)
            setattr(self, name, value)
        self.batch_state_index = eqx.nn.StateIndex((new.mean, new.var))
        self.more_state_index = eqx.nn.StateIndex((new.weight, new.pending))
        self.inference, self.input_size = inference, input_size

    @options.documented(options.LayerCallOptions)
    def __call__(
        self,
        x: ArrayLike,
        state: eqx.nn.State,
        *,
        key: Any = None,
        inference: bool | None = None,
        **call: Unpack[options.LayerCallOptions],
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Normalizes `x` and, in training, updates the running statistics.

        Args:
            x: Input of shape (features, ...), or as `axis` says.
            state: Holds the running statistics.
            key: Not used; Equinox's containers pass it.
            inference: Whether to normalize by the running statistics.
            **call: Replaced by one entry per option.

        Returns:
            The normalized array, of the shape of `x`, and the new state.
        """
        places = self.batch_state_index, self.more_state_index
        running = BatchStats(*state.get(places[0]), *state.get(places[1]))
        names = *options.options_of(options.Settings), "update_stats"
        given = {name: getattr(self, name) for name in names}
        given |= {name: v for name, v in call.items() if v is not None}
        mode = self.inference if inference is None else inference
        x, params = axes.as_inexact(x, self.dtype), Params(self.weight, self.bias)
        y, new = batch_norm(x, params, running, use_running_average=mode, **given)
        if new is not running:
            state = state.set(places[0], new[:2]).set(places[1], new[2:])
        return y, state
