"""Dense causal attention by others: what a dense kernel is measured against, with versions and reasons for absence.

Timing proves nothing of a rival that was not offered at its best: layouts are changed and programs compiled before
the clock starts, and a rival that cannot run says why instead of being left out in silence.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparseprefill.contracts import AttentionInputs
from sparseprefill.evals.bench import why_no_flex

_FLEX_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Rival:
    """Somebody else's dense causal attention."""

    prepare: Callable[[AttentionInputs], Callable[[], Tensor]]  # gives [batch, query_heads, queries, value_dim] a call
    version: Callable[[], str]
    why_not: Callable[[AttentionInputs], str | None]  # why it cannot be had here, before anything is run


def why_not_causal(inputs: AttentionInputs) -> str | None:
    """Why these inputs are not plain causal attention of whole prompts, all that rivals are asked for, or None."""
    for name in ("softcap", "sinks", "window", "key_valid", "segment"):
        if getattr(inputs, name) is not None:
            return f"rivals are asked for plain causal attention, these inputs have a {name}"
    if inputs.query_start or not inputs.queries == inputs.keys == inputs.filled:
        return "rivals are asked for whole prompts: as many queries as keys, all filled"
    return None


def dense_flops(inputs: AttentionInputs) -> float:
    """FLOPs of both products over the pairs that a causal mask leaves, as published rates count them."""
    pairs = inputs.queries * (inputs.queries + 1) / 2
    return 2 * inputs.batch * inputs.query_heads * pairs * (inputs.head_dim + inputs.value_dim)


def ready(inputs: AttentionInputs) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Calls of the rivals that run on these inputs, by name, each run once; and why the others do not.

    Raises ValueError for inputs that are not plain causal attention.
    """
    reason = why_not_causal(inputs)
    if reason is not None:
        raise ValueError(reason)
    calls: dict[str, Callable[[], Tensor]] = {}
    reasons: dict[str, str] = {}
    for name, rival in RIVALS.items():
        why = rival.why_not(inputs)
        if why is not None:
            reasons[name] = why
            continue
        try:
            call = rival.prepare(inputs)
            call()
        except (RuntimeError, ImportError, NotImplementedError) as error:  # what torch and compilers say of themselves
            reasons[name] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no reason'}"
            )
            continue
        calls[name] = call
    return calls, reasons


def _sdpa(backend: SDPBackend, repeated: bool) -> Rival:
    """One of torch's fused kernels; `repeated`: it takes no grouped heads, so keys are repeated before the clock."""

    def prepare(inputs: AttentionInputs) -> Callable[[], Tensor]:
        key, value = inputs.key, inputs.value
        if repeated:
            key, value = (each.repeat_interleave(inputs.group_size, 1) for each in (key, value))

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(
                    inputs.query, key, value, is_causal=True, scale=inputs.scale, enable_gqa=not repeated
                )

        return run

    return Rival(prepare, lambda: f"torch {torch.__version__}", lambda inputs: None)


def _prepare_flex(inputs: AttentionInputs) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    # as create_block_mask would have it, which looks at every pair: 17 GB at 128k tokens
    tile = torch.arange(-(-inputs.queries // _FLEX_BLOCK), dtype=torch.int32, device=inputs.device)
    # each row lists its own tile first, the others behind it do not count
    diagonal = ((tile[:, None] + tile) % len(tile))[None, None]
    mask = BlockMask.from_kv_blocks(
        torch.ones_like(tile)[None, None], diagonal, tile[None, None],
        tile.expand(len(tile), -1)[None, None].contiguous(), BLOCK_SIZE=_FLEX_BLOCK, mask_mod=causal,
        seq_lengths=(inputs.queries, inputs.keys),
    )  # fmt: skip
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(
        inputs.query, inputs.key, inputs.value, block_mask=mask, scale=inputs.scale, enable_gqa=True
    )


def _prepare_flash(module: str, inputs: AttentionInputs) -> Callable[[], Tensor]:
    """`flash_attn_func` of a package: tokens outside heads, grouped heads as they are."""
    attend = importlib.import_module(module).flash_attn_func
    query, key, value = (each.transpose(1, 2).contiguous() for each in (inputs.query, inputs.key, inputs.value))

    def run() -> Tensor:
        result = attend(query, key, value, softmax_scale=inputs.scale, causal=True)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output.transpose(1, 2)

    return run


def _why_no_flash(module: str, package: str, least: tuple[int, int], inputs: AttentionInputs) -> str | None:
    if inputs.device.type != "cuda":
        return f"it needs a CUDA device, the inputs are on {inputs.device}"
    if inputs.query.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes float16 and bfloat16, not {inputs.query.dtype}"
    if torch.cuda.get_device_capability(inputs.device) < least:
        return f"it needs compute capability {least[0]}.{least[1]}"
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{package} cannot be imported ({error})"
    return None


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}, version unknown"


RIVALS: dict[str, Rival] = {
    "sdpa flash": _sdpa(SDPBackend.FLASH_ATTENTION, False),
    "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION, False),
    "sdpa efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION, True),
    "flex": Rival(
        _prepare_flex, lambda: f"torch {torch.__version__}, compiled", lambda inputs: why_no_flex(inputs.device.type)
    ),
    "flash-attn": Rival(
        functools.partial(_prepare_flash, "flash_attn"), functools.partial(_version, "flash_attn"),
        functools.partial(_why_no_flash, "flash_attn", "flash-attn", (8, 0)),
    ),
    "flash-attn 3": Rival(
        functools.partial(_prepare_flash, "flash_attn_interface"), functools.partial(_version, "flash_attn_3"),
        functools.partial(_why_no_flash, "flash_attn_interface", "flash-attn 3", (9, 0)),
    ),
}  # fmt: skip
"""By the name that a report gives them."""
