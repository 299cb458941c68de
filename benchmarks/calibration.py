"""Are estimates as good as they can be, and standard errors and intervals as wide as they should be?

    python benchmarks/calibration.py                                   # everything, with few replications
    python benchmarks/calibration.py --replications 2000 --sections efficiency
    python benchmarks/calibration.py --sections sbc --simulations 1000

One system of three states under clamps, known emission weights and start; unknown: A, b, Q, R. `efficiency` compares maximum
likelihood with the Cramér-Rao bound, the inverse of the information averaged over replications at the truth. `coverage` counts how
often 95 % intervals of every entry of A hold the truth, with the standard error of that share by the number of replications. `sbc`
draws parameters from the prior and data from them, and tests the ranks of the truth among posterior draws for uniformity.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy import stats

import issm
from issm.inference.information import free_directions, observed_information
from issm.models.trials import as_trials

SECTIONS = ("efficiency", "coverage", "sbc")
WEIGHTS = np.array([[0.7, 0.2, 0.0], [-0.3, 0.6, 0.2], [0.0, 0.3, 0.5]])
TRUTH = dict(
    initial_mean=np.zeros(3), initial_cov=np.ones(3), dynamics_weights=WEIGHTS, dynamics_bias=[0.2, -0.1, 0.0],
    dynamics_cov=[0.3, 0.2, 0.4], emissions_weights=[[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, -0.5]],
    emissions_cov=[0.2, 0.3, 0.2, 0.3],
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--replications", type=int, default=200, help="of maximum likelihood and information intervals")
    parser.add_argument("--resampled", type=int, default=20, help="replications of bootstrap and posterior intervals")
    parser.add_argument("--refits", type=int, default=200, help="of each bootstrap")
    parser.add_argument("--draws", type=int, default=500, help="of each of two chains")
    parser.add_argument("--simulations", type=int, default=200, help="of simulation-based calibration")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--at-once", type=int, default=20, help="replications side by side")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if options.simulations and "sbc" in options.sections:
        calibrate(options)
    if {"efficiency", "coverage"} & set(options.sections):
        study(options)


def design(num_trials, num_timesteps):
    """Every trial clamps each state once, a third of the time in all, to values of its own."""
    rng = np.random.default_rng(7)
    mask, value = np.zeros((num_trials, num_timesteps, 3), bool), np.zeros((num_trials, num_timesteps, 3))
    length = max(num_timesteps // 8, 1)
    for k in range(num_trials):
        for i, start in enumerate(rng.choice(num_timesteps - length, 3, replace=False)):
            mask[k, start : start + length, i] = True
            value[k, start : start + length, i] = rng.normal() * 2
    return issm.Intervention(mask, value)


def in_batches(function, keys, size):
    """The results of all keys, `size` of them at a time."""
    run, count = jax.jit(jax.vmap(function)), len(keys)
    keys = keys[np.arange(-(-count // size) * size) % count]  # one size of batch, one compilation
    parts = [run(keys[start : start + size]) for start in range(0, len(keys), size)]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:count], *parts)


def unknown(params):
    where = lambda p: (p.dynamics.weights, p.dynamics.bias, p.dynamics.cov, p.emissions.cov)  # noqa: E731
    return eqx.tree_at(where, jax.tree.map(lambda _: False, params), (True,) * 4)


def study(options):
    truth, plan = issm.make_lgssm_params(**TRUTH), design(options.trials, options.steps)
    trainable, known = unknown(truth), {"interventions": plan, "trainable": unknown(truth)}
    directions = free_directions(truth, trainable)
    keys = jax.random.split(jax.random.key(options.seed), options.replications)

    def replicate(key):
        _, emissions = issm.lgssm_sample(key, truth, options.steps, interventions=plan)
        fit = issm.fit_em(truth, emissions, num_iters=400, tol=1e-10, **known)
        errors = issm.parameter_covariance(fit.params, emissions, **known)
        information = observed_information(truth, as_trials(truth, emissions, None, plan), directions, "sequential")
        return emissions, fit, errors.standard_errors.dynamics.weights, information

    began = time.perf_counter()
    emissions, fits, errors, information = in_batches(replicate, keys, options.at_once)
    estimates = np.asarray(fits.params.dynamics.weights)
    print(f"{options.replications} fits with information, {np.asarray(fits.converged).sum()} converged,"
          f" {time.perf_counter() - began:.0f} s")  # fmt: skip

    embedded = directions @ jnp.linalg.inv(information.mean(axis=0)) @ directions.T
    _, unravel = ravel_pytree(truth)
    bound = np.sqrt(np.asarray(unravel(jnp.diagonal(embedded)).dynamics.weights))
    if "efficiency" in options.sections:
        rmse = np.sqrt(((estimates - WEIGHTS) ** 2).mean(axis=0))
        bias = (estimates.mean(axis=0) - WEIGHTS) / estimates.std(axis=0)
        print(
            f"RMSE / Cramér-Rao bound, entries of A: {np.round(rmse / bound, 3).tolist()}, largest {(rmse / bound).max():.3f}"
        )
        print(f"bias / sd: {np.round(bias, 3).tolist()}, largest {np.abs(bias).max():.3f}"
              f" (its own standard error {1 / np.sqrt(len(estimates)):.3f})")  # fmt: skip
    if "coverage" in options.sections:
        report("information", np.abs(estimates - WEIGHTS) <= 1.96 * np.asarray(errors))
        resample(options, truth, known, emissions, fits)


def resample(options, truth, known, emissions, fits):
    """Bootstrap and posterior intervals of the first replications."""
    inside = {"bootstrap": [], "posterior": []}
    began, r_hat = {name: 0.0 for name in inside}, []
    for k in range(min(options.resampled, options.replications)):
        params = jax.tree.map(lambda leaf, k=k: leaf[k], fits.params)
        for name in inside:
            start, key = time.perf_counter(), jax.random.key(1000 + k)
            if name == "bootstrap":
                result = issm.bootstrap(
                    key,
                    params,
                    emissions[k],
                    num_samples=options.refits,
                    num_at_once=50,
                    num_iters=200,
                    tol=1e-8,
                    **known,
                )
            else:
                result = issm.sample_parameters(
                    key, params, emissions[k], num_samples=options.draws, num_warmup=100, num_chains=2, **known
                )
                r_hat.append(float(result.r_hat.dynamics.weights.max()))
            lower, upper = (np.asarray(end.dynamics.weights) for end in result.intervals(0.95))
            inside[name].append((lower <= WEIGHTS) & (upper >= WEIGHTS))
            began[name] += time.perf_counter() - start
    for name, hits in inside.items():
        if hits:
            report(f"{name} ({began[name] / len(hits):.1f} s each)", np.array(hits))
    if r_hat:
        print(
            f"  largest R-hat of A in each replication: {np.max(r_hat):.3f} at most, {np.median(r_hat):.3f} in the middle"
        )


def report(name, inside):
    """Coverage of all entries of A; the entries of one replication are not independent, replications are."""
    shares = inside.reshape(len(inside), -1).mean(axis=1)
    error = shares.std(ddof=1) / np.sqrt(len(shares))
    by_entry = np.round(inside.mean(axis=0), 3).tolist()
    print(
        f"95 % intervals by {name}, {len(inside)} replications: cover {shares.mean():.3f} ± {error:.3f}; by entry {by_entry}"
    )


def calibrate(options, num_draws=31, num_bins=8):
    """Ranks of the truth among posterior draws that are far enough apart to count as independent."""
    like, plan = issm.make_lgssm_params(**TRUTH), design(2, 12)
    degrees, scale, precision = 8.0, 3.0, 10.0
    prior = issm.RegressionPrior(precision=precision, degrees=degrees, scale=scale)
    only_cov = issm.RegressionPrior(degrees=degrees, scale=scale)
    priors = issm.Priors(dynamics=prior, emissions=only_cov)

    def simulate(key):
        names = ("process", "noise", "weights", "bias", "data", "chain")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        variances = lambda key, dim: scale / 2 / jax.random.gamma(key, degrees / 2, (dim,))  # noqa: E731
        process = variances(keys["process"], 3)
        sd = jnp.sqrt(process / precision)
        truth = eqx.tree_at(
            lambda p: (p.dynamics.weights, p.dynamics.bias, p.dynamics.cov, p.emissions.cov), like,
            (sd[:, None] * jax.random.normal(keys["weights"], (3, 3)), sd * jax.random.normal(keys["bias"], (3,)), process,
             variances(keys["noise"], 4)),
        )  # fmt: skip
        _, emissions = issm.lgssm_sample(keys["data"], truth, 12, interventions=plan)
        samples = issm.sample_parameters(
            keys["chain"], like, emissions, interventions=plan, trainable=unknown(like), priors=priors,
            num_samples=num_draws, num_warmup=60, num_chains=1, thin=8,
        )  # fmt: skip
        return jax.tree.map(lambda draws, own: (draws < own[None]).sum(axis=0), samples.draws, truth)

    began = time.perf_counter()
    keys = jax.random.split(jax.random.key(options.seed + 1), options.simulations)
    ranks = in_batches(simulate, keys, options.at_once)
    fields = {"A": ranks.dynamics.weights, "b": ranks.dynamics.bias, "Q": ranks.dynamics.cov, "R": ranks.emissions.cov}
    p_values = {}
    for name, field in fields.items():
        for index in np.ndindex(field.shape[1:]):
            counts = np.bincount(
                np.asarray(field)[(slice(None), *index)] * num_bins // (num_draws + 1), minlength=num_bins
            )
            p_values[f"{name}{list(index)}"] = stats.chisquare(counts).pvalue
    smallest = min(p_values, key=p_values.get)
    seconds, low = time.perf_counter() - began, sum(p < 0.01 for p in p_values.values())
    print(f"simulation-based calibration, {options.simulations} simulations, {seconds:.0f} s, {len(p_values)} parameters:"
          f" smallest p {p_values[smallest]:.4f} ({smallest}), {low} below 0.01")  # fmt: skip


if __name__ == "__main__":
    main()
