"""Domain-specific batch norm (Chang et al., 2019): statistics for each domain."""

import dataclasses
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp

from jbn import axes
from jbn.call import Stats, prepare, run, thread
from jbn.options import Options, documented
from jbn.typing import ArrayLike, BatchStats, Params
from jbn.variants.soft import mixed


@documented(Options)
def domain_batch_norm(
    x: ArrayLike,
    params: Params | None,
    batch_stats: Stats,
    *,
    use_running_average: bool,
    domain: ArrayLike | int,
    num_domains: int | None = None,
    mix: Literal["output", "stats"] = "output",
    shrink_to: Literal["running", "pooled"] = "running",
    **options: Unpack[Options],
) -> tuple[jax.Array, Stats]:
    """Normalizes the rows of each domain by the domain's own mean and variance.

    Domains may be mixed in one batch. The result, the running statistics and the
    gradients are those of one `jbn.batch_norm` for each domain, called with its rows. A
    domain that is absent keeps its running statistics. Uses:

    - split batch norm, AdvProp (Xie et al., 2020): 0 for clean, 1 for adversarial rows;
    - domain-specific batch norm (Chang et al., 2019), batch correction: rows by source;
    - a discriminator that sees real and fake in one batch: 0 and 1;
    - MAML's statistics for each inner step (Antoniou et al., 2019): `domain=step`, one
      number, for the whole batch;
    - instance norm on packed data: rows by sample, and `batch_stats=None`.

    If `domain` has a floating dtype, it holds each row's shares in several domains. The
    moments of domain k are those of all rows with weights `domain[..., k]`, and `mix`
    selects how a row is normalized, where p are its shares divided by their sum:

    - `"output"`: `y = sum_k domain[..., k] * y_k`, with `y_k` the output normalized by
      domain k, its scale and its bias (mode normalization, Deecke et al., 2019);
    - `"stats"`: by the mixture's `mean = sum_k p_k * mean_k` and
      `var = sum_k p_k * (var_k + abs(mean_k - mean)**2)` (as UnMix-TNS, Tomar et al.,
      2024), with the scale and bias `sum_k p_k * scale_k` and `sum_k p_k * bias_k`.

    Shares of 0 and 1 are the same as ids. Gradients reach the shares.

    Make the statistics by `init((num_domains, num_features))`. Parameters are shared
    (`init(num_features)`) or each domain's own, with the shape of the statistics.

    Args:
        x: Input of shape (..., features, ...) and any floating or complex dtype.
        params: Scale and bias, one entry per feature, or per domain and feature; `None`
            leaves them out.
        batch_stats: Running mean and variance, one entry per domain and feature.
        use_running_average: `False` in training, `True` at inference.
        domain: The domain of each row: integers for the rows, or only for their leading
            axes (one per image: shape (batch,)), or one for all; may be traced. A row
            with a negative id, such as padding, belongs to no domain: it does not
            count, and is normalized by the last one. The same holds for a traced id of
            `num_domains` or more; a known one is an error.
            Floating: non-negative shares, with a last axis of size num_domains, and
            size 1 along row axes where they do not vary. A row whose shares are all 0
            does not count; its output is 0, or for `"stats"` that of equal shares.
        num_domains: Number of domains; only needed if `batch_stats` is `None`.
        mix: How shares mix domains: `"output"` or `"stats"`.
        shrink_to: Where `tau` shrinks a domain's statistics to: its own running ones,
            or those of all domains of the batch together, for domains too rare to have
            good running statistics. In training only: in inference a domain has its
            own running statistics, which average over its batches.
        **options: As for `jbn.batch_norm`; `trim` only with ids. If a domain may have a
            single row in a batch, set `min_weight=1`, or the output of that row is
            `bias`. For domains of few rows, `tau` and `second_moment=True` help.

    Returns:
        The normalized array and the running statistics, as `jbn.batch_norm`.

    Raises:
        TypeError: If `domain` does not hold real numbers, or as `jbn.batch_norm` does.
        ValueError: If `domain` does not fit the rows, if `num_domains` is missing or
            not that of `batch_stats`, if `mix` or `shrink_to` is unknown, or as
            `jbn.batch_norm` does.
        NameError: As `jbn.batch_norm` does.

    Example:
        >>> import jax.numpy as jnp
        >>> import jbn
        >>> x = jnp.array([[0.0], [10.0], [2.0], [30.0]])
        >>> _, stats = jbn.init((3, 1))
        >>> y, stats = domain_batch_norm(
        ...     x,
        ...     None,
        ...     stats,
        ...     use_running_average=False,
        ...     domain=jnp.array([0, 1, 0, 1]),
        ...     momentum=0.5,
        ... )
        >>> print(y.ravel().round(3))
        [-1. -1.  1.  1.]
        >>> print(stats.mean.ravel(), stats.var.ravel())
        [ 0.5 10.   0. ] [ 1.  50.5  1. ]

    References:
        Chang et al., "Domain-Specific Batch Normalization for Unsupervised Domain
        Adaptation", 2019. https://arxiv.org/abs/1906.03950
        Xie et al., "Adversarial Examples Improve Image Recognition", 2020.
        https://arxiv.org/abs/1911.09665
        Antoniou, Edwards and Storkey, "How to train your MAML", 2019.
        https://arxiv.org/abs/1810.09502
        Deecke, Murray and Bilen, "Mode Normalization", 2019, equations 5 and 6.
        https://arxiv.org/abs/1810.05466
        Tomar et al., "Un-Mixing Test-Time Normalization Statistics: Combatting Label
        Temporal Correlation", 2024. https://arxiv.org/abs/2401.08328
    """
    if domain is None:
        raise TypeError(
            "`domain` must be given: which domain each row, each entry of the leading"
            " axes, or the whole of `x` belongs to."
        )
    if batch_stats is not None:
        axes.check_record(batch_stats, "batch_stats", BatchStats)
        if num_domains is None and batch_stats.mean.ndim:
            num_domains = batch_stats.mean.shape[0]
    if num_domains is None:
        raise ValueError(
            "`num_domains` must be given if `batch_stats` is None; got None."
        )
    num_domains = axes.size(num_domains, "num_domains")
    axes.check_word(mix, "mix", ("output", "stats"))
    axes.check_word(shrink_to, "shrink_to", ("running", "pooled"))
    ids_or_shares: Any = axes.as_array(domain, "domain")
    soft = jnp.issubdtype(ids_or_shares.dtype, jnp.floating)
    if soft and options.get("trim") is not None:
        raise ValueError(
            "`trim` judges a row by the statistics of its domain, and with a floating"
            " `domain` it has several. Drop `trim`, or pass ids."
        )
    call = prepare(
        "domain_batch_norm",
        x,
        params,
        batch_stats,
        use_running_average=use_running_average,
        domain=None if soft else ids_or_shares,
        num_domains=num_domains,
        **options,
    )
    call = dataclasses.replace(call, pooled=shrink_to == "pooled")
    if soft:
        shares = axes.row_shares(ids_or_shares, "domain", call.lay, num_domains)
        return run(mixed, call, shares, mix=mix)
    return run(thread, call)
