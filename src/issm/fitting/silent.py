"""What the data say nothing about: EM leaves it as it was, and a step that changes coordinates has to be told."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from issm._linalg import symmetrize
from issm.fitting.m_step import BLOCKS, Rules, coefficients_of, with_coefficients
from issm.fitting.regression import PatternStatistics, RowStatistics, never_free
from issm.fitting.score import with_prior
from issm.fitting.statistics import SufficientStatistics
from issm.models.lgssm import ParamsLGSSM, ParamsLGSSMInitial


class SilentBlock(eqx.Module):
    """Of one block.

    Attributes:
        rows: Rows that were never free, or never observed.
        known: Projection of the coefficients `[input_weights, bias]` of each row on what their regressors never span; None
            where there are no inputs.
    """

    rows: Bool[Array, " rows"]
    known: Float[Array, "rows_or_1 known known"] | None


class Silent(eqx.Module):
    """Of all blocks."""

    initial: SilentBlock
    dynamics: SilentBlock
    emissions: SilentBlock


def find_silent(params: ParamsLGSSM, stats: SufficientStatistics, rules: Rules) -> Silent:
    """Rows and directions that neither data nor priors speak about; only counts and regressors that are known matter."""
    blocks = {}
    for name in BLOCKS:
        block = getattr(params, name)
        blocks[name] = _silent_block(block, with_prior(block, getattr(stats, name), getattr(rules, name)))
    return Silent(**blocks)


def keep_silent(trial: ParamsLGSSM, current: ParamsLGSSM, silent: Silent) -> ParamsLGSSM:
    """The parameters on trial with everything silent as it is in `current`; the likelihood is the same."""
    blocks = []
    for name in BLOCKS:
        new, old, quiet = (getattr(tree, name) for tree in (trial, current, silent))
        coefficients, before = coefficients_of(new), coefficients_of(old)
        if quiet.known is not None:
            first = coefficients.shape[1] - quiet.known.shape[-1]
            moved = (coefficients - before)[:, first:]
            coefficients = coefficients.at[:, first:].add(-(quiet.known @ moved[:, :, None])[:, :, 0])
        coefficients = jnp.where(quiet.rows[:, None], before, coefficients)
        cov = new.cov
        if isinstance(cov, jax.Array):
            keep = _keep_conditional if cov.ndim == 2 else lambda new, old, rows: jnp.where(rows, old, new)
            cov = keep(cov, old.cov, quiet.rows)
        blocks.append(with_coefficients(new, coefficients, cov))
    return ParamsLGSSM(*blocks)


def _keep_conditional(new: Array, old: Array, silent: Bool[Array, " rows"]) -> Array:
    r"""A covariance with the old regression of the silent rows s on the others o.

    $Q_{so} Q_{oo}^{-1}$ and $Q_{ss} - Q_{so} Q_{oo}^{-1} Q_{os}$ stay as they were, which is what EM makes of it.
    """
    other = ~silent
    eye = jnp.eye(len(silent), dtype=old.dtype)
    both = lambda cov, rows, columns: jnp.where(rows[:, None] & columns[None], cov, 0.0)  # noqa: E731
    across, among = both(old, silent, other), both(old, other, other) + jnp.where(silent[:, None], eye, 0.0)
    slopes = jnp.linalg.solve(among, across.T).T
    left = both(old, silent, silent) - slopes @ across.T
    follows = jnp.where(other[:, None], eye, slopes)
    kept = symmetrize(follows @ both(new, other, other) @ follows.T + left)
    return jnp.where(silent.any(), kept, new)


def _silent_block(block: Any, stats: RowStatistics | PatternStatistics) -> SilentBlock:
    rows = never_free(stats)
    if isinstance(block, ParamsLGSSMInitial) or block.input_weights.shape[-1] == 0:
        return SilentBlock(rows, None)
    gram = stats.gram if isinstance(stats, RowStatistics) else stats.gram.sum(axis=0)[None]
    known = block.input_weights.shape[-1] + 1
    return SilentBlock(rows, jax.vmap(_null_projection)(gram[:, -known:, -known:]))


def _null_projection(gram: Array) -> Array:
    """On the directions without information, as `solve_semidefinite` judges them."""
    scale = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(scale > 0, scale, 1.0)
    values, vectors = jnp.linalg.eigh(symmetrize(gram / scale[:, None] / scale[None]))
    null = values <= 10 * gram.shape[0] * jnp.finfo(gram.dtype).eps * jnp.abs(values).max()
    return jnp.where(null[None], vectors, 0.0) @ vectors.T * scale[None] / scale[:, None]
