"""What a compilation tells. For TPUs: pip install libtpu (690 MB), and -m slow."""

import dataclasses
import functools
import importlib.util
import json
import os
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec as P,
    SingleDeviceSharding,
)

from jbn.linen import BatchNorm
from jbn.models import MLP, ResNet
from jbn.training.ahead import (
    CompileReport,
    DoesNotFitError,
    compile_ahead,
    find_collectives,
    topology_devices,
)
from jbn.training.devices import Device
from jbn.training.errors import UsageError


Parallel = Literal["pmap", "jit"]
tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='no TPU compiler: pip install "jbn[tpu]", or the libtpu of your JAX',
)


@pytest.fixture(autouse=True)
def platforms():
    """`topology_devices` leaves JAX with the CPU alone."""
    before = jax.config.values["jax_platforms"]
    yield
    jax.config.update("jax_platforms", before)


def lower_step(
    make_model: Callable[[Any], Any], devices: list[Device], parallel: Parallel
) -> jax.stages.Lowered:
    """Lowers the trainer's own step, on images of 8x8 pixels, 16 for each device."""
    from jbn.training.executor import Executor
    from jbn.training.step import create_state, make_train_step
    from jbn.training.tasks import Supervised

    executor = Executor(devices, parallel)
    norm = functools.partial(BatchNorm, momentum=0.9, axis_name=executor.axis_name)
    task = Supervised(
        kind="classification",
        model=make_model(norm),
        image_shape=(8, 8, 3),
        num_classes=10,
        optimizer=optax.sgd(0.1, momentum=0.9),
        axis_name=executor.axis_name,
    )
    state = jax.eval_shape(lambda: create_state(task, 0))
    rows = 16 * len(devices)
    batch = {
        "image": jax.ShapeDtypeStruct((rows, 8, 8, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "index": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    return executor.lower(make_train_step(task), state, batch)


def compile_mapped(
    f: Callable[..., Any], out: str | None = None, devices: list[Device] | None = None
) -> CompileReport:
    """Compiles `f` of (5, 8) numbers on each of four devices."""
    devices = devices or jax.devices()[:4]
    out_specs = P() if out is None else P(out)
    mesh = Mesh(np.asarray(devices), ("d",), axis_types=(AxisType.Auto,))
    f = jax.shard_map(
        f, mesh=mesh, in_specs=P(None, "d"), out_specs=out_specs, check_vma=False
    )
    x = jax.ShapeDtypeStruct((5, 32), "f", sharding=NamedSharding(mesh, P(None, "d")))
    return compile_ahead(jax.jit(f).lower(x))


@pytest.mark.devices
def test_a_sum_over_devices():
    report = compile_mapped(lambda x: lax.psum(x, "d"))
    (found,) = report.collectives
    assert (found.kind, found.bytes, found.in_loop) == ("all-reduce", 4 * 40, False)
    assert "psum" in found.op_name
    assert report.num_devices == 4
    assert report.arguments == report.outputs == 4 * 40
    assert report.peak >= 2 * 4 * 40
    assert report.flops is not None
    assert report.bytes_accessed is not None


@pytest.mark.devices
def test_no_communication():
    report = compile_mapped(lambda x: 2 * x, "d")
    assert report.collectives == ()
    assert report.flops == 40
    assert "collectives     none" in str(report)


@pytest.mark.devices
def test_loops_count_once_and_say_so():
    def f(x):
        body = lambda total, row: (total + lax.psum(row, "d"), None)
        total, _ = lax.scan(body, jnp.zeros(8), x)
        return lax.psum(total, "d")

    report = compile_mapped(f)
    assert [(c.bytes, c.in_loop) for c in report.collectives] == [
        (32, True),
        (32, False),
    ]
    assert report.as_dict()["collectives"] == {
        "all-reduce": {
            "count": 2,
            "in_loops": 1,
            "in_branches": 0,
            "bytes": 64,
            "largest": 32,
        }
    }
    assert "2 all-reduce, 64 bytes (largest: 32 bytes); 1 in loops" in str(report)


@pytest.mark.devices
@pytest.mark.parametrize(
    ("kind", "f", "size"),
    [
        ("all-gather", lambda x: lax.all_gather(x, "d"), 4 * 160),
        ("reduce-scatter", lambda x: lax.psum_scatter(x[:4], "d"), 4 * 8),
        ("all-to-all", lambda x: lax.all_to_all(x[:4], "d", 0, 0), 4 * 32),
        (
            "collective-permute",
            lambda x: lax.ppermute(x, "d", [(i, (i + 1) % 4) for i in range(4)]),
            4 * 40,
        ),
    ],
)
def test_kinds(kind: str, f: Callable[..., Any], size: int):
    report = compile_mapped(f, "d")
    assert [(c.kind, c.bytes) for c in report.collectives] == [(kind, size)]


@pytest.mark.devices
def test_branches_say_so():
    def f(x):
        total = lax.psum(x.sum(), "d")
        # Each device has the same total, and takes the same branch.
        return lax.cond(total > 0, lambda: lax.psum(x, "d"), lambda: x)

    report = compile_mapped(f)
    assert sorted((c.bytes, c.in_branch) for c in report.collectives) == [
        (4, False),
        (4 * 40, True),
    ]
    assert report.as_dict()["collectives"]["all-reduce"]["in_branches"] == 1
    assert "; 1 in branches" in str(report)


def test_a_tuple_in_one_message():
    hlo = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (x: f32[4,3]) -> f32[3] {
  %x = f32[4,3]{1,0:T(4,128)} parameter(0)
  %all-reduce.1 = (f32[4,3]{1,0:T(4,128)}, bf16[2,3]{1,0}, /*index=2*/pred[5]{0}) \
all-reduce(%x, %y, %z), to_apply=%sum, metadata={op_name="jit(f)/a \\"quoted\\" name"}
  ROOT %tuple = f32[3] get-tuple-element(%all-reduce.1), index=0
}
"""
    (found,) = find_collectives(hlo)
    assert found.bytes == 4 * 12 + 2 * 6 + 5
    assert found.op_name == 'jit(f)/a \\"quoted\\" name'


def test_two_halves_are_one_message():
    """Of which the second has the result; and what loops call is in the loop."""
    hlo = """\
%called (p: f32[8]) -> f32[32] {
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}
  ROOT %done = f32[32]{0} all-gather-done(%start)
}

%body (p: (s32[], s4[3], f8e4m3fn[7])) -> (s32[], s4[3], f8e4m3fn[7]) {
  %call = f32[32]{0} call(%q), to_apply=%called
  ROOT %all-to-all = (s4[3]{0}, f8e4m3fn[7]{0}, token[]) all-to-all(%a, %b, %c)
}

%test (p: (s32[], s4[3], f8e4m3fn[7])) -> pred[] {
  ROOT %lt = pred[] compare(%p, %p), direction=LT
}

ENTRY main (x: f32[8]) -> f32[8] {
  while.1 = (s32[], s4[3], f8e4m3fn[7]) while(t), condition=%test, body=%body
  start.1 = f32[8]{0} all-reduce-start(x), to_apply=add
  ROOT done.1 = f32[8]{0} all-reduce-done(start.1)
}
"""
    assert [(c.kind, c.bytes, c.in_loop) for c in find_collectives(hlo)] == [
        ("all-gather", 128, True),
        ("all-to-all", 2 + 7, True),
        ("all-reduce", 32, False),
    ]


@pytest.mark.devices
def test_what_fits():
    report = compile_mapped(lambda x: lax.psum(x, "d"))
    assert report.memory is None  # a CPU has whatever the machine has
    assert report.fits is None
    assert report.total == report.arguments + report.outputs + report.temporaries
    parts = {"arguments": 3, "outputs": 3, "aliased": 2, "temporaries": 2, "code": 1}
    gib = {name: count * 2**30 for name, count in parts.items()}
    report = dataclasses.replace(report, **gib, memory=7 * 2**30)
    assert report.fits
    assert "7.00 GiB of 7.00 GiB: fits" in str(report)
    # The program counts, too.
    report = dataclasses.replace(report, code=2**30 + 2**29)
    assert report.fits is False
    assert "7.50 GiB of 7.00 GiB: DOES NOT FIT" in str(report)
    shown = re.findall(r"^    .*?(\d\.\d\d) GiB", str(report), flags=re.MULTILINE)
    assert sum(map(float, shown)) == 7.5
    content = json.loads(json.dumps(report.as_dict()))
    assert content["fits"] is False
    assert content["device_kind"] == "cpu"


class Refused:
    """A lowered computation that does not compile."""

    def __init__(self, error: str):
        self.error = error

    def compile(self, options: Any = None) -> Any:
        raise jax.errors.JaxRuntimeError(self.error)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.00G of "
            'hbm.\n  1. Size: 4.00G\n     Operator: op_name="jit(f)/dot_general"\n',
            None,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.00G of "
            "15.75G hbm. Exceeded hbm capacity by 258.00M.\n\n"
            '  1. Size: 4.00M\n     Operator: op_name="jit(f)/dot_general"\n',
            r"needs 16.00 GiB of the 15.75 GiB of memory .* takes 4.00 MiB: "
            r"jit\(f\)/dot_general\. Use smaller batches",
        ),
        (
            "RESOURCE_EXHAUSTED: Allocation (size=2199023255552) would exceed memory "
            "(size=17179869184) :: %s0 = inlined_call_operand.hbm",
            r"needs 2048.00 GiB of the 16.00 GiB of memory",
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_what_the_compiler_refuses(error: str, message: str | None, untyped):
    """A message where memory is the reason; otherwise what the compiler said."""
    lowered: Any = Refused(error)
    if message is None:
        with pytest.raises(jax.errors.JaxRuntimeError):
            compile_ahead(lowered)
    else:
        with pytest.raises(DoesNotFitError, match=message):
            compile_ahead(lowered)


def test_levels_are_those_of_the_compiler():
    f = jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.ones(3))
    for level in (None, "O0", "O3"):
        assert compile_ahead(f, level=level).outputs == 12


def test_without_the_compiler_of_tpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UsageError, match=r'not installed.*pip install "jbn\[tpu\]"'):
        topology_devices("tpu", "v5e:2x2")


@pytest.mark.parametrize("topology", ["h100", "missing.txt:1x4", f"{__file__}:4"])
def test_gpus_need_a_description(topology: str):
    with pytest.raises(UsageError, match=r"h100.txt:1x8.*target_config"):
        topology_devices("gpu", topology)


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 80000000000 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "H100"
"""


def test_gpus(tmp_path):
    """Skipped without jax-cuda13-plugin and jax-cuda13-pjrt; no GPU is needed."""
    (tmp_path / "h100.txt").write_text(H100)
    (tmp_path / "wrong.txt").write_text("threads: many")
    try:
        devices = topology_devices("gpu", f"{tmp_path}/h100.txt:2x2")
    except UsageError as error:
        pytest.skip(str(error))
    assert [d.process_index for d in devices] == [0, 0, 1, 1]
    report = compile_mapped(lambda x: lax.psum(x, "d"), devices=devices)
    assert [(c.kind, c.bytes) for c in report.collectives] == [("all-reduce", 160)]
    assert report.device_kind == "H100"
    assert report.memory == 60_000_000_000
    with pytest.raises(UsageError, match="the GPU compiler cannot read"):
        topology_devices("gpu", f"{tmp_path}/wrong.txt:1x1")


@tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "number", "kind"),
    [
        ("v5e:1x1", 1, "TPU v5 lite"),
        ("v5e:2x1", 2, "TPU v5 lite"),
        ("v5e:16x16", 256, "TPU v5 lite"),
        ("v6e:4x4", 16, "TPU v6 lite"),
        ("v4:2x2x1", 8, "TPU v4"),
        ("v5p:2x2x2", 8, "TPU v5"),
        ("tpu7x:2x2x1", 8, "TPU7x"),
    ],
)
def test_topologies(topology: str, number: int, kind: str):
    before = dict(os.environ)
    devices = topology_devices("tpu", topology)
    assert len(devices) == number
    assert {d.device_kind for d in devices} == {kind}
    # TPU_LIBRARY_PATH is set by the libtpu package itself.
    assert {**before, "TPU_LIBRARY_PATH": ""} == {**os.environ, "TPU_LIBRARY_PATH": ""}


@tpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e", "v5e:3x3", "v9:2x2"])
def test_unknown_topologies(topology: str):
    with pytest.raises(UsageError, match=rf"{topology}: .* for example: v5e:1x1"):
        topology_devices("tpu", topology)


@tpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "resnet"])
@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_one_all_reduce_forward_and_one_backward(kind: str, parallel: Parallel):
    """For each norm layer, and one for the gradients, whose parts XLA joins.

    It also joins those of a shortcut's norm and of the last norm that this goes around,
    which do not wait for one another. So the ResNet's 6 layers count as 5.
    """
    make_model = {
        "mlp": lambda norm: MLP(features=(24, 40), norm=norm),
        "resnet": lambda norm: ResNet(
            stage_sizes=(1, 1), widths=(16, 32), num_classes=10, stem="small", norm=norm
        ),
    }[kind]
    layers = {"mlp": 2, "resnet": 5}[kind]
    lowered = lower_step(make_model, topology_devices("tpu", "v5e:2x2"), parallel)
    report = compile_ahead(lowered, level="O0")
    assert report.num_devices == 4
    assert report.fits
    assert {c.kind for c in report.collectives} == {"all-reduce"}
    assert len(report.collectives) == 2 * layers + 1
    *forward, gradients = sorted(
        c.bytes for c in report.collectives if "transpose(" not in c.op_name
    )
    backward = sorted(c.bytes for c in report.collectives if "transpose(" in c.op_name)
    assert len(backward) == len(forward) == layers
    # Two sums for each channel; and mean and variance of each of the four devices, with
    # some single numbers: not of the devices that JAX has here.
    channels = {"mlp": [24, 40], "resnet": [16, 16, 16, 32, 64]}[kind]
    assert backward == [8 * n for n in channels]
    for size, n in zip(forward, channels, strict=True):
        assert 12 * 4 * n <= size <= 12 * 4 * n + 64
    assert gradients > max(forward)


@tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    ["v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"],
)
def test_memory_is_what_the_compiler_holds_to(topology: str):
    device = topology_devices("tpu", topology)[0]

    def compile_products(n: int) -> CompileReport:
        x = jax.ShapeDtypeStruct((n, n), "f", sharding=SingleDeviceSharding(device))
        products = jax.jit(lambda x: (x @ x) @ (x.T @ x.T)).lower(x)
        return compile_ahead(products, level="O0")

    memory = compile_products(256).memory
    assert memory is not None
    # There are four matrices at a time, or two where arguments do not count (v4).
    with pytest.raises(DoesNotFitError, match="does not fit") as refused:
        compile_products(int((1.1 * memory / (8 if "v4" in topology else 16)) ** 0.5))
    available = re.search(r"of the ([\d.]+) GiB", str(refused.value))
    assert available is not None
    assert float(available[1]) == pytest.approx(memory / 2**30, abs=0.01)
