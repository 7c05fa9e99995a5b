"""The commands that make, judge and import profiles, as a user types them, on the model inside at small lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from sparseprefill import patch_model
from sparseprefill.cli import main
from sparseprefill.evals.loading import load_model
from sparseprefill.patterns import AShape, BlockSparse, Dense, VerticalSlash, load_patterns
from sparseprefill.profile_scores import read_scores, scores_folder

FEW = ("--candidate", "a_shape:window=0.2", "--candidate", "block_sparse:keep=0.4,sink=0,local=64")


def invoke(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["profile", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_a_profile_is_made_shown_and_used(tmp_path: Path) -> None:
    out, page = tmp_path / "p.json", tmp_path / "p.html"
    settings = ("--prompts", "builtin:needle+prose", "--lengths", "1k", "--samples", 2, "--held-out", 1, *FEW)
    said = invoke(*settings, "--budget", 0.5, "--out", out, "--html", page).output
    assert "3 prompts of 3072 tokens in all, 4 layers with 32 heads: 13056 tiles of 64 x 64 to compute" in said
    assert "uncalibrated" in said
    assert "computed 13056 tiles in" in said
    assert f"wrote {out}, {out}.scores, {page}" in said
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    found = load_patterns(out)
    assert {type(pattern) for heads in found.layers for pattern in heads} <= {AShape, BlockSparse, Dense}
    assert found.made["source"] == "built-in prompts (needle, prose), seed 1"
    assert found.made["seed"] == 1
    assert found.weights is not None
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    shown = invoke("show", out).output
    assert shown in said
    # another target needs no model; what stands there is not overwritten unasked
    assert "holds scores of an earlier run" in invoke(*settings, "--out", out, code=1).output
    assert "computed 0 tiles" in invoke(*settings, "--target-mass", 0.5, "--out", out, "--resume").output
    assert load_patterns(out).made["target"] == {"kind": "mass", "mass": 0.5}
    assert "13056 tiles of 64 x 64 to compute, 0 of" in invoke(*settings, "--out", out, "--again").output
    model, _ = load_model()
    with torch.no_grad(), patch_model(model, profile=out, strict=True, min_length=0) as patch:
        model(input_ids=torch.arange(1000)[None])
    assert patch.report().warnings == {}
    assert patch.report().sparse_calls == 4


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("The rain fell on the hills, and nobody came. " * 200, encoding="utf-8")
    out = tmp_path / "p.json"
    settings = ("--prompts", tmp_path / "novel.txt", "--lengths", "300,200", "--samples", 1, "--held-out", 1, *FEW)
    invoke("run", *settings, "--out", out, "--quantile", 0.3, "--every", 2)
    made = load_patterns(out).made
    assert made["source"] == "text novel.txt"
    assert [each["tokens"] for each in made["prompts"]] == [300, 200, 300, 200]
    assert (made["quantile"], made["every"]) == (0.3, 2)
    assert len(read_scores(f"{out}.scores").prompts) == 4


@pytest.mark.slow
def test_minference_s_own_search(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    invoke(
        "--minference-search", "--prompts", "builtin:needle", "--lengths", "3k", "--samples", 1, "--held-out", 0,
        "--out", out,
    )  # fmt: skip
    found = load_patterns(out)
    assert found.made["target"] == {"kind": "minference"}
    assert {type(each) for heads in found.layers for each in heads} <= {AShape, VerticalSlash, BlockSparse}
    assert found.held_out == ()


@pytest.mark.slow
def test_a_profile_is_judged(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    invoke("--prompts", "builtin:needle", "--lengths", "2k", "--samples", 1, "--held-out", 0, *FEW, "--out", out)
    said = invoke(
        "validate", out, "--prompts", "builtin:needle", "--lengths", "2k", "--samples", 2, "--json", tmp_path / "c.json"
    ).output
    assert "lost mass over that of" in said
    data = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert data["prompts"][0]["name"] == "needle/2048/0"
    assert data["source"] == "built-in prompts (needle), seed 2"
    assert 0 < data["low"] <= data["ratio"] <= data["high"]
    again = ("validate", out, "--prompts", "builtin:needle", "--lengths", "2k", "--samples", 2, "--seed", 1)
    assert "was tuned on the prompt needle/2048/0" in invoke(*again, code=1).output
    assert "there is no profile at" in invoke("validate", tmp_path / "missing.json", code=1).output
    assert "at least two blocks" in invoke(
        "validate", "inside", "--prompts", "builtin:prose", "--lengths", "100", "--samples", 2, code=1
    ).output  # fmt: skip


def test_what_cannot_be_made_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 400)
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": ', encoding="utf-8")
    short = ("--lengths", "200", "--samples", 1, "--held-out", 0, "--out", tmp_path / "p.json")
    for arguments, message in (
        (("--prompts", tmp_path / "empty.txt", *short), "has 0 tokens, and 200 are needed"),
        (("--prompts", tmp_path / "latin.txt", *short), "is not UTF-8 text"),
        (("--prompts", tmp_path / "torn.jsonl", *short), "line 2"),
        (("--prompts", tmp_path / "missing.txt", *short), "there is no text at"),
        (("--prompts", tmp_path, *short), "is a folder"),
        (("--prompts", "builtin:poem", *short), "no built-in kind 'poem'"),
        (("--prompts", "builtin:prose", "--lengths", "100", "--held-out", 0, *short[-2:]), "at least two blocks of 64"),
        (("--prompts", "builtin:prose", "--lengths", "64k", "--samples", 1, *short[-2:]), "window is 32768"),
        (("--out", tmp_path / "nowhere" / "p.json"), "there is no folder"),
        (("--out", tmp_path / "p.json", "--html", tmp_path), "is a directory"),
        (("--budget", 0.2, "--target-mass", 0.9, "--out", tmp_path / "p.json"), "different targets: choose one"),
        (("--budget", 2, "--out", tmp_path / "p.json"), "the budget must be in (0, 1]"),
        (("--target-mass", 0, "--out", tmp_path / "p.json"), "the target mass must be in (0, 1]"),
        (("--resume", "--again", "--out", tmp_path / "p.json"), "choose one"),
        (("--candidate", "star", "--prompts", "builtin:prose", *short), "unknown method 'star'"),
        (("--minference-search", "--prompts", "builtin:prose", *short), "2500"),
        (("--quantile", 2, "--prompts", "builtin:prose", *short), "quantile must be in [0, 1)"),
        (("--html", tmp_path / "p.json", *short), "is named twice in this command"),
        (("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "p.jsonl"), "is named twice in this command"),
        (("nobody/nothing", "--out", tmp_path / "p.json"), "cannot be loaded"),
    ):
        output = invoke(*arguments, code=2 if message == "is a directory" else 1).output
        assert message in output, output
    assert not (tmp_path / "p.json").exists()


def test_scores_are_removed_only_when_work_can_begin(tmp_path: Path) -> None:
    """A mistake beside --again does not cost what an earlier run has left."""
    out = tmp_path / "p.json"
    settings = ("--lengths", "200", "--samples", 1, "--held-out", 0, "--out", out)
    invoke("--prompts", "builtin:prose", *settings, *FEW)
    before = {file.name: file.read_bytes() for file in scores_folder(out).iterdir()}
    for arguments in (
        ("--prompts", tmp_path / "missing.txt"),
        ("--prompts", "builtin:prose", "--candidate", "star"),
        ("--prompts", "builtin:prose", "--block", 128),
        ("--prompts", "builtin:prose", "--quantile", 1),
    ):
        invoke(*arguments, *settings, "--again", code=1)
        assert {file.name: file.read_bytes() for file in scores_folder(out).iterdir()} == before
    assert "0 of them done before" in invoke("--prompts", "builtin:prose", *settings, *FEW[:2], "--again").output
    assert [each.label for each in read_scores(scores_folder(out)).candidates][1:] == ["a_shape:sink=128,window=0.2"]


def test_who_stops_a_run_is_told_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p.json"
    settings = ("--prompts", "builtin:prose", "--lengths", "200", "--samples", 1, "--held-out", 0, *FEW, "--out", out)

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr("sparseprefill.cli_profile_run._Progress.advance", stops)
        assert f"{scores_folder(out)} keeps what was computed: --resume goes on" in invoke(*settings, code=1).output
    assert not out.exists()
    assert ", 0 of them done before" not in invoke(*settings, "--resume").output


def test_no_command_replaces_what_it_reads(tmp_path: Path) -> None:
    out, config = tmp_path / "p.json", tmp_path / "config.json"
    config.write_text(json.dumps([{"0": entry("stream_llm", 64, 128)}]), encoding="utf-8")
    twice = "is named twice in this command"
    assert twice in invoke("import-minference", config, "--out", config, code=1).output
    assert json.loads(config.read_text(encoding="utf-8"))[0]["0"][0] == "stream_llm"
    invoke("import-minference", config, "--out", out)
    before = out.read_bytes()
    assert twice in invoke("validate", out, "--json", out, code=1).output
    assert out.read_bytes() == before
    scores_folder(out).mkdir()
    assert "the scores of another profile" in invoke("import-minference", config, "--out", out, code=1).output


def test_a_budget_that_nothing_meets_keeps_the_scores(tmp_path: Path) -> None:
    """What was computed is not lost by a target that cannot be reached."""
    settings = ("--prompts", "builtin:prose", "--lengths", "600", "--samples", 1, "--held-out", 0, *FEW)
    out = tmp_path / "p.json"
    output = invoke(*settings, "--budget", 0.05, "--out", out, code=1).output
    assert "a budget of 0.05 is below" in output
    assert not out.exists()
    assert "computed 0 tiles" in invoke(*settings, "--budget", 0.6, "--out", out, "--resume").output


def entry(kind: str, first: int, second: int) -> list[object]:
    return [kind, first, second, 1.0]


def test_minference_s_configuration_becomes_a_profile(tmp_path: Path) -> None:
    layer: dict[str, object] = {str(head): entry("vertical_and_slash", 1000, 6096) for head in range(8)}
    layer["1"], layer["2"] = entry("stream_llm", 100, 800), entry("block_sparse", 1, 1)
    layer["3"] = entry("spiral", 1, 1)
    del layer["7"]
    (tmp_path / "config.json").write_text(json.dumps([layer] * 4), encoding="utf-8")
    out = tmp_path / "p.json"
    said = invoke("import-minference", tmp_path / "config.json", "--model", "inside", "--out", out).output
    assert "mapped 24 of 32 heads" in said
    assert "spiral" in said
    found = load_patterns(out)
    assert found.layers[2] == (
        VerticalSlash(1000, 6096), AShape(100, 800), BlockSparse(6400, 0, 0), Dense(),
        *(VerticalSlash(1000, 6096),) * 3, Dense(),
    )  # fmt: skip
    model, _ = load_model()
    with patch_model(model, profile=out) as patch:
        assert patch.report().warnings == {}
    with pytest.raises(ValueError, match="weights"):  # it names none
        patch_model(model, profile=out, strict=True)
    (tmp_path / "config.json").write_text(json.dumps([layer] * 3), encoding="utf-8")
    assert "3 layers" in invoke(
        "import-minference", tmp_path / "config.json", "--model", "inside", "--out", out, code=1
    ).output  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps([{"0": entry("spiral", 1, 1)}]), encoding="utf-8")
    assert "nothing in" in invoke("import-minference", tmp_path / "config.json", "--out", out, code=1).output
    (tmp_path / "config.json").write_text("[{", encoding="utf-8")
    assert "is not a JSON" in invoke("import-minference", tmp_path / "config.json", "--out", out, code=1).output


def test_the_group_says_what_it_has() -> None:
    said = invoke("--help").output
    for name in ("run", "validate", "import-minference", "show", "diff", "merge"):
        assert f"  {name}" in said
    assert "Give each head of MODEL the pattern" in invoke("run", "--help").output
