"""What every method holds to: values, derivatives, padding, devices, memory.

Each is compared with its definition in float64, in `reference.py`.
"""

import dataclasses
import functools
import itertools
import re
from typing import Any, Literal, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import reference
from differentiation import QUICKLY, modes
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jbn


pytestmark = pytest.mark.sweep


SHAPE = (16, 3, 3)  # images, places, features
DOMAINS = 3


@dataclasses.dataclass(frozen=True)
class Method:
    """A function of jbn, and the arguments that make it what it is."""

    name: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    affine: Literal["features", "domains", "classes", "elements"] = "features"
    ids: Literal["domain", "labels"] | None = None
    # Whether each row, each image or the whole batch has an id, and of what values.
    ids_of: Literal["rows", "images", "all"] = "rows"
    values: tuple[int, int] = (0, DOMAINS)


METHODS = {
    "batch norm": Method("batch_norm"),
    "tau": Method("batch_norm", {"tau": 2.5}),
    "trim": Method("batch_norm", {"trim": 1.3}),
    "renorm, clipped": Method("batch_renorm", {"r_max": 1.05, "d_max": 0.1}),
    "renorm, open": Method("batch_renorm", {"r_max": 100.0, "d_max": 100.0}),
    "renorm, trim": Method("batch_renorm", {"r_max": 1.2, "d_max": 0.5, "trim": 1.3}),
    "ghost": Method("ghost_batch_norm", {"num_groups": 4}),
    "ghost, ragged": Method("ghost_batch_norm", {"num_groups": 3}),
    "ghost, tau": Method("ghost_batch_norm", {"num_groups": 7, "tau": 1.5}),
    "domain": Method("domain_batch_norm", ids="domain"),
    "domain, own affine": Method(
        "domain_batch_norm", affine="domains", ids="domain", ids_of="images"
    ),
    "domain, one for all": Method(
        "domain_batch_norm", affine="domains", ids="domain", ids_of="all"
    ),
    "domain, padding": Method(
        "domain_batch_norm", affine="domains", ids="domain", values=(-1, DOMAINS + 2)
    ),
    "domain, tau and trim": Method(
        "domain_batch_norm",
        {"tau": 2.5, "trim": 1.5},
        ids="domain",
        values=(-1, DOMAINS + 1),
    ),
    "labels": Method(
        "conditional_batch_norm", affine="classes", ids="labels", ids_of="images"
    ),
    "labels, one plus": Method(
        "conditional_batch_norm", {"one_plus": True}, affine="classes", ids="labels"
    ),
    "maps": Method("conditional_batch_norm", affine="elements"),
    "maps, tau": Method(
        "conditional_batch_norm", {"one_plus": True, "tau": 1.0}, affine="elements"
    ),
    "frozen": Method("frozen_batch_norm"),
    "frozen affine": Method(
        "frozen_batch_norm",
        {"use_running_average": False, "freeze_stats": False, "freeze_mode": False},
    ),
    "frozen statistics": Method(
        "frozen_batch_norm",
        {"use_running_average": False, "freeze_affine": False, "freeze_mode": False},
    ),
    "frozen mode": Method(
        "frozen_batch_norm",
        {"use_running_average": False, "freeze_affine": False, "freeze_stats": False},
    ),
}
every_method = pytest.mark.parametrize("name", METHODS)
# One of each kind; the others are slow.
SOME = (
    "batch norm",
    "tau",
    "renorm, trim",
    "ghost, ragged",
    "domain, own affine",
    "domain, padding",
    "labels",
    "maps",
    "frozen affine",
)
most_methods = pytest.mark.parametrize(
    "name",
    [
        name if name in SOME else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
    ],
)


class Problem(NamedTuple):
    """All arrays of a call; `args` are x, weights, scale, bias, epsilon."""

    args: tuple
    ids: Any
    running: Any
    ct: Any


def problem(name, rng, shape=SHAPE, axis: int | tuple[int, ...] = -1) -> Problem:
    """Random arguments, in the default precision; nothing is 0 or 1 in them.

    Epsilon is of the size of the variance. The running mean of the last feature is far
    away, and that of the others near: limits by the running statistics are met and are
    not, and `trim` leaves out some elements, but none of the last feature.
    """
    method = METHODS[name]
    axes = axis if isinstance(axis, tuple) else (axis,)
    last = sorted(a % len(shape) for a in axes)
    first = [a for a in range(len(shape)) if a not in last]
    features = tuple(shape[a] for a in last)
    center = np.arange(float(np.prod(features))).reshape(features) - 1
    x = 1.5 * rng.standard_normal(shape) + np.expand_dims(center, first)
    weights = rng.uniform(
        0.3, 2.0, np.where(np.isin(range(len(shape)), last), 1, shape)
    )
    weights *= rng.random(weights.shape) < 0.8
    scale_shape, bias_shape = {
        "features": (features, features),
        "domains": ((DOMAINS, *features),) * 2,
        "classes": ((DOMAINS, *features),) * 2,
        "elements": (shape, [1 if a == first[-1] else n for a, n in enumerate(shape)]),
    }[method.affine]
    stats_shape = (DOMAINS, *features) if method.ids == "domain" else features
    mean = center + 0.3 * rng.standard_normal(stats_shape)
    mean.reshape(-1, center.size)[:, -1] += 6
    ids_shape = [shape[a] for a in first]
    ids_shape = ids_shape[: {"rows": None, "images": 1, "all": 0}[method.ids_of]]
    ids = rng.integers(*method.values, ids_shape)
    scale, bias = rng.standard_normal(scale_shape), rng.standard_normal(bias_shape)
    return jax.tree.map(
        jnp.asarray,
        Problem(
            (x, weights, scale, bias, 0.7),
            None if method.ids is None else ids,
            jbn.BatchStats(mean, rng.uniform(0.5, 2, stats_shape)),
            rng.standard_normal(shape),
        ),
    )


def ours(name, p: Problem, **options):
    """Output and new statistics of jbn."""
    method = METHODS[name]
    x, weights, scale, bias, epsilon = p.args
    options = {"use_running_average": False, **method.settings, **options}
    if method.ids is not None:
        options[method.ids] = p.ids
    params = jbn.Params(scale, bias)
    if method.affine == "elements":
        options |= {"scale": scale, "bias": bias}
        params = None
    return getattr(jbn, method.name)(
        x, params, p.running, weights=weights, epsilon=epsilon, **options
    )


def theirs(name, p: Problem, **options):
    """Those of the definition."""
    method = METHODS[name]
    x, weights, scale, bias, epsilon = p.args
    options = {**method.settings, **options}
    if method.ids is not None:
        options[method.ids] = p.ids
    y, new = getattr(reference, method.name)(
        x,
        reference.Affine(scale, bias),
        reference.Running(*p.running[:2]),
        weights=jnp.ones(()) if weights is None else weights,
        epsilon=epsilon,
        **options,
    )
    return y, jbn.BatchStats(*new)


class Step(NamedTuple):
    """What a training step computes."""

    loss: Any
    y: Any
    stats: Any
    grads: Any  # by x, weights, scale, bias, epsilon


def step(run, name, p: Problem, mean=lambda tree: tree, factor=1, **options) -> Step:
    """A training step, whose loss passes by elements without weight."""
    counted = True if p.args[1] is None else p.args[1] > 0

    def loss(args):
        y, stats = run(name, p._replace(args=args), **options)
        total = jnp.where(counted, jnp.sin(y) * p.ct, 0).sum()
        return mean(total * factor), (y, stats)

    (total, (y, stats)), grads = jax.value_and_grad(loss, has_aux=True)(p.args)
    return Step(total, y, stats, grads)


@functools.cache
def compiled(run, name, **options):
    """`step` for any problem of the same shapes."""
    f = lambda p: step(run, name, p, **options)
    return jax.jit(f, compiler_options=QUICKLY if run is theirs else None)


def assert_close(got, want, rtol=1e-10, atol=1e-10):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=rtol, atol=atol)


# --- Values and gradients --------------------------------------------------------


@every_method
@pytest.mark.usefixtures("x64")
def test_features_last(name, rng):
    p = problem(name, rng)
    assert_close(compiled(ours, name)(p), compiled(theirs, name)(p))


@most_methods
@pytest.mark.usefixtures("x64")
def test_features_first_with_a_weight_for_each_element(name, rng):
    p = problem(name, rng, (6, 3, 5), 1)
    x, _, *affine = p.args
    weights = rng.uniform(0.3, 2.0, x.shape) * (rng.random(x.shape) < 0.8)
    p = p._replace(args=(x, jnp.asarray(weights), *affine))
    want = compiled(theirs, name, axis=1)(p)
    assert_close(compiled(ours, name, axis=1)(p), want)
    # The same with elements that are not there.
    bad = rng.choice([np.nan, np.inf, -np.inf], x.shape)
    dirty = p._replace(args=(jnp.where(weights > 0, x, bad), *p.args[1:]))
    assert_alike_where(weights > 0, compiled(ours, name, axis=1)(dirty), want)


@most_methods
@pytest.mark.usefixtures("x64")
def test_several_feature_axes_with_a_weight_for_each_channel(name, rng):
    p = problem(name, rng, (6, 2, 4, 2), (-1, 1))
    weights = jnp.asarray([0.5, 0.0, 1.0, 3.0]).reshape(1, 2, 1, 2)
    p = p._replace(args=(p.args[0], weights, *p.args[2:]))
    got, want = (compiled(run, name, axis=(-1, 1))(p) for run in (ours, theirs))
    assert_close(got, want)


@most_methods
@pytest.mark.usefixtures("x64")
def test_nothing_weighted_and_ids_that_are_known(name, rng):
    p = problem(name, rng)
    p = p._replace(args=(p.args[0], None, *p.args[2:]))
    if METHODS[name].ids == "domain":
        # One that is known to be too large is an error: see `test_ids.py`.
        p = p._replace(ids=jnp.where(p.ids < DOMAINS, p.ids, -1))

    def known(run):
        return lambda args: step(run, name, p._replace(args=args))

    got = jax.jit(known(ours), compiler_options=QUICKLY)(p.args)
    assert_close(got, jax.jit(known(theirs), compiler_options=QUICKLY)(p.args))


@every_method
@pytest.mark.usefixtures("x64")
def test_mask_of_rows(name, rng):
    p = problem(name, rng)
    x, _, *affine = p.args
    mask = jnp.asarray(rng.random(SHAPE[:2]) < 0.7)
    f = jax.jit(lambda p, mask: ours(name, p, mask=mask))
    got = f(p._replace(args=(x, None, *affine)), mask)
    weights = mask.astype(x.dtype)[..., None]
    want = compiled(theirs, name)(p._replace(args=(x, weights, *affine)))
    assert_close(got, (want.y, want.stats))


@pytest.mark.parametrize(
    ("use_running_average", "update_stats"),
    [(True, False), (True, True), (False, False)],
)
@pytest.mark.parametrize("name", [n for n in SOME if not n.startswith("frozen")])
@pytest.mark.usefixtures("x64")
def test_switches(name, use_running_average, update_stats, rng):
    """What to normalize by, and whether to update; with the gradients of the former."""
    p = problem(name, rng)
    flags = {"use_running_average": use_running_average, "update_stats": update_stats}

    def both(run):
        def loss(p):
            y, new = run(name, p, **flags)
            return (jnp.sin(y) * p.ct).sum(), (y, new)

        grad = jax.value_and_grad(loss, has_aux=True, allow_int=True)
        return jax.jit(grad, compiler_options=QUICKLY)

    (value, dp), (want, want_dp) = both(ours)(p), both(theirs)(p)
    assert_close(value, want)
    # In evaluation these include the gradients of the running statistics.
    assert_close((dp.args, dp.running), (want_dp.args, want_dp.running))
    assert np.any(dp.running.mean) == use_running_average


@every_method
@pytest.mark.usefixtures("x64")
def test_no_gradient_passes_through_the_new_statistics(name, rng):
    def state(p):
        _, new = ours(name, p)
        return sum((jnp.sin(v) * v).sum() for v in new[:2])

    p = problem(name, rng)
    updates = name not in ("frozen", "frozen statistics")
    dp = jax.jit(jax.grad(state, allow_int=True), compiler_options=QUICKLY)(p)
    for leaf in jax.tree.leaves((dp.args, dp.running if updates else 0)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.usefixtures("x64")
def test_methods_differ(rng):
    """So that no method passes here for another one."""
    p = problem("batch norm", rng)
    found = {
        name: compiled(theirs, name)(p)
        for name, method in METHODS.items()
        if method.affine == "features" and method.ids is None
    }
    for one, other in itertools.combinations(found.values(), 2):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        assert max(np.abs(a - b).max() for a, b in pairs) > 1e-3


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        # Each method meets a few modes, and each mode a few methods. All are slow.
        pytest.param(name, mode, marks=[] if (5 * i + j) % 9 == 0 else pytest.mark.slow)
        for i, name in enumerate(METHODS)
        for j, mode in enumerate(modes(0.0))
    ],
)
@pytest.mark.usefixtures("x64")
def test_every_mode_of_differentiation(mode, name, rng):
    p = problem(name, rng, (8, 2, 3))
    x, weights, *affine = p.args
    # Positive, see `test_mixed_second_derivatives_at_a_weight_of_zero`.
    p = p._replace(args=(x, weights + 0.1, *affine))
    derive = modes(p.ct)[mode]

    def derivative(run):
        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def derived(p):  # With traced ids: known ones must be within range.
            return derive(lambda *args: run(name, p._replace(args=args))[0], p.args)

        return derived(p)

    assert_close(derivative(ours), derivative(theirs), 1e-9, 1e-9)


# --- What masked elements come out as ---------------------------------------------


@pytest.mark.parametrize("masked_output", ["zero", "input"])
@most_methods
@pytest.mark.usefixtures("x64")
def test_masked_output_is_applied_last(name, masked_output, rng):
    """After residual and activation; its own gradient in place of the formula's."""
    p = problem(name, rng)
    x, _, *affine = p.args
    mask = jnp.asarray(rng.random(SHAPE) < 0.7)
    residual = jnp.asarray(rng.standard_normal(SHAPE))

    def loss(run):
        def f(x, residual, affine, mask, p):
            y, stats = run(x, residual, p._replace(args=(x, None, *affine)), mask)
            return (jnp.sin(y) * p.ct).sum(), (y, stats)

        return jax.jit(
            jax.value_and_grad(f, (0, 1, 2), has_aux=True), compiler_options=QUICKLY
        )

    def mine(x, residual, p, mask):
        options: dict[str, Any] = {"residual": residual, "activation": jax.nn.silu}
        return ours(name, p, mask=mask, masked_output=masked_output, **options)

    def wanted(x, residual, p, mask):
        weights = mask.astype(x.dtype)
        y, stats = theirs(name, p._replace(args=(x, weights, *p.args[2:])))
        other = jnp.zeros_like(x) if masked_output == "zero" else x
        return jnp.where(mask, jax.nn.silu(y + residual), other), stats

    arrays = x, residual, affine, mask, p
    got, want = loss(mine)(*arrays), loss(wanted)(*arrays)
    assert_close(got, want)
    # What the masked elements hold matters to nothing but themselves.
    dirty = jnp.where(mask, x, jnp.nan)
    (_, (y, stats)), (dx, *grads) = loss(mine)(dirty, *arrays[1:])
    (_, (want_y, want_stats)), (want_dx, *want_grads) = want
    assert_close((stats, grads), (want_stats, want_grads))
    assert_close((y[mask], dx[mask]), (want_y[mask], want_dx[mask]))
    left = (y[~mask], dx[~mask])
    if masked_output == "zero":
        assert not np.any(left)
    else:
        assert np.isnan(left[0]).all()


def test_masked_output_saves_and_reads_nothing_more(rng):
    """The mask is there anyway, and the selection is part of the loop over `x`."""
    x = jnp.asarray(rng.standard_normal((512, 8, 8)), jnp.float32)
    params, stats = jbn.init(8)

    def bytes_of(masked_output, mask):
        options: Any = {"use_running_average": False, "masked_output": masked_output}
        f = jax.jit(
            lambda x, params: jbn.batch_norm(x, params, stats, mask=mask, **options)[0]
        )
        _, vjp = jax.vjp(f, x, params)
        saved = {v.unsafe_buffer_pointer(): v.nbytes for v in jax.tree.leaves(vjp)}
        cost: Any = f.lower(x, params).compile().cost_analysis()
        return sum(saved.values()), cost["bytes accessed"]

    for shape in ((512, 8), x.shape):
        mask = jnp.asarray(rng.random(shape) < 0.7)
        saved, read = bytes_of("input", mask)
        plain_saved, plain_read = bytes_of("normalized", mask)
        assert saved == plain_saved
        assert read <= plain_read + mask.nbytes


def test_masked_output_without_a_mask_does_nothing(rng):
    p = problem("batch norm", rng)
    want = ours("batch norm", p)
    got = ours("batch norm", p, masked_output="zero")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    with pytest.raises(ValueError, match="`masked_output` must be one of"):
        ours("batch norm", p, masked_output="zeros")


# --- What is not there ------------------------------------------------------------


def assert_alike_where(counts, got: Step, want: Step):
    """The same, but for outputs and gradients of what does not count."""
    assert_close((got.loss, got.stats), (want.loss, want.stats))
    (dx, dweights, *got_rest), (want_dx, want_dweights, *want_rest) = got[3], want[3]
    assert_close(got_rest, want_rest)
    some = np.broadcast_to(counts, dx.shape)
    assert_close((got.y[some], dx[some]), (want.y[some], want_dx[some]))
    assert_close(dweights[np.asarray(counts)], want_dweights[np.asarray(counts)])
    assert np.isfinite(got.y).all()
    assert np.isfinite(dweights).all()
    np.testing.assert_array_equal(dx[~some], 0)


def rows_at(index):
    """Which rows have these numbers, of the shape of weights."""
    return jnp.asarray(np.isin(np.arange(48), index).reshape(16, 3, 1))


@every_method
@pytest.mark.usefixtures("x64")
def test_rows_without_weight_may_hold_anything(name, rng):
    p = problem(name, rng)
    x, weights, scale, bias, epsilon = p.args
    away = rows_at([1, 5, 6, 21, 47])
    weights = jnp.where(away, 0, weights)
    clean = p._replace(args=(x, weights, scale, bias, epsilon))
    bad = rng.choice([np.nan, np.inf, -np.inf], x.shape)
    dirty = p._replace(args=(jnp.where(away, bad, x), *clean.args[1:]))
    got, want = compiled(ours, name)(dirty), compiled(theirs, name)(clean)
    assert_alike_where(~away, got, want)
    if "renorm" not in name:  # which adds `scale * d`
        zero = -1.0 if METHODS[name].settings.get("one_plus") else 0.0
        only_bias = (x, weights, jnp.full_like(scale, zero), bias, epsilon)
        want = compiled(theirs, name)(p._replace(args=only_bias))
        ignored = np.broadcast_to(away, x.shape)
        assert_close(got.y[ignored], want.y[ignored])


@pytest.mark.usefixtures("x64")
def test_mixed_second_derivatives_at_a_weight_of_zero(rng):
    """What it would do to the gradient of `x` if an element began to count."""
    p = problem("batch norm", rng)
    x, weights, *affine = p.args

    def mixed(run):
        def loss(x, weights):
            y, _ = run("batch norm", p._replace(args=(x, weights, *affine)))
            return (jnp.sin(y) * p.ct).sum()

        def along(x, weights):
            return (jax.grad(loss)(x, weights) * p.ct).sum()

        return jax.jit(jax.grad(along, argnums=1))(x, weights)

    assert_close(mixed(ours), mixed(theirs))


@most_methods
@pytest.mark.usefixtures("x64")
def test_second_derivatives_pass_by_rows_without_weight(name, rng):
    p = problem(name, rng, (8, 2, 3))
    x, weights, *affine = p.args
    weights = weights.at[1:3].set(0)
    some = np.broadcast_to(weights > 0, x.shape)

    def hvp(run, x):
        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def product(p):  # With traced ids: known ones must be within range.
            def loss(x):
                return step(run, name, p._replace(args=(x, weights, *affine))).loss

            return jax.jvp(jax.grad(loss), (p.args[0],), (p.ct,))[1]

        return product(p._replace(args=(x, weights, *affine)))

    got = hvp(ours, jnp.where(some, x, jnp.nan))
    assert_close(got[some], hvp(theirs, x)[some])
    np.testing.assert_array_equal(got[~some], 0)


@every_method
@pytest.mark.usefixtures("x64")
def test_no_weight_at_all(name, rng):
    p = problem(name, rng)
    x, weights, *affine = p.args
    nothing = p._replace(args=(x, jnp.zeros_like(weights), *affine))
    got, want = compiled(ours, name)(nothing), compiled(theirs, name)(nothing)
    assert_close(got, want)
    jax.tree.map(np.testing.assert_array_equal, got.stats, p.running)


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].ids == "domain"])
@pytest.mark.usefixtures("x64")
def test_a_domain_that_is_absent_keeps_its_statistics(name, rng):
    p = problem(name, rng)
    p = p._replace(ids=jnp.where(p.ids == 1, 2, p.ids))
    got, want = compiled(ours, name)(p), compiled(theirs, name)(p)
    assert_close(got, want)
    for new, old in zip(got.stats[:2], p.running[:2], strict=True):
        np.testing.assert_array_equal(new[1], old[1])


@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith("ghost")])
@pytest.mark.usefixtures("x64")
def test_a_group_without_weight(name, rng):
    p = problem(name, rng)
    x, weights, *affine = p.args
    p = p._replace(args=(x, weights.at[:6].set(0), *affine))
    assert_close(compiled(ours, name)(p), compiled(theirs, name)(p))


@every_method
@pytest.mark.usefixtures("x64")
def test_empty_batch(name, rng):
    p = problem(name, rng, (0, 3, 3))
    f = jax.jit(functools.partial(step, ours, name), compiler_options=QUICKLY)
    got = f(p)
    assert got.y.shape == (0, 3, 3)
    jax.tree.map(np.testing.assert_array_equal, got.stats, p.running)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(got.grads))


@pytest.mark.parametrize("name", ["trim", "renorm, trim"])
@pytest.mark.usefixtures("x64")
def test_what_is_trimmed_may_be_nan(name, rng):
    """Unlike what is left out by weights, it is found by its value."""
    p = problem(name, rng)
    x = p.args[0]
    away = rows_at([1, 21])
    got = compiled(ours, name)(
        p._replace(args=(jnp.where(away, jnp.nan, x), *p.args[1:]))
    )
    far = p._replace(args=(jnp.where(away, 1e6, x), *p.args[1:]))
    some = np.broadcast_to(~away, x.shape)[..., :2]
    want = compiled(theirs, name)(far)
    assert_close(got.y[..., :2][some], want.y[..., :2][some])
    assert_close(
        [v[..., :2] for v in got.stats[:2]], [v[..., :2] for v in want.stats[:2]]
    )


# --- Devices ----------------------------------------------------------------------


class Shards(NamedTuple):
    """The arrays of a problem that are split over devices, and those that are not."""

    args: tuple
    ids: Any
    ct: Any = None
    running: Any = None


def is_split(name):
    """Which of x, weights, scale, bias, epsilon have rows."""
    elements = METHODS[name].affine == "elements"
    return (True, True, elements, elements, False)


def divide(name, p: Problem):
    split = tuple(v for v, s in zip(p.args, is_split(name), strict=True) if s)
    shared = tuple(v for v, s in zip(p.args, is_split(name), strict=True) if not s)
    ids = (None, p.ids) if METHODS[name].ids_of == "all" else (p.ids, None)
    return Shards(split, ids[0], ct=p.ct), Shards(shared, ids[1], running=p.running)


def join(name, split, shared):
    split, shared = iter(split), iter(shared)
    return tuple(next(split) if s else next(shared) for s in is_split(name))


def problem_of(name, split: Shards, shared: Shards) -> Problem:
    args = join(name, split.args, shared.args)
    ids = split.ids if shared.ids is None else shared.ids
    return Problem(args, ids, shared.running, split.ct)


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("d",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )


def over_devices(name, kind, devices):
    """`step` over so many devices, as a function of the problem."""

    def local(split, shared, *, axis_name=None, factor=1):
        mean = lambda tree: tree
        if axis_name is not None:
            mean = functools.partial(jax.lax.pmean, axis_name=axis_name)
        options = {} if axis_name is None else {"axis_name": axis_name}
        done = step(
            ours, name, problem_of(name, split, shared), mean, factor, **options
        )
        by_split, by_shared = divide(name, Problem(done.grads, None, None, None))
        # The mean of the loss is inside of what is differentiated, and that of the
        # gradients outside, as in the trainer: right wherever it runs.
        return (done.y, by_split.args), (done.loss, done.stats, mean(by_shared.args))

    named = functools.partial(local, axis_name="d", factor=devices)
    mesh = None if kind == "vmap" else mesh_of(devices)
    stacked = kind in ("vmap", "pmap")
    if kind == "vmap":
        run = jax.jit(jax.vmap(named, (0, None), (0, None), axis_name="d"))
    elif kind == "pmap":
        run = jax.pmap(
            named,
            "d",
            in_axes=(0, None),
            out_axes=(0, None),
            devices=jax.devices()[:devices],
        )
    elif kind == "jit":
        run = jax.jit(local)
    else:
        run = jax.jit(
            jax.shard_map(
                named,
                mesh=mesh,
                in_specs=(P("d"), P()),
                out_specs=(P("d"), P()),
                check_vma=kind == "shard_map checked",
            )
        )

    def call(p):
        split, shared = divide(name, p)
        if stacked:
            split = jax.tree.map(lambda v: v.reshape(devices, -1, *v.shape[1:]), split)
        elif kind == "jit":
            assert mesh is not None
            split = jax.device_put(split, NamedSharding(mesh, P("d")))
        (y, by_split), (loss, stats, by_shared) = run(split, shared)
        if stacked:
            y, by_split = jax.tree.map(
                lambda v: v.reshape(-1, *v.shape[2:]), (y, by_split)
            )
        if kind in ("vmap", "pmap", "shard_map unchecked"):
            by_split = jax.tree.map(lambda v: v / devices, by_split)
        return Step(loss, y, stats, join(name, by_split, by_shared))

    return call


KINDS = ("jit", "pmap", "vmap", "shard_map checked", "shard_map unchecked")
# How many of its six rows each of eight devices has; with fewer devices these merge.
COUNTS = (
    (6, 6, 6, 6, 6, 6, 6, 6),
    (6, 4, 1, 0, 2, 0, 0, 5),
    (0, 0, 0, 0, 6, 4, 1, 0),
    (0, 1, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 0, 0, 0, 0),
)


@pytest.mark.parametrize(
    ("name", "kind", "devices"),
    [
        # Each method meets a few of them. All are slow.
        pytest.param(
            name,
            kind,
            devices,
            marks=[
                *([pytest.mark.devices] if kind != "vmap" and devices > 1 else []),
                *([] if (2 * i + j) % 9 == 0 else [pytest.mark.slow]),
            ],
        )
        for i, name in enumerate(METHODS)
        for j, (kind, devices) in enumerate(itertools.product(KINDS, (8, 4, 2, 1)))
    ],
)
@pytest.mark.usefixtures("x64")
def test_uneven_shards_are_one_batch(name, kind, devices, rng):
    run = over_devices(name, kind, devices)
    whole = {}
    if "ghost" in name and kind != "jit":  # Groups are cut on each device.
        whole = {"devices": devices}
    for counts in COUNTS:
        p = problem(name, rng)
        x, weights, *affine = p.args
        valid = np.arange(6) < np.asarray(counts)[:, None]
        weights = jnp.where(valid.reshape(weights.shape), weights + 0.1, 0)
        # What pads a shard may be anything.
        dirty = p._replace(args=(jnp.where(weights > 0, x, jnp.nan), weights, *affine))
        want = compiled(theirs, name, **whole)(p._replace(args=(x, weights, *affine)))
        assert_alike_where(weights > 0, run(dirty), want)


# All-reduces forward, and forward and backward together, with every statistic and
# gradient that there is. One is what the moments take, one their derivative; `trim`
# takes one to count what is near.
ALL_REDUCES = {
    "batch norm": (1, 2),
    "tau": (1, 2),
    "trim": (2, 3),
    "renorm, clipped": (1, 2),
    "ghost": (1, 1),
    "domain": (1, 2),
    "domain, tau and trim": (2, 3),
    "labels": (1, 2),
    "maps": (1, 2),
    "frozen": (0, 0),
    "frozen affine": (1, 2),
    "frozen mode": (1, 1),
}


def compiled_text(kind, f, out_specs, split, shared) -> str:
    """The HLO of `f` on four devices."""
    mesh = mesh_of(4)
    to = lambda spec: NamedSharding(mesh, spec)
    split, shared = jax.device_put((split, shared), (to(P("d")), to(P())))
    if kind == "jit":
        f = jax.jit(f, out_shardings=jax.tree.map(to, out_specs))
    else:
        in_specs = (P("d"), P())
        f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
    text = f.lower(split, shared).compile().as_text()
    assert text
    return text


def all_reduces(hlo):
    """The number of numbers that each of them sums."""
    operands = re.findall(r" = (.*) all-reduce(?:-start)?\(", hlo)
    return [
        sum(
            int(np.prod([int(n) for n in dims.split(",") if n]))
            for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
        )
        for shapes in operands
    ]


OTHERS = re.compile(
    r" (all-gather|all-to-all|collective-permute|reduce-scatter)[\w-]*\("
)


@pytest.mark.devices
@pytest.mark.parametrize("kind", ["jit", "shard_map"])
@pytest.mark.parametrize("name", ALL_REDUCES)
def test_collectives(name, kind, rng):
    """As few as can be, of a few numbers a feature, however large the batch."""
    split, shared = divide(name, problem(name, rng, (64, 11, 3)))
    options = {"axis_name": "d"} if kind == "shard_map" else {}

    def forward(split, shared):
        return ours(name, problem_of(name, split, shared), **options)

    def both(split, shared):
        # Not by what devices share, as scale: to sum that is up to `shard_map`.
        def f(split_args):
            return forward(split._replace(args=split_args), shared)

        y, vjp, new = jax.vjp(f, split.args, has_aux=True)
        return (y, *vjp(split.ct)), new

    expected = ALL_REDUCES[name]
    if (name, kind) == ("ghost", "jit"):
        expected = (2, 2)  # One among the groups, one among what XLA makes of the rest.
    for f, count in zip((forward, both), expected, strict=True):
        hlo = compiled_text(kind, f, (P("d"), P()), split, shared)
        assert not OTHERS.search(hlo)
        sizes = all_reduces(hlo)
        assert len(sizes) == count
        # Each of four shards has four numbers, a gradient has four, and trimming has
        # two; all for each domain.
        assert sum(sizes) <= (4 * 4 + 4 + 2) * 3 * DOMAINS


@pytest.mark.devices
def test_groups_need_no_communication(rng):
    split, shared = divide("ghost", problem("ghost", rng, (64, 11, 3)))

    def backward(split, shared):
        f = lambda x: ours(
            "ghost",
            problem_of("ghost", split._replace(args=(x, *split.args[1:])), shared),
            axis_name="d",
        )[0]
        y, vjp = jax.vjp(f, split.args[0])
        return y, vjp(split.ct)[0]

    hlo = compiled_text("shard_map", backward, (P("d"), P("d")), split, shared)
    assert not OTHERS.search(hlo)
    assert not all_reduces(hlo)


# --- Transformations --------------------------------------------------------------


@most_methods
@pytest.mark.parametrize("of_data", [False, True])
@pytest.mark.usefixtures("x64")
def test_ensemble_is_a_loop(name, of_data, rng):
    """Of parameters and statistics, with the same data for all members or not."""
    members = [problem(name, rng) for _ in range(3)]
    if not of_data and METHODS[name].affine != "elements":
        x, weights, *_ = members[0].args
        members = [
            m._replace(
                args=(x, weights, *m.args[2:]), ids=members[0].ids, ct=members[0].ct
            )
            for m in members
        ]
        in_axes = Problem((None, None, 0, 0, 0), None, 0, None)
    else:
        in_axes = 0
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *members)
    if in_axes != 0:
        x, weights, *rest = stacked.args
        stacked = stacked._replace(
            args=(x[0], weights[0], *rest), ids=members[0].ids, ct=members[0].ct
        )
    run = jax.jit(
        jax.vmap(functools.partial(step, ours, name), (in_axes,)),
        compiler_options=QUICKLY,
    )
    want = [compiled(theirs, name)(m) for m in members]
    assert_close(run(stacked), jax.tree.map(lambda *v: jnp.stack(v), *want))


@most_methods
@pytest.mark.usefixtures("x64")
def test_scan_with_rematerialization_is_a_loop(name, rng):
    """Over batches, with the running statistics as its carry."""
    batches = [problem(name, rng) for _ in range(3)]
    args, running = batches[0].args, batches[0].running
    shared = args[2:]
    xs = jax.tree.map(
        lambda *v: jnp.stack(v), *[(b.args[:2], b.ids, b.ct) for b in batches]
    )

    def loss(xs, shared):
        @jax.checkpoint
        def body(running, batch):
            args, ids, ct = batch
            p = Problem((*args, *shared), ids, running, ct)
            y, new = ours(name, p, momentum=0.5)
            return new, (jnp.where(args[1] > 0, jnp.sin(y) * ct, 0)).sum()

        last, losses = jax.lax.scan(body, running, xs)
        return losses.sum(), last

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
    (total, last), (dxs, dshared) = jax.jit(grad, compiler_options=QUICKLY)(xs, shared)

    want_total, want_dshared = 0.0, 0.0
    for i, batch in enumerate(batches):
        p = batch._replace(args=(*batch.args[:2], *shared), running=running)
        want = compiled(theirs, name, momentum=0.5)(p)
        running = want.stats
        want_total += want.loss
        want_dshared = (
            jax.tree.map(lambda a, b: a + b, want.grads[2:], want_dshared)
            if i
            else want.grads[2:]
        )
        assert_close([v[i] for v in dxs[0]], want.grads[:2])
    assert_close((total, last, dshared), (want_total, running, want_dshared))


@every_method
def test_statistics_keep_their_dtypes_and_structure(name, rng):
    """Whatever the input is: of 16 bits, or masked."""
    p = problem(name, rng)
    x, *rest = p.args
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        q = p._replace(args=(x.astype(dtype), *rest))
        y, new = jax.eval_shape(functools.partial(ours, name), q)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert jax.tree.structure(new) == jax.tree.structure(p.running)
        for v, old in zip(
            jax.tree.leaves(new), jax.tree.leaves(p.running), strict=True
        ):
            assert (v.shape, v.dtype) == (old.shape, jnp.float32)


@most_methods
def test_statistics_may_be_donated(name, rng):
    p = problem(name, rng)

    def update(running, p):
        return ours(name, p._replace(running=running))[1]

    want = jax.jit(update)(p.running, p._replace(running=None))
    running = jax.tree.map(jnp.copy, p.running)
    update_in_place = jax.jit(update, donate_argnums=0)
    got = update_in_place(running, p._replace(running=None))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(v.is_deleted() for v in jax.tree.leaves(running))


# --- Precision and memory ---------------------------------------------------------


@every_method
@pytest.mark.usefixtures("x64")
def test_bfloat16_is_rounded_once(name, rng):
    p = jax.tree.map(
        lambda v: v if jnp.issubdtype(v.dtype, jnp.integer) else v.astype(jnp.float32),
        problem(name, rng),
    )
    x = p.args[0].astype(jnp.bfloat16)
    f = jax.jit(lambda x, p: ours(name, p._replace(args=(x, *p.args[1:]))))
    y, new = f(x, p)
    p = p._replace(args=(x, *p.args[1:]))
    wide = jax.tree.map(
        lambda v: v if jnp.issubdtype(v.dtype, jnp.integer) else v.astype(jnp.float64),
        p,
    )
    want = compiled(theirs, name)(wide)
    assert y.dtype == jnp.bfloat16
    assert {v.dtype for v in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}
    # The nearest one, but for what float32 arithmetic adds to numbers of some 10.
    _, exponent = np.frexp(want.y)
    error = np.abs(np.asarray(y, np.float64) - want.y)
    assert (error <= 0.5 * np.ldexp(1.0, exponent - 8) + 2e-5).all()
    assert_close(new, want.stats, 1e-5, 1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@every_method
def test_backward_pass_keeps_the_input_and_little_else(name, weighted, rng):
    """What came in row by row, and of the rest a few numbers for each statistic."""
    method = METHODS[name]
    p = problem(name, rng, (512, 4, 8))
    x, weights, scale, bias, epsilon = p.args
    x = x.astype(jnp.bfloat16)

    @jax.jit
    def f(x, scale, bias, p):  # With traced ids: known ones must be within range.
        args = x, weights if weighted else None, scale, bias, epsilon
        return ours(name, p._replace(args=args))[0]

    _, vjp = jax.vjp(lambda *args: f(*args, p), x, scale, bias)
    kept = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(vjp)}
    rows = x[..., 0].size
    allowed = 80 * 8 * max(DOMAINS, method.settings.get("num_groups", 1))
    if name != "frozen" or weighted:
        allowed += x.nbytes + weighted * weights.nbytes
    ids = jnp.zeros(0, int) if p.ids is None else p.ids
    allowed += ids.nbytes
    if method.ids == "domain" and not weighted:
        allowed += rows  # A mask of what is padding,
    if "trim" in method.settings:
        allowed += x.size * (4 if weighted else 1)  # or of what is near.
    if method.affine == "elements":
        allowed += scale.nbytes
    if method.ids == "labels":
        # The scale that each label stands for, and the labels once more.
        allowed += ids.nbytes + ids.size * 8 * 4
    if "ghost" in name:
        # Two bytes an element and four a weight to fill up the last groups, and a mask.
        allowed += 4 * 7 * (2 * 8 + 4) + rows
    assert sum(leaf.nbytes for leaf in kept.values()) <= allowed


# --- Properties -------------------------------------------------------------------


seeds = st.integers(0, 2**16)


@functools.cache
def forward(name):
    """Output and statistics, for any problem of the same shapes."""
    return jax.jit(functools.partial(ours, name))


@functools.cache
def forward_over(name, devices):
    """Likewise, by a mapped axis."""

    def local(split, shared):
        return ours(name, problem_of(name, split, shared), axis_name="d")

    run = jax.jit(jax.vmap(local, (0, None), (0, None), axis_name="d"))

    def call(p):
        split, shared = divide(name, p)
        split = jax.tree.map(lambda v: v.reshape(devices, -1, *v.shape[1:]), split)
        y, new = run(split, shared)
        return y.reshape(-1, *y.shape[2:]), new

    return call


@hypothesis.given(
    name=st.sampled_from(["batch norm", "renorm, clipped", "domain, padding", "maps"]),
    devices=st.sampled_from([2, 4, 8]),
    valid=st.lists(st.integers(0, 3), min_size=48, max_size=48),
    seed=seeds,
)
def test_any_split_is_one_batch(name, devices, valid, seed):
    with jax.enable_x64(True):
        p = problem(name, np.random.default_rng(seed))
        weights = jnp.asarray(valid, float).reshape(16, 3, 1)
        p = p._replace(args=(p.args[0], weights, *p.args[2:]))
        want = compiled(theirs, name)(p)
        assert_close(forward_over(name, devices)(p), (want.y, want.stats))


@hypothesis.given(
    name=st.sampled_from(
        ["batch norm", "trim", "renorm, clipped", "ghost", "domain, padding", "maps"]
    ),
    seed=seeds,
)
def test_integer_weight_is_a_repeated_row(name, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        p = problem(name, rng, (12, 1, 3))
        # Within each quarter, so that the groups of `ghost` are the same rows.
        counts = rng.multinomial(6, np.full(3, 1 / 3), size=4).ravel()
        repeat = lambda v: jnp.repeat(v, counts, axis=0, total_repeat_length=24)
        x, _, *affine = p.args
        repeated = (repeat(x), None, *affine)
        if METHODS[name].affine == "elements":
            repeated = (repeat(x), None, *map(repeat, affine[:2]), affine[2])
        ids = None if p.ids is None else repeat(p.ids)
        weights = jnp.asarray(counts, float).reshape(12, 1, 1)
        y, new = forward(name)(p._replace(args=(x, weights, *affine)))
        want = compiled(theirs, name)(Problem(repeated, ids, p.running, repeat(p.ct)))
        assert_close((repeat(y), new), (want.y, want.stats))


@hypothesis.given(
    name=st.sampled_from(["batch norm", "tau", "domain, padding", "labels, one plus"]),
    shape=st.sampled_from([SHAPE, (5, 1, 2)]),
    seed=seeds,
)
def test_permuted_rows_give_permuted_outputs(name, shape, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(shape[0])
    with jax.enable_x64(True):
        p = problem(name, rng, shape)
        x, weights, *affine = p.args
        permuted = p._replace(args=(x[order], weights[order], *affine), ids=p.ids)
        if p.ids is not None:
            permuted = permuted._replace(ids=p.ids[order])
        want = compiled(theirs, name)(p)
        assert_close(forward(name)(permuted), (want.y[order], want.stats))


@hypothesis.given(
    ids=st.lists(st.integers(-1, DOMAINS), min_size=16, max_size=16), seed=seeds
)
def test_domains_are_a_loop(ids, seed):
    ids = np.asarray(ids)
    with jax.enable_x64(True):
        p = problem("domain, own affine", np.random.default_rng(seed))
        x, weights, scale, bias = map(np.asarray, p.args[:4])
        y, new = forward("domain, own affine")(p._replace(ids=jnp.asarray(ids)))
        for k in range(DOMAINS):
            mine = ids == k
            total, mean, var = oracle.moments(x[mine], weights[mine])
            running, running_var = (np.asarray(v[k]) for v in p.running[:2])
            mean = np.where(total > 0, mean, running)
            var = np.where(total > 0, var, running_var)
            want = oracle.normalize(x[mine], mean, var, scale[k], bias[k], epsilon=0.7)
            assert_close(y[mine], want)
            assert_close(new.mean[k], 0.99 * running + 0.01 * mean)
            assert_close(new.var[k], 0.99 * running_var + 0.01 * var)


@hypothesis.given(
    num_groups=st.integers(1, 18), devices=st.sampled_from([1, 2]), seed=seeds
)
def test_ghost_statistics_are_those_of_the_batch(num_groups, devices, seed):
    with jax.enable_x64(True):
        p = problem("batch norm", np.random.default_rng(seed))
        x, weights, *_ = p.args

        def update(x, weights, running, **options):
            return jbn.ghost_batch_norm(
                x,
                None,
                running,
                use_running_average=False,
                num_groups=num_groups,
                weights=weights,
                momentum=0.0,
                **options,
            )[1]

        if devices > 1:
            x, weights = (v.reshape(2, 8, *v.shape[1:]) for v in (x, weights))
            update = jax.vmap(
                functools.partial(update, axis_name="d"),
                (0, 0, None),
                None,
                axis_name="d",
            )
        new = jax.jit(update, compiler_options=QUICKLY)(x, weights, p.running)
        _, mean, var = oracle.moments(p.args[0], p.args[1])
        assert_close(new, (mean, var))


@hypothesis.given(
    name=st.sampled_from(
        ["batch norm", "tau", "renorm, trim", "domain, padding", "maps", "frozen mode"]
    ),
    seed=seeds,
)
def test_padding_changes_nothing(name, seed):
    """Rows with a mask of False, anywhere, and whatever they hold."""
    rng = np.random.default_rng(seed)
    index = np.sort(rng.choice(16, 10, replace=False))
    with jax.enable_x64(True):
        p = problem(name, rng)
        x, _, *affine = p.args
        mask = jnp.asarray(np.isin(np.arange(16), index).reshape(16, 1, 1))
        bad = rng.choice([np.nan, np.inf, 1e300], SHAPE)
        padded = p._replace(args=(jnp.where(mask, x, bad), None, *affine))
        y, new = forward(name)(padded, mask=mask)
        if METHODS[name].affine == "elements":
            affine = [*(v[index] for v in affine[:2]), affine[2]]
        ids = None if p.ids is None else p.ids[index]
        without = Problem((x[index], None, *affine), ids, p.running, p.ct[index])
        want = compiled(theirs, name)(without)
        assert_close((y[index], new), (want.y, want.stats))
