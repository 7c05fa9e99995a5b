"""The Hugging Face seam: one reversible call lets a stock model prefill sparsely.

A stateless attention function and a mask function are registered under one name. transformers hands them queries and
keys after RoPE and QK-norm, grouped heads not repeated, the cache updated; nothing of a model's own code is copied.
What a patched layer needs to know hangs on its attention module, so that two models with different methods coexist.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparseprefill import huggingface_masks as masks
from sparseprefill.contracts import AttentionInputs, BlockGrid
from sparseprefill.guard import GuardLog
from sparseprefill.huggingface_activations import (
    check_activations,
    check_last_logits,
    chunk_mlps,
    chunkable_mlps,
    keep_last_logits,
)
from sparseprefill.huggingface_layers import (
    COUNTING,
    LAYERS,
    PatchedLayer,
    Settings,
    calibrate_layers,
    decision_of,
    layer_cost,
)
from sparseprefill.huggingface_masks import NAME, MaskInfo, MaskSettings
from sparseprefill.huggingface_modules import (
    STATE,
    LayerShape,
    attention_modules,
    chooses_its_keys,
    device_of,
    implementations_of,
    kernel_for,
    layer_shapes,
    model_facts,
    nested_configs,
    tensor_parallel,
    text_config,
    unwrap,
)
from sparseprefill.huggingface_weights import files_hash, weights_hash, weights_warnings
from sparseprefill.kernels import choose_implementation
from sparseprefill.patterns import Dense, LastRowsDense, ModelPatterns, Pattern, PerHead
from sparseprefill.patterns.parts import parts_of
from sparseprefill.patterns.per_head import of_heads
from sparseprefill.prefill import (
    check_guarded,
    describe_pattern,
    named_method,
    resolve_method,
    sparse_prefill,
)
from sparseprefill.reports import PatchReport

Method = str | Pattern | ModelPatterns


class Patch:
    """A patched model, made by `patch_model`. Leaving the `with` block, or `remove()`, puts everything back as it was.

    `model` is the patched model itself.
    """

    def __init__(
        self, model: PreTrainedModel, layers: dict[int, PatchedLayer], undo: list[Callable[[], None]],
        warned: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.model = model
        self._layers = layers
        self._undo = undo
        self._warned = warned

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def active(self) -> bool:
        """False once it was removed."""
        return bool(self._undo)

    def remove(self) -> None:
        """Restore the model's configuration object and attention modules. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    @property
    def layers(self) -> dict[int, PatchedLayer]:
        """The state of each patched layer, by its number."""
        return dict(self._layers)

    def undo(self, action: Callable[[], None]) -> None:
        """Let `remove` do this too, first of all."""
        self._undo.append(action)

    @property
    def patterns(self) -> dict[int, Pattern]:
        """What each patched layer follows, by its number, as the method was resolved for this model."""
        return {number: layer.pattern for number, layer in self._layers.items()}

    def report(self) -> PatchReport:
        """What every layer and head did since the patch (or `reset()`)."""
        layers = list(self._layers.values())
        modules = {layer.key: m for m in self.model.modules() if (layer := getattr(m, STATE, None)) is not None}

        def place(layer: PatchedLayer) -> tuple[torch.device, torch.dtype]:
            module = modules.get(layer.key)  # None after the patch was removed
            return (module and device_of(module)) or self.model.device, self.model.dtype

        decision = decision_of((layer, *(layer.decided or place(layer))) for layer in layers)
        return PatchReport(layers[0].method, decision, tuple(layer.report() for layer in layers), dict(self._warned))

    def observe(self, on: bool) -> None:
        """Switch the counting of density, kept mass and times on or off; calls are always counted."""
        for layer in self._layers.values():
            layer.settings = dataclasses.replace(layer.settings, observe=on)

    def reset(self) -> None:
        """Forget what was counted so far."""
        with COUNTING:
            for layer in self._layers.values():
                layer.sparse_calls, layer.decided = 0, None
                for counted in (layer.previous_calls, layer.kernels, layer.timings, layer.sums):
                    counted.clear()
                layer.guard = GuardLog()

    def _raise_on_nan(self, *_: Any) -> None:
        """After a forward pass on a GPU: one read of the flags that its layers set."""
        flags = [(layer.number, layer.nan) for layer in self._layers.values() if layer.nan is not None]
        for layer in self._layers.values():
            layer.nan = None
        if flags and bool(torch.stack([flag.to(flags[0][1].device) for _, flag in flags]).any()):
            _nan_error(next(number for number, flag in flags if bool(flag)))


def patch_model(
    model: PreTrainedModel,
    method: Method | None = None,
    *,
    profile: str | Path | None = None,
    strict: bool = False,
    dense_layers: Sequence[int] = (),
    layers: Mapping[int, Method] | None = None,
    heads: Mapping[tuple[int, int], Method] | None = None,
    last_rows_dense: int = 0,
    block_q: int = 64,
    block_k: int = 64,
    impl: str = "auto",
    min_length: int | None = None,
    observe: bool = True,
    sample_rows: int = 16,
    min_mass: float | None = None,
    calibration: str | Path | None = None,
    mlp_chunk: int | None = None,
    last_logits: bool = False,
    context: Any = None,
    **options: Any,
) -> Patch:
    """Let a stock Hugging Face model prefill long prompts sparsely, until the returned handle is removed.

        with patch_model(model, method="vertical_slash", density=0.2) as patch:
            model.generate(**inputs)
            print(patch.report())

    Calls with fewer than `block_q` queries (decoding) and calls for which sparse attention is not expected to be
    cheaper run on the implementation the model had before; the report counts them with the reason.

    Args:
        model: any model whose attention dispatches through transformers' attention interface.
        method: a name of `sparseprefill methods`, or an object with `build_index(inputs, grid) -> BlockIndex`. None:
            what a `profile` gives each head, or else the provisional default (`sparseprefill.patterns.methods`).
        profile: the file of a profile, for method "minference": a pattern for each head; for method "sale": its
            threshold.
        strict: refuse a profile that was not made for the very weights of this model, instead of warning.
        dense_layers: layers that stay as they were (negative numbers count from the end).
        layers: other methods for some layers, `{layer: method}`.
        heads: other methods for some query heads, `{(layer, head): method}`.
        last_rows_dense: that many last queries of each call attend densely.
        block_q, block_k: tokens a tile.
        impl: "auto", "triton", "cpu" or "reference".
        min_length: sparse from that many keys on; None lets the cost model decide, the calibrated one where the
            machine was calibrated for layers like these, on the device and in the dtype that the model has now.
        observe: count density, kept mass and times for `report()`.
        sample_rows: queries a call on which kept mass is measured against dense attention; 0 for none.
        min_mass: guard: a head whose kept mass, sampled in each call, is below this runs again with full rows.
        calibration: the file that `sparseprefill bench --calibrate` wrote; None: the one where it writes by default,
            if it is there. Read once, here.
        mlp_chunk: MLPs compute that many tokens at a time, so that a long prompt's activations do not decide which
            length fits. Exact up to rounding, as each token is computed for itself; None: as they were.
        last_logits: the last token's logits alone, where the caller gives neither `logits_to_keep` nor `labels`.
        context: what `prepare_context` or `load_context` gave: questions and answers attend to what its method chooses.
            Of the other arguments it goes with `observe`, `sample_rows`, `mlp_chunk` and `last_logits`.
        options: of the method.

    Raises:
        TypeError, ValueError: unknown method or option, layers or heads that do not exist, a profile of another model,
            a damaged calibration.
        FileNotFoundError, PermissionError: a profile that is not there or may not be read.
        NotImplementedError: the model, or its head_dim, cannot be served; the message says what to do.

    A model that was refused is exactly as it was. While patched, a forward pass raises NotImplementedError for what
    sparse attention has not (`output_attentions`, dropout, gradients), FloatingPointError where queries or keys are
    NaN, and ValueError for a batch row that is padding only.
    """
    if context is not None:
        others = {
            "profile": profile, "strict": strict, "dense_layers": dense_layers, "layers": layers, "heads": heads,
            "last_rows_dense": last_rows_dense, "min_length": min_length, "min_mass": min_mass,
            "calibration": calibration, "impl": None if impl == "auto" else impl,
            "block_q": None if block_q == 64 else block_q, "block_k": None if block_k == 64 else block_k,
        }  # fmt: skip
        given = [name for name, value in others.items() if value not in (None, False, (), [], {}, 0)] + list(options)
        if given:
            raise ValueError(
                f"{', '.join(given)}: a context was prepared with its own options, and takes none of these"
            )
        patched: Patch = context.patch(
            model, method, observe=observe, sample_rows=sample_rows, mlp_chunk=mlp_chunk, last_logits=last_logits
        )
        return patched
    settings = Settings(block_q, block_k, impl, min_length, observe, sample_rows, min_mass)
    known = settings.calibration(calibration)
    plan = plan_patch(
        model, method, profile=profile, strict=strict, dense_layers=dense_layers, layers=layers, heads=heads,
        last_rows_dense=last_rows_dense, settings=settings, mlp_chunk=mlp_chunk, last_logits=last_logits, **options,
    )  # fmt: skip
    for text in plan.warnings:
        warnings.warn(text, UserWarning, stacklevel=2)
    inner = plan.model
    if known is not None:
        places = {number: device_of(module) for number, module in plan.modules.items()}
        calibrate_layers(known, plan.layers, plan.shapes, places, inner.dtype)
    _register_functions()
    undo: list[Callable[[], None]] = []
    patch = Patch(inner, plan.layers, undo, plan.warnings)
    try:
        _use_private_config(inner, undo)
        private = text_config(inner)
        masks.bind_config(private, MaskSettings(plan.previous, block_q))
        undo.append(functools.partial(masks.unbind_config, private))
        _switch(inner, private)
        for number, module in plan.modules.items():
            if hasattr(module, STATE):  # loaded under our name: that method comes back
                undo.append(functools.partial(setattr, module, STATE, getattr(module, STATE)))
            else:
                undo.append(functools.partial(delattr, module, STATE))
            setattr(module, STATE, plan.layers[number])
        hook = inner.base_model.register_forward_hook(patch._raise_on_nan)  # wrappers may go round the outer forward
        undo.append(hook.remove)
        for outer in {id(m): m for m in (inner, inner.base_model)}.values():
            undo.append(outer.register_forward_pre_hook(_refuse_attentions, with_kwargs=True).remove)
        _refuse_continuous_batching(inner, undo)
        if mlp_chunk is not None:
            chunk_mlps(plan.mlps, mlp_chunk, undo)
        if last_logits:
            keep_last_logits(inner, undo)
    except BaseException:
        patch.remove()
        raise
    return patch


@dataclass(frozen=True, slots=True)
class PatchPlan:
    """What `patch_model` would do to a model; making one changes nothing."""

    model: PreTrainedModel  # without its wrappers
    config: PreTrainedConfig  # of the language model
    previous: str  # the attention implementation of before
    modules: dict[int, nn.Module]
    shapes: dict[int, LayerShape]
    layers: dict[int, PatchedLayer]
    mlps: list[nn.Module] = field(default_factory=list)  # that are to compute in chunks of tokens
    warnings: dict[str, int] = field(default_factory=dict)  # what is to be warned of, how often


def plan_patch(
    model: Any, method: Method | None, *, profile: str | Path | None = None, strict: bool = False,
    dense_layers: Sequence[int] = (), layers: Mapping[int, Method] | None = None,
    heads: Mapping[tuple[int, int], Method] | None = None, last_rows_dense: int = 0, settings: Settings | None = None,
    mlp_chunk: int | None = None, last_logits: bool = False, **options: Any,
) -> PatchPlan:  # fmt: skip
    """Everything that can be checked and prepared before a model is touched. Raises what `patch_model` raises."""
    settings = settings or Settings()
    check_activations(mlp_chunk, last_logits)
    method, options = named_method(method, profile, options)
    wrapped, model = model, unwrap(model)
    _check_overrides(dense_layers, layers, heads)
    pattern = _resolve(method, profile, last_rows_dense, options)
    config = text_config(model)
    modules = attention_modules(model, config)
    if getattr(config, "output_attentions", False):
        raise NotImplementedError(_NO_ATTENTIONS)
    for module in modules.values():
        if chooses_its_keys(module):
            raise NotImplementedError(_OWN_KEYS.format(type(module).__name__))
    facts = model_facts(config)
    for entry in [pattern, *(layers or {}).values(), *(heads or {}).values()]:
        if isinstance(entry, ModelPatterns) and entry in (heads or {}).values():
            raise ValueError("heads: a single head takes a pattern, not the profile of a whole model")
        mismatch = entry.mismatch(facts) if isinstance(entry, ModelPatterns) else None
        if mismatch:
            raise ValueError(f"this profile is of another model: {mismatch}")
    profiles = [each for each in (pattern, *(layers or {}).values()) if isinstance(each, ModelPatterns)]
    doubts = weights_warnings(profiles, functools.partial(weights_hash, wrapped), strict)
    doubts |= _tile_warnings(profiles, settings)
    part = tensor_parallel(model)
    shapes = layer_shapes(modules, config, part)
    last = max(modules) + 1
    stay_dense = {n % last for n in dense_layers} - {n % last for n, _ in heads or {}}

    def check_kernel(number: int, *, skips: bool = False) -> None:
        device = device_of(modules[number])
        if number in stay_dense or device is None:
            return
        kernel, reasons = kernel_for(
            shapes[number], device, model.dtype, settings.impl, settings.block_q, settings.block_k, skips=skips
        )
        if kernel is None:
            asked = {name: why for name, why in reasons.items() if settings.impl in ("auto", name)}
            raise NotImplementedError(
                f"layer {number} of {type(model).__name__} cannot be served: "
                + "; ".join(f"{name}: {why}" for name, why in asked.items())
                + f". dense_layers=[{number}] would leave it as it is"
            )

    for number in modules:
        check_kernel(number)
    all_heads = {number: shape.query_heads * part.ranks for number, shape in shapes.items()}
    chosen = _patterns_of_layers(pattern, all_heads, dense_layers, layers, heads, last_rows_dense)
    chosen = {number: of_heads(each, part.of(all_heads[number])) for number, each in chosen.items()}
    places = {number: device_of(module) for number, module in modules.items()}
    skipping = {n: tried_pattern(chosen[n], shapes[n], places[n], settings) for n in chosen}
    if any(skipping.values()):  # a local layer computes its whole window
        known = masks.masks_of(model, 2 * settings.block_q)
        for number in skipping:
            skipping[number] &= masks.mask_of_layer(known, config, number).local is None
            if skipping[number]:
                check_kernel(number, skips=True)

    mlps = chunkable_mlps(model, modules) if mlp_chunk is not None else []
    if last_logits:
        check_last_logits(model)
    previous = _previous_implementation(model, config)
    name = method if isinstance(method, str) else describe_pattern(method)
    states = {
        number: PatchedLayer(
            number, chosen[number], number in stay_dense, settings, previous, name, shapes[number].head_dim,
            first_head=part.of(all_heads[number]).start, skips=skipping[number],
        )
        for number in sorted(modules)
    }  # fmt: skip
    return PatchPlan(model, config, previous, modules, shapes, states, mlps, doubts)


def _resolve(
    method: Method, profile: str | Path | None, last_rows_dense: int, options: dict[str, Any]
) -> Pattern | ModelPatterns:
    """The method with its options, of which the profile is one. Raises ValueError for a profile with another method."""
    if profile is None:
        return resolve_method(method, last_rows_dense=last_rows_dense, **options)
    if method not in ("minference", "sale"):
        name = method if isinstance(method, str) else type(method).__name__
        raise ValueError(
            "a profile brings its own patterns: it goes with the methods 'minference' and 'sale' alone, not with "
            f"{name}"
        )
    return resolve_method(method, last_rows_dense=last_rows_dense, profile=profile, **options)


def _tile_warnings(profiles: Iterable[ModelPatterns], settings: Settings) -> dict[str, int]:
    """What is to be said of profiles that were scored with other tiles than these settings have; how often."""
    said: dict[str, int] = {}
    for profile in profiles:
        block = profile.made.get("block")
        if type(block) is int and (block, block) != (settings.block_q, settings.block_k):
            text = (
                f"the profile was made with tiles of {block} x {block}, and runs with {settings.block_q} x "
                f"{settings.block_k}: its heads keep and compute something else than it says; use block_q={block} and "
                f"block_k={block}, or make it again with --block"
            )
            said[text] = said.get(text, 0) + 1
    return said


def _check_overrides(dense_layers: Any, layers: Any, heads: Any) -> None:
    """Raises TypeError where the three overrides are not what they should be."""

    def number(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    if isinstance(dense_layers, str) or not isinstance(dense_layers, Iterable) or not all(map(number, dense_layers)):
        raise TypeError(f"dense_layers must be a list of layer numbers, got {dense_layers!r}")
    if layers is not None and not (isinstance(layers, Mapping) and all(map(number, layers))):
        raise TypeError(f"layers must be {{layer number: method}}, got {layers!r}")
    if heads is None:
        return
    if not isinstance(heads, Mapping) or not all(
        isinstance(key, tuple) and len(key) == 2 and all(map(number, key)) for key in heads
    ):
        raise TypeError(f"heads must be {{(layer number, head): method}}, got {heads!r}")


def patched_layers(model: nn.Module) -> dict[int, PatchedLayer] | None:
    """What the layers of a patched model do, by number; None for one that is not patched, registered or not."""
    states = [getattr(module, STATE) for module in model.modules() if hasattr(module, STATE)]
    return {state.number: state for state in states if not state.registered} or None


def _refuse_attentions(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Some models swallow the argument and would return nothing for it."""
    if options.get("output_attentions"):
        raise NotImplementedError(_NO_ATTENTIONS)


def _refuse_continuous_batching(model: PreTrainedModel, undo: list[Callable[[], None]]) -> None:
    """Its entry points raise in the caller's thread: later it would switch the model to flash attention, or log."""
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        if hasattr(model, name):
            if name in vars(model):
                undo.append(functools.partial(setattr, model, name, vars(model)[name]))
            else:
                undo.append(functools.partial(delattr, model, name))
            setattr(model, name, _refuse_paged)


_REGISTERED: dict[str, Any] = {}
_NO_ATTENTIONS = (
    "output_attentions=True: sparse attention never has the whole matrix; switch it off, or do without the patch"
)


_COPIED = (
    "the configuration of this patched model was replaced (a copy of the model, perhaps): "
    "remove the patch before copying a model, and patch the copy"
)
_OWN_KEYS = (
    "{} chooses the keys of each query itself, by the name of the attention implementation, so it cannot be patched: "
    "run it without the patch"
)


def register(
    method: Method | None = None,
    *,
    profile: str | Path | None = None,
    previous: str = "sdpa",
    calibration: str | Path | None = None,
    **options: Any,
) -> None:
    """Serve `from_pretrained(..., attn_implementation="sparseprefill")` with this method from now on.

    `previous` is the implementation that decoding and short prompts run on; models that transformers itself runs on
    eager (GPT-OSS) need "eager". Takes the method's options, `profile`, `last_rows_dense`, `block_q`, `block_k`,
    `impl`, `min_length` and `min_mass` of `patch_model`. There is no handle, so nothing is observed; for a report,
    patch the model instead. `calibration` is that of `patch_model`, read now.
    Raises ValueError and TypeError as `patch_model` does; what a model cannot serve shows in its first forward pass,
    as does the warning that a profile was made for other weights.
    """
    for name, reason in (
        ("observe", "there is no handle to read a report from"),
        ("sample_rows", "there is no handle to read a report from"),
        ("strict", "the model is not known yet"),
        ("mlp_chunk", "there is no model yet whose MLPs could be looked at"),
        ("last_logits", "there is no model yet whose logits could be looked at"),
    ):
        if name in options:
            raise ValueError(f"register takes no {name}: {reason}; patch the model instead")
    shared = {name: options.pop(name) for name in list(options) if name in Settings.__dataclass_fields__}
    settings = Settings(**shared, observe=False)
    known = settings.calibration(calibration)
    last_rows_dense = options.pop("last_rows_dense", 0)
    method, options = named_method(method, profile, options)
    pattern = _resolve(method, profile, last_rows_dense, options)
    check_guarded(pattern, settings.guard)
    for text in _tile_warnings([pattern] if isinstance(pattern, ModelPatterns) else [], settings):
        warnings.warn(text, UserWarning, stacklevel=2)
    if previous not in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()) or previous == NAME:
        raise ValueError(f"previous must be an attention implementation of transformers, got {previous!r}")
    _REGISTERED.update(
        pattern=pattern, settings=settings, previous=previous,
        method=method if isinstance(method, str) else describe_pattern(method), calibration=known,
    )  # fmt: skip
    masks.set_default_settings(MaskSettings(previous, settings.block_q))
    _register_functions()


def _register_functions() -> None:
    AttentionInterface.register(NAME, _attend)
    AttentionInterface.register(f"paged|{NAME}", _refuse_paged)
    masks.register_mask()


def _refuse_paged(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "continuous batching (generate_batch) keeps keys in pages, which sparseprefill does not read: "
        "use generate, or remove the patch"
    )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function under our name: (output [batch, queries, heads, value_dim], None).

    In a compiled model, decoding stays inside the compiled graph; a prefill leaves it for our kernels.
    """
    if kwargs.get("indices") is not None or kwargs.get("block_indices") is not None:
        raise NotImplementedError(_OWN_KEYS.format(type(module).__name__))
    if torch.compiler.is_compiling() and not isinstance(attention_mask, MaskInfo):
        layer = getattr(module, STATE, None)
        if layer is not None and layer.copied:
            raise RuntimeError(_COPIED)
        if layer is not None:
            _note_compiled(layer.key, query.shape[2] < layer.settings.block_q)
        return _run_previous(layer, module, query, key, value, attention_mask, scaling, dropout, kwargs)
    attend = _attend_outside_of_graphs if torch.compiler.is_compiling() else _attend_eagerly
    result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _note_compiled(key: int, decoding: bool) -> bool:
    """Runs while a graph is made, not when it runs: it takes a number because the compiler takes no objects here."""
    layer = LAYERS.get(key)
    if layer is not None:
        if decoding:
            layer.note_previous("compiled decoding (counted once a graph)")
        else:
            layer.note_previous("compiled with a mask of the caller's own (counted once a graph)")
    return True


def _attend_eagerly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    dtype = query.dtype  # of the attention: rotated queries and keys come in float32 under autocast
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    layer = getattr(module, STATE, None)
    if layer is None:
        shape = LayerShape(query.shape[1], key.shape[1], query.shape[-1], value.shape[-1])
        local = isinstance(attention_mask, MaskInfo) and attention_mask.local is not None
        layer = _registered_layer(module, shape, query.device, dtype, local)
    if kwargs.get("output_attentions"):
        raise NotImplementedError(_NO_ATTENTIONS)
    strange = (
        layer is not None and not layer.registered and masks.bound_settings(getattr(module, "config", None)) is None
    )
    if layer is not None and (layer.copied or strange):
        raise RuntimeError(_COPIED)
    if layer is not None and layer.registered and layer.nan is not None:
        flag, layer.nan = layer.nan, None
        if bool(flag):
            _nan_error(layer.number)
    back = functools.partial(_run_previous, layer, module, query, key, value, attention_mask, scaling, dropout, kwargs)
    if layer is None:
        return back()
    if layer.context is not None:
        _refuse_training(layer, dropout, query, key, value)
        _watch_for_nan(layer, query, key)
        served = layer.context.attend(layer, query, key, value, attention_mask, scaling, kwargs)
        return served.to(query.dtype).transpose(1, 2).contiguous(), None
    queries = query.shape[2]
    reason = _why_previous(layer, module, query, key, attention_mask, kwargs)
    if reason is None:
        keys = min(key.shape[2], attention_mask.query_start + queries)  # a static cache is longer than what it holds
        layer.decided = query.device, dtype
        reason = layer.choice(queries, keys, attention_mask, *layer.decided)
    if reason is not None:
        layer.note_previous(reason)
        return back()
    _refuse_training(layer, dropout, query, key, value)
    info = attention_mask.on(query.device)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (t.to(dtype) for t in (query, key, value))
    inputs = AttentionInputs(
        query, key, value,
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        window=info.window,
        key_valid=info.key_valid,
        query_start=info.query_start,
        key_length=min(keys, info.query_start + queries),
        segment=info.segment,
    )  # fmt: skip
    _watch_for_nan(layer, inputs.query, inputs.key)
    settings = layer.settings
    prefill = sparse_prefill(
        inputs, layer.pattern_under(info), block_q=settings.block_q, block_k=settings.block_k, impl=settings.impl,
        observe=settings.observe, sample_rows=settings.sample_rows, guard=settings.guard,
        draw=f"{layer.number}/{layer.sparse_calls}",
    )  # fmt: skip
    impl = settings.impl
    if impl == "auto":  # tiles that may be skipped, and how large they are, decide with the inputs
        part = next((part for part in prefill.parts if part.index.skip is not None), prefill.parts[0])
        impl = choose_implementation(part.inputs, part.index)
    layer.note(prefill, impl)
    output = prefill.result.output
    assert output is not None
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def _refuse_training(layer: PatchedLayer, dropout: float, *tensors: Tensor) -> None:
    """Raises NotImplementedError for what sparse attention has not."""
    if dropout:
        raise NotImplementedError(
            f"layer {layer.number}: attention dropout ({dropout}) in training mode: call model.eval()"
        )
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        raise NotImplementedError("sparse prefill has no backward pass: run the model under torch.no_grad()")


_attend_outside_of_graphs = torch.compiler.disable(_attend_eagerly)  # whose wrapper takes time in every call


def _why_previous(
    layer: PatchedLayer, module: nn.Module, query: Tensor, key: Tensor, attention_mask: Any, kwargs: dict[str, Any]
) -> str | None:
    """Why a call cannot be ours, or None."""
    if query.shape[2] < layer.settings.block_q:
        return "fewer queries than a block (decoding)"
    if not isinstance(attention_mask, MaskInfo):
        return "no mask from transformers" if attention_mask is None else "a mask of the caller's own"
    if attention_mask.opaque is not None:
        return attention_mask.opaque
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        return "not causal"
    if kwargs.get("position_bias") is not None:
        return "position bias"
    if attention_mask.keys != key.shape[2] or attention_mask.queries != query.shape[2]:
        raise NotImplementedError(
            f"layer {layer.number} has {query.shape[2]} queries and {key.shape[2]} keys, its mask was made for "
            f"{attention_mask.queries} and {attention_mask.keys}: {type(module).__name__} changes them behind "
            "transformers' attention interface, so it cannot be patched; run it without the patch"
        )
    return None


def _run_previous(
    layer: PatchedLayer | None, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None, dropout: float, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The implementation the model had before, with that implementation's own mask."""
    if layer is not None:
        previous = layer.previous
    else:  # a module of a patched model that is no self-attention layer of it
        bound = masks.bound_settings(getattr(module, "config", None))
        if bound is None:
            raise RuntimeError(
                f"{type(module).__name__} runs under the name {NAME!r}, but nothing was registered for it: call "
                "sparseprefill.register(...) before loading a model by that name, or patch_model on the loaded one"
            )
        previous = bound.previous
    if isinstance(attention_mask, MaskInfo):
        attention_mask = attention_mask.previous_mask(previous)
    if isinstance(attention_mask, Tensor) and attention_mask.device != query.device:
        attention_mask = attention_mask.to(query.device)
    interface, eager = implementations_of(module)
    if previous == "eager" and eager is None:
        raise NotImplementedError(f"{type(module).__name__} has no eager attention function to go back to")
    function: Callable[..., Any] = eager if previous == "eager" else interface[previous]
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return result


def _registered_layer(
    module: nn.Module, shape: LayerShape, device: torch.device, dtype: torch.dtype, local: bool
) -> PatchedLayer | None:
    """State for a module of a model that was loaded under our name; None where `register` was not called for it.

    `local`: it sees a window or chunks alone.
    """
    if not _REGISTERED or not isinstance(getattr(module, "layer_idx", None), int):
        return None
    previous = _REGISTERED["previous"]
    if previous == "sdpa" and not _supports(module, "_supports_sdpa"):
        raise NotImplementedError(
            f"{type(module).__name__} does not run on sdpa: call sparseprefill.register(..., previous='eager')"
        )
    pattern = _REGISTERED["pattern"]
    config = getattr(module, "config", None)
    mismatch = pattern.mismatch(model_facts(config)) if isinstance(pattern, ModelPatterns) and config else None
    if mismatch:
        raise ValueError(f"the registered profile is of another model: {mismatch}")
    if isinstance(pattern, ModelPatterns) and config is not None and masks.bound_settings(config) is None:
        for text in weights_warnings([pattern], functools.partial(files_hash, config, module)):
            warnings.warn(text, UserWarning, stacklevel=2)
    number = module.layer_idx
    assert isinstance(number, int)
    chosen, settings = _for_layer(pattern, number), _REGISTERED["settings"]
    layer = PatchedLayer(
        number, chosen, False, settings, previous, _REGISTERED["method"], shape.head_dim, registered=True
    )
    known = _REGISTERED["calibration"]
    if known is not None:
        layer.skips = not local and tried_pattern(chosen, shape, device, settings)
        layer.cost = layer_cost(known, settings, shape, device, dtype, skips=layer.skips)
    setattr(module, STATE, layer)
    if config is not None and masks.bound_settings(config) is None:  # a later `register` is for other models
        masks.bind_config(config, MaskSettings(previous, layer.settings.block_q))
    return layer


def _supports(module: nn.Module, flag: str) -> bool:
    """A class flag of the family this attention module belongs to."""
    classes = vars(sys.modules[type(module).__module__]).values()
    families = [
        c for c in classes if isinstance(c, type) and issubclass(c, PreTrainedModel) and c is not PreTrainedModel
    ]
    return all(getattr(family, flag, False) for family in families)


def _watch_for_nan(layer: PatchedLayer, query: Tensor, key: Tensor) -> None:
    """On the CPU raise at once, on a GPU set a flag that is read once after the forward pass."""
    nan = query.isnan().any() | key.isnan().any()
    if query.device.type == "cpu":
        if nan:
            _nan_error(layer.number)
    else:
        layer.nan = nan if layer.nan is None else layer.nan | nan


def _nan_error(layer: int) -> None:
    raise FloatingPointError(
        f"the queries or keys of layer {layer} contain NaN, so no block can be chosen: "
        "check the model's weights and dtype (float16 overflows where bfloat16 does not)"
    )


def _for_layer(pattern: Any, layer: int) -> Pattern:
    own = getattr(pattern, "for_layer", None)
    result: Pattern = own(layer) if callable(own) else pattern
    return result


def _patterns_of_layers(
    pattern: Pattern | ModelPatterns,
    query_heads: Mapping[int, int],
    dense_layers: Sequence[int],
    layers: Mapping[int, Method] | None,
    heads: Mapping[tuple[int, int], Method] | None,
    last_rows_dense: int,
) -> dict[int, Pattern]:
    """The pattern of each layer, overrides applied. Raises ValueError for layers and heads that do not exist."""
    last = max(query_heads) + 1
    chosen: dict[int, Pattern] = {number: _for_layer(pattern, number) for number in sorted(query_heads)}

    def existing(number: int, what: str) -> int:
        real = number + last if number < 0 else number
        if real not in chosen:
            raise ValueError(f"{what}: there is no attention layer {number} (layers are 0 to {last - 1})")
        return real

    named: dict[int, str] = {}

    def once(number: int, what: str) -> int:
        real = existing(number, what)
        if real in named:
            raise ValueError(f"layer {real} is named twice, in {named[real]} and in {what}: once is enough")
        named[real] = what
        return real

    for number, method in (layers or {}).items():
        real = once(number, "layers")
        chosen[real] = _for_layer(resolve_method(method, last_rows_dense=last_rows_dense), real)
    for number in dense_layers:
        chosen[once(number, "dense_layers")] = Dense()
    for (number, head), method in (heads or {}).items():
        real = existing(number, "heads")
        if not 0 <= head < query_heads[real]:
            raise ValueError(f"heads: there is no query head {head} (heads are 0 to {query_heads[real] - 1})")
        each = list(_each_head(chosen[real], query_heads[real]))
        each[head] = _for_layer(resolve_method(method, last_rows_dense=last_rows_dense), real)
        chosen[real] = PerHead(tuple(each))
    return chosen


def _each_head(pattern: Pattern, heads: int) -> tuple[Pattern, ...]:
    """The pattern of every head of a layer, one by one."""
    if isinstance(pattern, PerHead):
        return pattern.patterns
    if isinstance(pattern, LastRowsDense):
        return tuple(dataclasses.replace(pattern, pattern=each) for each in _each_head(pattern.pattern, heads))
    return (pattern,) * heads


def tried_pattern(pattern: Pattern, shape: LayerShape, place: torch.device | None, settings: Settings) -> bool:
    """Whether the lists of a pattern let the kernel skip tiles: asked with two blocks of zeros where a layer runs.

    What a pattern refuses is refused here, before the model is changed. Without a place the CPU is taken: a layer that
    has no weights yet. A wrapper may leave so short a prompt as it is, so that what it goes around is asked too.
    """
    tokens = 2 * max(settings.block_q, settings.block_k)
    device = torch.device("cpu") if place is None or place.type == "meta" else place
    query = torch.zeros(1, shape.query_heads, tokens, shape.head_dim, device=device)
    key = torch.zeros(1, shape.kv_heads, tokens, shape.head_dim, device=device)
    value = torch.zeros(1, shape.kv_heads, tokens, shape.value_dim, device=device)
    inputs = AttentionInputs(query, key, value, scale=1.0)
    grid = BlockGrid.of(inputs, settings.block_q, settings.block_k)
    there = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with there, torch.no_grad(), torch.autocast(device.type, enabled=False):  # as in a prefill
        own: Any = pattern
        while True:
            if any(part.index.skip is not None for part in parts_of(own, inputs, grid)):
                return True
            own = getattr(own, "inner", getattr(own, "pattern", None))
            if not callable(getattr(own, "build_index", None)):
                return False


def _previous_implementation(model: PreTrainedModel, config: PreTrainedConfig) -> str:
    previous: str | None = config._attn_implementation
    if previous is None or previous == NAME:  # loaded under our name: what transformers would have chosen
        previous = _REGISTERED.get("previous") or ("sdpa" if model._supports_sdpa else "eager")
    if previous.startswith("paged|"):
        raise NotImplementedError(f"the model runs on {previous!r} (continuous batching), which cannot be patched")
    return previous


def _use_private_config(model: PreTrainedModel, undo: list[Callable[[], None]]) -> None:
    """Give the model a copy of its configuration: another model made from the same object must not switch with it."""
    original = model.config
    memo: dict[int, Any] = {}
    private = copy.deepcopy(original, memo)
    replaced = {id(config): memo.get(id(config)) for config in nested_configs(original)}
    replaced[id(original)] = private
    pairs = [
        (config, replaced[id(config)]) for config in nested_configs(original) if replaced.get(id(config)) is not None
    ]
    undo.append(functools.partial(_carry_back, [(old, new, dict(vars(new))) for old, new in pairs]))
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig) and replaced.get(id(value)) is not None:
                setattr(module, name, replaced[id(value)])
                undo.append(functools.partial(setattr, module, name, value))


def _carry_back(configs: list[tuple[Any, Any, dict[str, Any]]]) -> None:
    """What was changed in the private configurations while the model was patched (resized embeddings, say) stays."""
    for original, private, before in configs:
        for name, value in vars(private).items():
            if name.startswith("_attn_implementation") or isinstance(value, PreTrainedConfig):
                continue
            if name not in before or (before[name] is not value and before[name] != value):
                vars(original)[name] = value


def _switch(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Set our name for the language model alone, and make sure that it took effect.

    `set_attn_implementation` would also switch every model that happens to be a submodule, on its own configuration.
    """
    config._attn_implementation_internal = NAME
    if config._attn_implementation != NAME:
        raise NotImplementedError(
            f"{type(model).__name__} did not accept an attention implementation: it cannot be patched"
        )
