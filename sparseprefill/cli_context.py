"""`sparseprefill context`: a text that is prepared once, and questions about it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_options import clear_errors

_FOLDER = click.Path(file_okay=False, path_type=Path)
_MODEL = click.option("--model", help="Hub name or folder.  [default: the model that ships inside]")
_DTYPE = click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
_DEVICE = click.option("--device", help="cpu or cuda; default: what is there.")
_TRUST = click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")


@click.group()
def context() -> None:
    """Prepare a long text once, and ask many questions about it."""


@context.command()
@click.argument("text", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=_FOLDER, help="Folder to write the context to.")
@click.option("--method", "chosen", default="squeezed", show_default=True, metavar="NAME[:OPTION=VALUE,...]",
              help="squeezed or retrieval.")  # fmt: skip
@click.option("--prefill", default="dense", show_default=True, metavar="NAME",
              help="Method that the text itself is run with.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(1), help="Only so many first tokens of the text.")
@click.option("--chunk", type=click.IntRange(64), help="Run so many tokens at a time.  [default: all at once]")
@click.option("--chat", type=click.Choice(["auto", "none", "always"]), default="auto", show_default=True,
              help="Use the tokenizer's chat template.")  # fmt: skip
@click.option("--again", is_flag=True, help="Replace a context that is there.")
@_MODEL
@_DTYPE
@_DEVICE
@_TRUST
def build(
    text: Path, out: Path, chosen: str, prefill: str, tokens: int | None, chunk: int | None, chat: str, again: bool,
    model: str | None, dtype: str, device: str | None, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Run TEXT, a file in UTF-8, through the model, index what it keeps, and write it to a folder."""
    from sparseprefill.context import prepare_context
    from sparseprefill.evals.context_prompts import ContextPrompt
    from sparseprefill.evals.loading import load_model
    from sparseprefill.files import read_text
    from sparseprefill.patterns.context_methods import context_method
    from sparseprefill.patterns.names import parse_options

    with clear_errors():
        name, _, options = chosen.partition(":")
        context_method(name, parse_options(options))  # before anything heavy
        content = read_text(text, "text")
        if out.exists() and not again:
            raise ValueError(f"{out} is there: --again replaces it")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {out.parent} to make {out.name} in: make it first")
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        prompt = ContextPrompt.of(tokenizer, chat)
        ids = prompt.context_ids(tokenizer, content)
        if tokens is not None:
            ids = ids[:tokens]
        made = prepare_context(loaded, ids, name, prefill=prefill, chunk=chunk, **parse_options(options))
        made.made["prompt"] = prompt.to_dict()
        made.save(out, overwrite=again)
        click.echo(_described(made.made, len(made), made.bytes))
        click.echo(f"wrote {out}")


@context.command()
@click.argument("folder", type=_FOLDER)
@click.argument("question", nargs=-1)
@click.option("--questions", type=click.Path(dir_okay=False, path_type=Path), help="A file with one a line.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of an answer.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Questions asked at a time.")
@click.option("--cue", default="", help="What every answer begins with, already written.")
@click.option("--dense", is_flag=True, help="Attend to everything, for comparison.")
@_MODEL
@_DTYPE
@_DEVICE
@_TRUST
def ask(
    folder: Path, question: tuple[str, ...], questions: Path | None, max_new_tokens: int, batch: int, cue: str,
    dense: bool,
    model: str | None, dtype: str, device: str | None, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Answer questions about the context in FOLDER, with the model that it was built with."""
    import time

    from sparseprefill.context_store import context_facts, load_context
    from sparseprefill.evals.context_prompts import ContextPrompt
    from sparseprefill.evals.loading import load_model
    from sparseprefill.files import read_text
    from sparseprefill.huggingface import patch_model

    with clear_errors():
        asked = list(question)
        if questions is not None:
            asked += [line for line in read_text(questions, "questions").splitlines() if line.strip()]
        if not asked:
            raise ValueError("nothing is asked: give a question, or a file of them with --questions")
        prompt = ContextPrompt.from_dict(context_facts(folder)["made"].get("prompt") or {})
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        found = load_context(folder, loaded)
        rows = [prompt.question_ids(tokenizer, each, cue) for each in asked]
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        share = None
        with contextlib.nullcontext() if dense else patch_model(loaded, context=found, sample_rows=0) as patch:
            began = time.perf_counter()
            for start in range(0, len(rows), batch):
                inputs = found.inputs(rows[start : start + batch])
                generate: Any = loaded.generate
                written = generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
                for each, new in zip(asked[start : start + batch], written, strict=True):
                    click.echo(f"{each}\n {cue} {tokenizer.decode(new, skip_special_tokens=True).strip()}")
            seconds = (time.perf_counter() - began) / len(rows)
            if patch is not None:
                share = patch.report().context_share
        kept = "all keys" if dense else "its window alone" if share is None else f"{share:.1%} of the context's keys"
        click.echo(f"{seconds:.2f} s a question, attending to {kept}")


@context.command()
@click.argument("folder", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(folder: Path, as_json: bool) -> None:
    """Say what a context was made from, how large it is, and whether its file is there. Loads no model."""
    from sparseprefill.context_store import FACTS, TENSORS, context_facts

    with clear_errors():
        facts = context_facts(folder)
        size = {each: (folder / each).stat().st_size for each in (TENSORS, FACTS) if (folder / each).is_file()}
        if TENSORS not in size:
            raise FileNotFoundError(f"there is no {TENSORS} in {folder}: the context is not whole, build it again")
        shown = {key: value for key, value in facts.items() if key != "sha256"} | {"bytes": size}
        if as_json:
            click.echo(json.dumps(shown, indent=1))
            return
        options = ",".join(f"{key}={value}" for key, value in facts["options"].items())
        own = facts["fingerprint"]
        click.echo(f"method   {facts['method']}:{options}")
        layers = f"{facts['layers']} layers"
        click.echo(f"model    {own['model']['architecture']}, {layers}, {own['dtype']}, weights {own['weights']:.20}")
        click.echo(f"tokens   {facts['made'].get('tokens', '?')}, sha256 {own['tokens']:.12}")
        click.echo(f"made     {_described(facts['made'])}")
        click.echo(f"size     {sum(size.values()) / 2**20:.1f} MiB")


def _described(made: dict[str, object], tokens: int | None = None, sizes: dict[str, int] | None = None) -> str:
    seconds = made.get("seconds")
    parts = [] if tokens is None else [f"{tokens} tokens"]
    if isinstance(seconds, dict):
        parts += [f"{what} took {value:.1f} s" for what, value in seconds.items()]
    parts += [f"{what}: {size / 2**20:.1f} MiB" for what, size in (sizes or {}).items()]
    return ", ".join([*parts, f"run with {made.get('prefill', '?')}"])
