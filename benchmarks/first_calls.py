"""What a first call waits for the compiler: the main functions on one small experiment, each in a process of its own.

    python benchmarks/first_calls.py                    # every function, float64
    python benchmarks/first_calls.py --dtype float32 --functions fit_em fit_sgd
    python benchmarks/first_calls.py --kept             # also the first call of the next process, with what was compiled kept on disk

Ten trials of 200 steps, two states, three emissions, two clamps: small enough for the second call, which is printed beside the
first, to say how much of it was computing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

NUM_TRIALS, NUM_TIMESTEPS = 10, 200
FUNCTIONS = {
    "lgssm_sample": lambda s: s.issm.lgssm_sample(s.key, s.params, NUM_TIMESTEPS, interventions=s.plan),
    "lgssm_filter": lambda s: s.issm.lgssm_filter(s.params, s.emissions, interventions=s.plan),
    "lgssm_smoother": lambda s: s.issm.lgssm_smoother(s.params, s.emissions, interventions=s.plan),
    "marginal_log_prob": lambda s: s.issm.marginal_log_prob(s.params, s.emissions, interventions=s.plan),
    "its gradient": lambda s: s.gradient(s.params),
    "posterior_sample": lambda s: s.issm.posterior_sample(s.key, s.params, s.emissions, interventions=s.plan),
    "initialize_lgssm": lambda s: s.issm.initialize_lgssm(s.key, s.emissions, state_dim=2, interventions=s.plan),
    "fit_em": lambda s: s.issm.fit_em(s.params, s.emissions, interventions=s.plan, num_iters=3),
    "fit_sgd": lambda s: s.issm.fit_sgd(s.params, s.emissions, interventions=s.plan, num_epochs=3),
    "parameter_covariance": lambda s: s.issm.parameter_covariance(s.params, s.emissions, interventions=s.plan),
    "identifiability": lambda s: s.issm.identifiability(s.plan, s.params, s.emissions),
    "bootstrap": lambda s: s.issm.bootstrap(
        s.key, s.params, s.emissions, interventions=s.plan, num_samples=4, num_iters=3
    ),
    "sample_parameters": lambda s: s.issm.sample_parameters(
        s.key, s.params, s.emissions, interventions=s.plan, num_samples=4, num_warmup=4
    ),
    "causal_effect": lambda s: s.issm.causal_effect(s.params, s.unseen),
    "counterfactual": lambda s: s.issm.counterfactual(s.params, s.emissions, s.untouched, interventions=s.plan),
    "residual_diagnostics": lambda s: s.issm.residual_diagnostics(s.params, s.emissions, interventions=s.plan),
    "design_interventions": lambda s: s.issm.design_interventions(s.params, [s.unseen, s.other], budget=1),
}


class Experiment:
    """Arguments of all functions."""

    def __init__(self, dtype: str):
        import jax

        jax.config.update("jax_enable_x64", dtype == "float64")
        import issm

        self.issm, self.key = issm, jax.random.key(0)
        self.params = issm.make_lgssm_params(
            [0.0, 0.0], [1.0, 1.0], [[0.9, 0.0], [0.4, 0.8]], [0.05, 0.05],
            [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0.1, 0.1, 0.1],
        )  # fmt: skip
        clamp = lambda i, value, start, stop, steps=NUM_TIMESTEPS: issm.do(  # noqa: E731
            {i: value}, num_timesteps=steps, state_dim=2, start=start, stop=stop
        )
        self.plan = issm.merge(clamp(0, np.linspace(0.5, 2.0, 30), 40, 70), clamp(1, -1.0, 120, 150))
        self.unseen, self.other = clamp(0, 1.0, 10, 30, 40), clamp(1, 1.0, 10, 30, 40)
        self.untouched = issm.no_intervention(NUM_TIMESTEPS, 2)
        self.emissions = jax.random.normal(self.key, (NUM_TRIALS, NUM_TIMESTEPS, 3)).block_until_ready()
        log_prob = lambda params: issm.marginal_log_prob(params, self.emissions, interventions=self.plan).sum()  # noqa: E731
        self.gradient = jax.jit(jax.grad(log_prob))


def measure(name: str, dtype: str) -> None:
    """Seconds of the first and of the second call."""
    import jax

    experiment = Experiment(dtype)
    for _ in range(2):
        began = time.perf_counter()
        jax.block_until_ready(jax.tree.leaves(FUNCTIONS[name](experiment)))
        print(f"{time.perf_counter() - began:.5f}", end=" ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--functions", nargs="+", choices=list(FUNCTIONS), default=list(FUNCTIONS), metavar="FUNCTION")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--kept", action="store_true", help="once more, with what was compiled kept on disk")
    parser.add_argument("--measure", choices=list(FUNCTIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure, arguments.dtype)
    print(
        f"| {arguments.dtype} | first call (s) |{' in the next process (s) |' if arguments.kept else ''} second (ms) |"
    )
    print("|---|---|---|" + ("---|" if arguments.kept else ""))
    for name in arguments.functions:
        command = [sys.executable, __file__, "--dtype", arguments.dtype, "--measure", name]
        with tempfile.TemporaryDirectory() as folder:
            kept = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
            environment = {**os.environ, **(kept if arguments.kept else {})}
            runs = [
                subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout.split()
                for _ in range(1 + arguments.kept)
            ]
        firsts = "".join(f" {float(first):.1f} |" for first, _ in runs)
        print(f"| {name} |{firsts} {1e3 * float(runs[0][1]):.1f} |", flush=True)


if __name__ == "__main__":
    main()
