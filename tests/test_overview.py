"""The page that lists the methods: all of them, and the options that each refuses."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.sparse import BCOO

import jbn


PAGE = (Path(__file__).parents[1] / "docs" / "overview.md").read_text()
# Of each option that does not fit every method, a value that has an effect.
OPTIONS = {
    "tau": 2.0,
    "trim": 3.0,
    "activation": jax.nn.relu,
    "masked_output": "zero",
    "residual": jnp.ones((4, 2)),
    "mask": jnp.array([[True], [True], [True], [False]]),
    "weights": jnp.array([[1.0], [2.0], [1.0], [1.0]]),
    "unbiased": True,
    "min_weight": 1.0,
    "momentum": 0.5,
}
ARGUMENTS = {
    "batch_norm": {},
    "batch_renorm": {},
    "ghost_batch_norm": {"num_groups": 2},
    "domain_batch_norm": {"domain": jnp.array([0, 0, 0, 0])},
    "conditional_batch_norm": {"labels": jnp.array([0, 1, 0, 1])},
    "frozen_batch_norm": {},
    "sparse_batch_norm": {},
}


def refused(method: str) -> list[str]:
    """The options that a method raises an error for."""
    x = jnp.array([[0.0, 1.0], [2.0, 0.0], [4.0, 4.0], [0.0, 3.0]])
    shape = (1, 2) if method == "domain_batch_norm" else (2,)
    params, stats = jbn.init(shape)
    if method == "domain_batch_norm":
        params, _ = jbn.init(2)
    if method == "conditional_batch_norm":
        params = jbn.Params(jnp.ones((2, 2)), jnp.zeros((2, 2)))
    given = BCOO.fromdense(x) if method == "sparse_batch_norm" else x
    mode = {} if method == "frozen_batch_norm" else {"use_running_average": False}
    found = []
    for name, value in OPTIONS.items():
        options = ARGUMENTS[method] | mode | {name: value}
        try:
            getattr(jbn, method)(given, params, stats, **options)
        except ValueError as error:
            if f"does not take `{name}`" not in str(error):
                raise
            found.append(name)
    return found


@pytest.mark.parametrize("method", ARGUMENTS)
def test_methods_take_all_options_but_those_in_the_table(method):
    assert f"`jbn.{method}`" in PAGE
    table = PAGE.partition("| does not take |")[2].partition("\n## ")[0]
    row = re.search(rf"^\| `{method}` \| (.*) \|$", table, re.MULTILINE)
    said = re.findall(r"`(\w+)`", row[1]) if row else []
    assert sorted(refused(method)) == sorted(said)


def test_every_method_is_listed():
    methods = {name for name in dir(jbn) if re.fullmatch("[a-z_]*norm", name)}
    assert set(ARGUMENTS) < methods
    assert all(f"`jbn.{method}`" in PAGE for method in methods)
