"""The table of context methods: those that serve many questions about one fixed context. One row each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sparseprefill.patterns.names import nearest_name
from sparseprefill.patterns.retrieval import Retrieval
from sparseprefill.patterns.squeezed import Squeezed


@dataclass(frozen=True, slots=True)
class ContextRow:
    """One line of the table."""

    method: type[Any]  # its dataclass; the fields are the method's options
    summary: str  # what it keeps
    paper: str
    native: tuple[int, int]  # queries and keys that are chosen together in its paper
    cost: str = ""  # law of finding the keys, in products of a head and query; n keys of the context
    knob: str = "density"  # the option that says how much is kept
    kind: str = "context"
    looks_ahead: bool = True  # queries of a block share a choice, which later ones of it have a say in
    chunked: str = "own"  # a chunk of a question has blocks of its own

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that go with the method's name."""
        return tuple(each.name for each in dataclasses.fields(self.method))


VERBS = ("check_length", "index_layer", "calibrate", "load_index")

CONTEXT_METHODS = {
    "squeezed": ContextRow(
        Squeezed,
        "keys of clusters that a block of queries is likely to look at",
        "arXiv:2411.09688",
        (128, 128),
        cost="share of clusters x n",
    ),
    "retrieval": ContextRow(
        Retrieval,
        "the keys nearest to each query, found in an index",
        "arXiv:2409.10516",
        (1, 1),
        cost="what a walk meets",
    ),
}
"""By name, in the order in which they are listed."""


def context_method(method: Any, options: dict[str, Any]) -> Any:
    """A context method by name with its options, or an object with the verbs of one.

    Raises ValueError for an unknown name or option (with the nearest known one), TypeError for other objects.
    """
    if isinstance(method, str):
        if method not in CONTEXT_METHODS:
            raise ValueError(f"unknown context method {method!r:.80}.{nearest_name(method, CONTEXT_METHODS)} "
                             f"Context methods: {', '.join(CONTEXT_METHODS)}")  # fmt: skip
        row = CONTEXT_METHODS[method]
        for name in options:
            if name not in row.options:
                raise ValueError(
                    f"context method {method!r} has no option {name!r:.80}.{nearest_name(name, row.options)} Its "
                    f"options: {', '.join(row.options)}"
                )
        return row.method(**options)
    if not all(callable(getattr(method, verb, None)) for verb in VERBS):
        raise TypeError(
            f"a context method is a name ({', '.join(CONTEXT_METHODS)}) or an object with "
            f"{', '.join(VERBS)}, got {type(method).__name__}"
        )
    if options:
        raise ValueError(f"options go with a method's name; {type(method).__name__} got {', '.join(options)}")
    return method
