"""An Equinox module. It creates, reads and writes its state, and calls one function."""

from typing import TYPE_CHECKING, Any, TypedDict, Unpack, get_type_hints

import equinox as eqx
import jax
import jax.numpy as jnp

from jbn import axes
from jbn.options import (
    LayerCallOptions,
    LayerOptions,
    Settings,
    completed,
    documented,
    options_of,
)
from jbn.typing import ArrayLike, BatchStats, Params
from jbn.variants.batch_norm import batch_norm, init


# Arguments that Equinox's layer also has, or whose defaults differ.
_NAMED = {"axis", "axis_name", "debias", "dtype", "epsilon", "momentum", "param_dtype"}

_hints = get_type_hints(LayerOptions, include_extras=True)
_others: dict[str, Any] = {k: hint for k, hint in _hints.items() if k not in _NAMED}
_Options: Any = TypedDict("_Options", _others, total=False)  # pyright: ignore[reportArgumentType]

if TYPE_CHECKING:

    class _Fields(eqx.nn.StatefulLayer):
        def __getattr__(self, name: str) -> Any: ...
else:
    fields = {name: eqx.field(static=True) for name in _hints}
    body = {"__annotations__": dict.fromkeys(fields, Any), "__module__": __name__}
    _Fields = type(eqx.Module)("_Fields", (eqx.nn.StatefulLayer,), body | fields)


class BatchNorm(_Fields):
    """Normalizes each feature by the batch: `jbn.batch_norm` as an Equinox module.

    Replaces `equinox.nn.BatchNorm(..., mode="batch")`: it has the same arguments in the
    same order and the parameters `weight` and `bias`, takes and returns an
    `equinox.nn.State`, and supports `equinox.nn.inference_mode`. The differences: the
    output has the dtype of `x`, evaluation is right from the first update on, and
    `axis_name` may be omitted if the layer sees the whole batch. All options of
    `jbn.batch_norm` are available.
    """

    weight: jax.Array | None
    bias: jax.Array | None
    batch_state_index: eqx.nn.StateIndex
    more_state_index: eqx.nn.StateIndex
    inference: bool
    input_size: int | tuple[int, ...] = eqx.field(static=True)

    @documented(_Options)
    def __init__(
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
            axis_name: Mapped axes to take the statistics over, besides those of `x`.
            eps: Added to the variance, inside the square root.
            channelwise_affine: Whether to learn `weight` and `bias`.
            momentum: Weight of the *old* running statistic; `None`: cumulative.
            inference: Whether to normalize by the running statistics.
            dtype: Dtype of `weight` and `bias`. Statistics are float32 or wider.
            mode: `"batch"`; Equinox's mode `"ema"`, which trains by running statistics,
                is not offered.
            axis: Feature axis or axes of `x`, without the axes of `vmap`.
            debias: Whether to remove the initial values from the running statistics.
            output_dtype: Dtype of the output; that of `x` by default.
            **settings: Replaced by one entry per option.
        """
        if mode != "batch":
            raise ValueError(f'`BatchNorm` takes `mode="batch"` alone; got {mode!r}.')
        given = completed(_Options, settings, "BatchNorm")
        if callable(given["tau"]):
            raise TypeError("`BatchNorm` counts no calls: give `tau` in each, traced.")
        given |= {"axis": axis, "debias": debias, "epsilon": eps, "momentum": momentum}
        given |= {"axis_name": axis_name, "dtype": output_dtype}
        given["param_dtype"] = jnp.float32 if dtype is None else dtype
        for name, value in given.items():
            setattr(self, name, _hashable(value))
        track = debias or momentum is None
        _, fresh = init(input_size, track_weight=track, accumulate=self.accumulate)
        make = (jax.random.key(0), fresh.mean.shape, self.param_dtype)
        scaled, moved = (
            channelwise_affine and v for v in (self.use_scale, self.use_bias)
        )
        self.weight = self.scale_init(*make) if scaled else None
        self.bias = self.bias_init(*make) if moved else None
        self.batch_state_index = eqx.nn.StateIndex((fresh.mean, fresh.var))
        self.more_state_index = eqx.nn.StateIndex((fresh.weight, fresh.pending))
        self.inference = inference
        self.input_size = input_size

    @documented(LayerCallOptions)
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: ArrayLike,
        state: eqx.nn.State,
        *,
        key: Any = None,
        inference: bool | None = None,
        **call: Unpack[LayerCallOptions],
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
        indices = self.batch_state_index, self.more_state_index
        running = BatchStats(*state.get(indices[0]), *state.get(indices[1]))
        options: dict[str, Any] = {k: getattr(self, k) for k in options_of(Settings)}
        options |= call
        for name in ("tau", "update_stats"):
            if options.get(name) is None:
                options[name] = getattr(self, name)
        mode = self.inference if inference is None else inference
        x = axes.as_inexact(x, self.dtype)
        params = Params(self.weight, self.bias)
        y, new = batch_norm(x, params, running, use_running_average=mode, **options)
        if new is not running:
            state = state.set(indices[0], new[:2]).set(indices[1], new[2:])
        return y, state


def _hashable(value: Any) -> Any:
    """Lists of axes or groups as tuples: Equinox compares static fields."""
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
