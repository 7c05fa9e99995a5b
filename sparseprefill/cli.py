"""The command line: each command parses, calls one function and prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from sparseprefill import __version__
from sparseprefill.cli_evals import DEMO, along, fidelity, longbench, needle, report, ruler, specs
from sparseprefill.cli_options import Numbers, clear_errors, progress_bar


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


for each in (needle, ruler, longbench, fidelity, report):
    main.add_command(each)


@main.command()
@click.argument("model", required=False)
@click.option(
    "--method", "chosen", default="minference", metavar="NAME[:OPTION=VALUE,...]", help="The method to ask about."
)
@click.option("--impl", default="auto", help="auto, triton, cpu or reference.")
@click.option("--device", help="Where the model would run; default: a GPU if there is one.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a page.")
@click.pass_context
def doctor(
    ctx: click.Context, model: str | None, chosen: str, impl: str, device: str | None, dtype: str,
    trust_remote_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say which kernel each layer of MODEL would run and why not another, from which length on, on this machine.

    MODEL is a hub name or a folder (default: the model that ships inside); its weights are not read. The exit status
    is 1 where the model cannot be patched.
    """
    from sparseprefill.doctor import explain, skeleton
    from sparseprefill.prefill import parse_options

    name, _, options = chosen.partition(":")
    with clear_errors():
        bare = skeleton(model, dtype=dtype, trust_remote_code=trust_remote_code)
        found = explain(bare, name, device=device, impl=impl, **parse_options(options))
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    if found.refused:
        ctx.exit(1)


@main.command()
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--lengths", type=Numbers(), default="16k", help="Lengths of the kernel cells.")
@click.option("--densities", default="0.1,0.25,0.5", help="Densities of the kernel cells.")
@click.option("--ttft", type=Numbers(), default=None, help="Also time the model inside at these lengths.")
@click.option("--model", help="For --ttft: hub name or folder.")
@click.option("--trust-remote-code", is_flag=True, help="For --ttft: run code that comes with the model.")
@click.option("--density", default=0.2, help="For --ttft: budget of the methods.")
@click.option("--repeats", default=5, help="Timed runs; medians are reported.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the cells as JSON.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
def bench(
    device: str | None, lengths: tuple[int, ...], densities: str, ttft: tuple[int, ...] | None, model: str | None,
    trust_remote_code: bool, density: float, repeats: int, out: Path | None, markdown: bool,
) -> None:  # fmt: skip
    """Time the kernel against dense attention and FlexAttention on the same masks, correctness first."""
    from dataclasses import asdict

    import torch

    from sparseprefill.evals import bench as benches
    from sparseprefill.evals.loading import load_model, provenance
    from sparseprefill.files import check_folder, write_text

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with clear_errors():
        if out is not None:
            check_folder(out)  # before minutes of measuring
        reason = benches.why_no_flex(device)
        if reason:
            click.echo(f"without FlexAttention: {reason}")
        wanted = [float(part) for part in densities.split(",")]
        with progress_bar(4 * len(lengths) * len(wanted), "kernel") as progress:
            cells = benches.kernel_cells(
                device=device, lengths=lengths, densities=wanted, repeats=repeats, progress=progress
            )
        click.echo(benches.kernel_table(cells, markdown=markdown))
        written: dict[str, Any] = {"provenance": provenance(), "kernel": [asdict(cell) for cell in cells]}
        if ttft:
            loaded, _ = load_model(model, device=device, trust_remote_code=trust_remote_code)
            chosen = specs((), density)
            with progress_bar(len(ttft) * len(chosen), "ttft") as progress:
                times = benches.first_token_times(loaded, chosen, ttft, repeats=repeats, progress=progress)
            click.echo(benches.first_token_table(times, markdown=markdown))
            written["ttft"] = [asdict(each) for each in times]
            written["provenance"] = provenance(loaded)
        if out is not None:
            write_text(out, json.dumps(written, indent=1) + "\n")
            click.echo(f"wrote {out}")


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
