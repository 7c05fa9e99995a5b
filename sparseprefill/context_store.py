"""A fixed context in a folder: `context.safetensors` with its tensors, `context.json` with what they belong to.

Nothing is ever half there: a folder is written beside its place and moved there when its last byte is on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseprefill import __version__
from sparseprefill.context import FixedContext, bytes_of, fingerprint_of
from sparseprefill.files import read_json, shown
from sparseprefill.patterns.context_methods import CONTEXT_METHODS, context_method
from sparseprefill.patterns.fixed_context import ContextLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
"""Of what is written; others are refused."""

TENSORS, FACTS = "context.safetensors", "context.json"

_SPARE_BYTES = 1 << 20  # beside the tensors


def save_context(context: FixedContext, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write a context to a folder, whole or not at all.

    Args:
        context: of a named method.
        folder: is made; its parent must be there.
        overwrite: replace a context that stands there.

    Raises:
        ValueError: a method of the user's own, which a file cannot hold; a folder that holds something else.
        FileExistsError: something is there, and `overwrite` is not given.
        FileNotFoundError: there is no folder to make it in.
        OSError: the disk refuses, or has too little room; what stood there is unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    place = Path(folder)
    if context.name not in CONTEXT_METHODS:
        raise ValueError(f"only contexts of {', '.join(CONTEXT_METHODS)} can be saved, this one is of {context.name}")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {place.parent} to make {place.name} in: make it first")
    if place.exists():
        if not overwrite:
            raise FileExistsError(f"{place} is there already: name another folder, or overwrite it")
        strange = (
            [each.name for each in place.iterdir() if each.name not in (TENSORS, FACTS)] if place.is_dir() else [""]
        )
        if strange:
            raise ValueError(f"{place} holds something else than a context ({shown(strange[0])}), and is not replaced")
    tensors = {name: each.detach().cpu().contiguous() for name, each in context.tensors().items()}
    size = sum(each.numel() * each.element_size() for each in tensors.values())
    free = shutil.disk_usage(place.parent).free
    if free < size + _SPARE_BYTES:
        raise OSError(f"{place.parent} has {free >> 20} MiB left, and the context takes {(size >> 20) + 1} MiB")
    facts = {
        "format": FORMAT, "sparseprefill": __version__, "method": context.name,
        "options": dataclasses.asdict(context.method), "fingerprint": context.fingerprint, "made": context.made,
        "scales": {str(number): list(each) for number, each in context.scales.items()}, "layers": len(context.layers),
        "sha256": {name: hashlib.sha256(bytes_of(each)).hexdigest() for name, each in tensors.items()},
    }  # fmt: skip
    facts["facts_sha256"] = _sha(facts)
    mark = secrets.token_hex(8)
    part, old = place.with_name(f".{place.name}.{mark}.part"), place.with_name(f".{place.name}.{mark}.old")
    try:
        part.mkdir()
        save_file(tensors, part / TENSORS)
        with (part / TENSORS).open("rb") as file:
            os.fsync(file.fileno())
        _write(part / FACTS, (json.dumps(facts, indent=1) + "\n").encode())
        if place.exists():
            place.rename(old)
        try:
            part.rename(place)
        except BaseException:
            if old.exists():
                old.rename(place)
            raise
        _sync(place.parent)
    except SafetensorError as error:  # its way to say that the disk refuses
        raise OSError(f"{place} cannot be written: {error}; what stood there is unchanged") from error
    except OSError as error:
        raise type(error)(error.errno, f"{error.strerror}; what stood there is unchanged", str(place)) from error
    finally:
        if old.exists() and not place.exists():
            old.rename(place)
        for left in (part, old):
            if left.exists():
                shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can."""
    with contextlib.suppress(OSError):
        there = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(there)
        finally:
            os.close(there)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load_context(
    folder: str | Path, model: PreTrainedModel, input_ids: Tensor | None = None, *,
    store: str | torch.device | None = None,
) -> FixedContext:  # fmt: skip
    """A context that `FixedContext.save` wrote, for the model that it was prepared with.

    Args:
        folder: that was named there.
        model: of the same shape, dtype and weights.
        input_ids: the context's tokens, to be compared; None: whatever they are.
        store: see `prepare_context`.

    Raises:
        FileNotFoundError, PermissionError: there is no context, or it may not be read.
        ValueError: another version's, damaged, of another model or of other tokens; the message says which.
    """
    place = Path(folder)
    facts = context_facts(place)
    tensors = _tensors(place, facts)
    tokens = tensors.pop("tokens")
    now, then = fingerprint_of(model, tokens), facts["fingerprint"]
    differing = [name for name in ("model", "dtype", "weights") if now[name] != then.get(name)]
    if differing:
        said = "; ".join(f"{name}: {shown(then.get(name))} there, {shown(now[name])} now" for name in differing)
        raise ValueError(f"the context {place} was prepared with another model ({said}): prepare it again")
    if now["tokens"] != then.get("tokens"):
        raise ValueError(f"the context {place} is damaged: its tokens are not those it was made for")
    if input_ids is not None:
        given = input_ids[0] if input_ids.dim() == 2 else input_ids
        if not torch.equal(given.cpu().to(torch.int64), tokens):
            raise ValueError(f"the context {place} is of other tokens: prepare one of these")
    device = torch.device(store) if store is not None else model.device
    try:
        method = context_method(facts["method"], facts["options"])
        scales = {int(number): (each[0], each[1]) for number, each in facts["scales"].items()}
        layers = {n: _layer(n, tensors, method, scales.get(n), device) for n in range(facts["layers"])}
    except (KeyError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise ValueError(f"the context {place} is damaged: {type(error).__name__}: {shown(str(error))}") from error
    return FixedContext(model, facts["method"], method, tokens, layers, scales, then, facts["made"])


def _layer(
    number: int, tensors: Mapping[str, Tensor], method: Any, scale: tuple[float, float | None] | None,
    device: torch.device,
) -> ContextLayer:  # fmt: skip
    own = {name.partition(".")[2]: each for name, each in tensors.items() if name.partition(".")[0] == str(number)}
    index = None
    if scale is not None:
        made = {name.removeprefix("index."): each for name, each in own.items() if name.startswith("index.")}
        index = method.load_index(own["order"], made, own["key"], *scale).to(device)
    place = {name: own[name].to(device) for name in ("edge_key", "edge_value", "key", "value")}
    return ContextLayer(**place, sink=method.sink, order=own["order"].to(device), index=index)


def context_facts(folder: str | Path) -> dict[str, Any]:
    """What `context.json` says, checked. Raises as `load_context`."""
    path = Path(folder) / FACTS
    left = sorted(path.parent.parent.glob(f".{glob.escape(path.parent.name)}.*.old"))
    if left and not path.parent.exists():
        raise FileNotFoundError(
            f"there is no context {path.parent}: writing a new one was cut off, and the one before is {left[-1]}; "
            "rename it"
        )
    facts = read_json(path, "context")
    kinds = {
        "method": str,
        "options": dict,
        "fingerprint": dict,
        "made": dict,
        "scales": dict,
        "layers": int,
        "sha256": dict,
    }
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        said = shown(facts.get("format")) if isinstance(facts, dict) else "none"
        raise ValueError(f"the context {path} has format {said}, and this version reads {FORMAT}: prepare it again")
    for name, kind in kinds.items():
        if not isinstance(facts.get(name), kind):
            raise ValueError(f"the context {path} is damaged: {name} is {shown(facts.get(name))}")
    if facts.get("facts_sha256") != _sha(facts):
        raise ValueError(f"the context {path} is damaged: it is not what was written; prepare it again")
    if facts["method"] not in CONTEXT_METHODS:
        raise ValueError(f"the context {path} is of a method that is not known here: {shown(facts['method'])}")
    return facts


def _sha(facts: Mapping[str, Any]) -> str:
    """Of everything but itself."""
    own = {name: each for name, each in facts.items() if name != "facts_sha256"}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _tensors(place: Path, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors, each as its checksum says."""
    from safetensors import SafetensorError, safe_open

    path = place / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"there is no {TENSORS} in {place}: the context is not whole, prepare it again")
    try:
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(safe_open(path, framework="pt"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the context {path} is damaged: {error}: prepare it again") from error
    if set(tensors) != set(facts["sha256"]) or "tokens" not in tensors:
        raise ValueError(f"the context {path} is damaged: it does not hold the tensors that {FACTS} names")
    for name, each in tensors.items():
        if hashlib.sha256(bytes_of(each)).hexdigest() != facts["sha256"][name]:
            raise ValueError(f"the context {path} is damaged: {name} is not what was written; prepare it again")
    return tensors
