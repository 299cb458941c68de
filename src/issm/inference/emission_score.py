r"""The expected score of the emissions, trial by trial, as a linear map of the data.

With $v_t = [x_t; w_t]$, $w_t = [u_t; 1]$, $\Theta = [C\ D\ d]$ and a diagonal R that is the same at all steps, what is expected of a trial
given its data is

$$-\tfrac12 \sum_n \Big( \frac{s_n}{R_n} + T \log 2 \pi R_n \Big), \qquad s_n = \sum_t E[(y_{tn} - \Theta_n v_t)^2].$$

Means and covariances of the states enter apart. With $\bar v_t = [\bar x_t; w_t]$ the part of the means changes along $\dot\Theta$ and
$\dot R$, with $G = R^{-1} \dot\Theta$, $g_n = \dot R_n / 2 R_n^2$ and $q_n = \sum_t (y_{tn} - D_n u_t - d_n)^2$, by

$$\sum_t \bar v_t^\top W^\top y_t + g^\top q - \langle {\textstyle\sum} \bar v \bar v^\top, \Theta^\top G \rangle
+ \langle {\textstyle\sum} \bar x \bar x^\top, C^\top \mathrm{diag}(g)\, C \rangle
+ 2 \langle {\textstyle\sum} \bar x w^\top, C^\top \mathrm{diag}(g) [D\ d] \rangle,$$

$W = G - 2\, [\mathrm{diag}(g)\, C\ \ 0]$. Transposed, the first term is one product of few rows with the data of all trials. Where
differences of such sums would lose digits, sums of residuals take their place.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from issm.inference.compression import squares_by_emission
from issm.inference.moments import Moments
from issm.models.emission_sums import keeps_digits
from issm.models.fields import TimeVarying, is_diagonal, values_of
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Trials


class EmissionScore(eqx.Module):
    r"""What the score of every trial is made of.

    Attributes:
        params: The parameters.
        emissions: The data.
        regressors: $\bar v_t$.
        gram: $\sum_t \bar v_t \bar v_t^\top$.
        covs: $\sum_t Cov[x_t]$.
        squares: $q_n$.
        enough: Whether sums over the data keep their digits.
        cross_of_residuals, second_of_residuals: $\sum_t \bar v_t e_t^\top$ and $\sum_t e_{tn}^2$ with $e_t = y_t - \Theta \bar v_t$
            where they do not, else zero.
    """

    params: ParamsLGSSM
    emissions: Float[Array, "num_trials num_timesteps emission_dim"]
    regressors: Float[Array, "num_trials num_timesteps states_and_known"]
    gram: Float[Array, "num_trials states_and_known states_and_known"]
    covs: Float[Array, "num_trials state_dim state_dim"]
    squares: Float[Array, "num_trials emission_dim"]
    enough: Bool[Array, ""]
    cross_of_residuals: Float[Array, "num_trials states_and_known emission_dim"]
    second_of_residuals: Float[Array, "num_trials emission_dim"]

    def along(self, tangent: ParamsLGSSM) -> Float[Array, " num_trials"]:
        """The derivative along a tangent of the parameters."""
        variances, change = (values_of(params.emissions.cov) for params in (self.params, tangent))
        by_variance = change / (2 * variances**2)
        by_coefficients = _coefficients(tangent) / variances[:, None]
        weights, change_of_weights = self.params.emissions.weights, by_coefficients[:, : self.params.state_dim]
        of_covs = weights.T @ (by_variance[:, None] * weights - change_of_weights)  # type: ignore[union-attr]
        of_means = jnp.where(
            self.enough,
            self._from_data(by_coefficients, by_variance),
            jnp.einsum("kvn,nv->k", self.cross_of_residuals, by_coefficients) + self.second_of_residuals @ by_variance,
        )
        constant = self.emissions.shape[1] * (change / variances).sum() / 2
        return of_means + jnp.einsum("kij,ij->k", self.covs, of_covs) - constant

    def _from_data(self, by_coefficients: Array, by_variance: Array) -> Array:
        """The part of the means, for $G$ and $g$."""
        coefficients, state_dim = _coefficients(self.params), self.params.state_dim
        loaded = by_variance[:, None] * coefficients[:, :state_dim]
        of_data = by_coefficients - 2 * jnp.pad(loaded, ((0, 0), (0, coefficients.shape[1] - state_dim)))
        num_trials, num_timesteps, emission_dim = self.emissions.shape
        projected = self.emissions.reshape(-1, emission_dim) @ _few_rows(of_data)
        with_data = (projected.reshape(num_trials, num_timesteps, -1) * self.regressors).sum(axis=(1, 2))
        of_states = loaded.T @ coefficients
        of_gram = jnp.pad(of_states.at[:, state_dim:].multiply(2.0), ((0, coefficients.shape[1] - state_dim), (0, 0)))
        of_gram = of_gram - coefficients.T @ by_coefficients
        return with_data + self.squares @ by_variance + jnp.einsum("kvw,vw->k", self.gram, of_gram)


def is_linear_in_data(params: ParamsLGSSM, trials: Trials) -> bool:
    """Whether this score is that of the model: complete data, a diagonal R, and nothing that varies in time."""
    varies = any(isinstance(field, TimeVarying) for field in vars(params.emissions).values())
    return not trials.may_miss and not varies and is_diagonal(params.emissions.cov)


def emission_score(params: ParamsLGSSM, trials: Trials, moments: Moments) -> EmissionScore:
    """The score at the smoothed moments."""
    emissions, means = trials.emissions, moments.smoothed_means
    num_trials, num_timesteps, emission_dim = emissions.shape
    inputs = jnp.broadcast_to(trials.plan.inputs, (num_trials, num_timesteps, params.input_dim))
    regressors = jnp.concatenate([means, inputs, jnp.ones_like(means[..., :1])], axis=-1)
    coefficients, squares = _coefficients(params), squares_by_emission(params, trials)
    gram, known = jnp.swapaxes(regressors, 1, 2) @ regressors, slice(params.state_dim, None)
    of_known = coefficients[:, known]
    offsets = jnp.einsum("nv,kvw,nw->kn", of_known, gram[:, known, known], of_known)
    expected = num_timesteps * values_of(params.emissions.cov)
    enough = keeps_digits(jnp.broadcast_to(expected, squares.shape), squares + offsets)

    def from_residuals() -> tuple[Array, Array]:
        def one(at: tuple[Array, Array]) -> tuple[Array, Array]:
            emissions, regressors = at
            left = emissions - regressors @ coefficients.T
            return regressors.T @ left, (left**2).sum(axis=0)

        return lax.map(jax.checkpoint(one), (emissions, regressors))

    def nothing() -> tuple[Array, Array]:
        shape = (num_trials, coefficients.shape[1], emission_dim)
        return jnp.zeros(shape, squares.dtype), jnp.zeros_like(squares)

    cross, second = lax.cond(enough, nothing, from_residuals)
    covs = trials.spread(moments.smoothed_covs.sum(axis=1))
    return EmissionScore(params, emissions, regressors, gram, covs, squares, enough, cross, second)


def _coefficients(params: ParamsLGSSM) -> Float[Array, "emission_dim states_and_known"]:
    block = params.emissions
    return jnp.concatenate([block.weights, block.input_weights, block.bias[:, None]], axis=1)  # type: ignore[list-item]


def _few_rows(matrix: Array) -> Array:
    """The matrix itself; its transpose is kept, so that the product that makes its cotangent has few rows and many columns."""
    return lax.optimization_barrier(matrix.T).T
