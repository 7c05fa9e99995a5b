"""Training-free sparse attention for the prefill of long-context language models.

    from sparseprefill import patch_model
    with patch_model(model, method="minference") as patch:
        model.generate(**inputs, max_new_tokens=64)
        print(patch.report())

Importing loads nothing heavy and changes nothing; names are resolved when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseprefill.context import FixedContext, prepare_context
    from sparseprefill.context_store import load_context
    from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
    from sparseprefill.doctor import Explanation, explain
    from sparseprefill.huggingface import Patch, patch_model, register
    from sparseprefill.kernels import block_sparse_attention
    from sparseprefill.profile import profile_model

__version__ = "0.1.0"

_HOMES = {
    "AttentionInputs": "sparseprefill.contracts",
    "AttentionOutput": "sparseprefill.contracts",
    "BlockGrid": "sparseprefill.contracts",
    "BlockIndex": "sparseprefill.contracts",
    "Explanation": "sparseprefill.doctor",
    "FixedContext": "sparseprefill.context",
    "Patch": "sparseprefill.huggingface",
    "block_sparse_attention": "sparseprefill.kernels",
    "explain": "sparseprefill.doctor",
    "load_context": "sparseprefill.context_store",
    "patch_model": "sparseprefill.huggingface",
    "prepare_context": "sparseprefill.context",
    "profile_model": "sparseprefill.profile",
    "register": "sparseprefill.huggingface",
}

__all__ = [
    "AttentionInputs",
    "AttentionOutput",
    "BlockGrid",
    "BlockIndex",
    "Explanation",
    "FixedContext",
    "Patch",
    "block_sparse_attention",
    "explain",
    "load_context",
    "patch_model",
    "prepare_context",
    "profile_model",
    "register",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
