"""Weights from and to PyTorch, whose package is not needed here."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from jbn.tools import port
from jbn.tools.layers import Where, chosen


def from_torch(
    source: Any,
    variables: Any,
    *,
    names: port.Names = None,
    skip: Where = (),
    norm: Any = None,
) -> Any:
    """Fills variables with the weights and statistics of a PyTorch module.

    | here | there |
    |---|---|
    | `scale`, `bias` of a norm | `weight`, `bias` |
    | `mean`, `var` | `running_mean`, `running_var` |
    | `kernel` of a `Dense` or `Conv` | `weight`, with transposed axes |
    | `embedding` | `weight` |
    | anything else | the same name, unchanged |

    So the kernel of a convolution of any rank, grouped or not, changes from (out, in,
    height, width) to (height, width, in, out), and that of a linear layer from (out,
    in) to (in, out). Images are channels-last here. Shapes do not show two differences,
    which your model has to handle: a `ConvTranspose` must have `transpose_kernel=True`;
    and before a `Dense` on a flattened image, the model must transpose to (channels,
    height, width).

    Weights do not include the conventions of a layer (PyTorch's running variance is
    unbiased): make our layer with the options from `torch_options`. If our layer has a
    `weight`, it becomes `num_batches_tracked`. That counts batches, but `momentum=None`
    here counts rows: to continue with it, multiply `weight` by the rows of a batch.

        variables = from_torch(module, variables, names=torchvision_name)

    Args:
        source: A module, or a state dict, of tensors or arrays.
        variables: The variables to fill: Linen's, of one layer or of a model; an NNX
            module; or a pair of `jbn.Params` and `jbn.BatchStats` as from `jbn.init`.
            Linen's may be shapes only, as from `jax.eval_shape`.
        names: The source's name of each of our layers: a dict from paths such as
            `"encoder/norm"`, or a function of the path. By default the path with dots,
            `"encoder.norm"`.
        skip: Arrays to leave out, by our names or by theirs: patterns such as
            `"head/*"` for our arrays, which stay unchanged, with their counterparts
            unused, or `"unused.*"` for theirs; or a function of the name.
        norm: Our norm (a class, a partial of one, a layer, or a dict of the options of
            `jbn.batch_norm`), whose options are compared with a module's. The layers of
            an NNX module are always compared.

    Returns:
        The same structure as `variables`, with other values; a copy of an NNX module.

    Raises:
        TypeError: If `source` or `variables` are none of these.
        ValueError: If one of our arrays has no counterpart or another shape, or one of
            the source's arrays is not used, except `num_batches_tracked` (the message
            names all of them). Or if an `nnx.ConvTranspose` lacks
            `transpose_kernel=True`.

    Warns:
        UserWarning: If options of norm layers differ from the source's, or if the
            layout of a transposed convolution's kernel for Linen is not clear from its
            shape.

    Example:
        >>> import jbn
        >>> state = {
        ...     "weight": np.array([2.0]),
        ...     "bias": np.array([1.0]),
        ...     "running_mean": np.array([3.0]),
        ...     "running_var": np.array([4.0]),
        ...     "num_batches_tracked": np.array(10),
        ... }
        >>> params, batch_stats = from_torch(state, jbn.init(1))
        >>> print(params.scale, params.bias, batch_stats.mean, batch_stats.var)
        [2.] [1.] [3.] [4.]
    """
    tensors = _state_dict(source)
    state = _arrays(tensors)
    _compare("from_torch", source, variables, names, norm)
    _check_transposed("from_torch", source, variables, skip)

    def weight(name: str) -> float | int:
        prefix = f"{name}." if name else ""
        return int(state.get(f"{prefix}num_batches_tracked", 1))

    dotted = _dotted(names)
    aliases = _aliases(tensors)
    return port.fill(_DIALECT, state, variables, dotted, skip, weight, aliases)


def to_torch(
    variables: Any,
    target: Any,
    *,
    names: port.Names = None,
    skip: Where = (),
    norm: Any = None,
) -> dict[str, Any]:
    """Fills a PyTorch state dict with our weights and statistics.

    The inverse of `from_torch`:

        module.load_state_dict(to_torch(variables, module, names=torchvision_name))

    Args:
        variables: Linen's variables, an NNX module, or `jbn.Params` and
            `jbn.BatchStats`.
        target: A module, or a state dict, with a place for each array. Not changed.
        names: As for `from_torch`, like the other arguments.
        skip: Arrays to leave out, by our names or by theirs.
        norm: Our norm, whose options are compared with the target's.

    Returns:
        A state dict like that of `target`: tensors with the same dtype and device, or
        arrays. `num_batches_tracked`, which only matters with `momentum=None`, is that
        of the target.

    Raises:
        TypeError: As `from_torch` does.
        ValueError: As `from_torch` does, or if two different layers of ours share an
            array in the target.

    Warns:
        UserWarning: As `from_torch` does.

    Example:
        >>> import jbn
        >>> state = to_torch(jbn.init(1), {
        ...     "weight": np.zeros(1),
        ...     "bias": np.zeros(1),
        ...     "running_mean": np.zeros(1),
        ...     "running_var": np.zeros(1),
        ... })
        >>> print(state["weight"], state["running_var"])
        [1.] [1.]
    """
    state = _state_dict(target)
    arrays = _arrays(state)
    _compare("to_torch", target, variables, names, norm)
    _check_transposed("to_torch", target, variables, skip)
    dotted = _dotted(names)
    new = port.spell(_DIALECT, variables, arrays, dotted, skip, _aliases(state))
    return {key: _like(value, new[key]) for key, value in state.items()}


def torch_options(module: Any) -> dict[str, Any]:
    """The options with which our norm layer continues like one of PyTorch.

        layer = jbn.BatchNorm(**torch_options(module))

    Args:
        module: A `BatchNorm1d`, `2d` or `3d`, or `SyncBatchNorm`.

    Returns:
        `momentum`, which is one minus theirs; `epsilon`; and `unbiased=True`. With
        `momentum=None` statistics are cumulative in both, but batches have equal weight
        there, and rows here: the means are equal if all batches have the same size.

    Raises:
        TypeError: If `module` is not a batch norm.

    Example:
        >>> import types
        >>> module = types.SimpleNamespace(momentum=0.1, eps=1e-5, running_mean=None)
        >>> torch_options(module)
        {'momentum': 0.9, 'epsilon': 1e-05, 'unbiased': True}
    """
    if not _is_norm(module):
        raise TypeError(
            "`torch_options` takes a batch norm module of PyTorch, with `running_mean`"
            f" and `eps`; got {type(module).__name__}."
        )
    options: dict[str, Any] = {"epsilon": module.eps}
    if not hasattr(module, "momentum"):  # torchvision's FrozenBatchNorm2d
        return options
    momentum = None if module.momentum is None else 1 - module.momentum
    return {"momentum": momentum, **options, "unbiased": True}


def _read(leaf: port.Leaf, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if leaf.name == "kernel" and value.ndim > 1:
        return np.moveaxis(value, (0, 1), (-1, -2))
    return value


def _write(leaf: port.Leaf, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if leaf.name == "kernel" and value.ndim > 1:
        return np.moveaxis(value, (-1, -2), (0, 1))
    return value


_DIALECT = port.Dialect(
    "torch",
    {
        "kernel": ("weight",),
        "scale": ("weight",),
        "embedding": ("weight",),
        "mean": ("running_mean",),
        "var": ("running_var",),
    },
    ".",
    _read,
    _write,
    ("num_batches_tracked",),
)


def _dotted(names: port.Names) -> port.Names:
    return lambda layer: port.their_name(layer, names, ".")


def _compare(caller: str, module: Any, variables: Any, names: port.Names, norm: Any):
    if hasattr(module, "named_modules"):
        norms = {
            name: torch_options(m) for name, m in module.named_modules() if _is_norm(m)
        }
        port.compare(caller, variables, norms, names, norm, ".")


def _check_transposed(caller: str, module: Any, variables: Any, skip: Where) -> None:
    """Refuses or warns of transposed convolutions whose layout differs from theirs."""
    if isinstance(variables, nnx.Module):
        for path, layer in nnx.iter_graph(variables):
            name = "/".join(map(str, path))
            if (
                isinstance(layer, nnx.ConvTranspose)
                and not layer.transpose_kernel
                and not chosen(f"{name}/kernel", skip)
            ):
                raise ValueError(
                    f"`{caller}` needs `transpose_kernel=True` in a `ConvTranspose`,"
                    f" PyTorch's layout of the kernel; {name!r} lacks it."
                )
    elif hasattr(module, "named_modules"):
        unsure = [
            repr(name)
            for name, layer in module.named_modules()
            if getattr(layer, "transposed", False)
            and layer.weight.shape[0] == layer.weight.shape[1]
            and not chosen(f"{name}.weight", skip)
        ]
        if unsure:
            warnings.warn(
                f"`{caller}`: {', '.join(unsure)} must be a Linen `ConvTranspose` with"
                " `transpose_kernel=True` here; its shape does not show that.",
                stacklevel=3,
            )


def _aliases(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each name, the other names of the same memory."""
    groups: dict[Any, list[str]] = {}
    for name, value in state.items():
        if hasattr(value, "data_ptr"):
            place = value.data_ptr()
            layout = str(value.dtype), tuple(value.shape), tuple(value.stride())
        elif isinstance(value, np.ndarray):
            place = value.__array_interface__["data"][0]
            layout = value.dtype.str, value.shape, value.strides
        else:
            place, layout = id(value), None
        groups.setdefault((place, layout), []).append(name)
    return {
        name: [other for other in group if other != name]
        for group in groups.values()
        for name in group
        # (Empty arrays all have the same address.)
        if len(group) > 1 and math.prod(np.shape(state[name])) > 0
    }


def _is_norm(module: Any) -> bool:
    return hasattr(module, "running_mean") and hasattr(module, "eps")


def _state_dict(source: Any) -> Mapping[str, Any]:
    state = source.state_dict() if hasattr(source, "state_dict") else source
    if not isinstance(state, Mapping):
        raise TypeError(
            "PyTorch's side must be a module or a state dict; got"
            f" {type(source).__name__}."
        )
    return state


def _arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {key: _array(value) for key, value in state.items()}


def _array(value: Any) -> np.ndarray:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    if "bfloat16" in str(value.dtype):  # NumPy has none
        value = value.float()
    return value.numpy()


def _like(value: Any, new: np.ndarray) -> Any:
    if hasattr(value, "new_tensor"):
        return value.new_tensor(np.array(new, order="C"))
    return np.array(new, np.asarray(value).dtype)
