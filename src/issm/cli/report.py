"""Tables of a run, as text and as one page of HTML that needs nothing else."""

import base64
import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from issm.cli.figures import Picture
from issm.cli.numbers import decimals_of
from issm.cli.run import Result


@dataclass
class Table:
    """A titled table of text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def make_tables(numbers: dict[str, Any]) -> list[Table]:
    """The tables of a run from its numbers, as they are in `metrics.json`."""
    models = numbers["models"]
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("log-likelihood", lambda m: _number(m.get("log_likelihood"), 3)),
        ("updates", lambda m: str(m["num_iters"]) if "num_iters" in m else ""),
        ("rollout R²", lambda m: _number(m.get("rollout_r2"), 3)),
        ("95% interval covers", lambda m: _percent(m.get("coverage_95"))),
        ("error of drift, as fitted", lambda m: _percent(m.get("drift_error"))),
        ("error of drift, aligned", lambda m: _percent(m.get("drift_error_aligned"))),
    ]
    for head, name in (("process variance", "dynamics_cov"), ("emission variance", "emissions_cov")):
        columns.append((head, lambda m, name=name: _scalar(m.get("parameters", {}).get(name))))
    entries = dict(models)
    if "true_parameters" in numbers:
        entries["true parameters"] = numbers["true_parameters"]
    kept = [(head, cell) for head, cell in columns if any(cell(m) for m in entries.values())]
    tables = [
        Table(
            "Models",
            ["model", *(head for head, _ in kept)],
            [[name, *(cell(m) for _, cell in kept)] for name, m in entries.items()],
        )
    ]
    rows = [
        [name, c["name"], _number(c["value"], 4), _number(c["se_information"], 3), _number(c["se_scores"], 3)]
        for name, m in models.items()
        for c in m["coefficients"]
    ]
    if rows:
        header = ["model", "parameter", "estimate", "s.e. (information)", "s.e. (scores)"]
        tables.append(Table("Standard errors", header, rows))
    rows = [_answer_row(answer) for answer in numbers["known_answers"]]
    if rows:
        tables.append(
            Table("Known answers", ["model", "quantity", "known", "here", "", "source of the known one"], rows)
        )
    return tables


def _answer_row(answer: dict[str, Any]) -> list[str]:
    decimals = decimals_of(answer["known"])
    return [
        answer["model"],
        answer["quantity"],
        _number(answer["known"], decimals),
        _number(answer["got"], min(decimals + 2, 12)),
        "agrees" if answer["agrees"] else "DIFFERS",
        answer["source"],
    ]


def as_text(tables: list[Table]) -> str:
    """Tables for a terminal."""
    blocks = []
    for table in tables:
        rows = [table.header, *table.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
        text = [[_pad(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        lines = ["  ".join(row).rstrip() for row in text]
        blocks.append("\n".join([table.title, lines[0], "-" * max(len(line) for line in lines), *lines[1:]]))
    return "\n\n".join(blocks)


def as_html(result: Result, numbers: dict[str, Any], pictures: list[Picture], directory: Path) -> str:
    """The report: one page with its figures inside, which loads nothing from anywhere."""
    parts = [f"<h1>{html.escape(result.config.title)}</h1>"]
    if result.config.description:
        parts.append(f"<p>{html.escape(result.config.description)}</p>")
    train = result.dataset.train.emissions
    trials = f"{len(train)} trial{'s' * (len(train) > 1)}"
    parts.append(f"<p>Fitted to {trials} of {train.shape[1]} steps with {train.shape[2]} emissions.</p>")
    for table in make_tables(numbers):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
        rows = "".join(f"<tr>{''.join(_html_cell(cell) for cell in row)}</tr>" for row in table.rows)
        parts.append(f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>")
        if table.title == "Models":
            parts.append(f"<p class='note'>{html.escape(_table_note(numbers))}</p>")
    parts.append("<h2>Figures</h2>")
    for picture in pictures:
        data = base64.b64encode((directory / f"{picture.name}.png").read_bytes()).decode()
        parts.append(
            f"<figure><img alt='{html.escape(picture.name)}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        )
    ends = [f"{each.section.name}: {each.reason}, {each.seconds:.1f} s" for each in result.models]
    parts.append("<h2>How the fits ended</h2><ul>" + "".join(f"<li>{html.escape(end)}</li>" for end in ends) + "</ul>")
    settings = html.escape(result.config.model_dump_json(indent=2, exclude_unset=True))
    parts.append(f"<details><summary>Configuration</summary><pre>{settings}</pre></details>")
    parts.append(f"<p class='note'>issm {html.escape(numbers['issm'])}, {numbers['seconds']:.1f} s</p>")
    return _PAGE.format(title=html.escape(result.config.title), body="\n".join(parts))


def _table_note(numbers: dict[str, Any]) -> str:
    notes = ["The log-likelihood is in nats."]
    if any("rollout_r2" in m for m in numbers["models"].values()):
        notes.append("Rollouts predict the test trials from their first steps and their stimulation alone.")
    if any("drift_error" in m for m in numbers["models"].values()):
        notes.append(
            "The error of the drift is that of (A − I)/dt in the Frobenius norm, relative to the truth: as fitted, and after"
            " the affine change of coordinates that explains the true states best, which only a simulation allows."
        )
    return " ".join(notes)


def _number(value: float | None, decimals: int) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.{decimals}f}".replace("-", "−")


def _percent(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.1%}"


def _scalar(value: Any) -> str:
    array = np.asarray([] if value is None else value)
    return f"{array.ravel()[0]:.6g}" if array.size == 1 else ""


def _pad(cell: str, width: int) -> str:
    return cell.rjust(width) if _is_number(cell) else cell.ljust(width)


def _is_number(cell: str) -> bool:
    return bool(cell) and cell[0] in "−-0123456789" and cell[-1] in "0123456789%"


def _html_cell(cell: str) -> str:
    kind = " class='number'" if _is_number(cell) else ""
    return f"<td{kind}>{html.escape(cell)}</td>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }}
th, td {{ text-align: left; padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
figure {{ margin: 1.5rem 0; }} img {{ max-width: 100%; height: auto; }}
figcaption, .note {{ color: #555; font-size: 0.88rem; }}
pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 0.8rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
