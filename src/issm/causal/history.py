"""What came before a plan, and the one checked form in which every causal question reaches its kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from issm._check import as_float_array, fail
from issm._linalg import symmetrize
from issm.inference.dense import run_filter
from issm.inference.observations import whiten
from issm.interventions import Intervention
from issm.models.fields import TimeVarying
from issm.models.lgssm import ParamsLGSSM, ParamsLGSSMInitial, check_params
from issm.models.transitions import free_transitions, lgssm_transitions
from issm.models.trials import Plan, as_plan, as_trials


class History(eqx.Module):
    r"""The past of one or many trials: the plan's first step arrives from the last step of `emissions`.

    The state at the end of the past is $p(x_{t_0} \mid y_{0:t_0}, do(\cdot), u)$, filtered with the parameters of each
    question that is asked, draws of the parameters included.

    Attributes:
        emissions: $y_{0:t_0}$, `(num_past_steps, emission_dim)` or with a leading trial axis; NaN is a missing entry.
        inputs: Soft inputs of the past, `(num_past_steps, input_dim)`, shared or one such array for each trial; None where the
            model has none.
        interventions: Clamps of the past, shared or one for each trial. None: no clamps.

    Raises:
        ValueError: If `emissions` or `inputs` are not numbers. Shapes are checked against the model where it is used.

    References:
        `docs/concepts.md`, "Effects"; model equations in Särkkä & Svensson (2023), theorem 6.6.

    Examples:
        >>> import numpy as np, issm
        >>> issm.History(np.zeros((20, 3))).num_timesteps
        20
    """

    emissions: Float[Array, "*trials num_past_steps emission_dim"]
    inputs: Float[Array, "*trials num_past_steps input_dim"] | None
    interventions: Intervention | None

    def __init__(self, emissions: Any, inputs: Any = None, interventions: Intervention | None = None):
        self.emissions = as_float_array("emissions", emissions)
        if self.emissions.ndim not in (2, 3):
            fail(
                "emissions",
                got=f"shape {tuple(self.emissions.shape)}",
                expected="(num_past_steps, emission_dim) or (num_trials, num_past_steps, emission_dim)",
                remedy="Add the emission axis with `y[:, None]` for a single emission.",
            )
        self.inputs = None if inputs is None else as_float_array("inputs", inputs)
        self.interventions = interventions

    @property
    def num_timesteps(self) -> int:
        """Number of past steps."""
        return self.emissions.shape[-2]


class Scenario(eqx.Module):
    """A plan, what it is compared with, and what came before: checked, in the dtype of the parameters.

    Attributes:
        past: Emissions of the past, or None where the plan starts from the initial distribution.
        past_plan: Inputs and clamps of the past, or None.
        plan: Inputs over the horizon, and the plan's clamps.
        reference: Clamps of the plan that it is compared with.
    """

    past: Float[Array, "*trials num_past_steps emission_dim"] | None
    past_plan: Plan | None
    plan: Plan
    reference: Intervention

    def map(self, kernel: Callable[..., Any], *others: Any) -> Any:
        """Apply `kernel` to the scenario (and the `others`) of each trial; without any trial axis, to this one."""
        arguments = (self, *others)
        if not any(leaf.ndim == 3 for leaf in jax.tree.leaves(arguments)):
            return kernel(*arguments)
        axes = jax.tree.map(lambda leaf: 0 if leaf.ndim == 3 else None, arguments)
        return jax.vmap(kernel, in_axes=axes)(*arguments)


def as_scenario(
    params: ParamsLGSSM,
    plan: Any,
    *,
    reference: Intervention | None = None,
    history: History | None = None,
    inputs: Any = None,
) -> Scenario:
    """Check a question against the model.

    Raises:
        ValueError: If the plan is none, or its length, states or trials do not fit the model, the inputs, the reference or the
            history.
    """
    check_params(params)
    check_plan("plan", plan)
    num_timesteps = plan.num_timesteps
    if history is not None and not isinstance(history, History):
        fail(
            "history",
            got=f"a {type(history).__name__}",
            expected="a History",
            remedy="Build one from the data up to the plan: `History(emissions, inputs, interventions)`.",
        )
    num_past = 0 if history is None else history.num_timesteps
    _check_time_axis(params, num_past, num_timesteps)
    shapes = {"plan": plan.mask.shape}
    if reference is not None:
        check_plan("reference", reference)
        shapes["reference"] = reference.mask.shape
    if inputs is not None:
        shapes["inputs"] = np.shape(inputs)
    for name, shape in shapes.items():
        if len(shape) >= 2 and shape[-2] != num_timesteps:
            fail(
                name,
                got=f"{shape[-2]} steps",
                expected=f"{num_timesteps} steps, those of `plan`",
                remedy="The first step of the plan is the first after `history`; what happened before belongs to the history.",
            )
    if history is not None:
        shapes["history"] = history.emissions.shape
    num_trials = next((shape[0] for shape in shapes.values() if len(shape) == 3), None)
    if history is not None and history.emissions.ndim == 3 and history.emissions.shape[0] != num_trials:
        fail(
            "history",
            got=f"{history.emissions.shape[0]} trials",
            expected=f"{num_trials} trials, those of the plan or of the inputs",
            remedy="A history, plan or input without a trial axis is shared by all trials.",
        )
    ahead = at_steps(params, num_past, num_past + num_timesteps)
    checked = as_plan(
        ahead, inputs, plan, num_timesteps=num_timesteps, num_trials=num_trials, interventions_name="plan"
    )
    compared = as_plan(
        ahead,
        inputs,
        reference,
        num_timesteps=num_timesteps,
        num_trials=num_trials,
        interventions_name="reference",
    )
    past, past_plan = None, None
    if history is not None:
        with named("history"):
            trials = as_trials(at_steps(params, 0, num_past), history.emissions, history.inputs, history.interventions)
        past, past_plan = trials.emissions[0] if trials.one_sequence else trials.emissions, trials.plan
    return Scenario(past, past_plan, checked, compared.intervention)


def plan_params(params: ParamsLGSSM, scenario: Scenario) -> ParamsLGSSM:
    r"""The model over the horizon of one trial's plan, after the state filtered from its past."""
    if scenario.past is None or scenario.past_plan is None:
        return params
    past = at_steps(params, 0, scenario.past.shape[0])
    before = lgssm_transitions(past, scenario.past_plan.inputs, scenario.past_plan.intervention)
    seen = whiten(past, scenario.past, scenario.past_plan.inputs, may_miss=True)
    filtered = run_filter(before, seen.reduce())
    return arrive(params, scenario, filtered.means[-1], filtered.covs[-1])


def arrive(params: ParamsLGSSM, scenario: Scenario, mean: Array, cov: Array) -> ParamsLGSSM:
    r"""The model over the horizon: its initial distribution is that of the arrival in the first step.

    After a state $N(m_{t_0}, P_{t_0})$ at the end of the past this is $N(A m_{t_0} + B u + b,\ A P_{t_0} A^\top + Q)$: the
    prediction of one more step without emissions and clamps. Clamps of the first step then cut it as they cut any other arrival.
    """
    assert scenario.past is not None
    num_past, inputs = scenario.past.shape[0], scenario.plan.inputs
    two = jnp.concatenate([jnp.zeros_like(inputs[:1]), inputs[:1]])
    last = free_transitions(at_steps(params, num_past - 1, num_past + 1), two)
    arrival = ParamsLGSSMInitial(
        last.weights[1] @ mean + last.shift[1],
        symmetrize(last.weights[1] @ cov @ last.weights[1].T + last.cov[1]),
    )
    ahead = at_steps(params, num_past, num_past + inputs.shape[-2])
    return ParamsLGSSM(arrival, ahead.dynamics, ahead.emissions)


def at_steps(params: ParamsLGSSM, start: int, stop: int) -> ParamsLGSSM:
    """The parameters with their time-varying fields cut to some steps."""

    def cut(field: Array | TimeVarying) -> Array | TimeVarying:
        return TimeVarying(field.values[start:stop]) if isinstance(field, TimeVarying) else field

    return jax.tree.map(cut, params, is_leaf=lambda node: isinstance(node, TimeVarying))


def check_plan(name: str, plan: Any) -> None:
    """Refuse what is no plan."""
    if not isinstance(plan, Intervention):
        fail(
            name,
            got=f"a {type(plan).__name__}",
            expected="an Intervention",
            remedy="Build one with `do`, `stimulate` or `Intervention(mask, value)`.",
        )


def check_average(average_trials: Any, has_trials: bool, expected: str) -> None:
    """Refuse an average over trials where there are none."""
    if average_trials and not has_trials:
        fail("average_trials", got="True for a single sequence", expected=expected, remedy="Leave it out.")


def _check_time_axis(params: ParamsLGSSM, num_past: int, num_timesteps: int) -> None:
    for block in ("dynamics", "emissions"):
        for name, field in vars(getattr(params, block)).items():
            if isinstance(field, TimeVarying) and field.values.shape[0] != num_past + num_timesteps:
                fail(
                    f"params.{block}.{name}",
                    got=f"{field.values.shape[0]} steps",
                    expected=f"{num_past + num_timesteps} steps: {num_past} of the history and {num_timesteps} of the plan",
                    remedy="Give a `TimeVarying` field one entry for each step of the past and of the horizon.",
                )


@contextmanager
def named(prefix: str) -> Iterator[None]:
    """Prefix the name of the argument in an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}.{error}") from None
