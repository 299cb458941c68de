"""The public door of every function that takes data: checks it, and gives it one form whatever the user's leading axes."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from issm._check import as_float_array, check_finite, fail
from issm._host import is_concrete, to_device
from issm._once import look_once
from issm.interventions import Intervention
from issm.models.emission_sums import EmissionSums
from issm.models.fields import TimeVarying
from issm.models.lgssm import ParamsLGSSM, check_params


class Plan(eqx.Module):
    """Inputs and clamps of one or many trials, checked.

    Attributes:
        inputs: `(num_timesteps, input_dim)` where all trials share them, else with a leading trial axis.
        intervention: Clamps; with a trial axis where trials differ.
    """

    inputs: Float[Array, "*trials num_timesteps input_dim"]
    intervention: Intervention

    @property
    def axes(self) -> "Plan":
        """`in_axes` for `jax.vmap` over trials."""
        return jax.tree.map(lambda leaf: 0 if leaf.ndim == 3 else None, self)


class Chunks(eqx.Module):
    """Trials in chunks of equal size, each of one pattern, so that a chunk can share its matrices.

    Attributes:
        trials: The trials of each chunk, `(num_chunks, size)`; a place left over repeats a trial.
        pattern: The pattern of each chunk.
        place: Where each trial is among all places.
    """

    trials: Int[Array, "num_chunks size"]
    pattern: Int[Array, " num_chunks"]
    place: Int[Array, " num_trials"]


class Trials(eqx.Module):
    """Emissions of one or many trials with their inputs and clamps, checked.

    Attributes:
        emissions: `(num_trials, num_timesteps, emission_dim)`; NaN is a missing entry.
        plan: Inputs and clamps.
        representatives: One trial for each pattern of clamps and missing entries. Covariances depend on the pattern alone, so
            they are computed for these trials only.
        pattern: The pattern of each trial; None where there is one pattern, or where every trial has its own.
        one_sequence: Whether the user gave one sequence without a trial axis.
        may_miss: Whether an entry may be missing; false only when the values are known to be complete.
        chunks: The trials by pattern, where `pattern` is not None.
        sums: Where a fit has made them, log-likelihoods need be right in total only, and the data are read fewer times.
        by_step: Whether log-likelihoods are asked for at every step, or only their sum for each trial.
    """

    emissions: Float[Array, "num_trials num_timesteps emission_dim"]
    plan: Plan
    representatives: Int[Array, " num_patterns"]
    pattern: Int[Array, " num_trials"] | None
    one_sequence: bool = eqx.field(static=True)
    may_miss: bool = eqx.field(static=True)
    chunks: Chunks | None = None
    sums: EmissionSums | None = None
    by_step: bool = eqx.field(static=True, default=True)

    @property
    def num_trials(self) -> int:
        """Number of trials K."""
        return self.emissions.shape[0]

    @property
    def num_patterns(self) -> int:
        """Number of patterns G of clamps and missing entries."""
        return self.representatives.shape[0]

    @property
    def in_patterns(self) -> Int[Array, " num_patterns"]:
        """How many trials have each pattern."""
        if self.pattern is None:
            return jnp.full(self.num_patterns, self.num_trials // self.num_patterns, jnp.int32)
        return jnp.zeros(self.num_patterns, jnp.int32).at[self.pattern].add(1)

    @property
    def have_own_patterns(self) -> bool:
        """Whether every trial has a pattern of its own."""
        return self.pattern is None and self.num_patterns > 1

    def of_patterns(self) -> "Trials":
        """One trial for each pattern."""
        chosen = self.representatives
        return Trials(
            emissions=self.emissions[chosen],
            plan=jax.tree.map(lambda leaf: leaf[chosen] if leaf.ndim == 3 else leaf, self.plan),
            representatives=jnp.arange(self.num_patterns),
            pattern=None,
            one_sequence=False,
            may_miss=self.may_miss,
        )

    def spread(self, by_pattern: Array, axis: int = 0) -> Array:
        """Give every trial the value of its pattern: `axis` grows from num_patterns (or 1) to num_trials."""
        if self.pattern is not None and by_pattern.shape[axis] != 1:
            return jnp.take(by_pattern, self.pattern, axis=axis)
        shape = list(by_pattern.shape)
        shape[axis] = self.num_trials
        return jnp.broadcast_to(by_pattern, shape)

    def like_user(self, result: Any) -> Any:
        """Drop the trial axis of every array again if the user gave one sequence."""
        return jax.tree.map(lambda leaf: leaf[0], result) if self.one_sequence else result

    def map(self, kernel: Callable[[Array, Array, Intervention], Any]) -> Any:
        """Apply `kernel(emissions, inputs, intervention)` to every trial; the result has the user's leading axes."""
        if self.one_sequence:
            return kernel(self.emissions[0], self.plan.inputs, self.plan.intervention)
        axes = self.plan.axes
        return jax.vmap(kernel, in_axes=(0, axes.inputs, axes.intervention))(
            self.emissions, self.plan.inputs, self.plan.intervention
        )


def as_trials(params: ParamsLGSSM, emissions: Any, inputs: Any, interventions: Any) -> Trials:
    """Check parameters and data, and give the data one form in the dtype of the parameters.

    Raises:
        ValueError: If the parameters are not those of a model, shapes disagree, the data are empty, all missing or infinite,
            or inputs are NaN.
    """
    check_params(params)
    dtype = params.initial.mean.dtype
    emissions = as_float_array("emissions", emissions, dtype)
    if emissions.ndim not in (2, 3) or emissions.shape[-1] != params.emission_dim:
        fail(
            "emissions",
            got=f"shape {tuple(emissions.shape)}",
            expected=f"(num_timesteps, {params.emission_dim}) or (num_trials, num_timesteps, {params.emission_dim})",
            remedy="The last axis holds the emissions, one for each row of the emission weights; add it with `y[..., None]` for"
            " a single emission. Pad trials of unequal length with `pad_trials`.",
        )
    if 0 in emissions.shape:
        fail(
            "emissions",
            got=f"empty data, shape {tuple(emissions.shape)}",
            expected="at least one trial and one step",
            remedy="Check how the data were cut.",
        )
    may_miss = _may_miss(emissions)
    one_sequence = emissions.ndim == 2
    num_trials = None if one_sequence else emissions.shape[0]
    plan = as_plan(params, inputs, interventions, num_timesteps=emissions.shape[-2], num_trials=num_trials)
    emissions = emissions[None] if one_sequence else emissions
    representatives, pattern, chunks = _group(emissions, plan.intervention, may_miss)
    return Trials(emissions, plan, representatives, pattern, one_sequence, may_miss, chunks)


def as_plan(
    params: ParamsLGSSM,
    inputs: Any,
    interventions: Any,
    *,
    num_timesteps: int,
    num_trials: int | None,
    inputs_name: str = "inputs",
    interventions_name: str = "interventions",
) -> Plan:
    """Check inputs and clamps against the model, the number of steps and the number of trials (None: one sequence)."""
    _check_time_axis(params, num_timesteps)
    dtype = params.initial.mean.dtype
    nothing = _nothing_done(num_timesteps, params.state_dim, dtype.name)
    if interventions is None:
        if inputs is None and not params.input_dim:
            return nothing
        interventions = nothing.intervention
    if not isinstance(interventions, Intervention):
        fail(
            interventions_name,
            got=f"a {type(interventions).__name__}",
            expected="an Intervention",
            remedy="Build one with `do`, `stimulate` or `Intervention(mask, value)`.",
        )
    _check_leading_axes(
        interventions_name,
        interventions.mask.shape,
        (num_timesteps, params.state_dim),
        ("num_timesteps", "state_dim"),
        num_trials,
    )
    if inputs is None:
        if params.input_dim:
            fail(
                inputs_name,
                got="None",
                expected=f"shape (num_timesteps, input_dim) = {(num_timesteps, params.input_dim)}",
                remedy="The model has input weights; pass zeros if there was no input.",
            )
        inputs = nothing.inputs
    inputs = as_float_array(inputs_name, inputs, dtype)
    _check_leading_axes(
        inputs_name, inputs.shape, (num_timesteps, params.input_dim), ("num_timesteps", "input_dim"), num_trials
    )
    check_finite(inputs_name, inputs)
    cast = lambda leaf: leaf if leaf.dtype in (dtype, bool) else leaf.astype(dtype)  # noqa: E731
    return Plan(inputs, jax.tree.map(cast, interventions))


# Arrays that say "nothing" are made once: a small problem would feel their cost. They are concrete whoever asks first.


@lru_cache(maxsize=64)
def _nothing_done(num_timesteps: int, state_dim: int, dtype: str) -> Plan:
    with jax.ensure_compile_time_eval():
        free = Intervention(np.zeros((num_timesteps, state_dim), bool), np.zeros((), dtype))
        return Plan(to_device(np.zeros((num_timesteps, 0), dtype)), free)


@lru_cache(maxsize=1)
def _one_pattern() -> Array:
    with jax.ensure_compile_time_eval():
        return to_device(np.zeros(1, np.int32))


def _check_leading_axes(name: str, shape: tuple, expected: tuple, words: tuple, num_trials: int | None) -> None:
    allowed = [expected] if num_trials is None else [expected, (num_trials, *expected)]
    if tuple(shape) not in allowed:
        described = f"({', '.join(words)}) = {expected}"
        if num_trials is not None:
            described += f" or (num_trials, {', '.join(words)}) = {allowed[1]}"
        fail(
            name,
            got=f"shape {tuple(shape)}",
            expected=described,
            remedy="Its steps must be those of the emissions; without a trial axis it is shared by all trials.",
        )


def _check_time_axis(params: ParamsLGSSM, num_timesteps: int) -> None:
    for block in ("dynamics", "emissions"):
        for name, field in vars(getattr(params, block)).items():
            if isinstance(field, TimeVarying) and field.values.shape[0] != num_timesteps:
                fail(
                    f"params.{block}.{name}",
                    got=f"{field.values.shape[0]} steps",
                    expected=f"{num_timesteps} steps, those of the data",
                    remedy="Give a `TimeVarying` field one entry for each step.",
                )


LARGEST_READ_AT_ONCE = 2**16
"""Numbers up to which NumPy looks through the data sooner than a compiled function is called."""


@jax.jit
def _surely_finite(emissions: Array) -> Array:
    """False where an entry is not finite, or where a sum overflows; a matrix product reads faster than a comparison."""
    return jnp.isfinite(emissions @ jnp.ones(emissions.shape[-1], emissions.dtype)).all()


@look_once
def _may_miss(emissions: Array) -> bool:
    if not is_concrete(emissions):
        return True
    if emissions.size > LARGEST_READ_AT_ONCE:
        with jax.ensure_compile_time_eval():  # the data may be known although the caller is being traced
            if bool(_surely_finite(emissions)):
                return False
    values = np.asarray(emissions)
    if np.isfinite(values).all():
        return False
    if np.isinf(values).any():
        fail(
            "emissions",
            got="infinite entries",
            expected="finite numbers, or NaN where an entry is missing",
            remedy="Replace them, with NaN if they are missing.",
        )
    if np.isnan(values).all():
        fail(
            "emissions",
            got="nothing but NaN",
            expected="at least one observed entry",
            remedy="NaN means missing. To predict without data, use `interventional_prediction`.",
        )
    return bool(np.isnan(values).any())


def _group(emissions: Array, intervention: Intervention, may_miss: bool) -> tuple[Array, Array | None, Chunks | None]:
    """Group the trials by what their covariances depend on: clamp masks, clamp variances and missing entries.

    Values that are not known yet (under `jit`) cannot be grouped: every trial is then a pattern of its own.
    """
    num_trials = emissions.shape[0]
    decisive = [intervention.mask, intervention.variance] if intervention.mask.ndim == 3 else []
    if num_trials == 1 or not (decisive or may_miss):
        return _one_pattern(), None, None
    if not all(is_concrete(array) for array in (emissions, *decisive)):
        return jnp.arange(num_trials), None, None
    return _group_known(emissions, *decisive)


@look_once
def _group_known(emissions: Array, *decisive: Array) -> tuple[Array, Array | None, Chunks | None]:
    """Group trials by their missing entries and by their part of the arrays in `decisive`."""
    arrays = [np.asarray(array) for array in decisive]
    if _may_miss(emissions):
        arrays.append(np.isnan(np.asarray(emissions)))
    first_with: dict[bytes, int] = {}
    num_trials = emissions.shape[0]
    first = [first_with.setdefault(b"".join(array[k].tobytes() for array in arrays), k) for k in range(num_trials)]
    representatives, pattern = np.unique(first, return_inverse=True)
    if len(representatives) in (1, num_trials):
        return to_device(representatives), None, None
    return to_device(representatives), to_device(pattern), _chunk(pattern, len(representatives))


def _chunk(pattern: np.ndarray, num_patterns: int) -> Chunks:
    """Chunks of the mean number of trials of a pattern: fewer than twice as many places as trials, however uneven they are."""
    size = -(-len(pattern) // num_patterns)
    trials, patterns, place = [], [], np.zeros(len(pattern), np.int32)
    for each in range(num_patterns):
        members = np.flatnonzero(pattern == each)
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            place[chunk] = len(trials) * size + np.arange(len(chunk))
            trials.append(np.resize(chunk, size))
            patterns.append(each)
    return Chunks(*map(to_device, (np.array(trials, np.int32), np.array(patterns, np.int32), place)))
