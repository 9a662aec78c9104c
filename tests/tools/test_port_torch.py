"""Weights from and to PyTorch: layers, and torchvision's ResNets."""

import contextlib
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peers import needs

import jbn
import jbn.linen
import jbn.nnx
from jbn.models import ResNet, resnet18, resnet50, torchvision_name
from jbn.models.resnet import BottleneckBlock
from jbn.tools import from_torch, to_torch, torch_options


torch: Any = pytest.importorskip("torch", reason=needs("torch"))
pytestmark = [pytest.mark.sweep, pytest.mark.peers("torch")]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def torchvision_resnet(sizes, bottleneck, widths, num_classes):
    """torchvision's ResNet, as its `models/resnet.py` has it, with names of its own."""
    conv = partial(torch.nn.Conv2d, bias=False)
    norm = torch.nn.BatchNorm2d
    expansion = 4 if bottleneck else 1

    class Block(torch.nn.Module):
        def __init__(self, inplanes, planes, stride):
            super().__init__()
            out = planes * expansion
            if bottleneck:
                self.conv1, self.bn1 = conv(inplanes, planes, 1), norm(planes)
                self.conv2 = conv(planes, planes, 3, stride, padding=1)
                self.bn2 = norm(planes)
                self.conv3, self.bn3 = conv(planes, out, 1), norm(out)
            else:
                self.conv1 = conv(inplanes, planes, 3, stride, padding=1)
                self.bn1 = norm(planes)
                self.conv2 = conv(planes, planes, 3, padding=1)
                self.bn2 = norm(planes)
            self.downsample = None
            if stride != 1 or inplanes != out:
                down = conv(inplanes, out, 1, stride)
                self.downsample = torch.nn.Sequential(down, norm(out))

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            if bottleneck:
                y = self.bn3(self.conv3(torch.relu(y)))
            return torch.relu(y + (self.downsample(x) if self.downsample else x))

    class ResNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = conv(3, widths[0], 7, 2, padding=3)
            self.bn1 = norm(widths[0])
            self.maxpool = torch.nn.MaxPool2d(3, 2, padding=1)
            channels = widths[0]
            for i, (size, width) in enumerate(zip(sizes, widths, strict=True), start=1):
                blocks = []
                for j in range(size):
                    blocks.append(Block(channels, width, 2 if i > 1 and j == 0 else 1))
                    channels = width * expansion
                setattr(self, f"layer{i}", torch.nn.Sequential(*blocks))
            self.fc = torch.nn.Linear(channels, num_classes)

        def forward(self, x):
            x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
            for i in range(1, len(sizes) + 1):
                x = getattr(self, f"layer{i}")(x)
            return self.fc(x.mean((2, 3)))

    return ResNet()


def nchw(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def trained(module, batches, lr=0.1):
    """`module` after some steps, so that nothing is at its initial value."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        y = module(x)
        (y.square().mean() - y.flatten()[::3].sum() / 10).backward()
        optimizer.step()
    return module


def shapes_of(model, x):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))


def relative(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max())


def state_arrays(module):
    return {k: v.detach().clone().numpy() for k, v in module.state_dict().items()}


def assert_states_equal(a, b):
    assert list(a) == list(b)
    for key, value in a.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(b[key]), key)


RESNETS = {
    "bottleneck": (
        partial(ResNet, (1, 1), BottleneckBlock),
        (1, 1),
        True,
        (4, 8),
        10,
    ),
    "18 narrow": (resnet18, (2, 2, 2, 2), False, (8, 12, 16, 24), 10),
    "50 narrow": (resnet50, (3, 4, 6, 3), True, (4, 6, 8, 12), 10),
    "18": (resnet18, (2, 2, 2, 2), False, (64, 128, 256, 512), 1000),
    "50": (resnet50, (3, 4, 6, 3), True, (64, 128, 256, 512), 1000),
}
FAST = {"bottleneck", "18 narrow"}


@pytest.mark.parametrize(
    ("make", "sizes", "bottleneck", "widths", "num_classes"),
    [
        pytest.param(*case, id=name, marks=() if name in FAST else pytest.mark.slow)
        for name, case in RESNETS.items()
    ],
)
def test_torchvision_resnet(rng, make, sizes, bottleneck, widths, num_classes):
    # 64x64, so that the last stage still has 2x2 pixels a batch can have statistics of.
    xs = rng.normal(size=(4, 4, 64, 64, 3)).astype(np.float32)
    peer = torchvision_resnet(sizes, bottleneck, widths, num_classes)
    trained(peer, map(nchw, xs[:3]), lr=0.01)

    norm = partial(jbn.linen.BatchNorm, **torch_options(peer.bn1))
    model = make(widths=widths, num_classes=num_classes, norm=norm)
    shapes = shapes_of(model, xs[0])
    variables = from_torch(peer, shapes, names=torchvision_name, norm=norm)

    def same_structure(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)

    jax.tree.map(same_structure, variables, shapes)

    back = to_torch(variables, peer, names=torchvision_name, norm=norm)
    assert_states_equal(back, peer.state_dict())
    fresh = torchvision_resnet(sizes, bottleneck, widths, num_classes)
    fresh.load_state_dict(
        to_torch(variables, fresh, names=torchvision_name), strict=True
    )

    x = xs[3]
    fresh.eval()
    peer.eval()
    with torch.no_grad():
        expected = peer(nchw(x)).numpy()
        np.testing.assert_array_equal(fresh(nchw(x)).numpy(), expected)
        logits = jax.jit(partial(model.apply, train=False))(variables, x)
        assert relative(logits, expected) < 1e-4

        expected = peer.train()(nchw(x)).numpy()
    step = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    logits, updated = step(variables, x)
    assert relative(logits, expected) < 1e-4
    theirs = from_torch(peer, shapes, names=torchvision_name)["batch_stats"]

    def close(ours, theirs):
        assert relative(ours, theirs) < 1e-4

    jax.tree.map(close, updated["batch_stats"], theirs)


LAYERS = {
    "1d, rows": ("BatchNorm1d", (16, 3)),
    "1d, sequences": ("BatchNorm1d", (4, 3, 5)),
    "2d": ("BatchNorm2d", (4, 3, 5, 6)),
    "3d": ("BatchNorm3d", (4, 3, 5, 6, 2)),
}


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.3, "eps": 0.01}], ids=str)
@pytest.mark.parametrize(("kind", "shape"), LAYERS.values(), ids=LAYERS)
def test_layers(rng, kind, shape, options, first):
    xs = torch.from_numpy((rng.normal(size=(5, *shape)) * 2 + 1).astype(np.float32))
    peer = trained(getattr(torch.nn, kind)(3, **options), xs[:4])
    ours = (lambda x: x) if first else (lambda x: np.moveaxis(x, 1, -1))
    axis = 1 if first else -1
    x = ours(xs[4].numpy())

    # As a function.
    options = torch_options(peer)
    params, stats = from_torch(peer, jbn.init(3), norm=options)
    call = partial(jbn.batch_norm, axis=axis, **options)
    infer = jax.jit(partial(call, use_running_average=True))
    step = jax.jit(partial(call, use_running_average=False))
    expected = peer.eval()(xs[4]).detach().numpy()
    np.testing.assert_allclose(infer(x, params, stats)[0], ours(expected), **CLOSE)
    state = state_arrays(peer)
    expected = peer.train()(xs[4]).detach().numpy()
    y, new = step(x, params, stats)
    np.testing.assert_allclose(y, ours(expected), **CLOSE)
    np.testing.assert_allclose(new.mean, peer.running_mean, **CLOSE)
    np.testing.assert_allclose(new.var, peer.running_var, **CLOSE)
    # What PyTorch updates in place is not ours.
    np.testing.assert_array_equal(stats.mean, state["running_mean"])
    assert (peer.running_mean.numpy() != state["running_mean"]).all()

    # As modules.
    linen = jbn.linen.BatchNorm(use_running_average=True, axis=axis, **options)
    variables = linen.init(jax.random.key(0), x)
    variables = from_torch(state, variables)
    np.testing.assert_array_equal(variables["params"]["scale"], params.scale)
    np.testing.assert_array_equal(variables["params"]["bias"], params.bias)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], stats.mean)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], stats.var)
    module = jbn.nnx.BatchNorm(3, axis=axis, **options, rngs=nnx.Rngs(0))
    ported = from_torch(peer, module)
    assert type(ported) is jbn.nnx.BatchNorm
    np.testing.assert_array_equal(module.mean[...], 0)
    np.testing.assert_allclose(
        ported(xs[4].numpy() if first else x, use_running_average=True),
        infer(x, params, new)[0],
        **CLOSE,
    )

    # And back.
    for source in ((params, stats), variables, from_torch(state, module)):
        back = to_torch(source, state)
        assert_states_equal(back, state)
        assert back["weight"] is not state["weight"]
        fresh = getattr(torch.nn, kind)(3, momentum=peer.momentum, eps=peer.eps)
        fresh.load_state_dict(to_torch(source, fresh), strict=True)
        np.testing.assert_array_equal(fresh.running_var, stats.var)
        np.testing.assert_array_equal(fresh.weight.detach(), params.scale)


def test_layers_without_affine_or_statistics():
    bare = torch.nn.BatchNorm1d(3, affine=False)
    bare.running_mean += 2
    params, stats = from_torch(bare, (None, jbn.init(3)[1]))
    assert params is None
    np.testing.assert_array_equal(stats.mean, [2, 2, 2])
    none = jbn.init(3, use_scale=False, use_bias=False)
    assert from_torch(bare, none)[0] == jbn.Params()
    assert_states_equal(
        to_torch(none, bare), torch.nn.BatchNorm1d(3, affine=False).state_dict()
    )
    with pytest.raises(
        ValueError, match=r"Not there: 'weight' \(our 'scale'\), 'bias'"
    ):
        from_torch(bare, jbn.init(3))
    with pytest.raises(ValueError, match=r"Not used: 'weight', 'bias'\. Pass `names`"):
        from_torch(torch.nn.BatchNorm1d(3), none)

    stateless = torch.nn.BatchNorm1d(3, track_running_stats=False)
    with torch.no_grad():
        stateless.weight += 1
    with pytest.raises(ValueError, match=r"'running_mean' \(our 'mean'\)"):
        from_torch(stateless, jbn.init(3))
    params, stats = from_torch(stateless, jbn.init(3), skip=("mean", "var"))
    np.testing.assert_array_equal(params.scale, [2, 2, 2])
    np.testing.assert_array_equal(stats.var, [1, 1, 1])


def test_sync_batch_norm():
    peer = torch.nn.SyncBatchNorm(3, momentum=0.2)
    peer.running_var *= 3
    _, stats = from_torch(peer, jbn.init(3), norm=torch_options(peer))
    np.testing.assert_array_equal(stats.var, [3, 3, 3])


def test_cumulative_average(rng):
    xs = rng.normal(size=(3, 8, 2)).astype(np.float32)
    peer = torch.nn.BatchNorm1d(2, momentum=None)
    for x in xs[:2]:
        peer(torch.from_numpy(x))
    options = torch_options(peer)
    assert options["momentum"] is None
    params, stats = from_torch(peer, jbn.init(2, track_weight=True), norm=options)
    np.testing.assert_array_equal(stats.weight, [2, 2])
    stats = stats._replace(weight=stats.weight * 8)
    _, stats = jbn.batch_norm(
        xs[2], params, stats, use_running_average=False, **options
    )
    peer(torch.from_numpy(xs[2]))
    np.testing.assert_allclose(stats.mean, peer.running_mean, **CLOSE)


def test_a_debiased_average_goes_on_as_a_plain_one(rng):
    xs = rng.normal(size=(3, 8, 2)).astype(np.float32)
    peer = torch.nn.BatchNorm1d(2)
    peer(torch.from_numpy(xs[0]))
    options = torch_options(peer)
    params, stats = from_torch(peer, jbn.init(2, track_weight=True))
    for x in xs[1:]:
        peer(torch.from_numpy(x))
        _, stats = jbn.batch_norm(
            x, params, stats, use_running_average=False, **options
        )
    np.testing.assert_allclose(stats.mean, peer.running_mean, **CLOSE)
    np.testing.assert_allclose(stats.var, peer.running_var, **CLOSE)
    # A state dict of before PyTorch counted.
    state = state_arrays(peer)
    del state["num_batches_tracked"]
    _, stats = from_torch(state, jbn.init(2, track_weight=True))
    np.testing.assert_array_equal(stats.weight, [1, 1])
    # The count is theirs.
    assert to_torch((params, stats), peer)["num_batches_tracked"] == 3


class Linear(nn.Module):
    """One layer of every kind that has a kernel."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        return self.layer(x)


KERNELS = {
    "linear": (lambda t: t.Linear(4, 6), (5, 4), lambda: nn.Dense(6)),
    "conv1d": (
        lambda t: t.Conv1d(4, 6, 3),
        (2, 4, 9),
        lambda: nn.Conv(6, (3,), padding=0),
    ),
    "conv2d": (
        lambda t: t.Conv2d(4, 6, (3, 2), stride=2),
        (2, 4, 9, 8),
        lambda: nn.Conv(6, (3, 2), strides=2, padding=0),
    ),
    "conv3d": (
        lambda t: t.Conv3d(4, 6, (3, 2, 1)),
        (2, 4, 5, 6, 3),
        lambda: nn.Conv(6, (3, 2, 1), padding=0),
    ),
    "grouped": (
        lambda t: t.Conv2d(4, 6, 3, groups=2),
        (2, 4, 9, 8),
        lambda: nn.Conv(6, (3, 3), padding=0, feature_group_count=2),
    ),
    "depthwise": (
        lambda t: t.Conv2d(4, 8, 3, groups=4, bias=False),
        (2, 4, 9, 8),
        lambda: nn.Conv(8, (3, 3), padding=0, feature_group_count=4, use_bias=False),
    ),
    "transposed": (
        lambda t: t.ConvTranspose2d(4, 4, (3, 2), stride=2),
        (2, 4, 5, 6),
        lambda: nn.ConvTranspose(
            4, (3, 2), strides=(2, 2), padding="VALID", transpose_kernel=True
        ),
    ),
}


@pytest.mark.parametrize(("peer", "shape", "layer"), KERNELS.values(), ids=KERNELS)
def test_kernels(rng, peer, shape, layer):
    peer = peer(torch.nn)
    x = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    ours = np.moveaxis(x.numpy(), 1, -1)
    model = Linear(layer())
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ours))

    # The shape of a square one does not tell its layout.
    def warned():
        if isinstance(peer, torch.nn.ConvTranspose2d):
            return pytest.warns(UserWarning, match="transpose_kernel=True")
        return contextlib.nullcontext()

    with warned():
        variables = from_torch(peer, shapes, names={"layer": ""})
    y: Any = model.apply(variables, ours)
    expected = np.moveaxis(peer(x).detach().numpy(), 1, -1)
    np.testing.assert_allclose(y, expected, **CLOSE)
    with warned():
        back = to_torch(variables, peer, names={"layer": ""})
    assert_states_equal(back, peer.state_dict())


class Mixed(nnx.Module):
    def __init__(self, rngs, **options):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.norms = nnx.List(
            [jbn.nnx.BatchNorm(4, rngs=rngs, **options), nnx.LayerNorm(4, rngs=rngs)]
        )
        self.head = nnx.Linear(4, 2, rngs=rngs)
        self.temperature = nnx.Param(jnp.ones(2))

    def __call__(self, ids):
        x = self.embed(ids)
        for norm in self.norms:
            x = norm(x)
        return self.head(x) * self.temperature[...][None]


def mixed_torch():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(7, 4)
            norms = [torch.nn.BatchNorm1d(4), torch.nn.LayerNorm(4, eps=1e-6)]
            self.norms = torch.nn.ModuleList(norms)
            self.head = torch.nn.Linear(4, 2)
            self.temperature = torch.nn.Parameter(torch.full((2,), 2.0))

        def forward(self, ids):
            x = self.embed(ids)
            for norm in self.norms:
                x = norm(x)
            return self.head(x) * self.temperature

    return Mixed()


def test_nnx_model(rng):
    ids = rng.integers(0, 7, 12)
    peer = trained(mixed_torch(), [torch.from_numpy(ids)] * 3)
    model = Mixed(nnx.Rngs(0), momentum=0.9, unbiased=True)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    # Attributes have the same names here: nothing to say.
    ported = from_torch(peer, model)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    ported.eval()
    expected = peer.eval()(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(ported(jnp.asarray(ids)), expected, **CLOSE)
    assert_states_equal(to_torch(ported, peer), peer.state_dict())


def test_dtypes():
    peer = torch.nn.BatchNorm1d(3).to(torch.bfloat16)
    state = peer.state_dict()
    params, stats = from_torch(state, jbn.init(3, param_dtype=jnp.float16))
    assert params.scale is not None
    assert params.scale.dtype == jnp.float16
    assert stats.var.dtype == jnp.float32
    wide = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (params, stats))
    back = to_torch(wide, peer)
    assert {v.dtype for k, v in back.items() if k[0] != "n"} == {torch.bfloat16}
    assert back["num_batches_tracked"].shape == ()
    back = to_torch(wide, torch.nn.BatchNorm1d(3).double())
    assert back["weight"].dtype == torch.float64


def tiny(rng):
    """Variables of two layers, and a state dict for them."""
    f = lambda *shape: rng.normal(size=shape).astype(np.float32)
    variables = {
        "params": {
            "conv": {"kernel": f(3, 3, 2, 4)},
            "norm": {"scale": f(4), "bias": f(4)},
        },
        "batch_stats": {"norm": {"mean": f(4), "var": f(4)}},
        "other": {"norm": {"scale": f(1)}},
    }
    state = {
        "conv.weight": f(4, 2, 3, 3),
        "norm.weight": f(4),
        "norm.bias": f(4),
        "norm.running_mean": f(4),
        "norm.running_var": f(4),
        "norm.num_batches_tracked": np.asarray(3),
    }
    return variables, state


def test_other_collections_and_frozen_dicts(rng):
    variables, state = tiny(rng)
    for given in (variables, nn.FrozenDict(variables)):
        ported = from_torch(state, given)
        assert ported["other"] == given["other"]
        np.testing.assert_array_equal(
            ported["params"]["norm"]["scale"], state["norm.weight"]
        )


def test_pending_and_step_stay(rng):
    layer = jbn.linen.BatchRenorm(lambda n: 1.0 + n.astype(float), accumulate=True)
    x = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    layer = layer.clone(use_running_average=False)
    variables = layer.init(jax.random.key(0), x)
    _, updated = layer.apply(variables, x, mutable=["batch_stats"])
    variables = {**variables, **updated}
    peer = torch.nn.BatchNorm1d(3)
    ported = from_torch(peer, variables)
    for name in ("pending", "step"):
        jax.tree.map(
            np.testing.assert_array_equal,
            ported["batch_stats"][name],
            variables["batch_stats"][name],
        )
    to_torch(variables, peer)


WRONG = {
    "missing": (
        {"norm.bias": None, "norm.running_var": None},
        {},
        [r"Not there: 'norm\.bias' \(our 'norm/bias'\), 'norm\.running_var'"],
    ),
    "unused": ({"fc.weight": (3, 3)}, {}, [r"Not used: 'fc\.weight'\."]),
    "shape": (
        {"conv.weight": (4, 3, 3, 2), "norm.weight": (5,)},
        {},
        [
            r"'conv\.weight' has \(4, 3, 3, 2\), in our layout \(3, 2, 3, 4\), and our"
            r" 'conv/kernel' has \(3, 3, 2, 4\)",
            r"'norm\.weight' has \(5,\), and our 'norm/scale' has \(4,\)",
        ],
    ),
    "all of it": (
        {"norm.bias": None, "fc.weight": (3, 3), "norm.weight": (5,)},
        {},
        [r"Not there: 'norm\.bias'", r"Not used: 'fc\.weight'", r"'norm\.weight' has"],
    ),
    "many": (
        {f"extra.{i}": (1,) for i in range(7)},
        {},
        [r"Not used: 'extra\.0', 'extra\.1', 'extra\.2' and 4 more\."],
    ),
    "twice": (
        {},
        {"names": lambda path: "norm"},
        [r"Used twice: 'norm\.weight' \(also for our 'norm/scale'\)"],
    ),
}


@pytest.mark.parametrize(("changes", "options", "messages"), WRONG.values(), ids=WRONG)
def test_errors_name_what_is_wrong_and_change_nothing(rng, changes, options, messages):
    variables, state = tiny(rng)
    for key, shape in changes.items():
        if shape is None:
            del state[key]
        else:
            state[key] = np.zeros(shape, np.float32)
    kept = jax.tree.map(np.copy, (variables, state))
    for call, args in (
        (from_torch, (state, variables)),
        (to_torch, (variables, state)),
    ):
        for message in messages:
            with pytest.raises(ValueError, match=message):
                call(*args, **options)
    jax.tree.map(np.testing.assert_array_equal, kept, (variables, state))


def test_errors_change_no_module():
    peer, model = mixed_torch(), Mixed(nnx.Rngs(0), momentum=0.9, unbiased=True)
    state = peer.state_dict()
    state["head.weight"] = torch.zeros(3, 4)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    with pytest.raises(ValueError, match=r"'head\.weight' has \(3, 4\)"):
        from_torch(state, model)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_skip_keeps_a_new_head(rng):
    variables, state = tiny(rng)
    variables["params"]["head"] = {"kernel": np.ones((4, 9), np.float32)}
    state["head.weight"] = np.zeros((1000, 4), np.float32)
    with pytest.raises(ValueError, match=r"head\.weight"):
        from_torch(state, variables)
    for skip in ("head/*", ["head/kernel"], lambda path: path.startswith("head")):
        ported = from_torch(state, variables, skip=skip)
        np.testing.assert_array_equal(ported["params"]["head"]["kernel"], 1)
        back = to_torch(ported, state, skip=skip)
        assert_states_equal(back, state)
    # Others are not kept.
    np.testing.assert_array_equal(
        ported["batch_stats"]["norm"]["mean"], state["norm.running_mean"]
    )


def test_names_by_dict_or_function(rng):
    variables, state = tiny(rng)
    renamed = {f"module.{k}".replace("norm", "bn"): v for k, v in state.items()}
    by_dict = {"conv": "module.conv", "norm": "module.bn"}
    by_function = lambda path: "module." + path.replace("norm", "bn")
    for names in (by_dict, by_function):
        ported = from_torch(renamed, variables, names=names)
        expected = from_torch(state, variables)
        jax.tree.map(np.testing.assert_array_equal, ported, expected)
        assert_states_equal(to_torch(ported, renamed, names=names), renamed)
    # What the dict lacks has the same name there.
    state["bn.weight"] = state.pop("norm.weight")
    with pytest.raises(
        ValueError, match=r"Not used: 'norm\.bias', 'norm\.running_mean'"
    ):
        from_torch(state, variables, names={"norm": "bn"})


MISMATCHED = {
    "momentum": ({"momentum": 0.99}, "next running statistics will differ", "=0.99"),
    "unbiased": ({"unbiased": False}, "`unbiased=True`", "unbiased=False"),
    "epsilon": ({"epsilon": 1e-3}, "outputs will differ", "epsilon=0.001"),
    "cumulative": ({"momentum": None}, "momentum=0.9", "momentum=None"),
}


@pytest.mark.parametrize(
    ("change", "effect", "found"), MISMATCHED.values(), ids=MISMATCHED
)
def test_other_conventions_warn(change, effect, found):
    peer = torch.nn.BatchNorm1d(3)
    right = torch_options(peer)
    options = {**right, **change}
    targets = {
        "dict": options,
        "layer": jbn.linen.BatchNorm(**options),
        "partial": partial(jbn.linen.BatchNorm, **options),
    }
    for norm in targets.values():
        for call in (
            lambda norm=norm: from_torch(peer, jbn.init(3), norm=norm),
            lambda norm=norm: to_torch(jbn.init(3), peer, norm=norm),
        ):
            with pytest.warns(UserWarning, match=effect) as caught:
                call()
            assert found in str(caught[0].message)
            assert len(caught) == 1
    module = jbn.nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match=effect):
        from_torch(peer, module)
    with pytest.warns(UserWarning, match=effect):
        to_torch(module, peer)
    # Filters make errors of warnings: there are none.
    from_torch(peer, jbn.init(3), norm=right)
    from_torch(peer, jbn.nnx.BatchNorm(3, **right, rngs=nnx.Rngs(0)))


def test_one_warning_for_all_layers_alike():
    peer = torch.nn.ModuleList(torch.nn.BatchNorm1d(3) for _ in range(4))
    tree = jbn.linen.BatchNorm(use_running_average=True).init(
        jax.random.key(0), jnp.zeros((2, 3))
    )
    variables = {k: {str(i): tree[k] for i in range(4)} for k in tree}
    # Flax's class is compared, too.
    with pytest.warns(
        UserWarning, match="'0' and 3 more needs `momentum=0.9, unb"
    ) as w:
        from_torch(peer, variables, norm=nn.BatchNorm)
    assert len(w) == 1


def test_frozen_layers_need_but_their_epsilon():
    peer = torch.nn.BatchNorm1d(3)
    from_torch(peer, jbn.init(3), norm=jbn.linen.FrozenBatchNorm)
    with pytest.warns(UserWarning, match="outputs will differ"):
        from_torch(
            peer, jbn.init(3), norm=partial(jbn.linen.FrozenBatchNorm, epsilon=0.1)
        )
    # torchvision's FrozenBatchNorm2d has no momentum.
    frozen = SimpleNamespace(eps=1e-5, running_mean=None)
    assert torch_options(frozen) == {"epsilon": 1e-5}


def test_no_other_library_is_imported():
    code = (
        "import sys, jbn.tools;"
        "print(*{'torch', 'keras', 'haiku', 'flax'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    # Flax is what the tools are for; it shows that the test can fail.
    assert result.stdout.split() == ["flax"]


@pytest.mark.usefixtures("untyped")
def test_wrong_types(rng):
    variables, state = tiny(rng)
    with pytest.raises(TypeError, match="module or a state dict; got list"):
        from_torch([1], variables)
    with pytest.raises(TypeError, match="dict with `params`"):
        from_torch(state, variables["params"])
    with pytest.raises(TypeError, match="batch norm module of PyTorch"):
        torch_options(torch.nn.Linear(2, 2))
