"""`fit_em` through its door: frozen entries, guards, the log of the likelihood, the bar, batches of starts, bad calls.

A fit takes seconds to compile, so that most tests share one shape, one number of updates and one system, `ROWS`.
"""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import helpers
import issm
from issm.fitting import em, em_loop
from issm.fitting.m_step import make_rules
from issm.fitting.result import Code
from issm.inference.methods import choose_method

NUM_ITERS = 20
NUM_TRIALS, NUM_TIMESTEPS, EMISSION_DIM, STATE_DIM = 4, 15, 3, 2
SHAPE = dict(num_trials=NUM_TRIALS, num_timesteps=NUM_TIMESTEPS, emission_dim=EMISSION_DIM, state_dim=STATE_DIM)
CLAMPED = dict(input_dim=1, clamps="perfect", shared_interventions=False)
DIAGONAL = dict(initial_cov="diagonal", dynamics_cov="diagonal", emissions_cov="diagonal")
ROWS = helpers.random_system(5, **SHAPE, **CLAMPED, **DIAGONAL)
FULL = helpers.random_system(6, **SHAPE, **CLAMPED)
ONE_UPDATE = 1e9  # a tolerance that any second update falls below


def start_of(system, seed=0, distance=0.2):
    """Parameters in the neighbourhood of the truth."""
    rng = np.random.default_rng(seed)
    changed = {name: value + distance * rng.normal(size=np.shape(value)) for name, value in system.fields.items()}
    covs = {name: 1.5 * value for name, value in system.fields.items() if name.endswith("cov")}
    return issm.make_lgssm_params(**changed | covs)


def fit(params, system, *, emissions=None, inputs=None, plan=None, tol=0.0, **options):
    (own_emissions, own_inputs), own = system.data
    return issm.fit_em(
        params,
        own_emissions if emissions is None else emissions,
        own_inputs if inputs is None else inputs,
        interventions=own["interventions"] if plan is None else plan,
        num_iters=NUM_ITERS,
        tol=tol,
        **options,
    )


def log_prob(params, system):
    args, kwargs = system.data
    return float(issm.marginal_log_prob(params, *args, **kwargs).sum())


def assert_sound(result, *, rtol=0.0):
    """Finite, never down, and not ended by a guard."""
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(result.params)), result.reason
    assert np.isfinite(result.log_probs).all()
    objective = np.asarray(result.log_probs + result.log_priors)
    assert (np.diff(objective) >= -rtol * np.abs(objective[1:])).all(), np.diff(objective)
    assert Code(int(result.code)) in (Code.MAX_ITERS, Code.CONVERGED), result.reason
    assert len(result.log_probs) == result.num_iters + 1


def assert_same(actual, expected, **tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


# Frozen entries


def frozen_fit(system):
    (emissions, inputs), options = system.data

    @jax.jit
    def fit(params, trainable):
        return issm.fit_em(params, emissions, inputs, **options, trainable=trainable, num_iters=NUM_ITERS, tol=0.0)

    return fit


FROZEN_FITS = {"rows": (ROWS, frozen_fit(ROWS)), "full": (FULL, frozen_fit(FULL))}
BLOCKS = {"initial": lambda p: p.initial, "dynamics": lambda p: p.dynamics, "emissions": lambda p: p.emissions}


def random_entries(params, seed):
    """About half of all entries, covariances with two axes as a whole."""
    rng = np.random.default_rng(seed)
    mask = jax.tree.map(lambda leaf: rng.random(leaf.shape) < 0.5, params)
    covs = [block.cov for block in (mask.initial, mask.dynamics, mask.emissions)]
    whole = [np.full(cov.shape, cov.flat[0]) if cov.ndim == 2 else cov for cov in covs]
    return eqx.tree_at(lambda m: (m.initial.cov, m.dynamics.cov, m.emissions.cov), mask, whole)


def everything_but(where, params):
    mask = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    return eqx.tree_at(where, mask, jax.tree.map(np.zeros_like, where(mask)))


FROZEN = {
    **{f"half of all entries, seed {seed}": lambda p, seed=seed: random_entries(p, seed) for seed in range(3)},
    **{f"all of {name}": lambda p, where=where: everything_but(where, p) for name, where in BLOCKS.items()},
    "all covariances": lambda p: everything_but(lambda m: [block(m).cov for block in BLOCKS.values()], p),
    "one row of the dynamics": lambda p: eqx.tree_at(
        lambda m: m.dynamics.weights, everything_but(lambda m: (), p), np.array([[False, False], [True, True]])
    ),
}


@pytest.mark.parametrize("kind", FROZEN_FITS)
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_entries_keep_every_bit_and_the_rest_moves(kind, name):
    system, fit = FROZEN_FITS[kind]
    start = start_of(system)
    trainable = FROZEN[name](start)
    result = fit(start, trainable)
    objective = np.asarray(result.log_probs)
    assert (np.diff(objective) >= 0).all()
    assert objective[-1] > objective[0]
    assert Code(int(result.code)) == Code.MAX_ITERS, result.reason
    for mask, before, after in zip(*map(jax.tree.leaves, (trainable, start, result.params)), strict=True):
        np.testing.assert_array_equal(np.asarray(after)[~mask], np.asarray(before)[~mask])
        assert (np.asarray(after)[mask] != np.asarray(before)[mask]).all()


@pytest.mark.parametrize("kind", FROZEN_FITS)
def test_prefixes_freeze_what_arrays_freeze(kind):
    """The same fit outside `jit`, where the masks are known, from one Boolean for a field."""
    system, traced = FROZEN_FITS[kind]
    start = start_of(system)
    trainable = eqx.tree_at(lambda m: m.emissions.weights, jax.tree.map(lambda _: True, start), False)
    eager = fit(start, system, trainable=trainable)
    np.testing.assert_array_equal(eager.params.emissions.weights, start.emissions.weights)
    assert_sound(eager)
    jitted = traced(start, everything_but(lambda m: m.emissions.weights, start))
    np.testing.assert_allclose(jitted.log_probs, eager.log_probs, rtol=1e-9)
    assert_same(jitted.params, eager.params, rtol=1e-6, atol=1e-8)


def test_a_field_that_varies_in_time_is_kept_by_one_false():
    """The way of the page on freezing parameters."""
    trainable = eqx.tree_at(lambda p: p.dynamics.weights, jax.tree.map(lambda _: True, VARYING), False)
    assert not make_rules(VARYING, trainable, None).dynamics.coefficients[:, :STATE_DIM].any()


# Data and starts on which a naive EM breaks


def with_channel(channel, values):
    emissions = ROWS.emissions.copy()
    emissions[..., channel] = values
    return emissions


def test_constant_channel():
    result = fit(start_of(ROWS), ROWS, emissions=with_channel(1, 3.0))
    assert_sound(result)
    np.testing.assert_array_equal(result.floored, [False, True, False])
    assert "floor for emission 1" in result.reason


def test_duplicate_channels():
    result = fit(start_of(ROWS), ROWS, emissions=with_channel(1, ROWS.emissions[..., 0]))
    assert_sound(result)


def test_offset_changes_nothing_but_the_bias():
    start = start_of(ROWS)
    plain = fit(start, ROWS)
    moved = eqx.tree_at(lambda p: p.emissions.bias, start, start.emissions.bias + 1000.0)
    offset = fit(moved, ROWS, emissions=ROWS.emissions + 1000.0)
    assert_sound(offset)
    np.testing.assert_allclose(offset.log_probs, plain.log_probs, rtol=1e-9)
    back = eqx.tree_at(lambda p: p.emissions.bias, offset.params, offset.params.emissions.bias - 1000.0)
    assert_same(back, plain.params, rtol=1e-7, atol=1e-8)


def test_offset_that_the_start_does_not_know():
    assert_sound(fit(start_of(ROWS), ROWS, emissions=ROWS.emissions + 1000.0))


def test_offset_in_single_precision():
    single = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)  # noqa: E731
    start = single(start_of(ROWS))
    plain = fit(start, ROWS)
    offset = fit(start, ROWS, emissions=ROWS.emissions + 1000.0)
    for result in (plain, offset):
        assert_sound(result)
        assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {np.dtype("float32")}
    np.testing.assert_allclose(plain.log_probs, fit(start_of(ROWS), ROWS).log_probs, rtol=1e-3)


def test_start_with_tiny_emission_noise():
    start = eqx.tree_at(lambda p: p.emissions.cov, start_of(ROWS), jnp.asarray(np.full(EMISSION_DIM, 1e-6)))
    result = fit(start, ROWS)
    assert_sound(result)
    assert (result.params.emissions.cov > 1e-3).any()


def test_single_precision_changes_form_where_the_parameters_ask_for_it(monkeypatch):
    """A program for each form, one after the other, does what one program of both does."""
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start_of(ROWS))
    start = eqx.tree_at(lambda p: p.emissions.cov, single, jnp.full(EMISSION_DIM, 1e-6, jnp.float32))
    chosen = []

    def choose(*args):
        chosen.append(choose_method(*args))
        return chosen[-1]

    monkeypatch.setattr(em_loop, "choose_method", choose)
    result = fit(start, ROWS)
    assert chosen == ["sqrt", "sequential"]
    assert_sound(result)
    both = jax.jit(lambda params: fit(params, ROWS).log_probs)(start)
    np.testing.assert_allclose(result.log_probs[:5], both[:5], rtol=1e-4)
    monkeypatch.setattr(em_loop, "choose_method", lambda *_: "sqrt")
    against_the_verdict = fit(start, ROWS)  # ends all the same
    np.testing.assert_allclose(against_the_verdict.log_probs[:5], both[:5], rtol=1e-4)


def test_unused_input():
    start = start_of(ROWS)
    result = fit(start, ROWS, inputs=np.zeros_like(ROWS.inputs))
    assert_sound(result)
    for block in ("dynamics", "emissions"):
        after, before = (getattr(p, block).input_weights for p in (result.params, start))
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)


def test_two_inputs_that_never_differ():
    """What they do together is learned, through updates of EM and steps beyond; how they share it stays as it was."""
    where = lambda p: (p.dynamics.input_weights, p.emissions.input_weights)  # noqa: E731
    start = start_of(ROWS)
    start = eqx.tree_at(where, start, [jnp.concatenate([w, w + 0.3], axis=1) for w in where(start)])
    result = fit(start, ROWS, inputs=np.concatenate([ROWS.inputs, ROWS.inputs], axis=-1))
    assert_sound(result)
    for after, before in zip(where(result.params), where(start), strict=True):
        np.testing.assert_allclose(after[:, 1] - after[:, 0], before[:, 1] - before[:, 0], rtol=0, atol=1e-9)
        assert (np.abs(after - before) > 1e-3).any()


def test_state_that_is_clamped_throughout():
    always = np.arange(NUM_TIMESTEPS)[:, None] > [0, NUM_TIMESTEPS]  # from the first arrival on
    plan = issm.Intervention(ROWS.mask | always, ROWS.value, ROWS.variance)
    start = start_of(ROWS)
    result = fit(start, ROWS, plan=plan)
    assert_sound(result)
    np.testing.assert_array_equal(result.kept, [True, False])
    assert "dynamics of state 0" in result.reason
    for name in ("weights", "bias", "input_weights", "cov"):
        before, after = getattr(start.dynamics, name), getattr(result.params.dynamics, name)
        np.testing.assert_array_equal(after[0], before[0])
        assert (np.asarray(after[1]) != np.asarray(before[1])).all()


def test_channel_without_an_observation_and_trials_of_unequal_length():
    emissions = with_channel(2, np.nan)
    emissions[1, 9:] = np.nan
    emissions[3] = np.nan
    start = start_of(ROWS)
    result = fit(start, ROWS, emissions=emissions)
    assert_sound(result)
    for name in ("weights", "bias", "input_weights", "cov"):
        np.testing.assert_array_equal(getattr(result.params.emissions, name)[2], getattr(start.emissions, name)[2])
    assert not result.floored.any()


@pytest.mark.parametrize(
    "shape", [dict(num_trials=3, num_timesteps=1), dict(num_trials=50, num_timesteps=2)], ids=["T = 1", "50 of T = 2"]
)
def test_short_trials(shape):
    system = helpers.random_system(7, **shape, clamps="initial", **DIAGONAL)
    start = issm.make_lgssm_params(**system.fields)
    result = fit(start, system)
    assert_sound(result)
    one_step = shape["num_timesteps"] == 1
    np.testing.assert_array_equal(result.kept, [one_step, one_step])
    if one_step:
        assert "dynamics of state 0, 1" in result.reason
        assert_same(result.params.dynamics, start.dynamics, rtol=0)


def test_start_whose_likelihood_is_not_finite():
    start = eqx.tree_at(lambda p: p.dynamics.bias, start_of(ROWS), jnp.asarray(np.full(STATE_DIM, 1e200)))
    result = fit(start, ROWS)
    assert "starting parameters" in result.reason
    assert not result.converged
    assert result.num_iters == 0
    assert_same(result.params, start, rtol=0)


# What the result says


def test_log_probs_belong_to_the_parameters_before_each_update():
    whole = fit(start_of(ROWS), ROWS)
    assert_sound(whole)
    assert whole.num_iters == NUM_ITERS
    assert Code(int(whole.code)) == Code.MAX_ITERS
    assert "num_iters" in whole.reason
    assert not whole.converged
    assert whole.log_probs[-1] == pytest.approx(log_prob(whole.params, ROWS), rel=1e-9)
    np.testing.assert_array_equal(whole.log_priors, 0.0)
    params = start_of(ROWS)
    for k in range(4):
        assert whole.log_probs[k] == pytest.approx(log_prob(params, ROWS), rel=1e-9)
        one = fit(params, ROWS, tol=ONE_UPDATE)
        assert one.num_iters == 1
        assert one.converged
        assert one.log_probs.shape == (2,)
        params = one.params


def test_tolerance_is_nats_for_each_observed_number():
    tol, numbers = 1e-3, ROWS.emissions.size
    whole = fit(start_of(ROWS), ROWS, accelerate=False)
    result = fit(start_of(ROWS), ROWS, tol=tol, accelerate=False)
    expected = int(np.argmax(np.diff(whole.log_probs) <= tol * numbers)) + 1
    assert 1 < expected < NUM_ITERS
    assert result.num_iters == expected
    assert result.converged
    assert result.reason.startswith("converged")
    np.testing.assert_array_equal(result.log_probs, whole.log_probs[: expected + 1])
    assert result.log_probs[-1] == pytest.approx(log_prob(result.params, ROWS), rel=1e-9)


def test_bar_changes_nothing_but_standard_error(capsys):
    quiet = fit(start_of(ROWS), ROWS)
    assert capsys.readouterr() == ("", "")
    shown = fit(start_of(ROWS), ROWS, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(rf"\rfit_em  \[=+\]  {NUM_ITERS}/{NUM_ITERS}  log prob -\d[\d.e+]*  [\d.]+ s\n$", err)
    assert_same(shown, quiet, rtol=0)
    assert shown.reason == quiet.reason


def test_interrupt_returns_what_has_been_reached(monkeypatch, capsys):
    whole = fit(start_of(ROWS), ROWS)
    draw, seen = em_loop.ProgressBar.draw, []

    def interrupt(self, done, objective):
        seen.append(done)
        draw(self, done, objective)
        if done >= 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(em_loop.ProgressBar, "draw", interrupt)
    result = fit(start_of(ROWS), ROWS, progress=True)
    assert result.reason == "interrupted"
    assert not result.converged
    assert result.num_iters == seen[-1] - 1  # the last update has no likelihood yet
    np.testing.assert_array_equal(result.log_probs, whole.log_probs[: result.num_iters + 1])
    assert result.log_probs[-1] == pytest.approx(log_prob(result.params, ROWS), rel=1e-9)
    assert capsys.readouterr().err.endswith("\n")


def test_interrupt_before_the_first_update(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(em_loop, "run", interrupt)
    result = fit(start_of(ROWS), ROWS, progress=True)
    assert result.reason == "interrupted"
    assert result.num_iters == 0
    assert_same(result.params, start_of(ROWS), rtol=0)
    assert np.isnan(result.log_probs).all()


# Batches of starts


def test_vmapped_starts_are_the_loop():
    starts = [start_of(ROWS, seed, distance) for seed, distance in enumerate((0.2, 0.05, 0.5))]
    tol = 1e-3
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    batch = jax.jit(jax.vmap(lambda params: fit(params, ROWS, tol=tol)))(stacked)
    loop = [fit(params, ROWS, tol=tol) for params in starts]
    assert len({one.num_iters for one in loop}) > 1, "they should end at different updates"
    assert batch.log_probs.shape == (3, NUM_ITERS + 1)
    assert batch.reason == [one.reason for one in loop]
    for i, one in enumerate(loop):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], batch.params), one.params, rtol=1e-7, atol=1e-9)
        last = one.num_iters
        assert int(batch.num_iters[i]) == last
        np.testing.assert_allclose(batch.log_probs[i, : last + 1], one.log_probs, rtol=1e-9)
        np.testing.assert_array_equal(batch.log_probs[i, last:], batch.log_probs[i, last])


# Every option


PRIORS = issm.Priors(
    initial=issm.RegressionPrior(precision=0.5, degrees=3.0, scale=0.2),
    dynamics=issm.RegressionPrior(precision=2.0, degrees=3.0, scale=0.2),
    emissions=issm.RegressionPrior(mean=0.1, precision=1.0, degrees=5.0, scale=0.3),
    input_l1=0.7,
)
VARIANTS = {
    "diagonal, shared noisy clamps, missing, inputs, priors": (
        helpers.random_system(8, **SHAPE, **DIAGONAL, input_dim=1, clamps="noisy", missing=0.15, missing_steps=(14,)),
        PRIORS,
    ),
    "full, clamps by trial, missing, inputs, priors": (
        helpers.random_system(9, **SHAPE, input_dim=1, clamps="mixed", shared_interventions=False, missing=0.15),
        PRIORS,
    ),
    "full Q and S beside a diagonal R, no clamps": (
        helpers.random_system(10, **SHAPE, emissions_cov="diagonal"),
        None,
    ),
    "diagonal Q beside a full R, shared clamps": (
        helpers.random_system(11, **SHAPE, dynamics_cov="diagonal", clamps="mixed", missing=0.1),
        None,
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_never_goes_down(name):
    system, priors = VARIANTS[name]
    result = fit(start_of(system), system, priors=priors)
    assert_sound(result)
    assert result.log_probs[-1] == pytest.approx(log_prob(result.params, system), rel=1e-9)
    assert result.num_iters == NUM_ITERS


def test_sparsity_prior_silences_an_input():
    system, _ = VARIANTS["diagonal, shared noisy clamps, missing, inputs, priors"]
    strong = eqx.tree_at(lambda p: p.input_l1, PRIORS, 1e4)
    result = fit(start_of(system), system, priors=strong)
    assert_sound(result)
    np.testing.assert_array_equal(result.params.dynamics.input_weights, 0.0)


# Clamps identify the dynamics


def test_dynamics_are_recovered_where_the_additive_model_fails(record_property):
    weights = np.array([[0.8, -0.4, 0.0], [0.4, 0.7, 0.0], [0.0, 0.5, 0.6]])
    num_trials, num_timesteps, state_dim = 8, 80, 3
    rng = np.random.default_rng(0)
    readout = rng.normal(size=(6, state_dim))
    truth = issm.make_lgssm_params(
        np.zeros(state_dim), np.ones(state_dim), weights, np.full(state_dim, 0.1), readout, np.full(6, 0.1)
    )
    plans = []
    for k in range(num_trials):  # two of the states follow a staircase for three quarters of the trial
        clamps = {i % state_dim: np.repeat(rng.normal(size=6), 10) for i in (k, k + 1)}
        plans.append(issm.do(clamps, num_timesteps=num_timesteps, state_dim=state_dim, start=10, stop=70))
    plan = jax.tree.map(lambda *leaves: jnp.stack(leaves), *plans)
    _, emissions = issm.lgssm_sample(jax.random.key(0), truth, num_timesteps, interventions=plan)
    inputs = np.where(plan.mask, plan.value, 0.0)

    def error(input_dim, **data):
        blank = issm.make_lgssm_params(
            np.zeros(state_dim),
            np.ones(state_dim),
            0.5 * np.eye(state_dim),
            np.ones(state_dim),
            readout,
            np.ones(6),
            dynamics_input_weights=np.zeros((state_dim, input_dim)),
            emissions_input_weights=np.zeros((6, input_dim)),
        )
        kept = jax.tree.map(lambda _: True, blank)
        kept = eqx.tree_at(lambda m: (m.emissions.weights, m.emissions.input_weights), kept, (False, False))
        result = issm.fit_em(blank, emissions, **data, trainable=kept, num_iters=60, tol=0.0)
        assert_sound(result)
        return np.linalg.norm(result.params.dynamics.weights - weights) / np.linalg.norm(weights)

    clamped, additive = error(0, interventions=plan), error(state_dim, inputs=inputs)
    record_property("relative error in A", f"under clamps {clamped:.3f}, additive {additive:.3f}")
    assert clamped < 0.15
    assert clamped < additive / 3


# Bad calls


PARAMS = start_of(ROWS)
(Y, U), PLAN = ROWS.data[0], ROWS.interventions
ALL = jax.tree.map(lambda _: True, PARAMS)
FULL_PARAMS = start_of(FULL)


def partly_frozen():
    mask = np.ones((STATE_DIM, STATE_DIM), bool)
    mask[0, 1] = mask[1, 0] = False
    return eqx.tree_at(lambda m: m.dynamics.cov, jax.tree.map(lambda _: True, FULL_PARAMS), mask)


VARYING = eqx.tree_at(
    lambda p: p.dynamics.weights, PARAMS, issm.TimeVarying(jnp.zeros((NUM_TIMESTEPS, STATE_DIM, STATE_DIM)))
)

# name: (arguments, options, the argument named, what came, what was expected)
BAD_CALLS = {
    "no update": ((PARAMS, Y, U), dict(num_iters=0), "num_iters", "0", "at least 1"),
    "half an update": ((PARAMS, Y, U), dict(num_iters=2.5), "num_iters", "2.5", "an integer"),
    "True updates": ((PARAMS, Y, U), dict(num_iters=True), "num_iters", "True", "an integer"),
    "negative tolerance": ((PARAMS, Y, U), dict(tol=-1.0), "tol", "-1.0", "at least zero"),
    "tolerance is NaN": ((PARAMS, Y, U), dict(tol=np.nan), "tol", "nan", "at least zero"),
    "tolerance is a word": ((PARAMS, Y, U), dict(tol="small"), "tol", "small", "a number"),
    "tolerance for each trial": ((PARAMS, Y, U), dict(tol=np.zeros(4)), "tol", "", "a number"),
    "accelerate by number": ((PARAMS, Y, U), dict(accelerate=1), "accelerate", "1", "True or False"),
    "bar by number": ((PARAMS, Y, U), dict(progress=1), "progress", "1", "True or False"),
    "priors are a dictionary": ((PARAMS, Y, U), dict(priors={}), "priors", "a dict", "a Priors"),
    "one prior": (
        (PARAMS, Y, U),
        dict(priors=issm.RegressionPrior(precision=1.0)),
        "priors",
        "a RegressionPrior",
        "a Priors",
    ),
    "prior of a block is a number": (
        (PARAMS, Y, U),
        dict(priors=eqx.tree_at(lambda p: p.dynamics, PRIORS, 1.0)),
        "priors.dynamics",
        "a float",
        "a RegressionPrior",
    ),
    "prior of another size": (
        (PARAMS, Y, U),
        dict(priors=issm.Priors(dynamics=issm.RegressionPrior(precision=np.ones(3)))),
        "priors.dynamics.precision",
        "shape (3,)",
        "(4, 4)",
    ),
    "scale without degrees": (
        (PARAMS, Y, U),
        dict(priors=issm.Priors(emissions=issm.RegressionPrior(scale=1.0))),
        "priors.emissions.degrees",
        "None",
        "degrees of freedom",
    ),
    "negative sparsity": (
        (PARAMS, Y, U),
        dict(priors=issm.Priors(input_l1=-1.0)),
        "priors.input_l1",
        "-1.0",
        "at least zero",
    ),
    "trainable of another structure": ((PARAMS, Y, U), dict(trainable={"A": True}), "trainable", "structure", "prefix"),
    "trainable by name": ((PARAMS, Y, U), dict(trainable="dynamics"), "trainable", "dynamics", "True, False"),
    "trainable by number": (
        (PARAMS, Y, U),
        dict(trainable=eqx.tree_at(lambda m: m.dynamics.bias, ALL, 0)),
        "trainable.dynamics.bias",
        "dtype int",
        "Boolean",
    ),
    "trainable of another shape": (
        (PARAMS, Y, U),
        dict(trainable=eqx.tree_at(lambda m: m.dynamics.weights, ALL, np.ones(2, bool))),
        "trainable.dynamics.weights",
        "shape (2,)",
        "(2, 2)",
    ),
    "nothing to train": ((PARAMS, Y, U), dict(trainable=False), "trainable", "nothing but False", "at least one"),
    "single entries of a full covariance": (
        (FULL_PARAMS, Y, U),
        dict(trainable=partly_frozen()),
        "trainable.dynamics.cov",
        "single entries",
        "the whole matrix",
    ),
    "to train what varies in time": (
        (VARYING, Y, U),
        dict(trainable=eqx.tree_at(lambda m: m.dynamics.weights, ALL, True)),
        "trainable.dynamics.weights",
        "True",
        "False",
    ),
    "parameters are a dictionary": ((ROWS.fields, Y, U), {}, "params", "a dict", "ParamsLGSSM"),
    "emissions first": ((Y, PARAMS), {}, "params", "", "ParamsLGSSM"),
    "emissions of another size": ((PARAMS, Y[..., :2], U), {}, "emissions", "(4, 15, 2)", "3)"),
    "all missing": ((PARAMS, np.full_like(Y, np.nan), U), {}, "emissions", "NaN", "observed"),
    "infinite": ((PARAMS, np.full_like(Y, np.inf), U), {}, "emissions", "infinite", "finite"),
    "inputs left out": ((PARAMS, Y), {}, "inputs", "None", "(15, 1)"),
    "interventions of fewer steps": (
        (PARAMS, Y, U),
        dict(interventions=issm.no_intervention(14, STATE_DIM)),
        "interventions",
        "(14, 2)",
        "(15, 2)",
    ),
    "interventions of more trials": (
        (PARAMS, Y[:3], U),
        dict(interventions=PLAN),
        "interventions",
        "(4, 15, 2)",
        "(3, 15, 2)",
    ),
    "a mask for interventions": ((PARAMS, Y, U), dict(interventions=PLAN.mask), "interventions", "", "an Intervention"),
}


@pytest.fixture
def user_calls():
    """Calls as a user makes them: without the type checks of these tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("user_calls")
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_name_the_argument_before_compilation(name, monkeypatch):
    arguments, options, argument, got, expected = BAD_CALLS[name]

    def compiled(*_, **__):
        raise AssertionError("compiled before it was checked")

    for kernel in ("prepare", "run", "_finish"):
        monkeypatch.setattr(em, kernel, compiled)
    with pytest.raises(ValueError) as caught:
        issm.fit_em(*arguments, **options)
    message = str(caught.value)
    assert message.startswith(f"{argument}: got "), message
    came, _, wanted = message.partition("; expected ")
    assert got in came, message
    assert expected in wanted, message
    assert wanted.rstrip().endswith("."), message
