"""What would run, and why: a look at a model, this machine and a method together, changing none of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from sparseprefill.calibration import processor
from sparseprefill.evals.loading import load_config, provenance
from sparseprefill.huggingface import Method, patched_layers, plan_patch
from sparseprefill.huggingface_layers import PatchedLayer, Settings, calibrate_layers, decision_of
from sparseprefill.huggingface_masks import NAME, MaskInfo, mask_of_layer, masks_of
from sparseprefill.huggingface_modules import (
    STATE,
    LayerShape,
    device_of,
    kernel_for,
    layer_shapes,
    model_facts,
    tensor_parallel,
    text_config,
    unwrap,
)
from sparseprefill.kernels.dispatch import device_limits
from sparseprefill.kernels.native_build import describe_native
from sparseprefill.prefill import describe_pattern
from sparseprefill.reports import ranges, table

# releases of transformers under which the tests of the seam run
TESTED = ("5.0.0", "5.23.0")


@dataclass(frozen=True, slots=True)
class LayerExplanation:
    """What one attention layer would do with a long prompt."""

    layer: int
    mask: str  # what the model's own mask lets a query see
    pattern: str
    kernel: str | None  # the implementation that computes it; None where none can
    why_not: dict[str, str]  # of the other implementations
    break_even: int | None  # tokens of the shortest prompt, in one call, that runs sparsely; None: none does
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """See `explain`. `str()` gives a page to read, `to_dict()` what JSON can hold."""

    model: dict[str, Any]  # its class and hard keys
    environment: dict[str, Any]  # versions, processor, threads
    device: dict[str, Any]  # where it would run
    native: str  # the native library of the CPU: what it was built for and where it lies, or why there is none
    state: str  # patched or not, and by what
    refused: str | None  # why `patch_model` would refuse, or None
    decision: str  # what chooses between sparse and dense
    profile: str  # where patterns of single heads come from
    layers: tuple[LayerExplanation, ...]  # in order; empty where the model is refused
    notes: tuple[str, ...]  # what else is worth knowing

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.environment["versions"].items())
        facts = ", ".join(f"{name} {value}" for name, value in self.model.items())
        device = ", ".join(f"{name} {value}" for name, value in self.device.items())
        lines = [f"model      {facts}", f"versions   {versions}", f"device     {device}"]
        lines += [f"native     {self.native}", f"state      {self.state}"]
        if self.refused:
            lines.append(f"refused    {self.refused}")
        lines += [f"decision   {self.decision}", f"profile    {self.profile}"]
        if self.layers:
            lines += ["", table(_HEAD, [row for _, row in _grouped(self.layers)])]
            reasons = {(name, why) for layer in self.layers for name, why in layer.why_not.items()}
            lines += ["", *(f"not {name}: {why}" for name, why in sorted(reasons))]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


_HEAD = ["layers", "mask", "pattern", "kernel", "sparse from", "heads", "head_dim"]


def _grouped(layers: tuple[LayerExplanation, ...]) -> list[tuple[tuple[Any, ...], list[str]]]:
    """Table rows; layers in which everything agrees share one."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for each in layers:
        heads = f"{each.query_heads}/{each.kv_heads}"
        dims = f"{each.head_dim}" if each.value_dim == each.head_dim else f"{each.head_dim}/{each.value_dim}"
        start = "never" if each.break_even is None else str(each.break_even)
        groups.setdefault((each.mask, each.pattern, each.kernel or "none", start, heads, dims), []).append(each.layer)
    return [(key, [ranges(numbers), *key]) for key, numbers in groups.items()]


def explain(
    model: Any, method: Method | None = None, *, device: str | None = None, calibration: str | Path | None = None,
    **options: Any,
) -> Explanation:  # fmt: skip
    """Say which kernel each layer of a model would run and why not another, from which length on, and what is patched.

    Changes nothing; weights may be on the meta device. A patched model is explained as it is patched, and then takes
    no method.

    Args:
        model: as for `patch_model`.
        method: as for `patch_model`.
        device: "cpu", "cuda", ...: where the model would run; None: where it is.
        calibration: as for `patch_model`.
        options: every other argument of `patch_model`.

    Raises:
        TypeError, ValueError: what is not a model, an unknown device, an option that does not exist.
        What `patch_model` would refuse is not raised but said in `refused`.
    """
    inner = unwrap(model)
    place = _place(inner, device)
    asked = {name: options.pop(name) for name in list(options) if name in Settings.__dataclass_fields__}
    running = patched_layers(inner)
    if running and (options or asked or calibration is not None or method is not None):
        raise ValueError("this model is patched: explain(model) says how; remove the patch to ask about another method")
    settings = Settings(**asked)
    known = None if running else settings.calibration(calibration)
    refused, layers, notes = None, running, list(_version_notes())
    modules: dict[int, nn.Module] = {}
    facts: dict[str, Any] = {}
    try:
        config = text_config(inner)
        if running is None:
            plan = plan_patch(inner, method, settings=settings, **options)
            layers, modules = plan.layers, plan.modules
            notes.extend(plan.warnings)
        facts = model_facts(config)
    except NotImplementedError as error:
        refused = str(error)
    if running is not None:
        modules = {state.number: m for m in inner.modules() if (state := getattr(m, STATE, None)) is not None}
        now = config._attn_implementation
        if now != NAME:
            notes.append(f"the model was switched to {now!r} after it was patched: nothing runs sparsely")
    explained: tuple[LayerExplanation, ...] = ()
    places: dict[int, torch.device] = {}
    if layers is not None:
        masks = masks_of(inner, 2 * settings.block_q)
        shapes = layer_shapes(modules, config, tensor_parallel(inner))
        places = {number: (device_of(m) if device is None else None) or place for number, m in modules.items()}
        if known is not None:
            calibrate_layers(known, layers, shapes, places, inner.dtype)
        longest = getattr(config, "max_position_embeddings", None) or 1 << 20
        explained = tuple(
            _explain_layer(
                layers[number],
                shapes[number],
                mask_of_layer(masks, config, number),
                places[number],
                inner.dtype,
                longest,
            )
            for number in sorted(layers)
        )
        others = sorted(set(range(config.num_hidden_layers)) - set(layers))
        if others:
            notes.append(f"layers {ranges(others)} have no attention to patch: they stay as they are")
    return Explanation(
        model={"class": type(inner).__name__, **facts},
        environment=provenance(),
        device=_device_facts(place),
        native=describe_native(),
        state=_state(inner, running),
        refused=refused,
        decision=decision_of((layers[n], places[n], inner.dtype) for n in sorted(layers)) if layers else "-",
        profile=_profile(method, options, running is not None),
        layers=explained,
        notes=tuple(notes),
    )


def skeleton(name: str | None = None, *, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """A model without its weights, for `explain`; `name` as for `load_model`. Reads config.json alone."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    kind: Any = AutoModelForCausalLM
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and config.get_text_config() is not config:
        kind = AutoModelForImageTextToText
    chosen = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(config, trust_remote_code=trust_remote_code, **chosen)
    except Exception as error:  # whatever a strange configuration makes transformers raise
        raise ValueError(f"no model can be made of {name!r}: {type(error).__name__}: {error}") from error
    return model


def _place(model: PreTrainedModel, device: str | None) -> torch.device:
    if device is None:
        module = next(m for m in model.modules() if next(m.parameters(), None) is not None)
        found = device_of(module)
        return found if found is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        return torch.zeros(1, device=place).device  # "cuda" has become "cuda:0"
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {device!r} here: {error}") from error


def _explain_layer(
    state: PatchedLayer, shape: LayerShape, mask: MaskInfo, device: torch.device, dtype: torch.dtype, longest: int
) -> LayerExplanation:
    settings = state.settings
    kernel, why = kernel_for(shape, device, dtype, settings.impl, settings.block_q, settings.block_k, skips=state.skips)
    if mask.opaque is not None:
        why[kernel or "sparse"] = f"{mask.opaque}: this layer runs on the previous implementation"
        kernel = None
    even = state.break_even(mask, device, dtype, longest) if kernel else None
    pattern = "dense" if state.always_dense else describe_pattern(state.pattern_under(mask))
    return LayerExplanation(
        state.number, _describe_mask(mask), pattern, kernel, why, even,
        shape.query_heads, shape.kv_heads, shape.head_dim, shape.value_dim,
    )  # fmt: skip


def _describe_mask(mask: MaskInfo) -> str:
    if mask.opaque is not None:
        return mask.opaque
    if mask.chunk is not None:
        return f"chunks of {mask.chunk}"
    return "causal" if mask.window is None else f"sliding window of {mask.window}"


def _state(model: PreTrainedModel, running: dict[int, PatchedLayer] | None) -> str:
    if running is not None:
        return f"patched with {next(iter(running.values())).method}"
    if model.config.get_text_config()._attn_implementation == NAME:
        return "not patched; it runs what sparseprefill.register was given"
    return "not patched"


def _device_facts(place: torch.device) -> dict[str, Any]:
    if place.type != "cuda":
        return {"kind": place.type, "name": processor(), "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(place)
    limits = device_limits(place)
    return {
        "kind": "cuda", "name": found.name, "capability": ".".join(map(str, limits.capability)),
        "shared memory a block": limits.shared, "L2 cache": limits.cache, "memory": found.total_memory,
    }  # fmt: skip


def _version_notes() -> Iterator[str]:
    release = Version(transformers.__version__)
    if not Version(TESTED[0]) <= release <= Version(TESTED[1]):
        yield f"transformers {release} is outside of what was tested ({TESTED[0]} to {TESTED[1]})"


def _profile(method: Method | None, options: dict[str, Any], patched: bool) -> str:
    if patched:
        return "see the patterns of the layers"
    if options.get("profile") is not None:
        return f"{options['profile']}"
    return "none given: every head follows the method's default"
