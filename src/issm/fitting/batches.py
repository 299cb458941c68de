"""Data that a gradient method sees in parts: the trials it learns from, those held out, and the batches of an epoch."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from issm._check import as_array, as_float_array, fail
from issm._host import is_concrete
from issm._types import PRNGKey
from issm.inference.likelihood import log_likelihoods
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM
from issm.models.trials import Plan, Trials, as_trials


class Data(eqx.Module):
    """Emissions, inputs and clamps as the user gave them; whatever has three axes has one entry for each trial."""

    emissions: Array
    inputs: Array | None
    interventions: Intervention | None

    @property
    def num_trials(self) -> int:
        """Number of trials; one for a sequence without a trial axis."""
        return self.emissions.shape[0] if self.emissions.ndim == 3 else 1

    def take(self, trials: Int[Array, " chosen"] | np.ndarray) -> "Data":
        """Some of the trials."""
        return jax.tree.map(lambda leaf: leaf[trials] if leaf.ndim == 3 else leaf, self)


class Likelihood(eqx.Module):
    r"""Minus the log-likelihood of a linear Gaussian model, of trials, for each number that was observed in `num_observed`."""

    num_observed: Float[Array, ""]
    num_trials: int = eqx.field(static=True)
    method: str = eqx.field(static=True, default="auto")

    def __call__(self, params: ParamsLGSSM, trials: Trials) -> Float[Array, ""]:
        """The loss of a batch stands for that of all trials."""
        share = trials.num_trials / self.num_trials
        return -log_likelihoods(params, trials, self.method).sum() / (self.num_observed * share)


class UserLoss(eqx.Module):
    """A loss of the user's own, on the user's arrays."""

    function: Any

    def __call__(self, params: Any, data: Data) -> Float[Array, ""]:
        """The loss of a batch."""
        value = self.function(params, data.emissions, data.inputs, data.interventions)
        if jnp.shape(value) != ():
            fail(
                "loss",
                got=f"a function whose value has shape {jnp.shape(value)}",
                expected="one number",
                remedy="Take the mean over the trials.",
            )
        return value


def as_data(emissions: Any, inputs: Any, interventions: Any) -> Data:
    """Check what can be checked without knowing the model."""
    emissions = as_float_array("emissions", emissions)
    if emissions.ndim not in (2, 3) or 0 in emissions.shape[:-1]:
        fail(
            "emissions",
            got=f"shape {tuple(emissions.shape)}",
            expected="(num_timesteps, emission_dim) or (num_trials, num_timesteps, emission_dim), not empty",
            remedy="Add the last axis with `y[..., None]` for a single emission.",
        )
    if interventions is not None and not isinstance(interventions, Intervention):
        fail(
            "interventions",
            got=f"a {type(interventions).__name__}",
            expected="an Intervention or None",
            remedy="Build one with `do`, `stimulate` or `Intervention(mask, value)`.",
        )
    inputs = None if inputs is None else as_float_array("inputs", inputs)
    data = Data(emissions, inputs, interventions)
    for name, leaf in (("inputs", inputs), ("interventions", None if interventions is None else interventions.mask)):
        if leaf is not None and leaf.shape[:-1] not in (emissions.shape[:-1], emissions.shape[-2:-1]):
            fail(
                name,
                got=f"shape {tuple(leaf.shape)}",
                expected=f"leading axes {tuple(emissions.shape[:-1])} or {tuple(emissions.shape[-2:-1])}, as the emissions",
                remedy="Its steps must be those of the emissions; without a trial axis it is shared by all trials.",
            )
    return data


def likelihood_data(params: ParamsLGSSM, data: Data) -> Trials:
    """Checked trials of a linear Gaussian model."""
    return as_trials(params, data.emissions, data.inputs, data.interventions)


def split(data: Data, held_out: Any) -> tuple[Data, Data | None]:
    """The trials to learn from and those to watch."""
    if held_out is None:
        return data, None
    chosen = as_array("held_out", held_out)
    if not is_concrete(chosen):
        fail("held_out", got="values that JAX traces", expected="known trials", remedy="Choose them outside of `jit`.")
    chosen, places = np.asarray(chosen), np.arange(data.num_trials)
    valid = chosen.ndim == 1 and (
        chosen.shape == places.shape
        if chosen.dtype == bool
        else np.issubdtype(chosen.dtype, np.integer) and np.isin(chosen, places).all()
    )
    held = np.isin(places, places[chosen] if valid else [])
    if not valid or not held.any() or held.all():
        fail(
            "held_out",
            got=f"{held_out!r}",
            expected=f"indices of some, not all, of the {len(places)} trials, or a Boolean for each",
            remedy="For example `held_out=[0, 3]`.",
        )
    return data.take(places[~held]), data.take(places[held])


def take(data: Data | Trials, chosen: Int[Array, " chosen"]) -> Data | Trials:
    """Some of the trials; which ones is not known before the run."""
    if isinstance(data, Data):
        return data.take(chosen)
    plan: Plan = jax.tree.map(lambda leaf: leaf[chosen] if leaf.ndim == 3 else leaf, data.plan)
    alike = data.num_patterns == 1
    representatives = jnp.zeros(1, jnp.int32) if alike else jnp.arange(len(chosen), dtype=jnp.int32)
    return Trials(data.emissions[chosen], plan, representatives, None, False, data.may_miss)


def shuffle(key: PRNGKey, num_trials: int, batch_size: int) -> list[Int[Array, "num_batches size"]]:
    """Every trial once: full batches, and the rest as a smaller one."""
    order = jax.random.permutation(key, num_trials)
    full = num_trials - num_trials % batch_size
    batches = [order[:full].reshape(-1, batch_size), order[None, full:]]
    return [part for part in batches if part.size]
