"""Strict JAX, eight virtual CPU devices, and a generator seeded by the test's name."""

import collections
import importlib
import warnings
import zlib

import jax
import jaxtyping
import numpy as np
import pytest


# Before any device is used. Tests take subsets of the eight.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# It is for type checkers alone.
collect_ignore = ["types_of_a_user.py"]

# Compiling takes most of the time of the tests. Of a sweep this many cases are quick,
# and one each of these ways to compile (of the fixture `devices`).
SAMPLE = 2
WAYS = "folded", "as on a TPU", "as on a GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases of a sweep as slow, but for a sample that is always the same."""
    sweeps = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep") and not item.get_closest_marker("slow"):
            way = next((way for way in WAYS if way in item.nodeid), None)
            sweeps[item.nodeid.partition("[")[0], way].append(item)
    for (_, way), cases in sweeps.items():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in cases[SAMPLE if way is None else 1 :]:
            item.add_marker("slow")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def standard_promotion():
    """For code of others, which does not hold to strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_on_a_tpu(monkeypatch: pytest.MonkeyPatch):
    """What is compiled for a TPU, on CPUs.

    To be used under a mesh with a name of its own: else JAX finds what it has compiled.
    """
    for module in ("ops.placement", "ops.cpu", "ops.passes", "summary"):
        monkeypatch.setattr(f"jbn.{module}.platform", lambda: "tpu")
    # Each image is a block, as the large ones are.
    monkeypatch.setattr("jbn.summary._LEAST_IMAGE_ROWS", 1)
    monkeypatch.setattr("jbn.summary._FOLDED_BLOCK_ROWS", 1)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """What is compiled for a GPU, on CPUs; likewise."""
    for module in ("ops.placement", "ops.cpu", "ops.gpu", "ops.passes", "summary"):
        monkeypatch.setattr(f"jbn.{module}.platform", lambda: "gpu")
    # Small arrays are treated as large ones are.
    monkeypatch.setattr("jbn.ops.gpu._LEAST_ELEMENTS", 1)
    monkeypatch.setattr("jbn.ops.gpu._LEAST_ROWS", 2)
    monkeypatch.setattr("jbn.ops.gpu._LEAST_TEAMS", 2)


@pytest.fixture(params=["eight devices", "one device", *WAYS])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Whether arrays may be spread over devices, and how passes over them are made.

    On one CPU axes are merged, and the sums of large arrays folded: "folded" has small
    ones folded, too.
    """
    if request.param == "eight devices":
        yield
        return
    if request.param == "folded":
        monkeypatch.setattr("jbn.ops.cpu._LEAST_ELEMENTS", 1)
        monkeypatch.setattr("jbn.ops.cpu._LEAST_RUN", 1)
        monkeypatch.setattr("jbn.ops.cpu._SHORT", 0)
    if request.param.startswith("as on"):
        request.getfixturevalue(request.param.replace(" ", "_").lower())
    # Each has a mesh of its own name, or it would find the other's compiled functions.
    name = request.param.replace(" ", "_")
    mesh = jax.make_mesh((1,), (name,), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield


@pytest.fixture
def untyped():
    """Without the type checks of the tests, to see the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch):
    """Keras 3 on JAX; the test is skipped without it."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    try:
        keras = importlib.import_module("keras")
    except ImportError as error:
        pytest.skip(f"no Keras: {error}")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras was imported with another backend")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*__array__ implementation doesn't accept")
        yield keras
