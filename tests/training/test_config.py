"""The command line: what it accepts, refuses, and takes from a run to resume."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from jbn.training.config import (
    GROUPS,
    PRESETS,
    Config,
    Model,
    Period,
    claim_workdir,
    load_config,
    parse_config,
    period_of,
    preset,
)
from jbn.training.errors import UsageError
from jbn.training.workdir import reserved


def test_every_field_is_explained(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        flag = "norm." if field.name == "norm_options" else field.name
        assert f"--{flag.replace('_', '-')}" in text
        assert f"{field.name}: " in (Config.__doc__ or "")
    assert "{None}" not in text
    for title in GROUPS:
        assert f" {title} options " in text
    assert "more options" not in text
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
        (["--beta1=1"], "--beta1=1.0 is out of range: from 0 to below 1"),
        (["--clip-norm=0"], "--clip-norm=0.0 is out of range: above 0"),
        (["--microbatches=0"], "--microbatches=0 is out of range: at least 1"),
        (["--max-skipped=-1"], "--max-skipped=-1 is out of range: at least 0"),
        (["--crop"], "--crop needs --image-size"),
        (["--mixup=-1"], "--mixup=-1.0 is out of range: at least 0"),
        (["--model=unet", "--mixup=.2"], "--mixup is not for --model=unet"),
        (["--test-fraction=1"], "--test-fraction=1.0 is out of range: above 0 and b"),
        (["--model=dcgan", "--microbatches=2"], "--microbatches is not for"),
        (["--coordinator=h:1"], "--coordinator also needs --num-processes"),
        (["--num-processes=2"], "--num-processes also needs --coordinator"),
        (
            ["--coordinator=h:1", "--num-processes=2"],
            "--coordinator also needs --process-id",
        ),
        (["--model", "dcgan", "--bn-group-size=1"], "--bn-group-size is not for"),
        (["--model=dcgan", "--label-smoothing=.1"], "--label-smoothing is not for"),
        (["--seed=4294967296"], "--seed=4294967296 is out of range"),
        *(
            ([f"--{name}=0"], f"--{name}=0 is out of range: at least 1")
            for name in ("bn-group-size", "save-every", "num-processes", "peer-timeout")
        ),
        *(
            ([f"--{name}=-1"], rf"--{name}=-1(\.0)? is out of range: at least 0")
            for name in ("shift", "warmup-epochs", "weight-decay", "process-id")
        ),
        *(
            ([f"--{name}={value}"], rf"--{name}={value} is out of range: from 0 to bel")
            for name in ("beta1", "label-smoothing", "ema-decay")
            for value in (-0.1, 1.0)
        ),
        (
            ["--coordinator=h:1", "--num-processes=2", "--process-id=2"],
            "--process-id=2 is out of range",
        ),
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


def test_no_flag_at_all_is_the_perceptron_on_digits():
    assert parse_config([]) == Config()
    assert (Config().model, Config().dataset) == ("mlp", "digits")


@pytest.mark.parametrize("model", PRESETS)
def test_defaults_are_those_of_the_model(model: str, tmp_path: Path):
    for args in (["--model", model], [f"--model={model}"]):
        assert parse_config(args) == preset(model)
    for name, value in PRESETS[model].items():
        assert getattr(preset(model), name) == value
    workdir = f"--workdir={tmp_path / model}"
    first = parse_config([f"--model={model}", workdir, "--seed=4"])
    claim_workdir(first)
    again = parse_config(["--resume", workdir])
    assert again == dataclasses.replace(first, resume=True)


def test_a_schedule_is_over_all_epochs(tmp_path: Path):
    workdir = f"--workdir={tmp_path}"
    claim_workdir(parse_config([workdir, "--schedule=cosine", "--epochs=3"]))
    with pytest.raises(UsageError, match=r"made with --epochs=3.*resumed with 4"):
        parse_config(["--resume", workdir, "--epochs=4"])
    assert load_config(tmp_path / "config.json").epochs == 3


def test_what_may_change_on_resuming(tmp_path: Path):
    """Where and how it runs, but not what; nor how long, if a schedule ends there."""
    workdir = f"--workdir={tmp_path}"
    first = parse_config([workdir, "--schedule=cosine", "--epochs=3"])
    claim_workdir(first)
    match = "was made with --epochs=3. It cannot be resumed with 4"
    with pytest.raises(UsageError, match=match):
        parse_config([workdir, "--resume", "--epochs=4"])
    other: dict[str, Any] = {
        "steps_per_dispatch": 5,
        "num_devices": 2,
        "save_every": 7,
        "max_skipped": 1,
        "peer_timeout": 20,
        "loader": "grain",
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in other.items()]
    again = parse_config([workdir, "--resume", *flags])
    assert again == dataclasses.replace(first, resume=True, **other)
    for flag in (
        *("--model=resnet8", "--dataset=mnist", "--image-size=9", "--shift=1"),
        *("--flip", "--microbatches=2", "--optimizer=sgd", "--beta1=0.5"),
        *("--schedule=constant", "--warmup-epochs=1", "--weight-decay=0.1"),
        *("--clip-norm=1", "--label-smoothing=0.1", "--ema-decay=0.9"),
        *("--precision=bf16", "--bn-group-size=1", "--width=8", "--depth=3"),
        *("--norm=layer", "--norm.tau=1", "--dropout=.1", "--test-fraction=.3"),
    ):
        with pytest.raises(UsageError, match="leave the flag out"):
            parse_config([workdir, "--resume", flag])
    # With a description, the data themselves are compared when they are opened.
    (tmp_path / "dataset.json").write_text("{}")
    assert parse_config([workdir, "--resume", "--dataset=mnist"]).dataset == "mnist"


# ---- What suits a model --------------------------------------------------------------


def test_every_model_has_its_defaults():
    models = get_args(Model)
    assert set(PRESETS) == set(models)
    for model in models:
        for args in ([f"--model={model}"], ["--model", model]):
            config = parse_config(args)
            assert config == preset(model) == Config(model=model, **PRESETS[model])
    assert preset("mlp") == Config()


def test_flags_come_before_what_suits_a_model():
    config = parse_config(["--epochs=2", "--model=unet", "--dataset=pets"])
    expected = dataclasses.replace(preset("unet"), epochs=2, dataset="pets")
    assert config == expected


@pytest.mark.parametrize("model", ["resnet18", "dcgan"])
def test_help_shows_what_suits_a_model(model: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        parse_config([f"--model={model}", "--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"(default: {model})" in text
    for name, value in PRESETS[model].items():
        # (Texts name flags, too, but without a value.)
        flag = re.search(rf"--{name.replace('_', '-')} [A-Z{{]", text)
        assert flag is not None
        after = text[flag.start() :]
        assert f"(default: {value})" in after[:600] or name == "image_size"


def test_a_model_that_is_not_there():
    with pytest.raises(
        UsageError, match=r"--model=resnt8 is not known\. Did you mean `"
    ):
        parse_config(["--model=resnt8"])
    with pytest.raises(UsageError, match="There are mlp, resnet8, resnet18"):
        parse_config(["--model=vgg"])


def test_paths_to_data_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that a run can be used from another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for name in ("set", "./set", str(tmp_path / "set")):
        config = parse_config([f"--dataset={name}", "--data-dir=data"])
        assert config.dataset == str(tmp_path / "set")
        assert config.data_dir == tmp_path / "data"
    assert parse_config(["--dataset=mnist"]).dataset == "mnist"
    with reserved(parse_config(["--dataset=set"])) as workdir:
        assert workdir.name.startswith("set-mlp-seed0-")


def test_a_run_of_several_processes_is_resumed_by_one(tmp_path: Path):
    """The flags that join processes are of a process, and not of its run."""
    together = ["--coordinator=h:1", "--num-processes=2", "--process-id=0"]
    workdir = f"--workdir={tmp_path}"
    claim_workdir(parse_config([workdir, *together, "--distributed", "--seed=3"]))
    again = parse_config(["--resume", workdir])
    assert (again.coordinator, again.num_processes, again.process_id) == (None,) * 3
    assert (again.distributed, again.seed) == (False, 3)


# ---- Files ---------------------------------------------------------------------------


def written(path: Path, **changes: Any) -> Path:
    values = dataclasses.asdict(Config()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epochs": "ten"}, "\"ten\" is not a value of 'epochs'"),
        ({"epochs": True}, "true is not a value of 'epochs'"),
        ({"flip": 1}, "1 is not a value of 'flip'"),
        ({"workdir": 3}, "3 is not a value of 'workdir'"),
        ({"model": "vgg"}, "--model=vgg is not known"),
        ({"learning_rte": 1.0}, "no flag 'learning_rte'. Did you mean 'learning_rate'"),
        ({"zzz": 1.0}, "there is no flag 'zzz'. Is it newer than this"),
        ({"seed": ...}, "'seed' is missing. Its default is 0"),
        ({"epochs": 0}, "--epochs=0 is out of range"),
    ],
)
def test_a_file_that_was_edited(tmp_path: Path, changes: dict[str, Any], match: str):
    path = written(tmp_path / "config.json", **changes)
    with pytest.raises(UsageError, match=match) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path} is not the configuration of a run: ")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1,\n}', "\udcff"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str):
    path = tmp_path / "config.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(UsageError, match="is not the configuration of a run"):
        load_config(path)


def test_the_file_of_an_older_version(tmp_path: Path):
    """Flags that are newer have their defaults."""
    path = written(tmp_path / "config.json", init_from=..., steps=..., save_every=7)
    assert load_config(path) == dataclasses.replace(Config(), save_every=7)


def test_flags_come_before_a_file(tmp_path: Path):
    first = parse_config([f"--workdir={tmp_path / 'run'}", "--seed=5", "--model=unet"])
    claim_workdir(first)
    path = tmp_path / "run" / "config.json"
    for args in ([f"--config={path}"], ["--config", str(path)]):
        found = parse_config([*args, "--epochs=9"])
        expected = dataclasses.replace(first, workdir=None, epochs=9, config=path)
        assert found == expected
    with pytest.raises(UsageError, match="--config is for a new run"):
        parse_config([f"--config={path}", "--resume", f"--workdir={tmp_path / 'run'}"])
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        parse_config(["--config=nothing.json"])


@pytest.mark.parametrize(
    ("value", "period"),
    [
        ("500", Period(steps=500)),
        ("10m", Period(seconds=600.0)),
        ("0.5m", Period(seconds=30.0)),
    ],
)
def test_periods(value: str, period: Period):
    config = parse_config([f"--eval-every={value}"])
    assert period_of(config, "eval_every") == period
    assert period_of(config, "save_every") is None


@pytest.mark.parametrize("value", ["0", "-1", "0m", "10h", "m", "1.5"])
def test_what_is_no_period(value: str):
    with pytest.raises(UsageError, match=f"--save-every={value} is out of range"):
        parse_config([f"--save-every={value}"])
