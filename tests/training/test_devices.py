"""Devices: those asked for, or a message. The tests run on eight virtual CPUs."""

from typing import Any

import jax
import pytest

from jbn.training.devices import describe, select_devices
from jbn.training.errors import UsageError


def test_one_cpu_unless_asked_for_more():
    assert select_devices(None, None) == jax.devices()[:1]
    assert select_devices("cpu", 4) == jax.devices()[:4]


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_missing_accelerator(accelerator: Any):
    if jax.default_backend() == accelerator:
        pytest.skip("is there")
    before = jax.config.values["jax_platforms"]
    with pytest.raises(UsageError, match=r"found only 8 CPU\..*pip install"):
        select_devices(accelerator, None)
    assert jax.config.values["jax_platforms"] == before


def test_too_many_devices():
    with pytest.raises(UsageError, match="--num-devices=9, but JAX found 8 CPU"):
        select_devices(None, 9)


def test_describe():
    assert describe(jax.devices()[:3]) == "3 CPU"
