"""What an installed jbn must do wherever it stands: `.ci/release` runs it.

With `--train`, what the extra of that name brings as well.
"""

import importlib.metadata
import importlib.resources
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jbn


def core() -> None:
    assert jbn.__version__ == importlib.metadata.version("jbn")
    assert importlib.resources.files("jbn").joinpath("py.typed").is_file()
    assert not list(pathlib.Path(jbn.__file__).parent.rglob("make_npz.py"))
    params, batch_stats = jbn.init(2)
    x = jnp.array([[1.0, 10.0], [3.0, 30.0], [jnp.nan, jnp.inf]])
    step = jax.jit(
        lambda x: jbn.batch_norm(
            x,
            params,
            batch_stats,
            use_running_average=False,
            mask=jnp.array([True, True, False]),
            momentum=0.5,
        )
    )
    y, stats = step(x)
    np.testing.assert_allclose(y[:2], [[-1, -1], [1, 1]], rtol=1e-5)
    np.testing.assert_allclose(stats.mean, [1, 10])


def train() -> None:
    import flax.linen as nn
    from flax import nnx

    import jbn.models
    import jbn.nnx
    import jbn.tools
    from jbn.training.digits.builder import read_digits

    x = jax.random.normal(jax.random.key(0), (8, 4))
    y, _ = jbn.BatchNorm(use_running_average=False).init_with_output(
        jax.random.key(0), x
    )
    assert isinstance(jbn.BatchNorm(), nn.Module)
    np.testing.assert_array_equal(y, jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))(x))
    digits = importlib.resources.files("jbn.training.digits")
    assert "CC BY 4.0" in digits.joinpath("LICENSE.txt").read_text()
    assert [len(rows) for rows in read_digits()] == 3 * [1797]
    assert callable(jbn.tools.fold)
    assert callable(jbn.models.ResNet)


if __name__ == "__main__":
    place = pathlib.Path(jbn.__file__)
    assert "site-packages" in place.parts, f"imported from {place}"
    core()
    if "--train" in sys.argv[1:]:
        train()
    else:
        assert importlib.util.find_spec("flax") is None, "Flax is here; JAX should do"
    print("jbn", jbn.__version__, "works at", place.parent)
