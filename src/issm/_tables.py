"""Tables of text, as the `summary()` of a result prints them."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "") -> str:
    """Columns under their heads, the first to the left and the others to the right; numbers with four digits."""
    cells = [[str(head) for head in header], *([format_number(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, *lines] if title else lines).rstrip()


def format_number(value: Any) -> str:
    """A cell: whole numbers and words as they are, Booleans as words, other numbers with four digits, NaN as nothing."""
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype == bool:
        return "yes" if array else "no"
    if np.issubdtype(array.dtype, np.integer):
        return str(int(array))
    number = float(array)
    return "" if np.isnan(number) else f"{number:.4g}"


def join_words(words: Sequence[Any]) -> str:
    """A list in prose: a, b and c."""
    texts = [str(word) for word in words]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
