"""`design_interventions` against loops in NumPy and simulated trials."""

import itertools
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import issm
from helpers import random_system
from worlds import simulate

SIZES = dict(num_timesteps=8, state_dim=2)
CANDIDATES = [
    issm.no_intervention(8, 2),
    *(issm.do({i: v}, **SIZES, start=1, stop=s) for i, v, s in [(0, 1.0, 3), (0, -2.0, 5), (1, 1.5, 4), (1, -1.0, 7)]),
    issm.do({0: 1.0, 1: 1.0}, **SIZES, start=2, stop=6),
]


@pytest.fixture(scope="module")
def system():
    return random_system(2, num_timesteps=8, state_dim=2, emission_dim=2, input_dim=1, dynamics_cov="full")


@pytest.fixture(scope="module")
def informations(system):
    """What each candidate is expected to tell, by simulated trials, with the standard error of the simulation."""
    noise, found = np.asarray(system.fields["dynamics_cov"]), []
    for plan in CANDIDATES:
        mask, value = np.asarray(plan.mask), np.asarray(plan.value)
        ((states, _),) = simulate(
            np.random.default_rng(0), system.fields, system.inputs, [(mask, value, np.zeros_like(value))], 20000
        )
        ones, inputs = np.ones((20000, 8, 1)), np.broadcast_to(system.inputs, (20000, 8, 1))
        z = np.concatenate([states[:, :-1], inputs[:, 1:], ones[:, 1:]], axis=2)
        total = np.zeros((20000, 2, 4, 4))
        for t in range(1, 8):
            free = np.flatnonzero(~mask[t])
            precision = np.linalg.inv(noise[np.ix_(free, free)])
            for place, i in enumerate(free):
                total[:, i] += precision[place, place] * z[:, t - 1, :, None] * z[:, t - 1, None, :]
        found.append((total.mean(axis=0), total.std(axis=0) / np.sqrt(20000)))
    return found


def exact(system, plan):
    return np.asarray(issm.identifiability(plan, system.params, None, system.inputs).information)


def criterion(information, kind, slopes=None):
    covariances = np.linalg.inv(information)
    if kind == "D":
        return -sum(np.linalg.slogdet(c[:2, :2])[1] for c in covariances) / 2
    if kind == "A":
        return -sum(np.trace(c[:2, :2]) for c in covariances)
    return -sum(g @ c @ g for g, c in zip(slopes, covariances, strict=True))


def test_expected_information_is_that_of_simulated_trials(system, informations):
    for plan, (mean, error) in zip(CANDIDATES, informations, strict=True):
        assert (np.abs(exact(system, plan) - mean) <= 4.5 * error + 1e-9).all()


def effect(params):
    return issm.impulse_response(params, 3, source=0).emissions[3, 1]


@pytest.mark.parametrize("kind", ["D", "A", "effect"])
def test_the_greedy_choice(system, kind):
    """Each trial is the best of all candidates, given those before it, and three of them are near the best three."""
    each = [exact(system, plan) for plan in CANDIDATES]
    slopes = None
    if kind == "effect":
        weights, step = np.asarray(system.fields["dynamics_weights"]), 1e-6
        slopes = np.zeros((2, 4))
        for i, j in np.ndindex(2, 2):
            at = [weights + sign * step * (np.arange(4).reshape(2, 2) == 2 * i + j) for sign in (1, -1)]
            values = [float(effect(issm.make_lgssm_params(**system.fields | {"dynamics_weights": w}))) for w in at]
            slopes[i, j] = (values[0] - values[1]) / (2 * step)
    design = issm.design_interventions(
        system.params, CANDIDATES, budget=3, criterion=effect if kind == "effect" else kind, inputs=system.inputs
    )
    total = each[0]
    values = [criterion(total, kind, slopes)]
    for k in range(3):
        options = [criterion(total + one, kind, slopes) for one in each]
        assert int(design.chosen[k]) == np.argmax(options)
        total = total + each[np.argmax(options)]
        values.append(max(options))
    np.testing.assert_allclose(design.criterion, values, rtol=1e-6)
    np.testing.assert_allclose(design.information, total, rtol=1e-9)
    best = max(criterion(each[0] + sum(c), kind, slopes) for c in itertools.combinations_with_replacement(each, 3))
    assert values[-1] - values[0] >= (1 - np.exp(-1)) * (best - values[0])
    expected = np.sqrt([np.diag(c)[:2] for c in np.linalg.inv(total)])
    np.testing.assert_allclose(design.standard_errors, expected, rtol=1e-6)
    assert design.summary().splitlines()[-1].startswith("trial 2")


def test_refined_values_stay_inside_the_bounds_and_tell_more(system):
    known = exact(system, CANDIDATES[0])
    options = dict(budget=2, inputs=system.inputs, information=known)
    plain = issm.design_interventions(system.params, CANDIDATES, **options)
    refined = issm.design_interventions(system.params, CANDIDATES, **options, refine=40, bounds=(-2.0, 2.0))
    assert (plain.chosen == refined.chosen).all()
    assert float(refined.refined_criterion) > float(plain.criterion[-1])
    assert (np.asarray(refined.plans.mask) == np.asarray(plain.plans.mask)).all()
    assert np.abs(np.asarray(refined.plans.value)).max() <= 2.0 + 1e-12
    total = known + sum(exact(system, jax.tree.map(lambda leaf, k=k: leaf[k], refined.plans)) for k in range(2))
    np.testing.assert_allclose(refined.information, total, rtol=1e-9)
    assert float(refined.refined_criterion) == pytest.approx(criterion(total, "D"), rel=1e-6)


def test_the_closed_loop_of_the_examples_learns(capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "closed_loop.py"))
    errors = example["main"](num_batches=2)
    assert errors[1] < errors[0]
    assert "Next trials" in capsys.readouterr().out
