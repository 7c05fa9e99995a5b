"""What is built is what is here: the rooms below the package, the model inside, nothing beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("patterns", "estimators", "kernels", "evals")
FOLDERS = {"sparseprefill": "sparseprefill", **{room: f"sparseprefill/{room}" for room in ROOMS}}
BESIDE = ("pyproject.toml", "README.md", "LICENSE")
SKIPPED = shutil.ignore_patterns("__pycache__", ".*")


def build(kind: str, source: Path, target: Path) -> Path:
    """A wheel or sdist by the hook that pip calls, without a network. Gives the file."""
    target.mkdir(exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


def installed_files(wheel: Path) -> set[str]:
    """The wheel's files, its own dist-info aside."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what gets built: a build in the checkout would meet stale modules in build/lib."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=SKIPPED)
    for name in BESIDE:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("built") / "wheel")


@pytest.fixture(scope="module")
def expected(tree: Path) -> set[str]:
    """Every file of the five folders, under the name it installs by."""
    return {
        f"{installed}/{path.relative_to(tree / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (tree / folder).rglob("*")
        if path.is_file() and ".egg-info" not in path.as_posix()
    }


def test_the_wheel_holds_exactly_the_package_tree(wheel: Path, expected: set[str]) -> None:
    assert "sparseprefill/py.typed" in expected
    assert {f"sparseprefill/{room}/__init__.py" for room in ROOMS} <= expected
    held = installed_files(wheel)
    assert not expected - held, "not packed"
    assert not held - expected, "packed, but not in the tree"


def test_the_model_inside_is_packed_and_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {
            Path(info.filename).name: info.file_size
            for info in archive.infolist()
            if info.filename.startswith("sparseprefill/needle_model/")
        }
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert sum(sizes.values()) <= 16 * 2**20


def test_the_wheel_says_who_it_is(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(info["METADATA"]).decode()
        scripts = archive.read(info["entry_points.txt"]).decode()
        licence = archive.read(info["LICENSE"]).decode()
    assert "\nName: sparseprefill\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "sparseprefill = sparseprefill.cli:main" in scripts
    assert "Apache License" in licence


def test_a_wheel_built_from_the_sdist_is_the_same(tree: Path, expected: set[str], tmp_path: Path) -> None:
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert installed_files(build("wheel", source, tmp_path / "wheel")) == expected


def test_the_wheel_works_where_no_checkout_is(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import sparseprefill.kernels, sparseprefill.patterns, sparseprefill.estimators, sparseprefill.evals
for room in {ROOMS!r}:
    print(sys.modules[f"sparseprefill.{{room}}"].__file__)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path.anchor, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "sparseprefill" / room / "__init__.py") for room in ROOMS]
