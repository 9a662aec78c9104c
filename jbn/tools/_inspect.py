"""Inspect: the gap between what a network trains with and what it evaluates with."""

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

    Compares the running statistics, which evaluation normalizes by, with the moments
    of what the layers see when the batches run through the model in training mode,
    merged over all batches: with what `recalibrate` would put in their place. For
    normal distributions with the mean and the variance (and epsilon) of each,

        KL(data || running) = (r - 1 - log(r) + drift**2) / 2
        r = (var + epsilon) / (running_var + epsilon)
        drift = (mean - running_mean) / sqrt(running_var + epsilon)

    Statistics are found to be off by a divergence that matters and that is no chance:
    ten times that of statistics that are right, by the scatter of the batches, their
    number and the momentum. Give batches as they are in training, some dozens of them.

    | kind | what it is |
    |---|---|
    | `nonfinite` | statistics, parameters or input not finite; negative variance |
    | `never_updated` | mean 0 and variance 1, which the data have not |
    | `cold` | a part of these initial values is still in the statistics |
    | `shifted` | of other data, or of parameters that have changed since |
    | `noisy` | an average of so few rows that it is off by chance |
    | `few_rows` | batches (or groups) of less than 16 rows, or one of a single row |
    | `unseen` | no rows for a layer, or for a domain of it |
    | `dead` | features that are constant (var below 1e-10 of the layer's median) |
    | `tiny` | features with a variance below epsilon, which then decides |
    | `zero_scale` | features with scale 0, unless the whole layer has |

    Dead features are notes: they are the same in both modes. Features that are active
    so rarely that their variance is not known to a factor of two are not judged. Frozen
    layers gather nothing, and are not compared. A layer that is called several times is
    compared with all of its inputs.

    Args:
        apply: As for `recalibrate`, running the model in training mode. Is jitted.
        variables: Linen's variables, or an NNX model; not changed.
        batches: The data; iterated once.
        where: Which layers, as for `convert`; by default all.
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
