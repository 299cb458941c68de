"""Posterior draws of the parameters, by several Markov chains side by side."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from issm._check import check_key, fail, is_concrete
from issm._types import PRNGKey
from issm.fitting.chains import effective_sample_size, split_r_hat
from issm.fitting.gibbs import Regression, degrees_of_freedom, regressions, sweep
from issm.fitting.intervals import check_level, means, quantiles, standard_deviations
from issm.fitting.m_step import BLOCKS, Rules, make_rules
from issm.fitting.priors import Priors
from issm.fitting.result import FIELDS
from issm.inference.methods import choose_method
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM, TimeVarying
from issm.models.trials import Trials, as_trials

LARGEST_R_HAT = 1.05


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
        num_chains: Number of chains.

    References:
        Gelman et al. (2013), *Bayesian Data Analysis*, 3rd ed., sec. 11.4 and 11.5.

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
    num_chains: int = eqx.field(static=True)

    @property
    def reason(self) -> str:
        """Whether the chains have mixed, in words."""
        r_hats, sizes = jax.tree.leaves(self.r_hat), jax.tree.leaves(self.effective_sample_size)
        if not all(is_concrete(leaf) for leaf in r_hats):
            return "not known while JAX traces"
        largest = np.array([np.max(leaf, initial=1.0) for leaf in r_hats])
        if np.isnan(largest).any():
            named = ", ".join(FIELDS[i] for i in np.flatnonzero(np.isnan(largest)))
            return f"not finite: {named}; the data and the priors leave a direction without a proper posterior"
        smallest = min(np.min(leaf, initial=np.inf) for leaf in sizes)
        worst = f"R-hat at most {largest.max():.3f}, {smallest:.0f} effective draws or more"
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
        return quantiles(self.draws, check_level(level))


def sample_parameters(
    key: PRNGKey,
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    trainable: Any = None,
    priors: Priors | None = None,
    num_samples: int = 500,
    num_warmup: int = 200,
    num_chains: int = 4,
    thin: int = 1,
) -> ParameterSamples:
    r"""Draw from $p(θ \mid y, do(\cdot), u) \propto p(y \mid do(\cdot), u, θ)\, p(θ)$.

    By Gibbs sampling: the states are drawn given the parameters, and the parameters, which are conjugate under `priors`, given
    the states. It is exact, has no step size, and rejects no draw. A row of the dynamics learns only from arrivals in which its
    state was not clamped, a row of the emissions from what was observed. What has no prior has a flat one, in the entries
    themselves.

    Args:
        key: JAX random key.
        params: Where every chain starts, a fit for instance; what is not trainable stays. No field may be `TimeVarying`.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        trainable: What is unknown, as for `fit_em`. Freeze what neither data nor priors hold: where the basis of the states is
            free, chains wander along it.
        priors: Priors, as for `fit_em`, without `input_l1`, which is not conjugate.
        num_samples: Draws kept from each chain, at least 4.
        num_warmup: Draws of each chain thrown away before.
        num_chains: Number of chains, all in one `jax.vmap`.
        thin: Keep one draw of so many.

    Returns:
        The draws, their means and standard deviations, and whether the chains have mixed.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, or if the posterior of a covariance is improper.

    References:
        Gelman et al. (2013), *Bayesian Data Analysis*, 3rd ed., sec. 11.1 and 14.2; Carter & Kohn (1994), *Biometrika* 81;
        Durbin & Koopman (2002), *Biometrika* 89, for the states.

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
    trials = as_trials(params, emissions, inputs, interventions)
    rules = make_rules(params, trainable, priors)
    method = choose_method("auto", params, trials)
    sizes = Sizes(num_samples, num_warmup, num_chains, thin)
    if rules.input_l1 is not None:
        fail(
            "priors.input_l1",
            got="a sparsity prior",
            expected="None: it is not conjugate",
            remedy="Use a `RegressionPrior` on the dynamics.",
        )
    _check_fields(params)
    if all(is_concrete(leaf) for leaf in jax.tree.leaves((params, trials, rules))):
        _check_proper(params, trials, rules)
    return _sample_gibbs(key, params, trials, rules, sizes, method)


class Sizes(NamedTuple):
    """Numbers that a compiled run depends on."""

    num_samples: int
    num_warmup: int
    num_chains: int
    thin: int


@jax.jit(static_argnames=("sizes", "method"))
def _sample_gibbs(
    key: PRNGKey, params: ParamsLGSSM, trials: Trials, rules: Rules, sizes: Sizes, method: str
) -> ParameterSamples:
    def sweeps(params: ParamsLGSSM, key: PRNGKey, count: int) -> ParamsLGSSM:
        one = lambda params, key: (sweep(key, params, trials, rules, method), None)  # noqa: E731
        return lax.scan(one, params, jax.random.split(key, count))[0]

    def chain(key: PRNGKey) -> ParamsLGSSM:
        def keep(params: ParamsLGSSM, key: PRNGKey) -> tuple[ParamsLGSSM, ParamsLGSSM]:
            params = sweeps(params, key, sizes.thin)
            return params, params

        warmup_key, sample_key = jax.random.split(key)
        start = sweeps(params, warmup_key, sizes.num_warmup)
        return lax.scan(keep, start, jax.random.split(sample_key, sizes.num_samples))[1]

    return _summarise(jax.vmap(chain)(jax.random.split(key, sizes.num_chains)))


def _summarise(chains: ParamsLGSSM) -> ParameterSamples:
    draws = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), chains)
    return ParameterSamples(
        draws=draws,
        mean=means(draws),
        sd=standard_deviations(draws),
        r_hat=jax.tree.map(split_r_hat, chains),
        effective_sample_size=jax.tree.map(effective_sample_size, chains),
        num_chains=jax.tree.leaves(chains)[0].shape[0],
    )


def _check_fields(params: ParamsLGSSM) -> None:
    for block in BLOCKS:
        for name, field in vars(getattr(params, block)).items():
            if isinstance(field, TimeVarying):
                fail(
                    f"params.{block}.{name}",
                    got="a TimeVarying",
                    expected="a constant field",
                    remedy="Use `parameter_covariance` or `bootstrap`, which keep such fields as they are.",
                )


def _check_proper(params: ParamsLGSSM, trials: Trials, rules: Rules) -> None:
    """Refuse a covariance that is seen too rarely for its posterior to be one."""
    zeros = jnp.zeros((trials.num_trials, trials.emissions.shape[1], params.state_dim), params.initial.mean.dtype)
    for name, regression in zip(BLOCKS, regressions(zeros, trials), strict=True):
        cov, rule = getattr(params, name).cov, getattr(rules, name)
        if not np.asarray(rule.cov).any():
            continue
        least = _spare_degrees(cov, regression, rule)
        if not least > 0:
            fail(
                f"trainable.{name}.cov",
                got="True, but too few steps tell about it",
                expected="a posterior that is proper",
                remedy=f"Give it a prior, `Priors({name}=RegressionPrior(degrees=..., scale=...))`, or freeze it.",
            )


def _spare_degrees(cov: Float[Array, "..."], regression: Regression, rule: Any) -> float:
    """How far the least-seen variance is above the degrees of freedom below which it has no posterior."""
    seen, dim = np.asarray(regression.seen), cov.shape[0]
    count = lambda flags: jnp.asarray(flags.sum(axis=0), cov.dtype)  # noqa: E731
    if cov.ndim == 1:
        degrees = np.asarray(degrees_of_freedom(rule.prior, count(seen), dim, diagonal=True))
        return float(np.min(degrees[np.asarray(rule.cov)]))
    return float(degrees_of_freedom(rule.prior, count(seen.any(axis=1)), dim, diagonal=False)) - (dim - 1)
