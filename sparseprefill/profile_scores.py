"""What the profiler has measured, on the disk, and how a pattern is chosen from it.

A folder of scores holds `run.json` (everything that the scores depend on) and one safetensors file for each prompt and
layer. It is written as the profiler goes, so that a run can be resumed; and it is kept, so that another target can be
chosen, or a page drawn, without running the model again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparseprefill import __version__
from sparseprefill.files import check_same, lock, read_json, write_bytes, write_text
from sparseprefill.patterns.allocation import allocate, cheapest_reaching
from sparseprefill.patterns.candidates import Candidate
from sparseprefill.patterns.dense import Dense
from sparseprefill.patterns.last_rows import Pattern
from sparseprefill.patterns.minference_search import CANDIDATES as MINFERENCE
from sparseprefill.patterns.minference_search import choose as choose_as_minference
from sparseprefill.patterns.sale import Sale
from sparseprefill.patterns.sale_search import ERROR, check_error, ladder
from sparseprefill.patterns.sale_search import choose as choose_as_sale
from sparseprefill.patterns.scores import BINS, CandidateTable, LayerScores, Picture, summarise
from sparseprefill.patterns.store import PATTERNS, HeadScore, ModelPatterns

SCHEMA = "sparseprefill-scores-1"
"""Of a folder of scores; another one is refused."""

_COUNTS = ("mass", "lost", "queries", "kept", "visible", "tiles", "dense_tiles", "estimator")
_DIGITS = 6  # of numbers in a profile


@dataclass(frozen=True, slots=True)
class TargetMass:
    """Each head gets the cheapest candidate that keeps so much of its attention mass; dense where none does.

    What counts is the mass that all query rows but the share `quantile` of `choose` keep at least. Raises ValueError
    for a mass outside of (0, 1].
    """

    mass: float = 0.98

    def __post_init__(self) -> None:
        _check_share("the target mass", self.mass)


@dataclass(frozen=True, slots=True)
class WorkBudget:
    """The candidates of all heads together that keep most mass, at a mean work of at most so much of dense attention.

    Raises ValueError for a work outside of (0, 1].
    """

    work: float = 0.2

    def __post_init__(self) -> None:
        _check_share("the budget", self.work)


@dataclass(frozen=True, slots=True)
class DensityBudget:
    """The candidates of all heads together that keep most mass, at a mean density of at most this.

    As `WorkBudget`, and finding the blocks costs nothing. Raises ValueError for a density outside of (0, 1].
    """

    density: float = 0.2

    def __post_init__(self) -> None:
        _check_share("the density", self.density)


@dataclass(frozen=True, slots=True)
class MInferenceSearch:
    """MInference's own search, for comparison: its candidates and its score, without its rewriting of winners.

    Jiang et al., 2024, arXiv:2407.02490. The scores must have been made for it (`score_model(..., search=True)`).
    """


@dataclass(frozen=True, slots=True)
class SaleSearch:
    """SALE's own calibration: each head's threshold halves until its output is within `error` a token of dense's.

    See `sparseprefill.patterns.sale_search` (arXiv:2505.24179). The candidates are dense and SALE at the thresholds of
    its ladder; the scores must hold their errors (`score_model(..., errors=True)`). Raises ValueError or TypeError for
    an error that is no finite number above 0.
    """

    error: float = ERROR

    def __post_init__(self) -> None:
        check_error(self.error)


Target = TargetMass | WorkBudget | DensityBudget | MInferenceSearch | SaleSearch
"""What a choice aims at."""


def _check_share(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number in (0, 1], got {value!r:.80}")
    if not 0 < value <= 1:
        raise ValueError(f"{what} must be in (0, 1], got {value!r:.80}")


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """A prompt that was scored."""

    name: str  # as it was given
    tokens: int  # its length
    held_out: bool  # it has no part in the choice


@dataclass(frozen=True, slots=True)
class CandidateInfo:
    """A candidate that was scored."""

    label: str  # see `Candidate`
    family: str  # name of its method
    control: bool  # never chosen


class ProfileScores:
    """A folder of scores. Raises what `read_json` raises for one that is damaged, and ValueError for another schema."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "run.json"
        data = read_json(path, "scores")
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"the scores {path} are not of schema {SCHEMA}: remove {self.folder} and profile again")
        try:
            self.settings: dict[str, Any] = data["settings"]
            self.candidates = tuple(CandidateInfo(**each) for each in self.settings["candidates"])
            self.prompts = tuple(PromptInfo(**each) for each in self.settings["prompts"])
            self.layers: tuple[int, ...] = tuple(self.settings["layers"])
            self.facts: dict[str, Any] = self.settings["facts"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the scores {path} are damaged ({error}): remove {self.folder}, profile again") from error

    @staticmethod
    def begin(folder: str | Path, settings: dict[str, Any], *, resume: bool, again: bool = False) -> ProfileScores:
        """Make a folder for these settings, or, with `resume`, go on in one that was begun with the same.

        `again` first removes the scores that are there.
        Raises ValueError where the folder is there and `resume` is not asked for, or its settings differ.
        """
        folder = Path(folder)
        settings = json.loads(json.dumps(settings, allow_nan=False))
        if again and (folder / "run.json").exists():
            ProfileScores(folder).remove()
        if (folder / "run.json").exists():
            if not resume:
                raise ValueError(f"{folder} holds scores of an earlier run: resume it, or remove it")
            check_same(ProfileScores(folder).settings, settings, folder / "run.json")
        else:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(f"{folder} is there and holds no scores: remove it, or name another")
            if not folder.exists():
                folder.mkdir()  # of two runs that begin at once, one fails here
            write_text(folder / "run.json", json.dumps({"schema": SCHEMA, "settings": settings}, indent=1) + "\n")
        return ProfileScores(folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out while this one writes; what a killed one left half-written is removed."""
        with (self.folder / "run.json").open("rb") as file:
            lock(file, self.folder)
            for torn in self.folder.glob(".*.part"):
                torn.unlink()
            yield

    def path(self, prompt: int, layer: int) -> Path:
        """The file of one prompt's layer."""
        return self.folder / f"prompt_{prompt:04d}_layer_{layer:04d}.safetensors"

    def missing(self, prompt: int) -> list[int]:
        """Layers of a prompt that have no scores yet."""
        return [layer for layer in self.layers if not self.path(prompt, layer).exists()]

    @property
    def complete(self) -> bool:
        """Every layer of every prompt has been scored."""
        return not any(self.missing(number) for number in range(len(self.prompts)))

    def add(
        self, prompt: int, layer: int, scores: LayerScores, search: Tensor | None = None, errors: Tensor | None = None
    ) -> None:
        """Write the scores of one prompt's layer, whole or not at all."""
        tensors = {name: getattr(scores, name) for name in _COUNTS}
        tensors["lost"] = tensors["lost"].to(torch.int32)
        if search is not None:
            tensors["search"] = search.double().cpu()
        if errors is not None:
            tensors["errors"] = errors.double().cpu()
        metadata = {}
        if scores.picture is not None:
            kept = scores.picture.kept
            tensors["picture_mass"] = scores.picture.mass
            tensors["picture_kept"] = torch.from_numpy(np.packbits(kept.numpy(), axis=-1))
            metadata["tiles"] = str(scores.picture.tiles)
        write_bytes(self.path(prompt, layer), save({k: v.contiguous() for k, v in tensors.items()}, metadata))

    def load(self, prompt: int, layer: int) -> tuple[LayerScores, Tensor | None]:
        """The scores of one prompt's layer, and those of MInference's search. ValueError where there are none."""
        scores, found = self._read(prompt, layer)
        return scores, found.get("search")

    def _read(self, prompt: int, layer: int) -> tuple[LayerScores, dict[str, Tensor]]:
        """The scores of one prompt's layer, and all that its file holds."""
        path = self.path(prompt, layer)
        if not path.exists():
            raise ValueError(
                f"{self.folder} has no scores of layer {layer} on prompt {self.prompts[prompt].name}: the run has not "
                "ended; resume it"
            )
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                tiles = int((file.metadata() or {}).get("tiles", "1"))
            counts = {name: found[name] for name in _COUNTS}
            counts["lost"] = counts["lost"].to(torch.int64)
            if counts["mass"].shape[1] != len(self.candidates) or counts["lost"].shape[2] != BINS:
                raise ValueError(f"it has {counts['mass'].shape[1]} candidates")
            if "errors" in found and found["errors"].shape != counts["mass"].shape:
                raise ValueError(f"it has errors of shape {tuple(found['errors'].shape)}")
            picture = None
            if "picture_mass" in found:
                cells = found["picture_mass"].shape[-1]
                kept = np.unpackbits(found["picture_kept"].numpy(), axis=-1, count=cells).astype(bool)
                picture = Picture(found["picture_mass"], torch.from_numpy(kept), tiles)
        except (SafetensorError, KeyError, ValueError, IndexError, OSError) as error:
            raise ValueError(f"the scores {path} are damaged ({error}): remove that file and resume the run") from error
        return LayerScores(**counts, picture=picture), found

    def table(self, layer: int, held_out: bool, quantile: float) -> CandidateTable:
        """Means over the tuning or the held-out prompts. ValueError where there are none."""
        chosen = [number for number, prompt in enumerate(self.prompts) if prompt.held_out == held_out]
        if not chosen:
            raise ValueError(f"{self.folder} has no {'held-out' if held_out else 'tuning'} prompts")
        return summarise([self.load(number, layer)[0] for number in chosen], quantile)

    def picture(self, layer: int) -> tuple[str, Picture] | None:
        """Where the mass of a layer lies, and on which prompt; None where no picture was kept."""
        for number in reversed(range(len(self.prompts))):
            if self.settings["picture"] == number:
                found = self.load(number, layer)[0].picture
                return None if found is None else (self.prompts[number].name, found)
        return None

    def search(self, layer: int) -> Tensor:
        """MInference's score, float64 [query_heads, its candidates], mean over the tuning prompts."""
        found = [self.load(number, layer)[1] for number, prompt in enumerate(self.prompts) if not prompt.held_out]
        scores = [each for each in found if each is not None]
        if not scores or len(scores) < len(found):
            raise ValueError(f"{self.folder} holds no scores of MInference's search: profile again with that target")
        return torch.stack(scores).mean(0)

    def errors(self, layer: int) -> Tensor:
        """float64 [tuning prompts, query_heads, candidates]: how far outputs are from those of dense attention.

        See `sparseprefill.patterns.sale_search.output_errors`.
        """
        found = [self._read(number, layer)[1] for number, prompt in enumerate(self.prompts) if not prompt.held_out]
        errors = [each["errors"] for each in found if "errors" in each]
        if not errors or len(errors) < len(found):
            raise ValueError(f"{self.folder} holds no errors of outputs: profile again for SALE's calibration")
        return torch.stack(errors)

    def remove(self) -> None:
        """Remove the whole folder. ValueError where another process writes it."""
        with (self.folder / "run.json").open("rb") as file:
            lock(file, self.folder)
            for each in self.folder.glob("*.safetensors"):
                each.unlink()
        shutil.rmtree(self.folder)


def read_scores(folder: str | Path) -> ProfileScores:
    """The scores in a folder. Raises FileNotFoundError without them, and ValueError for damaged ones."""
    return ProfileScores(folder)


def scores_folder(profile: str | Path) -> Path:
    """Where the scores lie that a profile was chosen from."""
    return Path(profile).with_name(Path(profile).name + ".scores")


def choose(
    scores: ProfileScores, candidates: Sequence[Candidate], target: Target, *, quantile: float = 0.1
) -> ModelPatterns:
    """A pattern for each head.

    Heads of layers that were not scored (local ones, which run exactly anyway) are dense and have no scores.

    Args:
        scores: complete ones.
        candidates: those that were scored, in order.
        target: what to aim at.
        quantile: `low_mass` is what all query rows but this share keep at least.

    Raises:
        ValueError: scores of other candidates, or incomplete ones; a budget below the cheapest allocation.
    """
    if [each.label for each in candidates] != [each.label for each in scores.candidates]:
        raise ValueError(f"{scores.folder} holds scores of other candidates")
    tuning = {layer: scores.table(layer, False, quantile) for layer in scores.layers}
    chosen, reached = _chosen(scores, candidates, target, tuning)
    some_held_out = any(prompt.held_out for prompt in scores.prompts)
    held_out = {layer: scores.table(layer, True, quantile) for layer in scores.layers} if some_held_out else {}
    facts = scores.facts
    count: int = facts["layers"]
    heads: Any = facts["query_heads"]
    each: list[int] = heads if isinstance(heads, list) else [heads] * count

    def patterns(layer: int) -> tuple[Pattern, ...]:
        if layer not in chosen:
            return (Dense(),) * each[layer]
        return tuple(candidates[column].pattern for column in chosen[layer].tolist())

    def of(tables: dict[int, CandidateTable], layer: int) -> tuple[HeadScore | None, ...]:
        if layer not in tables:
            return (None,) * each[layer]
        table = tables[layer]
        columns = chosen[layer][:, None]
        values = [
            getattr(table, name).gather(1, columns)[:, 0].tolist() for name in ("mass", "low_mass", "density", "work")
        ]
        return tuple(
            HeadScore(
                min(1.0, round(mass, _DIGITS)), round(low, _DIGITS), round(density, _DIGITS), round(work, _DIGITS)
            )
            for mass, low, density, work in zip(*values, strict=True)
        )

    settings = scores.settings
    made = {
        "sparseprefill": __version__, "target": reached, "quantile": quantile,
        **{key: settings[key] for key in ("block", "every", "dtype", "tiles", "prompts_digest")},
        "prompts": settings["prompts"], "candidates": [each.label for each in candidates if not each.control],
        **settings["details"],
    }  # fmt: skip
    layers = range(count)
    return ModelPatterns(
        tuple(map(patterns, layers)), facts, settings["weights"], tuple(of(tuning, layer) for layer in layers),
        tuple(of(held_out, layer) for layer in layers) if held_out else (), made,
    )  # fmt: skip


def _chosen(
    scores: ProfileScores, candidates: Sequence[Candidate], target: Target, tables: dict[int, CandidateTable]
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Columns of the candidates, int64 [query_heads] for each layer; and what the target came to, for the profile."""
    allowed = torch.tensor([n for n, each in enumerate(candidates) if not each.control])
    if isinstance(target, MInferenceSearch):
        if [each.pattern for each in candidates] != [Dense(), *MINFERENCE]:
            raise ValueError("MInference's search chooses among its own candidates, after dense: score those")
        found = {layer: choose_as_minference(scores.search(layer)) + 1 for layer in tables}  # dense stands first
        return found, {"kind": "minference"}
    if isinstance(target, SaleSearch):
        return _as_sale(scores, candidates, target, tables), {"kind": "sale", "error": target.error}
    if isinstance(target, TargetMass):
        dense = next(n for n, column in enumerate(allowed.tolist()) if isinstance(candidates[column].pattern, Dense))
        found = {
            layer: allowed[cheapest_reaching(table.low_mass[:, allowed], table.work[:, allowed], target.mass, dense)]
            for layer, table in tables.items()
        }
        return found, {"kind": "mass", "mass": target.mass}
    mass = torch.cat([table.mass[:, allowed] for table in tables.values()])
    kind, budget = ("budget", target.work) if isinstance(target, WorkBudget) else ("density", target.density)
    cost = "work" if kind == "budget" else "density"
    costs = torch.cat([getattr(table, cost)[:, allowed] for table in tables.values()])
    best = allocate(mass, costs, budget)
    heads = [len(table.mass) for table in tables.values()]
    found = dict(zip(tables, allowed[best.chosen].split(heads), strict=True))
    reached = {
        "kind": kind, cost: budget, "bound": round(best.bound, _DIGITS), "gap": round(best.gap, 9),
    }  # fmt: skip
    return found, reached


def _as_sale(
    scores: ProfileScores, candidates: Sequence[Candidate], target: SaleSearch, layers: Iterable[int]
) -> dict[int, Tensor]:
    """Columns of the candidates that SALE's own calibration ends on."""
    check_ladder(candidates)
    tokens = [prompt.tokens for prompt in scores.prompts if not prompt.held_out]
    steps = len(ladder())
    # dense stands before the ladder, and is the step behind its end
    return {
        layer: (choose_as_sale(scores.errors(layer)[:, :, 1:], tokens, target.error) + 1) % (steps + 1)
        for layer in layers
    }


def check_ladder(candidates: Sequence[Candidate]) -> None:
    """Raise ValueError for candidates that are not dense and SALE at the thresholds of its own calibration, in order.

    The other options of SALE are free, and the same for all.
    """
    patterns = [each.pattern for each in candidates]
    steps = [each for each in patterns[1:] if isinstance(each, Sale)]
    if (
        patterns[:1] != [Dense()]
        or len(steps) != len(patterns) - 1
        or tuple(each.threshold for each in steps) != ladder()
        or len({each.family for each in steps}) != 1
        or any(each.control for each in candidates)
    ):
        raise ValueError(
            "SALE's calibration chooses among dense and its own ladder of thresholds: leave the candidates out, or "
            "make them with sale_candidates(ladder(), ...) of sparseprefill.patterns"
        )


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Raise ValueError for candidates that repeat, that a profile cannot hold, or without dense among them."""
    labels = [each.label for each in candidates]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ValueError(f"the candidate {min(twice)} is there twice")
    for each in candidates:
        if not each.control and type(each.pattern) not in PATTERNS.values():
            raise ValueError(f"a profile holds {', '.join(PATTERNS)}, and no {type(each.pattern).__name__}")
    if not any(isinstance(each.pattern, Dense) and not each.control for each in candidates):
        raise ValueError("dense must be among the candidates: a head may need all of its attention")
