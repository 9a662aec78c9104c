"""What type checkers tell a user of jbn: `.ci/release` has pyright read this, strictly.

It is never run. Each line that is wrong says so, and pyright says where one is not.
"""

from typing import assert_type

import jax
import jax.numpy as jnp
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx


x = jnp.ones((4, 3))
params, batch_stats = jbn.init(3)
assert_type(params, jbn.Params)
assert_type(batch_stats, jbn.BatchStats)

y, batch_stats = jbn.batch_norm(x, params, batch_stats, use_running_average=False)
assert_type(y, jax.Array)
assert_type(batch_stats.mean, jax.Array)
assert_type(jbn.moments(x), jbn.Moments)

jbn.batch_norm(x, params, batch_stats)  # pyright: ignore[reportCallIssue]
jbn.batch_norm(x, params, batch_stats, False)  # pyright: ignore[reportCallIssue]
jbn.batch_norm(
    x,
    params,
    batch_stats,
    use_running_average="no",  # pyright: ignore[reportArgumentType]
)
jbn.ghost_batch_norm(
    x,
    params,
    batch_stats,
    use_running_average=False,
    num_groups=2,
    momentun=0.9,  # pyright: ignore[reportCallIssue]
)
jbn.BatchNrom()  # pyright: ignore[reportAttributeAccessIssue]

linen = jbn.BatchNorm(use_running_average=False, momentum=0.9)
assert_type(linen, jbn.linen.BatchNorm)
layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
assert_type(layer(x), jax.Array)
jbn.nnx.BatchNorm(3)  # pyright: ignore[reportCallIssue]
