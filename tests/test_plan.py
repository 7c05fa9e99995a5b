"""Plans: tiles counted before there is a prompt are those that are computed, shapes give the work, gaps are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from method_cases import BLOCK, CASES
from tiny_models import FAMILIES, tiny_config

from sparseprefill.cli import main
from sparseprefill.contracts import BlockGrid
from sparseprefill.huggingface_layers import Settings
from sparseprefill.patterns import BlockSparse, Dense, LastRowsDense, PerHead, VerticalSlash
from sparseprefill.patterns.cluster_segments import ClusterSegments
from sparseprefill.patterns.expected_tiles import LAWS, count_tiles, tile_law
from sparseprefill.patterns.hip import Hip
from sparseprefill.patterns.methods import METHODS
from sparseprefill.patterns.parts import parts_coverage, parts_of
from sparseprefill.patterns.pbs import Pbs
from sparseprefill.patterns.sign_code import SignCode
from sparseprefill.patterns.skip_softmax import SkipSoftmax
from sparseprefill.patterns.vote_columns import VoteColumns, tokenselect
from sparseprefill.plan import check_config, plan
from sparseprefill.plan_check import PlanCheck, check_plan, check_table
from sparseprefill.prefill import COST_MODELS, CostModel
from support import make_inputs

CONFIGS = Path(__file__).resolve().parent / "data" / "configs"
SHAPE = {"query_heads": 4, "kv_heads": 2, "block_q": BLOCK, "block_k": BLOCK}


def measured(pattern: Any, keys: int, window: int | None = None) -> tuple[int, int]:
    """Tiles of dense attention and of the pattern, of all heads."""
    inputs = make_inputs(query_heads=4, kv_heads=2, queries=keys, head_dim=8, window=window, seed=keys)
    grid = BlockGrid.of(inputs, BLOCK, BLOCK)
    tiles = [int(parts_coverage(parts_of(each, inputs, grid)).tiles.sum()) for each in (Dense(), pattern)]
    return tiles[0], tiles[1]


@pytest.mark.parametrize("keys", [9, 160, 333])
@pytest.mark.parametrize("method", CASES)
def test_counted_tiles_are_those_that_are_computed(method: str, keys: int) -> None:
    for pattern in (CASES[method].pattern, CASES[method].full):
        count = count_tiles(pattern, keys=keys, **SHAPE)
        dense, tiles = measured(pattern, keys)
        assert count.dense == dense
        assert count.low <= tiles <= count.high, count
        assert count.law == tile_law(pattern)
        if count.law != "content":
            assert count.exact
            assert count.share() == tiles / dense


@pytest.mark.parametrize(
    "pattern",
    [VoteColumns(keep=0.05, probe=1024, local=64), tokenselect(keep=0.2, superblock=256, local=64),
     Hip(keep=256, sink=64, local=64, stages=((64, 0, 8), (8, 1024, 8)), most=1.0),
     Hip(keep=64, sink=64, local=64, stages=((64, 0, 1), (32, 2048, 1)), most=0.1)],
    ids=["probe", "stretches", "small chunks", "refused"],
)  # fmt: skip
def test_the_most_is_the_most(pattern: Any) -> None:
    inputs = make_inputs(query_heads=4, kv_heads=2, queries=2048, head_dim=8)
    grid = BlockGrid.of(inputs, 64, 64)
    tiles = int(parts_coverage(parts_of(pattern, inputs, grid)).tiles.sum())
    count = count_tiles(pattern, keys=2048, query_heads=4, kv_heads=2, block_q=64, block_k=64)
    assert count.low <= tiles <= count.high


def test_laws_say_what_tiles_depend_on() -> None:
    laws = {name: tile_law(row.at(row.knobs[2])) for name, row in METHODS.items() if row.knob}
    assert set(laws.values()) == set(LAWS)
    static = {name for name, row in METHODS.items() if row.kind == "static" and row.knob}
    assert {name for name, law in laws.items() if law == "positions"} == static | {"skip_softmax"}  # around dense
    assert laws["block_sparse"] == laws["sale"] == laws["clusters"] == laws["delta_correct"] == "count"
    assert laws["vertical_slash"] == laws["snapkv"] == laws["flashprefill"] == laws["cached"] == "content"
    assert tile_law(LastRowsDense(BlockSparse(keep=0.2), 10)) == "count"
    assert tile_law(PerHead((Dense(), BlockSparse(keep=0.2)))) == "count"
    assert tile_law(PerHead((Dense(), VerticalSlash(density=0.2)))) == "content"
    assert tile_law(object()) == "content"


@pytest.mark.parametrize(
    "pattern",
    [ClusterSegments(keep=0.3, segment=64, tokens=8), Pbs(BlockSparse(mass=0.5, sink=0, local=0), segment=64),
     LastRowsDense(BlockSparse(keep=0.2), 20), PerHead((Dense(), BlockSparse(keep=0.2)) * 2)],
    ids=lambda each: type(each).__name__,
)  # fmt: skip
def test_parts_last_rows_and_heads_are_counted(pattern: Any) -> None:
    count = count_tiles(pattern, keys=400, **SHAPE)
    _, tiles = measured(pattern, 400)
    assert count.low <= tiles <= count.high
    assert count.exact == (count.law == "count")


def test_a_local_layer_keeps_its_window() -> None:
    count = count_tiles(BlockSparse(keep=0.1), keys=400, window=70, **SHAPE)
    dense, _ = measured(Dense(), 400)
    own, _ = measured(Dense(), 400, window=70)
    assert (count.dense, count.low, count.high) == (dense, own, own)


@pytest.mark.parametrize("window", [None, 50])
def test_a_layer_of_chunks_keeps_those_alone(window: int | None) -> None:
    count = count_tiles(BlockSparse(keep=0.1), keys=400, chunk=70, window=window, **SHAPE)
    inputs = make_inputs(
        query_heads=4, kv_heads=2, queries=400, head_dim=8, window=window, segment=(torch.arange(400) // 70)[None]
    )
    low, high = BlockGrid.of(inputs, BLOCK, BLOCK).visible_blocks(inputs)
    assert count.low == count.high == 4 * int((high - low).sum()) < count.dense / 3


@pytest.mark.parametrize("method", ["sign_code", "hyperattention", "random"])
def test_layers_that_differ_in_a_seed_are_planned_together(method: str) -> None:
    _, found = reckon(None, method, length=4096, options={})
    assert [each.layers for each in found.layers] == [(0, 1, 2, 3)]


def test_what_is_cheaper_to_count_keeps_as_many() -> None:
    for keep in (0.1, 100, 1.0):
        pattern = SignCode(keep=keep, sink=16, local=32, bits=8)
        count = count_tiles(pattern, keys=333, **SHAPE)
        assert count.low == count.high == measured(pattern, 333)[1]


def reckon(name: str | None, method: str = "block_sparse", length: int = 32768, **options: Any) -> Any:
    made = plan(name, (length,), [("it", method, options.pop("options", {"keep": 0.1}))], **options)
    (found,) = made.plans
    return made, found


def test_the_work_is_that_of_the_shape() -> None:
    """Llama-3.1-8B: 8.03 G weights, 128 KiB of cache a token, and attention's operations from the formula."""
    made, found = reckon(str(CONFIGS / "llama-3.1-8b"), device="H200")
    (layers,) = found.layers
    assert layers.layers == tuple(range(32))
    assert layers.tiles.dense == 32 * 512 * 513 // 2
    assert found.memory["weights"] == 2 * 8_030_261_248
    assert found.memory["cache"] == 32768 * 131072
    pairs = 32768 * 32769 / 2
    attention, others = 4 * 32 * 32 * 128 * pairs, 2 * 32768 * (8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096)
    assert found.attention_share == pytest.approx(attention / (attention + others))
    share = layers.tiles.share()
    assert found.bound == pytest.approx((attention + others) / (attention * share + others))
    assert found.dense_seconds == pytest.approx(attention / 989e12)
    assert found.sparse_seconds == pytest.approx(share * attention / 989e12)
    assert "PREDICTION" in str(made)
    assert layers.bound == pytest.approx(1 / share)
    assert 1 < layers.speedup < layers.bound
    _, qwen = reckon(str(CONFIGS / "qwen3-8b" / "config.json"), device="h200")
    assert qwen.memory["weights"] == 2 * 8_190_735_360
    assert qwen.memory["cache"] == 32768 * 147456


def test_break_even_is_where_the_cost_model_says_so() -> None:
    made, found = reckon(None, length=8192)
    (layers,) = found.layers
    at = layers.break_even
    assert at is not None
    assert "bound" in made.text()
    _, dear = reckon(None, "clusters", length=4096)
    assert dear.layers[0].break_even is None, "finding alone takes longer than dense attention"
    _, dense = reckon(None, "dense", length=4096, options={})
    assert dense.layers[0].bound == dense.bound == 1.0
    assert dense.layers[0].own == "dense"
    assert dense.layers[0].speedup is None


def test_the_cost_model_is_that_of_the_kernel_that_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made, found = reckon(None, length=8192)
    assert COST_MODELS["cpu", "cpu"].describe() in made.text()
    for module in ("plan", "huggingface_layers"):  # whether there is a calibration file or not
        monkeypatch.setattr(f"sparseprefill.{module}.kernel_for", lambda *_, **__: ("native", {}))
    native, faster = reckon(None, length=8192)
    assert COST_MODELS["cpu", "native"].describe() in native.text()
    assert faster.layers[0].speedup > found.layers[0].speedup


def test_what_a_kernel_skips_is_expected_and_not_listed() -> None:
    _, found = reckon(None, "skip_softmax", length=8192, options={})
    (layers,) = found.layers
    assert layers.tiles.share() == 1.0
    assert layers.expected == SkipSoftmax(Dense()).expected_density(8192) < 1.0
    assert layers.bound == pytest.approx(1 / layers.expected)


def test_layers_that_run_as_without_the_method_take_as_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config("gemma2").save_pretrained(tmp_path)
    seconds = 1e-9
    entry = SimpleNamespace(
        cost=CostModel(1.4, 512), dense_pair_seconds=seconds, overheads={}, describe=lambda: "calibrated"
    )
    monkeypatch.setattr(Settings, "calibration", lambda self, path: "known")
    monkeypatch.setattr(
        "sparseprefill.plan.layer_cost", lambda *_, **__: SimpleNamespace(entry=entry, kernel="native", missing="")
    )
    made, found = reckon(str(tmp_path), length=700)
    local = next(each for each in found.layers if each.own)
    assert local.own == "window"
    pairs = 700 * 701 / 2
    assert local.dense_seconds == local.sparse_seconds == pytest.approx(seconds * pairs * local.tiles.share())
    (chosen,) = [each for each in found.layers if not each.own]
    assert chosen.dense_seconds == pytest.approx(seconds * pairs)
    assert chosen.sparse_seconds != chosen.dense_seconds
    assert "(window)" in made.text()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_a_plan(family: str, tmp_path: Path) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    try:
        made, found = reckon(str(tmp_path), length=700)
    except NotImplementedError as error:
        pytest.skip(f"refused by patch_model too: {error}")
    assert {layer for each in found.layers for layer in each.layers}
    assert all(each.tiles.low <= each.tiles.high <= each.tiles.dense for each in found.layers)
    assert all(value >= 0 for value in found.memory.values())
    assert made.to_dict()["plans"][0]["length"] == 700


def test_local_layers_are_told_apart(tmp_path: Path) -> None:
    tiny_config("gemma2").save_pretrained(tmp_path)
    _, found = reckon(str(tmp_path), length=700)
    assert len(found.layers) == 2
    assert {each.overhead > 0 for each in found.layers} == {True, False}


def test_experts_count_by_the_share_that_is_asked(tmp_path: Path) -> None:
    shares = []
    for asked in (1, 2):
        folder = tmp_path / str(asked)
        tiny_config("qwen3_moe", num_experts_per_tok=asked).save_pretrained(folder)
        shares.append(reckon(str(folder), length=700)[1].attention_share)
    assert shares[0] > shares[1]


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"])
def test_a_configuration_that_lacks_a_field_is_refused(field: str, tmp_path: Path) -> None:
    written = json.loads((CONFIGS / "llama-3.1-8b" / "config.json").read_text(encoding="utf-8"))
    del written[field]
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(ValueError, match=f"has no {field}: transformers would put another model's number there"):
        reckon(str(tmp_path))


@pytest.mark.parametrize("field", ["num_key_value_heads", "intermediate_size"])
def test_a_number_that_only_a_default_gives_is_refused(field: str, tmp_path: Path) -> None:
    written = json.loads((CONFIGS / "qwen3-8b" / "config.json").read_text(encoding="utf-8"))
    del written[field]
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(ValueError, match=f"has no {field}"):
        reckon(str(tmp_path))


def test_numbers_that_follow_from_others_need_not_be_there(tmp_path: Path) -> None:
    written = json.loads((CONFIGS / "llama-3.1-8b" / "config.json").read_text(encoding="utf-8"))
    del written["num_key_value_heads"]  # each query head has its own
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert reckon(str(tmp_path))[1].memory["cache"] == 4 * 32768 * 131072
    written = {"model_type": "gpt_bigcode", "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 50}
    assert check_config(str(tmp_path)) == str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert reckon(str(tmp_path), length=700)[1].memory["cache"] == 2 * 700 * 2 * 8 * 4


def test_configurations_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1, 2]", encoding="utf-8")
    with pytest.raises(ValueError, match="configuration"):
        reckon(str(tmp_path))
    written = json.loads((CONFIGS / "llama-3.1-8b" / "config.json").read_text(encoding="utf-8"))
    path.write_text(json.dumps({**written, "num_key_value_heads": 7}), encoding="utf-8")
    with pytest.raises(ValueError, match="32 query heads over 7 KV heads"):
        reckon(str(tmp_path))
    text = {"model_type": "llama", **{k: v for k, v in written.items() if k != "num_hidden_layers"}}
    whole = {"model_type": "llava", "text_config": text, "num_hidden_layers": 32}
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(ValueError, match="has no num_hidden_layers"):
        reckon(str(tmp_path))


def test_fields_may_have_the_names_of_their_family(tmp_path: Path) -> None:
    written = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 50, "n_positions": 1024}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert check_config(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "tpu"}, "a plan is for cpu, cuda, or one of A100"),
        ({"device": "H200", "calibration": "x.json"}, "a calibration is of the machine it was measured on"),
        ({"length": 0}, "lengths are tokens, from 1 to 2097152"),
        ({"length": 10**11}, "lengths are tokens, from 1 to 2097152"),
        ({"options": {"keep": 2.0}}, "keep as a share must be in (0, 1]"),
        ({"method": "stem", "options": {}, "block_q": 20}, "stride"),
        ({"method": "blok_sparse"}, "Did you mean 'block_sparse'"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        reckon(None, **options)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no GPU here"):
            reckon(None, device="cuda")


def run(*words: object) -> Any:
    return CliRunner().invoke(main, ["plan", *map(str, words)])


def test_the_command() -> None:
    shown = run(CONFIGS / "qwen3-8b", "--length", "8k,16k", "--method", "a_shape:window=0.1", "--device", "H200")
    assert shown.exit_code == 0, shown.output
    assert "a_shape:window=0.1" in shown.output
    assert "PREDICTION" in shown.output
    written = run("--json", "--length", "4k")
    assert json.loads(written.output)["plans"][0]["method"] == "default"
    assert run("--markdown", "--length", "4k").output.count("| method") == 2
    for words, said in (
        ((CONFIGS / "qwen3-8b", "--model", "other"), "two models were named"),
        (("--json", "--markdown"), "choose one"),
        ((__file__,), "is a file: give a model's config.json"),
        (("no/such/model",), "no configuration can be read"),
        (("--method", "stem:keap=0.1"), "Did you mean 'keep'"),
    ):
        refused = run(*words)
        assert refused.exit_code != 0
        assert said in refused.output
        assert "Traceback" not in refused.output


def test_a_plan_is_checked_against_what_runs(tmp_path: Path) -> None:
    methods = [("window", "a_shape", {"window": 0.3}), ("means", "block_sparse", {"keep": 0.3}),
               ("lines", "vertical_slash", {"density": 0.3}), ("delta", "delta_correct", {"keep": 0.2})]  # fmt: skip
    checks = check_plan(None, (512, 1024), methods, repeats=1)
    assert [(each.method, each.length) for each in checks] == [
        (name, length) for length in (512, 1024) for name, _, _ in methods
    ]
    assert all(each.holds and each.planned is None and each.measured > 0 for each in checks)
    assert all((each.low == each.high) == (each.method != "lines") for each in checks)
    wrong = PlanCheck("it", 100, 3, 3, 4, 1.0, 1.5, 1.0, 1.0)
    assert "WRONG" in check_table([wrong])
    assert wrong.off == 1.5
    out = tmp_path / "checks.json"
    done = CliRunner().invoke(
        main, ["bench", "plan", "--lengths", "512", "--method", "a_shape", "--repeats", "1", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text(encoding="utf-8"))["checks"][0]["method"] == "a_shape"
