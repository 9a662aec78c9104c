"""Batch normalization for JAX: `(x, params, batch_stats) -> (y, batch_stats)`."""

import importlib
from typing import TYPE_CHECKING

from jbn._moments import merge as merge, moments as moments
from jbn._normalize import normalize as normalize
from jbn._shrink import shrink as shrink
from jbn.running import (
    commit as commit,
    update_batch_stats as update_batch_stats,
)
from jbn.typing import (
    BatchStats as BatchStats,
    Moments as Moments,
    Params as Params,
)
from jbn.variants.batch_norm import batch_norm as batch_norm, init as init
from jbn.variants.conditional import (
    conditional_batch_norm as conditional_batch_norm,
)
from jbn.variants.domain import domain_batch_norm as domain_batch_norm
from jbn.variants.frozen import frozen_batch_norm as frozen_batch_norm
from jbn.variants.ghost import ghost_batch_norm as ghost_batch_norm
from jbn.variants.graph import graph_norm as graph_norm
from jbn.variants.renorm import batch_renorm as batch_renorm
from jbn.weighting.balance import (
    group_weights as group_weights,
    sample_weights as sample_weights,
)
from jbn.weighting.packed import segment_ids as segment_ids
from jbn.weighting.trim import trimmed_weights as trimmed_weights


if TYPE_CHECKING:
    from jbn import (
        equinox as equinox,
        linen as linen,
        models as models,
        nnx as nnx,
        tools as tools,
        training as training,
    )
    from jbn.linen import (
        BatchNorm as BatchNorm,
        BatchRenorm as BatchRenorm,
        ConditionalBatchNorm as ConditionalBatchNorm,
        DomainBatchNorm as DomainBatchNorm,
        FrozenBatchNorm as FrozenBatchNorm,
        GhostBatchNorm as GhostBatchNorm,
        GraphNorm as GraphNorm,
    )
    from jbn.variants.sparse import (
        SparseOutput as SparseOutput,
        sparse_batch_norm as sparse_batch_norm,
    )

__version__ = "0.2.0"

# Imported on first use, so that `import jbn` only needs JAX, and is fast.
_LATE = {
    **dict.fromkeys(
        (
            "BatchNorm",
            "BatchRenorm",
            "ConditionalBatchNorm",
            "DomainBatchNorm",
            "FrozenBatchNorm",
            "GhostBatchNorm",
            "GraphNorm",
        ),
        "jbn.linen",
    ),
    **dict.fromkeys(("SparseOutput", "sparse_batch_norm"), "jbn.variants.sparse"),
}
_MODULES = "equinox", "linen", "models", "nnx", "tools", "training"


if not TYPE_CHECKING:  # Pyright would accept any misspelled name.

    def __getattr__(name: str):
        if name in _LATE:
            return getattr(importlib.import_module(_LATE[name]), name)
        if name in _MODULES:
            return importlib.import_module(f"jbn.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATE, *_MODULES})
