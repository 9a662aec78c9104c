"""Strict JAX, one device unless asked for more, and seeded generators."""

import collections
import functools
import warnings
import zlib

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest
from peers import load_peer, skip_without_peers

from jbn.lowering import late, passes


if not hasattr(jax, "enable_x64"):  # Before JAX 0.8.
    import jax.experimental as experimental

    jax.enable_x64 = getattr(experimental, "enable_x64")  # noqa: B009
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# For properties that compile a program for each example. `--hypothesis-profile=nightly`
# draws more.
_profile = functools.partial(
    hypothesis.settings.register_profile, deadline=None, derandomize=True
)
_profile("quick", max_examples=10)
_profile("nightly", max_examples=100)
hypothesis.settings.load_profile("quick")

# It is for type checkers alone.
collect_ignore = ["types_of_a_user.py"]

# The ways to compile (of the fixture `lowering`) that a sweep samples apart.
WAYS = "split", "as on a TPU", "as on a GPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--devices",
        type=int,
        default=1,
        help="virtual CPU devices; with several, only tests marked `devices` run",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before any device is used.
    jax.config.update("jax_num_cpu_devices", config.getoption("--devices"))


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Skips tests for other devices; of a sweep, only the outermost cases are quick."""
    several = int(str(config.getoption("--devices"))) > 1
    for item in items:
        if several and not item.get_closest_marker("devices"):
            item.add_marker(pytest.mark.skip("runs on one device"))
        if not several and item.get_closest_marker("devices"):
            item.add_marker(pytest.mark.skip("needs eight devices: --devices=8"))
        if "keras" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.peers("keras"))
        skip_without_peers(item)
    sweeps = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep") and not item.get_closest_marker("slow"):
            way = next((way for way in WAYS if way in item.nodeid), None)
            where = item.get_closest_marker("devices") is not None
            sweeps[item.nodeid.partition("[")[0], way, where].append(item)
    for (_, way, _), cases in sweeps.items():
        # The first and the last differ in every parameter, as the author ordered them.
        for item in cases[1:-1] if way is None else cases[1:]:
            item.add_marker("slow")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in words how many tests passed, and why others were skipped."""
    stats = terminalreporter.stats
    count = {name: len(stats.get(name, ())) for name in ("passed", "failed", "error")}
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )
    terminalreporter.section("summary")
    terminalreporter.line(f"{count['passed']:6,} passed")
    if wrong := count["failed"] + count["error"]:
        terminalreporter.line(f"{wrong:6,} FAILED")
    for reason, number in reasons.most_common():
        terminalreporter.line(f"{number:6,} skipped: {reason}")


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
def no_jaxprs_from_before():
    """Forgets the jaxprs of programs, which do not know of a changed threshold."""
    late._jaxpr.cache_clear()
    yield
    late._jaxpr.cache_clear()


@pytest.fixture
def as_on_a_tpu(monkeypatch: pytest.MonkeyPatch, no_jaxprs_from_before):
    """The program for a TPU, on CPUs.

    To be used under a mesh with a name of its own: else JAX finds what it has compiled.
    """
    lower_for(monkeypatch, "tpu")
    # Each image is a block, as the large ones are.
    monkeypatch.setattr("jbn.lowering.blocks._LEAST_IMAGE_ROWS", 1)
    monkeypatch.setattr("jbn.lowering.blocks._SPLIT_BLOCK_ROWS", 1)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, no_jaxprs_from_before):
    """The program for a GPU, on CPUs; likewise."""
    lower_for(monkeypatch, "gpu")
    # Small arrays are treated as large ones are.
    monkeypatch.setattr("jbn.lowering.gpu._LEAST_ELEMENTS", 1)
    monkeypatch.setattr("jbn.lowering.gpu._LEAST_ROWS", 2)
    monkeypatch.setattr("jbn.lowering.gpu._LEAST_TEAMS", 2)


def lower_for(
    monkeypatch: pytest.MonkeyPatch, platform: late.Platform, shards: int | None = None
) -> None:
    """Lowers everything for another platform, or for more devices."""
    before = late.target_of

    def target_of(_, axis_context):
        target = before(platform, axis_context)
        return target if shards is None else target._replace(shards=shards)

    monkeypatch.setattr(late, "target_of", target_of)
    monkeypatch.setattr(late, "expected_platform", lambda: platform)
    monkeypatch.setattr(passes, "expected_platform", lambda: platform)


@pytest.fixture(params=["one device", "eight shards", *WAYS])
def lowering(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    no_jaxprs_from_before,
):
    """Which of the programs for other machines is compiled.

    With eight shards arrays may be split over devices, so that axes are not merged and
    sums not split. "split" has the sums of small arrays split, too.
    """
    if request.param == "one device":
        yield
        return
    if request.param == "eight shards":
        lower_for(monkeypatch, "cpu", shards=8)
    if request.param == "split":
        monkeypatch.setattr("jbn.lowering.cpu._FUSES_SUMS", False)
        monkeypatch.setattr("jbn.lowering.cpu._LEAST_ELEMENTS", 1)
        monkeypatch.setattr("jbn.lowering.cpu._LEAST_RUN", 1)
        monkeypatch.setattr("jbn.lowering.cpu._SHORT", 0)
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
    """Keras 3 on JAX. Tests that use it are marked `peers("keras")`."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = load_peer("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras was imported with another backend")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*__array__ implementation doesn't accept")
        yield keras
