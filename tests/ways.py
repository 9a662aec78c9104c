"""In which ways a test runs: of the fixture `lowering`, and of mapping over devices."""

from typing import Any

import pytest


def on(*ways: str):
    """Runs a test in these ways alone."""
    return lambda test: pytest.mark.usefixtures("lowering")(
        pytest.mark.parametrize("lowering", ways, indirect=True)(test)
    )


def needs_devices(*values: Any, when: bool = True) -> Any:
    """A case of a test that needs several devices, if `when`."""
    return pytest.param(*values, marks=[pytest.mark.devices] if when else [])


def mapped_by(*kinds: str) -> list[Any]:
    """Ways to map over devices; all but `vmap` need several of them."""
    return [needs_devices(kind, when=kind != "vmap") for kind in kinds]


def numbers_of_devices(*numbers: int) -> list[Any]:
    """Numbers of devices to run on."""
    return [needs_devices(number, when=number > 1) for number in numbers]


def executors(*pairs: tuple[str, int]) -> list[Any]:
    """Pairs of how a trainer is parallel, and on how many devices."""
    return [needs_devices(*pair, when=pair[1] > 1) for pair in pairs]
