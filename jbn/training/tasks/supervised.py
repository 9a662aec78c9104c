"""Classification of images or of their pixels: logits against integer labels."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbn.training import augment, pictures
from jbn.training.data import Dataset
from jbn.training.metrics import Metric
from jbn.training.state import TrainState
from jbn.training.step import Batch, Metrics, by_row, descend, gradient, sum_rows


_METRICS = {
    "classification": Metric("accuracy", "accuracy", percent=True),
    "segmentation": Metric("miou", "mean intersection over union", percent=True),
}


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Minimizes the cross-entropy of `model`'s logits and the labels of a batch.

        loss = sum(weight * cross_entropy) / sum(weight)

    over the examples, or their pixels, of all devices, so it does not matter how they
    are distributed. Pixels with label -1 are ignored.

    Attributes:
        kind: `classification`, with labels of shape (batch,), or `segmentation`, with
            labels of shape (batch, height, width).
        model: A Linen module, or an object with the same `init` and `apply`. It is
            called with images, `train` and `mask`. Its norm layers must take their
            statistics over `axis_name` as well.
        image_shape: Shape of one image.
        num_classes: Labels are below this.
        optimizer: Turns gradients into updates.
        axis_name: The mapped axis over the devices, or `None` if a batch holds all the
            rows (under plain `jit`, sharded or not).
        local_model: The model without mapped axes.
        label_smoothing: Share of the probability that is spread evenly over all
            classes.
        microbatches: Parts of a batch that gradients are summed over.
        momentum: Momentum of the running statistics; needed with several microbatches.
        shift: Most pixels to move an image by in training, at random.
        flip: Whether to mirror images in training, at random.
        mixup: The `alpha` of `augment.mixup`; 0 is off. Only for classification.
        row_keys: Whether to pass the model `keys` in training, one per image.
    """

    kind: Literal["classification", "segmentation"]
    model: Any
    image_shape: tuple[int, ...]
    num_classes: int
    optimizer: optax.GradientTransformation
    axis_name: str | None = None
    local_model: Any = None
    label_smoothing: float = 0.0
    microbatches: int = 1
    momentum: float = 0.9
    shift: int = 0
    flip: bool = False
    mixup: float = 0.0
    row_keys: bool = False
    recalibrates: bool = dataclasses.field(default=False, init=False)

    @property
    def metric(self) -> Metric:
        """Accuracy, or mean intersection over union."""
        return _METRICS[self.kind]

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Makes `params`, `batch_stats` and `opt_state`."""
        images = jnp.zeros((1, *self.image_shape), jnp.uint8)
        variables = self.model.init(key, images, train=False)
        params = variables["params"]
        return {
            "params": params,
            "batch_stats": variables.get("batch_stats", {}),
            "opt_state": self.optimizer.init(params),
        }

    def update(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """One step of the optimizer; sums of `loss`, `correct` and `weight`."""
        if self.shift or self.flip:
            batch = augment.augment(batch, by_row(key, batch), self.shift, self.flip)
        if self.mixup:
            mix_keys = by_row(jax.random.fold_in(key, 2), batch)
            batch = augment.mixup(batch, mix_keys, self.mixup)
        total = sum_rows(_weights(batch), self.axis_name)

        def objective(params: Any, batch_stats: Any, batch: Batch) -> Any:
            for_model = jax.random.fold_in(key, 1)
            call: dict[str, Any] = {}
            if self.row_keys:
                call["keys"] = by_row(for_model, batch)
            # For users' models: a different key for each device and microbatch.
            rngs = {"dropout": jax.random.fold_in(for_model, batch["index"][0])}
            logits, updated = self.model.apply(
                {"params": params, "batch_stats": batch_stats},
                batch["image"],
                train=True,
                mask=batch["weight"] > 0,
                mutable=["batch_stats"],
                rngs=rngs,
                **call,
            )
            sums = self._sums(logits, batch, self.label_smoothing)
            loss = sums["loss"] / jnp.where(total > 0, total, 1)
            return loss, (updated.get("batch_stats", {}), sums)

        grads, batch_stats, metrics = gradient(
            objective,
            state.params,
            state.batch_stats,
            batch,
            axis_name=self.axis_name,
            microbatches=self.microbatches,
            momentum=self.momentum,
        )
        params, opt_state = descend(
            self.optimizer, grads, state.opt_state, state.params
        )
        new = dataclasses.replace(
            state, params=params, batch_stats=batch_stats, opt_state=opt_state
        )
        return new, metrics

    def evaluate(self, variables: Mapping[str, Any], batch: Batch) -> Metrics:
        """The sums of `update`, plus `top5` and the `confusion` matrix."""
        logits: Any = self.model.apply(variables, batch["image"], train=False)
        found = jnp.argmax(logits, axis=-1)
        counts = _weights(batch) > 0
        # (float32 cannot count beyond 2^24 pixels; int32 can.)
        confusion = jnp.zeros((self.num_classes, self.num_classes), jnp.int32)
        confusion = confusion.at[batch["label"], found].add(counts.astype(jnp.int32))
        if self.axis_name is not None:
            confusion = jax.lax.psum(confusion, self.axis_name)
        sums = {**self._sums(logits, batch, 0.0), "confusion": confusion}
        if self._has_top5:
            sums["top5"] = sum_rows(
                jnp.where(_among_top(logits, batch["label"], 5), _weights(batch), 0),
                self.axis_name,
            )
        return sums

    def apply(self, variables: Mapping[str, Any], batch: Batch) -> Any:
        """Applies the model as in training, on all rows."""
        return (self.local_model or self.model).apply(
            variables,
            batch["image"],
            train=True,
            mask=batch["weight"] > 0,
            mutable=["batch_stats"],
        )

    def summarize(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean loss and accuracy; in an evaluation also `miou` or `top5_accuracy`."""
        weight = float(sums["weight"])
        values = {
            "loss": float(sums["loss"]) / weight if weight else float("nan"),
            "accuracy": float(sums["correct"]) / weight if weight else float("nan"),
        }
        if "top5" in sums:
            values["top5_accuracy"] = float(sums["top5"]) / weight
        if self.kind == "segmentation" and "confusion" in sums:
            values["miou"] = float(
                np.nanmean(intersection_over_union(sums["confusion"]))
            )
        return values

    def by_class(
        self, sums: Mapping[str, np.ndarray], classes: Sequence[str]
    ) -> dict[str, dict[str, float | int | None]]:
        """Metrics of each class, of an evaluation.

        Args:
            sums: The sums of `evaluate` over a split.
            classes: Names of the classes.

        Returns:
            For each class the number of `examples` (or pixels), `recall`, `precision`
            and intersection over union (`iou`); `None` if the denominator is zero.
        """
        confusion = np.asarray(sums["confusion"])
        right, labelled = np.diagonal(confusion), confusion.sum(axis=1)
        found, iou = confusion.sum(axis=0), intersection_over_union(confusion)

        def part(of: int, count: int) -> float | None:
            return float(of / count) if count else None

        return {
            name: {
                "examples": int(labelled[k]),
                "recall": part(right[k], labelled[k]),
                "precision": part(right[k], found[k]),
                "iou": None if np.isnan(iou[k]) else float(iou[k]),
            }
            for k, name in enumerate(classes)
        }

    def pictures(
        self,
        variables: Mapping[str, Any],
        sums: Mapping[str, np.ndarray],
        dataset: Dataset,
    ) -> dict[str, Any]:
        """The confusion matrix, or images with their predictions."""
        if self.kind == "classification":
            return {"confusion": pictures.confusion(sums["confusion"], dataset.classes)}
        rows = np.linspace(0, len(dataset.test) - 1, 6).astype(int)
        examples = dataset.test.rows(rows)
        model = self.local_model or self.model
        apply = jax.jit(lambda v, images: model.apply(v, images, train=False))
        found = np.asarray(apply(variables, examples["image"])).argmax(-1)
        return {
            "overlays": pictures.overlays(
                examples["image"], examples["label"], found, dataset.classes
            )
        }

    @property
    def _has_top5(self) -> bool:
        return self.kind == "classification" and self.num_classes > 5

    def _sums(self, logits: Any, batch: Batch, smoothing: float) -> Metrics:
        weights, labels = _weights(batch), jnp.maximum(batch["label"], 0)
        # Not by index: for pixels, XLA would constant-fold that scatter for seconds.
        one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        if "share" in batch:
            share = batch["share"][:, None].astype(logits.dtype)
            other = jax.nn.one_hot(
                batch["other_label"], logits.shape[-1], dtype=logits.dtype
            )
            one_hot = share * one_hot + (1 - share) * other
        one_hot = optax.smooth_labels(one_hot, smoothing) if smoothing else one_hot
        losses = optax.safe_softmax_cross_entropy(logits, one_hot)
        right = jnp.argmax(logits, axis=-1) == labels
        sums = {
            # Selected, not multiplied: a loss of weight zero may be non-finite.
            "loss": jnp.where(weights > 0, weights * losses, 0),
            "correct": jnp.where(right, weights, 0),
            "weight": weights,
        }
        return {name: sum_rows(x, self.axis_name) for name, x in sums.items()}


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """The ratio for each class; NaN for one that occurs in neither."""
    both = np.diagonal(confusion).astype(np.float64)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    return np.divide(both, either, out=np.full_like(both, np.nan), where=either > 0)


def _among_top(logits: jax.Array, labels: jax.Array, count: int) -> jax.Array:
    """Whether fewer than `count` classes have a larger logit than the label."""
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.bool_)
    own = jnp.max(logits, axis=-1, where=one_hot, initial=-jnp.inf, keepdims=True)
    return jnp.sum(logits > own, axis=-1) < count


def _weights(batch: Batch) -> jax.Array:
    """The weight of each label."""
    weight, label = batch["weight"], batch["label"]
    weight = weight.reshape(weight.shape + (1,) * (label.ndim - 1))
    return jnp.where(label >= 0, weight, jnp.zeros_like(weight))
