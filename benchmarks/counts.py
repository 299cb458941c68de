"""Poisson emissions: how well is the response to stimulation predicted that nobody has tried?

    python benchmarks/counts.py [--sizes 6x25] [--systems 5] [--no-dynamax]

Random stable systems, each state clamped alone in training, pairs of them together in the test. The mean squared error of the predicted
rates against held-out counts, over that of the true expected counts, which nothing but luck can beat. Beside the library's
fitters: the same model with clamps taken for additive inputs, and dynamax's filter for such models (CMGF, its likelihood
maximised by Adam), which knows no clamps either.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import issm

NUM_TRIALS, NUM_TIMESTEPS, NUM_TEST, NUM_DRAWS = 40, 50, 40, 400
SIZES = ((3, 15), (4, 18), (6, 25))


def system(rng, state_dim, emission_dim):
    """A model with rates of about five counts, stable whichever pair of states is held."""
    turn = np.linalg.qr(rng.normal(size=(state_dim, state_dim)))[0]
    weights = 0.5 * turn + 0.5 * np.eye(state_dim)
    held = [np.delete(np.arange(state_dim), [i, j]) for i in range(state_dim) for j in range(i + 1)]
    largest = max(np.abs(np.linalg.eigvals(weights[np.ix_(free, free)])).max(initial=0.0) for free in held)
    weights *= 0.9 / max(largest, np.abs(np.linalg.eigvals(weights)).max())
    linear = issm.make_lgssm_params(
        np.zeros(state_dim), np.full(state_dim, 0.1), weights, np.full(state_dim, 0.02), np.eye(state_dim), np.ones(state_dim),
        dynamics_bias=0.05 * rng.normal(size=state_dim),
    )  # fmt: skip
    readout = 0.6 * rng.normal(size=(emission_dim, state_dim)) / np.sqrt(state_dim)
    emission = issm.PoissonEmission(
        issm.LinearMap(readout, np.log(5.0) + 0.3 * rng.normal(size=emission_dim)), link="exp"
    )
    return issm.SSM(linear.initial, linear.dynamics, emission)


def plans(rng, state_dim, num_trials, together):
    """Every trial holds `together` states at once, twice, at values of its own."""
    mask, value = (np.zeros((num_trials, NUM_TIMESTEPS, state_dim), kind) for kind in (bool, float))
    for k in range(num_trials):
        for start in (5 + rng.integers(8), 28 + rng.integers(8)):
            for i in rng.permutation(state_dim)[:together]:
                mask[k, start : start + 8, i] = True
                value[k, start : start + 8, i] = rng.choice([-1, 1]) * rng.uniform(0.5, 1.5)
    return issm.Intervention(mask, value)


def predicted(model, plan, inputs=None):
    """Expected counts under a plan: means over draws of the states."""
    draws = issm.sample_prediction(jax.random.key(9), model, plan, inputs=inputs, num_draws=NUM_DRAWS)
    inputs = jnp.zeros((*plan.mask.shape[:2], 0)) if inputs is None else inputs
    rate = lambda state, u: model.emission.mean(model.emission.map(state) + model.emission.input_weights @ u)  # noqa: E731
    mean = lambda states, inputs: jax.vmap(jax.vmap(rate))(states, inputs)  # noqa: E731
    return jax.vmap(mean, in_axes=(1, None))(draws.states.draws, inputs).mean(axis=0)


def by_dynamax(counts, inputs, state_dim, num_iters=300):
    """Additive inputs, the likelihood of the conditional moments filter maximised; returns a function that predicts rates."""
    from dynamax.generalized_gaussian_ssm import EKFIntegrals, ParamsGGSSM, conditional_moments_gaussian_filter
    from tensorflow_probability.substrates.jax.distributions import Poisson

    emission_dim = counts.shape[2]
    start = dict(
        weights=0.9 * jnp.eye(state_dim), inputs=0.1 * jnp.eye(state_dim), bias=jnp.zeros(state_dim), process=jnp.full(state_dim, -3.0),
        readout=0.1 * jax.random.normal(jax.random.key(3), (emission_dim, state_dim)), offset=jnp.log(counts.mean(axis=(0, 1)) + 0.1),
    )  # fmt: skip

    def rates(p, state):
        return jnp.exp(p["readout"] @ state + p["offset"])

    def loss(p):
        model = ParamsGGSSM(
            initial_mean=jnp.zeros(state_dim), initial_covariance=0.1 * jnp.eye(state_dim),
            dynamics_function=lambda x, u: p["weights"] @ x + p["inputs"] @ u + p["bias"],
            dynamics_covariance=jnp.diag(jnp.exp(p["process"])),
            emission_mean_function=lambda x, u: rates(p, x), emission_cov_function=lambda x, u: jnp.diag(rates(p, x)),
            emission_dist=lambda mean, cov: Poisson(log_rate=jnp.log(mean)),
        )  # fmt: skip
        each = lambda y, u: conditional_moments_gaussian_filter(model, EKFIntegrals(), y, u).marginal_loglik  # noqa: E731
        return -jax.vmap(each)(counts, inputs).sum() / counts.size

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, num_iters))

    def update(carry, _):
        p, state = carry
        value, slope = jax.value_and_grad(loss)(p)
        moves, state = optimizer.update(slope, state)
        return (optax.apply_updates(p, moves), state), value

    (p, _), losses = jax.jit(lambda p: jax.lax.scan(update, (p, optimizer.init(p)), None, num_iters))(start)
    assert np.isfinite(losses).all()

    def predict(inputs):
        def one(key, u):
            noise = jnp.exp(p["process"] / 2) * jax.random.normal(key, (len(u), state_dim))
            step = lambda x, at: ((new := p["weights"] @ x + p["inputs"] @ at[0] + p["bias"] + at[1]), rates(p, new))  # noqa: E731
            return jax.lax.scan(step, jnp.zeros(state_dim), (u, noise))[1]

        keys = jax.random.split(jax.random.key(4), NUM_DRAWS)
        return jax.vmap(lambda key: jax.vmap(one, in_axes=(None, 0))(key, inputs))(keys).mean(axis=0)

    return predict


def study(seed, state_dim, emission_dim, options):
    """Ratio of squared errors and seconds of every fitter on one system."""
    rng = np.random.default_rng([state_dim, seed])
    truth = system(rng, state_dim, emission_dim)
    plan, test_plan = plans(rng, state_dim, NUM_TRIALS, 1), plans(rng, state_dim, NUM_TEST, 2)
    _, counts = issm.sample(jax.random.key(seed), truth, NUM_TIMESTEPS, interventions=plan)
    _, test_counts = issm.sample(jax.random.key(1000 + seed), truth, NUM_TIMESTEPS, interventions=test_plan)
    floor = float(((test_counts - predicted(truth, test_plan)) ** 2).mean())
    start_with = dict(likelihood="poisson", link="exp", widths=())
    start = issm.initialize_ssm(jax.random.key(2), counts, state_dim, interventions=plan, **start_with)
    additive = issm.initialize_ssm(jax.random.key(2), counts, state_dim, input_dim=state_dim, **start_with)
    no_plan = jax.tree.map(jnp.zeros_like, test_plan)
    fitters = {
        "fit_laplace_em": lambda: predicted(
            issm.fit_laplace_em(start, counts, interventions=plan, num_iters=options.sweeps).params, test_plan
        ),
        "fit_vi, structured": lambda: predicted(
            issm.fit_vi(jax.random.key(5), start, None, counts, interventions=plan, num_iters=options.sweeps).params, test_plan
        ),
        "additive Poisson SSM": lambda: predicted(
            issm.fit_laplace_em(additive, counts, plan.value, num_rollout=400, num_iters=options.sweeps).params, no_plan, test_plan.value
        ),
    }  # fmt: skip
    if options.dynamax:
        fitters["dynamax CMGF"] = lambda: by_dynamax(counts, plan.value, state_dim)(test_plan.value)
    row = {}
    for name, fit in fitters.items():
        began = time.perf_counter()
        rates = np.asarray(fit())
        row[name] = (float(((np.asarray(test_counts) - rates) ** 2).mean()) / floor, time.perf_counter() - began)
        print(f"  system {seed}: {name} {row[name][0]:.3f} ({row[name][1]:.0f})", flush=True)
    return row


def _size(text: str) -> tuple[int, int]:
    state_dim, emission_dim = text.split("x")
    return int(state_dim), int(emission_dim)


def main() -> None:
    """Print one line for each fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_size, nargs="+", default=SIZES, metavar="DxN", help="states and emissions")
    parser.add_argument("--systems", type=int, default=5, help="of each size")
    parser.add_argument("--sweeps", type=int, default=200, help="updates after the rollout stage")
    parser.add_argument("--no-dynamax", dest="dynamax", action="store_false")
    options = parser.parse_args()
    for state_dim, emission_dim in options.sizes:
        print(
            f"\nD {state_dim}, N {emission_dim}, K {NUM_TRIALS}, T {NUM_TIMESTEPS}: squared error over the true mean's own (s)"
        )
        rows = []
        for seed in range(options.systems):
            rows.append(study(seed, state_dim, emission_dim, options))
        print("  worst:    " + ", ".join(f"{n} {max(row[n][0] for row in rows):.3f}" for n in rows[0]), flush=True)


if __name__ == "__main__":
    main()
