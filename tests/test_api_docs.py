"""The reference is complete: every public name has a page, a full docstring, and an example that runs."""

import doctest
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import issm

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "api"
SUBMODULES = ("simulate", "metrics", "plotting", "io", "compat")


def _public_names():
    """`{dotted name: object}` of all that a user may import."""
    names = {f"issm.{name}": value for name, value in _attributes(issm)}
    existing = {module.name for module in pkgutil.iter_modules(issm.__path__)}
    for submodule in SUBMODULES:
        if submodule in existing:
            path = f"issm.{submodule}"
            module = pkgutil.resolve_name(path)
            for name, value in _attributes(module):
                if getattr(value, "__module__", path).startswith(path):
                    names[f"{path}.{name}"] = value
    return names


def _attributes(module):
    return [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]


def _documented_names():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("**/*.md")))
    return set(re.findall(r"^::: (issm[\w.]*)\s*$", pages, flags=re.MULTILINE))


def _docstring(value):
    """The object's own docstring: a class does not inherit one."""
    own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    return inspect.cleandoc(own or "")


def _section(doc, title):
    """Body of a Google section, or None."""
    found = re.search(rf"^{title}:\n((?:[ \t]+.*\n?|\n)+)", doc, flags=re.MULTILINE)
    return found.group(1) if found else None


def _parameters(function):
    """What Args must list; empty where the signature cannot be read."""
    try:
        return [p.name for p in inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        return []


def _fields(cls):
    """Public annotated fields, inherited ones included."""
    return [
        name
        for base in reversed(cls.__mro__)
        if base.__module__.startswith("issm")
        for name in vars(base).get("__annotations__", {})
        if not name.startswith("_")
    ]


def _bad_references(body):
    """Cited works that the bibliography lacks, and pages or headings that do not exist."""
    bibliography = (ROOT / "docs" / "references.md").read_text(encoding="utf-8").split("\n\n")
    for author, year in re.findall(r"(?:^|[;.,(] |\s)([A-Z][^\s,;()]+)(?:[ ,]+[^;()]*?)? \((\d{4})\)", body):
        if not any(entry.startswith(author) and f"({year})" in entry for entry in bibliography):
            yield f"cites {author} ({year}), which docs/references.md lacks"
    for page, _, heading in re.findall(r'`(docs/[\w./-]+\.md)`(, "([^"]+)")?', body):
        text = (ROOT / page).read_text(encoding="utf-8") if (ROOT / page).exists() else ""
        if not text or (heading and not re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE)):
            yield f'refers to {page} "{heading}", which does not exist'


def _faults(name, value, documented):
    if name not in documented:
        yield f"is on no page: add `::: {name}` under docs/api"
    if not callable(value):
        return  # an alias or a constant
    doc = _docstring(value)
    if not doc:
        yield "has no docstring"
        return
    lines = doc.splitlines()
    if not lines[0].strip() or (len(lines) > 1 and lines[1].strip()):
        yield "its summary is not one line followed by a blank one"
    if inspect.isclass(value):
        required = ["References", "Examples"]
        listed, wanted = "Attributes", _fields(value)
        body = (_section(doc, "Attributes") or "") + (_section(doc, "Args") or "")
    else:
        required = ["Returns", "Raises", "References", "Examples"]
        listed, wanted = "Args", _parameters(value)
        body = _section(doc, "Args") or ""
    for title in required:
        if not (_section(doc, title) or "").strip():
            yield f"has no {title}"
    yield from _bad_references(_section(doc, "References") or "")
    missing = [p for p in wanted if not re.search(rf"^\s*\*{{0,2}}{p}\b.*:", body, re.MULTILINE)]
    if missing:
        yield f"its {listed} leave out {', '.join(missing)}"
    if _section(doc, "Examples") and ">>>" not in _section(doc, "Examples"):
        yield "its Examples have no `>>>`"


PUBLIC = _public_names()


def test_reference_is_complete():
    documented = _documented_names()
    faults = [f"{name} {fault}" for name, value in PUBLIC.items() for fault in _faults(name, value, documented)]
    faults += [f"{name} is documented but not public" for name in sorted(documented - set(PUBLIC))]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)


@pytest.mark.parametrize("name", sorted(n for n, v in PUBLIC.items() if callable(v)))
def test_example_runs(name):
    value = PUBLIC[name]
    docs = {name: _docstring(value)}
    if inspect.isclass(value):
        docs |= {
            f"{name}.{member}": inspect.getdoc(method) or ""
            for member, method in vars(value).items()
            if not member.startswith("_") and (callable(method) or isinstance(method, property))
        }
    report = []
    for label, doc in docs.items():
        test = doctest.DocTestParser().get_doctest(doc, {}, label, None, 0)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
        runner.run(test, out=report.append)
    assert not report, "\n".join(report)


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
def test_page_runs(page, tmp_path, monkeypatch):
    """The Python blocks of a page run, one after the other; other libraries rely on promotion."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    by_peers = page.endswith("inside-other-libraries.md")
    promotion = jax.numpy_dtype_promotion("standard" if by_peers else "strict")
    with promotion, jax.numpy_rank_promotion("allow" if by_peers else "raise"):
        for block in blocks:
            exec(compile(block, page, "exec"), namespace)
