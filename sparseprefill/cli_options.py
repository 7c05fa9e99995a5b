"""Types and habits that all commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    AnyType = click.ParamType[Any]
else:  # click 8.1 has no types to fill in
    AnyType = click.ParamType


class Numbers(AnyType):
    """`4096,8192` or `4k,8k`."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of positive integers."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(
                int(part[:-1]) * 1024 if part.lower().endswith("k") else int(part) for part in value.split(",")
            )
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 4096,8192 or 4k,8k", param, ctx)
        if min(numbers) < 1:
            self.fail("numbers must be positive", param, ctx)
        return numbers


class Places(AnyType):
    """`0,2,5-7`: numbers of layers or heads."""

    name = "N[,N-M...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of integers from 0 on, each once, in the order given."""
        if not isinstance(value, str):
            return value
        found: list[int] = []
        for part in value.split(","):
            first, dash, last = part.strip().partition("-")
            ends = (first, last if dash else first)
            if not all(end.isdecimal() and len(end) <= 5 for end in ends):
                self.fail(f"{value!r} is not a list of numbers like 0,2,5-7", param, ctx)
            if int(ends[0]) > int(ends[1]):
                self.fail(f"{part.strip()!r} ends before it begins", param, ctx)
            found += range(int(ends[0]), int(ends[1]) + 1)
        if len(set(found)) < len(found):
            self.fail(f"{value!r} names one twice", param, ctx)
        return tuple(found)


class Shares(AnyType):
    """`0.05,0.1`: shares of the work of dense attention."""

    name = "X[,X...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of numbers in (0, 1]."""
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers like 0.05,0.1", param, ctx)
        if not all(0 < number <= 1 for number in numbers):
            self.fail(f"{value!r} must be shares in (0, 1], a density or a work", param, ctx)
        return numbers


class Tile(AnyType):
    """`128x64`: queries and keys of a tile; `64` is 64x64."""

    name = "QxK"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Two positive integers."""
        if not isinstance(value, str):
            return value
        queries, times, keys = value.lower().partition("x")
        sides = (queries, keys if times else queries)
        if not all(side.isdecimal() and len(side) <= 5 and int(side) for side in sides):
            self.fail(f"{value!r} is not a tile like 64x64", param, ctx)
        return tuple(map(int, sides))


class Depths(AnyType):
    """`10`, as many depths, or `0,25,50`, percentages."""

    name = "N|P[,P...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A number of depths, or a tuple of percentages."""
        if not isinstance(value, str):
            return value
        try:
            return tuple(float(part) for part in value.split(",")) if "," in value else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number of depths like 10 nor percentages like 0,25,50", param, ctx)


class Defaulting(click.Group):
    """A group with a command, `run`, that need not be named: what names no other command are its arguments."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, with `run` put before what begins otherwise."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@contextmanager
def clear_errors() -> Iterator[None]:
    """What the library refuses becomes a message without a traceback."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError, FloatingPointError, MemoryError) as error:
        raise click.ClickException(str(error)) from error


def refuse_input(out: Path, files: Iterable[str | Path]) -> None:
    """ValueError where a file to be written is one of those that the same command reads or writes."""
    for file in files:
        if os.path.realpath(out) == os.path.realpath(file):
            raise ValueError(f"{out} is named twice in this command and would be replaced: name another file to write")


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Callable[[int], Any]]:
    """A function that adds steps to a bar on standard error."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, file=sys.stderr, dynamic_ncols=True) as bar:
        yield bar.update
