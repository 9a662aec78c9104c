"""What does the first step cost, against Flax's? Tracing, lowering and compilation.

    python benchmarks/first_step.py [--quick] [--name=first_step-newest]

Each measured run starts with cold caches, and its processor time is taken. Ours and
Flax's take turns in one process, in an order that turns around with each round. Beside
the times stand the sizes of the programs, in equations and StableHLO operations, which
do not depend on the machine, and the time of calls without `jit`. `shard_map` runs in a
process of its own, as it needs several virtual devices; all else runs with one device.
"Reach" is the ratio that we aim at. `--quick` runs fewer rounds, and does not compile
ResNet-50; it writes no file.
"""

import timing


timing.prepare()

import argparse
import functools
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from tables import FIRST_STEP, first_step_rows

import jbn
import jbn.nnx
from jbn.models import resnet50
from jbn.models.norms import activated


OURS, FLAX = "jbn", "flax"
LINEN = {OURS: jbn.BatchNorm, FLAX: nn.BatchNorm}
NNX = {OURS: jbn.nnx.BatchNorm, FLAX: nnx.BatchNorm}
BATCH, SIZE = 8, 64
DEPTH, WIDTH = 100, 64
ROWS, IMAGES = (64, 64), (8, 16, 16, 64)
DEVICES = 4
PLATFORMS = "cpu", "tpu", "cuda"
STAGES = "trace", "lower", "all"
# Not what attributes start with: `#stablehlo.`.
OPERATION = re.compile(r"(?<![#\w])(?:stablehlo|chlo)\.\w+")
CACHED = type(functools.cache(len))

# A function and its arguments.
Case = tuple[Callable[..., Any], tuple[Any, ...]]
Row = dict[str, Any]


# ---- How it is measured ------------------------------------------------------------


def forget() -> None:
    """Empties JAX's caches, and those of functions of ours and of Flax's modules."""
    jax.clear_caches()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("jbn", "flax"):
            for value in list(vars(module).values()):
                if isinstance(value, CACHED):
                    value.cache_clear()


def first(case: Case, compiled: bool) -> dict[str, float]:
    """Seconds of each stage of a first step; `all` only if it is compiled."""
    function, args = case
    forget()
    gc.collect()
    gc.disable()
    start = time.process_time()
    program = jax.jit(function).trace(*args)
    middle = time.process_time()
    lowered = program.lower()
    end = time.process_time()
    seconds = {"trace": middle - start, "lower": end - middle}
    if compiled:
        lowered.compile()
        seconds["all"] = time.process_time() - start
    gc.enable()
    return seconds


def cold(
    cases: dict[str, Case], rounds: int, compilations: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each stage in each round, by stage and by whose they are.

    Args:
        cases: What is traced, lowered and compiled, by name.
        rounds: How many; one more before them is not counted.
        compilations: In how many of the rounds it is compiled.

    Returns:
        By stage and name, one for each round in which there was such a stage.
    """
    times = {stage: {name: [] for name in cases} for stage in STAGES}
    for i in range(-1, rounds):
        for name in list(cases) if i % 2 else list(reversed(cases)):
            seconds = first(cases[name], 0 <= i < compilations)
            for stage, value in seconds.items() if i >= 0 else ():
                times[stage][name].append(value)
    return times


def row_of_times(part: str, what: str, times: Any, reach: float | None) -> Row:
    """Medians, and the median of ratios within a round."""
    pairs = zip(times[OURS], times[FLAX], strict=True)
    row = {
        "part": part,
        "what": what,
        "unit": "seconds",
        **{name: float(np.median(values)) for name, values in times.items()},
        "ratio": timing.ratio(times, OURS, FLAX),
        "reach": reach,
        "ratios": [a / b for a, b in pairs],
    }
    return shown(row)


def row_of_counts(part: str, what: str, counts: Any, reach: float | None) -> Row:
    """Sizes of programs."""
    ratio = counts[OURS] / counts[FLAX]
    row = {"part": part, "what": what, "unit": "count", **counts}
    return shown({**row, "ratio": ratio, "reach": reach})


def shown(row: Row) -> Row:
    """The same, printed, on stderr: stdout is for the table."""
    print(" | ".join(first_step_rows([row])[0]), file=sys.stderr, flush=True)
    return row


# ---- Sizes of programs -------------------------------------------------------------


def inner(value: Any) -> list[Any]:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, tuple | list):
        return [jaxpr for v in value for jaxpr in inner(v)]
    value = getattr(value, "jaxpr", value)  # of a ClosedJaxpr
    return [value] if hasattr(value, "eqns") else []


def equations(jaxpr: Any) -> dict[str, int]:
    """How many equations a jaxpr has, with those of all jaxprs in it.

    `distinct` counts a jaxpr that several equations call once, `inlined` at each call.
    An equation that calls counts as one, beside what it calls.
    """
    sizes: dict[int, tuple[int, int]] = {}  # by identity: own, and inlined

    def inlined(jaxpr: Any) -> int:
        if id(jaxpr) not in sizes:
            called = (inner(list(eqn.params.values())) for eqn in jaxpr.eqns)
            size = sum(1 + sum(map(inlined, jaxprs)) for jaxprs in called)
            sizes[id(jaxpr)] = len(jaxpr.eqns), size
        return sizes[id(jaxpr)][1]

    size = inlined(*inner(jaxpr))
    return {"distinct": sum(own for own, _ in sizes.values()), "inlined": size}


def traced(cases: dict[str, Case]) -> dict[str, Any]:
    """Each case, traced, by name."""
    forget()
    return {name: jax.jit(run).trace(*args) for name, (run, args) in cases.items()}


def operations(traced: Any, platform: str) -> int:
    """How many StableHLO operations the lowered text has; those of regions as well."""
    lowered = traced.lower(lowering_platforms=(platform,))
    return len(OPERATION.findall(lowered.as_text()))


# ---- What is measured --------------------------------------------------------------


class Deep(nn.Module):
    """A multilayer perceptron: dense, norm and ReLU, which is in our norm."""

    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits."""
        for _ in range(DEPTH):
            norm = activated(self.norm, nn.relu)
            x = norm(nn.Dense(WIDTH)(x), use_running_average=not train)
        return nn.Dense(10)(x)


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """What stands for an array in tracing."""
    return jax.ShapeDtypeStruct(shape, dtype)


def variables_of(model: nn.Module, x: Any, **call: Any) -> Any:
    """Parameters and statistics, as shapes."""
    init = functools.partial(model.init, **call)
    variables = jax.eval_shape(init, jax.random.key(0), x)
    return variables["params"], variables["batch_stats"]


def step(model: nn.Module, x: Any) -> Case:
    """A training step: loss, gradient, update by gradient descent."""

    def run(params, stats, x, labels):
        def loss_of(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new, loss

    labels = struct(x.shape[0], dtype=jnp.int32)
    return run, (*variables_of(model, x, train=False), x, labels)


def loss_of_layer(layer: nn.Module) -> Callable[..., Any]:
    """A loss with every derivative of the layer in it, and the new statistics."""

    def loss(params, x, stats, ct, mask):
        y, updated = layer.apply(
            {"params": params, "batch_stats": stats},
            x,
            use_running_average=False,
            mask=mask,
            mutable=["batch_stats"],
        )
        return (y * ct).sum(), updated["batch_stats"]

    return loss


def value_and_grad(layer: nn.Module, shape: tuple[int, ...], masked: bool) -> Case:
    """Of a layer, by parameters and input."""
    x = struct(*shape)
    mask = struct(*shape[:-1], 1, dtype=jnp.bool) if masked else None
    params, stats = variables_of(layer, x, use_running_average=True)
    run = jax.value_and_grad(loss_of_layer(layer), (0, 1), has_aux=True)
    return run, (params, x, stats, x, mask)


def hessian_vector(layer: nn.Module, shape: tuple[int, ...]) -> Case:
    """Of a layer, by parameters and input: forward over reverse."""
    x = struct(*shape)
    params, stats = variables_of(layer, x, use_running_average=True)

    def run(params, x, direction, stats, ct):
        loss = lambda params, x: loss_of_layer(layer)(params, x, stats, ct, None)[0]
        return jax.jvp(jax.grad(loss, (0, 1)), (params, x), direction)[1]

    return run, (params, x, (params, x), stats, x)


def inference(model: nn.Module, x: Any, **call: Any) -> Case:
    """By the running statistics."""

    def run(params, stats, x):
        return model.apply({"params": params, "batch_stats": stats}, x, **call)

    return run, (*variables_of(model, x, **call), x)


# ---- The parts ---------------------------------------------------------------------


def of_resnet(quick: bool) -> list[Row]:
    """A step of ResNet-50: time of each stage, and sizes."""
    part = "ResNet-50, training step"
    images = struct(BATCH, SIZE, SIZE, 3)
    cases = {name: step(resnet50(norm=norm), images) for name, norm in LINEN.items()}
    times = cold(cases, 2 if quick else 6, 0 if quick else 2)
    reaches = {"trace": 0.9, "lower": 0.9, "all": 1.0}
    rows = [
        row_of_times(part, stage, times[stage], reaches[stage])
        for stage in STAGES
        if times[stage][OURS]
    ]
    programs = traced(cases)
    sizes = {name: equations(program.jaxpr) for name, program in programs.items()}
    for how, reach in {"distinct": 1.2, "inlined": None}.items():
        counts = {name: size[how] for name, size in sizes.items()}
        rows.append(row_of_counts(part, f"equations, {how}", counts, reach))
    counts = {name: operations(program, "cpu") for name, program in programs.items()}
    rows.append(row_of_counts(part, "StableHLO operations", counts, 1.1))
    return rows


def of_mlp(quick: bool) -> list[Row]:
    """A step of a deep network of small layers."""
    part = f"MLP of {DEPTH} layers, training step"
    x = struct(*ROWS)
    cases = {name: step(Deep(norm), x) for name, norm in LINEN.items()}
    times = cold(cases, 2 if quick else 6, 1 if quick else 2)
    return [row_of_times(part, stage, times[stage], 1.0) for stage in STAGES]


def of_layer(quick: bool) -> list[Row]:
    """One layer, on rows and on images."""
    rounds = 2 if quick else 6
    made: dict[str, tuple[Callable[..., Case], float]] = {
        "value and gradient": (functools.partial(value_and_grad, masked=False), 1.1),
        "the same, masked": (functools.partial(value_and_grad, masked=True), 1.1),
        "Hessian-vector product": (hessian_vector, 1.2),
    }
    rows = []
    for shape in (ROWS, IMAGES):
        part = f"one layer, {'x'.join(map(str, shape))}"
        for what, (make, reach) in made.items():
            cases = {name: make(norm(), shape) for name, norm in LINEN.items()}
            times = cold(cases, rounds, rounds)
            rows.append(row_of_times(part, f"{what}, all", times["all"], reach))
    return rows


def of_shards(quick: bool) -> list[Row]:
    """One layer under `shard_map`; for a process with `DEVICES` devices."""
    part = f"shard_map, {DEVICES} devices"
    rounds = 2 if quick else 6
    mesh = jax.make_mesh((DEVICES,), ("data",))
    place = lambda spec, tree: jax.tree.map(
        lambda v: v.update(sharding=NamedSharding(mesh, spec)), tree
    )

    def forward(layer):
        def run(params, stats, x, ct):
            y, updated = layer.apply(
                {"params": params, "batch_stats": stats},
                x,
                use_running_average=False,
                mutable=["batch_stats"],
            )
            return y, updated["batch_stats"]

        return run, (P("data"), P())

    def gradient(layer):
        def run(params, stats, x, ct):
            loss = lambda params, x: loss_of_layer(layer)(params, x, stats, ct, None)
            return jax.grad(loss, (0, 1), has_aux=True)(params, x)

        return run, ((P(), P("data")), P())

    rows = []
    made = {"forward": (forward, 1.3), "gradient": (gradient, 1.2)}
    for what, (make, reach) in made.items():
        cases = {}
        for name, norm in LINEN.items():
            x = struct(DEVICES * ROWS[0], ROWS[1])
            params, stats = variables_of(norm(), x, use_running_average=True)
            run, out_specs = make(norm(axis_name="data"))
            run = jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(P(), P(), P("data"), P("data")),
                out_specs=out_specs,
            )
            x = place(P("data"), x)
            cases[name] = run, (place(P(), params), place(P(), stats), x, x)
        times = cold(cases, rounds, rounds)
        rows.append(row_of_times(part, f"{what}, all", times["all"], reach))
    return rows


def of_shards_apart(quick: bool) -> list[Row]:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--sharded", *(["--quick"] if quick else [])]
    child = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(child.stdout)


def of_eager(quick: bool) -> list[Row]:
    """Calls without `jit`, from the second on."""
    x, ct = jax.random.normal(jax.random.key(0), (2, *ROWS))

    def nnx_call(cls, frozen):
        layer = cls(ROWS[-1], use_running_average=frozen, rngs=nnx.Rngs(0))
        return lambda: layer(x)

    def linen_call(cls, frozen):
        layer = cls(use_running_average=frozen)
        variables = layer.init(jax.random.key(0), x)
        if frozen:
            return lambda: layer.apply(variables, x)
        return lambda: layer.apply(variables, x, mutable=["batch_stats"])

    def linen_gradient(cls):
        layer = cls()
        variables = layer.init(jax.random.key(0), x, use_running_average=True)
        run = jax.grad(loss_of_layer(layer), (0, 1), has_aux=True)
        args = variables["params"], x, variables["batch_stats"], ct, None
        return lambda: run(*args)

    made = {
        ("NNX", "evaluation"): (functools.partial(nnx_call, frozen=True), 0.5),
        ("NNX", "training"): (functools.partial(nnx_call, frozen=False), 0.5),
        ("Linen", "evaluation"): (functools.partial(linen_call, frozen=True), 1.0),
        ("Linen", "training"): (functools.partial(linen_call, frozen=False), 0.7),
        ("Linen", "gradient"): (linen_gradient, 1.0),
    }
    rows = []
    for (api, what), (make, reach) in made.items():
        classes = NNX if api == "NNX" else LINEN
        cases = {name: make(cls) for name, cls in classes.items()}
        rounds = 3 if quick else 10
        times = timing.interleaved(cases, rounds=rounds, wait=jax.block_until_ready)
        rows.append(row_of_times(f"without jit, {api}", what, times, reach))
    return rows


def of_inference(quick: bool) -> list[Row]:
    """Operations of evaluation, as lowered for each platform."""
    images = struct(BATCH, SIZE, SIZE, 3)
    parts = {
        f"one layer, {'x'.join(map(str, IMAGES))}": lambda norm: inference(
            norm(), struct(*IMAGES), use_running_average=True
        ),
        "ResNet-50": lambda norm: inference(resnet50(norm=norm), images, train=False),
    }
    rows = []
    for part, make in parts.items():
        if quick and part == "ResNet-50":
            continue
        programs = traced({name: make(norm) for name, norm in LINEN.items()})
        for platform in PLATFORMS:
            counts = {name: operations(v, platform) for name, v in programs.items()}
            what = f"StableHLO operations, {platform}"
            rows.append(row_of_counts(f"inference, {part}", what, counts, 1.0))
    return rows


def draw(results: list[Row]) -> Any:
    """Ours over Flax's, with what we aim at."""
    plt = evidence.style()
    figure, panel = plt.subplots(figsize=(9, 0.27 * len(results) + 1))
    places = np.arange(len(results))
    panel.barh(places, [r["ratio"] for r in results], color=evidence.BLUE)
    panel.axvline(1, color=evidence.ORANGE, lw=1)
    marked = [(i, r["reach"]) for i, r in enumerate(results) if r["reach"]]
    panel.plot(
        [reach for _, reach in marked],
        [i for i, _ in marked],
        "|",
        color=evidence.BLACK,
        markersize=11,
        label="reach",
    )
    labels = [f"{r['part']}: {r['what']}" for r in results]
    panel.set_yticks(places, labels, fontsize=8)
    panel.margins(y=0.01)
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("jbn / Flax")
    panel.set_title("The first step, calls without jit, and sizes of programs")
    panel.legend(fontsize=8)
    return figure


def main() -> None:
    """Measures, prints a table, writes JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--name", default="first_step", help="of the files it writes")
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    if args.sharded:
        jax.config.update("jax_num_cpu_devices", DEVICES)
        print(json.dumps(of_shards(args.quick)))
        return
    parts = of_eager, of_layer, of_inference, of_shards_apart, of_mlp, of_resnet
    found = {part: part(args.quick) for part in parts}
    order = of_resnet, of_mlp, of_layer, of_shards_apart, of_eager, of_inference
    results = [row for part in order for row in found[part]]
    evidence.report(
        args.name,
        __doc__.splitlines()[0],
        [0],
        results,
        evidence.table(FIRST_STEP, first_step_rows(results)),
        draw(results),
        [
            f"ResNet-50: batch {BATCH}, images {SIZE}x{SIZE}",
            f"MLP: batch {ROWS[0]}, width {WIDTH}",
            jax.devices()[0].device_kind,
        ],
        folder=None if args.quick else evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
