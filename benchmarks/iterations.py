"""What an iteration of the fits of general models costs, and whether it grows faster than the recording.

    python benchmarks/iterations.py [--lengths 100 1000 10000] [--dtypes float32 float64] [--emission gaussian]

Every fit is run twice with few and with more iterations, after both have been compiled: the difference of the times, over that of
the counts, is the time of an iteration without compilation and without what comes before and after. "growth" is the time of a
step of the data beside that at the length before: 1 is linear.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import issm
from issm.simulate import random_stimulation

STATE_DIM, EMISSION_DIM, REPEATS = 3, 10, 3
FITS = ("rollout stage", "Laplace EM", "structured VI", "mean-field LSTM")


def data(num_trials, num_timesteps, dtype, emission):
    """Trials of a turning system behind a linear map, each state clamped now and then, and a model to start from."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(STATE_DIM, STATE_DIM)))[0]
    readout = np.random.default_rng(1).normal(size=(EMISSION_DIM, STATE_DIM)) / np.sqrt(STATE_DIM)
    linear = issm.make_lgssm_params(
        np.zeros(STATE_DIM), np.full(STATE_DIM, 0.1), 0.9 * turn, np.full(STATE_DIM, 0.02), np.eye(STATE_DIM), np.ones(STATE_DIM)
    )  # fmt: skip
    linear_map = issm.LinearMap(readout, np.ones(EMISSION_DIM))
    noise = {
        "gaussian": lambda: issm.GaussianEmission(linear_map, np.full(EMISSION_DIM, 0.1)),
        "poisson": lambda: issm.PoissonEmission(linear_map),
    }
    truth = issm.SSM(linear.initial, linear.dynamics, noise[emission]())
    plan = random_stimulation(
        jax.random.key(0), num_timesteps, STATE_DIM, num_trials=num_trials, duration=10, gap=(20, 60)
    )
    _, emissions = issm.sample(jax.random.key(1), truth, num_timesteps, interventions=plan)
    emissions = emissions.astype(dtype)
    start = issm.initialize_ssm(jax.random.key(2), emissions, STATE_DIM, likelihood=emission, widths=(20,))
    return start, emissions, jax.tree.map(lambda x: x.astype(dtype) if x.dtype != bool else x, plan)


def runner(name, start, emissions, plan):
    """A function that runs one fit for so many iterations, twenty times as many in the rollout stage."""
    key, none = jax.random.key(3), {"interventions": plan, "num_rollout": 0}
    if name == "rollout stage":
        return lambda n: issm.fit_laplace_em(start, emissions, interventions=plan, num_rollout=20 * n, num_iters=0)
    if name == "Laplace EM":
        return lambda n: issm.fit_laplace_em(start, emissions, num_iters=n, **none)
    network = None
    if name == "mean-field LSTM":
        network = issm.MeanFieldLSTM(key, EMISSION_DIM, STATE_DIM, 0, width=20, bidirectional=True)
        network = jax.tree.map(lambda x: x.astype(emissions.dtype) if hasattr(x, "dtype") else x, network)
    return lambda n: issm.fit_vi(key, start, network, emissions, num_iters=n, **none)


def seconds_per_iteration(run, few, more):
    """The difference of the least run times, over the difference of the numbers of iterations."""

    def seconds(count):
        began = time.perf_counter()
        fit = jax.block_until_ready(run(count))
        return time.perf_counter() - began, max(int(fit.num_iters), fit.rollout_log_probs.size - 1)

    for count in (few, more):
        seconds(count)  # compiles
    (short, before), (long, after) = (min(seconds(count) for _ in range(REPEATS)) for count in (few, more))
    return (long - short) / (after - before)


def study(options):
    """Rows (dtype, fit, length, seconds of an iteration)."""
    for dtype in options.dtypes:
        for name in options.fits:
            for length in options.lengths:
                run = runner(name, *data(options.trials, length, jnp.dtype(dtype), options.emission))
                yield dtype, name, length, seconds_per_iteration(run, *options.iterations)


def main(arguments=None) -> None:
    """Print one line for each fit and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1000, 3000, 10000])
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "float64"])
    parser.add_argument("--emission", default="gaussian", choices=["gaussian", "poisson"])
    parser.add_argument("--fits", nargs="+", default=FITS, choices=FITS)
    parser.add_argument("--iterations", type=int, nargs=2, default=[3, 9], metavar=("FEW", "MORE"))
    options = parser.parse_args(arguments)
    if "float64" in options.dtypes:
        jax.config.update("jax_enable_x64", True)
    print(f"{'':8} {'':16} {'steps':>6} {'ms an iteration':>16} {'µs a step':>10} {'growth':>7}")
    last = None
    for dtype, name, length, seconds in study(options):
        per_step = seconds / (length * options.trials)
        growth = f"{per_step / last[1]:7.2f}" if last and last[0] == (dtype, name) else ""
        print(f"{dtype:8} {name:16} {length:6} {1e3 * seconds:16.2f} {1e6 * per_step:10.2f} {growth}", flush=True)
        last = ((dtype, name), per_step)


if __name__ == "__main__":
    main()
