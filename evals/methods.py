"""Methods as the evaluations name them: a name with its options, applied to a model for a while."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from sparseprefill.huggingface import Patch, patch_model
from sparseprefill.patterns.methods import METHODS
from sparseprefill.patterns.names import parse_options
from sparseprefill.patterns.parts import estimates
from sparseprefill.patterns.stem import Stem


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method with its options; "dense" without options is the stock model, unpatched."""

    name: str  # in `METHODS`
    options: dict[str, Any] = field(default_factory=dict)  # of the method

    @staticmethod
    def parse(text: str) -> MethodSpec:
        """`block_sparse:keep=0.2,sink=64` or just `a_shape`. Raises ValueError where an option is not name=value."""
        name, _, options = text.partition(":")
        return MethodSpec(name, parse_options(options))

    @staticmethod
    def at_density(name: str, density: float) -> MethodSpec:
        """One of the built-in methods with the budget that keeps this share of the visible pairs.

        Raises ValueError for a name that is none of them.
        """
        known = [each for each, row in METHODS.items() if row.share or each == "dense"]
        if name in METHODS and name not in known:
            row = METHODS[name]
            example = f"{name}:{row.knob}={row.knobs[len(row.knobs) // 2]:g}"
            raise ValueError(
                f"{name} has no option that says its density: name its options, as in {example}; `sparseprefill "
                "compare --knobs-at` finds those of a density on a model"
            )
        if name not in known:
            raise ValueError(f"no budget of {name!r} is known for a density: choose one of {', '.join(known)}")
        row = METHODS[name]
        return MethodSpec(name, {**row.fixed, row.share: density} if row.share else {})

    @staticmethod
    def about_density(name: str, density: float) -> MethodSpec:
        """The same for any method, so that finding and attending can be timed: where no option says a density, with
        options that come to about as much on inputs that mean nothing.
        """
        if name == "stem":
            options = {**METHODS[name].fixed, "keep": 0.0}
            options["keep"] = round(Stem.for_density(density, options["decay"]).keep or density, 4)
            return MethodSpec(name, options)
        if name == "flexprefill":  # the best tiles of a map; mass lies on the short rows, whose tiles are few
            return MethodSpec(name, {**METHODS[name].fixed, "gamma": round(min(1.0, 2.5 * density), 4)})
        if name == "local_stride":  # every n-th block beside the window
            stride = METHODS[name].fixed["stride"]
            local = max(0.005, (density - 1 / stride) / (1 - 1 / stride))
            return MethodSpec(name, {**METHODS[name].fixed, "local": round(local, 4)})
        if name == "gna":  # a window of a share s of the prompt holds 2 s - s^2 of the pairs
            return MethodSpec(name, {**METHODS[name].fixed, "window": round(1 - math.sqrt(1 - density), 4)})
        if name in ("snapkv", "vote_columns", "zipvl"):  # as if all columns stood in front
            return MethodSpec(name, {"keep": round(1 - math.sqrt(1 - density), 4), "local": 64})
        if name == "tokenselect":  # beside it each row keeps half a stretch, in the mean
            return MethodSpec(name, {"keep": round(0.6 * density, 4), "superblock": 256, "sink": 64, "local": 64})
        if name == "hyperattention":
            return MethodSpec(name, {"segment": 512, "block": 64})
        if name == "union":
            half = round(density / 2, 4)
            return MethodSpec(name, {"inner": "block_sparse", "other": f"a_shape:sink=64:window={half}", "keep": half})
        if METHODS[name].wraps and name != "pbs":
            return MethodSpec(name, {"inner": "block_sparse", "keep": density})
        return MethodSpec.at_density(name, density)

    @property
    def label(self) -> str:
        """As it is parsed."""
        return self.name + (":" + ",".join(f"{k}={v}" for k, v in self.options.items()) if self.options else "")

    def looks_ahead(self, last_rows_dense: int = 0) -> bool:
        """Whether blocks depend on later tokens, so that likelihoods of a text are flattered.

        Last rows that attend densely depend on where the prompt ends.
        """
        if self.label == "dense":
            return False
        row = METHODS.get(self.name)
        if self.options.get("last_rows_dense", last_rows_dense) > 0 or (row is not None and row.looks_ahead):
            return True
        # what goes around another method looks ahead where that one does
        inner = self.options.get("inner", row.inner) if row is not None and row.wraps else None
        return isinstance(inner, str) and MethodSpec(inner).looks_ahead()

    @property
    def estimates(self) -> bool:
        """Whether no mass is known to be kept, see `sparseprefill.patterns.parts.estimates`."""
        names = (self.name, self.options.get("inner"), str(self.options.get("other", "")).partition(":")[0])
        return any(estimates(METHODS[name].pattern) for name in names if name in METHODS)

    @contextlib.contextmanager
    def applied(self, model: PreTrainedModel, **settings: Any) -> Iterator[Patch | None]:
        """The model with this method; None for the stock model. Options of its own win over `settings`."""
        if self.name == "dense" and not self.options:
            yield None
            return
        with patch_model(model, self.name, **{**settings, **self.options}) as patch:
            yield patch
