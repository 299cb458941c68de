"""Where a fit of a general model starts."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from issm._check import as_float_array, fail
from issm._host import is_concrete
from issm._types import PRNGKey
from issm.fitting.initialize import initialize_lgssm
from issm.interventions import Intervention
from issm.models.discrete_emissions import BernoulliEmission, NegativeBinomialEmission, PoissonEmission
from issm.models.emissions import Emission, GaussianEmission
from issm.models.fields import values_of
from issm.models.lgssm import make_lgssm_params
from issm.models.maps import MLP, LinearMap
from issm.models.ssm import SSM

LIKELIHOODS = ("gaussian", "poisson", "negative_binomial", "bernoulli")


def initialize_ssm(
    key: PRNGKey,
    emissions: Any,
    state_dim: int,
    *,
    likelihood: str = "gaussian",
    widths: Sequence[int] = (50, 50),
    activation: str = "tanh",
    exposure: Any = 1.0,
    link: str = "softplus",
    input_dim: int = 0,
    interventions: Intervention | None = None,
    process_scale: float = 0.1,
    initial_scale: float = 0.3,
    emission_scale: float = 0.3,
) -> SSM:
    r"""A model whose emission map starts out linear: from the clamps if they are given, else one that holds its state.

    Without clamps $A = I, b = 0, m = 0$: between clamps the path starts at "hold the last clamped value". The bias of the map is
    the mean of each emission, or what the link makes of it.

    With `interventions` the dynamics, their noise and the linear map are those of `initialize_lgssm`, for emissions on the scale of
    the predictors: $g(y + \tfrac12)$ of counts over their exposure, with g the inverse of the link. Where the true map is not far
    from linear, this is by far the better start. Coins have no such scale: with them, leave the clamps out.

    Args:
        key: JAX random key, for the weights of the map.
        emissions: Data, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        state_dim: Number of states D, at least 1.
        likelihood: "gaussian", "poisson", "negative_binomial" or "bernoulli".
        widths: Numbers of hidden units of an `MLP`; empty for a `LinearMap`.
        activation: Of the `MLP`.
        exposure: Bin width, for counts.
        link: Of the rates of counts: "softplus" or "exp".
        input_dim: Number of soft inputs M.
        interventions: Clamps, shared or one for each trial, to start from; not together with inputs. None: hold the state.
        process_scale: Standard deviation of the process noise for one step, in the units of the states (those of the clamps).
        initial_scale: Standard deviation of the first state.
        emission_scale: Standard deviation of Gaussian emission noise, as a part of that of each emission.

    Returns:
        The model, in the dtype of `emissions`.

    Raises:
        ValueError: If the likelihood is unknown, a size is below 1, the emissions are no numbers, clamps do not fit them, or
            clamps come with coins or inputs.

    References:
        `docs/how-to/other-emissions.md`.

    Examples:
        >>> import jax, numpy as np, issm
        >>> model = issm.initialize_ssm(jax.random.key(0), np.ones((20, 3)), 2, likelihood="poisson")
        >>> model.dynamics.weights.tolist(), model.emission_dim
        ([[1.0, 0.0], [0.0, 1.0]], 3)
    """
    emissions = as_float_array("emissions", emissions)
    if emissions.ndim not in (2, 3) or 0 in emissions.shape:
        fail(
            "emissions",
            got=f"shape {tuple(emissions.shape)}",
            expected="(num_timesteps, emission_dim) or (num_trials, num_timesteps, emission_dim)",
            remedy="Add the axis of the emissions with `y[..., None]` if there is only one.",
        )
    if likelihood not in LIKELIHOODS:
        fail(
            "likelihood",
            got=repr(likelihood),
            expected=" or ".join(f'"{name}"' for name in LIKELIHOODS),
            remedy="Build an `SSM` of your own around any `equinox.Module`.",
        )
    if isinstance(state_dim, bool) or not isinstance(state_dim, (int, np.integer)) or state_dim < 1:
        fail(
            "state_dim",
            got=repr(state_dim),
            expected="an integer of at least 1",
            remedy="Clamps say which states there are.",
        )
    if not is_concrete(emissions):
        fail("emissions", got="values that JAX traces", expected="known values", remedy="Call it outside of `jit`.")
    values = np.asarray(emissions, np.float64).reshape(-1, emissions.shape[-1])
    seen = ~np.isnan(values)
    count = np.maximum(seen.sum(axis=0), 1)
    mean = np.where(seen, values, 0.0).sum(axis=0) / count
    variance = np.where(seen, (values - mean) ** 2, 0.0).sum(axis=0) / count
    dtype, emission_dim = emissions.dtype, emissions.shape[-1]
    offsets = _offsets(likelihood, mean, count, np.asarray(exposure, np.float64), link)
    network = MLP(key, state_dim, emission_dim, widths or (1,), activation=activation, bias=offsets, dtype=dtype)
    emission_map = network if widths else LinearMap(network.skip, network.biases[-1])
    linear = make_lgssm_params(
        initial_mean=jnp.zeros(state_dim, dtype),
        initial_cov=jnp.full(state_dim, initial_scale**2, dtype),
        dynamics_weights=jnp.eye(state_dim, dtype=dtype),
        dynamics_cov=jnp.full(state_dim, process_scale**2, dtype),
        dynamics_input_weights=jnp.zeros((state_dim, input_dim), dtype),
        emissions_weights=jnp.zeros((emission_dim, state_dim), dtype),
        emissions_cov=jnp.ones(emission_dim, dtype),
    )
    noise = emission_scale**2 * np.where(variance > 0, variance, 1.0)
    if interventions is not None:
        _check_clamped_start(likelihood, input_dim)
        scaled = _on_the_scale_of_predictors(likelihood, np.asarray(emissions), np.asarray(exposure), link)
        linear = initialize_lgssm(key, jnp.asarray(scaled, dtype), state_dim, interventions=interventions).params
        weights, bias = values_of(linear.emissions.weights), values_of(linear.emissions.bias)
        emission_map = LinearMap(weights, bias)
        if widths:
            emission_map = eqx.tree_at(lambda n: (n.skip, n.biases), network, (weights, (*network.biases[:-1], bias)))
        noise = values_of(linear.emissions.cov)
    emission = _emission(likelihood, emission_map, jnp.asarray(noise, dtype), jnp.asarray(exposure, dtype), link)
    return SSM(linear.initial, linear.dynamics, emission)


def _check_clamped_start(likelihood: str, input_dim: int) -> None:
    if likelihood == "bernoulli":
        fail(
            "interventions",
            got="clamps, and coins",
            expected="Gaussian emissions or counts",
            remedy="Leave them out here; the fit itself takes them.",
        )
    if input_dim:
        fail(
            "interventions",
            got=f"clamps, and input_dim {input_dim}",
            expected="no soft inputs",
            remedy="Start from `initialize_lgssm` with the inputs, or leave the clamps out.",
        )


def _on_the_scale_of_predictors(likelihood: str, emissions: np.ndarray, exposure: np.ndarray, link: str) -> np.ndarray:
    """Emissions for which the predictors are about linear: the inverse link of rates that are not zero."""
    if likelihood == "gaussian":
        return emissions
    return _inverse_link((emissions + 0.5) / exposure, link)


def _offsets(likelihood: str, mean: np.ndarray, count: np.ndarray, exposure: np.ndarray, link: str) -> np.ndarray:
    """Predictors whose means are those of the data."""
    if likelihood == "gaussian":
        return mean
    if likelihood == "bernoulli":
        return np.log((mean * count + 0.5) / ((1 - mean) * count + 0.5))
    return _inverse_link(np.maximum(mean, 0.1 / count) / exposure, link)


def _inverse_link(rates: np.ndarray, link: str) -> np.ndarray:
    return np.log(rates) if link == "exp" else rates + np.log(-np.expm1(-rates))


def _emission(likelihood: str, map: Any, noise: Any, exposure: Any, link: str) -> Emission:
    if likelihood == "gaussian":
        return GaussianEmission(map, noise)
    if likelihood == "poisson":
        return PoissonEmission(map, exposure, link=link)
    if likelihood == "negative_binomial":
        return NegativeBinomialEmission(map, jnp.full_like(noise, 10.0), exposure, link=link)
    return BernoulliEmission(map)
