"""Reading files that others wrote, and writing files so that none is ever lost or half there. Knows no torch.

What is read is bounded before it is parsed, and what is wrong with it is said with its path: a missing file is a
FileNotFoundError, one that may not be read a PermissionError, everything else a ValueError.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

# a profile of 128 layers and 128 heads takes 2 MiB; what is many times larger is no profile and would only fill memory
MOST_JSON_BYTES = 16 << 20
# a haystack that fills 10 million tokens takes about 50 MiB
MOST_TEXT_BYTES = 256 << 20
# what this package writes nests to 5; Python's parser gives up between 1000 and 100000, depending on its release
MOST_NESTING = 16


@contextlib.contextmanager
def opened(path: str | Path, what: str) -> Iterator[BinaryIO]:
    """A regular file to read bytes from; whatever is wrong with it, then or later, is said as `read_text` says it."""
    name = f"the {what} {path}"
    try:
        # not blocking: a pipe must be refused, not waited for
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ValueError(f"{name} is no regular file: name a file")
            yield file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {what} at {path}: check the path") from error
    except PermissionError as error:
        raise PermissionError(f"{name} may not be read: change its permissions or name another file") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name} is a folder: name the file in it") from error
    except OSError as error:
        loop = error.errno == errno.ELOOP
        raise ValueError(f"{name} cannot be read: {'its links form a loop' if loop else error.strerror}") from error
    except ValueError as error:  # a path that no file can have
        raise error if str(error).startswith(name) else ValueError(f"{name} cannot be read: {error}") from error


def read_text(path: str | Path, what: str, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """The text of a regular file in UTF-8. `what` names it in messages, as in "the profile /x/y.json is ..."."""
    name = f"the {what} {path}"
    with opened(path, what) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise ValueError(f"{name} is larger than {most_bytes} bytes, the most that is read: it is no {what}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_json(path: str | Path, what: str, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """What a JSON file holds: see `parse_json` and `read_text`."""
    return parse_json(read_text(path, what, most_bytes), f"the {what} {path}", what)


def parse_json(text: str, name: str, what: str = "text") -> Any:
    """What JSON text holds. ValueError, beginning with `name`, for anything that the standard leaves open.

    Those are numbers that are not finite, names that come twice in an object, and nesting below `MOST_NESTING`.
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"{name} nests deeper than {MOST_NESTING}, the deepest that is read") from None
    except ValueError as error:  # numbers of thousands of digits are one too
        raise ValueError(f"{name} is not a JSON {what}: {error}") from error
    level = [data]
    for _ in range(MOST_NESTING):
        level = [
            inner for outer in level if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]  # fmt: skip
    if level:
        raise ValueError(f"{name} nests deeper than {MOST_NESTING}, the deepest that is read")
    return data


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large a number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} comes twice in one object")
    return made


def shown(value: Any, most: int = 80) -> str:
    """A value from a file for a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(value) if not isinstance(value, (dict, list)) or len(value) <= most else f"{type(value).__name__} ..."
    return text if len(text) <= most else text[:most] + "..."


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text whole or not at all: see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: until the last byte is on the disk, what stood at `path` stands there.

    A link stays a link, and a file that is replaced keeps its permissions. Raises FileNotFoundError where the folder
    is missing and OSError, with the path, where the disk refuses.
    """
    check_folder(path)
    real = Path(os.path.realpath(path))
    part = real.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if real.is_file():
            shutil.copymode(real, part)
        part.replace(real)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise type(error)(error.errno, f"{error.strerror}; what stood there is unchanged", str(path)) from error
        raise


def check_folder(path: str | Path) -> None:
    """Raise FileNotFoundError without a folder to write `path` into, ValueError where it cannot become a file.

    To be asked before work.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} to write {Path(path).name} into: make it first")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: name a file to write")
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is a device or a pipe, which would be replaced: name a file to write")


def lock(file: RawIOBase | BufferedReader, path: str | Path) -> None:
    """Keep an open file to this process, until it is closed. ValueError where another process has it."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process writes {path}: wait for it, or name another folder") from error


def cache_folder() -> Path:
    """Where this package keeps what it can make again: sparseprefill in $XDG_CACHE_HOME or ~/.cache.

    It need not be there.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # the specification says to pass over others
        cache = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "sparseprefill"


def check_same(before: dict[str, Any], now: dict[str, Any], path: str | Path) -> None:
    """ValueError, with what differs, where a run that stands at `path` had other settings than this one."""
    differing = sorted(_differences(before, now))
    if differing:
        raise ValueError(
            f"{path} is of a run with other settings ({'; '.join(differing[:5])}): use the same settings to go on, or "
            "name another folder"
        )


def _differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}".lstrip("."))
    elif before != now:
        yield f"{where}: {_short(before)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
