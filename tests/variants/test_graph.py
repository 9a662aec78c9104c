"""`jbn.graph_norm` and its modules, next to PyTorch Geometric and float64 loops."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differentiation import modes
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx


FEATURES = 3
IDS = np.asarray([2, 0, 0, 2, 4, 0, 2, 2, 4, 0, 1], np.int32)  # 3 is empty, 1 one node
NUM = 5


def problem(rng, dtype: Any = np.float64) -> Any:
    x = rng.normal(size=(len(IDS), FEATURES)) * 2 + IDS[:, None]
    scale, bias, share = rng.normal(size=(3, FEATURES))
    return tuple(np.asarray(v, dtype) for v in (x, scale, bias, share))


def loop(x, scale, bias, share, ids, w, epsilon=1e-5):
    """One graph and feature at a time, by the paper's equation 6."""
    y = np.empty(x.shape)
    for i in range(len(x)):
        for c in range(x.shape[1]):
            own = [j for j in range(len(x)) if ids[j] == ids[i] and w[j] > 0]
            total = sum(w[j] for j in own)
            mean, second = 0.0, 1.0
            if total > 0:
                mean = share[c] * sum(w[j] * x[j, c] for j in own) / total
                second = sum(w[j] * (x[j, c] - mean) ** 2 for j in own) / total
            y[i, c] = scale[c] * (x[i, c] - mean) / np.sqrt(second + epsilon) + bias[c]
    return y


def by_jbn(x, scale, bias, share, ids: Any = IDS, num: Any = NUM, **options) -> Any:
    params = jbn.Params(scale, bias)
    return jbn.graph_norm(
        x, params, segment_ids=ids, num_segments=num, mean_scale=share, **options
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weighted", [False, True])
def test_values_are_those_of_the_paper(rng, weighted):
    x, scale, bias, share = problem(rng)
    params = scale, bias, share
    w = rng.integers(0, 3, len(x)).astype(float) if weighted else np.ones(len(x))
    got = jax.jit(by_jbn)(x, *params, weights=jnp.asarray(w[:, None]))
    np.testing.assert_allclose(got, loop(x, *params, IDS, w), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["GraphNorm", "InstanceNorm"])
def test_values_and_gradients_are_those_of_torch_geometric(rng, kind):
    torch = pytest.importorskip("torch")
    nn = pytest.importorskip("torch_geometric.nn")
    x, scale, bias, share = problem(rng)
    ct = rng.normal(size=x.shape)
    layer: Any = getattr(nn, kind)(FEATURES, eps=1e-3).double()
    params = {"weight": scale, "bias": bias, "mean_scale": share}
    if kind == "InstanceNorm":
        layer = nn.InstanceNorm(FEATURES, eps=1e-3, affine=True).double()
        params.pop("mean_scale")
        share = None
    layer.load_state_dict({k: torch.tensor(v) for k, v in params.items()})
    # Their instance norm divides by a number of nodes, the graphs one by one as well.
    given = torch.tensor(x, requires_grad=True)
    theirs = layer(given, torch.tensor(IDS, dtype=torch.int64), NUM)
    theirs.backward(torch.tensor(ct))

    def ours(x, scale, bias, share):
        return by_jbn(x, scale, bias, share, epsilon=1e-3)

    y, pull = jax.vjp(jax.jit(ours), x, scale, bias, share)
    dx, dscale, dbias, dshare = pull(jnp.asarray(ct))
    tight: Any = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(y, theirs.detach().numpy(), **tight)
    np.testing.assert_allclose(dx, given.grad.numpy(), **tight)
    np.testing.assert_allclose(dscale, layer.weight.grad.numpy(), **tight)
    np.testing.assert_allclose(dbias, layer.bias.grad.numpy(), **tight)
    if share is not None:
        np.testing.assert_allclose(dshare, layer.mean_scale.grad.numpy(), **tight)


def plain(x, w, scale, bias, share):
    """The formula, for JAX to differentiate."""
    own = jnp.asarray(IDS[:, None] == IDS[None], x.dtype) * w.T
    own = own / own.sum(1, keepdims=True)
    d = x - share[None] * (own @ x)
    return d / jnp.sqrt(own @ d**2 + 1e-5) * scale[None] + bias[None]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["grad", "jvp", "hvp, reverse over reverse"])
def test_derivatives_are_those_of_the_formula(rng, mode):
    x, scale, bias, share = map(jnp.asarray, problem(rng))
    # One node is its own mean: the share decides what is left of it.
    args = x, jnp.asarray(rng.uniform(0.5, 2, (len(x), 1))), scale, bias, share
    ours = lambda x, w, *params: by_jbn(x, *params, weights=w)
    derive = modes(jnp.asarray(rng.normal(size=x.shape)))[mode]
    got, want = (jax.jit(lambda *a, f=f: derive(f, a))(*args) for f in (ours, plain))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-8, atol=1e-8)


def test_padding_does_not_count_whatever_it_holds(rng):
    x, *params = problem(rng, np.float32)
    want = by_jbn(x, *params)
    rows = np.full((4, FEATURES), [[np.nan], [np.inf], [1e30], [-5.0]], np.float32)
    padded = np.concatenate([x, rows])
    ids = np.concatenate([IDS, [-1, NUM, NUM + 7, 0]]).astype(np.int32)
    mask = np.arange(len(ids)) < len(ids) - 1

    def loss(x, *params):
        y = by_jbn(x, *params, ids=ids, mask=mask)
        return (y[: len(IDS)] ** 3).sum(), y

    grads, y = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(padded, *params)
    np.testing.assert_allclose(y[: len(IDS)], want, rtol=1e-5, atol=1e-5)
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_array_equal(grads[0][len(IDS) :], 0)
    np.testing.assert_allclose(y[len(IDS)], params[1])  # NaN comes out as `bias`


def test_a_large_mean_loses_nothing(rng):
    x, scale, bias, _ = problem(rng, np.float32)
    far = (x + 1e3 * (1 + IDS[:, None])).astype("f")
    got = by_jbn(far, scale, bias, None)
    want = loop(far.astype(float), scale, bias, np.ones(3), IDS, np.ones(len(IDS)))
    several = IDS != 1  # one node is its mean
    np.testing.assert_allclose(got[several], want[several], rtol=1e-2, atol=1e-2)


@pytest.mark.devices
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("how", ["shard_map", "jit"])
def test_a_graph_may_lie_on_several_devices(rng, how):
    x, *params = problem(rng)
    x = np.concatenate([x, x[::-1] + 1, x[:2] - 3])[:24]
    ids = np.concatenate([IDS, IDS, IDS[:2]])[:24]
    want = by_jbn(x, *params, ids=ids)
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    if how == "jit":
        sharding = jax.sharding.NamedSharding(mesh, P("d"))
        given = jax.device_put((x, ids), sharding)
        got = jax.jit(lambda x, ids: by_jbn(x, *params, ids=ids))(*given)
    else:
        f = lambda x, ids: by_jbn(x, *params, ids=ids, axis_name="d")
        got = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d"))(x, ids)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_mean_scale", [True, False])
def test_modules_are_the_function(rng, use_mean_scale):
    x, scale, bias, share = problem(rng, np.float32)
    settings = {"epsilon": 0.1, "use_mean_scale": use_mean_scale}
    params = {"scale": scale, "bias": bias}
    if use_mean_scale:
        params["mean_scale"] = share
    want = by_jbn(x, scale, bias, share if use_mean_scale else None, epsilon=0.1)
    layer = jbn.linen.GraphNorm(**settings)
    fresh: Any = layer.init(jax.random.key(0), x, IDS, NUM)
    assert {k: v.shape for k, v in fresh["params"].items()} == {
        k: v.shape for k, v in params.items()
    }
    got: Any = layer.apply({"params": params}, x, IDS, NUM)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    layer = jbn.nnx.GraphNorm(FEATURES, rngs=nnx.Rngs(0), **settings)
    nnx.update(layer, nnx.State(params))
    np.testing.assert_allclose(layer(x, IDS, NUM), want, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument(rng):
    x, *params = problem(rng, np.float32)
    with pytest.raises(TypeError, match="`graph_norm` has no option `tau`"):
        by_jbn(x, *params, tau=1.0)
    with pytest.raises(TypeError, match="`segment_ids` must be of integers"):
        by_jbn(x, *params, ids=IDS * 1.0)
    with pytest.raises(ValueError, match="`segment_ids` must have one entry"):
        by_jbn(x, *params, ids=IDS[:-1])
    with pytest.raises(ValueError, match="`num_segments` must be at least 1; got 0"):
        by_jbn(x, *params, num=0)
    with pytest.raises(ValueError, match="`mean_scale` must have one entry"):
        by_jbn(x, params[0], params[1], np.ones(2, "f"))
