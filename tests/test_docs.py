"""What the pages say is held to the code: links, commands, options, examples, figures, reasons, limits."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch

import sparseprefill
from sparseprefill import calibration, cli
from sparseprefill.evals.bench import RIVALS, KernelCell, first_token_times, kernel_table
from sparseprefill.evals.compare import summarise
from sparseprefill.evals.context_levels import LevelCell, level_table
from sparseprefill.evals.context_questions import QuestionCell, question_table
from sparseprefill.evals.context_recall import HeadDistance, RecallCell, distance_table, scan_table
from sparseprefill.evals.growth import GrowthCell, growth_table
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.never_slower import Slowdown, never_slower_table
from sparseprefill.evals.overhead import OverheadCell, overhead_table
from sparseprefill.evals.ranking import standings
from sparseprefill.evals.results import EvalResult
from sparseprefill.evals.selector_result import DENSITIES, WORKS, SelectorResult
from sparseprefill.huggingface import patch_model
from sparseprefill.huggingface_layers import Settings
from sparseprefill.patterns.context_methods import CONTEXT_METHODS, ContextRow, context_method
from sparseprefill.patterns.expected_density import expected_density
from sparseprefill.patterns.expected_overhead import expected_overhead
from sparseprefill.patterns.methods import DEFAULT, METHODS, MethodRow
from sparseprefill.plan import plan
from sparseprefill.plan_check import PlanCheck, check_table
from sparseprefill.prefill import COST_MODELS, method_page, methods_table, resolve_method
from sparseprefill.reports import number

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("*.md")}
PAGES |= {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("docs/**/*.md")}
WHICH, WHY_NOT = PAGES["docs/which-method.md"], PAGES["docs/why-not-faster.md"]


def script(name: str) -> ModuleType:
    """A module from scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of the fenced blocks, indentation taken off."""
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE):
        yield found[2], re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command line that a page names, in a block or between backticks."""
    fenced = re.compile(r"^ *```.*?^ *```$", flags=re.DOTALL | re.MULTILINE)
    lines = [line for language, code in blocks(text) if language != "python" for line in code.split("\n")]
    lines += re.findall(r"^    (\S.*)$", fenced.sub("", text), flags=re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", fenced.sub("", text))]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    for line in joined.split("\n"):
        for part in re.split(r"&&|; done|; do ", line):
            words = re.sub(r"^(\w+=\S+ )+", "", part.strip()).split(" #")[0]
            if re.match(r"(sparseprefill|make|pytest|python) ", words):
                yield shlex.split(words)


def anchors(text: str) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            lost.append(link)
    assert not lost


def test_every_page_is_listed_in_the_readme() -> None:
    """Pages of methods are listed by `sparseprefill methods`, those of single results on the page of results."""
    listed = {"README.md", *(row["page"] for row in methods_table())}
    listed |= {f"docs/{link}" for link in re.findall(r"\]\((results/[^)]*\.md)\)", PAGES["docs/results.md"])}
    assert [name for name in PAGES if name not in listed and f"]({name})" not in PAGES["README.md"]] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_with_their_options(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for words in commands(PAGES[page]):
        program, *rest = words
        if program == "sparseprefill":
            check_click_command(rest)
        elif program == "make":
            unknown = [word for word in rest if "=" not in word and word not in targets]
            assert not unknown, f"make knows no {unknown}"
        elif program == "pytest":
            files = [word for word in rest if word.endswith(".py")]
            assert all((ROOT / name).is_file() for name in files), words
        elif rest[0].startswith("scripts/"):
            source = (ROOT / rest[0]).read_text(encoding="utf-8")
            options = [word for word in rest if word.startswith("--")]
            assert all(f'"{option}"' in source for option in options), words
        else:
            assert rest[0] in ("-c", "-I", "-m"), words


def check_click_command(words: list[str]) -> None:
    """Parse as click would, but for a trailing `...` or nothing at all, which name the command alone."""
    name, *rest = words
    command = cli.main.commands.get(name)
    assert command is not None, f"there is no command `sparseprefill {name}`"
    if isinstance(command, click.Group) and rest and rest[0] in command.commands:
        name, *rest = rest
        command = command.commands[name]
    if rest and rest != ["..."]:
        if rest[-1].startswith("--") and not is_flag(command, rest[-1]):
            rest.append("1")  # an option named without its value
        rest = [str(ROOT / "README.md") if word in ("FILE", "CONFIG") else word for word in rest]
        values = command.make_context(name, rest).params
        chosen = values.get("chosen", ())
        for method in (chosen,) if isinstance(chosen, str) else chosen or ():
            spec = MethodSpec.parse(method)
            own = {name: value for name, value in spec.options.items() if name not in Settings.__dataclass_fields__}
            if spec.name in CONTEXT_METHODS:
                context_method(spec.name, spec.options)
                continue
            resolve_method(spec.name, **(own or MethodSpec.at_density(spec.name, 0.2).options))


def is_flag(command: click.Command, option: str) -> bool:
    return any(
        option in [*each.opts, *each.secondary_opts] and getattr(each, "is_flag", False) for each in command.params
    )


def test_the_check_finds_wrong_commands() -> None:
    for wrong in (
        "no_such",
        "bench first-token --no-such",
        "needle --no-such",
        "needle --method no_such",
        "bench --lengths long",
    ):
        with pytest.raises((AssertionError, click.UsageError, ValueError)):
            check_click_command(wrong.split())
    found = sorted(commands("`sparseprefill needle\n--seed 2`\n\n    make test  # all\n"))
    assert found == [["make", "test"], ["sparseprefill", "needle", "--seed", "2"]]


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_name_what_exists(page: str) -> None:
    """They parse; what they import is there; what they pass to our functions is known."""
    for language, code in blocks(PAGES[page]):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparseprefill"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Call):
                check_call(node)


ALL_METHODS: dict[str, MethodRow | ContextRow] = {**METHODS, **CONTEXT_METHODS}


def check_call(call: ast.Call) -> None:
    name = ast.unparse(call.func).removeprefix("sparseprefill.")
    if name == "prepare_context":
        words = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        method = words.pop("method", None) or ast.literal_eval(call.args[2])
        context_method(method, {key: value for key, value in words.items() if key not in ("prefill", "store", "chunk")})
    if name not in ("explain", "patch_model", "register"):
        return
    own = set(inspect.signature(patch_model).parameters) | set(Settings.__dataclass_fields__) | {"previous", "device"}
    given = {str(word.arg): word.value for word in call.keywords}
    place = 0 if name == "register" else 1
    method = given.get("method") or (call.args[place] if len(call.args) > place else None)
    if not isinstance(method, ast.Constant) or "context" in given:
        return
    options = {key: ast.literal_eval(value) for key, value in given.items() if key not in own}
    if "profile" in options:  # a file that the reader has
        assert set(options) <= set(METHODS[method.value].options)
    else:
        resolve_method(method.value, **options)


@pytest.mark.parametrize("row", methods_table(), ids=lambda row: str(row["method"]))
def test_every_method_has_a_page(row: dict[str, str]) -> None:
    """With what the table says of it, each of its options, and no others."""
    text, method = PAGES[row["page"]], ALL_METHODS[row["method"]]
    facts = re.findall(r"^\| ([a-z ]+) \| (yes|no) \| (\w+) \| (\d+) x (\d+) \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(facts) == 1
    kind, ahead, chunked, block_q, block_k, paper = facts[0]
    assert (kind, ahead, chunked) == (row["kind"], row["looks ahead"], row["chunked prefill"])
    assert (int(block_q), int(block_k)) == method.native
    number = row["paper"].removeprefix("arXiv:")
    assert paper == ("none" if row["paper"] == "-" else f"[{number}](https://arxiv.org/abs/{number})")
    section = text.partition("\n## Options\n")[2].partition("\n## ")[0]
    named = [
        name for cell in re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    ]
    assert sorted(named) == sorted(method.options)


def test_the_diff_in_contributing_is_what_stands_there() -> None:
    """Every line that it adds is in the file it names, in that order."""
    (diff,) = [code for language, code in blocks(PAGES["CONTRIBUTING.md"]) if language == "diff"]
    added: dict[str, list[str]] = {}
    for line in diff.splitlines():
        if line.startswith("+++ b/"):
            lines = added.setdefault(line.removeprefix("+++ b/"), [])
        elif line.startswith("+"):
            lines.append(line[1:])
    assert list(added) == ["patterns/methods.py", "tests/method_cases.py"]
    for name, wanted in added.items():
        there = iter((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert all(line in there for line in wanted), name


def test_the_table_in_the_readme_is_that_of_the_methods() -> None:
    rows = re.findall(
        r"^\| \[`(\w+)`\]\((.*?)\) \| ([a-z ]+) \| .* \| (yes|no) \| .*\|$", PAGES["README.md"], re.MULTILINE
    )
    assert rows
    for name, link, kind, ahead in rows:
        assert (link, kind, ahead == "yes") == (
            method_page(name),
            ALL_METHODS[name].kind,
            ALL_METHODS[name].looks_ahead,
        ), name


def test_figures_on_which_method_are_those_of_the_results() -> None:
    result = EvalResult.load(ROOT / "docs/results/needle_cpu.json")
    labels = {method.name: method.label for method in result.methods}
    costs = {(each.method, each.group.get("length")): each for each in summarise(result, resamples=10).costs}
    section = WHICH.partition("## What was measured")[2]
    rows = re.findall(r"^\| `(\w+)`[^|]*((?:\| [\d.]+[%x]? )+)\|$", section, flags=re.MULTILINE)[: len(labels)]
    assert [name for name, _ in rows] == list(labels)
    for name, figures in rows:
        expected = []
        for length in (4096, 8192, 16384, 32768):
            found = [a.values["found"] for i, a in result.answers(labels[name]) if i.group["length"] == length]
            expected.append(f"{100 * sum(found) / len(found):.0f}%")
        expected += [f"{costs[labels[name], n].speed_up:.2f}x" for n in (16384, 32768)]
        expected.append(f"{costs[labels[name], 16384].kept_mass or 1:.3f}")
        assert figures.strip("| ").split(" | ") == expected, name


def rows_of(section: str) -> Iterator[list[str]]:
    """Cells of the rows of tables that begin with a name in backticks, the name without them."""
    for line in re.findall(r"^\| `[^`]+` \|.*\|$", section, flags=re.MULTILINE):
        name, *cells = line.strip("| ").split(" | ")
        yield [name.strip("`"), *cells]


def test_figures_of_the_comparison_are_those_of_the_results() -> None:
    result = SelectorResult.load(ROOT / "docs/results/compare_cpu.json")
    asked = [EvalResult.load(ROOT / f"docs/results/needle_{name}_cpu.json") for name in ("methods", "field")]
    labels = {method.name: (needles, method.label) for needles in asked for method in needles.methods}
    section = PAGES["docs/compare.md"].partition("\n## On the model inside\n")[2]
    before, _, after = section.partition("<!-- whole layers -->")
    whole, _, after = after.partition("\nThe same by kind")
    layers = SelectorResult.load(ROOT / "docs/results/compare_layer_cpu.json")
    for name, *cells in rows_of(whole):
        assert cells == [number(layers.curve("model, 16384 tokens", name).at(each)) for each in DENSITIES], name
    section, _, default = (before + after).partition("\n## The default method\n")
    section, _, timed = section.partition("\n### And the time?\n")
    models = [f"model, {length} tokens" for length in (8192, 16384)]
    common, native, planted = [], [], []
    for name, *cells in rows_of(section):
        (native if " x " in cells[0] else planted if len(cells) == 7 else common).append((name, cells))
    assert [name for name, _ in common] == [name for name, _ in planted]
    swept = {each.family for each in result.curves if each.repeats is None}
    assert {name for name, _ in common} == swept - {"dense", "skip_softmax"}
    assert len(native) == 7
    for name, cells in common:
        expected = [number(result.curve(g, name).at(d)) for g in models for d in DENSITIES]
        for length in (8192, 16384):
            needles, label = labels[name]
            found = [a.values["found"] for i, a in needles.answers(label) if i.group["length"] == length]
            expected.append(f"{100 * sum(found) / len(found):.0f}%")
        assert cells == expected, name
    for name, cells in native:
        block_q, block_k = map(int, cells[0].split(" x "))
        curve = result.curve(models[1], name, (block_q, block_k))
        assert cells[1:] == [number(curve.at(density)) for density in DENSITIES], name
    kinds = ("diffuse", "local", "slash", "vertical", "needle", "sink", "moving")
    for name, cells in planted:
        assert cells == [number(result.curve(f"planted: {kind}", name).at(0.1)) for kind in kinds], name
    times = SelectorResult.load(ROOT / "docs/results/compare_times_cpu.json").times
    for name, *cells in rows_of(timed.partition("\n### ")[0]):
        own = min((each for each in times if each.family == name), key=lambda each: abs(each.density - 0.2))
        assert cells == [number(each) for each in (own.density, own.find, own.attend, own.total)], name
    everywhere = [curve for group in result.groups for curve in result.on(group, result.tile)]
    ranking = [each for each in standings(everywhere, WORKS, axis="work") if not each.control]
    assert list(rows_of(default)) == [
        [each.family, f"{each.worst}", f"{each.mean_rank:.2f}", f"{each.unreached} of {each.compared}"]
        for each in ranking
    ]
    assert ranking[0].family == DEFAULT, "the default is what the comparison puts first"


def test_next_tokens_are_those_of_the_results() -> None:
    result = EvalResult.load(ROOT / "docs/results/fidelity_field_cpu.json")
    costs = {each.method: each for each in summarise(result, resamples=10).costs if not each.group}
    section = PAGES["docs/compare.md"].partition("<!-- fidelity -->")[2].partition("\n## ")[0]
    rows = list(rows_of(section))
    assert [name for name, *_ in rows] == [each.label for each in result.methods if each.label != "dense"]
    for name, *cells in rows:
        answers = [answer for _, answer in result.answers(name)]
        sizes = [stop - start for start, stop in (each.details["positions"] for each in answers)]

        def mean(metric: str, own: list[Any] = answers, counts: list[int] = sizes) -> float:
            return sum(each.values[metric] * count for each, count in zip(own, counts, strict=True)) / sum(counts)

        assert cells == [f"{costs[name].density:.3f}", f"{mean('kl'):.4f}", f"{100 * mean('agreement'):.1f}%"], name


def test_what_wrappers_gave_is_what_was_measured() -> None:
    page = PAGES["docs/wrappers.md"]
    needles = EvalResult.load(ROOT / "docs/results/needle_wrappers_cpu.json")
    costs = {(each.method, each.group.get("length")): each for each in summarise(needles, resamples=10).costs}
    rows = list(rows_of(page.partition("<!-- needles -->")[2].partition("<!-- errors -->")[0]))
    assert [name for name, *_ in rows] == [each.label for each in needles.methods if each.label != "dense"]
    for name, *cells in rows:
        found = [answer.values["found"] for _, answer in needles.answers(name)]
        cost = costs[name, 16384]
        assert cells == [
            f"{100 * sum(found) / len(found):.0f}%", f"{cost.density:.3f}", f"{cost.kept_mass:.3f}"
        ], name  # fmt: skip
    timed = SelectorResult.load(ROOT / "docs/results/compare_wrappers_cpu.json")
    rows = list(rows_of(page.partition("<!-- errors -->")[2]))
    assert [name for name, *_ in rows] == list(dict.fromkeys(each.family for each in timed.curves))
    for name, *cells in rows:
        curve = timed.curve("model, 8192 tokens", name)
        own = min((each for each in timed.times if each.family == name), key=lambda each: abs(each.density - 0.2))
        assert cells == [
            number(curve.at(0.2, "error")), number(curve.at(0.2)), f"{curve.estimator[0]:.4f}",
            number(own.density), number(own.find), number(own.attend),
        ], name  # fmt: skip


def test_columns_against_blocks_is_what_was_measured() -> None:
    result = SelectorResult.load(ROOT / "docs/results/compare_columns_cpu.json")
    rows = list(rows_of(PAGES["docs/methods/vote_columns.md"].partition("## Single columns or blocks")[2]))
    assert [name for name, *_ in rows] == ["snapkv", "snapkv:unit=token", "zipvl", "zipvl:unit=token"]
    for name, *cells in rows:
        curve = result.curve("model, 16384 tokens", name)
        assert cells == [number(curve.at(density)) for density in (0.1, 0.2, 0.3)], name


def test_when_clusters_pay_is_what_was_measured() -> None:
    result = SelectorResult.load(ROOT / "docs/results/compare_clusters_cpu.json")
    group = "model, 16384 tokens"
    section = PAGES["docs/methods/clusters.md"].partition("## When it pays")[2].partition("\n## ")[0]
    rows = list(rows_of(section))
    assert [name for name, *_ in rows] == ["clusters", "block_sparse", "pbs", "stem"]
    for name, *cells in rows:
        curve = result.curve(group, name)
        own = min(
            (each for each in result.times if (each.group, each.family) == (group, name)),
            key=lambda each: abs(each.density - 0.2),
        )
        assert cells[:3] == [number(curve.at(density)) for density in (0.1, 0.2, 0.3)], name
        assert cells[3:] == [number(each) for each in (own.density, own.find, own.attend, own.total)], name


def test_figures_of_finding_the_blocks_are_those_of_the_results() -> None:
    cells = json.loads((ROOT / "docs/results/overhead_estimators_cpu.json").read_text(encoding="utf-8"))["cells"]
    shares = {(each["method"], each["dtype"]): f"{each['estimate']:.3f}" for each in cells}
    section = PAGES["docs/performance.md"].partition("### The other methods")[2].partition("\n### ")[0]
    rows = list(rows_of(section))
    assert [row[0] for row in rows] == list(dict.fromkeys(each["method"] for each in cells))
    for name, low, full, _ in rows:
        assert (low, full) == (shares[name, "bfloat16"], shares[name, "float32"]), name


def rows_to_be(name: str, written: dict[str, Any]) -> list[list[str]]:
    """Cells of the table that a page shows of a file in docs/results."""
    if name.startswith("context_questions"):
        questions = [QuestionCell(**cell) for cell in written["cells"]]
        printed = cells_of(question_table(questions, written["again"], markdown=True))
        if name == "context_questions_cpu.json":
            return printed
        kept = {"method", "wished", "attended", "right", "lost", "gained", "loss in points", "95 % interval"}
        return [[cell for cell, title in zip(row, printed[0], strict=True) if title in kept] for row in printed]
    if name == "context_recall_cpu.json":
        return cells_of(scan_table([RecallCell(**cell) for cell in written["cells"]], markdown=True))
    if name == "context_recall_cpu.json, distances":
        return cells_of(distance_table([HeadDistance(**each) for each in written["distances"]], markdown=True))
    if name == "plan_cpu.json":
        return cells_of(check_table([PlanCheck(**each) for each in written["checks"]], markdown=True))
    if name == "context_levels_cpu.json":
        return cells_of(level_table([LevelCell(**cell) for cell in written["cells"]], markdown=True))
    if name == "never_slower_cpu.json":
        kept = [{k: v for k, v in cell.items() if k not in ("allowed", "passes")} for cell in written["cells"]]
        return cells_of(never_slower_table([Slowdown(**cell) for cell in kept], markdown=True))
    if name.startswith("growth"):
        return cells_of(growth_table([GrowthCell(**cell) for cell in written["cells"]], markdown=True).split("\n\n")[1])
    if name.startswith("bench_cpu"):
        against = RIVALS if any(cell["flex"] is not None for cell in written["kernel"]) else ("dense",)
        cells = [KernelCell(**cell) for cell in written["kernel"]]
        return cells_of(kernel_table(cells, against=against, markdown=True))
    printed = cells_of(overhead_table([OverheadCell(**cell) for cell in written["cells"]], markdown=True))
    columns = {"method", "dtype", "estimate / dense", "products / dense", "estimate / products", "density"}
    return [[cell for cell, title in zip(row, printed[0], strict=True) if title in columns] for row in printed]


def test_predictions_on_the_page_are_what_a_plan_says() -> None:
    """The shorter length, of the methods that are quickly counted."""
    section = PAGES["docs/plan.md"].partition("## A prediction")[2]
    shown = {tuple(cells[:3]): cells for cells in cells_of(section[section.index("| model") :])[1:]}
    methods = [
        ("a_shape:window=4096", "a_shape", {"window": 4096}),
        ("block_sparse:keep=0.1", "block_sparse", {"keep": 0.1}),
    ]
    for name in ("Llama-3.1-8B", "Qwen3-8B"):
        for found in plan(str(ROOT / "tests/data/configs" / name.lower()), (32768,), methods, device="H200").plans:
            (own,) = found.layers
            cells = shown[name, "32768", found.method]
            assert cells[3:] == [
                number(own.tiles.share()), number(own.bound, 2), number(own.speedup, 2), number(found.attention_share),
                number(found.bound, 2), number(found.dense_seconds, 3), number(found.memory["cache"] / 2**30, 2),
            ]  # fmt: skip


def cells_of(table: str) -> list[list[str]]:
    """Of the first table of a text, the rule below its head left out."""
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), table.split("\n")))
    return [[cell.strip() for cell in line.strip("|").split("|")] for n, line in enumerate(lines) if n != 1]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("bench_cpu.json", "docs/performance.md"),
        ("bench_cpu_avx2.json", "docs/performance.md"),
        ("bench_cpu_32k.json", "docs/performance.md"),
        ("never_slower_cpu.json", "docs/performance.md"),
        ("growth_cpu.json", "docs/performance.md"),
        ("growth_native_cpu.json", "docs/performance.md"),
        ("overhead_all_cpu.json", "docs/performance.md"),
        ("context_questions_cpu.json", "docs/context.md"),
        ("context_questions_again_cpu.json", "docs/context.md"),
        ("context_recall_cpu.json", "docs/context.md"),
        ("context_recall_cpu.json, distances", "docs/context.md"),
        ("context_levels_cpu.json", "docs/context.md"),
        ("plan_cpu.json", "docs/plan.md"),
    ],
)
def test_tables_of_results_are_those_of_the_results(name: str, shown: str) -> None:
    """The page has a place for it: empty as long as nothing was measured, then what the command prints."""
    page, path = PAGES[shown], ROOT / "docs/results" / name.partition(",")[0]
    place = re.search(rf"<!-- {re.escape(name)}(: .*?)? -->\n*", page)
    assert place is not None
    found = cells_of(page[place.end() :])
    if path.exists():
        expected = rows_to_be(name, json.loads(path.read_text(encoding="utf-8")))
        assert found == expected, "\n".join("| " + " | ".join(row) + " |" for row in expected)
    else:
        assert not found, f"figures of {name}, which is not there"


def test_the_sweep_that_is_shown_passes_and_ran_sparsely() -> None:
    path = ROOT / "docs/results/never_slower_cpu.json"
    if not path.exists():
        pytest.skip("not measured yet")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert all(cell["passes"] for cell in written["cells"])
    assert all(each["runs"] is not None and each["runs"] <= 8192 for each in written["crossings"])


def test_the_native_kernel_is_faster_than_dense_as_the_page_says() -> None:
    cells = json.loads((ROOT / "docs/results/bench_cpu.json").read_text(encoding="utf-8"))["kernel"]
    assert {cell["length"] for cell in cells} == {16384}
    for cell in (KernelCell(**each) for each in cells):
        assert cell.density > 0.71 or cell.ours["native"] < cell.dense, cell


def reasons_in_the_source() -> set[str]:
    """What a call can be counted under in `previous_calls`, numbers and names in it as N.

    Found where they are made: the returns of the functions that decide, and whatever becomes a mask's `opaque`.
    """
    found: set[str] = set()
    for name in ("huggingface.py", "huggingface_layers.py", "huggingface_masks.py"):
        for node in ast.walk(ast.parse((ROOT / "sparseprefill" / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name in ("_why_previous", "why_dense"):
                returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
                found |= {text for value in returned for text in texts(value)}
            elif isinstance(node, ast.FunctionDef) and node.name == "_understand":
                for value in (each.value for each in ast.walk(node) if isinstance(each, ast.Return)):
                    parts = value.elts if isinstance(value, ast.Tuple) else getattr(value, "args", [])
                    found |= {text for part in parts for text in texts(part)}
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "note_previous":
                found |= {text for value in node.args for text in texts(value)}
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "opaque":
                found |= set(texts(node.value))
    return found


def texts(value: ast.expr) -> Iterator[str]:
    """The strings an expression can be; what is filled into one becomes N."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "N" for part in value.values)
    elif isinstance(value, ast.IfExp):
        yield from (*texts(value.body), *texts(value.orelse))
    elif isinstance(value, ast.BoolOp):
        yield from (text for part in value.values for text in texts(part))


def test_every_reason_of_a_report_is_explained() -> None:
    explained = set(re.findall(r"^\| `([^`]+)` \| [^|]+ \| [^|]+ \|$", WHY_NOT, flags=re.MULTILINE))
    explained = {re.sub(r"\bNAME\b", "N", reason) for reason in explained}
    in_source = reasons_in_the_source()
    assert {"below break-even", "fewer keys than min_length=N", "it is not causal"} <= in_source
    assert in_source - explained == set(), "docs/why-not-faster.md does not explain these"
    assert explained - in_source == set(), "docs/why-not-faster.md explains what no report says"


def test_every_reason_for_no_calibration_is_explained() -> None:
    section = WHY_NOT.partition("| reason | what to do |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([^`]+)`[^|]* \| [^|]+ \|$", section, flags=re.MULTILINE)
    explained = {re.sub(r"\b[A-Z]+\b", "N", reason) for reason in rows}
    assert len(explained) == len(rows)
    aspects = {"no entry " + re.sub(r"\{\w+\}", "N", words) for _, words in calibration._ASPECTS}
    assert aspects <= explained
    said = set()
    for name in ("calibration.py", "huggingface_layers.py"):
        for node in ast.walk(ast.parse((ROOT / "sparseprefill" / name).read_text(encoding="utf-8"))):
            said |= set(texts(node)) if isinstance(node, ast.expr) else set()
    for reason in explained - aspects:
        assert any(text.startswith(reason) for text in said), reason


def test_break_even_table_follows_from_the_cost_model() -> None:
    section = WHY_NOT.partition("| budget | CPU | CPU, native | GPU |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.split("\n")[2:]]
    assert len(rows) >= 8
    for budget, *told in rows:
        share = re.fullmatch(r"a share of ([\d.]+)", budget)
        name = re.match(r"`(\w+)`", budget)
        if share:
            pattern = resolve_method("block_sparse", keep=float(share[1]))
        else:
            assert name is not None, budget
            pattern = resolve_method(name[1], **({"budget": "paper"} if "paper" in budget else {}))
        assert [shortest_sparse(*where, pattern) for where in COST_MODELS] == [told[1], told[0], told[2]], budget
    stated = re.search(r"From the stated model \(([^)]*)\)", WHY_NOT)
    assert stated is not None
    assert re.findall(r"([\d.]+) x", stated[1]) == [
        f"{COST_MODELS[where].tile_factor:g}" for where in (("cpu", "cpu"), ("cpu", "native"), ("cuda", "triton"))
    ]
    begins = re.search(r"`vertical_slash` keeps four, and begins\s+at (\d+)", WHY_NOT)
    assert begins is not None
    assert begins[1] == shortest_sparse("cpu", "cpu", resolve_method("vertical_slash", density=0.2))


def shortest_sparse(device: str, kernel: str, pattern: Any) -> str:
    """The first multiple of 64 tokens at which one prefill is expected to be cheaper sparsely, at head_dim 128."""
    model, place = COST_MODELS[device, kernel], torch.device(device)
    found = expected_overhead(pattern, place, 128, 64, 64)
    lengths = range(64, 1 << 16, 64)
    cheap = (n for n in lengths if model.sparse_is_cheaper(n, n, expected_density(pattern, n), found))
    return str(next(cheap, "never"))


def test_bench_runs_sparsely_as_the_page_says() -> None:
    assert "min_length=0, observe=False" in inspect.getsource(first_token_times)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """HTML of each page of the reference by module."""
    out = tmp_path_factory.mktemp("reference")
    made = [path for path in script("build_reference").build(out) if path.suffix == ".html"]
    return {
        path.relative_to(out).with_suffix("").as_posix().replace("/", "."): path.read_text(encoding="utf-8")
        for path in made
    }


class TestReference:
    """Built once, for real, and read back."""

    def test_every_public_name_is_there_and_documented(self, pages: dict[str, str]) -> None:
        reference = script("build_reference")
        loaded = reference.load_pages()
        for name, page in loaded.items():
            public = [member for member in page.members.values() if not member.name.startswith("_")]
            assert public, name
            for member in public:
                assert f'id="{member.name}"' in pages[name], f"{name}.{member.name} is not on its page"
                text = member.docstring.strip()
                assert text, f"{name}.{member.name} has no docstring"
                assert not text.startswith(f"{member.name}("), f"{name}.{member.name} has only what dataclass writes"
        for package in ("sparseprefill", *(f"sparseprefill.{room}" for room in reference.ROOMS)):
            exported = loaded[package].members
            assert set(exported) == set(importlib.import_module(package).__all__), package
            for cls in exported.values():
                for field in getattr(getattr(cls, "obj", None), "__dataclass_fields__", ()):
                    assert cls.members[field].docstring, f"{package}.{cls.name}.{field}: no comment after the field"

    def test_shapes_come_out_as_written(self, pages: dict[str, str]) -> None:
        text = " ".join(unescape(re.sub(r"<[^>]+>", "", pages["sparseprefill"])).split())
        for shape in (
            "[batch, query_heads, queries, head_dim]", "bool [batch, keys]", "[batch, rows, key_blocks]",
            "p - j < window", "columns[start[r] : start[r] + count[r]]",
            "[anchor + m * block_q, anchor + (m + 1) * block_q)",
        ):  # fmt: skip
            assert shape in text, shape

    def test_nothing_private_shows(self, pages: dict[str, str]) -> None:
        for name, page in pages.items():
            assert not re.findall(r'id="(?:\w+\.)?_(?!_)\w+"', page), name
            assert "_Layer" not in page, name
            assert "huggingface" not in name, "what is public of the seam stands on the first page"


class TestRelease:
    """What `make release` refuses; the whole of it takes minutes and a package index."""

    PROJECT = '[project]\nversion = "1.2.0"\n'
    PACKAGE = '__version__ = "1.2.0"\n'
    CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-01\n\n- A line.\n"

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({}, None),
            ({"PACKAGE": '__version__ = "1.1.0"\n'}, r"__init__.py 1\.1\.0"),
            ({"CHANGELOG": "## [Unreleased]\n\n## [1.1.0]\n"}, r"newest release in CHANGELOG.md is 1\.1\.0"),
            ({"CHANGELOG": "## [Unreleased]\n\n- New.\n\n## [1.2.0]\n"}, "entries under"),
            ({"CHANGELOG": "nothing\n"}, "is none"),
        ],
    )
    def test_versions_must_agree(self, changes: dict[str, str], reason: str | None) -> None:
        texts = {"PROJECT": self.PROJECT, "PACKAGE": self.PACKAGE, "CHANGELOG": self.CHANGELOG, **changes}
        said = script("release").why_versions_disagree(texts["PROJECT"], texts["PACKAGE"], texts["CHANGELOG"])
        assert said is None if reason is None else re.search(reason, said)

    def test_a_tree_with_changes_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        release = script("release")
        real = release.run
        monkeypatch.setattr(release, "run", lambda *command: real(*command, cwd=tmp_path))
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        assert release.why_not_clean() is None
        (tmp_path / "new.py").touch()
        assert "new.py" in release.why_not_clean()


def test_public_names_are_documented_in_the_package_itself() -> None:
    """Also for those who read `help(...)` and not the reference."""
    for name in sparseprefill.__all__:
        assert (inspect.getdoc(getattr(sparseprefill, name)) or "").strip(), name


def test_limits_in_security_are_those_of_the_code() -> None:
    rows = re.findall(
        r"^\| [^|]+ \| (\d+)( MiB)? \| `(\w+)` in `([\w/]+)\.py` \|$", PAGES["SECURITY.md"], flags=re.MULTILINE
    )
    assert len(rows) == 6
    for value, unit, name, home in rows:
        module = home.replace("/", ".")
        limits = importlib.import_module(module if module.startswith("sparseprefill.") else f"sparseprefill.{module}")
        assert getattr(limits, name) == int(value) * (2**20 if unit else 1), name
