"""Tools jit anew in each call what mostly was compiled before: programs are kept."""

import contextlib

import jax
import pytest
from caches import compilation_cache


@pytest.fixture(scope="session")
def folder_of_programs(tmp_path_factory: pytest.TempPathFactory):
    # Of this process alone: another might read what is half written.
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", autouse=True)
def programs_are_kept(folder_of_programs):
    # As for planted faults.
    given = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009
    with contextlib.nullcontext() if given else compilation_cache(folder_of_programs):
        yield
