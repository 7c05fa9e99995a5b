"""The commands that make a profile, or judge one; `sparseprefill.cli_profile` has those that only read profiles."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_options import Numbers, clear_errors, progress_bar, refuse_input

_MODEL = click.argument("model", required=False)
_OUT = click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), default=Path("profile.json"), help="The profile."
)
_DTYPE = click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
_DEVICE = click.option("--device", help="cpu or cuda; default: what is there.")
_TRUST = click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
_PROMPTS = click.option(
    "--prompts",
    default="builtin",
    help="builtin (or builtin:KIND[+KIND] of needle, multi_key, variable_tracking and prose), a text file, a .jsonl "
    "file, or hf:NAME[:CONFIG[:SPLIT]].",
)
_FIELD = click.option("--field", help="Of documents: where their text is.  [default: the first that is there]")


def _lengths(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--lengths", type=Numbers(), default=default, help="Tokens of a prompt.")


@click.command()
@_MODEL
@_OUT
@_PROMPTS
@_FIELD
@_lengths("8k")
@click.option("--samples", type=click.IntRange(1), default=4, help="Prompts a length to tune on.")
@click.option("--held-out", type=click.IntRange(0), default=4, help="Prompts a length to measure the choice on.")
@click.option("--seed", type=int, help="Of the built-in prompts.  [default: 1]")
@click.option(
    "--target-mass",
    type=float,
    help="Each head gets the cheapest pattern that keeps so much of its attention mass.  [default: 0.98]",
)
@click.option("--budget", type=float, help="Or: all heads together keep most at this mean share of dense work.")
@click.option("--density", type=float, help="Or: all heads together keep most at this mean density.")
@click.option("--minference-search", is_flag=True, help="Or: MInference's own search, for comparison.")
@click.option("--sale-search", is_flag=True, help="Or: SALE's own calibration of its thresholds.")
@click.option(
    "--error", type=float, help="For --sale-search: what an output may be off a token, over channels.  [default: 0.4]"
)
@click.option("--quantile", default=0.1, help="Share of the query rows that may keep less than the target.")
@click.option(
    "--method",
    "only",
    metavar="NAME[:OPTION=VALUE,...]",
    help="Choose from one method at its budgets: sale, or one of the default candidates'.",
)
@click.option(
    "--candidate",
    "chosen",
    multiple=True,
    metavar="NAME[:OPTION=VALUE,...]",
    help="Patterns to choose from, may be repeated.  [default: every method but sale, from 2% to 70%]",
)
@click.option("--block", type=click.IntRange(1), default=64, help="Tokens of a tile, both ways.")
@click.option("--every", type=click.IntRange(1), default=1, help="Score each n-th row of tiles only.")
@click.option(
    "--resume", is_flag=True, help="Go on with what an interrupted run left, or aim elsewhere with its scores."
)
@click.option("--again", is_flag=True, help="Remove the scores of an earlier run first.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page with pictures.")
@_DTYPE
@_DEVICE
@_TRUST
def run(
    model: str | None, out: Path, prompts: str, field: str | None, lengths: tuple[int, ...], samples: int,
    held_out: int, seed: int | None, target_mass: float | None, budget: float | None, density: float | None,
    minference_search: bool, sale_search: bool, error: float | None, quantile: float, only: str | None,
    chosen: tuple[str, ...], block: int, every: int, resume: bool, again: bool, html: Path | None,
    dtype: str, device: str | None, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Give each head of MODEL the pattern that serves it best, and write that profile.

    MODEL is a hub name or a folder (default: the model that ships inside). Scores are kept in OUT.scores: with them an
    interrupted run goes on, another target costs nothing, and `profile show` has pictures.
    """
    with clear_errors():
        from sparseprefill.evals.loading import load_model
        from sparseprefill.evals.profile_page import profile_table, write_page
        from sparseprefill.evals.profile_prompts import profile_prompts
        from sparseprefill.files import check_folder
        from sparseprefill.patterns import load_patterns, save_patterns
        from sparseprefill.profile import profile_model
        from sparseprefill.profile_scores import read_scores, scores_folder

        target = _target(target_mass, budget, density, minference_search, sale_search, error)
        candidates = _candidates(only, chosen, target)
        for path in (out, html):
            if path is not None:
                check_folder(path)  # before minutes of work
        refuse_input(out, [prompts])
        if html is not None:
            refuse_input(html, [out, prompts])
        folder = scores_folder(out)
        if resume and again:
            raise ValueError("--resume keeps what is there, --again removes it: choose one")
        if folder.exists() and not resume and not again:
            raise ValueError(
                f"{folder} holds scores of an earlier run: --resume goes on with them, --again removes them"
            )
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        made = profile_prompts(prompts, tokenizer, lengths, samples, held_out, seed=seed, field=field)
        for note in made.notes:
            click.echo(f"note: {note}")
        details: dict[str, Any] = {"source": made.source}
        if made.seed is not None:
            details["seed"] = made.seed
        if minference_search:
            click.echo("note: MInference's search computes these pairs once more, its own way")
        if sale_search:
            click.echo("note: SALE's calibration computes attention on the tuning prompts once more for each threshold")
        sale = sale_search or any(text.partition(":")[0] == "sale" for text in (only or "", *chosen))
        with _Progress(loaded, block, folder, search=minference_search, sale=sale) as progress:
            profile = profile_model(
                loaded, made.tuning, held_out=made.held_out, candidates=candidates, target=target,
                quantile=quantile, block=block, every=every, folder=folder, resume=resume, again=again,
                details=details, progress=progress.advance, announce=progress.announce,
            )  # fmt: skip
        save_patterns(profile, out)
        profile = load_patterns(out)
        click.echo(profile_table(profile))
        written = [out, folder]
        if html is not None:
            write_page(profile, read_scores(folder), html, out.name)
            written.append(html)
        click.echo("wrote " + ", ".join(map(str, written)))


def _target(
    mass: float | None, budget: float | None, density: float | None, search: bool, sale: bool, error: float | None
) -> Any:
    from sparseprefill.patterns.sale_search import ERROR
    from sparseprefill.profile_scores import DensityBudget, MInferenceSearch, SaleSearch, TargetMass, WorkBudget

    if sum(each is not None for each in (mass, budget, density)) + search + sale > 1:
        raise ValueError(
            "--target-mass, --budget, --density, --minference-search and --sale-search are different targets: choose "
            "one"
        )
    if error is not None and not sale:
        raise ValueError("--error is what --sale-search aims at: add that, or leave --error out")
    if sale:
        return SaleSearch(ERROR if error is None else error)
    if search:
        return MInferenceSearch()
    if density is not None:
        return DensityBudget(density)
    return WorkBudget(budget) if budget is not None else TargetMass(0.98 if mass is None else mass)


def _candidates(only: str | None, chosen: tuple[str, ...], target: Any) -> Any:
    """What --method or --candidate name; None for what the target brings."""
    from sparseprefill.patterns.candidates import candidates_of, sale_candidates
    from sparseprefill.patterns.names import parse_options
    from sparseprefill.patterns.sale_search import ladder
    from sparseprefill.profile_scores import SaleSearch

    if only is None:
        return chosen or None
    if chosen:
        raise ValueError("--method names all that is chosen from, --candidate one of several: choose one of them")
    name, _, text = only.partition(":")
    options = parse_options(text)
    if not isinstance(target, SaleSearch):
        return candidates_of(name, **options)
    if name != "sale":
        raise ValueError(f"--sale-search looks for thresholds of sale, and none of {name}: leave --method out")
    return sale_candidates(ladder(), **options)


class _Progress:
    """Says what profiling will take, shows a bar, and compares afterwards."""

    def __init__(
        self, model: Any, block: int, kept: Path | None = None, *, search: bool = False, sale: bool = False
    ) -> None:  # fmt: skip
        self.model, self.block, self.kept, self.search, self.sale = model, block, kept, search, sale
        self.predicted: float | None = None
        self.cost: Any = None
        self.computed = 0
        self.began = 0.0
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def announce(self, cost: Any) -> None:
        """Print the cost and begin the bar."""
        from sparseprefill.evals.profile_time import predicted_seconds

        self.cost = cost
        click.echo(
            f"{cost.prompts} prompts of {cost.tokens} tokens in all, {cost.layers} layers with {cost.heads} heads: "
            f"{cost.tiles} tiles of {self.block} x {self.block} to compute, {cost.done} of them done before; at most "
            f"{cost.peak_bytes / 2**20:.0f} MiB beside the model"
        )
        self.predicted, reason = predicted_seconds(self.model, cost, self.block, search=self.search, sale=self.sale)
        click.echo(reason if self.predicted is None else f"predicted: {self.predicted:.0f} s ({reason})")
        self.bar = progress_bar(cost.tiles - cost.done, "profile")
        self.step = self.bar.__enter__()
        self.began = time.perf_counter()

    def advance(self, tiles: int) -> None:
        """So many tiles more."""
        self.computed += tiles
        self.step(tiles)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.bar is None:
            return
        self.bar.__exit__(kind, error, trace)
        if isinstance(error, KeyboardInterrupt) and self.kept is not None:
            click.echo(f"stopped; {self.kept} keeps what was computed: --resume goes on", err=True)
        if error is None:
            took = time.perf_counter() - self.began
            compared = "" if self.predicted is None else f", {took / self.predicted:.2f} of what was predicted"
            click.echo(f"computed {self.computed} tiles in {took:.0f} s{compared}")


@click.command()
@click.argument("profile", type=click.Path(dir_okay=False, path_type=Path))
@_MODEL
@_PROMPTS
@_FIELD
@_lengths("16k")
@click.option("--samples", type=click.IntRange(2), default=8, help="Prompts a length.")
@click.option("--seed", type=int, help="Of the built-in prompts; not the one of the profile.  [default: 2]")
@click.option("--json", "out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@_DTYPE
@_DEVICE
@_TRUST
def validate(
    profile: Path, model: str | None, prompts: str, field: str | None, lengths: tuple[int, ...], samples: int,
    seed: int | None, out: Path | None, dtype: str, device: str | None, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Compare PROFILE with uniform patterns at its own density, on prompts that it was not made with.

    MODEL is that of the profile (default: the model that ships inside).
    """
    with clear_errors():
        import json
        from dataclasses import asdict

        from sparseprefill.evals.loading import load_model, provenance
        from sparseprefill.evals.profile_check import check_new, check_profile
        from sparseprefill.evals.profile_prompts import profile_prompts
        from sparseprefill.files import check_folder, write_text
        from sparseprefill.patterns import Sale, load_patterns

        found = load_patterns(profile)
        if out is not None:
            refuse_input(out, [profile, prompts])
            check_folder(out)
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        if prompts.partition(":")[0] == "builtin" and seed is None:
            seed = 2
        made = profile_prompts(prompts, tokenizer, lengths, samples, 0, seed=seed, field=field)
        check_new(found, made.source, made.tuning)
        block = found.made.get("block", 64)
        sale = any(isinstance(pattern, Sale) for heads in found.layers for pattern in heads)
        with _Progress(loaded, block, sale=sale) as progress:
            checked = check_profile(
                loaded, found, made.tuning, block=block, progress=progress.advance, announce=progress.announce
            )
        click.echo(str(checked))
        if out is not None:
            data = {"profile": profile.name, "source": made.source, **asdict(checked), "provenance": provenance(loaded)}
            write_text(out, json.dumps(data, indent=1) + "\n")
            click.echo(f"wrote {out}")


@click.command("import-minference")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="Hub name or folder of the model it is for; its weights are not read.")
@_OUT
@_TRUST
def import_minference(config: Path, model: str | None, out: Path, trust_remote_code: bool) -> None:
    """Turn CONFIG, a configuration file of MInference, into a profile, and say what could not be mapped.

    With --model the profile is held to that model; without, to its number of layers and heads alone.
    """
    with clear_errors():
        from sparseprefill.evals.loading import load_config
        from sparseprefill.files import check_folder
        from sparseprefill.huggingface_modules import model_facts
        from sparseprefill.patterns import Dense, ModelPatterns, save_patterns
        from sparseprefill.patterns.minference_config import read_minference
        from sparseprefill.profile_scores import scores_folder

        refuse_input(out, [config])
        check_folder(out)
        if scores_folder(out).exists():
            raise ValueError(
                f"{scores_folder(out)} holds the scores of another profile: name another file, or remove it"
            )
        facts: dict[str, Any] = {}
        if model is not None:
            facts = model_facts(load_config(model, trust_remote_code=trust_remote_code).get_text_config())
        layers, notes = read_minference(config, query_heads=facts.get("query_heads"), layers=facts.get("layers"))
        for note in notes:
            click.echo(f"note: {note}")
        heads = [pattern for layer in layers for pattern in layer]
        mapped = sum(not isinstance(pattern, Dense) for pattern in heads)
        if not mapped:
            raise ValueError(f"nothing in {config} could be mapped, so no profile was written")
        facts = facts or {"layers": len(layers), "query_heads": len(layers[0])}
        save_patterns(ModelPatterns(tuple(map(tuple, layers)), facts), out)
        click.echo(f"mapped {mapped} of {len(heads)} heads; wrote {out}")
