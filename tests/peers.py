"""Libraries that some tests compare with, and that users need not have."""

import importlib
import importlib.util
from typing import Any

import pytest


# By the name of the module; all are in the extra `peers`.
PEERS = {
    "equinox": "Equinox",
    "haiku": "Haiku",
    "keras": "Keras",
    "torch": "PyTorch",
}


def load_peer(name: str) -> Any:
    """A module of such a library, for tests that are marked `peers(...)`."""
    return importlib.import_module(name)


def needs(name: str) -> str:
    """Says why a test is skipped, and what to do."""
    return f'needs {PEERS[name]}: pip install -e ".[peers]"'


def skip_without_peers(item: pytest.Item) -> None:
    """Skips a test whose marks `peers(...)` name a library that is not installed."""
    for mark in item.iter_markers("peers"):
        for name in mark.args:
            if importlib.util.find_spec(name) is None:
                item.add_marker(pytest.mark.skip(needs(name)))
