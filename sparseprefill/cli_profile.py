"""The commands of profiles: showing what each head got, comparing two, joining several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_options import Defaulting, clear_errors, refuse_input
from sparseprefill.cli_profile_run import import_minference, run, validate

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.group(cls=Defaulting)
def profile() -> None:
    """Give each attention head of a model its pattern: `profile [MODEL] --out FILE` is `profile run`."""


for each in (run, validate, import_minference):
    profile.add_command(each)


@profile.command()
@click.argument("file", type=_FILE)
@click.option("--heads", is_flag=True, help="A row for each head instead of each layer.")
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@click.option("--png", type=_FILE, help="Write the maps of layers and heads as a picture.")
@click.option("--html", type=_FILE, help="Write everything as one page that needs nothing else.")
def show(file: Path, heads: bool, markdown: bool, png: Path | None, html: Path | None) -> None:
    """Print what the profile FILE gives each layer or head, and write it as a picture or a page.

    The page has curves of uniform patterns and pictures of heads where the scores of all candidates, which profiling
    leaves in FILE.scores, are still there.
    """
    from sparseprefill.evals.profile_page import profile_table, write_maps, write_page
    from sparseprefill.files import check_folder
    from sparseprefill.patterns.store import load_patterns

    with clear_errors():
        if png is not None:
            refuse_input(png, [file])
            check_folder(png)
        if html is not None:
            refuse_input(html, [file] if png is None else [file, png])
            check_folder(html)
        found = load_patterns(file)
        click.echo(profile_table(found, markdown, heads=heads), nl=False)
        if png is not None:
            write_maps(found, png)
            click.echo(f"wrote {png}")
        if html is not None:
            scores = scores_beside(file)
            digest = found.made.get("prompts_digest")
            if scores is not None and digest != scores.settings.get("prompts_digest"):
                raise ValueError(
                    f"{_scores(file)} holds the scores of another run than {file} was made by: remove it, or make the "
                    "profile again with --resume"
                )
            write_page(found, scores, html, file.name)
            click.echo(f"wrote {html}" + ("" if scores is not None else f", without what {_scores(file)} would add"))


class _Trouble(click.ClickException):
    """An error of a command whose exit status 1 says something else."""

    exit_code = 2


@profile.command()
@click.argument("first", type=_FILE)
@click.argument("second", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@click.pass_context
def diff(ctx: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """Say what differs between the profiles FIRST and SECOND, head by head.

    The exit status is 0 where they are the same, 1 where they differ, 2 where one cannot be read.
    """
    from sparseprefill.patterns.profiles import difference
    from sparseprefill.patterns.store import load_patterns

    try:
        with clear_errors():
            found = difference(load_patterns(first), load_patterns(second))
    except click.ClickException as error:
        raise _Trouble(error.message) from error
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))
    if found:
        ctx.exit(1)


@profile.command()
@click.argument("files", nargs=-1, required=True, type=_FILE)
@click.option("--out", required=True, type=_FILE, help="The profile to write.")
@click.option(
    "--keep",
    type=click.Choice(["mass", "density"]),
    default="mass",
    show_default=True,
    help="What decides: the most kept mass, or the least density.",
)
def merge(files: tuple[Path, ...], out: Path, keep: Any) -> None:
    """Join the profiles FILES of one model: each head gets the pattern that did best on held-out prompts.

    Ties go to the first. Merge profiles that were made on the same prompts: others are not fairly compared.
    """
    from sparseprefill.files import check_folder
    from sparseprefill.patterns.profiles import label_of, same_prompts
    from sparseprefill.patterns.profiles import merge as merge_profiles
    from sparseprefill.patterns.store import load_patterns, save_patterns

    with clear_errors():
        refuse_input(out, files)
        check_folder(out)
        if _scores(out).exists():
            raise ValueError(f"{_scores(out)} holds the scores of another profile: name another file, or remove it")
        profiles = [load_patterns(file) for file in files]
        merged = merge_profiles(profiles, keep)
        save_patterns(merged, out)
    for number, (file, each) in enumerate(zip(files, profiles, strict=True), 1):
        alike = sum(
            label_of(a) == label_of(b)
            for own, joined in zip(each.layers, merged.layers, strict=True)
            for a, b in zip(own, joined, strict=True)
        )
        click.echo(f"{number}. {file}: {alike} of {sum(map(len, merged.layers))} heads have its pattern")
    if same_prompts(profiles) is not True:
        different = same_prompts(profiles) is False
        known = "were made on different prompts" if different else "do not all say on which prompts they were made"
        click.echo(f"these profiles {known}: kept mass on one prompt says little of another", err=True)
    click.echo(f"wrote {out}")


def scores_beside(file: Path) -> Any:
    """What every candidate kept and cost, from the folder beside a profile; None where there is none."""
    from sparseprefill.profile_scores import read_scores

    return read_scores(_scores(file)) if _scores(file).is_dir() else None


def _scores(file: Path) -> Path:
    from sparseprefill.profile_scores import scores_folder

    return scores_folder(file)
