"""Residual networks such as ResNet-18 and ResNet-50, for large and small images."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax

from jbn.linen import BatchNorm
from jbn.models.inputs import as_unit, dropped, without_masked
from jbn.models.norms import activated
from jbn.ops import numeric
from jbn.typing import ArrayLike, DType


# Normal, of variance 2 / fan-out: He et al. 2015b; untruncated, as PyTorch's.
_kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class _Block(nn.Module):
    """Base of both blocks: a shortcut, and convolutions with norms.

    Attributes:
        width: Channels inside the block.
        strides: Factor by which the block downsamples.
        norm: Makes a norm layer.
        dtype: Dtype of the convolutions.
    """

    width: int
    strides: int
    norm: Callable[..., Any]
    dtype: DType | None = None

    def _shortcut(self, x: jax.Array, out: int, train: bool, mask: Any) -> jax.Array:
        # Not "if shapes differ": parameters must not depend on the image size.
        if self.strides == 1 and x.shape[-1] == out:
            return x
        x = _conv(out, 1, self.strides, self.dtype, "shortcut_conv")(x)
        norm = self.norm(name="shortcut_norm")
        return norm(x, use_running_average=not train, mask=mask)


class BasicBlock(_Block):
    """Two 3x3 convolutions; strides are in the first.

    Attributes are those of `ResNet`'s blocks: `width`, `strides`, `norm`, `dtype`.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Returns `relu(shortcut(x) + residual(x))`, of `width` channels.

        Args:
            x: Of shape `(batch, height, width, channels)`.
            train: Whether to normalize by the batch.
            mask: Of shape `(batch, 1, 1, 1)`.

        Returns:
            Of shape `(batch, height / strides, width / strides, self.width)`.
        """
        call = {"use_running_average": not train, "mask": mask}
        y = _conv(self.width, 3, self.strides, self.dtype, "conv1")(x)
        y = activated(self.norm, nn.relu, name="norm1")(y, **call)
        y = _conv(self.width, 3, 1, self.dtype, "conv2")(y)
        zeros = nn.initializers.zeros
        last = activated(self.norm, nn.relu, name="norm2", scale_init=zeros)
        return last(y, residual=self._shortcut(x, self.width, train, mask), **call)


class BottleneckBlock(_Block):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide.

    Strides are in the 3x3 convolution ("v1.5", as in PyTorch), not in the first one,
    which would then ignore three of four pixels.

    Attributes are those of `ResNet`'s blocks: `width`, `strides`, `norm`, `dtype`.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, mask: jax.Array | None = None
    ) -> jax.Array:
        """Returns `relu(shortcut(x) + residual(x))`, of `4 * width` channels.

        Args:
            x: Of shape `(batch, height, width, channels)`.
            train: Whether to normalize by the batch.
            mask: Of shape `(batch, 1, 1, 1)`.

        Returns:
            Of shape `(batch, height / strides, width / strides, 4 * self.width)`.
        """
        call = {"use_running_average": not train, "mask": mask}
        y = _conv(self.width, 1, 1, self.dtype, "conv1")(x)
        y = activated(self.norm, nn.relu, name="norm1")(y, **call)
        y = _conv(self.width, 3, self.strides, self.dtype, "conv2")(y)
        y = activated(self.norm, nn.relu, name="norm2")(y, **call)
        y = _conv(4 * self.width, 1, 1, self.dtype, "conv3")(y)
        zeros = nn.initializers.zeros
        last = activated(self.norm, nn.relu, name="norm3", scale_init=zeros)
        return last(y, residual=self._shortcut(x, 4 * self.width, train, mask), **call)


class ResNet(nn.Module):
    """Classifies images with a residual network.

        x = relu(norm(conv(x)))                        the stem
        x = relu(shortcut(x) + norm(conv(...)))        each block of each stage
        logits = dense(mean of x over pixels)

    The last scale of each block starts at zero, so that each block starts as its
    shortcut (Goyal et al.). Padding is symmetric, as in PyTorch, so that PyTorch's
    weights give the same outputs (`jbn.tools.from_torch`, with
    `names=torchvision_name`).

    Integer images are first scaled from 0..255 to 0..1, so that they can stay 8 bits
    wide until they are on the device.

    Attributes:
        stage_sizes: Number of blocks of each stage. From the second stage on, the first
            block halves the size of the images.
        block: `BasicBlock` or `BottleneckBlock`.
        num_classes: Width of the last layer.
        widths: Width of the blocks of each stage; the stem has the first width.
        stem: `"imagenet"`, a 7x7 convolution and a 3x3 max pooling, each with stride 2;
            or `"small"`, for images of about 32x32, a 3x3 convolution with stride 1.
        norm: Norm class, or a partial of one (`partial(BatchNorm, momentum=0.9)`). The
            layer is called with `use_running_average` and `mask`.
        dropout: Fraction of the units that are set to zero before the last layer,
            in training, if the call gives `keys`.
        dtype: Dtype to compute in, such as `jnp.bfloat16`; by default that of
            parameters and images, float32. Parameters, statistics, the mean over pixels
            and what follows are float32 in any case.

    Example:
        >>> import jax.numpy as jnp
        >>> model = ResNet(stage_sizes=(1,), widths=(4,), num_classes=3, stem="small")
        >>> images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
        >>> variables = model.init(jax.random.key(0), images, train=False)
        >>> list(variables["params"])
        ['stem_conv', 'stem_norm', 'stage1_block1', 'head']
        >>> list(variables["params"]["stage1_block1"])
        ['conv1', 'norm1', 'conv2', 'norm2']
        >>> model.apply(variables, images, train=False).shape
        (2, 3)

    References:
        He et al., "Deep Residual Learning for Image Recognition", 2015.
        https://arxiv.org/abs/1512.03385
        He et al., "Delving Deep into Rectifiers", 2015 (the initial weights).
        https://arxiv.org/abs/1502.01852
        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017
        (the zeros, and the initial weights of the last layer).
        https://arxiv.org/abs/1706.02677
    """

    stage_sizes: Sequence[int]
    block: Callable[..., Any] = BasicBlock
    num_classes: int = 1000
    widths: Sequence[int] = (64, 128, 256, 512)
    stem: Literal["imagenet", "small"] = "imagenet"
    norm: Callable[..., Any] = BatchNorm
    dtype: DType | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        train: bool,
        mask: ArrayLike | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits of a batch of images.

        Args:
            x: Images, of shape `(batch, height, width, channels)`.
            train: Whether to normalize by the batch (and update the running statistics)
                or by the running statistics.
            mask: Of shape `(batch,)`. Images that are `False` affect neither the
                statistics nor the gradients of other images, even if they are NaN.
                Their own logits are those of a black image.
            keys: A key for each image, of shape `(batch,)`, for dropout in training;
                `None` for none.

        Returns:
            Logits, of shape `(batch, num_classes)`.

        Raises:
            ValueError: If `stem` is not known, or there are not as many `widths` as
                stages.
        """
        if self.stem not in ("imagenet", "small"):
            raise ValueError(
                f"`stem` must be 'imagenet' or 'small'; got {self.stem!r}."
            )
        if len(self.widths) != len(self.stage_sizes):
            raise ValueError(
                "`widths` must have one entry per stage; got"
                f" {len(self.widths)} for {len(self.stage_sizes)} stages."
            )
        y, rows = without_masked(as_unit(x), mask)
        call: dict[str, Any] = {"train": train, "mask": rows}

        large = self.stem == "imagenet"
        size, strides = (7, 2) if large else (3, 1)
        y = _conv(self.widths[0], size, strides, self.dtype, "stem_conv")(y)
        norm = activated(self.norm, nn.relu, name="stem_norm")
        y = norm(y, use_running_average=not train, mask=rows)
        if large:
            pad: Any = ((1, 1), (1, 1))
            y = nn.max_pool(y, (3, 3), strides=(2, 2), padding=pad)

        stages = zip(self.stage_sizes, self.widths, strict=True)
        for i, (count, width) in enumerate(stages, start=1):
            for j in range(1, count + 1):
                y = self.block(
                    width,
                    strides=2 if i > 1 and j == 1 else 1,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"stage{i}_block{j}",
                )(y, **call)

        y = dropped(numeric.wide(y).mean((1, 2)), self.dropout, keys)
        head = nn.Dense(
            self.num_classes, kernel_init=nn.initializers.normal(0.01), name="head"
        )
        return head(y)


def resnet8(**options: Any) -> ResNet:
    """ResNet-8, for small images: 78,042 parameters for 10 classes and 3 channels.

    Its depth is 6n + 2 with n = 1 (He et al., section 4.2). Where the width changes,
    the shortcut is a convolution instead of zero padding.

    Args:
        **options: Attributes of `ResNet`, such as `num_classes` and `norm`.

    Returns:
        The model.
    """
    return _cifar(1, options)


def resnet20(**options: Any) -> ResNet:
    """ResNet-20, for small images: `resnet8` with n = 3.

    Args:
        **options: Attributes of `ResNet`, such as `num_classes` and `norm`.

    Returns:
        The model.
    """
    return _cifar(3, options)


def resnet18(**options: Any) -> ResNet:
    """ResNet-18: 11,689,512 parameters for 1000 classes.

    Args:
        **options: Attributes of `ResNet`, such as `num_classes`, `stem` and `norm`.

    Returns:
        The model.
    """
    return ResNet(stage_sizes=(2, 2, 2, 2), block=BasicBlock, **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50: 25,557,032 parameters for 1000 classes.

    Args:
        **options: Attributes of `ResNet`, such as `num_classes`, `stem` and `norm`.

    Returns:
        The model.
    """
    return ResNet(stage_sizes=(3, 4, 6, 3), block=BottleneckBlock, **options)


def torchvision_name(path: str) -> str:
    """The name of a layer of `ResNet` in torchvision's models.

    Args:
        path: Path of a layer among the variables.

    Returns:
        The name of the module there, for the `names` of `jbn.tools.from_torch`.

    Example:
        >>> torchvision_name("stage2_block1/norm3")
        'layer2.0.bn3'
        >>> torchvision_name("stage2_block1/shortcut_conv")
        'layer2.0.downsample.0'
    """
    names = {
        "stem_conv": "conv1",
        "stem_norm": "bn1",
        "shortcut_conv": "downsample.0",
        "shortcut_norm": "downsample.1",
        "head": "fc",
    }

    def name(part: str) -> str:
        if part.startswith("stage"):
            stage, block = part.removeprefix("stage").split("_block")
            return f"layer{stage}.{int(block) - 1}"
        return names.get(part, part.replace("norm", "bn"))

    return ".".join(map(name, path.split("/")))


def _cifar(count: int, options: dict[str, Any]) -> ResNet:
    defaults = {"num_classes": 10, "widths": (16, 32, 64), "stem": "small"}
    return ResNet(stage_sizes=(count,) * 3, **{**defaults, **options})


def _conv(features: int, size: int, strides: int, dtype: Any, name: str) -> nn.Conv:
    # "SAME" pads strided convolutions only on the right.
    pad = (size // 2, size // 2)
    return nn.Conv(
        features,
        (size, size),
        strides=strides,
        padding=(pad, pad),
        use_bias=False,
        dtype=dtype,
        kernel_init=_kaiming,
        name=name,
    )
