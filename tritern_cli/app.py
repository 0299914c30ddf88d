"""All commands. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from . import bench, convert, distill, evaluate, info, search, tune
from .reporting import Refused

EXAMPLES = """**Examples**

    tritern info all-MiniLM-L6-v2
    tritern convert all-MiniLM-L6-v2 minilm-ternary --embedding-bits 8
    tritern distill all-MiniLM-L6-v2 corpus.txt minilm-distilled --max_steps 1000
    tritern eval minilm-distilled corpus.txt --teacher all-MiniLM-L6-v2
    tritern search minilm-distilled corpus.txt "how do I sort a list?"

Models are sentence-transformers: a folder, or a name on the Hugging Face hub. Results go to standard
output, progress and notes to standard error. Exit code 0: done; 1: an error, in one line; 2: wrong usage;
130: Ctrl-C."""


class Verb(TyperCommand):
    """A command whose function yields ``Result``s. Each is printed at once, as text or as JSON.

    All other output goes to standard error. An error that is not a bug is one line there, with exit code 1.
    """

    def invoke(self, ctx: typer.Context) -> None:
        """Run the verb."""
        stdout = sys.stdout
        try:
            with redirect_stdout(sys.stderr):
                for result in super().invoke(ctx):
                    as_json = ctx.params["as_json"]
                    typer.echo(json.dumps(result.data) if as_json else result.text, file=stdout)
        except BrokenPipeError:  # the reader has stopped reading; typer ends quietly
            raise
        except Exception as error:
            if not isinstance(error, _expected()):
                raise
            advice = " (lower the batch size)" if type(error).__name__ == "OutOfMemoryError" else ""
            typer.secho(f"error: {' '.join(str(error).split())}{advice}", err=True, fg="red")
            raise typer.Exit(1) from None


def _expected() -> tuple[type[Exception], ...]:
    """Errors that a user can fix. This imports neither torch nor tritern."""
    library, torch = sys.modules.get("tritern"), sys.modules.get("torch")
    ours = [library.TriternError] if library else []
    memory = [torch.OutOfMemoryError] if torch else []
    return (Refused, OSError, ImportError, *ours, *memory)


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXAMPLES,
)
PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("convert", cls=Verb, epilog=convert.EXAMPLES)(convert.convert)
app.command("distill", cls=Verb, epilog=distill.EXAMPLES, context_settings=PASSED_ON)(distill.distill)
app.command("eval", cls=Verb, epilog=evaluate.EXAMPLES)(evaluate.evaluate)
app.command("info", cls=Verb, epilog=info.EXAMPLES)(info.info)
app.command("bench", cls=Verb, epilog=bench.EXAMPLES)(bench.bench)
app.command("tune", cls=Verb, epilog=tune.EXAMPLES)(tune.tune)
app.command("search", cls=Verb, epilog=search.EXAMPLES)(search.search)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"tritern {version('tritern')}")
        except PackageNotFoundError:  # used from a checkout that is not installed
            typer.echo("tritern, not installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Ternary sentence-embedding models: convert, distil, measure, search."""


def main() -> None:
    """Entry point of the script ``tritern``."""
    # default 1,024 shapes: oneDNN's cached objects would fragment freed memory
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    for stream in (sys.stdout, sys.stderr):  # a character unknown to the terminal must not stop the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="tritern")
