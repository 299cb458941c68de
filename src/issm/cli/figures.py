"""Figures of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

import issm
from issm import plotting
from issm.cli.run import Fitted, Result, stimulate_model
from issm.interventions import Intervention

TRUTH = "black"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
MOST_PANELS = 4


@dataclass
class Picture:
    """A figure, its file name and its caption."""

    name: str
    figure: Figure
    caption: str


def make_pictures(result: Result) -> list[Picture]:
    """All figures that the run has something to show in."""
    with rc_context(STYLE):
        pictures = [_fit_picture(result), _trace_picture(result)]
        if result.dataset.test is not None:
            pictures += [_rollout_picture(result), _effect_picture(result)]
        pictures.append(_flow_picture(result))
        pictures = [picture for picture in pictures if picture is not None]
        for picture in pictures:
            picture.figure.draw_without_rendering()  # lays the panels out while the style holds
    return pictures


def write_pictures(pictures: list[Picture], directory: Path) -> list[str]:
    """PNG files under `directory`; returns their names."""
    directory.mkdir(exist_ok=True)
    names = []
    for picture in pictures:
        names.append(f"{picture.name}.png")
        with rc_context(STYLE):
            picture.figure.savefig(directory / names[-1], dpi=160)
    return names


def _fit_picture(result: Result) -> Picture:
    """Emissions of the first trial and what each model makes of them."""
    data = result.dataset
    fitted = [each for each in result.models if each.section.fit.method != "none"] or result.models
    emission_dim = min(data.train.emissions.shape[-1], 2)
    figure = Figure(figsize=(7.2, 0.6 + 1.75 * len(fitted)), layout="constrained")
    panels = figure.subplots(len(fitted), emission_dim, squeeze=False, sharex=True, sharey="col")
    for row, each in zip(panels, fitted, strict=True):
        mean, lower, upper = _smoothed(each, result)
        for n, ax in enumerate(row):
            plotting.plot_prediction(
                mean[:, n], lower[:, n], upper[:, n],
                emissions=data.train.emissions[0, :, n], time=data.time, color=_color(each, result), ax=ax,
            )  # fmt: skip
            ax.set_title(each.section.name if emission_dim == 1 else f"{each.section.name}: {data.emission_names[n]}")
    for ax in panels[-1]:
        ax.set_xlabel(result.config.labels.time)
    figure.supylabel(result.config.labels.emissions, fontsize=9)
    which = "" if len(data.train.emissions) == 1 else " of the first trial"
    caption = f"Emissions{which} (points) and their smoothed mean without noise, with its 95% interval."
    return Picture("fit", figure, caption)


def _smoothed(each: Fitted, result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    _, inputs = stimulate_model(each.section, result.dataset, result.dataset.train)
    weights = np.asarray(each.params.emissions.weights)
    mean = each.smoothed_means[0] @ weights.T + np.asarray(each.params.emissions.bias)
    if inputs is not None:
        mean = mean + inputs[0] @ np.asarray(each.params.emissions.input_weights).T
    variance = np.einsum("nd,tde,ne->tn", weights, each.smoothed_covariances[0], weights)
    width = 1.96 * np.sqrt(np.maximum(variance, 0.0))
    return mean, mean - width, mean + width


def _trace_picture(result: Result) -> Picture | None:
    fitted = [each for each in result.models if len(each.log_probs) > 1]
    if not fitted:
        return None
    figure = Figure(figsize=(2.4 * len(fitted) if len(fitted) > 2 else 7.2, 2.4), layout="constrained")
    for ax, each in zip(figure.subplots(1, len(fitted), squeeze=False)[0], fitted, strict=True):
        plotting.plot_log_probs(each.log_probs, color=_color(each, result), ax=ax)
        ax.set_title(each.section.name)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(left=0)
    return Picture("trace", figure, "The log-likelihood before every update of EM.")


def _rollout_picture(result: Result) -> Picture | None:
    data, test, trial = result.dataset, result.dataset.test, 0
    rollouts = [(each, each.rollout) for each in result.models if each.rollout is not None]
    if test is None or not rollouts:
        return None
    first = rollouts[0][1]
    history = data.time.size - first.mean.shape[1]
    num_emissions = min(test.emissions.shape[-1], MOST_PANELS)
    has_clamps = test.clamps is not None
    ratios = [0.55] * has_clamps + [1.0] * num_emissions
    figure = Figure(figsize=(7.2, 0.7 + 1.35 * sum(ratios)), layout="constrained")
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    if has_clamps:
        _draw_clamps(panels[0], jax.tree.map(lambda leaf: leaf[trial], test.clamps), data.time)
    for n, ax in enumerate(panels[has_clamps:]):
        observed = test.emissions[trial, :, n]
        ax.plot(data.time, observed, color=TRUTH, linewidth=1.0, label="truth", zorder=4)
        for each, rollout in rollouts:
            band = rollout is first
            plotting.plot_prediction(
                rollout.mean[trial, :, n],
                rollout.lower[trial, :, n] if band else None,
                rollout.upper[trial, :, n] if band else None,
                time=data.time[history:],
                color=_color(each, result),
                label=each.section.name + (" with 95% interval" if band else ""),
                ax=ax,
            )
        ax.axvline(data.time[history], color="0.5", linewidth=0.8, linestyle=":")
        ax.set_ylabel(data.emission_names[n])
        ax.set_ylim(*_limits([observed, first.lower[trial, :, n], first.upper[trial, :, n]]))
    panels[-1].set_xlabel(result.config.labels.time)
    panels[-1].set_xlim(data.time[0], data.time[-1])
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.supylabel(result.config.labels.emissions, fontsize=9)
    caption = (
        "A test trial, whose stimulation no model has seen (top: where each state is held, and at what). From the dotted line on"
        " nothing is observed: the models know the stimulation only."
    )
    return Picture("rollout", figure, caption)


def _effect_picture(result: Result) -> Picture | None:
    """Effect of one test trial's stimulation on the first emissions, for models that know clamps."""
    data, test = result.dataset, result.dataset.test
    chosen = [each for each in result.models if each.section.stimulation == "clamps"]
    if test is None or test.clamps is None or not chosen:
        return None
    plan: Intervention = jax.tree.map(lambda leaf: leaf[0], test.clamps)
    num_emissions = min(test.emissions.shape[-1], 2)
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    panels = figure.subplots(1, num_emissions, squeeze=False, sharex=True)[0]
    for each in chosen:
        clamps, inputs = stimulate_model(each.section, data, test)
        effect = issm.causal_effect(
            each.params,
            jax.tree.map(lambda leaf: leaf[0], clamps),
            inputs=None if inputs is None else inputs[0],
        )
        for n, ax in enumerate(panels):
            label = f"{each.section.name}, 95% of trials"
            plotting.plot_effect(effect, n, time=data.time, color=_color(each, result), label=label, ax=ax)
    truth = None if data.truth is None else issm.causal_effect(data.truth, plan)
    for n, ax in enumerate(panels):
        if truth is not None:
            ax.plot(data.time, truth.mean[:, n], color=TRUTH, linestyle="--", linewidth=1.0, label="truth", zorder=4)
        ax.set_title(f"effect on {data.emission_names[n]}")
        ax.set_xlabel(result.config.labels.time)
        ax.set_ylabel(f"E[{data.emission_names[n]} | do] − E[{data.emission_names[n]}]")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    caption = (
        "Effect of the first test trial's stimulation against none at all: mean, and where 95% of the trials would lie."
    )
    return Picture("effect", figure, caption)


def _flow_picture(result: Result) -> Picture | None:
    data = result.dataset
    fitted = [each for each in result.models if each.aligned is not None]
    if data.system is None or data.train.states is None or data.system.state_dim != 2 or not fitted:
        return None
    states = data.train.states
    low, high = np.quantile(states.reshape(-1, 2), [0.02, 0.98], axis=0)
    extent = (low[0], high[0], low[1], high[1])
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    panels = figure.subplots(1, 1 + len(fitted), squeeze=False, sharex=True, sharey=True)[0]
    plotting.plot_flow_field(data.system, extent, states=states, color=TRUTH, ax=panels[0])
    panels[0].set_title("truth")
    for ax, each in zip(panels[1:], fitted, strict=True):
        as_fitted = each.section.stimulation == "clamps"
        matrix, offset = _drift(each, data.dt) if as_fitted else each.aligned  # type: ignore[misc]
        drift = _Affine(jnp.asarray(matrix), jnp.asarray(offset))
        plotting.plot_flow_field(drift, extent, states=states, color=_color(each, result), ax=ax)
        error = each.error if as_fitted else each.error_aligned
        ax.set_title(f"{each.section.name}{'' if as_fitted else ', aligned'}: error {error:.0%}")
        ax.set_ylabel("")
    caption = (
        "Flow fields dx/dt = f(x) over the training trajectories (grey). Clamps pin the coordinates of the interventional model,"
        " which is shown as fitted; the others are shown in the coordinates that suit them best."
    )
    return Picture("flow", figure, caption)


class _Affine:
    """x ↦ matrix x + offset."""

    def __init__(self, matrix: jax.Array, offset: jax.Array):
        self.matrix = matrix
        self.offset = offset

    def __call__(self, state: jax.Array) -> jax.Array:
        return self.matrix @ state + self.offset


def _drift(each: Fitted, dt: float) -> tuple[np.ndarray, np.ndarray]:
    weights = np.asarray(each.params.dynamics.weights)
    return (weights - np.eye(len(weights))) / dt, np.asarray(each.params.dynamics.bias) / dt


def _draw_clamps(ax: Any, clamps: Intervention, time: np.ndarray) -> None:
    mask, value = np.asarray(clamps.mask), np.asarray(clamps.value)
    for i in range(mask.shape[-1]):
        held = np.where(mask[:, i], value[:, i], np.nan)
        ax.plot(
            time,
            held,
            color=("0.15", "0.65")[i % 2],
            linewidth=2.0 + 3.0 * (i % 2),
            zorder=3 - i % 2,
            solid_capstyle="butt",
            label=f"state {i + 1} held",
        )
    ax.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
    span = max(np.abs(value).max() * 1.25, 1e-9)
    ax.set_ylim(-span, span)
    ax.set_ylabel("clamp")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, handlelength=1.2)


def _limits(series: list[np.ndarray]) -> tuple[float, float]:
    low, high = min(np.nanmin(each) for each in series), max(np.nanmax(each) for each in series)
    margin = 0.15 * (high - low) or 1.0
    return float(low - margin), float(high + margin)


def _color(each: Fitted, result: Result) -> str:
    return COLORS[[other is each for other in result.models].index(True) % len(COLORS)]
