"""PyTorch modules whose arrays are unused, aliased, shared or laid out otherwise."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn.linen
from jbn.tools import from_torch, to_torch


torch: Any = pytest.importorskip("torch")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def randomized(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    return module.eval()


class Theirs(torch.nn.Module):
    """A norm that is never called, and one that has two names."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(3, 3)
        self.n = torch.nn.BatchNorm1d(3)
        self.unused = torch.nn.BatchNorm1d(3)
        self.alias = self.n

    def forward(self, x):
        return self.alias(self.n(self.a(x)))


class Ours(nn.Module):
    norm: str = "n"

    @nn.compact
    def __call__(self, x):
        norm = jbn.linen.BatchNorm(use_running_average=True, name=self.norm)
        return norm(norm(nn.Dense(3, name="a")(x)))


def variables_of(model, x):
    return model.init(jax.random.key(0), x)


@pytest.mark.parametrize("name", ["n", "alias"])
@pytest.mark.parametrize("skip", ["unused.*", lambda name: name.startswith("unused")])
def test_unused_and_aliased(rng, name, skip):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    module, model = randomized(Theirs()), Ours(name)
    variables = from_torch(module, variables_of(model, x), skip=skip)
    wanted = module(torch.tensor(x)).detach()
    np.testing.assert_allclose(model.apply(variables, x), wanted, **CLOSE)

    # The way back: into a module with other numbers, whose unused norm keeps its own.
    target = Theirs()
    before = target.unused.weight.detach().clone()
    target.load_state_dict(to_torch(variables, target, skip=skip))
    got = target.eval()(torch.tensor(x)).detach()
    np.testing.assert_allclose(got, wanted, **CLOSE)
    assert (target.unused.weight == before).all()
    assert torch.equal(target.n.weight, module.n.weight)


def test_without_skip_theirs_is_named(rng):
    x = np.ones((2, 3), np.float32)
    variables = variables_of(Ours(), x)
    with pytest.raises(ValueError, match=r"'unused.weight'.*ours or theirs"):
        from_torch(Theirs(), variables)
    with pytest.raises(ValueError, match=r"'unused.weight'"):
        to_torch(variables, Theirs())


def test_two_layers_for_one_of_theirs(rng):
    """One module under two names there may be two layers here, if these agree."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("n", "alias"):
                x = jbn.linen.BatchNorm(use_running_average=True, name=name)(x)
            return x

    module = torch.nn.Module()
    module.n = module.alias = torch.nn.BatchNorm1d(3)
    randomized(module)
    x = jnp.ones((2, 3))
    variables = from_torch(module, variables_of(Two(), x))
    assert (variables["params"]["n"]["scale"] == module.n.weight.detach().numpy()).all()
    state = to_torch(variables, module)
    assert torch.equal(state["alias.running_var"], module.n.running_var)
    variables["params"]["alias"]["scale"] += 1
    with pytest.raises(ValueError, match="one array under several names"):
        to_torch(variables, module)
    to_torch(variables, module, skip="alias/*")


def test_state_dicts_of_arrays(rng):
    """Aliases are seen by their memory; equal numbers alone are no alias."""
    one = np.ones(3, np.float32)
    norm = {"running_mean": one * 0, "running_var": one * 3, "bias": one * 2}
    state = {f"n.{k}": v for k, v in {**norm, "weight": one}.items()}
    layer = {"n": {"scale": one, "bias": one}}
    stats = {"n": {"mean": one, "var": one}}
    variables = {"params": layer, "batch_stats": stats}
    from_torch({**state, "m.weight": one}, variables)
    with pytest.raises(ValueError, match="Not used: 'm\\.weight'"):
        from_torch({**state, "m.weight": one.copy()}, variables)


def test_transposed_convolutions(rng):
    module = torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 3, 2, stride=2))
    x = rng.normal(size=(1, 4, 4, 3)).astype(np.float32)
    wanted = module(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach()
    make = lambda transpose: nnx.ConvTranspose(
        3, 3, (2, 2), 2, transpose_kernel=transpose, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="`from_torch` needs `transpose_kernel=True`"):
        from_torch(module, nnx.Sequential(make(False)), names={"layers/0": "0"})
    layer = from_torch(module, nnx.Sequential(make(True)), names={"layers/0": "0"})
    np.testing.assert_allclose(layer(x), wanted, **CLOSE)

    linen = nn.ConvTranspose(3, (2, 2), (2, 2), transpose_kernel=True, name="t")
    variables = {"params": {"t": linen.init(jax.random.key(0), x)["params"]}}
    with pytest.warns(UserWarning, match=r"`from_torch`: '0' must be a Linen"):
        new = from_torch(module, variables, names={"t": "0"})
    got = linen.apply({"params": new["params"]["t"]}, x)
    np.testing.assert_allclose(got, wanted, **CLOSE)
    with pytest.warns(UserWarning, match=r"`to_torch`: '0' must be a Linen"):
        state = to_torch(new, module, names={"t": "0"})
    assert torch.equal(state["0.weight"], module[0].weight)
    # Where the shape tells, there is nothing to say.
    module = torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 2, 2))
    layer = nn.ConvTranspose(2, (2, 2), transpose_kernel=True)
    variables = {"params": {"t": layer.init(jax.random.key(0), x)["params"]}}
    from_torch(module, variables, names={"t": "0"})


class Branches(torch.nn.Module):
    """Depthwise, grouped and pointwise convolutions with norms, concatenated."""

    def __init__(self, rank):
        super().__init__()
        conv = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[rank - 1]
        norm = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
        self.depthwise = conv(4, 8, 3, padding=1, groups=4)
        self.grouped = conv(4, 6, 3, padding=1, groups=2, bias=False)
        self.point = conv(14, 5, 1)
        self.n0, self.n1, self.n2 = (norm[rank - 1](c) for c in (8, 6, 14))

    def forward(self, x):
        parts = [self.n0(self.depthwise(x)), torch.relu(self.n1(self.grouped(x)))]
        return self.point(self.n2(torch.cat(parts, 1)))


class OurBranches(nn.Module):
    rank: int

    @nn.compact
    def __call__(self, x):
        def conv(features, size, name, **kwargs):
            return nn.Conv(features, (size,) * self.rank, name=name, **kwargs)

        def norm(name):
            return jbn.linen.BatchNorm(use_running_average=True, name=name)

        a = norm("n0")(conv(8, 3, "depthwise", feature_group_count=4)(x))
        b = conv(6, 3, "grouped", feature_group_count=2, use_bias=False)(x)
        both = jnp.concatenate([a, nn.relu(norm("n1")(b))], -1)
        return conv(5, 1, "point")(norm("n2")(both))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_networks_of_branches(rng, rank):
    x = rng.normal(size=(2, *(5, 4, 3)[:rank], 4)).astype(np.float32)
    module, model = randomized(Branches(rank)), OurBranches(rank)
    there = module(torch.tensor(np.moveaxis(x, -1, 1))).detach().numpy()
    variables = from_torch(module, variables_of(model, x))
    got = model.apply(variables, x)
    np.testing.assert_allclose(got, np.moveaxis(there, 1, -1), rtol=1e-4, atol=1e-4)
    state = to_torch(variables, module)
    for name, value in module.state_dict().items():
        assert torch.equal(state[name], value), name
