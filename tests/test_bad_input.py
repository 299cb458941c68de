"""Bad calls: each must raise a ValueError that names the argument, what came, what was expected and the remedy.

Each must do so before anything is compiled: the jitted functions of the library are replaced by ones that fail.
"""

import re
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import issm
from issm import Intervention, TimeVarying
from issm._compile import Program

CHECKS = {"_surely_finite"}  # jitted, but part of the checks themselves

KEY = jax.random.key(0)
Y = np.zeros((5, 3))
U = np.zeros((5, 1))
TRIALS = np.zeros((2, 5, 3))
GOOD = {
    "initial_mean": np.zeros(2),
    "initial_cov": np.eye(2),
    "dynamics_weights": 0.5 * np.eye(2),
    "dynamics_cov": np.ones(2),
    "emissions_weights": np.ones((3, 2)),
    "emissions_cov": np.eye(3),
}
INPUTS = {"dynamics_input_weights": np.ones((2, 1))}
PARAMS = issm.make_lgssm_params(**GOOD)
DRIVEN = issm.make_lgssm_params(**GOOD, **INPUTS)
VARYING = issm.make_lgssm_params(**GOOD | {"dynamics_cov": TimeVarying(np.ones((5, 2)))})
PLAN = issm.do({0: 1.0}, num_timesteps=5, state_dim=2)
MASK = np.ones((5, 2), dtype=bool)
INDEFINITE = np.array([[1.0, 2.0], [2.0, 1.0]])
ASYMMETRIC = np.array([[1.0, 0.5], [0.0, 1.0]])


def make(**changes):
    return lambda: issm.make_lgssm_params(**GOOD | changes)


def edited(where, value):
    return eqx.tree_at(where, PARAMS, value)


def infer(*arguments, **options):
    """The same call to every function that takes data."""
    functions = (issm.lgssm_filter, issm.lgssm_smoother, issm.marginal_log_prob)
    calls = [lambda f=f: f(*arguments, **options) for f in functions]
    return [*calls, lambda: issm.posterior_sample(KEY, *arguments, **options)]


def with_entry(array, value):
    array = array.copy()
    array[(0,) * array.ndim] = value
    return array


# name: (call or calls, the argument named, a fragment of the message)
CALLS = {
    # parameters
    "mean is a matrix": (make(initial_mean=np.zeros((2, 2))), "initial_mean", "shape (2, 2)"),
    "mean is NaN": (make(initial_mean=np.array([0, np.nan])), "initial_mean", "NaN"),
    "initial covariance of another size": (make(initial_cov=np.eye(3)), "initial_cov", "shape (3, 3)"),
    "asymmetric covariance": (make(initial_cov=ASYMMETRIC), "initial_cov", "not symmetric"),
    "indefinite covariance": (make(dynamics_cov=INDEFINITE), "dynamics_cov", "eigenvalue -1"),
    "negative variance": (make(dynamics_cov=np.array([1.0, -1.0])), "dynamics_cov", "variance of -1"),
    "infinite variance": (make(dynamics_cov=np.array([1.0, np.inf])), "dynamics_cov", "infinite"),
    "emission variance of zero": (make(emissions_cov=np.zeros(3)), "emissions_cov", "positive variances"),
    "singular emission covariance": (make(emissions_cov=np.ones((3, 3))), "emissions_cov", "positive definite"),
    "dynamics weights not square": (make(dynamics_weights=np.ones((2, 3))), "dynamics_weights", "shape (2, 3)"),
    "dynamics weights of another size": (make(dynamics_weights=np.eye(3)), "dynamics_weights", "(2, 2)"),
    "emission weights transposed": (make(emissions_weights=np.ones((2, 3))), "emissions_weights", "shape (2, 3)"),
    "emission weights are a vector": (make(emissions_weights=np.ones(3)), "emissions_weights", "shape (3,)"),
    "bias of another size": (make(dynamics_bias=np.zeros(3)), "dynamics_bias", "shape (3,)"),
    "emission bias is a number": (make(emissions_bias=1.0), "emissions_bias", "shape (1,)"),
    "input weights disagree": (make(dynamics_input_weights=np.ones((2, 1)), emissions_input_weights=np.ones((3, 2))),
                               "emissions_input_weights", "(3, 1)"),
    "time axis without the mark": (make(dynamics_weights=np.ones((5, 2, 2))), "dynamics_weights", "TimeVarying"),
    "varying fields of two lengths": (make(dynamics_weights=TimeVarying(np.ones((5, 2, 2))),
                                           dynamics_bias=TimeVarying(np.ones((4, 2)))), "dynamics_bias", "(5, 2)"),
    "varying initial mean": (make(initial_mean=TimeVarying(np.ones((5, 2)))), "initial_mean", "TimeVarying"),
    "no time step": (make(dynamics_cov=TimeVarying(np.ones((0, 2)))), "dynamics_cov", "shape (0, 2)"),
    "no state": (make(initial_mean=np.zeros(0)), "initial_mean", "shape (0,)"),
    "complex weights": (make(dynamics_weights=np.eye(2) * 1j), "dynamics_weights", "complex"),
    "text": (make(dynamics_weights="identity"), "dynamics_weights", "real numbers"),
    "None where an array is needed": (make(dynamics_weights=None), "dynamics_weights", "None"),
    "ragged weights": (make(dynamics_weights=[[1.0], [1.0, 2.0]]), "dynamics_weights", "ragged"),
    "time-varying text": (lambda: TimeVarying(["a"]), "values", "real numbers"),
    "time-varying number": (lambda: TimeVarying(1.0), "values", "shape ()"),
    # clamps
    "mask of zeros and ones": (lambda: Intervention(np.ones((5, 2)), 1.0), "mask", "Boolean"),
    "mask of integers": (lambda: Intervention(np.ones((5, 2), dtype=int), 1.0), "mask", "astype(bool)"),
    "mask without a state axis": (lambda: Intervention(MASK[:, 0], 1.0), "mask", "shape (5,)"),
    "ragged mask": (lambda: Intervention([[True], [True, False]], 1.0), "mask", "ragged"),
    "value of another shape": (lambda: Intervention(MASK, np.ones((4, 2))), "value", "shape (4, 2)"),
    "value NaN under a true mask": (lambda: Intervention(MASK, with_entry(np.ones((5, 2)), np.nan)), "value", "NaN"),
    "value is text": (lambda: Intervention(MASK, "high"), "value", "real numbers"),
    "clamp variance negative": (lambda: Intervention(MASK, 1.0, -1.0), "variance", "at least zero"),
    "clamp variance infinite": (lambda: Intervention(MASK, 1.0, np.inf), "variance", "infinite"),
    "clamp variance of another shape": (lambda: Intervention(MASK, 1.0, np.ones(2)), "variance", "shape (2,)"),
    "state out of range": (lambda: issm.do({2: 1.0}, num_timesteps=5, state_dim=2), "clamps", "state 2"),
    "state negative": (lambda: issm.do({-1: 1.0}, num_timesteps=5, state_dim=2), "clamps", "state -1"),
    "state not an integer": (lambda: issm.do({0.5: 1.0}, num_timesteps=5, state_dim=2), "clamps", "state 0.5"),
    "clamps not a mapping": (lambda: issm.do([1.0], num_timesteps=5, state_dim=2), "clamps", "list"),
    "window empty": (lambda: issm.do({0: 1.0}, num_timesteps=5, state_dim=2, start=3, stop=3), "start, stop", "[3, 3)"),
    "window too long": (lambda: issm.do({0: 1.0}, num_timesteps=5, state_dim=2, stop=6), "start, stop", "[0, 6)"),
    "window not whole": (lambda: issm.do({0: 1.0}, num_timesteps=5, state_dim=2, stop=2.5), "start, stop", "2.5"),
    "values for another window": (lambda: issm.do({0: np.ones(5)}, num_timesteps=5, state_dim=2, start=1), "clamps[0]",
                                  "shape (5,)"),
    "value of do is NaN": (lambda: issm.do({0: np.nan}, num_timesteps=5, state_dim=2), "value", "NaN"),
    "plan of no steps": (lambda: issm.no_intervention(0, 2), "num_timesteps", "0"),
    "plan of no states": (lambda: issm.no_intervention(5, 0), "state_dim", "0"),
    "plan of half a step": (lambda: issm.no_intervention(2.5, 2), "num_timesteps", "2.5"),
    "amplitudes without channels": (lambda: issm.stimulate(np.ones(5), np.eye(2)), "amplitudes", "shape (5,)"),
    "targets of other channels": (lambda: issm.stimulate(np.ones((5, 3)), np.eye(2)), "targets", "shape (2, 2)"),
    "targets NaN": (lambda: issm.stimulate(np.ones((5, 1)), [[np.nan, 0.0]]), "targets", "NaN"),
    "active not Boolean": (lambda: issm.stimulate(np.ones((5, 2)), np.eye(2), np.ones((5, 2))), "active", "Boolean"),
    "active of another shape": (lambda: issm.stimulate(np.ones((5, 2)), np.eye(2), MASK[:3]), "active", "shape (3, 2)"),
    "amplitude NaN while active": (lambda: issm.stimulate(np.full((5, 2), np.nan), np.eye(2), MASK), "amplitudes", "NaN"),
    "merged plans of two lengths": (lambda: issm.merge(PLAN, issm.no_intervention(4, 2)), "b", "shape (4, 2)"),
    "merged plans in conflict": (lambda: issm.merge(PLAN, issm.do({0: 2.0}, num_timesteps=5, state_dim=2)), "a, b",
                                 "state 0 at step 0"),
    "merging no plan": (lambda: issm.merge(PLAN, None), "b", "NoneType"),
    # data
    "params a dictionary": (infer(GOOD, Y), "params", "dict"),
    "params a block of them": (infer(PARAMS.dynamics, Y), "params", "ParamsLGSSMDynamics"),
    "params edited to another shape": (infer(edited(lambda p: p.dynamics.bias, jnp.ones(3)), Y), "params.dynamics.bias",
                                       "shape (3,)"),
    "params edited to be indefinite": (infer(edited(lambda p: p.initial.cov, jnp.asarray(INDEFINITE)), Y),
                                       "params.initial.cov", "eigenvalue"),
    "params edited to NaN": (infer(edited(lambda p: p.dynamics.weights, jnp.full((2, 2), jnp.nan)), Y),
                             "params.dynamics.weights", "NaN"),
    "emissions a vector": (infer(PARAMS, np.zeros(5)), "emissions", "shape (5,)"),
    "emissions with four axes": (infer(PARAMS, TRIALS[None]), "emissions", "shape (1, 2, 5, 3)"),
    "emissions transposed": (infer(PARAMS, Y.T), "emissions", "shape (3, 5)"),
    "emissions of no steps": (infer(PARAMS, Y[:0]), "emissions", "empty"),
    "emissions of no trials": (infer(PARAMS, TRIALS[:0]), "emissions", "empty"),
    "emissions all missing": (infer(PARAMS, np.full((5, 3), np.nan)), "emissions", "NaN"),
    "emissions infinite": (infer(PARAMS, with_entry(Y, np.inf)), "emissions", "infinite"),
    "emissions None": (infer(PARAMS, None), "emissions", "None"),
    "emissions complex": (infer(PARAMS, Y * 1j), "emissions", "complex"),
    "emissions text": (infer(PARAMS, np.full((5, 3), "1.0")), "emissions", "real numbers"),
    "emissions Boolean": (infer(PARAMS, Y == 0), "emissions", "bool"),
    "emissions ragged": (infer(PARAMS, [np.zeros((5, 3)).tolist(), np.zeros((4, 3)).tolist()]), "emissions", "pad_trials"),
    "inputs missing": (infer(DRIVEN, Y), "inputs", "None"),
    "inputs to a model without": (infer(PARAMS, Y, U), "inputs", "shape (5, 1)"),
    "inputs of another length": (infer(DRIVEN, Y, U[:4]), "inputs", "shape (4, 1)"),
    "inputs of too many channels": (infer(DRIVEN, Y, np.zeros((5, 2))), "inputs", "shape (5, 2)"),
    "inputs of other trials": (infer(DRIVEN, TRIALS, np.zeros((3, 5, 1))), "inputs", "shape (3, 5, 1)"),
    "inputs with trials, emissions without": (infer(DRIVEN, Y, np.zeros((2, 5, 1))), "inputs", "shape (2, 5, 1)"),
    "inputs NaN": (infer(DRIVEN, Y, with_entry(U, np.nan)), "inputs", "NaN"),
    "interventions a mask": (infer(PARAMS, Y, interventions=MASK), "interventions", "ndarray"),
    "interventions of another length": (infer(PARAMS, Y, interventions=issm.no_intervention(4, 2)), "interventions",
                                        "shape (4, 2)"),
    "interventions on other states": (infer(PARAMS, Y, interventions=issm.no_intervention(5, 3)), "interventions",
                                      "shape (5, 3)"),
    "interventions on other trials": (infer(PARAMS, TRIALS, interventions=Intervention(np.stack([MASK] * 3), 1.0)),
                                      "interventions", "shape (3, 5, 2)"),
    "interventions with trials, emissions without": (infer(PARAMS, Y, interventions=Intervention(MASK[None], 1.0)),
                                                     "interventions", "shape (1, 5, 2)"),
    "varying params of another length": (infer(VARYING, Y[:4]), "params.dynamics.cov", "5 steps"),
    "method unknown": ([lambda: issm.lgssm_filter(PARAMS, Y, method="fast"),
                        lambda: issm.lgssm_smoother(PARAMS, Y, method="fast")], "method", "'fast'"),
    "method a number": (lambda: issm.lgssm_filter(PARAMS, Y, method=1), "method", "got 1"),
    # draws
    "no draws": (lambda: issm.posterior_sample(KEY, PARAMS, Y, num_samples=0), "num_samples", "0"),
    "key a number": ([lambda: issm.posterior_sample(0, PARAMS, Y), lambda: issm.lgssm_sample(0, PARAMS, 5)], "key", "int"),
    "keys in plenty": (lambda: issm.lgssm_sample(jax.random.split(KEY), PARAMS, 5), "key", "shape (2,)"),
    "drawing no steps": (lambda: issm.lgssm_sample(KEY, PARAMS, 0), "num_timesteps", "0"),
    "drawing half a step": (lambda: issm.lgssm_sample(KEY, PARAMS, 2.5), "num_timesteps", "2.5"),
    "drawing without inputs": (lambda: issm.lgssm_sample(KEY, DRIVEN, 5), "inputs", "None"),
    "drawing with ragged inputs": (lambda: issm.lgssm_sample(KEY, DRIVEN, 2, [[1.0], [1.0, 2.0]]), "inputs", "ragged"),
    "drawing trials that disagree": (lambda: issm.lgssm_sample(KEY, DRIVEN, 5, np.zeros((2, 5, 1)),
                                     interventions=Intervention(np.stack([MASK] * 3), 1.0)), "interventions", "(3, 5, 2)"),
    "drawing under no plan": (lambda: issm.lgssm_sample(KEY, PARAMS, 5, interventions=MASK), "interventions", "ndarray"),
    "drawing with params of others": (lambda: issm.lgssm_sample(KEY, GOOD, 5), "params", "dict"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_a_user(monkeypatch):
    """Without the run-time type checks that only the tests install, and without anything that compiles."""
    jaxtyping.config.update("jaxtyping_disable", True)
    jitted = type(jax.jit(lambda: None)), Program

    def compiles(*_, **__):
        raise AssertionError("reached a jitted function")

    for module in [module for name, module in sys.modules.items() if name.startswith("issm.")]:
        for name, value in vars(module).items():
            if isinstance(value, jitted) and name not in CHECKS:
                monkeypatch.setattr(module, name, compiles)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_table_is_long_enough():
    assert len(CALLS) >= 30


@pytest.mark.parametrize("name", CALLS)
def test_bad_call_is_refused(name):
    calls, argument, fragment = CALLS[name]
    for call in calls if isinstance(calls, list) else [calls]:
        with pytest.raises(ValueError) as caught:
            call()
        message = str(caught.value)
        parts = re.fullmatch(r"(.+?): got (.+?); expected (.+?)\. (\S.*)", message, flags=re.DOTALL)
        assert parts, f"argument, got, expected, remedy: {message}"
        assert parts.group(1) == argument, message
        assert fragment in message


@pytest.mark.parametrize("call", infer(PARAMS, Y))
def test_a_good_call_goes_on_to_compile(call):
    """So that the calls above fail for the reason they should."""
    with pytest.raises(AssertionError, match="reached a jitted function"):
        call()


def test_numpy_numbers_are_numbers():
    plan = issm.do({np.int64(0): np.float64(1)}, num_timesteps=np.int64(5), state_dim=np.int64(2), stop=np.int64(3))
    np.testing.assert_array_equal(plan.mask[:, 0], [True] * 3 + [False] * 2)
