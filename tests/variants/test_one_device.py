"""Every method on one device, where sums take forms of their own by size and layout.

Arrays of less than 2**15 elements, and of more; features last and first. Values and
gradients are those of the definitions in `reference.py`, in float64.
"""

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from differentiation import QUICKLY
from flax import nnx
from jax.experimental.sparse import BCOO
from ways import on

import jbn
import jbn.nnx


KINDS = 3  # domains, or classes
EPSILON = 0.7  # of the size of the variance


@dataclasses.dataclass(frozen=True)
class Case:
    """A method, the shape of its input, and what has a scale, a bias and an id."""

    method: str
    shape: tuple[int, ...]
    axis: int = -1
    affine: str = "features"  # or "kinds", or "elements"
    ids: str | None = None  # the argument's name
    ids_axes: int = 1  # how many of the leading axes have an id each
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def labels(shape, ids_axes=1, axis=-1, **settings):
    method = "conditional_batch_norm"
    return Case(method, shape, axis, "kinds", "labels", ids_axes, settings)


def maps(shape, axis=-1, **settings):
    return Case("conditional_batch_norm", shape, axis, "elements", settings=settings)


# Arrays of 33,600 elements, of which seven parts of the rows can be added at once.
ROWS, IMAGES, FIRST = (2100, 16), (7, 15, 20, 16), (7, 16, 300)

CONDITIONAL = {
    "labels of rows": labels((12, 3)),
    "labels of images": labels((8, 4, 4, 3)),
    "maps of labels": labels((3, 4, 4, 3), 3),
    "one label": labels((8, 4, 4, 3), 0),
    "labels, features first": labels((8, 3, 4, 4), axis=1),
    "scale and bias": maps((4, 2, 3, 5)),
    "scale and bias, features first": maps((4, 3, 2, 5), axis=1, one_plus=True),
    "labels of rows, large": labels(ROWS),
    "labels of images, large": labels(IMAGES, one_plus=True),
    "maps of labels, large": labels(IMAGES, 3),
    "labels, features first, large": labels(FIRST, axis=1),
    "scale and bias, large": maps(IMAGES),
    "scale and bias, features first, large": maps(FIRST, axis=1),
}
OPTIONS = {
    "batch_norm": {},
    "batch_renorm": {"r_max": 1.05, "d_max": 0.1},
    "ghost_batch_norm": {"num_groups": 3},
    "domain_batch_norm": {},
    "frozen_batch_norm": {"freeze_stats": False, "freeze_affine": False},
}
OTHERS = {
    f"{method}, {name}": Case(
        method,
        shape,
        axis,
        ids="domain" if method == "domain_batch_norm" else None,
        settings=options,
    )
    for method, options in OPTIONS.items()
    for name, shape, axis in (
        ("small", (8, 4, 4, 3), -1),
        ("large", ROWS, -1),
        ("large, features first", FIRST, 1),
    )
}
CASES = CONDITIONAL | OTHERS
# Those that are much like others.
SLOW = (
    "one label",
    "maps of labels",
    "labels, features first",
    "scale and bias, features first",
    "labels of rows, large",
    "maps of labels, large",
    "labels, features first, large",
    "scale and bias, large",
)


class Problem(NamedTuple):
    """All arrays of a call."""

    x: Any
    scale: Any
    bias: Any
    running: Any
    ids: Any
    ct: Any


def problem(name: str) -> Problem:
    """Random arguments, in float64; the same for the same name."""
    case, rng = CASES[name], np.random.default_rng(zlib.crc32(name.encode()))
    axis = case.axis % len(case.shape)
    rows = [a for a in range(len(case.shape)) if a != axis]
    features = (case.shape[axis],)
    # A scale for each element, and a bias that is the same along the last of the rows.
    flat = [1 if a == rows[-1] else n for a, n in enumerate(case.shape)]
    scale, bias = {
        "features": (features, features),
        "kinds": ((KINDS, *features), (KINDS, *features)),
        "elements": (case.shape, flat),
    }[case.affine]
    stats = (KINDS, *features) if case.ids == "domain" else features
    ids = [case.shape[a] for a in rows[: case.ids_axes]]
    return Problem(
        1.5 * rng.standard_normal(case.shape) + 2,
        rng.standard_normal(scale),
        rng.standard_normal(bias),
        reference.Running(2 + rng.standard_normal(stats), rng.uniform(0.5, 2, stats)),
        rng.integers(KINDS, size=ids),
        rng.standard_normal(case.shape),
    )


def ours(case: Case, p: Problem, **options):
    """Output and new statistics of jbn."""
    params = jbn.Params(p.scale, p.bias)
    if case.affine == "elements":
        options |= {"scale": p.scale, "bias": p.bias}
        params = None
    return getattr(jbn, case.method)(
        p.x,
        params,
        jbn.BatchStats(*p.running),
        axis=case.axis,
        epsilon=EPSILON,
        **options,
    )


def theirs(case: Case, p: Problem, **options):
    """Those of the definition."""
    return getattr(reference, case.method)(
        p.x,
        reference.Affine(p.scale, p.bias),
        p.running,
        weights=jnp.ones(()),
        axis=case.axis,
        epsilon=EPSILON,
        **options,
    )


class Step(NamedTuple):
    y: Any
    stats: Any
    grads: Any


def both_modes(run, name: str, p: Problem):
    """What is computed in training, and at inference."""
    case = CASES[name]
    ids = {} if case.ids is None else {case.ids: p.ids}

    def loss(args, mode):
        y, new = run(
            case, p._replace(**args), use_running_average=mode, **case.settings, **ids
        )
        return (y * p.ct).sum(), (y, *new[:2])

    args = {"x": p.x, "scale": p.scale, "bias": p.bias}

    def step(mode):
        (_, (y, *new)), grads = jax.value_and_grad(loss, has_aux=True)(args, mode)
        return Step(y, new, grads)

    return {"training": step(False), "inference": step(True)}


@functools.cache
def expected(name: str):
    run = functools.partial(both_modes, theirs, name)
    return jax.jit(run, compiler_options=QUICKLY)(problem(name))


def assert_close(got, want, tolerance=1e-9):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def check(name):
    run = functools.partial(both_modes, ours, name)
    got = jax.jit(run, compiler_options=QUICKLY)(problem(name))
    assert_close(got, expected(name))


@on("one device")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in CONDITIONAL
    ],
)
@pytest.mark.usefixtures("x64")
def test_a_scale_for_each_row(name):
    check(name)


@pytest.mark.sweep
@on("split", "as on a GPU")
@pytest.mark.parametrize("name", [n for n in CONDITIONAL if "large" not in n])
@pytest.mark.usefixtures("x64")
def test_a_scale_for_each_row_in_other_forms(name):
    check(name)


@pytest.mark.sweep
@on("one device")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.usefixtures("x64")
def test_every_other_method(name):
    check(name)


@on("one device")
@pytest.mark.parametrize(
    ("shape", "n_dense"),
    [
        ((12, 3), 1),
        pytest.param((12, 3), 0, marks=pytest.mark.slow),
        pytest.param(ROWS, 1, marks=pytest.mark.slow),
        pytest.param(ROWS, 0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("x64")
def test_sparse_arrays(shape, n_dense, rng):
    """As the dense array, of which elements are stored, or whole rows."""
    stored = rng.random((shape[0], 1) if n_dense else shape) < 0.6
    dense = rng.standard_normal(shape) * stored
    index = np.argwhere(stored)[:, : 2 - n_dense]
    where = tuple(index.T)
    scale, bias, mean = rng.standard_normal((3, shape[1]))
    running = jbn.BatchStats(jnp.asarray(mean), jnp.asarray(mean**2 + 0.5))
    ct = rng.standard_normal(shape)

    def ours(data, scale, bias):
        y, new = jbn.sparse_batch_norm(
            BCOO((data, jnp.asarray(index)), shape=shape, unique_indices=True),
            jbn.Params(scale, bias),
            running,
            use_running_average=False,
            epsilon=EPSILON,
        )
        y = jnp.zeros(shape).at[where].set(y.values.data) + y.background[None]
        return (y * ct).sum(), (y, *new[:2])

    def theirs(x, scale, bias):
        y, new = reference.batch_norm(
            x,
            reference.Affine(scale, bias),
            reference.Running(*running[:2]),
            weights=jnp.ones(()),
            epsilon=EPSILON,
        )
        return (y * ct).sum(), (y, *new)

    def run(f, x):
        grad = jax.value_and_grad(f, (0, 1, 2), has_aux=True)
        (_, aux), (dx, *grads) = jax.jit(grad, compiler_options=QUICKLY)(x, scale, bias)
        return (aux, grads), dx

    (got, dx), (want, dx_want) = run(ours, dense[where]), run(theirs, dense)
    assert_close((got, dx), (want, dx_want[where]))


def of_module(name: str):
    """What a module has to give in training, and its arguments in float32."""
    with jax.enable_x64(True):
        want = jax.tree.map(np.asarray, expected(name)["training"])
    p = problem(name)
    arrays = (p.x, p.scale, p.bias, p.running.mean, p.running.var, p.ct)
    return want, p.ids, *(jnp.asarray(v, jnp.float32) for v in arrays)


@on("one device")
@pytest.mark.parametrize("name", ["labels of images, large"])
def test_linen_trains_a_scale_for_each_row(name):
    want, ids, x, scale, bias, mean, var, ct = of_module(name)
    layer = jbn.ConditionalBatchNorm(
        num_classes=KINDS, use_running_average=False, epsilon=EPSILON, one_plus=True
    )
    stats = {"mean": mean, "var": var}

    @jax.jit
    def step(params, x):
        def loss(params, x):
            y, new = layer.apply(
                {"params": params, "batch_stats": stats},
                x,
                labels=ids,
                mutable=["batch_stats"],
            )
            return (y * ct).sum(), (y, new["batch_stats"])

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

    (_, (y, new)), (grads, dx) = step({"scale": scale, "bias": bias}, x)
    got = Step(y, [new["mean"], new["var"]], {**grads, "x": dx})
    assert_close(got, want, 5e-4)


@on("one device")
@pytest.mark.parametrize("name", ["labels of images"])
def test_nnx_trains_a_scale_for_each_row(name):
    want, ids, x, scale, bias, mean, var, ct = of_module(name)
    layer = jbn.nnx.ConditionalBatchNorm(
        3, num_classes=KINDS, epsilon=EPSILON, rngs=nnx.Rngs(0)
    )
    nnx.update(layer, {"scale": scale, "bias": bias, "mean": mean, "var": var})

    @nnx.jit
    def step(layer, x):
        def loss(layer, x):
            y = layer(x, labels=ids)
            return (y * ct).sum(), y

        return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

    (_, y), (grads, dx) = step(layer, x)
    grads = {name: grads[name][...] for name in ("scale", "bias")}
    got = Step(y, [layer.mean[...], layer.var[...]], {**grads, "x": dx})
    assert_close(got, want, 5e-4)
