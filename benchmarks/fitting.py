"""How well and how fast a fit gets to the optimum, from the data-driven start, without restarts.

    python benchmarks/fitting.py                             # 20 random systems, 20 hard designs, 6 of each edge
    python benchmarks/fitting.py --sections random --systems 5 --first 0
    python benchmarks/fitting.py --sections dynamax          # time beside dynamax's fit_em and fit_sgd

Of every system: E steps until the log-likelihood is within 1e-6 (relative) of the best that any fit of it reached, those of the
start apart; the log-likelihood less that of a fit started at the true parameters; the held-out mean squared error of
E[y | do(clamps)] over that of the true parameters. `designs.py` says what the systems are.
"""

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from designs import hard_design, random_design, rollout_error

import issm

CLOSE = 1e-6
EDGES = {
    "fewer emissions than states": lambda seed: random_design(
        seed, state_dim=4, emission_dim=3, num_trials=40, num_timesteps=100
    ),
    "one clamp level": lambda seed: random_design(
        seed, state_dim=4, emission_dim=10, num_trials=40, num_timesteps=100, levels=[2.0]
    ),
    "six trials of 50": lambda seed: random_design(seed, state_dim=3, emission_dim=8, num_trials=6, num_timesteps=50),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["random", "hard", "edges", "dynamax"])
    parser.add_argument("--systems", type=int, default=20)
    parser.add_argument("--edges", type=int, default=6, help="systems of each edge")
    parser.add_argument("--first", type=int, default=0, help="seed of the first system")
    parser.add_argument("--num-iters", type=int, default=250)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    seeds = range(arguments.first, arguments.first + arguments.systems)
    if "random" in arguments.sections:
        table("random systems", [(random_design, seed) for seed in seeds], arguments.num_iters)
    if "hard" in arguments.sections:
        table("hard designs", [(hard_design, seed) for seed in seeds], arguments.num_iters)
    if "edges" in arguments.sections:
        for name, make in EDGES.items():
            table(name, [(make, seed) for seed in range(arguments.edges)], arguments.num_iters)
    if "dynamax" in arguments.sections:
        for num_trials, num_timesteps in ((20, 100), (1, 2000)):
            beside_dynamax(num_trials, num_timesteps)


def table(title, cases, num_iters):
    """Print one line for each system, and how many meet each target."""
    print(
        f"\n{title}\n\n| system | K, T, N, D | start | E steps | less truth-started (nats) | its E steps | held-out ratio | s |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for make, seed in cases:
        design = make(seed)
        began = time.perf_counter()
        row = measure(design, num_iters)
        rows.append(row)
        shape = ", ".join(map(str, (*design.emissions.shape, design.truth.state_dim)))
        print(
            f"| {design.name} | {shape} | {row['start']} | {row['steps']} | {row['gain']:.3f} | {row['truth_steps']} "
            f"| {row['ratio']:.4f} | {time.perf_counter() - began:.0f} |",
            flush=True,
        )
        jax.clear_caches()
    steps = [row["steps"] if row["steps"] is not None else np.inf for row in rows]
    print(
        f"\nof {len(rows)}: at most 100 E steps {sum(s <= 100 for s in steps)} (median {np.median(steps):g}), "
        f"within 1 nat of truth-started {sum(r['gain'] >= -1 for r in rows)} (worst {min(r['gain'] for r in rows):.2f}), "
        f"ratio at most 1.05 {sum(r['ratio'] <= 1.05 for r in rows)} (worst {max(r['ratio'] for r in rows):.4f})",
        flush=True,
    )


def measure(design, num_iters):
    """One system: the fit from the data, the fit from the truth, and what both reached."""
    start = issm.initialize_lgssm(jax.random.key(0), design.emissions, design.truth.state_dim, **design.options)
    params = start.params
    if design.truth.dynamics.cov.ndim == 2:
        params = eqx.tree_at(lambda p: p.dynamics.cov, params, jnp.diag(params.dynamics.cov))
    fits = [
        issm.fit_em(p, design.emissions, **design.options, num_iters=num_iters, tol=1e-10)
        for p in (params, design.truth)
    ]
    own, other = (np.asarray(fit.log_probs) for fit in fits)
    best = max(own[-1], other[-1])
    return dict(
        start=start.start,
        steps=steps_to(own, best),
        gain=float(own[-1] - other[-1]),
        truth_steps=steps_to(other, best),
        ratio=rollout_error(fits[0].params, design) / rollout_error(design.truth, design),
    )


def steps_to(log_probs, best):
    """E steps until the log-likelihood is close to the best one; None if never."""
    close = log_probs >= best - CLOSE * abs(best)
    return int(np.argmax(close)) + 1 if close.any() else None


def beside_dynamax(num_trials, num_timesteps, *, state_dim=3, emission_dim=8, num_updates=100):
    """Seconds to a log-likelihood that every fitter reaches, from one start, without clamps.

    The log-likelihood is the lowest of those where the fitters end, NaN apart. With several trials dynamax's EM subtracts
    K^2 instead of K times the squared mean from the initial covariance, which is not positive definite then.
    """
    import optax
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    truth = random_design(
        0, state_dim=state_dim, emission_dim=emission_dim, num_trials=num_trials, num_timesteps=num_timesteps
    ).truth
    keys = jax.random.split(jax.random.key(0), num_trials)
    _, emissions = jax.vmap(lambda key: issm.lgssm_sample(key, truth, num_timesteps))(keys)
    start = issm.initialize_lgssm(jax.random.key(1), emissions, state_dim).params
    covs = tuple(jnp.diag(part.cov) for part in (start.initial, start.dynamics, start.emissions))
    start = eqx.tree_at(lambda p: (p.initial.cov, p.dynamics.cov, p.emissions.cov), start, covs)
    model = LinearGaussianSSM(state_dim, emission_dim)
    params, props = model.initialize(
        jax.random.key(0),
        initial_mean=start.initial.mean,
        initial_covariance=start.initial.cov,
        dynamics_weights=start.dynamics.weights,
        dynamics_bias=start.dynamics.bias,
        dynamics_covariance=start.dynamics.cov,
        emission_weights=start.emissions.weights,
        emission_bias=start.emissions.bias,
        emission_covariance=start.emissions.cov,
    )
    adam = optax.adam(2e-2)

    def their_em(num):
        return model.fit_em(params, props, emissions, num_iters=num, verbose=False)[1]

    def their_sgd(num):
        _, losses = model.fit_sgd(params, props, emissions, optimizer=adam, batch_size=num_trials, num_epochs=num)
        return -losses * emissions.size

    def our_em(num):
        return issm.fit_em(start, emissions, num_iters=num, tol=1e-10).log_probs

    def our_sgd(num):
        return issm.fit_sgd(start, emissions, num_epochs=num).log_probs

    fitters = [
        ("dynamax `fit_em`", their_em, num_updates),
        ("dynamax `fit_sgd`, Adam", their_sgd, 10 * num_updates),
        ("issm `fit_em`", our_em, num_updates),
        ("issm `fit_sgd`, L-BFGS", our_sgd, num_updates),
    ]
    first_calls = [seconds(fit, 1)[1] for _, fit, _ in fitters]
    traces = [np.asarray(fit(num)) for _, fit, num in fitters]
    target = min(trace[-1] for trace in traces if np.isfinite(trace[-1])) * (1 + 1e-9)  # the traces round differently
    print(f"\nK {num_trials}, T {num_timesteps}, N {emission_dim}, D {state_dim}; to {target:.3f}\n")
    print("| fitter | ends at | after | to the target | s | first call, s |\n|---|---|---|---|---|---|")
    for (name, fit, _), trace, first in zip(fitters, traces, first_calls, strict=True):
        there = np.flatnonzero(trace >= target)
        ends = f"| {name} | {trace[-1]:.3f} | {len(trace)} |"
        if not there.size:
            print(f"{ends} never | | {first:.1f} |")
            continue
        num = int(there[0]) + 1
        # dynamax compiles at every call: what one update takes is taken off, for all.
        took = min(seconds(fit, num)[1] for _ in range(3)) - min(seconds(fit, 1)[1] for _ in range(3))
        print(f"{ends} {num} | {took:.3f} | {first:.1f} |", flush=True)


def seconds(fit, num):
    """What a fit returns, and the seconds that it took."""
    began = time.perf_counter()
    result = jax.block_until_ready(fit(num))
    return result, time.perf_counter() - began


if __name__ == "__main__":
    main()
