"""The commands that evaluate: each makes a task, and one function runs it and writes what came out."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_options import Depths, Numbers, clear_errors

GRID_METHODS = ("dense", "a_shape", "tri_shape", "vertical_slash", "block_sparse", "random")
"""What runs where no method is named: those that a density can be given to."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What all evaluations are asked."""

    model: str | None
    chosen: tuple[str, ...]
    density: float | None
    last_rows_dense: int
    observe: int
    dtype: str
    device: str | None
    trust_remote_code: bool
    out: Path
    again: bool
    markdown: bool


DEMO = RunOptions(
    None, (*GRID_METHODS, "minference:profile=inside"), 0.2, 0, 1, "auto", None, False, Path("demo"), True, False
)
"""Every method of the grid at one density, and the profile of the model inside, on that model, begun anew."""

_OPTIONS = (
    click.option("--model", help="Hub name or folder; default: the model that ships inside."),
    click.option(
        "--method",
        "chosen",
        multiple=True,
        metavar="NAME[:OPTION=VALUE,...]",
        help="Methods, may be repeated; dense always runs.",
    ),
    click.option("--density", type=float, help="Budget of methods given without options.  [default: 0.2]"),
    click.option("--last-rows-dense", type=click.IntRange(0), default=0, help="Dense last queries for every method."),
    click.option(
        "--observe",
        type=click.IntRange(0),
        default=1,
        help="Prompts a stratum whose density and kept mass are counted, not timed.",
    ),
    click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"),
    click.option("--device", help="cpu or cuda; default: what is there, one GPU a process under torchrun."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model."),
    click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the results."),
    click.option("--again", is_flag=True, help="Remove an earlier run of this task in OUT and begin anew."),
    click.option("--markdown", is_flag=True, help="Print the whole report as Markdown."),
)


def evaluation(default_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of all evaluations, as one argument `run`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            given["out"] = given["out"] or Path(default_out)
            run = RunOptions(**{each.name: given.pop(each.name) for each in fields(RunOptions)})
            with clear_errors():
                command(run=run, **given)

        for option in reversed(_OPTIONS):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def specs(chosen: tuple[str, ...], density: float | None) -> list[Any]:
    """Methods as they were named, dense first; those without options get the budget of a density, 0.2 for None.

    Raises ValueError for a density that no method uses.
    """
    from sparseprefill.evals.methods import MethodSpec
    from sparseprefill.patterns.methods import METHODS

    parsed = [MethodSpec.parse(text) for text in chosen or GRID_METHODS]
    bare = [spec.name for spec in parsed if not spec.options]
    if density is not None and not any(name in METHODS and METHODS[name].share for name in bare):
        raise ValueError(f"no method here takes a density of {density} for its budget: leave --density out")
    density = 0.2 if density is None else density
    if not any(spec.label == "dense" for spec in parsed):
        parsed.insert(0, MethodSpec("dense"))
    return [spec if spec.options or ":" in spec.name else _with_budget(spec.name, density) for spec in parsed]


def _with_budget(name: str, density: float) -> Any:
    from sparseprefill.evals.methods import MethodSpec
    from sparseprefill.prefill import resolve_method

    if name not in GRID_METHODS:
        resolve_method(name)  # for the error that names it
    return MethodSpec.at_density(name, density)


def loaded_model(run: RunOptions) -> tuple[Any, Any]:
    """Model and tokenizer; one GPU a process where several share a run."""
    from sparseprefill.evals.loading import load_model

    device = run.device
    if device in (None, "cuda") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        if torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
    return load_model(run.model, dtype=run.dtype, device=device, trust_remote_code=run.trust_remote_code)


def evaluate(run: RunOptions, make_task: Callable[[Any, Any], Any]) -> Any:
    """Load the model, run the task with every method, write and print the report; the result, or None in a helper."""
    from sparseprefill.evals.report_page import write_report
    from sparseprefill.evals.runner import Workers, load_unfinished, run_eval, unfinished_runs

    chosen = specs(run.chosen, run.density)  # refused before a model is loaded
    model, tokenizer = loaded_model(run)
    task = make_task(model, tokenizer)
    try:
        result = run_eval(
            task, model, tokenizer, chosen, run.out, last_rows_dense=run.last_rows_dense,
            observe=run.observe, again=run.again, progress=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        if Workers.from_environment().rank == 0 and task.name in unfinished_runs(run.out):
            partial = load_unfinished(run.out, task.name)
            click.echo(f"\n{len(partial.records)} of {partial.planned} prompts are answered: the same command goes on")
            if partial.records:
                _say_written(write_report(partial, run.out))
        raise
    if result is None:
        return None
    paths = show(result, run.out, markdown=run.markdown)
    _say_written([run.out / f"{task.name}.json", *paths])
    return result


def show(result: Any, folder: Path, *, markdown: bool) -> list[Path]:
    """Print the report and write it; the files."""
    from sparseprefill.evals.compare import summarise
    from sparseprefill.evals.report_page import report_markdown, report_text, write_report

    summary = summarise(result)
    click.echo((report_markdown if markdown else report_text)(result, summary))
    return write_report(result, folder, summary=summary)


def _say_written(paths: list[Path]) -> None:
    click.echo("wrote " + ", ".join(str(path) for path in paths))


def sentences(haystack: Path | None) -> list[str] | None:
    """Of a text that things are hidden in; None: seeded prose."""
    from sparseprefill.files import read_text
    from sparseprefill.prompts import text_sentences

    return None if haystack is None else text_sentences(read_text(haystack, "haystack"))


_SEED = click.option("--seed", default=1, help="Of the prompts.")
_HAYSTACK = click.option(
    "--haystack", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Text to hide things in."
)
_CHAT_TEMPLATE = click.option(
    "--chat-template", type=click.Choice(["auto", "always", "none"]), help="Of the model's tokenizer.  [default: auto]"
)


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--markdown", is_flag=True, help="Print the whole report as Markdown.")
@click.pass_context
def report(ctx: click.Context, path: Path, markdown: bool) -> None:
    """Write the report of PATH again: a result file, or a folder of finished and unfinished runs.

    An unfinished run is reported as incomplete, into files of that name, and the exit status is 1.
    """
    from sparseprefill.evals.results import EvalResult
    from sparseprefill.evals.runner import load_unfinished, unfinished_runs

    broken: list[str] = []
    with clear_errors():
        if path.is_file():
            results = [EvalResult.load(path)]
        else:
            results = [EvalResult.load(each) for each in _result_files(path)]
            for task in unfinished_runs(path):
                try:
                    results.append(load_unfinished(path, task))
                except (ValueError, OSError) as error:  # the others are shown all the same
                    broken.append(str(error))
        if not results and not broken:
            raise ValueError(f"{path} holds no result of an evaluation: name the folder given as --out")
        for result in results:
            ended = path.is_file() or result.task not in unfinished_runs(path)
            if not result.records or (result.complete and not ended):
                done = "all" if result.records else "none"
                broken.append(f"{result.task}: {done} of {result.planned} prompts answered, and not ended")
                continue
            _say_written(show(result, path.parent if path.is_file() else path, markdown=markdown))
    for each in broken:
        click.echo(each, err=True)
    if broken or not all(result.complete for result in results):
        click.echo("INCOMPLETE: run the same command again to go on", err=True)
        ctx.exit(1)


def _result_files(folder: Path) -> list[Path]:
    """The results in a folder, known by how they begin; runs that have not ended begin alike, but for `complete`."""
    from sparseprefill.evals.results import SCHEMA

    found = []
    for each in sorted(folder.glob("*.json")):
        with each.open("rb") as file:
            begins = file.read(200)
        if SCHEMA.encode() in begins and b'"complete"' in begins:
            found.append(each)
    return found


@click.command()
@click.option("--lengths", type=Numbers(), default="2k,4k,8k", help="Windows in tokens.")
@click.option("--windows", default=3, help="Windows of each length.")
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Long text; default: seeded prose."
)
@click.option("--parts", default=4, help="Parts of a window that are reported apart.")
@click.option("--layers/--no-layers", default=True, help="Also the error of each layer, which takes a second pass.")
@_SEED
@evaluation("fidelity")
def fidelity(
    run: RunOptions, lengths: tuple[int, ...], windows: int, text: Path | None, parts: int, layers: bool, seed: int,
) -> None:  # fmt: skip
    """How far a method's next tokens are from dense attention's, over long text and without any task."""
    from sparseprefill.evals.fidelity import Fidelity
    from sparseprefill.huggingface_modules import model_window

    def make(model: Any, tokenizer: Any) -> Fidelity:
        return Fidelity(
            tokenizer, lengths, windows=windows, text=text, seed=seed, buckets=parts, layers=layers,
            window=model_window(model),
        )  # fmt: skip

    evaluate(run, make)


@click.command()
@click.argument("sets", nargs=-1)
@click.option("--edition", type=click.Choice(["1", "E", "2"]), default="1", help="LongBench, LongBench-E or version 2.")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="Folder, file or zip of the rows; default: $SPARSEPREFILL_DATA, else the hub.",
)
@click.option("--fixture", is_flag=True, help="A few made-up rows a set, to try things out: the scores mean nothing.")
@click.option(
    "--prompts",
    type=click.Path(exists=True, path_type=Path),
    help="Official prompt texts as published; default: lm-eval's, put right.",
)
@click.option("--verify/--no-verify", default=True, help="Refuse prompt texts that are not the official ones.")
@click.option("--samples", type=int, help="The first so many rows of a set (of a bucket in E).  [default: all]")
@click.option("--max-length", type=int, help="Tokens of a prompt before it is cut in the middle.  [default: by window]")
@_CHAT_TEMPLATE
@click.option("--system", help="A line in the system's role of the chat template.")
@click.option("--double-bos", is_flag=True, help="Special tokens once more around the chat template.")
@evaluation("longbench")
def longbench(
    run: RunOptions, sets: tuple[str, ...], edition: str, data: Path | None, fixture: bool, prompts: Path | None,
    verify: bool, samples: int | None, max_length: int | None, chat_template: str, system: str | None,
    double_bos: bool,
) -> None:  # fmt: skip
    """LongBench with the official prompts, truncation and scores, on SETS or all of them."""
    from sparseprefill.evals.longbench import LongBench, LongBenchV2
    from sparseprefill.huggingface_modules import model_window

    if edition == "2" and sets:
        raise ValueError(f"version 2 is one set of questions: leave out {', '.join(sets)}")
    switches: dict[str, Any] = {
        "data": data, "fixture": fixture, "prompts": prompts, "verify": verify, "samples": samples,
        "max_length": max_length, "chat_template": chat_template or "auto", "system": system,
        "double_bos": double_bos,
    }  # fmt: skip

    def make(model: Any, tokenizer: Any) -> Any:
        window = model_window(model)
        if edition == "2":
            return LongBenchV2(tokenizer, window, **switches)
        return LongBench(tokenizer, window, sets or None, extended=edition == "E", **switches)

    evaluate(run, make)


@click.command()
@click.option(
    "--kind",
    type=click.Choice(["classic", "multi", "passkey", "kv", "two_hop", "along"]),
    default="classic",
    help="What is hidden; along: questions all along one prompt, graded in its prefill.",
)
@click.option("--lengths", type=Numbers(), default="4k,8k,16k", help="Prompt and answer, in tokens.")
@click.option(
    "--depths", type=Depths(), help="How many, evenly from 0 to 100 %, or a list of percentages.  [default: 5]"
)
@click.option("--samples", default=1, help="Prompts a depth and length; of along, a length.")
@click.option("--needles", type=int, help="Facts a prompt, of multi, two_hop and along.")
@click.option(
    "--question", type=click.Choice(["start", "middle", "end"]), help="Where in the text it stands.  [default: end]"
)
@_SEED
@_HAYSTACK
@_CHAT_TEMPLATE
@evaluation("needle")
def needle(
    run: RunOptions, kind: str, lengths: tuple[int, ...], depths: Any, samples: int, needles: int | None,
    question: str | None, seed: int, haystack: Path | None, chat_template: str | None,
) -> None:  # fmt: skip
    """Needles in a haystack: does a method still find what dense attention finds, at every depth and length?"""
    from sparseprefill.evals.needle_tasks import needle_task
    from sparseprefill.huggingface_modules import model_window

    depths = 5 if depths is None and kind != "along" else depths
    given = {"depths": depths, "needles": needles, "question_at": question, "chat": chat_template}
    options = {name: value for name, value in given.items() if value is not None}

    def make(model: Any, tokenizer: Any) -> Any:
        return needle_task(
            kind, tokenizer, lengths, samples=samples, seed=seed, haystack=sentences(haystack),
            window=model_window(model), **options,
        )  # fmt: skip

    evaluate(run, make)


def along(run: RunOptions, lengths: tuple[int, ...], samples: int) -> None:
    """Needles all along the prompt, as the demonstration has them."""
    from sparseprefill.evals.needle_tasks import NeedlesAlong
    from sparseprefill.huggingface_modules import model_window

    evaluate(
        run, lambda model, tokenizer: NeedlesAlong(
            tokenizer, lengths, samples=samples, seed=1, window=model_window(model)
        ),
    )  # fmt: skip


@click.command()
@click.argument("tasks", nargs=-1)
@click.option("--lengths", type=Numbers(), default="4k", help="Prompt and answer, in tokens.")
@click.option("--samples", default=4, help="A task and length.")
@click.option(
    "--official", is_flag=True, help="The official 13 tasks as lm-eval makes them, deviations listed in the result."
)
@_SEED
@_HAYSTACK
@_CHAT_TEMPLATE
@evaluation("ruler")
def ruler(
    run: RunOptions, tasks: tuple[str, ...], lengths: tuple[int, ...], samples: int, official: bool, seed: int,
    haystack: Path | None, chat_template: str | None,
) -> None:  # fmt: skip
    """RULER's TASKS, or all of them: retrieval, tracing and counting at growing lengths.

    Without --official in words of our own, which need no data and no other package; with it those that lm-eval can make
    offline, unless TASKS name others.
    """
    from sparseprefill.evals.ruler import Ruler
    from sparseprefill.huggingface_modules import model_window

    if official and haystack is not None:
        raise ValueError("the official tasks have haystacks of their own: leave --haystack out, or --official")

    def make(model: Any, tokenizer: Any) -> Any:
        if official:
            return _official_ruler(model, tokenizer, tasks, lengths, samples, seed, chat_template)
        options: dict[str, Any] = {"tasks": tasks} if tasks else {}
        if chat_template is not None:
            options["chat"] = chat_template
        return Ruler(
            tokenizer, lengths, samples=samples, seed=seed, haystack=sentences(haystack),
            window=model_window(model), **options,
        )  # fmt: skip

    evaluate(run, make)


def _official_ruler(
    model: Any, tokenizer: Any, tasks: tuple[str, ...], lengths: tuple[int, ...], samples: int, seed: int,
    chat_template: str | None,
) -> Any:  # fmt: skip
    from sparseprefill.evals.lm_eval_tasks import OFFLINE_TASKS, LmEvalRuler
    from sparseprefill.huggingface_modules import model_window

    has = bool(getattr(tokenizer, "chat_template", None))
    return LmEvalRuler(
        tokenizer, tasks or OFFLINE_TASKS, lengths, samples, seed=seed, window=model_window(model),
        chat_template=chat_template == "always" or (chat_template != "none" and has),
    )  # fmt: skip
