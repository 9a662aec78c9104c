"""Tools jit anew in each call what mostly was compiled before: programs are kept."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@pytest.fixture(scope="session")
def folder_of_programs(tmp_path_factory: pytest.TempPathFactory) -> str:
    # Of this process alone: JAX does not write them at once.
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module", autouse=True)
def programs_are_kept(folder_of_programs: str):
    if jax.config.jax_compilation_cache_dir is not None:  # As for planted faults.
        yield
        return
    before = {name: getattr(jax.config, name) for name in SETTINGS}

    def update(settings: dict[str, float], folder: str | None) -> None:
        for name, value in settings.items():
            jax.config.update(name, value)
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()

    update(SETTINGS, folder_of_programs)
    yield
    update(before, None)
