"""The command line: what it accepts, refuses, and takes from a run to resume."""

import dataclasses
from pathlib import Path

import pytest

from jbn.training.config import Config, claim_workdir, load_config, parse_config
from jbn.training.errors import UsageError


def test_every_field_is_explained(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"{field.name}: " in (Config.__doc__ or "")
    assert "{None}" not in text
    assert "default: None" not in text


def test_written_and_read_again(tmp_path: Path):
    workdir = tmp_path / "run"
    config = Config(dataset="mnist", data_dir=tmp_path, workdir=workdir, seed=3)
    assert claim_workdir(config) == workdir
    assert load_config(workdir / "config.json") == config
    with pytest.raises(UsageError, match="has just been taken by another run"):
        claim_workdir(config)
    claim_workdir(dataclasses.replace(config, resume=True))
    assert load_config(workdir / "config.json") == config


def test_every_run_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    seen = set()
    for _ in range(3):  # In one and the same second.
        config = parse_config(["--dataset=emnist/letters", "--seed=7"])
        workdir = claim_workdir(config)
        assert load_config(workdir / "config.json").workdir == workdir
        assert workdir.parent == Path("runs")
        assert workdir.name.startswith("emnist-letters-mlp-seed7-")
        seen.add(workdir)
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--epochs=0"], "--epochs=0 is out of range: at least 1"),
        (["--batch-size=0"], "--batch-size=0 is out of range"),
        (["--steps-per-dispatch=0"], "--steps-per-dispatch=0 is out of range"),
        (["--num-devices=0"], "--num-devices=0 is out of range"),
        (["--image-size=0"], "--image-size=0 is out of range"),
        (["--learning-rate=0"], "--learning-rate=0.0 is out of range: above 0"),
        (["--momentum=1.5"], "--momentum=1.5 is out of range: from 0 to 1"),
        (["--seed=-1"], "--seed=-1 is out of range"),
        (["--resume"], "--resume needs --workdir"),
    ],
)
def test_out_of_range(args: list[str], match: str):
    with pytest.raises(UsageError, match=match):
        parse_config(args)


def test_resuming_takes_the_flags_of_the_run(tmp_path: Path):
    workdir = f"--workdir={tmp_path}"
    with pytest.raises(UsageError, match="there is no run in"):
        parse_config(["--resume", workdir])
    first = parse_config([workdir, "--seed=5", "--learning-rate=0.01", "--epochs=3"])
    claim_workdir(first)
    with pytest.raises(UsageError, match="is not empty"):
        parse_config([workdir])
    again = parse_config(["--resume", workdir, "--epochs=9", "--parallel=jit"])
    assert again == dataclasses.replace(first, resume=True, epochs=9, parallel="jit")
    for flag in ("--seed=6", "--learning-rate=0.1", "--batch-size=8", "--momentum=0.5"):
        with pytest.raises(UsageError, match="leave the flag out"):
            parse_config(["--resume", workdir, flag])
