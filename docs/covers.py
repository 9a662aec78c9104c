"""Copies one picture of each notebook to `docs/notebooks/`, for the top of its page.

python docs/covers.py            after notebooks were executed
python docs/covers.py --check    says whether the pictures are up to date
"""

import base64
import json
import pathlib
import sys


ROOT = pathlib.Path(__file__).parents[1]
# The notebooks, in the order of the site, and which of their pictures comes first.
COVERS = {
    "batch_norm": 1,
    "effects": 0,
    "paper": 0,
    "uneven": 0,
    "distributed": 1,
    "applications": 2,
    "nnx": 0,
}


def cover(name: str) -> bytes:
    """The picture, as it stands in the outputs of the notebook."""
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    pictures = [
        output["data"]["image/png"]
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    return base64.b64decode(pictures[COVERS[name]])


def main() -> int:
    """Writes the pictures, or compares them; returns the exit status."""
    stale = []
    for name in COVERS:
        path = ROOT / "docs" / "notebooks" / f"{name}.png"
        if path.exists() and path.read_bytes() == cover(name):
            continue
        stale.append(path.name)
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(cover(name))
    if stale and "--check" in sys.argv[1:]:
        print("out of date:", *stale, "(python docs/covers.py)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
