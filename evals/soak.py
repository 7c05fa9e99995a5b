"""Many random prefills in one process: does memory stay flat?

Each turn draws a method, a length, a batch, a padding and now and then a patch, chunks, a few generated tokens or a
report, and looks afterwards at what the process holds. Two measures that find different leaks: living tensors and
Python objects are counted exactly, so one kept tensor a prefill shows; resident memory also sees what lies outside of
Python, through the noise of the allocator, which is asked to give back what it holds for later before each look.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseprefill.evals.loading import provenance
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.huggingface import Patch, patch_model

NAMES = ("dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse", "random", "minference")
_STATM = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True)
class Held:
    """What the process holds after a number of prefills, garbage collected."""

    prefills: int
    resident: int  # bytes
    tensors: int
    tensor_bytes: int  # of distinct storages
    objects: int  # that Python's collector knows, without samples like this one


@dataclass(frozen=True, slots=True)
class SoakResult:
    """What was run and what was held along the way. `why_not_flat` judges it."""

    settings: dict[str, Any]
    provenance: dict[str, Any]
    seconds: float
    tokens: int  # of all prompts, padding included
    counts: dict[str, int]  # what was run, by name
    held: list[Held]
    warm: int  # samples [warm:] count: before, libraries still fill caches of their own
    cache_bytes: int  # keys and values of one prefill of the longest length

    def slope(self, name: str) -> float:
        """Least-squares slope of a field of `Held` a prefill, over the samples that count."""
        held = self.held[self.warm :]
        return statistics.linear_regression([h.prefills for h in held], [getattr(h, name) for h in held]).slope

    def why_not_flat(self) -> str | None:
        """Why memory was not flat, or None.

        Tensors and their bytes must be what they were, exactly. Objects may come and go by a few where libraries
        memoise, but not by one every ten prefills, which any object kept by a patch or a call would exceed. Resident
        memory still moves with what the allocator cannot give back; its fitted growth over all prefills that count
        must stay below the keys and values of one of the longest.
        """
        first, last = self.held[self.warm], self.held[-1]
        if (last.tensors, last.tensor_bytes) != (first.tensors, first.tensor_bytes):
            return (
                f"{last.tensors - first.tensors} tensors and {last.tensor_bytes - first.tensor_bytes} bytes in tensors "
                f"are left over from {last.prefills - first.prefills} prefills"
            )
        if self.slope("objects") > 0.1:
            return f"{self.slope('objects'):.2f} Python objects a prefill are left over"
        growth = self.slope("resident") * (last.prefills - first.prefills)
        if growth > self.cache_bytes:
            return (
                f"resident memory grows by {growth:.0f} bytes in {last.prefills - first.prefills} prefills, "
                f"the keys and values of one of the longest are {self.cache_bytes}"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON; the verdict and the slopes among them."""
        names = ("prefills", "resident", "tensors", "tensor_bytes", "objects")
        return {
            "settings": self.settings, "provenance": self.provenance, "seconds": self.seconds, "tokens": self.tokens,
            "counts": self.counts, "warm": self.warm, "cache_bytes": self.cache_bytes,
            "slopes": {name: self.slope(name) for name in names[1:]}, "why_not_flat": self.why_not_flat(),
            "columns": names, "held": [[getattr(held, name) for name in names] for held in self.held],
        }  # fmt: skip


def why_no_soak() -> str | None:
    """Why resident memory cannot be read here, or None."""
    return None if _STATM.is_file() else f"resident memory is read from {_STATM}, which Linux has"


@torch.no_grad()
def soak(
    model: PreTrainedModel,
    *,
    prefills: int = 500,
    shortest: int = 64,
    longest: int = 4096,
    seed: int = 0,
    samples: int = 50,
    progress: Callable[[int], Any] = lambda steps: None,
) -> SoakResult:
    """Run `prefills` random prefills of `shortest` to `longest` tokens and note what is held `samples` times.

    A batch of two or three has prompts of a half or a third of the length drawn. The first fifth of the samples warms
    up. `progress` is called with 1 a prefill. Raises NotImplementedError where resident memory cannot be read,
    ValueError for less than ten samples, more samples than prefills or lengths the model cannot take, and
    FloatingPointError if a prefill gives logits that are not finite.
    """
    reason = why_no_soak()
    if reason:
        raise NotImplementedError(reason)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", longest)
    if not 8 <= shortest <= longest <= window:
        raise ValueError(f"lengths must lie between 8 and the model's {window}, got {shortest} to {longest}")
    if not 10 <= samples <= prefills:
        raise ValueError(f"samples must be 10 to {prefills} (prefills), got {samples}")
    walk = _Walk(model, seed)
    every = prefills // samples
    began = time.perf_counter()
    held = []
    try:
        for number in range(1, prefills + 1):
            walk.step(shortest, longest)
            progress(1)
            if number % every == 0:
                walk.end()  # an observing patch holds sums until it is removed
                held.append(_held(number))
    finally:
        walk.end()
    settings = {"prefills": prefills, "shortest": shortest, "longest": longest, "seed": seed, "samples": samples}
    return SoakResult(
        settings, provenance(model), time.perf_counter() - began, walk.tokens, dict(sorted(walk.counts.items())), held,
        len(held) // 5, walk.token_bytes * longest,
    )  # fmt: skip


class _Walk:
    """One random prefill after the other; a patch stays for some of them."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model = model
        self.draw = random.Random(f"soak/{seed}")
        self.tokens_of = torch.Generator().manual_seed(seed)
        self.patch: Patch | None = None
        self.name = ""
        self.left = 0  # prefills until the method changes
        self.tokens = self.token_bytes = 0
        self.counts: collections.Counter[str] = collections.Counter()

    def step(self, shortest: int, longest: int) -> None:
        draw = self.draw
        if not self.left:
            self.end()
            self._begin()
        self.left -= 1
        self.counts[self.name] += 1
        batch = draw.choice((1, 1, 2, 3))
        length = max(shortest, draw.randint(shortest, longest) // batch)
        vocabulary = self.model.config.get_text_config().vocab_size
        ids = torch.randint(1, vocabulary, (batch, length), generator=self.tokens_of).to(self.model.device)
        mask, padding = self._padding(batch, length)
        kind = draw.choice(("once", "once", "once", "chunks", "generate"))
        if kind == "generate" and padding == "right":
            kind = "once"  # transformers itself warns of that
        self.counts.update([f"batch of {batch}", f"{padding} padding", kind, "prefills"])
        self.tokens += ids.numel()
        self._run(kind, ids, mask)
        if self.patch is not None and draw.random() < 0.2:
            self.patch.report()
            self.patch.reset()
            self.counts["report"] += 1

    def end(self) -> None:
        if self.patch is not None:
            self.patch.remove()
        self.patch, self.left = None, 0

    def _begin(self) -> None:
        draw = self.draw
        self.name = name = draw.choice((*NAMES, "stock"))
        self.left = draw.randint(1, 8)
        if name == "stock":
            return
        block = draw.choice((32, 64, 128))
        spec = MethodSpec.at_density(name, round(draw.uniform(0.1, 0.6), 2))
        self.patch = patch_model(
            self.model, name, min_length=draw.choice((0, 0, 0, None)), block_q=block, block_k=block,
            last_rows_dense=draw.choice((0, 0, 64)), observe=draw.random() < 0.7, **spec.options,
        )  # fmt: skip
        self.counts["patched"] += 1

    def _padding(self, batch: int, length: int) -> tuple[Tensor | None, str]:
        side = self.draw.choice(("left", "right", "no"))
        if side == "no":
            return None, side
        pads = [self.draw.randint(0, length // 3) for _ in range(batch)]
        place = torch.arange(length)
        rows = [place >= pad if side == "left" else place < length - pad for pad in pads]
        return torch.stack(rows).long().to(self.model.device), side

    def _run(self, kind: str, ids: Tensor, mask: Tensor | None) -> None:
        batch, length = ids.shape
        given = {} if mask is None else {"attention_mask": mask}
        if kind == "generate":
            self.model.generate(  # type: ignore[operator]  # a mixin that PreTrainedModel itself does not have
                ids, attention_mask=torch.ones_like(ids) if mask is None else mask, max_new_tokens=3, do_sample=False
            )
            return
        cut = length if kind == "once" else self.draw.randint(2 * length // 5, length - 1)  # behind all left padding
        result = self.model(input_ids=ids[:, :cut], **{k: m[:, :cut] for k, m in given.items()}, logits_to_keep=1)
        if cut < length:
            result = self.model(
                input_ids=ids[:, cut:], **given, past_key_values=result.past_key_values, logits_to_keep=1
            )
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in result.past_key_values.layers)
        self.token_bytes = kept // ids.numel()
        if not bool(result.logits.isfinite().all()):
            raise FloatingPointError(f"logits are not finite: {kind}, batch {batch}, length {length}, {self.patch!r}")


def _return_free_memory() -> None:
    """Let glibc give back what nobody holds: what it keeps for later comes and goes by more than a leak would cost."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _held(prefills: int) -> Held:
    gc.collect()
    _return_free_memory()
    objects = gc.get_objects()
    sizes: dict[int, int] = {}
    tensors = others = 0
    for each in objects:
        others += type(each) is not Held  # the samples themselves are no leak
        if issubclass(type(each), Tensor):  # isinstance would ask proxies for a class of theirs
            tensors += 1
            with contextlib.suppress(RuntimeError, NotImplementedError):  # a compiler's stand-ins hold no memory
                sizes[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    resident = int(_STATM.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return Held(prefills, resident, tensors, sum(sizes.values()), others)
