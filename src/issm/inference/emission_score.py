r"""The expected score of the emissions, trial by trial, from sums over the steps.

With $v_t = [x_t; u_t; 1]$, $\Theta = [C\ D\ d]$ and a diagonal R that is the same at all steps, trial k contributes

$$\frac{\partial}{\partial \Theta} = R^{-1} \sum_t E[e_t v_t^\top], \qquad
\frac{\partial}{\partial R_{nn}} = \frac{1}{2 R_{nn}^2} \sum_t E[e_{t,n}^2] - \frac{T}{2 R_{nn}}, \qquad e_t = y_t - \Theta v_t.$$

The data are read for $\sum_t y_t v_t^\top$ and $\sum_t y_{t,n}^2$, and no residual of the size of the data is made where differences of
these sums keep their digits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from issm.inference.moments import Moments
from issm.models.emission_sums import keeps_digits
from issm.models.fields import TimeVarying, is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials


class EmissionScore(eqx.Module):
    r"""Sums over the steps of every trial.

    Attributes:
        variances: The diagonal of R.
        num_timesteps: T.
        cross: $\sum_t E[v_t e_t^\top]$; few rows by many columns, the quicker way round for a product with the data.
        second: $\sum_t E[e_{t,n}^2]$.
    """

    variances: Float[Array, " emission_dim"]
    num_timesteps: int = eqx.field(static=True)
    cross: Float[Array, "num_trials states_and_known emission_dim"]
    second: Float[Array, "num_trials emission_dim"]

    def along(self, tangent: ParamsLGSSM) -> Float[Array, " num_trials"]:
        """The derivative along a tangent of the parameters."""
        variances = self.variances[None]
        by_cov = (self.second / variances - self.num_timesteps) / (2 * variances)
        by_coefficients = jnp.einsum("kvn,nv->k", self.cross, _coefficients(tangent) / self.variances[:, None])
        return by_coefficients + by_cov @ values_of(tangent.emissions.cov)


def has_sums(params: ParamsLGSSM, trials: Trials) -> bool:
    """Whether these sums say all: complete data, a diagonal R, and nothing that varies in time."""
    varies = any(isinstance(field, TimeVarying) for field in vars(params.emissions).values())
    return not trials.may_miss and not varies and is_diagonal(params.emissions.cov)


def score_from_sums(params: ParamsLGSSM, trials: Trials, moments: Moments) -> EmissionScore:
    """The sums at the smoothed moments."""
    emissions, means = trials.emissions, moments.smoothed_means
    num_trials, num_timesteps, _ = emissions.shape
    coefficients, state_dim = _coefficients(params), params.state_dim
    inputs = jnp.broadcast_to(trials.plan.inputs, (num_trials, num_timesteps, params.input_dim))
    regressors = jnp.concatenate([means, inputs, jnp.ones_like(means[..., :1])], axis=-1)
    covs = trials.spread(moments.smoothed_covs.sum(axis=1))
    loaded = covs @ coefficients[None, :, :state_dim].mT
    spread = (loaded * coefficients[None, :, :state_dim].mT).sum(axis=1)
    unseen = jnp.pad(loaded, ((0, 0), (0, coefficients.shape[1] - state_dim), (0, 0)))

    rows = jnp.swapaxes(regressors, 1, 2)
    cross, squares = rows @ emissions, (emissions**2).sum(axis=1)
    cross_after = cross - (rows @ regressors) @ coefficients[None].mT
    second = squares - (coefficients[None].mT * (cross + cross_after)).sum(axis=1)

    def from_residuals() -> tuple[Array, Array]:
        def one(at: tuple[Array, Array]) -> tuple[Array, Array]:
            emissions, regressors = at
            left = emissions - regressors @ coefficients.T
            return regressors.T @ left, (left**2).sum(axis=0)

        return lax.map(jax.checkpoint(one), (emissions, regressors))

    cross, second = lax.cond(keeps_digits(second, squares), lambda: (cross_after, second), from_residuals)
    return EmissionScore(params.emissions.cov, num_timesteps, cross - unseen, second + spread)  # type: ignore[arg-type]


def _coefficients(params: ParamsLGSSM) -> Float[Array, "emission_dim states_and_known"]:
    block = params.emissions
    return jnp.concatenate([block.weights, block.input_weights, block.bias[:, None]], axis=1)  # type: ignore[list-item]
