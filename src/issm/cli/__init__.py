"""The command `issm`: from a configuration to fitted models, numbers and a report."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path

EPILOG = """\
A configuration names a simulated system, or a .csv or .npz file with emissions and, optionally, inputs and clamps.
DIR gets the fitted models (issm.io.load reads them), metrics.json, report.html and figures/.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 for what the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "demo":
            with as_file(files("issm.cli") / "demo.yaml") as path:
                return _run(path, options)
        return _run(options.config, options)
    except KeyboardInterrupt:
        print("issm: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="issm",
        description="Causal state-space modelling of dynamical systems under intervention.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"issm {version('issm')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-q", "--quiet", action="store_true", help="no progress on standard error")
    common.add_argument("--force", action="store_true", help="run again even if DIR has this run already")
    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="fit a clamped linear system and an additive-input model, and compare both on an unseen stimulation",
    )
    demo.add_argument("-o", "--output", type=Path, default=Path("demo_out"), metavar="DIR", help="default: demo_out")
    run = commands.add_parser("run", parents=[common], help="do what a configuration file says")
    run.add_argument("-c", "--config", type=Path, required=True, metavar="CONFIG", help="a YAML file")
    run.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="made if it is not there")
    return parser


def _run(config_path: Path, options: argparse.Namespace) -> int:
    try:
        import jax

        from issm.cli import figures, report
        from issm.cli import numbers as keep
        from issm.cli import run as runner
        from issm.cli.config import ConfigError, read_config
    except ImportError as error:
        print(f"issm: {error.name} is missing; the command needs an extra: pip install 'issm[cli]'", file=sys.stderr)
        return 2
    started, progress, directory = time.perf_counter(), not options.quiet, options.output
    try:
        config = read_config(config_path)
        digest = keep.fingerprint(config, config_path.parent)
        finished = None if options.force else _finished(directory, digest)
        if finished is not None:
            print(f"{finished['title']}\n\n{report.as_text(report.make_tables(finished))}\n")
            print(f"{directory} holds this run already; --force runs it again.")
            return 0
        _make_directory(directory)
        with jax.enable_x64(True):
            result = runner.execute(config, config_path.parent, progress=progress)
            numbers = keep.report_numbers(result, digest)
            models = keep.write_models(result, directory)
            pictures = figures.make_pictures(result)
            drawn = figures.write_pictures(pictures, directory / "figures")
    except ConfigError as error:
        print(f"issm: {error}", file=sys.stderr)
        return 2
    numbers["files"] = [*models, *(f"figures/{name}" for name in drawn), "report.html"]
    numbers["seconds"] = round(time.perf_counter() - started, 3)
    numbers = json.loads(keep.as_json(numbers))
    keep.write_text(directory / "report.html", report.as_html(result, numbers, pictures, directory / "figures"))
    keep.write_text(directory / "metrics.json", keep.as_json(numbers))  # last: it marks a run that is complete
    print(f"{config.title}\n\n{report.as_text(report.make_tables(numbers))}\n")
    print(f"{numbers['seconds']:.0f} s. Written to {directory}: {', '.join([*numbers['files'], 'metrics.json'])}")
    return 0


def _make_directory(directory: Path) -> None:
    from issm.cli.config import ConfigError

    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "metrics.json").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {error.strerror}") from None


def _finished(directory: Path, digest: str) -> dict | None:
    """The numbers of this very run, if the directory has all of its files."""
    try:
        numbers = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(numbers, dict) and numbers.get("fingerprint") == digest
    return numbers if same and all((directory / name).is_file() for name in numbers["files"]) else None
