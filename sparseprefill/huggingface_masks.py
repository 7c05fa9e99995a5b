"""What transformers says about masks, as the few numbers attention needs: the one place that knows its releases.

transformers describes a mask as a function of indices and lets each attention implementation turn it into what it
likes. Ours becomes a `MaskInfo`. What it cannot express (image overlays, a user's own mask) is left to the
implementation the model had before, with that implementation's own mask, which is made only if a layer asks for it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

NAME = "sparseprefill"


@dataclass(frozen=True, slots=True)
class MaskSettings:
    """What the mask function has to know of the model it serves, found by the identity of its config."""

    previous: str  # the attention implementation of before
    least_queries: int  # calls with fewer queries go there


_SETTINGS: dict[int, tuple[weakref.ref[Any], MaskSettings]] = {}


def bind_config(config: Any, settings: MaskSettings) -> None:
    """Let masks made for `config` follow `settings`, as long as the config lives or until `unbind_config`."""
    key = id(config)
    _SETTINGS[key] = (weakref.ref(config, lambda _: _SETTINGS.pop(key, None)), settings)


def unbind_config(config: Any) -> None:
    """Forget a config."""
    _SETTINGS.pop(id(config), None)


def bound_settings(config: Any) -> MaskSettings | None:
    """The settings of a config, if it has any."""
    entry = _SETTINGS.get(id(config))
    return entry[1] if entry is not None and entry[0]() is config else None


class MaskIsNoTensor(NotImplementedError, AttributeError):
    """Raised where a model computes with its attention mask, of which a patched model has only a description.

    An AttributeError too, so that `hasattr(mask, name)` answers False.
    """


def _no_tensor(self: Any, *_: Any, **__: Any) -> Any:
    raise MaskIsNoTensor(
        "this model computes with its attention mask instead of handing it to the attention function, so it cannot be "
        "patched: run it without the patch"
    )


@dataclass(eq=False)
class MaskInfo:
    """The mask of one forward pass. It travels through a model in the place of a 4-D mask tensor."""

    query_start: int  # slot of the first query among the keys at hand
    queries: int
    keys: int  # keys at hand; a sliding cache holds only the last ones
    key_valid: Tensor | None  # bool [batch, keys], None: all that are filled
    window: int | None
    chunk: int | None  # tokens a chunk, where queries see their own chunk only; `segment` then numbers the chunks
    segment: Tensor | None  # int64 [batch, keys]
    opaque: str | None  # why no fast path can serve this mask, or None
    arguments: dict[str, Any]  # of the mask function, for the previous implementation
    batch: int
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> int | None:
        """Keys a query sees at most, in a layer that is local by design; None where it sees everything."""
        return self.window if self.chunk is None else min(self.chunk, self.window or self.chunk)

    def density(self, keys: int) -> float:
        """Share of full causal attention that the mask leaves, at most, for a prompt of `keys` tokens."""
        if self.chunk is not None:
            return min(1.0, self.chunk / keys)
        if self.window is None:
            return 1.0
        seen = min(self.window, keys)
        return (seen * keys - seen * (seen - 1) / 2) / (keys * (keys + 1) / 2)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _no_tensor(self)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __or__ = __invert__ = _no_tensor
    __lt__ = __le__ = __gt__ = __ge__ = _no_tensor
    __eq__ = __ne__ = _no_tensor
    __hash__ = object.__hash__

    def __getitem__(self, place: Any) -> MaskInfo:
        """The last queries alone, as models take them that need no more for their last layers; nothing else."""
        parts = place if isinstance(place, tuple) and len(place) in (3, 4) else (None, None, None)
        queries = parts[2]
        others = [part for n, part in enumerate(parts) if n != 2]
        if not isinstance(queries, slice) or queries.step not in (None, 1) or any(p != slice(None) for p in others):
            return _no_tensor(self)  # type: ignore[no-any-return]
        first, last, _ = queries.indices(self.queries)
        if last != self.queries or first >= last:
            return _no_tensor(self)  # type: ignore[no-any-return]
        arguments = dict(self.arguments)
        if "cache_position" in arguments:
            arguments["cache_position"] = arguments["cache_position"][first:]
        else:
            arguments |= {"q_offset": arguments["q_offset"] + first, "q_length": last - first}
        arguments["allow_is_causal_skip"] = False
        return dataclasses.replace(
            self, query_start=self.query_start + first, queries=last - first, arguments=arguments, _made={}
        )

    @property
    def ndim(self) -> int:
        """Generation with a static cache prepares masks early and passes them through as 4-D ones."""
        return 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As a 4-D mask would have it."""
        return (self.batch, 1, self.queries, self.keys)

    def to(self, device: Any, non_blocking: bool = False) -> MaskInfo:
        """For dispatch hooks that move every argument; tensors are moved where they are used."""
        return self

    def contiguous(self) -> MaskInfo:
        """Generation with a static cache asks for it."""
        return self

    def on(self, device: torch.device) -> MaskInfo:
        """The same with its tensors on `device`."""
        for name in ("key_valid", "segment"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                setattr(self, name, tensor.to(device))
        return self

    def previous_mask(self, previous: str) -> Any:
        """The mask that the previous implementation makes for itself; made once for all layers that need it."""
        if previous not in self._made:
            self._made[previous] = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[previous](**self.arguments)
        return self._made[previous]


def make_mask(**arguments: Any) -> Any:
    """The mask function registered under our name; called by transformers with its own keywords, see there."""
    settings = bound_settings(arguments.get("config")) or default_settings()
    given = arguments.get("attention_mask")
    if isinstance(given, MaskInfo):  # prepared by `generate` before the forward pass
        return given
    queries = arguments["cache_position"].shape[0] if "cache_position" in arguments else int(arguments["q_length"])
    if queries < settings.least_queries:  # before anything is read back: decoding stays as it was
        if queries > 1:  # a real mask: no mask at all means something else where a model drops queries behind it
            arguments["allow_is_causal_skip"] = False
        return masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[settings.previous](**arguments)
    return _describe(settings, queries, arguments)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _describe(settings: MaskSettings, queries: int, arguments: dict[str, Any]) -> MaskInfo:
    given = arguments.get("attention_mask")
    query_offset, arguments = _query_offset(arguments)
    kv_offset, keys = int(arguments.get("kv_offset", 0)), int(arguments["kv_length"])
    start = query_offset - kv_offset
    valid = None
    if given is not None:
        valid = _valid_keys(given, kv_offset, keys, min(keys, start + queries))
    batch = arguments.get("batch_size") or (given.shape[0] if given is not None else 1)
    window, chunk, segment, opaque = _understand(arguments["mask_function"], batch, keys, kv_offset)
    reach = getattr(arguments.get("config"), "max_position_embeddings", None)
    if window is not None and reach is not None and window >= max(reach, start + queries):
        window = None  # wider than the model itself, and than this prompt
    if start < 0 or start + queries > keys:
        opaque = f"queries stand in slots {start} to {start + queries - 1} of {keys} keys"
    return MaskInfo(start, queries, keys, valid, window, chunk, segment, opaque, arguments, batch)


def masks_of(model: Any, tokens: int) -> dict[str, MaskInfo]:
    """The masks that a patched model would make for one prompt, by layer type ("" where all layers share one).

    Asks transformers with a copy of the model's configuration; the model is not touched.
    """
    config = copy.deepcopy(model.config.get_text_config())
    config._attn_implementation = NAME
    register_mask()
    bind_config(config, MaskSettings("sdpa", 1))
    make = masking_utils.create_masks_for_generate
    embeddings = torch.zeros(1, tokens, 1)
    arguments = {"config": config, "attention_mask": None, "past_key_values": None, "position_ids": None}
    names = inspect.signature(make).parameters
    arguments["inputs_embeds" if "inputs_embeds" in names else "input_embeds"] = embeddings
    if "cache_position" in names:
        arguments["cache_position"] = torch.arange(tokens)
    try:
        # what hybrids use whose layer types are not of attention, or that 5.0 cannot look up
        plain: Any = masking_utils.create_causal_mask(**arguments)
        try:
            made = make(**arguments)
        except KeyError:
            made = plain
    finally:
        unbind_config(config)
    known = made if isinstance(made, dict) else {"": made}
    return {name: mask for name, mask in known.items() if isinstance(mask, MaskInfo)} or {"": plain}


def mask_of_layer(masks: dict[str, MaskInfo], config: Any, layer: int) -> MaskInfo:
    """The mask of a layer; of a hybrid whose layer types have names of their own, the one with full attention."""
    if len(masks) == 1:
        return next(iter(masks.values()))
    kind = (getattr(config, "layer_types", None) or {layer: ""})[layer]
    for name in (kind, "sliding_attention" if "sliding" in kind else "full_attention"):
        if name in masks:
            return masks[name]
    return next(iter(masks.values()))


_DEFAULT: list[MaskSettings] = []


def set_default_settings(settings: MaskSettings) -> None:
    """What models follow that were loaded under our name and not patched."""
    _DEFAULT[:] = [settings]


def default_settings() -> MaskSettings:
    """See `set_default_settings`; before it was called, everything goes to sdpa."""
    return _DEFAULT[0] if _DEFAULT else MaskSettings("sdpa", 1 << 62)


def register_mask() -> None:
    """Put `make_mask` under our name; without it padding would vanish silently."""
    masking_utils.AttentionMaskInterface.register(NAME, make_mask)


def _query_offset(arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Slot of the first query, and the arguments with that number frozen in them.

    transformers 5.0 to 5.2 gave cache_position instead of a length and an offset. A static cache's offset is a tensor
    that the cache itself counts up before attention runs, so a mask that is made later must not read it again.
    """
    if "cache_position" in arguments:
        position = arguments["cache_position"]
        return int(position[0]), {**arguments, "cache_position": position.clone()}
    offset = int(arguments.get("q_offset", 0))
    return offset, {**arguments, "q_offset": offset}


def _valid_keys(given: Tensor, kv_offset: int, keys: int, filled: int) -> Tensor | None:
    """bool [batch, keys] from a 2-D mask over all slots; None where nothing is masked.

    One read back to the host a forward pass, as the stock mask functions do; it is also what finds a row of padding.
    """
    valid = given[:, kv_offset : kv_offset + keys].to(torch.bool)
    short = keys - valid.shape[1]
    if short > 0:  # as transformers pads it; but slots that are not filled yet are the future, whatever stands there
        valid = torch.nn.functional.pad(valid, (0, short), value=False)
        valid[:, filled:] = True
    seen = valid[:, :filled]
    if bool(seen.all()):
        return None
    empty = (~given.to(torch.bool).any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"batch row {empty[0]} is padding only (attention_mask has no 1 so far): leave the row out of the batch, "
            "or, in a chunked prefill, make the first chunk longer than the padding"
        )
    return valid


def _understand(
    function: Callable[..., Any], batch: int, keys: int, kv_offset: int
) -> tuple[int | None, int | None, Tensor | None, str | None]:
    """(window, chunk, segment, None) of a mask function made of parts we know, else (None, None, None, why not)."""
    window: int | None = None
    chunk: int | None = None
    segment: Tensor | None = None
    causal = False

    def unknown(why: str) -> tuple[None, None, None, str]:
        return None, None, None, why

    for part in _parts(function):
        kind, inside = _kind(part), _enclosed(part)
        if kind == "causal_mask_function":
            causal = True
        elif kind == "sliding_window_overlay.inner_mask":
            window = min(window or inside["sliding_window"], inside["sliding_window"])
        elif kind == "chunked_overlay.inner_mask" and segment is None:
            chunk = int(inside["chunk_size"])
            slot = torch.arange(kv_offset, kv_offset + keys, device=inside["left_padding"].device)
            segment = (slot - inside["left_padding"][:, None]).div(chunk, rounding_mode="floor")
        elif kind == "packed_sequence_mask_function.inner_mask" and segment is None:
            segment = inside["packed_sequence_mask"]
            if segment.shape[1] != keys:
                return unknown(f"packed sequences of {segment.shape[1]} slots over {keys} keys")
        elif kind == "remap_positions_for_packed_sequence.inner_mask":
            # positions inside each packed sequence: the same distances and the same order as slots have there
            inner = _understand(inside["mask_function"], batch, keys, kv_offset)
            if inner[3] is not None or inner[2] is not None:
                return unknown(inner[3] or "chunks inside packed sequences")
            causal, window = True, inner[0] if window is None else min(window, inner[0] or window)
        else:
            return unknown(f"its mask has a part of its own ({kind})")
    if not causal:
        return unknown("it is not causal")
    return window, chunk, None if segment is None else segment.expand(batch, -1), None


def _parts(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions whose intersection this is."""
    if _kind(function) == "and_masks.and_mask":
        return [part for each in _enclosed(function)["mask_functions"] for part in _parts(each)]
    if _kind(function) == "or_masks.or_mask":
        some = [each for each in _enclosed(function)["mask_functions"] if not _adds_nothing(each)]
        if len(some) == 1:
            return _parts(some[0])
    return [function]


def _adds_nothing(function: Callable[..., Any]) -> bool:
    """An overlay for image tokens over a text without any. Read back once a forward pass, in models that see images."""
    return _kind(function) == "blockwise_overlay.inner_mask" and not bool(
        (_enclosed(function)["block_sequence_ids"] >= 0).any()
    )


def _kind(function: Callable[..., Any]) -> str:
    """Qualified name, for functions of transformers' own masking module; others are called by their module too."""
    name = getattr(function, "__qualname__", type(function).__name__).replace(".<locals>", "")
    module = getattr(function, "__module__", "")
    return name if module == masking_utils.__name__ else f"{module}.{name}"


def _enclosed(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables a closure remembers."""
    cells = getattr(function, "__closure__", None) or ()
    code = getattr(function, "__code__", None)
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True)) if code else {}
