"""Findings: problems of a layer, from its numbers, with advice."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np

from jbn.tools.measure import Measured, divergence


Severity = Literal["error", "warning", "note"]
Kind = Literal[
    "nonfinite",
    "never_updated",
    "cold",
    "shifted",
    "noisy",
    "few_rows",
    "unseen",
    "dead",
    "tiny",
    "zero_scale",
]

# A feature has drifted at 0.2 nats: 0.6 standard deviations, or a variance that is 2.1
# times or a third of the other. A layer has drifted if the mean over its features is a
# tenth of that. Both must be ten times the divergence of correct statistics by chance.
FEATURE_KL = 0.2
LAYER_KL = 0.02
_TIMES_NOISE = 10.0
# Means and variances of fewer rows are mostly noise. With 16, the noise is one tenth of
# the output: the variance of the mean, plus that of the standard deviation.
_FEW_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Finding:
    """A problem of one layer, and what to do about it.

    Attributes:
        layer: Path of the layer.
        domain: The domain, for layers with several.
        kind: Name of the finding; see `inspect`.
        severity: An `"error"` makes the running statistics useless, a `"warning"`
            makes evaluation differ from training, a `"note"` does neither.
        features: Indices of the features in the flattened statistics.
        message: A description, with numbers.
        advice: What to do.
    """

    layer: str
    domain: int | None
    kind: Kind
    severity: Severity
    features: tuple[int, ...]
    message: str
    advice: str


def findings(m: Measured) -> list[Finding]:
    """All findings of a layer."""
    rules = (_nonfinite, _unseen, _drifted, _few_rows, _dead, _tiny, _zero_scale)
    return [finding for rule in rules for finding in rule(m)]


def _nonfinite(m: Measured) -> Iterable[Finding]:
    wrong = ~(np.isfinite(m.mean) & np.isfinite(m.var) & (m.var >= 0))
    if wrong.any():
        yield _finding(
            m,
            "nonfinite",
            "error",
            wrong,
            f"{_count(wrong)} have a running mean or variance that is not finite, or a"
            " negative variance.",
            "Find the step that caused it (`jax.config.jax_debug_nans`); then"
            " `recalibrate` replaces the statistics.",
        )
    wrong = np.zeros(m.var.shape, bool)
    for param in (m.scale, m.bias):
        wrong |= False if param is None else ~np.isfinite(param)
    if wrong.any():
        yield _finding(
            m,
            "nonfinite",
            "error",
            wrong,
            f"{_count(wrong)} have a scale or bias that is not finite.",
            "The training has diverged: go back to an earlier checkpoint.",
        )
    wrong = ~(np.isfinite(m.data_mean) & np.isfinite(m.data_var))
    if wrong.any():
        yield _finding(
            m,
            "nonfinite",
            "error",
            wrong,
            f"{_count(wrong)} have an input that is not finite.",
            "Check the data and the layer before; leave out padding with `mask=`.",
        )


def _unseen(m: Measured) -> Iterable[Finding]:
    if m.batches or getattr(m.module, "freeze_stats", False):
        return
    every = np.ones(m.var.shape, bool)
    if m.module is None:
        text = "The layer did not run."
        advice = "`apply` skips part of the model, or the variables belong to another."
        yield _finding(m, "unseen", "note", every, text, advice)
        return
    if _is_initial(m, every):
        text = "Neither these batches nor training had rows for it."
        advice = (
            "Evaluation normalizes it by mean 0 and variance 1: leave such rows out, or"
            " `recalibrate` on data that has some."
        )
        yield _finding(m, "unseen", "warning", every, text, advice)
        return
    text = "These batches have no rows for it, so it is not compared."
    yield _finding(m, "unseen", "note", every, text, "Inspect data that has some.")


def _drifted(m: Measured) -> Iterable[Finding]:
    if not m.judged.any():
        return
    # A constant feature cannot be scaled wrongly, only shifted.
    kl = np.where(m.dead, m.drift**2 / 2, m.kl)
    if m.rows < _FEW_ROWS:
        # The running variance lacks the scatter of the batches' means, which `few_rows`
        # reports.
        epsilon = m.module.epsilon
        both = m.data_mean, m.within + epsilon, m.mean, m.var + epsilon
        kl = np.where(m.judged, np.minimum(kl, divergence(*both)), kl)
    average = lambda values: float(values[m.judged].mean())
    sure = m.judged & (kl > _TIMES_NOISE * m.noise)
    features = sure & (kl > FEATURE_KL)
    if average(kl) > max(LAYER_KL, _TIMES_NOISE * average(m.noise)):
        features = sure
    much = f"{average(kl):.2g} nats per feature, {kl[m.judged].max():.2g} at most"
    if features.any():
        yield _cause(m, features, much)
        return
    by_chance = average(m.running_noise)
    for_want_of_data = average(m.noise - m.running_noise)
    if average(kl) > LAYER_KL and by_chance > max(LAYER_KL, for_want_of_data):
        yield _finding(
            m,
            "noisy",
            "warning",
            m.judged,
            f"The statistics are off by chance: {much}. {_rows(m.rows)} per batch and"
            f" momentum={m.module.momentum} average too few rows.",
            "Average over more: `recalibrate`, or use a momentum closer to 1.",
        )


def _cause(m: Measured, features: np.ndarray, much: str) -> Finding:
    if _is_initial(m, m.judged):
        return _finding(
            m,
            "never_updated",
            "error",
            features,
            f"The statistics are still the initial mean 0 and variance 1: {much}.",
            'Keep what training returns: pass `mutable=["batch_stats"]` and put the new'
            " `batch_stats` into the state (NNX: `model.train()`). `recalibrate`"
            " repairs this network.",
        )
    if m.initial is not None:
        after = "" if m.updates is None else f", after {m.updates:,.0f} updates"
        momentum = m.module.momentum
        quicker = "`momentum=0.9`, " if momentum is not None and momentum > 0.9 else ""
        return _finding(
            m,
            "cold",
            "warning",
            features,
            f"{100 * m.initial:.2g} % of the statistics are still the initial mean 0"
            f" and variance 1{after}: {much}.",
            f"`recalibrate` now; next time {quicker}`debias=True`, or more steps.",
        )
    return _finding(
        m,
        "shifted",
        "warning",
        features,
        f"The statistics belong to other data, or lag behind the parameters: {much}.",
        "If the network is for this data, `recalibrate`; for a new domain, use"
        " `jbn.tools.adapt`; for several domains, `DomainBatchNorm`. If replicas or"
        " clients kept separate statistics, `jbn.tools.merge` them. If the parameters"
        " were still changing, a momentum of 0.9 follows them sooner.",
    )


def _few_rows(m: Measured) -> Iterable[Finding]:
    if not m.batches:
        return
    every = np.ones(m.var.shape, bool)
    groups = getattr(m.module, "num_groups", 1) or 1
    rows = m.rows / groups
    if rows < _FEW_ROWS:
        yield _finding(
            m,
            "few_rows",
            "warning",
            every,
            f"{_rows(rows)} per {'group' if groups > 1 else 'batch'}: the statistics"
            " are mostly noise, and the running variance lacks the scatter of means.",
            "Shrink them towards the running ones with `tau=`, or use `BatchRenorm`;"
            " share statistics over devices with `axis_name=`; for the running"
            " variance, set `second_moment=True`.",
        )
    elif m.least_rows <= 1:
        yield _finding(
            m,
            "few_rows",
            "warning",
            every,
            f"A batch has {_rows(m.least_rows)}, so its variance is 0, and its output"
            " is the bias.",
            "Set `min_weight=1`, or set `reference_weight=` to the usual number of"
            " rows, so that the batch counts by its rows; or drop such batches.",
        )


def _dead(m: Measured) -> Iterable[Finding]:
    if m.dead.any():
        epsilon = float(m.module.epsilon)
        most = 1 / math.sqrt(epsilon) if epsilon else math.inf
        yield _finding(
            m,
            "dead",
            "note",
            m.dead,
            f"{_count(m.dead)} are constant: their output is the bias.",
            "Prune them, or check the layers before (ReLU, padding, initial values)."
            f" If one does vary, its input is scaled by up to {most:.3g}: `trim=` and a"
            " larger `epsilon` limit that.",
        )


def _tiny(m: Measured) -> Iterable[Finding]:
    epsilon = float(getattr(m.module, "epsilon", 0))
    tiny = m.finite & ~m.dead & (m.data_var < epsilon)
    if tiny.any():
        yield _finding(
            m,
            "tiny",
            "note",
            tiny,
            f"{_count(tiny)} have a variance below epsilon={epsilon:g}, so epsilon"
            " determines their scale.",
            "If they matter, scale the input up, or set a smaller `epsilon`.",
        )


def _zero_scale(m: Measured) -> Iterable[Finding]:
    zero = np.zeros(m.var.shape, bool) if m.scale is None else m.scale == 0
    # A whole layer was initialized so, at the end of a residual branch.
    if zero.any() and not zero.all():
        yield _finding(
            m,
            "zero_scale",
            "note",
            zero,
            f"{_count(zero)} have scale 0: their output is the bias.",
            "Prune them, or leave scale and bias out of weight decay"
            " (`jbn.tools.decays`).",
        )


def _is_initial(m: Measured, features: np.ndarray) -> bool:
    return bool((m.mean[features] == 0).all() and (m.var[features] == 1).all())


def _finding(
    m: Measured,
    kind: Kind,
    severity: Severity,
    features: np.ndarray,
    message: str,
    advice: str,
) -> Finding:
    indices = tuple(np.flatnonzero(features).tolist())
    return Finding(m.layer, m.domain, kind, severity, indices, message, advice)


def _count(features: np.ndarray) -> str:
    return f"{int(features.sum()):,} of {features.size:,} features"


def _rows(rows: float) -> str:
    return f"{rows:,.3g} row{'' if rows == 1 else 's'}"
