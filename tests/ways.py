"""Which of the ways of the fixture `devices` a test runs in."""

import pytest


def on(*ways: str):
    """Runs a test in these ways alone."""
    return lambda test: pytest.mark.usefixtures("devices")(
        pytest.mark.parametrize("devices", ways, indirect=True)(test)
    )
