"""Time to first token, peak memory and parts of whole models: what is said, and what happens when memory runs out."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import tiny_model, tokens
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparseprefill.cli import main
from sparseprefill.evals import first_token as benches
from sparseprefill.evals.first_token import FirstTokenCell, ModelSetup, OutOfMemory, first_token_table, first_tokens
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.prefill_parts import PARTS, parts_table, prefill_parts, watched
from sparseprefill.evals.random_models import SHAPES, random_model, shape_config

DENSE, SPARSE = MethodSpec("dense"), MethodSpec("block_sparse", {"keep": 0.3})


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["bench", "first-token", "--device", "cpu", *arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the machine has left; a test may change them."""
    bytes_left = [1 << 40]
    monkeypatch.setattr(benches, "available_bytes", lambda device: bytes_left[0])
    return bytes_left


class TestCommand:
    """As a user types it."""

    def test_a_cut_random_model_is_marked(self, tmp_path: Path) -> None:
        out = tmp_path / "cells.json"
        said = invoke(
            "--shape", "inside", "--layers", "2", "--lengths", "320,256", "--repeats", "1", "--no-memory", "--method",
            "block_sparse:keep=0.3,mlp_chunk=100", "--profile", "--out", str(out),
        )  # fmt: skip
        written = json.loads(out.read_text())
        assert written["kind"] == "first-token"
        assert written["provenance"]["model"]["name"] == "inside, random weights"
        assert written["provenance"]["date"]
        cells = [FirstTokenCell(**each) for each in written["first_token"]]
        assert [(cell.length, cell.method) for cell in cells] == [
            (length, label) for length in (256, 320) for label in ("dense", "block_sparse:keep=0.3,mlp_chunk=100")
        ]
        assert all((cell.layers, cell.whole_layers, cell.extrapolated) == (2, 4, True) for cell in cells)
        assert all(cell.whole_seconds > cell.seconds > 0 for cell in cells)
        assert all(cell.first_seconds > 0 and cell.peak_bytes is None for cell in cells)
        assert [cell.density for cell in cells[::2]] == [1.0, 1.0]
        assert all(0 < (cell.density or 0) < 1 for cell in cells[1::2])
        assert said.count("(extrapolated)") == 4
        assert "2 of 4" in said
        assert "parts are of the 2 layers that ran" in said
        assert {part for each in written["parts"] for part in each["parts"]} == set(PARTS)

    def test_memory_that_runs_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: list[int]) -> None:
        """What was measured before is written, the rest goes on, the status is 1, and a length that fits is named."""
        monkeypatch.setattr(benches, "own_process_peak", lambda setup, spec, length: 20000 * length)
        real = benches._Bench.prefill

        def prefill(self: Any, model: Any, ids: Tensor) -> float:
            if ids.shape[1] >= 640 and not hasattr(model.model.layers[0].self_attn, "_sparseprefill"):
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return real(self, model, ids)

        monkeypatch.setattr(benches._Bench, "prefill", prefill)
        out = tmp_path / "cells.json"
        weights = sum(each.nbytes for each in ModelSetup(shape="inside").made()[0].parameters())
        free[0] = weights + 20000 * 700
        options = ("--shape", "inside", "--repeats", "1", "--method", "block_sparse:keep=0.3", "--out", str(out))
        said = invoke(*options, "--lengths", "320,640,960", code=1)
        assert "dense ran out of memory at 640 tokens: about 512 tokens fit" in said
        assert "by the 6 MiB that 320 tokens took" in said
        assert "block_sparse:keep=0.3 will not fit into memory at 960 tokens: about 512 tokens fit" in said
        written = json.loads(out.read_text())
        held = [(each["method"], each["length"], each["speed_up"] is None) for each in written["first_token"]]
        assert held == [
            ("dense", 320, False), ("block_sparse:keep=0.3", 320, False), ("block_sparse:keep=0.3", 640, True)
        ]  # fmt: skip
        assert [each["length"] for each in written["out_of_memory"]] == [640, 960]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--shape", "gpt-5"], "no shape is called 'gpt-5'"),
            (["--shape", "inside", "--layers", "5"], "has 4 layers, so 1 to 4 of them can run"),
            (["--layers", "9"], "has 4 layers, so 1 to 4 of them can run"),
            (["--shape", "inside", "--model", "inside"], "not both"),
            (["--offload-cache"], "leave --offload-cache out on the CPU"),
            (["--dense-limit", "1k,2k"], "one number of tokens"),
            (["--method", "no_such:keep=1"], "unknown method"),
            (["--out", "no/such/folder/file.json"], "folder"),
        ],
    )
    def test_what_is_refused(self, arguments: list[str], message: str) -> None:
        assert message in invoke("--lengths", "256", "--no-memory", *arguments, code=1)

    def test_memory_is_left_out_on_a_cpu_alone(self) -> None:
        result = CliRunner().invoke(main, ["bench", "first-token", "--device", "meta", "--no-memory"])
        assert result.exit_code == 1
        assert "--no-memory is for the CPU" in result.output

    def test_options_of_the_group_do_not_stand_before_it(self) -> None:
        result = CliRunner().invoke(main, ["bench", "--lengths", "1k", "first-token"])
        assert result.exit_code == 2
        assert "put options after the command" in result.output


class TestTimes:
    """`first_tokens` with a clock of our own."""

    def test_medians_turns_and_ratios(self, monkeypatch: pytest.MonkeyPatch, free: list[int]) -> None:
        model = tiny_model("llama", implementation="sdpa")
        taken = iter([9.0, 8.0, 7.0, 2.0, 1.0, 4.0, 1.0, 30.0, 3.0])  # first, first, density, then three turns

        def prefill(self: Any, model: Any, ids: Tensor) -> float:
            return next(taken)

        monkeypatch.setattr(benches._Bench, "prefill", prefill)
        steps: list[int] = []
        dense, sparse = first_tokens(model, [DENSE, SPARSE], [256], repeats=3, progress=steps.append)
        assert isinstance(dense, FirstTokenCell)
        assert isinstance(sparse, FirstTokenCell)
        assert (dense.first_seconds, dense.seconds, dense.speed_up) == (9.0, 4.0, 1.0)
        assert (sparse.first_seconds, sparse.seconds, sparse.speed_up) == (8.0, 1.0, 4.0)
        assert not dense.extrapolated
        assert sum(steps) == 2 * (2 + 3)

    def test_above_the_limit_dense_runs_one_layer(self, free: list[int]) -> None:
        model = tiny_model("llama", implementation="sdpa")
        there, ran = list(model.model.layers), []
        for number, layer in enumerate(there):
            layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        found = list(first_tokens(model, [DENSE, SPARSE], [256, 512], repeats=1, dense_limit=256))
        cells = [each for each in found if isinstance(each, FirstTokenCell)]
        assert [(c.length, c.layers, c.extrapolated) for c in cells] == [
            (256, 3, False), (256, 3, False), (512, 1, True), (512, 3, False)
        ]  # fmt: skip
        assert ran.count(0) - ran.count(2) == 2, "dense, at its first call and in its turn"
        assert list(model.model.layers) == there
        assert cells[2].whole_seconds > cells[2].seconds
        assert cells[3].speed_up == pytest.approx(cells[2].whole_seconds / cells[3].seconds)
        text = first_token_table(cells)
        assert text.count("(extrapolated)") == 1
        assert "1 of 3" in text

    def test_where_one_layer_stands_for_all_no_process_runs_them(self, free: list[int]) -> None:
        """What dense takes too long for is not run whole to see its peak either."""
        asked: list[tuple[str, int]] = []

        def peak(spec: MethodSpec, length: int) -> int:
            asked.append((spec.label, length))
            return 1 << 20

        model = tiny_model("llama", implementation="sdpa")
        found = list(first_tokens(model, [DENSE, SPARSE], [256, 512], repeats=1, dense_limit=256, peak=peak))
        cells = [each for each in found if isinstance(each, FirstTokenCell)]
        assert asked == [("dense", 256), (SPARSE.label, 256), (SPARSE.label, 512)]
        assert [cell.peak_bytes for cell in cells] == [1 << 20, 1 << 20, None, 1 << 20]

    def test_layers_that_differ_do_not_stand_for_each_other(self) -> None:
        with pytest.raises(ValueError, match="not all alike"):
            list(first_tokens(tiny_model("gemma2"), [DENSE], [256], dense_limit=128))
        with pytest.raises(ValueError, match="not all alike"):
            list(first_tokens(tiny_model("lfm2"), [DENSE], [256], whole_layers=9))

    def test_logits_that_are_not_finite_are_not_timed(self) -> None:
        model = tiny_model("llama", implementation="sdpa")
        with torch.no_grad():
            model.lm_head.weight[3] = torch.inf
        with pytest.raises(FloatingPointError, match="logits after 200 tokens are not finite"):
            list(first_tokens(model, [DENSE], [200]))

    def test_other_errors_are_not_taken_for_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def prefill(self: Any, model: Any, ids: Tensor) -> float:
            raise RuntimeError("a shape is wrong")

        monkeypatch.setattr(benches._Bench, "prefill", prefill)
        with pytest.raises(RuntimeError, match="a shape is wrong"):
            list(first_tokens(tiny_model("llama"), [DENSE], [200]))
        with pytest.raises(ValueError, match="repeats must be at least 1"):
            list(first_tokens(tiny_model("llama"), [DENSE], [200], repeats=0))

    def test_without_any_measure_what_is_counted_decides(self, free: list[int]) -> None:
        model = tiny_model("llama", implementation="sdpa")
        token = (2 * 2 * 16 * 3 + 3 * 64) * 4  # keys and values of 2 heads of 16 in 3 layers, three hidden states
        free[0] = 300 * token
        (lost,) = first_tokens(model, [DENSE], [301])
        assert lost == OutOfMemory("dense", 301, False, 256, "what the cache and the hidden states take")
        free[0] = 10 * token
        (lost,) = first_tokens(model, [DENSE], [301])
        assert "not even 256 tokens fit" in str(lost)

    def test_a_model_without_logits_to_keep(self) -> None:
        model = tiny_model("llama", implementation="sdpa")
        real = model.forward
        model.forward = lambda input_ids, use_cache: real(input_ids=input_ids, use_cache=use_cache)
        (cell,) = first_tokens(model, [DENSE], [256], repeats=1)
        assert isinstance(cell, FirstTokenCell)


class TestPeak:
    """Peak memory by a process of its own."""

    def test_it_answers_in_json(self) -> None:
        asked = {"setup": {"shape": "inside", "layers": 1}, "method": SPARSE.label, "length": 2048, "threads": 2}
        answered = json.loads(benches.answer(json.dumps(asked)))
        assert answered["out_of_memory"] is False
        if answered["bytes"] is not None:  # a system that tells; this process may hold freed memory that serves again
            assert answered["bytes"] >= 0

    def test_out_of_memory_is_an_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def peak(*_: Any) -> int:
            raise MemoryError

        monkeypatch.setattr(benches, "prefill_peak", peak)
        asked = {"setup": {"shape": "inside", "layers": 1}, "method": "dense", "length": 64, "threads": 2}
        assert json.loads(benches.answer(json.dumps(asked))) == {"out_of_memory": True}

    @pytest.mark.parametrize(
        ("code", "said", "error", "message"),
        [
            (-9, "", MemoryError, "was killed"),
            (0, '{"out_of_memory": true}', MemoryError, "dense ran out of memory at 64 tokens"),
            (1, "", ValueError, "could not be measured: a reason"),
        ],
    )
    def test_what_became_of_the_process(
        self, code: int, said: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(command, code, said, "a warning\na reason")

        monkeypatch.setattr(benches.subprocess, "run", run)
        with pytest.raises(error, match=message):
            benches.own_process_peak(ModelSetup(shape="inside"), DENSE, 64)

    @pytest.mark.slow
    def test_a_real_process(self) -> None:
        setup = benches.resolved_setup(ModelSetup())
        short, long = (benches.own_process_peak(setup, DENSE, length) for length in (2048, 8192))
        if short is not None and long is not None:
            assert 2 < long / short < 8
            assert long > 8192 * 4 * 2 * 256 * 4, "the cache of four layers at least"


class TestShapes:
    """Random models of published shapes."""

    @pytest.mark.parametrize(("shape", "billions"), [("llama-3.1-8b", 8.03), ("qwen3-8b", 8.19), ("inside", 0.00368)])
    def test_they_have_the_published_size(self, shape: str, billions: float) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=torch.bfloat16)
        assert model.num_parameters() / 1e9 == pytest.approx(billions, rel=2e-3)
        assert shape in SHAPES

    def test_weights_are_drawn_in_their_own_dtype_from_a_seed(self) -> None:
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        first, again, other = (random_model("inside", layers=1, dtype=torch.bfloat16, seed=s) for s in (1, 1, 2))
        assert torch.equal(torch.random.get_rng_state(), before)
        weights = [model.model.layers[0].mlp.up_proj.weight for model in (first, again, other)]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
        assert first.dtype == torch.bfloat16
        assert len(first.model.layers) == 1
        assert not first.training


class TestParts:
    """Where the time goes."""

    def test_parts_sum_to_the_whole_and_nothing_is_left_behind(self) -> None:
        model = tiny_model("llama", implementation="sdpa")
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        found = prefill_parts(model, [DENSE, SPARSE], [320], prefill=benches.seconds_of(model), repeats=1)
        dense, sparse = found
        for each in found:
            assert sum(each.parts.values()) == pytest.approx(each.seconds)
            assert set(each.parts) == set(PARTS)
            assert all(seconds >= 0 for seconds in each.parts.values())
            assert sum(each.share(part) for part in PARTS) == pytest.approx(1)
            assert all(each.parts[part] > 0 for part in ("attention", "projections", "MLP", "norms", "logits"))
        assert dense.parts["finding the blocks"] == 0
        assert sparse.parts["finding the blocks"] > 0
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        assert parts_table(found).count("%") == 2 * len(PARTS)

    def test_which_module_counts_as_what(self) -> None:
        model, ids = tiny_model("qwen3", implementation="sdpa"), tokens(1, 64)
        with watched(model) as clock, torch.no_grad():
            model(input_ids=ids)
            calls: dict[str, int] = {}
            for name, *_ in clock._spans:
                calls[name] = calls.get(name, 0) + 1
        assert calls == {"attention": 3, "projections": 12, "MLP": 3, "norms": 2 * 3 + 2 * 3 + 1, "logits": 1}

    def test_an_implementation_of_somebody_elses_comes_back(self) -> None:
        def own(*args: Any, **kwargs: Any) -> Any:
            return stock(*args, **kwargs)

        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own
        try:
            with watched(tiny_model("llama", implementation="sdpa")):
                assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not own
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
        finally:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]

    def test_eager_attention_is_refused(self) -> None:
        with pytest.raises(NotImplementedError, match="attn_implementation='sdpa'"), watched(tiny_model("llama")):
            pass


def test_the_table_of_whole_models_is_that_of_its_file() -> None:
    """The page has the rows that `first_token_cpu.json` gives, or says where they go while there is no such file."""
    docs = Path(__file__).resolve().parents[1] / "docs"
    section = (docs / "performance.md").read_text().partition("\n## The whole model\n")[2].partition("\n## ")[0]
    file = docs / "results" / "first_token_cpu.json"
    if not file.exists():
        assert "<!-- the table that this printed, of results/first_token_cpu.json -->" in section
        return
    cells = [FirstTokenCell(**each) for each in json.loads(file.read_text())["first_token"]]
    assert cells
    made = [re.sub(r" +", " ", line) for line in first_token_table(cells, markdown=True).splitlines()]
    stands = [re.sub(r" +", " ", line) for line in section.splitlines() if line.startswith("|")]
    assert [line for line in made if line.startswith("|") and "--" not in line] == [
        line for line in stands if "--" not in line
    ]
