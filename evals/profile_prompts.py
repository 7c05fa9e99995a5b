"""The prompts that heads are profiled on: tuning prompts that choose, and held-out prompts that judge the choice.

Both are made at once and share nothing: samples of their own, the two ends of a text, or different documents. Built-in
prompts come from draws of their own, so that no evaluation asks a profile about what it was tuned on.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseprefill.evals.prompt_rendering import Renderer, first_ids, last_ids, plain_ids, prefix_ids
from sparseprefill.evals.retrieval_prompts import Sample, draft, fitted
from sparseprefill.evals.ruler import check_lengths
from sparseprefill.files import opened, parse_json, read_text, shown
from sparseprefill.prompts import ProfilePrompt, needle_prompt, prose_ids

KINDS = ("needle", "multi_key", "variable_tracking", "prose")
"""Of built-in prompts, in turn: questions all along, one of several facts, chains of variables, nothing asked."""

TEXT_FIELDS = ("prompt", "text", "context", "content")
"""Where a document's text is looked for, in this order."""

IDS_FIELD = "token_ids"
"""Where a document's token ids are looked for, if it has none of the fields with a text."""

_HUB = "hf:"
_BUILTIN = "builtin"
_MOST_LINE_BYTES = 64 << 20  # a document of 10 million tokens takes about 50 MiB
_Documents = Generator[tuple[str, Any], None, None]  # where each stands, for messages, and what stands there


@dataclass(frozen=True, slots=True)
class ProfilePrompts:
    """What `profile_prompts` makes. Names are unique over both lists, and no window of tokens is in both."""

    tuning: tuple[ProfilePrompt, ...]  # lengths in the order given, as many of each as were asked for
    held_out: tuple[ProfilePrompt, ...]  # the same
    source: str  # where they are from, without the path of a machine
    notes: tuple[str, ...] = ()  # what was left out, and which field was read
    seed: int | None = None  # of built-in prompts


def profile_prompts(
    spec: str | Path,
    tokenizer: Any,
    lengths: Sequence[int],
    samples: int,
    held_out: int,
    *,
    seed: int | None = None,
    field: str | None = None,
) -> ProfilePrompts:
    """Tuning and held-out prompts, `samples` and `held_out` of each length.

    Args:
        spec: "builtin", or "builtin:" and some of `KINDS` joined by "+", for `builtin_prompts`;
            hf:NAME[:CONFIG[:SPLIT]] for `dataset_prompts`; a path that ends in .jsonl for `jsonl_prompts`; any other
            path for `text_prompts`.
        tokenizer: of the model. What it puts before every text stands before every prompt.
        lengths: tokens of a prompt, special tokens included.
        samples: tuning prompts a length, at least 1.
        held_out: held-out prompts a length; 0 for none.
        seed: of built-in prompts; None: 1.
        field: of documents; None: the first of `TEXT_FIELDS` and `IDS_FIELD` that a document has.

    Raises:
        ValueError: lengths or numbers that make no sense, an option that this source does not have, not enough text,
            a file that is not what it should be. FileNotFoundError, PermissionError: as for any file.
        ImportError: a data set without the package that reads it.
    """
    name = str(spec)
    counts = (tokenizer, lengths, samples, held_out)
    documents = name.startswith(_HUB) or name.lower().endswith(".jsonl")
    if field is not None and not documents:
        raise ValueError(f"a field is for documents, from a .jsonl file or from {_HUB}NAME: {name!r} has none")
    if seed is not None and name.partition(":")[0] != _BUILTIN:
        raise ValueError(f"a seed is for built-in prompts: those of {name!r} are the same each time")
    if name.partition(":")[0] == _BUILTIN:
        kinds = tuple(name.partition(":")[2].split("+")) if ":" in name else KINDS
        return builtin_prompts(*counts, seed=1 if seed is None else seed, kinds=kinds)
    if name.startswith(_HUB):
        return dataset_prompts(name, *counts, field=field)
    return jsonl_prompts(spec, *counts, field=field) if documents else text_prompts(spec, *counts)


# ---- made up


def builtin_prompts(
    tokenizer: Any,
    lengths: Sequence[int],
    samples: int,
    held_out: int,
    seed: int = 1,
    kinds: Sequence[str] = KINDS,
) -> ProfilePrompts:
    """Seeded prompts of these kinds, in turn: the i-th of a length is of kind i % len(kinds).

    Needles and prose have exactly the length, the others as many tokens as their units allow. Each prompt has a draw of
    its own, named by the seed, tuning or held-out, kind, length and number: it is the same whatever else is made.
    Raises ValueError for an unknown kind, and for lengths that are too short for one.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"there is no built-in kind {kind!r}: choose from {', '.join(KINDS)}, joined by +")
    prefix = _prefix(tokenizer, lengths, samples, held_out)
    parts = [
        tuple(
            _builtin(tokenizer, prefix, kinds[i % len(kinds)], length, _number(part, i // len(kinds)), seed)
            for length in lengths for i in range(count)
        )
        for part, count in enumerate((samples, held_out))
    ]  # fmt: skip
    return _apart(ProfilePrompts(parts[0], parts[1], f"built-in prompts ({', '.join(kinds)}), seed {seed}", seed=seed))


def _builtin(tokenizer: Any, prefix: Sequence[int], kind: str, length: int, number: str, seed: int) -> ProfilePrompt:
    name = f"{kind}/{length}/{number}"
    # far from the small seeds that people give evaluations
    own = int.from_bytes(hashlib.sha256(f"profile/{seed}/{name}".encode()).digest()[:8], "big")

    def encode(text: str) -> list[int]:
        return plain_ids(tokenizer, text)

    if kind == "needle":
        ids = needle_prompt(encode, length, seed=own, prefix=prefix).token_ids
    elif kind == "prose":
        ids = [*prefix, *prose_ids(encode, length - len(prefix), own)]
    else:
        renderer = Renderer.of(tokenizer, "none")

        def rendered(sample: Sample) -> list[int]:
            return renderer.token_ids(sample.text(), sample.cue)

        ids = rendered(fitted(lambda n: draft(kind, n, seed=own), length, lambda each: len(rendered(each)), name))
    return ProfilePrompt(name, tuple(ids))


# ---- of a text


def text_prompts(
    path: str | Path, tokenizer: Any, lengths: Sequence[int], samples: int, held_out: int
) -> ProfilePrompts:
    """Windows of a UTF-8 text that do not overlap: tuning ones from its beginning on, held-out ones up to its end.

    Raises ValueError for a text that is too short for all of them, with its tokens and those that are needed, and for
    one that begins a tuning and a held-out window alike.
    """
    prefix = _prefix(tokenizer, lengths, samples, held_out)
    text = read_text(path, "text")
    each = sum(length - len(prefix) for length in lengths)
    front, back = samples * each, held_out * each
    half = len(text) // 2
    first, last = first_ids(tokenizer, text[:half], front), last_ids(tokenizer, text[half:], back)
    if len(first) < front or len(last) < back:
        ids = plain_ids(tokenizer, text)
        if len(ids) < front + back:
            sizes = ", ".join(map(str, lengths))
            raise ValueError(
                f"the text {path} has {len(ids)} tokens, and {front + back} are needed: {samples} windows to tune on "
                f"and {held_out} held out, of {sizes} tokens each. Take a longer text, or fewer or shorter windows"
            )
        first, last = ids[:front], ids[len(ids) - back :]
    parts = []
    for part, (ids, count) in enumerate(((first, samples), (last, held_out))):
        left = iter(ids)
        parts.append(
            tuple(
                ProfilePrompt(
                    f"text/{length}/{_number(part, i)}", (*prefix, *itertools.islice(left, length - len(prefix)))
                )
                for length in lengths for i in range(count)
            )
        )  # fmt: skip
    return _apart(ProfilePrompts(parts[0], parts[1], f"text {Path(path).name}"))


# ---- of documents


def jsonl_prompts(
    path: str | Path,
    tokenizer: Any,
    lengths: Sequence[int],
    samples: int,
    held_out: int,
    field: str | None = None,
) -> ProfilePrompts:
    """Prompts of a file with one JSON object a line, each a document.

    Its text is in `field`, or a list of token ids is, which is taken as it stands, with nothing put before it; without
    `field`, in the first of `TEXT_FIELDS` and `IDS_FIELD` that is there and not null. The beginning of a document makes
    one prompt, of the longest length that it reaches and that still wants one. The first `samples` of a length are for
    tuning. Documents that are too short, or begin like one that was taken, are left out and counted in `notes`. Of the
    file as much is read as is needed.

    Raises ValueError with path and line for a line that is no such object, and with all counts for too few documents.
    """
    prefix = _prefix(tokenizer, lengths, samples, held_out)
    with contextlib.closing(_lines(path)) as documents:
        return _of_documents(
            documents, f"the prompt file {path}", f"prompt file {Path(path).name}", "jsonl", tokenizer, prefix, lengths,
            samples, held_out, field,
        )  # fmt: skip


def dataset_prompts(
    spec: str, tokenizer: Any, lengths: Sequence[int], samples: int, held_out: int, field: str | None = None
) -> ProfilePrompts:
    """Prompts of the rows of a data set, by the rules of `jsonl_prompts`.

    Args:
        spec: hf:NAME[:CONFIG[:SPLIT]], read from the hub row by row; or hf:FOLDER[::SPLIT], a folder that the package
            `datasets` wrote (save_to_disk) or that it can read. The split is "train" where none is named.

    Raises:
        ImportError: `datasets` is missing.
        FileNotFoundError: the hub is out of reach or has no such data set.
        ValueError: as for `jsonl_prompts`; a folder that cannot be read; a split that it does not have.
    """
    prefix = _prefix(tokenizer, lengths, samples, held_out)
    rest = spec.removeprefix(_HUB)
    parts = [rest] if Path(rest).is_dir() else rest.split(":")
    if not spec.startswith(_HUB) or not parts[0] or len(parts) > 3:
        raise ValueError(f"a data set is named {_HUB}NAME, {_HUB}NAME:CONFIG or {_HUB}NAME:CONFIG:SPLIT, got {spec!r}")
    name, config, split = (*parts, "", "")[:3]
    source = spec if not Path(name).is_dir() else _HUB + ":".join((Path(name).name, *parts[1:]))
    with contextlib.closing(_rows(name, config, split)) as documents:
        return _of_documents(
            documents, f"the data set {rest}", f"data set {source}", "dataset", tokenizer, prefix, lengths, samples,
            held_out, field,
        )  # fmt: skip


def _lines(path: str | Path) -> _Documents:
    name = f"the prompt file {path}"
    with opened(path, "prompt file") as file:
        for number in itertools.count(1):
            data = file.readline(_MOST_LINE_BYTES + 1)
            where = f"{name}, line {number}"
            if not data:
                return
            if len(data) > _MOST_LINE_BYTES:
                raise ValueError(f"{where} is longer than {_MOST_LINE_BYTES} bytes, the most that is read")
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error
            if line.strip():
                yield where, parse_json(line, where, "document")


def _rows(name: str, config: str, split: str) -> _Documents:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('prompts of a data set need datasets: pip install "sparseprefill[evals]"') from error
    folder = Path(name)
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    rows: Any = None
    try:
        if saved:
            rows = datasets.load_from_disk(name)
        else:
            rows = iter(datasets.load_dataset(name, config or None, split=split or "train", streaming=True))
    except Exception as error:  # whatever the hub, the network, the cache and damaged files make it raise
        raise _unread(name, error) from error
    if saved:
        rows = iter(_split(rows, name, config, split).with_format(None))
    end = object()
    for number in itertools.count(1):
        try:
            row = next(rows, end)
        except Exception as error:
            raise _unread(name, error) from error
        if row is end:
            return
        yield f"the data set {name}, row {number}", row


def _split(saved: Any, name: str, config: str, split: str) -> Any:
    """The split of what was loaded from a folder."""
    if config:
        raise ValueError(f"the data set folder {name} has no configurations: name it {_HUB}{name}[::SPLIT]")
    splits = list(saved) if isinstance(saved, dict) else [str(saved.split)] if saved.split else []
    wanted = split or ("train" if isinstance(saved, dict) else "")
    if wanted and wanted not in splits:
        raise ValueError(f"the data set folder {name} has no split {wanted!r}: it has {', '.join(splits) or 'none'}")
    return saved[wanted] if isinstance(saved, dict) else saved


def _unread(name: str, error: Exception) -> Exception:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if Path(name).is_dir():
        return ValueError(f"the data set folder {name} cannot be read ({reason}): save it again, with save_to_disk")
    return FileNotFoundError(
        f"the data set {name} cannot be read from the hub ({reason}): check its name, configuration and split. Without "
        f"a network, name a folder that save_to_disk wrote ({_HUB}FOLDER), or a .jsonl file"
    )


def _of_documents(
    documents: _Documents, name: str, source: str, kind: str, tokenizer: Any, prefix: Sequence[int],
    lengths: Sequence[int], samples: int, held_out: int, field: str | None,
) -> ProfilePrompts:  # fmt: skip
    wanted, shortest = samples + held_out, min(lengths)
    taken: dict[int, list[tuple[int, ...]]] = {length: [] for length in lengths}
    begun: set[tuple[int, ...]] = set()
    fields: Counter[str] = Counter()
    short = alike = 0
    for where, document in documents:
        own, value = _field(document, field, where)
        fields[own] += 1
        most = max(length for length, some in taken.items() if len(some) < wanted)
        ids = _beginning(value, most, tokenizer, prefix, f"{where}: its field {own!r}")
        fits = [length for length, some in taken.items() if len(some) < wanted and length <= len(ids)]
        if not fits:
            short += 1
        elif ids[:shortest] in begun:
            alike += 1
        else:
            begun.add(ids[:shortest])
            taken[max(fits)].append(ids[: max(fits)])
            if all(len(some) == wanted for some in taken.values()):
                break
    read = sum(fields.values())
    counts = f"{read} documents read, {short} left out as too short, {alike} as beginning like another"
    if any(len(some) < wanted for some in taken.values()):
        found = ", ".join(f"{len(some)} of {wanted} with {length} tokens" for length, some in taken.items())
        raise ValueError(
            f"{name} has too few documents: {found}; {counts}. Take a larger file, or fewer or shorter prompts"
            if read else f"{name} holds no document: is it whole?"
        )  # fmt: skip
    parts = [
        tuple(
            ProfilePrompt(f"{kind}/{length}/{_number(part, i)}", ids)
            for length, some in taken.items() for i, ids in enumerate(some[:samples] if part == 0 else some[samples:])
        )
        for part in (0, 1)
    ]  # fmt: skip
    origins = ", ".join(f"{own!r} ({count})" for own, count in fields.items())
    return _apart(ProfilePrompts(parts[0], parts[1], source, (counts, f"fields that were read: {origins}")))


def _field(document: Any, field: str | None, where: str) -> tuple[str, Any]:
    """Which field of a document is read, and what it holds."""
    if not isinstance(document, dict):
        raise ValueError(f"{where} is {shown(document)} where an object is wanted")
    names = (*TEXT_FIELDS, IDS_FIELD) if field is None else (field,)
    for name in names:
        if document.get(name) is not None:
            return name, document[name]
    there = ", ".join(shown(name, 30) for name in itertools.islice(document, 20)) or "no field"
    raise ValueError(f"{where} has no field {' or '.join(names)}, it has {there}: name the field that holds its text")


def _beginning(value: Any, most: int, tokenizer: Any, prefix: Sequence[int], what: str) -> tuple[int, ...]:
    """Up to `most` tokens of a document, with what stands before every text."""
    if isinstance(value, list) and all(type(each) is int and each >= 0 for each in value):
        return tuple(value[:most])
    if not isinstance(value, str):
        raise ValueError(f"{what} holds {shown(value)} where a text or a list of token ids is wanted")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a character at place {error.start}, which is no text") from error
    return (*prefix, *first_ids(tokenizer, value, most - len(prefix)))


# ---- of all


def _prefix(tokenizer: Any, lengths: Sequence[int], samples: int, held_out: int) -> list[int]:
    """What stands before every text; ValueError for numbers that make no sense."""
    for what, count, least in (("samples", samples, 1), ("held_out", held_out, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{what} must be a whole number of at least {least}, got {count!r}")
    if any(isinstance(length, bool) or not isinstance(length, int) for length in lengths):
        raise ValueError(f"lengths are numbers of tokens, got {list(lengths)}")
    check_lengths(lengths, None)
    prefix = prefix_ids(tokenizer)
    if min(lengths) <= len(prefix):
        raise ValueError(f"{min(lengths)} tokens are too short: the tokenizer puts {len(prefix)} before every text")
    return prefix


def _number(part: int, index: int) -> str:
    """The end of a name: of the tuning prompts (0) or of the held-out ones (1)."""
    return f"held-out-{index}" if part else str(index)


def _apart(made: ProfilePrompts) -> ProfilePrompts:
    """The same; ValueError where a prompt begins with one of the other list."""
    for one, other in itertools.product(made.tuning, made.held_out):
        size = min(len(one.token_ids), len(other.token_ids))
        if one.token_ids[:size] == other.token_ids[:size]:
            raise ValueError(
                f"{made.source}: the first {size} tokens of {one.name} and {other.name} are the same, so that one of "
                "them is not held out: take a text that does not repeat itself, or longer prompts"
            )
    return made
