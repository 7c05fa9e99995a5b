"""What a method will compute on a model, before anything heavy is loaded: tiles, shares, break-even, memory, bounds.

Everything follows from a model's config.json, the method and the length. Tiles are counted
(`sparseprefill.patterns.expected_tiles`), work is reckoned from shapes, and time from what this machine was calibrated
for; without a calibration there are bounds and stated cost models, and the plan says so.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparseprefill.calibration import CalibrationEntry
from sparseprefill.doctor import skeleton
from sparseprefill.evals.loading import model_folder
from sparseprefill.huggingface import Method, plan_patch
from sparseprefill.huggingface_layers import PatchedLayer, Settings, layer_cost
from sparseprefill.huggingface_masks import MaskInfo, mask_of_layer, masks_of
from sparseprefill.huggingface_modules import LayerShape, kernel_for, layer_shapes, tensor_parallel, text_config
from sparseprefill.kernels.roofline import ACCELERATORS, Accelerator
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import expected_overhead
from sparseprefill.patterns.expected_tiles import TileCount, count_tiles
from sparseprefill.patterns.wrapping import keeps_everything
from sparseprefill.prefill import CostModel, describe_pattern, stated_cost
from sparseprefill.profile_memory import out_of_memory
from sparseprefill.reports import number, ranges, table

MOST_TOKENS = 1 << 21
"""Tiles of longer prompts are too many to be counted."""

NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
"""Fields of a configuration without which transformers would plan another model: its defaults."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Layers that are alike, at one length."""

    layers: tuple[int, ...]
    pattern: str  # in words
    own: str  # "" where the method chooses; else why the layer runs as without it: "dense", "window", "chunks"
    tiles: TileCount  # of one layer
    expected: float  # share of dense attention's tiles that is reckoned with
    overhead: float  # time of finding the blocks over that of dense attention
    break_even: float | None  # density below which sparse is cheaper at this length; None: never
    speedup: float | None  # of attention, expected by the cost model
    bound: float  # of attention, if a tile cost what it costs densely and finding nothing: all tiles over the expected
    dense_seconds: float | None  # of one layer's attention, calibrated
    sparse_seconds: float | None


@dataclass(frozen=True, slots=True)
class LengthPlan:
    """One method on one model at one length."""

    method: str
    length: int  # tokens
    layers: tuple[LayerPlan, ...]
    attention_share: float  # of the prefill's floating-point operations, dense
    bound: float  # of the whole prefill, if everything else stayed and tiles cost what they do densely
    dense_seconds: float | None  # of attention in all layers; on an accelerator at least
    sparse_seconds: float | None
    memory: dict[str, float]  # bytes, by what they are for


@dataclass(frozen=True, slots=True)
class Plan:
    """See `plan`. `str()` gives a page to read, `to_dict()` what JSON can hold."""

    model: str
    device: str
    dtype: str
    plans: tuple[LengthPlan, ...]
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return self.text()

    def text(self, *, markdown: bool = False) -> str:
        """Tables of tiles and of whole prefills, and what was assumed."""
        rows, wholes = [], []
        for each in self.plans:
            for own in each.layers:
                count = own.tiles
                tiles = str(count.high) if count.exact else f"{count.low} to {count.high}"
                share = number(count.share()) if count.exact else f"{count.share(count.low):.3f} to {count.share():.3f}"
                chosen = not own.own
                rows.append([
                    each.method, str(each.length), ranges(own.layers) + (f" ({own.own})" if own.own else ""),
                    str(count.dense), tiles, share, number(own.overhead if chosen else None),
                    "-" if not chosen else "never" if own.break_even is None else number(own.break_even),
                    number(own.speedup, 2), number(own.bound if chosen else None, 2),
                ])  # fmt: skip
            wholes.append([
                each.method, str(each.length), number(each.attention_share), number(each.bound, 2),
                number(each.dense_seconds, 3), number(each.sparse_seconds, 3),
                *(number(each.memory[name] / 2**30, 2) for name in MEMORY),
            ])  # fmt: skip
        first = ["method", "tokens", "layers", "dense tiles", "tiles", "share", "finding / dense", "pays below density",
                 "expected speed-up", "bound"]  # fmt: skip
        second = ["method", "tokens", "attention / prefill", "bound, prefill", "attention s, dense", "sparse",
                  *(f"{name} GiB" for name in MEMORY)]  # fmt: skip
        said = "\n".join(f"- {each}" for each in self.assumptions)
        return "\n".join([
            f"{self.model}, {self.dtype}, on {self.device}: a plan, nothing was run.", "",
            "Attention, of one layer:", "", table(first, rows, markdown=markdown), "",
            "All layers, and the whole prefill:", "", table(second, wholes, markdown=markdown), "",
            "Assumed:", "", said,
        ])  # fmt: skip


MEMORY = ("weights", "cache", "lists", "MLP", "logits")
"""What a plan reckons memory for: see `LengthPlan.memory`."""


def plan(
    model: str | None, lengths: Sequence[int], methods: Sequence[tuple[str, Method | None, dict[str, Any]]], *,
    device: str = "cpu", dtype: str = "auto", calibration: str | Path | None = None, trust_remote_code: bool = False,
    block_q: int = 64, block_k: int = 64,
) -> Plan:  # fmt: skip
    """Reckon methods on a model at some lengths, of one prompt without padding in one call.

    Args:
        model: hub name, folder, or a config.json; None: the model inside. No weights are read.
        lengths: tokens.
        methods: (label, method as for `patch_model`, its options).
        device: "cpu", "cuda", or one of `ACCELERATORS` by name, which need not be here: its times are bounds.
        dtype: of the weights; "auto": what the configuration says.
        calibration: as for `patch_model`; for "cpu" and "cuda".
        trust_remote_code: run code that comes with the model.
        block_q, block_k: tokens a tile.

    Raises:
        ValueError: a configuration that lacks a field, an unknown device, lengths that are none, and what the methods
            refuse.
    """
    name, written = _checked_config(model)
    accelerator = next((each for each in ACCELERATORS if each.name.lower() == device.lower()), None)
    if accelerator is None and device not in ("cpu", "cuda"):
        names = ", ".join(each.name for each in ACCELERATORS)
        raise ValueError(f"a plan is for cpu, cuda, or one of {names}; got {device!r:.80}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: name one, as in --device H200, for a prediction")
    if accelerator is not None and calibration is not None:
        raise ValueError(f"a calibration is of the machine it was measured on, and {accelerator.name} is a prediction")
    if not lengths or min(lengths) < 1 or max(lengths) > MOST_TOKENS:
        raise ValueError(f"lengths are tokens, from 1 to {MOST_TOKENS}, as tiles are counted; got {list(lengths)}")
    bare = skeleton(name, dtype=dtype, trust_remote_code=trust_remote_code)
    config = text_config(bare)
    _check_shape(config, written, name)
    settings = Settings(block_q=block_q, block_k=block_k)
    known = settings.calibration(calibration) if accelerator is None else None
    place = torch.device("cpu" if device == "cpu" else "cuda")
    made: list[LengthPlan] = []
    words: list[str] = []
    stated: list[str] = []
    for label, method, options in methods:
        chosen = plan_patch(bare, method, settings=settings, **options)
        shapes = layer_shapes(chosen.modules, config, tensor_parallel(bare))
        masks = masks_of(bare, 2 * block_q)
        groups: dict[Any, list[int]] = {}
        for layer, state in sorted(chosen.layers.items()):
            mask = mask_of_layer(masks, config, layer)
            alike = _without_layer(state.pattern)
            groups.setdefault((shapes[layer], mask.window, mask.chunk, alike, state.always_dense), []).append(layer)
        for length in lengths:
            layers = []
            for (shape, *_), numbers in groups.items():
                state, mask = chosen.layers[numbers[0]], mask_of_layer(masks, config, numbers[0])
                entry, kernel = None, None
                if known is not None:
                    cost = layer_cost(known, settings, shape, place, bare.dtype, skips=state.skips)
                    entry, kernel = cost.entry, cost.kernel
                    words.append(cost.missing if entry is None else entry.describe())
                elif device == "cpu":
                    kernel, _ = kernel_for(shape, place, bare.dtype, "auto", block_q, block_k, skips=state.skips)
                model_of_cost = stated_cost(place.type, kernel) if entry is None else entry.cost
                if entry is None:
                    stated.append(model_of_cost.describe())
                layers.append(_layer(tuple(numbers), shape, state, mask, length, place, settings, entry, model_of_cost))
            made.append(_length(label, length, tuple(layers), groups, bare, config, accelerator))
    return Plan(
        type(bare).__name__ if model is None else str(model), device, str(bare.dtype).removeprefix("torch."),
        tuple(made), _assumptions(accelerator, sorted(set(words)), sorted(set(stated)), block_q, block_k),
    )  # fmt: skip


def check_config(model: str | None) -> str | None:
    """The name that loads this model's configuration. Raises ValueError where it lacks what a plan needs."""
    return _checked_config(model)[0]


def _checked_config(model: str | None) -> tuple[str | None, dict[str, Any]]:
    """`check_config`'s, and what the configuration says of the language model."""
    if model is not None and Path(model).is_file():
        if Path(model).name != "config.json":
            raise ValueError(f"{model} is a file: give a model's config.json, its folder, or a hub name")
        model = str(Path(model).parent)
    path = model_folder(model)
    try:
        written, _ = PreTrainedConfig.get_config_dict(path)
    except Exception as error:
        raise ValueError(f"no configuration can be read of {path!r}: {type(error).__name__}: {error}") from error
    if not isinstance(written, dict):
        raise ValueError(f"the configuration of {path!r} is no dictionary of fields, but a {type(written).__name__}")
    own = written.get("text_config")
    written = own if isinstance(own, dict) and own else written
    for field in NEEDED:
        if not _says(written, field):
            raise ValueError(_LACKS.format(repr(path), field))
    return model, written


_LACKS = "the configuration of {} has no {}: transformers would put another model's number there. Add it to config.json"


def _says(written: dict[str, Any], field: str) -> bool:
    """Whether a configuration has a field, by this or another name."""
    return any(each in written for each in (field, *_aliases(written).get(field, ())))


def _check_shape(config: Any, written: dict[str, Any], name: str | None) -> None:
    """Raise ValueError for heads that cannot be, and for numbers that only a default of transformers gave."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    known = inspect.signature(type(config)).parameters
    for field in ("num_key_value_heads", "intermediate_size"):
        # a default of None is made of other fields
        if field in known and isinstance(known[field].default, int) and not _says(written, field):
            raise ValueError(_LACKS.format(repr(name), field))
    if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
        raise ValueError(
            f"the configuration of {name!r} has {heads} query heads over {groups} KV heads, which cannot share them "
            "evenly: num_key_value_heads divides num_attention_heads"
        )


def _without_layer(pattern: Any) -> Any:
    """The same for all layers whose patterns differ in a seed, or in where they stand, alone: they compute as much."""
    if not dataclasses.is_dataclass(pattern) or isinstance(pattern, type) or not hasattr(pattern, "for_layer"):
        return pattern
    names = {each.name for each in dataclasses.fields(pattern)}
    changed: dict[str, Any] = {name: 0 for name in ("seed", "layer") if name in names}
    changed |= {name: _without_layer(getattr(pattern, name)) for name in ("inner", "other", "pattern") if name in names}
    return dataclasses.replace(pattern, **changed)


def _aliases(written: dict[str, Any]) -> dict[str, list[str]]:
    """Other names of fields in this kind of configuration."""
    from transformers import CONFIG_MAPPING

    kind = str(written.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return {}
    found: dict[str, list[str]] = {}
    for common, own in getattr(CONFIG_MAPPING[kind], "attribute_map", {}).items():
        found.setdefault(common, []).append(own)
        found.setdefault(own, []).append(common)
    return found


def _layer(
    numbers: tuple[int, ...], shape: LayerShape, state: PatchedLayer, mask: MaskInfo, length: int,
    device: torch.device, settings: Settings, entry: CalibrationEntry | None, cost: CostModel,
) -> LayerPlan:  # fmt: skip
    pattern: Any = state.pattern_under(mask)
    block_q, block_k = settings.block_q, settings.block_k
    try:
        tiles = count_tiles(
            pattern, keys=length, query_heads=shape.query_heads, kv_heads=shape.kv_heads, block_q=block_q,
            block_k=block_k, window=mask.window, chunk=mask.chunk,
        )  # fmt: skip
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(
            f"tiles of {length} tokens do not fit into memory to be counted: plan a shorter one"
        ) from error
    pairs = length * (length + 1) / 2
    seconds = None if entry is None else entry.dense_pair_seconds
    if mask.local is not None or state.always_dense or keeps_everything(pattern):
        own = "chunks" if mask.chunk is not None else "window" if mask.local is not None else "dense"
        asis = None if seconds is None else seconds * pairs * tiles.share()
        return LayerPlan(
            numbers, describe_pattern(pattern), own, tiles, tiles.share(), 0.0, None, None, 1.0, asis, asis
        )  # fmt: skip
    # of lists that a kernel may skip tiles of, the pattern knows what is expected
    density = min(max(expected_density(pattern, length), tiles.share(tiles.low)), tiles.share())
    if state.skips and tiles.exact:
        density = min(expected_density(pattern, length), tiles.share())
    expected = tiles.share() if tiles.exact and not state.skips else density
    overhead = expected_overhead(
        pattern, device, shape.head_dim, block_q, block_k, None if entry is None else entry.overheads
    )
    finding = overhead.pairs(pairs, length)
    sparse = cost.tile_factor * expected * pairs + finding + cost.fixed_tokens**2 / 2
    left = (pairs - finding - cost.fixed_tokens**2 / 2) / (cost.tile_factor * pairs)
    times = (None, None) if seconds is None else (seconds * pairs, seconds * sparse)
    return LayerPlan(
        numbers, describe_pattern(pattern), "", tiles, expected, finding / pairs, left if left > 0 else None,
        pairs / sparse, 1 / expected, *times,
    )  # fmt: skip


def _length(
    label: str, length: int, layers: tuple[LayerPlan, ...], groups: dict[Any, list[int]], model: PreTrainedModel,
    config: Any, accelerator: Accelerator | None,
) -> LengthPlan:  # fmt: skip
    pairs = length * (length + 1) / 2
    dense = kept = cache = 0.0
    size = torch.empty(0, dtype=model.dtype).element_size()
    for own, (shape, window, chunk, *_) in zip(layers, groups, strict=True):
        local = window if chunk is None else min(chunk, window or chunk)
        flops = 2 * pairs * shape.query_heads * (shape.head_dim + shape.value_dim) * len(own.layers)
        before = own.tiles.share() if local is not None else 1.0  # a local layer is local without us too
        dense += flops * before
        kept += flops * own.expected
        held = length if local is None else min(length, local)
        cache += held * shape.kv_heads * (shape.head_dim + shape.value_dim) * size * len(own.layers)
    others = 2.0 * length * _working_parameters(model, config)
    lists = max((own.tiles.high * 4 for own in layers), default=0)
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    width = width if isinstance(width, int) else max(width)
    seconds = [
        None if any(getattr(own, name) is None for own in layers)
        else sum(getattr(own, name) * len(own.layers) for own in layers)
        for name in ("dense_seconds", "sparse_seconds")
    ]  # fmt: skip
    if accelerator is not None:
        seconds = [dense / accelerator.flops, kept / accelerator.flops]
    return LengthPlan(
        label, length, layers, dense / (dense + others), (dense + others) / (kept + others), seconds[0], seconds[1],
        {
            "weights": float(sum(each.numel() for each in model.parameters()) * size), "cache": cache,
            "lists": float(lists), "MLP": float(3 * length * width * size),
            "logits": float(length * config.vocab_size * size),
        },
    )  # fmt: skip


def _working_parameters(model: PreTrainedModel, config: Any) -> float:
    """Weights that multiply each token: matrices, without embeddings and the head; of experts those that are asked."""
    outside = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is not None:
        outside.add(id(head.weight))
    asked = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    share = asked / experts if asked and experts else 1.0
    total = 0.0
    for name, each in model.named_parameters():
        if each.dim() >= 2 and id(each) not in outside:
            total += each.numel() * (share if ".experts." in name else 1.0)
    return total


def _assumptions(
    accelerator: Accelerator | None, words: Sequence[str], stated: Sequence[str], block_q: int, block_k: int
) -> tuple[str, ...]:  # fmt: skip
    said = [
        f"one prompt without padding, in one call, in tiles of {block_q} x {block_k}",
        "an interval of tiles: what is kept in any case, and the most; expected is what the method's budget comes to, "
        "or half of all where a threshold decides; speed-ups and bounds are at what is expected",
        "floating-point operations of attention and of all matrices but embeddings and the head; experts by the share "
        "that a token asks",
        "MLP: three activations of one layer, unless mlp_chunk= cuts them; logits: of all tokens, unless last_logits=",
    ]  # fmt: skip
    if accelerator is not None:
        said.append(
            f"PREDICTION, not measured: seconds are attention's operations at {accelerator.flops / 1e12:.0f} TFLOPS, "
            f"the peak of an {accelerator.name}, which no kernel reaches: bounds; expected speed-ups are those of the "
            f"stated cost model of a GPU, an assumption ({'; '.join(stated)})"
        )
    else:
        said += [f"time: {each}" for each in words]
        if stated:
            said.append(
                "without a calibration there are no seconds, expected speed-ups are those of the stated cost model "
                f"({'; '.join(stated)}), and the bound is what tiles alone allow"
            )
    return tuple(said)
