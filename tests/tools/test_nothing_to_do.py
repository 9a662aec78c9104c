"""What each tool says where it can do nothing: the table of the documentation."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn, nnx
from foreign import Net, NnxNet, NnxTorchlike, Torchlike, nnx_set, nnx_started, started

from jbn import tools


pytestmark = pytest.mark.usefixtures("standard_promotion", "untyped")
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "tools.md"
X = jnp.arange(24.0).reshape(8, 3)


def rows():
    """Model, API, tool and message of each row of the table."""
    table = PAGE.read_text().split("<!-- table nothing -->")[1].split("<!-- end")[0]
    model = message = ""
    for line in table.strip().splitlines()[2:]:
        own, api, names, said = (cell.strip() for cell in line.split("|")[1:-1])
        model = own or model
        message = message if said == "the same" else said
        for kind in ["Linen", "NNX"] if api == "both" else [api]:
            for tool in re.findall(r"`(\w+)`", names):
                name = f"{tool}-{kind}-{model}".strip("-")
                yield pytest.param(model, kind, tool, message, id=name)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.LayerNorm()(nn.Dense(3)(x))


class NnxPlain(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(x)


def linen(model):
    """A model, variables, and how to run them in training and at inference."""
    made = {
        "without batch norm": Plain(),
        "with a norm that is not recognized": Net(Torchlike, "training"),
        "whose paths `where=` misses": Net(functools.partial(nn.BatchNorm)),
    }[model]
    variables = started(made, X, False)
    train = lambda v, x: made.apply(v, x, True, mutable=["batch_stats"])
    infer = lambda v, x: made.apply(v, x, False, mutable=["batch_stats"])
    return made, variables, train, infer


def in_nnx(model):
    made = {
        "without batch norm": NnxPlain,
        "with a norm that is not recognized": lambda: nnx_started(NnxTorchlike),
        "whose paths `where=` misses": lambda: NnxNet(nnx.BatchNorm, nnx.Rngs(0)),
    }[model]()
    run = lambda m, x: m(x)
    return nnx_set(made, True) if hasattr(made, "norm") else made, made, run, run


def call(tool, model, kind):
    """Runs a tool on a model; returns what it returns."""
    where = {"where": "nrom"} if "misses" in model else {}
    if kind == "":
        made = variables = object()
        train = infer = lambda v, x: x
    else:
        made, variables, train, infer = (linen if kind == "Linen" else in_nnx)(model)
    inputs = (variables, X, False) if kind == "Linen" else (X,)
    parts = (
        variables
        if kind in ("", "Linen")
        else {
            "params": nnx.state(variables, nnx.Param),
            "batch_stats": nnx.state(variables, nnx.BatchStat),
        }
    )
    stats = parts if kind == "" else parts.get("batch_stats", {})
    if tool == "convert":
        new = tools.convert(made, **where)
        return new.apply(*inputs) if kind == "Linen" else new
    if tool in ("fold", "foldable"):
        return getattr(tools, tool)(made, *inputs, **where)
    if tool in ("inspect", "recalibrate", "population"):
        return getattr(tools, tool)(train, variables, [X], **where)
    if tool == "adapt":
        return tools.adapt(train, variables, [X], prior=1, **where)
    if tool == "stream":
        return tools.stream(infer, **where).init(variables, X)
    if tool == "merge":
        return tools.merge([stats, stats])
    if tool == "fed_bn":
        return tools.fed_bn(parts, parts, **where)
    if tool == "freeze":
        return tools.freeze(variables, **(where or {"where": "*"}))
    return getattr(tools, tool)(variables)


@pytest.mark.parametrize(("model", "kind", "tool", "message"), [*rows()])
def test_the_message_is_that_of_the_table(model, kind, tool, message):
    how, _, text = message.partition(": ")
    words = [re.escape(word) for word in text.replace("TOOL", tool).split()]
    pattern = r"\s+".join(words).replace(r"\.\.\.", "(?s:.*)")
    match = rf"\A{pattern}(\n---|\Z)"  # (A note of JAX may follow.)
    if how == "none":
        labels = jax.tree.leaves(call(tool, model, kind))
        assert set(labels) <= {"norm", "weight", "bias", True, False}
    elif how == "the report":
        (said,) = call(tool, model, kind).values()
        assert re.match(match, said)
    elif how == "UserWarning":
        with pytest.warns(UserWarning, match=match):
            call(tool, model, kind)
    else:
        error = {"ValueError": ValueError, "TypeError": TypeError}[how]
        with pytest.raises(error, match=match):
            call(tool, model, kind)


def test_the_table_has_each_tool_on_each_model():
    found = {(row.values[0], row.values[2]) for row in rows()}
    models = {model for model, _ in found}
    assert len(models) == 4
    names = "convert inspect recalibrate population adapt stream fold foldable fed_bn"
    for tool in names.split():
        assert {model for model, name in found if name == tool} == models
    for tool in ("kinds", "decays", "merge"):  # They take no `where`.
        assert len({model for model, name in found if name == tool}) == 3
