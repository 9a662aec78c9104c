"""Whether a pass over memory stays by itself, or is the compiler's to join."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from jbn.ops.placement import platform


def apart(arrays: Any) -> tuple[Any, Any, Any]:
    """Views of arrays for an output, and for two sums over rows, in a backward pass.

    What is computed from one view is not joined with what is computed from another.
    Else XLA would write out what two passes over the same array compute. On a TPU it
    does not, and has passes ride on the convolutions before and behind them: there,
    all views are one. On a CPU both sums have the same.

    On a GPU XLA takes sums of the same arrays in one pass, but first decides for each
    what to compute in it: of an activation that both read, nothing.
    """
    if platform() == "tpu":
        return arrays, arrays, arrays
    output = lax.optimization_barrier(arrays)
    if platform() == "gpu":
        # Barriers around the same arrays would be one.
        sums = lax.optimization_barrier(output)
        return output, sums, lax.optimization_barrier(sums)
    sums = lax.optimization_barrier(arrays)
    return output, sums, sums


def recomputed(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, of which nothing is kept for a backward pass but its arguments.

    Elsewhere than on a TPU with a barrier, without which XLA would find what the
    forward pass has computed, and keep that.
    """
    return jax.checkpoint(f, prevent_cse=platform() != "tpu")


def output_at_hand() -> bool:
    """Whether a backward pass may read an output as well as what it was made of.

    Something behind it keeps it, most likely, such as a convolution. On a TPU XLA makes
    it anew there rather than keep it.
    """
    return platform() != "tpu"


def written_out(v: jax.Array) -> jax.Array:
    """`v`, and its cotangent, of which XLA on GPU reads what is there anyway.

    It would rather compute either anew from all that it comes from. Worse, it leaves
    out a rounding to 16 bits where the next operation is in 32, and keeps what was
    rounded.
    """
    return lax.optimization_barrier(v) if platform() == "gpu" else v


def rounded(v: jax.Array, dtype: np.dtype) -> jax.Array:
    """`v` in `dtype`, but on a CPU, which computes in 32 bits."""
    return v if platform() == "cpu" else v.astype(dtype)
