r"""How far the mean of a posterior is from its mode, to the order that Laplace's approximation leaves out.

With $\Sigma$ the inverse Hessian at the mode $\hat x$ of $L(x) = \log p(x, y)$,

$$E[x_i \mid y] - \hat x_i \approx \tfrac12 \sum_{jkl} \Sigma_{ij}\, \partial_j \partial_k \partial_l L\, \Sigma_{kl}.$$

Linear dynamics have no third derivatives, and an emission has those of its own step alone: the sum over k and l is the slope
of $\mathrm{tr}(S_t \nabla^2 \log p(y_t \mid x_t))$ with $S_t$ the smoothed covariance, and the product with $\Sigma$ a pass of
filter and smoother.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from issm.models.emissions import Emission

LARGEST = 3.0**0.5
"""No mean of a unimodal density is further from the mode, in standard deviations (Johnson & Rogers, 1951)."""


def skew_pull(
    emission: Emission,
    emissions: Float[Array, "num_timesteps emission_dim"],
    inputs: Float[Array, "num_timesteps input_dim"],
    states: Float[Array, "num_timesteps state_dim"],
    covs: Float[Array, "num_timesteps state_dim state_dim"],
) -> Float[Array, "num_timesteps state_dim"]:
    r"""$g_t = \tfrac12 \nabla_{x_t} \mathrm{tr}(S_t \nabla^2 \log p(y_t \mid x_t))$, to be added to the scores of the emissions.

    Where $(g_t^\top S_t g_t)^{1/2}$, the shift in standard deviations that a step gives itself, is above `LARGEST`, the
    expansion does not hold and $g_t$ is shortened to it.

    References:
        Tierney & Kadane (1986), sec. 2; Rue, Martino & Chopin (2009), sec. 3.2; Johnson & Rogers (1951).
    """

    def one(observed: Array, given: Array, state: Array, cov: Array) -> Array:
        def log_prob(state: Array) -> Array:
            return emission.log_prob(observed[None], emission.predictors(state[None], given[None]))[0]

        return jax.grad(lambda state: (cov * jax.hessian(log_prob)(state)).sum())(state) / 2

    pull = jax.vmap(one)(emissions, inputs, states, covs)
    squared = jnp.einsum("ti,tij,tj->t", pull, covs, pull)
    long = squared > LARGEST**2
    return pull * jnp.where(long, LARGEST / jnp.sqrt(jnp.where(long, squared, 1.0)), 1.0)[:, None]
