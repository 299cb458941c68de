"""A question asked of several general models: draws of the parameters, each with draws of trials of its own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from issm._check import fail
from issm._types import PRNGKey
from issm.causal.estimates import Effect
from issm.causal.uncertainty import as_draws_of, check_covs_of_draws, empirical_spread, spreads_of_draws
from issm.models.emissions import GaussianEmission
from issm.models.fields import is_diagonal
from issm.models.ssm import SSM


def as_model_draws(model: SSM, parameters: Any) -> SSM | None:
    """Check draws of a general model: an `SSM` whose arrays have one leading axis.

    Raises:
        ValueError: If they are not those of a model like `model`.
    """
    if parameters is None:
        return None
    if not isinstance(parameters, SSM):
        fail(
            "parameters",
            got=f"a {type(parameters).__name__}",
            expected="an SSM of draws, every array with one leading axis",
            remedy="Stack fits with `jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)`; linear draws become an SSM by"
            " `jax.vmap(ssm_from_lgssm)(draws)`.",
        )
    like, fixed = eqx.partition(model, eqx.is_array)
    draws = as_draws_of(like, eqx.filter(parameters, eqx.is_array), "model")
    for block in ("initial", "dynamics"):
        cov = getattr(draws, block).cov
        check_covs_of_draws(f"parameters.{block}.cov", cov, is_diagonal(getattr(model, block).cov), positive=False)
    if isinstance(model.emission, GaussianEmission):
        cov = draws.emission.cov
        check_covs_of_draws("parameters.emission.cov", cov, is_diagonal(model.emission.cov), positive=True)
    return eqx.combine(draws, fixed)


def over_models(key: PRNGKey, model: SSM, draws: SSM | None, kernel: Callable[[PRNGKey, SSM], Any]) -> Any:
    """`kernel(key, model)` for every draw of the parameters, with a leading axis for them; of one where they are known."""
    if draws is None:
        return jax.tree.map(lambda leaf: leaf[None], kernel(key, model))
    varied, fixed = eqx.partition(draws, eqx.is_array)
    keys = jax.random.split(key, jax.tree.leaves(varied)[0].shape[0])
    return lax.map(lambda at: kernel(at[0], eqx.combine(at[1], fixed)), (keys, varied))


class SampledSummaries(eqx.Module):
    """The quantities of an effect from draws of two worlds."""

    per_step: Effect
    cumulative: Effect
    average: Effect
    relative: Effect
    outcome: Effect
    average_outcome: Effect


def summarise_worlds(
    without: Float[Array, "num_parameters *trials num_draws num_timesteps num_outputs"],
    under: Float[Array, "num_parameters *trials num_draws num_timesteps num_outputs"],
    window: Bool[Array, "*windows num_timesteps 1"],
    z: Float[Array, ""],
    *,
    known: bool,
    average_trials: bool,
) -> SampledSummaries:
    """Difference between two worlds, and the second itself; `known` where there is one model and no doubt about it.

    The draws of different trials are independent under one draw of the parameters, which is common to all.
    """
    without, under = (jnp.moveaxis(world, -3, 1) for world in (without, under))
    window = window[(None,) * (under.ndim - window.ndim)]
    counted = window.astype(under.dtype)
    length = counted.sum(axis=-2)
    averaged = lambda world: (world * counted).sum(axis=-2) / length  # noqa: E731
    effects = under - without
    totals = jnp.cumsum(effects * counted, axis=-2)
    parts = [effects, totals, averaged(effects), under, averaged(under), averaged(without)]
    if average_trials:
        parts = [part.mean(axis=2) for part in parts]
    per_step, cumulative, average, outcome, average_outcome, base = parts
    base = base.mean(axis=1, keepdims=True)
    relative = average / jnp.where(base == 0, jnp.nan, base)
    made = [_as_effect(part, z, known) for part in (per_step, cumulative, average, relative, outcome, average_outcome)]
    return SampledSummaries(*made)


def _as_effect(draws: Float[Array, "num_parameters num_draws *shape"], z: Array, known: bool) -> Effect:
    if known:
        spread = empirical_spread(draws[0], z)
        return Effect(draws[0].mean(axis=0), spread, None, spread)
    trial, parameter, total = spreads_of_draws(draws, z)
    return Effect(draws.mean(axis=(0, 1)), trial, parameter, total)
