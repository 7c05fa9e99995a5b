"""The command that keeps what a model's layers hand to attention, to compare methods on later and elsewhere."""

from __future__ import annotations

from pathlib import Path

import click

from sparseprefill.cli_options import Numbers, Places, clear_errors, progress_bar, refuse_input


@click.command()
@click.argument("model", required=False)
@click.option("--lengths", type=Numbers(), default="8k", show_default=True, help="Prompts in tokens.")
@click.option("--samples", type=click.IntRange(1), default=1, show_default=True, help="Prompts a length.")
@click.option("--prompts", default="builtin:needle", show_default=True, metavar="SPEC",
              help="As `sparseprefill profile` takes them.")  # fmt: skip
@click.option("--seed", type=int, help="Of built-in prompts.  [default: 1]")
@click.option("--layers", type=Places(), help="Their numbers, such as 0,2,5-7.  [default: all that see a whole prompt]")
@click.option("--heads", type=Places(), help="Query heads, of each layer; whole groups keep their keys together.")
@click.option("--store", type=click.Choice(["bfloat16", "float16", "float32"]),
              help="Dtype in the file.  [default: that of the model]")  # fmt: skip
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The capture to write.")
@click.option("--again", is_flag=True, help="Replace a capture that is there.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="Of the model.")  # fmt: skip
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
def capture(
    model: str | None, lengths: tuple[int, ...], samples: int, prompts: str, seed: int | None,
    layers: tuple[int, ...] | None, heads: tuple[int, ...] | None, store: str | None, out: Path, again: bool,
    dtype: str, device: str | None, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Keep queries, keys and values of layers of MODEL, under dense attention, in one safetensors file.

    MODEL is a hub name or a folder (default: the model that ships inside). `sparseprefill compare --capture FILE` meets
    every method with them, without the model.
    """
    from sparseprefill.evals.captures import save_capture, stored, total_bytes
    from sparseprefill.evals.compared_inputs import model_inputs
    from sparseprefill.evals.loading import load_model, provenance
    from sparseprefill.evals.profile_prompts import profile_prompts
    from sparseprefill.files import check_folder

    with clear_errors():
        refuse_input(out, [prompts])
        check_folder(out)  # before minutes of work
        if out.exists() and not again:
            raise ValueError(f"{out} is there: --again replaces it")
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        made = profile_prompts(prompts, tokenizer, lengths, samples, 0, seed=seed)
        for note in made.notes:
            click.echo(f"note: {note}")
        where = provenance(loaded)
        entries = []
        with progress_bar(len(made.tuning), "prompts") as bar:
            for prompt in made.tuning:
                found = model_inputs(loaded, [prompt], layers=layers, called=where["model"]["name"])
                entries += [stored(each, heads=heads, dtype=store) for each in found]
                bar(1)
        click.echo(
            f"{len(entries)} layers of {len(made.tuning)} prompts, {entries[0].inputs.query_heads} heads each: "
            f"{total_bytes(entries) / 2**20:.1f} MiB"
        )
        from_prompts = {"source": made.source, "lengths": list(lengths), "samples": samples}
        save_capture(entries, out, model=where, prompts=from_prompts)
        click.echo(f"wrote {out}")
