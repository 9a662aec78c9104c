"""What does a step of ResNet-50 take on TPU slices of 4, 16, 64 and 256 chips?

    pip install -e ".[train,tpu]"
    python benchmarks/pod.py                 six minutes of CPU for each compilation
    python benchmarks/pod.py --level O0      about one, with the same collectives

Compiles for TPU v5e, where there is none, by libtpu's own compiler; nothing is run.
Images of 224x224 pixels in bytes, bfloat16 inside, 1000 classes, SGD with momentum,
plain `jit` on a batch sharded over all chips. Where a batch does not fit, half of it.
Each compilation adds to docs/evidence/pod.json, and the table of all that is there is
printed: `--norm` and `--chips` choose some of them.

A batch that is far from its running mean takes a second pass, in a branch seldom
taken. The compiler counts its bytes and work as if it always were, so there is a row
without it.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from tables import dumped

from jbn.linen import BatchNorm
from jbn.models import resnet50
from jbn.training.ahead import DoesNotFitError, compile_ahead, topology_devices


FILE = Path(__file__).parents[1] / "docs" / "evidence" / "pod.json"
TOPOLOGIES = {4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
PER_DEVICE = 256


class FlaxNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` in a model that passes a mask, which is `None`."""

    def __call__(self, x, *, use_running_average, mask):
        """As Flax's own."""
        return super().__call__(x, use_running_average, mask=mask)


NO_SECOND = "jbn, no second pass"
NORMS = {
    "jbn": functools.partial(BatchNorm, momentum=0.9),
    # By itself, Flax's gives float32, and so would all after it be.
    "flax.linen": functools.partial(FlaxNorm, momentum=0.9, dtype=jnp.bfloat16),
}
CHOICES = [*NORMS, NO_SECOND]


def lower(norm, devices, per_device):
    """The training step, lowered for the devices."""
    if norm == NO_SECOND:
        with mock.patch("jbn.summary._again", lambda first, *_: first):
            return lower("jbn", devices, per_device)
    model = resnet50(norm=NORMS[norm], dtype=jnp.bfloat16)
    optimizer = optax.sgd(0.1, momentum=0.9)
    mesh = Mesh(np.asarray(devices), ("batch",), axis_types=(AxisType.Auto,))
    everywhere, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))

    def init():
        images = jnp.zeros((1, 224, 224, 3), jnp.uint8)
        variables = model.init(jax.random.key(0), images, train=False)
        params, batch_stats = variables["params"], variables["batch_stats"]
        return params, batch_stats, optimizer.init(params)

    @functools.partial(
        jax.jit,
        in_shardings=(everywhere, by_row, by_row),
        out_shardings=everywhere,
        donate_argnums=0,
    )
    def step(state, images, labels):
        params, batch_stats, opt_state = state

        def loss_fn(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, new_stats), grads = gradient(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), new_stats, opt_state), loss

    rows = per_device * len(devices)
    with jax.set_mesh(mesh):
        return step.lower(
            jax.eval_shape(init),
            jax.ShapeDtypeStruct((rows, 224, 224, 3), jnp.uint8),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        )


def measure(norm, chips, level):
    """Compiles one step, and returns what the compiler says."""
    devices = topology_devices("tpu", TOPOLOGIES[chips])
    jax.clear_caches()  # where the other's second pass would be found
    start, cpu = time.perf_counter(), time.process_time()
    per_device, refused = PER_DEVICE, []
    while True:
        try:
            report = compile_ahead(lower(norm, devices, per_device), level=level)
            break
        except DoesNotFitError as error:
            refused.append({"per_device": per_device, "error": str(error)})
            per_device //= 2
    # XLA joins all-reduces that do not wait for one another: the name is of the first.
    of_norms = [c for c in report.collectives if "norm" in c.op_name]
    return {
        "norm": norm,
        "chips": chips,
        "level": level or "default",
        "topology": TOPOLOGIES[chips],
        "per_device": per_device,
        "refused": refused,
        **report.as_dict(),
        "of_norms": {"count": len(of_norms), "bytes": sum(c.bytes for c in of_norms)},
        "date": datetime.date.today().isoformat(),
        "wall_seconds": round(time.perf_counter() - start),
        "cpu_seconds": round(time.process_time() - cpu),
        "versions": {"python": platform.python_version()}
        | {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "libtpu", "flax", "optax", "jbn")
        },
    }


def save(result):
    """Adds to the file, in place of an older result for the same, and returns all."""
    key = lambda r: (r["level"], r["norm"], r["chips"])
    old = json.loads(FILE.read_text())["results"] if FILE.exists() else []
    results = sorted([r for r in old if key(r) != key(result)] + [result], key=key)
    question = __doc__.partition("\n")[0]
    content = {"question": question, "results": results}
    FILE.write_text(dumped(content) + "\n")
    return results


def table(results):
    """A Markdown table."""
    lines = [
        "| effort | norm | chips | images a chip | memory, GiB | bytes accessed, GB"
        " | TFLOP | collectives | of norms | MB | of norms, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        kinds = r["collectives"]
        cells = [
            r["level"],
            r["norm"],
            r["chips"],
            r["per_device"],
            f"{r['peak'] / 2**30:.2f}",
            f"{r['bytes_accessed'] / 1e9:.1f}",
            f"{r['flops'] / 1e12:.2f}",
            ", ".join(
                f"{k['count']} {name}"
                + (f" ({n} in branches)" if (n := k.get("in_branches")) else "")
                for name, k in kinds.items()
            ),
            r["of_norms"]["count"],
            f"{sum(k['bytes'] for k in kinds.values()) / 1e6:.1f}",
            f"{r['of_norms']['bytes'] / 1e6:.2f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main():
    """Compiles what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--norm", nargs="+", choices=CHOICES, default=CHOICES)
    parser.add_argument(
        "--chips", nargs="+", type=int, choices=TOPOLOGIES, default=list(TOPOLOGIES)
    )
    parser.add_argument("--level", choices=("O0", "O1", "O2", "O3"))
    args = parser.parse_args()
    results = []
    for chips in args.chips:
        for norm in args.norm:
            print(f"{norm}, {chips} chips", flush=True)
            results = save(measure(norm, chips, args.level))
    print(table(results))


if __name__ == "__main__":
    main()
