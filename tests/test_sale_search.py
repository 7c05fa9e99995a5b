"""Thresholds of SALE: its own calibration against a literal loop, our aims, and the profiles that hold them."""

from __future__ import annotations

import dataclasses
import functools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from sparseprefill import huggingface, patch_model, profile_model, register
from sparseprefill.cli import main
from sparseprefill.contracts import AttentionInputs, BlockGrid, BlockIndex
from sparseprefill.doctor import explain
from sparseprefill.estimators.relative_attention import scored_blocks
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.profile_check import FAMILIES, check_profile
from sparseprefill.evals.profile_figures import plot_maps, type_colour
from sparseprefill.evals.profile_findings import findings, made_words
from sparseprefill.huggingface_modules import model_facts
from sparseprefill.huggingface_weights import weights_hash
from sparseprefill.patterns import (
    AShape,
    Dense,
    ModelPatterns,
    Pattern,
    Sale,
    VerticalSlash,
    load_patterns,
    save_patterns,
)
from sparseprefill.patterns.candidates import THRESHOLDS, candidates, candidates_of, sale_candidates
from sparseprefill.patterns.profiles import difference, merge
from sparseprefill.patterns.sale_search import choose, error_peak_bytes, ladder, least_tokens, output_errors
from sparseprefill.patterns.store import PATTERNS
from sparseprefill.prefill import resolve_method
from sparseprefill.profile import score_model
from sparseprefill.profile_scores import DensityBudget, SaleSearch, TargetMass, read_scores
from sparseprefill.profile_scores import choose as select
from support import make_inputs

SMALL: dict[str, Any] = {"window": 32, "segment": 32, "query_block": 16, "key_block": 16}
BLOCK = 16


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def ids(tokens: int, seed: int = 0) -> list[int]:
    """Runs of one token, so that blocks differ: among blocks of random tokens each has its largest weight somewhere."""
    run = torch.randint(3, 99, (-(-tokens // BLOCK),), generator=torch.Generator().manual_seed(seed))
    return run.repeat_interleave(BLOCK)[:tokens].tolist()


def calibrated(model: PreTrainedModel, error: float, **options: Any) -> ModelPatterns:
    settings: dict[str, Any] = {"candidates": sale_candidates(ladder(), **SMALL), "block": BLOCK}
    return profile_model(model, [ids(200, 0), ids(130, 1)], target=SaleSearch(error), **{**settings, **options})


# ---- the ladder, and the state that goes down it


def test_the_published_ladder() -> None:
    assert ladder() == (0.008, 0.004, 0.002, 0.001, 0.0005, 0.00025, 0.000125)
    assert ladder(0.5, 0.25) == (0.5,), "what is not above the least is dense"
    for first, least in ((1.0, 0.1), (0.1, 0.1), (0.1, 0.0), (math.nan, 0.1), (0.1, math.nan)):
        with pytest.raises(ValueError, match="a ladder goes from"):
            ladder(first, least)


def literal_choice(
    error_of: Callable[[int, int, float], float], tokens: list[int], heads: int, error: float
) -> list[float]:
    """Threshold of each head, 0 for dense: halving as published, prompt by prompt and head by head."""
    threshold = [0.008] * heads
    for prompt in range(len(tokens)):
        for head in range(heads):
            while threshold[head] > 0 and not error_of(prompt, head, threshold[head]) < error * tokens[prompt]:
                threshold[head] /= 2
                if threshold[head] <= 1e-4:
                    threshold[head] = 0.0
    return threshold


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_that_of_the_loop(seed: int) -> None:
    """Errors that do not fall with the threshold, and some exactly at what is allowed."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 9, (4,), generator=draw).tolist()
    errors = torch.randint(0, 9, (4, 12, 7), generator=draw).double() / 4

    def error_of(prompt: int, head: int, threshold: float) -> float:
        return float(errors[prompt, head, ladder().index(threshold)])

    for error in (0.25, 0.5, 1.0):
        chosen = [(*ladder(), 0.0)[step] for step in choose(errors, tokens, error).tolist()]
        assert chosen == literal_choice(error_of, tokens, 12, error)


def test_a_head_never_goes_up_again() -> None:
    """On the second prompt the first step would do, and on the third none below the second."""
    errors = torch.tensor([[[9.0, 0, 9]], [[0, 9, 0.0]], [[0, 0, 0]]], dtype=torch.float64)
    assert [choose(errors[:n], [1] * n, 1.0).tolist() for n in (1, 2, 3)] == [[1], [2], [2]]
    assert choose(torch.full((1, 1, 3), math.inf, dtype=torch.float64), [1], 1.0).tolist() == [3], "dense"


def test_no_choice_from_what_is_no_error() -> None:
    errors = torch.zeros(2, 3, 7, dtype=torch.float64)
    for wrong, message in ((errors[0], "errors must be"), (errors[:1], "errors must be"), (errors[:, :0], "must be"),
                           (errors * math.nan, "NaN")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            choose(wrong, [5, 6], 0.4)
    for error in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="the error must be a finite number above 0"):
            choose(errors, [5, 6], error)
        with pytest.raises(ValueError, match="the error must be a finite number above 0"):
            SaleSearch(error)
    for odd in (True, "0.4", None):
        with pytest.raises(TypeError, match="the error must be a number"):
            SaleSearch(odd)  # type: ignore[arg-type]


# ---- errors


def exact_output(inputs: AttentionInputs, mask: Tensor) -> Tensor:
    """float64 [1, heads, queries, value_dim] of softmax over the pairs in `mask` [1, heads, queries, keys]."""
    key, value = (t.double().repeat_interleave(inputs.group_size, 1) for t in (inputs.key, inputs.value))
    logits = inputs.query.double() @ key.mT * inputs.scale
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def test_errors_are_those_of_the_definition() -> None:
    inputs = make_inputs(query_heads=6, kv_heads=3, queries=201, head_dim=16, value_dim=8, scale=0.9)
    patterns: list[Pattern] = [Dense(), *(Sale(each, **SMALL) for each in (0.9, 0.1, 0.01, 0.001)), AShape(16, 32)]
    found = output_errors(inputs, patterns, block=BLOCK)
    assert found.dtype == torch.float64
    grid, causal = BlockGrid.of(inputs, BLOCK, BLOCK), inputs.visible_mask()[:, None]
    dense = exact_output(inputs, causal.expand(1, 6, -1, -1))
    wanted = []
    for pattern in patterns:
        tiles = pattern.build_index(inputs, grid).to_mask()
        pairs = tiles.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :201, :201] & causal
        wanted.append((exact_output(inputs, pairs) - dense).abs().sum((0, 2, 3)))
    assert torch.allclose(found, torch.stack(wanted, 1), rtol=1e-4, atol=1e-3)
    assert bool((found[:, 0] == 0).all())
    assert bool((found[:, 1] > 1.5 * found[:, 3]).all()), "the case is one in which thresholds matter"
    with pytest.raises(ValueError, match="one prompt without padding"):
        output_errors(make_inputs(batch=2), patterns)


def test_memory_of_the_errors_is_of_one_group() -> None:
    assert error_peak_bytes(8192, 32, 8, 128) == error_peak_bytes(8192, 4, 1, 128)
    assert error_peak_bytes(131072, 32, 8, 128) < 4 << 30


@pytest.mark.slow
def test_memory_of_the_errors_is_within_its_bound() -> None:
    """Eight heads of one group, and thresholds at which they keep a part."""
    code = (
        "import torch\n"
        "def most_held(): return 1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "from sparseprefill.contracts import AttentionInputs\n"
        "from sparseprefill.patterns.candidates import sale_candidates\n"
        "from sparseprefill.patterns.sale_search import error_peak_bytes, output_errors\n"
        "torch.set_num_threads(1)\n"
        "def made(heads, tokens): return torch.randn(1, heads, tokens, 128) * 0.4\n"
        "patterns = [each.pattern for each in sale_candidates((0.9, 0.5, 0.001))]\n"
        "output_errors(AttentionInputs(made(4, 512), made(1, 512), made(1, 512), 0.1), patterns)\n"
        "inputs = AttentionInputs(made(8, 4096), made(1, 4096), made(1, 4096), 0.1)\n"
        "before = most_held()\n"
        "output_errors(inputs, patterns)\n"
        "print(most_held() - before, error_peak_bytes(4096, 8, 1, 128))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, bound = map(int, done.stdout.split())
    assert bound / 8 < used <= bound


@pytest.mark.parametrize(
    ("window", "segment", "query_block", "key_block"),
    [(128, 128, 64, 32), (32, 32, 16, 16), (64, 256, 64, 64), (96, 64, 16, 32), (96, 32, 64, 16)],
)
def test_the_least_length_is_the_first_with_a_tested_block(
    window: int, segment: int, query_block: int, key_block: int
) -> None:
    pattern = Sale(0.999, window=window, segment=segment, query_block=query_block, key_block=key_block)
    least = least_tokens(pattern)

    def tested(tokens: int) -> int:
        blocks = torch.tensor(-(-(-(-tokens // query_block) * query_block) // key_block))
        return int(scored_blocks(blocks, segment // key_block, window // key_block))

    assert tested(least) > 0 == tested(least - 1)
    short = make_inputs(queries=least - 1, scale=1e-6)
    grid = BlockGrid.of(short, query_block, key_block)
    assert torch.equal(pattern.build_index(short, grid).to_mask(), BlockIndex.dense(short, grid).to_mask())
    long = make_inputs(queries=least, scale=1e-6)
    grid = BlockGrid.of(long, query_block, key_block)
    assert not torch.equal(pattern.build_index(long, grid).to_mask(), BlockIndex.dense(long, grid).to_mask())


# ---- candidates


def test_candidates_of_sale_share_one_estimate() -> None:
    found = sale_candidates(bits=8)
    assert isinstance(found[0].pattern, Dense)
    patterns = [each.pattern for each in found[1:] if isinstance(each.pattern, Sale)]
    assert [each.threshold for each in patterns] == list(THRESHOLDS) == sorted(THRESHOLDS, reverse=True)
    assert {each.family for each in patterns} == {Sale(0.5, bits=8).family}
    assert set(ladder()) < set(THRESHOLDS)
    assert not any(isinstance(each.pattern, Sale) for each in candidates()), "it would multiply everybody's time"
    assert candidates_of("sale", bits=8) == found
    assert {each.family for each in candidates_of("block_sparse")} == {"dense", "block_sparse"}
    for wrong, message in (
        ({"thresholds": ()}, "at least one"), ({"thresholds": (0.5, 1.0)}, r"threshold must be in \(0, 1\)"),
        ({"thresholds": (0.0,)}, r"threshold must be in \(0, 1\)"), ({"threshold": 0.1}, "leave threshold out"),
        ({"keep": 0.1}, "leave keep out"), ({"bit": 8}, "sale has no option 'bit'"), ({"bits": 5}, "bits must be"),
        ({"group": "head"}, "group must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sale_candidates(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no budgets of 'random' to choose from: name one of a_shape"):
        candidates_of("random")
    with pytest.raises(ValueError, match="leave keep out"):
        candidates_of("block_sparse", keep=0.1)


# ---- profiles


class Recorder:
    """Dense attention that keeps what each layer was given."""

    def __init__(self) -> None:
        self.seen: dict[int, AttentionInputs] = {}

    def for_layer(self, layer: int) -> RecorderOfLayer:
        return RecorderOfLayer(self, layer)

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        raise AssertionError("each layer has one of its own")


@dataclasses.dataclass(frozen=True, eq=False)
class RecorderOfLayer:
    recorder: Recorder
    layer: int

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        self.recorder.seen[self.layer] = inputs
        return BlockIndex.dense(inputs, grid)


def test_the_published_calibration_of_a_model(llama: PreTrainedModel) -> None:
    """What the profiler gives the heads is what a loop over prompts, layers and heads gives them, each head alone."""
    prompts, recorders = [ids(200, 0), ids(130, 1)], []
    for prompt in prompts:
        recorders.append(Recorder())
        with torch.no_grad(), patch_model(llama, recorders[-1], min_length=0, block_q=BLOCK, block_k=BLOCK) as patch:
            patch.model.base_model(input_ids=torch.tensor([prompt]), use_cache=False)

    def error_of(layer: int, prompt: int, head: int, threshold: float) -> float:
        own = recorders[prompt].seen[layer].select_heads([head])
        pattern = Sale(threshold, **SMALL)
        tiles = pattern.build_index(own, BlockGrid.of(own, BLOCK, BLOCK)).to_mask()
        causal, tokens = own.visible_mask()[:, None], own.queries
        pairs = tiles.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :tokens, :tokens] & causal
        return float((exact_output(own, pairs) - exact_output(own, causal)).abs().sum())

    allowed = 0.0004  # splits the heads
    wanted = [literal_choice(functools.partial(error_of, layer), [200, 130], 4, allowed) for layer in range(3)]
    found = calibrated(llama, allowed)
    chosen = [[each.threshold if isinstance(each, Sale) else 0.0 for each in layer] for layer in found.layers]
    assert chosen == wanted
    assert len({each for layer in wanted for each in layer}) > 2, "the case is one in which heads differ"
    assert found.made["target"] == {"kind": "sale", "error": allowed}


def test_another_error_needs_no_model(llama: PreTrainedModel, tmp_path: Path) -> None:
    """Errors are kept with the scores; the larger the error, the larger the thresholds; a stopped run goes on."""
    computed: list[int] = []
    options: dict[str, Any] = {"folder": tmp_path / "s", "held_out": [ids(150, 2)], "progress": computed.append}
    first = calibrated(llama, 1e-9, **options)
    assert all(score is not None and score.density > 0.9 for layer in first.tuning for score in layer)
    assert any(isinstance(each, Dense) for layer in first.layers for each in layer)
    before, stored = len(computed), sorted((tmp_path / "s").glob("*.safetensors"))
    assert len(stored) == before == 9
    second = calibrated(llama, 1e9, **options, resume=True)
    assert {each for layer in second.layers for each in layer} == {Sale(0.008, **SMALL)}
    assert len(computed) == before
    assert second.held_out != ()
    scores = read_scores(tmp_path / "s")
    assert scores.errors(0).shape == (2, 4, 8), "held-out prompts have none"
    kept = [file.read_bytes() for file in stored]
    stored[1].unlink()
    assert calibrated(llama, 1e9, **options, resume=True) == second
    assert [file.read_bytes() for file in stored] == kept
    with pytest.raises(ValueError, match="errors"):  # scores that were made for another target
        profile_model(llama, [ids(200, 0), ids(130, 1)], candidates=sale_candidates(ladder(), **SMALL), block=BLOCK,
                      folder=tmp_path / "s", held_out=[ids(150, 2)], resume=True)  # fmt: skip


def test_scores_without_errors_serve_no_calibration(llama: PreTrainedModel, tmp_path: Path) -> None:
    table = sale_candidates(ladder(), **SMALL)
    scores = score_model(llama, [ids(130)], candidates=table, block=BLOCK, folder=tmp_path / "s")
    with pytest.raises(ValueError, match="holds no errors of outputs"):
        scores.errors(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": ["a_shape"]}, "among dense and its own ladder"),
        ({"candidates": sale_candidates((0.008, 0.004), **SMALL)}, "among dense and its own ladder"),
        ({"candidates": [*sale_candidates(ladder()[:-1], **SMALL), Sale(ladder()[-1])]}, "its own ladder"),
        ({"prompts": [ids(64)]}, "64 tokens, of which SALE would test none.* at least 65 tokens"),
        ({"candidates": None}, "take prompts of at least 257 tokens"),
        ({"target": TargetMass(0.9), "prompts": [ids(200), ids(64, 1)]}, "prompt 1 has 64 tokens"),
        ({"held_out": [ids(64)]}, "held-out 0 has 64 tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_calibrated_is_refused(llama: PreTrainedModel, options: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"candidates": sale_candidates(ladder(), **SMALL), "target": SaleSearch(), **options}
    prompts = settings.pop("prompts", [ids(200)])
    with pytest.raises(ValueError, match=message):
        profile_model(llama, prompts, block=BLOCK, **settings)


def test_a_density_is_shared_by_the_heads(llama: PreTrainedModel, tmp_path: Path) -> None:
    """All heads together keep more than with any one threshold that is as sparse, and the mean is within the target."""
    table = sale_candidates((0.9, 0.5, 0.2, 0.1, 0.05, 0.02), **SMALL)
    options: dict[str, Any] = {"candidates": table, "block": BLOCK, "folder": tmp_path / "s"}
    prompts = [ids(300, 0), ids(280, 1)]
    found = profile_model(llama, prompts, target=DensityBudget(0.8), **options)
    own = [score for layer in found.tuning for score in layer if score is not None]
    density, mass = (math.fsum(getattr(s, name) for s in own) / len(own) for name in ("density", "mass"))
    assert density <= 0.8 + 1e-6
    scores = read_scores(tmp_path / "s")
    tables = [scores.table(layer, False, 0.1) for layer in scores.layers]
    masses, densities = (torch.cat([getattr(t, name) for t in tables]).mean(0) for name in ("mass", "density"))
    rivals = masses[densities <= 0.8].tolist()
    assert rivals
    assert mass >= max(rivals) - 1e-6
    target = found.made["target"]
    assert (target["kind"], target["density"]) == ("density", 0.8)
    assert target["gap"] >= 0
    assert profile_model(llama, prompts, target=DensityBudget(1), resume=True, **options).made["target"]["density"] == 1
    with pytest.raises(ValueError, match="below the mean cost"):
        profile_model(llama, prompts, target=DensityBudget(0.01), resume=True, **options)
    for wrong in (0, 1.5, math.nan, -0.2):
        with pytest.raises(ValueError, match=r"the density must be in \(0, 1\]"):
            DensityBudget(wrong)


def test_a_density_goes_with_any_candidates(llama: PreTrainedModel) -> None:
    found = profile_model(
        llama, [ids(300)], candidates=["a_shape:sink=16,window=32", "block_sparse:keep=0.5,sink=16,local=16"],
        target=DensityBudget(0.6), block=BLOCK,
    )  # fmt: skip
    own = [score.density for layer in found.tuning for score in layer if score is not None]
    assert math.fsum(own) / len(own) <= 0.6 + 1e-6


# ---- use


@pytest.fixture(scope="module")
def thresholds(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile with a threshold for each head, and dense heads."""
    path = tmp_path_factory.mktemp("sale") / "sale.json"
    each = [Sale(0.3, **SMALL), Dense(), Sale(0.05, **SMALL), Sale(0.01, **SMALL)]
    layers = tuple(tuple(each[(layer + head) % 4] for head in range(4)) for layer in range(3))
    save_patterns(ModelPatterns(layers, model_facts(llama.config)), path)
    return path


def test_a_profile_goes_with_method_sale(llama: PreTrainedModel, thresholds: Path) -> None:
    """It runs what "minference" runs with the same file, and is named in the report."""
    tokens, options = torch.tensor([ids(180)]), {"min_length": 0, "block_q": BLOCK, "block_k": BLOCK}
    outputs, named = [], []
    for method in ("sale", "minference"):
        with torch.no_grad(), patch_model(llama, method, profile=thresholds, **options) as patch:
            outputs.append(llama(input_ids=tokens).logits)
            named.append(patch.report().method)
            assert patch.report().sparse_calls == 3
    assert named == ["sale", "minference"]
    assert torch.equal(*outputs)
    with torch.no_grad():
        assert not torch.equal(llama(input_ids=tokens).logits, outputs[0])
    spec = MethodSpec.parse(f"sale:profile={thresholds}")
    with torch.no_grad(), spec.applied(llama, **options):
        assert torch.equal(llama(input_ids=tokens).logits, outputs[0])
    assert str(thresholds) in explain(llama, "sale", profile=thresholds).profile
    assert "Sale" in str(explain(llama, "sale", profile=thresholds, block_q=BLOCK, block_k=BLOCK))


def test_what_sale_takes_no_profile_with(llama: PreTrainedModel, thresholds: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    save_patterns(ModelPatterns(((AShape(16, 32), VerticalSlash(density=0.2), Sale(0.1), Dense()),) * 3), other)
    few = tmp_path / "few.json"
    save_patterns(ModelPatterns(((Sale(0.1), Dense()),) * 3), few)
    for options, error, message in (
        ({"profile": thresholds, "threshold": 0.1}, ValueError, "takes a profile, or else threshold"),
        ({"profile": thresholds, "bits": 8}, ValueError, "takes a profile, or else bits"),
        ({"profile": other}, ValueError, "gives heads AShape, VerticalSlash, .* use it with method 'minference'"),
        ({"profile": few}, ValueError, "of another model"),
        ({"profile": tmp_path / "none.json"}, FileNotFoundError, "there is no profile"),
        ({"threshold": 1.0}, ValueError, r"threshold must be in \(0, 1\)"),
        ({"error": 0.4}, ValueError, "has no option 'error'"),
    ):
        given: dict[str, Any] = options
        with pytest.raises(error, match=message):
            patch_model(llama, "sale", **given)
    patch_model(llama, profile=other).remove()


def test_thresholds_can_be_registered(llama: PreTrainedModel, thresholds: Path) -> None:
    before = dict(huggingface._REGISTERED)
    try:
        register("sale", profile=thresholds, block_q=BLOCK, block_k=BLOCK, min_length=0)
        assert huggingface._REGISTERED["pattern"] == load_patterns(thresholds)
        with pytest.raises(ValueError, match="takes a profile, or else threshold"):
            register("sale", profile=thresholds, threshold=0.1)
    finally:
        huggingface._REGISTERED.clear()
        huggingface._REGISTERED.update(before)


def test_a_density_of_sale_is_a_budget() -> None:
    assert MethodSpec.at_density("sale", 0.3) == MethodSpec("sale", {"keep": 0.3})
    assert resolve_method("sale", **MethodSpec.at_density("sale", 0.3).options) == Sale(keep=0.3)


def test_profiles_with_thresholds_are_compared_merged_and_drawn(
    llama: PreTrainedModel, thresholds: Path, tmp_path: Path
) -> None:
    table = sale_candidates(ladder(), **SMALL)
    scores = score_model(llama, [ids(150)], held_out=[ids(150, 2)], candidates=table, block=BLOCK, errors=True,
                         folder=tmp_path / "s")  # fmt: skip
    first, second = (select(scores, table, SaleSearch(error)) for error in (0.0004, 1e9))
    assert "sale:threshold=0.008" in str(difference(first, second))
    for layer, heads in enumerate(merge([first, second]).held_out):
        for head, score in enumerate(heads):
            assert score is not None
            assert score.mass == max(each.held_out[layer][head].mass for each in (first, second))  # type: ignore[union-attr]
    assert "SALE's own calibration" in made_words(first)
    assert "an error of 0.0004 a token" in made_words(first)
    assert any("sale" in line for line in findings(first))
    assert len({type_colour(each) for each in PATTERNS}) == len(PATTERNS), "every type has its colour"
    assert plot_maps(load_patterns(thresholds)).subfigs
    aimed = select(scores, table, DensityBudget(1.0))
    assert "the most kept mass at a mean density of 1" in made_words(aimed)


def test_thresholds_are_judged_beside_sale_for_every_head(llama: PreTrainedModel, thresholds: Path) -> None:
    found = check_profile(llama, load_patterns(thresholds), [ids(400, 5), ids(400, 6)], block=BLOCK)
    assert set(found.prompts[0].uniform) == {*FAMILIES, "sale", "random"}


# ---- the command


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["profile", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_thresholds_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    short = ("--prompts", "builtin:prose", "--lengths", "300", "--samples", 1, "--held-out", 1, "--out", out)
    said = invoke(*short, "--sale-search", "--error", 4, "--method", "sale:bits=8,window=64").output
    assert "once more for each threshold" in said
    assert "the estimate of SALE has no calibrated rate" in said
    found = load_patterns(out)
    assert found.made["target"] == {"kind": "sale", "error": 4.0}
    assert {(e.bits, e.window) for heads in found.layers for e in heads if isinstance(e, Sale)} == {(8, 64)}
    assert "computed 0 tiles" in invoke(
        *short, "--sale-search", "--error", 400, "--method", "sale:bits=8,window=64", "--resume"
    ).output  # fmt: skip
    invoke("show", out)
    assert "heads have another pattern" in invoke("diff", out, "inside:sale", code=1).output


@pytest.mark.slow
def test_thresholds_by_an_aim_and_their_page(tmp_path: Path) -> None:
    out, page = tmp_path / "p.json", tmp_path / "p.html"
    short = ("--prompts", "builtin:prose", "--lengths", "300", "--samples", 1, "--held-out", 1, "--out", out)
    invoke(*short, "--method", "sale", "--density", 0.97, "--html", page)
    assert "sale" in page.read_text(encoding="utf-8")
    assert load_patterns(out).made["candidates"] == [each.label for each in sale_candidates()]
    assert load_patterns(out).made["target"]["kind"] == "density"


def test_commands_that_contradict_themselves(tmp_path: Path) -> None:
    out = ("--prompts", "builtin:prose", "--samples", 1, "--held-out", 0, "--out", tmp_path / "p.json")
    for arguments, message in (
        (("--sale-search", "--density", 0.2), "different targets: choose one"),
        (("--budget", 0.2, "--density", 0.2), "different targets: choose one"),
        (("--error", 0.4), "--error is what --sale-search aims at"),
        (("--sale-search", "--error", 0), "the error must be a finite number above 0"),
        (("--sale-search", "--error", "nan"), "the error must be a finite number above 0"),
        (("--density", 0), "the density must be in (0, 1]"),
        (("--sale-search", "--method", "block_sparse"), "leave --method out"),
        (("--method", "sale", "--candidate", "a_shape"), "choose one of them"),
        (("--method", "sale:threshold=0.1"), "leave threshold out"),
        (("--method", "sale:bit=4"), "sale has no option 'bit'"),
        (("--method", "spiral"), "no budgets of 'spiral' to choose from"),
        (("--sale-search", "--candidate", "a_shape"), "among dense and its own ladder"),
        (("--sale-search", "--lengths", "200"), "take prompts of at least 257 tokens"),
    ):
        output = invoke(*arguments, *out, code=1).output
        assert message in output, output
    assert not (tmp_path / "p.json").exists()


# ---- what ships


def test_the_thresholds_inside_are_of_the_model_inside(recwarn: pytest.WarningsRecorder) -> None:
    """Made by `make profile`: of these weights, from the candidates that there are now."""
    model, _ = load_model()
    found = load_patterns("inside:sale")
    assert found.mismatch(model_facts(model.config)) is None
    assert found.weights == weights_hash(model)[0]
    assert found.made["candidates"] == [each.label for each in sale_candidates()], "run `make profile`"
    assert found.held_out != ()
    assert len({each for heads in found.layers for each in heads if isinstance(each, Sale)}) >= 3
    with patch_model(model, "sale", profile="inside", strict=True) as patch:
        assert patch.report().method == "sale"
        assert list(patch.patterns.values()) == [found.for_layer(layer) for layer in range(4)]
    assert not [each for each in recwarn if issubclass(each.category, UserWarning)]
