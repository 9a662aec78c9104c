"""The program of the guide "Train on clients" runs in Flower."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest


PROGRAM = pathlib.Path(__file__).parents[1] / "docs/guides/clients_flower.py"
MISSING = [name for name in ("flwr", "ray") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(
    bool(MISSING), reason='needs Flower: pip install "flwr[simulation]"'
)
def test_two_lines_help_clients_in_flower():
    """The rule of the guide, against Flax's norm and averaged statistics."""
    found = []
    for plain in ({}, {"PLAIN": "1"}):
        run = subprocess.run(
            [sys.executable, PROGRAM],
            env=os.environ | {"FLWR_TELEMETRY_ENABLED": "0"} | plain,
            capture_output=True,
            text=True,
            check=True,
        )
        (accuracy,) = re.findall(r"^test accuracy: (\S+) %$", run.stdout, re.M)
        found.append(float(accuracy))
    assert found[0] > 94
    assert found[0] > found[1] + 4
