"""Runs the Python of a page as one story, in a process of its own, and quickly.

Importing JAX, Flax and optax takes longer than most pages run. So the process is forked
from one that has imported them and done nothing else: JAX's backends start in the fork.
"""

import contextlib
import io
import json
import multiprocessing
import os
import pathlib


CONTEXT = multiprocessing.get_context("forkserver")
# Of jbn only what `import jbn` brings: the rest is for each page to import.
CONTEXT.set_forkserver_preload(["flax.linen", "flax.nnx", "jbn", "optax", "pytest"])


def tell(page: str, blocks: list[tuple[int, str]], folder: pathlib.Path) -> list[str]:
    """What each block prints; they share their names. `blocks` have their lines."""
    process = CONTEXT.Process(target=_tell, args=(page, blocks, folder))
    process.start()
    process.join()
    errors = (folder / "stderr.txt").read_text()
    assert process.exitcode == 0, f"exit status {process.exitcode}: {errors}"
    assert not errors, errors
    return json.loads((folder / "stdout.txt").read_text())


def _tell(page: str, blocks: list[tuple[int, str]], folder: pathlib.Path) -> None:
    os.chdir(folder)
    # Of the process, and not of Python alone: XLA writes to them, too.
    for number, name in (1, "stdout.txt"), (2, "stderr.txt"):
        with open(name, "w") as file:
            os.dup2(file.fileno(), number)
    names = {"__name__": "__main__"}
    printed = []
    for line, code in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * line + code, page, "exec"), names)
        printed.append(out.getvalue())
    print(json.dumps(printed))
