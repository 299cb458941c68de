"""How a model sees a stimulation: as clamps, as soft inputs, or not at all."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from issm._check import as_float_array, fail
from issm.causal.history import History, check_plan
from issm.causal.predict import Prediction, interventional_prediction
from issm.interventions import Intervention, no_intervention
from issm.models.lgssm import ParamsLGSSM

SEEN_AS = ("clamps", "inputs", "ignored")


def stimulation_as(seen_as: str, interventions: Intervention, inputs: Any = None) -> dict[str, Any]:
    r"""Inputs and clamps of the same stimulation as one of three models sees it.

    "clamps" is the interventional model (iSSM); "inputs" the additive one, which adds $B v_t$ to the dynamics and cuts nothing;
    "ignored" the observational one, which knows of neither.

    Args:
        seen_as: "clamps", "inputs" or "ignored".
        interventions: The clamps, `(num_timesteps, state_dim)` or with a leading trial axis.
        inputs: Soft inputs that every model gets, `(num_timesteps, input_dim)` or with a leading trial axis.

    Returns:
        `{"inputs": ..., "interventions": ...}`, the keywords of `initialize_lgssm`, `fit_em` and every function that takes data.
        Seen as inputs, the clamp values (zero where free) follow the soft inputs, `(..., num_timesteps, input_dim + state_dim)`.

    Raises:
        ValueError: If `seen_as` is another word, or lengths or numbers of trials disagree.

    References:
        Nejatbakhsh & Wang (2025), sec. 4 (the additive baseline).

    Examples:
        >>> import issm
        >>> plan = issm.do({0: 2.0}, num_timesteps=3, state_dim=2, start=1, stop=2)
        >>> seen = issm.stimulation_as("inputs", plan)
        >>> seen["inputs"].tolist(), seen["interventions"]
        ([[0.0, 0.0], [2.0, 0.0], [0.0, 0.0]], None)
    """
    if not isinstance(seen_as, str) or seen_as not in SEEN_AS:
        fail(
            "seen_as",
            got=repr(seen_as),
            expected="'clamps', 'inputs' or 'ignored'",
            remedy="A model of another kind goes into `compare` as a function.",
        )
    check_plan("interventions", interventions)
    if seen_as != "inputs":
        return {"inputs": inputs, "interventions": interventions if seen_as == "clamps" else None}
    return {"inputs": append_inputs(inputs, interventions.value), "interventions": None}


def append_inputs(inputs: Any, more: Float[Array, "*trials num_timesteps more_dim"]) -> Array:
    """Inputs with further columns; a trial axis of either is that of both."""
    if inputs is None:
        return more
    inputs = as_float_array("inputs", inputs, more.dtype)
    trials = {array.shape[0] for array in (inputs, more) if array.ndim == 3}
    if inputs.ndim not in (2, 3) or inputs.shape[-2] != more.shape[-2] or len(trials) > 1:
        fail(
            "inputs",
            got=f"shape {tuple(inputs.shape)}",
            expected=f"the trials and steps of `interventions`, {tuple(more.shape[:-1])}, and one axis of inputs",
            remedy="A single input needs its own axis: `u[..., None]`.",
        )
    spread = lambda array: jnp.broadcast_to(array, (*trials, *array.shape[-2:]))  # noqa: E731
    return jnp.concatenate([spread(inputs), spread(more)], axis=-1)


def roll_out(
    params: ParamsLGSSM, emissions: Array, inputs: Any, interventions: Intervention | None, history: int
) -> Prediction:
    """Predict trials `(num_trials, num_timesteps, emission_dim)` after their first steps from the stimulation alone."""
    num_trials, num_timesteps, _ = emissions.shape
    before, after = slice(None, history), slice(history, None)
    cut = lambda tree, steps: jax.tree.map(lambda leaf: leaf[..., steps, :], tree)  # noqa: E731
    if interventions is None:
        interventions = no_intervention(num_timesteps, params.state_dim)
    past = None
    if history:
        past = History(
            emissions[:, before], None if inputs is None else cut(inputs, before), cut(interventions, before)
        )
    plan = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_trials, *leaf.shape[-2:])), cut(interventions, after))
    return interventional_prediction(params, plan, history=past, inputs=None if inputs is None else cut(inputs, after))
