"""JAX's cache of compiled programs, for tests that run the same programs often."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache as cache


@contextlib.contextmanager
def compilation_cache(folder: Path) -> Iterator[None]:
    """Keeps compiled programs in a folder, in this process alone.

    Subprocesses still compile by themselves, as those of a user do.
    """
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.05,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        cache.reset_cache()  # It looks at the options once.
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        cache.reset_cache()
