"""Batch normalization for JAX: `(x, params, batch_stats) -> (y, batch_stats)`."""

from typing import TYPE_CHECKING

from jbn.functional import batch_norm as batch_norm, init as init
from jbn.moments import merge as merge, moments as moments
from jbn.normalize import normalize as normalize
from jbn.running import update_batch_stats as update_batch_stats
from jbn.typing import (
    BatchStats as BatchStats,
    Moments as Moments,
    Params as Params,
)


if TYPE_CHECKING:
    from jbn.linen import BatchNorm as BatchNorm

__version__ = "0.1.0"


def __getattr__(name: str):
    # Imported on first use, so that `import jbn` needs nothing but JAX.
    if name == "BatchNorm":
        from jbn.linen import BatchNorm

        return BatchNorm
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
