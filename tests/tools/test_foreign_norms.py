"""Tools on batch norms that neither Flax nor we wrote, against NumPy."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from foreign import (
    MODELS,
    NNX,
    TORCH,
    Copied,
    Net,
    NnxTorchlike,
    Torchlike,
    nnx_set,
    nnx_started,
    started,
)

import jbn.linen
import jbn.nnx
from jbn.tools import (
    adapt,
    convert,
    converting,
    decays,
    fed_bn,
    fold,
    foldable,
    inspect,
    kinds,
    merge,
    population,
    recalibrate,
)


pytestmark = pytest.mark.usefixtures("standard_promotion")
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


linen = pytest.mark.parametrize(
    ("model", "also", "words", "momentum"), MODELS.values(), ids=MODELS
)


def hidden(variables, x):
    """What the norm of a `Net` sees."""
    dense = variables["params"]["Dense_0"]
    return np.asarray(x, float) @ np.asarray(dense["kernel"], float) + dense["bias"]


def trained(model, variables, x, *args):
    return model.apply(variables, x, *args, mutable=["batch_stats"])


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(8, 3)) * 2 + 1, jnp.float32)


# --- Linen ---------------------------------------------------------------------------


@linen
def test_convert_computes_the_same(model, also, words, momentum, x):
    variables = started(model, x, False)
    new = convert(model, also=also)
    fresh = new.init(jax.random.key(0), x, False)
    assert jax.tree.structure(fresh) == jax.tree.structure(variables)
    close(new.apply(variables, x, False), model.apply(variables, x, False))
    y, updated = trained(new, variables, x, True)
    wanted, stats = trained(model, variables, x, True)
    close(y, wanted)
    h = hidden(variables, x)
    for name, batch in zip(words[:2], (h.mean(0), h.var(0)), strict=True):
        old = variables["batch_stats"]["norm"][name]
        close(updated["batch_stats"]["norm"][name], stats["batch_stats"]["norm"][name])
        close(
            updated["batch_stats"]["norm"][name],
            momentum * np.asarray(old) + (1 - momentum) * batch,
        )


@linen
def test_convert_to_another_class(model, also, words, momentum, x):
    variables = started(model, x, False)
    frozen = convert(model, jbn.linen.FrozenBatchNorm, also=also)
    y, updated = trained(frozen, variables, x, True)
    close(y, model.apply(variables, x, False))
    node = updated["batch_stats"]["norm"]
    np.testing.assert_array_equal(
        node[words[0]], variables["batch_stats"]["norm"][words[0]]
    )
    debiased = convert(model, also=also, debias=True)
    fresh = debiased.init(jax.random.key(0), x, True)
    assert {"weight", *words[:2]} == set(fresh["batch_stats"]["norm"])
    _, updated = jax.jit(lambda v: trained(debiased, v, x, True))(fresh)
    h = hidden(fresh, x)
    close(updated["batch_stats"]["norm"][words[0]], h.mean(0))
    close(updated["batch_stats"]["norm"][words[1]], h.var(0))


@linen
def test_statistics_of_data(model, also, words, momentum, x):
    variables = started(model, x, False)
    apply = lambda v, x: trained(model, v, x, True)
    batches = [x[:5], x[5:]]
    h = hidden(variables, x)
    new = recalibrate(apply, variables, batches, also=also)
    node = new["batch_stats"]["norm"]
    close(node[words[0]], h.mean(0))
    close(node[words[1]], h.var(0))
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    close(population(apply, variables, batches, also=also)["norm"].mean, h.mean(0))
    adapted = adapt(apply, variables, [x], prior=8, also=also)["batch_stats"]["norm"]
    old = np.asarray(variables["batch_stats"]["norm"][words[0]])
    close(adapted[words[0]], (old + h.mean(0)) / 2)
    (layer,) = inspect(apply, variables, batches, also=also).layers
    assert (layer.layer, layer.module.epsilon) == ("norm", 1e-2)
    assert layer.module.momentum == pytest.approx(momentum)
    close(layer.data_mean, h.mean(0))
    close(layer.mean, old)
    close(layer.scale, variables["params"]["norm"][words[2]])


@linen
def test_fold(model, also, words, momentum, x):
    variables = started(model, x, False)
    assert foldable(model, variables, x, False, also=also) == {
        "norm": "folded into Dense_0"
    }
    folded = fold(model, variables, x, False, also=also)
    assert set(folded.variables["params"]) == {"Dense_0", "Dense_1"}
    wanted = model.apply(variables, x, False)
    close(folded.apply(folded.variables, x, False), wanted)
    with pytest.raises(ValueError, match="'norm' is folded, for inference"):
        folded.apply(folded.variables, x, True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="not those of the folded model"):
        folded.apply(variables, x, False)
    with pytest.raises(ValueError, match="'norm' normalizes by the batch"):
        fold(model, variables, x, True, also=also)


@linen
def test_labels_and_merge(model, also, words, momentum, x):
    variables = started(model, x, False)
    labels = kinds(variables, also=also)["norm"]
    assert set(labels.values()) == {"norm"}
    assert decays(variables, also=also)["norm"][words[2]] is False
    other = jax.tree.map(lambda v: v + 1, variables)
    parts = [v["batch_stats"] for v in (variables, other)]
    (a, b), merged = parts, merge(parts, also=also)["norm"]
    means = np.stack([p["norm"][words[0]] for p in (a, b)])
    close(merged[words[0]], means.mean(0))
    scatter = np.mean([p["norm"][words[1]] for p in (a, b)], 0) + means.var(0)
    close(merged[words[1]], scatter)
    mine = fed_bn(other, variables, also=also)
    np.testing.assert_array_equal(
        mine["params"]["norm"][words[2]], variables["params"]["norm"][words[2]]
    )


def test_a_class_alone_is_taken_by_its_own_names(x):
    class Extra(Copied):
        """With a field and a statistic that Flax's has not."""

        temperature: float = 1.0

        @nn.compact
        def __call__(self, x, use_running_average=None):
            self.variable("batch_stats", "steps", jnp.zeros, ())
            return super().__call__(x, use_running_average)

    model = Net(Extra)
    variables = started(model, x, False)
    with pytest.raises(ValueError, match=r"'norm' has statistics, but calls them"):
        convert(model).apply(variables, x, False)
    new = convert(model, also=[Extra])
    close(new.apply(variables, x, False), model.apply(variables, x, False))
    _, updated = trained(new, variables, x, True)
    assert set(updated["batch_stats"]["norm"]) == {"mean", "var", "steps"}


def test_mode_by_mutability_and_by_a_function(x):
    class Plain(nn.Module):
        """No field and no argument says the mode, or epsilon."""

        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
            var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
            if not self.is_mutable_collection("batch_stats"):
                return (x - mean.value) / jnp.sqrt(var.value + 0.5)
            mean.value, var.value = x.mean(0), x.var(0)
            return (x - mean.value) / jnp.sqrt(var.value + 0.5)

    model = Plain()
    variables = started(model, x)
    with pytest.raises(ValueError, match="has statistics, but no field `epsilon`"):
        convert(model).apply(variables, x)
    with pytest.raises(ValueError, match="no field `momentum`"):
        convert(model, also={Plain: {"epsilon": 0.5}}).apply(variables, x)
    new = convert(model, also={Plain: {"epsilon": 0.5, "momentum": 0.0}})
    close(new.apply(variables, x), model.apply(variables, x))
    (got, stats), (want, wanted) = (
        trained(new, variables, x),
        trained(model, variables, x),
    )
    close(got, want)
    close(stats["batch_stats"]["var"], wanted["batch_stats"]["var"])
    fixed = convert(
        model,
        also={Plain: {"epsilon": 0.5, "use_running_average": lambda layer: True}},
        momentum=0.5,
    )
    close(trained(fixed, variables, x)[0], model.apply(variables, x))


def test_scan_and_remat(x):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            norm = nn.remat(Copied, static_argnums=2)
            return norm(name="norm")(nn.Dense(3)(x), False), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            split = {"params": True}
            stack = nn.scan(Block, variable_axes=axes, split_rngs=split, length=2)
            return stack(name="stack")(x, None)[0]

    model = Stack()
    variables = started(model, x)
    (y, stats), (want, wanted) = (
        trained(m, variables, x) for m in (convert(model), model)
    )
    close(y, want)
    jax.tree.map(close, stats, wanted)


def test_fold_tries_a_layer_that_it_does_not_know(x):
    class OnePlus(Copied):
        """Is not what its names say: the scale is one plus."""

        @nn.compact
        def __call__(self, x, use_running_average=None):
            y = super().__call__(x, use_running_average)
            return y + y

    model = Net(OnePlus)
    variables = started(model, x, False)
    report = foldable(model, variables, x, False)
    assert report["norm"].startswith("kept: its output is not scale * (x - mean)")
    model = Net(functools.partial(Torchlike, eps=0.5), "training")
    wrong = {Torchlike: TORCH | {"epsilon": 0.1}}
    report = foldable(
        model, variables := started(model, x, False), x, False, also=wrong
    )
    assert report["norm"].startswith("kept: its output is not scale * (x - mean)")


def test_a_converted_model_is_folded(x):
    model = Net(Copied)
    variables = started(model, x, False)
    frozen = convert(model, jbn.linen.FrozenBatchNorm)
    folded = fold(frozen, variables, x, True)
    assert folded.report == {"norm": "folded into Dense_0"}
    close(folded.apply(folded.variables, x, True), model.apply(variables, x, False))


def test_fold_takes_a_model_by_what_is_mutable(x):
    class Block(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            train = self.is_mutable_collection("batch_stats")
            return self.norm(use_running_average=not train)(nn.Dense(3)(x))

    for norm in (nn.BatchNorm, jbn.linen.BatchNorm, Copied):
        model = Block(norm)
        variables = started(model, x)
        folded = fold(model, variables, x)
        close(folded.apply(folded.variables, x), model.apply(variables, x))
        for mutable in ("batch_stats", True, ["batch_stats", "other"]):
            with pytest.raises(ValueError, match="normalizes by the batch"):
                fold(model, variables, x, mutable=mutable)


# --- NNX -----------------------------------------------------------------------------


in_nnx = pytest.mark.parametrize(("cls", "also", "words"), NNX.values(), ids=NNX)


@in_nnx
def test_nnx_convert(cls, also, words, x):
    model = nnx_started(cls)
    new = convert(model, also=also)
    assert isinstance(new.norm, jbn.nnx.BatchNorm)
    close(nnx_set(new, True)(x), nnx_set(model, True)(x))
    close(nnx_set(new, False)(x), nnx_set(model, False)(x))
    close(new.norm.mean[...], getattr(model.norm, words[0])[...])
    close(new.norm.var[...], getattr(model.norm, words[1])[...])


@in_nnx
def test_nnx_statistics_of_data(cls, also, words, x):
    model = nnx_started(cls)
    h = np.asarray(model.first(x), float)
    apply = lambda m, x: m(x)
    new = recalibrate(apply, model, [x[:5], x[5:]], also=also)
    assert type(new.norm) is cls
    close(getattr(new.norm, words[0])[...], h.mean(0))
    close(getattr(new.norm, words[1])[...], h.var(0))
    old = getattr(model.norm, words[0])[...]
    adapted = adapt(apply, model, [x], prior=8, also=also)
    close(getattr(adapted.norm, words[0])[...], (old + h.mean(0)) / 2)
    (layer,) = inspect(apply, model, [x], also=also).layers
    close(layer.data_var, h.var(0))
    assert layer.module.momentum == pytest.approx(0.7)


@in_nnx
def test_nnx_fold_and_labels(cls, also, words, x):
    model = nnx_set(nnx_started(cls), True)
    assert foldable(model, x, also=also) == {"norm": "folded into first"}
    folded = fold(model, x, also=also)
    close(folded(x), model(x))
    assert not {*words} & set(vars(folded.norm))
    labels = flax.traverse_util.flatten_dict(nnx.to_pure_dict(kinds(model, also=also)))
    assert labels["norm", words[2]] == labels["norm", "bias"] == "norm"
    with pytest.raises(ValueError, match="'norm' normalizes by the batch"):
        fold(nnx_set(model, False), x, also=also)


# --- what is not recognized is named, and nothing found is an error ------------------


def tries(model, variables, x):
    """Each tool that runs a Linen model, by name."""
    apply = lambda v, x: trained(model, v, x, True)
    return {
        "convert": lambda **k: convert(model, **k).apply(variables, x, False),
        "recalibrate": lambda **k: recalibrate(apply, variables, [x], **k),
        "population": lambda **k: population(apply, variables, [x], **k),
        "adapt": lambda **k: adapt(apply, variables, [x], prior=1, **k),
        "inspect": lambda **k: inspect(apply, variables, [x], **k),
        "fold": lambda **k: fold(model, variables, x, False, **k),
        "foldable": lambda **k: foldable(model, variables, x, False, **k),
    }


TOOLS = "convert", "recalibrate", "population", "adapt", "inspect", "fold", "foldable"


@pytest.mark.parametrize("tool", TOOLS)
def test_linen_with_nothing_that_is_meant(tool, x):
    model = Net(functools.partial(nn.BatchNorm, momentum=0.9))
    run = tries(model, started(model, x, False), x)[tool]
    with pytest.raises(
        ValueError, match=rf"`{tool}` found no .*where='nrom'.*\['norm'\]"
    ):
        run(where="nrom")


@pytest.mark.parametrize("tool", [t for t in TOOLS if t != "foldable"])
def test_linen_with_nothing_that_is_recognized(tool, x):
    model = Net(Torchlike, "training")
    run = tries(model, started(model, x, False), x)[tool]
    text = "'norm' has statistics, but calls them `running_mean`, `running_var`"
    with pytest.raises(ValueError, match=rf"`{tool}` (?s:.*){text}.*`also=Torchlike`"):
        run()


def test_foldable_names_what_is_not_recognized(x):
    model = Net(Torchlike, "training")
    report = foldable(model, started(model, x, False), x, False)
    assert report["norm"].startswith("kept: 'norm' has statistics, but calls them")


def test_linen_init_says_it_too(x):
    with pytest.raises(ValueError, match="`convert` found no batch norm"):
        convert(Net(nn.BatchNorm), where="nrom").init(jax.random.key(0), x, False)
    with pytest.raises(ValueError, match="`converting` found no batch norm"):
        with converting(where="nrom"):
            Net(nn.BatchNorm).init(jax.random.key(0), x, False)
    with converting() as paths:
        pass
    assert paths == []


def test_one_of_two_is_warned_of(x):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(not train, name="known")(x)
            return Torchlike(name="unknown")(x, train)

    model = Two()
    variables = started(model, x, False)
    text = "skips a layer: 'unknown' has statistics"
    with pytest.warns(UserWarning, match=f"`convert` {text}"):
        convert(model).apply(variables, x, False)
    with pytest.warns(UserWarning, match=f"`kinds` {text}"):
        kinds(variables)
    with pytest.warns(UserWarning, match=f"`merge` {text}"):
        merge([variables["batch_stats"]] * 2)
    convert(model, where="known").apply(variables, x, False)
    with pytest.raises(ValueError, match="`merge` found no batch norm"):
        merge([{"a": {"running_mean": jnp.ones(2), "running_var": jnp.ones(2)}}])
    with pytest.raises(ValueError, match=r"`fed_bn` found .*where='nrom'.*'known'"):
        fed_bn(variables, variables, where="nrom")


def test_nnx_names_what_is_not_recognized(x):
    model = nnx_started(NnxTorchlike)
    text = r"'NnxTorchlike' has statistics, but calls them.*`also=NnxTorchlike`"
    apply = lambda m, x: m(x)
    runs = {
        "convert": lambda: convert(model),
        "recalibrate": lambda: recalibrate(apply, model, [x]),
        "adapt": lambda: adapt(apply, model, [x], prior=1),
        "inspect": lambda: inspect(apply, model, [x]),
        "fold": lambda: fold(model, x),
    }
    for tool, run in runs.items():
        with pytest.raises(ValueError, match=rf"`{tool}`(?s:.*){text}"):
            run()
    with pytest.warns(UserWarning, match=text):
        decays(model)


def test_statistics_of_other_kinds_are_no_norms(x):
    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.SpectralNorm(nn.Dense(3))(x, update_stats=train)
            return nn.BatchNorm(not train, name="norm")(x)

    model = Spectral()
    variables = model.init(jax.random.key(0), x, False)
    convert(model).apply(variables, x, False)
    kinds(variables)
    merge([variables["batch_stats"]] * 2)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("also", "error", "text"),
    [
        ([3], TypeError, "`also` takes classes"),
        ({Copied: "mean"}, TypeError, "a dict of names"),
        ({Copied: {"epslon": 1}}, ValueError, "Did you mean 'epsilon'"),
        ({Copied: {"mean": 3}}, TypeError, "the name of a variable"),
    ],
)
def test_what_also_takes(also, error, text):
    with pytest.raises(error, match=text):
        convert(Copied(), also=also)


def test_calls_that_ours_does_not_know_are_refused(x):
    class Padded(Copied):
        @nn.compact
        def __call__(self, x, use_running_average=None, paddings=None):
            return super().__call__(x, use_running_average)

    model = Padded(use_running_average=True)
    variables = started(model, x)
    convert(model).apply(variables, x)
    with pytest.raises(ValueError, match="`Padded` is called with `paddings`"):
        convert(model).apply(variables, x, paddings=jnp.zeros(8))
