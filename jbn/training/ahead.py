"""Ahead-of-time compilation for devices that need not be present, and its report."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jaxlib import xla_client

from jbn.training.devices import Device
from jbn.training.errors import UsageError


# Environment of libtpu without a TPU. It is read when libtpu is loaded, and must not
# persist: on a real TPU the metadata server knows the other hosts.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not query Google Cloud's metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # do not lock out other processes
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any value: these two only silence warnings
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_EXAMPLES = (
    "v5e:1x1 (one chip), v5e:2x2 (4), v5e:16x16 (256), v6e:4x4 (16), v4:2x2x1,"
    " v5p:2x2x2, tpu7x:2x2x1"
)

_MIB = 2**20
# Memory available to programs by kind of device: the capacity minus the reserved part,
# as in the compiler of libtpu 0.0.41 ("Ran out of memory in memory space hbm. Used
# 16.00G of 15.75G"). Chips of v2, v3, v4 and 7x are two devices.
_TPU_MEMORY = {
    "TPU v2": 8 * 1024 * _MIB - 530 * _MIB,
    "TPU v3": 16 * 1024 * _MIB - 530 * _MIB,
    "TPU v4": 16 * 1024 * _MIB - 768 * _MIB,
    "TPU v5 lite": 16 * 1024 * _MIB - 258 * _MIB,
    "TPU v5": 96 * 1024 * _MIB - 263 * _MIB,
    "TPU v6 lite": 32 * 1024 * _MIB - 772 * _MIB,
    "TPU7x": 95 * 1024 * _MIB - 260 * _MIB,
}
# XLA's numbers for them (`ExecutionOptions.EffortLevel`).
_LEVELS = {"O0": 9, "O1": 19, "O2": 29, "O3": 39}


class DoesNotFitError(UsageError):
    """The compiler refused: the step needs more memory than the device has."""


def topology_devices(accelerator: Literal["tpu", "gpu"], topology: str) -> list[Device]:
    """Describes devices to compile for, which need not be present.

    Afterwards JAX itself only uses the CPU.

    Args:
        accelerator: The kind.
        topology: For TPUs, the generation and the shape of the slice, such as
            `v5e:4x4`. For GPUs, a file that describes one, the number of hosts and the
            GPUs of each, such as `h100.txt:1x8`. On a machine with such a GPU, print
            the file by
            `jaxlib.xla_client.get_topology_for_devices(jax.devices()).target_config`.

    Returns:
        The devices, for a `Mesh` or for `jax.pmap(devices=...)`.

    Raises:
        UsageError: If the compiler is not installed, or does not know the topology.
    """
    jax.config.update("jax_platforms", "cpu")
    return _tpus(topology) if accelerator == "tpu" else _gpus(topology)


def _tpus(topology: str) -> list[Device]:
    if "TPU_LIBRARY_PATH" not in os.environ and not importlib.util.find_spec("libtpu"):
        raise UsageError(
            "Compiling for TPUs needs their compiler, which is not installed (690 MB;"
            ' no TPU is needed): pip install "jbn[tpu]".'
        )
    sizes = [int(n) for n in re.findall(r"\d+", topology.partition(":")[2])]
    options: dict[str, Any] = {}
    if 1 in sizes[:2]:
        # By default a host has 2x2 chips, which do not fit this slice.
        options["chips_per_host_bounds"] = (*(min(n, 2) for n in sizes[:2]), 1)
    try:
        with _environment(_ALONE):
            found = topologies.get_topology_desc(topology, "tpu", **options)
    except Exception as error:  # its type differs between versions of JAX
        raise UsageError(
            f"--topology={topology}: the TPU compiler does not know it ({error}). "
            f"Known are, for example: {_EXAMPLES}."
        ) from None
    return list(found.devices)


def _gpus(topology: str) -> list[Device]:
    path, _, shape = topology.rpartition(":")
    if not re.fullmatch(r"\d+x\d+", shape) or not Path(path).is_file():
        raise UsageError(
            f"--topology={topology}: for GPUs, pass a file, a colon, the number of "
            "hosts and the number of GPUs of each: h100.txt:1x8. Print the file on "
            "a machine with such a GPU: "
            'python -c "import jax; from jaxlib import xla_client as x; '
            'print(x.get_topology_for_devices(jax.devices()).target_config)" > h100.txt'
        )
    jax.devices()  # registers the plugins
    try:
        found = topologies.get_topology_desc(
            "", "cuda", target_config=Path(path).read_text(), topology=f"1x{shape}"
        )
    except NotImplementedError:
        version = jax.__version__
        raise UsageError(
            "Compiling for GPUs needs their compiler, which is not installed (400 MB;"
            " no GPU is needed): pip install --no-deps"
            f" jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}."
        ) from None
    except Exception as error:
        raise UsageError(
            f"--topology={topology}: the GPU compiler cannot read {path} ({error})."
        ) from None
    return list(found.devices)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Temporarily sets environment variables that are not set."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def compile_ahead(
    lowered: jax.stages.Lowered, *, level: Literal["O0", "O1", "O2", "O3"] | None = None
) -> "CompileReport":
    """Compiles, and reports memory, work and communication.

    Lower a step on a sharded batch under `jax.set_mesh(mesh)`, where norm layers find
    the number of devices: otherwise it differs from the step that will run.

    Args:
        lowered: Result of `jax.jit(step).lower(...)` or `jax.pmap(step).lower(...)`,
            for local devices or those of `topology_devices`.
        level: The compiler's effort; by default that of a run. `O0` takes a fraction of
            the time. Collectives are the same, but memory and bytes are not: only
            compare numbers of the same level.

    Returns:
        The report.

    Raises:
        DoesNotFitError: If the compiler runs out of device memory.
    """
    options: Any = None if level is None else {"optimization_level": _LEVELS[level]}
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        message = _does_not_fit(str(error))
        if message is None:
            raise
        raise DoesNotFitError(message) from None
    return CompileReport.from_compiled(compiled)


def _does_not_fit(error: str) -> str | None:
    """The compiler's message about memory, in one paragraph, or `None`."""
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", error):
        needed, needed_unit, has, has_unit = found.groups()
        text = f"{needed} {needed_unit}iB of the {has} {has_unit}iB"
    elif found := re.search(
        r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)", error
    ):
        text = " of the ".join(_bytes(int(n)) for n in found.groups())
    else:
        return None
    largest = re.search(
        r"1\. Size: ([\d.]+)([KMGT]?).*?(?:op_name=\"(.*?)\"|Shape: (\S+))",
        error,
        flags=re.DOTALL,
    )
    message = f"The step does not fit: it needs {text} of memory of a device."
    if largest:
        size, unit, name, shape = largest.groups()
        message += f" The largest array takes {size} {unit}iB: {name or shape}."
    return f"{message} Use smaller batches, or more devices for them."


@dataclasses.dataclass(frozen=True)
class Collective:
    """One communication between devices in a compiled program.

    Attributes:
        kind: `all-reduce`, `all-gather`, ...
        bytes: Size of its result on each device.
        in_loop: Whether it is in the body of a loop, and may happen many times.
        in_branch: Whether it is in a branch, which may not be taken.
        op_name: Its name in the program, with the enclosing modules.
    """

    kind: str
    bytes: int
    in_loop: bool
    in_branch: bool
    op_name: str


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """The resources of a compiled program, per device.

    The body of a loop counts once: for a loop over steps, these are numbers per step.

    Attributes:
        device_kind: The kind of device.
        num_devices: The number of devices.
        arguments: Bytes of the arguments.
        outputs: Bytes of the outputs.
        aliased: Bytes of outputs that reuse the memory of arguments.
        temporaries: Bytes of temporary buffers.
        code: Bytes of the program itself.
        peak: Most bytes in use at any time, as reported by the compiler: without the
            program itself, and on a CPU without temporaries.
        memory: Bytes that the device offers, or `None` if unknown.
        flops: Floating-point operations, or `None` if unknown.
        bytes_accessed: Bytes read and written, as estimated by the compiler, or `None`.
        collectives: All communication.
    """

    device_kind: str
    num_devices: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int
    memory: int | None
    flops: float | None
    bytes_accessed: float | None
    collectives: tuple[Collective, ...]

    @classmethod
    def from_compiled(cls, compiled: jax.stages.Compiled) -> "CompileReport":
        """The report of a compiled program."""
        devices = {
            device
            for sharding in jax.tree.leaves(
                (compiled.input_shardings, compiled.output_shardings)
            )
            for device in sharding.device_set
        }
        device = next(iter(devices))
        memory: Any = compiled.memory_analysis()
        cost: Any = compiled.cost_analysis() or {}
        return cls(
            device_kind=device.device_kind,
            num_devices=len(devices),
            arguments=memory.argument_size_in_bytes,
            outputs=memory.output_size_in_bytes,
            aliased=memory.alias_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            peak=memory.peak_memory_in_bytes,
            memory=_memory(device),
            flops=cost.get("flops"),
            bytes_accessed=cost.get("bytes accessed"),
            collectives=find_collectives(compiled.as_text() or ""),
        )

    @property
    def total(self) -> int:
        """Bytes that are allocated: arguments, new outputs, temporaries, program."""
        return self.arguments + self.new_outputs + self.temporaries + self.code

    @property
    def new_outputs(self) -> int:
        """Bytes of outputs that do not reuse the memory of arguments."""
        return self.outputs - self.aliased

    @property
    def fits(self) -> bool | None:
        """Whether the memory is large enough; `None` if its size is unknown."""
        return None if self.memory is None else self.total <= self.memory

    def by_kind(self) -> dict[str, list[Collective]]:
        """The collectives by kind."""
        kinds = sorted({c.kind for c in self.collectives})
        return {kind: [c for c in self.collectives if c.kind == kind] for kind in kinds}

    def as_dict(self) -> dict[str, Any]:
        """Returns everything ready for JSON, with sums over collectives."""
        content = dataclasses.asdict(self)
        content |= {"total": self.total, "fits": self.fits}
        content["collectives"] = {
            kind: {
                "count": len(found),
                "in_loops": sum(c.in_loop for c in found),
                "in_branches": sum(c.in_branch for c in found),
                "bytes": sum(c.bytes for c in found),
                "largest": max(c.bytes for c in found),
            }
            for kind, found in self.by_kind().items()
        }
        return content

    def __str__(self) -> str:
        """The report in a few lines, for a terminal."""
        available = "" if self.memory is None else f" of {_bytes(self.memory)}"
        verdict = {True: ": fits", False: ": DOES NOT FIT", None: ""}[self.fits]
        lines = [
            f"Compiled for {self.num_devices} x {self.device_kind}. On each device:",
            f"  memory          {_bytes(self.total)}{available}{verdict}",
            f"    arguments     {_bytes(self.arguments)}",
            f"    new outputs   {_bytes(self.new_outputs)}"
            f" (and {_bytes(self.aliased)} in the memory of arguments)",
            f"    temporaries   {_bytes(self.temporaries)}",
            f"    program       {_bytes(self.code)}",
            f"  operations      {_count(self.flops)}",
            f"  bytes accessed  {_count(self.bytes_accessed)}",
        ]
        name = "collectives"
        for kind, found in self.by_kind().items():
            sizes = [c.bytes for c in found]
            loops = sum(c.in_loop for c in found)
            branches = sum(c.in_branch for c in found)
            lines.append(
                f"  {name:14}  {len(found)} {kind}, {_bytes(sum(sizes))}"
                f" (largest: {_bytes(max(sizes))})"
                + (f"; {loops} in loops, counted once" if loops else "")
                + (f"; {branches} in branches" if branches else "")
            )
            name = ""
        if not self.collectives:
            lines.append(f"  {name:14}  none")
        return "\n".join(lines)


def _memory(device: Device) -> int | None:
    """The bytes that programs may use."""
    if device.platform != "gpu":
        return _TPU_MEMORY.get(device.device_kind)
    described = str(xla_client.get_topology_for_devices([device]).target_config)
    size = re.search(r"device_memory_size: (\d+)", described)
    # JAX allocates three quarters of a GPU by default.
    return int(size[1]) * 3 // 4 if size else None


def _bytes(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def _count(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"


_KINDS = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Of asynchronous pairs the second counts: the type of the first includes operands.
_COLLECTIVE = re.compile(rf'\s+\S+(?: \S+)? = ([^"]+?) ({"|".join(_KINDS)})(-done)?\(')
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LOOP = re.compile(r"(?:body|condition)=%?([\w.\-]+)")
_BRANCH = re.compile(r"(?:branch|true|false)_computations?=(\{[^}]*\}|%?[\w.\-]+)")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)"
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\]")


def find_collectives(hlo: str) -> tuple[Collective, ...]:
    """Finds all communication in the text of a compiled program.

    Args:
        hlo: Text from `jax.stages.Compiled.as_text()`.

    Returns:
        The collectives, in the order of the text.
    """
    current = ""
    calls: dict[str, set[str]] = {}
    loops: set[str] = set()
    branches: set[str] = set()
    found: list[tuple[str, Collective]] = []
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = match[1]
            calls[current] = set()
        elif line.startswith(" "):
            for called in _CALLED.findall(line):
                calls[current].update(re.findall(r"[\w.\-]+", called))
            loops.update(_LOOP.findall(line))
            for called in _BRANCH.findall(line):
                branches.update(re.findall(r"[\w.\-]+", called))
            if match := _COLLECTIVE.match(line):
                name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', line)
                size = _size(match[1])
                op_name = name[1] if name else ""
                found.append(
                    (current, Collective(match[2], size, False, False, op_name))
                )

    def within(names: set[str]) -> set[str]:
        """These computations, and all that they call."""
        inside: set[str] = set()
        while names:
            inside |= names
            names = {called for n in names for called in calls.get(n, ())} - inside
        return inside

    looped, branched = within(loops), within(branches)
    return tuple(
        dataclasses.replace(c, in_loop=where in looped, in_branch=where in branched)
        for where, c in found
    )


def _size(type_: str) -> int:
    """Bytes of an array or of a tuple of arrays, by its type in HLO."""
    total = 0
    for name, bits, shape in _ARRAY.findall(type_):
        width = 8 if name == "pred" else int(bits or 0)  # a token has none
        sizes = [int(n.lstrip("<=")) for n in shape.split(",") if n]
        total += math.ceil(math.prod(sizes) * width / 8)
    return total
