"""What the kernels of this floor return: the moments of filter and smoother."""

import equinox as eqx
from jaxtyping import Array, Float


class Moments(eqx.Module):
    r"""What filter and smoother know, means by trial and covariances by pattern.

    Attributes:
        logliks: $\log p(y_t \mid past)$.
        filtered_means, filtered_covs: $m_t, P_t$.
        predicted_means, predicted_covs: $m_t^-, P_t^-$.
        adjoints: $r_t = \partial \log p(y) / \partial a_t$, the score with respect to a shift of the arrival in $x_t$.
        informations: $N_t$, its expected negative derivative.
        smoothed_means, smoothed_covs: $E[x_t \mid y]$, $Cov[x_t \mid y]$.
        smoothed_cross_covs: $Cov[x_t, x_{t+1} \mid y]$.
    """

    logliks: Float[Array, "*trials num_timesteps"]
    filtered_means: Float[Array, "*trials num_timesteps state_dim"]
    filtered_covs: Float[Array, "*patterns num_timesteps state_dim state_dim"]
    predicted_means: Float[Array, "*trials num_timesteps state_dim"]
    predicted_covs: Float[Array, "*patterns num_timesteps state_dim state_dim"]
    adjoints: Float[Array, "*trials num_timesteps state_dim"]
    informations: Float[Array, "*patterns num_timesteps state_dim state_dim"]
    smoothed_means: Float[Array, "*trials num_timesteps state_dim"]
    smoothed_covs: Float[Array, "*patterns num_timesteps state_dim state_dim"]
    smoothed_cross_covs: Float[Array, "*patterns num_timesteps_minus_1 state_dim state_dim"]


class TrialMeans(eqx.Module):
    r"""What depends on the values and not on the pattern alone.

    Attributes:
        filtered, predicted, adjoints, smoothed: As in `Moments`.
        squares: Of the white innovations, $\|L_t^{-1} (z_t - H_t m_t^-)\|^2$.
    """

    filtered: Float[Array, "num_trials num_timesteps state_dim"]
    predicted: Float[Array, "num_trials num_timesteps state_dim"]
    squares: Float[Array, "num_trials num_timesteps"]
    adjoints: Float[Array, "num_trials num_timesteps state_dim"]
    smoothed: Float[Array, "num_trials num_timesteps state_dim"]
