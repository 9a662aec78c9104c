"""Every option of every method, in functions and in modules: one generated contract.

The names come from the records of `jbn.options` and from signatures. A name without a
value below fails a test. Which values are right is for `variants/test_contract.py`:
here the modules do what the functions do, and a value that got lost would be seen.
"""

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differentiation import QUICKLY
from flax import nnx
from jax.experimental.sparse import BCOO
from peers import load_peer

import jbn
import jbn.linen
import jbn.nnx
from jbn.options import (
    CallOptions,
    LayerCallOptions,
    LayerOptions,
    Options,
    RowCallOptions,
    RowLayerOptions,
    RowOptions,
    RowSettings,
    Settings,
    defaults,
    options_of,
)


EQUINOX = importlib.util.find_spec("equinox") is not None
eqx: Any = load_peer("equinox") if EQUINOX else None

SHAPE = (8, 3, 3)  # images, places, features: either axis may hold features
RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


# Some are zero, which a sparse array does not store.
X = 1.5 * normal(*SHAPE) + jnp.asarray([[[0.0, 0.5, -1.0]]])
X = jnp.where(RNG.random(SHAPE) < 0.2, 0, X)
STORED = int(np.count_nonzero(X))
CT = normal(*SHAPE)
IDS = jnp.asarray([0, 1, 2, 0, 1, 2, 0, 1])  # of images
SHARES = jnp.asarray(RNG.uniform(0.1, 1, (8, 1, 3)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.uniform(0.2, 2, (8, 3, 1)), jnp.float32)

# What is given in place of each default.
VALUES: dict[str, Any] = {
    "axis": 1,
    "momentum": 0.7,
    "epsilon": 0.5,
    "dtype": jnp.bfloat16,
    "axis_name": "devices",
    "axis_index_groups": [[0]],
    "unbiased": True,
    "reference_weight": 100.0,
    "second_moment": True,
    "tau": 2.0,
    "min_weight": 1000.0,
    "trim": 1.5,
    "activation": jax.nn.relu,
    "masked_output": "zero",
    "update_stats": False,
    "mask": WEIGHTS > 0.7,
    "weights": WEIGHTS,
    "residual": normal(*SHAPE),
}
# What has an effect only beside another option.
BESIDE = {"masked_output": "mask"}
LAYER_VALUES: dict[str, Any] = {
    "use_running_average": True,
    "param_dtype": jnp.bfloat16,
    "use_bias": False,
    "use_scale": False,
    "bias_init": jax.nn.initializers.constant(0.5),
    "scale_init": jax.nn.initializers.constant(2.0),
    "use_fast_variance": False,
    "force_float32_reductions": False,
    "update_stats": False,
    "debias": True,
    "accumulate": True,
    "promote_dtype": lambda arrays, dtype: (2 * arrays[0], *arrays[1:]),
    "bias_metadata": {"tag": "b"},
    "scale_metadata": {"tag": "s"},
}
# Of metadata no array knows.
WITHOUT_EFFECT = {"use_fast_variance", "force_float32_reductions"}
WITHOUT_EFFECT |= {"bias_metadata", "scale_metadata"}
OF_PARAMS = {"param_dtype", "use_bias", "use_scale", "bias_init", "scale_init"}

# Equinox's name of each of ours.
EQUINOX_NAMES = {
    "dtype": "output_dtype",
    "epsilon": "eps",
    "param_dtype": "dtype",
    "use_running_average": "inference",
}

ABSENT: Any = object()
# What a method's own option is replaced by to see that it counts; most are left out.
OTHERS: dict[str, Any] = {
    "num_groups": 2,
    "domain": 1 - IDS % 2,
    "labels": 2 - IDS,
    "scale": jnp.ones((8, 3, 1)),
}
# What a value of an option is refused with, by all methods or by one.
ERRORS: dict[tuple[str | None, str], str] = {
    (None, "axis_index_groups"): "partitions the mapped axis `axis_name`",
    ("renorm", "tau"): "`batch_renorm` does not take `tau`",
    ("soft", "trim"): "`trim` judges a row by the statistics of its domain",
    ("sparse", "trim"): "`sparse_batch_norm` does not take `trim`",
    ("sparse", "activation"): "`sparse_batch_norm` does not take `activation`",
    ("sparse", "residual"): "`sparse_batch_norm` does not take `residual`",
    ("sparse", "masked_output"): "`sparse_batch_norm` does not take `masked_output`",
}
OWN_ERRORS: dict[str, tuple[Any, str]] = {
    "mix": ("both", "`mix` must be one of"),
    "shrink_to": ("all", "`shrink_to` must be one of"),
    "devices_per_group": (2, "splits the devices of `axis_name`"),
    "num_domains": (4, r"shape .*\(4, 3\)"),
}


class Method(NamedTuple):
    """A function and its module, with the options of its own.

    Attributes:
        function: Name of the function.
        module: Name of the classes, or `None`.
        own: Settings of its own, which a module has as fields.
        call: What each call needs besides `x`.
        made: Settings of the module that the function finds in the shapes.
        stats_front: What is in front of the features in the shape of statistics.
        params_front: The same for parameters; `None`: the call gives them.
    """

    function: str
    module: str | None
    own: dict[str, Any] = {}  # noqa: RUF012
    call: dict[str, Any] = {}  # noqa: RUF012
    made: dict[str, Any] = {}  # noqa: RUF012
    stats_front: tuple[int, ...] = ()
    params_front: tuple[int, ...] | None = ()


TRAINS = {"freeze_affine": False, "freeze_stats": False, "freeze_mode": False}
METHODS = {
    "batch norm": Method("batch_norm", "BatchNorm"),
    "renorm": Method("batch_renorm", "BatchRenorm", {"r_max": 1.1, "d_max": 0.2}),
    "ghost": Method(
        "ghost_batch_norm", "GhostBatchNorm", {"num_groups": 3, "interleaved": True}
    ),
    "domain": Method(
        "domain_batch_norm",
        "DomainBatchNorm",
        {"num_domains": 3},
        {"domain": IDS},
        {"own_affine": True},
        (3,),
        (3,),
    ),
    "soft": Method(
        "domain_batch_norm",
        "DomainBatchNorm",
        {"num_domains": 3},
        {"domain": SHARES},
        {"own_affine": True},
        (3,),
        (3,),
    ),
    "labels": Method(
        "conditional_batch_norm",
        "ConditionalBatchNorm",
        {"one_plus": True},
        {"labels": IDS},
        {"num_classes": 3},
        params_front=(3,),
    ),
    "maps": Method(
        "conditional_batch_norm",
        "ConditionalBatchNorm",
        {"one_plus": True},
        params_front=None,
    ),
    "frozen": Method("frozen_batch_norm", "FrozenBatchNorm", TRAINS),
    "sparse": Method("sparse_batch_norm", None),
}
FUNCTIONS = list(dict.fromkeys(method.function for method in METHODS.values()))
MODULES = [name for name, method in METHODS.items() if method.module is not None]
every_method = pytest.mark.parametrize("name", METHODS)
every_module = pytest.mark.parametrize("name", MODULES)


# --- One call, in three ways -----------------------------------------------------


class Problem(NamedTuple):
    """The arrays of a call."""

    x: jax.Array
    params: jbn.Params
    stats: jbn.BatchStats


def problem(name: str) -> Problem:
    """Arrays that differ from the initial ones, and from each other."""
    method = METHODS[name]
    params = jbn.Params(normal(8, 3, 1), normal(1, 3, 3))
    if method.params_front is not None:
        shape = (*method.params_front, 3)
        params = jbn.Params(normal(*shape), normal(*shape))
    shape = (*method.stats_front, 3)
    var = jnp.linspace(0.5, 4, int(np.prod(shape))).reshape(shape)
    return Problem(X, params, jbn.BatchStats(0.3 * normal(*shape), var))


PROBLEMS = {name: problem(name) for name in METHODS}


def present(record: Any) -> dict[str, Any]:
    """A record as Flax has it: a dict of what is there."""
    fields = {k: v for k, v in record._asdict().items() if v is not None}
    return fields | {k: present(v) for k, v in fields.items() if isinstance(v, tuple)}


def by_function(method: Method, p: Problem, **options: Any) -> Any:
    """Output and new statistics."""
    given: dict[str, Any] = {"use_running_average": False, **method.own}
    given |= method.call | options
    params: Any = p.params
    if method.params_front is None:
        params, given = None, present(p.params) | given
    given = {k: v for k, v in given.items() if v is not ABSENT}
    if method.function == "sparse_batch_norm":
        x = BCOO.fromdense(p.x, nse=STORED)
        y, new = jbn.sparse_batch_norm(x, params, p.stats, **given)
        axis = range(3)[given.get("axis", -1)]
        shape = [n if a == axis else 1 for a, n in enumerate(SHAPE)]
        y = y.values.todense() + y.background.reshape(shape)
    else:
        y, new = getattr(jbn, method.function)(p.x, params, p.stats, **given)
    return y, present(new)


def call_of(method: Method, p: Problem, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the call of a module gets of the options."""
    taken = {"use_running_average", *options_of(CallOptions)}
    call = {k: v for k, v in options.items() if k in taken} | method.call
    return call if method.params_front is not None else call | present(p.params)


def fields_of(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructor of a module gets."""
    settings = {k: v for k, v in options.items() if k in options_of(Settings)}
    return method.own | method.made | settings


def by_linen(method: Method, p: Problem, **options: Any) -> Any:
    options = {"use_running_average": False} | options
    layer = getattr(jbn.linen, str(method.module))(**fields_of(method, options))
    params = {} if method.params_front is None else present(p.params)
    variables = {"params": params, "batch_stats": present(p.stats)}
    call = call_of(method, p, options)
    y, new = layer.apply(variables, p.x, mutable=["batch_stats"], **call)
    return y, new["batch_stats"]


def by_nnx(method: Method, p: Problem, **options: Any) -> Any:
    options = {"use_running_average": False} | options
    layer = nnx.merge(*made(method, fields_of(method, options)))
    params = {} if method.params_front is None else present(p.params)
    nnx.update(layer, nnx.State(params | present(p.stats)))
    y = layer(p.x, **call_of(method, p, options))
    return y, state_of(layer)["batch_stats"]


def new_in_equinox(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """A layer and its state. Some names are Equinox's, and two defaults differ."""
    given = {EQUINOX_NAMES.get(name, name): value for name, value in settings.items()}
    given = {"axis": -1, "debias": False} | given
    return eqx.nn.make_with_state(jbn.equinox.BatchNorm)(3, **given)


def stats_in_equinox(layer: Any, state: Any) -> dict[str, Any]:
    indices = layer.batch_state_index, layer.more_state_index
    return present(jbn.BatchStats(*state.get(indices[0]), *state.get(indices[1])))


def by_equinox(method: Method, p: Problem, **options: Any) -> Any:
    call = call_of(method, p, {"use_running_average": False} | options)
    inference = call.pop("use_running_average")
    layer, state = new_in_equinox(fields_of(method, options))
    layer = eqx.tree_at(lambda v: (v.weight, v.bias), layer, tuple(p.params))
    state = state.set(layer.batch_state_index, (p.stats.mean, p.stats.var))
    y, state = layer(p.x, state, inference=inference, **call)
    return y, stats_in_equinox(layer, state)


def made(method: Method, settings: Mapping[str, Any]) -> Any:
    """A new NNX layer, taken apart."""
    with jax.ensure_compile_time_eval():
        cls = getattr(jbn.nnx, str(method.module))
        return nnx.split(cls(3, rngs=nnx.Rngs(0), **settings))


def state_of(layer: Any) -> dict[str, Any]:
    """The variables of an NNX layer, as Linen has them."""
    kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
    found = {k: nnx.to_pure_dict(nnx.state(layer, v)) for k, v in kinds.items()}
    return {k: v for k, v in found.items() if v}


WAYS: dict[str, Callable[..., Any]] = {
    "function": by_function,
    "linen": by_linen,
    "nnx": by_nnx,
    "equinox": by_equinox,
}
Case = Callable[[Problem], Any]


def ways_of(name: str) -> list[str]:
    """How a method can be called."""
    if METHODS[name].module is None:
        return ["function"]
    return [way for way in WAYS if way != "equinox" or has_equinox(name)]


def has_equinox(name: str) -> bool:
    return EQUINOX and name == "batch norm"


# The older way to emit loops compiles a fifth faster. Since jaxlib 0.10.2 it is gone.
OLD_XLA = jax.__version_info__ < (0, 10, 2)
QUICKEST = QUICKLY | ({"xla_cpu_use_fusion_emitters": False} if OLD_XLA else {})


def case(method: Method, way: str, options: Mapping[str, Any]) -> Case:
    """A call; with `axis_name`, what the first of two devices has of it."""
    run = WAYS[way]
    if "axis_name" not in options:
        return lambda p: run(method, p, **options)

    def first_of_two(p: Problem) -> Any:
        one = lambda x: run(method, p._replace(x=x), **options)
        x = jnp.stack([p.x, 2 * p.x])
        return jax.tree.map(lambda v: v[0], jax.vmap(one, axis_name="devices")(x))

    return first_of_two


def set_to(option: str) -> dict[str, Any]:
    """A value of an option, and what it has to stand beside."""
    names = {option, BESIDE.get(option, option)} - {""}
    return {name: VALUES[name] for name in names}


def together(name: str, cases: Mapping[tuple[str, str], Case]) -> dict[Any, Any]:
    """What each makes of the arrays of a method, or its error, by one program.

    Together, and with less of a compiler, they take a quarter of the time.
    """
    errors = {}

    def run(p: Problem) -> dict[Any, Any]:
        found = {}
        for key, f in cases.items():
            try:
                found[key] = f(p)
            except Exception as error:
                errors[key] = error
        return found

    return jax.jit(run, compiler_options=QUICKEST)(PROBLEMS[name]) | errors


def leaves_of(*trees: Any) -> list[list[Any]]:
    for tree in trees:
        if isinstance(tree, Exception):
            raise tree
    return [[np.asarray(v) for v in jax.tree.leaves(tree)] for tree in trees]


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    leaves = leaves_of(got, want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(*leaves, strict=True):
        assert g.dtype == w.dtype
        g, w = g.astype(np.float32), w.astype(np.float32)
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def differ(got: Any, want: Any) -> bool:
    """Whether they are not close at all, or not of the same kind."""
    leaves = leaves_of(got, want)
    if jax.tree.structure(got) != jax.tree.structure(want):
        return True
    return any(
        g.dtype != w.dtype or abs(g - w).max() > 1e-3
        for g, w in zip(*leaves, strict=True)
    )


# --- The options of all methods --------------------------------------------------


@every_method
def test_an_option_changes_the_result_and_modules_take_it(name, subtests):
    method = METHODS[name]
    cases = {
        (option, way): case(method, way, set_to(option))
        for option in VALUES
        for way in ways_of(name)
    }
    errors = {o: ERRORS.get((None, o), ERRORS.get((name, o))) for o in VALUES}
    if name == "sparse":  # which is the same as that of a dense array
        for option in (option for option, error in errors.items() if error is None):
            dense = METHODS["batch norm"]
            cases[option, "dense"] = case(dense, "function", set_to(option))
    found = together(name, cases | {("", "function"): case(method, "function", {})})
    for option in options_of(Options):
        with subtests.test(option):
            assert option in VALUES, f"give `{option}` a value in VALUES"
            results = {way: v for (o, way), v in found.items() if o == option}
            if (error := errors[option]) is not None:
                for result in results.values():
                    assert isinstance(result, ValueError)
                    assert error in str(result)
                continue
            want = results["function"]
            without = found[BESIDE.get(option, ""), "function"]
            assert differ(want, without), "has no effect"
            # Of a sparse array the output is rounded in two parts.
            tolerance = 0.05 if (name, option) == ("sparse", "dtype") else 1e-5
            for result in results.values():
                assert_close(result, want, tolerance)


# --- Options of a method's own ---------------------------------------------------


def given_of(name: str) -> dict[str, Any]:
    """The options of its own that a method is given in all tests here."""
    method = METHODS[name]
    maps = {} if method.params_front is not None else present(PROBLEMS[name].params)
    return method.own | method.call | maps


def own_options(function: str) -> list[str]:
    common = {"x", "params", "batch_stats", "use_running_average"}
    common |= {*options_of(Options)}
    # Of a state that is in modules: for `variants/test_renorm.py`.
    common |= {"step", "warmup_steps"}
    parameters = inspect.signature(getattr(jbn, function)).parameters
    return [name for name in parameters if name not in common]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_option_of_its_own_is_given(function):
    methods = [name for name, m in METHODS.items() if m.function == function]
    given = {option for name in methods for option in given_of(name)}
    for option in own_options(function):
        assert option in given | {*OWN_ERRORS}, f"give `{option}` a value in METHODS"


@pytest.mark.parametrize("name", [n for n in MODULES if n != "batch norm"])
def test_an_option_of_its_own_changes_the_result_and_modules_take_it(name, subtests):
    method = METHODS[name]
    cases = {("", way): case(method, way, {}) for way in ways_of(name)}
    # What cannot be left out, nor be another, is in a test below.
    options = set(given_of(name)) - {"freeze_affine", *OWN_ERRORS}
    for option in options:
        other = {option: OTHERS.get(option, ABSENT)}
        cases[option, "function"] = case(method, "function", other)
    if name == "renorm":  # whose modules take them in a call as well
        late = method._replace(own={"r_max": 2.0, "d_max": 1.0}, call=method.own)
        cases |= {("call", way): case(late, way, {}) for way in ("linen", "nnx")}
    found = together(name, cases)
    want = found["", "function"]
    for option in options:
        with subtests.test(option):
            assert differ(found[option, "function"], want), "has no effect"
    for where, way in cases:
        if where not in options:
            with subtests.test(f"{way} {where}"):
                assert_close(found[where, way], want)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("way", ["function", "linen", "nnx"])
@pytest.mark.parametrize("option", OWN_ERRORS)
def test_an_option_of_its_own_is_checked(option, way):
    value, message = OWN_ERRORS[option]
    names = [n for n in MODULES if option in own_options(METHODS[n].function)]
    assert names
    for name in names:
        method = METHODS[name]
        method = method._replace(own=method.own | {option: value})
        with pytest.raises(Exception, match=message):  # Flax has one of its own
            case(method, way, {})(PROBLEMS[name])


@every_module
def test_gradients_of_modules_are_those_of_the_function(name):
    names = "epsilon", "trim", "weights", "residual"
    options = {k: VALUES[k] for k in names if (name, k) not in ERRORS}
    options |= {"activation": jax.nn.silu}

    def grads(way: str, method: Method = METHODS[name]) -> Case:
        def loss(differentiated, p):
            x, params = differentiated
            y, _ = WAYS[way](method, p._replace(x=x, params=params), **options)
            return (y * CT).sum()

        return lambda p: jax.grad(loss)((p.x, p.params), p)

    cases = {("", way): grads(way) for way in ways_of(name)}
    if name == "frozen":
        own = {k: v for k, v in METHODS[name].own.items() if k != "freeze_affine"}
        frozen = METHODS[name]._replace(own=own)
        cases |= {("affine", way): grads(way, frozen) for way in ways_of(name)}
    found = together(name, cases)
    want = found["", "function"]
    assert all(abs(v).max() > 0.1 for v in leaves_of(want)[0])
    for way in ways_of(name):
        assert_close(found["", way], want)
        if name == "frozen":
            no_params = jax.tree.map(jnp.zeros_like, want[1])
            assert_close(found["affine", way], (want[0], no_params))


# --- The settings of modules alone -----------------------------------------------


def fresh(name: str, settings: Mapping[str, Any]) -> Problem:
    """What a new layer with these settings has, by `jbn.init`."""
    method, p = METHODS[name], PROBLEMS[name]
    track, accumulate = (settings.get(k, False) for k in ("debias", "accumulate"))
    shape = (*method.stats_front, 3)
    _, stats = jbn.init(shape, track_weight=track, accumulate=accumulate)
    if method.params_front is None:
        return p._replace(stats=stats)
    uses = {k: settings[k] for k in ("use_bias", "use_scale") if k in settings}
    dtype = settings.get("param_dtype", jnp.float32)
    shape = (*method.params_front, 3)
    params, _ = jbn.init(shape, param_dtype=dtype, **uses)
    if params.scale is not None and "one_plus" in method.own:
        params = params._replace(scale=0 * params.scale)
    for field in ("scale", "bias"):
        if f"{field}_init" in settings:
            value = settings[f"{field}_init"](jax.random.key(0), shape, dtype)
            params = params._replace(**{field: value})
    return Problem(p.x, params, stats)


def as_a_function(name: str, settings: Mapping[str, Any]) -> Case:
    """Variables of a new layer, and what the function makes of them."""
    method = METHODS[name]
    modes = {"use_running_average", "update_stats"}
    call = {k: v for k, v in settings.items() if k in modes}

    def run(p: Problem) -> Any:
        p = fresh(name, settings)._replace(x=p.x)
        variables = {"batch_stats": present(p.stats)}
        if method.params_front is not None:
            variables["params"] = present(p.params)
        if "promote_dtype" in settings:
            p = p._replace(x=settings["promote_dtype"]([p.x], None)[0])
        return variables, by_function(method, p, **call)

    return run


def linen_layer(name: str, settings: Mapping[str, Any]) -> Case:
    """The same of a new Linen layer."""
    method = METHODS[name]
    settings = {"use_running_average": False, **method.own, **method.made, **settings}

    def run(p: Problem) -> Any:
        layer = getattr(jbn.linen, str(method.module))(**settings)
        call = call_of(method, p, {})
        variables = layer.init(jax.random.key(0), p.x, **call)
        y, new = layer.apply(variables, p.x, mutable=["batch_stats"], **call)
        return variables, (y, new["batch_stats"])

    return run


def nnx_layer(name: str, settings: Mapping[str, Any]) -> Case:
    """The same of a new NNX layer."""
    method = METHODS[name]
    settings = {**method.own, **method.made, **settings}

    def run(p: Problem) -> Any:
        layer = nnx.merge(*made(method, settings))
        variables = state_of(layer)
        for param in variables.get("params", {}):
            found = getattr(layer, param).get_metadata()
            assert settings.get(f"{param}_metadata", {}).items() <= found.items()
        y = layer(p.x, **call_of(method, p, {}))
        return variables, (y, state_of(layer)["batch_stats"])

    return run


def equinox_layer(name: str, settings: Mapping[str, Any]) -> Case:
    """The same of a new Equinox layer."""

    def run(p: Problem) -> Any:
        layer, state = new_in_equinox(settings)
        params = present(jbn.Params(layer.weight, layer.bias))
        variables = {"batch_stats": stats_in_equinox(layer, state), "params": params}
        y, new = layer(p.x, state)
        return variables, (y, stats_in_equinox(layer, new))

    return run


def constructor(cls: type) -> Any:
    """What has the signature of a class.

    NNX makes that of a class itself `(*args, **kwargs)`, also for Flax's own.
    """
    return cls.__init__ if issubclass(cls, nnx.Module) else cls


def settings_of(cls: type) -> dict[str, inspect.Parameter]:
    """All arguments of a constructor that set something."""
    others = {"self", "name", "parent", "num_features", "rngs"}
    parameters = inspect.signature(constructor(cls)).parameters
    return {k: v for k, v in parameters.items() if k not in others}


def equinox_settings() -> list[str]:
    """All arguments of its constructor that set something, by our names."""
    others = {"input_size", "channelwise_affine", "mode"}
    ours = {theirs: name for name, theirs in EQUINOX_NAMES.items()}
    names = set(inspect.signature(jbn.equinox.BatchNorm).parameters) - others
    return sorted(ours.get(name, name) for name in names)


LAYERS: dict[str, tuple[Callable[..., Case], Any]] = {
    "linen": (linen_layer, settings_of(jbn.linen.BatchNorm)),
    "nnx": (nnx_layer, settings_of(jbn.nnx.BatchNorm)),
}
if EQUINOX:
    LAYERS["equinox"] = equinox_layer, equinox_settings()
# Of modules alone.
SETTINGS = [
    (way, setting)
    for way, (_, settings) in LAYERS.items()
    for setting in settings
    if setting not in options_of(Settings)
]


@every_module
def test_a_setting_makes_the_variables_and_reaches_the_call(name, subtests):
    layers = {
        way: layer
        for way, (layer, _) in LAYERS.items()
        if way != "equinox" or has_equinox(name)
    }
    settings = [(way, setting) for way, setting in SETTINGS if way in layers]
    cases = {("", way): layer(name, {}) for way, layer in layers.items()}
    for way, setting in settings:
        if setting in LAYER_VALUES:
            given = {setting: LAYER_VALUES[setting]}
            cases[setting, way] = layers[way](name, given)
            cases[setting, "function"] = as_a_function(name, given)
    found = together(name, cases)
    unseen = set(WITHOUT_EFFECT)
    if METHODS[name].params_front is None:
        unseen |= OF_PARAMS
    for way, setting in settings:
        with subtests.test(f"{way} {setting}"):
            assert setting in LAYER_VALUES, f"give `{setting}` one in LAYER_VALUES"
            got = found[setting, way]
            assert_close(got, found[setting, "function"])
            assert differ(got, found["", way]) == (setting not in unseen)


# --- Signatures, help and errors -------------------------------------------------


CLASSES = [
    getattr(module, name)
    for module in (jbn.linen, jbn.nnx)
    for name in dict.fromkeys(str(METHODS[name].module) for name in MODULES)
]
CALLS = [getattr(jbn, name) for name in FUNCTIONS] + [c.__call__ for c in CLASSES]
if EQUINOX:
    CALLS.append(jbn.equinox.BatchNorm.__call__)


def label(v: Any) -> str:
    """The name of a function or class, for the id of a test."""
    return f"{v.__module__.rpartition('.')[2]}.{v.__qualname__}"


def assert_shown(f: Callable[..., Any], wanted: Mapping[str, Any]) -> None:
    """In the signature, with these defaults."""
    parameters = inspect.signature(f).parameters
    for name, default in wanted.items():
        assert name in parameters
        assert parameters[name].default is default
    assert inspect.Parameter.VAR_KEYWORD not in {p.kind for p in parameters.values()}


def assert_explained(v: Any, names: set[str]) -> None:
    """One entry of `help` for each name, with a text."""
    for name in names:
        entries = re.findall(rf"^ +{name}: \S", v.__doc__ or "", re.MULTILINE)
        assert len(entries) == 1, f"{len(entries)} entries for `{name}`"


@pytest.mark.parametrize("f", CALLS, ids=label)
def test_a_call_shows_and_explains_every_option(f):
    record = LayerCallOptions if f.__name__ == "__call__" else Options
    assert_shown(f, defaults(record))
    assert_explained(f, set(inspect.signature(f).parameters) - {"self"})


@pytest.mark.parametrize("cls", CLASSES, ids=label)
def test_a_class_shows_and_explains_every_setting(cls):
    base = jbn.nnx.BatchNorm if issubclass(cls, nnx.Module) else jbn.linen.BatchNorm
    plain = settings_of(base)
    assert_shown(constructor(cls), {k: v.default for k, v in plain.items()})
    assert_shown(constructor(cls), defaults(LayerOptions))
    names = set(settings_of(cls))
    if cls is not base:
        names -= set(plain)
        pattern = r"All other (attributes|arguments) are those of `BatchNorm`"
        assert re.search(pattern, str(cls.__doc__))
    assert_explained(cls, names)


@pytest.mark.usefixtures("untyped")
@every_method
def test_a_misspelled_option_is_named_with_what_was_called(name):
    method, p = METHODS[name], PROBLEMS[name]
    with pytest.raises(TypeError, match=f"`{method.function}` has no option `wieghts`"):
        by_function(method, p, wieghts=WEIGHTS)
    if method.module is None:
        return
    call = method._replace(call=method.call | {"wieghts": WEIGHTS})
    field = method._replace(made=method.made | {"momentun": 0.9})
    for run in (by_linen, by_nnx):
        with pytest.raises(TypeError, match=f"`{method.function}` has no .*`wieghts`"):
            run(call, p)
        with pytest.raises(TypeError, match=rf"{method.module}\W.*momentun"):
            run(field, p)


# --- Graph norm, which has no running statistics ----------------------------------


def test_options_of_graph_norm_change_the_result_and_modules_take_them(subtests):
    scale, bias, share = normal(3, 3)
    ids = {"segment_ids": IDS, "num_segments": 3}
    params = {"scale": scale, "bias": bias, "mean_scale": share}

    def function(p, **options):
        return jbn.graph_norm(
            p.x, jbn.Params(scale, bias), mean_scale=share, **ids, **options
        )

    def apart(options):
        taken = {*options_of(RowSettings)}
        settings = {k: v for k, v in options.items() if k in taken}
        return settings, ids | {k: v for k, v in options.items() if k not in taken}

    def linen(p, **options):
        settings, call = apart(options)
        return jbn.linen.GraphNorm(**settings).apply({"params": params}, p.x, **call)

    def flax_nnx(p, **options):
        settings, call = apart(options)
        with jax.ensure_compile_time_eval():
            layer = jbn.nnx.GraphNorm(3, rngs=nnx.Rngs(0), **settings)
            graph, state = nnx.split(layer)
        layer = nnx.merge(graph, state)
        nnx.update(layer, nnx.State(params))
        return layer(p.x, **call)

    def one(run, option):
        options = set_to(option)
        if option != "axis_name":
            return lambda p: run(p, **options)
        batch = lambda p: jnp.stack([p.x, 2 * p.x])
        mapped = lambda x, p: run(p._replace(x=x), **options)
        return lambda p: jax.vmap(mapped, (0, None), axis_name="devices")(batch(p), p)[
            0
        ]

    ways = {"function": function, "linen": linen, "nnx": flax_nnx}
    options = ["", *options_of(RowOptions)]
    cases = {(o, way): one(run, o) for o in options for way, run in ways.items()}
    found = together("batch norm", cases)
    for option in options_of(RowOptions):
        with subtests.test(option):
            if (None, option) in ERRORS:
                error = ERRORS[None, option]
                assert all(error in str(found[option, way]) for way in ways)
                continue
            without = found[BESIDE.get(option, ""), "function"]
            assert differ(found[option, "function"], without)
            for way in ways:
                assert_close(found[option, way], found[option, "function"])


@pytest.mark.parametrize("cls", [jbn.linen.GraphNorm, jbn.nnx.GraphNorm], ids=label)
def test_graph_norm_shows_and_explains_its_options(cls):
    assert_shown(jbn.graph_norm, defaults(RowOptions))
    assert_explained(jbn.graph_norm, {*inspect.signature(jbn.graph_norm).parameters})
    assert_shown(constructor(cls), defaults(RowLayerOptions))
    assert_explained(cls, {*settings_of(cls)})
    assert_shown(cls.__call__, defaults(RowCallOptions))
    call = {*inspect.signature(cls.__call__).parameters} - {"self"}
    assert_explained(cls.__call__, call)
