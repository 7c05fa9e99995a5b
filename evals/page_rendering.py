"""Pages that need nothing else: a template, what stands in it, and no way for a text to become markup."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

from sparseprefill.evals.report_words import clean


def render_page(template: str, context: dict[str, Any]) -> str:
    """A page from one of the templates beside this module. Whatever is no `markup` is shown as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable,
    )  # fmt: skip
    environment.filters["nice"] = _nice
    page = environment.get_template(template).render(context)
    return page if page.endswith("\n") else page + "\n"


def _template(name: str) -> str:
    return (resources.files("sparseprefill.evals") / name).read_text(encoding="utf-8")


def markup(made_here: str) -> Any:
    """What is put into a page as it stands: only for SVG of `to_svg`, which escapes every text in it."""
    from markupsafe import Markup

    return Markup(made_here)


def _printable(value: Any) -> Any:
    """Texts are cleaned where they are printed; what is markup already was made here."""
    return clean(value) if type(value) is str else value


def _nice(text: str) -> str:
    """A number as it is printed, with a minus sign for its hyphen."""
    if text == "-":
        return "\N{EN DASH}"
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)
