"""Conditional batch norm: a scale and bias for each label, or each position."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from jbn import axes
from jbn._normalize import as_statistic, check_affine, expand_affine
from jbn.axes import AtRank, Layout
from jbn.call import Call, Stats, flag, prepare, run, thread
from jbn.ops.segments import segments_of, spread
from jbn.options import Options, documented
from jbn.typing import ArrayLike, Params


@documented(Options)
def conditional_batch_norm(
    x: ArrayLike,
    params: Params | None,
    batch_stats: Stats,
    *,
    use_running_average: bool,
    labels: ArrayLike | int | None = None,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    one_plus: bool = False,
    **options: Unpack[Options],
) -> tuple[jax.Array, Stats]:
    """Normalizes each feature, with a scale and bias given by a label or a map.

        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    Statistics are those of `jbn.batch_norm`. The scale of each row or position is saved
    for the backward pass, besides `x`. Scale and bias are

    - by label: `params[labels]`, from tables of shape (num_classes, *features)
      (Dumoulin et al., 2017; class-conditional GANs). There may be one label per row or
      per image, or a map of labels;
    - or given: arrays that broadcast to `x`, computed by the caller, such as a
      convolution of a segmentation map (SPADE, Park et al., 2019), or a projection of
      an embedding (BigGAN, Brock et al., 2019). Then `params` must be `None`.

    Args:
        x: Input of shape (..., features, ...) and any floating or complex dtype.
        params: Tables of scale and bias, one row per label. A field that is `None` is
            left out, and one without the label axis is shared by all labels.
        batch_stats: Running mean and variance, one entry per feature, or `None`.
        use_running_average: `False` in training, `True` at inference.
        labels: Integers for the rows, or only for their leading axes (one per image:
            shape (batch,)), or one for all. Traced labels out of range are clipped.
        scale: Scale of the rank of `x`, with size 1 where it does not vary.
        bias: Bias likewise.
        one_plus: Whether tables and `scale` hold `gamma` of a scale `1 + gamma`. Then
            zero, where initializers start and weight decay leads, is the identity.
        **options: As for `jbn.batch_norm`.

    Returns:
        The normalized array and the running statistics, as `jbn.batch_norm`.

    Raises:
        TypeError: If `labels` are not integers, `scale` or `bias` not floating, or as
            `jbn.batch_norm` does.
        ValueError: If neither or both of `labels` and `scale` or `bias` are given, if
            shapes do not fit, if labels are known to be out of range, or as
            `jbn.batch_norm` does.
        NameError: As `jbn.batch_norm` does.

    Example:
        >>> import jbn
        >>> x = jnp.array([[0.0], [2.0]])
        >>> params = Params(jnp.array([[1.0], [8.0]]), jnp.array([[0.0], [5.0]]))
        >>> y, _ = conditional_batch_norm(
        ...     x,
        ...     params,
        ...     None,
        ...     use_running_average=False,
        ...     labels=jnp.array([0, 1]),
        ...     epsilon=0.0,
        ... )
        >>> print(y.ravel())
        [-1. 13.]

    References:
        Dumoulin, Shlens and Kudlur, "A Learned Representation For Artistic Style",
        2017. https://arxiv.org/abs/1610.07629
        Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization",
        2019. https://arxiv.org/abs/1903.07291
        Brock, Donahue and Simonyan, "Large Scale GAN Training for High Fidelity Natural
        Image Synthesis", 2019. https://arxiv.org/abs/1809.11096
    """
    given = scale is not None or bias is not None
    if (labels is not None) == given:
        raise ValueError(
            "`conditional_batch_norm` takes either `labels`, for tables in `params`, or"
            f" `scale` and `bias`; got {'both' if given else 'neither'}. Without a"
            " condition use `batch_norm`."
        )
    if given and params is not None:
        raise ValueError(
            "`params` are tables for `labels`, and must be None if `scale` or `bias`"
            " are given. Multiply learned factors into these."
        )
    call = prepare(
        "conditional_batch_norm",
        x,
        None,
        batch_stats,
        use_running_average=use_running_average,
        **options,
    )
    one_plus = flag(one_plus, "one_plus")
    if given:
        scale = _per_call(scale, "scale", call.lay, call.x.dtype)
        bias = _per_call(bias, "bias", call.lay, call.x.dtype)
        return run(_with_maps, call, Params(scale, bias), one_plus=one_plus)
    axis = options.get("axis", -1)
    ids, num_classes = _checked_labels(params, labels, call.lay, axis, call.x.dtype)
    return run(
        _with_tables, call, params, ids, num_classes=num_classes, one_plus=one_plus
    )


def _with_maps(call: Call, maps: Params, *, one_plus: bool):
    """The body with a scale and a bias that broadcast to the input."""
    cast = lambda v: None if v is None else as_statistic(v, call.x.dtype)
    return _conditioned(call, cast(maps.scale), cast(maps.bias), one_plus)


def _with_tables(
    call: Call, params: Params, ids: AtRank, *, num_classes: int, one_plus: bool
):
    """The body with a scale and a bias of each label."""
    # JAX would read -1 as the last row; clipped, it is the first.
    labels = jnp.clip(ids.array().astype(jnp.int32), 0, num_classes - 1)
    segments = segments_of(labels, num_classes)
    tables = expand_affine(params, call.lay, call.x.dtype, fronted=True)
    each = lambda table: None if table is None else spread(table, segments)
    return _conditioned(call, each(tables[0]), each(tables[1]), one_plus)


def _conditioned(call: Call, scale, bias, one_plus: bool):
    if one_plus and scale is not None:
        scale = 1 + scale
    return thread(dataclasses.replace(call, scale=scale, bias=bias))


def _checked_labels(
    params: Params | None, labels, lay: Layout, axis, dtype
) -> tuple[AtRank, int]:
    """The label of each row, and the number of labels in the tables."""
    if params is not None:
        axes.check_record(params, "params", Params)
    rank = len(lay.features) + 1
    tables = [t for t in params or () if t is not None and t.ndim == rank]
    if not tables:
        raise ValueError(
            "`params` must have tables with one row per label, of shape (num_classes,"
            f" *features) with features {lay.features}; got none. Make them by"
            " `init((num_classes, num_features))`."
        )
    num_classes = tables[0].shape[0]
    ids = axes.row_ids(labels, "labels", lay)
    values = axes.known(ids.value)
    if values is not None and not ((values >= 0) & (values < num_classes)).all():
        raise ValueError(
            f"`labels` must be from 0 to {num_classes - 1}, as the tables in `params`"
            f" have {num_classes} rows; those given go from {values.min()} to"
            f" {values.max()}."
        )
    check_affine(params, lay, axis, dtype, ("label", num_classes))
    return ids, num_classes


def _per_call(v: ArrayLike | None, name: str, lay: Layout, dtype) -> jax.Array | None:
    """The caller's scale or bias, checked to broadcast to the input."""
    if v is None:
        return None
    given = axes.as_array(v, name)
    axes.check_real(given, f"{name}", not jnp.issubdtype(dtype, jnp.complexfloating))
    shape = tuple(given.shape)
    fits = len(shape) == len(lay.shape) and all(
        n in (1, m) for n, m in zip(shape, lay.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"`{name}` must have the rank of `x`, with size 1 where it does not vary;"
            f" got shape {shape} for `x` of shape {lay.shape}."
        )
    return jnp.asarray(given)
