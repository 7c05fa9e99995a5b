"""A cache with a context that several questions share: read-only, once, before the tail that each has for itself.

A stock model sees an ordinary cache: it gives context and tail together. Where a layer is patched for this very
context, it is handed the tail alone, and attends to the context by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from sparseprefill.patterns.fixed_context import ContextLayer


class ContextCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer: `keys` and `values` are the tail's alone, what is before them is the context's."""

    def __init__(self, context: ContextLayer, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.context = context
        self.context_dtype = dtype
        self.handing_over = False  # the next update is asked for by a layer that knows the context

    @property
    def tail(self) -> int:
        """Tokens of the tail."""
        return 0 if self.keys is None or not self.keys.numel() else int(self.keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the tail. Gives the tail alone to a layer that asked for it, else all keys and values."""
        if not self.handing_over and key_states.dtype is not self.context_dtype:
            raise ValueError(
                f"the context was prepared in {self.context_dtype} and the model sends {key_states.dtype}: prepare it "
                "again with the model as it is now"
            )
        if self.tail and self.keys is not None and len(self.keys) != len(key_states):
            raise ValueError(
                f"this cache belongs to {len(self.keys)} questions and is given {len(key_states)}: take a fresh one, "
                "context.cache()"
            )
        shapes = [(t.shape[-3], t.shape[-1]) for t in (key_states, value_states, self.context.key, self.context.value)]
        if not self.handing_over and shapes[:2] != shapes[2:]:
            raise NotImplementedError(
                "this model caches something else than its attention sees: its contexts are for patched models alone"
            )
        key, value = super().update(key_states, value_states, *args, **kwargs)
        if self.handing_over:
            return key, value
        batch = key.shape[0]
        before_key, before_value = (t.to(key.device)[None].expand(batch, -1, -1, -1) for t in self.context.plain())
        return torch.cat([before_key, key], 2), torch.cat([before_value, value], 2)

    def get_seq_length(self) -> int:
        """Tokens of context and tail."""
        return self.context.length + self.tail

    def reset(self) -> None:
        """Forget the tail. The context stays."""
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens (a negative number, or 0 for none). Raises ValueError where that reaches the context."""
        tokens = self.cropped(tokens_to_remove)
        if tokens and self.keys is not None and self.values is not None:
            left = self.tail - tokens
            self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]

    def cropped(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` drops. Raises ValueError as it does."""
        if tokens_to_remove > 0:  # as some releases have it: how many tokens are to be left
            tokens_to_remove = min(0, tokens_to_remove - self.get_seq_length())
        if -tokens_to_remove > self.tail:
            raise ValueError(
                f"{-tokens_to_remove} tokens cannot be dropped: {self.tail} are behind the context, which is read-only"
            )
        return -tokens_to_remove

    def reorder_cache(self, beam_idx: Any) -> None:
        """Of the tail: all rows have the same context."""
        if self.tail:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Of the tail: all rows have the same context."""
        if self.tail:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Of the tail: all rows have the same context."""
        if self.tail:
            super().batch_select_indices(indices)

    def offload(self) -> None:
        """The tail is small, and the context is not this cache's to move."""

    def prefetch(self) -> None:
        """See `offload`."""


class ContextCache(Cache):
    """The cache of one call of `generate`, of any number of questions: made by `FixedContext.cache()`."""

    def __init__(self, fingerprint: str, layers: Mapping[int, ContextLayer], dtype: torch.dtype) -> None:
        super().__init__(layers=[ContextCacheLayer(layers[number], dtype) for number in sorted(layers)])
        self.fingerprint = fingerprint  # of the context

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens of every layer, or of none: see `ContextCacheLayer.crop`."""
        for layer in self.layers:
            assert isinstance(layer, ContextCacheLayer)
            layer.cropped(tokens_to_remove)
        super().crop(tokens_to_remove)


class _Current(threading.local):
    """What this thread's attention modules were handed over, innermost last."""

    def __init__(self) -> None:
        self.layers: list[ContextCacheLayer] = []


_CURRENT = _Current()


def current_layer() -> ContextCacheLayer | None:
    """The cache layer whose tail the attention module that runs now was given."""
    return _CURRENT.layers[-1] if _CURRENT.layers else None


@contextmanager
def handed_over(layer: ContextCacheLayer) -> Iterator[None]:
    """While an attention module runs that knows the context."""
    layer.handing_over = True
    _CURRENT.layers.append(layer)
    try:
        yield
    finally:
        _CURRENT.layers.pop()
        layer.handing_over = False
