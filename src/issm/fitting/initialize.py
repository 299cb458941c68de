"""A start for the fitters, from the data: several guesses that use the clamps, a few updates each, the best one kept."""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from issm._check import check_key
from issm._host import to_device
from issm._types import PRNGKey
from issm.fitting.em import improve
from issm.fitting.redrawn import redrawn_start
from issm.fitting.start_data import StartData
from issm.fitting.starts import component_states, forward_states, history_states, regress, subspace_states
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM

NUM_UPDATES = 5
EXPLOSIVE = 1.1
STARTS = {
    "subspace": subspace_states,
    "forward": forward_states,
    "history": history_states,
}


class Initialization(eqx.Module):
    r"""Parameters to start a fitter from, and where they come from.

    Attributes:
        params: The parameters, with diagonal covariances.
        start: Name of the start that they come from, one of `starts`.
        starts: Names of the starts that were tried.
        log_probs: $\log p(y \mid do(\cdot), u)$ that each of them reached; NaN or infinite where it failed, `(num_starts,)`.
        never_clamped: States with fewer than two clamped steps: their coordinates are principal directions, `(state_dim,)`.
        one_level: States that are clamped to one value only: their scale rests on how clamped steps differ from others,
            `(state_dim,)`.
        remarks: What the data do not decide, in words.

    References:
        `docs/how-to/starting-a-fit.md`.

    Examples:
        >>> import jax, numpy as np, issm
        >>> start = issm.initialize_lgssm(jax.random.key(0), np.sin(np.arange(60.0))[:, None], state_dim=1)
        >>> start.start in start.starts, start.never_clamped.tolist()
        (True, [True])
    """

    params: ParamsLGSSM
    start: str = eqx.field(static=True)
    starts: tuple[str, ...] = eqx.field(static=True)
    log_probs: Float[Array, " num_starts"]
    never_clamped: Bool[Array, " state_dim"]
    one_level: Bool[Array, " state_dim"]
    remarks: tuple[str, ...] = eqx.field(static=True)

    @property
    def reason(self) -> str:
        """Which start won, what the others reached, and what the data do not decide."""
        reached = [f"{name} {float(value):.6g}" for name, value in zip(self.starts, self.log_probs, strict=True)]
        return "; ".join([f"start {self.start}: log-likelihoods {', '.join(reached)}", *self.remarks])


def initialize_lgssm(
    key: PRNGKey,
    emissions: Any,
    state_dim: int,
    *,
    inputs: Any = None,
    interventions: Intervention | None = None,
) -> Initialization:
    r"""Parameters to start a fitter from: several guesses, five updates of EM each, the largest likelihood kept.

    Every guess first takes states as linear functionals of the emissions. A state that is clamped at some time is the
    functional that predicts its known value, rescaled to slope one; states that are never clamped get the principal
    directions that remain, with a fixed sign. The guesses differ in what the functionals may see:

    - "subspace": the directions of $y_t$ that the steps around it and the clamps predict (canonical correlation);
    - "forward": $y_t$ regressed on the clamp values, given the recent past, which gives the columns of C of clamped states;
    - "history": the directions of $y_t, y_{t-1}, ...$ that the future predicts, for fewer emissions than states;
    - "components": the principal components of $y_t$, where nothing else can be had.

    Regressions then give C, D, d, R from all steps and each row of A, B, b, Q from the arrivals in which it was not clamped. A is
    shrunk to a spectral radius of at most 0.98, and updates that take it beyond 1.1 are not made. "history" is tried with fewer
    than twice as many emissions as states, and "components" where all others fail. From the best of these one more is made,
    which decides where clamps are rare:

    - "redrawn": the model in which clamped steps redraw all states is fitted, which learns from the steps that nobody touched,
      and clamped states are regressed in its coordinates, by their known values and with errors in the estimated states. It
      is not tried with too few untouched steps, or if a state is clamped to one value only.

    The start follows a change of units: emissions $c y + k$ give C, d and R in the new units and the same dynamics.

    Args:
        key: JAX random key; it only serves directions in which the data do not vary.
        emissions: $y_t$, `(num_timesteps, emission_dim)` or `(num_trials, num_timesteps, emission_dim)`; NaN is missing.
        state_dim: Number of states D.
        inputs: Soft inputs, `(num_timesteps, input_dim)`, shared or one such array for each trial.
        interventions: Clamps, shared or one for each trial.

    Returns:
        The parameters in the dtype of the emissions, the name of the start that won, and what the data do not decide.

    Raises:
        ValueError: If an argument has the wrong shape, type or values, if there are fewer observed steps than `state_dim + 1`, or
            if the data are traced by JAX: a start is made before compilation.

    References:
        Van Overschee & De Moor (1996), *Subspace Identification for Linear Systems*, ch. 3; Katayama (2005), *Subspace Methods
        for System Identification*, ch. 8 (canonical correlations); Fuller (1987), *Measurement Error Models*, sec. 2.3.

    Examples:
        >>> import jax, issm
        >>> truth = issm.make_lgssm_params([0.0], [1.0], [[0.9]], [0.1], [[1.0], [2.0]], [0.5, 0.5])
        >>> _, emissions = issm.lgssm_sample(jax.random.key(0), truth, 100)
        >>> start = issm.initialize_lgssm(jax.random.key(1), emissions, state_dim=1)
        >>> fit = issm.fit_em(start.params, emissions)
        >>> bool(fit.log_probs[0] >= start.log_probs.max() - 1e-3)
        True
    """
    check_key(key)
    data = StartData(emissions, state_dim, inputs, interventions)
    names = ["subspace"]
    if data.clamped.any():
        names.append("forward")
    if data.values.shape[2] < 2 * state_dim and data.values.shape[1] > 1:
        names.append("history")
    rng = np.random.default_rng(np.asarray(jax.random.randint(key, (4,), 0, 2**31 - 1)))
    tried = {name: _improve(regress(data, STARTS[name](data, rng)), data) for name in names}
    if not any(np.isfinite(log_prob) for _, log_prob in tried.values()):
        tried["components"] = _improve(regress(data, component_states(data, rng)), data)
    if data.clamped.any():
        guess = redrawn_start(data, tried[_best(tried)][0])
        if guess is not None:
            tried["redrawn"] = _improve(guess, data)
    best = _best(tried)
    failed = [name for name, (_, log_prob) in tried.items() if not np.isfinite(log_prob)]
    levels = [np.unique(data.value[..., i][data.mask[..., i] & data.alive]).size for i in range(state_dim)]
    one_level = data.clamped & (np.array(levels) == 1)
    return Initialization(
        params=tried[best][0],
        start=best,
        starts=tuple(tried),
        log_probs=to_device([log_prob for _, log_prob in tried.values()], data.dtype),
        never_clamped=to_device(~data.clamped),
        one_level=to_device(one_level),
        remarks=_remarks(data, one_level, failed),
    )


def _improve(guess: ParamsLGSSM, data: StartData) -> tuple[ParamsLGSSM, float]:
    fit = improve(guess, data.trials, NUM_UPDATES)
    if (
        np.abs(np.linalg.eigvals(fit.params.dynamics.weights)).max() > EXPLOSIVE
    ):  # little data: let no fitter start there
        return guess, float(np.asarray(fit.log_probs)[0])
    return fit.params, float(np.asarray(fit.log_probs)[-1])


def _best(tried: dict[str, tuple[ParamsLGSSM, float]]) -> str:
    return max(tried, key=lambda name: tried[name][1] if np.isfinite(tried[name][1]) else -np.inf)


def _remarks(data: StartData, one_level: np.ndarray, failed: list[str]) -> tuple[str, ...]:
    numbers = lambda flags: ", ".join(str(i) for i in np.flatnonzero(flags))  # noqa: E731
    said = []
    if failed:
        said.append(f"no finite likelihood from the start {', '.join(failed)}")
    if data.clamped.any() and not data.clamped.all():
        said.append(f"state {numbers(~data.clamped)} is never clamped: its coordinate is a principal direction")
    if not data.clamped.any():
        said.append("no state is clamped: coordinates are principal directions")
    if one_level.any():
        said.append(f"state {numbers(one_level)} is clamped to one value only: its scale is weakly determined")
    unseen = ~data.observed.any(axis=(0, 1))
    if unseen.any():
        said.append(f"emission {numbers(unseen)} is never observed")
    still = data.inputs.std(axis=(0, 1)) == 0
    if still.any():
        said.append(f"input {numbers(still)} never changes: its effect cannot be told from a constant")
    num_timesteps, emission_dim = data.values.shape[1:]
    if data.state_dim > emission_dim * num_timesteps:
        said.append(f"{data.state_dim} states exceed the {emission_dim * num_timesteps} numbers of a trial")
    numbers_seen, rows = int(data.observed.sum()), data.state_dim + emission_dim
    free = rows * (data.state_dim + data.inputs.shape[2] + 2)
    if numbers_seen < free:
        said.append(f"{numbers_seen} observed numbers are fewer than the {free} parameters of dynamics and emissions")
    if emission_dim < data.state_dim:
        said.append("fewer emissions than states: a local optimum is likely, try `multi_start`")
    return tuple(said)
