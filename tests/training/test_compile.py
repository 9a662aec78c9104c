"""`train.py compile`, for the devices that are here."""

import json
from pathlib import Path

import pytest
from ways import needs_devices

from jbn.training import compile
from jbn.training.errors import UsageError


SHAPE = ("--shape", "8", "8", "3", "--num-classes", "5")


@pytest.mark.devices
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_report(parallel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two norm layers: an all-reduce each way; the loss, its weight, the gradients."""
    file = tmp_path / "report.json"
    args = (*SHAPE, "--num-devices=4", f"--parallel={parallel}", f"--json={file}")
    assert compile.main(args) == 0
    out = capsys.readouterr().out
    assert f"4 CPU, by {parallel}" in out
    assert "all-reduce" in out
    report = json.loads(file.read_text())
    # 8 x 8 x 3 x 64 + 64 x 64 + 64 x 5 weights, 133 biases, 4 x 64 of norms and as many
    # statistics; Adam has each parameter twice more.
    params = 8 * 8 * 3 * 64 + 64 * 64 + 64 * 5 + 133 + 4 * 64
    assert report["arguments"] >= 4 * (3 * params + 4 * 64)
    assert report["arguments"] < 4 * (3 * params + 4 * 64) + 16384
    assert report["flops"] > 0


@pytest.mark.parametrize(
    ("args", "match"),
    [
        needs_devices(
            ["--batch-size=30", "--num-devices=4"], "is not a multiple of 4 devices"
        ),
        (["--topology=v5e:2x2"], "--topology needs --accelerator=tpu or gpu"),
        needs_devices(
            ["--bn-group-size=3", "--num-devices=4"],
            "must divide the number of devices",
        ),
    ],
)
def test_what_cannot_be_compiled(args: list[str], match: str):
    with pytest.raises(UsageError, match=match):
        compile.main((*SHAPE, *args))
