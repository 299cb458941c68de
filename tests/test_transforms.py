"""Every public function under jit, vmap, scan and grad, in float64 and in float32.

One line in `FUNCTIONS` for each: a function of a dictionary of floating-point arrays (`ARRAYS` names them) that returns any
pytree of arrays. Sizes and keys are closed over. A public function that is in no table fails a test.
"""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import issm
from helpers import random_system
from issm import TimeVarying

NUM_TIMESTEPS, STATE_DIM = 4, 2
KEY = jax.random.key(0)
SYSTEM = random_system(
    4, num_timesteps=NUM_TIMESTEPS, state_dim=STATE_DIM, emission_dim=2, input_dim=1, clamps="mixed", missing_steps=(2,)
)
SYSTEM.emissions[0, 1] = np.nan
MASK = np.array([[True, False], [False, True], [False, False], [False, True]])
ARRAYS = {
    **SYSTEM.fields,
    "emissions": SYSTEM.emissions,
    "inputs": SYSTEM.inputs,
    "value": np.where(MASK, SYSTEM.emissions[3], 0.0),
    "variance": np.where(MASK, [0.0, 0.3], 0.0),
}
FIELDS = tuple(SYSTEM.fields)
ONE_STEP = optax.sgd(0.1)
ONLY_OFFSETS = eqx.tree_at(lambda p: p.emissions.bias, jax.tree.map(lambda _: False, SYSTEM.params), True)


def plan(a):
    return issm.Intervention(MASK, a["value"], a["variance"])


def params(a):
    return issm.make_lgssm_params(**{name: a[name] for name in FIELDS})


def infer(function, **options):
    return lambda a: function(params(a), a["emissions"], a["inputs"], interventions=plan(a), **options)


def history(a):
    return issm.History(a["emissions"], a["inputs"], plan(a))


def bent(a):
    """A model whose emission map is curved."""
    linear = issm.ssm_from_lgssm(params(a))
    return eqx.tree_at(lambda m: m.emission.map, linear, Bent(linear.emission.map))


def diagonal_noise(a):
    """The arrays with diagonal covariances of the states."""
    return a | {name: jnp.diagonal(a[name]) for name in ("initial_cov", "dynamics_cov")}


def potentials_of(a):
    """A variational posterior near the data, one for the single trial."""
    free = issm.FreePotentials(1, NUM_TIMESTEPS, STATE_DIM, dtype=a["value"].dtype)
    return eqx.tree_at(lambda f: f.values, free, a["value"][None])


class Bent(eqx.Module):
    linear: issm.LinearMap

    def __call__(self, state):
        return self.linear(state) + 0.1 * jnp.tanh(self.linear(state)) ** 2


def limits(effect):
    """The effects alone: the spectral radius has no derivative."""
    return effect.limit, effect.per_step, effect.stable


def averages(effect):
    """Without the steps, which are NaN where nothing was observed."""
    return effect.average, effect.cumulative, effect.relative


def spreads(effect):
    """Without tail probabilities, which are steps."""
    return [
        (each.mean, each.trial.lower, each.trial.upper) for each in (effect.per_step, effect.cumulative, effect.average)
    ]


def excitation(report):
    """What has a derivative: a condition number may be infinite."""
    return report.excitation, report.information, report.support.gram


def statistics(diagnostics):
    """Without NaN, which stands where an emission is missing or there is too little of it to test."""
    return jax.tree.map(lambda leaf: jnp.nan_to_num(leaf), diagnostics)


def damped(a):
    """Far from where a limit ceases to exist."""
    return params(a | {"dynamics_weights": 0.5 * a["dynamics_weights"]})


SAMPLING = {"num_samples": 4, "num_warmup": 1, "num_chains": 1, "trainable": ONLY_OFFSETS}
FUNCTIONS = {
    "bend_dynamics": lambda a: issm.bend_dynamics(
        KEY, issm.ssm_from_lgssm(params(diagonal_noise(a))), (2,)).dynamics.map(a["value"][0]),
    "causal_effect": lambda a: issm.causal_effect(params(a), plan(a), history=history(a), inputs=a["inputs"]),
    "controlled_direct_effect": lambda a: limits(
        issm.controlled_direct_effect(damped(a), source=0, mediators=[1], num_steps=2, value=a["value"][0, 0])
    ),
    "counterfactual": infer(lambda p, y, u, interventions: issm.counterfactual(
        p, y, issm.no_intervention(4, 2), interventions=interventions, inputs=u)),
    "counterfactual_effect": infer(lambda p, y, u, interventions: spreads(issm.counterfactual_effect(
        p, y, issm.no_intervention(4, 2), interventions=interventions, inputs=u))),
    "compare": lambda a: issm.compare(
        KEY, {"clamps": (params(a), "clamps"), "ignored": (params(a), "ignored")}, jnp.stack([a["emissions"], -a["emissions"]]),
        a["inputs"], interventions=plan(a), num_bootstrap=5),
    "design_interventions": lambda a: issm.design_interventions(
        params(a), [plan(a), issm.no_intervention(4, 2)], budget=2, inputs=a["inputs"]),
    "do": lambda a: issm.do({0: a["value"][0, 0], 1: a["value"][1:3, 0]}, num_timesteps=4, state_dim=2, start=1, stop=3),
    "elbo": lambda a: issm.elbo(KEY, bent(a), potentials_of(a), a["emissions"], a["inputs"], interventions=plan(a)),
    "fit_em": lambda a: infer(issm.fit_em, num_iters=2, tol=0.0)(a).params,
    "fit_sgd": lambda a: infer(issm.fit_sgd, optimizer=ONE_STEP, num_epochs=2)(a).params,
    "identifiability": lambda a: excitation(issm.identifiability(plan(a), params(a), None, a["inputs"])),
    "fit_laplace_em": lambda a: floats(issm.fit_laplace_em(
        bent(diagonal_noise(a)), a["emissions"], a["inputs"], interventions=plan(a), num_rollout=0, num_iters=1).params),
    "fit_vi": lambda a: floats(issm.fit_vi(
        KEY, bent(diagonal_noise(a)), potentials_of(a), a["emissions"], a["inputs"], interventions=plan(a), num_rollout=0,
        num_iters=1).params),
    "impulse_response": lambda a: issm.impulse_response(params(a), 3, source=0, value=a["value"][0, 0]),
    "interventional_prediction": lambda a: issm.interventional_prediction(
        params(a), plan(a), history=history(a), inputs=a["inputs"]
    ),
    "log_joint": lambda a: issm.log_joint(
        bent(a), jnp.where(MASK, a["value"], a["emissions"][3]), a["emissions"], a["inputs"], interventions=plan(a)),
    "lgssm_filter": infer(issm.lgssm_filter),
    "lgssm_sample": lambda a: issm.lgssm_sample(KEY, params(a), NUM_TIMESTEPS, a["inputs"], interventions=plan(a)),
    "lgssm_smoother": infer(issm.lgssm_smoother),
    "make_lgssm_params": params,
    "marginal_log_prob": infer(issm.marginal_log_prob),
    "merge": lambda a: issm.merge(plan(a), issm.Intervention(~MASK, a["inputs"] * jnp.ones_like(a["inputs"], shape=(1, 2)))),
    "observed_effect": lambda a: averages(issm.observed_effect(params(a), a["emissions"], a["inputs"], start=3)),
    "pad_trials": lambda a: issm.pad_trials([a["inputs"], a["inputs"][:2]], 0.0)[0],
    "parameter_covariance": lambda a: infer(issm.parameter_covariance, trainable=ONLY_OFFSETS)(a).covariance,
    "posterior": lambda a: floats(issm.posterior(bent(a), a["emissions"], a["inputs"], interventions=plan(a))),
    "posterior_sample": lambda a: infer(lambda *args, **kw: issm.posterior_sample(KEY, *args, num_samples=2, **kw))(a),
    "residual_diagnostics": lambda a: statistics(infer(issm.residual_diagnostics)(a)),
    "sample": lambda a: issm.sample(KEY, bent(a), NUM_TIMESTEPS, a["inputs"], interventions=plan(a)),
    "sample_counterfactual": lambda a: floats(issm.sample_counterfactual(
        KEY, bent(a), a["emissions"], issm.no_intervention(4, 2), interventions=plan(a), inputs=a["inputs"], num_draws=2)),
    "sample_counterfactual_effect": lambda a: spreads(issm.sample_counterfactual_effect(
        KEY, bent(a), a["emissions"], issm.no_intervention(4, 2), interventions=plan(a), inputs=a["inputs"], num_draws=5)),
    "sample_effect": lambda a: spreads(
        issm.sample_effect(KEY, bent(a), plan(a), history=history(a), inputs=a["inputs"], num_draws=5)),
    "sample_prediction": lambda a: issm.sample_prediction(
        KEY, bent(a), plan(a), history=history(a), inputs=a["inputs"], num_draws=2),
    "sample_parameters": lambda a: infer(lambda *args, **kw: issm.sample_parameters(KEY, *args, **SAMPLING, **kw))(a).draws,
    "ssm_from_lgssm": lambda a: issm.ssm_from_lgssm(params(a)),
    "ssm_to_lgssm": lambda a: issm.ssm_to_lgssm(issm.ssm_from_lgssm(params(a))),
    "stimulation_as": lambda a: issm.stimulation_as("inputs", plan(a), a["inputs"])["inputs"],
    "stimulate": lambda a: issm.stimulate(a["inputs"], a["dynamics_input_weights"].T, np.ones((4, 1), dtype=bool)),
    "total_effects": lambda a: limits(issm.total_effects(damped(a), num_steps=2, value=a["value"][0, 0])),
    "transform_interventions": lambda a: issm.transform_interventions(plan(a), np.diag([2.0, -3.0]), a["inputs"][:2, 0]),
    "transform_params": lambda a: issm.transform_params(params(a), a["emissions_weights"], a["inputs"][:2, 0]),
}  # fmt: skip
NOT_OF_ARRAYS = {
    "placebo_effects": "calls the user's fit for every date",
    "structural_model": "looks at the series before anything is compiled, and says so when it is traced",
    "bootstrap": "compiles and batches its refits itself, and says so when the data are traced",
    "check_clamps": "calls the user's fit for every channel, and decides between them in Python",
    "multi_start": "starts from `initialize_lgssm`, which looks at the data before anything is compiled",
    "initialize_lgssm": "looks at the data before anything is compiled, and says so when they are traced",
    "information_criteria": "counts clamp values and observed steps, and says so when they are traced",
    "initialize_ssm": "looks at the data before anything is compiled, and says so when they are traced",
    "learn_targets": "decides what a channel does before anything is compiled, and says so when the data are traced",
    "no_intervention": "takes two sizes",
    "select_state_dim": "fits models of several sizes, each compiled on its own, and says so when the data are traced",
}
"""Public functions that no transformation can apply to, and why."""
FORWARD_ONLY = {
    "fit_sgd": "its loop ends when the data say so, which JAX cannot run backwards",
    "fit_em": "its loop ends when the data say so, which JAX cannot run backwards",
    "fit_laplace_em": "its loop ends when the data say so, which JAX cannot run backwards",
    "fit_vi": "the same",
}
"""Public functions whose derivative is `jax.jvp` and not `jax.grad`, and why."""


def arrays(dtype=jnp.float64):
    return {name: jnp.asarray(value, dtype) for name, value in ARRAYS.items()}


def two():
    """The arrays and a second set near them, stacked: one for each member of a vmap or step of a scan."""
    rng = np.random.default_rng(0)
    return {name: jnp.stack([value, value * (1 + 1e-2 * rng.random())]) for name, value in arrays().items()}


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def assert_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected)


def test_every_public_function_is_in_a_table():
    public = {name for name, value in vars(issm).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert public - FUNCTIONS.keys() - NOT_OF_ARRAYS.keys() == set()
    assert FUNCTIONS.keys() | NOT_OF_ARRAYS.keys() <= public


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_vmap_scan(name):
    function, stacked = FUNCTIONS[name], two()
    one_by_one = [function({k: v[i] for k, v in stacked.items()}) for i in range(2)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    assert_close(jax.jit(jax.vmap(function))(stacked), expected, **tolerance)
    _, scanned = jax.lax.scan(lambda carry, a: (carry, function(a)), 0, stacked)
    assert_close(scanned, expected, **tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_grad_is_the_finite_difference(name):
    """The derivative of a random contraction of all outputs along a random direction of all arguments."""
    rng = np.random.default_rng(1)
    direction = {k: jnp.asarray(np.where(np.isnan(v), 0.0, rng.normal(size=np.shape(v)))) for k, v in ARRAYS.items()}
    for k in ("initial_cov", "dynamics_cov", "emissions_cov"):
        direction[k] = (direction[k] + direction[k].T) / 2
    direction["variance"] = jnp.where(ARRAYS["variance"] > 0, direction["variance"], 0.0)  # zero is at the boundary
    shapes = jax.eval_shape(FUNCTIONS[name], arrays())
    weights = [jnp.asarray(rng.normal(size=leaf.shape)) for leaf in floats(shapes)]

    def contracted(a):
        return sum((w * leaf).sum() for w, leaf in zip(weights, floats(FUNCTIONS[name](a)), strict=True))

    if name in FORWARD_ONLY:
        evaluate = jax.jit(lambda a: jax.jvp(contracted, (a,), (direction,)))
        slope = float(evaluate(arrays())[1])
    else:
        evaluate = jax.jit(jax.value_and_grad(contracted))
        _, gradient = evaluate(arrays())
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in gradient.values())
        slope = sum(float((gradient[k] * direction[k]).sum()) for k in direction)
    assert slope == pytest.approx(central_difference(lambda a: evaluate(a)[0], direction), rel=1e-6)


def central_difference(function, direction, step=1e-4):
    """Fourth order: the error is of order step**4."""

    def at(size):
        return float(function({k: v + size * direction[k] for k, v in arrays().items()}))

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_stays_float32(name):
    single, double = FUNCTIONS[name](arrays(jnp.float32)), FUNCTIONS[name](arrays())
    assert {leaf.dtype for leaf in floats(single)} == {np.dtype("float32")}
    if "sample" in name or name == "elbo":  # other bits, other draws
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in floats(single))
    else:
        tolerance = (
            1e-3 if name == "fit_em" else 2e-4
        )  # one arrival teaches a whole row: its regression amplifies rounding
        assert_close(single, double, rtol=tolerance, atol=tolerance)


def test_results_follow_the_dtype_of_the_parameters():
    """Data of another precision are cast, whichever way round."""
    single, double = arrays(jnp.float32), arrays()
    for own, other in ((single, double), (double, single)):
        posterior = issm.lgssm_smoother(params(own), other["emissions"], other["inputs"], interventions=plan(other))
        assert {leaf.dtype for leaf in floats(posterior)} == {own["value"].dtype}
        draws = issm.lgssm_sample(KEY, params(own), NUM_TIMESTEPS, other["inputs"], interventions=plan(other))
        assert {leaf.dtype for leaf in floats(draws)} == {own["value"].dtype}


# The gradient of the marginal likelihood, argument by argument


GRADIENT = jax.jit(jax.value_and_grad(infer(issm.marginal_log_prob)))


@pytest.mark.parametrize("name", ARRAYS)
def test_gradient_of_the_log_likelihood_in_each_argument(name):
    """Entry by entry, with clamps, a missing entry and a missing step."""
    _, gradient = GRADIENT(arrays())
    gradient, value = np.asarray(gradient[name]), np.asarray(ARRAYS[name])
    assert np.isfinite(gradient).all()
    for index in np.ndindex(value.shape):
        symmetric = name.endswith("cov")
        if symmetric and index[0] > index[1]:
            continue  # moved together with its mirror image
        inside = ~np.isnan(value[index]) and not (name == "variance" and value[index] == 0)
        if not inside:
            continue
        direction = {k: np.zeros(np.shape(v)) for k, v in ARRAYS.items()}
        direction[name][index] = 1.0
        if symmetric:
            direction[name][index[::-1]] = 1.0
        slope = central_difference(lambda a: GRADIENT(a)[0], direction)
        expected = (gradient * direction[name]).sum()
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-8, err_msg=str(index))
    np.testing.assert_array_equal(gradient[np.isnan(value)], 0.0)


def test_gradient_in_time_varying_and_diagonal_fields():
    def log_prob(a, t):
        varying = {
            "dynamics_weights": TimeVarying(t["weights"]),
            "dynamics_cov": TimeVarying(t["cov"]),
            "emissions_cov": t["diagonal"],
        }
        fields = {name: a[name] for name in FIELDS} | varying
        return issm.marginal_log_prob(
            issm.make_lgssm_params(**fields), a["emissions"], a["inputs"], interventions=plan(a)
        )

    given = {
        "weights": jnp.stack([arrays()["dynamics_weights"]] * NUM_TIMESTEPS),
        "cov": jnp.full((NUM_TIMESTEPS, STATE_DIM), 0.4),
        "diagonal": jnp.array([0.3, 0.6]),
    }
    value_and_grad = jax.jit(jax.value_and_grad(lambda t: log_prob(arrays(), t)))
    _, gradient = value_and_grad(given)
    rng = np.random.default_rng(2)
    direction = {k: rng.normal(size=v.shape) for k, v in given.items()}
    step = 1e-5
    ends = [float(value_and_grad({k: v + s * direction[k] for k, v in given.items()})[0]) for s in (step, -step)]
    slope = sum(float((gradient[k] * direction[k]).sum()) for k in given)
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-7)
    np.testing.assert_array_equal(gradient["weights"][0], 0.0)  # entry 0 of a dynamics field is not used
    np.testing.assert_array_equal(gradient["cov"][0], 0.0)


@pytest.mark.parametrize("name", ["lgssm_smoother", "marginal_log_prob", "lgssm_sample"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_gradients_are_finite_at_the_edges(name, diagonal):
    """A known start, no process noise, perfect clamps, whole steps missing: no 0/0 hides in a derivative."""
    edge = arrays()
    zero = jnp.zeros(STATE_DIM) if diagonal else jnp.zeros((STATE_DIM, STATE_DIM))
    edge |= {"initial_cov": zero, "dynamics_cov": zero, "variance": jnp.zeros_like(edge["variance"])}
    edge["emissions"] = edge["emissions"].at[:3].set(jnp.nan)
    if diagonal:
        edge["emissions_cov"] = jnp.diagonal(edge["emissions_cov"])
    gradient = jax.grad(lambda a: sum(leaf.sum() for leaf in floats(FUNCTIONS[name](a))))(edge)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in gradient.values())
