"""`counterfactual_effect` against the joint Gaussian of both worlds at all steps, draw by draw, and against what it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import issm
from helpers import random_system
from test_counterfactual import CLAMPED, FREE, NOISY, NUM_TIMESTEPS, SIZES, affine_worlds
from worlds import as_plan

MIX = np.array([[1.0, -0.5, 0.25]])
READOUTS = {
    "emissions": ("emissions", np.eye(3)),
    "states": ("states", np.eye(2)),
    "mixed": (issm.Readout(MIX), MIX),
}
MISSING = random_system(
    1, num_trials=3, num_timesteps=NUM_TIMESTEPS, input_dim=1, missing=0.4, shared_inputs=True, missing_steps=(2,)
)


def reference(system, trial, factual, other, of, mix):
    """Means and covariance, given the emissions seen, of (difference, outcome) stacked over steps and outputs."""
    worlds = affine_worlds(system.fields, system.inputs, [as_plan(factual), as_plan(other)])
    (_, (mean, loading)), y = worlds[0], system.emissions[trial].ravel()
    seen = ~np.isnan(y)
    here, there = (world[0 if of == "states" else 1] for world in worlds)
    blown = np.kron(np.eye(NUM_TIMESTEPS), mix)
    m = np.concatenate([blown @ (there[0] - here[0]), blown @ there[0]])
    l = np.concatenate([blown @ (there[1] - here[1]), blown @ there[1]])
    gain = np.linalg.solve(loading[seen] @ loading[seen].T, loading[seen] @ l.T).T
    return m + gain @ (y[seen] - mean[seen]), l @ l.T - gain @ loading[seen] @ l.T


def check_against_sums(effect, mean, cov, steps):
    """Every field, by loops over outputs and matrices of ones."""
    dim = len(mean) // (2 * NUM_TIMESTEPS)
    close = dict(rtol=1e-7, atol=1e-8)
    for n in range(dim):
        pick = lambda chosen, part, n=n: np.bincount(  # noqa: E731
            [part * NUM_TIMESTEPS * dim + t * dim + n for t in chosen], minlength=len(mean)
        )
        for t in range(NUM_TIMESTEPS):
            for part, found in ((0, effect.per_step), (1, effect.outcome)):
                w = pick([t], part)
                np.testing.assert_allclose(found.mean[t, n], w @ mean, **close)
                np.testing.assert_allclose(found.trial.sd[t, n] ** 2, w @ cov @ w, **close)
            w = pick([s for s in steps if s <= t], 0)
            np.testing.assert_allclose(effect.cumulative.mean[t, n], w @ mean, **close)
            np.testing.assert_allclose(effect.cumulative.sd[t, n] ** 2, w @ cov @ w, **close)
        for part, found in ((0, effect.average), (1, effect.average_outcome)):
            w = pick(steps, part) / len(steps)
            np.testing.assert_allclose(found.mean[n], w @ mean, **close)
            np.testing.assert_allclose(found.sd[n] ** 2, w @ cov @ w, **close)
        w, outcome = pick(steps, 0) / len(steps), pick(steps, 1) / len(steps)
        np.testing.assert_allclose(effect.relative.mean[n], w @ mean / (outcome @ mean - w @ mean), rtol=1e-6)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("worlds", [(FREE, CLAMPED), (CLAMPED, NOISY)], ids=["to clamps", "clamped to noisy"])
def test_sums_over_steps_are_those_of_the_joint_gaussian(readout, worlds):
    """With missing entries; a trial by itself, and the average over three of them, whose variances add up."""
    of, mix = READOUTS[readout]
    factual, other = worlds
    options = dict(interventions=factual, inputs=MISSING.inputs, of=of, window=(1, 4))
    effect = issm.counterfactual_effect(MISSING.params, MISSING.emissions, other, **options)
    name = of if isinstance(of, str) else of.of
    answers = [reference(MISSING, k, factual, other, name, mix) for k in range(3)]
    for k, (mean, cov) in enumerate(answers):
        check_against_sums(jax.tree.map(lambda leaf, k=k: leaf[k] if leaf.ndim else leaf, effect), mean, cov, [1, 2, 3])
    averaged = issm.counterfactual_effect(MISSING.params, MISSING.emissions, other, **options, average_trials=True)
    mean, cov = (sum(parts) for parts in zip(*answers, strict=True))
    check_against_sums(averaged, mean / 3, cov / 9, [1, 2, 3])


SYSTEM = random_system(
    4,
    num_timesteps=NUM_TIMESTEPS,
    input_dim=1,
    initial_cov="diagonal",
    dynamics_cov="diagonal",
    emissions_cov="diagonal",
)


def ask(plan, params=SYSTEM.params, **options):
    return issm.counterfactual_effect(params, SYSTEM.emissions, plan, inputs=SYSTEM.inputs, **options)


def test_steps_are_those_of_the_counterfactual():
    effect, each = ask(CLAMPED), issm.counterfactual(SYSTEM.params, SYSTEM.emissions, CLAMPED, inputs=SYSTEM.inputs)
    np.testing.assert_allclose(effect.outcome.mean, each.emissions.mean, rtol=1e-10)
    np.testing.assert_allclose(effect.outcome.sd, each.emissions.sd, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(effect.mean, each.emissions.mean - SYSTEM.emissions, rtol=1e-9, atol=1e-12)
    assert [line.split()[0] for line in effect.summary().splitlines()[3::3]] == [
        "outcome", "average", "cumulative", "relative",
    ]  # fmt: skip


def test_equal_plans_change_nothing():
    effect = ask(CLAMPED, interventions=CLAMPED)
    for part in (effect.per_step, effect.cumulative, effect.average):
        np.testing.assert_array_equal(part.mean, 0.0)
        np.testing.assert_array_equal(part.sd, 0.0)
        np.testing.assert_array_equal(part.total.p_value, 1.0)
    np.testing.assert_array_equal(effect.average_outcome.mean, SYSTEM.emissions.mean(axis=0))


def test_windows_are_where_the_plans_differ():
    """The window "on" of the step at which only one plan clamps, in both directions."""
    late = issm.do({0: 1.0}, **SIZES, start=2, stop=3)
    for effect in (ask(late, window="on"), ask(FREE, interventions=late, window="on")):
        np.testing.assert_allclose(effect.average.mean, effect.mean[2], rtol=1e-12)
        np.testing.assert_allclose(effect.average.sd, effect.sd[2], rtol=1e-10)


def test_uncertain_parameters():
    """Draws are asked one by one; a covariance of rank one against finite differences along its direction."""
    flat, unravel = ravel_pytree(SYSTEM.params)
    changes = 0.05 * np.random.default_rng(0).normal(size=(10, flat.size)) * np.abs(flat)
    few = jax.vmap(unravel)(jnp.asarray(np.asarray(flat) + changes))
    estimate = ask(CLAMPED, parameters=few, window=(1, 4))
    alone = [ask(CLAMPED, jax.tree.map(lambda leaf, s=s: leaf[s], few), window=(1, 4)) for s in range(10)]
    for name in ("per_step", "cumulative", "average", "relative", "outcome", "average_outcome"):
        got = getattr(estimate, name)
        means, sds = (np.stack([getattr(getattr(one, name), field) for one in alone]) for field in ("mean", "sd"))
        np.testing.assert_allclose(got.mean, means.mean(axis=0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got.parameter.sd, means.std(axis=0, ddof=1), rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(got.trial.sd, np.sqrt((sds**2).mean(axis=0)), rtol=1e-8, atol=1e-12)
    direction = np.zeros(flat.size)
    direction[[10, 11, 14]] = [0.1, -0.05, 0.02]
    slope = [ask(CLAMPED, unravel(flat + sign * 1e-4 * direction)).average.mean for sign in (1, -1)]
    from_cov = ask(CLAMPED, parameters=np.outer(direction, direction)).average
    np.testing.assert_allclose(from_cov.parameter.sd, np.abs(slope[0] - slope[1]) / 2e-4, rtol=1e-5)
    np.testing.assert_allclose(from_cov.trial.sd, ask(CLAMPED).average.sd, rtol=1e-9)
