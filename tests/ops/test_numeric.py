"""Arithmetic at the ends of the range, where plain formulas give NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbn.ops import numeric


inf = np.inf


@pytest.mark.parametrize(
    ("square", "of_mean", "var"),
    [(3, 1, 2), (1, 1.0001, 0), (inf, 1, inf), (inf, inf, inf), (1, inf, 0)],
    ids=str,
)
def test_a_variance_is_not_negative_and_no_nan(square, of_mean, var):
    args = np.float32(square), np.float32(of_mean)
    assert numeric.difference(*map(jnp.asarray, args)) == var
    assert jax.jit(numeric.difference)(*args) == var


def test_averages_over_nothing_are_zero_and_pass_no_gradient():
    for total, want, slope in ((4.0, 0.25, -1 / 16), (0.0, 0.0, 0.0)):
        got = jax.value_and_grad(numeric.reciprocal)(jnp.asarray(total))
        np.testing.assert_array_equal(got, (want, slope))
