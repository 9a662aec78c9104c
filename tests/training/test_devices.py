"""Devices: those asked for, or a message. The tests run on eight virtual CPUs."""

import types
from typing import Any

import jax
import pytest

from jbn.training.devices import describe, select_devices
from jbn.training.errors import UsageError


@pytest.fixture(autouse=True)
def in_use():
    """The eight are there, and do not become fewer."""
    assert len(jax.devices()) == 8


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


def fake_devices(platform: str, kind: str) -> list[Any]:
    """Three of each of two processes, in the order of their numbers."""
    return [
        types.SimpleNamespace(
            id=i, process_index=p, platform=platform, device_kind=kind
        )
        for i, p in enumerate((0, 1, 0, 1, 1, 0))
    ]


@pytest.mark.parametrize(
    ("platform", "asked", "expected"),
    [
        ("cpu", None, [0, 1]),
        ("cpu", 2, [0, 2, 1, 3]),
        ("gpu", None, [0, 2, 5, 1, 3, 4]),
        ("gpu", 1, [0, 1]),
    ],
)
@pytest.mark.parametrize("process", [0, 1])
def test_those_of_a_process_are_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    asked: int | None,
    expected: list[int],
    process: int,
):
    """Everywhere in the same order, and as many of each as were asked for."""
    devices = fake_devices(platform, "Nice")
    local = [d for d in devices if d.process_index == process]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: local)
    found = select_devices(None, asked)
    assert [device.id for device in found] == expected
    name = platform.upper()
    assert describe(found) == f"{len(found)} {name} (Nice) in 2 processes"
    with pytest.raises(UsageError, match=rf"--num-devices=4, but JAX found 3 {name}"):
        select_devices(None, 4)
