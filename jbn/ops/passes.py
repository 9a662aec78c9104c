"""Whether a pass over memory stays by itself, or is the compiler's to join."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jbn.ops.placement import platform


def apart(arrays: Any) -> Any:
    """A view of arrays that what is computed from others is not joined with.

    XLA would write out what two passes over the same array compute. On a TPU it does
    not, and has passes ride on the convolutions before and behind them.
    """
    return arrays if platform() == "tpu" else lax.optimization_barrier(arrays)


def recomputed(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, of which nothing is kept for a backward pass but its arguments.

    Elsewhere than on a TPU with a barrier, without which XLA would find what the
    forward pass has computed, and keep that.
    """
    return jax.checkpoint(f, prevent_cse=platform() != "tpu")
