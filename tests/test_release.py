"""The version, the address and what a package index would show stand in one place."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import jbn


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert jbn.__version__ == version
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    log = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[([\d.]+)\] - ([\d-]+)$", log, re.MULTILINE)
    assert newest
    assert newest.groups() == (version, str(cited["date-released"]))
    assert cited["version"] == version


def test_the_address_of_the_repository_is_the_same_everywhere():
    address = PROJECT["urls"]["Repository"]
    owner = address.rsplit("/", 2)[-2]
    places = [
        ROOT / name
        for name in ("pyproject.toml", "SECURITY.md", "CITATION.cff", "mkdocs.yml")
    ]
    places += (ROOT / "docs").rglob("*.md")
    places += (ROOT / "notebooks").iterdir()
    pattern = r"github(?:usercontent)?(?:\.com)?/([\w-]+)/jbn\b"
    found = 0
    for path in places:
        if path.is_file():
            for other in re.findall(pattern, path.read_text()):
                found += 1
                assert other == owner, f"{path}: {other}/jbn"
    assert found > 10


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_is_there(path):
    """Scripts of this repository, and actions by hash: a tag can be moved."""
    jobs = yaml.safe_load(path.read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    for step in steps:
        if "uses" in step:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"])
        for script in re.findall(r"(?:bash|python) ([\w./]+/\S+)", step.get("run", "")):
            assert (ROOT / script).is_file(), script
    assert len(re.findall(r"uses: \S+  # v\d", path.read_text())) == len(
        [step for step in steps if "uses" in step]
    )


def test_the_newest_python_is_tested_and_promised():
    jobs = yaml.safe_load((WORKFLOWS[0].parent / "tests.yml").read_text())["jobs"]
    tested = {
        row["python"] for row in jobs["versions"]["strategy"]["matrix"]["include"]
    }
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert tested == {*promised}
    assert PROJECT["requires-python"] == f">={min(promised)}"
