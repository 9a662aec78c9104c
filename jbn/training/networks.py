"""Makes the networks of `--model`: ours, with width and depth, or a user's class."""

import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jbn import models
from jbn.models.resnet import BasicBlock, BottleneckBlock
from jbn.training.config import Config, is_class
from jbn.training.errors import UsageError, one_line


_LARGE = 96  # Image size from which a ResNet uses the stem for large images.
_STAGES = {
    "resnet18": {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)},
    "resnet50": {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)},
}


def make_model(
    config: Config, num_classes: int, image_shape: tuple[int, ...], norm: Any
) -> nn.Module:
    """Makes a classification network.

    Args:
        config: With `model`, `width`, `depth`, `dropout` and `precision`.
        num_classes: Number of classes.
        image_shape: Shape of one image.
        norm: Makes a norm layer.

    Returns:
        The network.

    Raises:
        UsageError: If the network or its depth is not available.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "norm": norm}
    if config.precision == "bf16":
        options["dtype"] = jnp.bfloat16
    if config.dropout:
        options["dropout"] = config.dropout
    if is_class(config.model):
        sizes = {"width": config.width, "depth": config.depth}
        options |= {name: v for name, v in sizes.items() if v is not None}
        return _own(config.model, options)
    if config.model == "mlp":
        features = (config.width or 64,) * (config.depth or 2)
        return models.MLP(features=features, **options)
    if config.model == "unet":
        widths = _doubling(config.width or 16, config.depth or 3)
        return models.UNet(widths=widths, **options)
    if config.model == "resnet8":
        return models.ResNet(
            stage_sizes=(_blocks(config.depth or 8),) * 3,
            widths=_doubling(config.width or 16, 3),
            stem="small",
            **options,
        )
    stages = _STAGES[config.model]
    depth = config.depth or min(stages)
    if depth not in stages:
        known = " or ".join(map(str, stages))
        raise UsageError(f"--depth={depth}: {config.model} has a depth of {known}.")
    return models.ResNet(
        stage_sizes=stages[depth],
        block=BasicBlock if config.model == "resnet18" else BottleneckBlock,
        widths=_doubling(config.width or 64, 4),
        stem="imagenet" if min(image_shape[:2]) >= _LARGE else "small",
        **options,
    )


def _doubling(width: int, count: int) -> tuple[int, ...]:
    return tuple(width * 2**i for i in range(count))


def _blocks(depth: int) -> int:
    if depth % 6 != 2 or depth < 8:
        raise UsageError(
            f"--depth={depth}: resnet8 has a depth of 8, 14, 20 or another 6n + 2."
        )
    return depth // 6


def _own(path: str, options: dict[str, Any]) -> nn.Module:
    """A network of the class, or from the function, at `module:name`."""
    make = _import(path)
    parameters = inspect.signature(make).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name not in parameters and not takes_all:
            flag = {"dtype": "--precision=bf16"}.get(name, f"--{name}")
            why = "" if name in ("num_classes", "norm") else f", for {flag}"
            raise UsageError(f"--model={path} must take `{name}`{why}.")
    try:
        model = make(**options)
    except Exception as error:  # The user's code may raise anything.
        raise UsageError(
            f"--model={path} cannot be made "
            f"({type(error).__name__}: {one_line(error)})."
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"--model={path} makes a {type(model).__name__}, not a Linen module."
        )
    return model


def check_own(
    path: str, model: nn.Module, num_classes: int, image_shape: tuple[int, ...]
) -> None:
    """Refuses a user's network that cannot be trained, without computing anything.

    Args:
        path: Its `--model`.
        model: The network, for one device.
        num_classes: Number of classes.
        image_shape: Shape of one image.

    Raises:
        UsageError: If it fails, or its outputs are not one logit per class.
    """
    images = jnp.zeros((2, *image_shape), jnp.uint8)

    def run(train: bool) -> Any:
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        mask: dict[str, Any] = {"mask": jnp.ones(2, bool)} if train else {}
        return model.init_with_output(keys, images, train=train, **mask)[0]

    for train in (False, True):
        try:
            found = jax.eval_shape(functools.partial(run, train))
        except Exception as error:  # The user's code may raise anything.
            raise UsageError(
                f"--model={path} fails on images of shape {images.shape} with "
                f"train={train} "
                f"({type(error).__name__}: {one_line(error)}{_where(error)})."
            ) from error
        shape = getattr(found, "shape", type(found).__name__)
        if shape != (2, num_classes):
            raise UsageError(
                f"--model={path} returns {shape} for images of shape {images.shape}: "
                f"an array of shape {(2, num_classes)} is needed, with one logit for "
                "each class."
            )


def _where(error: Exception) -> str:
    """The last line outside of libraries at which an error was raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and frame.filename != __file__
    ]
    return f", in {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _import(path: str) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:  # A console script does not have it in its path.
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # The user's code may raise anything.
        raise UsageError(
            f"--model={path}: the module {module_name} cannot be imported "
            f"({type(error).__name__}: {one_line(error)})."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"--model={path}: {module_name} has no class {name}.")
    return found
