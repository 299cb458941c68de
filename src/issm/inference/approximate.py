"""The smoother of the general model: Laplace's approximation, or a trained recognition network."""

from typing import Any

import jax.numpy as jnp

from issm._check import fail
from issm.inference.laplace import PosteriorSSM, laplace_posterior
from issm.inference.recognition import Recognition
from issm.inference.variational import check_recognition, recognised_posterior
from issm.interventions import Intervention
from issm.models.ssm import SSM, as_model_trials


def posterior(
    model: SSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    method: str | Recognition = "laplace",
    num_iters: int = 100,
) -> PosteriorSSM:
    r"""Smoothing under clamps with any emissions: Laplace's approximation, or what a recognition network says.

    $$\hat x = \arg\max_x \log p(x, y \mid do(\cdot), u), \quad p(x \mid y) \approx N(\hat x, H^{-1}), \quad
    \log p(y) \approx \log p(\hat x, y) - \tfrac12 \log |H / 2\pi|, \quad H = -\nabla_x^2 \log p(\hat x, y)$$

    The path is found by Gauss-Newton steps with a line search: each is one pass of filter and smoother over the potentials
    $J_t = G_t^\top W_t G_t$ of the emissions, with $G_t$ the derivative of their predictor and $W_t$ their expected
    information, so that its cost grows linearly in the number of steps. H then has the observed information of every step
    where that is positive semidefinite, and the expected one elsewhere. One more pass moves the means from the mode towards
    $E[x_t \mid y]$ by the next term of the expansion, the third derivatives of the emissions,

    $$E[x_i \mid y] \approx \hat x_i + \tfrac12 \sum_{jkl} H^{-1}_{ij} H^{-1}_{kl}
    \frac{\partial^3 \log p(y \mid \hat x)}{\partial x_j \partial x_k \partial x_l}.$$

    How far `smoothed_means` are from `modes`, in standard deviations, tells how skewed the posterior is: up to about a half the
    expansion is good, and no step moves itself by more than $\sqrt 3$, beyond which no mean of a unimodal density lies. The
    curvature of nonlinear dynamics is left out of the expansion. For a linear Gaussian model the result is exact. The
    derivatives of the result are those of the implicit function theorem.

    Args:
        model: The model.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        inputs: Soft inputs $u_t$, shared or one array for each trial.
        interventions: Clamps, shared or one for each trial. None: no clamps.
        method: "laplace", or a trained recognition network, e.g. from `fit_vi`, whose q is returned with its lower bound.
        num_iters: Largest number of Gauss-Newton steps, at least 1; a network takes none.

    Returns:
        Means, modes, covariances and an approximate marginal log-likelihood, with the leading axes of `emissions`.

    Raises:
        ValueError: If an argument has the wrong shape, type or values; the message names it.

    References:
        Fahrmeir & Kaufmann (1991), *Metrika* 38; Durbin & Koopman (2012), sec. 10.6; Tierney & Kadane (1986), and Rue, Martino
        & Chopin (2009), for the means; Nejatbakhsh & Wang (2025), for the model.

    Examples:
        >>> import numpy as np, issm
        >>> linear = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0]], [0.5])
        >>> spikes = issm.PoissonEmission(issm.LinearMap([[1.0], [-1.0]], [1.0, 1.0]), exposure=0.5, link="exp")
        >>> plan = issm.do({0: 1.0}, num_timesteps=4, state_dim=1, start=2, stop=3)
        >>> counts = np.array([[1.0, 0.0], [3.0, 1.0], [4.0, 0.0], [np.nan, 1.0]])
        >>> result = issm.posterior(issm.SSM(linear.initial, linear.dynamics, spikes), counts, interventions=plan)
        >>> result.smoothed_means[2].tolist(), result.smoothed_covariances[2].tolist()
        ([1.0], [[0.0]])
    """
    if not (isinstance(method, Recognition) or method == "laplace"):
        fail(
            "method",
            got=repr(method),
            expected='"laplace" or a recognition network',
            remedy="A linear Gaussian model has `lgssm_smoother`.",
        )
    if isinstance(num_iters, bool) or not isinstance(num_iters, int) or num_iters < 1:
        fail(
            "num_iters",
            got=repr(num_iters),
            expected="an integer of at least 1",
            remedy="It is the largest number of steps.",
        )
    trials = as_model_trials(model, emissions, inputs, interventions)
    if isinstance(method, Recognition):
        check_recognition(method, model, trials)
        return recognised_posterior(model, method, trials)
    return laplace_posterior(model, trials, jnp.asarray(num_iters, jnp.int32))
