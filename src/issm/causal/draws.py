"""Draws of states and emissions, with their moments and Monte-Carlo errors."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from issm._check import check_level, fail
from issm._linalg import psd_cholesky, safe_sqrt
from issm._types import PRNGKey
from issm.causal.summaries import prediction_table
from issm.inference.dense import run_filter, run_smoother
from issm.inference.observations import Potential
from issm.models.ssm import SSM
from issm.models.transitions import Transitions

GAUSS_NEWTON_STEPS = 100


class Draws(eqx.Module):
    """Draws of vectors at every step, and their moments.

    Attributes:
        draws: `(num_draws, num_timesteps, dim)`, with a leading trial axis if there are trials.
        num_parameters: Number of draws of the parameters that they come from, one after the other and equally many from each;
            1 where the parameters are taken as known.

    Raises:
        ValueError: If the draws cannot come from so many parameters.

    References:
        Gelman et al. (2013), *Bayesian Data Analysis*, sec. 10.5 (error of averages over draws).

    Examples:
        >>> import jax.numpy as jnp, issm
        >>> draws = issm.Draws(jnp.arange(4.0).reshape(4, 1, 1))
        >>> draws.mean.tolist(), round(float(draws.monte_carlo_error[0, 0]), 3)
        ([[1.5]], 0.645)
    """

    draws: Float[Array, "*trials num_draws num_timesteps dim"]
    num_parameters: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        if self.num_parameters < 1 or self.draws.shape[-3] % self.num_parameters:
            fail(
                "num_parameters",
                got=f"{self.num_parameters} for {self.draws.shape[-3]} draws",
                expected="a divisor of the number of draws",
                remedy="There are equally many draws for each.",
            )

    @property
    def mean(self) -> Float[Array, "*trials num_timesteps dim"]:
        """Mean over the draws."""
        return self.draws.mean(axis=-3)

    @property
    def sd(self) -> Float[Array, "*trials num_timesteps dim"]:
        """Standard deviation of the draws, all sources together."""
        return self.draws.std(axis=-3, ddof=1)

    @property
    def trial_sd(self) -> Float[Array, "*trials num_timesteps dim"]:
        """Standard deviation from draw to draw under the same parameters."""
        return jnp.sqrt(self._by_parameters().var(axis=-3, ddof=1).mean(axis=-3))

    @property
    def parameter_sd(self) -> Float[Array, "*trials num_timesteps dim"]:
        """Standard deviation of the mean for want of knowledge of the parameters, without its Monte-Carlo error."""
        if self.num_parameters == 1:
            return jnp.zeros_like(self.mean)
        grouped = self._by_parameters()
        error = self.trial_sd**2 / grouped.shape[-3]
        return safe_sqrt(jnp.maximum(grouped.mean(axis=-3).var(axis=-3, ddof=1) - error, 0.0))

    @property
    def cov(self) -> Float[Array, "*trials num_timesteps dim dim"]:
        """Covariance of the draws within each step, all sources together."""
        off = self.draws - self.draws.mean(axis=-3, keepdims=True)
        return jnp.einsum("...sti,...stj->...tij", off, off) / (self.draws.shape[-3] - 1)

    @property
    def monte_carlo_error(self) -> Float[Array, "*trials num_timesteps dim"]:
        """Standard error of `mean` for having drawn so few, given the parameters."""
        return self.trial_sd / self.draws.shape[-3] ** 0.5

    def interval(
        self, level: Any = 0.95
    ) -> tuple[Float[Array, "*trials num_timesteps dim"], Float[Array, "*trials num_timesteps dim"]]:
        """Central interval of every entry at every step, by quantiles of the draws.

        Args:
            level: Probability that an entry lies inside, above 0 and below 1.

        Returns:
            Lower and upper ends, each of the shape of `mean`.

        Raises:
            ValueError: If `level` is not between 0 and 1.
        """
        check_level(level)
        tail = (1 - jnp.asarray(level, self.draws.dtype)) / 2
        return jnp.quantile(self.draws, tail, axis=-3), jnp.quantile(self.draws, 1 - tail, axis=-3)

    def _by_parameters(self) -> Float[Array, "*trials num_parameters draws_of_each num_timesteps dim"]:
        *trials, num_draws, num_timesteps, dim = self.draws.shape
        split = (self.num_parameters, num_draws // self.num_parameters)
        return self.draws.reshape(*trials, *split, num_timesteps, dim)


class SampledPrediction(eqx.Module):
    """Draws of states and emissions under a plan.

    Attributes:
        states: Draws of the states.
        emissions: Draws of the emissions, their own noise included.

    References:
        `docs/how-to/other-emissions.md`.

    Examples:
        >>> import jax, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> model = issm.SSM(linear.initial, linear.dynamics, issm.PoissonEmission(issm.LinearMap([[1.0], [2.0]])))
        >>> result = issm.sample_prediction(jax.random.key(0), model, issm.no_intervention(5, 1), num_draws=10)
        >>> result.emissions.draws.shape, result.emissions.mean.shape
        ((10, 5, 2), (5, 2))
    """

    states: Draws
    emissions: Draws

    def summary(self) -> str:
        """Mean and standard deviation of states and emissions at some steps, over all trials if there are several.

        Returns:
            A table.
        """
        return prediction_table({"state": self.states, "emission": self.emissions})


def pool_draws(
    draws: Float[Array, "num_parameters *trials num_draws num_timesteps dim"],
) -> Draws:
    """One axis for the draws under all parameters."""
    num_parameters = draws.shape[0]
    draws = jnp.moveaxis(draws, 0, -4)
    return Draws(draws.reshape(*draws.shape[:-4], -1, *draws.shape[-2:]), num_parameters)


def check_num_draws(num_draws: Any) -> None:
    """Refuse too few draws, or what is no number of them."""
    if isinstance(num_draws, bool) or not isinstance(num_draws, (int, np.integer)) or num_draws < 2:
        fail(
            "num_draws",
            got=repr(num_draws),
            expected="an integer of at least 2",
            remedy="The error of a mean falls with the square root of the number of draws.",
        )


def simulate(key: PRNGKey, into: Transitions, num_draws: int) -> Float[Array, "num_draws num_timesteps dim"]:
    """Paths from the transitions."""
    noise = jax.random.normal(key, (*into.shift.shape, num_draws), into.shift.dtype)

    def step(states: Array, at: tuple[Transitions, Array]) -> tuple[Array, Array]:
        transition, white = at
        states = transition.weights @ states + transition.shift[:, None] + psd_cholesky(transition.cov) @ white
        return states, states

    _, paths = lax.scan(step, jnp.zeros_like(noise[0]), (into, noise))
    return jnp.transpose(paths, (2, 0, 1))


def draw_deviations(
    key: PRNGKey, into: Transitions, precision: Array, pull: Array, num_draws: int
) -> Float[Array, "num_draws num_timesteps dim"]:
    r"""Paths from the transitions given potentials J and g.

    A draw is $z^+ + E[z \mid g - (J z^+ + \epsilon)]$ for $z^+$ from the prior and $\epsilon \sim N(0, J)$.

    References:
        Durbin & Koopman (2012), sec. 4.9.
    """
    prior_key, noise_key = jax.random.split(key)
    prior = simulate(prior_key, into, num_draws)
    white = jax.random.normal(noise_key, prior.shape, prior.dtype)
    factors = jax.vmap(psd_cholesky)(precision)
    said = jnp.einsum("tij,stj->sti", precision, prior) + jnp.einsum("tij,stj->sti", factors, white)
    correction = Transitions(into.weights, jnp.zeros_like(into.shift), into.cov)

    def smooth(pull: Array) -> Array:
        return run_smoother(correction, run_filter(correction, Potential(precision, pull))).means

    return prior + jax.vmap(smooth)(pull[None] - said)


def predictors_of(model: SSM, states: Array, inputs: Array) -> Array:
    r"""$\eta_t$ along every path."""
    return jax.vmap(lambda path: model.emission.predictors(path, inputs))(states)
