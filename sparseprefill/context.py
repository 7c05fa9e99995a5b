"""A fixed context and many questions about it: prepared once, kept, and asked as often as one likes.

    context = prepare_context(model, context_ids, method="squeezed", density=0.1)
    answer = context.generate(question_ids, max_new_tokens=32)

The context is run once and its keys and values are kept. Questions, and the answers while they are generated, attend to
a few of them, which the method chooses for each KV head and block of queries, and to themselves.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sparseprefill import huggingface_masks as masks
from sparseprefill.context_cache import ContextCache, ContextCacheLayer, current_layer, handed_over
from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.huggingface import Patch, patch_model
from sparseprefill.huggingface_activations import replace_forward
from sparseprefill.huggingface_layers import PatchedLayer
from sparseprefill.huggingface_masks import MaskInfo, MaskSettings
from sparseprefill.huggingface_modules import STATE, attention_modules, model_facts, model_window, text_config, unwrap
from sparseprefill.huggingface_weights import weights_hash
from sparseprefill.kernels import block_sparse_attention
from sparseprefill.patterns import ModelPatterns
from sparseprefill.patterns.context_methods import context_method
from sparseprefill.patterns.fixed_context import (
    ACCESS,
    ContextCounts,
    ContextKeys,
    ContextLayer,
    attend_to_context,
    dense_lse,
)
from sparseprefill.patterns.parts import Part, parts_of
from sparseprefill.prefill import describe_pattern, resolve_method

LEAST_TOKENS = 64
"""The shortest context: less is no context, but a prompt."""

_BLOCK_Q = 64  # queries that share a choice


def prepare_context(
    model: PreTrainedModel,
    input_ids: Tensor,
    method: Any = "squeezed",
    *,
    prefill: Any = "dense",
    chunk: int | None = None,
    store: str | torch.device | None = None,
    progress: bool = True,
    **options: Any,
) -> FixedContext:
    """Run a context once, keep its keys and values, and index them.

    Args:
        model: any model that `patch_model` takes and whose cache keeps every token; it is left as it was.
        input_ids: int64 [tokens] or [1, tokens]: what all questions share, from the first token on.
        method: "squeezed", "retrieval", or an object with the verbs of a context method.
        prefill: the method that the context itself is run with: "dense", or what `patch_model` takes.
        chunk: run that many tokens at a time; None: all at once.
        store: where keys, values and indexes are kept; None: where the model is. "cpu" leaves a GPU's memory to the
            model, and sends it what was chosen.
        progress: show a bar.
        options: of the method.

    Raises:
        TypeError, ValueError: an unknown method or option; tokens that are none, or more than the model takes; a
            context that is no longer than sink and local window together, or too short for the density.
        NotImplementedError: the model cannot be patched, or some layers keep something else than keys and values.
    """
    chosen = context_method(method, options)
    run = run_context(model, input_ids, prefill=prefill, chunk=chunk, methods=(chosen,))
    name = method if isinstance(method, str) else describe_pattern(method)
    return run.index(chosen, name, store=store, progress=progress, last=True)


def run_context(
    model: PreTrainedModel, input_ids: Tensor, *, methods: Sequence[Any], prefill: Any = "dense",
    chunk: int | None = None,
) -> ContextRun:  # fmt: skip
    """Run a context once, for as many methods as are to be tried on it. Arguments and errors as `prepare_context`."""
    inner = unwrap(model)
    tokens = _one_row(input_ids)
    for method in methods:
        method.check_length(len(tokens))
    if len(tokens) < LEAST_TOKENS:
        raise ValueError(f"a context has at least {LEAST_TOKENS} tokens, got {len(tokens)}: put it into the prompt")
    room = model_window(inner)
    if room is not None and len(tokens) >= room:
        raise ValueError(f"a context of {len(tokens)} tokens leaves no room for a question: the model takes {room}")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < LEAST_TOKENS):
        raise ValueError(f"chunk must be at least {LEAST_TOKENS} tokens or None, got {chunk!r:.80}")
    vocabulary = getattr(text_config(inner), "vocab_size", None)
    if int(tokens.min()) < 0 or (isinstance(vocabulary, int) and int(tokens.max()) >= vocabulary):
        raise ValueError(f"tokens of this model are from 0 to {vocabulary} - 1, got {tokens.min()} to {tokens.max()}")
    pattern = resolve_method(prefill)
    mismatch = pattern.mismatch(model_facts(text_config(inner))) if isinstance(pattern, ModelPatterns) else None
    if mismatch:
        raise ValueError(f"prefill: this profile is of another model: {mismatch}")
    began = time.perf_counter()
    held, recorded = _run(model, tokens, pattern, max(method.local for method in methods), chunk)
    seconds = time.perf_counter() - began
    words = prefill if isinstance(prefill, str) else describe_pattern(prefill)
    return ContextRun(model, tokens, held, recorded, fingerprint_of(model, tokens), seconds, words, chunk)


@dataclass(eq=False)
class ContextRun:
    """Keys and values of a context, and what methods learn from."""

    model: PreTrainedModel
    tokens: Tensor
    held: dict[int, tuple[Tensor, Tensor]]  # of each layer, [kv_heads, length, ...]
    recorded: dict[int, _Recorded]  # of each layer that sees everything
    fingerprint: dict[str, Any]
    seconds: float
    prefill: str
    chunk: int | None
    seen: dict[tuple[int, int, int], ContextKeys] = field(default_factory=dict)  # what methods were shown

    def index(
        self, method: Any, name: str, *, store: str | torch.device | None = None, progress: bool = False,
        last: bool = False,
    ) -> FixedContext:  # fmt: skip
        """The context as one method lays it out. `last`: no other method will ask, so that one copy is kept."""
        began = time.perf_counter()
        place = torch.device(store) if store is not None else None
        layers: dict[int, ContextLayer] = {}
        indexes: dict[int, Any] = {}
        saved = 0.0  # what other methods have paid for
        for number in tqdm(sorted(self.recorded), desc="indexing the context", unit="layer", disable=not progress):
            place_of = number, method.sink, method.local
            if last or place_of not in self.seen:
                self.seen[place_of] = _context_keys(self.recorded[number], self.held[number][0], method)
            self.seen[place_of].saved.clear()
            indexes[number] = method.index_layer(self.seen[place_of])
            saved += sum(self.seen[place_of].saved)
            if last:
                del self.seen[place_of]
        if indexes:
            method.calibrate(list(indexes.values()), len(self.tokens))
        for number in sorted(self.held):
            key, value = (t if place is None else t.to(place) for t in self.held[number])
            layers[number] = ContextLayer.of(key, value, method.sink, method.local, indexes.get(number))
            if last:
                del self.held[number], key, value
                if number in self.recorded:
                    self.recorded[number].key = self.recorded[number].value = None
        seconds = {"running": round(self.seconds, 3), "indexing": round(saved + time.perf_counter() - began, 3)}
        made = {"seconds": seconds, "tokens": len(self.tokens), "prefill": self.prefill, "chunk": self.chunk}
        scales = {number: (each.scale, each.softcap) for number, each in self.recorded.items()}
        return FixedContext(self.model, name, method, self.tokens, layers, scales, self.fingerprint, made)


def _one_row(input_ids: Any) -> Tensor:
    """int64 [tokens] on the CPU. Raises TypeError or ValueError for what is no row of tokens."""
    if not isinstance(input_ids, Tensor):
        input_ids = torch.as_tensor(input_ids)
    if input_ids.dim() == 2 and input_ids.shape[0] == 1:
        input_ids = input_ids[0]
    if input_ids.dim() != 1 or not len(input_ids):
        raise ValueError(f"one row of tokens is needed, got {tuple(input_ids.shape)}")
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"tokens are whole numbers, got {input_ids.dtype}")
    row: Tensor = input_ids.detach().to("cpu", torch.int64, copy=True)
    return row


@dataclass
class _Recorded:
    """What a layer's attention saw of the context."""

    scale: float
    softcap: float | None
    query: list[Tensor] = field(default_factory=list)  # [query_heads, some, head_dim] of the wanted positions
    held_out: list[Tensor] = field(default_factory=list)
    key: Tensor | None = None  # [kv_heads, length, head_dim], as attention has them; caches may hold something else
    value: Tensor | None = None


class _Recorder:
    """A pattern that notes some queries, and the keys, and leaves the rest to another."""

    in_parts = True

    def __init__(self, around: Any, wanted: Tensor, held_out: int, layer: int = -1) -> None:
        self.around, self.wanted, self.held_out, self.layer = around, wanted, held_out, layer
        self.found: dict[int, _Recorded] = {}
        self.on = [False]  # shared by all layers; patching asks the pattern with zeros first

    def for_layer(self, layer: int) -> _Recorder:
        """The same for one layer, which notes into the same place."""
        around = self.around.for_layer(layer) if callable(getattr(self.around, "for_layer", None)) else self.around
        own = _Recorder(around, self.wanted, self.held_out, layer)
        own.found, own.on = self.found, self.on
        return own

    def build_parts(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Part, ...]:
        """See `sparseprefill.patterns.parts`."""
        if self.on[0]:
            start, stop = inputs.query_start, inputs.query_start + inputs.queries
            noted = self.found.setdefault(self.layer, _Recorded(inputs.scale, inputs.softcap))
            own = self.wanted[(self.wanted >= start) & (self.wanted < stop)] - start
            noted.query.append(_copied(inputs.query[0][:, own.to(inputs.device)]))
            if stop > self.held_out:
                noted.held_out.append(_copied(inputs.query[0][:, max(0, self.held_out - start) :]))
            noted.key, noted.value = inputs.key[0], inputs.value[0]
        return parts_of(self.around, inputs, grid)


def _copied(tensor: Tensor) -> Tensor:
    """On the CPU in float32, holding on to nothing."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


_TRAIN = 4096  # queries of the prefill that are kept for a method to learn from


def _run(
    model: PreTrainedModel, tokens: Tensor, pattern: Any, local: int, chunk: int | None
) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[int, _Recorded]]:
    """Keys and values of each layer, [kv_heads, length, ...], and what attention saw in layers that see everything."""
    inner = unwrap(model)
    config = text_config(inner)
    number = len(attention_modules(inner, config))
    keeps = NotImplementedError(
        f"{type(inner).__name__} does not keep keys and values of every token for each of its "
        f"{config.num_hidden_layers} layers (some share them, or have a state instead), so that no context of it can "
        "be kept"
    )
    if number != config.num_hidden_layers:
        raise keeps
    length = len(tokens)
    wanted = torch.linspace(0, length - 1, min(_TRAIN, length)).round().to(torch.int64)
    recorder: Any = _Recorder(pattern, wanted, length - local)
    cache = DynamicCache()
    step = length if chunk is None else chunk
    edges = [*range(0, length, step), length]
    if len(edges) > 2 and edges[-1] - edges[-2] < LEAST_TOKENS:
        del edges[-2]  # a last chunk that is too short for a block joins the one before
    last = "logits_to_keep" in inspect.signature(inner.forward).parameters
    with patch_model(model, recorder, min_length=0, observe=False, last_logits=last), torch.no_grad():
        recorder.on[0] = True
        for start, stop in itertools.pairwise(edges):
            ids = tokens[None, start:stop].to(inner.device)
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = list(cache.layers)
    whole = [type(each) is DynamicLayer and each.keys is not None and each.keys.shape[2] == length for each in layers]
    if len(whole) != number or not all(whole):
        raise keeps
    held = {place: (each.keys[0], each.values[0]) for place, each in enumerate(layers)}
    for place, noted in recorder.found.items():
        if noted.key is not None and noted.value is not None:
            held[place] = noted.key, noted.value
    return held, recorder.found


def _context_keys(recorded: _Recorded, key: Tensor, method: Any) -> ContextKeys:
    """What a method learns from, on the CPU in float32."""
    length = key.shape[1]
    own = key.detach().to("cpu", torch.float32)
    edge = torch.cat([own[:, : method.sink], own[:, length - method.local :]], 1)
    return ContextKeys(
        own[:, method.sink : length - method.local], edge, torch.cat(recorded.query, 1).cpu(),
        torch.cat(recorded.held_out, 1)[:, -method.local :], recorded.scale, recorded.softcap,
    )  # fmt: skip


def fingerprint_of(model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
    """What a context belongs to: the model's shape, dtype and weights, and the tokens."""
    inner = unwrap(model)
    weights, _ = weights_hash(model)
    if weights is None:  # made in memory, with adapters: from the numbers themselves
        digest = hashlib.sha256()
        for name, weight in inner.state_dict().items():
            if isinstance(weight, Tensor) and not weight.is_meta:
                digest.update(f"{name} {tuple(weight.shape)} ".encode())
                digest.update(bytes_of(weight))
        weights = f"state:{digest.hexdigest()}"
    return {
        "model": model_facts(text_config(inner)), "dtype": str(inner.dtype).removeprefix("torch."), "weights": weights,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }  # fmt: skip


def bytes_of(tensor: Tensor) -> bytes:
    """The numbers of a tensor, whatever its dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class FixedContext:
    """A context that was run and indexed; made by `prepare_context` or `load_context`. Asking changes nothing of it."""

    def __init__(
        self, model: PreTrainedModel, name: str, method: Any, tokens: Tensor, layers: Mapping[int, ContextLayer],
        scales: Mapping[int, tuple[float, float | None]], fingerprint: Mapping[str, Any], made: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.model = model
        self.name = name
        self.method = method
        self.tokens = tokens
        self.layers = dict(layers)
        self.scales = dict(scales)
        self.fingerprint = dict(fingerprint)
        self.made = dict(made)
        self._lock = threading.Lock()
        self._users = 0  # calls of `generate` that share one patch
        self._patch: Patch | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def key(self) -> str:
        """A short text that tells this context from others."""
        text = f"{self.fingerprint} {self.method!r} {self.made.get('prefill')} {self.made.get('chunk')}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def cache(self) -> ContextCache:
        """A cache for one call of `generate` or of the model, of any number of questions.

        A stock model may use it too, and attends to everything then.
        """
        dtype = next(iter(self.layers.values())).key.dtype
        return ContextCache(self.key, self.layers, dtype)

    def inputs(self, questions: Any, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """What to give `generate`: context and questions as tokens with their mask, and a fresh cache.

        Args:
            questions: int64 [tokens] or [batch, tokens], or a list of rows of different lengths.
            attention_mask: [batch, tokens], 0 where a question is padding, on either side; None: no padding.

        Shorter questions get padding between the context and themselves. Raises TypeError or ValueError for what is no
        question, and for what the model has no room for.
        """
        rows = _question_rows(questions, attention_mask)
        if not rows:
            raise ValueError("nothing is asked: give at least one question")
        longest = max(map(len, rows))
        room = model_window(unwrap(self.model))
        if room is not None and len(self) + longest >= room:
            raise ValueError(
                f"a question of {longest} tokens behind a context of {len(self)} does not fit: the model takes {room}"
            )
        pad = getattr(text_config(unwrap(self.model)), "pad_token_id", None)
        ids = torch.full((len(rows), len(self) + longest), pad if isinstance(pad, int) and pad >= 0 else 0)
        mask = torch.zeros_like(ids)
        ids[:, : len(self)], mask[:, : len(self)] = self.tokens, 1
        for row, (own, real) in zip(rows, zip(ids, mask, strict=True), strict=True):
            own[len(own) - len(row) :], real[len(own) - len(row) :] = row, 1
        device = unwrap(self.model).device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "past_key_values": self.cache()}

    def generate(self, questions: Any, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Answers to questions, attending to what the method chooses of the context.

        Args:
            questions, attention_mask: see `inputs`.
            options: of transformers' `generate`. What would need more than tokens in return is refused.

        Returns:
            int64 [batch, tokens]: each question, with its padding before it, and its answer; the context is left out.
        """
        for name in ("past_key_values", "input_ids", "inputs_embeds", "position_ids", "streamer"):
            if name in options:
                raise ValueError(
                    f"generate of a context takes no {name}: for it, patch the model and call its generate"
                )
        if options.get("return_dict_in_generate"):
            raise ValueError("generate of a context gives tokens: for more, patch the model and call its own generate")
        inputs = self.inputs(questions, attention_mask)
        room = model_window(unwrap(self.model))
        asked, new = inputs["input_ids"].shape[1], options.get("max_new_tokens")
        if room is not None and isinstance(new, int) and asked + new > room:
            raise ValueError(
                f"context and question have {asked} tokens, and {new} new ones do not fit: the model takes {room}"
            )
        inner: Any = self.model
        with self._patched():
            out = inner.generate(**inputs, **options)
        result: Tensor = getattr(out, "sequences", out)[:, len(self) :]
        return result

    @contextlib.contextmanager
    def _patched(self) -> Iterator[None]:
        """The model patched for this context, once for all threads that ask at a time."""
        with self._lock:
            if not self._users and _served_by(unwrap(self.model)) is not self:
                self._patch = patch_model(self.model, context=self, observe=False)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and self._patch is not None:
                    self._patch.remove()
                    self._patch = None

    def digests(self) -> dict[str, str]:
        """sha256 of every tensor of this context, by name: equal before and after asking."""
        return {name: hashlib.sha256(bytes_of(each)).hexdigest() for name, each in self.tensors().items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that it consists of, by name."""
        found = {"tokens": self.tokens}
        for number, layer in self.layers.items():
            own = {
                "edge_key": layer.edge_key, "edge_value": layer.edge_value, "key": layer.key, "value": layer.value,
                "order": layer.order.contiguous(),
            }  # fmt: skip
            if layer.index is not None:
                own |= {f"index.{name}": each for name, each in layer.index.tensors().items()}
            found |= {f"{number}.{name}": each for name, each in own.items()}
        return found

    @property
    def bytes(self) -> dict[str, int]:
        """Memory of keys and values, and of what was made to choose among them."""
        sizes = {"keys and values": 0, "index": 0}
        for name, each in self.tensors().items():
            own = name.split(".")[1:2] and name.split(".")[1] in ("edge_key", "edge_value", "key", "value")
            sizes["keys and values" if own else "index"] += each.numel() * each.element_size()
        held = (getattr(layer.index, "held_bytes", 0) for layer in self.layers.values())
        sizes["index"] += sum(map(int, held))
        return sizes

    def save(self, folder: Any, *, overwrite: bool = False) -> None:
        """Write it to a folder, whole or not at all: see `sparseprefill.context_store.save_context`."""
        from sparseprefill.context_store import save_context

        save_context(self, folder, overwrite=overwrite)

    def patch(
        self, model: PreTrainedModel, method: Any = None, *, observe: bool = True, sample_rows: int = 16,
        access: str = "auto", mlp_chunk: int | None = None, last_logits: bool = False,
    ) -> Patch:  # fmt: skip
        """What `patch_model(model, method, context=...)` does."""
        if method is not None and method not in (self.name, self.method):
            raise ValueError(f"this context was prepared for the method {self.name!r}, not for {method!r:.80}")
        if access not in ACCESS:
            raise ValueError(f"access is one of {', '.join(ACCESS)}, got {access!r:.80}")
        if unwrap(model) is not unwrap(self.model):
            now = fingerprint_of(model, self.tokens)
            differing = [name for name in self.fingerprint if now[name] != self.fingerprint[name]]
            if differing:
                raise ValueError(f"this context was prepared with another model: {', '.join(differing)} differ")
        inner = unwrap(model)
        patch = patch_model(
            model, "dense", min_length=0, observe=observe, sample_rows=sample_rows, mlp_chunk=mlp_chunk,
            last_logits=last_logits,
        )  # fmt: skip
        private = text_config(inner)
        bound = masks.bound_settings(private)
        assert bound is not None
        masks.bind_config(private, MaskSettings(bound.previous, 1))  # decoding is ours too; removing unbinds it
        modules = {layer.key: module for module in inner.modules() if (layer := _state(module)) is not None}
        try:
            for number, layer in patch.layers.items():
                layer.method = self.name
                layer.context = _Server(self, self.layers[number], access)
                undo: list[Callable[[], None]] = []
                module = modules[layer.key]
                replace_forward(module, functools.partial(_with_context, module.forward, self.key, number), undo)
                patch.undo(undo[0])
        except BaseException:
            patch.remove()
            raise
        return patch


def _state(module: nn.Module) -> PatchedLayer | None:
    return getattr(module, STATE, None)


def _served_by(model: nn.Module) -> FixedContext | None:
    """The context that a model is patched for."""
    for module in model.modules():
        layer = _state(module)
        if layer is not None and isinstance(layer.context, _Server):
            return layer.context.context
    return None


def _question_rows(questions: Any, attention_mask: Tensor | None) -> list[Tensor]:
    """Rows without padding. Raises TypeError or ValueError for what is no question."""
    if isinstance(questions, Tensor) and questions.dim() == 2:
        if attention_mask is None:
            return [_one_row(row) for row in questions]
        if attention_mask.shape != questions.shape:
            raise ValueError(
                f"attention_mask must be of the questions' shape {tuple(questions.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        return [
            _one_row(row[own.bool()]) for row, own in zip(questions, attention_mask.to(questions.device), strict=True)
        ]
    if attention_mask is not None:
        raise ValueError("attention_mask goes with questions as one tensor [batch, tokens]")
    several = isinstance(questions, (list, tuple)) and any(
        isinstance(each, (Tensor, list, tuple)) for each in questions
    )
    rows = list(questions) if several else [questions]
    return [_one_row(row) for row in rows]


def _with_context(forward: Callable[..., Any], key: str, number: int, *arguments: Any, **options: Any) -> Any:
    """An attention module's forward, whose cache hands over the tail alone."""
    own = next((each for each in (*options.values(), *arguments) if isinstance(each, Cache)), None)
    if not isinstance(own, ContextCache):
        raise ValueError(
            "this model is patched for a context, and was called without it: pass context.inputs(question_ids) to "
            "generate, or past_key_values=context.cache() with the tokens that stand behind the context"
        )
    if own.fingerprint != key:
        raise ValueError("this cache belongs to another context than the one that the model is patched for")
    layer = own.layers[number]
    assert isinstance(layer, ContextCacheLayer)
    with handed_over(layer):
        return forward(*arguments, **options)


@dataclass(eq=False)
class _Server:
    """What attends in one layer of a model that is patched for a context."""

    context: FixedContext
    layer: ContextLayer
    access: str

    @property
    def method(self) -> Any:
        """What chooses in this layer."""
        return self.context.method

    def attend(
        self, state: PatchedLayer, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None,
        kwargs: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        """Output [batch, query_heads, queries, value_dim]; `key` and `value` are the tail's."""
        handed = current_layer()
        if handed is None or handed.tail != key.shape[2]:
            raise RuntimeError(
                f"layer {state.number} changes its keys behind transformers' cache, so that no context can be served"
            )
        if not isinstance(mask, MaskInfo) or mask.opaque is not None:
            why = mask.opaque if isinstance(mask, MaskInfo) else "the mask is the caller's own"
            raise NotImplementedError(f"a context is served with a 2-D attention_mask alone ({why})")
        info = mask.on(query.device)
        if info.segment is not None and info.chunk is None:
            raise NotImplementedError("a context is not served to packed questions: give them as rows of a batch")
        length = self.layer.length
        valid = info.key_valid
        if valid is not None and not bool(valid[:, :length].all()):
            raise ValueError("attention_mask hides a part of the context: it must be 1 for every token of it")
        common: dict[str, Any] = {
            "scale": scaling if scaling is not None else query.shape[-1] ** -0.5, "softcap": kwargs.get("softcap"),
            "sinks": kwargs.get("s_aux"),
        }  # fmt: skip
        tail_valid = None if valid is None else valid[:, length : length + key.shape[2]]
        dtype = self.layer.key.dtype  # under autocast rotated queries and keys come in float32
        query, key, value = (t.to(dtype) for t in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            if info.local is not None:
                return self._in_window(state, query, key, value, info, tail_valid, common)
            start = info.query_start - length
            tail = AttentionInputs(query, key, value, key_valid=tail_valid, query_start=start, **common)
            began = time.perf_counter()
            result, counts = attend_to_context(self.layer, query, tail, block_q=_BLOCK_Q, access=self.access)
            seconds = time.perf_counter() - began if query.device.type == "cpu" else 0.0
            if state.settings.observe:
                state.note_context(self._counted(counts, tail), self._mass(state, tail, result), seconds)
            else:
                state.note_context(None, None, 0.0)
        assert result.output is not None
        return result.output

    def _in_window(
        self, state: PatchedLayer, query: Tensor, key: Tensor, value: Tensor, info: MaskInfo,
        tail_valid: Tensor | None, common: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """A local layer: what its window reaches of the context, and the tail, exactly.

        Padding between context and question is put before the context, so that distances are those of tokens.
        """
        assert info.local is not None
        batch, length = query.shape[0], self.layer.length
        before = min(info.local - 1, length)
        context_key, context_value = (
            t.to(query.device)[None].expand(batch, -1, -1, -1) for t in self.layer.last(before)
        )
        slot = torch.arange(before + key.shape[2], device=query.device)
        pad = slot.new_zeros(batch) if tail_valid is None else tail_valid.to(torch.int8).argmax(1)
        source = torch.where(slot < before + pad[:, None], slot - pad[:, None], slot).clamp(min=0)

        def shifted(tensor: Tensor) -> Tensor:
            return tensor.gather(2, source[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))

        valid = segment = None
        if tail_valid is not None:
            whole = torch.nn.functional.pad(tail_valid, (before, 0), value=True)
            valid = whole.gather(1, source) & (slot >= pad[:, None])
        if info.chunk is not None:
            position = slot + (length - before) - pad[:, None]
            segment = position.clamp(min=0).div(info.chunk, rounding_mode="floor").expand(batch, -1)
        inputs = AttentionInputs(
            query, shifted(torch.cat([context_key, key], 2)), shifted(torch.cat([context_value, value], 2)),
            window=info.window, key_valid=valid, query_start=info.query_start - length + before, segment=segment,
            **common,
        )  # fmt: skip
        state.local = "in its chunks" if info.chunk else "in its sliding window"
        size = min(_BLOCK_Q, max(16, query.shape[2]))
        result = block_sparse_attention(inputs, BlockIndex.dense(inputs, BlockGrid.of(inputs, size, 64)))
        state.note_context(None, None, 0.0)
        assert result.output is not None
        return result.output

    def _counted(self, counts: ContextCounts, tail: AttentionInputs) -> dict[str, Tensor]:
        """Pairs of one call, of each query head: of context and tail, and of the context alone."""
        group = tail.query_heads // len(counts.chosen)
        own = counts.chosen.repeat_interleave(group).to(tail.device) + counts.edges
        among = _tail_pairs(tail)
        return {
            "kept": own + among, "visible": counts.visible + among, "context_kept": own,
            "context_visible": counts.visible,
        }  # fmt: skip

    def _mass(self, state: PatchedLayer, tail: AttentionInputs, result: AttentionOutput) -> Tensor | None:
        """Kept mass on some queries of a question; not while it is answered, where it would cost what it saves."""
        rows = state.settings.sample_rows
        if not state.settings.observe or not rows or tail.queries == 1:
            return None
        place = torch.linspace(0, tail.queries - 1, min(rows, tail.queries), device=tail.device).round().to(torch.int64)
        share = (result.lse[:, :, place].double() - dense_lse(self.layer, tail, place).double()).exp()
        real = torch.ones(tail.batch, len(place), dtype=torch.bool, device=tail.device)
        if tail.key_valid is not None:
            real = tail.key_valid[:, tail.query_start + place]
        share = torch.where(real[:, None], share, 0.0)
        return torch.stack([share.sum((0, 2)), real.sum().double().expand(tail.query_heads)], -1)


def _tail_pairs(tail: AttentionInputs) -> int | Tensor:
    """Pairs of a real query of the tail and a key of it that it sees."""
    start, queries = tail.query_start, tail.queries
    if tail.key_valid is None:
        return tail.batch * (queries * start + queries * (queries + 1) // 2)
    seen = tail.key_valid.to(torch.int64).cumsum(1)[:, start : start + queries]
    return (seen * tail.key_valid[:, start : start + queries]).sum()
