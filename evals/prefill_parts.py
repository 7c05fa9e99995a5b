"""Where the time of a whole prefill goes: attention, finding its blocks, projections, MLPs, norms, logits, the rest.

Modules are timed by hooks, attention by a function around the one that the model calls. The parts do not overlap, and
what none of them covers is the rest, so that they sum to the whole.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.tasks import finish_queue
from sparseprefill.huggingface_activations import decoder_layers, mlp_of
from sparseprefill.huggingface_modules import attention_modules, implementations_of, text_config
from sparseprefill.reports import number, table

PARTS = ("attention", "finding the blocks", "projections", "MLP", "norms", "logits", "rest")
"""The rows of a profile. Projections are all linear layers inside attention modules; the rest is embedding, rotation,
residuals, cache, masks, what observing takes, and Python.
"""


@dataclass(frozen=True, slots=True)
class PrefillParts:
    """One method at one length: seconds of each part, medians."""

    method: str  # its label
    length: int  # tokens
    seconds: float  # of the whole prefill while it was watched
    parts: dict[str, float]  # by the names of `PARTS`; they sum to the whole

    def share(self, part: str) -> float:
        """Of the whole."""
        return self.parts[part] / self.seconds


class Clock:
    """Adds up how long modules and functions take, by a name for each: on a GPU from events, read at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: list[tuple[str, Any]] = []
        self._hooks: list[Any] = []

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _begin(self, name: str) -> None:
        self._open.append((name, self._now()))

    def _end(self) -> None:
        name, began = self._open.pop()
        self._spans.append((name, began, self._now()))

    def watch(self, module: nn.Module, name: str) -> None:
        """Time each call of a module."""
        self._hooks.append(module.register_forward_pre_hook(lambda *_: self._begin(name)))
        self._hooks.append(module.register_forward_hook(lambda *_: self._end()))

    def around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._begin(name)
            result = function(*args, **kwargs)
            self._end()
            return result

        return timed

    def seconds(self) -> dict[str, float]:
        """What was added up under each name, and forgotten with this call."""
        finish_queue(self._device)
        found: dict[str, float] = {}
        for name, began, ended in self._spans:
            took = ended - began if self._device.type != "cuda" else began.elapsed_time(ended) / 1e3
            found[name] = found.get(name, 0.0) + took
        self._spans.clear()
        self._open.clear()  # of a call that was broken off
        return found

    def remove(self) -> None:
        """Take all hooks away."""
        while self._hooks:
            self._hooks.pop().remove()


@contextlib.contextmanager
def watched(model: Any) -> Iterator[Clock]:
    """The parts of an unpatched model under a clock; patches may come and go inside.

    Raises NotImplementedError where the model's attention function is in no table, so that nothing can go around it.
    """
    config = text_config(model)
    attention = attention_modules(model, config)
    name = config._attn_implementation
    interface, _ = implementations_of(next(iter(attention.values())))
    if name is None or name == "eager":
        raise NotImplementedError(
            f"{type(model).__name__} runs on its own eager attention, which cannot be timed by itself: load it with "
            "attn_implementation='sdpa'"
        )
    clock = Clock(model.device)
    seen: set[int] = set()

    def watch(module: nn.Module | None, part: str) -> None:
        if module is not None and id(module) not in seen:
            seen.update(map(id, module.modules()))
            clock.watch(module, part)

    for layer in decoder_layers(model, attention):
        watch(mlp_of(layer), "MLP")
    for module in attention.values():
        for inner in module.modules():
            if hasattr(inner, "in_features"):
                watch(inner, "projections")
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            watch(module, "norms")
    watch(model.get_output_embeddings(), "logits")
    before = vars(interface).get("_local_mapping", {}).get(name)  # somebody's own, to be put back
    interface[name] = clock.around(interface[name], "attention")
    try:
        yield clock
    finally:
        clock.remove()
        if before is None:
            del interface[name]
        else:
            interface[name] = before


def prefill_parts(
    model: Any,
    methods: Sequence[MethodSpec],
    lengths: Sequence[int],
    *,
    prefill: Callable[[Any, Tensor], float],
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[PrefillParts]:
    """Profile methods on random tokens, in turns, after one turn that is left out.

    `prefill(model, ids)` runs one and gives its seconds. A method is observed, which takes time of its own: the whole
    is a little more than the time to first token.
    """
    results = []
    draw = torch.Generator().manual_seed(seed)
    with watched(model) as clock:
        for length in lengths:
            ids = torch.randint(1, text_config(model).vocab_size, (1, length), generator=draw).to(model.device)
            runs: dict[str, list[dict[str, float]]] = {spec.label: [] for spec in methods}
            for turn in range(repeats + 1):
                for spec in methods:
                    found = _one(model, spec, ids, prefill, clock)
                    if turn:
                        runs[spec.label].append(found)
                    progress(1)
            results += [_median(label, length, each) for label, each in runs.items()]
    return results


def _one(
    model: Any, spec: MethodSpec, ids: Tensor, prefill: Callable[[Any, Tensor], float], clock: Clock
) -> dict[str, float]:
    """Seconds of every part of one prefill."""
    with spec.applied(model, min_length=0, observe=True, sample_rows=0) as patch:
        clock.seconds()
        whole = prefill(model, ids)
        found = dict.fromkeys(PARTS, 0.0) | clock.seconds()
        if patch is not None:
            layers = patch.report().layers
            found["attention"] += sum(layer.kernel_seconds for layer in layers)
            found["finding the blocks"] = sum(layer.estimator_seconds for layer in layers)
    found["rest"] = whole - sum(found.values())
    return found


def _median(label: str, length: int, runs: Sequence[dict[str, float]]) -> PrefillParts:
    """Medians of the parts, and their sum: medians of wholes need not be the sum of medians."""
    parts = {part: statistics.median(run[part] for run in runs) for part in PARTS}
    return PrefillParts(label, length, sum(parts.values()), parts)


def parts_table(results: Sequence[PrefillParts], *, markdown: bool = False) -> str:
    """One line a method and length: the seconds, then the share of each part."""
    rows = [
        [str(each.length), each.method, number(each.seconds), *(f"{each.share(part):.1%}" for part in PARTS)]
        for each in results
    ]
    return table(["length", "method", "seconds", *PARTS], rows, markdown=markdown)
