"""How many stimulation channels `learn_targets` gets exactly right, over random systems.

    python benchmarks/targets.py                          # 40 systems at snr 2
    python benchmarks/targets.py --snr 0.25 0.5 1 2 4     # a curve
    python benchmarks/targets.py --trials 20 60 180       # another

Each system has 6 states, 12 emissions and 4 to 8 channels, of which about 70 % clamp one or two states (also to zero), 15 % are soft
and 15 % do nothing. One channel is on at a time, for 3 to 8 steps. `snr` is the root mean square of an emission's signal over the
standard deviation of its noise. A channel is exact if its kind and, for a clamp, its set of states are right under one
permutation of the states for the whole system. Beside it the rule of clamping whatever the input weights touch: input weights
fitted with an L1 penalty by gradient descent, given the true A, C, Q and R; a state is clamped where its weight is not zero.
"""

import argparse
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

import issm

STATE_DIM, EMISSION_DIM, NUM_TIMESTEPS = 6, 12, 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", type=int, default=40)
    parser.add_argument("--snr", type=float, nargs="+", default=[2.0])
    parser.add_argument("--trials", type=int, nargs="+", default=[60])
    parser.add_argument("--first", type=int, default=0, help="seed of the first system")
    parser.add_argument("--num-iters", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=np.inf, help="start no system after this time")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    began = time.perf_counter()
    print(
        f"{'snr':>5} {'trials':>6} {'systems':>7} {'exact':>9} {'share':>6} {'undecided':>9} {'wrong':>5} {'L1 rule':>9} {'s each':>6}"
    )
    for snr, trials in itertools.product(arguments.snr, arguments.trials):
        counts = np.zeros(5, int)  # channels, exact, undecided, wrong, exact by the L1 rule
        done, spent = 0, 0.0
        for seed in range(arguments.first, arguments.first + arguments.systems):
            if time.perf_counter() - began > arguments.seconds:
                break
            system = System(seed, trials, snr)
            start = time.perf_counter()
            learned = issm.learn_targets(
                jax.random.key(seed),
                system.emissions,
                system.amplitudes,
                STATE_DIM,
                active=system.active,
                num_iters=arguments.num_iters,
            )
            spent += time.perf_counter() - start
            exact = system.exact(learned.kinds, np.asarray(learned.targets) != 0)
            undecided = np.array([kind == "undecided" for kind in learned.kinds])
            hits = l1_rule(system)
            by_rule = system.exact(tuple("clamp" if row.any() else "none" for row in hits), hits)
            counts += [len(exact), exact.sum(), undecided.sum(), (~exact & ~undecided).sum(), by_rule.sum()]
            done += 1
            if arguments.verbose:
                print(seed, exact.astype(int), system.kinds, learned.kinds, learned.reasons, flush=True)
        if done:
            total, right, unsure, wrong, rule = counts
            print(
                f"{snr:5g} {trials:6d} {done:7d} {right:4d}/{total:<4d} {right / total:6.1%} {unsure:9d} {wrong:5d}"
                f" {rule:4d}/{total:<4d} {spent / done:6.1f}",
                flush=True,
            )


class System:
    """A random system with its channels, and data."""

    def __init__(self, seed: int, num_trials: int, snr: float):
        rng = np.random.default_rng(seed)
        dim, channels = STATE_DIM, int(rng.integers(4, 9))
        left, right = (np.linalg.qr(rng.normal(size=(dim, dim)))[0] for _ in range(2))
        self.weights = 0.95 * left * np.append(1.0, rng.uniform(0.5, 1.0, dim - 1)) @ right  # stable under every clamp
        self.noise = rng.uniform(0.3, 1.0, dim)
        self.loadings = rng.normal(size=(EMISSION_DIM, dim))
        cov = scipy.linalg.solve_discrete_lyapunov(self.weights, np.diag(self.noise))
        signal = np.einsum("ni,ij,nj->n", self.loadings, cov, self.loadings)
        self.emission_noise = np.full(EMISSION_DIM, signal.mean() / snr**2)
        self.bias = rng.normal(size=EMISSION_DIM)
        self.targets, effects, kinds = np.zeros((channels, dim)), np.zeros((dim, channels)), []
        for m in range(channels):
            kind = rng.choice(["clamp", "soft", "none"], p=[0.7, 0.15, 0.15])
            kinds.append(str(kind))
            if kind == "clamp":
                hit = rng.choice(dim, rng.integers(1, 3), replace=False)
                self.targets[m, hit] = rng.uniform(0.7, 2.0, len(hit)) * rng.choice([-1, 1], len(hit))
            elif kind == "soft":
                hit = rng.choice(dim, rng.integers(1, 4), replace=False)
                effects[hit, m] = rng.uniform(0.5, 1.5, len(hit)) * rng.choice([-1, 1], len(hit))
        self.kinds = tuple(kinds)
        self.active, self.amplitudes = stimulation(rng, num_trials, channels)
        params = issm.make_lgssm_params(
            np.zeros(dim), cov, self.weights, self.noise, self.loadings, self.emission_noise,
            emissions_bias=self.bias, dynamics_input_weights=effects,
        )  # fmt: skip
        plan = issm.stimulate(self.amplitudes, self.targets, self.active)
        _, self.emissions = issm.lgssm_sample(
            jax.random.key(seed), params, NUM_TIMESTEPS, jnp.asarray(self.amplitudes), interventions=plan
        )

    def exact(self, kinds: tuple[str, ...], hits: np.ndarray) -> np.ndarray:
        """Which channels are right, under the permutation of states that makes most of them so."""
        alike = np.array([a == b for a, b in zip(kinds, self.kinds, strict=True)])
        truth = self.targets != 0
        best = np.zeros(len(alike), bool)
        for order in itertools.permutations(range(STATE_DIM)):
            right = alike & (hits[:, order] == truth).all(axis=1)
            if right.sum() > best.sum():
                best = right
        return best


def stimulation(rng: np.random.Generator, num_trials: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Pulses of one channel at a time; a quarter of them to zero."""
    active = np.zeros((num_trials, NUM_TIMESTEPS, channels), bool)
    amplitudes = np.zeros(active.shape)
    for k in range(num_trials):
        t = int(rng.integers(2, 6))
        while t < NUM_TIMESTEPS - 3:
            m, length = rng.integers(channels), int(rng.integers(3, 9))
            active[k, t : t + length, m] = True
            amplitudes[k, t : t + length, m] = rng.choice([-1, 0, 1, 2]) * rng.uniform(0.5, 1.5)
            t += length + int(rng.integers(3, 9))
    return active, amplitudes


def l1_rule(system: System, penalty: float = 0.1, num_steps: int = 500) -> np.ndarray:
    """Non-zero input weights after gradient descent on squared innovations with an L1 penalty, everything else being known."""
    precision = system.loadings.T / system.emission_noise
    states = np.linalg.solve(
        precision @ system.loadings, precision @ (np.asarray(system.emissions) - system.bias)[..., None]
    )
    states = states[..., 0]
    innovations = (states[:, 1:] - states[:, :-1] @ system.weights.T).reshape(-1, STATE_DIM)
    inputs = system.amplitudes[:, 1:].reshape(len(innovations), -1)
    gram, cross = inputs.T @ inputs / len(inputs), inputs.T @ innovations / len(inputs)
    weights = np.random.default_rng(0).normal(size=cross.shape)
    step = 0.5 / np.linalg.eigvalsh(gram)[-1]
    for _ in range(num_steps):
        weights = weights - step * (gram @ weights - cross + penalty * np.sign(weights))
    return weights != 0


if __name__ == "__main__":
    main()
