"""LongBench as evaluations: version 1, its even-length selection E, and the multiple choice of version 2.

The protocol is the official one: prompts, truncation in the middle, which sets go through a chat template, lengths of
answers, what is cut off before scoring, scores and averages. Where papers differ there is a switch, and every switch
stands in `settings()`: a score without them cannot be compared with anything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparseprefill.evals.generation import generate
from sparseprefill.evals.longbench_data import (
    BUCKETS,
    EXTENDED,
    SETS,
    V2,
    V2_FIELDS,
    LongBenchSet,
    Row,
    Rows,
    Templates,
    bucket_of,
    digest,
    load_rows,
    v1_templates,
    v2_templates,
)
from sparseprefill.evals.longbench_metrics import (
    category_average,
    dataset_average,
    extract_choice,
    official_bucket_mean,
    official_mean,
    sample_score,
    v2_scores,
)
from sparseprefill.evals.tasks import Answer, Attempt, Group, Item, Metric, Prompt, Total

CHAT_TEMPLATES = ("auto", "none", "always")
MARGIN = 1024
"""Tokens of the window that the default maximum length leaves to the chat template and the answer (512 at most)."""
V2_LENGTH, V2_NEW_TOKENS = 120_000, 128


def halves_v1(ids: Sequence[int], max_length: int) -> tuple[Sequence[int], Sequence[int]] | None:
    """The first and the last half of a prompt that version 1 keeps; None where it is short enough.

    An odd maximum loses a token, and a maximum of 1 keeps everything: so does the official code.
    """
    if len(ids) <= max_length:
        return None
    half = max_length // 2
    return ids[:half], ids[-half:]


def halves_v2(ids: Sequence[int], max_length: int) -> tuple[Sequence[int], Sequence[int]] | None:
    """The same for version 2, where an odd maximum gives the last half one token more."""
    if len(ids) <= max_length:
        return None
    return ids[: max_length // 2], ids[len(ids) - (max_length + 1) // 2 :]


@dataclass(frozen=True, slots=True)
class Prompting:
    """How a prompt's text becomes the tokens that a model is given."""

    tokenizer: Any
    window: int | None  # of the model, in tokens; None: not known
    max_length: int | None = None  # tokens of a prompt before the chat template; None: by the window, see `limit`
    chat_template: str = "auto"  # "auto": as the protocol says; "none" and "always": for every set
    system: str | None = None  # a line before the prompt, in the system's role of the chat template
    double_bos: bool = False  # special tokens once more around the chat template, as most public scripts have it
    template_options: Mapping[str, Any] = field(default_factory=dict)  # for the template, as in enable_thinking

    def checked(self, templated: Sequence[str], new_tokens: int) -> Prompting:
        """Itself. ValueError where the tokenizer, the window or the switches cannot serve.

        Args:
            templated: names of what goes through the chat template.
            new_tokens: the longest answer.
        """
        if self.chat_template not in CHAT_TEMPLATES:
            raise ValueError(f"unknown chat_template {self.chat_template!r}: choose one of {', '.join(CHAT_TEMPLATES)}")
        if templated and getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"the tokenizer has no chat template, and {', '.join(templated)} want one: take a model tuned for "
                'chat, or give all prompts plainly by chat_template="none" (--chat-template none), for lower scores'
            )
        given = {"system": self.system, "double_bos": self.double_bos, "template_options": self.template_options}
        if not templated and any(given.values()):
            name = next(name for name, value in given.items() if value)
            raise ValueError(
                f"{name} is of the chat template, and no prompt of this run goes through one: leave it out"
            )
        if self.max_length is None and self.window is None:
            raise ValueError("the model's configuration names no window: give max_length (--max-length)")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if self.window is not None and self.limit() + new_tokens > self.window:
            raise ValueError(
                f"a max_length of {self.limit()} and {new_tokens} new tokens exceed the model's window of "
                f"{self.window}: choose at most {self.window - new_tokens}, less what the chat template takes"
            )
        return self

    def limit(self, most: int | None = None) -> int:
        """Tokens of a prompt before it is cut: `max_length`, or the window without a margin.

        The margin is `MARGIN`, half the window where that is less. The official choice is a window less about 500 to
        1300, by hand for each model.
        """
        if self.max_length is not None:
            return self.max_length
        assert self.window is not None
        own = self.window - min(MARGIN, self.window // 2)
        return own if most is None else min(own, most)

    def encode(self, text: str) -> list[int]:
        """The tokens of a plain text, special ones included."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Their text without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def final(self, text: str, templated: bool) -> list[int]:
        """The tokens that the model is given. ValueError where the chat template refuses."""
        if not templated:
            return self.encode(text)
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns.append({"role": "user", "content": text})
        try:
            whole = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **self.template_options
            )
        except Exception as error:  # a template is a program of the model's and may raise anything
            raise ValueError(f"the chat template refuses the prompt: {error}") from error
        ids: list[int] = self.tokenizer(whole, add_special_tokens=self.double_bos, verbose=False)["input_ids"]
        return list(ids)

    def check_fit(self, prompt: str, tokens: int, new_tokens: int, limit: int) -> None:
        """ValueError where a prompt and its answer exceed the window, which a template and re-reading may cause."""
        if self.window is not None and tokens + new_tokens > self.window:
            raise ValueError(
                f"{prompt}: {tokens} tokens and {new_tokens} new ones exceed the model's window of {self.window}: "
                f"choose a max_length (--max-length) below {limit}, by {tokens + new_tokens - self.window} at least"
            )

    def settings(self, limit: int) -> dict[str, Any]:
        """For the settings of a run."""
        template = getattr(self.tokenizer, "chat_template", None)
        by_default = "window" if limit == self.limit() else "protocol"
        return {
            "max_length": limit, "max_length_from": by_default if self.max_length is None else "given",
            "chat_template": self.chat_template, "chat_template_sha256": template and digest(json.dumps(template)),
            "system": self.system, "double_bos": self.double_bos, "template_options": dict(self.template_options),
            "tokenizer": {
                "name": Path(str(getattr(self.tokenizer, "name_or_path", ""))).name,
                "vocabulary_sha256": _vocabulary(self.tokenizer),
            },
        }  # fmt: skip


def _vocabulary(tokenizer: Any) -> str:
    entries = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _first(rows: Sequence[Row], samples: int | None) -> Sequence[Row]:
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    return rows[:samples]


class LongBench:
    """LongBench version 1: 21 data sets in six categories, each with the metric it was published with.

    With `extended`, LongBench-E: 13 of the sets, selected to have rows of all lengths, scored by length as well.

    Args:
        tokenizer: the model's.
        window: the model's, see `model_window`.
        sets: names in `SETS`; None: all of them (all of E's).
        extended: LongBench-E.
        data, fixture: where rows come from, see `load_rows`.
        prompts, verify: where prompt texts come from, see `v1_templates`.
        samples: the first so many rows of each set (of each bucket of it in E); None: all.
        max_length, chat_template, system, double_bos, template_options: see `Prompting`. "auto" gives six sets of
            examples and code plainly and everything else in the model's chat template.

    Raises:
        ValueError, FileNotFoundError, ImportError: what cannot be run, with the way out, before anything is run.
    """

    def __init__(
        self,
        tokenizer: Any,
        window: int | None,
        sets: Sequence[str] | None = None,
        *,
        extended: bool = False,
        data: str | Path | None = None,
        fixture: bool = False,
        prompts: str | Path | None = None,
        verify: bool = True,
        samples: int | None = None,
        max_length: int | None = None,
        chat_template: str = "auto",
        system: str | None = None,
        double_bos: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        known = EXTENDED if extended else tuple(SETS)
        chosen = tuple(known if sets is None else sets)
        strange = [name for name in chosen if name not in known]
        if strange or not chosen or len(set(chosen)) < len(chosen):
            what = f"has no set {strange[0]!r}" if strange else "wants at least one set, each once"
            raise ValueError(f"LongBench{'-E' if extended else ''} {what}: choose from {', '.join(known)}")
        self.name = "longbench_e" if extended else "longbench"
        self.metrics: tuple[Metric, ...] = (
            Metric("score", "the data set's own: F1 of words, ROUGE-L, a class, a number, or similarity of a line"),
        )
        self.axes: tuple[str, ...] = ("dataset", "bucket") if extended else ("dataset",)
        self.sets = chosen
        self.extended = extended
        self._samples = samples
        chinese = [name for name in chosen if SETS[name].metric.endswith("_zh") and SETS[name].metric != "retrieval_zh"]
        if chinese and importlib.util.find_spec("jieba") is None:
            raise ImportError(f'{chinese[0]} is scored with jieba: pip install "sparseprefill[evals]"')
        self._segmenter = f"jieba {importlib.metadata.version('jieba')}" if chinese else None
        mode = Prompting(tokenizer, window, max_length, chat_template, system, double_bos, dict(template_options or {}))
        self._templated = {
            name: chat_template == "always" or (chat_template == "auto" and not SETS[name].template_free)
            for name in chosen
        }
        self._prompting = mode.checked(
            [name for name in chosen if self._templated[name]], max(SETS[name].max_new_tokens for name in chosen)
        )
        self._limit = mode.limit()
        self._templates: Templates = v1_templates(chosen, prompts, verify=verify)
        suffix = "_e" if extended else ""
        self._loaded: dict[str, Rows] = {name: load_rows(name + suffix, data=data, fixture=fixture) for name in chosen}
        self._rows: dict[str, tuple[LongBenchSet, Row]] = {
            f"{name}/{row['_id']}": (SETS[name], row) for name in chosen for row in self._selected(name)
        }
        self.notes: tuple[str, ...] = (
            "Scores follow the official scorer to the letter; chat template, truncation and averages move them by "
            "points: compare with numbers whose settings are known.",
            *_made_up(fixture), *_not_official(self._templates),
        )  # fmt: skip

    def _selected(self, name: str) -> list[Row]:
        rows = self._loaded[name].rows
        if not self.extended:
            return list(_first(rows, self._samples))
        kept = [
            id(row)
            for bucket, _ in BUCKETS
            for row in _first([each for each in rows if bucket_of(each["length"]) == bucket], self._samples)
        ]
        return [row for row in rows if id(row) in set(kept)]

    def settings(self) -> dict[str, Any]:
        """Everything that decides prompts and grades."""
        return {
            "version": "E" if self.extended else "1", "sets": list(self.sets), "samples": self._samples,
            "data": {
                name: {"source": each.source, "rows": len(each.rows), "sha256": each.sha256}
                for name, each in self._loaded.items()
            },
            "prompts": self._templates.settings(), **self._prompting.settings(self._limit),
            "scoring": {"rules": "official", "code_sim": "difflib", "segmenter": self._segmenter},
        }  # fmt: skip

    def plan(self) -> list[str]:
        """`hotpotqa/<_id>`, set by set."""
        return list(self._rows)

    def prepare(self, prompt: str) -> Prompt:
        """The prompt of an id. ValueError where it does not fit the model's window."""
        entry, row = self._rows[prompt]
        mode, templated = self._prompting, self._templated[entry.name]
        text = self._templates.texts[entry.name].format(context=row["context"], input=row["input"])
        whole = mode.encode(text)
        halves = halves_v1(whole, self._limit)
        if halves is not None:
            text = mode.decode(halves[0]) + mode.decode(halves[1])
        ids = mode.final(text, templated) if templated or halves is not None else whole
        mode.check_fit(prompt, len(ids), entry.max_new_tokens, self._limit)
        group: Group = {"dataset": entry.name, "category": entry.category, "language": entry.language}
        if self.extended:
            group["bucket"] = bucket_of(row["length"])
        item = Item(prompt, group, tuple(row["answers"]), _chance(entry, row))
        details = {"tokens": len(ids), "tokens_uncut": len(whole), "truncated": halves is not None}
        return Prompt(prompt, ids, (item,), details, (entry, row))

    def run(self, attempt: Attempt) -> list[Answer]:
        """The answer, scored officially."""
        entry, row = attempt.prompt.data
        stop: Sequence[int] = ()
        if entry.stop_at_newline:
            stop = attempt.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
            if not stop:
                raise ValueError(f"{entry.name} ends at a newline, and the tokenizer has no token for it: leave it out")
        new = generate(attempt, entry.max_new_tokens, stop_ids=stop, min_new_tokens=1 if stop else 0)
        text = self._prompting.decode(new)
        score = sample_score(entry.name, text, row["answers"], row["all_classes"])
        return [Answer(attempt.prompt.items[0].id, {"score": score}, text)]

    def totals(self, answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
        """The official score of each data set and the averages that are published of them; by bucket as well in E."""
        found: list[Total] = []
        for method, pairs in answers.items():
            if self.extended:
                found += self._bucket_totals(method, pairs)
                continue
            scores = {name: official_mean(values) for name, values in _by_dataset(self.sets, pairs).items() if values}
            found += [Total(name, method, score, "official score of the data set") for name, score in scores.items()]
            found += _averages(method, scores, tuple(SETS))
        return found

    def _bucket_totals(self, method: str, pairs: list[tuple[Item, Answer]]) -> list[Total]:
        found: list[Total] = []
        for bucket, _ in BUCKETS:
            inside = [pair for pair in pairs if pair[0].group["bucket"] == bucket]
            means = {name: official_bucket_mean(v) for name, v in _by_dataset(self.sets, inside).items()}
            found += [
                Total(f"{name} {bucket}", method, mean, "official score of the data set's rows of this length")
                for name, mean in means.items()
            ]
            scores = {name: mean for name, mean in means.items() if mean is not None}
            found += _averages(method, scores, EXTENDED, f" {bucket}")
        return found


def _made_up(fixture: bool) -> tuple[str, ...]:
    return ("The rows are made up: the scores measure nothing.",) if fixture else ()


def _not_official(templates: Templates) -> tuple[str, ...]:
    return (f"Prompts that are not the official ones: {', '.join(templates.unverified)}.",) * bool(templates.unverified)


def _by_dataset(sets: Sequence[str], pairs: Sequence[tuple[Item, Answer]]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {name: [] for name in sets}
    for item, answer in pairs:
        values[str(item.group["dataset"])].append(answer.values["score"])
    return values


def _averages(method: str, scores: dict[str, float], whole: Sequence[str], suffix: str = "") -> list[Total]:
    """The official averages by language, said to be parts where sets are missing, and the plain mean."""
    found = []
    for language, title in (("en", "English"), ("zh", "Chinese")):
        all_of_it = [name for name in whole if SETS[name].language in (language, "code")]
        if not any(SETS[name].language == language for name in scores):
            continue
        missing = [name for name in all_of_it if name not in scores]
        name = f"{title}, mean of categories{' (of some sets)' if missing else ''}{suffix}"
        what = "mean of the categories' means"
        what += f", not the official average: without {', '.join(missing)}" if missing else ", the official average"
        found.append(Total(name, method, category_average(scores, language), what))
    listed = "all sets" if len(scores) == len(whole) else ", ".join(scores)
    what = f"plain mean over {listed}" if scores else "no set has an answer"
    found.append(Total(f"mean of data sets{suffix}", method, dataset_average(scores), what))
    return found


def _chance(entry: LongBenchSet, row: Row) -> float | None:
    if entry.metric == "classification":
        return 1 / len(row["all_classes"])
    if entry.metric in ("retrieval", "retrieval_zh"):
        pattern = r"^Paragraph (\d+)" if entry.metric == "retrieval" else r"^段落(\d+)"
        paragraphs = set(re.findall(pattern, row["context"], flags=re.MULTILINE))
        return 1 / len(paragraphs) if paragraphs else None
    return None


class LongBenchV2:
    """LongBench version 2: 503 questions with four choices each, on documents of 8 thousand to 2 million words.

    Zero-shot, greedily (the leaderboard samples at temperature 0.1), at most 128 new tokens. An answer that does not
    name a choice in the sentence asked for is wrong; so is an empty one, which the official script asks for again.

    Args:
        tokenizer: the model's.
        window: the model's, see `model_window`.
        data, fixture: where rows come from, see `load_rows`.
        prompts, verify: where the prompt comes from, see `v2_templates`.
        samples: the first so many rows; None: all.
        max_length: tokens of a prompt before the chat template; None: 120000, or the window less its margin if that is
            less.
        chat_template, system, double_bos, template_options: see `Prompting`; "auto" and "always" are the same here.

    Raises:
        ValueError, FileNotFoundError, ImportError: what cannot be run, with the way out, before anything is run.
    """

    def __init__(
        self,
        tokenizer: Any,
        window: int | None,
        *,
        data: str | Path | None = None,
        fixture: bool = False,
        prompts: str | Path | None = None,
        verify: bool = True,
        samples: int | None = None,
        max_length: int | None = None,
        chat_template: str = "auto",
        system: str | None = None,
        double_bos: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = "longbench_v2"
        self.metrics: tuple[Metric, ...] = (Metric("accuracy", "the right one of four choices", binary=True),)
        self.axes: tuple[str, ...] = ("difficulty", "length")
        self._templated = chat_template != "none"
        mode = Prompting(tokenizer, window, max_length, chat_template, system, double_bos, dict(template_options or {}))
        self._prompting = mode.checked([V2] if self._templated else [], V2_NEW_TOKENS)
        self._limit = mode.limit(V2_LENGTH)
        self._samples = samples
        self._templates: Templates = v2_templates(prompts, verify=verify)
        self._loaded = load_rows(V2, data=data, fixture=fixture)
        self._rows: dict[str, Row] = {f"longbench-v2/{row['_id']}": row for row in _first(self._loaded.rows, samples)}
        self.notes: tuple[str, ...] = (
            "Greedy and zero-shot; the leaderboard samples at temperature 0.1 and leaves out answers that stay empty.",
            *_made_up(fixture), *_not_official(self._templates),
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Everything that decides prompts and grades."""
        data = {"source": self._loaded.source, "rows": len(self._loaded.rows), "sha256": self._loaded.sha256}
        return {
            "version": "2", "mode": "0shot", "samples": self._samples, "data": data,
            "prompts": self._templates.settings(), **self._prompting.settings(self._limit),
            "scoring": {"rules": "official", "max_new_tokens": V2_NEW_TOKENS},
        }  # fmt: skip

    def plan(self) -> list[str]:
        """`longbench-v2/<_id>`."""
        return list(self._rows)

    def prepare(self, prompt: str) -> Prompt:
        """The prompt of an id. ValueError where it does not fit the model's window."""
        row, mode = self._rows[prompt], self._prompting
        text = self._templates.texts["0shot"]
        for mark, name in V2_FIELDS:  # one after the other, so that a mark in a document is replaced too: officially
            text = text.replace(mark, row[name].strip())
        whole = mode.encode(text)
        halves = halves_v2(whole, self._limit)
        if halves is not None:
            text = mode.decode([*halves[0], *halves[1]])
        ids = mode.final(text, self._templated) if self._templated or halves is not None else whole
        mode.check_fit(prompt, len(ids), V2_NEW_TOKENS, self._limit)
        group: Group = {name: row[name] for name in ("domain", "difficulty", "length")}
        details = {"tokens": len(ids), "tokens_uncut": len(whole), "truncated": halves is not None}
        return Prompt(prompt, ids, (Item(prompt, group, (row["answer"],), 0.25),), details, row)

    def run(self, attempt: Attempt) -> list[Answer]:
        """The answer, and whether it names the right choice."""
        text = self._prompting.decode(generate(attempt, V2_NEW_TOKENS))
        choice = extract_choice(text)
        right = float(choice == attempt.prompt.data["answer"])
        return [Answer(attempt.prompt.items[0].id, {"accuracy": right}, text, {"choice": choice})]

    def totals(self, answers: dict[str, list[tuple[Item, Answer]]]) -> list[Total]:
        """The official six accuracies."""
        found = []
        for method, pairs in answers.items():
            rows = [
                (answer.values["accuracy"] == 1.0, str(item.group["difficulty"]), str(item.group["length"]))
                for item, answer in pairs
            ]
            what = "official accuracy in percent"
            found += [Total(name, method, value, what) for name, value in v2_scores(rows).items()]
        return found
