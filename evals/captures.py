"""Queries, keys and values of a model's layers in one file, so that methods can be compared without the model.

A capture is a safetensors file. Entry n has the tensors `n.query`, `n.key` and `n.value` [heads, tokens, dim], and
`n.sinks` [query_heads] where the layer has sinks; what else belongs to an entry, the model and prompts stands in the
metadata, as JSON. Tensors are mapped into memory when an entry is asked for, not before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparseprefill.contracts import AttentionInputs
from sparseprefill.evals.compared_inputs import NamedInputs
from sparseprefill.evals.report_words import one_line
from sparseprefill.files import MOST_JSON_BYTES, check_folder, opened, parse_json, shown, write_bytes

SCHEMA = "sparseprefill-capture-1"
"""Of a capture; another one is refused."""

MOST_ENTRIES = 4096
"""Of a capture."""

MOST_CAPTURE_BYTES = 16 << 30
"""Of the tensors of a capture; a few layers of some heads are a few hundred MiB."""

MOST_TOKENS = 1 << 24
"""Of an entry."""

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""In which tensors are stored, by name."""

_TENSORS = ("query", "key", "value", "sinks")
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class CaptureEntry:
    """What a capture says of one of its entries. Raises ValueError or TypeError for what no entry can be."""

    name: str  # of a prompt's layer
    group: str  # over which means are taken
    scale: float  # of logits
    tokens: int  # queries, and keys
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str  # a name in `DTYPES`
    softcap: float | None = None
    sinks: bool = False  # whether the layer has them
    needle: int | None = None  # slot of a key that queries after it look for

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            kinds = _KINDS[str(each.type)]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise TypeError(f"{each.name} is {shown(value)}")
        for name in ("name", "group"):
            value = getattr(self, name)
            if value != one_line(value):  # it stands in tables
                raise ValueError(f"{name} is {shown(value)}, which is not one line of text that is seen")
        for name in ("tokens", "query_heads", "kv_heads", "head_dim", "value_dim"):
            if not 1 <= getattr(self, name) <= MOST_TOKENS:
                raise ValueError(f"{name} is {shown(getattr(self, name))}")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads are no multiple of {self.kv_heads} KV heads")
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= _LARGEST:  # infinity, NaN, and what no float32 holds
                raise ValueError(f"{name} is {shown(value)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {shown(self.dtype)}")
        if self.needle is not None and not 0 <= self.needle < self.tokens:
            raise ValueError(f"needle is {shown(self.needle)}")

    @staticmethod
    def of(each: NamedInputs) -> CaptureEntry:
        """Of inputs that a capture can hold. Raises ValueError for others."""
        inputs = each.inputs
        reason = _why_not_captured(inputs)
        if reason is not None:
            raise ValueError(f"{each.name} cannot be captured: {reason}")
        return CaptureEntry(
            one_line(each.name), one_line(each.group), float(inputs.scale), inputs.queries, inputs.query_heads,
            inputs.kv_heads, inputs.head_dim, inputs.value_dim, str(inputs.query.dtype).removeprefix("torch."),
            None if inputs.softcap is None else float(inputs.softcap), inputs.sinks is not None, each.needle,
        )  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors, by what they are."""
        found: dict[str, tuple[int, ...]] = {
            "query": (self.query_heads, self.tokens, self.head_dim),
            "key": (self.kv_heads, self.tokens, self.head_dim),
            "value": (self.kv_heads, self.tokens, self.value_dim),
        }
        return found | ({"sinks": (self.query_heads,)} if self.sinks else {})

    @property
    def bytes(self) -> int:
        """Of query, key and value."""
        vectors = self.query_heads * self.head_dim + self.kv_heads * (self.head_dim + self.value_dim)
        return self.tokens * vectors * DTYPES[self.dtype].itemsize


_NOTHING = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,), "float": (int, float), "float | None": (int, float, _NOTHING), "int": (int,),
    "int | None": (int, _NOTHING), "bool": (bool,),
}  # fmt: skip


def _why_not_captured(inputs: AttentionInputs) -> str | None:
    if inputs.batch != 1 or inputs.key_valid is not None:
        return "it is of several prompts, or padded"
    if inputs.window is not None or inputs.segment is not None:
        return "its queries see a part of the prompt alone"
    if inputs.query_start or not inputs.queries == inputs.keys == inputs.filled:
        return "its queries are not all of one prompt"
    if str(inputs.query.dtype).removeprefix("torch.") not in DTYPES:
        return f"its dtype is {inputs.query.dtype}"
    bad = next((name for name in _TENSORS[:3] if not bool(getattr(inputs, name).isfinite().all())), None)
    return None if bad is None else f"its {bad} is not finite"


def stored(each: NamedInputs, *, heads: Sequence[int] | None = None, dtype: str | None = None) -> NamedInputs:
    """A copy on the CPU of what a capture is to hold: some query heads (None: all), in a dtype (None: its own).

    Keys stay grouped where whole groups are named, in order. Raises ValueError for heads that there are not, or twice.
    """
    inputs = each.inputs
    if heads is not None:
        strangers = [head for head in heads if not 0 <= head < inputs.query_heads]
        if strangers or not heads or len(set(heads)) < len(heads):
            what = f"there is no head {strangers[0]}" if strangers else "each head is named once, and at least one"
            raise ValueError(f"{what}: {each.name} has heads 0 to {inputs.query_heads - 1}")
        inputs = inputs.select_heads(heads)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"a capture is stored in {', '.join(DTYPES)}, not in {dtype!r}")
    kind = inputs.query.dtype if dtype is None else DTYPES[dtype]
    tensors = {name: getattr(inputs, name).detach().to("cpu", kind, copy=True).contiguous() for name in _TENSORS[:3]}
    sinks = None if inputs.sinks is None else inputs.sinks.detach().to("cpu", torch.float32, copy=True)
    return dataclasses.replace(each, inputs=dataclasses.replace(inputs, **tensors, sinks=sinks))


def save_capture(
    entries: Sequence[NamedInputs],
    path: str | Path,
    *,
    model: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
) -> int:
    """Write a capture, whole or not at all; the bytes of the file.

    Args:
        entries: one prompt each, all of it: batch 1, no padding, no window.
        path: the file.
        model, prompts: where it is from; plain types that JSON can hold.

    Raises:
        ValueError: no entries, or too much of them; inputs that cannot be captured, or are not finite.
    """
    check_folder(path)
    infos = [CaptureEntry.of(each) for each in entries]
    if not 0 < len(infos) <= MOST_ENTRIES:
        raise ValueError(f"a capture has 1 to {MOST_ENTRIES} entries, got {len(infos)}")
    size = sum(info.bytes for info in infos)
    if size > MOST_CAPTURE_BYTES:
        raise ValueError(
            f"these entries take {size / 2**30:.1f} GiB, and a capture has at most {MOST_CAPTURE_BYTES >> 30}: take "
            "fewer layers, heads or tokens, or bfloat16"
        )
    tensors: dict[str, Tensor] = {}
    for number, each in enumerate(entries):
        for name in infos[number].shapes():
            tensor: Tensor = getattr(each.inputs, name)
            # a copy, since safetensors writes no tensors that share memory
            own = tensor.float() if name == "sinks" else tensor[0]
            tensors[f"{number}.{name}"] = own.to("cpu", copy=True).contiguous()
    said = {"model": model or {}, "prompts": prompts or {}, "entries": [dataclasses.asdict(info) for info in infos]}
    text = json.dumps(said, allow_nan=False)
    if len(text) > MOST_JSON_BYTES:
        raise ValueError(f"what is said of model, prompts and entries is longer than {MOST_JSON_BYTES} bytes")
    data = save(tensors, {"schema": SCHEMA, "capture": text})
    write_bytes(path, data)
    return len(data)


@dataclass(frozen=True, slots=True)
class Capture(Sequence[NamedInputs]):
    """A capture's entries; each is mapped into memory, and held to be finite, when it is asked for."""

    path: Path
    infos: tuple[CaptureEntry, ...]  # what is said of each
    model: dict[str, Any] = field(default_factory=dict)  # where it is from; see `provenance`
    prompts: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.infos)

    @overload
    def __getitem__(self, number: int) -> NamedInputs: ...
    @overload
    def __getitem__(self, number: slice) -> list[NamedInputs]: ...
    def __getitem__(self, number: int | slice) -> NamedInputs | list[NamedInputs]:
        if isinstance(number, slice):
            return [self._read(n) for n in range(len(self))[number]]
        return self._read(range(len(self))[number])

    def __iter__(self) -> Iterator[NamedInputs]:
        return map(self._read, range(len(self)))

    def _read(self, number: int) -> NamedInputs:
        info = self.infos[number]
        try:
            with safe_open(self.path, "pt") as file:
                found = {name: file.get_tensor(f"{number}.{name}") for name in info.shapes()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"the capture {self.path} is damaged ({error}): make it again") from error
        for name, tensor in found.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"the capture {self.path} is damaged: {info.name} has a {name} that is not finite")
        inputs = AttentionInputs(
            found["query"][None], found["key"][None], found["value"][None], info.scale, info.softcap,
            found.get("sinks"),
        )  # fmt: skip
        return NamedInputs(info.name, info.group, inputs, info.needle)


def load_capture(path: str | Path) -> Capture:
    """The capture in a file: a sequence of `NamedInputs`. What the file says of itself is checked at once.

    Raises:
        FileNotFoundError, PermissionError: as for any file.
        ValueError: another schema, a damaged file, entries without their tensors or of other shapes; later, when an
            entry is asked for, numbers that are not finite.
    """
    name = f"the capture {path}"
    with opened(path, "capture"):
        pass  # a regular file that may be read
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            held = {each: file.get_slice(each) for each in file.keys()}  # noqa: SIM118
            shapes = {each: (tuple(part.get_shape()), part.get_dtype()) for each, part in held.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{name} is damaged, or no safetensors file ({error}): make it again") from error
    if said.get("schema") != SCHEMA:
        raise ValueError(
            f"{name} is not of schema {SCHEMA} but {shown(said.get('schema'))}: make it again, `sparseprefill capture`"
        )
    text = said.get("capture", "")
    if len(text) > MOST_JSON_BYTES:
        raise ValueError(f"{name} says more of itself than {MOST_JSON_BYTES} bytes, the most that is read")
    data = parse_json(text, name, "capture")
    try:
        infos = tuple(CaptureEntry(**each) for each in data["entries"])
        capture = Capture(Path(path), infos, dict(data["model"]), dict(data["prompts"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{name} is damaged ({error}): make it again") from error
    reason = _why_not_held(infos, shapes)
    if reason is not None:
        raise ValueError(f"{name} is damaged: {reason}. Make it again")
    return capture


_STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors calls them


def _why_not_held(infos: Sequence[CaptureEntry], held: dict[str, tuple[tuple[int, ...], str]]) -> str | None:
    """Why these are not the tensors of these entries, or None."""
    if not 0 < len(infos) <= MOST_ENTRIES:
        return f"it has {len(infos)} entries, and 1 to {MOST_ENTRIES} are read"
    if sum(info.bytes for info in infos) > MOST_CAPTURE_BYTES:
        return f"its entries take more than {MOST_CAPTURE_BYTES >> 30} GiB, the most that is read"
    left = set(held)
    for number, info in enumerate(infos):
        for name, shape in info.shapes().items():
            key, kind = f"{number}.{name}", "float32" if name == "sinks" else info.dtype
            if key not in held:
                return f"{info.name} has no {name}"
            own, stored_as = held[key]
            if own != shape or _STORED.get(stored_as) != kind:
                return f"the {name} of {info.name} is {stored_as} {list(own)}, not {kind} {list(shape)}"
            left.discard(key)
    return f"it holds {min(left)!r}, which belongs to no entry" if left else None


def total_bytes(entries: Iterable[NamedInputs]) -> int:
    """What a capture of these will take, but for some kilobytes."""
    return sum(CaptureEntry.of(each).bytes for each in entries)
