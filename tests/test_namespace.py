"""What `import jbn` offers to completion, and to those who look around."""

import json
import subprocess
import sys

import pytest

import jbn


SCRIPT = """
import json, sys
import jbn

names = dir(jbn)
early = [name for name in ("equinox", "flax", "optax") if name in sys.modules]
missing = [name for name in names if not hasattr(jbn, name)]
modules = {name: getattr(jbn, name).__name__ for name in %r}
print(json.dumps([names, early, missing, modules]))
"""
MODULES = ["equinox", "linen", "models", "nnx", "tools", "training"]
NAMES = """
    BatchNorm BatchRenorm BatchStats ConditionalBatchNorm DomainBatchNorm
    FrozenBatchNorm GhostBatchNorm Moments Params SparseOutput batch_norm batch_renorm
    commit conditional_batch_norm domain_batch_norm frozen_batch_norm ghost_batch_norm
    group_weights init merge moments normalize sample_weights segment_ids shrink
    sparse_batch_norm trimmed_weights update_batch_stats
""".split()


def test_a_new_process_sees_everything():
    """Without Flax, until something of it is asked for."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT % MODULES],
        capture_output=True,
        text=True,
        check=True,
    )
    names, early, missing, modules = json.loads(run.stdout)
    assert {*MODULES, *NAMES} <= {*names}
    assert early == []
    assert missing == []
    assert modules == {name: f"jbn.{name}" for name in MODULES}


def test_names_are_what_they_say():
    for name in NAMES:
        assert getattr(jbn, name).__name__ == name


def test_what_is_not_there_is_an_error():
    with pytest.raises(AttributeError, match="batchnorm"):
        jbn.batchnorm  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


WITHOUT_FLAX = """
import sys

sys.modules["flax"] = None  # As if it were not installed.
import jbn

for statement in sys.stdin.read().splitlines():
    try:
        exec(statement)
    except ModuleNotFoundError as error:
        print(error)
"""


def test_a_missing_flax_is_named_with_its_extra():
    statements = [
        "jbn.BatchNorm",
        "jbn.nnx",
        "import jbn.nnx",
        "from jbn.linen import BatchRenorm",
        "jbn.tools",
        "from jbn.tools import fold",
        "from jbn import models",
    ]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_FLAX],
        input="\n".join(statements),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    assert len(lines) == len(statements)
    for line in lines:
        assert line.endswith(
            'needs Flax, which is not installed: pip install "jbn[flax]"'
        )
