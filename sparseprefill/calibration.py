"""What attention was measured to cost on this machine, in a file of its own: break-even is no business of a profile.

A profile says what a model's heads need and may travel; seconds belong to one machine, one dtype, one set of versions.
The file holds one entry for each such setting and shape of layer. `sparseprefill bench --calibrate` writes it,
`patch_model` reads it once. An entry that differs in anything from what runs is not used, and the reason is said.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparseprefill import __version__, files
from sparseprefill.patterns.expected_overhead import Overhead
from sparseprefill.patterns.store import MOST_HEADS
from sparseprefill.prefill import CostModel

VARIABLE = "SPARSEPREFILL_CALIBRATION"
"""The environment variable that names the file in place of the default."""
SCHEMA = 2
"""Of the file; others are refused. 1 held no overheads, and its cost was that of finding and attending together."""
COMMAND = "sparseprefill bench --calibrate"
"""What writes the file."""
# a machine with a hundred models and a dozen settings has fewer entries, a measurement some dozens of cells
_MOST_ENTRIES, _MOST_CELLS, _MOST_RATES = 4096, 4096, 64
_MOST_SECONDS, _MOST_TOKENS, _MOST_FACTOR, _MOST_LETTERS = 1e6, 1 << 30, 1e4, 256


@dataclass(frozen=True, slots=True)
class CalibrationKey:
    """What an entry was measured with; an entry is for exactly this."""

    device: str  # its kind: cpu, cuda
    device_name: str  # of the processor or GPU
    dtype: str  # of queries, keys and values
    threads: int | None  # of torch, on a CPU; None on a GPU
    torch: str  # version
    triton: str  # version, or "not installed"
    sparseprefill: str  # version
    query_heads: int  # of a layer, in this process
    kv_heads: int  # likewise
    head_dim: int  # of queries and keys
    value_dim: int  # of values
    kernel: str  # the implementation that computes the blocks
    block_q: int  # tokens a tile
    block_k: int  # tokens a tile


@dataclass(frozen=True, slots=True)
class CalibrationCell:
    """One measured point; seconds are medians of interleaved calls."""

    selector: str  # the method that chose the blocks
    length: int  # tokens of the prefill
    density: float  # pairs computed over visible pairs, mean of the heads
    dense: float  # seconds of torch's dense causal attention
    sparse: float  # seconds of the whole sparse call as a patch makes it, observed
    finding: float = 0.0  # seconds of finding the blocks, in the same turns

    @property
    def attending(self) -> float:
        """Seconds of the rest of the sparse call."""
        return self.sparse - self.finding


@dataclass(frozen=True, slots=True)
class CalibrationEntry:
    """What was measured under one key."""

    key: CalibrationKey
    cost: CostModel  # of all but finding the blocks, fitted; decides between sparse and dense
    dense_pair_seconds: float  # of one (query, key) pair of dense attention, all heads of the layer together
    cells: tuple[CalibrationCell, ...]  # what these were fitted from
    date: str  # of the measurement, YYYY-MM-DD
    rates: dict[str, float] = field(default_factory=dict)  # seconds of further units of work, by name
    overheads: dict[str, Overhead] = field(default_factory=dict)  # of finding the blocks, by `estimator_name`

    def describe(self) -> str:
        """One line for reports."""
        threads = "" if self.key.threads is None else f", {self.key.threads} thread{'s' * (self.key.threads != 1)}"
        return f"calibrated on {self.date} ({self.key.device}, {self.key.dtype}{threads}): {self.cost.describe()}"


@dataclass(frozen=True, slots=True)
class Machine:
    """The part of a key that no model decides."""

    processor: str  # see `processor`
    torch: str  # version
    triton: str  # version, or "not installed"
    sparseprefill: str  # version

    @staticmethod
    def here() -> Machine:
        """This one."""
        try:
            triton = metadata.version("triton")
        except metadata.PackageNotFoundError:
            triton = "not installed"
        return Machine(processor(), str(torch.__version__), triton, __version__)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibration file holds, and the machine it was read on: looking up reads nothing more."""

    entries: tuple[CalibrationEntry, ...]
    machine: Machine
    missing: str | None = None  # why there are no entries, or None

    def key(
        self, device: torch.device, dtype: torch.dtype, kernel: str, *, query_heads: int, kv_heads: int, head_dim: int,
        value_dim: int, block_q: int, block_k: int,
    ) -> CalibrationKey:  # fmt: skip
        """The key of a layer that runs on `device` of this machine now."""
        here, on_gpu = self.machine, device.type == "cuda"
        return CalibrationKey(
            device.type, torch.cuda.get_device_name(device) if on_gpu else here.processor,
            str(dtype).removeprefix("torch."), None if on_gpu else torch.get_num_threads(),
            here.torch, here.triton, here.sparseprefill, query_heads, kv_heads, head_dim, value_dim, kernel,
            block_q, block_k,
        )  # fmt: skip

    def lookup(self, key: CalibrationKey) -> tuple[CalibrationEntry | None, str]:
        """(the entry of exactly this key, "") or (None, why there is none, in words)."""
        near: Sequence[CalibrationKey] = [entry.key for entry in self.entries]
        if not near:
            return None, self.missing or f"the calibration file has no entries: `{COMMAND}` measures them"
        for names, words in _ASPECTS:
            agreeing = [each for each in near if all(getattr(each, name) == getattr(key, name) for name in names)]
            if not agreeing:
                others = sorted({words.format(**dataclasses.asdict(each)) for each in near})
                shown = " or ".join(others[:3]) + (f" or {len(others) - 3} more" if len(others) > 3 else "")
                return None, f"the calibration has no entry {words.format(**dataclasses.asdict(key))}, only {shown}"
            near = agreeing
        return next(entry for entry in self.entries if entry.key == key), ""


# in this order an entry is looked for, so that the reason names the first thing that differs
_ASPECTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("device", "device_name"), "for {device} {device_name}"),
    (
        ("query_heads", "kv_heads", "head_dim", "value_dim"),
        "for layers of {query_heads}/{kv_heads} heads of {head_dim}/{value_dim}",
    ),
    (("dtype",), "in {dtype}"),
    (("kernel",), "of the kernel {kernel}"),
    (("block_q", "block_k"), "with tiles of {block_q} x {block_k}"),
    (("threads",), "with {threads} threads"),
    (("torch", "triton", "sparseprefill"), "of torch {torch}, triton {triton}, sparseprefill {sparseprefill}"),
)


def processor() -> str:
    """Processor name and the instruction sets that matter here, where Linux tells them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine() or "unknown"
    lines = info.read_text(encoding="utf-8").splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(wanted)})" if wanted else name


def default_path() -> Path:
    """The file that `patch_model` reads unless it is given one; it need not be there.

    $SPARSEPREFILL_CALIBRATION, else sparseprefill/calibration.json in $XDG_CACHE_HOME or ~/.cache.
    """
    named = os.environ.get(VARIABLE)
    return Path(named) if named else files.cache_folder() / "calibration.json"


def load_calibration(path: str | Path | None = None) -> Calibration:
    """Read a calibration file; None: the one of `default_path`, and if that is not there, a calibration of nothing.

    Raises FileNotFoundError for a path that was given and is not there, PermissionError, and ValueError with the path,
    the place and the way out for anything that `save_entries` did not write whole.
    """
    machine = Machine.here()
    if path is None:
        path = default_path()
        try:
            os.stat(path)
        except OSError as error:  # not there, or in a folder that may not be looked into
            lost = isinstance(error, FileNotFoundError)
            why = "there is no calibration file" if lost else f"the calibration file {path}: {error.strerror}"
            return Calibration((), machine, f"{why}; `{COMMAND}` writes one")
    return Calibration(_read(path), machine)


def save_entries(entries: Iterable[CalibrationEntry], path: str | Path | None = None) -> Path:
    """Add entries to a calibration file, each in place of the one with its key; the others stay. Returns the path.

    Written whole or not at all; the default folder is made. Two processes that write at once keep the entries of one.
    Raises what `load_calibration` raises for what stands there, ValueError for an entry that would not be read back,
    FileNotFoundError and OSError as `files.write_text` does.
    """
    target = default_path() if path is None else Path(path)
    check_writable(path)
    kept = {entry.key: entry for entry in _read(target)} if target.exists() else {}
    kept |= {entry.key: entry for entry in entries}
    name = f"the calibration for {target}"
    written = {"schema": SCHEMA, "entries": [dataclasses.asdict(entry) for entry in kept.values()]}
    try:
        text = json.dumps(written, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} holds what JSON cannot: {error}") from error
    if _entries(files.parse_json(text, name), name) != tuple(kept.values()):
        raise ValueError(f"{name} would not be read back as it is")
    files.write_text(target, text)
    return target


def check_writable(path: str | Path | None = None) -> None:
    """Raise what `save_entries` would, for the file itself: to be asked before minutes of measuring."""
    target = default_path() if path is None else Path(path)
    if path is None and not os.environ.get(VARIABLE):
        target.parent.mkdir(parents=True, exist_ok=True)
    files.check_folder(target)
    if target.exists():
        _read(target)


def _read(path: str | Path) -> tuple[CalibrationEntry, ...]:
    name = f"the calibration file {path}"
    try:
        return _entries(files.read_json(path, "calibration file"), name)
    except ValueError as error:
        raise ValueError(f"{error}. Remove it, then write it again with `{COMMAND}`") from error


def _entries(data: Any, name: str) -> tuple[CalibrationEntry, ...]:
    if not isinstance(data, dict) or type(data.get("schema")) is not int or data["schema"] != SCHEMA:
        found = files.shown(data.get("schema")) if isinstance(data, dict) else None
        raise ValueError(f"{name} has schema {found}; this version reads schema {SCHEMA}")
    _names(data, ("schema", "entries"), name)
    entries = _list(data["entries"], _MOST_ENTRIES, f"{name}: `entries`")
    made = tuple(_entry(entry, f"{name}: entry {number}") for number, entry in enumerate(entries))
    if len({entry.key for entry in made}) < len(made):
        raise ValueError(f"{name} has two entries of one key")
    return made


def _entry(data: Any, place: str) -> CalibrationEntry:
    _names(data, [each.name for each in dataclasses.fields(CalibrationEntry)], place)
    cost = data["cost"]
    _names(cost, ("tile_factor", "fixed_tokens"), f"{place}: `cost`")
    rates = data["rates"]
    if not isinstance(rates, dict) or len(rates) > _MOST_RATES:
        raise ValueError(f"{place}: `rates` must be an object of at most {_MOST_RATES} numbers")
    overheads = data["overheads"]
    if not isinstance(overheads, dict) or len(overheads) > _MOST_CELLS:
        raise ValueError(f"{place}: `overheads` must be an object of at most {_MOST_CELLS} overheads")
    cells = _list(data["cells"], _MOST_CELLS, f"{place}: `cells`")
    return CalibrationEntry(
        _key(data["key"], f"{place}: `key`"),
        CostModel(
            _real(cost["tile_factor"], _MOST_FACTOR, f"{place}: `tile_factor`"),
            _whole(cost["fixed_tokens"], 0, _MOST_TOKENS, f"{place}: `fixed_tokens`"),
        ),
        _real(data["dense_pair_seconds"], _MOST_SECONDS, f"{place}: `dense_pair_seconds`"),
        tuple(_cell(cell, f"{place}: cell {number}") for number, cell in enumerate(cells)),
        _date(data["date"], f"{place}: `date`"),
        {_text(name, f"{place}: a name in `rates`"): _real(rate, _MOST_SECONDS, f"{place}: rate {files.shown(name)}")
         for name, rate in rates.items()},
        {_text(name, f"{place}: a name in `overheads`"): _overhead(each, f"{place}: overhead {files.shown(name)}")
         for name, each in overheads.items()},
    )  # fmt: skip


def _overhead(data: Any, place: str) -> Overhead:
    _names(data, [each.name for each in dataclasses.fields(Overhead)], place)
    return Overhead(
        _real(data["share"], _MOST_FACTOR, f"{place}: `share`", none=True),
        _real(data["per_key"], _MOST_TOKENS, f"{place}: `per_key`", none=True),
        _whole(data["fixed_tokens"], 0, _MOST_TOKENS, f"{place}: `fixed_tokens`"),
    )


def _key(data: Any, place: str) -> CalibrationKey:
    names = [each.name for each in dataclasses.fields(CalibrationKey)]
    _names(data, names, place)
    made: dict[str, Any] = {}
    for name in names:
        value, where = data[name], f"{place}: `{name}`"
        if name in ("query_heads", "kv_heads"):
            made[name] = _whole(value, 1, MOST_HEADS, where)
        elif name in ("head_dim", "value_dim", "block_q", "block_k", "threads"):
            absent = name == "threads" and value is None
            made[name] = None if absent else _whole(value, 1, 1 << 20, where)
        else:
            made[name] = _text(value, where)
    return CalibrationKey(**made)


def _cell(data: Any, place: str) -> CalibrationCell:
    _names(data, [each.name for each in dataclasses.fields(CalibrationCell)], place)
    return CalibrationCell(
        _text(data["selector"], f"{place}: `selector`"),
        _whole(data["length"], 1, _MOST_TOKENS, f"{place}: `length`"),
        _real(data["density"], 1.0, f"{place}: `density`"),
        _real(data["dense"], _MOST_SECONDS, f"{place}: `dense`"),
        _real(data["sparse"], _MOST_SECONDS, f"{place}: `sparse`"),
        _real(data["finding"], _MOST_SECONDS, f"{place}: `finding`", none=True),
    )


def _names(data: Any, names: Sequence[str], place: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{place} must be an object, got {files.shown(data)}")
    for name in names:
        if name not in data:
            raise ValueError(f"{place} has no {name!r}")
    strangers = data.keys() - set(names)
    if strangers:
        raise ValueError(f"{place} has an unknown entry {files.shown(min(strangers))}: is it of a later version?")


def _list(data: Any, most: int, place: str) -> list[Any]:
    if not isinstance(data, list) or len(data) > most:
        raise ValueError(f"{place} must be a list of at most {most}")
    return data


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MOST_LETTERS:
        raise ValueError(f"{place} must be a text of 1 to {_MOST_LETTERS} letters, got {files.shown(value)}")
    return value


def _whole(value: Any, least: int, most: int, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{place} must be a whole number from {least} to {most}, got {files.shown(value)}")
    return value


def _real(value: Any, most: float, place: str, *, none: bool = False) -> float:
    """`none`: it may be 0."""
    right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= most
    if not right or (value == 0 and not none):
        least = "of at least 0" if none else "above 0"
        raise ValueError(f"{place} must be a number {least} and at most {most:g}, got {files.shown(value)}")
    return float(value)


def _date(value: Any, place: str) -> str:
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"{place} must be a day like 2026-01-31, got {files.shown(value)}") from None
