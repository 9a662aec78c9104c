"""Weights from and to Haiku, whose package is not needed here."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn.tools import port
from jbn.tools.layers import Where


def from_haiku(
    source: tuple[Mapping, Mapping],
    variables: Any,
    *,
    decay_rate: float,
    epsilon: float = 1e-5,
    names: port.Names = None,
    skip: Where = (),
    norm: Any = None,
) -> Any:
    """Fills variables with the parameters and state of a Haiku model.

    | here | there |
    |---|---|
    | `scale`, `bias` of a norm | `scale`, `offset`, without axes of size 1 |
    | `mean`, `var` | `average` in `~/mean_ema` and `~/var_ema`, likewise |
    | `weight`, where our layer keeps one | `1 - decay_rate**counter` |
    | `kernel`, `bias` of a `Dense` or `Conv` | `w`, `b`, in the same layout |
    | `embedding` | `embeddings` |
    | anything else | the same name |

    Not for transposed convolutions, whose kernels have another layout.

    Haiku's averages are debiased. To continue in the same way, make our layer with
    `BatchNorm(momentum=decay_rate, epsilon=1e-5, debias=True)`, or with
    `jbn.init(..., track_weight=True)`.

    Args:
        source: Parameters and state, as returned by `init` of
            `hk.transform_with_state`.
        variables: The variables to fill: Linen's, of one layer or of a model; an NNX
            module; or a pair of `jbn.Params` and `jbn.BatchStats` as from `jbn.init`.
            Linen's may be shapes only, as from `jax.eval_shape`.
        decay_rate: The `decay_rate` of Haiku's batch norms.
        epsilon: Their `eps`.
        names: The source's name of each of our layers: a dict from paths such as
            `"encoder/norm"`, or a function of the path. By default the same path. A
            single layer has the path `""`.
        skip: Which of our arrays to leave unchanged, with their counterparts unused:
            patterns of paths such as `"head/*"`, or a function of the path.
        norm: Our norm (a class, a partial of one, a layer, or a dict of options), whose
            options are compared with the source's. The layers of an NNX module are
            always compared.

    Returns:
        The same structure as `variables`, with other values; a copy of an NNX module.

    Raises:
        TypeError: If `source` or `variables` are none of these.
        ValueError: If one of our arrays has no counterpart or another shape, or one of
            the source's arrays is not used. The message names all of them.

    Warns:
        UserWarning: If options of norm layers differ from the source's.

    Example:
        >>> import jbn
        >>> ema = lambda value: {
        ...     "average": np.array([[value]]), "hidden": np.array([[value / 2]]),
        ...     "counter": np.array(1),
        ... }
        >>> affine = {"scale": np.array([[2.0]]), "offset": np.array([[1.0]])}
        >>> params = {"norm": affine}
        >>> state = {"norm/~/mean_ema": ema(3.0), "norm/~/var_ema": ema(4.0)}
        >>> params, batch_stats = from_haiku(
        ...     (params, state), jbn.init(1, track_weight=True),
        ...     decay_rate=0.5, names={"": "norm"},
        ... )
        >>> print(params.scale, params.bias)
        [2.] [1.]
        >>> print(batch_stats.mean, batch_stats.var, batch_stats.weight)
        [3.] [4.] [0.5]
    """
    arrays = _flat(source)
    _compare("from_haiku", arrays, variables, decay_rate, epsilon, names, norm)

    def weight(name: str) -> float:
        counter = arrays.get(f"{name}/~/mean_ema/counter", 0)
        return 1 - decay_rate ** max(int(counter), 0)

    return port.fill(_DIALECT, arrays, variables, names, skip, weight)


def to_haiku(
    variables: Any,
    target: tuple[Mapping, Mapping],
    *,
    decay_rate: float,
    epsilon: float = 1e-5,
    names: port.Names = None,
    skip: Where = (),
    norm: Any = None,
) -> tuple[dict, dict]:
    """Fills Haiku's parameters and state with ours.

    The inverse of `from_haiku`. For each statistic

        average = ours
        hidden = average * (1 - decay_rate**counter)

    where `counter` is the number of updates that results in our `weight`; without a
    weight it is so large that the initial value has no influence.

    Args:
        variables: Linen's variables, an NNX module, or `jbn.Params` and
            `jbn.BatchStats`.
        target: Parameters and state with a place for each array. Not changed.
        decay_rate: As for `from_haiku`, like the other arguments.
        epsilon: `eps` there.
        names: The target's name of each of our layers.
        skip: Which of our arrays to leave out.
        norm: Our norm, whose options are compared with the target's.

    Returns:
        Parameters and state, with the shapes and dtypes of the target.

    Raises:
        TypeError: As `from_haiku` does.
        ValueError: As `from_haiku` does.

    Warns:
        UserWarning: As `from_haiku` does.
    """
    arrays = _flat(target)
    _compare("to_haiku", arrays, variables, decay_rate, epsilon, names, norm)
    new = port.spell(_DIALECT, variables, arrays, names, skip)
    ours = port.leaves(variables)
    pairs = port.match("to_haiku", _DIALECT, ours, arrays, names, skip)
    for leaf, key in pairs.items():
        if not key.endswith("/average"):
            continue
        weight = ours.get(leaf._replace(name="weight"))
        weight = 1.0 if weight is None else float(np.max(weight))
        counter = _updates(weight, decay_rate)
        module = key.removesuffix("average")
        new[f"{module}hidden"] = new[key] * (1 - decay_rate**counter)
        new[f"{module}counter"] = np.asarray(counter)

    def of(tree: Mapping) -> dict:
        return {
            module: {
                name: jnp.array(new[f"{module}/{name}"], jnp.asarray(value).dtype)
                for name, value in values.items()
            }
            for module, values in tree.items()
        }

    params, state = target
    return of(params), of(state)


def _read(leaf: port.Leaf, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return _resized(value, shape)


def _resized(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Reshapes `value` if only axes of size 1 differ."""
    same = [n for n in value.shape if n != 1] == [n for n in shape if n != 1]
    return value.reshape(shape) if same else value


_DIALECT = port.Dialect(
    "haiku",
    {
        "kernel": ("w",),
        "bias": ("offset", "b"),
        "mean": ("~/mean_ema/average",),
        "var": ("~/var_ema/average",),
        "embedding": ("embeddings",),
    },
    "/",
    _read,
    _read,
    ("_ema/hidden", "_ema/counter"),
)


def _updates(weight: float, decay_rate: float) -> int:
    """The number of updates where `1 - decay_rate**updates` is `weight`."""
    if weight <= 0:
        return 0
    if decay_rate <= 0:
        return 1
    # In float32, a weight any closer to 1 is 1.
    rest = max(1 - weight, 2.0**-25)
    return max(1, round(math.log(rest) / math.log(decay_rate)))


def _compare(caller, arrays, variables, decay_rate, epsilon, names, norm):
    options = {"momentum": decay_rate, "epsilon": epsilon, "debias": True}
    options["unbiased"] = False
    ends = "/~/mean_ema/average"
    norms = {k.removesuffix(ends): options for k in arrays if k.endswith(ends)}
    port.compare(caller, variables, norms, names, norm)


def _flat(source: Any) -> dict[str, np.ndarray]:
    if not (
        isinstance(source, tuple)
        and len(source) == 2
        and all(isinstance(tree, Mapping) for tree in source)
    ):
        raise TypeError(
            "Haiku's side must be a tuple of parameters and state, two dicts, as `init`"
            f" of `hk.transform_with_state` gives them; got {type(source).__name__}."
        )
    return {
        f"{module}/{name}": np.asarray(jax.device_get(value))
        for tree in source
        for module, values in tree.items()
        for name, value in values.items()
    }
