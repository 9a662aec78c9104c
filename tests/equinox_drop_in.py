r"""Runs Equinox's own tests with jbn's BatchNorm in the place of Equinox's.

Nothing of Equinox is kept in this repository, and its source distribution has no tests:
they come from the tag of its repository that is the installed version::

    python tests/equinox_drop_in.py                   # clones the repository
    python tests/equinox_drop_in.py PATH_OF_CHECKOUT

As for Flax (`flax_drop_in.py`): the tests whose text can reach a BatchNorm run first
with Equinox's, in the settings of Equinox's CI. Those that construct one and pass run
again with ours. Ours has no mode "ema", so it is given "batch" in its place.

This file is also the pytest plugin that replaces and records.
"""

import argparse
import importlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Generator
from typing import Any

import pytest
from flax_drop_in import (
    Outcomes,
    keep_reaching,
    reaching_tests,
    replace_everywhere,
    run_pytest,
)


# Tests that fail with ours: what their error says, and why.
PINNED = {
    "tests/test_nn.py::test_batch_norm[ema]": (
        "ema_state_index",
        "it reads the state of the mode 'ema', which ours does not have",
    )
}
Report = dict[str, dict[str, Any]]


# The plugin.


class Plugin(Outcomes):
    """Replaces the class, selects tests, and records what each test does."""

    def __init__(self, config: pytest.Config) -> None:
        """Replaces the class, before any test module is imported."""
        super().__init__()
        self.written = pathlib.Path(str(config.getoption("--batch-norm-report")))
        self.constructed = False
        original = importlib.import_module("equinox").nn.BatchNorm
        ours = bool(config.getoption("--replace-batch-norm"))
        base: Any = importlib.import_module("jbn.equinox").BatchNorm
        base = base if ours else original

        def init(layer: Any, *args: Any, **kwargs: Any) -> None:
            self.constructed = True
            if ours and kwargs.get("mode") == "ema":
                kwargs["mode"] = "batch"
            base.__init__(layer, *args, **kwargs)

        watched = type(base)("BatchNorm", (base,), {"__init__": init})
        replace_everywhere(original, watched)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drops the tests that cannot reach a BatchNorm."""
        keep_reaching(items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Attributes what is constructed during a test to this test."""
        self.constructed = False
        self.tests[item.nodeid] = {"outcome": "passed", "error": ""}
        result = yield
        self.tests[item.nodeid]["constructed"] = self.constructed
        return result

    def pytest_sessionfinish(self) -> None:
        """Writes the report."""
        self.written.write_text(json.dumps(self.tests, indent=1))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the plugin's options."""
    group = parser.getgroup("jbn in Equinox's tests")
    group.addoption("--replace-batch-norm", action="store_true")
    group.addoption("--batch-norm-report", metavar="JSON")


@pytest.hookimpl(trylast=True)  # jaxtyping has to see Equinox imported
def pytest_configure(config: pytest.Config) -> None:
    """Installs the plugin."""
    config.pluginmanager.register(Plugin(config))


# The command.


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """Clones the repository at the tag of the installed version.

    Args:
        folder: Where to put it.

    Returns:
        The folder of the checkout.

    Raises:
        OSError: If git cannot clone it.
    """
    about = importlib.metadata.metadata("equinox")
    links = dict(v.split(", ") for v in about.get_all("Project-URL") or ())
    options = ["--depth=1", f"--branch=v{about['Version']}"]
    command = ["git", "clone", *options, links["repository"], str(folder / "equinox")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"git could not clone Equinox's repository:\n{done.stderr}")
    return folder / "equinox"


def run(source: pathlib.Path, *, ours: bool) -> Report:
    """Runs Equinox's tests that can reach a BatchNorm.

    Args:
        source: Folder of a checkout.
        ours: Whether with our class.

    Returns:
        `outcome`, `error` and `constructed` of each test.

    Raises:
        RuntimeError: If pytest itself failed.
    """
    tests = sorted((source / "tests").glob("test_*.py"))
    files = [str(p) for p in tests if reaching_tests("BatchNorm", p)]
    with tempfile.TemporaryDirectory() as folder:
        written = pathlib.Path(folder, "report")
        options = ["-p", "equinox_drop_in", f"--rootdir={source}"]
        options += ["-c", str(source / "pyproject.toml")]
        options += [f"--batch-norm-report={written}"]
        options += ["--replace-batch-norm"] * ours
        return run_pytest([*options, *files], written, {})


def compare(baseline: Report, report: Report) -> tuple[list[str], dict[str, str]]:
    """Compares the runs, with Equinox's class and with ours.

    Args:
        baseline: With Equinox's.
        report: With ours.

    Returns:
        The tests that construct a BatchNorm and pass with both; and those that pass
        with Equinox's alone, or fail in spite of `PINNED`, with the error.
    """
    good, bad = [], {}
    for test, before in baseline.items():
        if before["constructed"] and before["outcome"] == "passed":
            error, _ = PINNED.get(test, ("", ""))
            done = report.get(test, {"outcome": "missing", "error": "did not run"})
            if done["outcome"] == "passed" and done["constructed"] and not error:
                good.append(test)
            elif done["outcome"] == "passed" or not (error and error in done["error"]):
                bad[test] = done["error"] or "passes or constructs nothing"
    return good, bad


def main() -> int:
    """Prints the tests that pass with ours, and those that do not.

    Returns:
        0 if all others are listed in `PINNED`, else 1.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", nargs="?", type=pathlib.Path, help="a checkout")
    source = parser.parse_args().source
    with tempfile.TemporaryDirectory() as folder:
        source = source.resolve() if source else fetch(pathlib.Path(folder))
        good, bad = compare(run(source, ours=False), run(source, ours=True))
    for test in good:
        print(f"passes  {test}")
    for test, (_, reason) in PINNED.items():
        print(f"pinned  {test}: {reason}")
    for test, error in bad.items():
        print(f"fails   {test}: {error}")
    return int(bool(bad) or not good)


if __name__ == "__main__":
    sys.exit(main())
