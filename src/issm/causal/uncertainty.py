"""Trial noise and parameter uncertainty of an effect, apart and together."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from issm._check import as_array, as_float_array, check_covariance, check_finite, check_variances, fail
from issm._linalg import psd_cholesky, safe_sqrt
from issm.models.fields import is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM

BISECTIONS = 24


class Spread(eqx.Module):
    """How far an effect may lie from zero and from its mean, by one source of uncertainty or by several.

    Attributes:
        sd: Standard deviation.
        lower: Lower end of the central interval at the level asked for.
        upper: Upper end.
        prob_positive: Probability that the effect is above zero (one-sided).
        prob_negative: Probability that it is below zero (one-sided).
        p_value: Two-sided tail probability: twice the smaller of the probabilities of an effect of at most, and of at least,
            zero. Below 0.05 exactly if the central 95 % interval leaves out zero.

    References:
        Gelman et al. (2013), *Bayesian Data Analysis*, sec. 2.3 (central intervals).

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> effect = issm.causal_effect(params, issm.do({0: 5.0}, num_timesteps=3, state_dim=1))
        >>> bool((effect.per_step.trial.p_value < 0.05).all())
        True
    """

    sd: Float[Array, "*shape"]
    lower: Float[Array, "*shape"]
    upper: Float[Array, "*shape"]
    prob_positive: Float[Array, "*shape"]
    prob_negative: Float[Array, "*shape"]
    p_value: Float[Array, "*shape"]


class Directions(eqx.Module):
    """Columns of a factor of the parameter covariance, each as a change of the parameters; leading axis num_columns."""

    columns: ParamsLGSSM


def as_uncertain_parameters(params: ParamsLGSSM, parameters: Any) -> ParamsLGSSM | Directions | None:
    """Check draws of the parameters, or turn their covariance into directions.

    Raises:
        ValueError: If draws are not those of a model like `params`, or the covariance has another size or is none.
    """
    if parameters is None:
        return None
    if isinstance(parameters, ParamsLGSSM):
        return _checked_draws(params, parameters)
    flat, unravel = ravel_pytree(params)
    if as_array("parameters", parameters).dtype == object:
        fail(
            "parameters",
            got=f"a {type(parameters).__name__}",
            expected="a covariance, a ParamsLGSSM of draws, or None",
            remedy="Pass `.covariance` of a parameter covariance, `.draws` of samples or a bootstrap; stack single parameter sets with"
            " `jax.tree.map(lambda *leaves: jnp.stack(leaves), *sets)`.",
        )
    cov = as_float_array("parameters", parameters, flat.dtype)
    if cov.shape != (flat.size, flat.size):
        fail(
            "parameters",
            got=f"shape {tuple(cov.shape)}",
            expected=f"a covariance (num_parameters, num_parameters) = {(flat.size, flat.size)}, or a ParamsLGSSM of draws",
            remedy="Its rows follow `jax.flatten_util.ravel_pytree(params)`; fixed parameters have zero rows.",
        )
    check_covariance("parameters", cov)
    return Directions(jax.vmap(unravel)(_psd_cholesky(cov).T))


def _checked_draws(params: ParamsLGSSM, draws: ParamsLGSSM) -> ParamsLGSSM:
    draws = as_draws_of(params, draws, "params")
    for block in ("initial", "dynamics", "emissions"):
        cov, positive = getattr(draws, block).cov, block == "emissions"
        check_covs_of_draws(f"parameters.{block}.cov", cov, is_diagonal(getattr(params, block).cov), positive=positive)
    return draws


def as_draws_of(params: Any, draws: Any, name: str) -> Any:
    """Draws with one leading axis, at least two and finite, in the form and dtype of `params`, the argument `name`."""
    same_form = jax.tree.structure(params) == jax.tree.structure(draws)
    leaves = jax.tree.leaves(draws)
    num_draws = jnp.shape(leaves[0])[:1]
    pairs = zip(leaves, jax.tree.leaves(params), strict=False)
    if not same_form or not num_draws or any(jnp.shape(a) != (*num_draws, *jnp.shape(b)) for a, b in pairs):
        fail(
            "parameters",
            got=f"draws with shapes {[tuple(jnp.shape(leaf)) for leaf in leaves]}",
            expected=f"one leading axis of draws before those of `{name}`,"
            f" {[tuple(jnp.shape(leaf)) for leaf in jax.tree.leaves(params)]}",
            remedy=f"Draws must be of the model in `{name}`: the same dimensions, and diagonal covariances where it has them.",
        )
    if num_draws[0] < 2:
        fail(
            "parameters",
            got=f"{num_draws[0]} draws",
            expected="at least 2 draws",
            remedy="Leave `parameters` out where the parameters are known.",
        )
    draws = jax.tree.map(lambda leaf, like: as_float_array("parameters", leaf, like.dtype), draws, params)
    for leaf in jax.tree.leaves(draws):
        check_finite("parameters", leaf)
    return draws


def check_covs_of_draws(argument: str, cov: Any, diagonal: bool, *, positive: bool) -> None:
    """Refuse draws of a covariance of which one is none."""
    (check_variances if diagonal else check_covariance)(argument, values_of(cov), positive=positive)


_psd_cholesky = jax.jit(psd_cholesky)


def normal_spread(mean: Float[Array, "*shape"], sd: Float[Array, "*shape"], z: Float[Array, ""]) -> Spread:
    """Spread of N(mean, sd²), sd zero included; all of it is NaN where the mean is."""
    at_most_zero, at_least_zero = _normal_tails(mean, sd)
    known = Spread(
        sd=sd,
        lower=mean - z * sd,
        upper=mean + z * sd,
        prob_positive=1 - at_most_zero,
        prob_negative=1 - at_least_zero,
        p_value=_two_sided(at_most_zero, at_least_zero),
    )
    return jax.tree.map(lambda leaf: jnp.where(jnp.isnan(mean), jnp.nan, leaf), known)


def empirical_spread(draws: Float[Array, "num_draws *shape"], z: Float[Array, ""]) -> Spread:
    """Spread of draws, all equally probable."""
    tail = jax.scipy.special.ndtr(-z)
    dtype = draws.dtype
    at_most_zero, at_least_zero = (draws <= 0).astype(dtype).mean(axis=0), (draws >= 0).astype(dtype).mean(axis=0)
    return Spread(
        sd=draws.std(axis=0, ddof=1),
        lower=jnp.quantile(draws, tail, axis=0),
        upper=jnp.quantile(draws, 1 - tail, axis=0),
        prob_positive=1 - at_most_zero,
        prob_negative=1 - at_least_zero,
        p_value=_two_sided(at_most_zero, at_least_zero),
    )


def mixture_spread(means: Float[Array, "num_draws *shape"], sds: Float[Array, "num_draws *shape"], z: Array) -> Spread:
    """Spread of a mixture of normals with equal weights, one for each draw of the parameters."""
    at_most_zero, at_least_zero = (tails.mean(axis=0) for tails in _normal_tails(means, sds))
    return Spread(
        sd=jnp.sqrt(means.var(axis=0, ddof=1) + (sds**2).mean(axis=0)),
        lower=_mixture_quantile(means, sds, -z),
        upper=_mixture_quantile(means, sds, z),
        prob_positive=1 - at_most_zero,
        prob_negative=1 - at_least_zero,
        p_value=_two_sided(at_most_zero, at_least_zero),
    )


def spreads_of_draws(
    draws: Float[Array, "num_parameters num_draws *shape"], z: Float[Array, ""]
) -> tuple[Spread, Spread, Spread]:
    """Spread from draw to draw, of the means between parameters, and of all, for several draws under each of some parameters.

    Draws of trials add their Monte-Carlo error to the means; that share of the variance between the means is taken out, by
    drawing them together around their own mean.

    References:
        Gelman et al. (2013), *Bayesian Data Analysis*, sec. 5.4 (variance within and between groups).
    """
    num_draws, means = draws.shape[1], draws.mean(axis=1)
    mean, within = means.mean(axis=0), draws.var(axis=1, ddof=1).mean(axis=0)
    trial = _with_sd(empirical_spread(_pooled(draws - means[:, None] + mean[None, None]), z), safe_sqrt(within))
    between = means.var(axis=0, ddof=1)
    share = jnp.where(between > 0, jnp.maximum(1 - within / num_draws / jnp.where(between > 0, between, 1.0), 0.0), 1.0)
    parameter = empirical_spread(mean[None] + safe_sqrt(share)[None] * (means - mean[None]), z)
    total = _with_sd(empirical_spread(_pooled(draws), z), jnp.hypot(trial.sd, parameter.sd))
    return trial, parameter, total


def _with_sd(spread: Spread, sd: Array) -> Spread:
    return eqx.tree_at(lambda s: s.sd, spread, sd)


def _pooled(draws: Float[Array, "num_parameters num_draws *shape"]) -> Float[Array, "all_draws *shape"]:
    return draws.reshape(-1, *draws.shape[2:])


def _normal_tails(mean: Array, sd: Array) -> tuple[Array, Array]:
    """Probabilities of at most and of at least zero under N(mean, sd²); both are one for a sure zero."""
    random = sd > 0
    score = jnp.where(random, mean, 0.0) / jnp.where(random, sd, 1.0)
    at_most = jnp.where(random, jax.scipy.special.ndtr(-score), (mean <= 0).astype(mean.dtype))
    at_least = jnp.where(random, jax.scipy.special.ndtr(score), (mean >= 0).astype(mean.dtype))
    return at_most, at_least


def _two_sided(at_most_zero: Array, at_least_zero: Array) -> Array:
    return jnp.minimum(2 * jnp.minimum(at_most_zero, at_least_zero), 1.0)


def _mixture_quantile(means: Array, sds: Array, z: Array) -> Array:
    """Bisection between the smallest and the largest of the components' own quantiles, which enclose it."""
    target, ends = jax.scipy.special.ndtr(z), means + z * sds

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        lower, upper = bracket
        middle = (lower + upper) / 2
        below = _normal_tails(means - middle[None], sds)[0].mean(axis=0) < target
        return jnp.where(below, middle, lower), jnp.where(below, upper, middle)

    lower, upper = lax.fori_loop(0, BISECTIONS, halve, (ends.min(axis=0), ends.max(axis=0)))
    return (lower + upper) / 2
