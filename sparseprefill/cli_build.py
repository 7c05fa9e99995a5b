"""The command that builds what is compiled on the machine that uses it."""

from __future__ import annotations

import click

from sparseprefill.cli_options import clear_errors


@click.command("build-cpu")
@click.option("--force", is_flag=True, help="Build it again, even where it is built.")
@click.option("--remove", is_flag=True, help="Instead remove what was built, for this and any other machine.")
def build_cpu(force: bool, remove: bool) -> None:
    """Build the native library of the CPU, for this machine's processor: attention, and the products of `sale`.

    Needs a C++ compiler (g++, clang++, or what CXX names) and nothing else. It is checked against the reference before
    it is installed, in $SPARSEPREFILL_NATIVE or the user's cache; nothing is built unless this command is called.
    """
    from sparseprefill.kernels import native_build

    with clear_errors():
        if remove and force:
            raise ValueError("--force builds, --remove removes: give one of them")
        if remove:
            number = native_build.remove()
            what = f"{number} librar{'y' if number == 1 else 'ies'} from {native_build.cache_folder()}"
            click.echo(f"removed {what}" if number else "nothing is built")
            return
        native_build.build(force=force, say=click.echo)
        found = native_build.built()
        if found is None:
            raise ValueError(native_build.why_not_built())
        path, record = found
        click.echo(f"native library  {path}")
        click.echo(f"instructions    {record.instructions}")
        click.echo(f"compiled by     {record.compiler}")
        click.echo(f"with            {record.flags}")
        click.echo(
            f"check           passed: attention and scores equal the reference; {record.seconds:.1f} s with compiling"
        )
