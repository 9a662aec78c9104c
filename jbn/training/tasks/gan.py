"""Generative adversarial training of two networks with batch norm."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbn.training import pictures
from jbn.training.data import Dataset
from jbn.training.metrics import Metric
from jbn.training.state import TrainState
from jbn.training.step import Batch, Metrics, by_row, descend, gradient, sum_rows


# Images are downsampled to this size before their Gaussians are compared.
_COARSE = 8


@dataclasses.dataclass(frozen=True)
class GAN:
    """Trains a generator and a discriminator, alternating one step each.

        discriminator: mean of softplus(-D(real)) + mean of softplus(D(G(z)))
        generator:     mean of softplus(-D(G(z)))

    Real and generated images pass through the discriminator one after the other, as two
    domains with separate statistics. Each network's running statistics are updated once
    per step, in its own step.

    Attributes:
        generator: Called with latent vectors, `train` and `mask`; returns images with
            values from -1 to 1.
        discriminator: Called with images, `train`, `mask` and `domain` (0: real, 1:
            generated); returns logits, which are high for real images.
        image_shape: Shape of one image.
        latent_size: Length of a normally distributed latent vector.
        optimizer: Turns the gradients of the generator into updates.
        discriminator_optimizer: The same for the discriminator; by default `optimizer`.
        axis_name: The mapped axis over the devices, or `None` if a batch holds all the
            rows.
        local_generator: The generator without mapped axes.
    """

    generator: nn.Module
    discriminator: nn.Module
    image_shape: tuple[int, ...]
    latent_size: int
    optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation | None = None
    axis_name: str | None = None
    local_generator: nn.Module | None = None
    # Samples suffer from running statistics that lag behind the generator.
    recalibrates: bool = dataclasses.field(default=True, init=False)

    @property
    def metric(self) -> Metric:
        """The Fréchet distance of images downsampled to 8 by 8 pixels."""
        return Metric("frechet", "Fréchet distance", higher_is_better=False)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Makes `params`, `batch_stats` and `opt_state`, each for both networks."""
        for_g, for_d = jax.random.split(key)
        z = jnp.zeros((1, self.latent_size))
        images = jnp.zeros((1, *self.image_shape))
        variables = {
            "generator": self.generator.init(for_g, z, train=False),
            "discriminator": self.discriminator.init(
                for_d, images, train=False, domain=0
            ),
        }
        params = {name: v["params"] for name, v in variables.items()}
        return {
            "params": params,
            "batch_stats": {
                name: v.get("batch_stats", {}) for name, v in variables.items()
            },
            "opt_state": {
                name: self._optimizer(name).init(p) for name, p in params.items()
            },
        }

    def update(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One step of each; sums of `loss` (generator) and `discriminator_loss`."""
        params, stats = dict(state.params), dict(state.batch_stats)
        opt_state = dict(state.opt_state)
        weight = batch["weight"]
        total = sum_rows(weight, self.axis_name)
        z = self._latent(key, batch)
        real = _scaled(batch["image"])

        def mean(losses: jax.Array) -> tuple[jax.Array, jax.Array]:
            losses = jnp.where(weight > 0, weight * losses, 0)
            summed = sum_rows(losses, self.axis_name)
            return summed / jnp.where(total > 0, total, 1), summed

        def judge(p: Any, s: Any, images: jax.Array, domain: int) -> tuple[Any, Any]:
            logits, updated = self.discriminator.apply(
                {"params": p, "batch_stats": s},
                images,
                train=True,
                mask=weight > 0,
                domain=domain,
                mutable=["batch_stats"],
            )
            return logits, updated.get("batch_stats", {})

        def generate(p: Any) -> tuple[Any, Any]:
            images, updated = self.generator.apply(
                {"params": p, "batch_stats": stats["generator"]},
                z,
                train=True,
                mask=weight > 0,
                mutable=["batch_stats"],
            )
            return images, updated.get("batch_stats", {})

        def discriminate(p: Any, s: Any, fake: Batch) -> Any:
            on_real, s = judge(p, s, real, 0)
            on_fake, s = judge(p, s, fake["image"], 1)
            loss, summed = mean(nn.softplus(-on_real) + nn.softplus(on_fake))
            return loss, (s, {"discriminator_loss": summed})

        def deceive(p: Any, s: Any, batch: Any) -> Any:
            del s, batch
            images, updated = generate(p)
            logits, _ = judge(
                params["discriminator"], stats["discriminator"], images, 1
            )
            loss, summed = mean(nn.softplus(-logits))
            return loss, (updated, {"loss": summed})

        fake, _ = generate(params["generator"])
        metrics: Metrics = {"weight": total}
        turns = {
            "discriminator": (discriminate, {"image": fake}),
            "generator": (deceive, {}),
        }
        for name, (objective, given) in turns.items():
            grads, stats[name], sums = gradient(
                objective, params[name], stats[name], given, axis_name=self.axis_name
            )
            params[name], opt_state[name] = descend(
                self._optimizer(name), grads, opt_state[name], params[name]
            )
            metrics.update(sums)
        new = dataclasses.replace(
            state, params=params, batch_stats=stats, opt_state=opt_state
        )
        return new, metrics

    def evaluate(self, variables: Mapping[str, Any], batch: Batch) -> Metrics:
        """Sums over real and generated images, for their moments."""
        z = self._latent(jax.random.key(1), batch)
        fake = self.generator.apply(_of_generator(variables), z, train=False)
        counts = (batch["weight"] > 0).astype(jnp.float32)
        sums = {"weight": counts}
        for name, images in {"real": _scaled(batch["image"]), "fake": fake}.items():
            # Images in 0..1, centered at 1/2: their squares cancel less in float32.
            images = images / 2  # type: ignore[operator]
            rows = jnp.where(counts[:, None] > 0, _coarse(images), 0)
            each = {
                "pixels": images.mean((1, 2, 3)),
                "squares": (images**2).mean((1, 2, 3)),
            }
            for what, value in each.items():
                sums[f"{name}_{what}"] = counts * value
            sums[f"{name}_rows"] = rows
            sums[f"{name}_products"] = jnp.einsum("ni,nj->ij", rows, rows)[None]
        total = jax.tree.map(lambda x: x.sum(0), sums)
        if self.axis_name is not None:
            total = jax.lax.psum(total, self.axis_name)
        return total

    def apply(self, variables: Mapping[str, Any], batch: Batch) -> Any:
        """Applies the generator as in training."""
        model = self.local_generator or self.generator
        _, updated = model.apply(
            _of_generator(variables),
            self._latent(jax.random.key(2), batch),
            train=True,
            mask=batch["weight"] > 0,
            mutable=["batch_stats"],
        )
        stats = {**variables["batch_stats"], "generator": updated["batch_stats"]}
        return None, {"batch_stats": stats}

    def summarize(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean losses in training; the moments of the images in an evaluation."""
        n = float(sums["weight"])
        if "real_products" not in sums:
            names = {
                "generator_loss": "loss",
                "discriminator_loss": "discriminator_loss",
            }
            return {
                name: float(sums[key]) / n if n else float("nan")
                for name, key in names.items()
            }
        values, gaussians = {}, []
        for name in ("real", "fake"):
            mean = float(sums[f"{name}_pixels"]) / n
            values[f"{name}_mean"] = 0.5 + mean
            values[f"{name}_std"] = float(
                np.sqrt(max(float(sums[f"{name}_squares"]) / n - mean**2, 0))
            )
            rows = np.asarray(sums[f"{name}_rows"], np.float64) / n
            products = np.asarray(sums[f"{name}_products"], np.float64) / n
            gaussians.append((rows, products - np.outer(rows, rows)))
        return {"frechet": frechet_distance(*gaussians[0], *gaussians[1]), **values}

    def pictures(
        self,
        variables: Mapping[str, Any],
        sums: Mapping[str, np.ndarray],
        dataset: Dataset,
    ) -> dict[str, Any]:
        """Samples next to real images."""
        del sums
        real = dataset.train.rows(np.arange(min(32, len(dataset.train))))["image"]
        return {"samples": pictures.samples(self.sample(variables, 64), real)}

    def sample(self, variables: Mapping[str, Any], number: int, seed: int = 0) -> Any:
        """Generates images.

        Args:
            variables: Of both networks.
            number: Number of images.
            seed: Seed of the latent vectors.

        Returns:
            uint8 of shape (number, height, width, channels).
        """
        z = jax.random.normal(jax.random.key(seed), (number, self.latent_size))
        model = self.local_generator or self.generator
        apply = jax.jit(lambda v, z: model.apply(v, z, train=False))
        images = np.asarray(apply(_of_generator(variables), z), np.float32)
        return np.rint(np.clip((images + 1) * 127.5, 0, 255)).astype(np.uint8)

    def _optimizer(self, name: str) -> optax.GradientTransformation:
        if name == "discriminator" and self.discriminator_optimizer is not None:
            return self.discriminator_optimizer
        return self.optimizer

    def _latent(self, key: jax.Array, batch: Batch) -> jax.Array:
        normal = lambda key: jax.random.normal(key, (self.latent_size,))
        return jax.vmap(normal)(by_row(key, batch))


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """The Fréchet distance of two Gaussians (Dowson and Landau, 1982).

        |mean1 - mean2|^2 + trace(cov1 + cov2 - 2 (cov1 cov2)^(1/2))

    Args:
        mean1: Of the first, of shape (d,).
        cov1: Its covariance, of shape (d, d).
        mean2: Of the second.
        cov2: Its covariance.

    Returns:
        The squared distance, like the "FID".
    """
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # A similar matrix to the product of the two, but symmetric.
    both = np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)
    apart = np.sum((mean1 - mean2) ** 2)
    return float(apart + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(both).sum())


def _of_generator(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part["generator"] for name, part in variables.items()}


def _scaled(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 127.5 - 1


def _coarse(images: jax.Array) -> jax.Array:
    """Images downsampled to at most 8 by 8 pixels, as rows."""
    n, height, width, channels = images.shape
    rows, columns = np.gcd(height, _COARSE), np.gcd(width, _COARSE)
    shape = (n, rows, height // rows, columns, width // columns, channels)
    return images.reshape(shape).mean((2, 4)).reshape(n, -1)
