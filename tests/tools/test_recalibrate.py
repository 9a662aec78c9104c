"""Recalibration against float64 NumPy on pooled data, layer by layer."""

# Flax types what `init` and `apply` return as unions that nothing can be read from.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn, nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from peers import load_peer

import jbn
import jbn.linen
import jbn.nnx
from jbn.models import MLP
from jbn.tools import population, recalibrate
from jbn.training.data import InMemory, load_dataset
from jbn.training.step import create_state, make_train_step
from jbn.training.tasks import Supervised


pytestmark = pytest.mark.sweep


# Float32 against float64; data of mean 100 and standard deviation 3.
close = functools.partial(np.testing.assert_allclose, rtol=3e-5, atol=1e-5)
EPSILON = 0.1


def batches_of(x, sizes):
    ends = list(itertools.accumulate(sizes))
    assert ends[-1] == len(x)
    return [jnp.asarray(part) for part in np.split(x, ends[:-1])]


@pytest.fixture
def x(rng):
    """20 rows, float32, whose features are far from mean 0 and variance 1."""
    scale, mean = np.array([3.0, 0.2, 1.0, 7.0]), np.array([100.0, -1.0, 0.0, 5.0])
    return np.float32(rng.standard_normal((20, 4)) * scale + mean)


class Deep(nn.Module):
    """Dense and norm, three times, for data whose statistics change on the way."""

    train: bool
    norm: Any = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        for width in (5, 6, 3):
            x = nn.Dense(width)(x)
            norm = self.norm(epsilon=EPSILON, momentum=0.9)
            x = jax.nn.tanh(norm(x, use_running_average=not self.train))
        return x


def apply(model, **call):
    return lambda variables, x: model.apply(
        variables, x, mutable=["batch_stats"], **call
    )


@functools.cache
def deep_shapes():
    init = Deep(False).init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((2, 4)))


def deep_variables(rng):
    variables = deep_shapes()
    value = lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype)
    return jax.tree.map(value, variables)


def norm(h, mean, var, p):
    return (h - mean) / np.sqrt(var + EPSILON) * p["scale"] + p["bias"]


def wide(tree):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), tree)


def layer_by_layer(params, x):
    """The population statistics of a `Deep` in evaluation, by their definition."""
    params, h, found = wide(params), np.asarray(x, np.float64), {}
    for i in range(3):
        dense = params[f"Dense_{i}"]
        h = h @ dense["kernel"] + dense["bias"]
        _, mean, var = oracle.moments(h)
        found[f"BatchNorm_{i}"] = {"mean": mean, "var": var}
        h = np.tanh(norm(h, mean, var, params[f"BatchNorm_{i}"]))
    return found


def fvcore(params, parts):
    """fvcore's precise batch norm (`update_bn_stats`), on a `Deep` in training.

    Its estimator, from `_PopulationVarianceEstimator` and the mean's: sums over batches
    weighted by their sizes, of means, and of `var + mean**2`, each batch normalized by
    itself. (There variances are unbiased in each batch; Flax's convention is biased.)
    """
    params, found = wide(params), {}
    hs = [np.asarray(part, np.float64) for part in parts]
    sizes = np.array([len(h) for h in hs], np.float64)[:, None]
    for i in range(3):
        dense = params[f"Dense_{i}"]
        hs = [h @ dense["kernel"] + dense["bias"] for h in hs]
        means, variances = np.stack([h.mean(0) for h in hs]), [h.var(0) for h in hs]
        mean = (sizes * means).sum(0) / sizes.sum()
        square = (sizes * (np.stack(variances) + means**2)).sum(0) / sizes.sum()
        found[f"BatchNorm_{i}"] = {"mean": mean, "var": square - mean**2}
        p = params[f"BatchNorm_{i}"]
        hs = [np.tanh(norm(h, h.mean(0), h.var(0), p)) for h in hs]
    return found


def all_close(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(functools.partial(close, **tolerance), got, want)


# --- one layer: the statistics of the pooled data, however it is cut ---------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "sizes", [[20], [8, 8, 4], [1] * 20, [19, 1], [1, 2, 17]], ids=str
)
def test_one_layer_has_the_statistics_of_all_rows(sizes, train, x, rng):
    """In any order, as each case has its own."""
    x = rng.permutation(x)
    layer = jbn.linen.BatchNorm(use_running_average=not train)
    variables = layer.init(jax.random.key(0), x)
    new = recalibrate(apply(layer), variables, batches_of(x, sizes))
    _, mean, var = oracle.moments(x)
    close(new["batch_stats"]["mean"], mean)
    close(new["batch_stats"]["var"], var)


@pytest.mark.peers("torch")
def test_pytorch_update_bn_differs_when_the_last_batch_is_partial(x):
    """`torch.optim.swa_utils.update_bn` averages batches alike, and variances."""
    torch = load_peer("torch")
    parts = batches_of(x, [8, 8, 4])
    theirs = torch.nn.BatchNorm1d(4)
    loader = [torch.tensor(np.array(part)) for part in parts]
    torch.optim.swa_utils.update_bn(loader, theirs)
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    ours = recalibrate(apply(layer), variables, parts)["batch_stats"]
    mean = np.mean([np.asarray(p, np.float64).mean(0) for p in parts], 0)
    var = np.mean([np.asarray(p, np.float64).var(0, ddof=1) for p in parts], 0)
    close(theirs.running_mean.numpy(), mean, rtol=1e-4)
    close(theirs.running_var.numpy(), var, rtol=1e-3)
    close(ours["mean"], np.asarray(x, np.float64).mean(0))
    assert (abs(theirs.running_mean.numpy() - ours["mean"]) > 1e-3).all()
    assert (abs(theirs.running_var.numpy() / ours["var"] - 1) > 1e-2).any()


@pytest.mark.parametrize("counting", ["mask", "weights"])
def test_masks_and_weights_are_those_of_the_calls(counting, x, rng):
    w = rng.random((20, 4)) > 0.4 if counting == "mask" else rng.random((20, 4))
    w = np.asarray(w, bool if counting == "mask" else np.float32)
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    poisoned = np.where(w > 0, x, np.float32(np.nan))

    def run(variables, batch):
        rows, w = batch
        return layer.apply(variables, rows, mutable=["batch_stats"], **{counting: w})

    sizes = [7, 7, 6]
    parts = zip(batches_of(poisoned, sizes), batches_of(w, sizes), strict=True)
    moments = population(run, variables, list(parts))[""]
    weight, mean, var = oracle.moments(x, w)
    close(moments.weight, weight)
    close(moments.mean, mean)
    close(moments.var, var)


def test_images_count_their_pixels(rng):
    x = np.float32(rng.standard_normal((6, 4, 4, 3)) + 2)
    layer = jbn.linen.BatchNorm(use_running_average=False, axis=1)
    variables = layer.init(jax.random.key(0), x)
    moments = population(apply(layer), variables, batches_of(x, [4, 2]))[""]
    weight, mean, var = oracle.moments(x, axis=1)
    assert (weight == 6 * 12).all()
    jax.tree.map(close, moments, jbn.Moments(weight, mean, var))


# --- several layers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "passes"),
    [([20], 3), ([1] * 20, None), ([3, 17], 5), ([8, 8, 4], None)],
    ids=str,
)
def test_inference_mode_is_exact_in_every_layer(sizes, passes, x, rng):
    variables = deep_variables(rng)
    model = apply(Deep(train=False))
    new = recalibrate(model, variables, batches_of(x, sizes), passes=passes)
    all_close(new["batch_stats"], layer_by_layer(variables["params"], x), rtol=1e-4)


def test_each_pass_makes_one_more_layer_exact(x, rng):
    variables = deep_variables(rng)
    want = layer_by_layer(variables["params"], x)
    for passes in (1, 2):
        new = recalibrate(
            apply(Deep(train=False)), variables, [jnp.asarray(x)], passes=passes
        )
        for i in range(3):
            got, exact = (s[f"BatchNorm_{i}"] for s in (new["batch_stats"], want))
            right = np.allclose(got["var"], exact["var"], rtol=1e-4)
            assert right == (i < passes)


@pytest.mark.parametrize("sizes", [[20], [5] * 4, [3, 17]], ids=str)
def test_training_mode_is_precise_bn_of_fvcore(sizes, x, rng):
    variables = deep_variables(rng)
    parts = batches_of(x, sizes)
    new = recalibrate(apply(Deep(train=True)), variables, parts)
    all_close(new["batch_stats"], fvcore(variables["params"], parts), rtol=1e-4)


def test_training_mode_depends_on_batches_and_not_on_running_statistics(x, rng):
    variables = deep_variables(rng)
    other = jax.tree.map(lambda v: v + 1, variables["batch_stats"])
    other = {**variables, "batch_stats": other}
    run = apply(Deep(train=True))
    got, same, cut = (
        recalibrate(run, v, batches_of(x, sizes))["batch_stats"]["BatchNorm_2"]["var"]
        for v, sizes in (
            (variables, [8, 8, 4]),
            (other, [8, 8, 4]),
            (variables, [4] * 5),
        )
    )
    close(got, same)
    assert (abs(got / cut - 1) > 1e-3).all()


@pytest.mark.usefixtures("standard_promotion")
def test_layers_of_flax_in_a_model_of_flax(x, rng):
    variables = deep_variables(rng)
    model = apply(Deep(False, nn.BatchNorm))
    new = recalibrate(model, variables, batches_of(x, [8, 8, 4]), passes=None)
    all_close(new["batch_stats"], layer_by_layer(variables["params"], x), rtol=1e-4)


class Stack(nn.Module):
    """Three layers that are scanned over, one behind the other."""

    @nn.compact
    def __call__(self, x):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                norm = jbn.linen.BatchNorm(use_running_average=True, epsilon=EPSILON)
                return jax.nn.tanh(norm(nn.Dense(4)(x))), None

        scanned = nn.scan(
            Step,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scanned(name="stack")(x, None)[0]


@pytest.mark.parametrize("passes", [3, None])
def test_layers_that_are_scanned(passes, x):
    model = Stack()
    variables = model.init(jax.random.key(0), x)
    parts = batches_of(x, [8, 8, 4])
    new = recalibrate(apply(model), variables, parts, passes=passes)
    h = np.asarray(x, np.float64)
    got = new["batch_stats"]["stack"]["BatchNorm_0"]
    params = wide(variables["params"]["stack"])
    for i in range(3):
        layer = jax.tree.map(lambda v, i=i: v[i], params)
        h = h @ layer["Dense_0"]["kernel"] + layer["Dense_0"]["bias"]
        _, mean, var = oracle.moments(h)
        close(got["mean"][i], mean, rtol=1e-4, atol=1e-4)
        close(got["var"][i], var, rtol=1e-4)
        h = np.tanh(norm(h, mean, var, layer["BatchNorm_0"]))


def test_a_layer_used_twice_has_the_statistics_of_both_inputs(x):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = jbn.linen.BatchNorm(use_running_average=True)
            norm(x)
            return norm(3 * x + 1)

    variables = Twice().init(jax.random.key(0), x)
    found = population(apply(Twice()), variables, batches_of(x, [8, 8, 4]))
    weight, mean, var = oracle.moments(np.concatenate([x, 3 * x + 1]))
    jax.tree.map(close, found["BatchNorm_0"], jbn.Moments(weight, mean, var))


def test_where_recalibrates_some_layers(x, rng):
    variables = deep_variables(rng)
    run = apply(Deep(train=False))
    new = recalibrate(
        run, variables, [jnp.asarray(x)], where=["BatchNorm_0", "nothing"]
    )
    got, old = new["batch_stats"], variables["batch_stats"]
    all_close(got["BatchNorm_0"], layer_by_layer(variables["params"], x)["BatchNorm_0"])
    for name in ("BatchNorm_1", "BatchNorm_2"):
        jax.tree.map(np.testing.assert_array_equal, got[name], old[name])
    assert set(population(run, variables, [x], where=lambda p: p[-1] != "0")) == {
        "BatchNorm_1",
        "BatchNorm_2",
    }


# --- devices -----------------------------------------------------------------------


def mesh(n):
    return jax.make_mesh((n,), ("d",), (AxisType.Auto,), devices=jax.devices()[:n])


@pytest.mark.devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_under_shard_map(check_vma, x, rng):
    variables = deep_variables(rng)
    model = Deep(False, functools.partial(jbn.linen.BatchNorm, axis_name="d"))
    sharded = jax.shard_map(
        apply(model),
        mesh=mesh(4),
        in_specs=(P(), P("d")),
        out_specs=(P("d"), P()),
        check_vma=check_vma,
    )
    parts = batches_of(x, [12, 8])
    new = recalibrate(sharded, variables, parts, passes=None)
    all_close(new["batch_stats"], layer_by_layer(variables["params"], x), rtol=1e-4)


@pytest.mark.devices
def test_under_shard_map_with_uneven_and_empty_devices(x):
    layer = jbn.linen.BatchNorm(use_running_average=False, axis_name="d")
    variables = layer.init(jax.random.key(0), x)
    mask = np.array([True] * 5 + [False] * 5 + [True] * 3 + [False] * 7)[:, None]

    def run(variables, batch):
        x, mask = batch
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    sharded = jax.shard_map(
        run, mesh=mesh(4), in_specs=(P(), P("d")), out_specs=(P("d"), P())
    )
    data = [(jnp.asarray(x), jnp.asarray(mask))] * 2
    weight, mean, var = oracle.moments(x, mask)
    got = population(sharded, variables, data)[""]
    jax.tree.map(close, got, jbn.Moments(2 * weight, mean, var))


@pytest.mark.devices
def test_under_pmap(x):
    layer = jbn.linen.BatchNorm(use_running_average=False, axis_name="d")
    variables = layer.init(jax.random.key(0), x)
    mapped = jax.pmap(
        apply(layer),
        "d",
        in_axes=(None, 0),
        out_axes=(0, None),
        devices=jax.devices()[:4],
    )
    parts = batches_of(x, [12, 8])
    run = lambda variables, x: mapped(variables, x.reshape(4, -1, 4))
    weight, mean, var = oracle.moments(x)
    got = population(run, variables, parts)[""]
    jax.tree.map(close, got, jbn.Moments(weight, mean, var))


@pytest.mark.devices
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_many_batches_on_virtual_devices(kind, rng):
    """With too many under way XLA hangs, and ends the process after a minute."""
    data = rng.normal(size=(64, 4)).astype(np.float32)
    # All of them: a device more than there are others in the pool of threads.
    parts = [jax.device_put(data, NamedSharding(mesh(8), P("d")))] * 200
    if kind == "linen":
        layer = jbn.linen.BatchNorm(use_running_average=False)
        variables = layer.init(jax.random.key(0), data)
        new = recalibrate(apply(layer), variables, parts)["batch_stats"]["mean"]
    else:
        model = jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        new = recalibrate(lambda model, x: model(x), model, parts).mean[...]
    close(new, data.mean(0))


@pytest.mark.devices
def test_with_batches_that_are_sharded(x, rng):
    variables = deep_variables(rng)
    sharding = NamedSharding(mesh(4), P("d"))
    parts = [jax.device_put(p, sharding) for p in batches_of(x, [12, 8])]
    new = recalibrate(apply(Deep(train=False)), variables, parts, passes=None)
    all_close(new["batch_stats"], layer_by_layer(variables["params"], x), rtol=1e-4)


# --- what else layers keep ---------------------------------------------------------


def test_domains_have_their_own_and_an_absent_one_keeps_its(x):
    layer = jbn.linen.DomainBatchNorm(3, use_running_average=False)
    variables = layer.init(jax.random.key(0), x, domain=0)
    stats = jax.tree.map(lambda v: v + 7, variables["batch_stats"])
    variables = {**variables, "batch_stats": stats}
    domain = np.arange(20) % 3
    run = lambda v, b: layer.apply(v, b[0], domain=b[1], mutable=["batch_stats"])
    sizes = [8, 8, 4]
    parts = list(zip(batches_of(x, sizes), batches_of(domain, sizes), strict=True))
    new = recalibrate(run, variables, parts)["batch_stats"]
    some = [(a, np.where(b == 1, 0, b)) for a, b in parts]
    absent = recalibrate(run, variables, some)["batch_stats"]
    for d in range(3):
        _, mean, var = oracle.moments(x[domain == d])
        close(new["mean"][d], mean)
        close(new["var"][d], var)
    np.testing.assert_array_equal(absent["mean"][1], stats["mean"][1])
    np.testing.assert_array_equal(absent["var"][1], stats["var"][1])
    close(absent["mean"][0], oracle.moments(x[domain != 2])[1])


@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}], ids=str)
def test_layers_that_track_their_weight(options, x):
    """The weight is that of the rows; training then goes on from there."""
    layer = jbn.linen.BatchNorm(use_running_average=False, **options)
    variables = layer.init(jax.random.key(0), x)
    new = recalibrate(apply(layer), variables, batches_of(x, [8, 8, 4]))
    weight, mean, var = oracle.moments(x)
    assert set(new["batch_stats"]) == {"mean", "var", "weight"}
    close(new["batch_stats"]["weight"], weight)
    _, after = layer.apply(new, x + 1, mutable=["batch_stats"])
    share = 0.5 if options == {"momentum": None} else 0.01
    close(after["batch_stats"]["mean"], mean + share)
    scatter = 0.25 if options == {"momentum": None} else 0.0
    close(after["batch_stats"]["var"], var + scatter, rtol=1e-4)


@pytest.mark.parametrize(
    ("layer", "call"),
    [
        (jbn.linen.FrozenBatchNorm(debias=True), {}),
        (jbn.linen.BatchNorm(debias=True), {"mask": np.zeros((20, 1), bool)}),
        (
            jbn.linen.BatchNorm(momentum=None),
            {"weights": np.zeros((20, 1), np.float32)},
        ),
    ],
    ids=["frozen", "mask", "weights"],
)
def test_what_has_seen_nothing_keeps_all_that_it_has(layer, call, x):
    run = apply(layer, use_running_average=False, **call)
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    stats = {
        "mean": jnp.full(4, 2.0),
        "var": jnp.full(4, 3.0),
        "weight": jnp.full(4, 0.9),
    }
    variables = {**variables, "batch_stats": stats}
    new = recalibrate(run, variables, [x, x])
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], stats)


def test_a_frozen_layer_among_others_is_kept(x):
    model = nn.Sequential(
        [
            jbn.linen.FrozenBatchNorm(use_running_average=False),
            jbn.linen.BatchNorm(use_running_average=False),
        ]
    )
    variables = model.init(jax.random.key(0), x)
    variables["batch_stats"]["layers_0"]["mean"] += 1
    new = recalibrate(apply(model), variables, [x])["batch_stats"]
    jax.tree.map(
        np.testing.assert_array_equal,
        new["layers_0"],
        variables["batch_stats"]["layers_0"],
    )
    h = (np.asarray(x, np.float64) - 1) / np.sqrt(1 + 1e-5)
    close(new["layers_1"]["mean"], h.mean(0))
    close(new["layers_1"]["var"], h.var(0))


def test_moments_that_are_pending_do_not_count_and_stay(x):
    layer = jbn.linen.BatchNorm(use_running_average=False, accumulate=True)
    variables = layer.init(jax.random.key(0), x)
    _, updated = layer.apply(variables, x + 1000, mutable=["batch_stats"])
    variables = {**variables, **updated}
    new = recalibrate(apply(layer), variables, [x])["batch_stats"]
    close(new["mean"], oracle.moments(x)[1])
    close(new["var"], oracle.moments(x)[2])
    pending = updated["batch_stats"]["pending"]
    jax.tree.map(np.testing.assert_array_equal, new["pending"], pending)


def test_renorm_keeps_its_step(x):
    growing = lambda step: 1.0 + step.astype(jnp.float32)
    layer = jbn.linen.BatchRenorm(use_running_average=False, r_max=growing)
    variables = layer.init(jax.random.key(0), x)
    _, updated = layer.apply(variables, x, mutable=["batch_stats"])
    new = recalibrate(apply(layer), {**variables, **updated}, [x, x])["batch_stats"]
    assert new["step"] == 1
    close(new["mean"], oracle.moments(x)[1])


# --- NNX ---------------------------------------------------------------------------


class NnxDeep(nnx.Module):
    def __init__(self, rngs, norm=jbn.nnx.BatchNorm):
        widths = (4, 5, 6, 3)
        self.dense = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.norms = nnx.List([norm(w, epsilon=EPSILON, rngs=rngs) for w in widths[1:]])

    def __call__(self, x):
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = jax.nn.tanh(norm(dense(x)))
        return x

    def as_linen(self):
        params = {f"Dense_{i}": self.dense[i] for i in range(3)}
        params |= {f"BatchNorm_{i}": self.norms[i] for i in range(3)}
        return {
            name: {
                k: getattr(layer, k)[...]
                for k in ("kernel", "bias", "scale")
                if getattr(layer, k, None) is not None
            }
            for name, layer in params.items()
        }


def nnx_stats(model):
    return {
        f"BatchNorm_{i}": {"mean": n.mean[...], "var": n.var[...]}
        for i, n in enumerate(model.norms)
    }


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("train", "kind"), [(True, jbn.nnx.BatchNorm), (False, nnx.BatchNorm)]
)
def test_nnx_models(train, kind, x):
    model = NnxDeep(nnx.Rngs(0), kind)
    model.train() if train else model.eval()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    parts = batches_of(x, [15, 5])
    run = lambda model, x: model(x)
    new: Any = recalibrate(run, model, parts, passes=1 if train else None)
    params = model.as_linen()
    want = fvcore(params, parts) if train else layer_by_layer(params, x)
    all_close(nnx_stats(new), want, rtol=1e-4)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before
    )
    assert [type(n) for n in new.norms] == [kind] * 3
    assert new.norms[0].use_running_average is not train
    jax.tree.map(np.testing.assert_array_equal, new.as_linen(), params)


def test_nnx_state_beside_the_statistics(x):
    layer = jbn.nnx.BatchNorm(4, debias=True, rngs=nnx.Rngs(0))
    new = recalibrate(lambda m, x: m(x), layer, batches_of(x, [8, 8, 4]))
    close(new.weight[...], np.full(4, 20.0))
    assert (layer.weight[...] == 0).all()
    frozen = jbn.nnx.FrozenBatchNorm(4, debias=True, rngs=nnx.Rngs(0))
    frozen.weight[...] = jnp.full(4, 0.9)
    new = recalibrate(lambda m, x: m(x), frozen, [x])
    np.testing.assert_array_equal(new.weight[...], np.full(4, 0.9, np.float32))
    np.testing.assert_array_equal(new.mean[...], np.zeros(4))


def test_nnx_pending_moments_do_not_count(x):
    layer = jbn.nnx.BatchNorm(4, accumulate=True, rngs=nnx.Rngs(0))
    layer(x + 1000)
    new = recalibrate(lambda m, x: m(x), layer, [x])
    close(new.mean[...], oracle.moments(x)[1])
    np.testing.assert_array_equal(new.pending["weight"][...], np.full(4, 20.0))


def test_nnx_layers_that_are_scanned(x):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm = jbn.nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.norm(x) + 1

    model = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: Layer(rngs)))(nnx.Rngs(0))
    scan = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    run = lambda model, x: scan(x, model)
    new: Any = recalibrate(run, model, batches_of(x, [8, 8, 4]), passes=2)
    h = np.asarray(x, np.float64)
    for i in range(2):
        _, mean, var = oracle.moments(h)
        close(new.norm.mean[i], mean, atol=1e-4)
        close(new.norm.var[i], var, rtol=1e-4)
        h = (h - mean) / np.sqrt(var + 1e-5) + 1


# --- purity, cost, use -------------------------------------------------------------


def test_nothing_else_changes_and_inputs_are_not_touched(x, rng):
    variables = deep_variables(rng)
    variables["other"] = {"counter": jnp.asarray(3)}
    before = jax.tree.map(np.array, variables)
    identity = jax.tree.map(id, variables)
    run = lambda v, x: Deep(train=True).apply(v, x, mutable=["batch_stats"])
    new = recalibrate(run, variables, batches_of(x, [8, 8, 4]))
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.map(id, variables) == identity
    assert set(new) == set(variables)
    for name in ("params", "other"):
        jax.tree.map(np.testing.assert_array_equal, new[name], variables[name])
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    shapes = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
    assert shapes(new) == shapes(variables)


def classification(model, optimizer, image_shape):
    return Supervised(
        kind="classification",
        model=model,
        image_shape=image_shape,
        num_classes=10,
        optimizer=optimizer,
    )


@pytest.mark.usefixtures("standard_promotion")
def test_the_training_state_stays_bit_for_bit(rng):
    """Recalibrating between two steps of training does not disturb them."""
    images = jnp.asarray(rng.integers(0, 255, (16, 4, 4, 1)), jnp.uint8)
    batch = {
        "image": images,
        "label": jnp.arange(16) % 10,
        "index": jnp.arange(16),
        "weight": jnp.ones(16),
    }
    model = MLP(features=(4,))
    task = classification(model, optax.sgd(1e-2), (4, 4, 1))
    state, _ = jax.jit(make_train_step(task))(create_state(task, 0), batch)
    before = jax.tree.map(np.array, state)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    recalibrate(apply(model, train=True), variables, [images])
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_traces_once_for_each_shape(x, rng):
    """Whatever the number of batches and passes; one more is for their first."""
    variables, traces = deep_variables(rng), []

    def run(variables, x):
        traces.append(x.shape)
        return Deep(train=False).apply(variables, x, mutable=["batch_stats"])

    recalibrate(run, variables, batches_of(x, [8, 8, 4]), passes=3)
    assert len(traces) <= 3


def test_nnx_traces_once_for_each_shape(x):
    traces = []

    def run(model, x):
        traces.append(x.shape)
        return model(x)

    model = NnxDeep(nnx.Rngs(0))
    model.eval()
    recalibrate(run, model, batches_of(x, [8, 8, 4]), passes=3)
    assert len(traces) <= 3


def test_batches_may_be_any_iterable_of_any_pytree(x):
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    run = lambda v, b: layer.apply(v, b["x"], mutable=["batch_stats"])
    parts = ({"x": part, "label": None} for part in batches_of(x, [8, 8, 4]))
    new = recalibrate(run, variables, parts)
    close(new["batch_stats"]["mean"], oracle.moments(x)[1])


class Endless:
    """Makes a new iterator each time, as a data loader does."""

    def __init__(self, parts):
        self.parts, self.times = parts, 0

    def __iter__(self):
        self.times += 1
        return iter(self.parts)


def test_a_loader_is_iterated_once_for_each_pass(x, rng):
    variables, loader = deep_variables(rng), Endless(batches_of(x, [8, 8, 4]))
    new = recalibrate(apply(Deep(train=False)), variables, loader, passes=3)
    assert loader.times == 3
    all_close(new["batch_stats"], layer_by_layer(variables["params"], x), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_it_closes_the_gap_after_few_steps_with_a_slow_momentum():
    """Momentum .99, 23 steps: running statistics still are four fifths initial."""
    data = load_dataset("digits")
    assert isinstance(data.train, InMemory)
    assert isinstance(data.test, InMemory)
    model = MLP(norm=functools.partial(jbn.linen.BatchNorm, momentum=0.99))
    task = classification(model, optax.adam(1e-2), data.image_shape)
    state = create_state(task, 0)
    step = jax.jit(make_train_step(task))
    order = np.random.default_rng(0).permutation(len(data.train))
    parts = [order[i : i + 64] for i in range(0, len(order), 64)]
    assert len(parts) == 23
    for rows in parts:
        batch = {
            "image": jnp.asarray(data.train.image[rows]),
            "label": jnp.asarray(data.train.label[rows]),
            "index": jnp.asarray(rows),
            "weight": jnp.ones(len(rows)),
        }
        state, _ = step(state, batch)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = [data.train.image[rows] for rows in parts]

    def accuracy(variables, **call):
        logits = model.apply(variables, data.test.image, **call)
        logits = logits[0] if isinstance(logits, tuple) else logits
        return float((logits.argmax(-1) == data.test.label).mean())

    by_batch = accuracy(variables, train=True, mutable=["batch_stats"])
    before = accuracy(variables, train=False)
    new = recalibrate(apply(model, train=True), variables, images)
    after = accuracy(new, train=False)
    exact = recalibrate(apply(model, train=False), variables, images, passes=None)
    print(f"{before=} {after=} {by_batch=} {accuracy(exact, train=False)=}")
    # Measured: see docs/tools.md.
    assert by_batch - before > 0.03
    assert abs(after - by_batch) < 0.02
    assert abs(accuracy(exact, train=False) - by_batch) < 0.02


# --- refusals ----------------------------------------------------------------------


def test_no_batches(x):
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(apply(layer), variables, [])
    model = jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(lambda m, x: m(x), model, iter(()))


def test_several_passes_over_an_iterator(x, rng):
    variables = deep_variables(rng)
    for passes in (2, None):
        with pytest.raises(ValueError, match="Pass a list, or an object that makes"):
            recalibrate(
                apply(Deep(train=False)), variables, iter([x, x]), passes=passes
            )


def test_an_iterator_is_refused_where_passes_are_counted(x):
    """It would be empty after the first."""
    layer = jbn.linen.BatchNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), x)
    parts = iter(batches_of(x, [8, 8, 4]))
    with pytest.raises(ValueError, match="Pass a list, or an object that makes"):
        recalibrate(apply(layer), variables, parts, passes=None)


@pytest.mark.usefixtures("untyped")
def test_variables_that_are_neither(x):
    for variables in (None, [], jbn.linen.BatchNorm()):
        with pytest.raises(TypeError, match="Linen's variables, a dict with `params`"):
            recalibrate(lambda v, x: x, variables, [x])  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_apply_that_returns_no_updates(x):
    layer = jbn.linen.BatchNorm(use_running_average=True)
    variables = layer.init(jax.random.key(0), x)
    runs = [
        lambda v, x: layer.apply(v, x, mutable=["batch_stats"])[0],
        lambda v, x: (layer.apply(v, x, mutable=["batch_stats"])[0], {}),
        lambda v, x: layer.apply(v, x, mutable=["batch_stats"])[1],
    ]
    for run in runs:
        with pytest.raises(
            ValueError, match=r"model.apply\(variables, ...,\n? ?mutable"
        ):
            recalibrate(run, variables, [x])


def test_no_layer_that_is_meant(x, rng):
    variables = deep_variables(rng)
    with pytest.raises(ValueError, match="where='encoder"):
        recalibrate(apply(Deep(train=True)), variables, [x], where="encoder/*")
    model = NnxDeep(nnx.Rngs(0))
    with pytest.raises(ValueError, match="`recalibrate` found no batch norm layer"):
        recalibrate(lambda m, x: m(x), model, [x], where="encoder/*")
