"""How many trials a designed experiment saves: error in A after n designed trials, and after n and 2 n random ones.

    python benchmarks/design_study.py [--systems 20] [--repeats 4] [--trials 4]

Every system has a pool of random pulses. Designed trials are chosen from it knowing a first guess of the dynamics, fitted to two
trials without clamps; random trials are drawn from the same pool. The dynamics are then fitted to all trials by EM.
"""

import argparse
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import issm
from issm.simulate import random_stimulation

NUM_TIMESTEPS, STATE_DIM, EMISSION_DIM, POOL, FIRST = 30, 3, 5, 40, 2
LOADING = np.random.default_rng(0).normal(size=(EMISSION_DIM, STATE_DIM))


def random_truth(seed: int) -> issm.ParamsLGSSM:
    """A random stable system with a spectral radius between 0.7 and 0.95."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(STATE_DIM, STATE_DIM))
    weights *= rng.uniform(0.7, 0.95) / np.abs(np.linalg.eigvals(weights)).max()
    return issm.make_lgssm_params(
        np.zeros(STATE_DIM),
        np.full(STATE_DIM, 0.1),
        weights,
        np.full(STATE_DIM, 0.1),
        LOADING,
        np.full(EMISSION_DIM, 0.05),
    )


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, 0))
def fitted(key: jax.Array, truth: issm.ParamsLGSSM, plans: issm.Intervention) -> issm.ParamsLGSSM:
    """Simulate an experiment and fit its dynamics, from a start that knows none of them."""
    _, emissions = issm.lgssm_sample(key, truth, NUM_TIMESTEPS, interventions=plans)
    nothing = jax.tree.map(lambda _: False, truth)
    free = eqx.tree_at(lambda p: (p.dynamics.weights, p.dynamics.bias, p.dynamics.cov), nothing, (True, True, True))
    start = eqx.tree_at(lambda p: p.dynamics.weights, truth, 0.5 * jnp.eye(STATE_DIM))
    return issm.fit_em(start, emissions, interventions=plans, trainable=free, num_iters=60).params


def stacked(trees: list) -> object:
    """One tree with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def main() -> None:
    """Print medians over the systems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--trials", type=int, default=4)
    options = parser.parse_args()
    truths = [random_truth(seed) for seed in range(options.systems) for _ in range(options.repeats)]
    truth, count = stacked(truths), len(truths)
    keys = jax.random.split(jax.random.key(0), (4, count))
    pools = [
        random_stimulation(
            jax.random.key(100 + k),
            NUM_TIMESTEPS,
            STATE_DIM,
            num_trials=POOL,
            duration=(3, 10),
            gap=(2, 12),
            one_at_a_time=True,
        )
        for k in range(count)
    ]
    none = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:FIRST]), pools[0])
    guesses = fitted(keys[0], truth, stacked([none] * count))
    errors = {}
    arms = {"designed": options.trials, "random": options.trials, "random, twice as many": 2 * options.trials}
    for arm, (name, trials) in enumerate(arms.items()):
        plans = []
        for k in range(count):
            if name == "designed":
                guess = jax.tree.map(lambda leaf, k=k: leaf[k], guesses)
                chosen = issm.design_interventions(guess, pools[k], budget=trials, criterion="A").plans
            else:
                places = np.random.default_rng(k).choice(POOL, trials, replace=False)
                chosen = jax.tree.map(lambda leaf, places=places: leaf[places], pools[k])
            plans.append(jax.tree.map(lambda a, b: jnp.concatenate([a, b]), none, chosen))
        found = fitted(keys[1 + arm], truth, stacked(plans)).dynamics.weights
        squares = ((found - truth.dynamics.weights) ** 2).sum(axis=(1, 2))
        errors[name] = np.asarray(squares).reshape(options.systems, options.repeats).mean(axis=1)
        print(
            f"{name:24}{trials:4} trials: root mean square error of A, median {np.sqrt(np.median(errors[name])):.3f}",
            flush=True,
        )
    for name in list(errors)[1:]:
        ratio = errors["designed"] / errors[name]
        print(
            f"squared error, designed over {name}: median {np.median(ratio):.2f}, below one in {(ratio < 1).mean():.0%} of systems"
        )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
