"""Is a profile better than giving every head the same pattern? Asked at equal density, on prompts it was not made with.

On each prompt the profile's kept mass and density are measured beside those of uniform patterns at densities around
it; the kept mass of a family at exactly the profile's density is read off the line between its neighbours. Everything
is paired by prompt, and intervals are bootstrapped over prompts; in each resample the profile meets whichever family is
the best there.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.huggingface_modules import model_facts, text_config, unwrap
from sparseprefill.patterns import ModelPatterns, Pattern, Sale
from sparseprefill.patterns.candidates import Candidate
from sparseprefill.prefill import resolve_method
from sparseprefill.profile import ProfileCost, score_model
from sparseprefill.profile_scores import ProfileScores
from sparseprefill.prompts import ProfilePrompt
from sparseprefill.reports import number, table

FAMILIES = ("a_shape", "tri_shape", "vertical_slash", "block_sparse")
"""What a profile is compared with; random blocks are shown beside them. One with thresholds of SALE also with that."""

_CONTROL = "random"
_AROUND = (0.75, 0.9, 1.0, 1.1, 1.3)  # densities of uniform patterns, in the profile's own
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class PromptCheck:
    """One prompt; means over all heads that were scored."""

    name: str  # of the prompt
    tokens: int  # its length
    density: float  # of the profile
    mass: float  # that the profile keeps
    uniform: dict[str, float | None]  # that each family keeps at this density; None: it cannot be that sparse


@dataclass(frozen=True, slots=True)
class ProfileCheck:
    """What a comparison came to. `str()` gives a table."""

    prompts: tuple[PromptCheck, ...]
    best: str  # the family that keeps most, over all prompts
    ratio: float  # mass that the profile loses over what the best family loses
    low: float  # of its 95 % interval
    high: float

    @property
    def density(self) -> float:
        """Mean over the prompts."""
        return float(np.mean([each.density for each in self.prompts]))

    @property
    def mass(self) -> float:
        """Kept by the profile, mean over the prompts."""
        return float(np.mean([each.mass for each in self.prompts]))

    def _mean(self, family: str) -> float | None:
        kept = [each.uniform[family] for each in self.prompts]
        some = [mass for mass in kept if mass is not None]
        return float(np.mean(some)) if len(some) == len(kept) else None

    def __str__(self) -> str:
        families = list(self.prompts[0].uniform)
        rows = [
            [each.name, str(each.tokens), number(each.density), number(each.mass),
             *(number(each.uniform[family]) for family in families)]
            for each in self.prompts
        ]  # fmt: skip
        means = [number(self._mean(family)) for family in families]
        rows.append(["mean", "", number(self.density), number(self.mass), *means])
        head = ["prompt", "tokens", "density", "this profile", *(f"every head {family}" for family in families)]
        return (
            "kept attention mass at the density of this profile, mean over heads\n"
            f"{table(head, rows)}\n"
            f"lost mass over that of {self.best}, the best uniform pattern: {self.ratio:.3f}, 95% interval "
            f"{self.low:.3f} to {self.high:.3f} over {len(self.prompts)} prompts"
        )


def check_profile(
    model: Any,
    profile: ModelPatterns,
    prompts: Sequence[Any],
    *,
    tokenizer: Any = None,
    block: int = 64,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda tiles: None,
    announce: Callable[[ProfileCost], Any] = lambda cost: None,
) -> ProfileCheck:
    """Compare a profile with uniform patterns at its own density.

    Args:
        model: the profile's.
        profile: to be judged.
        prompts: as for `profile_model`; they should be none that it was made with.
        tokenizer: for prompts that are texts.
        block: tokens of a tile, both ways.
        seed: of the bootstrap.
        progress, announce: as for `profile_model`.

    Raises:
        ValueError: fewer than two prompts, a profile of another model, and what `score_model` raises.
    """
    if len(prompts) < 2:
        raise ValueError(f"an interval needs at least two prompts, got {len(prompts)}")
    mismatch = profile.mismatch(model_facts(text_config(unwrap(model))))
    if mismatch:
        raise ValueError(f"this profile is of another model: {mismatch}")
    with tempfile.TemporaryDirectory(prefix="sparseprefill-") as made:
        options: dict[str, Any] = {"tokenizer": tokenizer, "block": block}
        own = [Candidate("profile", _Whole(profile), control=True)]
        families: tuple[str, ...] = FAMILIES
        if any(isinstance(pattern, Sale) for heads in profile.layers for pattern in heads):
            families = (*FAMILIES, "sale")
        # a profile is denser in short prompts: each length needs neighbours of its own
        first = score_model(model, _one_a_length(prompts), candidates=own, folder=Path(made) / "first", **options)
        wanted = {
            float(f"{min(1.0, _means(first, number)[1][0] * around):.3g}")
            for number in range(len(first.prompts)) for around in _AROUND
        }  # fmt: skip
        uniform = [
            Candidate(family, _uniform(family, density), control=True)
            for family in (*families, _CONTROL) for density in sorted(wanted)
        ]  # fmt: skip
        scores = score_model(
            model,
            prompts,
            candidates=[*own, *uniform],
            folder=Path(made) / "all",
            announce=announce,
            progress=progress,
            **options,
        )
        return _compared(scores, [each.family for each in uniform], seed)


def check_new(profile: ModelPatterns, source: str, prompts: Sequence[ProfilePrompt]) -> None:
    """Raise ValueError where a prompt has the name, and the source, of one that the profile was tuned on."""
    listed: Any = profile.made.get("prompts")
    if profile.made.get("source") != source or not isinstance(listed, list):
        return
    tuned_on = [each.get("name") for each in listed if isinstance(each, dict) and each.get("held_out") is False]
    for prompt in prompts:
        if prompt.name in tuned_on:
            raise ValueError(
                f"{source}: this profile was tuned on the prompt {prompt.name}, so that it cannot be judged by it: "
                "take another seed, or other prompts"
            )


def _one_a_length(prompts: Sequence[Any]) -> list[Any]:
    """The first prompt of each length; of texts, whose length is not known yet, each."""
    found: dict[Any, Any] = {}
    for place, prompt in enumerate(prompts):
        ids = prompt.token_ids if isinstance(prompt, ProfilePrompt) else prompt
        # lengths within a twentieth are one: some built-in prompts fall short of what was asked for
        key = (place, "text") if isinstance(ids, str) else round(math.log(max(1, len(ids))) * 20)
        found.setdefault(key, prompt)
    return list(found.values())


def _lost(mass: float | None) -> float:
    return np.inf if mass is None else 1 - mass


@dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    """A profile as a candidate."""

    profile: ModelPatterns

    def for_layer(self, layer: int) -> Pattern:
        return self.profile.for_layer(layer)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        raise AssertionError("a profile has a pattern for each layer")


def _uniform(family: str, density: float) -> Pattern:
    pattern = resolve_method(family, **MethodSpec.at_density(family, density).options)
    assert not isinstance(pattern, ModelPatterns)
    return pattern


def _means(scores: ProfileScores, prompt: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Kept mass and density of each candidate on a prompt, means over all heads of all layers."""
    loaded = [scores.load(prompt, layer)[0] for layer in scores.layers]
    mass = np.concatenate([(each.mass / each.queries).numpy() for each in loaded])
    density = np.concatenate([(each.kept / each.visible).double().numpy() for each in loaded])
    return mass.mean(0), density.mean(0)


def _compared(scores: ProfileScores, families: Sequence[str], seed: int) -> ProfileCheck:
    found = []
    for place, prompt in enumerate(scores.prompts):
        mass, density = _means(scores, place)
        columns = {name: [n + 1 for n, each in enumerate(families) if each == name] for name in dict.fromkeys(families)}
        # dense closes each curve: it keeps everything
        uniform = {
            name: None
            if density[near].min() > density[0]
            else float(np.interp(density[0], [*density[near], 1.0], [*mass[near], 1.0]))
            for name, some in columns.items()
            if (near := sorted(some, key=lambda column: (density[column], mass[column])))
        }
        found.append(PromptCheck(prompt.name, prompt.tokens, float(density[0]), float(mass[0]), uniform))
    own = np.array([1 - each.mass for each in found])
    judges = [name for name in found[0].uniform if name != _CONTROL]
    # [prompts, families]; a family that cannot be so sparse on every prompt is none to compare with
    others = np.array([[_lost(each.uniform[name]) for name in judges] for each in found])
    if np.isinf(others.mean(0).min()):
        raise ValueError(
            f"this profile's density, {found[0].density:.3f}, is below what any uniform pattern can have at this "
            "length: take longer prompts"
        )

    def ratio(chosen: np.ndarray[Any, Any]) -> Any:
        return own[chosen].mean(-1) / np.maximum(others[chosen].mean(-2).min(-1), 1e-12)

    everyone = np.arange(len(found))
    drawn = ratio(np.random.default_rng(seed).integers(0, len(found), (_RESAMPLES, len(found))))
    low, high = np.quantile(drawn, [0.025, 0.975])
    best = judges[int(others.mean(0).argmin())]
    return ProfileCheck(tuple(found), best, float(ratio(everyone)), float(low), float(high))
