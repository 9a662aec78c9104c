"""The norms that `--norm` chooses, and their options by name."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
from jbn.linen import BatchNorm, BatchRenorm, GhostBatchNorm
from jbn.models import MLP
from jbn.options import LayerOptions, options_of
from jbn.training import norms
from jbn.training.build import make_norm, row_multiple
from jbn.training.config import Config, claim_workdir, load_config, parse_config
from jbn.training.errors import UsageError
from jbn.training.norms import NormOptions


pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_options_are_those_of_the_layers():
    """By name and default: a new one of a scalar type is a flag."""
    fields = {field.name: field.default for field in dataclasses.fields(NormOptions)}
    options = options_of(LayerOptions)
    for name in ("tau", "trim", "epsilon", "debias", "min_weight", "unbiased"):
        assert fields[name] == options[name][1].default
    assert set(fields) - set(options) == {"r_max", "d_max", "num_groups"}
    kinds = {kind for _, (kind, _) in options.items()}
    assert kinds > set(norms._TYPES)


@pytest.mark.parametrize(
    ("flags", "cls", "expected"),
    [
        (["--norm.tau=32"], BatchNorm, {"tau": 32.0}),
        (["--norm=batch", "--norm.trim=5"], BatchNorm, {"trim": 5.0}),
        (["--norm.epsilon=.1", "--norm.debias"], BatchNorm, {"epsilon": 0.1}),
        (["--norm=renorm", "--norm.r-max=2"], BatchRenorm, {"r_max": 2.0}),
        (["--norm=ghost", "--norm.num-groups=4"], GhostBatchNorm, {"num_groups": 4}),
        (["--no-norm.use-bias", "--momentum=.7"], BatchNorm, {"use_bias": False}),
    ],
)
def test_flags_reach_the_layer(flags: list[str], cls: type, expected: Any):
    config = parse_config(flags)
    layer = make_norm(config, None)()
    assert type(layer) is cls
    assert {name: getattr(layer, name) for name in expected} == expected
    assert layer.momentum == config.momentum


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--norm=group", "--norm.tau=3"], "--norm.tau is not for --norm=group: only"),
        (["--norm=batch", "--norm.r-max=3.5"], "--norm.r-max is not for --norm=batch"),
        (["--norm=none", "--norm.epsilon=1"], "--norm.epsilon is not for --norm=none"),
        (["--norm=ghost"], "--norm=ghost needs --norm.num-groups"),
        (["--norm=ghost", "--norm.num-groups=0"], "--norm.num-groups=0 is out of r"),
        (
            ["--norm=layer", "--bn-group-size=1"],
            "--bn-group-size is only for --norm=batch",
        ),
        (["--dropout=1"], "--dropout=1.0 is out of range"),
        (["--model=dcgan", "--dropout=.5"], "--dropout is not for --model=dcgan"),
        (["--width=0"], "--width=0 is out of range: at least 1"),
    ],
)
def test_what_has_no_meaning_together(flags: list[str], match: str):
    with pytest.raises(UsageError, match=match):
        parse_config(flags)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--norm.tau=-1"], "--norm=batch: `tau` must be at least 0; got -1"),
        (["--norm=renorm", "--norm.r-max=.5"], "--norm=renorm: `r_max` must be at lea"),
    ],
)
def test_values_out_of_range(flags: list[str], match: str):
    config = parse_config(flags)
    with pytest.raises(UsageError, match=match):
        make_norm(config, None)


def test_saved_and_resumed(tmp_path: Path):
    flags = ["--norm=renorm", "--norm.tau=8", "--dropout=.25", f"--workdir={tmp_path}"]
    config = parse_config(flags)
    claim_workdir(config)
    assert load_config(tmp_path / "config.json") == config
    again = parse_config(["--resume", f"--workdir={tmp_path}"])
    assert again.norm_options == NormOptions(tau=8.0)
    with pytest.raises(UsageError, match=r"made with --norm.tau=8.0.*resumed with 9"):
        parse_config(["--resume", f"--workdir={tmp_path}", "--norm.tau=9"])


def test_rows_fill_ghost_groups():
    config = Config(norm="ghost", norm_options=NormOptions(num_groups=6))
    assert row_multiple(config, 4) == 12
    assert row_multiple(dataclasses.replace(config, microbatches=3), 1) == 18
    assert row_multiple(Config(), 4) == 4


# ---- Norms of single examples, against NumPy -----------------------------------------


def in_model(norm: str, x: np.ndarray, **options: Any) -> tuple[np.ndarray, Any]:
    """The output and the parameters of a layer, called as the models call theirs."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            make = norms.make(norm, NormOptions(**options), momentum=0.9)
            layer = make(name="norm", scale_init=nn.initializers.constant(2.0))
            return layer(x, use_running_average=False, mask=None)

    found: Any = Model().init_with_output(jax.random.key(0), jnp.asarray(x))
    y, variables = found
    assert set(variables) <= {"params"}
    return np.asarray(y), variables.get("params", {}).get("norm", {})


def normalized(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return 2 * (x - mean) / np.sqrt(var + epsilon)


def test_layer_norm(rng: np.random.Generator):
    x = rng.normal(3, 2, (4, 3, 5, 8)).astype(np.float32)
    y, params = in_model("layer", x, epsilon=0.1)
    np.testing.assert_allclose(y, normalized(x, (1, 2, 3), 0.1), rtol=1e-4, atol=1e-5)
    assert params["scale"].shape == params["bias"].shape == (8,)


@pytest.mark.parametrize(("channels", "given", "groups"), [(32, None, 2), (6, 3, 3)])
def test_group_norm(rng: np.random.Generator, channels: int, given: Any, groups: int):
    x = rng.normal(3, 2, (4, 3, 5, channels)).astype(np.float32)
    y, _ = in_model("group", x, num_groups=given)
    grouped = x.reshape(4, 3, 5, groups, -1)
    expected = normalized(grouped, (1, 2, 4), 1e-5).reshape(x.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=f"=5 does not divide {channels} channels"):
        in_model("group", x, num_groups=5)


def test_none_is_the_affine_map(rng: np.random.Generator):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    y, params = in_model("none", x)
    np.testing.assert_array_equal(y, 2 * x)
    assert set(params) == {"scale", "bias"}
    bare, params = in_model("none", x, use_scale=False, use_bias=False)
    np.testing.assert_array_equal(bare, x)
    assert params == {}
    half, _ = in_model("none", jnp.asarray(x, jnp.bfloat16))  # type: ignore[arg-type]
    assert half.dtype == jnp.bfloat16


# ---- Dropout -------------------------------------------------------------------------


def test_dropout_is_by_row(rng: np.random.Generator):
    """The part that is asked for, scaled; and the same for a row wherever it is."""
    x = rng.integers(0, 256, (32, 4, 4, 1), np.uint8)
    model = MLP(features=(400,), num_classes=400, norm=jbn.linen.FrozenBatchNorm)
    model = model.clone(dropout=0.25)
    variables: Any = model.init(jax.random.key(0), x, train=False)
    # The last layer shows the hidden units.
    variables["params"]["Dense_1"] = {"kernel": np.eye(400), "bias": np.zeros(400)}
    keys = jax.random.split(jax.random.key(1), 32)
    apply = lambda x, keys: np.asarray(model.apply(variables, x, train=True, keys=keys))
    whole, dropped = apply(x, None), apply(x, keys)
    alive = np.abs(whole) > 1e-6
    share = (dropped[alive] == 0).mean()
    assert share == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / alive.sum()))
    stays = alive & (dropped != 0)
    np.testing.assert_allclose(dropped[stays], whole[stays] / 0.75, rtol=1e-5)
    order = rng.permutation(32)
    np.testing.assert_allclose(apply(x[order], keys[order]), dropped[order], rtol=1e-5)
    evaluated = model.apply(variables, x, train=False)
    np.testing.assert_allclose(np.asarray(evaluated), whole, rtol=1e-5)
