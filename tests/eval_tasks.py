"""A small task for the tests of the runner: random prompts, a score that sparse attention changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from sparseprefill.evals.generation import generate
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.tasks import Answer, Attempt, Item, Metric, Prompt, Total, mean_totals

SPECS = (
    MethodSpec("dense"),
    MethodSpec("a_shape", {"sink": 64, "window": 64}),
    MethodSpec("block_sparse", {"keep": 1.0}),
)


class Parity:
    """Is the first new token even? Two strata, and a prompt of the second has two items."""

    name = "parity"
    metrics = (Metric("even", "first new token is even", binary=True), Metric("share", "share of even new tokens"))
    axes = ("kind", "length")
    notes = ("A task of the tests.",)

    def __init__(self, prompts: int = 4, before: Callable[[str], Any] = lambda prompt: None) -> None:
        self.prompts, self.before = prompts, before

    def settings(self) -> dict[str, Any]:
        return {"prompts": self.prompts, "lengths": (200, 260)}

    def plan(self) -> Sequence[str]:
        return [f"{kind}/{i}" for kind in ("one", "two") for i in range(self.prompts)]

    def prepare(self, prompt: str) -> Prompt:
        self.before(prompt)
        kind, _, number = prompt.partition("/")
        length = 200 if kind == "one" else 260
        draw = random.Random(prompt)
        ids = [draw.randrange(10, 900) for _ in range(length)]
        ends = ("a",) if kind == "one" else ("a", "b")
        items = tuple(
            Item(f"{prompt}/{end}", {"kind": kind, "length": length, "number": int(number)}, ("even",), 0.5)
            for end in ends
        )
        return Prompt(prompt, ids, items, {"drawn": True})

    def run(self, attempt: Attempt) -> list[Answer]:
        new = generate(attempt, 3)
        even = [token % 2 == 0 for token in new]
        values = {"even": float(bool(even) and even[0]), "share": sum(even) / max(1, len(even))}
        return [Answer(item.id, values, attempt.tokenizer.decode(new)) for item in attempt.prompt.items]

    def totals(self, answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
        return mean_totals(answers, "even")


def comparable(data: dict[str, Any]) -> dict[str, Any]:
    """A saved result without what was measured by the clock and what says where it ran."""
    records = [
        {**record, "runs": {label: {**run, "cost": None} for label, run in record["runs"].items()}}
        for record in data["records"]
    ]
    return {**data, "provenance": None, "records": records}
