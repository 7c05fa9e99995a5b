"""The command that compares selectors: what each method keeps of the attention at what density."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_options import Numbers, clear_errors, progress_bar, refuse_input

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("model", required=False)
@click.option("--lengths", type=Numbers(), default="8k,16k", show_default=True, help="Prompts in tokens.")
@click.option("--samples", type=click.IntRange(1), default=1, help="Prompts a length.", show_default=True)
@click.option(
    "--prompts",
    default="builtin:needle",
    show_default=True,
    metavar="SPEC",
    help="As `sparseprefill profile` takes them.",
)
@click.option("--seed", type=int, help="Of built-in prompts and made-up heads.  [default: 1]")
@click.option("--planted", type=click.IntRange(0), default=4096, show_default=True,
              help="Tokens of made-up heads; 0: none.")  # fmt: skip
@click.option("--only-planted", is_flag=True, help="Made-up heads alone, no model.")
@click.option("--tiles/--no-tiles", default=True, help="Also tiles of 64 x 32 and 128 x 64, on the shortest prompts.")
@click.option("--densities", default="0.05,0.1,0.2,0.3", show_default=True, help="At which the tables compare.")
@click.option("--quantile", type=float, default=0.1, show_default=True,
              help="Share of the queries that may keep less than the low mass.")  # fmt: skip
@click.option("--every", type=click.IntRange(1), default=1, show_default=True,
              help="Look at each n-th row of tiles only, for long prompts.")  # fmt: skip
@click.option("--bound", type=float, default=0.02, show_default=True,
              help="Threshold at which tiles are held to the bound of the rounding error.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--out", type=_FILE, help="Write the curves as JSON.")
@click.option("--png", type=_FILE, help="Write the curves as a picture.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
def compare(
    model: str | None, lengths: tuple[int, ...], samples: int, prompts: str, seed: int | None, planted: int,
    only_planted: bool, tiles: bool, densities: str, quantile: float, every: int, bound: float, dtype: str,
    device: str | None, trust_remote_code: bool, out: Path | None, png: Path | None, markdown: bool,
) -> None:  # fmt: skip
    """Compare what methods keep of the attention at equal density, each over a sweep of its knob.

    On the layers of MODEL (default: the model that ships inside) under dense attention, and on made-up heads. Widths of
    SALE's codes are told apart on the shortest prompts and on made-up heads.
    """
    from itertools import chain

    from sparseprefill.estimators.selection import check_share, check_threshold
    from sparseprefill.evals.compared_inputs import model_inputs, planted_inputs
    from sparseprefill.evals.loading import load_model, provenance
    from sparseprefill.evals.planted_heads import KINDS
    from sparseprefill.evals.profile_prompts import profile_prompts
    from sparseprefill.evals.selectors import TILES, selectors
    from sparseprefill.evals.selectors import compare as compare_selectors
    from sparseprefill.evals.selectors_figures import write_selectors
    from sparseprefill.files import check_folder, write_text
    from sparseprefill.huggingface_modules import text_config

    with clear_errors():
        wanted = [float(part) for part in densities.split(",")]
        for density in wanted:
            check_share("a density", density)
        check_threshold(bound)
        for file in (out, png):
            if file is not None:
                check_folder(file)  # before minutes of measuring
        if out is not None and png is not None:
            refuse_input(png, [out])
        if only_planted and (model is not None or not planted):
            raise ValueError("--only-planted is for made-up heads alone: leave out the model, and --planted 0")
        number = 1 if seed is None else seed
        shared: dict[str, Any] = {"quantile": quantile, "every": every, "bound": bound}
        loaded: Any = None
        made: Any = None
        first: list[Any] = []
        others: list[Any] = []
        if not only_planted:
            loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            made = profile_prompts(prompts, tokenizer, lengths, samples, 0, seed=seed)
            # widths and tiles are told apart on the shortest prompts: the others would take many times as long
            first = [each for n, each in enumerate(made.tuning) if lengths[n // samples] == min(lengths)]
            others = [each for each in made.tuning if each not in first]
        layers = 0 if loaded is None else text_config(loaded).num_hidden_layers
        heads = planted_inputs(planted, number) if planted else ()
        with progress_bar((len(first) + len(others)) * layers + (2 * len(KINDS) if planted else 0), "compare") as bar:
            found = compare_selectors(
                chain(model_inputs(loaded, first) if first else (), heads), selectors(),
                tiles=TILES if tiles else TILES[:1], progress=bar, **shared,
            )  # fmt: skip
            if others:
                found += compare_selectors(model_inputs(loaded, others), selectors(widths=()), progress=bar, **shared)
        settings = {"planted": planted, "seed": number, **shared, "date": datetime.date.today().isoformat()}
        if made is not None:
            settings |= {"prompts": made.source, "lengths": list(lengths), "samples": samples}
        found = dataclasses.replace(found, settings=settings, provenance=provenance(loaded))
        click.echo(found.text(wanted, markdown=markdown))
        if out is not None:
            lines = json.dumps(found.to_dict(), separators=(",", ":")).replace('{"group"', '\n{"group"')
            write_text(out, lines + "\n")
            click.echo(f"wrote {out}")
        if png is not None:
            models = [each for each in found.groups if each.startswith("model")]
            write_selectors(found, png, models or None)
            click.echo(f"wrote {png}")
