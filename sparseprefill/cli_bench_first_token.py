"""The command that times whole models: time to first token, peak memory, and where the time goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_evals import specs
from sparseprefill.cli_options import Numbers, clear_errors, progress_bar

METHODS = ("stem:keep=0.12,decay=0.7,sink=64,local=128", "block_sparse:keep=0.2")
"""Where none is named: the default method, and one that is simpler, at about a fifth of the pairs."""


@click.command("first-token")
@click.option("--model", help="Hub name or folder.  [default: the model inside]")
@click.option("--shape", help="Instead random weights of a shape: llama-3.1-8b, qwen3-8b or inside.")
@click.option("--layers", type=click.IntRange(1), help="Run the first so many layers alone; the others are reckoned.")
@click.option("--lengths", type=Numbers(), default="4k,16k", help="Prompt lengths.")
@click.option(
    "--method", "chosen", multiple=True, metavar="NAME[:OPTION=VALUE,...]",
    help="May be repeated; dense always runs.  [default: stem and block_sparse at a fifth of the pairs]",
)  # fmt: skip
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Timed turns; medians are reported.")
@click.option(
    "--dense-limit", type=Numbers(), help="Above, dense is timed on one layer.  [default: 256k on a GPU, none on a CPU]"
)
@click.option("--mlp-chunk", type=click.IntRange(1), help="MLPs compute so many tokens at a time.")
@click.option("--offload-cache", is_flag=True, help="Keys and values wait in the CPU's memory; on a GPU.")
@click.option("--memory/--no-memory", default=True, help="On a CPU, a process for each method and length.")
@click.option("--profile", "profiled", is_flag=True, help="Also say which part of the model takes the time.")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the model.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write everything as JSON.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@click.pass_context
def first_token(
    ctx: click.Context, model: str | None, shape: str | None, layers: int | None, lengths: tuple[int, ...],
    chosen: tuple[str, ...], device: str | None, dtype: str, repeats: int, dense_limit: tuple[int, ...] | None,
    mlp_chunk: int | None, offload_cache: bool, memory: bool, profiled: bool, trust_remote_code: bool,
    out: Path | None, markdown: bool,
) -> None:  # fmt: skip
    """Time whole prefills, dense and with methods in turns, up to the first token; and what they hold at most.

    The first call of each, which compiles and allocates, is reported apart. What runs out of memory is named with the
    longest prompt that should fit, the rest goes on, and the exit status is 1.
    """
    from dataclasses import asdict

    import torch

    from sparseprefill.evals import first_token as benches
    from sparseprefill.evals.loading import provenance
    from sparseprefill.evals.prefill_parts import parts_table, prefill_parts
    from sparseprefill.files import check_folder, write_text

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with clear_errors():
        if out is not None:
            check_folder(out)  # before minutes of measuring
        if dense_limit is not None and len(dense_limit) != 1:
            raise ValueError("--dense-limit is one number of tokens")
        if not memory and device != "cpu":
            raise ValueError("--no-memory is for the CPU: on a GPU memory is read from the runs that are timed")
        limit = dense_limit[0] if dense_limit else benches.DENSE_LIMIT if device.startswith("cuda") else None
        methods = specs(chosen or METHODS, None)
        setup = benches.ModelSetup(
            model, shape, layers, device, dtype, trust_remote_code, mlp_chunk, offload_cache
        )  # fmt: skip
        loaded, whole = setup.made()
        own_process = benches.resolved_setup(setup)

        def peak(spec: Any, length: int) -> int | None:
            return benches.own_process_peak(own_process, spec, length)

        written: dict[str, Any] = {
            "kind": "first-token", "provenance": provenance(loaded),
            "settings": {**asdict(setup), "whole_layers": whole, "repeats": repeats, "dense_limit": limit},
            "first_token": [], "out_of_memory": [], "parts": [],
        }  # fmt: skip
        cells: list[Any] = []
        lost: list[Any] = []

        def save() -> None:
            written["first_token"], written["out_of_memory"] = list(map(asdict, cells)), list(map(asdict, lost))
            if out is not None:
                write_text(out, json.dumps(written, indent=1) + "\n")

        try:
            with progress_bar(len(lengths) * len(methods) * (2 + repeats), "first token") as progress:
                for found in benches.first_tokens(
                    loaded, methods, lengths, whole_layers=whole, repeats=repeats, dense_limit=limit,
                    peak=peak if memory and device == "cpu" else None, offload_cache=offload_cache, progress=progress,
                ):  # fmt: skip
                    if isinstance(found, benches.OutOfMemory):
                        lost.append(found)
                    else:
                        cells.append(found)
                    save()
        finally:
            click.echo(benches.first_token_table(cells, markdown=markdown))
        fitting = [n for n in lengths if all(n < each.length for each in lost)]
        if profiled and fitting:
            with progress_bar(len(fitting) * len(methods) * (1 + repeats), "parts") as progress:
                parts = prefill_parts(
                    loaded, methods, fitting, prefill=benches.seconds_of(loaded, offload_cache), repeats=repeats,
                    progress=progress,
                )  # fmt: skip
            click.echo(parts_table(parts, markdown=markdown))
            if setup.layers is not None:
                click.echo(f"parts are of the {setup.layers} layers that ran")
            written["parts"] = [asdict(each) for each in parts]
            save()
        if out is not None:
            click.echo(f"wrote {out}")
    for each in lost:
        click.echo(str(each), err=True)
    if lost:
        ctx.exit(1)
