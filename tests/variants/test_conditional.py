"""Conditional batch norm against PyTorch's parts, and tables written out in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from peers import load_peer

import jbn
import jbn.nnx
from jbn import BatchStats, Params


pytestmark = pytest.mark.sweep


STATIC = ("use_running_average", "update_stats", "axis", "one_plus", "unbiased")
conditional = jax.jit(jbn.conditional_batch_norm, static_argnames=STATIC)
train = functools.partial(conditional, use_running_average=False)
# Sums of some hundred float32 numbers, a root and two products.
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}
TIGHT: Any = {"rtol": 1e-10, "atol": 1e-12}  # float64


def make(rng, num_classes=4, features=3):
    """Tables and statistics that all differ from the defaults and each other."""
    stats = BatchStats(rng.normal(size=features), rng.uniform(0.5, 3, features))
    shape = (num_classes, features)
    params = Params(rng.uniform(0.5, 2, shape), rng.normal(size=shape))
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (params, stats))


def wide(tree) -> Any:
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), tree)


def normalized(x, axis=-1, epsilon=1e-5):
    _, mean, var = oracle.moments(x, axis=axis)
    return oracle.normalize(x, mean, var, axis=axis, epsilon=epsilon)


def folded(stats, x, axis=-1, momentum=0.99, unbiased=False):
    weight, mean, var = oracle.moments(x, axis=axis)
    var = var * weight / (weight - 1) if unbiased else var
    return tuple(
        momentum * np.float64(old) + (1 - momentum) * new
        for old, new in ((stats.mean, mean), (stats.var, var))
    )


def assert_folded(new, stats, x, **options):
    want_mean, want_var = folded(stats, x, **options)
    np.testing.assert_allclose(new.mean, want_mean, **CLOSE)
    np.testing.assert_allclose(new.var, want_var, **CLOSE)


@pytest.mark.peers("torch")
def test_class_conditional_as_in_torch(rng):
    torch = load_peer("torch")
    x, dy = rng.normal(1, 2, (2, 6, 3, 4, 4)).astype(np.float32)
    labels = np.asarray([2, 0, 2, 2, 3, 0])  # 1 is absent
    params, stats = make(rng)
    peer = torch.nn.BatchNorm2d(3, affine=False, eps=0.01, momentum=0.3)
    peer.running_mean.copy_(torch.from_numpy(np.array(stats.mean)))
    peer.running_var.copy_(torch.from_numpy(np.array(stats.var)))
    gamma, beta = (torch.nn.Embedding(4, 3) for _ in range(2))
    for table, mine in ((gamma, params.scale), (beta, params.bias)):
        table.weight.data = torch.from_numpy(np.array(mine))
    their_x = torch.from_numpy(x).requires_grad_()
    indices = torch.from_numpy(labels)
    want = gamma(indices)[:, :, None, None] * peer(their_x)
    want = want + beta(indices)[:, :, None, None]
    want.backward(torch.from_numpy(dy))

    def run(x, params):
        return train(
            x,
            params,
            stats,
            labels=labels,
            axis=1,
            epsilon=0.01,
            momentum=0.7,
            unbiased=True,
        )

    y, back, new = jax.vjp(run, jnp.asarray(x), params, has_aux=True)
    dx, dparams = back(jnp.asarray(dy))
    np.testing.assert_allclose(y, want.detach().numpy(), **CLOSE)
    np.testing.assert_allclose(new.mean, peer.running_mean, **CLOSE)
    np.testing.assert_allclose(new.var, peer.running_var, **CLOSE)
    np.testing.assert_allclose(dx, their_x.grad, rtol=1e-4, atol=1e-5)
    # Sums of 48 products.
    np.testing.assert_allclose(dparams.scale, gamma.weight.grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dparams.bias, beta.weight.grad, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(dparams.scale[1], np.zeros(3))
    # Inference, with the statistics that are new.
    peer.eval()
    want = gamma(indices)[:, :, None, None] * peer(their_x)
    want = want + beta(indices)[:, :, None, None]
    y, same = conditional(
        x, params, new, use_running_average=True, labels=labels, axis=1, epsilon=0.01
    )
    np.testing.assert_allclose(y, want.detach().numpy(), **CLOSE)
    jax.tree.map(np.testing.assert_array_equal, same, new)


@pytest.mark.peers("torch")
def test_spade_as_in_torch(rng):
    torch = load_peer("torch")
    x, dy = rng.normal(1, 2, (2, 2, 3, 6, 6)).astype(np.float32)
    segmentation = rng.normal(size=(2, 5, 6, 6)).astype(np.float32)
    # The 3x3 convolutions of a segmentation map are the user's own.
    kernels = rng.normal(size=(2, 3, 5, 3, 3)).astype(np.float32) / 3
    peer = torch.nn.BatchNorm2d(3, affine=False)
    their_x = torch.from_numpy(x).requires_grad_()
    their_kernels = torch.from_numpy(kernels).requires_grad_()
    gamma, beta = (
        torch.nn.functional.conv2d(torch.from_numpy(segmentation), k, padding=1)
        for k in their_kernels
    )
    want = peer(their_x) * (1 + gamma) + beta
    want.backward(torch.from_numpy(dy))
    _, stats = jbn.init(3)

    def run(x, kernels):
        gamma, beta = (jax.lax.conv(segmentation, k, (1, 1), "SAME") for k in kernels)
        return train(
            x,
            None,
            stats,
            scale=gamma,
            bias=beta,
            one_plus=True,
            axis=1,
            momentum=0.9,
            unbiased=True,
        )

    y, back, new = jax.vjp(run, jnp.asarray(x), jnp.asarray(kernels), has_aux=True)
    dx, dkernels = back(jnp.asarray(dy))
    np.testing.assert_allclose(y, want.detach().numpy(), **CLOSE)
    np.testing.assert_allclose(new.mean, peer.running_mean, **CLOSE)
    np.testing.assert_allclose(new.var, peer.running_var, **CLOSE)
    np.testing.assert_allclose(dx, their_x.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dkernels, their_kernels.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "axis", "of_labels", "reshaped", "known"),
    [
        ((10, 3), -1, (10,), (10, 1), True),
        ((2, 4, 5, 3), -1, (2,), (2, 1, 1, 1), False),
        ((2, 4, 5, 3), -1, (2, 4), (2, 4, 1, 1), False),
        ((2, 4, 5, 3), -1, (2, 4, 5), (2, 4, 5, 1), True),  # a map of labels
        ((2, 4, 5, 3), -1, (1, 4, 5, 1), (1, 4, 5, 1), False),  # one for all images
        ((2, 3, 4, 5), 1, (2, 4, 5), (2, 1, 4, 5), False),
        ((2, 3, 4, 5), 1, (2, 1, 1, 1), (2, 1, 1, 1), True),
        ((2, 4, 5, 3), -1, (), (1, 1, 1, 1), True),
        ((2, 4, 5, 3), -1, (), (1, 1, 1, 1), False),
    ],
    ids=str,
)
def test_labels_of_rows_of_images_or_of_places(
    rng, shape, axis, of_labels, reshaped, known
):
    x = rng.normal(2, 3, shape).astype(np.float32)
    labels = rng.integers(0, 4, of_labels)
    params, stats = make(rng)
    options: Any = {"axis": axis, "epsilon": 0.1, "momentum": 0.8}
    call = functools.partial(
        jbn.conditional_batch_norm, use_running_average=False, **options
    )
    if known:
        run = jax.jit(functools.partial(call, labels=labels))
    else:
        run = functools.partial(jax.jit(call), labels=labels)
    y, new = run(x, params, stats)

    feature = np.arange(3).reshape(
        [3 if a == axis % x.ndim else 1 for a in range(x.ndim)]
    )
    pairs = np.broadcast_arrays(labels.reshape(reshaped), feature)
    scale, bias = (np.asarray(p, np.float64)[tuple(pairs)] for p in params)
    want = scale * normalized(x, axis, 0.1) + bias
    np.testing.assert_allclose(y, want, **CLOSE)
    assert_folded(new, stats, x, axis=axis, momentum=0.8)


@pytest.mark.parametrize(
    ("tables", "one_plus"),
    [
        (("own", "shared"), False),
        (("shared", "own"), True),
        (("own", None), True),
        ((None, "own"), True),
        ((None, "own"), False),
    ],
)
def test_one_table_and_one_that_is_shared_or_none(rng, tables, one_plus):
    x = rng.normal(2, 3, (10, 3)).astype(np.float32)
    labels = rng.integers(0, 4, 10)
    full, stats = make(rng)
    fields = [
        {"own": table, "shared": table[0], None: None}[which]
        for which, table in zip(tables, full, strict=True)
    ]
    y, _ = train(
        x, Params(*fields), stats, labels=labels, one_plus=one_plus, epsilon=0.1
    )
    scale, bias = (
        None
        if field is None
        else np.asarray(field)[labels]
        if which == "own"
        else np.asarray(field)
        for which, field in zip(tables, fields, strict=True)
    )
    want = normalized(x, epsilon=0.1)
    if scale is not None:
        want = want * (one_plus + scale)
    if bias is not None:
        want = want + bias
    np.testing.assert_allclose(y, want, **CLOSE)


@pytest.mark.parametrize(
    ("of_scale", "of_bias", "one_plus"),
    [
        ((4, 1, 3), (4, 1, 3), True),  # FiLM, BigGAN: one for an image and feature
        ((4, 5, 1), (1, 5, 3), False),
        ((1, 1, 1), (4, 5, 3), True),
        ((4, 5, 3), None, False),
        (None, (4, 1, 1), True),
    ],
    ids=str,
)
def test_scale_and_bias_that_are_given(rng, x64, of_scale, of_bias, one_plus):
    x, dy = rng.normal(2, 3, (2, 4, 5, 3))
    scale, bias = (
        None if s is None else rng.normal(size=s) for s in (of_scale, of_bias)
    )
    _, stats = wide(make(rng))

    def run(x, given):
        return train(x, None, stats, one_plus=one_plus, epsilon=0.1, **given)

    given = {"scale": scale, "bias": bias}
    given = {k: jnp.asarray(v) for k, v in given.items() if v is not None}
    y, back, _ = jax.vjp(run, jnp.asarray(x), given, has_aux=True)
    dx, dgiven = back(jnp.asarray(dy))
    xh = normalized(x, epsilon=0.1)
    gain = (
        np.ones(x.shape)
        if scale is None
        else one_plus + np.broadcast_to(scale, x.shape)
    )
    want = gain * xh + (0 if bias is None else bias)
    np.testing.assert_allclose(y, want, **TIGHT)
    want_dx, _, _ = oracle.input_gradient(x, dy * gain, np.ones(3), epsilon=0.1)
    np.testing.assert_allclose(dx, want_dx, **TIGHT)
    for name, full in (("scale", dy * xh), ("bias", dy)):
        if name in given:
            shape = given[name].shape
            axes = tuple(a for a in range(3) if shape[a] == 1)
            want = full.sum(axes, keepdims=True)
            np.testing.assert_allclose(dgiven[name], want, **TIGHT)


def test_the_gradient_of_a_table_is_gathered_from_all_rows_of_a_label(rng, x64):
    x, dy = rng.normal(2, 3, (2, 9, 3))
    labels = np.asarray([1, 1, 3, 0, 1, 3, 1, 0, 1])
    params, stats = wide(make(rng))

    def run(x, params):
        return train(x, params, stats, labels=labels, epsilon=0.1)[0]

    _, back = jax.vjp(run, jnp.asarray(x), params)
    dx, dparams = back(jnp.asarray(dy))
    xh = normalized(x, epsilon=0.1)
    dscale, dbias = np.zeros((2, 4, 3))
    for i, label in enumerate(labels):
        dscale[label] += dy[i] * xh[i]
        dbias[label] += dy[i]
    np.testing.assert_allclose(dparams.scale, dscale, **TIGHT)
    np.testing.assert_allclose(dparams.bias, dbias, **TIGHT)
    gained = dy * np.asarray(params.scale)[labels]
    want, _, _ = oracle.input_gradient(x, gained, np.ones(3), epsilon=0.1)
    np.testing.assert_allclose(dx, want, **TIGHT)


def test_traced_labels_out_of_range_get_the_nearest(rng):
    x = rng.normal(2, 3, (6, 3)).astype(np.float32)
    params, stats = make(rng)
    got = train(x, params, stats, labels=np.asarray([-1, -9, 0, 4, 99, 3]))
    want = train(x, params, stats, labels=np.asarray([0, 0, 0, 3, 3, 3]))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    got, _ = train(x, params, stats, labels=np.asarray([250, 0, 0, 0, 0, 0], np.uint8))
    want, _ = train(x, params, stats, labels=np.asarray([3, 0, 0, 0, 0, 0]))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("update_stats", [False, True])
def test_statistics_are_those_of_batch_norm(rng, use_running_average, update_stats):
    # Rows of all labels share them, whatever their scale and bias.
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    params, stats = make(rng)
    labels = rng.integers(0, 4, 8)
    y, new = conditional(
        x,
        params,
        stats,
        labels=labels,
        use_running_average=use_running_average,
        update_stats=update_stats,
        momentum=0.7,
    )
    xh = normalized(x)
    if use_running_average:
        xh = oracle.normalize(x, stats.mean, stats.var)
    scale, bias = (np.asarray(p, np.float64)[labels] for p in params)
    np.testing.assert_allclose(y, scale * xh + bias, **CLOSE)
    if update_stats:
        assert_folded(new, stats, x, momentum=0.7)
    else:
        jax.tree.map(np.testing.assert_array_equal, new, stats)
    if not use_running_average:
        y, none = train(x, params, None, labels=labels)
        assert none is None
        np.testing.assert_allclose(y, scale * xh + bias, **CLOSE)


def test_the_output_alone_is_rounded_to_the_dtype_of_the_input(rng):
    x = jnp.asarray(rng.normal(300, 1, (16, 3)), jnp.bfloat16)
    scale, bias = (jnp.asarray(v, jnp.float32) for v in rng.normal(size=(2, 16, 3)))
    y, _ = train(x, None, None, scale=scale, bias=bias)
    assert y.dtype == jnp.bfloat16
    want = np.asarray(scale) * normalized(np.asarray(x, np.float64)) + np.asarray(bias)
    # Eight bits, rounded to the nearest. (A scale of as many would show.)
    got = np.asarray(y, np.float64)
    np.testing.assert_allclose(got, want, rtol=1.01 * 2**-8, atol=1e-5)


def test_complex_input_with_a_real_and_a_complex_scale(rng):
    x = (rng.normal(size=(8, 3)) + 1j * rng.normal(2, 1, (8, 3))).astype(np.complex64)
    real = rng.normal(size=(8, 1)).astype(np.float32)
    for scale in real, np.exp(1j * real):
        y, _ = train(x, None, None, scale=scale, one_plus=True)
        want = (1 + scale) * normalized(x)
        np.testing.assert_allclose(y, want, **CLOSE)


@pytest.mark.parametrize("one_plus", [False, True])
def test_modules_start_at_the_identity(rng, one_plus):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    labels = rng.integers(0, 4, 8)
    start = 0 if one_plus else 1
    layer = jbn.ConditionalBatchNorm(4, one_plus=one_plus, use_running_average=False)
    y, variables = layer.init_with_output(jax.random.key(0), x, labels=labels)
    params = variables["params"]
    np.testing.assert_array_equal(params["scale"], np.full((4, 3), start))
    np.testing.assert_array_equal(params["bias"], np.zeros((4, 3)))
    np.testing.assert_allclose(y, normalized(x), **CLOSE)

    layer = jbn.nnx.ConditionalBatchNorm(3, 4, one_plus, rngs=nnx.Rngs(0))
    assert layer.scale is not None
    np.testing.assert_array_equal(layer.scale[...], np.full((4, 3), start))
    np.testing.assert_allclose(layer(x, labels=labels), normalized(x), **CLOSE)


def test_modules_take_an_initializer_that_is_given(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    labels = rng.integers(0, 4, 8)
    options: Any = {"one_plus": True, "scale_init": jax.nn.initializers.constant(0.5)}
    layer = jbn.ConditionalBatchNorm(4, use_running_average=False, **options)
    y, _ = layer.init_with_output(jax.random.key(0), x, labels=labels)
    np.testing.assert_allclose(y, 1.5 * normalized(x), **CLOSE)
    layer = jbn.nnx.ConditionalBatchNorm(3, 4, rngs=nnx.Rngs(0), **options)
    np.testing.assert_allclose(layer(x, labels=labels), 1.5 * normalized(x), **CLOSE)


# --- mistakes ----------------------------------------------------------------------

X = np.ones((4, 3, 2), np.float32)
LABELS = np.asarray([0, 1, 2, 1])
TABLES = jbn.init((3, 2))[0]


def run(**kwargs: Any) -> Any:
    kwargs = {"params": TABLES, "batch_stats": jbn.init(2)[1]} | kwargs
    return jbn.conditional_batch_norm(X, use_running_average=False, **kwargs)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("kwargs", "error", "came", "fix"),
    [
        ({}, ValueError, "got neither", "Without a condition use `batch_norm`"),
        (
            {"labels": LABELS, "scale": X},
            ValueError,
            "got both",
            "takes either `labels`, for tables in `params`, or `scale` and `bias`",
        ),
        ({"labels": LABELS, "bias": X}, ValueError, "got both", "takes either"),
        (
            {"bias": X},
            ValueError,
            "`params` are tables for `labels`",
            "must be None if .* are given. Multiply learned factors into these",
        ),
        (
            {"labels": LABELS, "params": None},
            ValueError,
            "got none",
            r"Make them by `init\(\(num_classes, num_features\)\)`",
        ),
        (
            {"labels": LABELS, "params": jbn.init(2)[0]},
            ValueError,
            "with features (2,); got none",
            r"Make them by `init\(\(num_classes, num_features\)\)`",
        ),
        (
            {"labels": LABELS, "params": TABLES._asdict()},
            TypeError,
            "got dict",
            r"Make one of a dict by `jbn.Params\(\*\*params\)`",
        ),
        (
            {"labels": LABELS, "params": jbn.init((3, 5))[0]},
            ValueError,
            "it has shape (3, 5)",
            "`params.scale` must have one entry",
        ),
        (
            {"labels": LABELS, "params": TABLES._replace(bias=jnp.ones((4, 2)))},
            ValueError,
            "it has shape (4, 2)",
            "`params.bias` must have one entry",
        ),
        (
            {"labels": LABELS + 1},
            ValueError,
            "have 3 rows; those given go from 1 to 3",
            "`labels` must be from 0 to 2",
        ),
        (
            {"labels": -1},
            ValueError,
            "those given go from -1 to -1",
            "`labels` must be from 0 to 2",
        ),
        (
            {"labels": LABELS / 2},
            TypeError,
            "got float64",
            "`labels` must be of integers",
        ),
        (
            {"labels": LABELS[:3]},
            ValueError,
            "`labels` must have one entry for each row",
            "or for each entry of its leading axes",
        ),
        (
            {"params": None, "scale": np.ones((4, 2), np.float32)},
            ValueError,
            "got shape (4, 2) for `x` of shape (4, 3, 2)",
            "`scale` must have the rank of `x`, with size 1 where it does not vary",
        ),
        (
            {"params": None, "bias": np.ones((4, 2, 2), np.float32)},
            ValueError,
            "got shape (4, 2, 2)",
            "`bias` must have the rank of `x`",
        ),
        (
            {"params": None, "scale": np.ones((4, 3, 2), int)},
            TypeError,
            "got int64",
            "`scale` must be of a floating dtype, since `x` is not complex",
        ),
        (
            {"params": None, "bias": np.ones((4, 3, 2), np.complex64)},
            TypeError,
            "got complex64",
            "`bias` must be of a floating dtype, since `x` is not complex",
        ),
    ],
)
def test_a_mistake_gets_one_clear_error(kwargs, error, came, fix):
    with pytest.raises(error, match=fix) as raised:
        run(**kwargs)
    assert came in str(raised.value)


@pytest.mark.usefixtures("untyped")
def test_given_as_lists():
    got, _ = run(params=None, scale=[[[2.0, 3.0]]], bias=[[[0.5, 1.0]]])
    np.testing.assert_array_equal(got, np.broadcast_to([0.5, 1.0], X.shape))


@pytest.mark.usefixtures("untyped")
def test_labels_as_a_list():
    got, want = run(labels=LABELS.tolist()), run(labels=LABELS)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_message_speaks_of_classes():
    with pytest.raises(ValueError, match=r"`params\.scale`") as raised:
        run(labels=LABELS, params=jbn.init((3, 5))[0])
    assert "domain" not in str(raised.value)


def test_a_label_for_each_image_saves_no_scale_for_each_pixel():
    shape, classes = (16, 32, 32, 16), 4
    _, stats = jbn.init(shape[-1])
    params = Params(*jnp.ones((2, classes, shape[-1])))
    x, labels = jnp.ones(shape), jnp.zeros(shape[0], int)

    def loss(x, params, ct):
        return (ct * train(x, params, stats, labels=labels)[0]).sum()

    program = jax.jit(jax.grad(loss, (0, 1))).lower(x, params, x).compile()
    analysis: Any = program.memory_analysis()
    assert analysis.temp_size_in_bytes < 0.1 * x.nbytes
