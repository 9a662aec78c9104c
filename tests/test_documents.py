"""What the README and the site show is what happens, and nothing public is left out."""

import ast
import importlib
import inspect
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from peers import PEERS
from story import tell


ROOT = pathlib.Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
README = (ROOT / "README.md").read_text()
BLOCKS = FENCE.findall(README)
PYTHON = [text for language, text in BLOCKS if language == "python"]
# The first two are for .ci/run: installing, and running these tests.
COMMANDS = [text.strip() for language, text in BLOCKS if language == "bash"][2:]


def imports_of(text: str) -> list[str]:
    """The top-level modules that the Python of a page imports."""
    code = "".join(code for kind, code in FENCE.findall(text) if kind == "python")
    found = re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)
    return list(dict.fromkeys(found))


def page(path: pathlib.Path):
    text, name = path.read_text(), path.relative_to(ROOT / "docs").as_posix()
    peers = [module for module in imports_of(text) if module in PEERS]
    marks = [pytest.mark.peers(*peers)] if peers else []
    if name == "tools.md":  # It trains a network first, and compiles every tool.
        marks.append(pytest.mark.slow)
    return pytest.param(name, marks=marks, id=name)


PAGES = [
    page(path)
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if "```python" in path.read_text()
]


def run(*command: str, cwd: pathlib.Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_runs_and_prints_what_is_shown(code, tmp_path):
    printed = run(sys.executable, "-c", code, cwd=tmp_path)
    following = BLOCKS[BLOCKS.index(("python", code)) + 1]
    shown = following[1] if following[0] == "text" else ""
    assert printed == shown


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.slow
def test_commands_run(command, tmp_path):
    python, script, *flags = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    for i, flag in enumerate(flags):
        name, _, value = flag.partition("=")
        if name == "--manual-dir":
            folder = ROOT / value
            if not folder.is_dir():
                pytest.skip(f"no {folder}")
            flags[i] = f"{name}={folder}"
    flags += [f"--workdir={tmp_path}/run", f"--data-dir={tmp_path}/data"]
    printed = run(sys.executable, str(ROOT / script), *flags, cwd=tmp_path)
    assert re.search(r"^final test accuracy: 9[789]\.\d+ %", printed, re.MULTILINE)


def test_every_path_named_exists():
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_a_page_of_the_site_prints_what_it_shows(page, tmp_path):
    text = (ROOT / "docs" / page).read_text()
    blocks: list[tuple[int, str]] = []
    shown: list[str] = []
    after = ""
    for match in FENCE.finditer(text):
        language, code = match.groups()
        if language == "python":
            blocks.append((text.count("\n", 0, match.start(2)), code))
            shown.append("")
        elif language == "text" and shown and after == "python":
            shown[-1] = code
        after = language
    # What the page has its reader train first.
    before = text.partition("```python")[0]
    for command in re.findall(r"^    python (train\.py .*)$", before, re.MULTILINE):
        script, *flags = shlex.split(command)
        run(sys.executable, str(ROOT / script), *flags, cwd=tmp_path)
    assert tell(page, blocks, tmp_path) == shown


def find(path: str):
    """What a dotted path names in the reference: a module before a function in it."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    "module", ["jbn", "jbn.linen", "jbn.models", "jbn.nnx", "jbn.tools"]
)
def test_everything_public_is_in_the_reference(module):
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = [find(path) for path in re.findall(r"^::: (\S+)$", pages, re.M)]
    package = importlib.import_module(module)
    assert package.__file__ is not None
    tree = ast.parse(pathlib.Path(package.__file__).read_text())
    # What it defines, and what it imports `as` itself.
    public = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    } | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is not None and alias.asname == alias.name
    }
    # Modules have entries for what is in them.
    public = {name for name in public if not inspect.ismodule(getattr(package, name))}
    missing = {name for name in public if getattr(package, name) not in documented}
    assert public
    assert not missing
