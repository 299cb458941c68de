"""Posterior draws of the parameters, by several Markov chains side by side."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from issm._check import check_key, fail
from issm._compile import jit_quickly
from issm._constraints import check_interior, log_volume, whole_matrices
from issm._host import is_concrete
from issm._trees import trainable_masks
from issm._types import PRNGKey
from issm.fitting.chains import effective_sample_size, split_r_hat
from issm.fitting.gibbs import check_proper, sweep
from issm.fitting.intervals import means, quantiles, standard_deviations
from issm.fitting.m_step import BLOCKS, Rules, log_prior, make_rules
from issm.fitting.nuts import LEAST_WARMUP, Sizes, sample_nuts
from issm.fitting.priors import Priors
from issm.fitting.result import FIELDS
from issm.inference.information import along_coordinates, free_directions
from issm.inference.likelihood import log_likelihoods
from issm.inference.methods import choose_method
from issm.interventions import Intervention
from issm.models.fields import TimeVarying
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials, as_trials

LARGEST_R_HAT = 1.05
METHODS = ("auto", "gibbs", "nuts")

LogPrior = Callable[[ParamsLGSSM], Any]


class ParameterSamples(eqx.Module):
    r"""Draws from the posterior of the parameters.

    Attributes:
        draws: All chains one after the other, one leading axis `num_chains * num_samples`: what `causal_effect` takes in
            `parameters`.
        mean: Posterior mean of every entry.
        sd: Posterior standard deviation; zero for what is fixed.
        r_hat: Split $\hat R$ of every entry: how much wider the draws of all chains are than those of one. Near one if the
            chains have mixed; one for what is fixed.
        effective_sample_size: Number of independent draws that would tell as much about the mean of an entry.
        num_divergent: Number of draws at the end of a path along which NUTS lost the energy; zero for Gibbs sampling.
        num_chains: Number of chains.
        method: "gibbs" or "nuts".

    References:
        Gelman et al. (2013), *Bayesian Data Analysis*, 3rd ed., sec. 11.4 and 11.5; Betancourt (2017), on divergences.

    Examples:
        >>> import equinox as eqx, jax, numpy as np, issm
        >>> params = issm.make_lgssm_params(0.0, 1.0, 0.5, 1.0, 1.0, 1.0)
        >>> only_weights = eqx.tree_at(lambda p: p.dynamics.weights, jax.tree.map(lambda _: False, params), True)
        >>> samples = issm.sample_parameters(
        ...     jax.random.key(0), params, np.sin(np.arange(30.0))[:, None], trainable=only_weights,
        ...     num_samples=20, num_warmup=5, num_chains=2)
        >>> samples.draws.dynamics.weights.shape, samples.r_hat.dynamics.weights.shape
        ((40, 1, 1), (1, 1))
    """

    draws: ParamsLGSSM
    mean: ParamsLGSSM
    sd: ParamsLGSSM
    r_hat: ParamsLGSSM
    effective_sample_size: ParamsLGSSM
    num_divergent: Int[Array, ""]
    num_chains: int = eqx.field(static=True)
    method: str = eqx.field(static=True)

    @property
    def reason(self) -> str:
        """Whether the chains have mixed, and whether NUTS diverged, in words."""
        r_hats, sizes = jax.tree.leaves(self.r_hat), jax.tree.leaves(self.effective_sample_size)
        if not all(is_concrete(leaf) for leaf in r_hats):
            return "not known while JAX traces"
        largest = np.array([np.max(leaf, initial=1.0) for leaf in r_hats])
        if np.isnan(largest).any():
            named = ", ".join(FIELDS[i] for i in np.flatnonzero(np.isnan(largest)))
            return f"not finite: {named}; the data and the priors leave a direction without a proper posterior"
        smallest = min(np.min(leaf, initial=np.inf) for leaf in sizes)
        worst = f"R-hat at most {largest.max():.3f}, {smallest:.0f} effective draws or more"
        if self.num_divergent:
            worst += (
                f"; {int(self.num_divergent)} draws after a divergence: where the posterior narrows, too few may lie"
            )
        if largest.max() < LARGEST_R_HAT:
            return f"the chains agree: {worst}"
        named = ", ".join(FIELDS[i] for i in np.flatnonzero(largest >= LARGEST_R_HAT))
        return f"the chains do not agree yet in {named} ({worst}); draw more"

    def intervals(self, level: float = 0.95) -> tuple[ParamsLGSSM, ParamsLGSSM]:
        """Central posterior intervals of every entry.

        Args:
            level: Probability inside, between 0 and 1.

        Returns:
            Lower and upper ends in the structure of the parameters.

        Raises:
            ValueError: If `level` is not between 0 and 1.
        """
        return quantiles(self.draws, level)


def sample_parameters(
    key: PRNGKey,
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    trainable: Any = None,
    priors: Priors | LogPrior | None = None,
    method: str = "auto",
    num_samples: int = 500,
    num_warmup: int = 200,
    num_chains: int = 4,
    thin: int = 1,
) -> ParameterSamples:
    r"""Draw from $p(θ \mid y, do(\cdot), u) \propto p(y \mid do(\cdot), u, θ)\, p(θ)$.

    Gibbs sampling draws the states given the parameters, and the parameters, which are conjugate under `Priors`, given
    the states. It is exact, has no step size, and rejects no draw. A row of the dynamics learns only from arrivals in which its
    state was not clamped, a row of the emissions from what was observed.

    NUTS needs no conjugacy: it follows the gradient of the marginal likelihood, which is one smoother, in coordinates z without
    constraints (variances by their logarithm, full covariances by their Cholesky factor), with $\log |\partial θ / \partial z|$ added.
    Its draws have no derivative.

    Both draw from the same posterior. What has no prior has a flat one, in the entries themselves.

    Args:
        key: JAX random key.
        params: Where every chain starts, a fit for instance; what is not trainable stays. `TimeVarying` fields are for NUTS,
            which keeps them.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        trainable: What is unknown, as for `fit_em`. Freeze what neither data nor priors hold: where the basis of the states is
            free, chains wander along it.
        priors: Priors, as for `fit_em`; or a function of the parameters that gives the log density of a prior of your own, up to
            a constant, defined once or a pytree with a `__call__`. Such a function and `input_l1` are not conjugate.
        method: "gibbs", "nuts", or "auto": Gibbs sampling where it is exact, else NUTS.
        num_samples: Draws kept from each chain, at least 4.
        num_warmup: Draws of each chain thrown away before, at least 20 for NUTS, which adapts its step size and scales in them.
            Gibbs sampling rounds it up to a multiple of `thin`.
        num_chains: Number of chains, all side by side.
        thin: Keep one draw of so many.

    Returns:
        The draws, their means and standard deviations, and whether the chains have mixed.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, or if the posterior of a covariance is improper.

    References:
        Gelman et al. (2013), *Bayesian Data Analysis*, 3rd ed., sec. 11.1 and 14.2; Carter & Kohn (1994), *Biometrika* 81;
        Durbin & Koopman (2002), *Biometrika* 89, for the states; Hoffman & Gelman (2014), for NUTS.

    Examples:
        >>> import equinox as eqx, jax, issm
        >>> truth = issm.make_lgssm_params(0.0, 1.0, 0.9, 0.1, 1.0, 0.5)
        >>> plan = issm.do({0: 2.0}, num_timesteps=30, state_dim=1, start=10, stop=20)
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 30, interventions=plan)
        >>> only_weights = eqx.tree_at(lambda p: p.dynamics.weights, jax.tree.map(lambda _: False, truth), True)
        >>> samples = issm.sample_parameters(
        ...     jax.random.key(1), truth, emissions, interventions=plan, trainable=only_weights,
        ...     num_samples=20, num_warmup=5, num_chains=2)
        >>> 0 < float(samples.sd.dynamics.weights[0, 0]) < 0.5
        True
    """
    check_key(key)
    for name, value, least in (
        ("num_samples", num_samples, 4),
        ("num_warmup", num_warmup, 0),
        ("num_chains", num_chains, 1),
        ("thin", thin, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            fail(name, got=repr(value), expected=f"an integer of at least {least}", remedy="Give a count.")
    if method not in METHODS:
        fail(
            "method",
            got=repr(method),
            expected=f"one of {METHODS}",
            remedy='"auto" is Gibbs sampling where it is exact.',
        )
    trials = as_trials(params, emissions, inputs, interventions)
    own = callable(priors) and not isinstance(priors, Priors)
    rules = make_rules(params, trainable, None if own else priors)
    obstacle = _obstacle(params, rules, own)
    if method == "gibbs" and obstacle is not None:
        name, got, expected = obstacle
        fail(name, got=got, expected=expected, remedy='Use `method="nuts"`.')
    if not own and all(is_concrete(leaf) for leaf in jax.tree.leaves((params, trials, rules))):
        check_proper(params, trials, rules)
    sizes, smoother = Sizes(num_samples, num_warmup, num_chains, thin), choose_method("auto", params, trials)
    if method == "gibbs" or (method == "auto" and obstacle is None):
        return _sample_gibbs(key, params, trials, rules, sizes, smoother)
    if num_warmup < LEAST_WARMUP:
        fail(
            "num_warmup",
            got=repr(num_warmup),
            expected=f"at least {LEAST_WARMUP} for NUTS",
            remedy="It adapts its step size in them: give some hundred.",
        )
    masks = whole_matrices(trainable_masks(params, trainable, fixed=TimeVarying), "trainable")
    check_interior(params, masks, "params")
    directions = free_directions(params, trainable)
    prior = rules if priors is None or isinstance(priors, Priors) else priors
    return _sample_nuts(key, params, trials, prior, directions, masks, sizes, smoother)


def _obstacle(params: ParamsLGSSM, rules: Rules, own: bool) -> tuple[str, str, str] | None:
    """The first argument that Gibbs sampling has no conditional distribution for: its name, what came, what was expected."""
    if own:
        return "priors", "a function", "a Priors or None: no other is conjugate"
    if rules.input_l1 is not None:
        return "priors.input_l1", "a sparsity prior", "None: it is not conjugate"
    for block in BLOCKS:
        for name, field in vars(getattr(params, block)).items():
            if isinstance(field, TimeVarying):
                return f"params.{block}.{name}", "a TimeVarying", "a constant field"
    return None


@partial(jit_quickly, static_argnames=("sizes", "smoother"))
def _sample_gibbs(
    key: PRNGKey, params: ParamsLGSSM, trials: Trials, rules: Rules, sizes: Sizes, smoother: str
) -> ParameterSamples:
    def draw(params: ParamsLGSSM, key: PRNGKey) -> tuple[ParamsLGSSM, ParamsLGSSM]:
        one = lambda params, key: (sweep(key, params, trials, rules, smoother), None)  # noqa: E731
        params, _ = lax.scan(one, params, jax.random.split(key, sizes.thin))
        return params, params

    # The warm-up is made of draws, too: a sweep stands, and is compiled, in one place.
    num_before = -(-sizes.num_warmup // sizes.thin)

    def chain(key: PRNGKey) -> ParamsLGSSM:
        draws = lax.scan(draw, params, jax.random.split(key, num_before + sizes.num_samples))[1]
        return jax.tree.map(lambda leaf: leaf[num_before:], draws)

    chains = jax.vmap(chain)(jax.random.split(key, sizes.num_chains))
    return _summarise(chains, jnp.zeros((), jnp.int32), "gibbs")


@partial(jit_quickly, jit=eqx.filter_jit)
def _sample_nuts(
    key: PRNGKey, params: ParamsLGSSM, trials: Trials, prior: Rules | LogPrior, directions: Array, masks: Any,
    sizes: Sizes, smoother: str,
) -> ParameterSamples:  # fmt: skip
    at = along_coordinates(params, directions)

    def log_density(step: Float[Array, " num_free"]) -> Float[Array, ""]:
        moved = at(step)
        known = log_prior(moved, prior) if isinstance(prior, Rules) else prior(moved)
        return log_likelihoods(moved, trials, smoother).sum() + known + log_volume(moved, masks)

    steps, num_divergent = sample_nuts(key, log_density, jnp.zeros(directions.shape[1], directions.dtype), sizes)
    return _summarise(jax.vmap(jax.vmap(at))(steps), num_divergent, "nuts")


def _summarise(chains: ParamsLGSSM, num_divergent: Int[Array, ""], method: str) -> ParameterSamples:
    draws = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), chains)
    entries = jax.vmap(jax.vmap(lambda draw: ravel_pytree(draw)[0]))(chains)
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], draws))[1]
    return ParameterSamples(
        draws=draws,
        mean=means(draws),
        sd=standard_deviations(draws),
        r_hat=unravel(split_r_hat(entries)),
        effective_sample_size=unravel(effective_sample_size(entries)),
        num_divergent=num_divergent,
        num_chains=jax.tree.leaves(chains)[0].shape[0],
        method=method,
    )
