"""Equinox's own tests pass with our class (minutes: they run twice)."""

import importlib.metadata

import equinox_drop_in as drop_in
import pytest


@pytest.mark.slow
def test_equinox_own_tests_pass_with_our_class(tmp_path):
    try:
        source = drop_in.fetch(tmp_path)
    except (OSError, importlib.metadata.PackageNotFoundError) as error:
        pytest.skip(f"no sources of Equinox: {error}")
    good, bad = drop_in.compare(
        drop_in.run(source, ours=False), drop_in.run(source, ours=True)
    )
    assert bad == {}
    if importlib.metadata.version("equinox") == "0.13.8":
        assert len(good) == 8


def test_what_fails_with_ours_alone_is_bad():
    done = {"outcome": "passed", "error": "", "constructed": True}
    failed = {"outcome": "failed", "error": "wrong", "constructed": True}
    none = done | {"constructed": False}
    (pinned,) = drop_in.PINNED
    baseline = {"a": done, "b": done, "c": done, "d": done, pinned: done}
    baseline |= {"e": failed, "f": none}
    report = {"a": done, "b": failed, "c": none, pinned: failed, "e": failed}
    good, bad = drop_in.compare(baseline, report)
    assert good == ["a"]
    assert set(bad) == {"b", "c", "d", pinned}
    known = failed | {"error": "has no `ema_state_index`"}
    assert drop_in.compare({pinned: done}, {pinned: known}) == ([], {})
    assert pinned in drop_in.compare({pinned: done}, {pinned: done})[1]
