"""Flax's own tests pass with our classes (minutes: they run four times)."""

import importlib.metadata
import sys

import flax_drop_in as drop_in
import pytest


@pytest.mark.slow
def test_flax_own_tests_pass_with_our_classes(tmp_path):
    try:
        source = drop_in.fetch(tmp_path)
    except (OSError, importlib.metadata.PackageNotFoundError) as error:
        pytest.skip(f"no sources of Flax: {error}")
    baseline = drop_in.run(source, "none")
    selected = drop_in.constructing(baseline)
    if importlib.metadata.version("flax") == "0.12.8":
        # Flax skips one more on Python 3.11.
        assert len(selected) == 131 + (sys.version_info >= (3, 12)), (
            baseline.not_collected
        )

    for replacement in drop_in.REPLACEMENTS:
        report = drop_in.run(source, replacement, selected)
        tests = drop_in.compare(baseline, report, replacement)
        assert tests["bad"] == {}, replacement
