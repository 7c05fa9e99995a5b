"""The command that reckons what methods will compute on a model, from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_options import Numbers, Tile, clear_errors, progress_bar


@click.command("plan")
@click.argument("model", required=False)
@click.option("--model", "named", help="The same as MODEL.")
@click.option("--length", "lengths", type=Numbers(), default="8k,32k,128k", show_default=True, help="Tokens.")
@click.option("--method", "methods", metavar="NAME[:OPTION=VALUE,...]", multiple=True,
              help="Methods, may be repeated.  [default: the default method]")  # fmt: skip
@click.option("--device", default="cpu", show_default=True,
              help="cpu or cuda, or a GPU that need not be here: A100, H100 SXM, H200, B200.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--calibration", type=click.Path(dir_okay=False, path_type=Path),
              help="What `sparseprefill bench --calibrate` wrote, for times.")  # fmt: skip
@click.option("--tile", type=Tile(), default="64x64", show_default=True, help="Queries and keys of a tile.")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a page.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
def plan(
    model: str | None, named: str | None, lengths: tuple[int, ...], methods: tuple[str, ...], device: str, dtype: str,
    calibration: Path | None, tile: tuple[int, int], trust_remote_code: bool, as_json: bool, markdown: bool,
) -> None:  # fmt: skip
    """Say what methods will compute on MODEL: tiles, shares, break-even, memory, bounds. Nothing is run.

    MODEL is a hub name, a folder or a config.json (default: the model that ships inside); no weights are read.
    """
    from sparseprefill.patterns.names import parse_options
    from sparseprefill.plan import plan as reckon

    with clear_errors():
        if model is not None and named is not None and model != named:
            raise ValueError(f"two models were named: {model!r} and {named!r}")
        if as_json and markdown:
            raise ValueError("--json and --markdown are two ways to print: choose one")
        asked: list[tuple[str, str | None, dict[str, Any]]] = []
        for text in methods:
            name, _, options = text.partition(":")
            asked.append((text, name, parse_options(options)))
        found = reckon(
            model or named, lengths, asked or [("default", None, {})], device=device, dtype=dtype,
            calibration=calibration, trust_remote_code=trust_remote_code, block_q=tile[0], block_k=tile[1],
        )  # fmt: skip
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.text(markdown=markdown))


_CHECKED = (
    "a_shape:window=0.2", "local_stride", "block_sparse:keep=0.2", "stem:keep=0.12", "vertical_slash:density=0.2",
    "flashprefill",
)  # fmt: skip


@click.command("plan")
@click.option("--model", help="Hub name or folder.  [default: the model that ships inside]")
@click.option("--lengths", type=Numbers(), default="8k,16k,32k,64k", show_default=True, help="Tokens.")
@click.option("--method", "methods", metavar="NAME[:OPTION=VALUE,...]", multiple=True, default=_CHECKED,
              show_default=True, help="Methods, may be repeated.")  # fmt: skip
@click.option("--calibration", type=click.Path(dir_okay=False, path_type=Path),
              help="What `sparseprefill bench --calibrate` wrote; without one only tiles are compared.")  # fmt: skip
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed calls; medians count.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
def bench_plan(
    model: str | None, lengths: tuple[int, ...], methods: tuple[str, ...], calibration: Path | None, repeats: int,
    out: Path | None, markdown: bool,
) -> None:  # fmt: skip
    """Compare `sparseprefill plan` with what is measured on this CPU: tiles, and times where there is a calibration.

    Queries and keys are random numbers of the model's shape, in float32. The exit status is 1 where tiles are not what
    was planned.
    """
    from dataclasses import asdict

    from sparseprefill.evals.loading import provenance
    from sparseprefill.files import check_folder, write_text
    from sparseprefill.patterns.names import parse_options
    from sparseprefill.plan_check import check_plan, check_table

    with clear_errors():
        if out is not None:
            check_folder(out)
        asked = []
        for text in methods:
            name, _, options = text.partition(":")
            asked.append((text, name, parse_options(options)))
        with progress_bar(2 * len(lengths) * len(asked), "calls") as progress:
            checks = check_plan(
                model, lengths, asked, calibration=calibration, repeats=repeats, progress=progress
            )  # fmt: skip
        click.echo(check_table(checks, markdown=markdown))
        if out is not None:
            written = {"provenance": provenance(), "repeats": repeats, "checks": list(map(asdict, checks))}
            write_text(out, json.dumps(written, indent=1) + "\n")
            click.echo(f"wrote {out}")
        if not all(each.holds for each in checks):
            raise ValueError("tiles are not what was planned, see the table")
