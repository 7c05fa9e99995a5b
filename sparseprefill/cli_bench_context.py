"""`sparseprefill bench context`: what context methods keep and cost, on the model inside and on made-up clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_options import Numbers, Shares, clear_errors, progress_bar

_OUT = click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
_MARKDOWN = click.option("--markdown", is_flag=True, help="Print Markdown tables.")
_MODEL = click.option("--model", help="Hub name or folder.  [default: the model that ships inside]")


@click.group("context")
def bench_context() -> None:
    """Measure methods for a fixed context: answers and times, nearest keys found, one level of clusters or two."""


@bench_context.command("questions")
@_MODEL
@click.option("--length", type=Numbers(), default="16k", show_default=True, help="Tokens of a context.")
@click.option("--contexts", type=click.IntRange(1), default=5, show_default=True)
@click.option("--questions", type=click.IntRange(1, 60), default=40, show_default=True, help="A context.")
@click.option("--shares", type=Shares(), default="0.15,0.05,0.02", show_default=True,
              help="Of the context's keys, sink and local window included.")  # fmt: skip
@click.option("--index", "indexes", multiple=True, default=("graph", "hnsw"), show_default=True,
              help="Of retrieval; may be given again.")  # fmt: skip
@click.option("--sink", default=16, show_default=True)
@click.option("--local", default=128, show_default=True)
@click.option("--seed", default=1, show_default=True, help="Of contexts and questions.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw losses against shares, as PNG.")
@_OUT
@_MARKDOWN
def questions(
    model: str | None, length: tuple[int, ...], contexts: int, questions: int, shares: tuple[float, ...],
    indexes: tuple[str, ...], sink: int, local: int, seed: int, plot: Path | None, out: Path | None,
    markdown: bool,
) -> None:  # fmt: skip
    """Ask many questions about long contexts, with each method, dense, and with keys chosen at random."""
    from dataclasses import asdict
    from functools import partial

    from sparseprefill.evals import context_questions as eval_
    from sparseprefill.evals.loading import load_model, provenance
    from sparseprefill.evals.report_figures import check_picture
    from sparseprefill.files import check_folder, write_text
    from sparseprefill.patterns.retrieval import Retrieval
    from sparseprefill.patterns.squeezed import Squeezed

    methods: list[tuple[str, Any, str]] = [
        ("squeezed", Squeezed, "tokens"), ("squeezed, in tiles", Squeezed, "tiles"),
        ("squeezed, two levels", partial(Squeezed, coarse=0.01), "tokens"),
        *((f"retrieval, {index}", partial(Retrieval, index=index), "tokens") for index in indexes),
        ("random", eval_.RandomKeys, "tokens"),
    ]  # fmt: skip
    with clear_errors():
        for path in (plot, out):
            if path is not None:
                check_folder(path)
        if plot is not None:
            check_picture(plot)
        loaded, tokenizer = load_model(model)
        with progress_bar(len(methods) * len(shares) * contexts, "contexts") as progress:
            cells, again = eval_.ask_all(
                loaded, tokenizer, methods, length=length[0], contexts=contexts, questions=questions, shares=shares,
                sink=sink, local=local, seed=seed, progress=progress,
            )  # fmt: skip
        click.echo(eval_.question_table(cells, again, markdown=markdown))
        if out is not None:
            written = {
                "provenance": provenance(loaded), "length": length[0], "contexts": contexts, "questions": questions,
                "sink": sink, "local": local, "seed": seed, "again": again, "cells": list(map(asdict, cells)),
            }  # fmt: skip
            write_text(out, json.dumps(written, indent=1) + "\n")
            click.echo(f"wrote {out}")
        if plot is not None:
            eval_.question_plot(cells, plot)
            click.echo(f"wrote {plot}")


@bench_context.command("recall")
@_MODEL
@click.option("--length", type=Numbers(), default="16k", show_default=True, help="Tokens of the context.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curves, as PNG.")
@_OUT
@_MARKDOWN
def recall(
    model: str | None, length: tuple[int, ...], plot: Path | None, out: Path | None, markdown: bool
) -> None:  # fmt: skip
    """Recall@100 of indexes of keys against the share of the keys that they scan, with questions' queries.

    And how far these queries are from the keys, next to how far keys are from each other.
    """
    from dataclasses import asdict

    from sparseprefill.evals import context_recall as eval_
    from sparseprefill.evals.context_heads import question_heads
    from sparseprefill.evals.loading import load_model, provenance
    from sparseprefill.files import check_folder, write_text

    with clear_errors():
        for path in (plot, out):
            if path is not None:
                check_folder(path)
        loaded, tokenizer = load_model(model)
        heads = question_heads(loaded, tokenizer, length[0])
        with progress_bar(len(heads) * len(eval_.EFFORTS), "indexes") as progress:
            cells = eval_.recall_curves(heads, progress=progress)
        click.echo(eval_.recall_table(cells, markdown=markdown))
        click.echo()
        click.echo(eval_.scan_table(cells, markdown=markdown))
        click.echo()
        distances: list[eval_.HeadDistance] = []
        try:
            distances = eval_.query_distances(heads)
            click.echo(eval_.distance_table(distances, markdown=markdown))
        except ValueError as error:  # the recall stands without it
            click.echo(f"no distances: {error}")
        if out is not None:
            written = {
                "provenance": provenance(loaded), "length": length[0], "cells": list(map(asdict, cells)),
                "distances": list(map(asdict, distances)),
            }  # fmt: skip
            write_text(out, json.dumps(written, indent=1) + "\n")
            click.echo(f"wrote {out}")
        if plot is not None:
            eval_.recall_plot(cells, plot, 100)
            click.echo(f"wrote {plot}")


@bench_context.command("levels")
@click.option("--lengths", type=Numbers(), default="16k,64k,256k,1024k", show_default=True, help="Keys.")
@_OUT
@_MARKDOWN
def levels(lengths: tuple[int, ...], out: Path | None, markdown: bool) -> None:
    """Time a choice among clusters of one level and of two, on made-up clusters."""
    from dataclasses import asdict

    from sparseprefill.evals import context_levels as eval_
    from sparseprefill.evals.loading import provenance
    from sparseprefill.files import check_folder, write_text

    with clear_errors():
        if out is not None:
            check_folder(out)
        with progress_bar(len(lengths), "lengths") as progress:
            cells = eval_.level_times(lengths, progress=progress)
        click.echo(eval_.level_table(cells, markdown=markdown))
        if out is not None:
            written = {"provenance": provenance(), "cells": list(map(asdict, cells))}
            write_text(out, json.dumps(written, indent=1) + "\n")
            click.echo(f"wrote {out}")
