"""Merged statistics against those of the rows themselves, in float64 NumPy."""

# Flax types what `init` and `apply` return as unions that nothing can be read from.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st

import jbn
import jbn.linen
import jbn.nnx
from jbn.tools import average, fed_bn, merge, population


pytestmark = pytest.mark.sweep


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def all_close(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(functools.partial(close, **tolerance), got, want)


def stats_of(x, *more, **extra):
    """The collection of two layers that have seen just `x`, and `-2 x`."""
    nodes = {}
    for name, rows in (("norm", x), ("other", -2 * np.asarray(x))):
        _, mean, var = oracle.moments(rows)
        nodes[name] = {"mean": jnp.float32(mean), "var": jnp.float32(var)}
    return {"encoder": {"block": nodes["norm"]}, "head": nodes["other"]}


@pytest.fixture
def parts(rng):
    """Rows of four replicas, of uneven number and far apart."""
    sizes, means = (7, 2, 1, 10), (0.0, 5.0, -20.0, 3.0)
    return [rng.standard_normal((n, 3)) + m for n, m in zip(sizes, means, strict=True)]


# --- the statistics of all rows ----------------------------------------------------


def test_four_replicas_have_the_scatter_of_their_means():
    """PEERS' example, and the docstring's: 2.25, where the naive average has 1."""
    parts = [{"n": {"mean": jnp.array([m]), "var": jnp.array([1.0])}} for m in range(4)]
    parts = jax.tree.map(jnp.float32, parts)
    merged, naive = merge(parts), average(parts)
    assert float(merged["n"]["mean"][0]) == float(naive["n"]["mean"][0]) == 1.5
    assert float(naive["n"]["var"][0]) == 1.0
    assert float(merged["n"]["var"][0]) == 2.25


def test_weights_are_rows(parts):
    merged = merge([stats_of(p) for p in parts], weights=[len(p) for p in parts])
    all_close(merged, stats_of(np.concatenate(parts)))


def test_without_weights_parts_count_alike(parts):
    merged = merge([stats_of(p) for p in parts])
    alike = np.concatenate([np.repeat(p, 70 // len(p), 0) for p in parts])
    assert len(alike) == 4 * 70
    all_close(merged, stats_of(alike))


@pytest.mark.parametrize(
    "kind",
    [np.asarray, jnp.asarray, list, tuple],
    ids=["numpy", "jax", "list", "tuple"],
)
def test_weights_of_any_kind(kind, parts):
    weights = kind([7.0, 2.0, 1.0, 10.0])
    merged = merge([stats_of(p) for p in parts], weights=weights)
    all_close(merged, stats_of(np.concatenate(parts)))


def test_only_the_ratio_of_weights_matters(parts):
    stats = [stats_of(p) for p in parts]
    all_close(merge(stats, weights=[3] * 4), merge(stats))
    all_close(
        merge(stats, weights=[1e-6, 2e-6, 0, 4e-6]),
        merge(stats, weights=[1e6, 2e6, 0, 4e6]),
    )


def test_a_part_of_weight_zero_does_not_count_whatever_it_holds(parts):
    stats = [stats_of(p) for p in parts]
    bad = jax.tree.map(lambda v: v * jnp.nan, stats[0])
    got = merge([stats[1], bad, stats[2]], weights=[2, 0, 1])
    all_close(got, stats_of(np.concatenate(parts[1:3])))


def test_where_none_counts_the_first_is_kept(parts):
    stats = [stats_of(p) for p in parts]
    equal(merge(stats, weights=[0] * 4), stats[0])


def test_one_part_is_itself(parts):
    for weights in (None, [5]):
        equal(merge([stats_of(parts[0])], weights=weights), stats_of(parts[0]))
    alike = merge([stats_of(parts[0])] * 5)
    all_close(alike, stats_of(parts[0]), rtol=1e-6)


def test_parts_are_not_touched(parts):
    stats = [stats_of(p) for p in parts]
    before = jax.tree.map(np.array, stats)
    merge(stats, weights=[0, 1, 2, 3])
    jax.tree.map(np.testing.assert_array_equal, stats, before)


def test_stacked_along_a_first_axis(parts):
    stats = [stats_of(p) for p in parts]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *stats)
    weights = [len(p) for p in parts]
    all_close(merge(stacked, weights=weights), stats_of(np.concatenate(parts)))
    equal(merge(stacked), merge(stats))


def test_weights_of_each_domain(rng):
    """Statistics (domains, features): each client has other domains."""
    x, y = rng.standard_normal((12, 2)), rng.standard_normal((8, 2)) + 4
    layer = jbn.linen.DomainBatchNorm(3, use_running_average=False, momentum=0.0)
    dx, dy = np.arange(12) % 2, np.arange(8) % 2 + 1
    stats = []
    for rows, d in ((x, dx), (y, dy)):
        variables = layer.init(jax.random.key(0), jnp.float32(rows), domain=d)
        _, new = layer.apply(
            variables, jnp.float32(rows), domain=d, mutable=["batch_stats"]
        )
        stats.append(new["batch_stats"])
    counts = [np.bincount(d, minlength=3) for d in (dx, dy)]
    got = merge(stats, weights=counts)
    for d in range(3):
        _, mean, var = oracle.moments(np.concatenate([x[dx == d], y[dy == d]]))
        close(got["mean"][d], mean)
        close(got["var"][d], var)


def test_weights_of_each_feature(parts):
    masks = [np.arange(3) < k for k in (3, 2, 1, 2)]
    stats = [stats_of(p) for p in parts]
    weights = [len(p) * mask for p, mask in zip(parts, masks, strict=True)]
    got = merge(stats, weights=weights)["head"]
    for f in range(3):
        rows = np.concatenate(
            [-2 * p[:, f] for p, mask in zip(parts, masks, strict=True) if mask[f]]
        )
        close(got["mean"][f], rows.mean())
        close(got["var"][f], rows.var())


def test_scanned_layers_are_merged_layer_by_layer(parts):
    stack = lambda p: {
        "mean": jnp.stack([p["head"]["mean"]] * 2) * jnp.ones((2, 1)),
        "var": jnp.stack([p["head"]["var"]] * 2),
    }
    got = merge([{"s": stack(stats_of(p))} for p in parts], weights=[7, 2, 1, 10])
    all_close(got, {"s": stack(stats_of(np.concatenate(parts)))})


def test_under_jit_with_traced_weights(parts):
    stats = [stats_of(p) for p in parts]
    got = jax.jit(lambda s, w: merge(s, weights=w))(stats, jnp.array([7.0, 2, 1, 10]))
    all_close(got, stats_of(np.concatenate(parts)))
    first = jax.jit(lambda s, w: merge(s, weights=w))(stats, jnp.zeros(4))
    equal(first, stats[0])


# --- algebra -----------------------------------------------------------------------

numbers = st.floats(-50, 50, width=32)
some = st.lists(
    st.tuples(
        numbers, st.floats(0, 50, width=32), st.sampled_from([0.0, 1.0, 3.0, 8.0])
    ),
    min_size=2,
    max_size=5,
)


def collections(triples):
    return (
        [
            {"n": {"mean": jnp.float32([m]), "var": jnp.float32([v])}}
            for m, v, _ in triples
        ],
        [w for _, _, w in triples],
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(triples=some, data=st.data())
def test_associative_and_commutative(triples, data):
    """In any order and grouping, the mixture by its definition in float64."""
    order = data.draw(st.permutations(range(len(triples))))
    cut = data.draw(st.integers(1, len(triples) - 1))
    triples = [triples[i] for i in order]
    stats, weights = collections(triples)
    groups = (slice(None, cut), slice(cut, None))
    halves = [merge(stats[g], weights=weights[g]) for g in groups]
    got = merge(halves, weights=[sum(weights[g]) for g in groups])["n"]
    whole = merge(stats, weights=weights)["n"]
    m, v, w = np.array(triples, np.float64).T
    if w.sum() == 0:
        np.testing.assert_array_equal(whole["mean"], stats[0]["n"]["mean"])
        return
    mean = (w * m).sum() / w.sum()
    var = (w * (v + (m - mean) ** 2)).sum() / w.sum()
    for merged in (got, whole):
        np.testing.assert_allclose(merged["mean"][0], mean, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(merged["var"][0], var, rtol=1e-5, atol=1e-3)


def test_no_cancellation_where_means_are_large():
    """Mean 1e4, variance 1: `E[x**2] - mean**2` in float32 has no digit left."""
    parts = [
        {"mean": jnp.float32([1e4 + d]), "var": jnp.float32([1.0])} for d in (0, 2)
    ]
    merged = merge(parts)
    assert float(merged["var"][0]) == 2.0


# --- where the parts come from -----------------------------------------------------


@pytest.mark.devices
def test_statistics_of_devices_under_pmap(parts):
    """Without `axis_name` each device keeps its own; merged they are the pool's."""
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=0.0)
    x = jnp.asarray(np.concatenate(parts), jnp.float32).reshape(4, 5, 3)
    variables = layer.init(jax.random.key(0), x[0])
    step = lambda x: layer.apply(variables, x, mutable=["batch_stats"])[1][
        "batch_stats"
    ]
    stacked = jax.pmap(step, devices=jax.devices()[:4])(x)
    assert stacked["mean"].shape == (4, 3)
    _, mean, var = oracle.moments(np.concatenate(parts))
    all_close(merge(stacked), {"mean": mean, "var": var})
    assert (abs(stacked["var"].mean(0) / var - 1) > 0.1).all()


def test_microbatches_and_clients_are_the_pooled_recalibration(parts):
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    run = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])
    rows = [jnp.float32(p) for p in parts]
    found = [population(run, variables, [p])[""] for p in rows]
    clients = [{"mean": m.mean, "var": m.var} for m in found]
    got = merge(clients, weights=[m.weight for m in found])
    pooled = population(run, variables, rows)[""]
    all_close(got, {"mean": pooled.mean, "var": pooled.var})
    _, mean, var = oracle.moments(np.concatenate(parts))
    all_close(got, {"mean": mean, "var": var})


def test_weights_that_layers_track_are_summed(parts):
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=None)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    stats = [
        layer.apply(variables, jnp.float32(p), mutable=["batch_stats"])[1][
            "batch_stats"
        ]
        for p in parts
    ]
    got = merge(stats, weights=[s["weight"] for s in stats])
    weight, mean, var = oracle.moments(np.concatenate(parts))
    all_close(got, {"mean": mean, "var": var, "weight": weight})


def test_pending_moments_are_merged(parts):
    layer = jbn.linen.BatchNorm(use_running_average=False, accumulate=True)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 3)))
    stats = [
        layer.apply(variables, jnp.float32(p), mutable=["batch_stats"])[1][
            "batch_stats"
        ]
        for p in parts
    ]
    committed = jbn.commit(merge(stats), momentum=0.0)
    _, mean, var = oracle.moments(np.concatenate(parts))
    close(committed["mean"], mean)
    close(committed["var"], var)


def test_a_step_count_is_the_first_s(parts):
    stats = [{"n": {**stats_of(p)["head"], "step": jnp.int32(3)}} for p in parts]
    assert merge(stats)["n"]["step"] == 3


# --- parameters --------------------------------------------------------------------


def test_average_is_that_of_federated_averaging(rng):
    trees = [
        {"a": {"k": rng.standard_normal((2, 3))}, "b": [rng.random(2)]} for _ in "abc"
    ]
    trees32 = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), trees)
    got = average(trees32, weights=[1, 2, 5])
    want = jax.tree.map(lambda *v: np.average(v, axis=0, weights=[1, 2, 5]), *trees)
    all_close(got, want)
    all_close(average(trees32), jax.tree.map(lambda *v: np.mean(v, 0), *trees))


def test_average_keeps_dtypes_and_what_is_equal():
    tree = {
        "half": jnp.full(3, 1.2345, jnp.bfloat16),
        "full": jnp.full(3, 1.2345),
        "count": jnp.asarray(7),
    }
    got = average([tree] * 7)
    assert [v.dtype for v in jax.tree.leaves(got)] == [
        v.dtype for v in jax.tree.leaves(tree)
    ]
    all_close(got, tree, rtol=1e-6)


def test_average_in_16_bits_is_rounded_once():
    values = jnp.asarray([1.0, 1.0078125, 1.015625], jnp.bfloat16)
    trees = [{"w": v} for v in values]
    assert average(trees)["w"] == jnp.asarray(1.0078125, jnp.bfloat16)


def test_average_where_none_counts_is_the_first():
    trees = [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}]
    equal(average(trees, weights=[0, 0]), trees[0])
    equal(average(trees, weights=[0, 3]), trees[1])


# --- FedBN -------------------------------------------------------------------------


def client(seed):
    norm = lambda k: {"scale": jnp.full(2, k), "bias": jnp.full(2, -k)}
    stats = lambda k: {"mean": jnp.full(2, 10 + k), "var": jnp.full(2, 20 + k)}
    k = float(seed)
    return {
        "params": {
            "dense": {"kernel": jnp.full((2, 2), k), "bias": jnp.full(2, k)},
            "norm": norm(k),
            "block": {"norm": norm(k), "norm_2": norm(k)},
            "layer_norm": norm(k),
        },
        "batch_stats": {
            "norm": stats(k),
            "block": {
                "norm": stats(k),
                "norm_2": {**stats(k), "weight": jnp.ones(2) * k},
            },
        },
    }


def sources(variables):
    """Which client each value is of, by path."""
    flat = jax.tree_util.tree_leaves_with_path(variables)
    name = lambda path: "/".join(str(k.key) for k in path)
    return {name(path): int(abs(leaf.ravel()[0])) % 10 for path, leaf in flat}


def test_fed_bn_keeps_the_clients_own_norms():
    got = fed_bn(client(1), client(2))
    assert jax.tree.structure(got) == jax.tree.structure(client(1))
    for path, source in sources(got).items():
        own = "norm" in path and "layer_norm" not in path
        assert source == (2 if own else 1), path


@pytest.mark.parametrize(
    ("where", "own"),
    [
        ("block/norm", {"block/norm"}),
        ("block/*", {"block/norm", "block/norm_2"}),
        (lambda path: path == "norm", {"norm"}),
        ([], set()),
    ],
    ids=["one", "glob", "function", "none"],
)
def test_fed_bn_where(where, own):
    for path, source in sources(fed_bn(client(1), client(2), where=where)).items():
        layer = path.split("/", 1)[1].rsplit("/", 1)[0]
        assert source == (2 if layer in own else 1), path


def test_fed_bn_keeps_pending_moments():
    layer = jbn.linen.BatchNorm(use_running_average=False, accumulate=True)
    start = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    _, stats = layer.apply(start, jnp.ones((5, 3)), mutable=["batch_stats"])
    new = fed_bn(start, {**start, **stats})
    equal(new["batch_stats"], stats["batch_stats"])
    assert new["batch_stats"]["pending"]["weight"].max() == 5


class Numbered(nnx.Module):
    """Has norm layers by name and by number."""

    def __init__(self, value):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(2, 2, rngs=rngs)
        self.norm = jbn.nnx.BatchNorm(2, rngs=rngs)
        self.norms = nnx.List([jbn.nnx.BatchNorm(2, rngs=rngs)])
        nnx.update(self, jax.tree.map(lambda v: v * 0 + value, nnx.state(self)))


@pytest.mark.parametrize("convert", [lambda s: s, nnx.to_pure_dict], ids=["", "dicts"])
def test_a_round_with_nnx(convert):
    models = [Numbered(1.0), Numbered(3.0)]
    variables = [
        {
            "params": convert(nnx.state(model, nnx.Param)),
            "batch_stats": convert(nnx.state(model, nnx.BatchStat)),
        }
        for model in models
    ]
    shared = {
        "params": average([v["params"] for v in variables]),
        "batch_stats": merge([v["batch_stats"] for v in variables]),
    }
    own = fed_bn(variables[0], variables[1], where="norms/0")
    nnx.update(models[0], shared["params"])
    nnx.update(models[0], shared["batch_stats"])
    np.testing.assert_array_equal(models[0].dense.kernel[...], np.full((2, 2), 2.0))
    for norm in models[0].norm, models[0].norms[0]:
        # Means 1 and 3, variances 1 and 3.
        assert (norm.mean[...] == 2).all()
        assert (norm.var[...] == 3).all()
    nnx.update(models[0], own["params"])
    nnx.update(models[0], own["batch_stats"])
    found = [models[0].norm, models[0].norms[0]]
    assert [n.scale[0] for n in found] == [1, 3]
    assert [n.mean[0] for n in found] == [1, 3]


def test_a_round_of_one_client_is_the_identity():
    only = client(3)
    shared = {
        "params": average([only["params"]], weights=[10]),
        "batch_stats": merge([only["batch_stats"]], weights=[10]),
    }
    equal(shared, only)
    equal(fed_bn(shared, only), only)


def test_a_round_of_federated_averaging(parts):
    """Two clients: kernels averaged by rows, statistics pooled, norms their own."""
    clients, rows = [client(1), client(3)], [30, 10]
    for c, p in zip(clients, parts, strict=False):
        c["batch_stats"]["norm"] = {k: v[:2] for k, v in stats_of(p)["head"].items()}
    shared = {
        "params": average([c["params"] for c in clients], weights=rows),
        "batch_stats": merge([c["batch_stats"] for c in clients], weights=rows),
    }
    close(shared["params"]["dense"]["kernel"], np.full((2, 2), 1.5))
    new = fed_bn(shared, clients[1])
    close(new["params"]["dense"]["kernel"], np.full((2, 2), 1.5))
    equal(new["params"]["norm"], clients[1]["params"]["norm"])
    equal(new["batch_stats"], clients[1]["batch_stats"])


def test_fed_bn_of_a_model_that_is_one_norm():
    layer = jbn.linen.BatchNorm(use_running_average=True)
    own = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    equal(fed_bn(jax.tree.map(lambda v: v + 1, own), own), own)


# --- refusals ----------------------------------------------------------------------


def test_what_cannot_be_merged_is_refused(parts):
    stats = [stats_of(p) for p in parts]
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match="got 3 for 4"):
        merge(stats, weights=[1, 2, 3])
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        merge(stats, weights=[1, 2, -1, 3])
    with pytest.raises(ValueError, match="must not be negative"):
        merge(stats, weights=[1, 2, float("nan"), 3])
    with pytest.raises(ValueError, match="of the same layers"):
        merge([stats[0], {"head": stats[1]["head"]}])
    uneven = {"a": {"mean": jnp.zeros((2, 3)), "var": jnp.zeros((4, 3))}}
    with pytest.raises(ValueError, match=r"sizes \[\(2,\), \(4,\)\]. Pass a list"):
        merge(uneven)
    with pytest.raises(ValueError, match="Pass a list"):
        merge({"mean": jnp.zeros(()), "var": jnp.zeros(())})


@pytest.mark.usefixtures("untyped")
def test_what_is_no_collection_is_refused():
    for wrong in (None, 3, itertools.repeat({})):
        with pytest.raises(TypeError, match="must be a list of collections"):
            merge(wrong)  # pyright: ignore[reportArgumentType]


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="at least one tree"):
        average([])
    with pytest.raises(ValueError, match="got 1 for 2"):
        average([{}, {}], weights=[1])
    with pytest.raises(ValueError, match="must not be negative"):
        average([{"w": jnp.ones(1)}] * 2, weights=[1, -1])
