"""Build and try out a release; upload nothing. Run by `make release`, which installs what this needs.

Only what is committed is built. `dist/` is replaced when everything has passed, and not before.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_IN_THE_SDIST = (".gitignore", ".ci/")
MADE_BY_SETUPTOOLS = ("PKG-INFO", "setup.cfg", "sparseprefill.egg-info/")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints. Stops the release where it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def why_not_clean() -> str | None:
    """Why the checkout is not what is committed, or None."""
    changed = run("git", "status", "--porcelain").splitlines()
    return f"the tree is not clean, commit or stash first: {', '.join(changed[:5])}" if changed else None


def version_of(text: str) -> str:
    """What stands in `version = "..."` or `__version__ = "..."`."""
    found = re.search(r'^(?:__version__|version) = "(.+)"$', text, flags=re.MULTILINE)
    return found[1] if found else "nothing"


def why_versions_disagree(project: str, package: str, changelog: str) -> str | None:
    """Why pyproject.toml, the package and CHANGELOG.md (their texts) do not name one version to release, or None."""
    version, own = version_of(project), version_of(package)
    if own != version:
        return f"pyproject.toml says {version}, sparseprefill/__init__.py {own}"
    sections = re.split(r"^## \[(.+?)\].*$", changelog, flags=re.MULTILINE)
    names, texts = sections[1::2], sections[2::2]
    released = [name for name in names if name != "Unreleased"]
    if not released or released[0] != version:
        return f"pyproject.toml says {version}, the newest release in CHANGELOG.md is {(released or ['none'])[0]}"
    if any(name == "Unreleased" and text.strip() for name, text in zip(names, texts, strict=True)):
        return f"CHANGELOG.md has entries under [Unreleased]: put them under [{version}], or raise the version"
    return None


def why_tagged_elsewhere(version: str) -> str | None:
    """Why this version may not be released from here, or None."""
    tagged = run("git", "tag", "--list", f"v{version}").strip()
    if tagged and run("git", "rev-list", "-1", tagged) != run("git", "rev-list", "-1", "HEAD"):
        return f"{tagged} is already the tag of another commit: raise the version"
    return None


def contents(archive: Path) -> dict[str, bytes]:
    """Files of a wheel, or of an sdist without its first folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as sdist:
        files = [member for member in sdist if member.isfile()]
        return {file.name.partition("/")[2]: sdist.extractfile(file).read() for file in files}  # type: ignore[union-attr]


def build(work: Path) -> list[Path]:
    """Sdist and wheel of the last commit, the wheel made from the sdist and held against one made from the tree."""
    run("git", "archive", "--format=tar", "-o", work / "tree.tar", "HEAD")
    with tarfile.open(work / "tree.tar") as archive:
        archive.extractall(work / "tree", filter="data")
    # times of the commit, not of the build
    os.environ["SOURCE_DATE_EPOCH"] = run("git", "log", "-1", "--format=%ct").strip()
    builder = (sys.executable, "-m", "build", "--no-isolation")
    run(*builder, "--outdir", work / "dist", cwd=work / "tree")
    run(*builder, "--wheel", "--outdir", work / "direct", cwd=work / "tree")
    (sdist,), (wheel,) = (work / "dist").glob("*.tar.gz"), (work / "dist").glob("*.whl")
    (direct,) = (work / "direct").iterdir()
    from_sdist, from_tree = contents(wheel), contents(direct)
    differing = sorted(n for n in from_sdist.keys() | from_tree.keys() if from_sdist.get(n) != from_tree.get(n))
    if differing:
        sys.exit(f"the wheel made from the sdist and the one made from the tree differ in {differing}")
    tracked = {f for f in run("git", "ls-files").splitlines() if not f.startswith(NOT_IN_THE_SDIST)}
    packed = {name for name in contents(sdist) if not name.startswith(MADE_BY_SETUPTOOLS)}
    if tracked != packed:
        sys.exit(
            f"MANIFEST.in: the sdist lacks {sorted(tracked - packed)} and has, untracked, {sorted(packed - tracked)}"
        )
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    print(f"built {sdist.name} ({len(packed)} files) and {wheel.name} ({len(from_tree)} files)", flush=True)
    return [sdist, wheel]


def try_out(wheel: Path, work: Path) -> None:
    """Install the wheel into an environment of its own and use it where no checkout is."""
    environment = work / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=work)
    smoke = shutil.copy(ROOT / "scripts" / "smoke.py", work / "smoke.py")
    print(run(python, "-I", smoke, cwd=work), end="", flush=True)


def main() -> None:
    began = time.monotonic()
    names = ("pyproject.toml", "sparseprefill/__init__.py", "CHANGELOG.md")
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in names]
    version = version_of(texts[0])
    for reason in (why_versions_disagree(*texts), why_tagged_elsewhere(version), why_not_clean()):
        if reason:
            sys.exit(f"no release: {reason}")
    with tempfile.TemporaryDirectory(prefix="sparseprefill-release-") as folder:
        made = build(Path(folder))
        try_out(made[1], Path(folder))
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        (ROOT / "dist").mkdir()
        kept = [shutil.copy(file, ROOT / "dist" / file.name).relative_to(ROOT) for file in made]
    print(f"{version} is ready in dist/ after {time.monotonic() - began:.0f} s; nothing was uploaded. To publish it:")
    print(f"  git tag -a v{version} -m 'Release {version}' && git push origin v{version}")
    print(f"  .venv-release/bin/twine upload {' '.join(map(str, kept))}")


if __name__ == "__main__":
    main()
