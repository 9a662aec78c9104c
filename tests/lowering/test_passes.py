"""`jbn.lowering.passes`: what a program for each platform has of barriers."""

import re

import jax
import jax.numpy as jnp
import pytest

from jbn.lowering.passes import separate


@pytest.mark.parametrize(("platform", "barriers"), [("cuda", 3), ("tpu", 0)])
def test_views_are_apart_on_a_gpu(platform, barriers):
    """Each is a barrier around the one before, or XLA would merge them."""
    traced = jax.jit(lambda v: separate(v, views=3)).trace(jnp.zeros(4))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("optimization_barrier") == barriers
    (returned,) = re.findall(r"return (.*) :", text)
    assert len(set(returned.split(", "))) == max(1, barriers)
