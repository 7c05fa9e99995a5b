"""Results of evaluations made by hand from seeded draws, for the tests of comparisons and reports."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sparseprefill.evals.results import Cost, EvalResult, MethodRecord, Observed, Record, Run
from sparseprefill.evals.tasks import Answer, Item, Metric, Total

METHODS = (
    MethodRecord("dense", "dense", {}, False),
    MethodRecord("a_shape:sink=64,window=0.2", "a_shape", {"sink": 64, "window": 0.2}, False),
    MethodRecord("vertical_slash:density=0.2", "vertical_slash", {"density": 0.2}, True),
    MethodRecord("block_sparse:keep=0.2", "block_sparse", {"keep": 0.2}, False),
    MethodRecord("random:keep=0.2", "random", {"keep": 0.2}, False),
)
DENSITY = {"a_shape": 0.21, "vertical_slash": 0.19, "block_sparse": 0.2, "random": 0.2}
KEEPS = {"dense": 1.0, "a_shape": 0.45, "vertical_slash": 0.985, "block_sparse": 0.95, "random": 0.3}
SETS = (
    "narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique", "dureader",
    "gov_report", "qmsum", "multi_news", "vcsum", "trec", "triviaqa", "samsum", "lsht", "passage_count",
    "passage_retrieval_en", "passage_retrieval_zh", "lcc", "repobench-p",
)  # fmt: skip
MACHINE: dict[str, Any] = {
    "versions": {"python": "3.11.9", "torch": "2.9.0", "transformers": "5.17.0", "sparseprefill": "0.1.0"},
    "threads": 2, "processor": "AMD EPYC 9354 (avx2, avx512f)", "gpu": "NVIDIA H200",
    "model": {"name": "needles-8m", "dtype": "bfloat16", "device": "cuda", "parameters": 8_000_000},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "task": {"seed": 0, "lengths": [4096, 8192], "haystack": "prose"}, "methods": [m.label for m in METHODS],
    "last_rows_dense": 0, "min_length": 0, "observe": 1,
    "model": {"name": "needles-8m", "dtype": "bfloat16", "device": "cuda", "weights": "ab12", "config": "cd34"},
    "tokenizer": {"class": "PreTrainedTokenizerFast", "sha256": "ef56", "chat_template": None},
}  # fmt: skip


def make_run(method: MethodRecord, answers: Sequence[Answer], tokens: int, draw: random.Random, first: bool) -> Run:
    """A run with plausible costs; the first of its kind is observed and not timed."""
    dense = method.name == "dense"
    density = DENSITY.get(method.name, 1.0)
    base = (tokens / 4096) ** 1.7
    seconds = base * (0.35 + 0.65 * (density + 0.05)) * draw.uniform(0.95, 1.1) if not dense else base
    return Run(
        tuple(answers), 16, {} if dense else {"triton": 24},
        {} if dense else {"fewer queries than a block (decoding)": 360},
        None if dense or not first else Observed(density, density * 1.08, min(1.0, 0.5 + 0.5 * KEEPS[method.name])),
        Cost() if first else Cost(seconds, seconds * 1.3, int(3e9 + 2e5 * tokens)),
    )  # fmt: skip


def assemble(
    task: str, methods: Sequence[MethodRecord], metrics: Sequence[Metric], axes: Sequence[str],
    records: Sequence[Record], *, planned: int | None = None, notes: Sequence[str] = (), totals: Sequence[Total] = (),
    provenance: Sequence[dict[str, Any]] = (MACHINE,), settings: dict[str, Any] | None = None,
) -> EvalResult:  # fmt: skip
    """A result that its own reader accepts."""
    result = EvalResult(
        task, settings or SETTINGS, tuple(methods), tuple(metrics), tuple(axes), tuple(notes), tuple(provenance),
        len(records) if planned is None else planned, tuple(records), tuple(totals),
    )  # fmt: skip
    return EvalResult.from_dict(_json(result.to_dict()))


def _json(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _json(value) for key, value in data.items()}
    return [_json(value) for value in data] if isinstance(data, (list, tuple)) else data


def needle_result(
    samples: int = 4, methods: Sequence[MethodRecord] = METHODS, lengths: Sequence[int] = (4096, 8192, 16384, 32768),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0), planned: int | None = None, seed: int = 0,
) -> EvalResult:  # fmt: skip
    """A grid of depth by length, right or wrong, one item a prompt."""
    draw = random.Random(seed)
    records = []
    for length in lengths:
        for depth in depths:
            for sample in range(samples):
                item = Item(
                    f"{length}/{depth}/{sample}", {"depth": depth, "length": length}, (f"{7000 + sample}",), 0.001
                )
                dense = draw.random() < 0.97
                runs = {}
                for method in methods:
                    far = 1 - 0.5 * depth * length / 32768
                    right = dense and draw.random() < (KEEPS[method.name] ** (2 - far))
                    answer = Answer(
                        item.id, {"right": float(right)}, f"The number is {7000 + sample if right else 12}."
                    )
                    runs[method.label] = make_run(method, [answer], length, draw, sample == 0)
                records.append(Record(item.id, length, "0" * 64, (item,), {}, runs))
    return assemble(
        "needle", methods, [Metric("right", "the number was found", binary=True)], ["depth", "length"], records,
        planned=planned, notes=("One needle a prompt.",),
    )  # fmt: skip


def longbench_result(samples: int = 6, planned: int | None = None, seed: int = 1) -> EvalResult:
    """21 sets by one axis, graded scores, official totals where complete."""
    draw = random.Random(seed)
    records = []
    for number, name in enumerate(SETS):
        for sample in range(samples):
            chance = 0.03 if name == "passage_count" else 0.0
            item = Item(f"{name}/{sample}", {"set": name}, ("Paris", "the city of Paris"), chance)
            level = 0.02 if name == "passage_count" else 0.25 + 0.03 * (number * 7 % 20)
            dense = min(1.0, max(0.0, draw.gauss(level, 0.2)))
            runs = {}
            for method in METHODS:
                same = method.name == "dense" or draw.random() < KEEPS[method.name]
                value = dense if same else min(1.0, max(0.0, dense - abs(draw.gauss(0.1, 0.1))))
                answer = Answer(item.id, {"score": value}, "It is Paris." if same else "It is somewhere in the north.")
                runs[method.label] = make_run(method, [answer], 9000 + 100 * sample, draw, sample == 0)
            records.append(Record(item.id, 9000 + 100 * sample, "0" * 64, (item,), {}, runs))
    totals = [Total("average of categories, English", m.label, 48.54 - i, "mean of six means") for i, m in
              enumerate(METHODS)] + [Total("mean of sets", m.label, None if i == 4 else 47.9 - i, "plain") for i, m in
                                     enumerate(METHODS)]  # fmt: skip
    complete = planned is None
    return assemble(
        "longbench", METHODS, [Metric("score", "official score of each set")], ["set"], records, planned=planned,
        totals=totals if complete else (), notes=("Prompts are cut in the middle at 31500 tokens.",),
        provenance=(MACHINE, {**MACHINE, "gpu": "NVIDIA A100"}), settings={**SETTINGS, "last_rows_dense": 64},
    )  # fmt: skip


def fidelity_result(prompts: int = 8, methods: Sequence[MethodRecord] = METHODS, seed: int = 2) -> EvalResult:
    """KL and perplexity by length: lower is better, not percent, no texts, beside agreement in percent."""
    draw = random.Random(seed)
    metrics = (
        Metric("KL", "divergence of next-token distributions from dense, nats", False, False),
        Metric("perplexity", "of the text", False, False), Metric("agreement", "same first choice as dense"),
    )  # fmt: skip
    records = []
    for length in (1024, 4096, 16384):
        for domain in ("prose", "code"):
            for sample in range(prompts):
                item = Item(f"{domain}/{length}/{sample}", {"domain": domain, "length": length})
                base = draw.uniform(8, 12)
                runs = {}
                for method in methods:
                    kl = 0.0 if method.name == "dense" else (1.02 - KEEPS[method.name]) * draw.uniform(0.05, 0.2)
                    values = {"KL": kl, "perplexity": base * (1 + kl), "agreement": 1 - min(1.0, 2 * kl)}
                    runs[method.label] = make_run(method, [Answer(item.id, values)], length, draw, sample == 0)
                records.append(Record(item.id, length, "0" * 64, (item,), {}, runs))
    return assemble("fidelity", methods, metrics, ["domain", "length"], records)
