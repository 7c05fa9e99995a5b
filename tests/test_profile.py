"""The profiler: every head gets its shape, what is written is what would run, no interruption changes the result."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ALL_LOCAL, FAMILIES, tiny_model
from transformers import PreTrainedModel

from sparseprefill import huggingface, patch_model, profile, profile_scores, register
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.evals.loading import load_model
from sparseprefill.huggingface_modules import model_facts
from sparseprefill.huggingface_weights import weights_hash
from sparseprefill.patterns import (
    AShape,
    BlockSparse,
    Dense,
    ModelPatterns,
    RandomBlocks,
    VerticalSlash,
    load_patterns,
    save_patterns,
)
from sparseprefill.patterns import scores as scoring
from sparseprefill.patterns.candidates import Candidate, candidates
from sparseprefill.patterns.scores import dense_tiles, score
from sparseprefill.profile import ProfileCost, profile_model, prompts_digest
from sparseprefill.profile_scores import (
    MInferenceSearch,
    ProfileScores,
    TargetMass,
    WorkBudget,
    choose,
    read_scores,
    scores_folder,
)
from sparseprefill.prompts import ProfilePrompt

CANDIDATES = (
    "a_shape:sink=16,window=32",
    "vertical_slash:density=0.4,probe=16",
    "block_sparse:keep=0.3,sink=16,local=16",
)
BLOCK = 16


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def ids(tokens: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 99, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def profiled(model: Any, **options: Any) -> ModelPatterns:
    settings: dict[str, Any] = {"candidates": CANDIDATES, "block": BLOCK, "held_out": [ids(150, 2)]}
    return profile_model(model, [ids(200, 0), ids(130, 1)], **{**settings, **options})


# ---- choosing


def planted(tokens: int, seed: int = 0) -> AttentionInputs:
    """Four heads: near keys and the first ones; some columns and one distance; one drawn block a row; everything."""
    draw = torch.Generator().manual_seed(seed)
    position, dim, blocks = torch.arange(tokens).double(), 64, tokens // 64

    def place(at: torch.Tensor, width: float) -> torch.Tensor:
        """Products of two of these peak where they stand at the same place."""
        turn = at[:, None] * torch.linspace(-math.log(width), math.log(3 / width), 31).double().exp()
        return torch.nn.functional.pad(torch.cat([turn.cos(), turn.sin()], 1) / 31**0.5, (0, 2))

    near_query, near_key = place(position, 60.0) * 60, place(position, 60.0)
    near_query[:, 62], near_key[:4, 62] = 58, 1
    far_query, far_key = place(position - 500, 8.0) * 40, place(position, 8.0)
    far_query[:, 62], far_key[torch.randperm(tokens // 2, generator=draw)[:4], 62] = 40, 1
    codes = torch.nn.functional.normalize(torch.randn(blocks, dim, generator=draw).double(), dim=1)
    wanted = torch.tensor([int(torch.randint(0, row + 1, (1,), generator=draw)) for row in range(blocks)])
    heads = [
        (near_query, near_key), (far_query, far_key),
        (codes[wanted].repeat_interleave(64, 0) * 25, codes.repeat_interleave(64, 0)),
        (torch.zeros(tokens, dim).double(), torch.randn(tokens, dim, generator=draw).double()),
    ]  # fmt: skip
    query, key = (torch.stack(each)[None].float() for each in zip(*heads, strict=True))
    return AttentionInputs(query, key, torch.zeros(1, 4, tokens, 8), scale=1.0)


def scored(
    folder: Path, inputs: list[AttentionInputs], table: tuple[Candidate, ...], held_out: int = 0
) -> ProfileScores:
    """Scores of a model with one layer, made without a model."""
    heads = inputs[0].query_heads
    settings = {
        "facts": {"layers": 1, "query_heads": heads, "architecture": "planted", "kv_heads": heads, "head_dim": 64,
                  "rope": None, "vocabulary": 9},
        "weights": None, "layers": [0], "block": 64, "every": 1, "search": False, "tiles": 1, "picture": 0,
        "dtype": "float32", "prompts_digest": "", "details": {},
        "candidates": [{"label": c.label, "family": c.family, "control": c.control} for c in table],
        "prompts": [
            {"name": f"{n}", "tokens": each.queries, "held_out": n >= len(inputs) - held_out}
            for n, each in enumerate(inputs)
        ],
    }  # fmt: skip
    found = ProfileScores.begin(folder, settings, resume=False)
    for number, each in enumerate(inputs):
        found.add(number, 0, score(each, [c.pattern for c in table], picture=number == 0))
    return found


def test_each_planted_head_gets_its_shape(tmp_path: Path) -> None:
    """Near keys are an A-shape, columns and a distance vertical-slash, drawn blocks block-sparse, all keys dense."""
    table = candidates()
    scores = scored(tmp_path / "s", [planted(2048, seed) for seed in (0, 1)], table, held_out=1)
    found = choose(scores, table, TargetMass(0.9))
    assert [type(pattern) for pattern in found.layers[0]] == [AShape, VerticalSlash, BlockSparse, Dense]
    for tuning, held_out in zip(found.tuning[0][:3], found.held_out[0][:3], strict=True):
        assert tuning.low_mass >= 0.9
        assert held_out.low_mass >= 0.9  # other columns, other blocks
        assert held_out.work < 0.75
    # in one budget they keep more than any pattern that all share, at no more work
    shared = choose(scores, table, WorkBudget(0.4))
    kept = sum(each.mass for each in shared.tuning[0]) / 4
    own = scores.table(0, False, 0.1)
    uniform = [
        float(own.mass[:, n].mean())
        for n, each in enumerate(table) if not each.control and float(own.work[:, n].mean()) <= 0.4
    ]  # fmt: skip
    assert kept > max(uniform) + 0.05
    assert sum(each.work for each in shared.tuning[0]) / 4 <= 0.4 + 1e-6
    assert shared.made["target"]["gap"] >= 0


def test_targets_keep_their_word(tmp_path: Path) -> None:
    """The cheapest that reaches the mass, by brute force; the control is never chosen, however good it is."""
    table = (*candidates(shares=(0.1, 0.4), windows=(128,)), Candidate("block_sparse", BlockSparse(0.9), control=True))
    scores = scored(tmp_path / "s", [planted(1024)], table)
    own = scores.table(0, False, 0.2)
    for target in (0.3, 0.7, 0.95, 1.0):
        found = choose(scores, table, TargetMass(target), quantile=0.2)
        for head, pattern in enumerate(found.layers[0]):
            reaching = [
                (float(own.work[head, n]), -float(own.low_mass[head, n]), n)
                for n, each in enumerate(table) if not each.control and float(own.low_mass[head, n]) >= target
            ]  # fmt: skip
            assert pattern == table[min(reaching)[2]].pattern
    with pytest.raises(ValueError, match="no held-out prompts"):
        scores.table(0, True, 0.1)
    assert found.held_out == ()
    with pytest.raises(ValueError, match="chooses among its own candidates"):
        choose(scores, table, MInferenceSearch())
    with pytest.raises(ValueError, match="scores of other candidates"):
        choose(scores, table[:-1], TargetMass(0.9))
    for bad in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            TargetMass(bad)
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            WorkBudget(bad)
    with pytest.raises(ValueError, match="budget"):
        choose(scores, table, WorkBudget(0.01))


# ---- a model


def test_what_a_profile_says_is_what_then_runs(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Density and kept mass of every head, on the prompt it was chosen on, as the patched model reports them."""
    prompt = ids(200)
    found = profile_model(llama, [prompt], candidates=CANDIDATES, block=BLOCK, target=WorkBudget(0.6))
    save_patterns(found, tmp_path / "p.json")
    kinds = {type(pattern) for heads in found.layers for pattern in heads}
    assert len(kinds) > 1, "a profile of one pattern shows little"
    with (
        torch.no_grad(),
        patch_model(
            llama, profile=tmp_path / "p.json", min_length=0, block_q=BLOCK, block_k=BLOCK, sample_rows=200
        ) as patch,
    ):
        llama(input_ids=torch.tensor([prompt]))
        report = patch.report()
    for layer, tuning in zip(report.layers, found.tuning, strict=True):
        # another layer's sparsity changes what the next one sees, but not where static patterns lie
        assert layer.tile_work is not None
        if layer.layer == 0:
            assert layer.density == pytest.approx([each.density for each in tuning], abs=1e-6)
            assert layer.kept_mass == pytest.approx([each.mass for each in tuning], abs=1e-5)
    assert found.model == model_facts(llama.config)
    assert found.made["tiles"] == 3 * 4 * dense_tiles(200, BLOCK)
    assert found.made["target"]["kind"] == "budget"
    assert load_patterns(tmp_path / "p.json") == found


QUICK = ("llama", "gemma2", "gpt_oss", "qwen3_next")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in FAMILIES if name not in ALL_LOCAL
    ],
)  # fmt: skip
def test_what_it_costs_is_known_before(family: str) -> None:
    """Tiles to the last one; local layers and layers without attention are dense, and say that nobody looked."""
    model = tiny_model(family)
    announced: list[ProfileCost] = []
    computed: list[int] = []
    found = profiled(model, announce=announced.append, progress=computed.append)
    assert announced[0].tiles == sum(computed) == found.made["tiles"] > 0
    assert announced[0].tokens == 480
    config = model.config.get_text_config()
    local = [kind != "full_attention" for kind in getattr(config, "layer_types", None) or ["full_attention"] * 3]
    for layer in range(3):
        assert all((each is None) == local[layer] for each in found.tuning[layer])
        assert all((each is None) == local[layer] for each in found.held_out[layer])
        if local[layer]:
            assert set(found.layers[layer]) == {Dense()}
    assert announced[0].layers == 3 - sum(local)


def test_prompts_in_any_form_are_the_same_prompts(llama: PreTrainedModel) -> None:
    class Words:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    plain = ids(100)
    forms: list[Any] = [
        plain, torch.tensor(plain), torch.tensor([plain]), ProfilePrompt("prompt 0", plain), " ".join(map(str, plain)),
    ]  # fmt: skip
    found = [
        profile_model(llama, [each], candidates=CANDIDATES[:1], block=BLOCK, target=0.5, tokenizer=Words())
        for each in forms
    ]
    assert all(each == found[0] for each in found)
    assert found[0].made["prompts_digest"] == prompts_digest([ProfilePrompt("prompt 0", plain)])


def test_digests_tell_every_difference() -> None:
    prompts = [ProfilePrompt("a", [1, 2]), ProfilePrompt("b", [3])]
    same = [ProfilePrompt("a", (1, 2)), ProfilePrompt("b", torch.tensor([3]))]  # type: ignore[arg-type]
    assert prompts_digest(prompts) == prompts_digest(same)
    assert re.fullmatch(r"[0-9a-f]{64}", prompts_digest(prompts))
    others = [
        [ProfilePrompt("a", [1]), ProfilePrompt("b", [2, 3])],
        [ProfilePrompt("a", [12]), ProfilePrompt("b", [3])],
        [ProfilePrompt("a", [1, 2]), ProfilePrompt("c", [3])],
        [ProfilePrompt("b", [3]), ProfilePrompt("a", [1, 2])],
        prompts[:1],
        [],
    ]
    assert len({prompts_digest(each) for each in [prompts, *others]}) == 7


def test_nothing_in_a_profile_is_measured_in_seconds(llama: PreTrainedModel, tmp_path: Path) -> None:
    save_patterns(profiled(llama, details={"seed": 3}), tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert data["made"].pop("seed") == 3
    assert set(data) == {"schema", "made", "model", "layers"}  # no weights: this model has no file
    assert set(data["made"]) == {
        "sparseprefill", "target", "quantile", "block", "every", "dtype", "tiles", "prompts_digest", "prompts",
        "candidates",
    }  # fmt: skip
    assert str(tmp_path) not in text


# ---- stopping and resuming


class Interrupted(KeyboardInterrupt):
    pass


def stopping_after(layers: int) -> Any:
    left = [layers]

    def progress(_: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise Interrupted

    return progress


@pytest.mark.parametrize("layers", [1, 3, 5, 8])
def test_a_resumed_run_gives_the_same_bytes(llama: PreTrainedModel, tmp_path: Path, layers: int) -> None:
    """Three prompts of three layers, stopped after some: nothing that was scored is scored again."""
    save_patterns(profiled(llama, folder=tmp_path / "whole"), tmp_path / "whole.json")
    with pytest.raises(Interrupted):
        profiled(llama, folder=tmp_path / "part", progress=stopping_after(layers))
    assert len(list((tmp_path / "part").glob("*.safetensors"))) == layers
    with pytest.raises(ValueError, match="holds scores of an earlier run: resume it, or remove it"):
        profiled(llama, folder=tmp_path / "part")
    announced: list[ProfileCost] = []
    again: list[int] = []
    found = profiled(llama, folder=tmp_path / "part", resume=True, progress=again.append, announce=announced.append)
    assert len(again) == 9 - layers
    assert sum(again) == announced[0].tiles - announced[0].done
    save_patterns(found, tmp_path / "part.json")
    assert (tmp_path / "part.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    for one in (tmp_path / "whole").iterdir():
        assert one.read_bytes() == (tmp_path / "part" / one.name).read_bytes(), one.name


def test_another_target_needs_no_model(llama: PreTrainedModel, tmp_path: Path) -> None:
    profiled(llama, folder=tmp_path / "s", target=0.9)
    again: list[int] = []
    found = profiled(llama, folder=tmp_path / "s", resume=True, target=WorkBudget(0.5), progress=again.append)
    assert again == []
    assert found == profiled(llama, target=WorkBudget(0.5))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block": 32}, "block: 16 there, 32 now"),
        ({"every": 2}, "every: 1 there, 2 now"),
        ({"candidates": CANDIDATES[:2]}, "candidates"),
        ({"held_out": []}, "prompts"),
        ({"details": {"seed": 2}}, "seed"),
    ],
    ids=str,
)
def test_resuming_with_other_settings_is_refused(
    llama: PreTrainedModel, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(Interrupted):
        profiled(llama, folder=tmp_path / "s", progress=stopping_after(1))
    with pytest.raises(ValueError, match=f"of a run with other settings .*{message}"):
        profiled(llama, folder=tmp_path / "s", resume=True, **changed)


def test_resuming_with_other_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(Interrupted):
        profiled(model, folder=tmp_path / "s", progress=stopping_after(1))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"other settings .*weights"):
        profiled(model, folder=tmp_path / "s", resume=True)


@pytest.mark.slow
def test_killed_midway_and_resumed_on_the_command_line(tmp_path: Path) -> None:
    """SIGKILL leaves at most one layer unfinished, and the profile is the same file in the end."""
    command = [
        sys.executable, "-m", "sparseprefill.cli", "profile", "--lengths", "2k", "--samples", "2", "--held-out", "1",
        "--budget", "0.4", "--out",
    ]  # fmt: skip
    subprocess.run([*command, str(tmp_path / "whole.json")], check=True, capture_output=True)
    killed = 0
    out = tmp_path / "part.json"
    for _ in range(3):
        before = len(list(scores_folder(out).glob("*.safetensors")))
        going = subprocess.Popen([*command, str(out), "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len(list(scores_folder(out).glob("*.safetensors"))) < before + 3 and going.poll() is None:
            time.sleep(0.005)
        going.send_signal(signal.SIGKILL)
        killed += going.wait() == -signal.SIGKILL
        going.communicate()
    assert killed
    subprocess.run([*command, str(out), "--resume"], check=True, capture_output=True)
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(scores_folder(out).glob(".*.part"))


def test_a_full_disk_leaves_nothing_half_written(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = os.fsync, [4]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        profiled(llama, folder=tmp_path / "s")
    monkeypatch.undo()
    assert sorted(path.suffix for path in (tmp_path / "s").iterdir()) == [".json", *[".safetensors"] * 3]
    assert profiled(llama, folder=tmp_path / "s", resume=True) == profiled(llama)


@pytest.mark.parametrize("damage", [b"", b"\x10\0\0\0\0\0\0\0{}", None], ids=["empty", "no header", "cut short"])
def test_damaged_scores_are_named(llama: PreTrainedModel, tmp_path: Path, damage: bytes | None) -> None:
    profiled(llama, folder=tmp_path / "s")
    path = read_scores(tmp_path / "s").path(1, 2)
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    with pytest.raises(ValueError, match=rf"the scores .*{path.name} are damaged .*: remove that file and resume"):
        profiled(llama, folder=tmp_path / "s", resume=True)
    path.unlink()
    assert profiled(llama, folder=tmp_path / "s", resume=True) == profiled(llama)


def test_damaged_settings_of_scores_are_named(llama: PreTrainedModel, tmp_path: Path) -> None:
    profiled(llama, folder=tmp_path / "s")
    path = tmp_path / "s" / "run.json"
    text = path.read_text(encoding="utf-8")
    for damaged, message in (
        (text[:50], "not a JSON scores"),
        (text.replace("sparseprefill-scores-1", "sparseprefill-scores-0"), "not of schema sparseprefill-scores-1"),
        (text.replace('"layers": [', '"strata": ['), "are damaged .*layers"),
    ):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_scores(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="no scores at"):
        read_scores(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="is there and holds no scores"):
        profiled(llama, folder=tmp_path / "other")


def test_unfinished_scores_choose_nothing(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        profiled(llama, folder=tmp_path / "s", progress=stopping_after(4))
    scores = read_scores(tmp_path / "s")
    assert not scores.complete
    with pytest.raises(ValueError, match="no scores of layer 1 on prompt prompt 1: the run has not ended"):
        choose(scores, profile._candidates(CANDIDATES, TargetMass()), TargetMass())


# ---- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": []}, ValueError, "no prompt to tune on"),
        ({"prompts": "a text"}, TypeError, "put it into a list"),
        ({"prompts": ["a text"]}, TypeError, "prompt 0 is a text: give a tokenizer"),
        ({"prompts": [ids(31)]}, ValueError, "prompt 0 has 31 tokens, and a profile needs at least two blocks of 16"),
        ({"held_out": [ids(8)]}, ValueError, "held-out 0 has 8 tokens"),
        ({"prompts": [ids(2049)]}, ValueError, "prompt 0 has 2049 tokens, and the model's window is 2048"),
        ({"prompts": [[*ids(60), 128]]}, ValueError, "outside of the model's vocabulary of 128"),
        ({"prompts": [[*ids(60), -1]]}, ValueError, "outside of the model's vocabulary"),
        ({"prompts": [[*ids(60), 1.5]]}, TypeError, "whole numbers"),
        ({"prompts": [torch.zeros(2, 60, dtype=torch.int64)]}, ValueError, "one row, got a tensor of"),
        ({"prompts": [ProfilePrompt("x", ids(60))] * 2}, ValueError, "names of their own"),
        ({"candidates": "a_shape"}, TypeError, "candidates are a list"),
        ({"candidates": ["star"]}, ValueError, "unknown method 'star'"),
        ({"candidates": ["a_shape:window=0"]}, ValueError, "window must be at least 1"),
        ({"candidates": [3]}, TypeError, "a candidate is a Candidate, a pattern or a text, got int"),
        ({"candidates": ["a_shape", AShape()]}, ValueError, "is there twice"),
        (
            {"candidates": [type("Mine", (), {"build_index": None, "__repr__": lambda self: "a Mine"})()]},
            TypeError,
            "got Mine",
        ),
        ({"candidates": CANDIDATES, "target": MInferenceSearch()}, ValueError, "brings its own candidates"),
        ({"target": True}, TypeError, "target mass must be a number"),
        ({"target": 1.2}, ValueError, r"target mass must be in \(0, 1\]"),
        ({"target": WorkBudget(0.001)}, ValueError, "budget"),
        ({"target": "cheap"}, TypeError, "target is a TargetMass"),
        ({"resume": True, "again": True}, ValueError, "choose one"),
        ({"quantile": 1.0}, ValueError, "quantile must be in"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"block": 0}, ValueError, "block_q must be at least 1"),
    ],
    ids=str,
)
def test_what_cannot_be_profiled_is_refused(
    llama: PreTrainedModel, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    prompts = options.pop("prompts", [ids(60)])
    settings: dict[str, Any] = {"candidates": CANDIDATES, "block": BLOCK, **options}
    if isinstance(settings.get("target"), MInferenceSearch) and "candidates" not in options:
        settings.pop("candidates")
    with pytest.raises(error, match=message):
        profile_model(llama, prompts, **settings)
    assert llama.config._attn_implementation == "eager"  # as it was


def test_a_target_is_known_before_anything_is_computed(llama: PreTrainedModel) -> None:
    """What only the choice would notice is refused before minutes of scoring; a whole number is a mass too."""

    def never(cost: ProfileCost) -> None:
        raise AssertionError("it went on")

    for wrong in ({"quantile": math.nan}, {"quantile": -0.1}, {"target": 2}, {"target": True}, {"target": None}):
        with pytest.raises((ValueError, TypeError)):
            profiled(llama, announce=never, **wrong)
    assert profiled(llama, target=1).made["target"] == {"kind": "mass", "mass": 1}


def test_models_that_see_nothing_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer of MistralForCausalLM sees a whole prompt"):
        profiled(tiny_model("mistral"))


def test_memory_is_asked_for_before_and_said_after(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way the message says which length would fit, and that length then does."""
    need = profile._need(
        {0: profile.LayerShape(4, 2, 16, 16)}, [0], len(profile._candidates(CANDIDATES, TargetMass())), BLOCK, False
    )
    prompts = [ids(1500)]
    free = need(1024) + 10
    monkeypatch.setattr(profile, "available_bytes", lambda device: free)
    with pytest.raises(MemoryError, match=r"of 1500 tokens will not fit: .* prompts of up to 1024 tokens would fit"):
        profile_model(llama, prompts, candidates=CANDIDATES, block=BLOCK)
    monkeypatch.setattr(profile, "available_bytes", lambda device: need(600))
    with pytest.raises(MemoryError, match="prompts of up to 512 tokens would fit"):
        profile_model(llama, prompts, candidates=CANDIDATES, block=BLOCK)
    monkeypatch.setattr(profile, "available_bytes", lambda device: 5)
    with pytest.raises(MemoryError, match="take shorter prompts"):
        profile_model(llama, prompts, candidates=CANDIDATES, block=BLOCK)
    monkeypatch.setattr(profile, "available_bytes", lambda device: None)

    def fails(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(profile, "available_bytes", lambda device: need(300))
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    monkeypatch.setattr(profile, "score", fails)
    with pytest.raises(MemoryError, match=r"ran out of memory: .* up to 256 tokens would fit"):
        profile_model(llama, prompts, candidates=CANDIDATES, block=BLOCK)
    assert llama.config._attn_implementation == "eager"


def test_memory_that_is_there_is_known() -> None:
    free = profile.available_bytes(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50
    assert profile.available_bytes(torch.device("meta")) is None


def test_one_run_writes_a_folder_at_a_time(llama: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        profiled(llama, folder=tmp_path / "s", progress=stopping_after(1))
    other = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, fcntl; f = open(sys.argv[1], 'rb'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); "
         "sys.stdin.read()", str(tmp_path / "s" / "run.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process writes"):
            profiled(llama, folder=tmp_path / "s", resume=True)
        with pytest.raises(ValueError, match="another process writes"):
            profiled(llama, folder=tmp_path / "s", again=True)
        assert list((tmp_path / "s").glob("*.safetensors"))
    finally:
        other.communicate()
    profiled(llama, folder=tmp_path / "s", resume=True)


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The largest tensors that scoring allocates, by entries of its largest slab."""
    seen: list[int] = []
    real = scoring.block_mass

    def watched(inputs: AttentionInputs, grid: BlockGrid, rows: torch.Tensor) -> Any:
        mass, lse = real(inputs, grid, rows)
        seen.append(inputs.query_heads * len(rows) * grid.block_q * mass.shape[-1] * grid.block_k)
        return mass, lse

    monkeypatch.setattr(scoring, "block_mass", watched)
    yield seen


def test_no_matrix_of_all_pairs_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = planted(4096)
    with counted(monkeypatch) as seen:
        score(inputs, [Dense()])
    assert max(seen) <= scoring._LOGITS < 4 * 4096 * 4096


MOST_HELD = (  # not getrusage: a process begins with what the one that started it held
    "def most_held(): return 1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
)


@pytest.mark.slow
def test_a_long_wide_layer_stays_within_its_bound() -> None:
    """32k tokens, 32 heads of 128 dims, all default candidates: below 2 GiB beside queries, keys and values."""
    code = (
        "import torch\n"
        f"{MOST_HELD}\n"
        "from sparseprefill.contracts import AttentionInputs\n"
        "from sparseprefill.patterns.candidates import candidates\n"
        "from sparseprefill.patterns.scores import peak_bytes, score\n"
        "torch.set_num_threads(2)\n"
        "def made(heads, tokens): return torch.randn(1, heads, tokens, 128)\n"
        "patterns = [each.pattern for each in candidates()]\n"
        "score(AttentionInputs(made(4, 512), made(1, 512), made(1, 512), 0.1), patterns)\n"
        "inputs = AttentionInputs(made(32, 32768), made(8, 32768), torch.zeros(1, 8, 32768, 1)"
        ".expand(1, 8, 32768, 128), 0.1)\n"
        "before = most_held()\n"
        "score(inputs, patterns, every=32)\n"
        "print(most_held() - before,"
        " peak_bytes(32768, 32, 8, 128, len(patterns)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, bound = map(int, done.stdout.split())
    assert bound / 8 < used <= bound < 2 << 30


@pytest.mark.slow
def test_memory_of_the_search_is_within_its_bound() -> None:
    """Sixteen heads of one group: slabs of the search are larger than all the rest, and are asked for."""
    code = (
        "import torch\n"
        f"{MOST_HELD}\n"
        "from sparseprefill.contracts import AttentionInputs\n"
        "from sparseprefill.patterns.minference_search import SearchSettings, search_peak_bytes, search_scores\n"
        "torch.set_num_threads(1)\n"
        "def made(heads, tokens): return torch.randn(1, heads, tokens, 64)\n"
        "search_scores(AttentionInputs(made(2, 300), made(1, 300), made(1, 300), 0.1), SearchSettings(first_row=200))\n"
        "inputs = AttentionInputs(made(16, 3600), made(1, 3600), made(1, 3600), 0.1)\n"
        "before = most_held()\n"
        "search_scores(inputs)\n"
        "print(most_held() - before,"
        " search_peak_bytes(3600, 16, 1, 64))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, bound = map(int, done.stdout.split())
    assert bound / 8 < used <= bound
    shapes = {0: profile.LayerShape(16, 1, 64, 64)}
    assert profile._need(shapes, [0], 7, 64, search=True)(3600) >= bound
    assert profile._need(shapes, [0], 7, 64, search=False)(3600) < used


def test_profiles_of_layers_with_different_heads_are_told_apart() -> None:
    heads = ModelPatterns(((Dense(),) * 4, (Dense(),) * 2))
    assert heads.mismatch({"query_heads": [4, 2], "layers": 2}) is None
    assert (
        heads.mismatch({"query_heads": [4, 4], "layers": 2}) == "layer 1 of the profile has 2 heads, this model has 4"
    )
    assert heads.mismatch({"query_heads": 4, "layers": 2}) == "layer 1 of the profile has 2 heads, this model has 4"


def test_a_pattern_of_ones_own_can_be_scored_but_not_chosen(llama: PreTrainedModel) -> None:
    class Mine:
        def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
            return BlockIndex.dense(inputs, grid)

    with pytest.raises(ValueError, match=r"a profile holds .* and no Mine"):
        profiled(llama, candidates=[Mine()])
    found = profiled(llama, candidates=[*map(profile._candidate, CANDIDATES), Candidate("mine", Mine(), control=True)])
    assert found.layers == profiled(llama).layers


def test_random_blocks_are_a_control_however_they_are_named(llama: PreTrainedModel) -> None:
    for given in ("random:keep=0.9,sink=16,local=16", RandomBlocks(0.9, 16, 16)):
        found = profiled(llama, candidates=[*CANDIDATES, given], target=0.5)
        assert found == profiled(llama, target=0.5)
        assert not any(isinstance(each, RandomBlocks) for heads in found.layers for each in heads)


def test_other_tiles_than_a_profile_was_made_with_are_warned_of(llama: PreTrainedModel, tmp_path: Path) -> None:
    """What it says of its heads holds for one size of tiles: nobody runs another one without being told."""
    save_patterns(profiled(llama), tmp_path / "p.json")
    assert load_patterns(tmp_path / "p.json").made["block"] == BLOCK
    for tiles in ({}, {"block_q": BLOCK}):
        with (
            pytest.warns(UserWarning, match="made with tiles of 16 x 16, and runs with"),
            patch_model(llama, profile=tmp_path / "p.json", **tiles) as patch,
        ):
            assert [count for text, count in patch.report().warnings.items() if "tiles" in text] == [1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the profile was made with tiles")
        patch_model(llama, profile=tmp_path / "p.json", block_q=BLOCK, block_k=BLOCK).remove()
    before = dict(huggingface._REGISTERED)
    try:
        with pytest.warns(UserWarning, match="made with tiles of 16 x 16"):
            register(profile=tmp_path / "p.json")
    finally:
        huggingface._REGISTERED.clear()
        huggingface._REGISTERED.update(before)


def test_scores_come_back_as_they_were_written(tmp_path: Path) -> None:
    table = candidates(shares=(0.3,), windows=(128,))
    inputs = planted(1024)
    scores = scored(tmp_path / "s", [inputs], table)
    found, search = scores.load(0, 0)
    wanted = score(inputs, [each.pattern for each in table], picture=True)
    assert search is None
    for field in dataclasses.fields(wanted):
        if field.name != "picture":
            assert torch.equal(getattr(found, field.name), getattr(wanted, field.name)), field.name
    assert found.picture is not None
    assert wanted.picture is not None
    assert torch.equal(found.picture.kept, wanted.picture.kept)
    assert torch.equal(found.picture.mass, wanted.picture.mass)
    assert scores.picture(0)[0] == "0"
    assert profile_scores.SCHEMA in (tmp_path / "s" / "run.json").read_text(encoding="utf-8")


def test_the_profile_inside_is_of_the_model_inside(recwarn: pytest.WarningsRecorder) -> None:
    """Made by `make profile`: of these weights, from the candidates that there are now."""
    model, _ = load_model()
    found = load_patterns("inside")
    assert found.mismatch(model_facts(model.config)) is None
    assert found.weights == weights_hash(model)[0]
    assert found.made["candidates"] == [each.label for each in candidates() if not each.control], "run `make profile`"
    kinds = {type(pattern) for heads in found.layers for pattern in heads} - {Dense}
    assert len(kinds) >= 3
    with patch_model(model, profile="inside", strict=True) as patch:
        assert patch.report().method == "minference"
    assert not [each for each in recwarn if issubclass(each.category, UserWarning)]


def test_other_tiles_than_the_profile_s_are_warned_of(llama: PreTrainedModel) -> None:
    found = profiled(llama)
    with pytest.warns(UserWarning, match="made with tiles of 16 x 16, and runs with 64 x 64"):
        patch = patch_model(llama, found)
    assert list(patch.report().warnings.values()) == [1]
    patch.remove()
    with patch_model(llama, found, block_q=16, block_k=16) as patch:
        assert patch.report().warnings == {}
