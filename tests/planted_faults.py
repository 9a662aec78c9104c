"""Plants faults into a copy of the project, one at a time: does a test find each?

    python tests/planted_faults.py [--list] [--only NAME]... [--minutes MINUTES]

For each fault the tests that are most likely to find it run, and all of the core where
these do not. What is printed is a table in Markdown: the fault, and the first test that
failed, or SURVIVED. A survivor is a line that no test holds, or one that does nothing.

It is no test itself, since it takes half an hour.
"""

import argparse
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple


ROOT = pathlib.Path(__file__).resolve().parents[1]
SURVIVED = "SURVIVED"
NOT_RUN = "not run: no time left"
LONGEST = 1800  # seconds of one run
# All that may find a fault which its own tests did not; the quick ones first.
CORE = [
    "tests/test_options.py",
    "tests/test_running.py",
    "tests/test_nnx_statistics.py",
    "tests/test_missing_state.py",
    "tests/test_shrink.py",
    "tests/test_ids.py",
    "tests/test_moments.py",
    "tests/ops",
    "tests/lowering",
    "tests/test_functional.py",
    "tests/test_derivative.py",
    "tests/variants",
]


class Fault(NamedTuple):
    """A text of a file, and what is put in its place.

    Attributes:
        name: What is wrong.
        file: Where, in `jbn`.
        old: The text.
        new: The one in its place.
        tests: Those that are most likely to find it.
        times: How often the text occurs; all are replaced.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    times: int = 1


def of(file: str, *tests: str) -> tuple[str, ...]:
    """Tests of a file."""
    return tuple(f"tests/{file}.py::{test}" for test in tests)


def options(*methods: str) -> tuple[str, ...]:
    """Of the contract of options: those of all methods."""
    test = "test_an_option_changes_the_result_and_modules_take_it"
    return of("test_options", *(f"{test}[{name}]" for name in methods))


def own(*methods: str) -> tuple[str, ...]:
    """Those of a method's own."""
    test = "test_an_option_of_its_own_changes_the_result_and_modules_take_it"
    return of("test_options", *(f"{test}[{name}]" for name in methods))


def settings(*methods: str) -> tuple[str, ...]:
    """Those of modules alone."""
    test = "test_a_setting_makes_the_variables_and_reaches_the_call"
    return of("test_options", *(f"{test}[{name}]" for name in methods))


def gradients(*methods: str) -> tuple[str, ...]:
    test = "test_gradients_of_modules_are_those_of_the_function"
    return of("test_options", *(f"{test}[{name}]" for name in methods))


def contract(*tests: str) -> tuple[str, ...]:
    """Of the contract of all methods, beside their references."""
    return of("variants/test_contract", *tests)


VALUES = contract(
    *(f"test_features_last[{name}]" for name in ("batch norm", "tau", "domain"))
)
AS_FLAX = of("test_skins", "test_every_argument_of_flax_by_name_position_and_default")
RENORM = contract("test_features_last[renorm, clipped]")
IN_PARTS = of(
    "test_derivative",
    "test_gradient_is_the_oracles[split--1-True]",
    "test_gradient_is_the_oracles[split-axis2-False]",
)

FAULTS = [
    # --- Options ---
    Fault(
        "a default of momentum that is another",
        "options.py",
        "            0.99,\n",
        "            0.9,\n",
        AS_FLAX,
    ),
    Fault(
        "a default of epsilon that is another",
        "options.py",
        "Option(1e-5, ",
        "Option(1e-3, ",
        AS_FLAX,
    ),
    Fault(
        "a misspelled option is passed over",
        "options.py",
        'raise TypeError(f"`{function}` has no option `{name}`.{hint}")',
        "continue",
        of(
            "test_options",
            "test_a_misspelled_option_is_named_with_what_was_called[batch norm]",
        ),
    ),
    Fault(
        "help leaves out the last option",
        "options.py",
        "in options_of(record).items()\n    ]\n    return",
        "in [*options_of(record).items()][:-1]\n    ]\n    return",
        of("test_options", "test_a_call_shows_and_explains_every_option"),
    ),
    # --- Arguments, and the steps of a call ---
    Fault(
        "min_weight is ignored",
        "call.py",
        "if self.min_weight is None:\n            return moments",
        "if True:\n            return moments",
        options("batch norm"),
    ),
    Fault(
        "tau is ignored",
        "call.py",
        "tau=tau if _may_exceed(tau, 0) else None",
        "tau=None",
        options("batch norm"),
    ),
    Fault(
        "trim is ignored",
        "call.py",
        "if self.trim is None or not self.summarizes:",
        "if True:",
        options("batch norm"),
    ),
    Fault(
        "inference updates",
        "call.py",
        "update_stats = batch_stats is not None and not use_running_average",
        "update_stats = batch_stats is not None",
        settings("batch norm")
        + of("test_skins", "test_linen_inference_needs_nothing_mutable"),
    ),
    Fault(
        "axis_name is dropped",
        "call.py",
        "if not summarizes:\n",
        "if True:\n",
        options("batch norm"),
    ),
    Fault(
        "groups of devices are dropped",
        "call.py",
        "rows=axes.rows(lay, axis_name, groups),",
        "rows=axes.rows(lay, axis_name, None),",
        options("batch norm"),
    ),
    Fault(
        "no rows count as some",
        "call.py",
        "            and 0 not in rows\n",
        "",
        of(
            "test_functional",
            "test_zero_rows_leave_the_state_alone",
        ),
    ),
    Fault(
        "a gradient passes to the running statistics",
        "call.py",
        "running = lax.stop_gradient(self.running)",
        "running = self.running",
        of("test_shrink", "test_no_gradient_passes_to_the_running_statistics"),
    ),
    Fault(
        "tau counts rows and not weights",
        "call.py",
        "if self.weights is None or self.weights.dtype == bool:",
        "if True:",
        contract("test_features_last[tau]"),
    ),
    Fault(
        "tau is differentiated as if it were 0",
        "call.py",
        "rows = self.rows if self.tau is None else None",
        "rows = self.rows",
        contract("test_features_last[tau]"),
    ),
    Fault(
        "too little weight of a microbatch does not count",
        "call.py",
        "if self.batch_stats.pending is None:\n            # Micro",
        "if True:\n            # Micro",
        of("test_accumulate", "test_too_little_weight_to_normalize_by_still_counts"),
    ),
    Fault(
        "a domain that is too large by one is taken",
        "call.py",
        "(values >= num_domains).any()",
        "(values > num_domains).any()",
        of("test_ids", "test_a_domain_that_is_not_there_is_refused"),
    ),
    # --- Linen ---
    Fault(
        "Linen does not read its update_stats",
        "linen.py",
        'given["update_stats"] = layer.update_stats',
        'given["update_stats"] = None',
        settings("batch norm"),
    ),
    Fault(
        "Linen updates as it is initialized",
        "linen.py",
        '"update_stats": False, "axis_name": None, ',
        '"axis_name": None, ',
        settings("batch norm"),
    ),
    Fault(
        "Linen makes variables where it cannot",
        "linen.py",
        'if there or layer.is_mutable_collection("batch_stats"):',
        "if True:",
        of("test_missing_state", "test_linen_inference", "test_inference"),
    ),
    Fault(
        "Linen takes trained statistics for new ones",
        "linen.py",
        'if name == "weight" and trained and layer.momentum is not None:',
        "if False:",
        of("test_missing_state", "test_a_trained_mean_counts_in_full"),
    ),
    Fault(
        "Linen guesses how many rows were seen",
        "linen.py",
        "optional = optional if there else []",
        "pass",
        of("test_missing_state", "test_how_many_rows_were_seen_cannot_be_guessed"),
    ),
    Fault(
        "Linen does not count its steps",
        "linen.py",
        "step.value = next_step(step.value)",
        "pass",
        of("variants/test_renorm", "test_only_updates_advance_the_schedule"),
    ),
    Fault(
        "Linen has scale in place of scale_init",
        "linen.py",
        "ones = scale_init or layer.scale_init",
        "ones = scale_init or nn.initializers.ones",
        settings("batch norm"),
    ),
    Fault(
        "Linen starts 1 + gamma at gamma = 1",
        "linen.py",
        "nn.initializers.zeros if from_zero else self.scale_init",
        "self.scale_init",
        settings("labels"),
    ),
    Fault(
        "Linen ignores own_affine",
        "linen.py",
        "params_front=front if self.own_affine else (),",
        "params_front=(),",
        settings("domain"),
    ),
    Fault(
        "Linen ignores devices_per_group",
        "linen.py",
        "devices_per_group=1 if self.is_initializing() else self.devices_per_group,",
        "devices_per_group=1,",
        of("test_options", "test_an_option_of_its_own_is_checked"),
    ),
    Fault(
        "Linen ignores freeze_affine",
        "linen.py",
        "            freeze_affine=self.freeze_affine,\n",
        "",
        gradients("frozen"),
    ),
    # --- NNX ---
    Fault(
        "NNX does not read its update_stats",
        "nnx.py",
        'options["update_stats"] = layer.update_stats',
        "pass",
        settings("batch norm"),
    ),
    Fault(
        "NNX does not count its steps",
        "nnx.py",
        "layer.step[...] = next_step(layer.step[...])",
        "pass",
        of("variants/test_renorm", "test_only_updates_advance_the_schedule"),
    ),
    Fault(
        "NNX starts 1 + gamma at gamma = 1",
        "nnx.py",
        'settings.setdefault("scale_init", jax.nn.initializers.zeros)',
        "pass",
        settings("labels"),
    ),
    Fault(
        "NNX ignores own_affine",
        "nnx.py",
        "params_front = front if own_affine else ()",
        "params_front = ()",
        settings("domain"),
    ),
    Fault(
        "NNX ignores freeze_affine",
        "nnx.py",
        "            freeze_affine=self.freeze_affine,\n",
        "",
        gradients("frozen"),
    ),
    Fault(
        "NNX has no weight to debias by",
        "nnx.py",
        'track_weight=given["debias"] or given["momentum"] is None,',
        'track_weight=given["momentum"] is None,',
        settings("batch norm"),
    ),
    Fault(
        "NNX commits by the biased variance",
        "nnx.py",
        '"unbiased": layer.unbiased,',
        '"unbiased": False,',
        of(
            "test_skins_variants",
            "test_commit_in_a_model_of_nnx_takes_the_rule_of_each_layer",
        ),
    ),
    Fault(
        "NNX does not normalize by what promote_dtype makes",
        "nnx.py",
        "given = running._replace(mean=mean, var=var)",
        "pass",
        of("test_skins", "TestNnx::test_a_users_promote_dtype_is_honoured"),
    ),
    # --- Methods ---
    Fault(
        "batch_norm drops unbiased",
        "variants/batch_norm.py",
        "        **options,\n    )\n    return run(thread, call)",
        '        **{k: v for k, v in options.items() if k != "unbiased"},\n'
        "    )\n    return run(thread, call)",
        options("batch norm"),
    ),
    Fault(
        "ghost groups drop the residual",
        "variants/ghost.py",
        "residual=None if call.residual is None else split(call.residual),",
        "residual=None,",
        options("ghost"),
    ),
    Fault(
        "the padding of ghost groups counts",
        "variants/ghost.py",
        "v = jnp.pad(v, widths)",
        'v = jnp.pad(v, widths, mode="edge")',
        contract("test_features_last[ghost, ragged]"),
    ),
    Fault(
        "ghost groups are longer",
        "variants/ghost.py",
        "group_size = -(-size // num_groups)",
        "group_size = size // num_groups + 1",
        contract("test_features_last[ghost]"),
    ),
    Fault(
        "each device keeps the statistics of its own ghost groups",
        "variants/ghost.py",
        "return summary.all_reduce(whole, rows)",
        "return whole",
        options("ghost"),
    ),
    Fault(
        "groups of devices do not share",
        "variants/ghost.py",
        "    if size == 1:\n        return None",
        "    if True:\n        return None",
        of("variants/test_ghost", "test_devices_that_cannot_share_a_group"),
    ),
    Fault(
        "a table of 1 + gamma is one of gamma",
        "variants/conditional.py",
        "scale = 1 + scale",
        "scale = +scale",
        own("labels", "maps"),
    ),
    Fault(
        "a label of -1 is the last",
        "variants/conditional.py",
        "labels = jnp.clip(ids.array().astype(jnp.int32), 0, num_classes - 1)",
        "labels = ids.array().astype(jnp.int32) % num_classes",
        of(
            "variants/test_conditional",
            "test_traced_labels_out_of_range_get_the_nearest",
        ),
    ),
    Fault(
        "a label that is too large by one is taken",
        "variants/conditional.py",
        "(values < num_classes)",
        "(values <= num_classes)",
        of("test_ids", "test_a_label_that_is_not_there_is_refused"),
    ),
    Fault(
        "frozen parameters have a gradient",
        "variants/frozen.py",
        "scale, bias = lax.stop_gradient((call.scale, call.bias))",
        "scale, bias = call.scale, call.bias",
        gradients("frozen"),
    ),
    Fault(
        "frozen statistics are updated",
        "variants/frozen.py",
        'if flag(freeze_stats, "freeze_stats"):\n        update_stats = False',
        'if flag(freeze_stats, "freeze_stats"):\n        pass',
        contract("test_features_last[frozen affine]")
        + of("variants/test_frozen", "test_three_switches"),
    ),
    Fault(
        "a frozen mode does not update in training",
        "variants/frozen.py",
        "update_stats = use_running_average is False",
        "update_stats = False",
        contract("test_features_last[frozen mode]")
        + of(
            "variants/test_frozen",
            "test_statistics_adapt_while_the_old_ones_normalize",
        ),
    ),
    Fault(
        "r has no lower limit",
        "variants/renorm.py",
        "jnp.clip(r, 1 / r_max, r_max)",
        "jnp.clip(r, 0, r_max)",
        of("test_missing_state", "test_a_schedule_starts_at_zero"),
    ),
    Fault(
        "d has no limit",
        "variants/renorm.py",
        "d = jnp.where(some, _clip(d, d_max), 0)",
        "d = jnp.where(some, d, 0)",
        own("renorm"),
    ),
    Fault(
        "d is not scaled",
        "variants/renorm.py",
        "bias = call.scale.astype(d.dtype) * d",
        "bias = d",
        RENORM,
    ),
    Fault(
        "gradients pass through r and d",
        "variants/renorm.py",
        "moments, running, epsilon = lax.stop_gradient(\n"
        "        (call.enough(as_moments(batch)), call.running, call.epsilon)\n    )",
        "moments, running, epsilon = (\n"
        "        call.enough(as_moments(batch)), call.running, call.epsilon\n    )",
        contract("test_features_last[renorm, open]"),
    ),
    Fault(
        "the last step overflows",
        "variants/renorm.py",
        "return jnp.where(step < jnp.iinfo(step.dtype).max, step + 1, step)",
        "return step + 1",
        of("variants/test_renorm", "test_the_last_step_there_is_stays"),
    ),
    Fault(
        "implicit zeros do not count",
        "variants/sparse.py",
        "return merge(moments, Moments(zeros, none, jnp.zeros_like(zeros)))",
        "return moments",
        options("sparse"),
    ),
    Fault(
        "a zero of a sparse array has the wrong sign",
        "variants/sparse.py",
        "background = -slope * stats.mean",
        "background = slope * stats.mean",
        options("sparse"),
    ),
    # --- The formula and its derivative ---
    Fault(
        "the derivative lacks the term of the variance",
        "_normalize.py",
        "    if half_dvar is not None:\n        stretched",
        "    if False:\n        stretched",
        VALUES,
    ),
    Fault(
        "the derivative lacks the term of the mean",
        "_normalize.py",
        "    if dmean is not None:\n        moved",
        "    if False:\n        moved",
        VALUES,
    ),
    Fault(
        "the term of the variance is twice as large",
        "_normalize.py",
        "rstd * half_dvar.astype(wide)",
        "rstd * (2 * half_dvar).astype(wide)",
        VALUES,
    ),
    Fault(
        "the slope of a feature lacks the scale",
        "_normalize.py",
        "of_element, of_gain, tangents, rstd, slope)",
        "of_element, of_gain, tangents, rstd, rstd)",
        VALUES,
    ),
    Fault(
        "the slope of an element lacks the scale",
        "_normalize.py",
        "of_element, tangents, slope, by_output, form.dtype",
        "of_element, tangents, rstd, by_output, form.dtype",
        VALUES,
    ),
    Fault(
        "the derivative by epsilon is lost",
        "_normalize.py",
        "    depsilon = tangents.epsilon\n",
        "    depsilon = None\n",
        VALUES,
    ),
    Fault(
        "the bias of what takes no part has no gradient",
        "_normalize.py",
        "other = zero if where_ignored is None else where_ignored",
        "other = zero",
        of(
            "test_derivative",
            "test_what_takes_no_part_comes_out_as_the_bias_and_passes_nothing_else",
        ),
    ),
    Fault(
        "what takes no part passes gradients",
        "_normalize.py",
        "    if part is not None:\n        zero = jnp.zeros",
        "    if False:\n        zero = jnp.zeros",
        of(
            "test_derivative",
            "test_what_takes_no_part_comes_out_as_the_bias_and_passes_nothing_else",
        ),
    ),
    Fault(
        "a ReLU's slope by the input and not the output",
        "_normalize.py",
        "return gate(operands.residual > 0, tangent, form.dtype)",
        "return gate(operands.x > 0, tangent, form.dtype)",
        of("test_fused", "test_relu_whose_slope_is_seen_in_the_output"),
    ),
    Fault(
        "a ReLU's slope at zero is 1",
        "_normalize.py",
        "return gate(before > 0, tangent, form.dtype)",
        "return gate(before >= 0, tangent, form.dtype)",
        of("test_fused", "test_relu_has_no_slope_at_zero"),
    ),
    Fault(
        "a ReLU's slope is 1 where the output is zero",
        "_normalize.py",
        "return gate(operands.residual > 0, tangent, form.dtype)",
        "return gate(operands.residual >= 0, tangent, form.dtype)",
        of("test_fused", "test_relu_has_no_slope_at_zero"),
    ),
    Fault(
        "the gradient of the residual is lost",
        "_normalize.py",
        "    if tangents.residual is not None:\n        residual",
        "    if False:\n        residual",
        of("test_fused", "test_gradient_of_the_residual"),
    ),
    Fault(
        "a residual that is not there makes a NaN",
        "_normalize.py",
        "y = y + _skipped(residual, residual, weights, y.dtype)",
        "y = y + numeric.wide(residual).astype(y.dtype)",
        of("test_fused", "test_padding_of_any_value"),
    ),
    Fault(
        "second derivatives miss the rule",
        "_normalize.py",
        "    y = apply(form, read)\n",
        "    y = _formula(form, read)\n",
        of(
            "test_derivative",
            "test_second_derivatives_keep_x_and_its_tangent",
        )
        + of("lowering/test_cpu", "test_loops_over_elements_do_no_work_of_features"),
    ),
    Fault(
        "a label for each image is broadcast early",
        "_normalize.py",
        "v is not None and v.shape == x.shape for v in (scale, bias)",
        "v is not None and v.shape != stats.mean.shape for v in (scale, bias)",
        of(
            "variants/test_conditional",
            "test_a_label_for_each_image_saves_no_scale_for_each_pixel",
        ),
    ),
    Fault(
        "a constant feature without epsilon is NaN",
        "_normalize.py",
        "    if not guarded:\n        return lax.rsqrt(total)",
        "    if True:\n        return lax.rsqrt(total)",
        of(
            "test_functional",
            "test_a_constant_feature_without_epsilon_is_the_bias",
        ),
    ),
    # --- Moments and their derivative ---
    Fault(
        "the derivative of the variance lacks its 2",
        "_moments.py",
        "jnp.zeros_like(dmean), dmean, 2 * half_dvar)",
        "jnp.zeros_like(dmean), dmean, half_dvar)",
        VALUES,
    ),
    Fault(
        "the derivative by the weights lacks the variance",
        "_moments.py",
        "excess = numeric.abs_square(d) - spread(parts.var, segments)",
        "excess = numeric.abs_square(d)",
        VALUES,
    ),
    Fault(
        "the derivative by the weights reads what is not finite",
        "_moments.py",
        "            dw = where(part, dw, 0)\n",
        "            pass\n",
        of("test_derivative", "test_gradient_of_weights_passes_by_what_is_not_finite"),
    ),
    Fault(
        "the derivative is that of one device",
        "_moments.py",
        "        sums = summary.psum(sums, rows)\n",
        "        pass\n",
        of("test_distribution", "test_uneven_shards_are_one_batch"),
    ),
    # --- Summaries ---
    Fault(
        "parts are merged without weights",
        "summary.py",
        "weigh = functools.partial(numeric.weigh, weights=weights * per_weight)\n",
        "alike = jnp.where(weights > 0, 1.0, 0.0).astype(weights.dtype)\n"
        "        alike = alike * numeric.reciprocal(total((alike,))[0])\n"
        "        weigh = functools.partial(numeric.weigh, weights=alike)\n",
        of("test_moments", "test_merge_equals_the_whole"),
    ),
    Fault(
        "the variance lacks the scatter of the means",
        "summary.py",
        "square = parts.var + numeric.abs_square(offset)",
        "square = parts.var",
        of("test_moments", "test_merge_equals_the_whole"),
    ),
    Fault(
        "parts that weigh alike are added up",
        "summary.py",
        "np.asarray(1 / number, v.dtype)",
        "np.asarray(1, v.dtype)",
        of("test_moments", "test_shards_that_weigh_alike_are_the_whole"),
    ),
    Fault(
        "the rows of one device are counted",
        "summary.py",
        "if devices > 1:  # All have as many rows.",
        "if False:",
        of("test_moments", "test_shards_that_weigh_alike_are_the_whole"),
    ),
    Fault(
        "the mean loses its second part",
        "summary.py",
        "offset = (parts.shift - shift) + parts.offset",
        "offset = parts.shift - shift",
        of("test_moments", "test_variance_is_right_to_1e_5_at_any_mean"),
    ),
    Fault(
        "all devices share one slot",
        "summary.py",
        "        slot = index\n",
        "        slot = 0 * index\n",
        contract("test_any_split_is_one_batch"),
    ),
    Fault(
        "weights that do not vary count once",
        "ops/numeric.py",
        "repeated = tuple(a for a in axes if counted.shape[a] != x.shape[a])",
        "repeated = ()",
        of("test_nnx_statistics", "test_training_in_16_bits"),
    ),
    # --- Running statistics ---
    Fault(
        "momentum is the other way round",
        "running.py",
        "return momentum, jnp.asarray(complement, dtype)",
        "return jnp.asarray(complement, dtype), momentum",
        of("test_running", "test_exponential_keeps_momentum_of_the_old"),
    ),
    Fault(
        "one minus a momentum near 1 is rounded",
        "running.py",
        "complement = 1 - momentum if complement is None else complement",
        "complement = 1 - momentum",
        of("test_running", "test_a_momentum_close_to_one_is_not_rounded_away"),
    ),
    Fault(
        "unbiased is ignored",
        "running.py",
        "    if rule.unbiased:\n        has_var",
        "    if False:\n        has_var",
        options("batch norm"),
    ),
    Fault(
        "one row has an unbiased variance",
        "running.py",
        "has_var = seen > 1",
        "has_var = seen > 0",
        of(
            "test_running",
            "test_where_there_is_no_unbiased_variance_the_running_one_stays",
        ),
    ),
    Fault(
        "the weight is not tracked",
        "running.py",
        "weight = where(some, numeric.scaled_up(total), weight)",
        "weight = where(some, weight, weight)",
        settings("batch norm")
        + of(
            "test_running",
            "test_debiased_is_the_exponentially_weighted_mean_of_the_batches",
        ),
    ),
    Fault(
        "a cumulative weight outweighs every batch",
        "running.py",
        "kept *= jnp.minimum(weight, 1)",
        "kept *= weight",
        of("test_running", "test_an_exponential_average_goes_on_from_a_cumulative_one"),
    ),
    Fault(
        "a share of zero keeps a NaN",
        "running.py",
        "new_mean = numeric.weigh(mean, keep) + numeric.weigh(batch_mean, add)",
        "new_mean = keep.astype(mean.dtype) * mean"
        " + add.astype(mean.dtype) * batch_mean",
        of("test_extremes", "test_a_momentum_of_zero_replaces_what_is_no_number"),
    ),
    Fault(
        "second_moment is ignored",
        "running.py",
        "if rule.momentum is None or rule.second_moment:",
        "if rule.momentum is None:",
        options("batch norm"),
    ),
    Fault(
        "a large batch counts less",
        "running.py",
        "batches = seen / jnp.asarray(self.reference_weight, dtype)",
        "batches = jnp.asarray(self.reference_weight, dtype) / seen",
        of("test_count_aware", "test_any_momentum"),
    ),
    Fault(
        "gradients pass through the new statistics",
        "running.py",
        "batch_stats, moments = lax.stop_gradient((batch_stats, moments))",
        "pass",
        of("test_running", "test_no_gradient_passes"),
    ),
    Fault(
        "what is committed stays pending",
        "running.py",
        "return new._replace(pending=jax.tree.map(jnp.zeros_like, pending))",
        "return new._replace(pending=pending)",
        of("test_accumulate", "test_what_is_committed_is_not_committed_again"),
    ),
    Fault(
        "a microbatch takes the place of those before",
        "running.py",
        "zip(merge(pending, moments), pending, strict=True)",
        "zip(moments, pending, strict=True)",
        of("test_accumulate", "test_statistics_are_those_of_all_rows"),
    ),
    Fault(
        "shrinking lacks the gap of the means",
        "_shrink.py",
        " + share * (1 - share) * gap",
        "",
        of("test_shrink", "test_it_is_the_moments_of_a_mixture"),
    ),
    # --- What is computed over memory ---
    Fault(
        "the variance is about the shift",
        "ops/shifted.py",
        "var = numeric.difference(square, numeric.abs_square(offset))",
        "var = square",
        of("test_moments", "test_variance_is_right_to_1e_5_at_any_mean"),
    ),
    Fault(
        "the shift is zero",
        "ops/shifted.py",
        "shift = numeric.coarse(_sample_mean(x, axes))",
        "shift = jnp.zeros_like(_sample_mean(x, axes))",
        of("test_moments", "test_variance_is_right_to_1e_5_without_jit"),
    ),
    Fault(
        "a lifted variance comes down half the way",
        "ops/shifted.py",
        "var / lift.real / lift.real",
        "var / lift.real",
        of("test_extremes", "test_tiny_deviations_without_epsilon"),
    ),
    Fault(
        "the first segment is left out",
        "ops/segments.py",
        "there = (ids >= 0) & (ids < num)",
        "there = (ids > 0) & (ids < num)",
        of("ops/test_segments", "test_ids_out_of_range_are_of_no_segment"),
    ),
    Fault(
        "no segment is one",
        "ops/segments.py",
        "return segments.ids < segments.num",
        "return segments.ids <= segments.num",
        of("variants/test_domain", "test_rows_of_no_domain_are_padding"),
    ),
    Fault(
        "ids of 8 bits stay so",
        "ops/segments.py",
        "ids = ids.astype(jnp.int32)  # `num`",
        "pass  # `num`",
        of("test_ids", "test_more_domains_than_an_id_can_name"),
    ),
    Fault(
        "rows of no segment get the first one's statistic",
        "ops/segments.py",
        'mode="clip"',
        'mode="wrap"',
        contract("test_features_last[domain, padding]"),
    ),
    Fault(
        "blocks of segments overlap",
        "ops/segments.py",
        "ids + num * block",
        "ids + block",
        of("ops/test_segments", "test_variances_are_exact_far_from_zero"),
    ),
    Fault(
        "a weight of zero times infinity",
        "ops/numeric.py",
        "return where(weights > 0, weighted, 0)",
        "return weighted",
        contract("test_rows_without_weight_may_hold_anything[batch norm]"),
    ),
    Fault(
        "what is masked is not centered on nothing",
        "ops/numeric.py",
        "return d if part is None else where(part, d, 0)",
        "return d",
        contract("test_rows_without_weight_may_hold_anything[batch norm]"),
    ),
    Fault(
        "a variance may be negative",
        "ops/numeric.py",
        "lax.max(square - lax.min(of_mean, most), lax.full_like(square, 0))",
        "square - lax.min(of_mean, most)",
        of("test_moments", "test_variance_is_never_negative"),
    ),
    Fault(
        "a variance that overflows is NaN",
        "ops/numeric.py",
        "lax.max(square - lax.min(of_mean, most), lax.full_like(square, 0))",
        "lax.max(square - of_mean, lax.full_like(square, 0))",
        of("ops/test_numeric", "test_a_variance_is_not_negative_and_no_nan"),
    ),
    # --- Weights ---
    Fault(
        "all must be near to trim",
        "weighting/trim.py",
        "2 * sums[0] >= sums[1]",
        "sums[0] >= sums[1]",
        options("batch norm"),
    ),
    Fault(
        "trimming has no epsilon",
        "weighting/trim.py",
        "(stats.var + epsilon.astype(real))",
        "stats.var",
        contract("test_features_last[trim]"),
    ),
    Fault(
        "each device trims by its own half",
        "weighting/trim.py",
        "        sums = summary.psum(sums, rows)\n",
        "        pass\n",
        of("test_robust", "test_the_half_is_taken_over_all_devices[vmap]"),
    ),
    Fault(
        "samples are told apart by the other axes",
        "weighting/balance.py",
        "if a not in kept)",
        "if a in kept)",
        of("test_weighting", "test_sample_weights_are_shares_of_the_sample"),
    ),
    Fault(
        "a group is one on each device",
        "weighting/balance.py",
        "        totals = summary.psum(totals, rows)\n",
        "        pass\n",
        of("test_weighting", "test_groups_over_devices_are_one_batch"),
    ),
    Fault(
        "segments of no rows are lost",
        "weighting/packed.py",
        '.at[ends].add(1, mode="drop")',
        '.at[ends].set(1, mode="drop")',
        of("test_packed", "test_any_lengths"),
    ),
    # --- Lowering ---
    Fault(
        "the last part of a split sum is dropped",
        "lowering/cpu.py",
        "lax.index_in_dim(terms, i, self.axis, False) for i in range(self.parts)",
        "lax.index_in_dim(terms, i, self.axis, False) for i in range(self.parts - 1)",
        of("lowering/test_cpu", "test_split_sums_are_sums"),
    ),
    Fault(
        "the last slice of a split sum is dropped",
        "lowering/cpu.py",
        "for i in range(self.parts)\n        )\n        return total(functools.reduce",
        "for i in range(self.parts - 1)\n        )\n        return total("
        "functools.reduce",
        of("lowering/test_cpu", "test_repeating_is_the_transpose_of_a_sum"),
    ),
    Fault(
        "the two sums of a loop are exchanged",
        "lowering/sums.py",
        "return both[..., 0, :], both[..., 1, :]",
        "return both[..., 1, :], both[..., 0, :]",
        IN_PARTS,
    ),
    Fault(
        "axes are merged with one that is kept",
        "lowering/cpu.py",
        "                and a - 1 in axes\n",
        "                and a > 0\n",
        options("batch norm"),
    ),
    Fault(
        "axes are merged where arrays do not agree",
        "lowering/cpu.py",
        "all((shape[a] == 1) == (shape[a - 1] == 1) for shape in shapes)",
        "True",
        options("ghost"),
    ),
    Fault(
        "a mixture of domains far apart is multiplied out",
        "variants/soft.py",
        "    return jnp.all((off <= _FAR**2 * var) | jnp.logical_not(some))",
        "    return jnp.array(True) | jnp.all(off <= var)",
        of("variants/test_soft", "test_domains_far_apart_are_as_exact"),
    ),
    Fault(
        "rows that fill a block count",
        "ops/soft.py",
        "jnp.pad(v, ((0, added), (0, 0))) if added else v",
        "jnp.pad(v, ((0, added), (0, 0)), mode='edge') if added else v",
        of("variants/test_soft", "test_rows_that_no_number_of_blocks_divides"),
    ),
    Fault(
        "a mixture's variance is not that of the means",
        "variants/soft.py",
        "soft.product(p, var + square(offset)), square(center))",
        "soft.product(p, var), square(0 * center))",
        of(
            "variants/test_soft",
            "test_values_statistics_and_gradients_are_those_of_the_formula",
        ),
    ),
    Fault(
        "a hoisted value is off by one",
        "lowering/cpu.py",
        "lax.pad(stat[None], stat.dtype.type(0),",
        "lax.pad(stat[None], stat.dtype.type(1),",
        of("lowering/test_cpu", "test_hoist_is_the_identity"),
    ),
    Fault(
        "hoist returns zero",
        "lowering/passes.py",
        "return [hoisted(arrays[0], self.shape)]",
        "return [jnp.zeros_like(arrays[0])]",
        VALUES,
    ),
    Fault(
        "Blocks sum over axes that are kept",
        "lowering/gpu.py",
        "if len(between) + 1 != len(summed) or features == 1:",
        "if features == 1:",
        of("lowering/test_gpu", "test_sums_around_an_axis_that_is_kept_have_no_blocks"),
    ),
    Fault(
        "Blocks do not know that XLA merges sums",
        "lowering/gpu.py",
        "return v * lax.optimization_barrier(np.ones((), v.dtype))",
        "return v",
        of("lowering/test_gpu", "test_blocks_are_not_merged"),
    ),
    Fault(
        "pairs are two times the first",
        "lowering/gpu.py",
        "part(0) | part(1)",
        "part(0) | part(0)",
        of("lowering/test_gpu", "test_pairs_are_bit_for_bit_what_elements_are"),
    ),
    Fault(
        "Separate loses a view on a GPU",
        "lowering/passes.py",
        "arrays = lax.optimization_barrier(arrays)",
        "arrays = arrays if found else lax.optimization_barrier(arrays)",
        of("lowering/test_passes", "test_views_are_apart_on_a_gpu"),
    ),
    Fault(
        "the cotangent of a view is lost",
        "lowering/passes.py",
        "views = [arrays[i :: self.leaves] for i in range(self.leaves)]",
        "last = max(1, self.views - 1) * self.leaves\n"
        "        views = [arrays[i : last : self.leaves] for i in range(self.leaves)]",
        VALUES + of("test_derivative", "test_numerical_derivatives"),
    ),
    Fault(
        "a gate lets all pass",
        "lowering/passes.py",
        "return [where(chosen, v, 0).astype(wide)]",
        "return [v.astype(wide)]",
        of("test_fused", "test_every_activation[one device-relu]"),
    ),
    Fault(
        "each term of a tangent is rounded",
        "lowering/passes.py",
        "v.astype(self.dtype) if self.backward else v",
        "v.astype(self.dtype)",
        of("test_fused", "test_16_bit_tangents_are_rounded_once"),
    ),
    Fault(
        "blocks need not divide the rows",
        "lowering/blocks.py",
        "if shape[a] % c == 0]",
        "]",
        of("lowering/test_blocks", "test_blocks_divide_the_rows"),
    ),
    Fault(
        "a vmapped program takes axes as they come",
        "lowering/late.py",
        "arrays[i] = jnp.moveaxis(arrays[i], cast(int, axes[i]), 0)",
        "pass",
        of("lowering/test_late", "test_vmap_over_any_axis"),
    ),
]


# --- Running tests ---------------------------------------------------------------


def copy_of_the_project(to: pathlib.Path) -> None:
    """What git tracks, and what it would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)


def pytest_in(copy: str, tests: list[str], options: list[str], report: str) -> None:
    """The body of a process: runs tests of a copy, and exits with what pytest says.

    Of what is slow only the cases run that are named.
    """
    os.chdir(copy)
    others = [p for p in sys.path if not pathlib.Path(p).is_relative_to(ROOT)]
    sys.path[:] = [copy, *others]
    with open(report, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        import pytest

        class Quick:
            @pytest.hookimpl(trylast=True)
            def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
                slow = lambda item: item.get_closest_marker("slow") is not None
                items[:] = [v for v in items if v.nodeid in tests or not slow(v)]

        quiet = "-q --tb=no -rfE -p no:cacheprovider -p no:xdist".split()
        code = int(pytest.main([*quiet, *options, *tests], [Quick()]))
        module = sys.modules.get("jbn")
        if module is None or not str(module.__file__).startswith(copy):
            code = 99  # these were not tests of the copy
    os._exit(code)


class Copy:
    """A copy of the project, whose tests run in processes that have imported JAX."""

    def __init__(self, folder: pathlib.Path):
        self.root, self.report = folder / "project", folder / "report.txt"
        copy_of_the_project(self.root)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["flax.linen", "flax.nnx", "pytest"])

    def failures(self, tests: Sequence[str], *options: str) -> str | None:
        """The tests that fail, with `-x` the first; or why they did not end."""
        names = list(dict.fromkeys(tests))
        args = str(self.root), names, list(options), str(self.report)
        process = self.context.Process(target=pytest_in, args=args)
        process.start()
        process.join(LONGEST)
        if process.is_alive():
            process.kill()
            process.join()
            return "no end"
        if process.exitcode == 0:
            return None
        report = self.report.read_text()
        found = re.findall(
            r"^(?:SUBFAILED(.*?)|FAILED|ERROR) (tests/\S+(?:\[.*?\])?)(?: - .*)?$",
            report,
            re.MULTILINE,
        )
        if not found:
            last = " ".join(report.split("\n")[-4:])
            return f"exit status {process.exitcode}: {last}"
        named = [f"{test} {part}".strip() for part, test in found]
        return named[0] if "-x" in options else "\n".join(named)


def check(faults: list[Fault]) -> list[str]:
    """What is wrong with the list itself."""
    mistakes = []
    names = [fault.name for fault in FAULTS]
    mistakes += [f"two are called {n!r}" for n in set(names) if names.count(n) > 1]
    for fault in faults:
        source = (ROOT / "jbn" / fault.file).read_text()
        count = source.count(fault.old)
        if count != fault.times:
            mistakes.append(f"{fault.name}: its text occurs {count} times")
            continue
        try:
            compile(source.replace(fault.old, fault.new), fault.file, "exec")
        except SyntaxError as error:
            mistakes.append(f"{fault.name}: {error}")
    return mistakes


def plant(fault: Fault, copy: Copy, tests: Sequence[str]) -> str | None:
    """The first of some tests that finds a fault, if any does."""
    path = copy.root / "jbn" / fault.file
    before = path.read_text()
    path.write_text(before.replace(fault.old, fault.new))
    try:
        return copy.failures(tests, "-x")
    finally:
        path.write_text(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--only", action="append", metavar="NAME", help="this fault")
    parser.add_argument(
        "--minutes", type=float, help="plant no more after this time; default: all"
    )
    given = parser.parse_args()
    faults = [f for f in FAULTS if given.only is None or f.name in given.only]
    if given.list:
        print("\n".join(f"{fault.file}: {fault.name}" for fault in faults))
        return 0
    mistakes = check(faults) if faults else [f"no fault is called {given.only}"]
    if mistakes:
        print("\n".join(mistakes))
        return 2
    end = time.monotonic() + 60 * (given.minutes or float("inf"))
    # A source changes within a second, which Python would not notice.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        # Most programs are those of the run before.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
        copy = Copy(pathlib.Path(folder))
        failing = copy.failures([test for fault in faults for test in fault.tests])
        if failing is not None:
            print(f"without any fault there fail already:\n{failing}")
            return 2
        survivors = report(faults, copy, end)
    print(f"\n{len(faults) - survivors} of {len(faults)} faults were found.")
    return int(survivors > 0)


def report(faults: list[Fault], copy: Copy, end: float) -> int:
    """Prints the table; returns how many faults no test has found."""

    def row(fault: Fault, found: str) -> None:
        found = found.removeprefix("tests/").replace("|", "\\|")
        print(f"| {fault.name} | {fault.file} | {found} |", flush=True)

    print("| fault | file | found by |\n| --- | --- | --- |")
    left, survivors = [], 0
    for fault in faults:
        if time.monotonic() > end:
            row(fault, NOT_RUN)
            survivors += 1
        elif found := plant(fault, copy, fault.tests):
            row(fault, found)
        else:
            left.append(fault)
    if left and time.monotonic() < end and (failing := copy.failures(CORE)):
        print(f"without any fault there fail already:\n{failing}")
        return survivors + len(left)
    for fault in left:
        found = "by no test of its own; " + NOT_RUN
        if time.monotonic() < end:
            found = plant(fault, copy, CORE)
        survivors += found is None or NOT_RUN in found
        row(fault, found or SURVIVED)
    return survivors


if __name__ == "__main__":
    sys.exit(main())
