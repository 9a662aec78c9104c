"""Libraries that some tests compare with, and that users need not have."""

import importlib.util

import pytest


# By the name of the module; all are in the extra `peers`.
PEERS = {
    "equinox": "Equinox",
    "haiku": "Haiku",
    "keras": "Keras",
    "torch": "PyTorch",
}


def needs(name: str) -> str:
    """Says why a test is skipped, and what to do."""
    return f'needs {PEERS[name]}: pip install -e ".[peers]"'


def skip_without_peers(item: pytest.Item) -> None:
    """Skips a test whose marks `peers(...)` name a library that is not installed."""
    for mark in item.iter_markers("peers"):
        for name in mark.args:
            if importlib.util.find_spec(name) is None:
                item.add_marker(pytest.mark.skip(needs(name)))
