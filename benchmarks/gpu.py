"""How fast is a norm layer on a GPU? Beside the card itself, Flax and PyTorch.

    python benchmarks/gpu.py [--without-torch]

Shapes of a ResNet-50 at 256 images; the layer alone, with ReLU, and with a residual and
ReLU, which ours has in it and others behind it. What is compared is the time that the
card computes, by its profiler: not the time to start its kernels, which a whole step,
compiled as one program, does not have. On JAX, backward is what forward and backward
take in one program, as in a step, less forward: what is kept between is the compiler's
choice. PyTorch keeps what it always does.

The floor is the time to copy as many bytes as must be read and written: forward reads
`x` twice (for its statistics, and to normalize) and writes once, backward reads `x` and
the cotangent twice and writes once. A residual is read once more. Backward, it takes
what is behind ReLU (the output, say), to begin with; its own cotangent, that is written
then, is read in place of that of the output. Evaluation reads and writes once.

Then a whole step of a ResNet-50, of 128 images: time, by the clock, and memory.
"""

import argparse
import collections
import concurrent.futures
import functools
import glob
import os
import statistics
import sys
import tempfile
import time


# Both libraries have to find room on the card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["JBN_BENCHMARK"] = "1"  # `network` need not start anew, on one core

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import network
import numpy as np
import timing
from peers import FLAX, OURS, flax_linen

import jbn
from jbn.models import resnet50


SHAPES = [
    (256, 112, 112, 64),
    (256, 56, 56, 256),
    (256, 28, 28, 512),
    (256, 14, 14, 1024),
    (256, 7, 7, 2048),
]
DTYPES = "bfloat16", "float32"
FORMS = "norm", "ReLU", "residual, ReLU"
# Arrays of the size of the input that must be read or written.
PASSES = {
    "forward": dict(zip(FORMS, (3, 3, 4), strict=True)),
    "backward": dict(zip(FORMS, (5, 5, 7), strict=True)),
    "training": dict(zip(FORMS, (8, 8, 11), strict=True)),
    "evaluation": dict(zip(FORMS, (2, 2, 3), strict=True)),
}
TORCH = "PyTorch", "PyTorch, compiled", "PyTorch, channels first"
COLORS = dict(
    zip(
        (OURS, FLAX, *TORCH),
        (evidence.BLUE, evidence.ORANGE, evidence.BLACK, "#777777", "#bbbbbb"),
        strict=True,
    )
)
REPEATS = 10
BATCH, SIZE = 128, 224  # of a step


# ---- JAX ---------------------------------------------------------------------------


def jbn_layer(features, dtype, form):
    """A function of (params, x, residual, train), and its params."""
    params, stats = jbn.init(features)
    activation = None if form == "norm" else jax.nn.relu

    def apply(params, x, residual, train):
        return jbn.batch_norm(
            x,
            params,
            stats,
            use_running_average=not train,
            residual=residual,
            activation=activation,
        )

    return apply, params


def flax_layer(features, dtype, form):
    """Likewise, with ReLU and addition behind it."""
    norm, params, stats = flax_linen(features, dtype)

    def apply(params, x, residual, train):
        y, new = norm(params, stats, x, train)
        y = y if residual is None else y + residual
        return y if form == "norm" else nn.relu(y), new

    return apply, params


def named(name, f):
    """A function that the profiler calls so."""

    def run(*args):
        return f(*args)

    run.__name__ = name
    return jax.jit(run)


def functions(apply):
    """What is timed of a layer."""

    def forward(params, x, residual):
        return apply(params, x, residual, True)

    def training(params, x, residual, ct):
        y, vjp, new = jax.vjp(forward, params, x, residual, has_aux=True)
        # As in a step, where a cotangent comes of an output.
        y, ct = jax.lax.optimization_barrier((y, ct))
        return y, new, vjp(ct)

    def evaluation(params, x, residual):
        return apply(params, x, residual, False)[0]

    return {"forward": forward, "training": training, "evaluation": evaluation}


def jax_programs(name, layer, x, residual, ct, form):
    """The same, lowered, with their arguments."""
    apply, params = layer(x.shape[-1], x.dtype, form)
    found = {}
    for what, f in functions(apply).items():
        args = (params, x, residual, *([ct] if what == "training" else []))
        found[what] = named(f"{name}_{what}", f).lower(*args), args
    return found


def jax_times(shape, dtype, pool):
    """Microseconds by what is timed, form and library."""
    keys = jax.random.split(jax.random.key(0), 3)
    make = jax.jit(lambda key: jax.random.normal(key, shape).astype(dtype) + dtype(0.1))
    x, residual, ct = map(make, keys)
    # As fast as the card goes: XLA copies numbers of 32 bits.
    words = jnp.ones(x.nbytes // 4, jnp.uint32)
    copy = named("copy", lambda v: v ^ 1).lower(words).compile()
    cases = {}
    for form in FORMS:
        skip = residual if form.startswith("residual") else None
        for who, layer in {OURS: jbn_layer, FLAX: flax_layer}.items():
            name = f"case{len(cases)}"
            cases[form, who] = name, jax_programs(name, layer, x, skip, ct, form)
    compile_all = lambda case: {
        what: (lowered.compile(), args) for what, (lowered, args) in case[1].items()
    }
    compiled = dict(zip(cases, pool.map(compile_all, cases.values()), strict=True))

    def run_all():
        for programs in compiled.values():
            for program, args in programs.values():
                jax.block_until_ready(program(*args))
        copy(words).block_until_ready()

    run_all()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(REPEATS):
                run_all()
        spent = kernels(folder)
    times = {what: {form: {} for form in FORMS} for what in PASSES}
    for (form, who), (name, _) in cases.items():
        for what in ("forward", "training", "evaluation"):
            times[what][form][who] = sum(spent[f"{name}_{what}"].values())
        both, forward = (times[what][form][who] for what in ("training", "forward"))
        times["backward"][form][who] = both - forward
    return sum(spent["copy"].values()), times


def kernels(folder):
    """Microseconds of a run by program and kernel: medians, times how often it runs."""
    (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if line.name.startswith("Stream") else ():
                program = str(dict(event.stats).get("hlo_module", ""))
                program = program.partition("(")[0].removeprefix("jit_")
                found[program][event.name].append(event.duration_ns / 1e3)
    return {
        program: {
            kernel: statistics.median(times) * len(times) / REPEATS
            for kernel, times in by_kernel.items()
        }
        for program, by_kernel in found.items()
    }


# ---- PyTorch -----------------------------------------------------------------------


def torch_times(shape, dtype, forms):
    """Likewise, by PyTorch."""
    import torch

    def layer(form):
        norm = torch.nn.BatchNorm2d(shape[-1]).cuda()

        def apply(x, residual):
            y = norm(x)
            y = y if residual is None else y + residual
            return y if form == "norm" else torch.relu(y)

        return norm, apply

    size = shape[0], shape[3], shape[1], shape[2]
    times = {what: {form: {} for form in FORMS} for what in PASSES}
    for form in forms:
        for who in TORCH:
            last = torch.channels_last
            if who == "PyTorch, channels first":
                last = torch.contiguous_format
            make = functools.partial(
                torch.randn, size, device="cuda", dtype=getattr(torch, dtype)
            )
            x, ct, residual = (make().contiguous(memory_format=last) for _ in range(3))
            x.requires_grad_()
            residual.requires_grad_()
            residual = residual if form.startswith("residual") else None
            norm, apply = layer(form)
            if who == "PyTorch, compiled":
                torch._dynamo.reset()
                apply = torch.compile(apply, dynamic=False)
            y = apply(x, residual)
            inputs = [v for v in (x, residual, norm.weight, norm.bias) if v is not None]
            forward = functools.partial(apply, x, residual)
            backward = functools.partial(
                torch.autograd.grad, y, inputs, ct, retain_graph=True
            )
            both = [torch_time(forward), torch_time(backward)]
            for what, spent in zip(PASSES, (*both, sum(both)), strict=False):
                times[what][form][who] = spent
            norm.eval()
            with torch.no_grad():
                times["evaluation"][form][who] = torch_time(forward)
    return times


def torch_time(f):
    """Microseconds on the card, which waits until all is queued."""
    import torch

    for _ in range(3):
        f()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(5):
        torch.cuda._sleep(int(2e7))  # cycles, about 10 ms
        start.record()
        for _ in range(REPEATS):
            f()
        end.record()
        torch.cuda.synchronize()
        found.append(1e3 * start.elapsed_time(end) / REPEATS)
    return statistics.median(found)


# ---- A whole step ------------------------------------------------------------------


def jax_step(cls, dtype):
    """Compiled, with its arguments."""
    dtype = jnp.dtype(dtype)
    norm = functools.partial(cls, dtype=dtype)
    return network.step(resnet50, norm, dtype, BATCH, SIZE)


def torch_step(dtype, compiled):
    """A function that runs one, and the memory that it takes beside its state."""
    import torch
    import torchvision

    torch.set_float32_matmul_precision("high")  # as XLA's default
    model = torchvision.models.resnet50().cuda()
    model = model.to(memory_format=torch.channels_last)
    run_model = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(BATCH, 3, SIZE, SIZE, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (BATCH,), device="cuda")

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = run_model(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return step, torch.cuda.max_memory_allocated() - before


def seconds_of(steps, wait):
    """Seconds of a step by name, by the clock."""
    clock = time.perf_counter
    found = timing.interleaved(steps, rounds=5, least=0.1, clock=clock, wait=wait)
    return {name: statistics.median(times) for name, times in found.items()}


# ---- The question ------------------------------------------------------------------


def draw(op):
    """Forward and backward of the bfloat16 forms, as shares of the card's speed."""
    plt = evidence.style()
    figure, panels = plt.subplots(3, 2, figsize=(11, 8), sharex=True, sharey=True)
    chosen = [r for r in op if r["dtype"] == "bfloat16"]
    for row, form in zip(panels, FORMS, strict=True):
        for panel, what in zip(row, ("forward", "backward"), strict=True):
            names = [n for n in COLORS if n in chosen[0]["microseconds"][what][form]]
            for i, name in enumerate(names):
                places = np.arange(len(chosen)) + (i - len(names) / 2 + 0.5) * 0.16
                shares = [
                    r["floors"][what][form] / time_of(r, what, form, name)
                    for r in chosen
                ]
                panel.bar(places, shares, 0.16, color=COLORS[name], label=name)
            panel.axhline(1, color="k", lw=1, ls=":")
            panel.set_title(f"{form}: {what}")
            panel.set_xticks(
                range(len(chosen)), [r["shape"] for r in chosen], fontsize=7
            )
    for panel in panels[:, 0]:
        panel.set_ylabel("of copy speed")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), ncols=5, loc="outside upper center"
    )
    return figure


def time_of(result, what, form, name):
    """Microseconds."""
    return result["microseconds"][what][form].get(name, float("nan"))


def main():
    """Measures, prints a table, writes JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without-torch", action="store_true")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        print("gpu: left out, there is none", file=sys.stderr)
        return
    with_torch = not args.without_torch
    started = time.perf_counter()

    def say(*words):
        print(f"{time.perf_counter() - started:.0f} s:", *words, flush=True)

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    layers = {OURS: jbn.BatchNorm, FLAX: nn.BatchNorm}
    ahead = {
        (dtype, who): pool.submit(jax_step, cls, dtype)
        for dtype in DTYPES
        for who, cls in layers.items()
    }
    # Compiled first: trying algorithms, it keeps the card busy.
    compiled = {key: future.result() for key, future in ahead.items()}
    say("networks compiled")
    op, steps = [], []
    for dtype in DTYPES:
        cases, about = {}, {}
        for who in layers:
            program, inputs = compiled.pop((dtype, who))
            cases[who] = functools.partial(program, *inputs)
            about[who] = {
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes
            }
        for who, seconds in seconds_of(cases, jax.block_until_ready).items():
            about[who] |= {"seconds": seconds, "loss": float(cases[who]()[-1])}
        del program, inputs, cases
        steps.append({"dtype": dtype, "by": about})
        say(steps[-1])
    for dtype in DTYPES:
        for shape in SHAPES:
            copy, times = jax_times(shape, jnp.dtype(dtype).type, pool)
            jax.clear_caches()
            op.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "dtype": dtype,
                    "copy": copy,
                    "floors": {
                        what: {form: copy * n / 2 for form, n in passes.items()}
                        for what, passes in PASSES.items()
                    },
                    "microseconds": times,
                }
            )
            say(op[-1]["shape"], dtype, f"copy {copy:.0f}", times)
    if with_torch:
        import torch

        for result in op:
            forms = FORMS if result["dtype"] == "bfloat16" else FORMS[:2]
            shape = tuple(map(int, result["shape"].split("x")))
            for what, by_form in torch_times(shape, result["dtype"], forms).items():
                for form, by_who in by_form.items():
                    result["microseconds"][what][form] |= by_who
            say(result["shape"], result["dtype"], "PyTorch")
        for line in steps:
            for who, option in zip(TORCH, (False, True), strict=False):
                if option and line["dtype"] == "float32":
                    continue  # a minute for the other will do
                step, memory = torch_step(line["dtype"], option)
                wait = lambda _: torch.cuda.synchronize()
                line["by"][who] = {
                    "seconds": seconds_of({who: step}, wait)[who],
                    "temporary_bytes": memory,
                }
                del step
                torch.cuda.empty_cache()
            say(line)
    header = ["shape", "dtype", "form", *(f"{w}, of copy speed" for w in PASSES)]
    rows = [
        [
            r["shape"],
            r["dtype"],
            form,
            *(
                f"{r['floors'][w][form] / time_of(r, w, form, OURS):.2f}"
                for w in PASSES
            ),
        ]
        for r in op
        for form in FORMS
    ]
    evidence.report(
        "gpu",
        __doc__.splitlines()[0],
        [0],
        {"op": op, "steps": steps},
        evidence.table(header, rows),
        draw(op),
        [jax.devices()[0].device_kind],
        folder=evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
