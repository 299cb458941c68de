"""Are intervals of effects as wide as they should be, and p-values uniform where there is no effect?

    python benchmarks/effect_coverage.py [--replications 200]

Every replication simulates an experiment on one system of three states whose third drives nothing, fits all parameters from the
data-driven start, and asks for the effect of clamps that no trial contained: the first two states together (coverage), and the third,
on emissions that read the other two (no effect at all, p-values). Standard errors of fits are beside their spread over the
replications.
"""

import argparse
import time

import jax
import numpy as np
from scipy import stats

import issm

NUM_TRIALS, NUM_TIMESTEPS, HORIZON = 20, 60, 20
STATE_DIM, EMISSION_DIM = 3, 6
LOADING = np.array(
    [[1.0, 0.3, 0.0], [-0.5, 1.0, 0.0], [0.8, -0.6, 0.0], [0.2, 0.4, 1.0], [-0.7, 0.1, 0.8], [0.3, -0.3, -0.9]]
)
TRUTH = dict(
    initial_mean=[0.5, -0.3, 0.2], initial_cov=[0.5, 0.4, 0.3], dynamics_weights=[[0.7, 0.2, 0.0], [-0.3, 0.6, 0.0], [0.3, -0.2, 0.5]],
    dynamics_bias=[0.2, -0.1, 0.1], dynamics_cov=[0.3, 0.2, 0.3], emissions_weights=LOADING, emissions_cov=[0.2, 0.3, 0.2, 0.3, 0.2, 0.3],
    emissions_bias=[1.0, 0.0, -1.0, 0.5, 0.0, 2.0],
)  # fmt: skip
UNMOVED = 3  # the first emissions do not read the third state


def training_plan():
    """Every trial holds each state once, alone, at a value of its own."""
    rng = np.random.default_rng(5)
    mask, value = (np.zeros((NUM_TRIALS, NUM_TIMESTEPS, STATE_DIM), kind) for kind in (bool, float))
    for k in range(NUM_TRIALS):
        starts = 4 + 18 * rng.permutation(STATE_DIM)
        for i, start in enumerate(starts):
            mask[k, start : start + 8, i] = True
            value[k, start : start + 8, i] = 2 * rng.normal()
    return issm.Intervention(mask, value)


def spread_error(estimates: np.ndarray) -> float:
    """Relative standard error of the standard deviation over the first axis, from the fourth moments; the mean over entries."""
    centred = estimates - estimates.mean(axis=0)
    kurtosis = (centred**4).mean(axis=0) / (centred**2).mean(axis=0) ** 2
    return float(np.sqrt((kurtosis - 1) / (4 * len(estimates))).mean())


def main() -> None:
    """Print coverage, p-values and standard errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replications", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    truth, plan = issm.make_lgssm_params(**TRUTH), training_plan()
    horizon = dict(num_timesteps=HORIZON, state_dim=STATE_DIM, start=3, stop=12)
    pair, third = issm.do({0: 1.5, 1: -1.0}, **horizon), issm.do({2: 2.0}, **horizon)
    true_effect = issm.causal_effect(truth, pair, window="on")
    effects, nulls, weights, errors, unconverged = [], [], [], [], 0
    began = time.perf_counter()
    for key in jax.random.split(jax.random.key(options.seed), options.replications):
        data_key, start_key = jax.random.split(key)
        _, emissions = issm.lgssm_sample(data_key, truth, NUM_TIMESTEPS, interventions=plan)
        start = issm.initialize_lgssm(start_key, emissions, STATE_DIM, interventions=plan).params
        fit = issm.fit_em(start, emissions, interventions=plan, num_iters=300, tol=1e-9)
        known = issm.parameter_covariance(fit.params, emissions, interventions=plan)
        effects.append(issm.causal_effect(fit.params, pair, parameters=known.covariance, window="on"))
        nulls.append(issm.causal_effect(fit.params, third, parameters=known.covariance, window="on").average)
        weights.append(fit.params.dynamics.weights)
        errors.append(known.standard_errors.dynamics.weights)
        unconverged += not fit.converged
    print(
        f"{options.replications} experiments fitted from scratch in {time.perf_counter() - began:.0f} s, {unconverged} not converged"
    )

    for name in ("average", "per_step"):
        wanted = getattr(true_effect, name).mean
        found = [getattr(effect, name) for effect in effects]
        inside = np.array([(e.parameter.lower <= wanted) & (wanted <= e.parameter.upper) for e in found])
        moved = np.broadcast_to(
            np.abs(wanted) > 1e-12, inside.shape[1:]
        )  # at unmoved steps the effect is zero in every fit
        shares = inside[:, moved].mean(axis=1)
        by_emission = np.round(inside.mean(axis=0), 3).tolist() if name == "average" else ""
        print(f"95 % intervals of the {name} effect of an unseen pair of clamps cover {shares.mean():.3f}"
              f" ± {shares.std(ddof=1) / np.sqrt(len(shares)):.3f} {by_emission}")  # fmt: skip

    p_values = np.array([effect.parameter.p_value[:UNMOVED] for effect in nulls])
    tests = [stats.kstest(column, "uniform").pvalue for column in p_values.T]
    print(f"no effect: p-values below .05 in {(p_values < 0.05).mean(axis=0).round(3).tolist()} of the replications by emission;"
          f" uniform by Kolmogorov and Smirnov with p {np.round(tests, 3).tolist()}")  # fmt: skip
    errors, weights = np.array(errors), np.array(weights)
    spread = weights.std(axis=0, ddof=1)
    summaries = {
        "root mean square": np.sqrt((errors**2).mean(axis=0)), "mean": errors.mean(axis=0), "median": np.median(errors, axis=0)
    }  # fmt: skip
    print(
        f"standard errors over the spread of the estimates, entries of A; the spread is known to {spread_error(weights):.1%}"
    )
    for word, each in summaries.items():
        print(f"    {word + ':':18} {(each / spread).round(3).tolist()}, all together {(each / spread).mean():.3f}")
    print(f"    largest standard error over the median one: {(errors.max(axis=0) / summaries['median']).max():.2f}")


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
