"""Bad causal questions: each is refused with a named error, before anything is compiled (see `test_bad_input.py`)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import issm
from issm import History, TimeVarying
from test_bad_input import as_a_user  # noqa: F401 (an autouse fixture)

SIZES = dict(num_timesteps=4, state_dim=2)
MODEL = dict(initial_mean=[0.0, 0.0], initial_cov=[1.0, 1.0], dynamics_weights=np.eye(2) * 0.5, dynamics_cov=[0.1, 0.1],
             emissions_weights=np.ones((3, 2)), emissions_cov=np.ones(3))  # fmt: skip
PARAMS = issm.make_lgssm_params(**MODEL)
DRIVEN = issm.make_lgssm_params(**MODEL, dynamics_input_weights=np.ones((2, 1)))
VARYING = issm.make_lgssm_params(**MODEL | {"dynamics_weights": TimeVarying(np.stack([np.eye(2)] * 4))})
PLAN = issm.do({0: 1.0}, **SIZES)
LONGER = issm.do({0: 1.0}, num_timesteps=5, state_dim=2)
ELSEWHERE = issm.do({2: 1.0}, num_timesteps=4, state_dim=3)
TRIALS = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), PLAN)
NUM_PARAMETERS = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
DRAWS = jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), PARAMS)
Y = np.zeros((3, 3))
SUPPORT = issm.identifiability(PLAN)


def predict(*arguments, **options):
    """The same call to every function that takes a plan."""
    return [lambda f=f: f(*arguments, **options) for f in (issm.interventional_prediction, issm.causal_effect)]


def effect(**options):
    return lambda: issm.causal_effect(PARAMS, PLAN, **options)


def would_be(*arguments, **options):
    """The same call to both functions that take a trial and a plan that might have been."""
    functions = (issm.counterfactual, issm.counterfactual_effect)
    return [lambda f=f: f(PARAMS, *arguments, **options) for f in functions]


def changed(**options):
    return lambda: issm.counterfactual_effect(PARAMS, np.zeros((4, 3)), PLAN, **options)


def pulse(params=PARAMS, num_steps=3, **options):
    return lambda: issm.impulse_response(params, num_steps, **{"source": 0} | options)


def hold(params=PARAMS, **options):
    """The same call to both functions that hold a state."""
    direct = dict(source=0, mediators=[1]) | options
    return [lambda: issm.total_effects(params, **options), lambda: issm.controlled_direct_effect(params, **direct)]


def mediated(**options):
    return lambda: issm.controlled_direct_effect(PARAMS, **{"source": 0, "mediators": []} | options)


def held_out(models=None, **options):
    given = dict(key=jax.random.key(0), emissions=np.zeros((2, 4, 3)), interventions=PLAN)
    models = {"m": (PARAMS, "clamps")} if models is None else models
    return lambda: issm.compare(models=models, **given | options)


def clamp_test(**options):
    trials = dict(
        interventions=PLAN, test_emissions=np.zeros((2, 4, 3)), test_interventions=PLAN, fit=lambda *_: PARAMS
    )
    return lambda: issm.check_clamps(jax.random.key(0), emissions=np.zeros((2, 4, 3)), **trials | options)


def design(**options):
    return lambda: issm.design_interventions(PARAMS, **{"candidates": [PLAN], "budget": 1} | options)


def seen(**options):
    return lambda: issm.observed_effect(PARAMS, np.zeros((4, 3)), **{"start": 2} | options)


def placebo(**options):
    return lambda: issm.placebo_effects(lambda *_: PARAMS, Y, num_timesteps=2, **options)


CALLS = {
    "draws for parameters": (predict(DRAWS, PLAN), "params.initial.mean", "(5, 2)"),
    "parameters that are none": (predict(MODEL, PLAN), "params", "a dict"),
    "a plan that is an array": (predict(PARAMS, np.ones((4, 2))), "plan", "a ndarray"),
    "no plan": (predict(PARAMS, None), "plan", "NoneType"),
    "a plan of another model": (predict(PARAMS, ELSEWHERE), "plan", "(4, 3)"),
    "a plan on a state that does not exist": (lambda: issm.do({2: 1.0}, **SIZES), "clamps", "state 2"),
    "conflicting clamps": (lambda: issm.merge(PLAN, issm.do({0: 2.0}, **SIZES)), "a, b", "state 0 at step 0"),
    "a plan longer than the inputs": (predict(DRIVEN, PLAN, inputs=np.zeros((3, 1))), "inputs", "3 steps"),
    "inputs of a model without": (predict(PARAMS, PLAN, inputs=np.zeros((4, 1))), "inputs", "(4, 1)"),
    "no inputs": (predict(DRIVEN, PLAN), "inputs", "None"),
    "inputs that are NaN": (predict(DRIVEN, PLAN, inputs=np.full((4, 1), np.nan)), "inputs", "NaN"),
    "a history that is an array": (predict(PARAMS, PLAN, history=Y), "history", "a ndarray"),
    "a history without axes": (lambda: History(np.zeros(4)), "emissions", "(4,)"),
    "a history of another model": (predict(PARAMS, PLAN, history=History(Y[:, :2])), "history.emissions", "(3, 2)"),
    "a history that ends after the plan starts": (
        predict(PARAMS, PLAN, history=History(Y, None, PLAN)), "history.interventions", "(4, 2)"),
    "a history without data": (predict(PARAMS, PLAN, history=History(Y * np.nan)), "history.emissions", "NaN"),
    "a history without inputs": (
        predict(DRIVEN, PLAN, history=History(Y), inputs=np.zeros((4, 1))), "history.inputs", "None"),
    "two numbers of trials": (predict(PARAMS, TRIALS, history=History(Y[None])), "history", "1 trials"),
    "fields that end before the plan": (predict(VARYING, LONGER), "params.dynamics.weights", "4 steps"),
    "fields that do not reach back": (
        predict(VARYING, PLAN, history=History(Y)), "params.dynamics.weights", "7 steps: 3 of the history"),
    "a reference that is an array": (effect(reference=np.ones((4, 2))), "reference", "a ndarray"),
    "a reference of another length": (effect(reference=LONGER), "reference", "5 steps"),
    "a reference of another model": (effect(reference=ELSEWHERE), "reference", "(4, 3)"),
    "an effect on something else": (effect(of="firing rates"), "of", "firing rates"),
    "an effect on an array": (effect(of=np.ones((1, 3))), "of", "array"),
    "a read-out of another model": (effect(of=issm.Readout(np.ones((1, 2)))), "of", "2 emissions"),
    "a read-out of other states": (effect(of=issm.Readout(np.ones((1, 3)), "states")), "of", "3 states"),
    "a read-out that is a vector": (lambda: issm.Readout(np.ones(3)), "weights", "(3,)"),
    "a read-out of neither": (lambda: issm.Readout(np.ones((1, 3)), "inputs"), "of", "inputs"),
    "a window with another name": (effect(window="during"), "window", "during"),
    "a window that leaves the plan": (effect(window=(2, 5)), "window", "(2, 5)"),
    "an empty window": (effect(window=(2, 2)), "window", "(2, 2)"),
    "a window after a plan that never ends": (effect(window="after"), "window", "no step"),
    "a window of steps": (effect(window=np.arange(4)), "window", "int"),
    "a window of another length": (effect(window=np.ones(5, bool)), "window", "(5,)"),
    "a level in percent": (effect(level=95), "level", "95"),
    "a level of one": (effect(level=1.0), "level", "1.0"),
    "draws of the wrong model": (
        effect(parameters=jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), DRIVEN)), "parameters", "leading axis"),
    "draws without an axis": (effect(parameters=PARAMS), "parameters", "leading axis"),
    "a list of parameters": (effect(parameters=[PARAMS, PARAMS]), "parameters", "a list"),
    "a window that is a slice": (effect(window=slice(1, 3)), "window", "dtype object"),
    "a ragged window": (effect(window=[[1], [1, 2]]), "window", "ragged"),
    "no level": (effect(level=None), "level", "None"),
    "one draw": (effect(parameters=jax.tree.map(lambda leaf: leaf[:1], DRAWS)), "parameters", "1 draws"),
    "draws that are NaN": (effect(parameters=jax.tree.map(lambda leaf: leaf * jnp.nan, DRAWS)), "parameters", "NaN"),
    "draws with a negative variance": (
        effect(parameters=jax.tree.map(lambda leaf: -leaf, DRAWS)), "parameters.initial.cov", "smallest variance"),
    "a covariance of another model": (effect(parameters=np.eye(3)), "parameters", "(3, 3)"),
    "an indefinite covariance": (effect(parameters=-np.eye(NUM_PARAMETERS)), "parameters", "eigenvalue"),
    "a counterfactual without a plan": (would_be(Y, None), "plan", "NoneType"),
    "a counterfactual plan longer than the trial": (would_be(Y, PLAN), "plan", "(4, 2)"),
    "a factual plan longer than the trial": (would_be(Y, PLAN, interventions=PLAN), "interventions", "(4, 2)"),
    "a counterfactual of nothing": (would_be(Y * np.nan, PLAN), "emissions", "NaN"),
    "a counterfactual over an empty window": (changed(window="after"), "window", "no step"),
    "a counterfactual on something else": (changed(of="rates"), "of", "rates"),
    "a counterfactual at a level in percent": (changed(level=95), "level", "95"),
    "a counterfactual averaged over no trials": (changed(average_trials=True), "average_trials", "single sequence"),
    "a counterfactual under draws of the wrong model": (
        changed(parameters=jax.tree.map(lambda leaf: jnp.stack([leaf] * 5), DRIVEN)), "parameters", "leading axis"),
    "a pulse in a model that is none": (pulse(MODEL), "params", "a dict"),
    "a pulse in a model that varies": (pulse(VARYING), "params.dynamics.weights", "causal_effect"),
    "a pulse and no step after": (pulse(num_steps=0), "num_steps", "0"),
    "a pulse on a state that does not exist": (pulse(source=2), "source", "0 ... 1"),
    "a pulse on a state by name": (pulse(source="V1"), "source", "V1"),
    "a pulse of two values": (pulse(value=[1.0, 2.0]), "value", "(2,)"),
    "a pulse of NaN": (pulse(value=np.nan), "value", "NaN"),
    "a pulse at a level in percent": (pulse(level=95), "level", "95"),
    "a pulse under draws of the wrong model": (pulse(parameters=PARAMS), "parameters", "leading axis"),
    "holding in a model that is none": (hold(MODEL), "params", "a dict"),
    "holding in a model that varies": (hold(VARYING), "params.dynamics.weights", "causal_effect"),
    "holding for no step": (hold(num_steps=0), "num_steps", "0"),
    "holding at many values": (hold(value=[1.0, 2.0]), "value", "(2,)"),
    "holding at a level in percent": (hold(level=95), "level", "95"),
    "holding under draws of the wrong model": (hold(parameters=PARAMS), "parameters", "leading axis"),
    "holding a state that does not exist": (mediated(source=2), "source", "0 ... 1"),
    "a mediator that does not exist": (mediated(mediators=[2]), "mediators", "state 2"),
    "a mediator that is the source": (mediated(mediators=[1, 0]), "mediators", "the source"),
    "a mediator that is no list": (mediated(mediators=1), "mediators", "a int"),
    "mediators by mask": (mediated(mediators=[False, True]), "mediators", "state False"),
    "clamps that are an array": (lambda: issm.identifiability(np.ones((4, 2))), "interventions", "a ndarray"),
    "emissions without a model": (lambda: issm.identifiability(PLAN, emissions=Y), "emissions", "no params"),
    "clamps of another length than the emissions": (lambda: issm.identifiability(PLAN, PARAMS, Y), "interventions", "(4, 2)"),
    "clamps of another model": (lambda: issm.identifiability(ELSEWHERE, PARAMS), "interventions", "(4, 3)"),
    "another model's entries estimated": (
        lambda: issm.identifiability(PLAN, PARAMS, Y[:1].repeat(4, 0), trainable=[True]), "trainable", "structure"),
    "a plan of other states than the clamps": (lambda: SUPPORT.check_plan(ELSEWHERE), "plan", "(3,)"),
    "a check of no plan": (lambda: SUPPORT.check_plan(None), "plan", "NoneType"),
    "comparing on one sequence": (held_out(emissions=Y), "emissions", "(3, 3)"),
    "comparing on one trial": (held_out(emissions=np.zeros((1, 4, 3))), "emissions", "two trials"),
    "comparing nothing": (held_out({}), "models", "{}"),
    "comparing a model that does not say what it sees": (held_out({"m": PARAMS}), "models['m']", "ParamsLGSSM"),
    "comparing a model that sees something else": (held_out({"m": (PARAMS, "drugs")}), "models['m'].seen_as", "drugs"),
    "comparing a model without the inputs it was fitted with": (held_out({"m": (PARAMS, "inputs")}), "models['m'].inputs", "(4, 2)"),
    "comparing without a key": (held_out(key=0), "key", "int"),
    "comparing after all steps": (held_out(history=4), "history", "at most 3"),
    "comparing with one resampling": (held_out(num_bootstrap=1), "num_bootstrap", "1"),
    "comparing under no plan": (held_out(interventions=None), "interventions", "NoneType"),
    "a view of no plan": (lambda: issm.stimulation_as("inputs", None), "interventions", "NoneType"),
    "a view with inputs of another length": (lambda: issm.stimulation_as("inputs", PLAN, np.zeros((3, 1))), "inputs", "(3, 1)"),
    "a check of clamps without any": (
        clamp_test(interventions=issm.no_intervention(4, 2)), "interventions", "no clamp"),
    "a check of clamps on one trial": (clamp_test(test_emissions=np.zeros((1, 4, 3))), "test_emissions", "(1, 4, 3)"),
    "a check of clamps with a fit that is none": (clamp_test(fit=PARAMS), "fit", "ParamsLGSSM"),
    "a check of clamps with a fit that returns its log": (clamp_test(fit=lambda *_: [1.0]), "fit", "a list"),
    "designing without candidates": (design(candidates=[]), "candidates", "a list"),
    "designing with one candidate alone": (design(candidates=PLAN), "candidates", "(4, 2)"),
    "designing with candidates of two lengths": (design(candidates=[PLAN, LONGER]), "candidates[1]", "(5, 2)"),
    "designing for another model": (design(candidates=[ELSEWHERE]), "candidates", "(1, 4, 3)"),
    "designing for no trial": (design(budget=0), "budget", "0"),
    "designing by another letter": (design(criterion="E"), "criterion", "'E'"),
    "designing for two effects": (design(criterion=lambda p: p.dynamics.bias), "criterion", "(2,)"),
    "designing on no information": (design(information=np.zeros((2, 3, 3))), "information", "singular"),
    "designing on information of another model": (design(information=np.eye(3)), "information", "(3, 3)"),
    "designing within crossed bounds": (design(bounds=(1.0, -1.0)), "bounds", "above"),
    "designing within one bound": (design(bounds=1.0), "bounds", "1.0"),
    "designing in a model that varies": (
        lambda: issm.design_interventions(VARYING, [PLAN], budget=1), "params.dynamics.weights", "TimeVarying"),
    "an effect before the series": (seen(start=0), "start", "0"),
    "an effect after the series": (seen(start=4), "start", "4"),
    "an effect on many trials": (lambda: issm.observed_effect(PARAMS, np.zeros((2, 4, 3)), start=2), "emissions", "one sequence"),
    "an effect on a past without data": (
        lambda: issm.observed_effect(PARAMS, np.array([[np.nan] * 3, [0.0] * 3]), start=1), "history.emissions", "NaN"),
    "an effect over no step": (seen(window=(1, 1)), "window", "(1, 1)"),
    "an observed effect with draws of the wrong model": (seen(parameters=PARAMS), "parameters", "leading axis"),
    "an effect on nothing": (
        lambda: issm.observed_effect(PARAMS, np.full((4, 3), [[0.0], [0.0], [np.nan], [np.nan]]), start=2), "emissions", "step 2"),
    "a placebo after the series": (placebo(starts=[2]), "starts", "step 2"),
    "no placebo": (placebo(starts=[]), "starts", "[]"),
    "a structure for two series": (lambda: issm.structural_model(np.zeros((9, 2))), "emissions", "(9, 2)"),
    "a structure for nothing": (lambda: issm.structural_model(np.full((9, 1), np.nan)), "emissions", "0 finite"),
    "a season of one step": (lambda: issm.structural_model(np.zeros((9, 1)), seasonal=1), "seasonal", "1"),
    "a regressor of another length": (lambda: issm.structural_model(np.zeros((9, 1)), np.zeros((8, 1))), "inputs", "(8, 1)"),
    "a regressor with gaps": (lambda: issm.structural_model(np.zeros((9, 1)), np.full((9, 1), np.nan)), "inputs", "NaN"),
    "a regressor that does not vary": (lambda: issm.structural_model(np.zeros((9, 1)), np.ones((9, 1))), "inputs", "constant"),
    "an average over no trials": (effect(average_trials=True), "average_trials", "single sequence"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_bad_question_is_refused(name):
    calls, argument, fragment = CALLS[name]
    for call in calls if isinstance(calls, list) else [calls]:
        with pytest.raises(ValueError) as caught:
            call()
        parts = re.fullmatch(r"(.+?): got (.+?); expected (.+?)\. (\S.*)", str(caught.value), flags=re.DOTALL)
        assert parts, f"argument, got, expected, remedy: {caught.value}"
        assert parts.group(1) == argument, caught.value
        assert fragment in str(caught.value)


@pytest.mark.parametrize("call", predict(PARAMS, PLAN, history=History(Y)))
def test_a_good_question_goes_on_to_compile(call):
    with pytest.raises(AssertionError, match="reached a jitted function"):
        call()
