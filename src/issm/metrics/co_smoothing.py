"""How well some emissions are predicted from the others."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import as_array, as_float_array, fail
from issm._host import is_concrete
from issm.inference.held_out import emission_groups, predict_held_out
from issm.interventions import Intervention
from issm.metrics.agreement import r2
from issm.models.lgssm import ParamsLGSSM, check_params


class CoSmoothing(eqx.Module):
    r"""Prediction of each group of emissions from the others at all steps, past and future.

    Attributes:
        log_probs: $\log p(y_H \mid y_{-H}, do(\cdot), u)$ for each group H, `(num_groups, *trials)`, nats.
        score: Their sum over groups and trials for each observed number, nats.
        predictions: Every emission from the groups that it is not in, with the shape of the emissions.
        r2: Share of the variance of each emission that its prediction explains, `(emission_dim,)`.

    References:
        Pei et al. (2021), on co-smoothing; `docs/concepts.md`, "Inference".

    Examples:
        >>> import jax, issm
        >>> from issm.metrics import co_smoothing
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0], [2.0], [1.0]], [0.1, 0.1, 0.1])
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), params, 50)
        >>> co_smoothing(params, emissions).predictions.shape
        (50, 3)
    """

    log_probs: Float[Array, "num_groups *trials"]
    score: Float[Array, ""]
    predictions: Float[Array, "*trials num_timesteps emission_dim"]
    r2: Float[Array, " emission_dim"]


def co_smoothing(
    params: ParamsLGSSM,
    emissions: Any,
    inputs: Any = None,
    *,
    interventions: Intervention | None = None,
    groups: Any = None,
) -> CoSmoothing:
    r"""Hold out one group of emissions after another and predict it from the rest, $p(y_H \mid y_{-H}, do(\cdot), u)$.

    A model with too many states fits noise of single emissions, which the others know nothing about, so its score falls.

    Args:
        params: Model, fitted to other trials.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or with a leading trial axis; NaN is missing. At least two emissions.
        inputs: Soft inputs, shared or one array for each trial.
        interventions: Clamps, shared or one for each trial.
        groups: Group of each emission, `(emission_dim,)`, integers from 0. None: emission n is in group n modulo 5 (modulo the
            number of emissions if there are fewer).

    Returns:
        Log densities, predictions, and how good they are.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, or there is only one group.

    References:
        Pei et al. (2021), *Neural Latents Benchmark '21*, sec. 3, where the emissions are spikes.

    Examples:
        >>> import jax, issm
        >>> from issm.metrics import co_smoothing
        >>> params = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0], [2.0], [1.0]], [0.1, 0.1, 0.1])
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), params, 200)
        >>> bool((co_smoothing(params, emissions).r2 > 0.5).all())
        True
    """
    check_params(params)
    emissions = as_float_array("emissions", emissions, params.initial.mean.dtype)
    groups = _as_groups(groups, params.emission_dim)
    log_probs, predictions = [], jnp.zeros_like(emissions)
    for group in range(groups.max() + 1):
        held_out = jnp.asarray(groups == group)
        log_prob, expected = predict_held_out(params, emissions, inputs, interventions, held_out)
        log_probs.append(log_prob)
        predictions = jnp.where(held_out.reshape((1,) * (emissions.ndim - 1) + (-1,)), expected, predictions)
    log_probs = jnp.stack(log_probs)
    count = (~jnp.isnan(emissions)).sum().astype(emissions.dtype)
    return CoSmoothing(log_probs, log_probs.sum() / count, predictions, r2(emissions, predictions, pooled=False))


def _as_groups(groups: Any, emission_dim: int) -> np.ndarray:
    if groups is None:
        groups = emission_groups(emission_dim)
    if not is_concrete(groups):
        fail("groups", got="values that JAX traces", expected="concrete integers", remedy="Close over them.")
    groups = np.asarray(as_array("groups", groups))
    counts = np.unique(groups) if groups.dtype.kind in "iu" else np.zeros(0)
    if groups.shape != (emission_dim,) or len(counts) < 2 or (counts != np.arange(len(counts))).any():
        fail(
            "groups",
            got=f"{groups.tolist()} for {emission_dim} emissions",
            expected="one integer for each emission, with at least two groups counted from 0",
            remedy="Co-smoothing predicts some emissions from others, so it needs at least two.",
        )
    return groups
