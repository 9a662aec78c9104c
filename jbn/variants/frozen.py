"""Frozen batch norm: keeps the parameters, the statistics or the mode fixed."""

import dataclasses
from typing import Unpack

import jax
from jax import lax

from jbn.call import Call, Stats, flag, prepare, run, thread
from jbn.options import Options, documented
from jbn.typing import ArrayLike, Params


@documented(Options)
def frozen_batch_norm(
    x: ArrayLike,
    params: Params | None,
    batch_stats: Stats,
    *,
    use_running_average: bool | None = None,
    freeze_affine: bool = True,
    freeze_stats: bool = True,
    freeze_mode: bool = True,
    **options: Unpack[Options],
) -> tuple[jax.Array, Stats]:
    """Normalizes by fixed statistics.

    For fine-tuning, in a model that is called in training mode. Three things can be
    frozen independently:

    | | what is frozen |
    |---|---|
    | `freeze_mode` | the mode: always normalizes by the running statistics |
    | `freeze_stats` | the running statistics: never updated |
    | `freeze_affine` | `params`: get no gradient |

    With all three the layer is a fixed affine map, and saves O(features) numbers for
    the backward pass (with a mask or weights also `x`, to find ignored elements). With
    `freeze_stats=False` the statistics are updated on new data, while the old ones
    normalize.

    A frozen parameter has a gradient of zero. Weight decay in the optimizer still
    changes it: exclude it there, too.

    Args:
        x: Input of shape (..., features, ...) and any floating or complex dtype.
        params: Scale and bias, one entry per feature; `None` leaves them out.
        batch_stats: Running mean and variance, one entry per feature.
        use_running_average: As for `jbn.batch_norm`; needed unless `freeze_mode`.
        freeze_affine: Whether `params` are constants.
        freeze_stats: Whether `batch_stats` are returned unchanged.
        freeze_mode: Whether to always normalize by the running statistics.
        **options: As for `jbn.batch_norm`.

    Returns:
        The normalized array and the running statistics, as `jbn.batch_norm`.

    Raises:
        TypeError: If a flag is not a boolean, or as `jbn.batch_norm` does.
        ValueError: As `jbn.batch_norm` does.
        NameError: As `jbn.batch_norm` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> x = jnp.array([[3.0], [5.0]])
        >>> stats = jbn.BatchStats(jnp.array([1.0]), jnp.array([4.0]))
        >>> y, same = frozen_batch_norm(x, None, stats, epsilon=0.0)
        >>> print(y.ravel(), same is stats)
        [1. 2.] True
    """
    update_stats = options.get("update_stats")
    if update_stats is not None:
        update_stats = flag(update_stats, "update_stats")
    if use_running_average is not None:
        use_running_average = flag(use_running_average, "use_running_average")
    freeze_affine = flag(freeze_affine, "freeze_affine")
    if flag(freeze_mode, "freeze_mode"):
        if update_stats is None:
            # A training call updates by default.
            update_stats = use_running_average is False
        use_running_average = True
    if flag(freeze_stats, "freeze_stats"):
        update_stats = False
    options["update_stats"] = update_stats
    call = prepare(
        "frozen_batch_norm",
        x,
        params,
        batch_stats,
        use_running_average=flag(use_running_average, "use_running_average"),
        **options,
    )
    return run(_with_frozen_affine if freeze_affine else thread, call)


def _with_frozen_affine(call: Call):
    """The body with a constant scale and bias."""
    scale, bias = lax.stop_gradient((call.scale, call.bias))
    return thread(dataclasses.replace(call, scale=scale, bias=bias))
