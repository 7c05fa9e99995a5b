"""The house rules: who may import whom, what an import may do, and that names, docs and entry points agree."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparseprefill

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("patterns", "estimators", "kernels", "evals")

# A module may import what stands before its own place, and its own room. Names on one line do not see each other.
# A new module of the spine gets its place here.
ORDER: tuple[tuple[str, ...], ...] = (
    ("contracts", "files"),
    ("coverage",),
    ("kernels",),
    ("estimators",),
    ("patterns",),
    ("guard",),
    ("prefill",),
    ("calibration",),
    ("prompts",),
    ("reports",),
    ("huggingface",),
    ("context",),
    ("profile",),
    ("evals",),
    ("doctor", "lm_eval"),
    ("plan",),
    ("cli",),
    ("__main__",),
)
PLACE = {name: place for place, names in enumerate(ORDER) for name in names}
FORBIDDEN_NAMES = {"utils", "util", "common", "base", "manager", "handler", "helpers", "types"}


def package_modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package as it installs, the root left out."""
    modules = {}
    for folder, prefix in [("sparseprefill", "sparseprefill"), *((room, f"sparseprefill.{room}") for room in ROOMS)]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([prefix, *(part for part in parts if part != "__init__")])
            modules[name] = path
    del modules["sparseprefill"]
    return modules


MODULES = package_modules()
ALL_PYTHON = sorted(
    [
        ROOT / "sparseprefill" / "__init__.py",
        *MODULES.values(),
        *(ROOT / "scripts").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]
)


def room(module: str) -> str:
    """The place-giving part of a module's name: 'sparseprefill.kernels.cpu' -> 'kernels'."""
    name = module.split(".")[1]
    spines = ("huggingface", "context", "profile", "plan", "cli")
    return next((spine for spine in spines if name.startswith(f"{spine}_")), name)


def imports(path: Path, module: str = "") -> Iterator[str]:
    """Dotted names of all that a file imports anywhere in it; `from a import b` gives a.b, relative ones resolved."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def run_python(code: str) -> str:
    """What the code prints in a fresh process that starts outside the checkout."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.anchor, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_has_a_place() -> None:
    strangers = sorted(name for name in MODULES if room(name) not in PLACE)
    assert not strangers, f"{strangers} have no place in ORDER: decide what they may import and add them"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    wrong = []
    for imported in imports(MODULES[module], module):
        if imported.split(".")[0] != "sparseprefill" or imported == "sparseprefill.__version__":
            continue
        if imported == "sparseprefill" or room(imported) not in PLACE:
            wrong.append(f"{imported}: name the module, not the package root")
        elif room(imported) != room(module) and PLACE[room(imported)] >= PLACE[room(module)]:
            wrong.append(f"{imported}: {room(imported)} does not stand before {room(module)}")
    assert not wrong, wrong


def test_only_the_seam_and_above_know_transformers() -> None:
    early = [name for name in MODULES if PLACE[room(name)] < PLACE["huggingface"]]
    assert early
    wrong = [name for name in early if any(i.split(".")[0] == "transformers" for i in imports(MODULES[name], name))]
    assert not wrong


def test_only_triton_modules_know_triton() -> None:
    allowed = re.compile(r"sparseprefill\.kernels\.triton_\w+")
    wrong = [
        name
        for name, path in MODULES.items()
        if not allowed.fullmatch(name) and any(i.split(".")[0] == "triton" for i in imports(path, name))
    ]
    assert not wrong


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_are_imported_by_their_full_names(path: Path) -> None:
    wrong = [name for name in imports(path) if name.split(".")[0] in ROOMS]
    assert not wrong, "a bare room name loads the same file as a second module"


def test_tests_are_no_package() -> None:
    """With an __init__.py pytest would put the root on sys.path and make the bare room names importable."""
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_importing_the_package_is_cold_and_silent() -> None:
    code = "import sys, sparseprefill; print([n for n in ('torch', 'transformers', 'triton') if n in sys.modules])"
    assert run_python(code) == "[]\n"


def test_importing_prompts_needs_no_torch() -> None:
    code = "import sys, sparseprefill.prompts; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    assert run_python(code) == "[]\n"


def test_the_rooms_below_the_seam_load_neither_transformers_nor_triton() -> None:
    early = [n for n in MODULES if PLACE[room(n)] < PLACE["huggingface"] and ".triton_" not in n]
    code = f"""
import importlib, sys
for name in {early!r}:
    importlib.import_module(name)
    for heavy in ("transformers", "triton", "matplotlib"):
        assert heavy not in sys.modules, f"{{name}} loads {{heavy}}"
"""
    assert run_python(code) == ""


def test_importing_every_module_registers_and_prints_nothing() -> None:
    has_triton = importlib.util.find_spec("triton") is not None
    modules = [n for n in MODULES if n != "sparseprefill.__main__" and (has_triton or ".triton_" not in n)]
    code = f"""
import importlib, json
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def registered():
    return [{{key: id(value) for key, value in table.items()}} for table in
            (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]

before = registered()
for name in {modules!r}:
    importlib.import_module(name)
    assert registered() == before, f"importing {{name}} changes what transformers has registered"
print(json.dumps([len(table) > 1 for table in before]))
"""
    assert json.loads(run_python(code)) == [True, True]


def test_every_public_name_resolves() -> None:
    assert len(set(sparseprefill.__all__)) == len(sparseprefill.__all__)
    for name in sparseprefill.__all__:
        assert getattr(sparseprefill, name) is not None
        assert name in dir(sparseprefill)
    with pytest.raises(AttributeError, match="no_such_name"):
        sparseprefill.no_such_name  # noqa: B018


def test_readme_lists_the_public_names() -> None:
    """The table under '## API' has one row for each public name (but __version__), first cell `name` or `name(...)`."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## API\n(.*?)(?=^## |\Z)", readme, flags=re.DOTALL | re.MULTILINE)
    assert section, "README.md has no section '## API'"
    listed = re.findall(r"^\| *`(\w+)", section[1], flags=re.MULTILINE)
    assert sorted(listed) == sorted(set(sparseprefill.__all__) - {"__version__"})


def test_console_script_resolves() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="sparseprefill")
    assert callable(script.load())


def test_versions_agree() -> None:
    assert importlib.metadata.version("sparseprefill") == sparseprefill.__version__
    assert f"## [{sparseprefill.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_module_names_say_what_is_inside() -> None:
    assert not [name for name in MODULES if FORBIDDEN_NAMES & set(name.split("."))]


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_and_classes_have_docstrings(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module has no docstring"
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and ast.get_docstring(node) is None
    ]
    assert not silent


def test_no_path_of_a_machine_is_written_down() -> None:
    path_of_a_machine = re.compile(r"(?<![\w.~])/(?:work|home|root|Users|tmp|mnt|opt)/\w")
    texts = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "pyproject.toml", "Makefile")]
    texts += [path for path in ALL_PYTHON if path.parent.name != "tests"]
    texts += sorted((ROOT / "sparseprefill").rglob("*.json"))
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if path_of_a_machine.search(line)
    ]
    assert not found
