"""Models and tokenizers for the evaluations, the small model that ships inside among them."""

from __future__ import annotations

import platform
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

MODEL_INSIDE = "needle_model"
"""Folder in this package that holds the small model which ships with it."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def model_folder(name: str | None) -> str:
    """What to give `from_pretrained`: the folder of the model inside for None, else the name itself."""
    return str(resources.files("sparseprefill") / MODEL_INSIDE) if name is None else name


def load_model(
    name: str | None = None, *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a hub name or a local folder; None: the model inside.

    Raises ValueError with the folder and the reason where it cannot be loaded.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = model_folder(name)
    if name is None and dtype == "auto":  # it ships in bfloat16, which few CPUs compute faster than float32
        dtype = "float32" if device == "cpu" else "bfloat16"
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=_DTYPES[dtype])
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        here = "folder" if Path(path).is_dir() else "name"
        raise ValueError(f"the model {here} {path!r} cannot be loaded: {type(error).__name__}: {error}") from error
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps Module.to without its overloads
    return model.train(False), tokenizer


def provenance(model: PreTrainedModel | None = None) -> dict[str, Any]:
    """What a result depends on besides its settings: versions, processor or GPU, threads."""
    versions = {"python": platform.python_version()}
    for package in ("sparseprefill", "torch", "triton", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    found: dict[str, Any] = {"versions": versions, "threads": torch.get_num_threads(), "processor": processor()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    if model is not None:
        found["model"] = {
            "name": Path(str(model.name_or_path)).name, "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type, "parameters": model.num_parameters(),
        }  # fmt: skip
    return found


def processor() -> str:
    """Processor name and the instruction sets that matter here, where Linux tells them."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = info.read_text(encoding="utf-8").splitlines()
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(wanted)})" if wanted else name
