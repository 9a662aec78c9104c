"""Fake-quantize kernels as they are after folding, in training."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn.ops import numeric
from jbn.tools import dataflow
from jbn.tools._fold import LINEAR, plan_of
from jbn.tools.layers import Where, chosen, is_linen
from jbn.tools.norms import Also, Norms


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
    """A function of a Linen model's variables; made by `quantizer`.

    Attributes:
        report: For each linear layer, by path, `quantized`, `quantized with PATHS` of
            the batch norms that are folded into it, or `kept: REASON`.
        quantize: The function of a kernel.
        gains: For each quantized layer, by path, the gains that its kernel gets.
    """

    report: dict[str, str]
    quantize: Callable[[jax.Array], jax.Array]
    gains: Mapping[str, "tuple[_Gain, ...]"]

    def __call__(self, variables: Mapping) -> dict[str, Any]:
        """Quantizes the kernels, as they are after folding.

        Args:
            variables: Of the model, with `params` and `batch_stats`; may be traced.

        Returns:
            The variables, with other kernels.
        """

        def walk(tree: Any, path: tuple[str, ...]) -> Any:
            if not isinstance(tree, Mapping):
                return tree
            new = {name: walk(value, (*path, name)) for name, value in tree.items()}
            layer = "/".join(path)
            if layer in self.gains and "kernel" in new:
                new["kernel"] = self._quantized(variables, layer, new["kernel"])
            return new

        return {**variables, "params": walk(variables["params"], ())}

    def _quantized(self, variables: Mapping, layer: str, leaf: Any) -> Any:
        kernel = dataflow.unboxed(leaf)
        wide = numeric.wide(kernel)
        gain = jnp.ones((1,) * kernel.ndim, wide.dtype)
        for part in self.gains[layer]:
            gain = gain * part.of(variables)
        gain = lax.stop_gradient(gain).astype(wide.dtype)
        zero = gain == 0
        # A kernel that will be multiplied by zero needs no quantization.
        new = self.quantize(wide * gain) / jnp.where(zero, 1, gain)
        new = jnp.where(zero, wide, new).astype(kernel.dtype)
        return leaf.replace_boxed(new) if isinstance(leaf, dataflow.BOXES) else new


@dataclasses.dataclass(frozen=True)
class _Gain:
    """What a batch norm multiplies by at inference, along a kernel."""

    var: tuple[str, ...]  # paths of the variables
    scale: tuple[str, ...] | None
    epsilon: float
    features: np.ndarray

    def of(self, variables: Mapping) -> jax.Array:
        read = lambda path: numeric.wide(
            jnp.asarray(dataflow.unboxed(dataflow.get(variables, path)))
        )
        total = read(self.var) + self.epsilon
        zero = total == 0  # as `fold` has it
        gain = jnp.where(zero, 0, 1 / jnp.sqrt(jnp.where(zero, 1, total)))
        if self.scale is not None:
            gain = gain * read(self.scale)
        return gain.ravel()[self.features]


def quantizer(
    model: nn.Module,
    variables: Mapping,
    /,
    *inputs: Any,
    quantize: Callable[[jax.Array], jax.Array],
    where: Where = None,
    also: Also = None,
    **kwargs: Any,
) -> Quantizer:
    """Makes a function that fake-quantizes the kernels of a model as if folded.

    For quantization-aware training. At inference `fold` multiplies a kernel by the
    `gain = scale / sqrt(var + epsilon)` of its batch norm, with the running variance,
    and the product is quantized. So training must see the errors of the product:

        kernel = quantize(kernel * gain) / gain

    where `gain` is not 0; where it is, the folded kernel is 0, without an error, and
    `kernel` stays as it is. The model does not change:

        prepare = quantizer(model, variables, x, quantize=int8, train=False)
        y, new = model.apply(prepare(variables), x, train=True, mutable=["batch_stats"])

    is a training step's forward pass: the batch norms normalize by the batch and update
    their statistics as always, by one convolution. With `train=False` the same network
    normalizes by its running statistics, and is equal, to rounding, to the folded one
    with quantized kernels: `fold(model, prepare(variables), x, train=False)`. To freeze
    the statistics late in training, apply `convert(model, FrozenBatchNorm,
    freeze_affine=False)`.

    Gradients pass through `quantize`, which should let them through where it rounds. No
    gradient passes through `gain`, so those of scale and bias are the layer's own, also
    where scale is 0. (PyTorch's `ConvBn2d` quantizes the same product, but divides the
    output by the gain: a scale of 0 gives NaN there.)

    Args:
        model: A Linen model.
        variables: Its variables, as for `fold`, like the inputs. They must be known;
            they only tell which layers are adjacent.
        *inputs: The arguments of `model.apply` at inference.
        quantize: Rounds an array to the values of its quantized form, in its own dtype.
            Dense layers and convolutions have their output features last.
        where: The linear layers to quantize, as for `convert`; by default all.
        also: Foreign batch norms, as for `convert`.
        **kwargs: Further arguments of `model.apply`.

    Returns:
        A function of variables, which may be used under `jit` and `grad`. Its `report`
        names all linear layers.

    Raises:
        TypeError: If `model` is not a Linen model, or variables are traced.
        ValueError: If a batch norm normalizes by the batch, if the model has none, or
            if no linear layer matches.

    Example:
        >>> model = nn.Sequential([nn.Dense(1), nn.BatchNorm(use_running_average=True)])
        >>> x = jnp.ones((1, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> kernel = jnp.asarray([[0.75], [0.5]])
        >>> stats = {"mean": jnp.zeros(1), "var": jnp.full(1, 0.25 - 1e-5)}
        >>> params = {**variables["params"], "layers_0": {"kernel": kernel, "bias": 0}}
        >>> prepare = quantizer(model, variables, x, quantize=jnp.round)
        >>> prepare.report
        {'layers_0': 'quantized with layers_1'}
        >>> new = prepare({"params": params, "batch_stats": {"layers_1": stats}})
        >>> print(new["params"]["layers_0"]["kernel"].ravel())  # 1.5 and 1, rounded
        [1.  0.5]

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient
        Integer-Arithmetic-Only Inference", 2018, section 3.2.
        https://arxiv.org/abs/1712.05877
        Krishnamoorthi, "Quantizing deep convolutional networks for efficient
        inference", 2018, section 3.2.2. https://arxiv.org/abs/1806.08342
    """
    if not is_linen(model):
        raise TypeError(
            "`quantizer` takes a Linen model; got the NNX model"
            f" `{type(model).__name__}`."
        )
    plan = plan_of("quantizer", model, (variables, *inputs), kwargs, None, Norms(also))
    into: dict[str, dict[str, np.ndarray]] = {}
    for norm, (layer, features) in plan.into.items():
        into.setdefault(layer, {})[norm] = features
    report, gains = {}, {}
    for index, call in plan.flow.calls.items():
        if not isinstance(call.layer, LINEAR) or not chosen(call.path, where):
            continue
        norms = into.get(call.path, {})
        why = plan.flow.obstacle(index)
        if why:
            report[call.path] = f"kept: it {why}"
            continue
        gains[call.path] = tuple(
            _gain(plan, norm, features) for norm, features in norms.items()
        )
        report[call.path] = "quantized" + (f" with {', '.join(norms)}" if norms else "")
    if not gains:
        found = [
            c.path for c in plan.flow.calls.values() if isinstance(c.layer, LINEAR)
        ]
        raise ValueError(
            f"`quantizer` found no linear layer to quantize; {where=}, the model has"
            f" {found or 'none'}, and of those {report or 'none match'}."
        )
    return Quantizer(report, quantize, gains)


def _gain(plan: Any, path: str, features: np.ndarray) -> _Gain:
    norm = plan.known[path].norm
    layer = plan.flow.calls[plan.folded[path]].layer
    keys = path.split("/") if path else []
    scale = None
    if plan.array(path, "scale") is not None:
        scale = ("params", *keys, norm.name("scale"))
    var = ("batch_stats", *keys, norm.name("var"))
    return _Gain(var, scale, float(norm.field(layer, "epsilon")), features)
