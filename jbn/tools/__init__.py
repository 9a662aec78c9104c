"""Tools for trained networks: pure functions on Linen variables and NNX models."""

import jbn.linen  # noqa: F401  # First: it names the extra if Flax is missing.
from jbn.tools._adapt import adapt as adapt
from jbn.tools._convert import convert as convert, converting as converting
from jbn.tools._fold import (
    Folded as Folded,
    FoldedNorm as FoldedNorm,
    fold as fold,
    foldable as foldable,
)
from jbn.tools._freeze import decays as decays, freeze as freeze, kinds as kinds
from jbn.tools._inspect import inspect as inspect
from jbn.tools._merge import average as average, fed_bn as fed_bn, merge as merge
from jbn.tools._quantize import Quantizer as Quantizer, quantizer as quantizer
from jbn.tools._recalibrate import (
    population as population,
    recalibrate as recalibrate,
    recalibrator as recalibrator,
)
from jbn.tools._stream import (
    Stream as Stream,
    StreamState as StreamState,
    empirical_bayes as empirical_bayes,
    stream as stream,
)
from jbn.tools.fold_into import (
    fold_into_next as fold_into_next,
    fold_into_previous as fold_into_previous,
)
from jbn.tools.haiku import from_haiku as from_haiku, to_haiku as to_haiku
from jbn.tools.keras import (
    from_keras as from_keras,
    keras_options as keras_options,
    to_keras as to_keras,
)
from jbn.tools.sbx import from_sbx as from_sbx, to_sbx as to_sbx
from jbn.tools.torch import (
    from_torch as from_torch,
    to_torch as to_torch,
    torch_options as torch_options,
)
