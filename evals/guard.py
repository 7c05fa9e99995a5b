"""What the guard finds, what it misses, when it cries wolf, and what it costs.

Failures are planted where attention itself makes them: a bad query row puts its weight on a key in a block that the
method skips. Good heads come from methods on a real model, judged by the kept mass of all their rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.evals.compared_inputs import layer_inputs
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.guard import Guard, fails, sampled_rows
from sparseprefill.huggingface import patch_model
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.patterns import AShape
from sparseprefill.prefill import resolve_method
from sparseprefill.prompts import needle_prompt
from sparseprefill.reports import number, table

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ROWS = (16, 32, 64, 128, 256)
_HEADS, _KV_HEADS, _DIM, _BLOCK = 8, 4, 64, 64
_SKIPPING = AShape(sink=64, window=256)
_FIRST = 384  # rows before this one skip no block
_SINK_LOGIT = 16.0  # against thousands of logits of spread 0.5: a row that looks nowhere else keeps 0.99 or more
# by how much the logit of a bad row's hidden key exceeds that of the sink
SEVERITIES = {"lost": 4.0, "half": 0.0}


@dataclass(frozen=True, slots=True)
class Planted:
    """One planted failure, and which of its heads each number of drawn rows flagged."""

    bad_heads: int
    share: float  # of a bad head's rows
    severity: str  # what a bad row keeps: about 0.02 ("lost") or 0.5 ("half")
    placed: str  # "scattered" or "together"
    seed: int
    mass: list[float]  # true mean kept mass of each bad head, over all rows
    found: dict[int, list[bool]]  # drawn rows: was it flagged, of each bad head
    false_alarms: dict[int, int]  # drawn rows: good heads flagged


def planted_failures(
    *,
    length: int = 16384,
    min_mass: float = 0.95,
    bad_heads: Sequence[int] = (1, 2, 4, 8),
    shares: Sequence[float] = SHARES,
    rows: Sequence[int] = ROWS,
    seeds: int = 4,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[Planted]:
    """Every combination of bad heads, bad row share, severity, placement and seed.

    The method is an A-shape of 64 + 256 tokens. A query row's mass depends on no other row, so each seed runs the
    kernels once with good rows and once for each severity with bad ones, and a case picks its rows from these.
    """
    cases: list[Planted] = []
    for seed in range(seeds):
        inputs, good, bad = _row_masses(length, seed)
        least = float(good[:, -Guard(min_mass).last :].mean(1).min())
        if least < min_mass:
            raise ValueError(f"good heads keep {least:.3f} on their last rows, below {min_mass}: nothing stands out")
        combinations = itertools.product(bad_heads, shares, SEVERITIES, ("scattered", "together"))
        for count, share, severity, placed in combinations:
            name = f"{seed}/{count}/{share}/{severity}/{placed}"
            draw = torch.Generator().manual_seed(len(cases))
            where = bad_rows(length, count, share, placed, draw)
            mass = torch.where(where, bad[severity], good)
            failing = where.any(1)
            found: dict[int, list[bool]] = {}
            alarms: dict[int, int] = {}
            for drawn in rows:
                guard = Guard(min_mass, rows=drawn)
                failed = _judged(inputs, mass[None], guard, name)[0]
                found[drawn], alarms[drawn] = failed[failing].tolist(), int(failed[~failing].sum())
            own = mass[failing].double().mean(1).tolist()
            cases.append(Planted(count, share, severity, placed, seed, own, found, alarms))
            progress(1)
    return cases


def bad_rows(length: int, count: int, share: float, placed: str, draw: torch.Generator) -> Tensor:
    """bool [heads, rows]: `share` of the rows of `count` heads, one at least; never rows that skip no block."""
    where = torch.zeros(_HEADS, length, dtype=torch.bool)
    able = length - _FIRST
    size = min(able, max(1, round(share * length)))
    for head in torch.randperm(_HEADS, generator=draw)[:count].tolist():
        if placed == "together":
            start = _FIRST + int(torch.randint(able - size + 1, (), generator=draw))
            where[head, start : start + size] = True
        else:
            where[head, _FIRST + torch.randperm(able, generator=draw)[:size]] = True
    return where


def _row_masses(length: int, seed: int) -> tuple[AttentionInputs, Tensor, dict[str, Tensor]]:
    """Inputs with good rows, the kept mass [heads, rows] of these, and that of bad rows by severity."""
    draw = torch.Generator().manual_seed(seed)

    def randn(heads: int) -> Tensor:
        return torch.randn(1, heads, length, _DIM, generator=draw)

    key = randn(_KV_HEADS)
    key *= _DIM**0.5 / key.norm(dim=-1, keepdim=True)  # so that c * key / sqrt(dim) has a logit of c with its key
    query = 0.5 * randn(_HEADS) + _SINK_LOGIT * _own_key(key)[:, :, :1] / _DIM**0.5
    inputs = AttentionInputs(query, key, randn(_KV_HEADS), _DIM**-0.5)
    bad = {}
    for severity in SEVERITIES:
        worse = dataclasses.replace(inputs, query=worse_queries(inputs, seed, severity))
        bad[severity] = next(_masses(worse, [_SKIPPING]))[0]
    return inputs, next(_masses(inputs, [_SKIPPING]))[0], bad


def worse_queries(inputs: AttentionInputs, seed: int, severity: str) -> Tensor:
    """The queries, each of which now looks for a key of its own behind the sink's block and before its window."""
    draw = torch.Generator().manual_seed(seed + 1000)
    length = inputs.queries
    room = (torch.arange(length) // _BLOCK * _BLOCK - 256 - _BLOCK).clamp(min=1)
    hidden = _BLOCK + (torch.rand(1, _HEADS, length, generator=draw) * room).long()
    hidden_key = _own_key(inputs.key).gather(2, hidden.clamp(max=length - 1)[..., None].expand_as(inputs.query))
    worse: Tensor = inputs.query + (_SINK_LOGIT + SEVERITIES[severity]) * hidden_key / _DIM**0.5
    return worse


def _own_key(key: Tensor) -> Tensor:
    """Keys repeated for each query head."""
    return key.repeat_interleave(_HEADS // _KV_HEADS, 1)


def _masses(inputs: AttentionInputs, patterns: Iterable[Any]) -> Iterator[Tensor]:
    """Kept mass [batch, heads, queries] of every row, a pattern at a time."""
    grid = BlockGrid.of(inputs, _BLOCK, _BLOCK)
    dense = block_sparse_attention(inputs, BlockIndex.dense(inputs, grid), values=False).lse
    for pattern in patterns:
        kept = block_sparse_attention(inputs, pattern.build_index(inputs, grid), values=False).lse
        yield (kept - dense).exp().clamp(max=1.0)


def _judged(inputs: AttentionInputs, mass: Tensor, guard: Guard, draw: str) -> Tensor:
    """bool [batch, heads]: whom the guard's rule fails, given the mass of every row."""
    place, real = sampled_rows(inputs, guard, draw)
    shape = (-1, mass.shape[1], -1)
    return fails(mass.gather(2, place[:, None].expand(shape)), real[:, None].expand(shape), guard)


@dataclass(frozen=True, slots=True)
class FalseAlarms:
    """How often heads of known mass were flagged, over all draws."""

    rows: int  # drawn
    rule: str
    min_mass: float
    good_heads: int  # mean kept mass of all rows, and of the last 16, at or above the floor
    flagged: float  # share of their checks that failed
    bad_heads: int  # below the floor over all rows
    missed: float  # share of their checks that did not fail


RULES: dict[str, Callable[[Tensor, Guard], Tensor]] = {
    "means": lambda mass, guard: torch.zeros(mass.shape[:-1], dtype=torch.bool),
    "means, or a row below a tenth of the floor": lambda mass, guard: (mass < guard.min_mass / 10).any(-1),
    "means, or three such rows": lambda mass, guard: (mass < guard.min_mass / 10).sum(-1) >= 3,
}
PROFILES = (
    *(MethodSpec("a_shape", {"sink": 64, "window": share}) for share in (0.2, 0.5, 0.8, 0.95)),
    *(MethodSpec("vertical_slash", {"density": share}) for share in (0.2, 0.5, 0.8, 0.9)),
    *(MethodSpec("block_sparse", {"keep": share}) for share in (0.2, 0.4, 0.6, 0.8, 0.9)),
    *(MethodSpec("random", {"keep": share}) for share in (0.5, 0.9)),
)


def head_masses(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    length: int = 4096,
    prompts: int = 3,
    profiles: Sequence[MethodSpec] = PROFILES,
    seed: int = 7,
    progress: Callable[[int], Any] = lambda steps: None,
) -> tuple[AttentionInputs, Tensor]:
    """Inputs of that length, and the kept mass [heads, rows] of every prompt, layer, profile and head.

    Random inputs stand beside the model's: logits of spread 4, in which few keys hold most of the mass.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    layers: list[AttentionInputs] = []
    for index in range(prompts):
        ids = needle_prompt(encode, length, seed=seed, index=index).token_ids
        layers += layer_inputs(model, torch.tensor([ids], device=model.device)).values()
    draw = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, heads, length, _DIM, generator=draw) for heads in (_HEADS, _KV_HEADS))
    layers.append(AttentionInputs(query, key, key, 4 * _DIM**-0.5))
    found = []
    for inputs in layers:
        for mass in _masses(inputs, [resolve_method(spec.name, **spec.options) for spec in profiles]):
            found.append(mass[0].cpu())
            progress(1)
    return layers[0], torch.cat(found)


def false_alarms(
    inputs: AttentionInputs,
    mass: Tensor,
    *,
    floors: Sequence[float] = (0.8, 0.9, 0.95, 0.97),
    rows: Sequence[int] = (64, 128),
    draws: int = 50,
) -> list[FalseAlarms]:
    """Each head (mass [heads, rows], rows of `inputs`) checked `draws` times, by the guard's rule and by others."""
    whole, last = mass.double().mean(1), mass[:, -Guard(1.0).last :].double().mean(1)
    results = []
    for floor, drawn in itertools.product(floors, rows):
        guard = Guard(floor, rows=drawn)
        good, bad = (whole >= floor) & (last >= floor), whole < floor
        if not good.any():
            raise ValueError(f"no head keeps {floor} of its mass: nothing can be a false alarm")
        flagged = {rule: torch.zeros(len(mass)) for rule in RULES}
        for draw in range(draws):
            place, _ = sampled_rows(inputs, guard, str(draw))
            sample = mass[:, place[0].cpu()]
            low = fails(sample, torch.ones_like(sample, dtype=torch.bool), guard)
            for rule, more in RULES.items():
                flagged[rule] += low | more(sample, guard)
        for rule, times in flagged.items():
            rate = times / draws
            missed = float((1 - rate[bad]).mean()) if bad.any() else 0.0
            results.append(
                FalseAlarms(drawn, rule, floor, int(good.sum()), float(rate[good].mean()), int(bad.sum()), missed)
            )
    return results


@dataclass(frozen=True, slots=True)
class GuardCost:
    """What checking costs, against the sparse prefill it guards; medians over interleaved repeats, in seconds."""

    method: str
    length: int
    min_mass: float  # of the run whose heads ran again; checks alone were timed with a floor that nothing is below
    attention: float  # estimator and kernel, all layers
    checks: float
    checks_over_attention: float  # median of the ratios
    reruns: float  # of the run at min_mass
    reran: int  # of how many (layer, head)
    checked: int
    first_token: float  # whole model, unguarded
    first_token_checked: float
    checks_over_first_token: float  # median over interleaved pairs of guarded / unguarded, less 1
    first_token_guarded: float  # at min_mass, with its re-runs


_NOTHING_IS_BELOW = 1e-30


@torch.no_grad()
def guard_cost(
    model: PreTrainedModel,
    methods: Sequence[MethodSpec],
    *,
    length: int = 32768,
    min_mass: float = 0.95,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[GuardCost]:
    """Prefill random tokens without a guard, with checks that never fail, and with `min_mass`, turn by turn."""
    draw = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(1, vocabulary, (1, length), generator=draw).to(model.device)
    results = []
    for spec in methods:

        def timed(floor: float | None, observe: bool, spec: MethodSpec = spec) -> tuple[float, Any]:
            with patch_model(
                model, spec.name, min_length=0, observe=observe, sample_rows=0, min_mass=floor, **spec.options
            ) as patch:
                _finish(model)
                began = time.perf_counter()
                model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()
                return time.perf_counter() - began, patch.report()

        timed(_NOTHING_IS_BELOW, True)
        plain, checked, watched = [], [], []
        for _ in range(repeats):
            plain.append(timed(None, False)[0])
            checked.append(timed(_NOTHING_IS_BELOW, False)[0])
            watched.append(timed(_NOTHING_IS_BELOW, True)[1])
            progress(1)
        full_seconds, _ = timed(min_mass, False)
        _, full = timed(min_mass, True)
        attention = [sum(x.estimator_seconds + x.kernel_seconds for x in report.layers) for report in watched]
        checks = [sum(x.guard_seconds for x in report.layers) for report in watched]
        results.append(
            GuardCost(
                spec.label, length, min_mass, statistics.median(attention), statistics.median(checks),
                statistics.median(c / a for c, a in zip(checks, attention, strict=True)),
                sum(x.rerun_seconds for x in full.layers), full.guard_reruns, full.guard_checks,
                statistics.median(plain), statistics.median(checked),
                statistics.median(c / p - 1 for c, p in zip(checked, plain, strict=True)), full_seconds,
            )
        )  # fmt: skip
    return results


def _finish(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def miss_table(
    cases: Sequence[Planted], *, severity: str | None = None, below: float | None = None, markdown: bool = False
) -> str:
    """Share of bad heads not flagged, by bad row share and drawn rows.

    `severity`: cases of one kind alone. `below`: heads alone whose true mean kept mass is below that.
    """
    drawn = sorted(cases[0].found)
    body = []
    for share in sorted({case.share for case in cases}):
        here = [
            (mass, [case.found[n][head] for n in drawn])
            for case in cases
            if case.share == share and severity in (None, case.severity)
            for head, mass in enumerate(case.mass)
            if below is None or mass < below
        ]
        if not here:
            body.append([f"{100 * share:g}%", "0", "-", *("-" for _ in drawn)])
            continue
        missed = [1 - statistics.fmean(column) for column in zip(*(flags for _, flags in here), strict=True)]
        mean = statistics.fmean(mass for mass, _ in here)
        body.append([f"{100 * share:g}%", str(len(here)), number(mean), *(f"{100 * m:.1f}%" for m in missed)])
    head = ["bad rows", "bad heads", "mean kept mass", *(f"{n} rows" for n in drawn)]
    return table(head, body, markdown=markdown)


def false_alarm_table(results: Sequence[FalseAlarms], *, markdown: bool = False) -> str:
    """One line a floor, number of drawn rows and rule."""
    body = [
        [
            number(r.min_mass, 2), str(r.rows), r.rule, str(r.good_heads), f"{100 * r.flagged:.2f}%", str(r.bad_heads),
            f"{100 * r.missed:.1f}%",
        ]
        for r in results
    ]  # fmt: skip
    head = ["floor", "drawn rows", "a head fails by", "good heads", "false alarms", "heads below", "missed"]
    return table(head, body, markdown=markdown)


def cost_table(results: Sequence[GuardCost], *, markdown: bool = False) -> str:
    """One line a method."""
    body = [
        [
            r.method, str(r.length), number(r.attention, 2), number(r.checks), f"{100 * r.checks_over_attention:.2f}%",
            f"{r.first_token:.2f}", f"{100 * r.checks_over_first_token:.2f}%", f"{r.reran}/{r.checked}",
            number(r.reruns, 2), number(r.first_token_guarded, 2),
        ]
        for r in results
    ]  # fmt: skip
    head = [
        "method", "length", "attention s", "checks s", "of attention", "TTFT s", "of TTFT", "ran again", "re-runs s",
        "TTFT with re-runs s",
    ]  # fmt: skip
    return table(head, body, markdown=markdown)
