"""The M step: three regressions, with what is frozen, floors and priors."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from issm._check import fail
from issm._host import is_concrete, to_device
from issm._trees import all_false, all_true, trainable_masks
from issm.fitting.priors import Priors, ResolvedPrior, resolve_prior
from issm.fitting.regression import PatternStatistics, RowStatistics, regress_patterns, regress_rows
from issm.fitting.statistics import SufficientStatistics
from issm.models.fields import TimeVarying, is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM, ParamsLGSSMDynamics, ParamsLGSSMEmissions, ParamsLGSSMInitial

BLOCKS = ("initial", "dynamics", "emissions")


class BlockRules(eqx.Module):
    """What an update of one block may do.

    Attributes:
        coefficients: Entries of `[weights, input_weights, bias]` that may move; one row if all rows agree, None if all may.
        cov: Entries of the covariance that may move; a full one moves as a whole.
        prior: Prior, or None.
    """

    coefficients: Bool[Array, "rows_or_1 columns"] | None
    cov: Bool[Array, "..."]
    prior: ResolvedPrior | None


class Rules(eqx.Module):
    """What an M step may do; `input_l1` is the weight of the sparsity prior on B."""

    initial: BlockRules
    dynamics: BlockRules
    emissions: BlockRules
    input_l1: Float[Array, ""] | None


def make_rules(params: ParamsLGSSM, trainable: Any, priors: Any) -> Rules:
    """Check `trainable` and `priors` against the parameters."""
    if priors is None:
        priors = Priors()
    if not isinstance(priors, Priors):
        fail("priors", got=f"a {type(priors).__name__}", expected="a Priors or None", remedy="Build one with `Priors`.")
    masks = trainable_masks(params, trainable, fixed=TimeVarying)
    blocks = {name: _block_rules(name, params, masks, getattr(priors, name)) for name in BLOCKS}
    return Rules(**blocks, input_l1=_check_l1(params, priors.input_l1))


def m_step(
    params: ParamsLGSSM, stats: SufficientStatistics, rules: Rules, floor: Float[Array, " emission_dim"]
) -> ParamsLGSSM:
    r"""Raise the expected complete-data log-likelihood (plus the log prior) as far as `rules` allow (model.md, section 4).

    Args:
        params: Parameters that the statistics were computed with.
        stats: Expected sufficient statistics.
        rules: What is frozen, and the priors.
        floor: Smallest emission variances.
    """
    l1 = None
    if rules.input_l1 is not None:
        state_dim, input_dim = params.state_dim, params.input_dim
        l1 = jnp.pad(jnp.broadcast_to(rules.input_l1, (input_dim,)), (state_dim, 1))
    updated = []
    for name in BLOCKS:
        block, rule = getattr(params, name), getattr(rules, name)
        coefficients, cov = update_block(
            coefficients_of(block),
            block.cov,
            getattr(stats, name),
            rule,
            floor=floor if name == "emissions" else None,
            l1=l1 if name == "dynamics" else None,
        )
        updated.append(with_coefficients(block, coefficients, cov))
    return ParamsLGSSM(*updated)


def log_prior(params: ParamsLGSSM, rules: Rules) -> Float[Array, ""]:
    """Log density of the priors, up to a constant."""
    total = jnp.zeros((), params.initial.mean.dtype)
    for name in BLOCKS:
        prior = getattr(rules, name).prior
        if prior is not None:
            block = getattr(params, name)
            total = total + prior.log_prob(coefficients_of(block), block.cov)
    if rules.input_l1 is not None:
        total = total - rules.input_l1 * jnp.abs(values_of(params.dynamics.input_weights)).sum()
    return total


def coefficients_of(
    block: ParamsLGSSMInitial | ParamsLGSSMDynamics | ParamsLGSSMEmissions,
) -> Float[Array, "rows columns"]:
    """`[weights, input_weights, bias]` of a block; a field that varies in time stands as zeros, since it never changes."""
    if isinstance(block, ParamsLGSSMInitial):
        return block.mean[:, None]
    constant = lambda field: jnp.zeros_like(field.values[0]) if isinstance(field, TimeVarying) else field  # noqa: E731
    return jnp.concatenate(
        [constant(block.weights), constant(block.input_weights), constant(block.bias)[:, None]], axis=1
    )


def with_coefficients(block: Any, coefficients: Array, cov: Array | TimeVarying) -> Any:
    """The block with other coefficients and covariance."""
    if isinstance(block, ParamsLGSSMInitial):
        return ParamsLGSSMInitial(coefficients[:, 0], cov)  # type: ignore[arg-type]
    keep = lambda field, new: field if isinstance(field, TimeVarying) else new  # noqa: E731
    columns = values_of(block.weights).shape[-1]
    return type(block)(
        weights=keep(block.weights, coefficients[:, :columns]),
        bias=keep(block.bias, coefficients[:, -1]),
        input_weights=keep(block.input_weights, coefficients[:, columns:-1]),
        cov=cov,
    )


def update_block(
    coefficients: Array,
    cov: Array | TimeVarying,
    stats: RowStatistics | PatternStatistics,
    rule: BlockRules,
    *,
    floor: Array | None = None,
    l1: Array | None = None,
) -> tuple[Array, Array | TimeVarying]:
    """New coefficients and covariance of one block."""
    if rule.prior is not None:
        stats = rule.prior.add_to(stats, coefficients)
    if isinstance(cov, TimeVarying):
        if not is_diagonal(cov):
            return coefficients, cov
        assert isinstance(stats, RowStatistics)  # known variances are weights in its sums
        new, _ = regress_rows(stats, coefficients, jnp.ones_like(stats.count), trainable=rule.coefficients, l1=l1)
        return _keep_frozen(new, coefficients, rule.coefficients), cov
    regress = regress_rows if isinstance(stats, RowStatistics) else regress_patterns
    new, new_cov = regress(stats, coefficients, cov, trainable=rule.coefficients, floor=floor, l1=l1)  # type: ignore[arg-type]
    moves = rule.cov if cov.ndim == 1 else rule.cov.all()
    return _keep_frozen(new, coefficients, rule.coefficients), jnp.where(moves, new_cov, cov)


def _keep_frozen(new: Array, old: Array, trainable: Array | None) -> Array:
    return new if trainable is None else jnp.where(trainable, new, old)


def _block_rules(name: str, params: ParamsLGSSM, masks: ParamsLGSSM, prior: Any) -> BlockRules:
    block, mask = getattr(params, name), getattr(masks, name)
    cov_mask = mask.cov.values if isinstance(mask.cov, TimeVarying) else mask.cov
    moves = coefficient_mask(mask)
    if not is_diagonal(block.cov) and is_concrete(cov_mask) and cov_mask.any() and not cov_mask.all():
        fail(
            f"trainable.{name}.cov",
            got="single entries of a full covariance frozen",
            expected="True or False for the whole matrix",
            remedy="A diagonal covariance, given with one axis, can be frozen entry by entry.",
        )
    if isinstance(block.cov, TimeVarying):
        if not is_diagonal(block.cov) and not all_false(moves):
            fail(
                f"trainable.{name}",
                got="coefficients to train beside a full covariance that varies in time",
                expected="them frozen, or a diagonal covariance",
                remedy=f"Freeze the rest of `{name}`, or give its covariance as variances (num_timesteps, dim).",
            )
        if prior is not None:
            fail(
                f"priors.{name}",
                got="a prior beside a covariance that varies in time",
                expected="None",
                remedy="A `TimeVarying` covariance is fixed; the prior is in units of a constant one.",
            )
    rows, columns = jax.eval_shape(coefficients_of, block).shape
    resolved = resolve_prior(f"priors.{name}", prior, rows, columns, params.initial.mean.dtype)
    coefficients = None
    if not all_true(moves):
        alike = is_concrete(moves) and bool((np.asarray(moves) == np.asarray(moves)[:1]).all())
        coefficients = to_device(moves[:1] if alike else moves)
    return BlockRules(coefficients, to_device(cov_mask), resolved)


def coefficient_mask(mask: Any) -> Any:
    """What may move among the coefficients of a block, from the Booleans of its fields."""
    if isinstance(mask, ParamsLGSSMInitial):
        return mask.mean[:, None]
    constant = lambda field: np.zeros_like(field.values[0]) if isinstance(field, TimeVarying) else field  # noqa: E731
    parts = [constant(mask.weights), constant(mask.input_weights), constant(mask.bias)[:, None]]
    stack = jnp if any(isinstance(part, jax.Array) for part in parts) else np
    return stack.concatenate(parts, axis=1)


def _check_l1(params: ParamsLGSSM, input_l1: Any) -> Array | None:
    if input_l1 is None:
        return None
    weight = to_device(input_l1, params.initial.mean.dtype)
    if weight.ndim or (is_concrete(weight) and not float(weight) >= 0):
        fail("priors.input_l1", got=repr(input_l1), expected="one number of at least zero", remedy="Zero is no prior.")
    if isinstance(params.dynamics.input_weights, TimeVarying):
        fail(
            "priors.input_l1",
            got="a prior on input weights that vary in time",
            expected="constant input weights",
            remedy="A `TimeVarying` field is fixed.",
        )
    return weight
