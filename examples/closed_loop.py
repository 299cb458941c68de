"""A closed loop: measure a little, choose the clamps that will tell most, measure these, and see what has become known."""

import equinox as eqx
import jax
import jax.numpy as jnp

import issm
from issm.simulate import random_stimulation

NUM_TIMESTEPS, STATE_DIM = 30, 3
TRUTH = issm.make_lgssm_params(
    initial_mean=[0.0, 0.0, 0.0],
    initial_cov=[0.1, 0.1, 0.1],
    dynamics_weights=[[0.7, 0.0, -0.2], [0.4, 0.6, 0.0], [0.0, 0.5, 0.6]],
    dynamics_cov=[0.05, 0.05, 0.05],
    emissions_weights=[[1.0, 0.0, 0.2], [0.0, 1.0, 0.0], [0.3, 0.0, 1.0], [0.5, -0.5, 0.5]],
    emissions_cov=[0.05, 0.05, 0.05, 0.05],
)  # stands for the animal
KNOWN = jax.tree.map(lambda _: False, TRUTH)
DYNAMICS = eqx.tree_at(lambda p: (p.dynamics.weights, p.dynamics.bias, p.dynamics.cov), KNOWN, (True, True, True))


def measure(key, plans):
    """One experiment. In the laboratory: carry the plans out, and record."""
    return issm.lgssm_sample(key, TRUTH, NUM_TIMESTEPS, interventions=plans)[1]


def taken(plans, trials):
    """Some of many trials."""
    return jax.tree.map(lambda leaf: leaf[trials], plans)


def placed(plans, trials, new):
    """The plans with new ones in the place of some."""
    return jax.tree.map(lambda leaf, others: leaf.at[trials].set(others), plans, new)


@jax.jit
def learn(emissions, plans):
    """Fit the dynamics (how the channels see the states is known here), and ask what the data say about every edge.

    Trials that have not been measured yet are missing entries and say nothing: one compilation serves all batches.
    """
    start = eqx.tree_at(lambda p: p.dynamics.weights, TRUTH, 0.5 * jnp.eye(STATE_DIM))
    params = issm.fit_em(start, emissions, interventions=plans, trainable=DYNAMICS, num_iters=50).params
    return params, issm.identifiability(plans, params, emissions, trainable=False)


def main(num_batches=3, batch=3):
    """The first batch clamps nothing, the others are chosen one after the other among forty random trials."""
    keys = jax.random.split(jax.random.key(0), num_batches + 1)
    candidates = random_stimulation(
        keys[0], NUM_TIMESTEPS, STATE_DIM, num_trials=40, duration=(4, 10), gap=(3, 10), one_at_a_time=True
    )
    plans = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[: num_batches * batch]), candidates)
    emissions = jnp.full((num_batches * batch, NUM_TIMESTEPS, len(TRUTH.emissions.bias)), jnp.nan)
    errors = []
    for b, key in enumerate(keys[1:]):
        here = slice(b * batch, (b + 1) * batch)
        if b:
            design = issm.design_interventions(
                params, candidates, budget=batch, criterion="A", information=report.information
            )
            print(design.summary())
            plans = placed(plans, here, design.plans)
        emissions = emissions.at[here].set(measure(key, taken(plans, here)))
        params, report = learn(emissions, plans)
        errors.append(float(jnp.linalg.norm(params.dynamics.weights - TRUTH.dynamics.weights)))
        print(f"{(b + 1) * batch} trials: error of A {errors[-1]:.3f}")
    print(report.summary())
    return errors


if __name__ == "__main__":
    main()
