"""Draws `docs/layers.svg`: the layers that `lint-imports` keeps.

    python docs/layers.py [--check]

The layers come from `pyproject.toml`, what each holds from its docstring. With
`--check` nothing is written, and a picture that is out of date is an error.
"""

import ast
import html
import sys
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "layers.svg"
WIDTH, LINE, PADDING, GAP = 760, 18, 8, 12
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57606a }
.name { font: 600 13px ui-monospace, monospace; fill: #1f2328 }
.jax { fill: #eef4fb; stroke: #9db9d9 }
.flax { fill: #fdf3e3; stroke: #dcb878 }
.arrow { fill: none; stroke: #8c959f; stroke-width: 1.5; marker-end: url(#head) }
"""
HEAD = """<defs>
<marker id="head" viewBox="0 0 8 8" refX="6" refY="4" orient="auto" markerWidth="6"
 markerHeight="6"><path d="M0 0L8 4L0 8z" fill="#8c959f"/></marker>
</defs>"""


def contracts():
    """The layers, each a list of modules side by side, and those without Flax."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = {c["type"]: c for c in content["tool"]["importlinter"]["contracts"]}
    layers = [layer.split(" | ") for layer in found["layers"]["layers"]]
    return [["train"], *layers], set(found["forbidden"]["source_modules"])


def note(module):
    """The first line of a module's docstring."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc, f"{path} has no docstring"
    return doc.splitlines()[0].replace("`", "")


def text(x, y, words, kind="note"):
    """A line of text."""
    return f'<text x="{x}" y="{y}" class="{kind}">{html.escape(words)}</text>'


def picture():
    """The whole drawing, from the top layer down."""
    layers, without_flax = contracts()
    parts, y = [text(10, 18, "Blue only needs JAX, yellow also Flax or Equinox.")], 30
    for modules in layers:
        if y > 30:
            parts.append(f'<path class="arrow" d="M{WIDTH / 2} {y}v{GAP - 2}"/>')
            y += GAP
        kind = "jax" if set(modules) <= without_flax else "flax"
        height = LINE * len(modules) + 2 * PADDING
        box = f'width="{WIDTH - 20}" height="{height}" rx="6"'
        parts.append(f'<rect class="{kind}" x="10" y="{y}" {box}/>')
        for i, module in enumerate(modules):
            at = y + PADDING + 13 + LINE * i
            parts.append(text(24, at, module.removeprefix("jbn."), "name"))
            parts.append(text(130, at, note(module)))
        y += height
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}">',
        "<title>The layers of jbn: each imports only what is below it</title>",
        f"<style>{STYLE}</style>",
        HEAD,
        f'<rect width="{WIDTH}" height="{y + 10}" fill="#ffffff"/>',
        *parts,
        "</svg>\n",
    ]
    return "\n".join(lines)


def main():
    """Writes the picture, or compares it."""
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(picture())
    elif not PICTURE.exists() or PICTURE.read_text() != picture():
        sys.exit(f"{PICTURE} is out of date: run `python docs/layers.py`")


if __name__ == "__main__":
    main()
