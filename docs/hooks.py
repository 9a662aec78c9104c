"""What MkDocs does not do by itself: notebooks from beside `docs/`, links out of it."""

import html
import json
import pathlib
import posixpath
import re

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = (
    "batch_norm",
    "effects",
    "paper",
    "uneven",
    "distributed",
    "applications",
    "nnx",
)


def on_config(config: MkDocsConfig) -> None:
    """Fills the notebooks that are there into the navigation, by their own titles."""
    pages = [
        {_title(path): f"notebooks/{path.name}"}
        for name in NOTEBOOKS
        if (path := ROOT / "notebooks" / f"{name}.ipynb").exists()
    ]
    assert config.nav is not None
    for section in config.nav:
        if "Notebooks" in section:
            section["Notebooks"] = pages


def _title(notebook: pathlib.Path) -> str:
    first = json.loads(notebook.read_text())["cells"][0]["source"]
    heading = re.search(r"^# (.+)$", "".join(first), re.MULTILINE)
    return heading.group(1) if heading else notebook.stem


def _anchors(path: pathlib.Path) -> set[str]:
    """The links to its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {
        "#" + re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-")
        for text in headings
    }


# Before the plugin that renders notebooks looks for them.
@event_priority(100)
def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the notebooks, which are not under `docs/`."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        uri, urls = f"notebooks/{path.name}", config.use_directory_urls
        files.append(File(uri, str(ROOT), config.site_dir, urls))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files):
    """Turns links to files outside of `docs/` into links to the repository.

    So that they work in the repository's own view of the page, and on the site.
    """

    def link(match: re.Match) -> str:
        target, anchor = match.group(1), match.group(2) or ""
        path = posixpath.normpath(
            posixpath.join("docs", posixpath.dirname(page.file.src_uri), target)
        )
        if path.startswith("docs/"):
            return match.group(0)
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: there is no {target}")
        if path.endswith(".md") and anchor and anchor not in _anchors(ROOT / path):
            raise PluginError(f"{page.file.src_uri}: there is no {target}{anchor}")
        here = posixpath.join("docs", path)
        if path.endswith(".ipynb"):
            up = posixpath.relpath(
                here, posixpath.join("docs", page.file.src_uri, "..")
            )
            return f"]({up}{anchor})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{path}{anchor})"

    return re.sub(r"\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)", link, markdown)


def on_page_content(content: str, page: Page, **_) -> str:
    """Makes pages of notebooks do without other servers: MathML, pictures."""
    if not page.file.src_uri.endswith(".ipynb"):
        return content
    # Pictures have whole addresses, which Colab needs; the site has them itself.
    content = re.sub(
        r"https://raw\.githubusercontent\.com/[^\"]*/docs/", "../../", content
    )
    # What would draw formulas otherwise, from another server.
    content = re.sub(r"<script[^>]* src=[^>]*>\s*</script>", "", content)
    cell = r'<div class="[^"]*jp-RenderedMarkdown.*?</div>'
    return re.sub(cell, lambda m: FORMULA.sub(_mathml, m[0]), content, flags=re.DOTALL)


# Code comes first, as what is in it is no formula.
FORMULA = re.compile(
    r"<(code|pre)\b.*?</\1>|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$", re.DOTALL
)


def _mathml(match: re.Match) -> str:
    for display in ("block", "inline"):
        if match[display]:
            formula = html.unescape(match[display])
            math = latex2mathml.converter.convert(formula, display=display)
            return f'<span class="formula-{display}">{math}</span>'
    return match[0]
