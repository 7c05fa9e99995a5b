"""The command that times: kernels, estimators, and what follows from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_bench_context import bench_context
from sparseprefill.cli_bench_first_token import first_token
from sparseprefill.cli_bench_growth import bench_growth, heads_of
from sparseprefill.cli_bench_slower import bench_never_slower
from sparseprefill.cli_evals import specs
from sparseprefill.cli_options import Numbers, clear_errors, progress_bar
from sparseprefill.cli_plan import bench_plan


def refuse_options(ctx: click.Context) -> None:
    """Options that stand before a command of a group would do nothing: refuse them."""
    for parameter in ctx.command.params:
        assert parameter.name is not None
        if ctx.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{parameter.opts[0]} stands before {ctx.invoked_subcommand!r}: put options after the command", ctx
            )


@click.group("bench", invoke_without_command=True)
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--lengths", type=Numbers(), help="Prompt lengths.  [default: 16k; for --calibrate by device]")
@click.option("--densities", help="Densities.  [default: 0.05,0.1,0.25,0.5,0.7; for --calibrate 0.1,0.2,0.5]")
@click.option("--against", default="flex,dense", help="Rivals of the kernel: flex, dense or both.")
@click.option(
    "--estimator", "estimators", multiple=True, metavar="METHOD[:OPTION=VALUE,...]",
    help="Instead time how this method finds its blocks, beside dense attention; may be repeated. `all`: every method.",
)  # fmt: skip
@click.option("--heads", help="Query/KV heads, not for --calibrate.  [default: 8/2; 32/8 on a GPU]")
@click.option("--ttft", type=Numbers(), help="Also time the model inside at these lengths.")
@click.option("--calibrate", is_flag=True, help="Instead measure when sparse pays, for layers like those of --model.")
@click.option(
    "--method", "methods", multiple=True, metavar="METHOD[:OPTION=VALUE,...]",
    help="For --calibrate: measure this method's finding of blocks too; may be repeated.  "
    "[default: vertical_slash, block_sparse and the default method]",
)  # fmt: skip
@click.option("--model", help="For --ttft, --calibrate: hub name or folder.  [default: the model inside]")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="For --calibrate.  [default: auto]"
)
@click.option("--trust-remote-code", is_flag=True, help="For --ttft, --calibrate: run code that comes with the model.")
@click.option("--density", type=float, help="For --ttft: budget of the methods.  [default: 0.2]")
@click.option("--repeats", default=5, help="Timed runs; medians are reported.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path),
    help="Write the cells as JSON; for --calibrate: the calibration file, if not the one that is read by default.",
)  # fmt: skip
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
@click.pass_context
def bench(
    ctx: click.Context, device: str | None, lengths: tuple[int, ...] | None, densities: str | None, against: str,
    estimators: tuple[str, ...], heads: str | None, ttft: tuple[int, ...] | None, calibrate: bool,
    methods: tuple[str, ...], model: str | None, dtype: str | None, trust_remote_code: bool, density: float | None,
    repeats: int, out: Path | None, markdown: bool,
) -> None:  # fmt: skip
    """Time the kernel against dense attention and FlexAttention on the same masks, correctness first.

    With --calibrate: time whole sparse calls against dense attention, fit the cost model that decides between them, and
    keep it in this machine's calibration file, which patch_model reads.

    With --estimator: time how methods find their blocks, as a share of dense attention, scores and results checked.

    Each command below times something else, and has options of its own.
    """
    if ctx.invoked_subcommand is not None:
        refuse_options(ctx)
        return
    from dataclasses import asdict

    import torch

    from sparseprefill.evals import bench as benches
    from sparseprefill.evals.loading import load_model, provenance
    from sparseprefill.files import check_folder, write_text

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with clear_errors():
        wanted = [
            float(part) for part in (densities or ("0.1,0.2,0.5" if calibrate else "0.05,0.1,0.25,0.5,0.7")).split(",")
        ]
        if estimators and (calibrate or ttft or densities or density is not None or model or dtype):
            raise ValueError(
                "--estimator goes with --lengths, --heads, --repeats, --device, --out and --markdown alone"
            )
        if methods and not calibrate:
            raise ValueError("--method is for --calibrate; --estimator times how a method finds its blocks")
        if heads is not None and calibrate:
            raise ValueError("--heads is not for --calibrate, which takes those of the model")
        if ctx.get_parameter_source("against") is click.core.ParameterSource.COMMANDLINE and (calibrate or estimators):
            raise ValueError("--against goes with the kernel, not with --calibrate or --estimator")
        if estimators:
            _time_estimators(device, estimators, lengths, heads, repeats, out, markdown)
            return
        if calibrate:
            if ttft or density is not None:
                raise ValueError("--calibrate measures attention alone: leave out --ttft and --density")
            _calibrate(
                device, lengths, wanted, methods, model, dtype or "auto", trust_remote_code, repeats, out, markdown
            )
            return
        if dtype is not None:
            raise ValueError("--dtype is for --calibrate: the kernel is timed in bfloat16 and float32")
        if out is not None:
            check_folder(out)  # before minutes of measuring
        rivals = tuple(part.strip() for part in against.split(","))
        reason = benches.why_no_flex(device) if "flex" in rivals else None
        if reason:
            click.echo(f"without FlexAttention: {reason}")
        query_heads, kv_heads = heads_of(heads or ("8/2" if device == "cpu" else "32/8"))
        example = benches.random_inputs(query_heads, kv_heads, 128, 64, torch.float32, device, 0)
        for name, why in benches.kernels_for(example)[1].items():
            click.echo(f"without {name}: {why}")
        lengths = lengths or (16384,)
        with progress_bar(4 * len(lengths) * len(wanted), "kernel") as progress:
            cells = benches.kernel_cells(
                device=device, lengths=lengths, densities=wanted, query_heads=query_heads, kv_heads=kv_heads,
                against=rivals, repeats=repeats, progress=progress,
            )  # fmt: skip
        click.echo(benches.kernel_table(cells, against=rivals, markdown=markdown))
        written: dict[str, Any] = {"provenance": provenance(), "kernel": [asdict(cell) for cell in cells]}
        if ttft:
            loaded, _ = load_model(model, device=device, trust_remote_code=trust_remote_code)
            chosen = specs((), 0.2 if density is None else density)
            with progress_bar(len(ttft) * len(chosen), "ttft") as progress:
                times = benches.first_token_times(loaded, chosen, ttft, repeats=repeats, progress=progress)
            click.echo(benches.first_token_table(times, markdown=markdown))
            written["ttft"] = [asdict(each) for each in times]
            written["provenance"] = provenance(loaded)
        if out is not None:
            write_text(out, json.dumps(written, indent=1) + "\n")
            click.echo(f"wrote {out}")


bench.add_command(first_token)


def _time_estimators(
    device: str, methods: tuple[str, ...], lengths: tuple[int, ...] | None, heads: str | None, repeats: int,
    out: Path | None, markdown: bool,
) -> None:  # fmt: skip
    """Measure, print, write."""
    from dataclasses import asdict

    from sparseprefill.evals import overhead
    from sparseprefill.evals.loading import provenance
    from sparseprefill.files import check_folder, write_text

    if out is not None:
        check_folder(out)
    query_heads, kv_heads = heads_of(heads or ("8/2" if device == "cpu" else "32/8"))
    lengths = lengths or (16384,)
    with progress_bar(2 * len(lengths), "estimators") as progress:
        cells = overhead.overhead_cells(
            methods, device=device, lengths=lengths, query_heads=query_heads, kv_heads=kv_heads,
            repeats=repeats, progress=progress,
        )  # fmt: skip
    click.echo(overhead.overhead_table(cells, markdown=markdown))
    if out is not None:
        written = {"provenance": provenance(), "heads": f"{query_heads}/{kv_heads}", "cells": list(map(asdict, cells))}
        write_text(out, json.dumps(written, indent=1) + "\n")
        click.echo(f"wrote {out}")


def _calibrate(
    device: str, lengths: tuple[int, ...] | None, densities: list[float], methods: tuple[str, ...], model: str | None,
    dtype: str, trust_remote_code: bool, repeats: int, out: Path | None, markdown: bool,
) -> None:  # fmt: skip
    """Measure, print, write."""
    from sparseprefill.calibration import check_writable, default_path, save_entries
    from sparseprefill.doctor import skeleton
    from sparseprefill.evals import calibrate as calibrating
    from sparseprefill.evals.loading import resolve_dtype

    check_writable(out)  # before a minute of measuring
    bare = skeleton(model, dtype=resolve_dtype(model, dtype, device), trust_remote_code=trust_remote_code)
    shapes = calibrating.shapes_of(bare)
    with progress_bar(len(shapes) * len(lengths or calibrating.lengths_for(device)), "calibrate") as progress:
        found = calibrating.calibrate(
            shapes, device=device, dtype=bare.dtype, lengths=lengths, densities=densities,
            methods=methods or calibrating.SELECTORS, repeats=repeats, progress=progress,
        )  # fmt: skip
    for each in found:
        click.echo(calibrating.calibration_report(each, markdown=markdown))
    calibrating.check_fits(found)
    path = save_entries((each.entry for each in found), out)
    click.echo(f"wrote {path}")
    if path != default_path():
        click.echo(f"patch_model(model, calibration={str(path)!r}) reads it; without a name it reads {default_path()}")


bench.add_command(bench_never_slower)
bench.add_command(bench_growth)
bench.add_command(bench_context)
bench.add_command(bench_plan)
