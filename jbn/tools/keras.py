"""Weights from and to Keras 3, whose package is not needed here."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jbn.tools import port
from jbn.tools.layers import Where


def from_keras(
    source: Any,
    variables: Any,
    *,
    names: port.Names = None,
    skip: Where = (),
    norm: Any = None,
) -> Any:
    """Fills variables with the weights and statistics of a Keras 3 model or layer.

    | here | there |
    |---|---|
    | `scale`, `bias` of a norm | `gamma`, `beta` |
    | `mean`, `var` | `moving_mean`, `moving_variance` |
    | `kernel`, `bias` of a `Dense` or `Conv` | `kernel`, `bias`, in the same layout |
    | `embedding` | `embeddings` |
    | anything else | the same name |

    A `ConvTranspose` must have `transpose_kernel=True`.

    Weights do not include the conventions of a layer: Keras' epsilon is 1e-3, ours
    1e-5. Make our layer with the options from `keras_options`. If our layer has a
    `weight`, it becomes 1: the statistics continue as a plain average, like those of
    Keras.

    Args:
        source: A built model or layer; or the list from `get_weights()` of one
            `BatchNormalization`.
        variables: The variables to fill: Linen's, of one layer or of a model; an NNX
            module; or a pair of `jbn.Params` and `jbn.BatchStats` as from `jbn.init`.
            Linen's may be shapes only, as from `jax.eval_shape`.
        names: The source's name of each of our layers: a dict from paths such as
            `"encoder/norm"`, or a function of the path. By default the same path.
            Nested Keras layers have paths as in `layer.path`, without the model's name.
        skip: Which of our arrays to leave unchanged, with their counterparts unused:
            patterns of paths such as `"head/*"`, or a function of the path.
        norm: Our norm (a class, a partial of one, a layer, or a dict of the options of
            `jbn.batch_norm`), whose options are compared with the source's. The layers
            of an NNX module are always compared.

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
        >>> weights = [np.array([value]) for value in (2.0, 1.0, 3.0, 4.0)]
        >>> params, batch_stats = from_keras(weights, jbn.init(1))
        >>> print(params.scale, params.bias, batch_stats.mean, batch_stats.var)
        [2.] [1.] [3.] [4.]
    """
    _compare("from_keras", source, variables, names, norm)
    arrays = _arrays("from_keras", source, variables)
    return port.fill(_DIALECT, arrays, variables, names, skip, lambda name: 1)


def to_keras(
    variables: Any,
    target: Any,
    *,
    names: port.Names = None,
    skip: Where = (),
    norm: Any = None,
) -> list[np.ndarray]:
    """Lists our weights and statistics as a Keras 3 model or layer does.

    The inverse of `from_keras`:

        model.set_weights(to_keras(variables, model, names=...))

    Args:
        variables: Linen's variables, an NNX module, or `jbn.Params` and
            `jbn.BatchStats`.
        target: A built model or layer, or its list of weights. Not changed.
        names: As for `from_keras`, like the other arguments.
        skip: Which of our arrays to leave out.
        norm: Our norm, whose options are compared with the target's.

    Returns:
        Arrays, in the order of `target.get_weights()`.

    Raises:
        TypeError: As `from_keras` does.
        ValueError: As `from_keras` does.

    Warns:
        UserWarning: As `from_keras` does.

    Example:
        >>> import jbn
        >>> zero = np.zeros(1)
        >>> print(*to_keras(jbn.init(1), [zero, zero, zero, zero]))
        [1.] [0.] [0.] [1.]
    """
    _compare("to_keras", target, variables, names, norm)
    arrays = _arrays("to_keras", target, variables)
    new = port.spell(_DIALECT, variables, arrays, names, skip)
    return [new[key].astype(value.dtype) for key, value in arrays.items()]


def keras_options(layer: Any) -> dict[str, Any]:
    """The options with which our norm layer continues like one of Keras.

        norm = jbn.BatchNorm(**keras_options(layer))

    Args:
        layer: A `BatchNormalization`.

    Returns:
        `momentum` and `epsilon` of the layer, and `unbiased=False`.

    Raises:
        TypeError: If `layer` is not a batch norm.

    Example:
        >>> import types
        >>> layer = types.SimpleNamespace(momentum=0.9, epsilon=1e-3, moving_mean=None)
        >>> keras_options(layer)
        {'momentum': 0.9, 'epsilon': 0.001, 'unbiased': False}
    """
    if not _is_norm(layer):
        raise TypeError(
            "`keras_options` takes a `BatchNormalization` of Keras, with `moving_mean`"
            f" and `epsilon`; got {type(layer).__name__}."
        )
    return {"momentum": layer.momentum, "epsilon": layer.epsilon, "unbiased": False}


_DIALECT = port.Dialect(
    "keras",
    {
        "scale": ("gamma", "scale"),
        "bias": ("beta", "bias"),
        "mean": ("moving_mean",),
        "var": ("moving_variance",),
        "embedding": ("embeddings",),
    },
    "/",
    port.unchanged,
    port.unchanged,
)


def _compare(caller: str, source: Any, variables: Any, names: port.Names, norm: Any):
    if hasattr(source, "weights"):
        norms = {path: keras_options(layer) for path, layer in _norms(source)}
        port.compare(caller, variables, norms, names, norm)


def _norms(source: Any) -> Iterator[tuple[str, Any]]:
    """The batch norms in a layer, including itself, by path."""
    strip = _strip(source)
    # Keras' own method finds nested layers, also in lists and dicts.
    for layer in source._flatten_layers():
        if _is_norm(layer):
            yield strip(layer.moving_mean.path).rpartition("/")[0], layer


def _is_norm(layer: Any) -> bool:
    return hasattr(layer, "moving_mean") and hasattr(layer, "epsilon")


def _strip(source: Any):
    """A function that removes the name of `source` from a path in it."""
    prefix = f"{source.path}/"
    paths = [weight.path for weight in source.weights]
    # Paths in a functional model do not begin with its name.
    inside = all(path.startswith(prefix) for path in paths)
    return lambda path: path.removeprefix(prefix) if inside else path


def _arrays(caller: str, source: Any, variables: Any) -> dict[str, np.ndarray]:
    if not hasattr(source, "weights"):
        return _listed(caller, source, variables)
    strip = _strip(source)
    arrays = {strip(w.path): np.asarray(w.numpy()) for w in source.weights}
    if len(arrays) < len(source.weights):
        paths = [strip(w.path) for w in source.weights]
        twice = sorted({repr(path) for path in paths if paths.count(path) > 1})
        raise ValueError(
            f"`{caller}` identifies weights by path, and several have the path"
            f" {twice[0]}. Give the layers names."
        )
    return arrays


def _listed(caller: str, source: Any, variables: Any) -> dict[str, np.ndarray]:
    """The weights of one layer, which only lists those that it has."""
    if not isinstance(source, Sequence):
        raise TypeError(
            "Keras' side must be a model, a layer, or the list of weights of one layer;"
            f" got {type(source).__name__}."
        )
    ours = {str(leaf) for leaf in port.leaves(variables)}
    order = {
        "scale": "gamma",
        "bias": "beta",
        "mean": "moving_mean",
        "var": "moving_variance",
    }
    names = [there for here, there in order.items() if here in ours]
    if len(source) != len(names):
        raise ValueError(
            f"`{caller}` takes a list of weights for those of one `BatchNormalization`;"
            f" got {len(source)} for our {', '.join(sorted(ours))}. Pass the layer, or"
            " the model, instead of its list."
        )
    return dict(zip(names, map(np.asarray, source), strict=True))
