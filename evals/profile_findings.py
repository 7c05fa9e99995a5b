"""What a profile says, in words: which heads got which pattern, what they keep, and what to know before trusting it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseprefill.evals.profile_figures import KINDS, judged_on, types_used
from sparseprefill.evals.report_words import cut, one_line, some
from sparseprefill.patterns.profiles import label_of, type_of
from sparseprefill.patterns.store import HeadScore, ModelPatterns
from sparseprefill.reports import number

_LARGE_GAP = 0.05  # of kept mass between tuning and held-out prompts: worth a warning

TERMS: tuple[tuple[str, str], ...] = (
    ("kept mass", "The share of the softmax weight, under dense attention, that falls on the pairs a head computes: "
     "the mean over query rows, then over prompts, each prompt counting the same. 1: nothing of weight was skipped."),
    ("low mass", "What all query rows but a small share (the quantile) keep at least."),
    ("density", "The pairs of a query and a key that are computed, of all pairs that dense attention computes."),
    ("work", "Tiles that are computed, of those of dense attention, and the work of finding them in the same unit. It "
     "is no time: what pays off depends on the machine."),
    ("tuning, held-out", "Patterns are chosen on the tuning prompts. The held-out prompts had no part in that: what is "
     "kept on them is what a new prompt may expect."),
    ("uniform", "Every head has the same candidate. A profile is worth its trouble where it keeps more than any of "
     "these for the same cost."),
    ("not profiled", "A head without a score: nothing was measured for it."),
)  # fmt: skip
"""The words of a page."""


@dataclass(frozen=True, slots=True)
class Head:
    """One head of a profile."""

    layer: int
    head: int
    pattern: Any
    tuning: HeadScore | None
    held_out: HeadScore | None

    @property
    def place(self) -> str:
        return f"layer {self.layer}, head {self.head}"


def heads_of(profile: ModelPatterns) -> list[Head]:
    """All heads, layer by layer."""
    return [
        Head(
            layer, head, pattern, profile.tuning[layer][head] if profile.tuning else None,
            profile.held_out[layer][head] if profile.held_out else None,
        )
        for layer, heads in enumerate(profile.layers)
        for head, pattern in enumerate(heads)
    ]  # fmt: skip


def kinds_of(profile: ModelPatterns) -> list[str]:
    """The kinds of prompts that there are scores for: `tuning`, `held_out`."""
    return [kind for kind in ("tuning", "held_out") if getattr(profile, kind)]


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.fsum(values) / len(values) if values else None


def share(count: int, total: int) -> str:
    """In percent; some are never 0% and never 100%."""
    percent = 100 * count / total
    if count in (0, total) or 1 <= percent <= 99:
        return f"{percent:.0f}%"
    return f"{percent:.2g}%" if percent < 1 else f"{min(percent, 99.9):.1f}%"


def kept(value: float | None) -> str:
    """A mass to three digits, 1.000 only where nothing is lost."""
    return number(value if value is None or value >= 1 - 1e-6 else min(value, 0.999))


def worst_heads(profile: ModelPatterns) -> list[Head]:
    """Heads with a score on the prompts that count, the one that keeps the least first."""
    kind = judged_on(profile)
    scored = [] if kind is None else [head for head in heads_of(profile) if getattr(head, kind) is not None]
    return sorted(scored, key=lambda head: getattr(head, kind or "").mass)


def listed(value: Any) -> bool:
    """Whether something from a file is a list of objects."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def text_of(value: Any) -> str:
    """Something from a file as a text."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return "; ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e12:
        return None  # nothing that a profile counts is as large
    return float(value)


def target_words(made: dict[str, Any]) -> str:
    """What each head's pattern was chosen for, as far as the profile says."""
    if "merged" in made:
        count = len(made["merged"]) if isinstance(made["merged"], list) else 0
        kept = "computed less" if made.get("keep") == "density" else "kept more mass"
        return f"Merged from {some(count, 'profile')}: each head has the pattern that {kept} on held-out prompts."
    target = made.get("target")
    if not isinstance(target, dict):
        return "" if target is None else f"Target: {one_line(cut(text_of(target), 200))}."
    mass, work, quantile = _number(target.get("mass")), _number(target.get("work")), _number(made.get("quantile"))
    if target.get("kind") == "mass" and mass is not None:
        rows = "" if quantile is None else f" in all but {100 * quantile:.4g}% of the query rows"
        return f"Target: each head has the cheapest pattern that keeps {mass:.4g} of the attention mass{rows}."
    if target.get("kind") == "budget" and work is not None:
        words = f"Target: the most kept mass for {work:.4g} of dense attention's work, over all heads"
        gap = _number(target.get("gap"))
        return f"{words}; at most {gap:.2g} below the best possible choice." if gap is not None else f"{words}."
    density, error = _number(target.get("density")), _number(target.get("error"))
    if target.get("kind") == "density" and density is not None:
        return f"Target: the most kept mass at a mean density of {density:.4g} over all heads."
    if target.get("kind") == "sale" and error is not None:
        return (
            "Target: SALE's own calibration, each head's threshold halved until its output is within an error of "
            f"{error:.4g} a token of dense attention's."
        )
    if target.get("kind") == "minference":
        return "Target: MInference's own search, the most kept mass whatever it costs."
    return f"Target: {one_line(cut(text_of(target), 200))}."


def model_words(profile: ModelPatterns) -> str:
    """The model in a line, as far as the profile says."""
    model, layers = profile.model, len(profile.layers)
    counts = sorted({len(heads) for heads in profile.layers})
    each = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    name = f"Model {one_line(cut(text_of(model['architecture']), 80))}" if "architecture" in model else "A model"
    words = f"{name}: {some(layers, 'layer')} of {each} query heads"
    if "kv_heads" in model:
        words += f", {one_line(cut(text_of(model['kv_heads']), 40))} key heads"
    if "head_dim" in model:
        words += f" of {one_line(cut(text_of(model['head_dim']), 40))}"
    return f"{words}."


def made_words(profile: ModelPatterns) -> str:
    """How the profile was made in a line, as far as it says."""
    made = profile.made
    if not made:
        return "It does not say how it was made."
    words = []
    version, prompts = made.get("sparseprefill"), made.get("prompts")
    if version is not None:
        words.append(f"sparseprefill {one_line(cut(text_of(version), 40))}")
    if isinstance(prompts, list) and listed(prompts):
        for held_out, kind in ((False, "tuning"), (True, "held-out")):
            tokens = [_number(each.get("tokens")) or 0 for each in prompts if each.get("held_out") is held_out]
            if tokens:
                span = f"{min(tokens):.0f}" + (f" to {max(tokens):.0f}" if min(tokens) < max(tokens) else "")
                words.append(f"{some(len(tokens), f'{kind} prompt')} of {span} tokens")
    if isinstance(made.get("candidates"), list):
        words.append(some(len(made["candidates"]), "candidate"))
    block, every = _number(made.get("block")), _number(made.get("every"))
    if block is not None:
        words.append(f"tiles of {block:.0f}" + (f", one row of tiles in {every:.0f} looked at" if every and every > 1
                                                else ""))  # fmt: skip
    made_with = f"Made with {', '.join(words)}." if words else ""
    return " ".join(each for each in (made_with, target_words(made)) if each)


def findings(profile: ModelPatterns) -> list[str]:
    """What the profile does, in sentences: types, kept mass and density, the gap to held-out prompts, the worst."""
    heads, types, kinds = heads_of(profile), types_used(profile), kinds_of(profile)
    names = [type_of(head.pattern) for head in heads]
    by_count = sorted(types, key=lambda each: -names.count(each))
    told = ", ".join(
        f"{names.count(each)} {one_line(each)} ({share(names.count(each), len(heads))})" for each in by_count
    )
    lines = [f"{some(len(heads), 'head')}: {told}."]
    for kind in reversed(kinds):
        scores = [score for head in heads if (score := getattr(head, kind)) is not None]
        mass, density, work = (mean([getattr(s, name) for s in scores]) for name in ("mass", "density", "work"))
        lines.append(f"On {KINDS[kind]} prompts a head keeps {kept(mass)} of the attention mass on average, at "
                     f"density {number(density)} and work {number(work)}.")  # fmt: skip
    pairs = [(head, head.tuning.mass - head.held_out.mass) for head in heads if head.tuning and head.held_out]
    if pairs:
        gap = mean([gap for _, gap in pairs]) or 0.0
        if round(gap, 4) == 0:
            said = "as much of the mass as on the tuning prompts, to four digits"
        else:
            said = f"{abs(gap):.4f} {'less' if gap > 0 else 'more'} of the mass than on the tuning prompts"
        head, most = max(pairs, key=lambda pair: pair[1])
        assert head.tuning is not None
        assert head.held_out is not None
        tuning, held_out = kept(head.tuning.mass), kept(head.held_out.mass)
        widest = (
            f" The widest gap has {head.place}: {tuning} on tuning prompts, {held_out} on held-out prompts."
            if most > 0
            else " No head keeps less."
        )
        lines.append(f"Gap: on held-out prompts the same heads keep {said}.{widest}")
    lines += _target_met(profile, heads, kinds)
    worst = worst_heads(profile)[:3]
    if worst:
        kind = judged_on(profile) or "tuning"
        told = "; ".join(
            f"{head.place} ({kept(getattr(head, kind).mass)}, {one_line(label_of(head.pattern))})" for head in worst
        )
        lines.append(f"The least is kept by {told}.")
    return lines


def _target_met(profile: ModelPatterns, heads: Sequence[Head], kinds: Sequence[str]) -> list[str]:
    target = profile.made.get("target")
    mass = _number(target.get("mass")) if isinstance(target, dict) and target.get("kind") == "mass" else None
    if mass is None or not kinds:
        return []
    told = []
    for kind in kinds:
        lows = [score.low_mass for head in heads if (score := getattr(head, kind)) is not None]
        told.append(f"{sum(low >= mass - 1e-9 for low in lows)} of {len(lows)} heads on {KINDS[kind]} prompts")
    return [f"The target of {mass:.4g} is reached by {' and '.join(told)}."]


def cautions(profile: ModelPatterns) -> list[str]:
    """What a reader should know before trusting the numbers."""
    heads, found = heads_of(profile), []
    if not kinds_of(profile):
        found.append("The profile has no scores: nothing is known of what its patterns keep and cost.")
    else:
        unscored = sum(head.tuning is None and head.held_out is None for head in heads)
        if unscored:
            found.append(f"{some(unscored, 'head')} of {len(heads)} without a score: not profiled, in no mean here.")
        if not profile.held_out:
            found.append("There were no held-out prompts: the figures are those of the very prompts that the patterns "
                         "were chosen on, and flatter them.")  # fmt: skip
        gaps = [h for h in heads if h.tuning and h.held_out and h.tuning.mass - h.held_out.mass >= _LARGE_GAP]
        if gaps:
            found.append(f"{some(len(gaps), 'head')} of {len(heads)} keep at least {_LARGE_GAP} less on held-out "
                         "prompts than on the tuning prompts: more or other tuning prompts may help.")  # fmt: skip
    prompts = profile.made.get("prompts")
    if isinstance(prompts, list) and listed(prompts):
        for held_out, kind in ((False, "tuning"), (True, "held-out")):
            if sum(each.get("held_out") is held_out for each in prompts) == 1:
                found.append(f"There was a single {kind} prompt.")
    control = sum(type_of(head.pattern) == "random" for head in heads)
    if control:
        found.append(f"{some(control, 'head')} with random blocks, which are a control and no method.")
    if profile.weights is None:
        found.append("The profile does not say for which weights it was made.")
    return found
