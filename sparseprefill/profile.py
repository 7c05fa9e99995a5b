"""The offline profiler: run a model densely, score every candidate on every layer, give each head its pattern.

A prompt is one forward pass. Each layer's queries and keys are scored when the layer runs and are then forgotten, so
that beside the model itself no more is held than `sparseprefill.patterns.scores.peak_bytes` says. Attention stays dense
throughout: what one layer loses does not change what the next one sees.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.huggingface import patch_model, plan_patch
from sparseprefill.huggingface_identity import model_identity
from sparseprefill.huggingface_layers import Settings
from sparseprefill.huggingface_masks import mask_of_layer, masks_of
from sparseprefill.huggingface_modules import (
    LayerShape,
    device_of,
    model_facts,
    model_window,
    tensor_parallel,
    text_config,
    unwrap,
)
from sparseprefill.huggingface_weights import weights_hash
from sparseprefill.patterns import Dense, ModelPatterns, Pattern, RandomBlocks, Sale
from sparseprefill.patterns.candidates import Candidate, sale_candidates
from sparseprefill.patterns.candidates import candidates as default_candidates
from sparseprefill.patterns.minference_search import CANDIDATES as MINFERENCE
from sparseprefill.patterns.minference_search import FIRST_ROW, search_peak_bytes, search_scores
from sparseprefill.patterns.names import parse_options
from sparseprefill.patterns.sale_search import error_peak_bytes, ladder, least_tokens, output_errors
from sparseprefill.patterns.scores import check_quantile, dense_tiles, peak_bytes, score
from sparseprefill.patterns.store import PATTERNS
from sparseprefill.prefill import resolve_method
from sparseprefill.profile_memory import available_bytes, longest_that_fits, out_of_memory
from sparseprefill.profile_scores import (
    MInferenceSearch,
    ProfileScores,
    SaleSearch,
    Target,
    TargetMass,
    check_candidates,
    check_ladder,
    choose,
)
from sparseprefill.prompts import ProfilePrompt


@dataclass(frozen=True, slots=True)
class ProfileCost:
    """What profiling will take, known before it begins."""

    prompts: int  # forward passes
    tokens: int  # of all prompts
    layers: int  # layers that are scored
    heads: int  # query heads of these layers
    tiles: int  # tiles of queries and keys whose products are computed, over all heads and prompts
    done: int  # of these tiles, that an earlier run has left
    peak_bytes: int  # held at most beside the model and its activations


def profile_model(
    model: Any,
    prompts: Sequence[Any],
    *,
    held_out: Sequence[Any] = (),
    candidates: Sequence[Any] | None = None,
    target: Target | float = 0.98,
    quantile: float = 0.1,
    block: int = 64,
    every: int = 1,
    tokenizer: Any = None,
    folder: str | Path | None = None,
    resume: bool = False,
    again: bool = False,
    details: dict[str, Any] | None = None,
    progress: Callable[[int], Any] = lambda tiles: None,
    announce: Callable[[ProfileCost], Any] = lambda cost: None,
) -> ModelPatterns:
    """Give each query head of a model the candidate that serves the target best on these prompts.

        profile = profile_model(model, [first_ids, second_ids], held_out=[third_ids], target=0.95)
        save_patterns(profile, "profile.json")
        patch_model(model, profile="profile.json")

    Args:
        model: as for `patch_model`, not patched.
        prompts: token ids of each prompt (a list, a 1-D tensor, a `ProfilePrompt`), or texts with a `tokenizer`.
        held_out: prompts on which the choice is measured but not made.
        candidates: a `Candidate`, a pattern, or a text such as "block_sparse:keep=0.1" each; None: the default table.
            Dense is always among them; random blocks are a control, scored and never chosen.
        target: a `TargetMass` (or its mass), a `WorkBudget`, a `DensityBudget`, or a search as it was published, which
            brings its candidates: `MInferenceSearch`, `SaleSearch`.
        quantile: share of the query rows that may keep less than what counts as kept.
        block: tokens of a tile, both ways; what `patch_model` will be given.
        every: score each n-th row of tiles only, for long prompts.
        tokenizer: for prompts that are texts.
        folder: where scores are kept; None: nowhere. See `ProfileScores`.
        resume: go on with what lies in `folder`.
        again: remove what lies in `folder`, when all that can be checked before has been.
        details: plain values that go into the profile as they are, such as seeds.
        progress: called with each number of tiles that was computed.
        announce: called once, before anything is computed.

    Raises:
        TypeError, ValueError: prompts that are none, shorter than two blocks (for SALE: than what it keeps in any
            case), or hold ids that the model has not; what `patch_model` refuses; a folder with scores of other
            settings; a target that cannot be reached.
        MemoryError: it will not fit, or did not; the message says which length would.
        NotImplementedError: the model cannot be patched, or is spread over several processes.
    """
    if isinstance(target, (int, float)):
        target = TargetMass(target)
    if not isinstance(target, Target):
        raise TypeError(
            "target is a TargetMass (or its mass), a WorkBudget, a DensityBudget, a MInferenceSearch or a SaleSearch, "
            f"got {target!r:.80}"
        )
    check_quantile(quantile)
    if resume and again:
        raise ValueError("resume keeps what is there, again removes it: choose one")
    chosen = _candidates(candidates, target)
    with _folder(folder) as place:
        scores = score_model(
            model, prompts, held_out=held_out, candidates=chosen, search=isinstance(target, MInferenceSearch),
            errors=isinstance(target, SaleSearch), block=block, every=every, tokenizer=tokenizer, folder=place,
            resume=resume, again=again, details=details, progress=progress, announce=announce,
        )  # fmt: skip
        return choose(scores, chosen, target, quantile=quantile)


def score_model(
    model: Any,
    prompts: Sequence[Any],
    *,
    held_out: Sequence[Any] = (),
    candidates: Sequence[Candidate],
    search: bool = False,
    errors: bool = False,
    block: int = 64,
    every: int = 1,
    tokenizer: Any = None,
    folder: str | Path,
    resume: bool = False,
    again: bool = False,
    details: dict[str, Any] | None = None,
    progress: Callable[[int], Any] = lambda tiles: None,
    announce: Callable[[ProfileCost], Any] = lambda cost: None,
) -> ProfileScores:
    """Score candidates on every layer of every prompt, into a folder; see `profile_model`, which also chooses.

    `search` also scores MInference's own candidates its own way; `errors` also measures, on the tuning prompts, how far
    each candidate's output is from that of dense attention, for `SaleSearch`.
    """
    model = unwrap(model)
    if tensor_parallel(model).ranks > 1:
        raise NotImplementedError("a profile is made in one process: load the model without tp_plan")
    taken = [
        *_prompts(model, prompts, tokenizer, block, "prompt"),
        *_prompts(model, held_out, tokenizer, block, "held-out"),
    ]
    if not prompts:
        raise ValueError("there is no prompt to tune on: give at least one")
    tuning = len(taken) - len(held_out)
    if len({prompt.name for prompt in taken}) < len(taken):
        raise ValueError("prompts need names of their own")
    plan = plan_patch(model, Dense(), settings=Settings(block_q=block, block_k=block))
    short = min(len(prompt.token_ids) for prompt in taken)
    if search and short <= FIRST_ROW:
        raise ValueError(
            f"MInference's search looks at query rows from {FIRST_ROW} on, and a prompt has {short} tokens: take "
            "longer prompts"
        )
    _check_tested(candidates, taken)
    masks = masks_of(model, 2 * block)
    layers = [
        number for number in sorted(plan.modules)
        if (mask := mask_of_layer(masks, plan.config, number)).local is None and mask.opaque is None
    ]  # fmt: skip
    if not layers:
        raise ValueError(
            f"no layer of {type(model).__name__} sees a whole prompt (all are local), so there is nothing to profile"
        )
    heads = {number: plan.shapes[number].query_heads for number in layers}
    a_head = [dense_tiles(len(prompt.token_ids), block, every) for prompt in taken]
    tiles = sum(a_head) * sum(heads.values())
    settings = {
        "facts": model_facts(plan.config), "weights": weights_hash(model)[0], "identity": model_identity(model),
        "dtype": str(model.dtype).removeprefix("torch."), "torch": torch.__version__, "layers": layers,
        "block": block, "every": every, "search": search, "errors": errors, "tiles": tiles,
        "picture": _pictured(taken, tuning),
        "candidates": [{"label": c.label, "family": c.family, "control": c.control} for c in candidates],
        "prompts": [
            {"name": p.name, "tokens": len(p.token_ids), "held_out": n >= tuning} for n, p in enumerate(taken)
        ],
        "prompts_digest": prompts_digest(taken), "details": details or {},
    }  # fmt: skip
    longest = max(len(prompt.token_ids) for prompt in taken)
    need = _need(plan.shapes, layers, len(candidates), block, search, errors)
    _check_memory(model, longest, need)
    scores = ProfileScores.begin(folder, settings, resume=resume, again=again)
    with scores.locked():
        left = sum(each * heads[layer] for n, each in enumerate(a_head) for layer in scores.missing(n))
        announce(
            ProfileCost(
                len(taken), sum(len(p.token_ids) for p in taken), len(layers), sum(heads.values()), tiles, tiles - left,
                need(longest),
            )
        )  # fmt: skip
        watcher = _Watcher([candidate.pattern for candidate in candidates], block, every, search, errors)
        for number, prompt in enumerate(taken):
            wanted = scores.missing(number)
            if not wanted:
                continue
            watcher.begin(scores, number, set(wanted), number == settings["picture"], progress, tuning=number < tuning)
            try:
                _run(model, prompt.token_ids, watcher, block)
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise _memory_error(model, len(prompt.token_ids), need, "ran out of memory") from error
            silent = scores.missing(number)
            if silent:
                raise NotImplementedError(
                    f"layer {silent[0]} did not run through sparseprefill on prompt {prompt.name}: this model cannot "
                    "be profiled; `sparseprefill doctor` says how its layers run"
                )
    return scores


def prompts_digest(prompts: Sequence[ProfilePrompt]) -> str:
    """Sha256 over names and token ids, in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.name}\0{len(prompt.token_ids)}\0".encode())
        digest.update(np.asarray(prompt.token_ids, dtype="<i8").tobytes())
    return digest.hexdigest()


class _Watcher:
    """A dense pattern that scores what passes through it, while it is active."""

    def __init__(
        self, patterns: Sequence[Pattern], block: int, every: int, search: bool, errors: bool
    ) -> None:  # fmt: skip
        self.patterns, self.block, self.every = patterns, block, every
        self.search, self.errors = search, errors
        self.scores: ProfileScores | None = None
        self.active = False
        self.prompt, self.wanted, self.picture, self.tuning = 0, set[int](), False, True
        self.progress: Callable[[int], Any] = lambda tiles: None

    def begin(
        self, scores: ProfileScores, prompt: int, wanted: set[int], picture: bool, progress: Callable[[int], Any],
        *, tuning: bool,
    ) -> None:  # fmt: skip
        """From now on the layers in `wanted` are scored, as this prompt's."""
        self.scores, self.prompt, self.wanted, self.picture, self.progress = scores, prompt, wanted, picture, progress
        self.tuning = tuning

    def for_layer(self, layer: int) -> _LayerWatcher:
        return _LayerWatcher(self, layer)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        raise AssertionError("each layer has a watcher of its own")

    def saw(self, layer: int, inputs: AttentionInputs) -> None:
        """Score a layer, once."""
        if not self.active or self.scores is None or layer not in self.wanted:
            return
        self.wanted.discard(layer)
        own = [each.for_layer(layer) if hasattr(each, "for_layer") else each for each in self.patterns]
        found = score(inputs, own, block=self.block, every=self.every, picture=self.picture)
        search = search_scores(inputs) if self.search else None
        errors = output_errors(inputs, own, block=self.block) if self.errors and self.tuning else None
        self.scores.add(self.prompt, layer, found, search, errors)
        self.progress(inputs.query_heads * dense_tiles(inputs.queries, self.block, self.every))


@dataclass(frozen=True, slots=True, eq=False)
class _LayerWatcher:
    watcher: _Watcher
    layer: int

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        self.watcher.saw(self.layer, inputs)
        return BlockIndex.dense(inputs, grid)


@torch.no_grad()
def _run(model: PreTrainedModel, token_ids: Sequence[int], watcher: _Watcher, block: int) -> None:
    ids = torch.tensor([list(token_ids)], device=model.device)
    # the same kernel whether a layer is scored or was before: a resumed run sees the same numbers
    with patch_model(model, watcher, min_length=0, observe=False, block_q=block, block_k=block) as patch:
        watcher.active = True  # patching tries patterns on zeros
        try:
            patch.model.base_model(input_ids=ids, use_cache=False)
        finally:
            watcher.active = False


def _candidates(given: Sequence[Any] | None, target: Target) -> tuple[Candidate, ...]:
    """What heads may get, dense first. Raises ValueError and TypeError for what no candidate can be."""
    if isinstance(target, MInferenceSearch):
        if given is not None:
            raise ValueError("MInference's search brings its own candidates: leave `candidates` out")
        names = {cls: name for name, cls in PATTERNS.items()}
        return (Candidate("dense", Dense()), *(Candidate(names[type(each)], each) for each in MINFERENCE))
    if given is None:
        return sale_candidates(ladder()) if isinstance(target, SaleSearch) else default_candidates()
    if isinstance(given, str):
        raise TypeError("candidates are a list, such as ['a_shape:window=512', 'block_sparse:keep=0.2']")
    made = [_candidate(each) for each in given]
    if not any(isinstance(each.pattern, Dense) for each in made):
        made.insert(0, Candidate("dense", Dense()))
    check_candidates(made)
    if isinstance(target, SaleSearch):
        check_ladder(made)
    return tuple(made)


def _candidate(each: Any) -> Candidate:
    if isinstance(each, Candidate):
        return each
    if isinstance(each, str):
        family, _, options = each.partition(":")
        pattern = resolve_method(family, **parse_options(options))
        if isinstance(pattern, ModelPatterns):
            raise ValueError(f"the candidate {each!r} is a profile of a whole model: name the pattern of a head")
        return Candidate(family, pattern, isinstance(pattern, RandomBlocks))
    if callable(getattr(each, "build_index", None)):
        names = {cls: name for name, cls in PATTERNS.items()}
        return Candidate(names.get(type(each), type(each).__name__), each, isinstance(each, RandomBlocks))
    raise TypeError(f"a candidate is a Candidate, a pattern or a text, got {type(each).__name__}")


def _prompts(
    model: PreTrainedModel, given: Sequence[Any], tokenizer: Any, block: int, kind: str
) -> Iterator[ProfilePrompt]:
    """Whatever stands for a prompt, as token ids that the model can read."""
    if isinstance(given, (str, bytes)):
        raise TypeError("prompts are a list of prompts, got one text: put it into a list")
    embeddings: Any = model.get_input_embeddings()
    vocabulary = int(getattr(embeddings, "num_embeddings", 0) or text_config(model).vocab_size)  # some are padded
    window = model_window(model)
    for number, each in enumerate(given):
        name = each.name if isinstance(each, ProfilePrompt) else f"{kind} {number}"
        ids: Any = each.token_ids if isinstance(each, ProfilePrompt) else each
        if isinstance(ids, str):
            if tokenizer is None:
                raise TypeError(f"{name} is a text: give a tokenizer too, or token ids")
            ids = tokenizer(ids)["input_ids"]
        if isinstance(ids, Tensor):
            if ids.dim() == 2 and len(ids) == 1:
                ids = ids[0]
            if ids.dim() != 1:
                raise ValueError(f"{name} must be token ids in one row, got a tensor of {tuple(ids.shape)}")
            ids = ids.tolist()
        if not all(isinstance(token, (int, np.integer)) and not isinstance(token, bool) for token in ids):
            raise TypeError(f"{name} must be token ids (whole numbers)")
        if len(ids) < 2 * block:
            raise ValueError(
                f"{name} has {len(ids)} tokens, and a profile needs at least two blocks of {block}: take longer prompts"
            )
        if window is not None and len(ids) > window:
            raise ValueError(f"{name} has {len(ids)} tokens, and the model's window is {window}: take shorter prompts")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"{name} holds token ids outside of the model's vocabulary of {vocabulary}")
        yield ProfilePrompt(name, list(map(int, ids)))


def _check_tested(candidates: Sequence[Candidate], prompts: Sequence[ProfilePrompt]) -> None:
    """Raise ValueError for a prompt that is so short that SALE keeps all of it at any threshold."""
    least = max((least_tokens(each.pattern) for each in candidates if isinstance(each.pattern, Sale)), default=0)
    for prompt in prompts:
        if len(prompt.token_ids) < least:
            raise ValueError(
                f"{prompt.name} has {len(prompt.token_ids)} tokens, of which SALE would test none, as sink and window "
                f"are kept in any case: take prompts of at least {least} tokens"
            )


def _pictured(prompts: Sequence[ProfilePrompt], tuning: int) -> int:
    """The prompt whose pictures are kept: the first of the shortest held-out ones, else of all."""
    among = range(tuning, len(prompts)) if tuning < len(prompts) else range(len(prompts))
    return min(among, key=lambda number: (len(prompts[number].token_ids), number))


def _need(
    shapes: dict[int, LayerShape], layers: Sequence[int], candidates: int, block: int, search: bool,
    errors: bool = False,
) -> Callable[[int], int]:  # fmt: skip
    """Bytes that scoring holds at most for a prompt of so many tokens."""
    distinct = {shapes[layer] for layer in layers}

    def need(tokens: int) -> int:
        each = [peak_bytes(tokens, s.query_heads, s.kv_heads, s.head_dim, candidates, block) for s in distinct]
        if search:  # after the other scores, which are small by then
            each += [search_peak_bytes(tokens, s.query_heads, s.kv_heads, s.head_dim) for s in distinct]
        if errors:
            each += [error_peak_bytes(tokens, s.query_heads, s.kv_heads, s.head_dim, block) for s in distinct]
        return max(each)

    return need


def _check_memory(model: PreTrainedModel, tokens: int, need: Callable[[int], int]) -> None:
    device = device_of(model)
    free = None if device is None else available_bytes(device)
    if free is not None and need(tokens) > free:
        raise _memory_error(model, tokens, need, "will not fit")


def _memory_error(model: PreTrainedModel, tokens: int, need: Callable[[int], int], what: str) -> MemoryError:
    device = device_of(model)
    free = None if device is None else available_bytes(device)
    fits = None if free is None else longest_that_fits(need, free, tokens)
    room = f"{need(tokens) / 2**30:.1f} GiB beside the model and its activations" + (
        "" if free is None else f", of {free / 2**30:.1f} GiB that are free"
    )
    way = "take shorter prompts" if not fits else f"prompts of up to {fits} tokens would fit"
    return MemoryError(f"scoring a prompt of {tokens} tokens {what}: it takes up to {room}; {way}")


@contextlib.contextmanager
def _folder(given: str | Path | None) -> Iterator[Path]:
    if given is not None:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory(prefix="sparseprefill-") as made:
        yield Path(made) / "scores"
