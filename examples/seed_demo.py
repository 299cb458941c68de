"""Two systems with curved emissions, fitted with clamps, with additive inputs, and with neither.

Every fit learns the linear dynamics and an emission network at once. It is judged on stimulation that it has not seen: by the
rollout, which knows the clamps and nothing else, by the prediction of each step from all steps before it, by the error of
the rates J = (A - I) / dt, and by the noise it finds. The true parameters are judged beside it.

    python examples/seed_demo.py -c examples/configs/seed_demo.yaml -o results
    python examples/seed_demo.py -c examples/configs/seed_demo_noisy.yaml
    python examples/seed_demo.py -c examples/configs/seed_demo_lifted.yaml
    python examples/seed_demo.py -c examples/configs/seed_demo_poisson.yaml -o results

Half of the time goes into compilation; on a CPU, XLA_FLAGS=--xla_cpu_use_fusion_emitters=false in the environment halves that.

Counts are Poisson with rates baseline * exp(gain * y), y being the emissions without noise. Predictions of counts are compared
with the expected ones.
"""

import argparse
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import yaml

import issm
from issm.metrics import r2, relative_error
from issm.simulate import DynamicAttractor, RotationalDynamics, euler_sample, random_stimulation

SYSTEMS = {"DynamicAttractor": DynamicAttractor(a1=-20.0, a2=1.2), "RotationalDynamics": RotationalDynamics(a=1.2)}
VARIANTS = ("iSSM", "iSSM, rollout only", "additive SSM", "observational SSM")
WITH_NOISE = (
    "iSSM, true emissions",
)  # learns the dynamics alone: what is then wrong with the noise is not the network's


class TrueMap(eqx.Module):
    """The emission map of a system, turned into more dimensions by `lift`, or the logarithm of the rates that go with it."""

    system: eqx.Module
    lift: jax.Array
    gain: jax.Array
    offset: jax.Array

    def __call__(self, state):
        return self.offset + self.gain * self.system.emit(state, self.lift)


def true_emission(name, config):
    """Noise that is not there is as small as single precision allows; the lift is orthogonal, the identity for two emissions."""
    square = (
        jnp.eye(2) if config["emission_dim"] == 2 else jax.random.normal(jax.random.key(3), (config["emission_dim"], 2))
    )
    lift = jnp.linalg.qr(square)[0].T if config["emission_dim"] > 2 else square
    if config["likelihood"] == "poisson":
        rates = TrueMap(SYSTEMS[name], lift, jnp.asarray(config["gain"]), jnp.log(config["baseline"]))
        return issm.PoissonEmission(rates, link="exp")
    variances = jnp.full(config["emission_dim"], config["emission_sd"] ** 2 + 1e-6)
    return issm.GaussianEmission(TrueMap(SYSTEMS[name], lift, jnp.ones(()), jnp.zeros(())), variances)


def simulate(key, name, config):
    """Clamps, states, emissions and their means, of one draw of the stimulation."""
    stimulation_key, state_key, emission_key = jax.random.split(key, 3)
    options = dict(config["stimulation"])
    options["gap"] = tuple(options["gap"])
    plan = random_stimulation(
        stimulation_key, config["num_timesteps"], 2, num_trials=config["num_trials"], **options
    )  # fmt: skip
    states = euler_sample(
        state_key, SYSTEMS[name], config["num_timesteps"], dt=config["dt"], initial_state=[0.0, 0.0],
        noise_scale=config["process_sd"] / np.sqrt(config["dt"]), interventions=plan,
    )  # fmt: skip
    emission = true_emission(name, config)
    clean = emission.mean(emission.map(states))
    if config["likelihood"] == "poisson":
        return plan, states, jax.random.poisson(emission_key, clean).astype(clean.dtype), clean
    return plan, states, clean + config["emission_sd"] * jax.random.normal(emission_key, clean.shape), clean


def true_model(name, config):
    """The system as a model."""
    rates, drift = jax.jacfwd(SYSTEMS[name])(jnp.zeros(2)), SYSTEMS[name](jnp.zeros(2))
    linear = issm.make_lgssm_params(
        jnp.zeros(2), jnp.full(2, 1e-6), jnp.eye(2) + config["dt"] * rates, jnp.full(2, config["process_sd"] ** 2 + 1e-8), jnp.eye(2),
        jnp.ones(2), dynamics_bias=config["dt"] * drift,
    )  # fmt: skip
    return issm.SSM(linear.initial, linear.dynamics, true_emission(name, config))


def given_to(variant, plan):
    """What a variant is told of the stimulation: clamps, inputs or nothing."""
    if variant.startswith("iSSM") or variant == "true parameters":
        return {"interventions": plan, "inputs": None}
    return {"interventions": None, "inputs": plan.value if variant == "additive SSM" else None}


def noise_in(name, plan, states, emissions, clean, config):
    """Standard deviations of the noise that was drawn: of the states where they were free, and of the emissions."""
    dynamics = true_model(name, config).dynamics
    noise = states[:, 1:] - states[:, :-1] @ dynamics.weights.T - dynamics.bias[None, None]
    return jnp.sqrt(jnp.mean(noise**2, where=~plan.mask[:, 1:])), jnp.std(emissions - clean)


def fit(variant, name, plan, emissions, config):
    """Fit all seeds at once; returns the fits and the CPU seconds they took, compilation included."""
    if variant == "iSSM, true emissions":
        model = true_model(name, config)
        learned = eqx.tree_at(
            lambda m: (m.dynamics, m.emission.cov), jax.tree.map(lambda leaf: False, model), (True, True)
        )
        began = time.process_time()
        result = issm.fit_laplace_em(
            model, emissions, interventions=plan, trainable=learned, num_rollout=0, num_iters=config["num_sweeps"]
        )
        return jax.tree.map(lambda leaf: leaf[None], eqx.filter(result, eqx.is_array)), time.process_time() - began
    keys = jax.random.split(
        jax.random.key(2), config["num_seeds" if variant.startswith("iSSM") else "num_baseline_seeds"]
    )
    input_dim = 2 if variant == "additive SSM" else 0
    starts = [
        issm.initialize_ssm(
            key, emissions, 2, widths=tuple(config["widths"]), input_dim=input_dim,
            likelihood=config["likelihood"], link="exp", process_scale=config["initial_process_sd"],
        )
        for key in keys
    ]  # fmt: skip
    models = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    def one(model):
        return issm.fit_laplace_em(
            model,
            emissions,
            num_rollout=config["num_rollout"],
            num_iters=0 if variant == "iSSM, rollout only" else config["num_sweeps"],
            **given_to(variant, plan),
        )

    began = time.process_time()
    fits = jax.block_until_ready(jax.jit(jax.vmap(one))(models))
    return fits, time.process_time() - began


def rollout(model, plan, given):
    """States and emissions from the first step on, with nothing known but the stimulation."""
    seen = issm.ParamsLGSSMEmissions(jnp.eye(2), jnp.zeros(2), jnp.zeros((2, model.input_dim)), jnp.ones(2))
    linear = issm.ParamsLGSSM(model.initial, model.dynamics, seen)
    plan = given["interventions"] or jax.tree.map(jnp.zeros_like, plan)
    states = issm.interventional_prediction(linear, plan, inputs=given["inputs"]).states.mean
    return states, jax.vmap(jax.vmap(lambda state: model.emission.mean(model.emission.map(state))))(states)


def one_step(model, plan, emissions, given):
    """Prediction of every step from all before it, by an iterated extended Kalman filter."""
    clamps = given["interventions"] or jax.tree.map(jnp.zeros_like, plan)
    drives = (
        jnp.zeros_like(clamps.value) if given["inputs"] is None else given["inputs"] @ model.dynamics.input_weights.T
    )
    eye = jnp.eye(2)

    def step(carry, at):
        mean, cov, first = carry
        mask, value, drive, observed = at
        free_mean = jnp.where(first, model.initial.mean, model.dynamics.weights @ mean + model.dynamics.bias + drive)
        free_cov = model.dynamics.weights @ cov @ model.dynamics.weights.T + jnp.diag(model.dynamics.cov)
        free_cov = jnp.where(first, jnp.diag(model.initial.cov), free_cov)
        mean = jnp.where(mask, value, free_mean)
        cov = jnp.where(mask[:, None] | mask[None, :], 0.0, free_cov)
        state = mean
        for _ in range(5):
            slope = jax.jacfwd(model.emission.map)(state)
            score, information = model.emission.local_information(observed, model.emission.map(state))
            precision = slope.T @ (information[:, None] * slope)
            pull = slope.T @ score + precision @ (state - mean)
            state = mean + jnp.linalg.solve(eye + cov @ precision, cov @ pull)
        return (state, jnp.linalg.solve(eye + cov @ precision, cov), False), model.emission.mean(
            model.emission.map(mean)
        )

    def trial(*at):
        return jax.lax.scan(step, (jnp.zeros(2), jnp.zeros((2, 2)), True), at)[1]

    return jax.vmap(trial)(clamps.mask, clamps.value, drives, emissions)


def judge(name, variant, models, plan, emissions, clean, config):
    """One row for each model: rollout and one-step R², error of the rates, and standard deviations of the noise there is."""
    given = given_to(variant, plan)
    true_rates = jax.jacfwd(SYSTEMS[name])(jnp.zeros(2))
    counts = config["likelihood"] == "poisson"

    @jax.jit
    @jax.vmap
    def scores(model):
        rates = (model.dynamics.weights - jnp.eye(2)) / config["dt"]
        _, predicted = rollout(model, plan, given)
        return (
            r2(clean, predicted),
            r2(clean if counts else emissions, one_step(model, plan, emissions, given)),
            relative_error(rates, true_rates),
            jnp.sqrt(model.dynamics.cov.mean()),
            *([] if counts else [jnp.sqrt(model.emission.cov.mean())]),
        )

    return np.stack([np.asarray(score) for score in scores(models)], axis=1)


def print_table(name, rows, seconds):
    columns = ("rollout R2", "one-step R2", "error of J", "process sd", "emission sd")
    columns = columns[: rows["true parameters"].shape[1]]
    print(f"\n{name}\n{'':>18} {'seed':>4}" + "".join(f" {column:>11}" for column in columns) + "   CPU s for all")
    for variant, scores in rows.items():
        for seed, row in enumerate(scores):
            label, spent = (variant, f"{seconds.get(variant, 0):.0f}") if seed == 0 else ("", "")
            print(f"{label:>18} {seed:>4}" + "".join(f" {value:>11.4f}" for value in row) + f"   {spent}")


def draw(name, fits, plan, states, emissions, config, folder):
    """Latents, observations, flow fields and losses of one system, each seed's best fit by the objective."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from issm.plotting import plot_flow_field, plot_interventions

    time_axis = np.arange(config["num_timesteps"]) * config["dt"]
    best = {v: int(np.argmax(f.log_probs[:, -1])) for v, f in fits.items()}
    models = {v: jax.tree.map(lambda leaf, v=v: leaf[best[v]], f.params) for v, f in fits.items()}
    paths = {v: rollout(m, plan, given_to(v, plan)) for v, m in models.items()}
    seen = "expected count" if config["likelihood"] == "poisson" else "observation"
    for kind, label, truth, place in (("latents", "latent", states, 0), ("observations", seen, emissions, 1)):
        figure, axes = plt.subplots(2, 2, figsize=(11, 5), sharex=True, layout="constrained")
        for trial in range(2):
            for dim in range(2):
                ax = axes[dim, trial]
                if kind == "latents":
                    plot_interventions(plan.mask[trial, :, dim], time=time_axis, label="clamped", ax=ax)
                ax.plot(time_axis, truth[trial, :, dim], color="black", linewidth=2, label="truth")
                ax.plot(
                    time_axis, paths["iSSM"][place][trial, :, dim], color="C0", linestyle="--", label="iSSM rollout"
                )
                if kind == "observations":
                    ax.plot(
                        time_axis, paths["additive SSM"][place][trial, :, dim], color="C1", linewidth=1, label="additive SSM rollout"
                    )  # fmt: skip
                ax.set_ylabel(f"{label} {dim + 1}")
                ax.margins(x=0)
            axes[0, trial].set_title(f"{name}, unseen stimulation, trial {trial + 1}")
            axes[1, trial].set_xlabel("time")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
        figure.savefig(folder / f"{name}_{kind}.png", dpi=110)
        plt.close(figure)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True, sharey=True)
    low, high = np.quantile(np.asarray(states), [0.01, 0.99], axis=(0, 1))
    extent = (float(low[0]), float(high[0]), float(low[1]), float(high[1]))
    dynamics = models["iSSM"].dynamics
    drifts = {
        "truth": SYSTEMS[name],
        "iSSM": lambda x: ((dynamics.weights - jnp.eye(2)) @ x + dynamics.bias) / config["dt"],
    }
    for ax, (label, drift) in zip(axes, drifts.items(), strict=True):
        plot_flow_field(drift, extent, color="C0" if label == "iSSM" else "0.2", ax=ax)
        ax.set_title(f"{name}: {label}")
    figure.savefig(folder / f"{name}_flow.png", dpi=110)
    plt.close(figure)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for color, (variant, result) in zip(("C0", "C1", "C2"), fits.items(), strict=True):
        for seed in range(len(result.log_probs)):
            label = variant if seed == 0 else None
            axes[0].plot(result.rollout_log_probs[seed], color=color, linewidth=0.8, alpha=0.7, label=label)
            axes[1].plot(result.log_probs[seed], color=color, linewidth=0.8, alpha=0.7)
    low = float(np.quantile(fits["iSSM"].rollout_log_probs, 0.02))  # the first updates come from far below
    high = max(float(result.rollout_log_probs.max()) for result in fits.values())
    axes[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    for ax, label in zip(axes, ("rollout stage", "Laplace EM"), strict=True):
        ax.set(title=f"{name}: {label}", xlabel="update", ylabel="nats for each observed entry")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(folder / f"{name}_loss.png", dpi=110)
    plt.close(figure)


def run(config, folder=None):
    """Everything of the study; returns the scores by system and variant, `(num_seeds, 5)`, of counts `(num_seeds, 4)`."""
    results = {}
    for name in config["systems"]:
        plan, states, emissions, drawn_from = simulate(jax.random.key(0), name, config)
        test_plan, test_states, test_emissions, clean = simulate(jax.random.key(1), name, config)
        truth = jax.tree.map(lambda leaf: leaf[None], eqx.filter(true_model(name, config), eqx.is_array))
        fits, seconds = {}, {}
        rows = {"true parameters": judge(name, "true parameters", truth, test_plan, test_emissions, clean, config)}
        for variant in VARIANTS + (WITH_NOISE if config["process_sd"] else ()):
            fits[variant], seconds[variant] = fit(variant, name, plan, emissions, config)
            broken = [
                not np.isfinite(leaf).all() for leaf in jax.tree.leaves(eqx.filter(fits[variant].params, eqx.is_array))
            ]
            assert not any(broken), f"{variant} is not finite"
            rows[variant] = judge(name, variant, fits[variant].params, test_plan, test_emissions, clean, config)
        print_table(name, rows, seconds)
        if config["process_sd"]:
            process, emission = noise_in(name, plan, states, emissions, drawn_from, config)
            print(f"noise drawn in the training data: process sd {process:.4f}, emission sd {emission:.4f}")
        if folder is not None:
            drawn = {v: f for v, f in fits.items() if not v.startswith("iSSM,")}
            shown = clean if config["likelihood"] == "poisson" else test_emissions
            draw(name, drawn, test_plan, test_states, shown, config, folder)
        results[name] = rows
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", type=Path, default=Path(__file__).parent / "configs" / "seed_demo.yaml")
    parser.add_argument("-o", "--output", type=Path, default=None, help="folder for the figures; none without it")
    arguments = parser.parse_args()
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    run(yaml.safe_load(arguments.config.read_text(encoding="utf-8")), arguments.output)


if __name__ == "__main__":
    main()
