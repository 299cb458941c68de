"""What a configuration file may say, and readable complaints about one that says something else."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from issm.cli.complaints import complaint

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Matrix = list[list[Number]]
FieldName = Literal[
    "initial_mean",
    "initial_cov",
    "dynamics_weights",
    "dynamics_bias",
    "dynamics_input_weights",
    "dynamics_cov",
    "emissions_weights",
    "emissions_bias",
    "emissions_input_weights",
    "emissions_cov",
]


class ConfigError(Exception):
    """A configuration or a data file that cannot be used; the message is for the user."""


class Section(BaseModel):
    """A section of the file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearSystem(Section):
    """f(x) = (rates - I) x + bias."""

    name: Literal["linear"]
    rates: Matrix
    bias: list[Number] | None = None


class SaddleSystem(Section):
    """A saddle between two stable points."""

    name: Literal["saddle"]
    a: Number = -0.6
    b: Number = 2.0
    c: Number = -1.0
    coherence: Number = 0.0


class PointAttractorSystem(Section):
    """Two independent decays."""

    name: Literal["point_attractor"]
    a1: Number = 1.0
    a2: Number = 1.0


class LineAttractorSystem(Section):
    """A line of fixed points."""

    name: Literal["line_attractor"]
    right: tuple[Number, Number] = (1.0, 0.0)
    left: tuple[Number, Number] = (0.0, 1.0)
    decay: Number = -1.0


class IntegratorSystem(Section):
    """Feedforward or low-rank integrator in random coordinates."""

    name: Literal["ff_integrator", "lr_integrator"]
    state_dim: Count


class RotationalSystem(Section):
    """A radius that stays and an angle that turns."""

    name: Literal["rotational_dynamics"]
    a: Number = 1.2


class DynamicAttractorSystem(Section):
    """A ring that attracts."""

    name: Literal["dynamic_attractor"]
    a1: Number = -20.0
    a2: Number = 1.2


System = Annotated[
    LinearSystem
    | SaddleSystem
    | PointAttractorSystem
    | LineAttractorSystem
    | IntegratorSystem
    | RotationalSystem
    | DynamicAttractorSystem,
    Field(discriminator="name"),
]


class Stimulation(Section):
    """Random pulses on every state, as in `issm.simulate.random_stimulation`; spans are in steps."""

    duration: tuple[Count, Count]
    gap: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]
    amplitude: Positive = 1.0
    distribution: Literal["normal", "uniform", "sign"] = "normal"
    one_at_a_time: bool = False

    @model_validator(mode="after")
    def _spans_are_ordered(self) -> "Stimulation":
        for name in ("duration", "gap"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"`{name}` must be [smallest, largest]")
        return self


class SimulatedEmissions(Section):
    """Random linear emissions of the states with white noise."""

    dim: Count
    noise_scale: Positive


class TestTrials(Section):
    """Trials that no model sees: after the first `history` steps they are predicted from their stimulation alone."""

    num_trials: Count
    history: Count = 10


class SimulatedTestTrials(TestTrials):
    """Test trials with a stimulation of their own."""

    stimulation: Stimulation


class SimulatedData(Section):
    """Draws from a system with known dynamics."""

    kind: Literal["simulated"]
    system: System
    dt: Positive
    num_trials: Count
    num_timesteps: Count
    initial_state: list[Number] | None = None
    noise_scale: NonNegative = 0.0
    stimulation: Stimulation
    emissions: SimulatedEmissions
    test: SimulatedTestTrials | None = None


class InputColumn(Section):
    """A soft input: a column, or a step that is 0 before a time and 1 from then on."""

    name: str
    column: str | None = None
    step_from: Number | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> "InputColumn":
        if (self.column is None) == (self.step_from is None):
            raise ValueError("needs either `column` or `step_from`")
        return self


class ClampColumn(Section):
    """A clamp on one state: the column of its values, where an empty cell leaves the state free unless `mask` names a column."""

    state: Annotated[int, Field(ge=0)]
    value: str
    mask: str | None = None


class CsvData(Section):
    """A table with a header and one row for each step; an empty emission is missing."""

    kind: Literal["csv"]
    path: Path
    emissions: Annotated[list[str], Field(min_length=1)]
    time: str | None = None
    trial: str | None = None
    inputs: list[InputColumn] = []
    clamps: list[ClampColumn] = []
    dt: Positive = 1.0
    test: TestTrials | None = None

    @model_validator(mode="after")
    def _steps_need_a_time(self) -> "CsvData":
        if self.time is None and any(each.step_from is not None for each in self.inputs):
            raise ValueError("an input with `step_from` needs `time`, the column that it is compared with")
        return self


class NpzData(Section):
    """A NumPy archive: the names of its arrays."""

    kind: Literal["npz"]
    path: Path
    emissions: str = "emissions"
    inputs: str | None = None
    mask: str | None = None
    value: str | None = None
    dt: Positive = 1.0
    test: TestTrials | None = None

    @model_validator(mode="after")
    def _clamps_are_whole(self) -> "NpzData":
        if (self.mask is None) != (self.value is None):
            raise ValueError("`mask` and `value` go together: both or neither")
        return self


class Fit(Section):
    """How to fit; "none" evaluates the starting parameters as they are."""

    method: Literal["em", "none"] = "em"
    num_iters: Count = 200
    tol: NonNegative = 1e-7
    zero_variances: bool = False


class ModelSection(Section):
    """One model to fit; without `inputs` it sees all of the data's, without `trainable` all of it is fitted."""

    name: Annotated[str, Field(min_length=1)]
    state_dim: Count
    stimulation: Literal["clamps", "inputs", "ignored"] = "clamps"
    inputs: list[str] | None = None
    start: dict[FieldName, list[Number] | Matrix] = {}
    trainable: list[FieldName] | None = None
    fit: Fit = Fit()
    standard_errors: bool = False


class KnownAnswer(Section):
    """A published number to print beside ours."""

    model: str
    quantity: str
    value: Number
    tolerance: Positive | None = None
    source: str


class Labels(Section):
    """Axis labels, with units."""

    time: str = "time (steps)"
    emissions: str = "emission"


class Config(Section):
    """A whole file."""

    title: str
    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    data: Annotated[SimulatedData | CsvData | NpzData, Field(discriminator="kind")]
    models: Annotated[list[ModelSection], Field(min_length=1)]
    known_answers: list[KnownAnswer] = []
    labels: Labels = Labels()

    @model_validator(mode="after")
    def _names_fit(self) -> "Config":
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"`models` must have different names, not {names}")
        for answer in self.known_answers:
            if answer.model not in names:
                raise ValueError(f"`known_answers` names the model {answer.model!r}; there are {names}")
        return self


def read_config(path: Path) -> Config:
    """Read and validate a file.

    Raises:
        ConfigError: If it cannot be read or says anything that is not understood; the message names every place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        found = list(dict.fromkeys(complaint(each, Config, raw) for each in error.errors(include_url=False)))
        count = f"{len(found)} error{'s' * (len(found) > 1)}"
        raise ConfigError("\n  ".join([f"{path}: {count}", *found])) from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Build a dict from a node, once it has been seen that its keys differ."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`, whose keys may be given again
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
