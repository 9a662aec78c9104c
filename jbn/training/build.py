"""Makes the parts of a configuration: data, norm, model, optimizer, task."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jbn import models
from jbn.training import norms
from jbn.training.config import Config, is_class, total_steps
from jbn.training.data import Dataset, Description, load_dataset
from jbn.training.errors import UsageError
from jbn.training.executor import Executor
from jbn.training.networks import check_own, make_model
from jbn.training.source import Target
from jbn.training.tasks import GAN, Supervised, Task


_LATENT_SIZE = 64
# Of the generator's rate: two time scales (Heusel et al., 2017).
_DISCRIMINATOR_RATE = 0.2


def target_of(config: Config) -> Target | None:
    """The target of the model in a data set."""
    if config.model == "dcgan":
        return None
    return "segmentation_mask" if config.model == "unet" else "label"


def open_dataset(config: Config, like: Description | None = None) -> Dataset:
    """Finds the data of a configuration, as `load_dataset` does."""
    return load_dataset(
        config.dataset,
        target=target_of(config),
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        image_size=config.image_size,
        loader=config.loader,
        crop=config.crop,
        seed=config.seed,
        test_fraction=config.test_fraction,
        like=like,
    )


def make_task(
    config: Config,
    dataset: Dataset,
    executor: Executor | None = None,
    *,
    steps_per_epoch: int = 1,
) -> Task:
    """Makes the task of a configuration.

    Args:
        config: Of the run.
        dataset: Its data, for their classes and their shape.
        executor: What runs it; by default one device.
        steps_per_epoch: For the schedule.

    Returns:
        The task.

    Raises:
        UsageError: If model and data, or the group size and the devices, do not fit.
    """
    optimizer = make_optimizer(config, steps_per_epoch)
    slower = dataclasses.replace(
        config, learning_rate=_DISCRIMINATOR_RATE * config.learning_rate
    )
    axis_name = None if executor is None else executor.axis_name
    norm, local_norm = (
        make_norm(config, e, steps_per_epoch=steps_per_epoch) for e in (executor, None)
    )
    if config.model == "dcgan":
        optimizers = optimizer, make_optimizer(slower, steps_per_epoch)
        return _make_gan(config, dataset, optimizers, norm, local_norm, axis_name)
    classes = len(dataset.classes)
    make = functools.partial(make_model, config, classes, dataset.image_shape)
    local_model = make(local_norm)
    if is_class(config.model):
        check_own(config.model, local_model, classes, dataset.image_shape)
    return Supervised(
        kind="segmentation" if config.model == "unet" else "classification",
        model=make(norm),
        local_model=local_model,
        image_shape=tuple(dataset.image_shape),
        num_classes=classes,
        optimizer=optimizer,
        axis_name=axis_name,
        label_smoothing=config.label_smoothing,
        microbatches=config.microbatches,
        momentum=config.momentum,
        shift=config.shift,
        flip=config.flip,
        mixup=config.mixup,
        row_keys=config.dropout > 0 and not is_class(config.model),
    )


def make_norm(
    config: Config, executor: Executor | None, *, steps_per_epoch: int = 1
) -> Callable[..., Any]:
    """Makes a factory of norm layers that share statistics as configured.

    Running statistics are always those of all devices, merged exactly in every step, so
    there is nothing to merge before an evaluation or a checkpoint.

    Args:
        config: With `norm`, `norm_options`, `momentum`, `fix_after`, `bn_group_size`
            and `microbatches`.
        executor: What the layers run on; `None` for one device.
        steps_per_epoch: For `fix_after`.

    Returns:
        A partial of a norm class, or a function like it.

    Raises:
        UsageError: If groups do not divide the devices, or the reverse, or an option
            is out of its range.
    """
    options: dict[str, Any] = {"momentum": config.momentum}
    if config.fix_after is not None:
        calls = config.fix_after * steps_per_epoch * config.microbatches
        tau = config.norm_options.tau
        options["tau"] = lambda step: jnp.where(step < calls, tau, jnp.inf)
    if config.microbatches > 1:
        options["accumulate"] = True
    kind, chosen = config.norm, config.norm_options
    norms.check_values(kind, chosen)
    if executor is None:
        return norms.make(kind, chosen, **options)
    options["axis_name"] = executor.axis_name
    devices, size = len(executor.devices), config.bn_group_size
    if kind == "ghost":
        groups = chosen.num_groups
        if executor.parallel == "pmap":
            if groups % devices:
                raise UsageError(
                    f"--norm.num-groups={groups} must be a multiple of the number of "
                    f"devices, {devices}: a group is on one device."
                )
            groups //= devices
        return norms.make(kind, chosen, local_groups=groups, **options)
    if size is None or size == devices:
        return norms.make(kind, chosen, **options)
    if size > devices or devices % size:
        raise UsageError(
            f"--bn-group-size={size} must divide the number of devices, {devices}."
        )
    if executor.parallel == "jit":
        return norms.make(
            "ghost",
            dataclasses.replace(chosen, num_groups=devices // size),
            **options,
        )
    options["devices_per_group"] = size
    return norms.make("ghost", chosen, local_groups=1, **options)


def row_multiple(config: Config, num_devices: int) -> int:
    """The number that the rows of a batch are padded to a multiple of.

    Args:
        config: Of the run.
        num_devices: Number of devices that share the rows.

    Returns:
        The least common multiple of devices and ghost groups, times the microbatches.
    """
    groups = config.norm_options.num_groups if config.norm == "ghost" else 1
    return math.lcm(num_devices, groups) * config.microbatches


def warmup_steps(config: Config, steps_per_epoch: int) -> int:
    """The number of warm-up steps, at least one less than the run has."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    return min(warmup, total_steps(config, steps_per_epoch) - 1)


def make_schedule(config: Config, steps_per_epoch: int) -> Callable[[Any], Any]:
    """Makes the learning rate, as a function of the number of steps before."""
    peak, warmup = config.learning_rate, warmup_steps(config, steps_per_epoch)
    if config.schedule == "cosine":
        total = total_steps(config, steps_per_epoch)
        start = 0.0 if warmup else peak
        return optax.warmup_cosine_decay_schedule(start, peak, warmup, total)
    if warmup:
        return optax.linear_schedule(0.0, peak, warmup)
    return optax.constant_schedule(peak)


def make_optimizer(config: Config, steps_per_epoch: int) -> Any:
    """Makes the optimizer.

    Args:
        config: Of the run.
        steps_per_epoch: For the schedule.

    Returns:
        An `optax.GradientTransformation`.
    """
    # A constant has no counter in the optimizer's state, unlike a schedule.
    is_constant = config.schedule == "constant" and not warmup_steps(
        config, steps_per_epoch
    )
    schedule = make_schedule(config, steps_per_epoch)
    rate = config.learning_rate if is_constant else schedule
    parts = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    decay = []
    if config.weight_decay:
        from jbn.tools import decays  # Takes a third of a second.

        decay = [optax.add_decayed_weights(config.weight_decay, mask=decays)]
    if config.optimizer == "sgd":
        # The decay of SGD goes through its momentum; that of AdamW does not.
        parts += decay
        parts.append(optax.trace(config.beta1, nesterov=True))
    else:
        # If a hidden unit is active for every example of a batch, the norm subtracts
        # its bias: the gradient is zero, or 1e-8 after rounding. With the usual epsilon
        # of 1e-8 this noise becomes a step of almost full size, and after three epochs
        # the losses of one and four devices differ by 1e-2. With this epsilon, by 1e-6.
        parts.append(optax.scale_by_adam(b1=config.beta1, eps=1e-5))
        parts += decay
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))


def _make_gan(
    config: Config,
    dataset: Dataset,
    optimizers: tuple[Any, Any],
    norm: Any,
    local_norm: Any,
    axis_name: str | None,
) -> GAN:
    height, width, channels = dataset.image_shape
    if height != width or height not in (8, 16, 32, 64):
        raise UsageError(
            f"--model=dcgan makes square images of 8, 16, 32 or 64 pixels; those of "
            f"{dataset.name} are {height}x{width}: pass --image-size."
        )
    dtype = {"dtype": jnp.bfloat16} if config.precision == "bf16" else {}
    width = config.width or min(64, 2 * height)
    make = lambda norm: models.Generator(
        image_size=height, channels=channels, width=width, norm=norm, **dtype
    )
    domains = norms.make_of_domains(
        config.norm, config.norm_options, momentum=config.momentum, axis_name=axis_name
    )
    return GAN(
        generator=make(norm),
        local_generator=make(local_norm),
        discriminator=models.Discriminator(width=width, norm=domains, **dtype),
        image_shape=tuple(dataset.image_shape),
        latent_size=_LATENT_SIZE,
        optimizer=optimizers[0],
        discriminator_optimizer=optimizers[1],
        axis_name=axis_name,
    )
