"""Judging a profile against uniform patterns, and predicting what profiling takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from transformers import PreTrainedModel

from sparseprefill import patch_model
from sparseprefill.calibration import Calibration, CalibrationEntry, Machine, load_calibration, save_entries
from sparseprefill.contracts import AttentionInputs
from sparseprefill.evals import profile_check, profile_time
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.profile_check import FAMILIES, ProfileCheck, PromptCheck, check_new, check_profile
from sparseprefill.evals.profile_prompts import profile_prompts
from sparseprefill.evals.profile_time import RATE, predicted_seconds, tile_seconds
from sparseprefill.huggingface_modules import model_facts
from sparseprefill.patterns import AShape, BlockSparse, Dense, ModelPatterns, VerticalSlash, load_patterns
from sparseprefill.prefill import CostModel
from sparseprefill.profile import ProfileCost, profile_model
from sparseprefill.prompts import ProfilePrompt
from support import make_inputs


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def ids(tokens: int, seed: int) -> list[int]:
    return torch.randint(3, 99, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(250, seed) for seed in (5, 6, 7)]


def uniform(model: PreTrainedModel, pattern: Any) -> ModelPatterns:
    return ModelPatterns(((pattern,) * 4,) * 3, model_facts(model.config))


def test_a_uniform_profile_is_as_good_as_itself(llama: PreTrainedModel) -> None:
    """Its own family keeps the same at its density: read off a line that goes through that very point."""
    for pattern, family in ((VerticalSlash(density=0.5), "vertical_slash"), (BlockSparse(0.5), "block_sparse")):
        found = check_profile(llama, uniform(llama, pattern), PROMPTS, block=16)
        for each in found.prompts:
            assert each.uniform[family] == pytest.approx(each.mass, abs=0.01)
            assert set(each.uniform) == {*FAMILIES, "random"}
        assert found.ratio >= 1 - 0.03  # the best family may be another


def test_the_figures_are_those_of_a_patched_model(llama: PreTrainedModel) -> None:
    profile = uniform(llama, BlockSparse(0.5))
    found = check_profile(llama, profile, PROMPTS, block=16)
    with (
        torch.no_grad(),
        patch_model(
            llama, profile, layers={1: "dense", 2: "dense"}, min_length=0, block_q=16, block_k=16, sample_rows=250
        ) as patch,
    ):
        llama(input_ids=torch.tensor([PROMPTS[0]]))
        first = patch.report().layers[0]
    own = profile_model(llama, [PROMPTS[0]], candidates=[BlockSparse(0.5)], block=16, target=1e-6)
    assert first.kept_mass == pytest.approx([each.mass for each in own.tuning[0]], abs=1e-5)
    assert found.prompts[0].mass == pytest.approx(
        np.mean([each.mass for heads in own.tuning for each in heads]), abs=1e-6
    )
    assert found.prompts[0].density == pytest.approx(
        np.mean([each.density for heads in own.tuning for each in heads]), abs=1e-6
    )


@pytest.mark.slow
def test_every_length_has_neighbours_of_its_own(llama: PreTrainedModel) -> None:
    """A window of tokens is denser in a short prompt: the order of prompts and their lengths decide nothing."""
    profile = uniform(llama, AShape(64, 128))
    long, short = ids(1600, 5), ids(500, 6)
    found = check_profile(llama, profile, [long, short], block=16)
    other = check_profile(llama, profile, [short, long], block=16)
    assert found.prompts[0].density < found.prompts[1].density / 2
    assert (found.best, found.ratio) == (other.best, pytest.approx(other.ratio))
    for one, two in zip(found.prompts, reversed(other.prompts), strict=True):
        assert (one.density, one.mass) == (two.density, two.mass)
        assert one.uniform == pytest.approx(two.uniform)


def test_a_profile_is_not_judged_by_what_it_was_tuned_on() -> None:
    made = {"source": "text a.txt", "prompts": [
        {"name": "text/9/0", "tokens": 9, "held_out": False}, {"name": "text/9/held-out-0", "tokens": 9,
                                                                "held_out": True},
    ]}  # fmt: skip
    profile = ModelPatterns(((Dense(),),), made=made)
    with pytest.raises(ValueError, match="was tuned on the prompt text/9/0"):
        check_new(profile, "text a.txt", [ProfilePrompt("text/9/1", [1]), ProfilePrompt("text/9/0", [1])])
    check_new(profile, "text b.txt", [ProfilePrompt("text/9/0", [1])])
    check_new(profile, "text a.txt", [ProfilePrompt("text/9/held-out-0", [1])])
    for odd in ({}, {**made, "prompts": 3}, {**made, "prompts": ["text/9/0", None]}):
        check_new(ModelPatterns(((Dense(),),), made=odd), "text a.txt", [ProfilePrompt("text/9/0", [1])])


@pytest.mark.slow
def test_the_profile_inside_beats_every_uniform_pattern() -> None:
    """At its own density it loses at most 0.8 of what the best of them loses, on prompts it was not made with."""
    model, tokenizer = load_model()
    prompts = profile_prompts("builtin", tokenizer, [8192], 3, 0, seed=2).tuning
    found = check_profile(model, load_patterns("inside"), prompts)
    assert found.low <= found.ratio <= found.high < 1
    assert found.ratio <= 0.8
    assert f"{found.ratio:.3f}" in str(found)
    assert found.best in str(found)


def test_intervals_are_over_prompts_and_meet_the_best_family_of_each_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families that take turns in being best: the profile is never compared with the worse one."""
    others = {"tri_shape": 0.99, "block_sparse": 0.1, "random": 0.0, "vertical_slash": 0.6}
    masses = {0: (0.9, {"a_shape": 0.8, **others}), 1: (0.7, {"a_shape": 0.2, **others})}
    families = [name for name in (*FAMILIES, "random") for _ in range(2)]

    def means(scores: Any, prompt: int) -> Any:
        mass, each = masses[prompt]
        flat = [each[name] for name in families]
        sparse = {name: [0.6, 0.7] if name == "tri_shape" else [0.4, 0.6] for name in families}
        return np.array([mass, *flat]), np.array([0.5, *(x for each in sparse.values() for x in each)])

    class Scores:
        class _Info:
            def __init__(self, name: str) -> None:
                self.name, self.tokens = name, 10

        prompts = (_Info("a"), _Info("b"))

    monkeypatch.setattr(profile_check, "_means", means)
    found = profile_check._compared(Scores(), families, 0)  # type: ignore[arg-type]
    # tri-shape cannot be so sparse, and is none to compare with
    assert found.prompts[0] == PromptCheck("a", 10, 0.5, 0.9, {**masses[0][1], "tri_shape": None})
    assert str(found).splitlines()[-2].split()[4] == "-"
    # lost 0.1 and 0.3; vertical-slash loses 0.4 and 0.4, A-shape 0.2 and 0.8
    assert found.best == "vertical_slash"
    assert found.ratio == pytest.approx(0.4 / 0.8)
    assert found.low == pytest.approx(0.5)  # both prompts the first: 0.1 / 0.2, A-shape; both drawn once: 0.5
    assert found.high == pytest.approx(0.75)  # both the second: 0.3 / 0.4
    monkeypatch.setattr(profile_check, "_means", lambda *_: (np.full(11, 0.5), np.array([0.1, *[0.4] * 10])))
    with pytest.raises(ValueError, match=r"0\.100, is below what any uniform pattern can have"):
        profile_check._compared(Scores(), families, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        (PROMPTS[:1], {}, "at least two prompts"),
        (PROMPTS, {"vocabulary": 5}, "of another model: the profile was made for vocabulary 5"),
        ([ids(20, 1), ids(20, 2)], {}, "needs at least two blocks"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    llama: PreTrainedModel, prompts: list[list[int]], change: dict[str, Any], message: str
) -> None:
    profile = ModelPatterns(((Dense(),) * 4,) * 3, {**model_facts(llama.config), **change})
    with pytest.raises(ValueError, match=message):
        check_profile(llama, profile, prompts, block=16)


# ---- time


def test_the_rate_is_seconds_of_a_tile() -> None:
    inputs: AttentionInputs = make_inputs(queries=256, query_heads=2, kv_heads=1)
    assert 0 < tile_seconds(inputs, 64, 1) < 1


def test_time_is_predicted_from_the_calibration_alone(
    llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that are left, at the calibrated rate, and the rest of the model, timed now."""
    monkeypatch.setenv("SPARSEPREFILL_CALIBRATION", str(tmp_path / "calibration.json"))
    cost = ProfileCost(prompts=2, tokens=1000, layers=3, heads=12, tiles=500, done=100, peak_bytes=1)
    seconds, reason = predicted_seconds(llama, cost, 16)
    assert seconds is None
    assert "uncalibrated (there is no calibration file" in reason
    key = Calibration((), Machine.here()).key(
        torch.device("cpu"), torch.float32, "cpu", query_heads=4, kv_heads=2, head_dim=16, value_dim=16, block_q=16,
        block_k=16,
    )  # fmt: skip
    entry = CalibrationEntry(key, CostModel(2.0, 512), 1e-9, (), "2026-01-02")
    save_entries([entry])
    assert load_calibration().lookup(key)[0] == entry
    seconds, reason = predicted_seconds(llama, cost, 16)
    assert seconds is None
    assert "has no rate for profiling" in reason
    save_entries([CalibrationEntry(key, CostModel(2.0, 512), 1e-9, (), "2026-01-02", {RATE: 0.5})])
    monkeypatch.setattr(profile_time, "_seconds_a_token", lambda model: 0.25)
    assert predicted_seconds(llama, cost, 16) == (
        400 * 0.5 + 800 * 0.25,
        "calibrated on 2026-01-02, for the default candidates",
    )
    assert predicted_seconds(llama, cost, 16, search=True)[0] is None
    assert "uncalibrated (the calibration has no entry with tiles" in predicted_seconds(llama, cost, 32)[1]


@pytest.mark.parametrize(("window", "tokens"), [(100, 100), (2048, 256)])
def test_the_rest_of_a_model_is_timed_within_its_window(window: int, tokens: int) -> None:
    model = tiny_model("llama", max_position_embeddings=window)
    seen: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _, arguments, options: seen.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    assert profile_time._seconds_a_token(model) > 0
    assert set(seen) == {tokens}


def test_a_check_reads_as_a_table() -> None:
    one = PromptCheck("needle/1", 10, 0.25, 0.75, {"a_shape": 0.5, "random": 0.125})
    found = ProfileCheck((one, one), "a_shape", 0.5, 0.45, 0.55)
    assert found.mass == 0.75
    assert found.density == 0.25
    lines = str(found).splitlines()
    assert lines[1].split("  ")[0] == "prompt"
    assert "every head a_shape" in lines[1]
    assert lines[-1] == (
        "lost mass over that of a_shape, the best uniform pattern: 0.500, 95% interval 0.450 to 0.550 over 2 prompts"
    )
    assert isinstance(AShape(), AShape)
