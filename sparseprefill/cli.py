"""The command line: each command parses, calls one function and prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from sparseprefill import __version__
from sparseprefill.cli_bench import bench
from sparseprefill.cli_build import build_cpu
from sparseprefill.cli_capture import capture
from sparseprefill.cli_compare import compare
from sparseprefill.cli_context import context
from sparseprefill.cli_evals import DEMO, along, fidelity, longbench, needle, report, ruler
from sparseprefill.cli_options import Numbers, clear_errors
from sparseprefill.cli_plan import plan
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

for each in (needle, ruler, longbench, fidelity, capture, compare, report, profile, bench, build_cpu, context, plan):
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
    from sparseprefill.patterns.names import parse_options

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
