"""The command line: each command parses, calls one function and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sparseprefill import __version__
from sparseprefill.cli_evals import specs
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


@main.command()
@click.option("--model", help="Hub name or folder; default: the model that ships inside.")
@click.option("--method", "chosen", multiple=True, metavar="NAME[:OPTION=VALUE,...]", help="Methods, may be repeated.")
@click.option("--density", default=0.2, help="Budget of methods given without options.")
@click.option("--lengths", type=Numbers(), default="4k,8k,16k,32k", help="Prompt lengths in tokens.")
@click.option("--depths", default=5, help="Needles a prompt, one in each of as many equal parts.")
@click.option("--samples", default=5, help="Prompts a length.")
@click.option("--generated", type=int, help="Of these, how many also use generate.  [default: all]")
@click.option(
    "--haystack", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text to hide needles in."
)
@click.option("--last-rows-dense", default=0, help="Dense last queries for every method.")
@click.option("--seed", default=1, help="Of the prompts.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("needle"), help="Folder of the results."
)
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
def needle(
    model: str | None, chosen: tuple[str, ...], density: float, lengths: tuple[int, ...], depths: int, samples: int,
    generated: int | None, haystack: Path | None, last_rows_dense: int, seed: int, dtype: str, device: str | None,
    trust_remote_code: bool, out: Path, markdown: bool,
) -> None:  # fmt: skip
    """Find needles all along long prompts, with dense attention and with the chosen methods.

    Writes OUT/needle.json (every cell) and OUT/needle.png (depth by length).
    """
    from sparseprefill.evals.loading import load_model

    with clear_errors():
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        _run_needle(
            loaded, tokenizer, specs(chosen, density), lengths, depths, samples, generated, haystack, last_rows_dense,
            seed, out, "needle", markdown,
        )  # fmt: skip


def _run_needle(
    model: Any, tokenizer: Any, specs: list[Any], lengths: tuple[int, ...], depths: int, samples: int,
    generated: int | None, haystack: Path | None, last_rows_dense: int, seed: int, out: Path, name: str, markdown: bool,
) -> None:  # fmt: skip
    from sparseprefill.evals.needle import passes, plot_heat_map, run_needle
    from sparseprefill.files import read_text
    from sparseprefill.prompts import text_sentences

    sentences = None if haystack is None else text_sentences(read_text(haystack, "haystack"))
    out.mkdir(parents=True, exist_ok=True)
    total = passes(len(specs), len(lengths), samples, samples if generated is None else generated)
    with progress_bar(total, name) as progress:
        result = run_needle(
            model, tokenizer, specs, lengths, needles=depths, samples=samples, generated=generated, seed=seed,
            haystack=sentences, last_rows_dense=last_rows_dense, progress=progress,
        )  # fmt: skip
    result.save(out / f"{name}.json")
    plot_heat_map(result, out / f"{name}.png")
    click.echo(result.table(markdown=markdown))
    click.echo(f"wrote {out / name}.json and {out / name}.png")


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
    from sparseprefill.evals.loading import load_model

    with clear_errors():
        model, tokenizer = load_model()
        click.echo(f"Needles in prompts of {', '.join(map(str, lengths))} tokens, every method at density {density}:")
        chosen = specs((), density)
        _run_needle(model, tokenizer, chosen, lengths, 5, samples, 0, None, 0, 1, out, "needle", False)
        click.echo("\nThe same with the last 64 rows dense in every method, on one prompt a length, not timed:")
        _run_needle(model, tokenizer, chosen, lengths, 5, 1, 0, None, 64, 1, out, "last_rows_dense", False)


if __name__ == "__main__":
    main()
