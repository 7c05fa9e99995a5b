"""Profiles as tables, pictures and pages, and the commands that show, compare and join them."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from pages import HOSTILE, Page
from profile_cases import (
    CANDIDATES,
    HEADS,
    LAYERS,
    PROMPTS,
    Info,
    Prompt,
    Scores,
    drawn_profile,
    model_of,
    profile_of,
    scores,
)

from sparseprefill import profile_scores
from sparseprefill.cli_profile import profile as commands
from sparseprefill.evals import profile_figures, profile_page
from sparseprefill.evals.profile_figures import (
    LEAST_MASS,
    OUTLINE,
    Uniform,
    compare_uniform,
    frontier,
    head_pngs,
    quantile_of,
)
from sparseprefill.evals.profile_findings import cautions, findings, share, target_words
from sparseprefill.evals.profile_page import (
    head_table,
    layer_table,
    plot_maps,
    plot_pareto,
    profile_html,
    profile_table,
    write_maps,
)
from sparseprefill.patterns import AShape, BlockSparse, Dense, HeadScore, ModelPatterns, load_patterns, save_patterns
from sparseprefill.patterns.profiles import label_of, type_of
from sparseprefill.patterns.scores import CandidateTable, Picture


@pytest.fixture(scope="module")
def found() -> Scores:
    return scores()


@pytest.fixture(scope="module")
def profile(found: Scores) -> ModelPatterns:
    return profile_of(found)


@pytest.fixture(scope="module")
def page(profile: ModelPatterns, found: Scores) -> str:
    return profile_html(profile, found, "model.json")


def ragged() -> ModelPatterns:
    """Layers of 1 to 4 heads; those of the second are not profiled."""
    whole = drawn_profile(4, 4, 3)
    layers, tuning, held_out = (
        tuple(row[: n + 1] for n, row in enumerate(rows)) for rows in (whole.layers, whole.tuning, whole.held_out)
    )
    none = (None,) * 2
    return ModelPatterns(
        layers, model_of(layers), None, (tuning[0], none, *tuning[2:]), (held_out[0], none, *held_out[2:])
    )


# Tables and words


@pytest.mark.parametrize("own", [profile_of(scores()), profile_of(scores(), held_out=False), ragged()])
def test_rows_of_layers_are_means_over_their_heads(own: ModelPatterns) -> None:
    table = layer_table(own)
    kinds = [kind for kind in ("tuning", "held_out") if getattr(own, kind)]
    assert [row[0] for row in table.rows] == [*map(str, range(len(own.layers))), "all"]
    for name, row in zip([*range(len(own.layers)), None], table.rows, strict=True):
        cell = dict(zip(table.head, row, strict=True))
        layers = range(len(own.layers)) if name is None else [name]
        patterns = [type_of(pattern) for layer in layers for pattern in own.layers[layer]]
        assert cell["heads"] == str(len(patterns))
        for kind in set(patterns):
            assert cell[kind] == f"{100 * patterns.count(kind) / len(patterns):.0f}%"
        for kind in kinds:
            mine = [score for layer in layers for score in getattr(own, kind)[layer] if score is not None]
            words = kind.replace("_", "-")
            if not mine:
                assert cell[f"{words} mass"] == cell[f"{words} worst"] == cell["work"] == "-"
                assert cell["profiled"] == "0"
                continue
            assert float(cell[f"{words} mass"]) == pytest.approx(np.mean([s.mass for s in mine]), abs=6e-4)
            assert float(cell[f"{words} worst"]) == pytest.approx(min(s.mass for s in mine), abs=6e-4)
            assert float(cell[f"{words} density"]) == pytest.approx(np.mean([s.density for s in mine]), abs=6e-4)
            if kind == kinds[-1]:
                assert float(cell["work"]) == pytest.approx(np.mean([s.work for s in mine]), abs=6e-4)
    assert ("profiled" in table.head) == any(score is None for row in own.tuning for score in row)


def test_rows_of_heads_name_each_pattern(profile: ModelPatterns) -> None:
    table = head_table(profile)
    assert len(table.rows) == LAYERS * HEADS
    for row in table.rows:
        cell = dict(zip(table.head, row, strict=True))
        layer, head = int(cell["layer"]), int(cell["head"])
        assert cell["pattern"] == label_of(profile.layers[layer][head])
        score = profile.held_out[layer][head]
        assert score is not None
        assert float(cell["held-out low mass"]) == pytest.approx(score.low_mass, abs=1e-3)
        assert float(cell["held-out work"]) == pytest.approx(score.work, abs=6e-4)


def test_the_table_says_what_and_how(profile: ModelPatterns) -> None:
    text = profile_table(profile)
    for words in (
        "Model llama: 2 layers of 4 query heads, 2 key heads of 32.",
        "2 tuning prompts of 160 to 256 tokens, 1 held-out prompt of 320 tokens, 12 candidates, tiles of 32",
        "each head has the cheapest pattern that keeps 0.8 of the attention mass in all but 10% of the query rows",
        "! There was a single held-out prompt.",
        "The target of 0.8 is reached by 8 of 8 heads on tuning prompts",
    ):
        assert words in text
    assert len(profile_table(profile, heads=True).splitlines()) == len(text.splitlines()) + LAYERS * HEADS - LAYERS - 1
    document = profile_table(profile, markdown=True)
    assert document.count("\n| ") == LAYERS + 3
    assert "| all " in document


def test_mass_reads_as_whole_only_where_nothing_is_lost() -> None:
    scored = tuple(HeadScore(mass, mass, 0.5, 0.5) for mass in (1.0, 0.99999, 0.9999999))
    rows = head_table(ModelPatterns(((Dense(), AShape(64, 128), Dense()),), tuning=(scored,))).rows
    assert [row[3] for row in rows] == ["1.000", "0.999", "1.000"]
    assert [share(n, 10_000) for n in (0, 1, 50, 5000, 9999, 10_000)] == ["0%", "0.01%", "0.5%", "50%", "99.9%", "100%"]


def test_the_gap_to_held_out_prompts_is_said() -> None:
    tuning = ((HeadScore(0.98, 0.9, 0.2, 0.3), HeadScore(0.96, 0.9, 0.2, 0.3)),)
    held_out = ((HeadScore(0.90, 0.8, 0.2, 0.3), HeadScore(0.96, 0.9, 0.2, 0.3)),)
    own = ModelPatterns(((AShape(64, 128), Dense()),), tuning=tuning, held_out=held_out)
    said = " ".join(findings(own))
    assert "on held-out prompts the same heads keep 0.0400 less of the mass than on the tuning prompts" in said
    assert "layer 0, head 0: 0.980 on tuning prompts, 0.900 on held-out prompts" in said
    assert any("1 head of 2 keep at least 0.05 less" in each for each in cautions(own))
    swapped = " ".join(findings(replace(own, tuning=held_out, held_out=tuning)))
    assert "0.0400 more of the mass" in swapped
    assert "No head keeps less." in swapped
    same = " ".join(findings(replace(own, held_out=tuning)))
    assert "as much of the mass as on the tuning prompts" in same
    alone = replace(own, held_out=())
    assert "Gap" not in " ".join(findings(alone))
    assert any("no held-out prompts" in each for each in cautions(alone))
    bare = replace(own, tuning=(), held_out=())
    assert any("The profile has no scores" in each for each in cautions(bare))
    assert profile_table(bare).endswith("50%\n")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"target": {"kind": "budget", "work": 0.2, "bound": 0.9, "gap": 1e-3}}, "for 0.2 of dense attention's work"),
        ({"target": {"kind": "mass", "mass": 0.9}, "quantile": 0.1}, "0.9 of the attention mass in all but 10% of the"),
        ({"target": {"kind": "minference"}}, "MInference's own search"),
        ({"merged": [{}, {}], "keep": "density"}, "each head has the pattern that computed less"),
        ({"target": {"kind": "mass", "mass": "much"}}, 'Target: {"kind": "mass", "mass": "much"}.'),
        ({"target": {"kind": "mass", "mass": 10**400}}, "Target: "),
        ({"target": ["odd"]}, "Target: odd."),
        ({"target": 3}, "Target: 3."),
        ({"merged": 3}, "Merged from 0 profiles"),
        ({}, ""),
    ],
)  # fmt: skip
def test_targets_are_told_as_far_as_they_are_known(made: dict[str, Any], words: str) -> None:
    assert words in target_words(made)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [1], [{}], [{"tokens": "x", "held_out": 2}], True, 10**400])
def test_whatever_stands_in_made_is_shown(profile: ModelPatterns, value: Any) -> None:
    for key in profile.made:
        odd = replace(profile, made={**profile.made, key: value})
        for text in (profile_table(odd), profile_table(odd, markdown=True)):
            assert "llama" in text
        profile_page.made_table(odd)
        profile_page.prompts_table(odd)
        assert 0 <= quantile_of(odd) < 1


# Maps


def meshes(figure: Any) -> list[Any]:
    """What the panels of a picture of maps show, as masked arrays [layers, heads]."""
    return [panel.axes[0].collections[0].get_array() for panel in figure.subfigs]


@pytest.mark.parametrize("own", [profile_of(scores()), profile_of(scores(), held_out=False), ragged()])
def test_maps_show_the_numbers_of_each_head(own: ModelPatterns) -> None:
    figure = plot_maps(own)
    patterns, density, lost = meshes(figure)
    used = profile_figures.types_used(own)
    judged = own.held_out or own.tuning
    for layer, row in enumerate(own.layers):
        for head in range(patterns.shape[1]):
            if head >= len(row):
                assert patterns.mask[layer, head], "no head, no cell"
                assert density.mask[layer, head]
                continue
            assert used[int(patterns[layer, head])] == type_of(row[head])
            score = judged[layer][head]
            if score is None:
                assert density.mask[layer, head]
                assert lost.mask[layer, head]
            else:
                assert density[layer, head] == score.density
                assert lost[layer, head] == pytest.approx(1 - score.mass)
    words = "held-out prompts" if own.held_out else "tuning prompts"
    assert [words in panel.axes[0].get_title() for panel in figure.subfigs] == [False, True, True]
    hatched = [[c for c in panel.axes[0].collections[1:] if c.get_hatch()] for panel in figure.subfigs]
    unscored = sum(score is None for row in judged for score in row)
    assert [sum(len(c.get_paths()) for c in each) for each in hatched] == [unscored] * 3


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (4, 8), (32, 32), (80, 64)])
def test_maps_of_any_model_can_be_read(layers: int, heads: int) -> None:
    figure = plot_maps(drawn_profile(layers, heads, 1))
    figure.canvas.draw()
    for panel in figure.subfigs:
        axes = panel.axes[0]
        box = axes.get_window_extent()
        points = 72 / figure.dpi
        assert box.width * points / heads >= 5
        assert box.height * points / layers >= 5
        labels = [tick.get_window_extent() for tick in axes.get_xticklabels()]
        assert all(a.x1 <= b.x0 for a, b in pairwise(labels)), "labels do not run together"
    assert max(figure.get_size_inches()) < 25


def test_types_are_told_apart_without_colour_vision() -> None:
    """Without red or without green receptors, as Machado et al., 2009, simulate it (severity 1, linear RGB)."""
    from matplotlib.colors import to_rgb

    blind = {
        "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    }
    for matrix in (np.eye(3), *map(np.array, blind.values())):
        seen = [matrix @ np.array(to_rgb(each)) ** 2.2 for each in profile_figures.TYPE_COLOURS.values()]
        for a, b in combinations([np.clip(each, 0, 1) ** (1 / 2.2) for each in seen], 2):
            assert np.linalg.norm(a - b) > 0.25


def test_maps_without_scores_show_patterns_alone(tmp_path: Path) -> None:
    bare = ModelPatterns(((Dense(), AShape(64, 128)),) * 2)
    assert len(plot_maps(bare).subfigs) == 1
    with pytest.raises(ValueError, match="no scores to draw density and mass of: show the patterns"):
        plot_maps(bare, ("density", "mass"))
    write_maps(bare, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_maps(bare, tmp_path / "nowhere" / "maps.png")


# Kept mass against cost


@pytest.mark.parametrize("held_out", [True, False])
def test_uniform_baselines_are_means_over_all_heads(found: Scores, held_out: bool) -> None:
    own = profile_of(found, held_out=held_out)
    compared = compare_uniform(own, found)
    tables = [found.table(layer, held_out, 0.1) for layer in range(LAYERS)]
    assert compared.kind == ("held_out" if held_out else "tuning")
    assert compared.heads == LAYERS * HEADS
    for name in ("mass", "density", "work"):
        means = torch.cat([getattr(table, name) for table in tables]).mean(0)
        assert [getattr(each, name) for each in compared.baselines] == pytest.approx(means.tolist())
        judged = own.held_out or own.tuning
        mine = [getattr(score, name) for row in judged for score in row]
        assert getattr(compared, name) == pytest.approx(sum(mine) / len(mine))
    dense = compared.baselines[0]
    assert (dense.mass, dense.density, dense.work) == pytest.approx((1, 1, 1))
    assert [each.control for each in compared.baselines] == [each.control for each in CANDIDATES]


def test_a_uniform_profile_is_its_own_baseline(found: Scores) -> None:
    tables = [found.table(layer, True, 0.1) for layer in range(LAYERS)]
    for column in (0, 3, 7):
        rows = tuple(
            tuple(
                HeadScore(*(min(1.0, float(t[head, column])) for t in (table.mass, table.low_mass, table.density)), 0.5)
                for head in range(HEADS)
            )
            for table in tables
        )
        own = ModelPatterns(((CANDIDATES[column].pattern,) * HEADS,) * LAYERS, held_out=rows)
        compared = compare_uniform(own, found)
        assert compared.mass == pytest.approx(compared.baselines[column].mass)
        assert compared.density == pytest.approx(compared.baselines[column].density)


def test_only_heads_that_were_scored_are_compared(found: Scores, profile: ModelPatterns) -> None:
    rows = tuple((*row[:2], None, None) for row in profile.held_out)
    compared = compare_uniform(replace(profile, held_out=rows), replace(found, layers=(1,)))
    assert compared.heads == 2
    assert compared.baselines[3].mass == pytest.approx(float(found.table(1, True, 0.1).mass[:2, 3].mean()))


@pytest.mark.parametrize("cost", ["density", "work"])
def test_the_curve_has_the_profile_and_a_line_a_family(found: Scores, profile: ModelPatterns, cost: Any) -> None:
    figure = plot_pareto(profile, found, cost)
    (axes,) = figure.axes
    compared = compare_uniform(profile, found)
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == [
        "dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse", "random (control, never chosen)",
        "this profile",
    ]  # fmt: skip
    assert lines["this profile"].get_xydata().tolist() == [[getattr(compared, cost), compared.mass]]
    assert lines["random (control, never chosen)"].get_linestyle() == "--"
    for label, line in lines.items():
        family = label.split(" ")[0]
        if family == "this":
            continue
        own = {(getattr(each, cost), each.mass) for each in compared.baselines if each.family == family}
        drawn = [tuple(place) for place in line.get_xydata().tolist()]
        assert set(drawn) <= own
        assert drawn == sorted(drawn)
        assert [mass for _, mass in drawn] == sorted(mass for _, mass in drawn), "no line goes down"
    low, high = axes.get_xlim()
    assert all(low < x < high for line in axes.lines for x in line.get_xdata())
    assert axes.get_ylabel() == "kept mass, held-out prompts"
    assert "tuning prompts" in plot_pareto(replace(profile, held_out=()), found).axes[0].get_ylabel()


def test_a_frontier_leaves_out_what_is_worse_and_dearer() -> None:
    def one(mass: float, density: float) -> Uniform:
        return Uniform("x", "x", False, mass, density, density)

    mine = [one(0.5, 0.3), one(0.6, 0.2), one(0.6, 0.4), one(0.9, 0.4), one(0.7, 0.2)]
    assert frontier(mine, "density") == [one(0.7, 0.2), one(0.9, 0.4)]
    assert frontier([], "work") == []


def test_scores_of_another_model_are_refused(found: Scores, profile: ModelPatterns) -> None:
    with pytest.raises(ValueError, match="a layer 9, the profile has 2 layers: they are of another model"):
        plot_pareto(profile, replace(found, layers=(0, 9)))
    with pytest.raises(ValueError, match="hold no layer or no candidate"):
        profile_html(profile, replace(found, layers=()), "x")
    with pytest.raises(ValueError, match="scores of 4 heads and 12 candidates, the profile has 2 heads"):
        compare_uniform(drawn_profile(2, 2, 1), found)
    with pytest.raises(ValueError, match="the scores name 11 candidates"):
        compare_uniform(profile, replace(found, candidates=found.candidates[1:]))
    with pytest.raises(ValueError, match="no head has a score both in the profile and beside it"):
        compare_uniform(replace(profile, tuning=(), held_out=()), found)
    with pytest.raises(ValueError, match="the picture shows 4 heads and 12 candidates, there are 3 and 12"):
        list(head_pngs(found.found["third", 0].picture, profile.layers[0][:3], found.candidates))  # type: ignore[arg-type]


# Pictures of heads


def pixels(png: bytes) -> Any:
    """uint8 [high, wide, 4]."""
    from matplotlib.image import imread

    return (255 * imread(io.BytesIO(png))).round().astype(np.uint8)


def test_pictures_show_the_mass_and_outline_what_is_kept() -> None:
    import matplotlib as mpl

    cells, draw = 10, np.random.default_rng(0)
    mass = np.tril(10 ** draw.uniform(-6, 0, (2, cells, cells))).astype(np.float32)
    kept = np.tril(draw.random((2, 1, cells, cells)) < 0.5)
    picture = Picture(torch.from_numpy(mass), torch.from_numpy(kept), 1)
    pattern = BlockSparse(0.2)
    info = [Info(label_of(pattern), "block_sparse", False)]
    shades = mpl.colormaps["magma"]
    for head, (png, outlined) in enumerate(head_pngs(picture, [pattern] * 2, info)):
        assert outlined
        image = pixels(png)
        size = len(image) // cells
        assert image.shape == (cells * size, cells * size, 4)
        for row in range(cells):
            for column in range(cells):
                cell = image[row * size : (row + 1) * size, column * size : (column + 1) * size]
                if column > row:
                    assert not cell[..., 3].any(), "the future is transparent"
                    continue
                assert (cell[..., 3] == 255).all()
                place = np.log10(max(mass[head, row, column], LEAST_MASS) / LEAST_MASS) / 4
                expected = np.array(shades(place)[:3]) * 255
                assert np.abs(cell[size // 2, size // 2, :3] - expected).max() < 16
                line = (cell[..., :3] == OUTLINE).all(-1)
                middle = size // 2
                sides = {(-1, 0): line[0, middle], (1, 0): line[-1, middle], (0, -1): line[middle, 0], (0, 1): line[middle, -1]}  # fmt: skip  # noqa: E501
                for (down, right), drawn in sides.items():
                    y, x = row + down, column + right
                    beyond = not (0 <= y < cells and 0 <= x < cells)
                    future = not beyond and x > y
                    inside = not beyond and not future and kept[head, 0, y, x]
                    assert drawn == (kept[head, 0, row, column] and not inside and not future)


def test_pictures_without_a_candidate_have_no_outline(found: Scores) -> None:
    _, picture = found.picture(0) or ("", None)
    assert picture is not None
    for png, outlined in head_pngs(picture, [AShape(1, 2)] * HEADS, found.candidates):
        assert not outlined
        assert not (pixels(png)[..., :3] == OUTLINE).all(-1).any()


@pytest.mark.parametrize("every", [2, 3])
def test_rows_that_were_not_looked_at_are_not_black(every: int) -> None:
    """Each row of tiles that was looked at stands for those above it that were not."""
    whole, some = (scores(n).picture(0) for n in (1, every))
    assert whole is not None
    assert some is not None
    dense = [Dense()] * HEADS
    cells = whole[1].mass.shape[1]
    for (a, _), (b, _) in zip(*(head_pngs(p, dense, scores().candidates) for _, p in (whole, some)), strict=True):
        a, b = pixels(a), pixels(b)  # type: ignore[assignment]
        size = len(a) // cells
        for row in range(cells):
            stands = cells - 1 - (cells - 1 - row) // every * every
            middle = np.s_[size // 2 :: size]
            assert (b[row * size + size // 2][middle] == a[stands * size + size // 2][middle]).all()  # type: ignore[call-overload]


# The page


def test_the_page_fetches_nothing_and_runs_nothing(page: str, profile: ModelPatterns) -> None:
    for text in (page, profile_html(profile, None, "model.json")):
        read = Page(text)
        assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in read.tags}
        assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"base64,[^\"]*", "", text)), "an address"
        for tag, attributes in read.tags:
            assert not [name for name in attributes if name.startswith("on")]
            for name in ("src", "href", "xlink:href"):
                value = attributes.get(name) or "#"
                assert value.startswith("#") or (tag in ("img", "image") and value.startswith("data:image/png;base64,"))
        policy = [each["content"] for each in read.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_every_id_is_there_once_and_all_can_be_read_aloud(page: str) -> None:
    read = Page(page)
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [name for _, attributes in read.tags for name in (attributes.get("aria-labelledby") or "").split()]
    linked = [str(each["href"]).removeprefix("#") for each in read.all("a")]
    assert set(named) | set(linked) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert len(read.all("caption")) == len(read.all("table")) == 5
    assert all(each.get("alt") for each in read.all("img"))
    assert len(read.all("svg")) == 3 + 2
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#010203" not in page


def test_the_page_says_all_there_is(page: str, profile: ModelPatterns, found: Scores) -> None:
    read = Page(page)
    text = read.text.replace("\N{MINUS SIGN}", "-").replace("\N{NON-BREAKING HYPHEN}", "-")
    for each in (*findings(profile), *cautions(profile), *profile_page.compared_words(compare_uniform(profile, found))):
        assert each in text
    for table in (layer_table(profile), head_table(profile)):
        for row in table.rows:
            assert " ".join(cell.replace("-", "\N{EN DASH}") if cell == "-" else cell for cell in row) in text
    assert "; ".join(each.label for each in CANDIDATES) in text
    for prompt in PROMPTS:
        assert f"{prompt.name} {prompt.tokens} {'held-out' if prompt.held_out else 'tuning'}" in text
    pictures = [each for each in read.all("img") if "Layer" in (each["alt"] or "")]
    assert len(pictures) == LAYERS * HEADS
    assert [each["alt"] for each in pictures[:2]] == [
        f"Layer 0, head {head}: where its attention mass lies" for head in range(2)
    ]
    for each in pictures:
        png = base64.b64decode((each["src"] or "").removeprefix("data:image/png;base64,"))
        assert pixels(png).shape == (int(each["height"] or 0), int(each["width"] or 0), 4)
    assert "Layer 1: prompt third, 320 tokens; a cell is a tile wide" in text


def test_a_page_without_scores_says_why_and_how(profile: ModelPatterns) -> None:
    read = Page(profile_html(profile, None, "model.json"))
    assert not read.all("img")
    assert len(read.all("svg")) == 3
    assert "the scores of all candidates were not found beside the profile" in read.text
    assert "or profile the model again" in read.text
    bare = Page(profile_html(replace(profile, tuning=(), held_out=()), None, "model.json"))
    assert len(bare.all("svg")) == 1
    assert "The profile has no scores" in bare.text


def test_what_is_left_out_is_said(found: Scores, profile: ModelPatterns, monkeypatch: pytest.MonkeyPatch) -> None:
    def pictures(own: Scores) -> tuple[list[int], list[str]]:
        drawn = profile_page.head_pictures(profile, own)
        return [len(layer.heads) for layer in drawn.layers], drawn.notes

    assert pictures(found) == ([HEADS] * LAYERS, [])
    assert pictures(replace(found, pictured=(1,))) == ([HEADS], ["No picture was kept of layer 0."])
    assert pictures(replace(found, layers=(1,))) == ([HEADS], ["Not scored, so without a picture: layer 0."])
    sizes = [len(each.url) for layer in profile_page.head_pictures(profile, found).layers for each in layer.heads]
    for shown in range(LAYERS * HEADS):
        monkeypatch.setattr(profile_page, "MOST_PICTURES", sum(sizes[: shown + 1]) - 1)
        counts, notes = pictures(found)
        assert sum(counts) == shown
        left = LAYERS * HEADS - shown
        first = f"layer {shown // HEADS}, head {shown % HEADS}"
        assert notes[0].startswith(f"{left} head{'s' if left > 1 else ''} from {first} on are left out")


def test_texts_that_mean_harm_stay_texts(found: Scores, profile: ModelPatterns) -> None:
    made = {
        **profile.made, HOSTILE: {HOSTILE: [HOSTILE]}, "sparseprefill": HOSTILE, "target": {"kind": HOSTILE},
        "prompts": [{"name": HOSTILE, "tokens": HOSTILE, "held_out": HOSTILE}], "candidates": [HOSTILE, "a" * 99_999],
    }  # fmt: skip
    model = {**profile.model, "architecture": HOSTILE, "rope": {HOSTILE: HOSTILE}, HOSTILE: 1}
    bad = replace(profile, made=made, model=model, weights=HOSTILE)
    column = [each.label for each in found.candidates].index(label_of(profile.layers[0][0]))
    infos = [replace(each, label=each.label if n == column else f"{HOSTILE}{n}", family=f"{HOSTILE}{n % 3}")
             for n, each in enumerate(found.candidates)]  # fmt: skip
    renamed = replace(found, candidates=tuple(infos), prompts=tuple(Prompt(p.name, 7, p.held_out) for p in PROMPTS))
    text = profile_html(bad, renamed, f"{HOSTILE}.json")
    text.encode("utf-8")
    read = Page(text)
    assert not {"script"} & {tag for tag, _ in read.tags}
    assert all((each["src"] or "").startswith("data:image/png;base64,") for each in read.all("img"))
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in read.text
    assert "{{ 7 * 7 }}" in read.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert "no outline: this pattern was no candidate" in text
    plain, document = profile_table(bad), profile_table(bad, markdown=True)
    for form in (plain, document):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", form)
    usual = profile_table(replace(profile, weights="x")).splitlines()
    assert len(plain.splitlines()) <= len(usual), "no line of its own"
    assert "<script" not in document
    assert not re.search(r"^# heading", document, re.MULTILINE)


@pytest.mark.slow
def test_the_page_of_the_largest_model_can_be_opened() -> None:
    layers, heads, cells = 80, 64, 128
    own = drawn_profile(layers, heads, 5)
    draw = torch.Generator().manual_seed(0)
    mass = torch.rand(heads, cells, cells, generator=draw).tril() / 10
    kept = torch.rand(heads, len(CANDIDATES), cells, cells, generator=draw) < 0.3
    table = CandidateTable(*(torch.rand(heads, len(CANDIDATES), generator=draw).double() for _ in range(4)))

    class Large(Scores):
        def table(self, layer: int, held_out: bool, quantile: float) -> CandidateTable:
            return table

        def picture(self, layer: int) -> tuple[str, Picture]:
            return "third", Picture(mass, kept, 4)

    text = profile_html(own, Large({}, layers=tuple(range(layers))), "large.json")
    assert len(text.encode()) < 20e6
    assert "are left out: a page with all pictures would be too large to open" in text
    assert "a cell is 4 tiles wide" in text


# Commands


def invoke(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(commands, list(arguments))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def folder(tmp_path: Path, profile: ModelPatterns) -> Path:
    """With the profiles a.json and b.json, which differ in one head and one score."""
    save_patterns(profile, tmp_path / "a.json")
    save_patterns(profile, tmp_path / "model.json")
    rows = [list(row) for row in profile.layers]
    rows[1][2] = AShape(64, 0.25)
    save_patterns(replace(profile, layers=tuple(map(tuple, rows))), tmp_path / "b.json")
    return tmp_path


def test_a_profile_is_shown(folder: Path, profile: ModelPatterns, found: Scores, page: str, monkeypatch: Any) -> None:
    path, html = str(folder / "model.json"), folder / "page.html"
    assert invoke("show", path).stdout == profile_table(profile)
    assert invoke("show", path, "--heads", "--markdown").stdout == profile_table(profile, markdown=True, heads=True)
    output = invoke("show", path, "--png", str(folder / "maps.png"), "--html", str(html)).stdout
    assert f"wrote {folder}/maps.png" in output
    assert f"wrote {html}, without what {folder}/model.json.scores would add" in output
    assert (folder / "maps.png").read_bytes().startswith(b"\x89PNG")
    assert "were not found beside the profile" in html.read_text()
    (folder / "model.json.scores").mkdir()
    asked: list[Path] = []

    def read_scores(where: Path) -> Scores:
        asked.append(where)
        return found

    monkeypatch.setattr(profile_scores, "read_scores", read_scores)
    output = invoke("show", path, "--html", str(html)).stdout
    assert output.endswith(f"wrote {html}\n")
    assert asked == [folder / "model.json.scores"]
    assert html.read_text() == page, "the same profile makes the same page"
    save_patterns(replace(profile, made={**profile.made, "prompts_digest": "d2"}), path)
    assert "holds the scores of another run" in invoke("show", path, "--html", str(html), code=1).stderr


def test_a_difference_is_an_exit_status(folder: Path) -> None:
    a, b = str(folder / "a.json"), str(folder / "b.json")
    assert invoke("diff", a, a).stdout == "the profiles are the same\n"
    output = invoke("diff", a, b, code=1).stdout
    assert "layer 1, head 2: " in output
    assert "-> a_shape:sink=64,window=0.25; density " in output
    assert output.endswith("1 of 8 heads have another pattern; those with scores change on average by density "
                           "+0.000, kept mass +0.000\n")  # fmt: skip
    told = json.loads(invoke("diff", a, b, "--json", code=1).stdout)
    assert [(each["layer"], each["head"]) for each in told["heads"]] == [(1, 2)]
    assert json.loads(invoke("diff", a, a, "--json").stdout)["heads"] == []
    assert "there is no profile at" in invoke("diff", a, str(folder / "none.json"), code=2).output


def test_profiles_are_merged(folder: Path, profile: ModelPatterns) -> None:
    a, b, out = (str(folder / name) for name in ("a.json", "b.json", "out.json"))
    done = invoke("merge", a, b, "--out", out)
    assert f"1. {a}: 8 of 8 heads have its pattern" in done.stdout
    assert f"2. {b}: 7 of 8 heads have its pattern" in done.stdout
    assert done.stdout.endswith(f"wrote {out}\n")
    assert "different prompts" not in done.output
    merged = load_patterns(out)
    assert merged.layers == profile.layers
    assert merged.made == {"merged": [profile.made, profile.made], "keep": "mass", "block": 32}
    assert "Merged from 2 profiles" in invoke("show", out).stdout
    save_patterns(replace(profile, made={**profile.made, "prompts_digest": "d2"}), b)
    assert "made on different prompts" in invoke("merge", a, b, "--keep", "density", "--out", out).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "none.json"], "there is no profile at"),
        (["show", "bad.json"], "is not a JSON profile"),
        (["show", "a.json", "--png", "a.json"], "is named twice in this command and would be replaced"),
        (["show", "a.json", "--png", "x", "--html", "./x"], "is named twice in this command"),
        (["show", "a.json", "--png", "nowhere/x.png"], "there is no folder nowhere to write x.png into"),
        (["show", "a.json", "--html", "nowhere/x.html"], "there is no folder nowhere to write x.html into"),
        (["merge", "a.json", "--out", "out.json"], "merging takes two profiles or more"),
        (["merge", "a.json", "b.json", "--out", "b.json"], "is named twice in this command"),
        (["merge", "a.json", "b.json", "--out", "kept.json"], "kept.json.scores holds the scores of another profile"),
        (["merge", "a.json", "other.json", "--out", "out.json"], "profiles 1 and 2 are of different models: layers"),
        (["merge", "a.json", "b.json", "--out", "nowhere/out.json"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_done_is_said(
    folder: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "bad.json").write_text((folder / "a.json").read_text()[:-9])
    (folder / "kept.json.scores").mkdir()
    save_patterns(drawn_profile(3, 4, 1), folder / "other.json")
    before = {path: path.read_bytes() for path in folder.glob("*.json")}
    assert message in invoke(*arguments, code=1).output
    assert {path: path.read_bytes() for path in folder.glob("*.json")} == before
