"""Effects of real events on real series, beside what has been published of them.

    python benchmarks/published_effects.py DIRECTORY [--only NAME ...]

The directory holds the CSV files with which CausalImpact's ports document their results. The published numbers are posterior means
and standard deviations of its R package at its defaults: everything in units of the standard deviation before the event, a level
believed to move by a hundredth of that in a step, a noise that leaves four fifths of the variance to the regressors, and a slab on
their weights that is worth a hundredth of an observation. (Its spike expects three regressors, and no series has more.) All of these
are conjugate, so that `sample_parameters` draws from the same posterior. Beside it are the modes under the prior of the level alone,
and under none, with weights and noise uncertain as the curvature says.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import equinox as eqx
import jax
import numpy as np

import issm

LEVEL_SD, LEVEL_DEGREES = 0.01, 32.0  # the prior of the level's steps: its guess in units of the series, and its weight
EXPECTED_R2, NOISE_DEGREES = 0.8, 50.0  # that of the noise: what the regressors are expected to explain, and its weight
SLAB_WEIGHT = 0.01  # that of their weights, in observations
SLAB_SHRINKAGE = 0.5  # how much of it is without correlations
SWEEPS = dict(num_samples=500, num_warmup=500, num_chains=4, thin=20)


@dataclass
class Study:
    """One series: where it is, when something happened, and what was published of it."""

    name: str
    file: str
    response: str
    regressors: list[str]
    start: int | str  # row, or the first entry of the first column that is at or after it
    published: float
    published_sd: float
    stop: int | str | None = None
    added: float = 0.0  # to the response after the start


STUDIES = [
    Study("volks", "ci_volks_data.csv", "VolksWagen", ["BMW", "Allianz"], "2015-09-20", -44.0, 5.6),
    Study("google", "ci_google_data.csv", "y", ["x1", "x2"], 60, 27.0, 4.5),
    Study(
        "comparison", "ci_comparison_data.csv", "CHANGED", ["NOT_CHANGED_1", "NOT_CHANGED_2", "NOT_CHANGED_3"],
        "2019-07-15", -657.0, 736.0, stop="2019-08-02",
    ),
    Study("basque", "ci_basque.csv", "Basque", ["another"], "1976", -0.76, 0.31),
    Study("arma", "ci_arma_data.csv", "y", ["X"], 70, 0.89, 0.30, added=1.0),
]  # fmt: skip

PRIORS = {
    "all": "posterior under all the published priors",
    "level": "mode, prior of the level alone",
    "none": "mode, no prior",
}


def read(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file with a header, separated by commas or spaces, quoted or not."""
    lines = path.read_text(encoding="utf-8").splitlines()
    separator = "," if "," in lines[0] else None
    rows = [[cell.strip('" ') for cell in line.split(separator)] for line in lines if line.strip()]
    return {name: np.array(column) for name, *column in zip(*rows, strict=True)}


def at_row(where: int | str | None, dates: np.ndarray) -> int | None:
    """A row as it is, or the first at or after a date."""
    return int(np.searchsorted(dates, where)) if isinstance(where, str) else where


def prepare(study: Study, directory: Path) -> tuple[np.ndarray, np.ndarray, int, float]:
    """Series and regressors in units of their standard deviation before the event, the event, and that unit."""
    columns = read(directory / study.file)
    dates = next((columns[name] for name in columns if name.lower() == "date"), np.arange(1000).astype(str))
    start, stop = at_row(study.start, dates), at_row(study.stop, dates)
    series = columns[study.response].astype(float)[:stop, None].copy()
    series[start:] += study.added
    drivers = np.stack([columns[name].astype(float) for name in study.regressors], axis=1)[:stop]
    scaled = [(each - each[:start].mean(axis=0)) / each[:start].std(axis=0, ddof=1) for each in (series, drivers)]
    return *scaled, start, float(series[:start].std(ddof=1))


def level_prior() -> issm.RegressionPrior:
    """Steps of the level."""
    return issm.RegressionPrior(degrees=LEVEL_DEGREES, scale=LEVEL_DEGREES * LEVEL_SD**2)


def regression_prior(drivers: np.ndarray, state_dim: int) -> issm.RegressionPrior:
    """Weights of the regressors and noise; the columns of the emissions are states, regressors and a bias."""
    each = drivers.T @ drivers / len(drivers)
    worth = SLAB_WEIGHT * ((1 - SLAB_SHRINKAGE) * each + SLAB_SHRINKAGE * np.diag(np.diag(each)))
    precision = np.zeros((state_dim + len(each) + 1,) * 2)
    precision[state_dim:-1, state_dim:-1] = worth
    return issm.RegressionPrior(precision=precision, degrees=NOISE_DEGREES, scale=NOISE_DEGREES * (1 - EXPECTED_R2))


def analyse(study: Study, directory: Path, priors: str) -> dict[str, float | str]:
    """The average effect by a local level with regressors, and what its fit found."""
    series, drivers, start, unit = prepare(study, directory)
    past = (series[:start], drivers[:start])
    model = issm.structural_model(*past)
    if priors == "all":
        both = issm.Priors(dynamics=level_prior(), emissions=regression_prior(past[1], model.params.state_dim))
        sampled = issm.sample_parameters(
            jax.random.key(0), model.params, *past, trainable=model.trainable, priors=both, **SWEEPS
        )
        params, parameters, note = sampled.mean, sampled.draws, sampled.reason
    else:
        fit = issm.fit_em(
            model.params,
            *past,
            trainable=model.trainable,
            priors=issm.Priors(dynamics=level_prior()) if priors == "level" else None,
            num_iters=5000,
            tol=1e-10,
        )
        regression = eqx.tree_at(lambda p: p.dynamics.cov, model.trainable, False)
        known = issm.parameter_covariance(fit.params, *past, trainable=regression)
        params, parameters, note = fit.params, known.covariance, f"{fit.num_iters} updates"
    effect = issm.observed_effect(params, series, drivers, start=start, parameters=parameters).average
    return dict(
        effect=unit * float(effect.mean[0]), sd=unit * float(effect.sd[0]), note=note,
        level_sd=float(np.sqrt(params.dynamics.cov[0])), noise_sd=float(np.sqrt(params.emissions.cov[0])),
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Print one line for each study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="*", default=[study.name for study in STUDIES], help="names of series")
    options = parser.parse_args(arguments)
    for priors, words in PRIORS.items():
        print(words)
        print(f"{'series':12}{'effect':>10}{'sd':>9}{'published':>11}{'sd':>9}{'off by (published sd)':>23}")
        for study in (study for study in STUDIES if study.name in options.only):
            found = analyse(study, options.directory, priors)
            off = (found["effect"] - study.published) / study.published_sd
            print(
                f"{study.name:12}{found['effect']:10.3g}{found['sd']:9.2g}{study.published:11.3g}{study.published_sd:9.2g}{off:23.2f}"
                f"    level sd {found['level_sd']:.2g}, noise sd {found['noise_sd']:.2g} of the series'; {found['note']}",
                flush=True,
            )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1:])
