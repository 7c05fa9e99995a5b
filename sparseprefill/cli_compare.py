"""The command that compares methods: what each keeps of the attention at what density and at what work."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_options import Numbers, Shares, Tile, clear_errors, progress_bar, refuse_input

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("model", required=False)
@click.option("--capture", "captures", type=_FILE, multiple=True,
              help="What `sparseprefill capture` wrote, instead of a model or beside it; may be repeated.")  # fmt: skip
@click.option("--lengths", type=Numbers(), help="Prompts in tokens.  [default: 8k,16k]")
@click.option("--samples", type=click.IntRange(1), help="Prompts a length.  [default: 1]")
@click.option("--prompts", metavar="SPEC", help="As `sparseprefill profile` takes them.  [default: builtin:needle]")
@click.option("--seed", type=int, help="Of built-in prompts and made-up heads.  [default: 1]")
@click.option("--planted", type=click.IntRange(0), default=4096, show_default=True,
              help="Tokens of made-up heads; 0: none.")  # fmt: skip
@click.option("--only-planted", is_flag=True, help="Made-up heads alone, no model.")
@click.option("--methods", metavar="NAME[,NAME...]",
              help="Some methods; NAME:option=value sets one that is not swept.  "
              "[default: all that have a knob, and dense]")  # fmt: skip
@click.option("--tile", type=Tile(), help="Queries and keys of the tile that all methods meet on.  [default: 64x64]")
@click.option("--native/--no-native", default=None,
              help="Each method also on the tile of its paper.  [default: native]")  # fmt: skip
@click.option("--measure", type=click.Choice(["mass", "error"]),
              help="Kept mass, or how far outputs are from those of dense attention.  [default: mass]")  # fmt: skip
@click.option("--densities", type=Shares(), default="0.05,0.1,0.2,0.3", show_default=True,
              help="At which the tables compare.")  # fmt: skip
@click.option("--works", type=Shares(), help="At which methods rank, tile work and finding the blocks together.  "
              "[default: 0.2,0.3,0.5,0.7]")  # fmt: skip
@click.option(
    "--knobs-at", type=float, metavar="DENSITY", help="Print each method as `--method` takes it, set to this."
)
@click.option("--time", "timed", is_flag=True, help="Also time each method near the densities, beside dense attention.")
@click.option("--repeats", type=click.IntRange(1), help="For --time: timed calls; medians are reported.  [default: 5]")
@click.option("--quantile", type=float, default=0.1, show_default=True,
              help="Share of the queries that may keep less than the low mass.")  # fmt: skip
@click.option("--every", type=click.IntRange(1), default=1, show_default=True,
              help="Look at each n-th row of tiles only, for long prompts.")  # fmt: skip
@click.option("--sale", is_flag=True,
              help="Instead SALE within itself: budgets, thresholds, widths of codes, knobs of each head.")  # fmt: skip
@click.option("--tiles/--no-tiles", default=None,
              help="For --sale: also tiles of 64 x 32 and 128 x 64, on short prompts.  [default: tiles]")  # fmt: skip
@click.option("--bound", type=float, help="For --sale: threshold at which tiles are held to the bound of the rounding "
              "error.  [default: 0.02]")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--out", type=_FILE, help="Write the curves as JSON.")
@click.option("--png", type=_FILE, help="Write the curves as a picture; with --time also NAME_totals.png.")
@click.option("--by-kind", is_flag=True, help="For --png: also a picture for each kind of method, NAME_kind.png.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
def compare(
    captures: tuple[Path, ...], densities: tuple[float, ...], works: tuple[float, ...] | None, knobs_at: float | None,
    out: Path | None, png: Path | None, by_kind: bool, markdown: bool, **given: Any,
) -> None:  # fmt: skip
    """Compare what methods keep of the attention at equal density and equal work, each over a sweep of its knob.

    On the layers of MODEL (default: the model that ships inside) under dense attention, on captures of them, and on
    made-up heads. docs/compare.md says how the tables are read.
    """
    from sparseprefill.estimators.selection import check_share
    from sparseprefill.evals.report_figures import check_picture
    from sparseprefill.evals.selector_result import WORKS
    from sparseprefill.evals.selectors_figures import write_selectors
    from sparseprefill.files import check_folder, write_text

    with clear_errors():
        if knobs_at is not None:
            check_share("a density", knobs_at)
        for file in (out, png):
            if file is not None:
                refuse_input(file, [*captures, *([prompts] if (prompts := given["prompts"]) else [])])
                check_folder(file)  # before minutes of measuring
        if by_kind and png is None:
            raise ValueError("--by-kind goes with --png, the picture of all methods")
        if png is not None:
            check_picture(png)
            refuse_input(png, [] if out is None else [out])
        asked = _Asked(captures=captures, densities=densities, **given)
        asked.check(knobs_at, works)
        asked.check_inputs()
        found = (asked.sale_result() if asked.sale else asked.result()).rounded()
        at = {"densities": list(densities), "works": list(works or WORKS)}  # of the tables, which the file can make
        found = dataclasses.replace(found, settings=found.settings | at)
        click.echo(found.text(densities, works or WORKS, markdown=markdown))
        if knobs_at is not None:
            _say_knobs(found, knobs_at)
        if out is not None:
            lines = json.dumps(found.to_dict(), separators=(",", ":"), allow_nan=False).replace(
                '{"group"', '\n{"group"'
            )
            write_text(out, lines + "\n")
            click.echo(f"wrote {out}")
        if png is not None:
            for picture in write_selectors(found, png, by_kind=by_kind):
                click.echo(f"wrote {picture}")


@dataclass(frozen=True)
class _Asked:
    """What the command was asked to compare, and on what."""

    model: str | None
    captures: tuple[Path, ...]
    lengths: tuple[int, ...] | None
    samples: int | None
    prompts: str | None
    seed: int | None
    planted: int
    only_planted: bool
    methods: str | None
    tile: tuple[int, int] | None
    native: bool | None
    measure: str | None
    densities: tuple[float, ...]
    timed: bool
    repeats: int | None
    quantile: float
    every: int
    sale: bool
    tiles: bool | None
    bound: float | None
    dtype: str
    device: str | None
    trust_remote_code: bool
    loaded: dict[str, Any] = field(default_factory=dict)  # what was loaded on the way

    @property
    def with_model(self) -> bool:
        """A model runs: one that is named, or the one inside where nothing else is."""
        return not self.only_planted and (self.model is not None or not self.captures)

    def check(self, knobs_at: float | None, works: Any) -> None:
        """Refuse options that would be ignored."""
        if self.only_planted and (self.model is not None or self.captures or not self.planted):
            raise ValueError(
                "--only-planted is for made-up heads alone: leave out the model, captures and --planted 0"
            )  # fmt: skip
        if not self.with_model:
            for name in ("lengths", "samples", "prompts"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} is of prompts of a model, and none runs: name MODEL, or leave it out")
            for name, given in (("dtype", self.dtype != "auto"), ("trust-remote-code", self.trust_remote_code)):
                if given:
                    raise ValueError(f"--{name} is of a model, and none runs: name MODEL, or leave it out")
            if self.seed is not None and not self.planted:
                raise ValueError("--seed is of built-in prompts and made-up heads, and there are none: leave it out")
        if self.repeats is not None and not self.timed:
            raise ValueError("--repeats is for --time: add that, or leave --repeats out")
        if self.sale:
            for name, value in (
                ("methods", self.methods), ("tile", self.tile), ("native", self.native), ("measure", self.measure),
                ("time", self.timed or None), ("knobs-at", knobs_at), ("works", works),
            ):  # fmt: skip
                if value is not None:
                    raise ValueError(f"--sale compares SALE within itself: leave --{name} out")
        for name, value in (("tiles", self.tiles), ("bound", self.bound)):
            if value is not None and not self.sale:
                raise ValueError(f"--{name} is for --sale: add that, or leave it out")

    def check_inputs(self) -> None:
        """Refuse what cannot be measured or measured on, before minutes of measuring."""
        from sparseprefill.evals.loading import check_device
        from sparseprefill.evals.planted_heads import planted_heads
        from sparseprefill.patterns.scores import check_quantile

        check_quantile(self.quantile)
        check_device(self._device())
        self._captures()
        if self.planted:
            planted_heads(self.planted)

    def result(self) -> Any:
        """Every method over its sweep."""
        from sparseprefill.evals.selectors import compare, method_selectors, method_settings

        names = None if self.methods is None else [each.strip() for each in self.methods.split(",")]
        chosen = method_selectors(names)
        tile = self.tile or (64, 64)
        native = self.native is not False
        prompts = self._prompts()
        with progress_bar(self._count(prompts), "compare") as bar:
            found = compare(
                self._inputs(prompts), chosen, tiles=(tile,), native=native, quantile=self.quantile, every=self.every,
                errors=self.measure == "error", per_head={}, time_at=self.densities if self.timed else (),
                repeats=self.repeats or 5, progress=bar,
            )  # fmt: skip
        more = {
            "methods": method_settings(chosen), "tile": list(tile), "native": native, "measure": self.measure or "mass"
        }  # fmt: skip
        return self._finished(found, more)

    def sale_result(self) -> Any:
        """SALE within itself: widths and tiles are told apart on the shortest prompts, captures and made-up heads."""
        from sparseprefill.estimators.selection import check_threshold
        from sparseprefill.evals.selectors import TILES, compare, sale_selectors

        bound = 0.02 if self.bound is None else self.bound
        check_threshold(bound)
        shared: dict[str, Any] = {"quantile": self.quantile, "every": self.every, "bound": bound}
        prompts = self._prompts()
        lengths, samples = self._lengths(), self.samples or 1
        first = [each for n, each in enumerate(prompts) if lengths[n // samples] == min(lengths)]
        others = [each for each in prompts if each not in first]  # these would take many times as long
        tiles = TILES if self.tiles is not False else TILES[:1]
        with progress_bar(self._count(prompts), "compare") as bar:
            found = compare(self._inputs(first), sale_selectors(), tiles=tiles, progress=bar, **shared)
            if others:
                rest = self._of_model(others)
                found += compare(rest, sale_selectors(widths=()), progress=bar, **shared)
        return self._finished(found, {"bound": bound})

    def _finished(self, found: Any, more: dict[str, Any]) -> Any:
        from sparseprefill.evals.loading import provenance

        settings: dict[str, Any] = {
            "planted": self.planted, "seed": 1 if self.seed is None else self.seed, "quantile": self.quantile,
            "every": self.every, **more, "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        made = self.loaded.get("prompts")
        if made is not None:
            settings |= {"prompts": made.source, "lengths": list(self._lengths()), "samples": self.samples or 1}
        if self.captures:
            settings["captures"] = [
                {"file": each.path.name, "model": each.model.get("model"), "prompts": each.prompts}
                for each in self._captures()
            ]
        return dataclasses.replace(found, settings=settings, provenance=provenance(self.loaded.get("model")))

    def _lengths(self) -> tuple[int, ...]:
        return self.lengths or (8192, 16384)

    def _captures(self) -> list[Any]:
        from sparseprefill.evals.captures import load_capture

        if "captures" not in self.loaded:
            self.loaded["captures"] = [load_capture(path) for path in self.captures]
        found: list[Any] = self.loaded["captures"]
        return found

    def _prompts(self) -> list[Any]:
        """Of the model, which is loaded for them."""
        from sparseprefill.evals.loading import load_model
        from sparseprefill.evals.profile_prompts import profile_prompts

        if not self.with_model:
            return []
        loaded, tokenizer = load_model(
            self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )
        spec = self.prompts or "builtin:needle"
        made = profile_prompts(spec, tokenizer, self._lengths(), self.samples or 1, 0, seed=self.seed)
        for note in made.notes:
            click.echo(f"note: {note}")
        self.loaded.update(model=loaded, prompts=made)
        return list(made.tuning)

    def _of_model(self, prompts: list[Any]) -> Iterator[Any]:
        from sparseprefill.evals.compared_inputs import model_inputs

        return model_inputs(self.loaded["model"], prompts) if prompts else iter(())

    def _inputs(self, prompts: list[Any]) -> Iterator[Any]:
        """All that methods meet: layers on these prompts, captures, made-up heads."""
        from sparseprefill.evals.compared_inputs import moved, planted_inputs

        yield from self._of_model(prompts)
        device = self._device()
        for each in self._captures():
            yield from (moved(entry, device) for entry in each)
        if self.planted:
            heads = planted_inputs(self.planted, 1 if self.seed is None else self.seed)
            yield from (moved(head, device) for head in heads)

    def _count(self, prompts: list[Any]) -> int:
        """How many of them there are, on all prompts."""
        from sparseprefill.evals.planted_heads import KINDS
        from sparseprefill.huggingface_modules import text_config

        layers = int(text_config(self.loaded["model"]).num_hidden_layers) if prompts else 0
        return len(prompts) * layers + sum(map(len, self._captures())) + (2 * len(KINDS) if self.planted else 0)

    def _device(self) -> str:
        """Where captures and made-up heads are looked at: with the model, or where it would be."""
        import torch

        model = self.loaded.get("model")
        if model is not None:
            return str(model.device)
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _say_knobs(found: Any, density: float) -> None:
    """A line for each method, ready to be pasted behind `sparseprefill needle`."""
    from sparseprefill.evals.compared_inputs import of_models

    for group in of_models(found.groups) or found.groups:
        click.echo(f"\n{group}, set to a density of {density:g}:")
        for spec in found.specs_at(group, density).values():
            click.echo(f"# {spec}" if isinstance(spec, str) else f"--method {spec.label}")
