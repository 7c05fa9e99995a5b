"""The table of methods: every method that has a name, one row each. Nothing registers itself."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from sparseprefill.patterns.a_shape import AShape
from sparseprefill.patterns.block_sparse import BlockSparse
from sparseprefill.patterns.cached import Cached
from sparseprefill.patterns.cluster_segments import ClusterSegments
from sparseprefill.patterns.delta_correct import DeltaCorrect
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.flashprefill import FlashPrefill
from sparseprefill.patterns.flexprefill import FlexPrefill
from sparseprefill.patterns.gna import Gna
from sparseprefill.patterns.hip import Hip
from sparseprefill.patterns.hyperattention import HyperAttention
from sparseprefill.patterns.l_mul import LMul
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.layer_carry import LayerCarry
from sparseprefill.patterns.local_stride import LocalStride
from sparseprefill.patterns.names import nearest_name, parse_options
from sparseprefill.patterns.pbs import PUBLISHED as PUBLISHED_INNER
from sparseprefill.patterns.pbs import Pbs
from sparseprefill.patterns.progressive import Progressive
from sparseprefill.patterns.random_blocks import RandomBlocks
from sparseprefill.patterns.sale import PUBLISHED as PUBLISHED_THRESHOLD
from sparseprefill.patterns.sale import Sale
from sparseprefill.patterns.sign_code import SignCode
from sparseprefill.patterns.skip_softmax import SkipSoftmax
from sparseprefill.patterns.spargeattn import SpargeAttn
from sparseprefill.patterns.stem import Stem
from sparseprefill.patterns.tri_shape import TriShape
from sparseprefill.patterns.union import Union
from sparseprefill.patterns.vertical_slash import PUBLISHED, VerticalSlash
from sparseprefill.patterns.vote_columns import VoteColumns, snapkv, tokenselect, zipvl
from sparseprefill.patterns.xattention import XAttention

KINDS = ("static", "selector", "wrapper", "kernel option", "context")
"""Static: does not look at the prompt; selector: does; wrapper: changes how another method runs; kernel option: what
the kernel leaves out while it runs, of the blocks of another method; context: serves questions about a fixed context,
and has a table of its own (`sparseprefill.patterns.context_methods`).
"""

SHARES = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7)
"""Values of a knob that is a share of the visible keys."""


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One line of the methods table."""

    pattern: type[Any]  # its dataclass; the fields are the method's options
    kind: str  # one of KINDS
    summary: str  # what it keeps
    paper: str  # where it was published, or ""
    looks_ahead: bool  # may the blocks of a row depend on later tokens?
    chunked: str  # "identical": the index of a chunk is that part of the one-shot index;
    # "own": it is the method applied to the chunk's own queries and all earlier keys
    native: tuple[int, int] = (64, 64)  # queries and keys of a tile in its paper
    share: str = ""  # the option that takes a density, "" where there is none
    knob: str = ""  # the option that `sparseprefill compare` sweeps, "" for none
    knobs: tuple[float, ...] = ()  # its values, those that keep least first
    fixed: dict[str, Any] = field(default_factory=dict)  # options that go with `share` and `knob`
    make: Callable[..., Pattern] | None = None  # called with the options; None: `pattern` itself
    names: tuple[str, ...] = ()  # options of `make` where they are others than the fields of `pattern`
    inner: str = "dense"  # name of the method that a wrapper goes around where `inner=` names no other,
    around: Callable[[dict[str, Any]], dict[str, Any]] = dict  # and that one's options, made of those given
    cost: str = ""  # law of finding the blocks, in products of a head; n tokens, n^2 pairs
    profile: tuple[type[Any], ...] | None = None  # `profile=` gives each head one of these; (): any pattern

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that go with the method's name."""
        own = self.names or tuple(each.name for each in dataclasses.fields(self.pattern))
        return (*(("profile",) if self.profile is not None else ()), *own)

    @property
    def wraps(self) -> bool:
        """Whether it goes around another method, whose options may stand beside its own."""
        return any(each.name == "inner" for each in dataclasses.fields(self.pattern))

    @property
    def stored(self) -> bool:
        """Whether profiles hold its pattern under this name: not what goes around others, or moves keys for a whole
        layer, nor a second name.
        """
        return not self.wraps and not self.names and getattr(self.pattern, "in_parts", False) is not True

    def build(self, **options: Any) -> Pattern:
        """The pattern with these options."""
        pattern: Pattern = (self.make or self.pattern)(**options)
        return pattern

    def at(self, value: float) -> Pattern:
        """The pattern at one value of the knob."""
        options = {**self.fixed, self.knob: value}
        if self.wraps and self.knob not in self.options:  # a knob of what it goes around
            return self.build(inner=METHODS[self.inner].build(**self.around(options)))
        return self.build(**options)


def _minference(budget: str | None = None, density: float | None = None, probe: int = 64) -> VerticalSlash:
    """Vertical-slash for every head, where there is no profile."""
    if budget is not None and density is not None:
        raise ValueError("minference takes either a budget or a density")
    if budget is None:
        return VerticalSlash(density=0.2 if density is None else density, probe=probe)
    if budget != "paper":
        raise ValueError(f"minference knows budget='paper' (1000 verticals, 6096 slashes), got {budget!r}")
    verticals, slashes = PUBLISHED
    return VerticalSlash(verticals=verticals, slashes=slashes, probe=probe)


def _vertical_slash(**options: Any) -> VerticalSlash:
    if not {"verticals", "slashes", "density"} & options.keys():
        options["density"] = 0.2
    return VerticalSlash(**options)


def _mean_pooled(options: dict[str, Any]) -> dict[str, Any]:
    """What pbs goes around: nothing is forced, as it keeps each row's own segment; a mass where there is no budget."""
    made = {"sink": 0, "local": 0, **options}
    return made if options.keys() & {"keep", "mass"} else {**made, "mass": PUBLISHED_INNER.mass}


def _sale(**options: Any) -> Sale:
    if options.keys().isdisjoint(("threshold", "keep")):
        options["threshold"] = PUBLISHED_THRESHOLD
    return Sale(**options)


def _union(inner: Pattern, other: str | Pattern = "a_shape:window=1024") -> Union:
    """The second method by name, with options as `NAME:option=value:option=value`, or as a pattern."""
    if not isinstance(other, str):
        return Union(inner, other)
    name, _, text = other.partition(":")
    if name not in METHODS or METHODS[name].wraps:
        raise ValueError(
            f"other must be a method that goes around no other one, got {name!r:.80}.{nearest_name(name, METHODS)}"
        )  # fmt: skip
    options = parse_options(text.replace(":", ","))
    for option in options:
        if option not in METHODS[name].options or option == "profile":
            raise ValueError(f"method {name!r} has no option {option!r}.{nearest_name(option, METHODS[name].options)}")
    return Union(inner, METHODS[name].build(**options))


def _vote_columns(**options: Any) -> VoteColumns:
    if not {"keep", "mass"} & options.keys():
        options["keep"] = 0.2
    return VoteColumns(**options)


def parameters(make: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the options of a preset."""
    return tuple(inspect.signature(make).parameters)


DEFAULT = "stem"
"""The method where none is named and there is no profile, with the options of `DEFAULT_OPTIONS` where none are given.

Provisional: chosen by `sparseprefill compare` on the model inside, made-up heads and captures; see docs/compare.md.
"""

DEFAULT_OPTIONS: dict[str, Any] = {"keep": 0.12, "decay": 0.7, "sink": 64, "local": 128}


METHODS: dict[str, MethodRow] = {
    "dense": MethodRow(Dense, "static", "every block", "", False, "identical", cost="nothing"),
    "a_shape": MethodRow(
        AShape, "static", "first tokens and a local window", "arXiv:2309.17453", False, "identical",
        share="window", knob="window", knobs=SHARES, fixed={"sink": 64},
        cost="nothing",
    ),
    "tri_shape": MethodRow(
        TriShape, "static", "A-shape, last rows dense", "arXiv:2412.10319", True, "own",
        share="window", knob="window", knobs=SHARES, fixed={"sink": 64},
        cost="nothing",
    ),
    "local_stride": MethodRow(
        LocalStride, "static", "a local window, and every n-th block, others in each KV head", "arXiv:2407.17678",
        False, "identical", knob="local", knobs=SHARES, fixed={"stride": 16},
        cost="nothing",
    ),
    "gna": MethodRow(
        Gna, "static", "a window with a stride and a dilation, and windows of images and videos", "arXiv:2504.16922",
        True, "own", knob="window", knobs=SHARES, fixed={"stride": 64},
        cost="nothing",
    ),
    "vertical_slash": MethodRow(
        VerticalSlash, "selector", "key columns and distances the last queries attend to", "arXiv:2407.02490", True,
        "own", share="density", knob="density", knobs=SHARES, make=_vertical_slash,
        cost="probe x n",
    ),
    "block_sparse": MethodRow(
        BlockSparse, "selector", "blocks whose mean key fits the mean query", "arXiv:2407.02490", False, "own",
        share="keep", knob="keep", knobs=SHARES,
        cost="n + n^2 / tile",
    ),
    "flashprefill": MethodRow(
        FlashPrefill, "selector", "blocks whose mean key is nearly as strong as the strongest", "arXiv:2603.06199",
        False, "own", (128, 128), share="keep", knob="alpha", knobs=(0.98, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.03),
        fixed={"sink": 64, "local": 128},
        cost="n^2 / block",
    ),
    "xattention": MethodRow(
        XAttention, "selector", "blocks of most mass, as estimated along antidiagonals", "arXiv:2503.16428", False,
        "own", (128, 128), share="keep", knob="threshold", knobs=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        cost="n^2 / stride",
    ),
    "stem": MethodRow(
        Stem, "selector", "a budget that falls along the prompt, by antidiagonals and long values", "arXiv:2603.06274",
        True, "own", (128, 128), knob="keep", knobs=(0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5),
        fixed={"decay": 0.7, "sink": 64, "local": 128},
        cost="n^2 / stride^2",
    ),
    "flexprefill": MethodRow(
        FlexPrefill, "selector", "columns and lines of the last block's attention, or the best tiles of a map",
        "arXiv:2502.20766", True, "own", (128, 128), knob="gamma", fixed={"min_budget": 128},
        knobs=(0.05, 0.15, 0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 0.95),
        cost="block x n + n^2 / tile",
    ),
    "spargeattn": MethodRow(
        SpargeAttn, "selector", "the best block means, and blocks whose mean does not speak for them",
        "arXiv:2502.18137", True, "own", (128, 64), share="topk", knob="topk", knobs=SHARES,
        cost="block x n + n^2 / tile",
    ),
    "vote_columns": MethodRow(
        VoteColumns, "selector", "key columns that a few rows vote for", "arXiv:2404.14469", True, "own",
        share="keep", make=_vote_columns,
        cost="2 probe x n",
    ),
    "snapkv": MethodRow(
        VoteColumns, "selector", "columns that the last queries vote for, with their neighbours", "arXiv:2404.14469",
        True, "own", share="keep", knob="keep", knobs=SHARES, make=snapkv, names=parameters(snapkv),
        cost="2 probe x n",
    ),
    "tokenselect": MethodRow(
        VoteColumns, "selector", "for each stretch the columns that its mean query votes for", "arXiv:2411.02886",
        True, "own", share="keep", knob="keep", knobs=SHARES, make=tokenselect, names=parameters(tokenselect),
        cost="2 n^2 / superblock",
    ),
    "zipvl": MethodRow(
        VoteColumns, "selector", "as many columns as hold a mass, by votes of recent and random queries",
        "arXiv:2410.08584", True, "own", share="keep", knob="mass", make=zipvl, names=parameters(zipvl),
        knobs=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.975),
        cost="2 (probe + spread) x n",
    ),
    "hip": MethodRow(
        Hip, "selector", "chunks whose probed keys fit a row's queries, in stages from large to small",
        "arXiv:2502.08910", False, "own", share="keep", knob="keep", knobs=SHARES,
        fixed={"sink": 64, "local": 256, "most": 1.0},
        cost="n^2 log(chunk) / (chunk x stride) + kept x n",
    ),
    "sign_code": MethodRow(
        SignCode, "selector", "blocks with a pair whose signs agree", "arXiv:2306.06446", True, "own",
        share="keep", knob="keep", knobs=SHARES,
        cost="n^2, of one bit",
    ),
    "l_mul": MethodRow(
        LMul, "selector", "blocks whose mean key fits the mean query, by additions alone", "arXiv:2410.00907", False,
        "own", share="keep", knob="keep", knobs=SHARES,
        cost="n + n^2 / tile, additions",
    ),
    "hyperattention": MethodRow(
        HyperAttention, "selector", "blocks of alike hashes between halves, and drawn keys for all others: a baseline",
        "arXiv:2310.05869", True, "own", (256, 256), cost="2 bits x n x log(n / segment)",
    ),
    "clusters": MethodRow(
        ClusterSegments, "selector", "tiles of keys that lie sorted by cluster in finished segments, and the own one",
        "arXiv:2505.02922", False, "own", share="keep", knob="keep", knobs=SHARES,
        cost="segment x n / tokens + n^2 / tokens",
    ),
    "pbs": MethodRow(
        Pbs, "wrapper", "what another method finds among sorted keys, and each row's own segment", "arXiv:2510.21270",
        True, "own", (128, 128), share="keep", knob="keep", knobs=SHARES, inner="block_sparse", around=_mean_pooled,
        cost="the inner one's + probe x n",
    ),
    "union": MethodRow(
        Union, "wrapper", "what another method finds, and what a second one does", "", False, "own",
        knob="keep", knobs=SHARES, inner="block_sparse", make=_union, names=("inner", "other"),
        cost="that of both",
    ),
    "cached": MethodRow(
        Cached, "wrapper", "what another method finds, once for rows that are alike", "arXiv:2411.02886", False, "own",
        knob="keep", knobs=SHARES, inner="block_sparse",
        cost="the inner one's, at most",
    ),
    "layer_carry": MethodRow(
        LayerCarry, "wrapper", "what another method finds, without blocks that earlier layers hardly looked at",
        "arXiv:2012.09852", True, "own", knob="keep", knobs=SHARES, inner="block_sparse",
        names=("inner", "start", "fall", "least", "probe", "first", "near"),
        cost="the inner one's + 2 probe x n",
    ),
    "progressive": MethodRow(
        Progressive, "wrapper", "what another method finds with few bits, and with all of them in flat rows",
        "arXiv:2012.09852", False, "own", knob="keep", knobs=SHARES, inner="block_sparse",
        cost="the inner one's, twice at most, + n^2 / block",
    ),
    "delta_correct": MethodRow(
        DeltaCorrect, "wrapper", "what another method finds; outputs corrected by every n-th query's dense one",
        "arXiv:2505.11254", False, "own", knob="keep", knobs=SHARES, inner="block_sparse",
        cost="the inner one's + 2 n^2 / every",
    ),
    "skip_softmax": MethodRow(
        SkipSoftmax, "kernel option", "of another method's blocks, what the kernel does not find negligible",
        "arXiv:2512.12087", False, "identical", (128, 128), knob="scale",
        knobs=(1000.0, 100.0, 10.0, 1.0),  # each costs a whole pass over the logits to measure
        cost="every listed logit",
    ),
    "random": MethodRow(
        RandomBlocks, "static", "random blocks, sink and window: the control", "", False, "identical",
        share="keep", knob="keep", knobs=SHARES,
        cost="tiles drawn",
    ),
    "minference": MethodRow(
        VerticalSlash, "selector", "a pattern for each head from a profile, else vertical-slash", "arXiv:2407.02490",
        True, "own", share="density", make=_minference, names=("budget", "density", "probe"), profile=(),
        cost="that of its patterns",
    ),
    "sale": MethodRow(
        Sale, "selector", "blocks with a pair whose 4-bit estimate passes a threshold", "arXiv:2505.24179", True,
        "own", (64, 32), share="keep", knob="keep", knobs=SHARES, make=_sale, profile=(Sale, Dense),
        cost="n^2, of four bits",
    ),
}  # fmt: skip
"""By name, in the order in which they are listed."""
