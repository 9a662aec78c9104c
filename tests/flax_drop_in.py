r"""Runs Flax's own tests with jbn's BatchNorm classes in the place of Flax's.

Nothing of Flax is kept in this repository. The tests come from Flax's source
distribution, fetched from PyPI in the version that is installed::

    python tests/flax_drop_in.py                       # fetches the sources
    python tests/flax_drop_in.py /path/to/flax-0.12.8  # uses unpacked ones

The command first runs, with Flax's own classes, the tests whose text can reach a
BatchNorm. This baseline records of each test whether it passes, and which of the two
classes it really constructs (a constructor is Python code, so it is seen under every
transform). The tests that construct one and pass are then run with
`jbn.linen.BatchNorm`, with `jbn.nnx.BatchNorm` and with both, in the settings of
Flax's own CI: warnings are errors, so is implicit rank promotion, and there are four
host devices.

This file is also the pytest plugin that replaces and records. One test by hand::

    PYTHONPATH=tests:. pytest -p flax_drop_in --replace-batch-norm=both \
        -c /path/to/flax-0.12.8/pyproject.toml \
        /path/to/flax-0.12.8/tests/nnx/summary_test.py
"""

import argparse
import ast
import collections
import functools
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Generator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest


KINDS = ("linen", "nnx")
REPLACEMENTS = {"linen": ("linen",), "nnx": ("nnx",), "both": KINDS}
OUTCOMES = ("equal", "rounded", "defect", "bad")

# These tests compare `flax.linen.BatchNorm` with `flax.nnx.BatchNorm` bit for bit. They
# pass when both are ours. With one of them alone ours meets Flax's, and
_EQUIVALENCE = (
    "tests/nnx/nn/normalization_test.py::TestLinenConsistency"
    "::test_nnx_linen_{}_equivalence{}"
).format
# - ours must not have this defect (numbered as in PEERS.md, section 1.3) of Flax's,
PINNED = {
    _EQUIVALENCE("batchnorm", i): "1.3-2: a feature whose mask is empty turns into NaN"
    for i in range(1, 16, 2)
}
PINNED_ERROR = "nan location mismatch"
# - the order of float operations shows in the last bits.
ROUNDED = {
    *(_EQUIVALENCE("batchnorm", i) for i in range(0, 16, 2)),
    *(_EQUIVALENCE("spectralnorm", i) for i in range(0, 16, 2)),
    "examples/gemma/helpers_test.py::ModuleFromLinenVariablesTest"
    "::test_different_structure0",
}
# How much of the last bit, in an array of size 1.
ROUNDING = 16


# The plugin: replaces, selects, records.


class Outcomes:
    """Records how each test ends: its `outcome` and `error`, by its id."""

    def __init__(self) -> None:
        """Records nothing yet."""
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes the worst outcome of setup, call and teardown."""
        if not report.passed and self.tests[report.nodeid]["outcome"] != "failed":
            error = error_of(str(report.longrepr))
            self.tests[report.nodeid].update(outcome=report.outcome, error=error)


class Plugin(Outcomes):
    """Replaces the classes, selects tests, and records what each test does."""

    def __init__(self, config: pytest.Config) -> None:
        """Replaces and watches the classes, before any test module is imported."""
        super().__init__()
        self.report: str | None = config.getoption("--batch-norm-report")
        only: str | None = config.getoption("--only-batch-norm")
        self.only = json.loads(pathlib.Path(only).read_text()) if only else None
        self.not_collected: dict[str, str] = {}
        self.constructed: set[str] = set()
        self.rounded = False
        self.equal = np.testing.assert_array_equal
        replacement = str(config.getoption("--replace-batch-norm"))
        self.replaced = REPLACEMENTS.get(replacement, ())
        modules = {kind: importlib.import_module(f"flax.{kind}") for kind in KINDS}
        for kind, module in modules.items():
            if kind in self.replaced:
                ours = importlib.import_module(f"jbn.{kind}").BatchNorm
                replace_everywhere(module.BatchNorm, ours)
            self.watch(module.BatchNorm, kind)

    def watch(self, cls: type, kind: str) -> None:
        """Has the constructor of a class note that it was called."""
        init = cls.__init__

        @functools.wraps(init)
        def watched(*args: Any, **kwargs: Any) -> None:
            self.constructed.add(kind)
            init(*args, **kwargs)

        cls.__init__ = watched

    def equal_up_to_rounding(
        self, actual: Any, desired: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Takes the place of `np.testing.assert_array_equal`; notes if not equal."""
        try:
            self.equal(actual, desired, *args, **kwargs)
        except AssertionError:
            dtypes = jnp.asarray(actual).dtype, jnp.asarray(desired).dtype
            if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes):
                raise
            tolerance = ROUNDING * max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
            np.testing.assert_allclose(actual, desired, rtol=tolerance, atol=tolerance)
            self.rounded = True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Notes a file that cannot be imported."""
        if report.failed:
            self.not_collected[report.nodeid] = error_of(report.longreprtext)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drops the tests that were not asked for."""
        if self.only is not None:
            items[:] = [item for item in items if item.nodeid in self.only]
        elif self.report:
            keep_reaching(items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Attributes what is constructed and rounded during a test to this test."""
        self.constructed.clear()
        self.rounded = False
        self.tests[item.nodeid] = {"outcome": "passed", "error": ""}
        with pytest.MonkeyPatch.context() as patch:
            if self.replaced:
                equal = self.equal_up_to_rounding
                patch.setattr(np.testing, "assert_array_equal", equal)
            result = yield
        constructed = sorted(self.constructed)
        self.tests[item.nodeid].update(constructed=constructed, rounded=self.rounded)
        return result

    def pytest_sessionfinish(self) -> None:
        """Writes the report."""
        if self.report:
            report = {"tests": self.tests, "not_collected": self.not_collected}
            pathlib.Path(self.report).write_text(json.dumps(report, indent=1))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the plugin's options."""
    group = parser.getgroup("jbn in Flax's tests")
    group.addoption(
        "--replace-batch-norm",
        choices=("none", *REPLACEMENTS),
        default="none",
        help="which of Flax's BatchNorm classes to replace by jbn's",
    )
    group.addoption(
        "--batch-norm-report",
        metavar="JSON",
        help="run only tests that can reach a BatchNorm, and write here what they do",
    )
    group.addoption(
        "--only-batch-norm",
        metavar="JSON",
        help="run only the tests listed in this file",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Installs the plugin."""
    config.pluginmanager.register(Plugin(config))


def replace_everywhere(original: type, replacement: type) -> None:
    """Puts one class wherever a module of the same package has the other."""
    package = original.__module__.partition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            for attribute, value in list(vars(module).items()):
                if value is original:
                    setattr(module, attribute, replacement)


@functools.cache
def reaching_tests(name: str, path: pathlib.Path) -> tuple[str, ...]:
    """Finds the tests of a file whose text can reach a class.

    A test can if its own text names the class. All tests of the file can if the text
    around the tests names it, or imports a file beside it that does.

    Args:
        name: Name of the class.
        path: The test file.

    Returns:
        Beginnings of the names of the tests: `("test",)` for all of them.
    """
    lines = path.read_text().splitlines()
    around = lines.copy()
    tests = set()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            first = min(part.lineno for part in (node, *node.decorator_list)) - 1
            for i in range(first, node.end_lineno or first):
                around[i] = ""
                if name in lines[i]:
                    tests.add(node.name)
    siblings = {p.stem for p in path.parent.glob("*.py") if name in p.read_text()}
    imported = {line.partition("import ")[2] for line in around}
    if siblings & imported or name in "".join(around):
        return ("test",)
    return tuple(tests)


def keep_reaching(items: list[pytest.Item]) -> None:
    """Drops the tests that cannot reach a BatchNorm."""
    items[:] = [
        item
        for item in items
        if item.name.startswith(reaching_tests("BatchNorm", item.path))
    ]


def error_of(text: str) -> str:
    """Joins the lines that pytest marks as the error, or else takes the last line."""
    marked = re.findall(r"^E +(.*\S)", text, flags=re.MULTILINE)
    return " ".join(marked[:5]) if marked else text.rstrip().rpartition("\n")[2]


# The command: fetches, runs, compares.


class Report(NamedTuple):
    """What one run of the tests did.

    Attributes:
        tests: `outcome`, `error`, `constructed` and `rounded` of each test.
        not_collected: The error of each file that could not be imported.
    """

    tests: dict[str, dict[str, Any]]
    not_collected: dict[str, str]


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """Fetches the sources, with tests, of the installed version of Flax.

    Args:
        folder: Where to unpack them.

    Returns:
        The folder of the sources.

    Raises:
        OSError: If pip cannot fetch them.
    """
    name = f"flax-{importlib.metadata.version('flax')}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=flax"]
    command = [*pip, f"--dest={folder}", name.replace("-", "==")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"pip could not fetch the sources of {name}:\n{done.stderr}")
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / name


def run(
    source: pathlib.Path, replacement: str, only: Collection[str] | None = None
) -> Report:
    """Runs Flax's tests: those of the library, then those of each example.

    Args:
        source: Folder of Flax's sources.
        replacement: Key of `REPLACEMENTS`, or `"none"`.
        only: The tests to run. By default those whose text can reach a BatchNorm.

    Returns:
        What they did.

    Raises:
        RuntimeError: If pytest itself failed.
    """
    groups: dict[pathlib.Path, list[str]] = {}
    for path in sorted(source.rglob("*_test.py")):
        top = path.relative_to(source).parts[0]
        if only is None:
            wanted = reaching_tests("BatchNorm", path)
        else:
            wanted = any(source / test.split("::")[0] == path for test in only)
        if wanted and top in ("tests", "examples"):
            group = path.parent if top == "examples" else source / top
            groups.setdefault(group, []).append(str(path))
    settings = {
        "FLAX_PROFILE": "1",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    result = Report({}, {})
    with tempfile.TemporaryDirectory() as folder:
        listed, written = pathlib.Path(folder, "only"), pathlib.Path(folder, "report")
        options = [
            *("-p", "flax_drop_in"),
            *("-c", str(source / "pyproject.toml"), "--continue-on-collection-errors"),
            f"--replace-batch-norm={replacement}",
            f"--batch-norm-report={written}",
        ]
        if only is not None:
            listed.write_text(json.dumps(sorted(only)))
            options.append(f"--only-batch-norm={listed}")
        for files in groups.values():
            found = run_pytest([*options, *files], written, settings)
            for total, part in zip(result, found.values(), strict=True):
                total.update(part)
    return result


def run_pytest(
    options: list[str], written: pathlib.Path, settings: dict[str, str]
) -> dict[str, Any]:
    """Runs pytest in a process of its own, with a plugin of this folder.

    Args:
        options: Of pytest; they name the plugin, the report and the tests.
        written: The report, in a folder that is otherwise empty.
        settings: Environment variables.

    Returns:
        The report.

    Raises:
        RuntimeError: If there is none.
    """
    # Not the settings of the run that we may be in.
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PYTEST"))}
    here = pathlib.Path(__file__).resolve().parent
    paths = [str(here), *filter(None, [keep.get("PYTHONPATH")]), str(here.parent)]
    own = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    written.unlink(missing_ok=True)
    # In an empty folder, so that imports of the package do not find its sources.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=written.parent,
        env=keep | own | settings,
    )
    if not written.exists():
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
    return json.loads(written.read_text())


def constructing(baseline: Report) -> dict[str, list[str]]:
    """Picks the tests that construct a BatchNorm and pass with Flax's own classes."""
    return {
        test: done["constructed"]
        for test, done in baseline.tests.items()
        if done["constructed"] and done["outcome"] == "passed"
    }


def compare(
    baseline: Report, report: Report, replacement: str
) -> dict[str, dict[str, str]]:
    """Compares a run with the baseline.

    Args:
        baseline: The run with Flax's own classes.
        report: The run with ours.
        replacement: Key of `REPLACEMENTS`.

    Returns:
        The tests that construct a BatchNorm and pass with Flax's own, and what to say
        of each, sorted into `equal` (passes as it is), `rounded` (passes up to
        rounding, see `ROUNDED`), `defect` (see `PINNED`) and `bad` (everything else).
        To construct other classes than in the baseline is bad, too: then the test
        does not test ours.
    """
    pinned, rounded = ({}, set()) if replacement == "both" else (PINNED, ROUNDED)
    sorted_tests: dict[str, dict[str, str]] = {kind: {} for kind in OUTCOMES}
    for test, constructed in constructing(baseline).items():
        done = report.tests.get(test)
        if done is None:
            lost = report.not_collected.get(test.split("::")[0], "did not run")
            outcome, text = "bad", lost
        elif done["outcome"] != "passed":
            known = test in pinned and PINNED_ERROR in done["error"]
            outcome, text = "defect" if known else "bad", done["error"]
        elif done["constructed"] != constructed:
            outcome, text = "bad", f"{done['constructed']} replaces {constructed}"
        elif test in pinned:
            outcome, text = "bad", f"passes, in spite of {pinned[test]}"
        elif done["rounded"]:
            outcome, text = "rounded" if test in rounded else "bad", "not equal"
        else:
            outcome, text = "equal", ""
        sorted_tests[outcome][test] = text
    return sorted_tests


def main() -> int:
    """Prints a table of the runs, and what is bad in them.

    Returns:
        0 if nothing is, else 1.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", nargs="?", type=pathlib.Path, help="Flax's sources")
    source = parser.parse_args().source
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        source = source.resolve() if source else fetch(pathlib.Path(folder))
        baseline = run(source, "none")
        selected = constructing(baseline)
        for path, n in collections.Counter(t.split("::")[0] for t in selected).items():
            print(f"{n:6}  {path}")
        print(f"{len(selected):6}  construct a BatchNorm and pass with Flax's own")
        for test, done in baseline.tests.items():
            if done["outcome"] != "passed":
                print(f"  {done['outcome']} with Flax's own: {test}: {done['error']}")
        for path, error in baseline.not_collected.items():
            print(f"  not collected: {path}: {error}")
        table = "{:10}" + "{:>9}" * len(OUTCOMES)
        print("", table.format("replaced", *OUTCOMES), sep="\n", flush=True)
        for replacement in REPLACEMENTS:
            tests = compare(baseline, run(source, replacement, selected), replacement)
            counts = [len(tests[outcome]) for outcome in OUTCOMES]
            print(table.format(replacement, *counts), flush=True)
            for test, text in tests["bad"].items():
                print(f"  {test}: {text}", flush=True)
            bad += len(tests["bad"])
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
