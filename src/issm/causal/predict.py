r"""What a plan will do: $p(x, y \mid do(\pi), h)$, in closed form."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax import lax
from jaxtyping import Array, Float

from issm._check import check_level
from issm._compile import jit_quickly
from issm._host import is_concrete, to_device
from issm._linalg import safe_sqrt, symmetrize
from issm.causal.history import History, Scenario, as_scenario, plan_params
from issm.causal.summaries import prediction_table
from issm.interventions import Intervention
from issm.models.fields import as_matrix, over_time
from issm.models.lgssm import ParamsLGSSM
from issm.models.sampling import emission_means
from issm.models.transitions import Transitions, lgssm_transitions


class Moments(eqx.Module):
    """Mean and covariance of a Gaussian vector at every step.

    Attributes:
        mean: `(num_timesteps, dim)`, with a leading trial axis if there are trials.
        cov: Covariance within each step, `(num_timesteps, dim, dim)`, with the same leading axis.

    References:
        Särkkä & Svensson (2023), eq. 6.18.

    Examples:
        >>> import jax.numpy as jnp, issm
        >>> lower, upper = issm.Moments(jnp.zeros((1, 1)), jnp.ones((1, 1, 1))).interval(0.95)
        >>> round(float(upper[0, 0]), 2)
        1.96
    """

    mean: Float[Array, "*trials num_timesteps dim"]
    cov: Float[Array, "*trials num_timesteps dim dim"]

    @property
    def sd(self) -> Float[Array, "*trials num_timesteps dim"]:
        """Standard deviation of every entry at every step."""
        return safe_sqrt(jnp.diagonal(self.cov, axis1=-2, axis2=-1))

    def interval(
        self, level: Any = 0.95
    ) -> tuple[Float[Array, "*trials num_timesteps dim"], Float[Array, "*trials num_timesteps dim"]]:
        r"""Central interval of every entry at every step, mean $\pm\ z$ sd.

        Args:
            level: Probability that an entry lies inside, above 0 and below 1.

        Returns:
            Lower and upper ends, each of the shape of `mean`.

        Raises:
            ValueError: If `level` is not between 0 and 1.
        """
        width = quantile_of_level(level, self.mean.dtype) * self.sd
        return self.mean - width, self.mean + width


class Prediction(eqx.Module):
    """Moments of states and emissions under a plan.

    Attributes:
        states: Moments of the states.
        emissions: Moments of the emissions, their own noise included.

    References:
        `docs/concepts.md`, "Effects".

    Examples:
        >>> import issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0], [2.0]], [0.5, 0.5])
        >>> prediction = issm.interventional_prediction(params, issm.no_intervention(5, 1))
        >>> prediction.emissions.mean.shape, prediction.emissions.cov.shape
        ((5, 2), (5, 2, 2))
    """

    states: Moments
    emissions: Moments

    def summary(self) -> str:
        """Mean and standard deviation of states and emissions at some steps, over all trials if there are several.

        Returns:
            A table.
        """
        return prediction_table({"state": self.states, "emission": self.emissions})


def interventional_prediction(
    params: ParamsLGSSM, plan: Intervention, *, history: History | None = None, inputs: Any = None
) -> Prediction:
    r"""Predict states and emissions under a plan, $p(x_{t_0+1:}, y_{t_0+1:} \mid do(\pi), h)$.

    Forward recursion under the clamps of the plan, from the initial distribution or from the state filtered at the end of the
    history: $m_t = A_t m_{t-1} + a_t$, $P_t = A_t P_{t-1} A_t^\top + Q_t$, and $C m_t + D u_t + d$, $C P_t C^\top + R$ for $y_t$.
    The parameters are taken as known.

    Args:
        params: Model parameters. A `TimeVarying` field has one entry for each step of the history and then of the plan.
        plan: Clamps over the horizon, `(num_timesteps, state_dim)` or with a leading trial axis.
        history: The past of the trials. The first step of the plan arrives from its last step through the ordinary dynamics.
            None: the plan starts from the initial distribution, which its clamps at step 0 replace.
        inputs: Soft inputs over the horizon, `(num_timesteps, input_dim)` or with a leading trial axis. Needed if the model
            has inputs.

    Returns:
        Moments of states `(num_timesteps, state_dim)` and emissions `(num_timesteps, emission_dim)` in the units of the data;
        with a leading trial axis if the plan, the history or the inputs have one.

    Raises:
        ValueError: If shapes, lengths or numbers of trials disagree; the message names the argument.

    References:
        Pearl (2009), *Causality*, sec. 3.2; Nejatbakhsh & Wang (2025), sec. 2; Särkkä & Svensson (2023), eq. 6.18.

    Examples:
        >>> import numpy as np, issm
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.5]], [0.1], [[2.0]], [0.5])
        >>> plan = issm.do({0: 4.0}, num_timesteps=3, state_dim=1, stop=1)
        >>> prediction = issm.interventional_prediction(params, plan, history=issm.History(np.zeros((10, 1))))
        >>> prediction.emissions.mean[:, 0].tolist()
        [8.0, 4.0, 2.0]
    """
    return _predict(params, as_scenario(params, plan, history=history, inputs=inputs))


@jit_quickly
def _predict(params: ParamsLGSSM, scenario: Scenario) -> Prediction:
    def one(scenario: Scenario) -> Prediction:
        return predict_sequence(plan_params(params, scenario), scenario.plan.inputs, scenario.plan.intervention)

    return scenario.map(one)


def predict_sequence(
    params: ParamsLGSSM, inputs: Float[Array, "num_timesteps input_dim"], plan: Intervention
) -> Prediction:
    """Prediction of one sequence from the initial distribution of `params`."""
    num_timesteps = inputs.shape[0]
    means, covs = forward_moments(lgssm_transitions(params, inputs, plan))
    weights = over_time(params.emissions.weights, num_timesteps)
    noise = over_time(as_matrix(params.emissions.cov), num_timesteps)
    return Prediction(
        states=Moments(means, covs),
        emissions=Moments(
            emission_means(params, means, inputs),
            symmetrize(weights @ covs @ jnp.swapaxes(weights, -1, -2)) + noise,
        ),
    )


def forward_moments(transitions: Transitions) -> tuple[Array, Array]:
    """Mean and covariance of every state of one sequence that nobody has seen."""

    def step(carry: tuple[Array, Array], at: Transitions) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        mean, cov = carry
        mean = at.weights @ mean + at.shift
        cov = symmetrize(at.weights @ cov @ at.weights.T + at.cov)
        return (mean, cov), (mean, cov)

    start = (jnp.zeros_like(transitions.shift[0]), jnp.zeros_like(transitions.cov[0]))
    return lax.scan(step, start, transitions)[1]


def quantile_of_level(level: Any, dtype: Any) -> Array:
    """The standard normal quantile z for which mean ± z sd holds `level` of the mass."""
    check_level(level)
    if is_concrete(level):
        return to_device(scipy.special.ndtri((1 + np.asarray(level)) / 2), dtype)
    return jax.scipy.special.ndtri((1 + level.astype(dtype)) / 2)
