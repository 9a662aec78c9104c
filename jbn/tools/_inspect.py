"""Inspect: the gap between the statistics of training and of evaluation."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax import nnx

from jbn.tools.findings import Severity, findings
from jbn.tools.layers import Where
from jbn.tools.measure import measure
from jbn.tools.norms import Also, Norms
from jbn.tools.report import Report


def inspect(
    apply: Callable[[Any, Any], Any],
    variables: Mapping | nnx.Module,
    batches: Iterable[Any],
    *,
    where: Where = None,
    also: Also = None,
) -> Report:
    """Finds the gap between training and evaluation, layer by layer.

    Compares the running statistics, by which evaluation normalizes, with the moments of
    the layers' inputs when the model runs on the batches in training mode, merged over
    all batches: those that `recalibrate` would set. For normal distributions with these
    means and variances (plus epsilon),

        KL(data || running) = (r - 1 - log(r) + drift**2) / 2
        r = (var + epsilon) / (running_var + epsilon)
        drift = (mean - running_mean) / sqrt(running_var + epsilon)

    Statistics are reported if the divergence is large and not due to chance: more than
    ten times that of correct statistics, as estimated from the scatter of the batches,
    their number and the momentum. Pass a few dozen batches, drawn as in training.

    | kind | meaning |
    |---|---|
    | `nonfinite` | non-finite statistics, parameters or input; negative variance |
    | `never_updated` | still mean 0 and variance 1, unlike the data |
    | `cold` | the statistics still contain part of these initial values |
    | `shifted` | statistics of other data, or of earlier parameters |
    | `noisy` | an average of too few rows |
    | `few_rows` | batches (or groups) of fewer than 16 rows, or one of a single row |
    | `unseen` | no rows for a layer, or for one of its domains |
    | `dead` | constant features (variance below 1e-10 of the layer's median) |
    | `tiny` | features whose variance is below epsilon |
    | `zero_scale` | features with scale 0, unless the whole layer has it |

    Dead features are only notes: they are the same in both modes. Features so rarely
    active that their variance is not known within a factor of two are not judged.
    Frozen layers are not compared. A layer that is called several times is compared
    with all of its inputs.

    Args:
        apply: As for `recalibrate`, running the model in training mode. It is jitted.
        variables: Linen's variables, or an NNX model; not changed.
        batches: The data; iterated once.
        where: The layers, as for `convert`; by default all.
        also: Other people's batch norms, as for `convert`.

    Returns:
        The report: `print` it, or draw its `figure`.

    Raises:
        TypeError: As `recalibrate` does.
        ValueError: As `recalibrate` does.

    Example:
        >>> import jax
        >>> import jbn.linen
        >>> layer = jbn.linen.BatchNorm(use_running_average=False)
        >>> data = jax.random.normal(jax.random.key(0), (4, 64, 2))
        >>> variables = layer.init(jax.random.key(1), data[0])
        >>> apply = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])
        >>> inspect(apply, variables, data).findings
        ()
        >>> (finding,) = inspect(apply, variables, 3 + data).findings
        >>> finding.kind, finding.features
        ('never_updated', (0, 1))
    """
    layers, num_batches = measure(apply, variables, batches, where, Norms(also))
    found = [finding for layer in layers for finding in findings(layer)]
    order: list[Severity] = ["error", "warning", "note"]
    found.sort(key=lambda finding: order.index(finding.severity))
    return Report(tuple(layers), tuple(found), num_batches)
