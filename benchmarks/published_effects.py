"""Effects of real events on real series, beside what has been published of them.

    python benchmarks/published_effects.py DIRECTORY [--only NAME ...]

The directory holds the CSV files with which CausalImpact's ports document their results. The published numbers are posterior means
and standard deviations of a Bayesian model with spike-and-slab regression, whose level is believed to move by a hundredth of the
series' standard deviation in a step. Here the level has the same prior (and, for comparison, none), the regression none, and
the mode is taken, so that agreement to about one posterior standard deviation is what can be hoped for.
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


def read(path: Path) -> dict[str, np.ndarray]:
    """Columns of a CSV file with a header, separated by commas or spaces, quoted or not."""
    lines = path.read_text(encoding="utf-8").splitlines()
    separator = "," if "," in lines[0] else None
    rows = [[cell.strip('" ') for cell in line.split(separator)] for line in lines if line.strip()]
    return {name: np.array(column) for name, *column in zip(*rows, strict=True)}


def at_row(where: int | str | None, dates: np.ndarray) -> int | None:
    """A row as it is, or the first at or after a date."""
    return int(np.searchsorted(dates, where)) if isinstance(where, str) else where


def analyse(study: Study, directory: Path, *, level_prior: bool) -> dict[str, float]:
    """The average effect by a local level with regressors, weights and noise uncertain as the curvature says."""
    columns = read(directory / study.file)
    dates = next((columns[name] for name in columns if name.lower() == "date"), np.arange(1000).astype(str))
    start, stop = at_row(study.start, dates), at_row(study.stop, dates)
    series = columns[study.response].astype(float)[:stop, None].copy()
    series[start:] += study.added
    drivers = np.stack([columns[name].astype(float) for name in study.regressors], axis=1)[:stop]
    center, scale = drivers[:start].mean(axis=0), drivers[:start].std(axis=0)
    drivers = (drivers - center) / scale
    model = issm.structural_model(series[:start], drivers[:start])
    guess = (LEVEL_SD * series[:start].std()) ** 2
    priors = issm.Priors(dynamics=issm.RegressionPrior(degrees=LEVEL_DEGREES, scale=LEVEL_DEGREES * guess))
    past = (series[:start], drivers[:start])
    fit = issm.fit_em(
        model.params,
        *past,
        trainable=model.trainable,
        priors=priors if level_prior else None,
        num_iters=5000,
        tol=1e-10,
    )
    regression = eqx.tree_at(lambda p: p.dynamics.cov, model.trainable, False)
    uncertainty = issm.parameter_covariance(fit.params, *past, trainable=regression)
    effect = issm.observed_effect(fit.params, series, drivers, start=start, parameters=uncertainty.covariance).average
    return dict(
        effect=float(effect.mean[0]), sd=float(effect.sd[0]), forecast_sd=float(effect.trial.sd[0]),
        level_sd=float(np.sqrt(fit.params.dynamics.cov[0])), noise_sd=float(np.sqrt(fit.params.emissions.cov[0])),
        updates=fit.num_iters,
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Print one line for each study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", nargs="*", default=[study.name for study in STUDIES], help="names of series")
    options = parser.parse_args(arguments)
    for level_prior in (True, False):
        print("level with the published prior" if level_prior else "level without a prior")
        print(f"{'series':12}{'effect':>10}{'sd':>9}{'published':>11}{'sd':>9}{'off by (published sd)':>23}")
        for study in (study for study in STUDIES if study.name in options.only):
            found = analyse(study, options.directory, level_prior=level_prior)
            off = (found["effect"] - study.published) / study.published_sd
            print(
                f"{study.name:12}{found['effect']:10.3g}{found['sd']:9.2g}{study.published:11.3g}{study.published_sd:9.2g}"
                f"{off:23.2f}    level sd {found['level_sd']:.2g}, noise sd {found['noise_sd']:.2g}, {found['updates']} updates",
                flush=True,
            )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1:])
