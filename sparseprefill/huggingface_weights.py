"""Which weights a model runs, told by the files it was loaded from.

A profile holds for the weights it was made with. To hash all of a model would take minutes, so the hash covers what the
files say of every tensor, and a sample of the tensors themselves: another checkpoint of the same model differs in both
or at least in the second. A single changed number is found only where the sample meets it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from torch import nn
from transformers import PreTrainedConfig

from sparseprefill import files
from sparseprefill.huggingface_modules import nested_configs, unwrap
from sparseprefill.patterns import ModelPatterns

SLICES, SLICE_BYTES = 256, 4096
"""How much of the data of all files together is hashed, spread evenly; all of it where it is no more than that."""

_MOST_HEADER_BYTES = 100_000_000  # the most that safetensors itself reads
_MOST_SHARDS = 4096
_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def weights_hash(model: Any) -> tuple[str | None, str]:
    """(sha256 of the files that a model was loaded from, where they are), or (None, why that cannot be told).

    The files are found by the name that the model was loaded by, in that folder or in the hub's cache, never over the
    network. It cannot be told of a model that was made in memory, was quantised while it was loaded or has adapters
    (then the files do not say what runs), nor where the files are gone, damaged or no safetensors. What was done to
    the weights after loading, merging an adapter say, is not seen.

    Args:
        model: as for `patch_model`, wrappers included.

    Raises:
        TypeError: what is no transformers model.
    """
    inner = unwrap(model)
    outer = model
    while outer is not inner:
        if getattr(outer, "peft_config", None):
            return None, _ADAPTERS
        outer = getattr(outer, "_orig_mod", None) or outer.get_base_model()
    if getattr(inner, "_hf_peft_config_loaded", False):
        return None, _ADAPTERS
    quantizer = getattr(inner, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "pre_quantized", False):
        return None, _QUANTISED
    # transformers notes on every model that it loads from files how it read them
    loaded = hasattr(inner, "_weight_conversions") or all(each.is_meta for each in inner.parameters())
    if not loaded:
        return None, "it was not loaded from files by itself: it was made in memory, or is a part of another model"
    return files_hash(inner.config, inner)


def files_hash(config: PreTrainedConfig, module: nn.Module) -> tuple[str | None, str]:
    """As `weights_hash`, where no more is known than a configuration and a part of the model."""
    if any(_is_adapter(each) for each in module.modules()):
        return None, _ADAPTERS
    name = next((each._name_or_path for each in nested_configs(config) if getattr(each, "_name_or_path", "")), "")
    if not name:
        return None, "its configuration does not say where it was loaded from"
    try:
        folder = _folder(name, getattr(config, "_commit_hash", None))
        if folder is None:
            return None, f"{name!r} is neither a folder nor in the hub's cache"
        if getattr(config, "quantization_config", None) is not None:
            on_disk = files.read_json(folder / "config.json", "model configuration")
            if not isinstance(on_disk, dict) or "quantization_config" not in on_disk:
                return None, _QUANTISED
        return _hash(_weight_files(folder)), str(folder)
    except (OSError, ValueError) as error:
        return None, str(error)


def weights_warnings(
    profiles: Sequence[ModelPatterns], find: Callable[[], tuple[str | None, str]], strict: bool = False
) -> dict[str, int]:
    """What is to be said of profiles that were made for other weights, or for weights that cannot be told; how often.

    Args:
        profiles: each is looked at; one that names no weights has nothing to compare.
        find: gives the model's `weights_hash`; called only where a profile names weights.
        strict: raise instead.

    Raises:
        ValueError: strict, and something is to be said, or there is no profile, or one names no weights.
    """
    if strict and not profiles:
        raise ValueError("strict compares the weights that a profile was made for, and there is no profile: drop it")
    said: dict[str, int] = {}
    found = None
    for profile in profiles:
        made_for = profile.weights
        if made_for is None:
            if strict:
                raise ValueError("strict=True, but the profile does not say which weights it was made for: drop strict")
            continue
        found = find() if found is None else found
        own, reason = found
        if own == made_for:
            continue
        if own is None:
            text = f"it cannot be told whether the profile was made for the weights of this model: {reason}"
        else:
            text = (
                f"the profile was made for other weights ({made_for:.12}...) than those of this model ({own:.12}...): "
                "what its heads keep may be different; make a profile of this model"
            )
        if strict:
            raise ValueError(f"{text} (strict=True)")
        said[text] = said.get(text, 0) + 1
    return said


_ADAPTERS = "it has adapters, so that its files do not say what runs"
_QUANTISED = "it was quantised while it was loaded, so that its files do not say what runs"


def _is_adapter(module: nn.Module) -> bool:
    """Whether PEFT put this module in the place of another; told without importing it."""
    return any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)


def _folder(name: str, commit: str | None) -> Path | None:
    """Where the files of a model lie on this machine."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json", revision=commit)
    except ValueError:  # no name that the hub could have: a folder that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads from a folder, sorted. FileNotFoundError or ValueError where there are none."""
    if (folder / _ONE).exists():
        return [folder / _ONE]
    if not (folder / _INDEX).exists():
        raise FileNotFoundError(f"{folder} has neither {_ONE} nor {_INDEX}: only safetensors are read")
    index = files.read_json(folder / _INDEX, "weights index")
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(each, str) for each in places.values()):
        raise ValueError(f"the weights index {folder / _INDEX} has no `weight_map` of names and files")
    names = sorted(set(places.values()))
    strange = [each for each in names if PurePath(each).name != each or each in ("", ".", "..")]
    if strange or len(names) > _MOST_SHARDS:
        what = f"names {files.shown(strange[0])}, no file beside it" if strange else f"names {len(names)} files"
        raise ValueError(f"the weights index {folder / _INDEX} {what}")
    return [folder / each for each in names]


@dataclass(frozen=True, slots=True)
class _Shard:
    """One safetensors file."""

    path: Path
    header: bytes
    data_bytes: int

    @property
    def begin(self) -> int:
        """Where the data begins."""
        return 8 + len(self.header)


def _hash(paths: Sequence[Path]) -> str:
    shards = [_shard(path) for path in paths]
    total = sum(shard.data_bytes for shard in shards)
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(len(shard.header).to_bytes(8, "little") + shard.header)
        digest.update(shard.data_bytes.to_bytes(8, "little"))
    for shard, pieces in itertools.groupby(_pieces(shards, _slices(total)), key=lambda piece: piece[0]):
        with files.opened(shard.path, "weights file") as file:
            for _, start, stop in pieces:
                digest.update(_read(file, shard.path, shard.begin + start, stop - start))
    return digest.hexdigest()


def _shard(path: Path) -> _Shard:
    """The header of a file, checked against its size."""
    name = f"the weights file {path}"
    with files.opened(path, "weights file") as file:
        size = file.seek(0, 2)
        length = int.from_bytes(_read(file, path, 0, 8), "little")
        if length > min(size - 8, _MOST_HEADER_BYTES):
            raise ValueError(f"{name} is damaged: its header is said to have {files.shown(length)} bytes")
        header = _read(file, path, 8, length)
    try:
        entries = files.parse_json(header.decode("utf-8"), name, "header")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is damaged: its header is no UTF-8 text") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{name} is damaged: its header is no table of tensors")
    ends = [entry.get("data_offsets") for key, entry in entries.items() if key != "__metadata__" and _is_entry(entry)]
    tensors = len(entries) - ("__metadata__" in entries)
    data = size - 8 - length
    if len(ends) != tensors or max((end[1] for end in ends), default=0) != data:
        raise ValueError(f"{name} is damaged: its header does not describe its {data} bytes of data")
    return _Shard(path, header, data)


def _is_entry(entry: Any) -> bool:
    place = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(place, list) and len(place) == 2 and all(type(each) is int for each in place)


def _read(file: BinaryIO, path: Path, start: int, count: int) -> bytes:
    file.seek(start)
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"the weights file {path} is damaged: it ends before byte {start + count}")
    return data


def _slices(total: int) -> list[tuple[int, int]]:
    """Ranges [start, stop) of the data of all files, one after the other: the first bytes, the last, evenly between."""
    if total <= SLICES * SLICE_BYTES:
        return [(0, total)]
    starts = [place * (total - SLICE_BYTES) // (SLICES - 1) for place in range(SLICES)]
    return [(start, start + SLICE_BYTES) for start in starts]


def _pieces(shards: Sequence[_Shard], slices: Sequence[tuple[int, int]]) -> Iterator[tuple[_Shard, int, int]]:
    """The same ranges, counted in each file, in order; one that goes on in the next file becomes two."""
    first = 0
    for shard in shards:
        last = first + shard.data_bytes
        for start, stop in slices:
            low, high = max(start, first), min(stop, last)
            if low < high:
                yield shard, low - first, high - first
        first = last
