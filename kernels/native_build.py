"""The native library of the CPU: building it on the machine that uses it, where it lies, and loading it.

It is C++ behind a plain C interface, compiled for this very processor by `sparseprefill build-cpu`, kept in a folder of
the user's cache and loaded by ctypes when it is first asked for. Loading needs no compiler and never builds. Each
source, processor and platform has a library of its own there, so machines may share a home.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparseprefill import files

VARIABLE = "SPARSEPREFILL_NATIVE"
"""The environment variable that names the folder in place of the default."""
COMMAND = "sparseprefill build-cpu"
"""What builds the library."""
ABI = 3
"""Of the C interface; the number that `sparseprefill_abi` gives. Raised when a function changes its arguments."""
SOURCES = tuple(map(Path(__file__).with_name, ("native_attention.cpp", "native_block_max.cpp")))
"""What is compiled."""
HEADERS = tuple(map(Path(__file__).with_name, ("native_tiles.h", "native_vectors.h")))
"""What the sources include."""
FLAGS = ("-O3", "-shared", "-fPIC", "-std=c++17", "-pthread")
"""How it is compiled, beside the flag for this processor."""
WITHOUT_TILES = "-DSPARSEPREFILL_NO_TILES"
"""Leaves the processor's tiles (AMX) unused: for where they are there, but the library with them does not pass."""
COMPILERS = ("c++", "g++", "clang++")
"""Looked for in this order where $CXX is not set."""
FUNCTIONS = (
    "sparseprefill_abi",
    "sparseprefill_instructions",
    "sparseprefill_attention",
    "sparseprefill_block_max",
    "sparseprefill_quantize",
)
"""What a library must have; each gives an int, but for the text of the instructions."""

_MOST_RECORD_BYTES, _MOST_LIBRARY_BYTES = 1 << 16, 1 << 26
_COMPILE_SECONDS, _CHECK_SECONDS, _WAIT_SECONDS = 600, 300, 600
# what may lie in the folder, so that `remove` takes away nothing else
_KEY, _LIBRARY, _RECORD = re.compile("[0-9a-f]{20}"), re.compile("(native|block_max)-[0-9a-f]{16}[.]so"), "record.json"
_PART = "building-"
_LOCK = "lock"


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """What was built, as it is recorded beside the library."""

    file: str  # name of the library, in the folder of the record
    sha256: str  # of the library
    instructions: str  # that it was compiled for
    compiler: str  # its path, and the first line of what it says of its version
    flags: str  # that it was compiled with
    seconds: float  # to compile and to check


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler."""

    command: tuple[str, ...]  # to be followed by arguments
    version: str  # the first line of what it says

    def describe(self) -> str:
        """One line."""
        return f"{shlex.join(self.command)} ({self.version})"


@dataclass(frozen=True, slots=True)
class _Answer:
    """What this process knows of one folder: a library and how it was built, or why there is none."""

    library: ctypes.CDLL | None = None
    path: Path | None = None
    record: NativeLibrary | None = None
    reason: str | None = None


_ANSWERS: dict[str, _Answer] = {}
_ASKING = threading.Lock()


def cache_folder() -> Path:
    """Where libraries are kept: $SPARSEPREFILL_NATIVE, else sparseprefill/native in $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else files.cache_folder() / "native"


def library() -> ctypes.CDLL | None:
    """The library that was built for this machine, or None: see `why_not_built`.

    Looked for once a process (and folder), whatever happens there later, unless this process itself builds or removes.
    """
    return _answer().library


def why_not_built() -> str | None:
    """Why there is no native library for this machine, or None."""
    return _answer().reason


def built() -> tuple[Path, NativeLibrary] | None:
    """The file that `library` was loaded from, and how it was made; None where there is none."""
    answer = _answer()
    return None if answer.path is None or answer.record is None else (answer.path, answer.record)


def describe_native() -> str:
    """One line: which instructions the library was built for and where it lies, or why there is none."""
    found, slower = built(), why_torch_is_faster()
    if found is None:
        return why_not_built() or ""
    left = "" if slower is None else f"; attention runs in torch all the same: {slower}"
    return f"built for {found[1].instructions}: {found[0]}{left}"


def why_torch_is_faster() -> str | None:
    """Why attention in torch is expected to be faster than in the library, or None: then `auto` takes that.

    So it is where the compiler could not say which processor it compiles for: torch chooses as it starts.
    """
    native = library()
    if native is None or native.sparseprefill_instructions() != b"portable":
        return None
    import torch

    own = torch.backends.cpu.get_cpu_capability()
    if not own.startswith("AVX"):
        return None
    return f"the library was built for any processor of this kind, torch uses {own} (impl='native' takes the library)"


def use(path: Path) -> None:
    """Let `library` be this file in this process, so that it can be tried before it is installed.

    Raises ValueError where it cannot be loaded.
    """
    with _ASKING:
        _ANSWERS[str(cache_folder())] = _Answer(_load(path), path)


def why_not_here() -> str | None:
    """Why no library can be built on this system, or None."""
    if sys.platform == "win32":
        return "there is no native library for Windows: the path in torch serves there"
    return None


def why_no_compiler() -> str | None:
    """Why no library can be compiled, or None."""
    try:
        find_compiler()
    except ValueError as error:
        return str(error)
    return None


def find_compiler() -> Compiler:
    """The C++ compiler of $CXX, which may have arguments; where that is not set, the first of COMPILERS that is there.

    Raises ValueError where there is none, or it does not run.
    """
    named = os.environ.get("CXX", "")
    try:
        asked = tuple(shlex.split(named))
    except ValueError as error:
        raise ValueError(f"CXX={named!r:.80} is no command: {error}") from error
    command = asked or tuple(name for name in COMPILERS if shutil.which(name))[:1]
    if not command:
        raise ValueError(f"there is no C++ compiler ({', '.join(COMPILERS)}): install g++ or clang++, or set CXX")
    program = shutil.which(command[0])
    if program is None:
        raise ValueError(
            f"CXX names {command[0]!r:.80}, which is no program: install g++ or clang++, or set CXX to one"
        )
    command = (program, *command[1:])
    done = _run((*command, "--version"), 60)
    if done.returncode:
        raise ValueError(f"the compiler {shlex.join(command)} does not run: {_last_lines(done)}")
    return Compiler(command, (done.stdout.strip().splitlines() or ["no version"])[0][:200])


def build(*, force: bool = False, say: Callable[[str], None] = lambda line: None, wait: float = _WAIT_SECONDS) -> Path:
    """Compile the library for this machine, check it in a process of its own, and keep it. Gives its path.

    A library that is there, can be loaded and was built by the same compiler stays, unless `force`. While another
    process builds in the folder, waits for it. What is wrong or crashes is never installed.

    Args:
        force: build in any case.
        say: gets a line for whatever happens that is not the usual.
        wait: seconds to wait for another process.

    Raises:
        NotImplementedError: on a system that is not served.
        ValueError: no compiler, what it refuses, a library that fails its check, a folder that cannot be written.
    """
    reason = why_not_here()
    if reason is not None:
        raise NotImplementedError(reason)
    folder = cache_folder()
    place = folder / _key()
    with _clear_refusals(folder), _locked(folder, say, wait):
        standing = _look(folder)
        if standing.path is not None and not force and _same_compiler(standing, say):
            say(f"built already: {COMMAND} --force builds it again")
            return standing.path
        if standing.reason is not None and (place / _RECORD).exists():
            say(f"{standing.reason}; building it again")
        place.mkdir(exist_ok=True)
        _sweep(place)  # what a build that was killed has left
        path = _build(place, find_compiler(), say)
    with _ASKING:
        _ANSWERS.pop(str(folder), None)
    return path


def remove() -> int:
    """Remove every library in `cache_folder`, of this and of other machines and versions. Gives how many there were.

    Other files stay, and so does the folder if it holds any. A process that has loaded a library keeps it.
    """
    folder = cache_folder()
    if not folder.is_dir():
        return 0
    removed = 0
    with _clear_refusals(folder), _locked(folder, lambda line: None, _WAIT_SECONDS):
        for place in [each for each in folder.iterdir() if _KEY.fullmatch(each.name) and each.is_dir()]:
            _sweep(place)
            removed += sum(_LIBRARY.fullmatch(each.name) is not None for each in place.iterdir())
            for each in [each for each in place.iterdir() if each.name == _RECORD or _LIBRARY.fullmatch(each.name)]:
                each.unlink()
            with contextlib.suppress(OSError):  # something else is in it
                place.rmdir()
        (folder / _LOCK).unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()
    with _ASKING:
        _ANSWERS.pop(str(folder), None)
    return removed


def _answer() -> _Answer:
    folder = cache_folder()
    known = _ANSWERS.get(str(folder))
    if known is None:
        with _ASKING:
            known = _ANSWERS.get(str(folder))
            if known is None:
                known = _ANSWERS[str(folder)] = _look(folder)
    return known


def _look(folder: Path) -> _Answer:
    """Load what the folder has for this machine; whatever is wrong becomes the reason."""
    reason = why_not_here()
    if reason is not None:
        return _Answer(reason=reason)
    try:
        place = folder / _key()
        if not os.path.lexists(place / _RECORD):
            others = folder.is_dir() and any(_KEY.fullmatch(each.name) for each in folder.iterdir())
            other = f"what lies in {folder} is of another version or for another processor" if others else ""
            need = "once on this machine (it needs a C++ compiler)"
            return _Answer(reason=f"{other or 'it is not built'}: run `{COMMAND}`, {need}")
        record = _read_record(place / _RECORD)
        path = place / record.file
        with files.opened(path, "native library") as file:
            data = file.read(_MOST_LIBRARY_BYTES + 1)
        # to load half a file is to be killed when the other half is touched
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise ValueError(f"the native library {path} is not the one that was built: it is damaged")
        return _Answer(_load(path), path, record)
    except (OSError, ValueError) as error:
        return _Answer(reason=f"{error}. `{COMMAND} --force` builds it again")


def _load(path: Path) -> ctypes.CDLL:
    """The library with its small functions declared. ValueError where that fails or the interface is another one."""
    try:
        loaded = ctypes.CDLL(str(path.absolute()))
        for name in FUNCTIONS:
            getattr(loaded, name).restype = ctypes.c_int
    except OSError as error:
        raise ValueError(f"the native library {path} cannot be loaded: {error}") from error
    except AttributeError as error:
        raise ValueError(f"the native library {path} lacks a function: {error}") from error
    loaded.sparseprefill_instructions.restype = ctypes.c_char_p
    found = loaded.sparseprefill_abi()
    if found != ABI:
        raise ValueError(f"the native library {path} has interface {found}, this version needs {ABI}")
    return loaded


def _read_record(path: Path) -> NativeLibrary:
    data = files.read_json(path, "record of the native library", _MOST_RECORD_BYTES)
    kinds = {each.name: float if each.name == "seconds" else str for each in dataclasses.fields(NativeLibrary)}
    if not isinstance(data, dict) or {name: type(value) for name, value in data.items()} != kinds:
        raise ValueError(f"{path} is no record of a native library")
    record = NativeLibrary(**data)
    if not _LIBRARY.fullmatch(record.file):
        raise ValueError(f"{path} names {files.shown(record.file)}, which is no native library")
    return record


def _key() -> str:
    """Of what a library must be made from and for to be loaded here. The compiler is no part of it."""
    sources = [*SOURCES, *HEADERS]
    parts = [str(ABI), *FLAGS, _processor_flag(), *_machine(), *(path.name for path in sources)]
    return hashlib.sha256(
        b"\0".join([*(part.encode() for part in parts), *(path.read_bytes() for path in sources)])
    ).hexdigest()[:20]


def _machine() -> tuple[str, ...]:
    """What decides whether a library made here runs there: system, C library, processor and its instructions."""
    try:
        runtime = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # not glibc
        runtime = ""
    return (sysconfig.get_platform(), runtime, *_processor())


def _processor() -> tuple[str, ...]:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        # cores may differ; numbers that change by themselves, such as the clock, are left out
        wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa", "cpu")
        lines = (line.partition(":") for line in info.read_text(encoding="utf-8", errors="replace").splitlines())
        return tuple(sorted({f"{name.strip()}:{value.strip()}" for name, _, value in lines if name.strip() in wanted}))
    if sys.platform == "darwin":
        names = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        with contextlib.suppress(ValueError):
            return tuple(_run(("sysctl", "-n", *names), 60).stdout.split())  # a processor of Apple has the first alone
    return (platform.processor(), platform.machine())


def _processor_flag() -> str:
    """The flag for the processor that compiles; it is called otherwise on Arm and Power."""
    return "-mcpu=native" if platform.machine().lower().startswith(("arm", "aarch", "ppc")) else "-march=native"


def _same_compiler(standing: _Answer, say: Callable[[str], None]) -> bool:
    """Was it built by the compiler that would build it now? If there is none any more, that is no reason to build."""
    assert standing.record is not None
    try:
        now = find_compiler().describe()
    except ValueError:
        return True
    if now != standing.record.compiler:
        say(f"it was built by {standing.record.compiler}, the compiler is now {now}: building it again")
    return now == standing.record.compiler


def _build(place: Path, compiler: Compiler, say: Callable[[str], None]) -> Path:
    """Compile, check, install: the record is replaced last, and decides what is loaded."""
    began = time.monotonic()
    flags = _accepted_flags(compiler, say)
    with tempfile.TemporaryDirectory(prefix=_PART, dir=place) as work:
        made = Path(work) / "library.so"
        try:
            instructions = _made(made, compiler, flags)
        except ValueError as error:
            if not any("amx_bf16" in line.split() for line in _processor()):
                raise
            say(f"{error}; building it again without AMX ({WITHOUT_TILES})")
            flags = (*flags, WITHOUT_TILES)
            instructions = _made(made, compiler, flags)
        sha256 = hashlib.sha256(made.read_bytes()).hexdigest()
        path = place / f"native-{sha256[:16]}.so"
        made.replace(path)
    seconds = round(time.monotonic() - began, 2)
    record = NativeLibrary(path.name, sha256, instructions, compiler.describe(), shlex.join(flags), seconds)
    files.write_text(place / _RECORD, json.dumps(dataclasses.asdict(record), indent=1) + "\n")
    for each in place.iterdir():
        if _LIBRARY.fullmatch(each.name) and each != path:
            each.unlink()
    return path


def _made(library: Path, compiler: Compiler, flags: Sequence[str]) -> str:
    """Compile and check a library. Gives its instructions."""
    library.unlink(missing_ok=True)
    done = _run((*compiler.command, *flags, *map(str, SOURCES), "-o", str(library)), _COMPILE_SECONDS)
    if done.returncode:
        raise ValueError(f"{compiler.describe()} could not compile the native library: {_last_lines(done)}")
    if not library.is_file():
        raise ValueError(f"{compiler.describe()} made no library and said nothing of it")
    return _check(library)


def _accepted_flags(compiler: Compiler, say: Callable[[str], None]) -> tuple[str, ...]:
    """FLAGS, and the one for this processor unless the compiler refuses just that one."""
    own, nothing = _processor_flag(), ("-x", "c++", "-fsyntax-only", os.devnull)
    refused = _run((*compiler.command, own, *nothing), 60)
    if refused.returncode == 0:
        return (own, *FLAGS)
    plain = _run((*compiler.command, *nothing), 60)
    if plain.returncode:
        raise ValueError(f"{compiler.describe()} cannot compile anything: {_last_lines(plain)}")
    say(f"{compiler.describe()} refuses {own}: built without it, for any processor of this kind, and slower for it")
    return FLAGS


# in a process of its own, and without torch, which takes seconds to import
_TRIAL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.sparseprefill_instructions.restype = ctypes.c_char_p
print(library.sparseprefill_abi(), library.sparseprefill_instructions().decode())
"""
_COMPARISON = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from sparseprefill.kernels.native_check import check_library
try:
    check_library(sys.argv[1])
except ValueError as error:
    sys.exit(str(error))
"""


def _check(path: Path) -> str:
    """Load a library and hold it against the reference, both in other processes. Gives its instructions."""
    said = _checked((sys.executable, "-I", "-S", "-c", _TRIAL, str(path)))
    abi, _, instructions = said.strip().partition(" ")
    if abi != str(ABI) or not instructions:
        raise ValueError(f"the native library has interface {abi!r:.20}, this version needs {ABI}: it is not installed")
    _checked((sys.executable, "-c", _COMPARISON, str(path), json.dumps([each or os.getcwd() for each in sys.path])))
    return instructions


def _checked(command: Sequence[str]) -> str:
    done = _run(command, _CHECK_SECONDS)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ValueError(f"the native library crashed in its check ({name}): it is not installed")
    if done.returncode:
        raise ValueError(f"the native library failed its check: {_last_lines(done, 1)}: it is not installed")
    return done.stdout


def _run(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run to the end, without an input; text that is no UTF-8 does no harm."""
    try:
        return subprocess.run(
            list(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8", errors="replace",
            timeout=seconds, check=False,
        )  # fmt: skip
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be run: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{Path(command[0]).name} was not done after {seconds:g} seconds") from error


def _last_lines(done: subprocess.CompletedProcess[str], most: int = 12) -> str:
    """The last lines of what a program said."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()[-most:]
    return "\n".join(line[:400] for line in lines) or f"it said nothing and ended with {done.returncode}"


@contextlib.contextmanager
def _clear_refusals(folder: Path) -> Iterator[None]:
    """What the disk refuses becomes a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"the folder {folder} cannot be used: {why}. Name another one with ${VARIABLE}") from error


@contextlib.contextmanager
def _locked(folder: Path, say: Callable[[str], None], wait: float) -> Iterator[None]:
    """Keep the folder, which is made, to this process. ValueError where another has it for `wait` seconds."""
    until, told = time.monotonic() + wait, False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("ab", buffering=0) as file:
            try:
                files.lock(file, folder)
            except ValueError as error:
                if time.monotonic() >= until:
                    raise ValueError(f"another process still builds in {folder}: try again when it is done") from error
                if not told:
                    say(f"another process builds in {folder}: waiting for it")
                told = True
            else:
                if _still_at(file.fileno(), folder / _LOCK):
                    yield
                    return
                continue  # it was removed, by who had it: make another
        time.sleep(0.05)


def _still_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _sweep(place: Path) -> None:
    """Remove what unfinished builds have left. To be called with the lock."""
    for each in place.glob(f"{_PART}*"):
        shutil.rmtree(each, ignore_errors=True)
