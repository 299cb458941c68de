"""One run: data, fits, their numbers, and the files that keep them."""

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import issm
from issm import metrics
from issm.causal.stimulation import roll_out
from issm.cli.config import Config, ConfigError, ModelSection
from issm.cli.data import Dataset, Trials, load_data
from issm.cli.errors import Coefficient, standard_errors
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM, make_lgssm_params

REQUIRED = ("initial_mean", "initial_cov", "dynamics_weights", "dynamics_cov", "emissions_weights", "emissions_cov")
FIELDS = (*REQUIRED, "dynamics_bias", "dynamics_input_weights", "emissions_bias", "emissions_input_weights")


@dataclass
class Rollout:
    """Predictions of the test trials after their history, `(num_trials, num_timesteps, emission_dim)`."""

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    r2: float
    coverage: float


@dataclass
class Fitted:
    """One fitted model and what is known of it."""

    section: ModelSection
    params: ParamsLGSSM
    log_likelihood: float
    log_probs: np.ndarray
    reason: str
    num_iters: int
    seconds: float
    smoothed_means: np.ndarray
    smoothed_covariances: np.ndarray
    coefficients: list[Coefficient] = field(default_factory=list)
    rollout: Rollout | None = None
    aligned: tuple[np.ndarray, np.ndarray] | None = None  # drift matrix and offset in the coordinates of the truth
    error: float = math.nan
    error_aligned: float = math.nan


@dataclass
class Result:
    """Everything that a report needs."""

    config: Config
    dataset: Dataset
    models: list[Fitted]
    truth_rollout: Rollout | None
    seconds: float


def execute(config: Config, folder: Path, *, progress: bool) -> Result:
    """Run a configuration whose paths are relative to `folder`.

    Raises:
        ConfigError: If the data are not what the configuration says, or a model does not fit them.
    """
    started = time.perf_counter()
    _say(progress, f"data: {config.data.kind}")
    dataset = load_data(config.data, config.seed, folder)
    fitted = []
    for i, section in enumerate(config.models):
        _say(progress, f"model {i + 1} of {len(config.models)}: {section.name}")
        try:
            fitted.append(_fit(section, dataset, jax.random.key(config.seed + 1 + i), progress))
        except ValueError as error:
            raise ConfigError(f"models[{i}] ({section.name}): {error}") from None
    truth_rollout = None
    if dataset.test is not None:
        _say(progress, "test trials")
        history = config.data.test.history if config.data.test else 0
        num_timesteps = dataset.test.emissions.shape[1]
        if history >= num_timesteps:
            raise ConfigError(
                f"data.test.history: got {history}; expected fewer than the {num_timesteps} steps of a trial."
            )
        for each in fitted:
            clamps, inputs = stimulate_model(each.section, dataset, dataset.test)
            each.rollout = _roll_out(each.params, dataset.test.emissions, clamps, inputs, history)
        if dataset.truth is not None:
            truth_rollout = _roll_out(dataset.truth, dataset.test.emissions, dataset.test.clamps, None, history)
    return Result(config, dataset, fitted, truth_rollout, time.perf_counter() - started)


def fields_of(params: ParamsLGSSM) -> dict[str, np.ndarray]:
    """The parameters under the names of the configuration."""
    blocks = {"initial": params.initial, "dynamics": params.dynamics, "emissions": params.emissions}
    return {name: np.asarray(getattr(blocks[name.split("_")[0]], name.split("_", 1)[1])) for name in FIELDS}


def _fit(section: ModelSection, dataset: Dataset, key: jax.Array, progress: bool) -> Fitted:
    started = time.perf_counter()
    train = dataset.train
    clamps, inputs = stimulate_model(section, dataset, train)
    start = _start(section, train.emissions, clamps, inputs, key)
    free = _trainable(section, start)
    if section.fit.method == "none":
        params, reason, num_iters = start, "evaluated as given", 0
        log_probs = np.asarray(issm.marginal_log_prob(start, train.emissions, inputs, interventions=clamps).sum())[None]
    else:
        options: dict[str, Any] = dict(num_iters=section.fit.num_iters, tol=section.fit.tol, progress=progress)
        fit = issm.fit_em(start, train.emissions, inputs, interventions=clamps, trainable=free, **options)
        reason = str(fit.reason)
        if section.fit.zero_variances:
            fit, reason = _zero_variances(fit, reason, train.emissions, inputs, clamps, free, options)
        params, num_iters, log_probs = fit.params, int(fit.num_iters), np.asarray(fit.log_probs)
    posterior = issm.lgssm_smoother(params, train.emissions, inputs, interventions=clamps)
    fitted = Fitted(
        section=section,
        params=params,
        log_likelihood=float(log_probs[-1]),
        log_probs=log_probs,
        reason=reason,
        num_iters=num_iters,
        seconds=0.0,
        smoothed_means=np.asarray(posterior.smoothed_means),
        smoothed_covariances=np.asarray(posterior.smoothed_covariances),
    )
    if section.standard_errors:
        names = {"inputs": _input_names(section, dataset), "emissions": dataset.emission_names}
        fitted.coefficients = standard_errors(params, free, train.emissions, inputs, clamps, names)
    if dataset.truth is not None and train.states is not None and dataset.truth.state_dim == params.state_dim:
        _align(fitted, dataset)
    fitted.seconds = time.perf_counter() - started
    return fitted


def stimulate_model(
    section: ModelSection, dataset: Dataset, trials: Trials
) -> tuple[Intervention | None, np.ndarray | None]:
    """The clamps and the inputs that a model is given."""
    columns = [dataset.input_names.index(name) for name in _chosen_inputs(section, dataset)]
    inputs, clamps = trials.inputs[..., columns], trials.clamps
    if clamps is not None:
        seen = issm.stimulation_as(section.stimulation, clamps, inputs)
        inputs, clamps = np.asarray(seen["inputs"]), seen["interventions"]
    if clamps is not None:
        missing = section.state_dim - clamps.state_dim
        if missing < 0:
            raise ValueError(
                f"state_dim: got {section.state_dim}; expected at least the {clamps.state_dim} states that are clamped."
            )
        wider = ((0, 0), (0, 0), (0, missing))
        clamps = jax.tree.map(lambda leaf: jnp.pad(leaf, wider), clamps)
    return clamps, inputs if inputs.shape[-1] else None


def _chosen_inputs(section: ModelSection, dataset: Dataset) -> list[str]:
    chosen = dataset.input_names if section.inputs is None else section.inputs
    unknown = [name for name in chosen if name not in dataset.input_names]
    if unknown:
        raise ValueError(f"inputs: got {unknown}; expected names among {dataset.input_names}.")
    return chosen


def _input_names(section: ModelSection, dataset: Dataset) -> list[str]:
    stimuli = (
        dataset.train.clamps.state_dim if section.stimulation == "inputs" and dataset.train.clamps is not None else 0
    )
    return [*_chosen_inputs(section, dataset), *(f"stimulus {i + 1}" for i in range(stimuli))]


def _start(
    section: ModelSection, emissions: np.ndarray, clamps: Intervention | None, inputs: np.ndarray | None, key: jax.Array
) -> ParamsLGSSM:
    """What the file gives, over a start from the data where it does not give all."""
    given: dict[str, Any] = {name: np.asarray(value, float) for name, value in section.start.items()}
    input_dim = 0 if inputs is None else inputs.shape[-1]
    for name, rows in (("dynamics_input_weights", section.state_dim), ("emissions_input_weights", emissions.shape[-1])):
        given.setdefault(name, np.zeros((rows, input_dim)))
        if given[name].shape != (rows, input_dim):
            raise ValueError(f"start.{name}: got shape {given[name].shape}; expected {(rows, input_dim)}.")
    if not all(name in given for name in REQUIRED):
        found = issm.initialize_lgssm(key, emissions, section.state_dim, inputs=inputs, interventions=clamps).params
        given = fields_of(found) | {name: given[name] for name in section.start}
    try:
        start = make_lgssm_params(**given)
    except ValueError as error:
        raise ValueError(f"start.{error}") from None
    if start.state_dim != section.state_dim:
        raise ValueError(f"start.initial_mean: got {start.state_dim} states; expected state_dim = {section.state_dim}.")
    return start


def _trainable(section: ModelSection, params: ParamsLGSSM) -> ParamsLGSSM:
    everything = section.trainable is None
    free = jax.tree.map(lambda _: everything, params)
    for name in section.trainable or []:
        block, attribute = name.split("_", 1)
        free = eqx.tree_at(lambda tree, b=block, a=attribute: getattr(getattr(tree, b), a), free, True)
    return free


def _zero_variances(
    fit: Any, reason: str, emissions: Any, inputs: Any, clamps: Any, free: ParamsLGSSM, options: dict
) -> tuple[Any, str]:
    """Set process variances to zero where the likelihood is highest there, which EM would approach only as 1 / iterations."""
    cov = fit.params.dynamics.cov
    if cov.ndim != 1 or not free.dynamics.cov:
        return fit, reason
    for i in range(len(cov)):
        at_zero = eqx.tree_at(lambda p, i=i: p.dynamics.cov, fit.params, fit.params.dynamics.cov.at[i].set(0.0))
        other = issm.fit_em(at_zero, emissions, inputs, interventions=clamps, trainable=free, **options)
        slope = jax.grad(lambda p: issm.marginal_log_prob(p, emissions, inputs, interventions=clamps).sum())(
            other.params
        )
        if float(other.log_probs[-1]) > float(fit.log_probs[-1]) and float(slope.dynamics.cov[i]) <= 0:
            reason = f"{other.reason}; process variance {i} is at its boundary, zero, where the likelihood is highest"
            log_probs = jnp.concatenate([fit.log_probs, other.log_probs])
            num_iters = int(fit.num_iters) + int(other.num_iters)
            fit = eqx.tree_at(lambda f: (f.log_probs, f.num_iters), other, (log_probs, num_iters))
    return fit, reason


def _roll_out(
    params: ParamsLGSSM, emissions: np.ndarray, clamps: Intervention | None, inputs: np.ndarray | None, history: int
) -> Rollout:
    """Predict everything after the first steps of each trial from the stimulation alone."""
    prediction = roll_out(params, jnp.asarray(emissions), inputs, clamps, history)
    mean = np.asarray(prediction.emissions.mean)
    lower, upper = (np.asarray(end) for end in prediction.emissions.interval(0.95))
    truth = emissions[:, history:]
    seen = ~np.isnan(truth)
    inside = (truth >= lower) & (truth <= upper)
    return Rollout(mean, lower, upper, float(metrics.r2(truth, mean)), float(inside[seen].mean()))


def _align(fitted: Fitted, dataset: Dataset) -> None:
    """Errors of the drift matrix (A - I) / dt, as fitted and in the affine coordinates that explain the true states best."""
    train, truth, dt = dataset.train, dataset.truth, dataset.dt
    if truth is None or train.states is None:
        return
    eye = np.eye(truth.state_dim)
    drift = (np.asarray(fitted.params.dynamics.weights) - eye) / dt
    true_drift = (np.asarray(truth.dynamics.weights) - eye) / dt
    found = fitted.smoothed_means.reshape(-1, truth.state_dim)
    columns = np.column_stack([found, np.ones(len(found))])
    solution, *_ = np.linalg.lstsq(columns, train.states.reshape(len(found), -1), rcond=None)
    turn, shift = solution[:-1].T, solution[-1]  # true state = turn @ found + shift
    aligned = turn @ drift @ np.linalg.pinv(turn)
    offset = turn @ np.asarray(fitted.params.dynamics.bias) / dt - aligned @ shift
    fitted.error = float(metrics.relative_error(drift, true_drift))
    fitted.error_aligned = float(metrics.relative_error(aligned, true_drift))
    fitted.aligned = (aligned, offset)


def _say(progress: bool, text: str) -> None:
    if progress:
        print(f"issm: {text}", file=sys.stderr, flush=True)
