"""Devices: those asked for, or a message. On a CPU, or on eight virtual ones."""

import types
from typing import Any

import jax
import pytest

from jbn.training.devices import describe, select_devices
from jbn.training.errors import UsageError


@pytest.fixture(autouse=True)
def in_use(request: pytest.FixtureRequest) -> int:
    """As many as are there, which become no fewer and no more."""
    number = len(jax.devices())
    assert number == request.config.getoption("--devices")
    return number


def test_one_cpu_unless_asked_for_more():
    assert select_devices(None, None) == jax.devices()[:1]
    assert select_devices("cpu", 1) == jax.devices()[:1]


@pytest.mark.devices
def test_some_of_several_cpus():
    assert select_devices(None, None) == jax.devices()[:1]
    assert select_devices("cpu", 4) == jax.devices()[:4]


@pytest.mark.parametrize("accelerator", ["gpu", "tpu"])
def test_missing_accelerator(accelerator: Any, in_use: int):
    if jax.default_backend() == accelerator:
        pytest.skip("is there")
    before = jax.config.values["jax_platforms"]
    with pytest.raises(UsageError, match=rf"found only {in_use} CPU\..*pip install"):
        select_devices(accelerator, None)
    assert jax.config.values["jax_platforms"] == before


def test_too_many_devices(in_use: int):
    found = f"--num-devices=9, but JAX found {in_use} CPU"
    with pytest.raises(UsageError, match=found):
        select_devices(None, 9)


def test_describe():
    assert describe(3 * jax.devices()[:1]) == "3 CPU"


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
