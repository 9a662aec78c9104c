"""Plants each fault and sees it named, at the right layer; and no other."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import jbn
import jbn.linen
import jbn.nnx
from jbn.tools import inspect, merge, population, recalibrate
from jbn.tools.measure import Measured
from jbn.tools.report import Report


EPS = 1e-5


class Net(nn.Module):
    """Two layers, each with a norm, that take no notice of what the norms are."""

    norm: Callable[..., Any] = jbn.linen.BatchNorm
    width: int = 24

    @nn.compact
    def __call__(self, x: Any, train: bool = True, **call: Any) -> Any:
        for i in (1, 2):
            x = nn.Dense(self.width, name=f"dense_{i}")(x)
            x = self.norm(name=f"norm_{i}")(x, use_running_average=not train, **call)
            x = nn.relu(x)
        return x


def applied(model: nn.Module, *names: str, **call: Any) -> Callable[[Any, Any], Any]:
    """The model in training mode; `names` are arguments that batches hold."""

    def apply(variables, batch):
        x, *rest = batch if names else (batch,)
        extra = dict(zip(names, rest, strict=True))
        return model.apply(variables, x, mutable=["batch_stats"], **extra, **call)

    return apply


def data(rng: np.random.Generator, batches: int = 20, rows: int = 64) -> list[Any]:
    mixing = rng.normal(size=(6, 6))
    x = rng.normal(size=(batches, rows, 6)) @ mixing + rng.normal(size=6)
    return separate(x)


def separate(x: np.ndarray, dtype: Any = jnp.float32) -> list[Any]:
    """An array for each batch. (To iterate over one of JAX's compiles a program.)"""
    return [jnp.asarray(batch, dtype) for batch in x]


def healthy(model: nn.Module, batches: Sequence[Any], **call: Any) -> Any:
    """Variables of a model whose statistics are those of the data."""
    variables: Any = model.init(jax.random.key(1), batches[0], **call)
    return recalibrate(applied(model, **call), variables, batches)


@pytest.fixture(scope="module")
def base() -> tuple[Any, list[Any], Any]:
    """A model, data, and variables that are in order."""
    model, batches = Net(), data(np.random.default_rng(5))
    return model, batches, healthy(model, batches)


def changed(variables: Any, collection: str, layer: str, **new: Any) -> Any:
    """Variables with other arrays, made by functions of the old, in one layer."""
    node = variables[collection][layer]
    node = node | {name: make(node[name]) for name, make in new.items()}
    return variables | {collection: variables[collection] | {layer: node}}


def found(report: Report) -> set[tuple[str, str]]:
    return {(finding.layer, finding.kind) for finding in report.findings}


def only(report: Report) -> Any:
    assert len(report.findings) == 1, report
    return report.findings[0]


def expected(x: np.ndarray, mean: Any, var: Any, eps: float = EPS) -> dict[str, Any]:
    """Drift, ratio and divergence of the rows of `x`, in float64."""
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    data_mean = x.mean(0)
    data_var = ((x - data_mean) ** 2).mean(0)
    p, q = data_var + eps, var + eps
    return {
        "drift": (data_mean - mean) / np.sqrt(q),
        "ratio": p / q,
        "kl": np.log(np.sqrt(q / p)) + (p + (data_mean - mean) ** 2) / (2 * q) - 0.5,
    }


def assert_numbers(layer: Measured, want: dict[str, Any]):
    for name, value in want.items():
        np.testing.assert_allclose(
            getattr(layer, name), value.ravel(), rtol=1e-4, atol=1e-5, err_msg=name
        )


# ---- Numbers -------------------------------------------------------------------------


def stats_for(rng: np.random.Generator, *shape: int) -> dict[str, Any]:
    mean = rng.normal(size=shape).astype(np.float32)
    var = rng.uniform(0.3, 3, size=shape).astype(np.float32)
    return {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}


@pytest.mark.parametrize("cls", [jbn.linen.BatchNorm, nn.BatchNorm])
def test_numbers_of_linen_layers(rng: np.random.Generator, cls: Any):
    layer = cls(use_running_average=False, axis=1, epsilon=0.01)
    sizes = (5, 3, 8)
    batches = [jnp.asarray(rng.normal(2, 3, (n, 4, 6)), jnp.float32) for n in sizes]
    variables = dict(layer.init(jax.random.key(0), batches[0]))
    variables["batch_stats"] = stats_for(rng, 4)
    (got,) = inspect(applied(layer), variables, batches).layers
    rows = np.concatenate([np.moveaxis(np.asarray(b), 1, -1) for b in batches])
    rows = rows.reshape(-1, 4).astype(np.float64)
    assert_numbers(got, expected(rows, **variables["batch_stats"], eps=0.01))
    assert (got.layer, got.batches, got.least_rows) == ("", 3, 18)
    assert got.rows == pytest.approx(32)
    summary = got.summary()
    want = expected(rows, **variables["batch_stats"], eps=0.01)
    assert summary["kl_mean"] == pytest.approx(want["kl"].mean(), rel=1e-4)
    assert summary["kl_max"] == pytest.approx(want["kl"].max(), rel=1e-4)
    moved = np.abs(want["drift"])
    assert summary["drift_max"] == pytest.approx(moved.max(), rel=1e-4)
    assert summary["drift_rms"] == pytest.approx(np.sqrt((moved**2).mean()), rel=1e-4)
    assert summary["ratio_median"] == pytest.approx(np.median(want["ratio"]), rel=1e-4)


@pytest.mark.parametrize("cls", [jbn.nnx.BatchNorm, nnx.BatchNorm])
def test_numbers_of_nnx_layers(rng: np.random.Generator, cls: Any):
    class Model(nnx.Module):
        def __init__(self):
            self.inside = nnx.List([cls(3, rngs=nnx.Rngs(0))])

        def __call__(self, x):
            return self.inside[0](x)

    model = Model()
    for name, value in stats_for(rng, 3).items():
        getattr(model.inside[0], name)[...] = value
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    batches = [jnp.asarray(rng.normal(1, 2, (n, 3)), jnp.float32) for n in (40, 20)]
    (got,) = inspect(lambda m, x: m(x), model, batches).layers
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    rows = np.concatenate(batches).astype(np.float64)
    layer = model.inside[0]
    assert_numbers(got, expected(rows, layer.mean[...], layer.var[...]))
    assert got.layer == "inside/0"


def test_rows_that_are_masked_do_not_count(rng: np.random.Generator):
    layer = jbn.linen.BatchNorm(use_running_average=False)
    x = rng.normal(3, 2, (4, 50, 2)).astype(np.float32)
    mask = rng.uniform(size=(4, 50, 1)) < 0.6
    x = np.where(mask, x, np.nan)
    variables = dict(layer.init(jax.random.key(0), jnp.zeros((1, 2))))
    variables["batch_stats"] = stats_for(rng, 2)
    batches = list(zip(x, mask, strict=True))
    report = inspect(applied(layer, "mask"), variables, batches)
    rows = x[mask[..., 0]].astype(np.float64)
    assert_numbers(report.layers[0], expected(rows, **variables["batch_stats"]))
    assert report.layers[0].least_rows == mask.sum((1, 2)).min()
    assert found(report) == {("", "shifted")}


def test_complex_features(rng: np.random.Generator):
    """Which are two normal distributions each: twice the divergence of one."""
    layer = jbn.linen.BatchNorm(use_running_average=False)
    x = rng.normal(1, 2, (3, 80, 2)) + 1j * rng.normal(-1, 2, (3, 80, 2))
    batches = separate(x, jnp.complex64)
    variables = dict(layer.init(jax.random.key(0), batches[0]))
    (got,) = inspect(applied(layer), variables, batches).layers
    rows = x.reshape(-1, 2).astype(np.complex64).astype(np.complex128)
    var = (np.abs(rows - rows.mean(0)) ** 2).mean(0) + EPS
    distance = np.abs(rows.mean(0)) / np.sqrt(1 + EPS)
    np.testing.assert_allclose(got.drift, distance, rtol=1e-5)
    want = var / (1 + EPS) - 1 - np.log(var / (1 + EPS)) + distance**2
    np.testing.assert_allclose(got.kl, want, rtol=1e-5)


def test_divergence_is_zero_where_statistics_are_those_of_the_data():
    layer = jbn.linen.BatchNorm(use_running_average=False)
    x = jnp.asarray([[0.0, 8.0], [2.0, 0.0]])
    variables = dict(layer.init(jax.random.key(0), x))
    variables["batch_stats"] = {
        "mean": jnp.asarray([1.0, 4.0]),
        "var": jnp.asarray([1.0, 16.0]),
    }
    (got,) = inspect(applied(layer), variables, [x]).layers
    np.testing.assert_array_equal(got.kl, 0)
    np.testing.assert_array_equal(got.drift, 0)


def test_effective_rows_are_those_that_are_independent(rng: np.random.Generator):
    """Every row comes 16 times, as the pixels of smooth images do."""
    layer = jbn.linen.BatchNorm(use_running_average=False)
    x = np.repeat(rng.normal(size=(40, 32, 20)), 16, axis=1)
    batches = separate(x)
    variables: Any = layer.init(jax.random.key(0), batches[0])
    (got,) = inspect(applied(layer), variables, batches).layers
    assert got.rows == 512
    assert got.effective_rows == pytest.approx(40 * 32, rel=0.15)
    # By how much more the means scatter than those of 512 independent rows.
    scatter = x.mean(1).var(0, ddof=1) / (x.var((0, 1)) / 512)
    assert got.effective_rows == pytest.approx(40 * 512 / scatter.mean(), rel=1e-4)
    once = separate(x[:, ::16])
    (got,) = inspect(applied(layer), variables, once).layers
    assert got.effective_rows == pytest.approx(40 * 32, rel=0.15)


# ---- Faults --------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [jbn.linen.BatchNorm, nn.BatchNorm])
def test_statistics_of_the_data_are_healthy(rng: np.random.Generator, norm: Any):
    model, batches = Net(norm), data(rng)
    report = inspect(applied(model), healthy(model, batches), batches)
    assert report.findings == ()
    assert report.healthy
    assert [layer.layer for layer in report.layers] == ["norm_1", "norm_2"]
    # Other data of the same kind, of which there are few.
    rng.shuffle(batches)
    assert inspect(applied(model), healthy(model, batches[:10]), batches[10:]).healthy


OURS: dict[str, dict[str, Any]] = {
    "BatchNorm": {"debias": True},
    "BatchRenorm": {},
    "GhostBatchNorm": {"num_groups": 2},
    "FrozenBatchNorm": {"freeze_stats": False},
    "ConditionalBatchNorm": {"num_classes": 2},
    "DomainBatchNorm": {"num_domains": 1},
}


@pytest.mark.parametrize(
    "name",
    [
        n if n == "DomainBatchNorm" else pytest.param(n, marks=pytest.mark.slow)
        for n in OURS
    ],
)
def test_all_classes_before_and_after(rng: np.random.Generator, name: str):
    """New ones are named, recalibrated ones are in order, in both APIs."""
    options, batches = OURS[name], data(rng, batches=8)
    call = {"ConditionalBatchNorm": {"labels": 1}, "DomainBatchNorm": {"domain": 0}}
    extra: dict[str, Any] = call.get(name, {})
    layer = getattr(jbn.linen, name)(use_running_average=False, **options)
    variables: Any = layer.init(jax.random.key(0), batches[0], **extra)
    model = getattr(jbn.nnx, name)(6, rngs=nnx.Rngs(0), **options)
    cases: list[tuple[Any, Any]] = [
        (applied(layer, **extra), variables),
        (lambda model, x: model(x, **extra), model),
    ]
    for apply, state in cases:
        assert only(inspect(apply, state, batches)).kind == "never_updated"
        state = recalibrate(apply, state, batches)
        assert inspect(apply, state, batches).findings == ()


def test_layers_that_are_called_twice(rng: np.random.Generator):
    """Are compared with both of their inputs, of which there are 2 x 64 rows."""

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            norm = jbn.linen.BatchNorm(use_running_average=False, name="norm")
            return norm(norm(x) + 1)

    model, batches = Twice(), data(rng)
    variables: Any = model.init(jax.random.key(0), batches[0])
    variables = recalibrate(applied(model), variables, batches)
    report = inspect(applied(model), variables, batches)
    assert report.findings == ()
    assert [(layer.layer, layer.rows) for layer in report.layers] == [("norm", 128)]
    rows = np.concatenate(batches).astype(np.float64)
    batch = np.asarray(batches, np.float64)
    again = (batch - batch.mean(1, keepdims=True)) / batch.std(1, keepdims=True) + 1
    both = np.concatenate([rows, again.reshape(-1, 6)])
    stats = variables["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], both.mean(0), rtol=1e-3, atol=1e-3)
    assert_numbers(report.layers[0], expected(both, both.mean(0), both.var(0)))


def test_never_updated(rng: np.random.Generator):
    model, batches = Net(nn.BatchNorm), data(rng)
    variables = healthy(model, batches)
    reset = {"mean": jnp.zeros_like, "var": jnp.ones_like}
    variables = changed(variables, "batch_stats", "norm_2", **reset)
    finding = only(inspect(applied(model), variables, batches))
    assert (finding.layer, finding.kind) == ("norm_2", "never_updated")
    assert finding.severity == "error"
    assert len(finding.features) == 24
    assert 'mutable=["batch_stats"]' in finding.advice


@pytest.mark.parametrize(
    ("norm", "steps"),
    [(nn.BatchNorm, 5), (jbn.linen.BatchNorm, 60), (nn.BatchNorm, 120)],
)
def test_cold(rng: np.random.Generator, norm: Any, steps: int):
    """Momentum 0.99 and few steps; and how many there were is found again."""
    model, batches = Net(norm), data(rng)
    variables: Any = model.init(jax.random.key(1), batches[0])

    @jax.jit
    def train(variables, x):
        return variables | model.apply(variables, x, mutable=["batch_stats"])[1]

    for step in range(steps):
        variables = train(variables, batches[step % len(batches)])
    report = inspect(applied(model), variables, batches)
    assert ("norm_1", "cold") in found(report)
    finding = report.findings[0]
    assert report.layers[0].initial == pytest.approx(0.99**steps, rel=0.1)
    assert report.layers[0].updates == pytest.approx(steps, rel=0.1, abs=2)
    assert {kind for _, kind in found(report)} == {"cold"}
    for word in ("recalibrate", "momentum=0.9", "debias=True"):
        assert word in finding.advice
    new = recalibrate(applied(model), variables, batches)
    assert inspect(applied(model), new, batches).findings == ()


@pytest.mark.slow
def test_updates_that_layers_keep(rng: np.random.Generator):
    batches = data(rng)

    def after(steps: int, cls: Any = jbn.linen.BatchNorm, **options: Any):
        layer = cls(use_running_average=False, **options)
        variables: Any = layer.init(jax.random.key(0), batches[0])
        for x in batches[:steps]:
            _, new = layer.apply(variables, x, mutable=["batch_stats"])
            variables = variables | new
        return inspect(applied(layer), variables, batches).layers[0].updates

    assert after(7, debias=True) == 7
    assert after(9, momentum=None) == 9
    assert after(5, jbn.linen.BatchRenorm, r_max=lambda step: 3.0) == 5
    assert after(20, momentum=0.5) is None


def test_shifted_input(base: Any):
    model, batches, variables = base
    report = inspect(applied(model), variables, [1.5 * x + 1 for x in batches])
    assert found(report) >= {("norm_1", "shifted")}
    assert {kind for _, kind in found(report)} == {"shifted"}
    for word in ("recalibrate", "adapt", "DomainBatchNorm"):
        assert word in report.findings[0].advice


def test_one_feature_that_has_drifted_is_named(base: Any):
    model, batches, variables = base
    move = lambda mean: mean.at[7].add(2 * jnp.sqrt(variables_var[7]))
    variables_var = variables["batch_stats"]["norm_2"]["var"]
    variables = changed(variables, "batch_stats", "norm_2", mean=move)
    finding = only(inspect(applied(model), variables, batches))
    assert (finding.layer, finding.features) == ("norm_2", (7,))


def test_noise_is_no_drift(rng: np.random.Generator):
    """The same statistics, right but for 0.3 standard deviations, and few rows."""
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.99)
    x = rng.normal(size=(2, 16, 40))
    variables: Any = layer.init(jax.random.key(0), jnp.zeros((1, 40)))
    few = inspect(applied(layer), variables, separate(x))
    assert few.findings == ()
    assert few.layers[0].summary()["kl_mean"] > 0.02
    # Some features of many are far off by chance.
    one = jnp.asarray(rng.normal(size=(16, 300)), jnp.float32)
    wide = inspect(applied(layer), layer.init(jax.random.key(0), one), [one])
    assert wide.layers[0].kl.max() > 0.2
    assert wide.findings == ()
    # As many nats from many rows are drift.
    much = rng.normal(0.3, 1, size=(20, 100, 40))
    many = inspect(applied(layer), variables, separate(much))
    assert only(many).kind == "never_updated"


def test_noisy(rng: np.random.Generator):
    """Momentum 0: the statistics are those of the last batch."""
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.0)
    x = separate(rng.normal(3, 2, size=(80, 16, 40)))
    variables: Any = layer.init(jax.random.key(0), x[0])
    _, new = layer.apply(variables, x[0], mutable=["batch_stats"])
    finding = only(inspect(applied(layer), {**variables, **new}, x))
    assert finding.kind == "noisy"
    assert "momentum closer to 1" in finding.advice


@pytest.mark.slow
def test_statistics_of_one_replica(rng: np.random.Generator):
    """Of data that are sorted; the merged ones are right."""
    layer = jbn.linen.BatchNorm(use_running_average=False)
    parts = rng.normal(rng.normal(0, 1.5, (2, 1, 1, 30)), 1, (2, 12, 64, 30))
    variables: Any = layer.init(jax.random.key(0), jnp.zeros((1, 30)))
    own = [recalibrate(applied(layer), variables, separate(part)) for part in parts]
    mixed = rng.permutation(parts.reshape(-1, 30)).reshape(-1, 64, 30)
    batches = separate(mixed)
    finding = only(inspect(applied(layer), own[0], batches))
    assert finding.kind == "shifted"
    assert "jbn.tools.merge" in finding.advice
    merged = merge([v["batch_stats"] for v in own])
    together = {**variables, "batch_stats": merged}
    assert inspect(applied(layer), together, batches).findings == ()


@pytest.mark.parametrize("way", ["zero", "constant"])
def test_dead(base: Any, way: str):
    model, batches, variables = base
    kill = lambda kernel: kernel.at[:, 3].set(0)
    bias = lambda b: b.at[3].set(0 if way == "zero" else 2.5)
    variables = changed(variables, "params", "dense_2", kernel=kill, bias=bias)
    variables = recalibrate(applied(model), variables, batches)
    finding = only(inspect(applied(model), variables, batches))
    assert (finding.layer, finding.kind) == ("norm_2", "dead")
    assert (finding.features, finding.severity) == ((3,), "note")
    assert inspect(applied(model), variables, batches).healthy


def test_dead_feature_that_has_moved(base: Any):
    """Its output is off, and only that: the variance is of no matter."""
    model, batches, variables = base
    kill = lambda kernel: kernel.at[:, 3].set(0)
    variables = changed(variables, "params", "dense_2", kernel=kill)
    stays = changed(
        variables, "batch_stats", "norm_2", mean=lambda mean: mean.at[3].set(0)
    )
    assert found(inspect(applied(model), stays, batches)) == {("norm_2", "dead")}
    moves = changed(
        variables, "batch_stats", "norm_2", mean=lambda mean: mean.at[3].set(9)
    )
    report = inspect(applied(model), moves, batches)
    assert found(report) == {("norm_2", "dead"), ("norm_2", "shifted")}
    assert report.findings[0].features == (3,)


def test_tiny_variance(base: Any):
    model, batches, variables = base
    shrink = lambda kernel: kernel.at[:, 5].multiply(1e-3)
    variables = changed(variables, "params", "dense_1", kernel=shrink)
    variables = recalibrate(applied(model), variables, batches)
    finding = only(inspect(applied(model), variables, batches))
    assert (finding.layer, finding.kind) == ("norm_1", "tiny")
    assert finding.features == (5,)
    assert "epsilon=1e-05" in finding.message


@pytest.mark.parametrize(
    ("collection", "name", "value"),
    [
        ("batch_stats", "mean", np.nan),
        ("batch_stats", "var", np.inf),
        ("batch_stats", "var", -0.1),
        ("params", "scale", np.nan),
    ],
)
def test_nonfinite(base: Any, collection: str, name: str, value: float):
    model, batches, variables = base
    spoil = {name: lambda old: old.at[2].set(value)}
    variables = changed(variables, collection, "norm_2", **spoil)
    finding = only(inspect(applied(model), variables, batches))
    assert (finding.layer, finding.kind) == ("norm_2", "nonfinite")
    assert (finding.features, finding.severity) == ((2,), "error")


def test_input_that_is_not_finite(base: Any):
    model, batches, variables = base
    spoil = lambda kernel: kernel.at[0, 4].set(jnp.nan)
    variables = changed(variables, "params", "dense_1", kernel=spoil)
    report = inspect(applied(model), variables, batches)
    finding = next(f for f in report.findings if f.layer == "norm_1")
    assert (finding.kind, finding.features) == ("nonfinite", (4,))
    assert "input" in finding.message
    json.dumps(report.as_dict(), allow_nan=False)


def test_scale_zero(base: Any):
    model, batches, variables = base
    one = changed(variables, "params", "norm_2", scale=lambda s: s.at[9].set(0))
    finding = only(inspect(applied(model), one, batches))
    assert (finding.layer, finding.kind) == ("norm_2", "zero_scale")
    assert finding.features == (9,)
    # A whole layer is a residual branch at its start.
    every = changed(variables, "params", "norm_2", scale=jnp.zeros_like)
    assert inspect(applied(model), every, batches).findings == ()


def test_scale_tables_by_label(rng: np.random.Generator):
    layer = jbn.linen.ConditionalBatchNorm(
        num_classes=3, one_plus=True, use_running_average=False
    )
    x = [jnp.asarray(b) for b in data(rng)]
    variables: Any = layer.init(jax.random.key(0), x[0], labels=0)
    apply = applied(layer, labels=1)
    variables = recalibrate(apply, variables, x)
    assert inspect(apply, variables, x).findings == ()
    table = variables["params"]["scale"].at[:, 4].set(-1).at[0, 2].set(-1)
    params = variables["params"] | {"scale": table}
    finding = only(inspect(apply, variables | {"params": params}, x))
    assert (finding.kind, finding.features) == ("zero_scale", (4,))


@pytest.mark.parametrize("rows", [2, 8])
def test_few_rows(rng: np.random.Generator, rows: int):
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.98)
    x = separate(rng.normal(2, 3, (200, rows, 20)))
    variables: Any = layer.init(jax.random.key(0), x[0])
    report = inspect(applied(layer), trained(layer, variables, x), x)
    finding = only(report)
    assert finding.kind == "few_rows"
    assert finding.message.startswith(f"{rows} rows per batch")
    for word in ("tau=", "BatchRenorm", "axis_name=", "second_moment=True"):
        assert word in finding.advice


def trained(layer: Any, variables: Any, batches: Sequence[Any]) -> Any:
    @jax.jit
    def step(variables, x):
        return variables | layer.apply(variables, x, mutable=["batch_stats"])[1]

    for x in batches:
        variables = step(variables, x)
    return variables


def test_unbiased_variance_of_few_rows_is_no_drift(rng: np.random.Generator):
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.98, unbiased=True)
    x = separate(rng.normal(2, 3, (300, 2, 40)))
    variables = trained(layer, layer.init(jax.random.key(0), x[0]), x)
    assert only(inspect(applied(layer), variables, x)).kind == "few_rows"


def test_a_last_batch_of_one_row(base: Any):
    model, batches, variables = base
    report = inspect(applied(model), variables, [*batches, batches[0][:1]])
    assert found(report) == {("norm_1", "few_rows"), ("norm_2", "few_rows")}
    for finding in report.findings:
        assert finding.message.startswith("A batch has 1 row,")
        assert "min_weight=1" in finding.advice


def test_groups_of_few_rows(rng: np.random.Generator):
    layer = jbn.linen.GhostBatchNorm(num_groups=16, use_running_average=False)
    x = data(rng)
    variables = recalibrate(applied(layer), layer.init(jax.random.key(0), x[0]), x)
    report = inspect(applied(layer), variables, x)
    assert report.findings[0].kind == "few_rows"
    assert report.findings[0].message.startswith("4 rows per group")


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_domains(rng: np.random.Generator, api: str):
    """0 is right, 1 has drifted, 2 is only in the statistics, 3 nowhere."""
    x = rng.normal(1, 2, (20, 64, 5)).astype(np.float32)
    domain = rng.integers(0, 2, (20, 64))
    batches = list(zip(x, domain, strict=True))
    right = x[domain == 0].astype(np.float64)
    mean = np.stack([right.mean(0), np.full(5, 4.0), np.full(5, 2.0), np.zeros(5)])
    var = np.stack([right.var(0), np.full(5, 4.0), np.full(5, 2.0), np.ones(5)])
    stats = {"mean": jnp.asarray(mean, "float32"), "var": jnp.asarray(var, "float32")}
    if api == "linen":
        layer = jbn.linen.DomainBatchNorm(num_domains=4, use_running_average=False)
        model: Any = layer.init(jax.random.key(0), x[0], domain=0)
        model = model | {"batch_stats": stats}
        apply = applied(layer, "domain")
    else:
        model = jbn.nnx.DomainBatchNorm(5, 4, rngs=nnx.Rngs(0))
        for name, value in stats.items():
            getattr(model, name)[...] = value
        apply = lambda model, batch: model(batch[0], domain=batch[1])
    report = inspect(apply, model, batches)
    for k in (0, 1):
        rows = x[domain == k].astype(np.float64)
        want = expected(rows, stats["mean"][k], stats["var"][k])
        assert_numbers(report.layers[k], want)
        assert report.layers[k].rows == pytest.approx((domain == k).sum() / 20)
    kinds = {(f.domain, f.kind, f.severity) for f in report.findings}
    assert kinds == {
        (1, "shifted", "warning"),
        (2, "unseen", "note"),
        (3, "unseen", "warning"),
    }
    assert "[3]" in str(report)
    json.dumps(report.as_dict(), allow_nan=False)


def test_statistics_of_what_did_not_run(base: Any):
    model, batches, variables = base
    left = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    stats = variables["batch_stats"] | {"gone": left}
    report = inspect(applied(model), variables | {"batch_stats": stats}, batches)
    assert found(report) == {("gone", "unseen")}
    some = inspect(
        applied(model), variables | {"batch_stats": stats}, batches, where="norm_*"
    )
    assert found(some) == set()


def test_frozen_layers_are_not_compared(rng: np.random.Generator):
    layer = jbn.linen.FrozenBatchNorm()
    x = data(rng)
    variables: Any = layer.init(jax.random.key(0), x[0])
    report = inspect(applied(layer), variables, x)
    assert report.findings == ()
    assert report.layers[0].batches == 0
    assert "-" in str(report)


def test_what_is_pending_is_no_data(rng: np.random.Generator):
    layer = jbn.linen.BatchNorm(use_running_average=False, accumulate=True)
    x = data(rng)
    variables: Any = layer.init(jax.random.key(0), x[0])
    _, new = layer.apply(variables, x[0] + 100, mutable=["batch_stats"])
    (got,) = inspect(applied(layer), variables | new, x).layers
    rows = np.concatenate(x).astype(np.float64)
    assert_numbers(got, expected(rows, np.zeros(6), np.ones(6)))


def test_several_faults_are_sorted_by_how_bad_they_are(base: Any):
    model, batches, variables = base
    variables = changed(variables, "params", "norm_2", scale=lambda s: s.at[0].set(0))
    variables = changed(variables, "batch_stats", "norm_1", mean=lambda m: m + 5)
    spoil = {"var": lambda var: var.at[1].set(jnp.nan)}
    variables = changed(variables, "batch_stats", "norm_2", **spoil)
    report = inspect(applied(model), variables, batches)
    assert [f.severity for f in report.findings] == ["error", "warning", "note"]
    assert not report.healthy


@pytest.mark.parametrize("jitted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_twice_with_the_same_function(base: Any, jitted: bool):
    """JAX does not run again what it has traced."""
    model, batches, variables = base
    apply = jax.jit(applied(model)) if jitted else applied(model)
    apply(variables, batches[0])
    first, second = (inspect(apply, variables, batches) for _ in range(2))
    assert [layer.layer for layer in first.layers] == ["norm_1", "norm_2"]
    assert first.as_dict() == second.as_dict()


def test_numbers_are_those_of_population(rng: np.random.Generator):
    model, batches = Net(), data(rng, batches=5)
    variables: Any = model.init(jax.random.key(1), batches[0])
    moments = population(applied(model), variables, batches)
    for layer in inspect(applied(model), variables, iter(batches)).layers:
        want = np.asarray(moments[layer.layer].mean) / np.sqrt(1 + EPS)
        np.testing.assert_allclose(layer.drift, want, rtol=1e-5, atol=1e-6)


# ---- No false alarms -----------------------------------------------------------------


class Classifier(nn.Module):
    """On digits: dense or convolutional, with the norm before or behind the ReLU."""

    kind: str

    @nn.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        norm = lambda: jbn.linen.BatchNorm(momentum=0.9, use_running_average=not train)
        if self.kind == "conv":
            for width in (4, 8):
                x = nn.relu(norm()(nn.Conv(width, (3, 3), (2, 2))(x)))
        x = x.reshape(x.shape[0], -1)
        if self.kind != "conv":
            for width in (32, 32):
                x = nn.Dense(width)(x)
                x = nn.relu(norm()(x)) if self.kind == "before" else norm()(nn.relu(x))
        return nn.Dense(10)(x)


@pytest.mark.parametrize(
    "kind",
    [
        "before",
        pytest.param("behind", marks=pytest.mark.slow),
        pytest.param("conv", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_model_trained_well_gives_no_alarm(kind: str):
    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(images[:1792].reshape(28, 64, 8, 8, 1) / 16, jnp.float32)
    y = jnp.asarray(labels[:1792].reshape(28, 64), jnp.int32)
    model = Classifier(kind)

    def loss_of(params, stats, x, y):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        right = jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)
        return -right.mean(), new["batch_stats"]

    def step(carry, index):
        params, stats = carry
        grad = jax.grad(loss_of, has_aux=True)
        grads, stats = grad(params, stats, x[index], y[index])
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), stats), None

    @jax.jit
    def train(key, order):
        start: Any = model.init(key, x[0])
        carry = start["params"], start["batch_stats"]
        params, stats = jax.lax.scan(step, carry, order)[0]
        return {"params": params, "batch_stats": stats}

    for seed in range(1 if kind == "before" else 3):
        epochs = [np.random.default_rng([seed, k]).permutation(28) for k in range(12)]
        order = jnp.asarray(np.concatenate(epochs))
        variables = train(jax.random.key(seed), order)
        logits: Any = model.apply(variables, x.reshape(-1, 8, 8, 1), train=False)
        right = (logits.argmax(-1) == y.ravel()).mean()
        assert right > (0.9 if kind == "conv" else 0.95)
        report = inspect(applied(model), variables, list(x))
        # Units that a ReLU has silenced for good are noted, and are there.
        allowed = {"dead", "tiny"} if kind == "behind" else set()
        assert {kind for _, kind in found(report)} <= allowed, str(report)


# ---- What comes out ------------------------------------------------------------------


@pytest.fixture
def faulty(base: Any) -> Report:
    model, batches, variables = base
    variables = changed(variables, "params", "norm_1", scale=lambda s: s.at[0].set(0))
    variables = changed(variables, "batch_stats", "norm_2", mean=lambda m: m + 5)
    return inspect(applied(model), variables, batches)


def test_table(faulty: Report):
    text = str(faulty)
    assert "\x1b" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    row = next(line.split() for line in lines if line.startswith(" norm_2"))
    summary = faulty.layers[1].summary()
    assert row[1] == "24"
    assert row[2] == "64"
    assert float(row[5]) == pytest.approx(summary["drift_rms"], abs=1e-3)
    assert float(row[7]) == pytest.approx(summary["kl_mean"], abs=1e-3)
    assert row[-1] == "shifted"
    assert re.search(r"^warning +norm_2 +shifted$", text, re.MULTILINE)
    words = " ".join(text.split())
    for finding in faulty.findings:
        assert " ".join(finding.message.split()) in words
        assert " ".join(finding.advice.split()) in words
        assert finding.layer in words


def test_table_in_colors_on_a_terminal(faulty: Report, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in str(faulty)


def test_table_in_a_notebook(faulty: Report, monkeypatch: pytest.MonkeyPatch):
    text = str(faulty)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(faulty) == text


def test_long_names_leave_room_for_findings(faulty: Report):
    def rename(layer: Any) -> Any:
        return dataclasses.replace(layer, layer=f"stage2_block1/short_{layer.layer}")

    text = str(dataclasses.replace(faulty, layers=tuple(map(rename, faulty.layers))))
    assert re.search(r" findings$", text, re.MULTILINE)


def test_dict(faulty: Report):
    values = json.loads(json.dumps(faulty.as_dict(), allow_nan=False))
    assert [layer["layer"] for layer in values["layers"]] == ["norm_1", "norm_2"]
    assert {f["kind"] for f in values["findings"]} == {"shifted", "zero_scale"}
    assert values["num_batches"] == 20
    assert not values["healthy"]


def test_figure(faulty: Report, tmp_path: Path):
    faulty.figure(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    faulty.figure(str(tmp_path / "layers.svg"))
    drawn = (tmp_path / "layers.svg").read_text()
    assert "<svg" in drawn


def test_errors(rng: np.random.Generator, untyped: None):
    model, batches = Net(), data(rng)
    variables: Any = model.init(jax.random.key(0), batches[0])
    with pytest.raises(ValueError, match="at least one batch"):
        inspect(applied(model), variables, [])
    with pytest.raises(ValueError, match="`inspect` found no batch norm layer"):
        inspect(applied(model), variables, batches, where="nowhere")
    with pytest.raises(ValueError, match="must return what Linen's"):
        inspect(lambda v, x: applied(model)(v, x)[0], variables, batches)
    with pytest.raises(TypeError, match="must be Linen's variables"):
        inspect(applied(model), [variables], batches)  # pyright: ignore[reportArgumentType]
