"""Tools on models that ask for a norm's class, and call it by its own arguments."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from foreign import (
    TORCH,
    Net,
    NnxByClass,
    NnxOwnCall,
    NnxTorchlike,
    NnxTurned,
    Padded,
    PaddedNet,
    Turned,
    nnx_started,
    started,
)

import jbn.linen
import jbn.nnx
from jbn.tools import adapt, convert, fold, foldable, inspect, population, recalibrate


pytestmark = pytest.mark.usefixtures("standard_promotion")
# (Flax's fast variance is the less exact.)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)

ROWS = {"mask": lambda call: None if call["rows"] is None else call["rows"][:, None]}
OWN = {NnxOwnCall: TORCH | ROWS}
by_class = pytest.mark.parametrize(
    ("cls", "also"), [(NnxOwnCall, OWN), (nnx.BatchNorm, None)], ids=["own", "flax"]
)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(8, 4)) * 2 + 1, jnp.float32)


by_its_class = functools.partial(nnx_started, net=NnxByClass)


def statistics(model):
    return jax.tree.leaves(nnx.state(model, nnx.BatchStat))


@by_class
def test_a_converted_layer_passes_for_the_class_of_the_old(cls, also, x):
    old = by_its_class(cls)
    new = convert(old, also=also)
    layer = new.layers[1]
    assert isinstance(layer, cls)
    assert isinstance(layer, jbn.nnx.BatchNorm)
    for train in (False, True, False):
        close(new(x, train), old(x, train))
    close(statistics(new), statistics(old))
    close(nnx.jit(lambda m, x: m(x, True))(new, x), old(x, True))
    # Frozen by another conversion.
    frozen = convert(new, jbn.nnx.FrozenBatchNorm)
    before = statistics(frozen)
    close(frozen(x, True), new(x, False))
    close(statistics(frozen), before)


@by_class
def test_statistics_of_a_model_that_asks_for_classes(cls, also, x):
    model = by_its_class(cls)
    h = np.asarray(model.layers[0](x), float)
    apply = lambda m, x: m(x, True)
    for source, names in ((model, also), (convert(model, also=also), None)):
        new = recalibrate(apply, source, [x[:5], x[5:]], also=names)
        close(statistics(new)[:2], [h.mean(0), h.var(0)])
        (layer,) = inspect(apply, source, [x], also=names).layers
        close(layer.data_mean, h.mean(0))
        adapted = adapt(apply, source, [x], prior=8, also=names)
        close(statistics(adapted)[0], (statistics(model)[0] + h.mean(0)) / 2)


@by_class
def test_a_folded_layer_passes_for_the_class_of_the_old(cls, also, x):
    model = by_its_class(cls)
    wanted = model(x)
    for source, names in ((model, also), (convert(model, also=also), None)):
        folded = fold(source, x, also=names)
        close(folded(x), wanted)
        assert isinstance(folded.layers[1], cls)
        assert not statistics(folded)
        with pytest.raises(ValueError, match="'layers/1' is folded, for inference"):
            folded(x, True)
        # It is no batch norm to the tools.
        with pytest.raises(ValueError, match="`convert` found no batch norm"):
            convert(folded, also=also)


@by_class
def test_such_layers_are_pickled_and_split(cls, also, x):
    model = by_its_class(cls)
    # (A lambda is not pickled.)
    names = {ours: name for ours, name in TORCH.items() if isinstance(name, str)}
    also = also and {NnxOwnCall: names}
    new = convert(model, also=also)
    for changed in (new, fold(new, x), fold(model, x, also=also)):
        again = pickle.loads(pickle.dumps(changed))
        assert type(again.layers[1]) is type(changed.layers[1])
        close(again(x), model(x))
        close(nnx.merge(*pickle.loads(pickle.dumps(nnx.split(changed))))(x), model(x))


def test_a_mask_by_another_name(x):
    old, rows = by_its_class(NnxOwnCall), jnp.arange(8) < 5
    new = convert(old, also=OWN)
    close(new(x, True, rows=rows), old(x, True, rows=rows))
    close(statistics(new), statistics(old))
    h = np.asarray(old.layers[0](x[:5]), float)
    apply = lambda m, x: m(x, True, rows=rows)
    (moments,) = population(apply, old, [x], also=OWN).values()
    close(moments.mean, h.mean(0))
    named = convert(old, also={NnxOwnCall: TORCH | {"weights": "rows"}})
    close(named(x, True, rows=rows[:, None]), old(x, True, rows=rows))
    # Arguments that no function reads have no meaning for the layer.
    graph = jnp.zeros(8, int)
    close(new(x, True, graph), old(x, True, graph))
    close(fold(old, x, graph=graph, also=OWN)(x, graph=graph), old(x))


def test_arguments_without_a_meaning_are_refused(x):
    old, graph = by_its_class(NnxOwnCall), jnp.zeros(8, int)
    also = {NnxOwnCall: TORCH}
    text = r"`NnxOwnCall` is called with `graph`.*`also=\{NnxOwnCall: \{\"mask\""
    with pytest.raises(ValueError, match=text):
        convert(old, also=also)(x, False, graph)
    report = foldable(old, x, graph=graph, also=also)
    assert report["layers/1"].startswith("kept: `NnxOwnCall` is called with `graph`")
    ignoring = {NnxOwnCall: TORCH | {"mask": None}}
    close(convert(old, also=ignoring)(x, True, graph), old(x, True, graph))


def test_paddings_are_a_mask(rng):
    x = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
    paddings = (jnp.arange(5) >= jnp.array([[5], [3], [4]])).astype(jnp.float32)
    model = PaddedNet()
    variables = started(model, x, paddings, False)
    with pytest.raises(ValueError, match="`Padded` is called with `paddings`"):
        convert(model, also=Padded).apply(variables, x, paddings, False)
    real = lambda call: call["paddings"][..., None] < 0.5
    also = {Padded: {"mask": real}}
    new = convert(model, also=also, masked_output="zero")
    train = lambda m: m.apply(variables, x, paddings, True, mutable=["batch_stats"])
    (y, stats), (wanted, updated) = train(new), train(model)
    close(y, wanted)
    jax.tree.map(close, stats, updated)
    infer = lambda m: m.apply(variables, x, paddings, False)
    close(infer(new), infer(model))
    dense = variables["params"]["Dense_0"]
    h = np.asarray(x @ dense["kernel"] + dense["bias"], float)[paddings < 0.5]
    apply = lambda v, x: model.apply(v, x, paddings, True, mutable=["batch_stats"])
    node = recalibrate(apply, variables, [x], also=also)["batch_stats"]["norm"]
    close(node["mean"], h.mean(0))
    close(node["var"], h.var(0))
    report = foldable(model, variables, x, paddings, False, also=also)
    assert report == {"norm": "kept: it is called with a mask or weights"}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("given", ["padding", 3])
def test_names_of_arguments_are_checked(given):
    with pytest.raises(ValueError, match=r"to an argument of the call of `Padded`"):
        convert(PaddedNet(), also={Padded: {"mask": given}})


def test_a_subclass_of_flaxs_with_another_flag(x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return Turned(momentum=0.7, name="norm")(nn.Dense(4)(x), train)

    model = Model()
    variables = started(model, x, False)
    new = convert(model)
    close(new.apply(variables, x, False), model.apply(variables, x, False))
    train = lambda m: m.apply(variables, x, True, mutable=["batch_stats"])
    jax.tree.map(close, train(new), train(model))
    assert foldable(model, variables, x, False)["norm"].endswith("`Turned`")


def test_a_subclass_of_flaxs_with_another_flag_in_nnx(x):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.norm = NnxTurned(4, rngs=rngs)

        def __call__(self, x, train):
            return self.norm(self.dense(x), train)

    old = Model(nnx.Rngs(0))
    old(x, True)
    new = convert(old)
    assert isinstance(new.norm, NnxTurned)
    close(new(x, False), old(x, False))
    close(new(x, True), old(x, True))
    close(statistics(new), statistics(old))
    assert foldable(old, x, False)["norm"].endswith("`NnxTurned`")
    folded = fold(new, x, False)
    close(folded(x, False), old(x, False))
    with pytest.raises(ValueError, match="'norm' is folded, for inference"):
        folded(x, True)


def test_the_mode_is_set_by_their_field(x):
    class Flagged(NnxTorchlike):
        def __init__(self, size, *, rngs):
            super().__init__(size, rngs=rngs)
            del self.use_running_average
            self.training = True

        def __call__(self, x):
            self.use_running_average = not self.training
            y = super().__call__(x)
            del self.use_running_average
            return y

    old, x = nnx_started(Flagged), x[:, :3]
    new = convert(old, also={Flagged: TORCH})
    again = convert(new)
    for training in (True, False):
        for model in (old, new, again):
            model.norm.training = training
        wanted = old(x)
        close(new(x), wanted)
        close(again(x), wanted)
    new.train()
    new.norm.training = False
    assert isinstance(new.norm, Flagged)


def test_ours_passes_for_flaxs():
    assert isinstance(jbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.BatchNorm)


def test_convert_says_that_a_model_without_norms_has_none(x):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.LayerNorm()(nn.Dense(3)(x))

    variables = Plain().init(jax.random.key(0), x, False)
    with pytest.raises(ValueError, match=r"`convert` found no batch norm.*has none"):
        convert(Plain()).apply(variables, x, False)

    class Skips(nn.Module):
        """A call that does not reach the norm is fine."""

        @nn.compact
        def __call__(self, x, inner):
            x = nn.Dense(3)(x)
            return x if inner else nn.BatchNorm(True, name="norm")(x)

    variables = Skips().init(jax.random.key(0), x, False)
    wanted = Skips().apply(variables, x, True)
    close(convert(Skips()).apply(variables, x, True), wanted)


def test_where_leaves_such_layers_alone(x):
    old = by_its_class(NnxOwnCall)
    with pytest.raises(ValueError, match=r"where='layers/3'.*\['layers/1'\]"):
        convert(old, where="layers/3", also=OWN)
    model = Net(functools.partial(nn.BatchNorm, momentum=0.7))
    variables = started(model, x, False)
    close(convert(model).apply(variables, x, False), model.apply(variables, x, False))
    assert isinstance(convert(old, also=OWN).layers[3], nnx.LayerNorm)
