"""Arguments that are misspelled, or of another kind, are named, with what is called."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.sparse import BCOO

import jbn
import jbn.nnx


# Users have no type checker: these are the errors that they see.
pytestmark = pytest.mark.usefixtures("untyped")

X = np.asarray([[1, 10], [3, 30], [5, 10], [7, 50]], np.float32)
PARAMS, STATS = jbn.init(2)
TABLES, _ = jbn.init((3, 2))
_, BY_DOMAIN = jbn.init((3, 2))
_, PENDING = jbn.init(2, accumulate=True)
MOMENTS = jbn.Moments(jnp.ones(2), jnp.ones(2), jnp.ones(2))

# What each needs, beside what all have in common.
FUNCTIONS: dict[str, dict[str, Any]] = {
    "batch_norm": {},
    "batch_renorm": {},
    "ghost_batch_norm": {"num_groups": 2},
    "domain_batch_norm": {"domain": 0, "batch_stats": BY_DOMAIN},
    "conditional_batch_norm": {"labels": 0, "params": TABLES},
    "frozen_batch_norm": {"freeze_stats": False, "freeze_mode": False},
    "sparse_batch_norm": {"x": BCOO.fromdense(jnp.asarray(X))},
}
CLASSES: dict[str, dict[str, Any]] = {
    "BatchNorm": {},
    "BatchRenorm": {},
    "GhostBatchNorm": {"num_groups": 2},
    "DomainBatchNorm": {"num_domains": 3},
    "ConditionalBatchNorm": {"num_classes": 3},
    "FrozenBatchNorm": {"freeze_stats": False, "freeze_mode": False},
}
IDS = {"DomainBatchNorm": {"domain": 0}, "ConditionalBatchNorm": {"labels": 0}}


def function(name: str, **options: Any) -> Any:
    """Calls one of the batch norms, in training."""
    common = {
        "x": X,
        "params": PARAMS,
        "batch_stats": STATS,
        "use_running_average": False,
    }
    return getattr(jbn, name)(**(common | FUNCTIONS[name] | options))


def linen(name: str, **options: Any) -> Any:
    """Makes a Linen layer, and calls it."""
    inputs = {k: options.pop(k) for k in ("x", "mask") if k in options}
    layer = getattr(jbn, name)(use_running_average=False, **CLASSES[name], **options)
    return layer.init(jax.random.key(0), **({"x": X} | inputs | IDS.get(name, {})))


def of_nnx(name: str, **options: Any) -> Any:
    """Makes an NNX layer, and calls it."""
    inputs = {k: options.pop(k) for k in ("x", "mask") if k in options}
    cls = getattr(jbn.nnx, name)
    layer = cls(2, rngs=nnx.Rngs(0), **CLASSES[name], **options)
    return layer(**({"x": X} | inputs | IDS.get(name, {})))


EVERYTHING = [
    *((function, name) for name in FUNCTIONS),
    *((call, name) for call in (linen, of_nnx) for name in CLASSES),
]
everything = pytest.mark.parametrize(
    ("call", "name"), EVERYTHING, ids=[f"{c.__name__}-{n}" for c, n in EVERYTHING]
)


# --- Another kind ----------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "no x": {"x": None},
    "a text as x": {"x": "a"},
    "a text as epsilon": {"epsilon": "1e-5"},
    "a text as momentum": {"momentum": "0.9"},
    "a text as mask": {"mask": "yes"},
    "no axis": {"axis": None},
}


@everything
@pytest.mark.parametrize("given", KINDS.values(), ids=KINDS)
def test_an_argument_of_another_kind_is_named(call, name, given):
    ((argument, value),) = given.items()
    with pytest.raises(TypeError) as raised:
        call(name, **given)
    if name == "sparse_batch_norm" and argument == "x":
        argument = name  # which takes a `BCOO`
    assert f"`{argument}`" in str(raised.value)
    assert str(value) in str(raised.value) or type(value).__name__ in str(raised.value)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "no epsilon": ("batch_norm", {"epsilon": None}),
    "a list of texts as x": ("batch_norm", {"x": [["a", "b"]]}),
    "an object as x": ("batch_norm", {"x": object()}),
    "rows of different lengths": ("batch_norm", {"x": [[1.0, 2.0], [3.0]]}),
    "texts as momentum": ("batch_norm", {"momentum": ["0.9", "0.9"]}),
    "weights": ("batch_norm", {"weights": "yes"}),
    "tau": ("batch_norm", {"tau": "1"}),
    "min_weight": ("batch_norm", {"min_weight": "1"}),
    "trim": ("batch_norm", {"trim": "3"}),
    "reference_weight": ("batch_norm", {"reference_weight": "32"}),
    "residual": ("batch_norm", {"residual": "a"}),
    "dtype": ("batch_norm", {"dtype": "float33"}),
    "r_max": ("batch_renorm", {"r_max": "3"}),
    "d_max": ("batch_renorm", {"d_max": "5"}),
    "num_groups": ("ghost_batch_norm", {"num_groups": "2"}),
    "domain": ("domain_batch_norm", {"domain": "photo"}),
    "num_domains": ("domain_batch_norm", {"num_domains": "3"}),
    "labels": ("conditional_batch_norm", {"labels": "cat"}),
    "scale": (
        "conditional_batch_norm",
        {"scale": "1", "labels": None, "params": None},
    ),
}


@pytest.mark.parametrize(("name", "given"), OTHERS.values(), ids=OTHERS)
def test_so_is_any_other(name, given):
    with pytest.raises(TypeError, match=f"`{next(iter(given))}`"):
        function(name, **given)


PIECES: dict[str, tuple[str, tuple, dict[str, Any]]] = {
    "init": ("num_features", ("3",), {}),
    "moments, x": ("x", (None,), {}),
    "moments, text": ("x", ("a",), {}),
    "moments, axis": ("axis", (X,), {"axis": None}),
    "moments, mask": ("mask", (X,), {"mask": "yes"}),
    "moments, weights": ("weights", (X,), {"weights": "yes"}),
    "normalize, x": ("x", (None, STATS), {}),
    "normalize, axis": ("axis", (X, STATS), {"axis": None}),
    "normalize, epsilon": ("epsilon", (X, STATS), {"epsilon": "1e-5"}),
    "trimmed_weights, x": ("x", ("a", STATS), {"trim": 3}),
    "trimmed_weights, axis": ("axis", (X, STATS), {"trim": 3, "axis": None}),
    "trimmed_weights, trim": ("trim", (X, STATS), {"trim": "3"}),
    "trimmed_weights, epsilon": (
        "epsilon",
        (X, STATS),
        {"trim": 3, "epsilon": "1e-5"},
    ),
    "update_batch_stats, momentum": ("momentum", (STATS, MOMENTS), {"momentum": "1"}),
    "update_batch_stats, reference_weight": (
        "reference_weight",
        (STATS, MOMENTS),
        {"reference_weight": "1"},
    ),
    "commit, momentum": ("momentum", (PENDING,), {"momentum": "0.9"}),
    "shrink, tau": ("tau", (MOMENTS, STATS), {"tau": "1"}),
    "sample_weights, weights": ("weights", ("yes",), {}),
    "sample_weights, axis": ("axis", (X,), {"axis": None}),
    "group_weights, ids": ("ids", ("a", 2), {}),
    "group_weights, weights": ("weights", (np.arange(2), 2), {"weights": "yes"}),
    "segment_ids, lengths": ("lengths", ("a",), {"num_rows": 3}),
    "segment_ids, row_splits": ("row_splits", (), {"row_splits": "a", "num_rows": 3}),
}


@pytest.mark.parametrize("case", PIECES)
def test_so_are_those_of_the_pieces(case):
    argument, args, options = PIECES[case]
    with pytest.raises(TypeError, match=f"`{argument}`"):
        getattr(jbn, case.partition(",")[0])(*args, **options)


# --- Misspelled ------------------------------------------------------------------


@everything
def test_a_misspelled_option_is_named_with_what_was_called(call, name):
    with pytest.raises(TypeError, match="momentun") as raised:
        call(name, momentun=0.9)
    message = str(raised.value)
    assert name in message
    if call is not linen:  # which is a dataclass, with a message of Python's
        assert "`momentum`" in message


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("batch_norm", "wieghts", "weights"),
        ("batch_norm", "eps", "epsilon"),
        ("batch_renorm", "residuals", "residual"),
        ("sparse_batch_norm", "axes", "axis"),
    ],
)
def test_what_was_meant_is_suggested(name, wrong, right):
    with pytest.raises(TypeError, match=f"`{right}`") as raised:
        function(name, **{wrong: 1})
    assert name in str(raised.value)
    assert wrong in str(raised.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_option_like_no_other_is_named(name):
    with pytest.raises(TypeError, match="colour") as raised:
        function(name, colour=1)
    assert name in str(raised.value)


def test_options_that_a_method_does_not_take_are_not_suggested():
    """Nor are arguments within the package."""
    for wrong in ("_stats_front", "stats_front", "param_front"):
        with pytest.raises(TypeError, match=wrong) as raised:
            of_nnx("BatchNorm", **{wrong: ()})
        assert "`_" not in str(raised.value).replace(f"`{wrong}`", "")


@pytest.mark.parametrize("piece", ["moments", "normalize", "commit", "shrink"])
def test_a_misspelled_option_of_a_piece_is_named(piece):
    with pytest.raises(TypeError, match="momentun") as raised:
        getattr(jbn, piece)(X, momentun=1)
    assert piece in str(raised.value)
