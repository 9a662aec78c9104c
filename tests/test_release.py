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


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=str)
def test_workflows_call_what_is_there(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    scripts = [
        script
        for job in jobs.values()
        for step in job["steps"]
        for script in re.findall(r"bash (\S+)", step.get("run", ""))
    ]
    assert scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script
