"""Write the API reference, one HTML page a module, from docstrings and from the comments that stand after fields.

python scripts/build_reference.py --out build/reference      # or: make reference
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import io
import itertools
import pkgutil
import re
import shutil
import sys
import tokenize
from pathlib import Path
from typing import Any

import pdoc.doc
import pdoc.render

import sparseprefill

ROOMS = ("patterns", "estimators", "kernels", "evals")
# a room's page shows what its `__all__` names; these hold more that people call
BESIDE = ("kernels.reference", "evals.bench", "evals.calibrate")
# the spine shows itself module by module, but for those whose public names stand on the first page, and the commands
HIDDEN = re.compile("contracts|huggingface.*|cli|__main__")


MADE_BY_A_FUNCTION = {"Patch"}  # nobody calls their constructors


def page_names() -> list[str]:
    """Dotted names of the modules that get a page, the package itself first."""
    spine = {module.name for module in pkgutil.iter_modules(sparseprefill.__path__)} - set(ROOMS)
    below = [*sorted(name for name in spine if not HIDDEN.fullmatch(name)), *ROOMS, *BESIDE]
    public = [name for name in below if not any(part.startswith("_") for part in name.split("."))]
    return ["sparseprefill", *(f"sparseprefill.{name}" for name in public)]


def field_comments(cls: type[Any]) -> dict[str, str]:
    """What the comments after the fields of a dataclass say, and those on lines of their own right below."""
    said: dict[str, str] = {}
    field, before = "", 0
    names = set(cls.__dataclass_fields__)  # class variables too
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        line = token.line.strip()
        if token.type == tokenize.COMMENT:
            own_line = line.startswith("#")
            name = line.split(":")[0]
            text = token.string.lstrip("# ")
            if not own_line and name in names:
                said[name], field, before = text, name, token.start[0]
            elif own_line and field and token.start[0] == before + 1:
                said[field], before = f"{said[field]} {text}", token.start[0]
    return said


def load_pages() -> dict[str, pdoc.doc.Module]:
    """The pages, ready to be rendered."""
    for name in sparseprefill.__all__:  # they are resolved when first asked for, and pdoc looks into the module's dict
        setattr(sparseprefill, name, getattr(sparseprefill, name))
    pages = {name: pdoc.doc.Module(importlib.import_module(name)) for name in page_names()}
    first, *others = pages.values()
    first.submodules = others  # the package's `__all__` names no modules, and its page is the way to all others
    for page in pages.values():
        for member in page.members.values():
            if isinstance(member, pdoc.doc.Class):
                complete_class(member)
            elif isinstance(member, pdoc.doc.Variable) and not member.docstring:
                member.docstring = said_of_constant(page.fullname, member.name)
    return pages


def complete_class(cls: pdoc.doc.Class) -> None:
    """Fields get their comments; constructors that nobody calls go."""
    if cls.name in MADE_BY_A_FUNCTION:
        del cls.members["__init__"]
    comments = field_comments(cls.obj) if dataclasses.is_dataclass(cls.obj) else {}
    for member in cls.members.values():
        if not member.docstring and member.name in comments:
            member.docstring = comments[member.name]
        elif not member.docstring and member.name == "build_index":
            member.docstring = "See `sparseprefill.patterns.Pattern.build_index`."


def said_of_constant(package: str, name: str) -> str:
    """Of a constant: the docstring in the module it comes from, where alone pdoc finds it, or the comment above it."""
    homes = [module for home, module in list(sys.modules.items()) if f"{home}.".startswith(f"{package}.")]
    for home in homes:
        member = pdoc.doc.Module(home).members.get(name)
        if member is not None and member.docstring:
            return member.docstring
        lines = inspect.getsource(home).splitlines()
        at = next((n for n, line in enumerate(lines) if re.match(rf"(\w+, )*{name}\b.* = ", line)), 0)
        above = list(itertools.takewhile(lambda line: line.startswith("#"), reversed(lines[:at])))
        if above:
            return " ".join(line.lstrip("# ") for line in reversed(above))
    return ""


def build(out: Path) -> list[Path]:
    """Write all pages into `out`, which is emptied first; gives the files."""
    shutil.rmtree(out, ignore_errors=True)
    pages = load_pages()
    pdoc.render.configure(
        docformat="google", show_source=False, footer_text=f"sparseprefill {sparseprefill.__version__}"
    )
    texts = {f"{name.replace('.', '/')}.html": pdoc.render.html_module(page, pages) for name, page in pages.items()}
    texts |= {"index.html": pdoc.render.html_index(pages), "search.js": pdoc.render.search_index(pages)}
    for name, text in texts.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/reference"))
    args = parser.parse_args()
    print(f"wrote {len(build(args.out))} files; begin at {args.out / 'sparseprefill.html'}")


if __name__ == "__main__":
    main()
