r"""The expected score of the emissions, trial by trial, for complete data and emissions that are the same at all steps.

With $v_t = [x_t; w_t]$, $w_t = [u_t; 1]$ and $\Theta = [C\ D\ d]$, what is expected of a trial given its data is

$$-\tfrac12 \big( \mathrm{tr}\, R^{-1} S + T \log |2 \pi R| \big), \qquad S = \sum_t E[(y_t - \Theta v_t)(y_t - \Theta v_t)^\top].$$

Along $\dot\Theta$ and $\dot R$ it changes, with $G = R^{-1} \dot\Theta$ and $B = \tfrac12 R^{-1} \dot R R^{-1}$, by

$$\mathrm{tr}\, B S + \sum_t E[(y_t - \Theta v_t)^\top G v_t] - \tfrac{T}{2} \mathrm{tr}\, R^{-1} \dot R,$$

where means and covariances of the states enter apart. With $\bar v_t = [\bar x_t; w_t]$ and $e_t = y_t - \Theta \bar v_t$ the part of the
means is $\sum_t e_t^\top (B e_t + G \bar v_t)$, one product of the residuals with B, or transposed one with themselves.

A diagonal R makes of it a linear map of the data: with $g = \mathrm{diag}(B)$ and $q_n = \sum_t (y_{tn} - D_n u_t - d_n)^2$ that part is

$$\sum_t \bar v_t^\top W^\top y_t + g^\top q - \langle {\textstyle\sum} \bar v \bar v^\top, \Theta^\top G \rangle
+ \langle {\textstyle\sum} \bar x \bar x^\top, C^\top B\, C \rangle + 2 \langle {\textstyle\sum} \bar x w^\top, C^\top B [D\ d] \rangle,$$

$W = G - 2\, [B C\ \ 0]$. Transposed, the first term is one product of few rows with the data of all trials. Where
differences of such sums would lose digits, sums of residuals take their place.
"""

from functools import partial

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


class ScoreSums(eqx.Module):
    r"""What the score needs to know of the data where R is diagonal.

    Attributes:
        gram: $\sum_t \bar v_t \bar v_t^\top$.
        squares: $q_n$.
        enough: Whether sums over the data keep their digits.
        cross_of_residuals, second_of_residuals: $\sum_t \bar v_t e_t^\top$ and $\sum_t e_{tn}^2$ where they do not, else zero.
    """

    gram: Float[Array, "num_trials states_and_known states_and_known"]
    squares: Float[Array, "num_trials emission_dim"]
    enough: Bool[Array, ""]
    cross_of_residuals: Float[Array, "num_trials states_and_known emission_dim"]
    second_of_residuals: Float[Array, "num_trials emission_dim"]


class EmissionScore(eqx.Module):
    r"""What the score of every trial is made of.

    Attributes:
        params: The parameters.
        emissions: The data.
        regressors: $\bar v_t$.
        covs: $\sum_t Cov[x_t]$.
        sums: Where R is diagonal; else the residuals of a trial are made when they are needed.
    """

    params: ParamsLGSSM
    emissions: Float[Array, "num_trials num_timesteps emission_dim"]
    regressors: Float[Array, "num_trials num_timesteps states_and_known"]
    covs: Float[Array, "num_trials state_dim state_dim"]
    sums: ScoreSums | None

    def along(self, tangent: ParamsLGSSM) -> Float[Array, " num_trials"]:
        """The derivative along a tangent of the parameters."""
        state_dim, num_timesteps = self.params.state_dim, self.emissions.shape[1]
        cov, change = (values_of(params.emissions.cov) for params in (self.params, tangent))
        if self.sums is not None:
            by_cov, by_coefficients = change / (2 * cov**2), _coefficients(tangent) / cov[:, None]
            of_means, trace = self._from_sums(by_coefficients, by_cov, self.sums), (change / cov).sum()
        else:
            solve = partial(jax.scipy.linalg.cho_solve, (jnp.linalg.cholesky(cov), True))
            relative_change, by_coefficients = solve(change), solve(_coefficients(tangent))
            by_cov, trace = solve(relative_change.T) / 2, jnp.trace(relative_change)
            of_means = self._from_residuals(by_coefficients, by_cov)
        weights, change_of_weights = _coefficients(self.params)[:, :state_dim], by_coefficients[:, :state_dim]
        of_covs = weights.T @ (_times(by_cov, weights) - change_of_weights)
        return of_means + jnp.einsum("kij,ij->k", self.covs, of_covs) - num_timesteps * trace / 2

    def _from_residuals(self, by_coefficients: Array, by_cov: Array) -> Array:
        """The part of the means for a full $B$, one trial at a time; steps are columns, so that transposed products keep their pace."""
        coefficients = _coefficients(self.params)

        def one(at: tuple[Array, Array]) -> Array:
            emissions, regressors = at
            residuals = emissions.T - coefficients @ regressors.T
            return (residuals * (by_cov @ residuals + by_coefficients @ regressors.T)).sum()

        return lax.map(jax.checkpoint(one), (self.emissions, self.regressors))

    def _from_sums(self, by_coefficients: Array, by_cov: Array, sums: ScoreSums) -> Array:
        """The part of the means for a diagonal $B$."""
        from_data = self._from_data(by_coefficients, by_cov, sums)
        of_residuals = jnp.einsum("kvn,nv->k", sums.cross_of_residuals, by_coefficients)
        return jnp.where(sums.enough, from_data, of_residuals + sums.second_of_residuals @ by_cov)

    def _from_data(self, by_coefficients: Array, by_cov: Array, sums: ScoreSums) -> Array:
        """The same where sums over the data keep their digits."""
        coefficients, state_dim = _coefficients(self.params), self.params.state_dim
        loaded = _times(by_cov, coefficients[:, :state_dim])
        of_data = by_coefficients - 2 * jnp.pad(loaded, ((0, 0), (0, coefficients.shape[1] - state_dim)))
        num_trials, num_timesteps, emission_dim = self.emissions.shape
        projected = self.emissions.reshape(-1, emission_dim) @ _few_rows(of_data)
        with_data = (projected.reshape(num_trials, num_timesteps, -1) * self.regressors).sum(axis=(1, 2))
        of_states = loaded.T @ coefficients
        of_gram = jnp.pad(of_states.at[:, state_dim:].multiply(2.0), ((0, coefficients.shape[1] - state_dim), (0, 0)))
        of_gram = of_gram - coefficients.T @ by_coefficients
        return with_data + sums.squares @ by_cov + jnp.einsum("kvw,vw->k", sums.gram, of_gram)


def is_score_of(params: ParamsLGSSM, trials: Trials) -> bool:
    """Whether this score is that of the model: complete data, and emissions that do not vary in time."""
    return not trials.may_miss and not any(isinstance(field, TimeVarying) for field in vars(params.emissions).values())


def emission_score(params: ParamsLGSSM, trials: Trials, moments: Moments) -> EmissionScore:
    """The score at the smoothed moments."""
    means = moments.smoothed_means
    inputs = jnp.broadcast_to(trials.plan.inputs, (*means.shape[:2], params.input_dim))
    regressors = jnp.concatenate([means, inputs, jnp.ones_like(means[..., :1])], axis=-1)
    covs = trials.spread(moments.smoothed_covs.sum(axis=1))
    sums = _score_sums(params, trials, regressors) if is_diagonal(params.emissions.cov) else None
    return EmissionScore(params, trials.emissions, regressors, covs, sums)


def _score_sums(params: ParamsLGSSM, trials: Trials, regressors: Array) -> ScoreSums:
    """The sums of every trial for a diagonal R; those of residuals only where the others would lose digits."""
    num_trials, num_timesteps, emission_dim = trials.emissions.shape
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

        return lax.map(jax.checkpoint(one), (trials.emissions, regressors))

    def nothing() -> tuple[Array, Array]:
        shape = (num_trials, coefficients.shape[1], emission_dim)
        return jnp.zeros(shape, squares.dtype), jnp.zeros_like(squares)

    return ScoreSums(gram, squares, enough, *lax.cond(enough, nothing, from_residuals))


def _coefficients(params: ParamsLGSSM) -> Float[Array, "emission_dim states_and_known"]:
    block = params.emissions
    return jnp.concatenate([block.weights, block.input_weights, block.bias[:, None]], axis=1)  # type: ignore[list-item]


def _times(cov: Array, matrix: Array) -> Array:
    """The product with a matrix, of which a diagonal one is given as its diagonal."""
    return cov[:, None] * matrix if cov.ndim == 1 else cov @ matrix


def _few_rows(matrix: Array) -> Array:
    """The matrix itself; its transpose is kept, so that the product that makes its cotangent has few rows and many columns."""
    return lax.optimization_barrier(matrix.T).T
