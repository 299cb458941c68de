"""From the data section of a configuration to arrays."""

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from issm.cli.config import ConfigError, CsvData, NpzData, SimulatedData, Stimulation, System
from issm.interventions import Intervention
from issm.models.lgssm import ParamsLGSSM, make_lgssm_params
from issm.simulate import (
    DynamicAttractor,
    Linear,
    RotationalDynamics,
    Saddle,
    euler_sample,
    ff_integrator,
    line_attractor,
    lr_integrator,
    point_attractor,
    random_stimulation,
)


@dataclass
class Trials:
    """Emissions `(K, T, N)`, inputs `(K, T, M)`, clamps, and the states where they are known."""

    emissions: np.ndarray
    inputs: np.ndarray
    clamps: Intervention | None
    states: np.ndarray | None = None

    def take(self, trials: slice) -> "Trials":
        """Some of the trials."""
        return Trials(
            self.emissions[trials],
            self.inputs[trials],
            None if self.clamps is None else jax.tree.map(lambda leaf: leaf[trials], self.clamps),
            None if self.states is None else self.states[trials],
        )


@dataclass
class Dataset:
    """What a run works on.

    `system` and `truth` belong to simulated data: the drift, and, where it is linear, the model that made the data.
    """

    train: Trials
    test: Trials | None
    dt: float
    time: np.ndarray
    emission_names: list[str]
    input_names: list[str] = field(default_factory=list)
    system: Any = None
    truth: ParamsLGSSM | None = None


def load_data(section: SimulatedData | CsvData | NpzData, seed: int, folder: Path) -> Dataset:
    """Make or read the data; paths are relative to `folder`.

    Raises:
        ConfigError: If a file cannot be read or does not hold what the configuration says.
    """
    if isinstance(section, SimulatedData):
        return _simulate(section, seed)
    try:
        return _read_csv(section, folder) if isinstance(section, CsvData) else _read_npz(section, folder)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.path: cannot read {section.path}: {error}") from None


def _simulate(section: SimulatedData, seed: int) -> Dataset:
    keys = dict(zip(("system", "emissions", "train", "test"), jax.random.split(jax.random.key(seed), 4), strict=True))
    system = _build_system(section.system, keys["system"])
    state_dim, emission_dim = system.state_dim, section.emissions.dim
    initial = section.initial_state or [0.0] * state_dim
    if len(initial) != state_dim:
        raise ConfigError(f"data.initial_state: got {len(initial)} numbers; expected {state_dim}, one for each state.")
    weights = jax.random.normal(keys["emissions"], (emission_dim, state_dim)) / math.sqrt(state_dim)

    def draw(key: jax.Array, num_trials: int, stimulation: Stimulation) -> Trials:
        clamp_key, state_key, emission_key = jax.random.split(key, 3)
        clamps = random_stimulation(
            clamp_key, section.num_timesteps, state_dim, num_trials=num_trials, **stimulation.model_dump()
        )
        states = euler_sample(
            state_key,
            system,
            section.num_timesteps,
            dt=section.dt,
            initial_state=initial,
            noise_scale=section.noise_scale,
            interventions=clamps,
        )
        noise = jax.random.normal(emission_key, (num_trials, section.num_timesteps, emission_dim))
        emissions = states @ weights.T + section.emissions.noise_scale * noise
        no_inputs = np.zeros((*emissions.shape[:2], 0))
        return Trials(np.asarray(emissions), no_inputs, clamps, np.asarray(states))

    test = section.test
    return Dataset(
        train=draw(keys["train"], section.num_trials, section.stimulation),
        test=None if test is None else draw(keys["test"], test.num_trials, test.stimulation),
        dt=section.dt,
        time=section.dt * np.arange(section.num_timesteps),
        emission_names=[f"y{n + 1}" for n in range(emission_dim)],
        system=system,
        truth=_true_params(section, system, weights, initial),
    )


def _build_system(section: System, key: jax.Array) -> Any:
    builders = {
        "linear": Linear,
        "saddle": Saddle,
        "point_attractor": point_attractor,
        "line_attractor": line_attractor,
        "rotational_dynamics": RotationalDynamics,
        "dynamic_attractor": DynamicAttractor,
        "ff_integrator": lambda state_dim: ff_integrator(key, state_dim),
        "lr_integrator": lambda state_dim: lr_integrator(key, state_dim),
    }
    try:
        return builders[section.name](**section.model_dump(exclude={"name"}))
    except ValueError as error:
        raise ConfigError(f"data.system.{error}") from None


def _true_params(section: SimulatedData, system: Any, weights: jax.Array, initial: list[float]) -> ParamsLGSSM | None:
    """The linear Gaussian model that the data were drawn from; None if the drift is not affine."""
    state_dim = system.state_dim
    points = jax.random.normal(jax.random.key(0), (4, state_dim))
    slopes = jax.vmap(jax.jacfwd(system))(points)
    if not np.allclose(slopes, slopes[:1], atol=1e-9):
        return None
    origin = system(jnp.zeros(state_dim))
    return make_lgssm_params(
        initial_mean=initial,
        initial_cov=np.zeros(state_dim),
        dynamics_weights=np.eye(state_dim) + section.dt * np.asarray(slopes[0]),
        dynamics_cov=np.full(state_dim, section.dt * section.noise_scale**2),
        dynamics_bias=section.dt * origin,
        emissions_weights=weights,
        emissions_cov=np.full(section.emissions.dim, section.emissions.noise_scale**2),
    )


def _read_csv(section: CsvData, folder: Path) -> Dataset:
    with (folder / section.path).open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ConfigError(f"data.path: {section.path} has no rows below its header.")

    def column(place: str, name: str, empty: float | None = None) -> np.ndarray:
        if name not in rows[0]:
            raise ConfigError(f"data.{place}: got {name!r}; expected a column of {section.path}: {', '.join(rows[0])}.")
        values = np.empty(len(rows))
        for i, row in enumerate(rows):
            cell = (row[name] or "").strip()
            try:
                values[i] = empty if not cell and empty is not None else float(cell)
            except ValueError:
                raise ConfigError(
                    f"data.{place}: row {i + 2} of {section.path} has {cell!r} in {name!r}; expected a number."
                ) from None
        return values

    nan = math.nan
    emissions = np.stack([column(f"emissions[{n}]", name, nan) for n, name in enumerate(section.emissions)], axis=-1)
    time = np.arange(len(rows)) * section.dt if section.time is None else column("time", section.time)
    inputs = [
        (time >= each.step_from).astype(float)
        if each.step_from is not None
        else column(f"inputs[{m}].column", str(each.column))
        for m, each in enumerate(section.inputs)
    ]
    arrays = {"emissions": emissions, "inputs": np.stack([np.zeros(len(rows)), *inputs], axis=-1)[:, 1:], "time": time}
    if section.clamps:
        state_dim = max(clamp.state for clamp in section.clamps) + 1
        mask, value = np.zeros((len(rows), state_dim), bool), np.zeros((len(rows), state_dim))
        for i, clamp in enumerate(section.clamps):
            values = column(f"clamps[{i}].value", clamp.value, nan)
            held = ~np.isnan(values) if clamp.mask is None else column(f"clamps[{i}].mask", clamp.mask, 0.0) != 0
            mask[:, clamp.state], value[:, clamp.state] = held, np.where(held, values, 0.0)
        arrays |= {"mask": mask, "value": value}
    lengths = {len(rows)}
    if section.trial is not None:
        names = [row.get(section.trial) for row in rows]
        if section.trial not in rows[0]:
            raise ConfigError(f"data.trial: got {section.trial!r}; expected a column: {', '.join(rows[0])}.")
        groups = [[i for i, name in enumerate(names) if name == trial] for trial in dict.fromkeys(names)]
        lengths = {len(group) for group in groups}
        if len(lengths) > 1:
            raise ConfigError(
                f"data.trial: got trials of {sorted(lengths)} rows; expected equal lengths. Pad with empty rows."
            )
        arrays = {name: array[np.array(groups)] for name, array in arrays.items()}
    else:
        arrays = {name: array[None] for name, array in arrays.items()}
    return _dataset(section, arrays, arrays["time"][0], list(section.emissions), [each.name for each in section.inputs])


def _read_npz(section: NpzData, folder: Path) -> Dataset:
    try:
        with np.load(folder / section.path, allow_pickle=False) as archive:
            found = dict(archive)
    except (ValueError, AttributeError, TypeError):
        raise ConfigError(f"data.path: {section.path} is not a NumPy archive of plain arrays.") from None
    arrays = {}
    for name in ("emissions", "inputs", "mask", "value"):
        key = getattr(section, name)
        if key is None:
            continue
        if key not in found:
            raise ConfigError(f"data.{name}: got {key!r}; expected an array of {section.path}: {', '.join(found)}.")
        array = found[key]
        if array.ndim not in (2, 3):
            raise ConfigError(
                f"data.{name}: {key!r} has shape {array.shape}; expected (num_timesteps, dim) or (num_trials, num_timesteps, dim)."
            )
        arrays[name] = array
    arrays["emissions"] = np.atleast_3d(
        arrays["emissions"][None] if arrays["emissions"].ndim == 2 else arrays["emissions"]
    )
    num_trials, num_timesteps, emission_dim = arrays["emissions"].shape
    for name, array in arrays.items():
        if array.shape[:-1] not in ((num_timesteps,), (num_trials, num_timesteps)):
            raise ConfigError(
                f"data.{name}: got shape {array.shape}; expected the trials and steps of the emissions,"
                f" ({num_trials}, {num_timesteps}, dim) or ({num_timesteps}, dim)."
            )
        arrays[name] = np.broadcast_to(array, (num_trials, num_timesteps, array.shape[-1]))
    arrays.setdefault("inputs", np.zeros((num_trials, num_timesteps, 0)))
    input_names = [f"u{m + 1}" for m in range(arrays["inputs"].shape[-1])]
    names = [f"y{n + 1}" for n in range(emission_dim)]
    return _dataset(section, arrays, section.dt * np.arange(num_timesteps), names, input_names)


def _dataset(
    section: CsvData | NpzData, arrays: dict, time: np.ndarray, emission_names: list[str], input_names: list[str]
) -> Dataset:
    clamps = None
    if "mask" in arrays:
        try:
            clamps = Intervention(arrays["mask"], arrays["value"])
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None
    trials = Trials(np.asarray(arrays["emissions"], float), np.asarray(arrays["inputs"], float), clamps)
    num_trials = len(trials.emissions)
    num_test = 0 if section.test is None else section.test.num_trials
    if num_test >= num_trials:
        raise ConfigError(
            f"data.test.num_trials: got {num_test}; expected fewer than the {num_trials} trials of the data."
        )
    return Dataset(
        train=trials.take(slice(0, num_trials - num_test)),
        test=trials.take(slice(num_trials - num_test, None)) if num_test else None,
        dt=section.dt,
        time=time,
        emission_names=emission_names,
        input_names=input_names,
    )
