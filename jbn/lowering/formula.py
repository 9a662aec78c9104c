"""The elementwise pass that normalizes a batch in training."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jbn.lowering.cpu import hoisted
from jbn.lowering.gpu import in_pairs, worth_pairs
from jbn.lowering.late import Target, late


def compiled_formula(
    formula: Callable[..., jax.Array], form: Any, operands: Any
) -> jax.Array:
    """`formula(form, operands)`, in the fastest form for the platform.

    Args:
        formula: An elementwise function. Its operands are `x`, `stats`, `weights`,
            `segments` and `residual` (the last three may be `None`), and per-feature
            arrays. Its third argument is a function that hoists a per-feature value.
        form: Its static part, with the output's `dtype` and the final `activation`, or
            `None`.
        operands: A record of arrays.
    """
    return late(_formula, operands, formula=formula, form=form)[0]


def _formula(
    target: Target, operands: Any, *, formula: Any, form: Any
) -> list[jax.Array]:
    x = operands.x
    plain = all(
        v is None for v in (operands.weights, operands.segments, operands.residual)
    )
    activates = form.activation is not None
    # Pairs are faster if nothing else could fuse into the loop over `x`: the input is
    # already in memory, and few elementwise functions follow an activation.
    if activates and plain and worth_pairs(target, x, form.dtype):
        stats = operands._replace(x=None)
        pair = lambda x, stats: formula(form, stats._replace(x=x))
        return [in_pairs(pair, x, stats, form.dtype)]
    if target.platform == "cpu":
        stats = operands.stats._replace(mean=hoisted(operands.stats.mean, x.shape))
        y = formula(form, operands._replace(stats=stats), hoisted)
    else:
        y = formula(form, operands)
    if activates and operands.residual is not None and target.platform == "gpu":
        # XLA would recompute the output for each reader, or drop its rounding.
        y = lax.optimization_barrier(y)
    return [y]
