"""`sparseprefill bench growth`: how time grows with the length of the prompt at fixed budgets."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sparseprefill.cli_options import Numbers, clear_errors, progress_bar


@click.command("growth")
@click.option("--lengths", type=Numbers(), help="Prompt lengths.  [default: 16k,24k,32k,48k,64k]")
@click.option(
    "--method", "methods", multiple=True, metavar="METHOD[:OPTION=VALUE,...]",
    help="Time this method instead of those that come by themselves; may be repeated.",
)  # fmt: skip
@click.option("--heads", default="2/1", show_default=True, help="Query/KV heads.")
@click.option("--head-dim", default=64, show_default=True, help="Of queries, keys and values.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Timed runs; medians are reported.")
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw both axes logarithmic, as PNG.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
def bench_growth(
    lengths: tuple[int, ...] | None, methods: tuple[str, ...], heads: str, head_dim: int, dtype: str, repeats: int,
    device: str | None, plot: Path | None, out: Path | None, markdown: bool,
) -> None:  # fmt: skip
    """Time finding and attending at growing lengths, with budgets that are fixed numbers of tokens.

    Dense attention grows with the square of the tokens. What is printed is how each method does: the slope of the line
    through the logarithms of times and lengths, of finding the blocks, of attending, and of both.
    """
    from dataclasses import asdict

    import torch

    from sparseprefill.evals import growth as eval_
    from sparseprefill.evals.loading import provenance
    from sparseprefill.files import check_folder, write_text

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with clear_errors():
        for path in (plot, out):
            if path is not None:
                check_folder(path)
        query_heads, kv_heads = heads_of(heads)
        lengths = lengths or eval_.LENGTHS
        with progress_bar(len(set(lengths)), "growth") as progress:
            cells = eval_.growth(
                methods or (*eval_.LINEAR, *eval_.QUADRATIC), device=device, lengths=lengths, query_heads=query_heads,
                kv_heads=kv_heads, head_dim=head_dim, dtype=getattr(torch, dtype), repeats=repeats, progress=progress,
            )  # fmt: skip
        click.echo(eval_.growth_table(cells, markdown=markdown))
        if out is not None:
            slopes = {
                method: {what: asdict(slope) for what, slope in each.items()}
                for method, each in eval_.slopes(cells).items()
            }
            written = {
                "provenance": provenance(), "heads": heads, "head_dim": head_dim, "dtype": dtype,
                "cells": list(map(asdict, cells)), "slopes": slopes,
            }  # fmt: skip
            write_text(out, json.dumps(written, indent=1) + "\n")
            click.echo(f"wrote {out}")
        if plot is not None:
            eval_.growth_plot(cells, plot)
            click.echo(f"wrote {plot}")


def heads_of(text: str) -> tuple[int, int]:
    """Query and KV heads of `32/8`. Raises ValueError for anything else."""
    query_heads, slash, kv_heads = text.partition("/")
    if not slash or not query_heads.isdigit() or not kv_heads.isdigit() or not int(query_heads) * int(kv_heads):
        raise ValueError(f"--heads is query/KV heads, such as 32/8, got {text!r:.80}")
    return int(query_heads), int(kv_heads)
