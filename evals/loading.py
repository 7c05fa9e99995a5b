"""Models and tokenizers for the evaluations, the small model that ships inside among them."""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from sparseprefill.calibration import processor
from sparseprefill.files import shown
from sparseprefill.patterns.store import INSIDE, MOST_HEADS, MOST_LAYERS

MODEL_INSIDE = "needle_model"
"""Folder in this package that holds the small model which ships with it."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def model_folder(name: str | None) -> str:
    """What to give `from_pretrained`: the folder of the model inside for None or "inside", else the name itself."""
    return str(resources.files("sparseprefill") / MODEL_INSIDE) if name in (None, INSIDE) else str(name)


def resolve_dtype(name: str | None, dtype: str, device: str) -> str:
    """What `load_model` makes of a dtype; "auto" stays for models that say themselves what they are."""
    if name in (None, INSIDE) and dtype == "auto":  # it ships in bfloat16, which few CPUs compute faster than float32
        return "float32" if device == "cpu" else "bfloat16"
    return dtype


def check_device(device: str) -> None:
    """Raise ValueError for what torch does not know, or cannot use here."""
    try:
        torch.zeros(1, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(f"there is no device {device!r} here ({reason}): choose cpu, or cuda with a GPU") from error


def load_model(
    name: str | None = None, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a hub name or a local folder; None or "inside": the model inside.

    Weights are read from safetensors alone, never from pickles, and no code of the model's own is run unless
    `trust_remote_code` says so. Raises ValueError with the folder, the reason and the way out where it cannot be
    loaded whole: weights that are missing or of another shape are not made up.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(_DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    path = model_folder(name)
    dtype = resolve_dtype(name, dtype, device)
    what = f"the model {'folder' if Path(path).is_dir() else 'name'} {path!r}"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _check_config(config, trust_remote_code)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=_DTYPES[dtype], use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True, ignore_mismatched_sizes=True,  # refused below, with their names
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged file makes transformers raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} cannot be loaded: {reason}{_way_out(path, reason)}") from error
    model: PreTrainedModel = loaded[0]
    report: dict[str, Any] = loaded[1]
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            first = min(str(key[0] if isinstance(key, tuple) else key) for key in report[kind])
            raise ValueError(
                f"{what} cannot be loaded: {len(report[kind])} weights are {kind.removesuffix('_keys')}, {first} among "
                "them, and would be random: fetch or save the model again"
            )
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps Module.to without its overloads
    return model.train(False), tokenizer


def load_config(name: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model, as `load_model` would believe it. Raises ValueError with the reason."""
    path = model_folder(name)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        _check_config(config, trust_remote_code)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"no model can be made of {path!r}: {reason}{_way_out(path, reason)}") from error
    return config


def _check_config(config: PreTrainedConfig, trusted: bool) -> None:
    """Refuse what would run code that is not transformers' own, and sizes that no model has."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        if not isinstance(part, PreTrainedConfig):
            continue
        kernel = str(part._attn_implementation or "")
        if not trusted and ("/" in kernel or ":" in kernel):
            raise ValueError(f"its config.json wants the attention kernel {kernel!r}, which is code from elsewhere")
        for field, most in (("num_hidden_layers", MOST_LAYERS), ("num_attention_heads", MOST_HEADS)):
            count = getattr(part, field, None)
            if isinstance(count, int) and not 1 <= count <= most:
                raise ValueError(f"its config.json claims {field} {shown(count)}; 1 to {most} are believed")


def _way_out(path: str, reason: str) -> str:
    """What to do about the refusals that are a policy and not a damage, or nothing."""
    if "trust_remote_code" in reason:
        return ". Read that code; then trust_remote_code=True (--trust-remote-code) runs it"
    if "attention kernel" in reason:
        return ". Take the entry out, or trust it with trust_remote_code=True (--trust-remote-code)"
    folder = Path(path)
    if folder.is_dir() and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        return (
            ". It holds pickled weights (.bin), which can run code when they are read: convert them to safetensors, "
            "with save_pretrained on a machine that may run them"
        )
    return ""


def provenance(model: PreTrainedModel | None = None) -> dict[str, Any]:
    """What a result depends on besides its settings: the day, versions, processor or GPU and its driver, threads."""
    versions = {"python": platform.python_version()}
    for package in ("sparseprefill", "torch", "triton", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    found: dict[str, Any] = {
        "date": date.today().isoformat(), "versions": versions, "threads": torch.get_num_threads(),
        "processor": processor(),
    }  # fmt: skip
    if torch.cuda.is_available():
        found["gpu"], found["driver"] = torch.cuda.get_device_name(), _driver()
    if model is not None:
        found["model"] = {
            "name": Path(str(model.name_or_path)).name, "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type, "parameters": model.num_parameters(),
        }  # fmt: skip
    return found


def _driver() -> str:
    """Version of the NVIDIA driver, or "unknown"."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.partition("\n")[0].strip() or "unknown"
