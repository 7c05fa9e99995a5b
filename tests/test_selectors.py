"""The comparison of selectors: its figures against slow definitions, what it must show of SALE, its command."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprefill import patch_model
from sparseprefill.cli import main
from sparseprefill.contracts import AttentionInputs, AttentionOutput, BlockGrid, BlockIndex
from sparseprefill.evals import measured_selectors
from sparseprefill.evals.captures import load_capture, save_capture
from sparseprefill.evals.compare import summarise
from sparseprefill.evals.compared_inputs import NamedInputs, model_inputs, planted_inputs
from sparseprefill.evals.curves import Curve
from sparseprefill.evals.loading import load_model
from sparseprefill.evals.measured_selectors import Selector, output_error
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.evals.planted_heads import planted_heads
from sparseprefill.evals.results import EvalResult
from sparseprefill.evals.rounding_bound import BoundCount, count_bound, logit_errors
from sparseprefill.evals.selector_result import DENSITIES, SelectorResult
from sparseprefill.evals.selectors import compare, method_selectors, method_settings, sale_selectors
from sparseprefill.evals.selectors_figures import draw_selectors, write_selectors
from sparseprefill.kernels.low_bit import LowBit, quantize, token_means
from sparseprefill.kernels.reference import reference_attention
from sparseprefill.patterns import AShape, BlockSparse, Dense, Pattern, Sale
from sparseprefill.patterns.methods import METHODS
from sparseprefill.patterns.parts import Part
from sparseprefill.patterns.vote_columns import snapkv
from sparseprefill.prefill import resolve_method
from sparseprefill.prompts import ProfilePrompt
from sparseprefill.reports import number
from support import make_inputs

ROOT = Path(__file__).resolve().parents[1]
RESULT = SelectorResult.load(ROOT / "docs/results/selectors_cpu.json")
SMALL = {"window": 32, "segment": 32, "query_block": 16, "key_block": 16}


# Figures against slow definitions


def test_figures_are_those_of_the_definitions() -> None:
    """Kept mass by the oracle, query by query; densities, and agreement of lists, from masks."""
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=200, dtype=torch.float64, seed=4)
    patterns: dict[str, Pattern] = {
        "exact": Sale(keep=0.4, bits=16, **SMALL),
        "rounded": Sale(keep=0.4, bits=2, **SMALL),
    }
    chosen = [Selector(name, 1, each, like=None if name == "exact" else "exact") for name, each in patterns.items()]
    result = compare([NamedInputs("a", "group", inputs)], chosen, tiles=[(16, 32)])
    grid = BlockGrid.of(inputs, 16, 32)
    visible = inputs.visible_mask()[0]
    masks = {}
    for name, pattern in patterns.items():
        index = pattern.build_index(inputs, grid)
        masks[name] = index.to_mask()[0]
        curve = result.curve("group", name, (16, 32))
        lse = [reference_attention(inputs, each).lse for each in (index, None)]
        mass = (lse[0] - lse[1]).exp()
        assert curve.mass[0] == pytest.approx(float(mass.mean()), abs=1e-6)
        low = torch.quantile(mass[0], 0.1, dim=-1, interpolation="lower").mean()
        assert curve.low_mass[0] == pytest.approx(float(low), abs=0.03)  # rounded down to a bin
        pairs = masks[name].repeat_interleave(16, 1)[:, :200].repeat_interleave(32, 2)[..., :200] & visible
        assert curve.density[0] == pytest.approx(float(pairs.sum() / (2 * visible.sum())))
    both, either = masks["exact"] & masks["rounded"], masks["exact"] | masks["rounded"]
    assert result.curve("group", "rounded", (16, 32)).agreement == (pytest.approx(float(both.sum() / either.sum())),)
    assert result.curve("group", "exact", (16, 32)).agreement is None


def test_a_group_is_the_mean_over_its_heads_and_dense_keeps_all() -> None:
    pair = [make_inputs(query_heads=heads, kv_heads=1, queries=96, seed=heads) for heads in (1, 3)]
    one = Selector("block_sparse", 0.5, BlockSparse(0.5, sink=16, local=16))
    apart = [compare([NamedInputs("", "x", each)], [one], tiles=[(16, 16)]).curves[0] for each in pair]
    together = compare([NamedInputs("", "x", each) for each in pair], [one], tiles=[(16, 16)]).curves[0]
    assert together.mass[0] == pytest.approx((apart[0].mass[0] + 3 * apart[1].mass[0]) / 4)
    dense = compare([NamedInputs("", "x", pair[0])], [Selector("dense", 1, Dense())]).curves[0]
    assert (dense.density, dense.estimator) == ((1.0,), (0.0,))
    assert dense.mass[0] == pytest.approx(1)


def test_a_needle_is_counted_where_it_is_far() -> None:
    inputs = make_inputs(query_heads=1, kv_heads=1, queries=512, seed=1)
    some = [Selector("dense", 1, Dense()), Selector("near", 1, BlockSparse(0.01, sink=0, local=16))]
    some[1] = Selector("near", 1, BlockSparse(16, sink=0, local=16))
    found = compare([NamedInputs("", "x", inputs, needle=40)], some, tiles=[(16, 16)])
    assert found.curve("x", "dense", (16, 16)).found == (1.0,)
    assert found.curve("x", "near", (16, 16)).found == (0.0,)


def curve(density: tuple[float, ...], mass: tuple[float, ...]) -> Curve:
    return Curve("g", (64, 64), "f", density, density, mass, mass, (0.0,) * len(mass))


def test_a_curve_is_read_between_its_points() -> None:
    own = curve((0.4, 0.1), (0.8, 0.2))
    assert own.at(0.05) is None
    assert own.at(0.1) == pytest.approx(0.2)
    assert own.at(0.25) == pytest.approx(0.5)
    assert own.at(0.7) == pytest.approx(0.9), "dense closes it"


def test_a_knob_for_each_head_loses_nothing_to_one_for_all() -> None:
    some = sale_selectors(shares=(0.3, 0.5, 0.8), thresholds=(0.5, 0.05), widths=())
    result = compare(planted_inputs(512, seed=2), some)
    for group in result.groups:
        for family in ("sale", "block_sparse", "vertical_slash"):
            uniform, own = result.curve(group, family), result.curve(group, f"{family}, per head")
            for density, mass in zip(own.density, own.mass, strict=True):
                assert mass >= (uniform.at(density) or 0) - 1e-6


def test_an_old_curve_is_read_at_no_work() -> None:
    own = curve((0.4, 0.1), (0.8, 0.2))
    assert own.at(0.2, axis="work") is None
    assert own.at(0.2, "error") is None


def test_work_and_error_are_read_between_points_too() -> None:
    own = dataclasses.replace(curve((0.1, 0.4), (0.2, 0.8)), estimator=(0.1, 0.2), work=(0.2, 0.6), error=(0.9, 0.5))
    assert own.at(0.1, axis="work") is None
    assert own.at(0.4, axis="work") == pytest.approx(0.5)
    assert own.at(0.9, axis="work") == pytest.approx(0.9), "all tiles, and the work of finding them, close it"
    assert own.at(1.2, axis="work") == pytest.approx(1)
    assert own.at(0.25, "error") == pytest.approx(0.7)
    assert own.at(1.0, "error") == 0


def test_a_knob_is_found_for_a_density() -> None:
    own = dataclasses.replace(curve((0.1, 0.5, 0.2), (0.2, 0.8, 0.5)), knob=(0.02, 0.4, 0.06))
    result = SelectorResult((own,))
    assert result.knob_at("g", "f", 0.1) == 0.02
    assert result.knob_at("g", "f", 0.15) == pytest.approx(0.04)
    assert result.knob_at("g", "f", 0.35) == pytest.approx(0.23)
    assert result.knob_at("g", "f", 0.5, (64, 64)) == 0.4
    for density in (0.09, 0.51):
        with pytest.raises(ValueError, match=r"f has densities of 0\.1 to 0\.5 on 'g', and 0\.\d+ is not"):
            result.knob_at("g", "f", density)
    whole = dataclasses.replace(own, knob=(16, 256, 32))
    assert whole.knob_at(0.35) == 144
    assert isinstance(whole.knob_at(0.36), int)
    small = dataclasses.replace(own, knob=(0.9, 1e-6, 1e-4))
    assert small.knob_at(0.49) == pytest.approx(1e-6 + (1e-4 - 1e-6) / 30, rel=1e-3)


# Patterns that lists of blocks do not tell all of


@dataclasses.dataclass(frozen=True)
class Halves:
    """The even blocks of a pattern's lists as one part, and the odd ones as another; all else is the pattern's own."""

    pattern: Pattern
    in_parts: ClassVar[bool] = True

    def build_parts(self, inputs: AttentionInputs, grid: BlockGrid) -> tuple[Part, ...]:
        mask = self.pattern.build_index(inputs, grid).to_mask()
        even = torch.arange(grid.key_blocks) % 2 == 0
        return tuple(Part(inputs, BlockIndex.from_mask(grid, mask & own)) for own in (even, ~even))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pattern, name)


@pytest.mark.parametrize("every", [1, 3])
def test_parts_come_to_what_one_list_comes_to(every: int) -> None:
    """Kept mass, its low quantile, density and work, of the same blocks by the other way."""
    inputs = make_inputs(query_heads=4, kv_heads=2, queries=200, seed=6, softcap=8.0)
    pattern = BlockSparse(0.4, sink=16, local=16)
    some = [Selector("one list", 1, pattern), Selector("parts", 1, Halves(pattern)), Selector("dense", 1, Dense())]
    given = NamedInputs("a", "g", inputs, needle=9)
    one, parts, dense = compare([given], some, tiles=[(16, 16)], every=every, errors=True).curves
    for name in ("mass", "density", "work", "error"):
        assert getattr(parts, name)[0] == pytest.approx(getattr(one, name)[0], abs=1e-5), name
    assert parts.low_mass[0] == pytest.approx(one.low_mass[0], abs=0.03)  # a rounding may take it over a bin's edge
    assert 0.2 < one.density[0] < 0.7
    assert one.found is not None
    assert parts.found is None, "no list names the tile of the needle"
    assert dense.error == (pytest.approx(0, abs=1e-6),)


def test_what_a_kernel_skips_counts_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(query_heads=2, kv_heads=1, queries=128, seed=7)
    whole = compare([NamedInputs("a", "g", inputs)], [Selector("f", 1, Halves(Dense()))], tiles=[(16, 16)]).curves[0]
    assert (whole.density, whole.work) == ((1.0,), (1.0,))
    real = measured_selectors.attend

    def skipping(parts: Any, **options: Any) -> Any:
        found = real(parts, **options)
        return SimpleNamespace(output=found.output, lse=found.lse - math.log(2), skipped=torch.tensor([[800, 2400]]))

    monkeypatch.setattr(measured_selectors, "attend", skipping)
    some = compare([NamedInputs("a", "g", inputs)], [Selector("f", 1, Halves(Dense()))], tiles=[(16, 16)]).curves[0]
    pairs = 128 * 129 / 2
    assert some.density[0] == pytest.approx(1 - (800 + 2400) / 2 / (2 * pairs))
    assert some.work[0] == pytest.approx(some.density[0])
    assert some.mass[0] == pytest.approx(0.5, abs=1e-6)


def test_errors_are_those_of_the_definition() -> None:
    inputs = make_inputs(
        query_heads=4, kv_heads=2, queries=150, value_dim=24, seed=8, sinks=torch.tensor([1.0, 0, 2, 3])
    )
    pattern = BlockSparse(0.3, sink=16, local=16)
    given = [NamedInputs("a", "g", inputs)]
    (found,) = compare(given, [Selector("f", 1, pattern)], tiles=[(16, 32)], errors=True).curves
    index = pattern.build_index(inputs, BlockGrid.of(inputs, 16, 32))
    own, exact = (reference_attention(inputs, each).output[0] for each in (index, None))
    errors = [float((own[h] - exact[h]).pow(2).sum().sqrt() / exact[h].pow(2).sum().sqrt()) for h in range(4)]
    assert found.error == (pytest.approx(sum(errors) / 4, rel=1e-5),)
    assert compare(given, [Selector("f", 1, pattern)]).curves[0].error is None
    with pytest.raises(ValueError, match="values"):
        output_error(AttentionOutput(None, torch.zeros(1, 4, 150)), AttentionOutput(None, torch.zeros(1, 4, 150)))


def test_work_is_tiles_and_finding_them() -> None:
    inputs = make_inputs(queries=160, seed=9)
    some = [Selector("block_sparse", 1, BlockSparse(0.3, sink=16, local=16)), Selector("a_shape", 1, AShape(16, 32))]
    found = compare([NamedInputs("", "g", inputs)], some, tiles=[(16, 16)], per_head={}).curves
    for own, chosen in zip(found, some, strict=True):
        index = chosen.pattern.build_index(inputs, BlockGrid.of(inputs, 16, 16))
        tiles = int(index.count.sum()) / (4 * 55)
        assert own.work[0] == pytest.approx(tiles + own.estimator[0])
    assert own.estimator == (0.0,)


# Tiles, times, and the table of methods


def test_what_a_tile_is_refused_by_is_named_and_left_out() -> None:
    inputs = NamedInputs("", "g", make_inputs(queries=160))
    chosen = method_selectors(["vertical_slash", "block_sparse"])
    result = compare([inputs, inputs], chosen, tiles=[(32, 16)], per_head={})
    assert [each.family for each in result.curves] == ["block_sparse"]
    (refused,) = result.refused
    assert (refused.family, refused.tile, refused.group) == ("vertical_slash", (32, 16), "g")
    assert "square" in refused.reason
    assert "vertical_slash  32 x 16  1 / 1   vertical-slash needs square tiles" in result.text()
    for native in (False, True):  # a native tile does not stand in for the one that was asked for
        with pytest.raises(ValueError, match=r"no method can run on these tiles \(vertical_slash: .*another tile"):
            compare([inputs], chosen[:9], tiles=[(32, 16)], native=native)


def test_attention_that_overflows_is_refused_and_values_of_zero_are_no_error() -> None:
    inputs, chosen = make_inputs(queries=160), method_selectors(["block_sparse"])[:2]
    wild = dataclasses.replace(inputs, scale=3e38)
    with pytest.raises(ValueError, match="'wild' overflows"):
        compare([NamedInputs("wild", "g", wild)], chosen, per_head={})
    silent = dataclasses.replace(inputs, value=torch.zeros_like(inputs.value))
    (curve,) = compare([NamedInputs("", "g", silent)], chosen, per_head={}, errors=True).curves
    assert curve.error == (0.0, 0.0)


def test_each_method_also_meets_on_its_native_tile() -> None:
    some = [
        Selector("own", 1, BlockSparse(0.3, sink=16, local=16), native=(16, 32)),
        Selector("same", 1, BlockSparse(0.5, sink=16, local=16), native=(16, 16)),
        Selector("dense", 1, Dense(), kind="static"),
    ]
    result = compare([NamedInputs("", "g", make_inputs(queries=160))], some, tiles=[(16, 16)], native=True)
    assert {(each.family, each.tile, each.native) for each in result.curves} == {
        ("own", (16, 16), False), ("own", (16, 32), True), ("same", (16, 16), True), ("dense", (16, 16), False),
    }  # fmt: skip
    assert {(each.family, each.tile) for each in result.on("g")} == {
        ("own", (16, 32)), ("same", (16, 16)), ("dense", (16, 16))
    }  # fmt: skip
    assert "each method on its native tile" in result.text()
    alone = compare([NamedInputs("", "g", make_inputs(queries=160))], some, tiles=[(16, 16)])
    assert len(alone.curves) == 3
    assert "native" not in alone.text()


def test_times_are_those_of_the_settings_nearest_to_the_densities() -> None:
    some = [Selector("f", share, BlockSparse(share, sink=16, local=16)) for share in (0.2, 0.4, 0.9)]
    some += [Selector("parts", 1, Halves(BlockSparse(0.3, sink=16, local=16))), Selector("dense", 1, Dense())]
    inputs = NamedInputs("", "g", make_inputs(queries=256))
    result = compare([inputs, inputs], some, tiles=[(16, 16)], time_at=(0.85, 0.42), repeats=1)
    assert [(each.family, each.knob) for each in result.times] == [("f", 0.4), ("f", 0.9), ("parts", 1)]
    for each in result.times:
        assert min(each.find, each.attend, each.dense, each.kernel) > 0
        assert each.total == each.find + each.attend
    assert "find / dense" in result.text()
    with pytest.raises(ValueError, match="density"):
        compare([inputs], some, time_at=(1.5,))


def test_every_method_with_a_knob_is_swept() -> None:
    chosen = method_selectors()
    swept = {name for name, row in METHODS.items() if row.knob}
    assert {each.family for each in chosen} == swept | {"dense"}
    for name in swept:
        row = METHODS[name]
        mine = [each for each in chosen if each.family == name]
        assert tuple(each.knob for each in mine) == row.knobs
        assert {(each.kind, each.native) for each in mine} == {(row.kind, row.native)}
        assert all(each.pattern == row.at(each.knob) for each in mine)
    assert method_settings(chosen)["a_shape"] == {"knob": "window", "fixed": {"sink": 64}}
    assert [each.family for each in method_selectors(["dense"])] == ["dense"]
    for names in (["no_such"], ["sale", "sale"], ["minference"], []):
        with pytest.raises(ValueError, match="choose from dense, a_shape"):
            method_selectors(names)


def test_options_of_a_sweep_stay_what_they_are() -> None:
    name = "snapkv:unit=token:probe=16"
    chosen = method_selectors(["snapkv", name])
    mine = [each for each in chosen if each.family == name]
    assert [each.pattern for each in mine] == [snapkv(keep=each.knob, unit="token", probe=16) for each in mine]
    assert method_settings(chosen)[name] == {"knob": "keep", "fixed": {"unit": "token", "probe": 16}}
    around = [each for each in method_selectors(["cached:inner=a_shape"]) if each.family == "cached:inner=a_shape"]
    assert [each.pattern.inner.window for each in around] == [each.knob for each in around]
    assert {each.pattern.inner.sink for each in around} == {64}, "what goes with that knob"
    two = method_selectors(["union:inner=stem:other=a_shape:sink=32:window=256"])
    assert {each.pattern.other for each in two} == {AShape(32, 256)}
    for wrong, said in (
        ("snapkv:keep=0.2", "which is what the sweep changes"), ("snapkv:unti=token", "no option 'unti'"),
        ("snapkv:unit", "name=value"), ("dense:keep=1", "no option 'keep'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            method_selectors([wrong])


def test_methods_set_to_a_density_are_parsed_as_they_are_printed() -> None:
    chosen = method_selectors(["a_shape", "block_sparse", "random", "gna:sink=0"])
    found = compare([NamedInputs("", "g", make_inputs(query_heads=2, queries=1024))], chosen, per_head={})
    result = dataclasses.replace(found, settings={"methods": method_settings(chosen)})
    specs = result.specs_at("g", 0.4)
    assert list(specs) == ["a_shape", "block_sparse", "random", "gna:sink=0"]
    for name, spec in specs.items():
        assert isinstance(spec, MethodSpec)
        again = MethodSpec.parse(spec.label)
        assert again == spec
        pattern = resolve_method(again.name, **again.options)
        (own,) = compare([NamedInputs("", "g", make_inputs(query_heads=2, queries=1024))], [Selector(name, 1, pattern)],
                         per_head={}).curves  # fmt: skip
        assert own.density[0] == pytest.approx(0.4, abs=0.03)
    assert isinstance(result.specs_at("g", 0.01)["random"], str)


# What must be shown of SALE


@pytest.fixture(scope="module")
def planted() -> SelectorResult:
    some = sale_selectors(shares=(0.2, 0.3, 0.5), thresholds=(0.9, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.005), widths=())
    return compare(planted_inputs(2048, seed=5), some, bound=0.02)


def gaps(result: SelectorResult, density: float) -> list[float]:
    """Kept mass with exact logits less that with 4 bits at a density, where both can be so sparse, by group."""
    found = []
    for group in result.groups:
        for family in ("sale", "sale by threshold"):
            own, exact = (result.curve(group, name).at(density) for name in (family, f"{family} exact"))
            found += [] if own is None or exact is None else [exact - own]
    return found


def test_four_bits_keep_what_exact_logits_keep(planted: SelectorResult) -> None:
    """Heads together. On one of 32 rows a single tile counts, for rounded logits as often as against them."""
    for density in (0.27, 0.3, 0.4, 0.5, 0.6, 0.8):
        found = gaps(planted, density)
        assert len(found) >= 10
        assert abs(sum(found) / len(found)) <= 0.005
        assert max(found) <= 0.015


def test_a_needle_is_found_where_mean_pooling_misses_it(planted: SelectorResult) -> None:
    for group in ("planted: needle", "planted: needle with outliers"):
        sale, mean = planted.curve(group, "sale by threshold"), planted.curve(group, "block_sparse")
        assert sale.knob[0] == 0.9
        assert sale.found is not None
        assert sale.found[0] > 0.99
        assert (mean.at(sale.density[0], "found") or 0) < 0.4
        assert sale.mass[0] > (mean.at(sale.density[0]) or 1) + 0.4


def test_nothing_is_lost_beyond_the_bound(planted: SelectorResult) -> None:
    assert set(planted.bounds) == set(planted.groups)
    assert all(each.lost == 0 and each.certain <= each.above <= each.tiles for each in planted.bounds.values())
    assert sum(each.certain for each in planted.bounds.values()) > 50
    assert sum(each.missed for each in planted.bounds.values()) > 0, "rounding does lose some within the bound"


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from(["token", "tile"]),
    threshold=st.sampled_from([0.9, 0.3, 0.05, 0.005]),
    spread=st.sampled_from([0.3, 1.0, 4.0]),
    queries=st.integers(40, 130),
    softcap=st.sampled_from([None, 5.0]),
    head_dim=st.sampled_from([5, 16]),
)
def test_what_the_bound_promises_is_kept(
    seed: int, bits: int, group: str, threshold: float, spread: float, queries: int, softcap: float | None,
    head_dim: int,
) -> None:  # fmt: skip
    inputs = make_inputs(
        query_heads=2, kv_heads=1, queries=queries, head_dim=head_dim, dtype=torch.float64, seed=seed, softcap=softcap,
        scale=spread,
    )  # fmt: skip
    pattern = Sale(threshold=threshold, bits=bits, group=group, **SMALL)
    for grid in (BlockGrid.of(inputs, 16, 16), BlockGrid.of(inputs, 32, 16)):
        found = count_bound(inputs, pattern, grid)
        assert found.lost == 0
        assert found.certain <= found.above <= found.tiles


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 4, 8]), level=st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_error_of_a_product_is_within_its_bound(seed: int, bits: int, level: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 1, n, 12, generator=draw, dtype=torch.float64) * level for n in (9, 14))
    key[..., 3] += 30 * level
    means = token_means(query, None), token_means(key, None)
    codes = [quantize(each, mean, bits) for each, mean in zip((query, key), means, strict=True)]
    shares = torch.arange(14)[None] // 5
    codes[1] = quantize(key, means[1], bits, group=shares)
    real = [each.unpacked()[..., :12].double() * each.scale[..., None] for each in codes]
    error = (real[0] @ real[1].mT - (query - means[0][:, :, None]) @ (key - means[1][:, :, None]).mT).abs()
    bound = torch.einsum("bhqc,bhkc->bhqk", *logit_errors(*codes))
    assert (error <= bound * (1 + 1e-9) + 1e-12 * level**2).all()


def test_the_bound_is_reached() -> None:
    """Vectors half a step off in every channel, the same way: a tighter bound would be wrong."""
    codes = torch.tensor([7.0, 3, 3, 3, 3, 3, 3, 3])
    vector = codes + torch.tensor([0.0, *[0.4999] * 7])
    rounded = quantize(vector[None, None, None].double(), torch.zeros(1, 1, 8), 4)
    assert rounded.unpacked()[0, 0, 0].tolist() == codes.tolist()
    error = float((vector.double() @ vector.double()) - codes @ codes)
    bound = float(torch.einsum("bhqc,bhkc->bhqk", *logit_errors(rounded, rounded)))
    assert error <= bound < 1.4 * error  # the largest channel is exact, and the bound does not know


# Refusals


def test_the_bound_refuses_what_it_does_not_cover() -> None:
    inputs = make_inputs(queries=96)
    grid = BlockGrid.of(inputs, 64, 64)
    for pattern in (Sale(keep=0.5), Sale(threshold=0.1, bits=16)):
        with pytest.raises(ValueError, match="name a threshold"):
            count_bound(inputs, pattern, grid)
    padded = make_inputs(batch=2, queries=96)
    with pytest.raises(ValueError, match="one whole prompt"):
        count_bound(padded, Sale(threshold=0.1), BlockGrid.of(padded, 64, 64))
    spoilt = make_inputs(queries=96)
    spoilt.key[0, 0, 3, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        count_bound(spoilt, Sale(threshold=0.1), BlockGrid.of(spoilt, 64, 64))
    exact = LowBit(torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1), 16, 8)
    with pytest.raises(ValueError, match="no rounding error"):
        logit_errors(exact, exact)


def test_comparisons_that_cannot_be_are_refused(tmp_path: Path) -> None:
    inputs = NamedInputs("", "x", make_inputs(queries=64))
    dense = Selector("dense", 1, Dense())
    for some in ([], [dense, dense]):
        with pytest.raises(ValueError, match="families and knobs"):
            compare([inputs], some)
    with pytest.raises(ValueError, match="must stand before"):
        compare([inputs], [Selector("a", 1, Dense(), like="dense"), dense])
    with pytest.raises(ValueError, match="nothing to compare on"):
        compare([], [dense])
    result = compare([inputs], [dense])
    with pytest.raises(KeyError, match="no curve"):
        result.curve("x", "no_such")
    with pytest.raises(ValueError, match="no group"):
        draw_selectors(result, ["no_such"])
    with pytest.raises(ValueError, match=r"ends in \.png"):
        write_selectors(result, tmp_path / "picture.pdf")
    for text in ("[]", '{"schema": "other"}', json.dumps({"schema": "sparseprefill-selectors-1", "curves": [{}]})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="make it again"):
            SelectorResult.load(tmp_path / "bad.json")


# The model inside, and the command


def test_a_model_is_looked_at_under_dense_attention() -> None:
    model, _ = load_model()
    ids = torch.randint(3, 99, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    found = list(model_inputs(model, [ProfilePrompt("p", ids)]))
    assert [each.name for each in found] == [f"p layer {n}" for n in range(model.config.num_hidden_layers)]
    assert {each.group for each in found} == {"model, 160 tokens"}
    seen: list[AttentionInputs] = []

    class Sparse:
        """Looks at the same, but keeps less: from the second layer on, inputs differ."""

        def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> object:
            seen.append(inputs)
            return BlockSparse(0.1, sink=0, local=16).build_index(inputs, grid)

    with patch_model(model, Sparse(), min_length=0, observe=False), torch.no_grad():
        seen.clear()
        model.base_model(input_ids=torch.tensor([ids]))
    torch.testing.assert_close(found[0].inputs.key, seen[0].key)
    assert not torch.allclose(found[1].inputs.key, seen[1].key)
    with pytest.raises(ValueError, match="window"):
        list(model_inputs(model, [ProfilePrompt("p", ids * 1000)]))


def test_the_command_within_sale(tmp_path: Path) -> None:
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    done = CliRunner().invoke(
        main, ["compare", "--sale", "--lengths", "512", "--planted", "0", "--no-tiles", "--densities", "0.9", "--out",
               str(out), "--png", str(png)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = SelectorResult.load(out)
    assert result.groups == ("model, 512 tokens",)
    assert result.settings["lengths"] == [512]
    assert result.provenance["model"]["name"] == "needle_model"
    assert result.bounds["model, 512 tokens"].lost == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    shown = re.search(r"^block_sparse  +([\d.]+)", done.stdout, flags=re.MULTILINE)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(result.curve("model, 512 tokens", "block_sparse").at(0.9) or 0, abs=1e-3)


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, words)])


def test_the_command_on_made_up_heads(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run("--only-planted", "--planted", 512, "--methods", "dense,block_sparse,random", "--densities", "0.6,0.75",
               "--works", "0.6,0.8", "--tile", "32x32", "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    result = SelectorResult.load(out)
    assert len(result.groups) == 14
    assert (result.tile, result.measure) == ((32, 32), "mass")
    assert {each.tile for each in result.curves} == {(32, 32), (64, 64)}
    assert result.settings["methods"]["block_sparse"] == {"knob": "keep", "fixed": {}}
    assert (result.settings["planted"], result.settings["measure"]) == (512, "mass")
    for title in (
        "planted: moving, tiles of 32 x 32: kept mass at a density",
        "planted: moving, each method on its native tile",
        "ranks at densities of 0.6, 0.75, tiles of 32 x 32",
        "ranking at equal density (0.6, 0.75), tiles of 32 x 32, all groups",
        "ranking at equal work, finding the blocks included (0.6, 0.8), tiles of 32 x 32, all groups",
        "ranking at equal density (0.6, 0.75), each method on its native tile, all groups",
    ):
        assert title in done.output
    assert "random +" in done.output
    assert "the groups of models" not in done.output
    at = (result.settings["densities"], result.settings["works"])
    assert at == ([0.6, 0.75], [0.6, 0.8])
    assert result.text(*at) in done.output, "the file says what the tables said"


def test_the_command_on_a_capture(tmp_path: Path) -> None:
    heads = [make_inputs(query_heads=2, kv_heads=1, queries=600, seed=seed) for seed in (1, 2)]
    pack, out = tmp_path / "pack.safetensors", tmp_path / "out.json"
    save_capture([NamedInputs(f"layer {n}", "tiny, 600 tokens", each) for n, each in enumerate(heads)], pack,
                 model={"model": {"name": "tiny"}}, prompts={"source": "made up"})  # fmt: skip
    done = run("--capture", pack, "--planted", 0, "--methods", "block_sparse,vertical_slash,random", "--no-native",
               "--densities", "0.5", "--works", "0.6", "--knobs-at", "0.5", "--time", "--repeats", 1, "--measure",
               "error", "--out", out, "--png", tmp_path / "out.png", "--markdown")  # fmt: skip
    assert done.exit_code == 0, done.output
    result = SelectorResult.load(out)
    assert (result.groups, result.measure) == (("tiny, 600 tokens",), "error")
    own = compare([NamedInputs("", "g", each) for each in heads], method_selectors(["block_sparse"])).curves[0]
    assert result.curve("tiny, 600 tokens", "block_sparse").mass == pytest.approx(own.mass, abs=1e-4)
    assert result.settings["captures"] == [
        {"file": "pack.safetensors", "model": {"name": "tiny"}, "prompts": {"source": "made up"}}
    ]
    assert "model" not in result.provenance
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    lines = re.findall(r"^--method (\S+)$", done.output, flags=re.MULTILINE)
    specs = result.specs_at("tiny, 600 tokens", 0.5).values()
    assert lines == [spec.label for spec in specs if isinstance(spec, MethodSpec)]
    assert lines, "one at least reaches that density"
    assert re.search(r"^\| tiny, 600 tokens \| block_sparse ", done.output, flags=re.MULTILINE)
    assert "| mean error of the output |" in done.output
    assert {each.family for each in result.times} == {"block_sparse", "vertical_slash", "random"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only-planted", "--planted", "0"], "made-up heads alone"),
        (["--only-planted", "inside"], "made-up heads alone"),
        (["--only-planted", "--lengths", "512"], "--lengths is of prompts"),
        (["--only-planted", "--planted", "100"], "at least 512 tokens"),
        (["--densities", "1.5"], "density"),
        (["--densities", "x"], "0.05,0.1"),
        (["--knobs-at", "0"], "density"),
        (["--tile", "64x"], "64x64"),
        (["--tile", "0x64"], "64x64"),
        (["--methods", "no_such"], "choose from dense"),
        (["--methods", "vertical_slash", "--tile", "64x32", "--only-planted", "--no-native"], "name another tile"),
        (["--repeats", "3"], "--repeats is for --time"),
        (["--bound", "0.1"], "--bound is for --sale"),
        (["--no-tiles"], "--tiles is for --sale"),
        (["--sale", "--bound", "2"], "threshold"),
        (["--sale", "--methods", "sale"], "leave --methods out"),
        (["--sale", "--time"], "leave --time out"),
        (["--sale", "--works", "0.5"], "leave --works out"),
        (["--capture", "no_such.safetensors"], "no capture at"),
        (["--capture", __file__], "no safetensors file"),
        (["--out", "no_such_folder/x.json"], "no folder"),
        (["--lengths", "512", "--prompts", "builtin:no_such"], "no_such"),
        (["--png", "picture.jpg"], "ends in .png"),
        (["--quantile", "nan"], "quantile"),
        (["--device", "no_such"], "there is no device 'no_such' here"),
        (["--only-planted", "--dtype", "bfloat16"], "--dtype is of a model"),
        (["--capture", "x", "--planted", "0", "--seed", "2"], "--seed is of"),
        (["--prompts", "x.json", "--out", "x.json"], "named twice"),
    ],
)
def test_the_command_refuses(options: list[str], said: str) -> None:
    done = run(*options)
    assert done.exit_code in (1, 2)
    assert said in done.output
    assert "Traceback" not in done.output


def test_a_capture_is_not_written_over(tmp_path: Path) -> None:
    pack = tmp_path / "pack.safetensors"
    save_capture([NamedInputs("x", "g", make_inputs(queries=64))], pack)
    done = run("--capture", pack, "--out", pack)
    assert done.exit_code == 1
    assert "named twice" in done.output
    assert len(load_capture(pack)) == 1


# The figures in the repository


def test_the_recorded_run_shows_what_the_pages_say() -> None:
    assert [each for each in RESULT.groups if each.startswith("model")] == ["model, 8192 tokens", "model, 16384 tokens"]
    assert all(each.lost == 0 for each in RESULT.bounds.values())
    on_model = SelectorResult(tuple(each for each in RESULT.curves if each.group.startswith("model")))
    made_up = SelectorResult(tuple(each for each in RESULT.curves if not each.group.startswith("model")))
    for density in DENSITIES:
        assert all(abs(each) <= 0.005 for each in gaps(on_model, density))
        found = gaps(made_up, density)
        assert abs(sum(found)) <= 0.005 * max(1, len(found))


def test_the_tables_of_the_page_are_those_of_the_run() -> None:
    page = (ROOT / "docs/methods/sale.md").read_text(encoding="utf-8")
    figures = r"((?:\| [\d.-]+ )+)\|$"
    section = page.partition("### Against other selectors")[2].partition("\n### ")[0]
    rows = re.findall(rf"^\| `?([a-z_, ]+?)`? {figures}", section, flags=re.MULTILINE)
    assert len(rows) == 10
    for family, shown in rows:
        curves = [RESULT.curve(f"model, {tokens} tokens", family) for tokens in (8192, 16384)]
        expected = [number(each.at(density)) for each in curves for density in DENSITIES]
        assert shown.strip("| ").split(" | ") == expected, family
    section = page.partition("### Which tiles")[2].partition("\n## ")[0]
    cut = re.findall(rf"^\| (\d+) x (\d+), ([a-z_, ]+?) {figures}", section, flags=re.MULTILINE)
    assert len(cut) == 15
    for block_q, block_k, family, shown in cut:
        one = RESULT.curve("model, 8192 tokens", family, (int(block_q), int(block_k)))
        assert shown.strip("| ").split(" | ") == [number(one.at(density)) for density in DENSITIES]
    bound = RESULT.bounds["model, 16384 tokens"]
    told = f"{bound.above} tiles between sink and window have an exact score above it, {bound.certain} of them"
    assert told in " ".join(page.split())


def test_the_needles_of_sale_are_those_of_the_run() -> None:
    result = EvalResult.load(ROOT / "docs/results/needle_sale_cpu.json")
    label = "sale:keep=0.2"
    expected = []
    for length in (4096, 8192, 16384, 32768):
        found = [answer.values["found"] for item, answer in result.answers(label) if item.group["length"] == length]
        expected.append(f"{100 * sum(found) / len(found):.0f}%")
    costs = {(each.method, each.group.get("length")): each for each in summarise(result, resamples=10).costs}
    expected.append(number(costs[label, 16384].kept_mass))
    assert f"| `sale`, `keep=0.2` | {' | '.join(expected)} |" in (ROOT / "docs/which-method.md").read_text("utf-8")


def test_recorded_results_survive_a_round_trip(tmp_path: Path) -> None:
    (tmp_path / "again.json").write_text(json.dumps(RESULT.to_dict()))
    assert SelectorResult.load(tmp_path / "again.json") == RESULT
    assert RESULT.bounds["planted: needle"] == BoundCount(**RESULT.to_dict()["bounds"]["planted: needle"])
    assert planted_heads(512)[0].name == "diffuse"
