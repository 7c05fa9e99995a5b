"""What a profile looks like: a table for a terminal or Markdown, and one page that needs nothing else.

Whatever comes from files is shown as text, never as markup.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparseprefill.evals.page_rendering import markup, render_page
from sparseprefill.evals.profile_figures import (
    KINDS,
    CandidateInfo,
    Comparison,
    ProfileScores,
    PromptInfo,
    Show,
    check_scores,
    compare_uniform,
    draw_pareto,
    head_pngs,
    judged_on,
    plot_maps,
    plot_pareto,
    scale_png,
    types_used,
)
from sparseprefill.evals.profile_findings import (
    TERMS,
    Head,
    cautions,
    findings,
    heads_of,
    kept,
    kinds_of,
    listed,
    made_words,
    mean,
    model_words,
    share,
    text_of,
    worst_heads,
)
from sparseprefill.evals.report_figures import to_png, to_svg
from sparseprefill.evals.report_words import Table, cut, markdown, markdown_cell, one_line, some
from sparseprefill.files import check_folder, write_bytes, write_text
from sparseprefill.patterns.profiles import label_of, type_of
from sparseprefill.patterns.store import HeadScore, ModelPatterns
from sparseprefill.reports import number, table

__all__ = [
    "CandidateInfo",
    "ProfileScores",
    "PromptInfo",
    "plot_maps",
    "plot_pareto",
    "profile_html",
    "profile_table",
    "write_maps",
    "write_page",
]

MOST_PICTURES = 14_000_000
"""So many characters of a page are pictures of heads; with all the rest of the largest models it stays below 20 MB."""

WORST = 10
"""So many heads are listed as those that keep the least."""

# Tables: what all forms share


def layer_table(profile: ModelPatterns) -> Table:
    """A row a layer and one for all: shares of the types, and what is kept and computed on both kinds of prompts."""
    heads, types, kinds = heads_of(profile), types_used(profile), kinds_of(profile)
    known = not kinds or all(head.tuning or head.held_out for head in heads)

    def row(name: str, own: list[Head]) -> list[str]:
        found = [type_of(head.pattern) for head in own]
        cells = [name, str(len(own)), *(share(found.count(each), len(own)) for each in types)]
        if not known:
            cells.append(str(sum(head.tuning is not None or head.held_out is not None for head in own)))
        for kind in kinds:
            scores = [score for head in own if (score := getattr(head, kind)) is not None]
            cells += [kept(mean([score.mass for score in scores])),
                      kept(min((score.mass for score in scores), default=None)),
                      number(mean([score.density for score in scores]))]  # fmt: skip
        if kinds:  # the last of them is what counts
            cells.append(number(mean([score.work for score in scores])))
        return cells

    by_layer: dict[int, list[Head]] = {}
    for head in heads:
        by_layer.setdefault(head.layer, []).append(head)
    rows = [row(str(layer), own) for layer, own in by_layer.items()]
    names = ["layer", "heads", *map(one_line, types), *([] if known else ["profiled"])]
    for kind in kinds:
        names += [f"{KINDS[kind]} {what}" for what in ("mass", "worst", "density")]
    names += ["work"] if kinds else []
    return Table("Heads by pattern, and what they keep and compute", names, [*rows, row("all", heads)])


def _head_rows(profile: ModelPatterns, heads: Sequence[Head], caption: str) -> Table:
    kinds = kinds_of(profile)
    head = ["layer", "head", "pattern"]
    for kind in kinds:
        head += [f"{KINDS[kind]} {what}" for what in ("mass", "low mass", "density", "work")]
    rows = []
    for each in heads:
        row = [str(each.layer), str(each.head), one_line(label_of(each.pattern))]
        for kind in kinds:
            score = getattr(each, kind)
            if score is None:
                row += ["-"] * 4
            else:
                row += [kept(score.mass), kept(score.low_mass), number(score.density), number(score.work)]
        rows.append(row)
    return Table(caption, head, rows)


def head_table(profile: ModelPatterns) -> Table:
    """A row a head."""
    return _head_rows(profile, heads_of(profile), "Heads: the pattern of each, and what it keeps and computes")


def worst_table(profile: ModelPatterns) -> Table | None:
    """The heads that keep the least on the prompts that count; None without scores."""
    worst = worst_heads(profile)
    if not worst:
        return None
    kind = KINDS[judged_on(profile) or "tuning"]
    return _head_rows(profile, worst[:WORST], f"The {some(min(WORST, len(worst)), 'head')} that keep the least on "
                      f"{kind} prompts")  # fmt: skip


def made_table(profile: ModelPatterns) -> Table:
    """The model's keys, its weights, and how the profile was made, as far as it says."""
    found = [(f"model.{name}", value) for name, value in profile.model.items()]
    found += [("weights", profile.weights if profile.weights is not None else "not known")]
    # prompts have a table of their own
    found += [item for item in profile.made.items() if not (item[0] == "prompts" and listed(item[1]))]
    rows = [[one_line(cut(name, 80)), one_line(cut(text_of(value), 3000))] for name, value in found]
    return Table("The model, and how the profile was made", ["what", "value"], rows)


def prompts_table(profile: ModelPatterns) -> Table | None:
    """The prompts, where the profile lists them."""
    prompts = profile.made.get("prompts")
    if not listed(prompts):
        return None
    assert isinstance(prompts, list)
    rows = [
        [one_line(cut(text_of(each.get("name", "-")), 120)), one_line(cut(text_of(each.get("tokens", "-")), 20)),
         "held-out" if each.get("held_out") is True else "tuning" if each.get("held_out") is False else "-"]
        for each in prompts
    ]  # fmt: skip
    return Table("Prompts", ["prompt", "tokens", "used as"], rows)


# The table


def profile_table(profile: ModelPatterns, markdown: bool = False, *, heads: bool = False) -> str:
    """A profile for a terminal, or as Markdown: what it is in a few lines, and a row for each layer.

    Args:
        profile: it may have scores or none.
        markdown: as Markdown, in which no text from the profile means anything.
        heads: a row for each head instead.
    """
    found = head_table(profile) if heads else layer_table(profile)
    said = [model_words(profile), made_words(profile), *findings(profile)]
    warned = cautions(profile)
    if not markdown:
        lines = [one_line(each) for each in said] + [f"! {one_line(each)}" for each in warned]
        return "\n".join([*lines, "", table(found.head, found.rows)]) + "\n"
    return _as_markdown(found, said, warned)


def _as_markdown(found: Table, said: Sequence[str], warned: Sequence[str]) -> str:
    rows = [[markdown_cell(cell) for cell in row] for row in found.rows]
    parts = [
        "\n\n".join(markdown(each) for each in said[:2]),
        "\n".join(f"- {markdown(each)}" for each in said[2:]),
        "\n".join(f"- **Note**: {markdown(each)}" for each in warned),
        f"**{markdown(found.caption)}**",
        table([markdown_cell(each) for each in found.head], rows, markdown=True),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# The page


@dataclass(frozen=True, slots=True)
class _Figure:
    svg: Any
    caption: str


@dataclass(frozen=True, slots=True)
class _HeadPicture:
    url: str
    size: int
    title: str
    words: str


@dataclass(slots=True)
class _LayerPictures:
    title: str
    heads: list[_HeadPicture] = field(default_factory=list)


@dataclass(slots=True)
class _Pictures:
    layers: list[_LayerPictures] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scale: str = ""


def write_page(
    profile: ModelPatterns, scores: ProfileScores | None, path: str | Path, name: str | None = None
) -> None:  # fmt: skip
    """Write `profile_html` whole or not at all. `name` is what the page calls the profile; None: the page's own name.

    Raises ValueError as `profile_html`, FileNotFoundError where the folder is missing.
    """
    check_folder(path)
    write_text(path, profile_html(profile, scores, Path(path).name if name is None else name))


def write_maps(profile: ModelPatterns, path: str | Path) -> None:
    """Write `plot_maps` as a PNG file, whole or not at all."""
    check_folder(path)
    write_bytes(path, to_png(plot_maps(profile)))


def profile_html(profile: ModelPatterns, scores: ProfileScores | None, name: str) -> str:
    """One page with its style and pictures inside: nothing is fetched and nothing is run.

    Args:
        profile: it may have scores or none.
        scores: of every candidate, if they were kept: the curve of uniform baselines and the pictures of heads.
        name: of the profile's file.

    Raises:
        ValueError: the scores cannot be those of this profile.
    """
    found = None if scores is None else compare_uniform(profile, scores)
    pictures = _Pictures() if scores is None else head_pictures(profile, scores)
    worst = worst_table(profile)
    context = {
        "name": one_line(cut(name, 120)), "model": model_words(profile), "made": made_words(profile),
        "findings": findings(profile), "warnings": cautions(profile),
        "maps": list(_maps(profile)), "scored": judged_on(profile) is not None,
        "pareto": [] if found is None else list(_pareto(found)),
        "compared": [] if found is None else compared_words(found),
        "layers": _unbroken(layer_table(profile)), "worst": None if worst is None else _unbroken(worst),
        "heads": _unbroken(head_table(profile)),
        "broad": max(map(len, profile.layers)) > 40,
        "hatched": any(head.tuning is None and head.held_out is None for head in heads_of(profile)),
        "pictures": pictures, "settings": made_table(profile), "prompts": prompts_table(profile), "terms": TERMS,
        "has_scores": scores is not None,
    }  # fmt: skip
    return render_page("profile.html.j2", context)


def _unbroken(found: Table) -> Table:
    """With headings that a browser does not break inside a word."""
    return replace(found, head=[each.replace("-", "\N{NON-BREAKING HYPHEN}") for each in found.head])


def _maps(profile: ModelPatterns) -> Iterator[_Figure]:
    types = ", ".join(f"{one_line(each)}" for each in types_used(profile))
    shows: tuple[tuple[Show, str, str], ...] = (
        ("pattern", "Pattern of each head", f"Layers by heads, coloured by type: {types}."),
        ("density", "Density of each head", "Layers by heads, pale where little is computed."),
        ("mass", "Attention mass each head keeps", "Layers by heads, dark where much is lost."),
    )
    for show, title, told in shows:
        if show == "pattern" or judged_on(profile) is not None:
            figure = plot_maps(profile, (show,))
            yield _Figure(
                markup(to_svg(figure, f"map-{show}", title, f"{told} The table of heads says the same.")), title
            )


def _pareto(found: Comparison) -> Iterator[_Figure]:
    told = " ".join(compared_words(found))
    for cost, title in (("density", "Kept mass against density"), ("work", "Kept mass against work")):
        figure = draw_pareto(found, "density" if cost == "density" else "work")
        yield _Figure(markup(to_svg(figure, f"pareto-{cost}", title, told)), title)


def compared_words(found: Comparison) -> list[str]:
    """The profile beside the best uniform baselines."""
    lines = [
        f"Over {some(found.heads, 'head')} on {KINDS[found.kind]} prompts the profile keeps {kept(found.mass)} of the "
        f"mass at density {found.density:.3f} and work {found.work:.3f}."
    ]
    if found.kind == "tuning":
        lines.append("There are no held-out prompts to compare on.")
    real = [each for each in found.baselines if not each.control]
    as_much = [each for each in real if each.mass >= found.mass]
    if as_much:
        each = min(as_much, key=lambda each: each.work)
        lines.append(f"To keep as much with one pattern for all heads takes work {each.work:.3f}, at density "
                     f"{each.density:.3f} ({one_line(each.label)}).")  # fmt: skip
    as_cheap = [each for each in real if each.work <= found.work]
    if as_cheap:
        each = max(as_cheap, key=lambda each: each.mass)
        lines.append(f"For no more work than the profile's, the best single pattern keeps {kept(each.mass)} "
                     f"({one_line(each.label)}).")  # fmt: skip
    else:
        lines.append("No single candidate takes as little work as the profile.")
    return lines


def head_pictures(profile: ModelPatterns, scores: ProfileScores) -> _Pictures:
    """Where the mass of each head lies, first layers first, as many as a page can hold."""
    check_scores(profile, scores)
    kind, tokens = judged_on(profile), {prompt.name: prompt.tokens for prompt in scores.prompts}
    found, used, without, left, first_left = _Pictures(scale=_url(scale_png())), 0, [], 0, ""
    for layer in sorted(scores.layers):
        heads = profile.layers[layer]
        if left:
            left += len(heads)
            continue
        drawn = scores.picture(layer)
        if drawn is None:
            without.append(layer)
            continue
        prompt, picture = drawn
        wide = "a tile" if picture.tiles == 1 else f"{picture.tiles} tiles"
        length = f", {tokens[prompt]} tokens" if prompt in tokens else ""
        own = _LayerPictures(f"Layer {layer}: prompt {one_line(cut(prompt, 80))}{length}; a cell is {wide} wide")
        for head, (png, outlined) in enumerate(head_pngs(picture, heads, scores.candidates)):
            url = _url(png)
            if used + len(url) > MOST_PICTURES:
                left, first_left = len(heads) - head, f"layer {layer}, head {head}"
                break
            used += len(url)
            score = getattr(profile, kind)[layer][head] if kind else None
            own.heads.append(_HeadPicture(
                url, int.from_bytes(png[16:20], "big"), f"Layer {layer}, head {head}",
                _picture_words(label_of(heads[head]), score, outlined),
            ))  # fmt: skip
        if own.heads:
            found.layers.append(own)
    unscored = sorted(set(range(len(profile.layers))) - set(scores.layers))
    if left:
        found.notes.append(f"{some(left, 'head')} from {first_left} on are left out: a page with all pictures would be "
                           "too large to open.")  # fmt: skip
    if without:
        found.notes.append(f"No picture was kept of {_layer_list(without)}.")
    if unscored:
        found.notes.append(f"Not scored, so without a picture: {_layer_list(unscored)}.")
    return found


def _picture_words(label: str, score: HeadScore | None, outlined: bool) -> str:
    told = "" if score is None else f"; density {number(score.density)}, kept mass {kept(score.mass)}"
    return f"{one_line(label)}{told}{'' if outlined else '; no outline: this pattern was no candidate'}"


def _layer_list(layers: Sequence[int]) -> str:
    """As in "layers 0 to 3, 7"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    told = ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in spans)
    return f"layer{'' if len(layers) == 1 else 's'} {told}"


def _url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
