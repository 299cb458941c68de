"""Laplace and variational posteriors beside long runs of NUTS, the parameters being known.

    python benchmarks/posteriors.py [--draws 20000] [--no-variational]

For every model, the largest distance of a mean in NUTS's standard deviations, and the range of the ratios of standard deviations,
over all states at all steps at which they are not clamped; for Laplace's approximation also the distance of the mode.
"""

import argparse
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import issm

NUM_TIMESTEPS, STATE_DIM = 20, 2


def models():
    """Small systems: counts, rare spikes, coin flips, a curved map."""
    linear = issm.make_lgssm_params(
        [0.3, -0.2], [0.5, 0.5], [[0.8, 0.3], [-0.3, 0.8]], [0.1, 0.15], np.eye(2), np.ones(2), dynamics_bias=[0.1, 0.0]
    )
    rng = np.random.default_rng(0)
    readout = lambda dim: issm.LinearMap(rng.normal(size=(dim, 2)), 0.3 * rng.normal(size=dim))  # noqa: E731
    emissions = {
        "Poisson, about two counts": issm.PoissonEmission(readout(8), exposure=2.0, link="exp"),
        "Poisson, rare": issm.PoissonEmission(readout(8), exposure=0.3),
        "Bernoulli": issm.BernoulliEmission(readout(10)),
        "negative binomial": issm.NegativeBinomialEmission(readout(8), np.full(8, 3.0), exposure=2.0),
        "Gaussian around a network": issm.GaussianEmission(
            issm.MLP(jax.random.key(3), in_size=2, out_size=6, widths=(10,)), np.full(6, 0.1)
        ),
    }
    return {name: issm.SSM(linear.initial, linear.dynamics, emission) for name, emission in emissions.items()}


def by_nuts(model, emissions, plan, start, num_draws):
    """Means and standard deviations of the free states, the larger Monte-Carlo error in sd, and the largest R-hat."""
    import tensorflow_probability.substrates.jax as tfp

    free = np.flatnonzero(~np.asarray(plan.mask))
    clamped = jnp.where(plan.mask, plan.value, 0.0).ravel()
    scale = jnp.sqrt(jnp.diagonal(start.smoothed_covariances, axis1=1, axis2=2)).ravel()[free]
    center = start.modes.ravel()[free]

    def log_density(z):
        states = clamped.at[free].set(center + scale * z).reshape(plan.mask.shape)
        return issm.log_joint(model, states, emissions, interventions=plan)

    def chain(key):
        kernel = tfp.mcmc.DualAveragingStepSizeAdaptation(
            tfp.mcmc.NoUTurnSampler(log_density, step_size=0.3), num_adaptation_steps=800, target_accept_prob=0.85
        )
        return tfp.mcmc.sample_chain(
            num_draws, jnp.zeros(len(free)), kernel=kernel, num_burnin_steps=1000, trace_fn=None, seed=key
        )

    draws = np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(1), 2)))
    r_hat = tfp.mcmc.potential_scale_reduction(jnp.swapaxes(draws, 0, 1))
    ess = tfp.mcmc.effective_sample_size(jnp.swapaxes(draws, 0, 1)).sum(axis=0)
    draws = np.asarray(center + scale * draws).reshape(-1, len(free))
    return draws.mean(axis=0), draws.std(axis=0), float(1 / np.sqrt(ess.min())), float(r_hat.max()), free


def posteriors(model, emissions, plan, variational):
    """What the library says, by its name."""
    data = dict(interventions=plan)
    batch = emissions[None]
    train = dict(trainable=False, num_rollout=0, num_iters=4000, num_samples=16, recognition_rate=2e-2, **data)
    yield "Laplace", issm.posterior(model, emissions, **data)
    if not variational:
        return
    free = issm.FreePotentials(1, NUM_TIMESTEPS, STATE_DIM)
    fit = issm.fit_vi(jax.random.key(4), model, free, batch, **train)
    yield (
        "structured VI",
        jax.tree.map(lambda leaf: leaf[0], issm.posterior(model, batch, **data, method=fit.recognition)),
    )
    lstm = issm.MeanFieldLSTM(jax.random.key(5), model.emission_dim, STATE_DIM, 0, width=32, bidirectional=True)
    fit = issm.fit_vi(jax.random.key(6), model, lstm, batch, **train | dict(recognition_rate=5e-3))
    yield (
        "mean-field LSTM",
        jax.tree.map(lambda leaf: leaf[0], issm.posterior(model, batch, **data, method=fit.recognition)),
    )


def main() -> None:
    """Print one line for each model and posterior."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20000, help="of each of two chains")
    parser.add_argument("--no-variational", dest="variational", action="store_false")
    options = parser.parse_args()
    plan = issm.do({0: 1.0}, num_timesteps=NUM_TIMESTEPS, state_dim=STATE_DIM, start=6, stop=10)
    for name, model in models().items():
        _, emissions = issm.sample(jax.random.key(7), model, NUM_TIMESTEPS, interventions=plan)
        found, began = dict(posteriors(model, emissions, plan, options.variational)), time.perf_counter()
        mean, sd, error, r_hat, free = by_nuts(model, emissions, plan, found["Laplace"], options.draws)
        print(
            f"\n{name}: NUTS {time.perf_counter() - began:.0f} s, Monte-Carlo error {error:.3f} sd, R-hat {r_hat:.4f}"
        )
        for method, result in found.items():
            own = np.sqrt(np.diagonal(result.smoothed_covariances, axis1=1, axis2=2).ravel()[free])
            off, mode_off = (
                np.abs(np.asarray(path).ravel()[free] - mean) / sd for path in (result.smoothed_means, result.modes)
            )
            ratio = own / sd
            print(f"  {method:16} mean off by {off.max():.3f} sd at most ({off.mean():.3f} on average; mode {mode_off.max():.3f}), "
                  f"sd ratio {ratio.min():.3f} to {ratio.max():.3f} (mean {ratio.mean():.3f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    main()
