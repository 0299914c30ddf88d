"""The command line, called in this process."""

import json

from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from tritern_cli.app import app


def run(*arguments, input=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=input, catch_exceptions=False)


def answer(*arguments, input=None):
    """The JSON objects on standard output, which holds nothing else."""
    result = run(*arguments, "--json", input=input)
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def error(*arguments, input=None):
    """The one line of an error."""
    result = run(*arguments, input=input)
    assert result.exit_code == 1 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def wrong_usage(*arguments):
    """The message, without its frame."""
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


def load(path):
    return SentenceTransformer(str(path), device="cpu")
