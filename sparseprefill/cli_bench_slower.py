"""`sparseprefill bench never-slower`: is a patched model ever slower than the stock one, and where does it gain?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sparseprefill.cli_options import Numbers, clear_errors, progress_bar


@click.command("never-slower")
@click.option("--model", help="Hub name or folder.  [default: the model inside]")
@click.option("--lengths", type=Numbers(), help="Prompt lengths.  [default: from 128 to 32k]")
@click.option(
    "--dtypes", default="float32,bfloat16", show_default=True, help="What the model is loaded as, float16 too."
)
@click.option(
    "--method", "methods", multiple=True, metavar="METHOD[:OPTION=VALUE,...]",
    help="Patch with this instead of as patch_model(model) does; may be repeated. `default` is that.",
)  # fmt: skip
@click.option("--calibration", type=click.Path(path_type=Path), help="The calibration file to decide by.")
@click.option("--pairs", type=int, help="Timed pairs a length.  [default: 30 up to 2k tokens, 7 above]")
@click.option("--device", help="cpu or cuda; default: what is there.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@click.option("--markdown", is_flag=True, help="Print Markdown tables.")
def bench_never_slower(
    model: str | None, lengths: tuple[int, ...] | None, dtypes: str, methods: tuple[str, ...],
    calibration: Path | None, pairs: int | None, device: str | None, trust_remote_code: bool, out: Path | None,
    markdown: bool,
) -> None:  # fmt: skip
    """Time whole prefills of a stock model and of its patched twin in pairs, at many lengths.

    A length fails where a slowdown of more than 3 % of dense, or 30 microseconds a layer, is sure: where its lower 95 %
    bound is above the larger of them. The exit status is then 1. Below break-even the patched model runs dense, and the
    last column says how many layers ran sparsely.
    """
    from dataclasses import asdict

    import torch

    from sparseprefill.evals import never_slower as eval_
    from sparseprefill.evals.loading import load_model, provenance
    from sparseprefill.evals.methods import MethodSpec
    from sparseprefill.files import check_folder, write_text

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with clear_errors():
        if out is not None:
            check_folder(out)
        wanted = [each.strip() for each in dtypes.split(",")]
        strange = [each for each in wanted if each not in ("float32", "bfloat16", "float16")]
        if strange:
            raise ValueError(f"--dtypes are float32, bfloat16 and float16, got {strange[0]!r:.80}")
        specs = [None if text == "default" else MethodSpec.parse(text) for text in methods or ("default",)]
        settings: dict[str, Any] = {} if calibration is None else {"calibration": calibration}
        lengths = lengths or eval_.LENGTHS
        found: list[eval_.Slowdown] = []
        passed: list[eval_.PassThrough] = []
        with progress_bar(len(wanted) * len(specs) * len(set(lengths)), "pairs") as progress:
            for dtype in wanted:
                loaded, _ = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
                try:
                    passed.append(eval_.pass_through(loaded, **settings))
                except NotImplementedError as error:  # even two blocks of queries run sparsely here
                    click.echo(f"{dtype}: what a call that stays dense takes is not known: {error}")
                found += eval_.never_slower(loaded, specs, lengths=lengths, pairs=pairs, progress=progress, **settings)
        click.echo(eval_.never_slower_table(found, markdown=markdown))
        for each in passed:
            click.echo(eval_.pass_through_report(each))
        if out is not None:
            written = {
                "provenance": provenance(loaded),
                "cells": [{**asdict(cell), "allowed": cell.allowed, "passes": cell.passes} for cell in found],
                "crossings": [asdict(each) for each in eval_.crossings(found)],
                "pass_through": [asdict(each) for each in passed],
            }
            write_text(out, json.dumps(written, indent=1) + "\n")
            click.echo(f"wrote {out}")
        failed = [each for each in found if not each.passes]
        if failed:
            raise click.ClickException(
                "slower than dense: " + ", ".join(f"{each.method} {each.dtype} at {each.length}" for each in failed)
            )
