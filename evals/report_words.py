"""Numbers and foreign texts as the reports of evaluations print them: the same in HTML, Markdown and on a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparseprefill.evals.tasks import Metric

_PLACEHOLDER = "\N{REPLACEMENT CHARACTER}"
_UNSEEN = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"), *range(0x7F, 0xA0),  # control characters
    0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A),  # they turn what stands around a text
    0x200B, 0x2028, 0x2029, 0x2060, 0xFEFF,  # not seen, or taken for the end of a line
)  # fmt: skip
_TABLE: dict[int, str] = {
    **{code: f"[U+{code:04X}]" for code in _UNSEEN}, 0xFFFE: _PLACEHOLDER, 0xFFFF: _PLACEHOLDER,
}  # fmt: skip
_SURROGATES = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(
    r"-|<?[-+]?\d[\d.]*(e[-+]?\d+)?( ?(x|s|ms|GiB|%))?|\d+ / \d+|\[[-+\d., e]+\]"
    r"|[-+]?\d[\d.]*(e[-+]?\d+)? (\[[-+\d., e]+\]|-)"
)
_MARKS = re.compile(r"([\\`*\[\]|~$])|(?<![0-9A-Za-z])(_)|(_)(?![0-9A-Za-z])")
_LINE_START = re.compile(r"^(\s*)(#|[-+=>](?=\s|$|[-=])|\d+[.)](?=\s))")


def clean(text: str) -> str:
    """A text that can be written as UTF-8 and shown.

    Control characters, and others that are not seen or turn the direction of what follows, are shown by their number,
    as in "[U+202E]"; lone surrogates become a placeholder. Line breaks and tabs stay.
    """
    return _SURROGATES.sub(_PLACEHOLDER, text).translate(_TABLE)


def one_line(text: str) -> str:
    """Clean, without line breaks and runs of blanks: for a cell of a table, a heading, a label."""
    return " ".join(clean(text).split())


def cut(text: str, most: int) -> str:
    """A long text without its middle, saying how much is gone."""
    if len(text) <= most:
        return text
    head = most - most // 3
    tail = most - head
    return f"{text[:head]} [... {len(text) - most} characters left out ...] {text[len(text) - tail :]}"


def short(text: str, most: int = 34) -> str:
    """One line of at most `most` characters, for a label in a plot."""
    line = one_line(text)
    head = (most - 1) // 2
    return line if len(line) <= most else f"{line[:head]}\N{HORIZONTAL ELLIPSIS}{line[len(line) - (most - 1 - head) :]}"


def markdown(text: str) -> str:
    """One line in which nothing means anything to Markdown or is taken for HTML, at its start or further on."""
    line = _unmarked(text)
    return _LINE_START.sub(lambda found: f"{found[1]}\\{found[2]}" if not found[2][0].isdigit() else
                           f"{found[1]}{found[2][:-1]}\\{found[2][-1]}", line)  # fmt: skip


def markdown_cell(text: str) -> str:
    """As `markdown`, inside a table, where no line begins; numbers and intervals stay as they are."""
    return text.replace("<", "&lt;") if _NUMBER.fullmatch(text) else _unmarked(text)


def _unmarked(text: str) -> str:
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(lambda found: "\\" + found.group(0), line)


def score(value: float | None, metric: Metric) -> str:
    """A mean: in points of a hundred for a percent metric."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" if metric.percent else f"{value:.4g}"


def change(value: float | None, metric: Metric) -> str:
    """A difference with its sign; small ones keep digits, so that a difference never reads as none."""
    if value is None:
        return "-"
    if not metric.percent:
        return "0" if value == 0 else f"{value:+.3g}"
    points = 100 * value
    if abs(points) < 1e-9:
        return "0.0"
    return f"{points:+.1f}" if abs(points) >= 0.95 else f"{points:+.2f}" if abs(points) >= 0.005 else f"{points:+.0e}"


def interval(low: float | None, high: float | None, metric: Metric) -> str:
    """As in "[-6.3, -2.1]"; a dash for none."""
    return "-" if low is None or high is None else f"[{change(low, metric)}, {change(high, metric)}]"


def in_cell(value: float, metric: Metric) -> str:
    """A score for a cell of a heat map: "100" and "0" only where nothing was lost or nothing was right."""
    if not metric.percent:
        return f"{value:.2g}"
    points = 100 * value
    text = f"{points:.0f}"
    if text == "100" and value < 1:
        return f"{min(points, 99.9):.1f}"
    if text in ("0", "-0") and value > 0:
        return f"{max(points, 0.1):.1f}"
    return "0" if text == "-0" else text


def probability(value: float | None) -> str:
    """A p-value."""
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def seconds(value: float | None) -> str:
    """A time."""
    if value is None:
        return "-"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def times(value: float | None) -> str:
    """A speed-up."""
    return "-" if value is None else f"{value:.2f}x"


def gibibytes(value: int | None) -> str:
    """Memory."""
    return "-" if value is None else f"{value / 2**30:.2f} GiB"


def counts(found: dict[str, int]) -> str:
    """What was counted, by name."""
    return "; ".join(f"{name}: {count}" for name, count in found.items()) or "-"


def group_value(axis: str, value: str | int | float) -> str:
    """A value of an axis as a reader names it."""
    if isinstance(value, str):
        return one_line(value) or "(none)"
    if axis == "length" and value >= 1024 and value % 1024 == 0:
        return f"{int(value) // 1024}k"
    if axis == "depth":
        return f"{100 * value if isinstance(value, float) and value <= 1 else value:.4g}%"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def some(count: int, noun: str) -> str:
    """As in "1 prompt" and "2 prompts"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Table:
    """A table in words, before it is HTML, Markdown or text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def numeric(self) -> list[bool]:
        """Of each column: does it hold numbers, intervals and dashes alone?"""
        return [all(_NUMBER.fullmatch(row[c]) for row in self.rows) for c in range(len(self.head))]
