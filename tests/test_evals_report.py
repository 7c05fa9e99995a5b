"""Reports of evaluations: what stands in them, what an incomplete one must not say, and texts that mean harm."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eval_results import MACHINE, METHODS, SETS, fidelity_result, longbench_result, needle_result
from eval_tasks import SPECS, Parity
from pages import HOSTILE, Page

from sparseprefill.evals.compare import Summary, summarise
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.report_figures import SCALE, limits, plot_heat_maps
from sparseprefill.evals.report_findings import nothing_to_lose, verdicts, warnings
from sparseprefill.evals.report_page import (
    MOST_FLIPS,
    report_html,
    report_markdown,
    report_text,
    row_differences,
    summary_table,
    write_report,
)
from sparseprefill.evals.report_words import change, clean, cut, in_cell, markdown, one_line, probability, short
from sparseprefill.evals.results import Cost, EvalResult
from sparseprefill.evals.runner import run_eval
from sparseprefill.evals.tasks import Metric, Total

PERCENT, PLAIN = Metric("p", "percent"), Metric("k", "plain", higher_is_better=False, percent=False)


def of(result: EvalResult, resamples: int = 200) -> tuple[EvalResult, Summary]:
    return result, summarise(result, resamples=resamples)


def with_answers(result: EvalResult, method: str, change_answer: Any) -> EvalResult:
    """A result in which every answer of a method is what a function makes of dense's."""
    records = []
    for record in result.records:
        answers = tuple(change_answer(answer) for answer in record.runs["dense"].answers)
        records.append(replace(record, runs={**record.runs, method: replace(record.runs[method], answers=answers)}))
    return replace(result, records=tuple(records))


@pytest.fixture(scope="module")
def needle() -> tuple[EvalResult, Summary]:
    return of(needle_result())


@pytest.fixture(scope="module")
def needle_page(needle: tuple[EvalResult, Summary]) -> str:
    return report_html(*needle)


@pytest.fixture(scope="module")
def longbench() -> tuple[EvalResult, Summary]:
    return of(longbench_result())


@pytest.fixture(scope="module")
def longbench_page(longbench: tuple[EvalResult, Summary]) -> str:
    return report_html(*longbench)


@pytest.fixture(scope="module")
def half() -> tuple[EvalResult, Summary]:
    part = needle_result(samples=1, planned=100)
    return of(replace(part, totals=(Total("an average", "dense", 51.37),)))  # nobody should have made it


def test_a_page_fetches_nothing_and_runs_nothing(needle_page: str, longbench_page: str) -> None:
    for text in (needle_page, longbench_page):
        page = Page(text)
        assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form", "image"} & {
            t for t, _ in page.tags
        }
        assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text), "an address"
        for tag, attributes in page.tags:
            assert not [name for name in attributes if name.startswith("on")]
            for name in ("src", "href", "xlink:href"):
                assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        policy = [each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_id_is_there_once_and_every_reference_leads_to_one(needle_page: str, longbench_page: str) -> None:
    for text in (needle_page, longbench_page):
        page = Page(text)
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        named = [name for _, attributes in page.tags for name in (attributes.get("aria-labelledby") or "").split()]
        linked = [
            value.removeprefix("#") for _, attributes in page.tags for key in ("href", "xlink:href")
            if (value := attributes.get(key)) is not None
        ]  # fmt: skip
        cut_by = re.findall(r"url\(#([^)]+)\)", text)
        assert set(named) | set(linked) | set(cut_by) <= set(ids)
        assert named
        assert linked


def test_tables_and_pictures_can_be_read_aloud(needle_page: str) -> None:
    page = Page(needle_page)
    tables = len(page.all("table"))
    assert tables > 10
    assert len(page.all("caption")) == tables
    assert needle_page.count("<thead>") == tables
    assert {each.get("scope") for each in page.all("th")} == {"col", "row"}
    pictures = page.all("svg")
    assert len(pictures) == 5 + 1 + 4 + 2  # a map a method, differences overall and by row, two against costs
    assert all(each.get("role") == "img" and each.get("aria-labelledby") for each in pictures)
    assert needle_page.count("<title") == len(pictures) + 1
    assert 'lang="en"' in needle_page
    assert 'name="viewport"' in needle_page
    assert "prefers-color-scheme: dark" in needle_page
    assert "@media print" in needle_page


def test_the_page_says_what_the_summary_says(needle: tuple[EvalResult, Summary], needle_page: str) -> None:
    result, summary = needle
    text = Page(needle_page).text.replace("\N{MINUS SIGN}", "-")
    for row in summary_table(result, summary, result.metrics[0]).rows:
        for cell in row:
            assert cell in text or cell == "-"
    for verdict in verdicts(result, summary):
        assert verdict.sentence in text
    for warning in warnings(result, summary):
        assert warning in text
    assert "vertical_slash:density=0.2 \N{DAGGER}" in text
    for term in ("density", "tile work", "kept mass", "TTFT", "McNemar p", "chance"):
        assert f" {term} " in text
    for word in ("triton: ", "fewer queries than a block (decoding): ", "NVIDIA H200", "task.haystack", "One needle"):
        assert word in text


def test_maps_have_the_colours_of_the_field_and_a_number_in_each_cell(needle_page: str) -> None:
    maps = re.findall(r'<svg[^>]*aria-labelledby="map0-\d-title.*?</svg>', needle_page, re.DOTALL)
    assert len(maps) == 5
    assert SCALE[2].lower() in maps[0], "what is all right is the end of the scale, whatever the other cells hold"
    assert SCALE[0].lower() not in maps[0]
    assert SCALE[0].lower() in maps[4]
    for each in maps:
        numbers = [int(n) for n in re.findall(r">(\d+)</text>", each)]
        assert len(numbers) == 20
        assert set(numbers) <= {0, 25, 50, 75, 100}
        assert "currentColor" in each
        assert "#010203" not in each


def test_colours_of_percent_run_from_0_to_1_and_others_are_shared() -> None:
    result, summary = of(fidelity_result(prompts=2, methods=METHODS[:3]))
    kl, _, agreement = result.metrics
    assert limits(result, summary.cells, agreement) == (0.0, 1.0)
    means = [c.mean for c in summary.cells if c.metric == "KL" and len(c.group) == 2]
    assert limits(result, summary.cells, kl) == (min(means), max(means))
    text = Page(report_html(result, summary)).text
    assert f"from light at 0 to dark at {max(means):.4g}, the same in all these maps" in text
    for verdict in verdicts(result, summary):
        assert verdict.state == "worse"
        assert verdict.sentence.startswith("Worse by 0.")


def test_one_axis_has_points_a_line_a_row_and_totals(
    longbench: tuple[EvalResult, Summary], longbench_page: str
) -> None:
    result, summary = longbench
    text = Page(longbench_page).text
    differences = row_differences(result, summary, result.metrics[0])
    assert differences is not None
    assert [row[0] for row in differences.rows] == list(SETS)
    for name in SETS:
        assert longbench_page.count(f">{name}</text>") == 5  # one plot of scores, four of differences
    assert "average of categories, English" in text
    assert "48.54" in text
    assert "a guess (chance)" in text
    assert "2 different machines" in text
    assert "NVIDIA A100" in text
    assert "last 64 rows" in text
    assert "no better than a guess in 1 row (passage_count)" in text


@pytest.mark.parametrize("form", [report_html, report_markdown, report_text])
def test_an_incomplete_result_is_never_shown_as_complete(form: Any, half: tuple[EvalResult, Summary]) -> None:
    text = form(*half)
    assert "INCOMPLETE: 20 of 100 prompts" in text[: text.index("Model needles-8m")]
    assert not re.search(r"(?<!in)complete, ", text, re.IGNORECASE)
    assert "so far (20 of 100 prompts, not final)" in text.lower()
    assert "Totals" not in text
    assert "51.37" not in text
    if form is report_html:
        page = Page(text)
        assert re.search(r"<title>INCOMPLETE: 20 of 100 prompts - needle", text)
        assert [each["class"] for each in page.all("div") if each.get("role") == "alert"] == ["banner"]
        headings = re.findall(r"<h[12][^>]*>(.*?)</h", text)
        marked = [each for each in headings if "INCOMPLETE: 20 of 100" in each]
        assert len(marked) == 6, "the title and every heading above numbers"
    if form is report_markdown:
        assert text.startswith("# needle: INCOMPLETE: 20 of 100 prompts\n")
        assert text.count("INCOMPLETE") == 5


def test_a_complete_result_says_so_and_has_its_totals(
    longbench: tuple[EvalResult, Summary], longbench_page: str
) -> None:
    document, text = report_markdown(*longbench), report_text(*longbench)
    for form in (document, text, longbench_page):
        assert "complete, 126 prompts" in form
        assert "INCOMPLETE" not in form
        assert "48.54" in form


def test_files_are_written_whole_and_replace_those_of_the_unfinished_run(tmp_path: Path) -> None:
    result = needle_result(samples=1, methods=METHODS[:2], lengths=(1024, 2048), depths=(0.0, 1.0))
    written = write_report(replace(result, planned=9), tmp_path)
    assert [path.name for path in written] == [
        "needle.incomplete.html",
        "needle.incomplete.md",
        "needle.incomplete.png",
    ]
    other = tmp_path / "ruler.incomplete.md"
    other.write_text("of another task")
    written = write_report(result, str(tmp_path))
    assert [path.name for path in written] == ["needle.html", "needle.md", "needle.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*sorted(path.name for path in written), other.name]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    before = [path.read_bytes() for path in written]
    write_report(result, tmp_path)
    assert [path.read_bytes() for path in written] == before, "the same result makes the same files"


def test_reports_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    result = needle_result(samples=1, methods=METHODS[:2], lengths=(1024,))
    for name in ("../needle", "", "a/b", ".hidden", "a\nb", "needle\x00"):
        with pytest.raises(ValueError, match="cannot name a file"):
            write_report(replace(result, task=name), tmp_path)
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_report(result, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no answers yet"):
        write_report(replace(result, records=(), planned=3), tmp_path)
    with pytest.raises(ValueError, match=r"no metric 'f1' here: choose from right"):
        plot_heat_maps(result, "f1")
    with pytest.raises(ValueError, match="no answers yet"):
        plot_heat_maps(replace(result, records=()))
    assert list(tmp_path.iterdir()) == []


def hostile(result: EvalResult) -> EvalResult:
    """Every text that a model, a file or a user gives, as bad as it comes."""
    label = f"block_sparse:keep={HOSTILE}"

    def text(number: int) -> str:
        return f"{number}{HOSTILE}" + ("very long line " * 4000 if number % 2 else "a" * 60_000)

    methods = (result.methods[0], replace(result.methods[3], label=label))
    records = []
    for number, record in enumerate(result.records):
        item = record.items[0]
        item = replace(item, id=f"{number}{HOSTILE}", references=(text(number),) * 9,
                       group={f"axis{HOSTILE}": f"{HOSTILE}{number % 3}"})  # fmt: skip
        runs = {}
        for method, old in ((methods[0], "dense"), (methods[1], METHODS[3].label)):
            run = record.runs[old]
            value = float(method.label == "dense")
            answer = replace(run.answers[0], item=item.id, text=text(number), values={HOSTILE: value})
            runs[method.label] = replace(run, answers=(answer,), kernels={HOSTILE: 3} if run.kernels else {},
                                         previous_calls={HOSTILE: 2})  # fmt: skip
        records.append(replace(record, prompt=item.id, items=(item,), runs=runs))
    return replace(
        result, methods=methods, records=tuple(records), axes=(f"axis{HOSTILE}",), notes=(HOSTILE,),
        metrics=(Metric(HOSTILE, HOSTILE),), settings={HOSTILE: HOSTILE, "model": {"name": HOSTILE}},
        provenance=({"processor": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}},),
    )  # fmt: skip


def test_texts_that_mean_harm_stay_texts(tmp_path: Path) -> None:
    result = hostile(needle_result(samples=1, lengths=(1024, 2048)))
    result, summary = of(result)
    text = report_html(result, summary)
    text.encode("utf-8")
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page.text, "a template is not run"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f\ud800-\udfff\ufffe]", text)
    assert len(text) < 1_000_000, "long texts are cut"
    assert "characters left out ..." in page.text
    assert "and 4 more" in page.text
    for form in (report_markdown(result, summary), report_text(result, summary)):
        form.encode("utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069\ud800-\udfff]", form)
    assert all(path.stat().st_size for path in write_report(result, tmp_path))


def test_a_formula_in_a_label_is_not_set_as_one(tmp_path: Path) -> None:
    result = needle_result(samples=1, methods=METHODS[:2], lengths=(1024,), depths=(0.0,))
    record = result.records[0]
    item = replace(record.items[0], group={"depth": r"$\frac{a$", "length": "$a_1$"})
    result = replace(result, records=(replace(record, items=(item,)),))
    assert r">$\frac{a$</text>" in report_html(*of(result))
    assert len(write_report(result, tmp_path)) == 3


@pytest.mark.slow
def test_a_real_run_has_a_report(tmp_path: Path) -> None:
    result = run_eval(Parity(2), *load_model(device="cpu"), SPECS, tmp_path)
    assert result is not None
    page, document, _ = write_report(EvalResult.load(tmp_path / "parity.json"), tmp_path)
    text = Page(page.read_text(encoding="utf-8")).text
    for spec in SPECS:
        assert spec.label in text
    assert "mean of all items" in text
    assert "no item differs" in text, "all blocks are dense attention"
    assert "first token not timed" not in text
    assert document.read_text(encoding="utf-8").startswith("# parity: complete, 4 prompts\n")


def markdown_cells(line: str) -> list[str]:
    """Cells of a row as GitHub splits them: at bars that no backslash stands before."""
    return re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))


def test_tables_of_markdown_keep_their_columns_whatever_stands_in_them() -> None:
    document = report_markdown(*of(hostile(needle_result(samples=1, lengths=(1024,)))))
    widths = 0
    for part in document.split("\n\n"):
        lines = part.split("\n")
        if not lines[0].startswith("| "):
            continue
        assert re.fullmatch(r"[| :-]+", lines[1])
        assert len({len(markdown_cells(line)) for line in lines}) == 1
        widths += 1
    assert widths > 6
    bare = re.sub(r"\\[\\`*\[\]|~$_#]", "", document)
    assert "`" not in bare
    assert "<" not in bare.replace("&lt;", "")
    assert not re.search(r"^# (?!needle)", document, re.MULTILINE)


def test_verdicts_name_what_was_shown_and_no_more() -> None:
    result = needle_result()
    labels = [method.label for method in result.methods[1:]]
    found = {each.method: each for each in verdicts(*of(result, 2000))}
    assert found[labels[0]].state == "lost"
    assert "which leaves out zero" in found[labels[0]].sentence
    assert found[labels[2]].state == "no difference shown"
    assert re.search(r"a loss of \d\.\d points is not excluded", found[labels[2]].sentence)
    same = with_answers(result, labels[2], lambda answer: answer)
    verdict = {each.method: each for each in verdicts(*of(same))}[labels[2]]
    assert verdict.state == "no item differs"
    assert "up to 3.7% of such prompts may still differ" in verdict.sentence  # 1 - 0.05 ** (1 / 80)
    assert any(each.startswith(f"No item differs from dense with {labels[2]}.") for each in warnings(*of(same)))
    gained = with_answers(with_answers(result, "dense", lambda answer: replace(answer, values={"right": 0.25})),
                          labels[2], lambda answer: replace(answer, values={"right": 1.0}))  # fmt: skip
    assert {each.method: each.state for each in verdicts(*of(gained))}[labels[2]] == "gained"


def test_a_single_prompt_has_no_interval_and_says_so() -> None:
    result, summary = of(needle_result(samples=1, lengths=(4096,), depths=(0.5,)))
    found = verdicts(result, summary)
    assert {each.state for each in found} == {"one prompt"}
    assert {each.sentence.split(" on a")[0] for each in found} == {"The same as dense", "Worse by 100.0 points"}
    assert any("single prompt" in each for each in warnings(result, summary))
    for form in (report_html, report_markdown, report_text):
        assert "nothing is known of the spread" in form(result, summary)


def test_dense_alone_is_a_report_too(tmp_path: Path) -> None:
    result = needle_result(samples=1, methods=METHODS[:1])
    text = Page(report_html(*of(result))).text
    assert "nothing to compare it with" in text
    assert len(write_report(result, tmp_path)) == 3


def test_where_dense_cannot_do_it_nothing_is_tested() -> None:
    result = needle_result(samples=2, methods=METHODS[:2])
    wrong = with_answers(result, "dense", lambda answer: replace(answer, values={"right": 0.0}))
    assert {each.state for each in verdicts(*of(wrong))} == {"not tested"}
    assert warnings(*of(wrong))[0].startswith("Dense attention itself scores 0.0")
    for form in (report_html, report_markdown, report_text):
        assert "nothing can be lost" in form(*of(wrong))
    assert nothing_to_lose(0.30, 0.25, 100, PERCENT), "within what a guess reaches by luck"
    assert not nothing_to_lose(0.40, 0.25, 100, PERCENT)
    assert not nothing_to_lose(0.05, None, 100, PERCENT)
    assert not nothing_to_lose(0.0, None, 100, PLAIN), "no divergence at all is the best there is"


def test_a_method_that_never_ran_is_told_apart() -> None:
    result = needle_result(samples=1, lengths=(1024, 2048))
    label = METHODS[3].label
    records = []
    for record in result.records:
        short_one = record.tokens == 1024
        run = record.runs[label]
        run = replace(run, kernels={} if short_one else run.kernels, previous_calls={"below break-even": 24})
        records.append(replace(record, runs={**record.runs, label: run}))
    partly = replace(result, records=tuple(records))
    assert f"{label} never ran sparsely at length 1k: its scores there are those of dense attention." in warnings(
        *of(partly)
    )
    never = replace(result, records=tuple(record for record in records if record.tokens == 1024), planned=5)
    assert any(
        each.startswith(f"{label} never ran sparsely: below break-even (120 calls)") for each in warnings(*of(never))
    )
    assert "dense attention in all but name" in report_text(*of(never))


def test_no_times_and_no_density_are_dashes(tmp_path: Path) -> None:
    result = needle_result(samples=1, lengths=(1024,), methods=METHODS[:2])
    bare = replace(result, records=tuple(
        replace(record, runs={k: replace(run, cost=Cost(), observed=None) for k, run in record.runs.items()})
        for record in result.records
    ))  # fmt: skip
    text = Page(report_html(*of(bare))).text
    assert "density not observed; first token not timed" in text
    assert "Score against" not in text


def test_flips_are_listed_losses_first_with_room_for_gains() -> None:
    result = needle_result(samples=20, methods=METHODS[:2], lengths=(1024, 2048))  # 200 prompts
    draw = random.Random(1)
    values = [draw.random() for _ in result.records]

    def changed(record: Any, number: int) -> Any:
        dense = record.runs["dense"].answers[0]
        other = replace(dense, values={"right": 0.0 if number < 150 else 1.0}, text=f"answer {number}")
        dense = replace(dense, values={"right": 0.1 + 0.8 * values[number]}, text="\u05d0\u05d1\u05d2")
        return replace(record, runs={
            "dense": replace(record.runs["dense"], answers=(dense,)),
            METHODS[1].label: replace(record.runs[METHODS[1].label], answers=(other,)),
        })  # fmt: skip

    records = tuple(changed(record, number) for number, record in enumerate(result.records))
    result = replace(result, records=records, metrics=(Metric("right", "graded"),))
    text = report_html(*of(result))
    shown = [int(n) for n in re.findall(r'dir="auto">answer (\d+)<', text)]
    assert len(shown) == MOST_FLIPS
    losses, gains = [n for n in shown if n < 150], [n for n in shown if n >= 150]
    assert shown == losses + gains
    assert losses == sorted(range(150), key=lambda n: -values[n])[:70]
    assert gains == sorted(range(150, 200), key=lambda n: values[n])[:30]
    assert "150 lost, 50 gained" in Page(text).text
    assert "100 more are not listed here" in Page(text).text


def test_several_machines_are_told_and_the_same_one_twice_is_not() -> None:
    result = needle_result(samples=1, methods=METHODS[:2])
    for other, told in ((MACHINE, False), ({**MACHINE, "threads": 4}, True), ({**MACHINE, "gpu": "other"}, True)):
        two = replace(result, provenance=(MACHINE, other))
        assert any("different machines" in each for each in warnings(*of(two))) is told


def test_the_picture_is_marked_where_it_is_of_a_part() -> None:
    result = needle_result(samples=1, methods=METHODS[:2], planned=44)
    figure = plot_heat_maps(result)
    assert "INCOMPLETE: 20 of 44 prompts" in figure.get_suptitle()
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [METHODS[0].label, METHODS[1].label]
    assert all(axes.collections[0].get_clim() == (0, 1) for axes in panels)
    assert [len(axes.texts) for axes in panels] == [20, 20]
    assert "INCOMPLETE" not in plot_heat_maps(replace(result, planned=20)).get_suptitle()
    single = plot_heat_maps(longbench_result(samples=1))
    assert len(single.axes[0].texts) == 21 * 5


def test_cells_nobody_asked_for_stay_empty() -> None:
    result = needle_result(samples=1, lengths=(1024, 2048), methods=METHODS[:2])
    ragged = replace(result, records=result.records[:-1], planned=9)
    text = report_html(*of(ragged))
    maps = re.findall(r'<svg[^>]*aria-labelledby="map0-0-title.*?</svg>', text, re.DOTALL)
    assert maps[0].count(">\N{EN DASH}</text>") == 1


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (-0.0421, PERCENT, "-4.2"), (0.0, PERCENT, "0.0"), (-1e-17, PERCENT, "0.0"), (-0.0004, PERCENT, "-0.04"),
        (1e-7, PERCENT, "+1e-05"), (None, PERCENT, "-"), (0.0, PLAIN, "0"), (0.012345, PLAIN, "+0.0123"),
    ],
)  # fmt: skip
def test_differences_keep_their_sign_and_never_read_as_none(value: float | None, metric: Metric, text: str) -> None:
    assert change(value, metric) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "100"), (0.999, "99.9"), (0.99999, "99.9"), (0.994, "99"), (0.0, "0"), (0.001, "0.1"), (0.00001, "0.1"),
        (0.5, "50"),
    ],
)  # fmt: skip
def test_a_cell_is_100_only_where_all_is_right(value: float, text: str) -> None:
    assert in_cell(value, PERCENT) == text


def test_words() -> None:
    assert probability(0.0004) == "<0.001"
    assert clean("a\tb\nc\x00\x7f\ud800") == "a\tb\nc[U+0000][U+007F]\N{REPLACEMENT CHARACTER}"
    assert "\u202e" not in clean("\u202eabc")
    assert clean("\u05d0\u4e2d\U0001f600\u200d") == "\u05d0\u4e2d\U0001f600\u200d", "scripts stay as they are"
    assert one_line(" a \n\n b\t") == "a b"
    assert cut("x" * 100, 100) == "x" * 100
    long = cut("a" * 500 + "b" * 500, 100)
    assert "[... 900 characters left out ...]" in long
    assert (long[0], long[-1], long.count("b")) == ("a", "b", 33)
    assert len(short("y" * 100, 20)) == 20
    assert markdown("a_b|c") == "a_b\\|c"
    assert markdown("_a_ *b* `c` <d> [e](f)") == "\\_a\\_ \\*b\\* \\`c\\` &lt;d&gt; \\[e\\](f)"
    assert [markdown(line) for line in ("# a", "1. a", "- a", "-4.2", "+ a")] == [
        "\\# a",
        "1\\. a",
        "\\- a",
        "-4.2",
        "\\+ a",
    ]
