"""The command line: each command parses, calls one function and prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from sparseprefill import __version__
from sparseprefill.cli_build import build_cpu
from sparseprefill.cli_capture import capture
from sparseprefill.cli_compare import compare
from sparseprefill.cli_evals import DEMO, along, fidelity, longbench, needle, report, ruler, specs
from sparseprefill.cli_options import Numbers, clear_errors, progress_bar
from sparseprefill.cli_profile import profile


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="sparseprefill")
def main() -> None:
    """Training-free sparse attention for the prefill of long prompts."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
def methods(as_json: bool, markdown: bool) -> None:
    """List the methods, their options and what is known of them."""
    from sparseprefill.prefill import methods_table
    from sparseprefill.reports import table

    rows = methods_table()
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        click.echo(table(list(rows[0]), [list(row.values()) for row in rows], markdown=markdown))


_CALIBRATION = "What `bench --calibrate` wrote; default: where it writes by default, if that is there."

for each in (needle, ruler, longbench, fidelity, capture, compare, report, profile, build_cpu):
    main.add_command(each)


@main.command()
@click.argument("model", required=False)
@click.option(
    "--method",
    "chosen",
    metavar="NAME[:OPTION=VALUE,...]",
    help="The method to ask about; without one, the provisional default.",
)
@click.option("--impl", default="auto", help="auto, triton, cpu or reference.")
@click.option("--device", help="Where the model would run; default: a GPU if there is one.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--calibration", type=click.Path(dir_okay=False, path_type=Path), help=_CALIBRATION)
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a page.")
@click.pass_context
def doctor(
    ctx: click.Context, model: str | None, chosen: str | None, impl: str, device: str | None, dtype: str,
    calibration: Path | None, trust_remote_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say which kernel each layer of MODEL would run and why not another, from which length on, on this machine.

    MODEL is a hub name or a folder (default: the model that ships inside); its weights are not read. The exit status
    is 1 where the model cannot be patched.
    """
    import torch

    from sparseprefill.doctor import explain, skeleton
    from sparseprefill.evals.loading import resolve_dtype
    from sparseprefill.prefill import parse_options

    name, _, options = (chosen or "").partition(":")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with clear_errors():
        dtype = resolve_dtype(model, dtype, device)
        bare = skeleton(model, dtype=dtype, trust_remote_code=trust_remote_code)
        found = explain(bare, name or None, device=device, impl=impl, calibration=calibration, **parse_options(options))
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    if found.refused:
        ctx.exit(1)


@main.command()
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--lengths", type=Numbers(), help="Prompt lengths.  [default: 16k; for --calibrate by device]")
@click.option("--densities", help="Densities.  [default: 0.1,0.25,0.5; for --calibrate 0.1,0.2,0.5]")
@click.option(
    "--estimator", "estimators", multiple=True, metavar="METHOD[:OPTION=VALUE,...]",
    help="Instead time how this method finds its blocks, beside dense attention; may be repeated.",
)  # fmt: skip
@click.option("--heads", help="For --estimator: query/KV heads.  [default: 8/2; 32/8 on a GPU]")
@click.option("--ttft", type=Numbers(), help="Also time the model inside at these lengths.")
@click.option("--calibrate", is_flag=True, help="Instead measure when sparse pays, for layers like those of --model.")
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
def bench(
    device: str | None, lengths: tuple[int, ...] | None, densities: str | None, estimators: tuple[str, ...],
    heads: str | None, ttft: tuple[int, ...] | None, calibrate: bool, model: str | None, dtype: str | None,
    trust_remote_code: bool, density: float | None, repeats: int, out: Path | None, markdown: bool,
) -> None:  # fmt: skip
    """Time the kernel against dense attention and FlexAttention on the same masks, correctness first.

    With --calibrate: time whole sparse calls against dense attention, fit the cost model that decides between them, and
    keep it in this machine's calibration file, which patch_model reads.

    With --estimator: time how methods find their blocks, as a share of dense attention, scores and results checked.
    """
    from dataclasses import asdict

    import torch

    from sparseprefill.evals import bench as benches
    from sparseprefill.evals.loading import load_model, provenance
    from sparseprefill.files import check_folder, write_text

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with clear_errors():
        wanted = [float(part) for part in (densities or ("0.1,0.2,0.5" if calibrate else "0.1,0.25,0.5")).split(",")]
        if estimators and (calibrate or ttft or densities or density is not None or model or dtype):
            raise ValueError(
                "--estimator goes with --lengths, --heads, --repeats, --device, --out and --markdown alone"
            )
        if heads is not None and not estimators:
            raise ValueError("--heads is for --estimator")
        if estimators:
            _time_estimators(device, estimators, lengths, heads, repeats, out, markdown)
            return
        if calibrate:
            if ttft or density is not None:
                raise ValueError("--calibrate measures attention alone: leave out --ttft and --density")
            _calibrate(device, lengths, wanted, model, dtype or "auto", trust_remote_code, repeats, out, markdown)
            return
        if dtype is not None:
            raise ValueError("--dtype is for --calibrate: the kernel is timed in bfloat16 and float32")
        if out is not None:
            check_folder(out)  # before minutes of measuring
        reason = benches.why_no_flex(device)
        if reason:
            click.echo(f"without FlexAttention: {reason}")
        lengths = lengths or (16384,)
        with progress_bar(4 * len(lengths) * len(wanted), "kernel") as progress:
            cells = benches.kernel_cells(
                device=device, lengths=lengths, densities=wanted, repeats=repeats, progress=progress
            )
        click.echo(benches.kernel_table(cells, markdown=markdown))
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
    query_heads, slash, kv_heads = (heads or ("8/2" if device == "cpu" else "32/8")).partition("/")
    if not slash or not query_heads.isdigit() or not kv_heads.isdigit():
        raise ValueError(f"--heads is query/KV heads, such as 32/8, got {heads!r:.80}")
    lengths = lengths or (16384,)
    with progress_bar(2 * len(lengths), "estimators") as progress:
        cells = overhead.overhead_cells(
            methods, device=device, lengths=lengths, query_heads=int(query_heads), kv_heads=int(kv_heads),
            repeats=repeats, progress=progress,
        )  # fmt: skip
    click.echo(overhead.overhead_table(cells, markdown=markdown))
    if out is not None:
        written = {"provenance": provenance(), "heads": f"{query_heads}/{kv_heads}", "cells": list(map(asdict, cells))}
        write_text(out, json.dumps(written, indent=1) + "\n")
        click.echo(f"wrote {out}")


def _calibrate(
    device: str, lengths: tuple[int, ...] | None, densities: list[float], model: str | None, dtype: str,
    trust_remote_code: bool, repeats: int, out: Path | None, markdown: bool,
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
            shapes, device=device, dtype=bare.dtype, lengths=lengths, densities=densities, repeats=repeats,
            progress=progress,
        )  # fmt: skip
    for each in found:
        click.echo(calibrating.calibration_report(each, markdown=markdown))
    calibrating.check_fits(found)
    path = save_entries((each.entry for each in found), out)
    click.echo(f"wrote {path}")
    if path != default_path():
        click.echo(f"patch_model(model, calibration={str(path)!r}) reads it; without a name it reads {default_path()}")


@main.command()
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("demo"), help="Folder of the results."
)
@click.option("--lengths", type=Numbers(), default="4k,8k,16k,32k", help="Prompt lengths in tokens.")
@click.option("--density", default=0.2, help="Budget of every method.")
@click.option("--samples", default=2, help="Prompts a length.")
def demo(out: Path, lengths: tuple[int, ...], density: float, samples: int) -> None:
    """The whole walk on the model inside: needles found with dense and with sparse attention, and how fast."""
    with clear_errors():
        click.echo(f"Needles in prompts of {', '.join(map(str, lengths))} tokens, every method at density {density}:")
        along(replace(DEMO, out=out, density=density), lengths, samples)
        click.echo("\nThe same with the last 64 rows dense in every method, on one prompt a length, not timed:")
        along(replace(DEMO, out=out / "last_rows_dense", density=density, last_rows_dense=64), lengths, 1)


if __name__ == "__main__":
    main()
