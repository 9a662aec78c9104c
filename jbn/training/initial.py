"""Loads weights and statistics for `--init-from`."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import numpy as np

from jbn.training.config import Config
from jbn.training.errors import UsageError
from jbn.training.state import TrainState


Variables = dict[str, np.ndarray]


def initialize_from(config: Config, state: TrainState) -> TrainState:
    """Replaces parameters and statistics by those of `config.init_from`.

    Args:
        config: With `init_from`, `init_skip` and `checkpoint`.
        state: The initial state of the model to train.

    Returns:
        The new state. An average over steps starts at the new parameters.

    Raises:
        UsageError: If the source cannot be read, or belongs to another model.
    """
    source = config.init_from
    assert source is not None
    found = _read(source, config.checkpoint)
    ours = {"params": state.params, "batch_stats": state.batch_stats}
    flat = _flat(ours)
    kept = {name for name in flat if _matches(name, config.init_skip)}
    skipped = kept | {name for name in found if _matches(name, config.init_skip)}
    if config.init_skip is not None and not skipped:
        layers = sorted({name.split("/")[1] for name in flat})
        raise UsageError(
            f"--init-skip={config.init_skip} matches no layer. Those of the model are "
            f"{', '.join(layers)}: give one as '{layers[-1]}/*'."
        )
    found = {name: x for name, x in found.items() if name not in skipped}
    for name in sorted((flat.keys() | found.keys()) - kept):
        layer = name.partition("/")[2].rpartition("/")[0]
        hint = f"--init-skip='{layer}/*' leaves the layer as it is initialized."
        if name not in found:
            raise UsageError(f"--init-from={source} has no {name}. {hint}")
        if name not in flat:
            raise UsageError(
                f"--init-from={source} is of another model: it has {name}. {hint}"
            )
        if found[name].shape != flat[name].shape:
            raise UsageError(
                f"--init-from={source} has {name} of shape {found[name].shape}, and "
                f"the model of this run {flat[name].shape}. {hint}"
            )
    new = {
        name: x if name in kept else np.asarray(found[name], x.dtype)
        for name, x in flat.items()
    }
    variables = _unflatten(new, ours)
    average = dict(variables) if state.average else {}
    return dataclasses.replace(state, **variables, average=average)


def _read(source: Path, checkpoint: str) -> Variables:
    if source.is_dir():
        from jbn.training.run import read_variables

        return _flat(read_variables(source, checkpoint))
    try:
        if source.suffix == ".npz":
            with np.load(source, allow_pickle=False) as arrays:
                return dict(arrays)
        if source.suffix == ".msgpack":
            tree: Any = flax.serialization.msgpack_restore(source.read_bytes())
            return _flat(tree)
    except Exception as error:  # Both may raise anything here.
        line = (str(error).strip().splitlines() or [""])[0]
        raise UsageError(
            f"--init-from={source} cannot be read ({type(error).__name__}: {line})."
        ) from error
    what = (
        "does not exist" if not source.exists() else "is not an .npz or .msgpack file"
    )
    raise UsageError(
        f"--init-from={source} {what}. Pass the folder of a run, or a file from "
        "`jbn fold`."
    )


def _matches(name: str, pattern: str | None) -> bool:
    """Whether a pattern matches an array or its layer."""
    path = name.partition("/")[2]
    return pattern is not None and fnmatch.fnmatchcase(path, pattern)


def _flat(variables: Mapping[str, Any]) -> Variables:
    flat: Any = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    return flat


def _unflatten(flat: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    new = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
    return {name: new.get(name, {}) for name in like}
