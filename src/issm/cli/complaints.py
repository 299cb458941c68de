"""What is wrong with a configuration, in one line for each error."""

import difflib
import typing
from typing import Any, Literal

from pydantic import BaseModel


def complaint(error: Any, section: type[BaseModel], raw: Any) -> str:
    """`place: got ...; expected ...` for one error of pydantic's, found in `raw`, which should have been a `section`."""
    place, node = "", raw
    for part in error["loc"]:  # parts that the file does not have are pydantic's tags of unions
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            place, node = f"{place}[{part}]", node[part]
        elif isinstance(node, dict) and part in node:
            place, node = f"{place}.{part}", node[part]
        elif part == error["loc"][-1] and error["type"] == "missing":
            place = f"{place}.{part}"
        elif part == "[key]":
            place = f"{place} (a key)"
    place = place.lstrip(".") or "the file"
    if error["type"] == "extra_forbidden":
        allowed = _keys_at(section, error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), allowed, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        return f"{place}: got an unknown key; expected one of {', '.join(allowed)}.{hint}"
    if error["type"] == "missing":
        return f"{place}: got nothing; expected this key, which is required."
    if error["type"] == "value_error":
        return f"{place}: {error['ctx']['error']}."
    message = error["msg"][0].lower() + error["msg"][1:]
    given = repr(error["input"])
    given = given if len(given) <= 60 else f"{given[:57]}..."
    message = message.removeprefix("input should be ").removeprefix("input should have ")
    return f"{place}: got {given}; expected: {message}."


def _keys_at(section: type[BaseModel], loc: tuple) -> list[str]:
    """Keys of the section that a location of pydantic's leads to; such a location holds the tags of unions."""
    candidates = [section]
    for part in loc:
        named = [c for c in candidates if any(part in _tags(f.annotation) for f in c.model_fields.values())]
        if named and not any(part in c.model_fields for c in candidates):
            candidates = named
        elif isinstance(part, str):
            fields = [c.model_fields[part] for c in candidates if part in c.model_fields]
            candidates = [found for f in fields for found in _sections_in(f.annotation)]
    return sorted({key for c in candidates for key in c.model_fields})


def _tags(annotation: Any) -> tuple:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in typing.get_args(annotation) for found in _sections_in(inner)]
