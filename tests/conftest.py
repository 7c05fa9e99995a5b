"""What holds for every test: no network, poisoned fresh memory, fixed seeds, GPU tests only where there is a GPU."""

from __future__ import annotations

import os

# read by the libraries when they are imported, so set before any of them is
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# the user's own file would decide what runs sparsely here; a file in no folder is never there, and never made
os.environ["SPARSEPREFILL_CALIBRATION"] = os.path.join(os.path.dirname(__file__), "no-such-folder", "calibration.json")
# as if the native library were not built, whatever this machine has: the fixture `native` is for tests of it
os.environ["SPARSEPREFILL_NATIVE"] = os.path.join(os.path.dirname(__file__), "no-such-folder", "native")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait starve a busy machine

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils import _device

# Triton asks once, when it is imported, and other libraries import it too: so before any of them, and not after torch
# has said whether there is a GPU to compile for
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("sparseprefill", deadline=None, derandomize=True, database=None)
settings.load_profile("sparseprefill")

# the order of a sum depends on the number of threads: the same everywhere, and as few as the smallest machine has
torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """The same allocation, but memory that the package asked for arrives full of NaN, or of indices out of any range.

    Fresh memory is often zero by luck, and a kernel that forgets its tail then passes.
    """

    @functools.wraps(allocate)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "sparseprefill" and not tensor.is_meta and tensor.dtype != torch.bool:
            wild = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
            tensor.fill_(wild)
        return tensor

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def _poison_fresh_memory() -> Iterator[None]:
    _device._device_constructors()  # torch keeps a set of its constructors from first use on: let it hold the real ones
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch, "empty_permuted"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Tests draw from generators of their own; this is for what draws from the global one, such as model weights."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the native library, built once a session. Skips where there is no compiler, and only there."""
    from sparseprefill.kernels import native_build

    reason = native_build.why_not_here() or native_build.why_no_compiler()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native_build.VARIABLE, str(folder))
        native_build.build()
    return folder


@pytest.fixture
def native(native_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The native library serves in this test. Gives its folder, which is not to be changed."""
    from sparseprefill.kernels import native_build

    monkeypatch.setenv(native_build.VARIABLE, str(native_folder))
    assert native_build.why_not_built() is None
    return native_folder


@pytest.fixture(autouse=True)
def _native_where_it_is_meant(request: pytest.FixtureRequest) -> None:
    """A test of several implementations, named by its parameter `impl`, has the native library where that is meant."""
    called = getattr(request.node, "callspec", None)
    if called is not None and called.params.get("impl") == "native":
        request.getfixturevalue("native")
