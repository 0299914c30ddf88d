"""Code blocks of Markdown pages, run or at least parsed by the command that they call.

How a block is examined follows from its tag:

    python      run; the blocks of a page share a namespace. One that raises must be followed by its error
    text, json  after another block: exactly what that block printed, apart from white space
    console     `$ command` lines, run, and their output
    bash        commands, run
    no tag      indented, README only: commands that are parsed, or one of ``NOT_COMMANDS``

Two comments before a block change that. ``<!-- not run: reason -->``: commands are parsed and not run.
``<!-- numbers vary -->``: numbers in its output may differ.
"""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

from tritern_kernels import cpu

ROOT = Path(__file__).parents[2]
NOT_COMMANDS = "y[m, n] = scale_x[m]", "kernels/tritern_kernels/"
COMMANDS = "make", "python", "pip", "bash", "torchrun", "tritern", "mkdocs", "OUT=", "mkdir", "cat", "ls"


class Block(NamedTuple):
    tag: str
    content: str
    line: int
    comments: str


def blocks(text):
    comments = ""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "html_block":
            comments += token.content
        elif token.type in ("fence", "code_block"):
            line = (token.map or [0])[0] + (2 if token.type == "fence" else 1)
            yield Block(token.info.strip(), token.content, line, comments)
            comments = ""
        elif token.type.endswith("_open"):
            comments = ""


def same(shown, printed, numbers_vary):
    """Whether a page shows what was printed; white space may differ, and numbers and versions where they
    vary.
    """

    def plain(text):
        text = text.replace(f"{Path.cwd()}/", "")
        if numbers_vary:
            text = re.sub(r"\d[\d.,]*(\+\w+)?", "#", re.sub(r"gpu [^,]*", "gpu #", text))
        return text.split()

    return plain(shown) == plain(printed)


# ---------------------------------------------------------------- commands


class Accepted(Exception):
    """The arguments of a script were understood."""


def parse_only(monkeypatch):
    """Scripts stop when their arguments are parsed, and so does ``tritern`` if they hand theirs on to it."""

    def command():
        parse_cli(sys.argv[1:])
        raise Accepted

    monkeypatch.setattr("tritern_cli.app.main", command)
    original = argparse.ArgumentParser.parse_known_args

    def parse(self, *args, **kwargs):
        found, rest = original(self, *args, **kwargs)
        if rest:  # for another parser, or a usage error of the caller's
            return found, rest
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


def parse_cli(arguments):
    """Parse the arguments of ``tritern`` without doing anything."""
    import typer

    from tritern.distillation.arguments import parse_settings
    from tritern_cli.app import app

    group = typer.main.get_command(app)
    with group.make_context("tritern", list(arguments)) as context:
        rest = [*context._protected_args, *context.args]
        name, verb, rest = group.resolve_command(context, rest)  # pyright: ignore[reportAttributeAccessIssue]
        inner = verb.make_context(name, rest, parent=context)
        if name == "distill":
            parse_settings(inner.args)


def run_cli(arguments, standard_input, monkeypatch):
    from typer.testing import CliRunner

    from tritern_cli.app import app

    monkeypatch.setattr("tritern_cli.bench._process", lambda: ThreadPoolExecutor(1))  # starts at once
    result = CliRunner().invoke(app, arguments, input=standard_input, prog_name="tritern")
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_script(arguments, monkeypatch):
    """``python SCRIPT ...`` or ``python -m MODULE ...`` in this process."""
    with monkeypatch.context() as patch:
        module = arguments[0] == "-m"
        script = arguments[1] if module else str(ROOT / arguments[0])
        patch.setattr(sys, "argv", [script, *arguments[1 + module :]])
        patch.setattr(sys, "path", [*sys.path, str(Path(script).parent)])
        (runpy.run_module if module else runpy.run_path)(script, run_name="__main__")


def check_command(words, monkeypatch):
    """A command that is not run: is it there, and does it take these arguments?"""
    words = [w for i, w in enumerate(words) if not (re.fullmatch(r"[A-Z_]+=.*", w) and i < 2)]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(target in targets for target in rest if "=" not in target), words
    elif program == "pip":
        text = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"tritern\[(.+?)\]", " ".join(rest)):
            assert all(re.search(rf"^{name} = \[", text, re.MULTILINE) for name in extra.split(",")), extra
    elif program == "bash":
        subprocess.run(["bash", "-n", ROOT / rest[0]], check=True)
    elif program == "tritern":
        parse_cli(rest)
    elif program == "torchrun" and "--no-python" in rest:
        check_command(rest[rest.index("tritern") :], monkeypatch)
    elif program in ("python", "torchrun"):
        start = next(i for i, w in enumerate(rest) if w == "-m" or w.endswith(".py"))
        assert program == "torchrun" or start == 0, words
        with monkeypatch.context() as patch, pytest.raises(Accepted):
            parse_only(patch)
            run_script(rest[start:], patch)
    else:
        pytest.fail(f"no way to check {program!r}: {' '.join(words)}")


def run_command(command, monkeypatch, output):
    """Run one command; what it prints goes to ``output``."""
    *feeding, last = command.split(" | ")
    program, *rest = shlex.split(last, comments=True)
    given = None
    if feeding:
        given = subprocess.run(
            ["bash", "-c", " | ".join(feeding)], capture_output=True, text=True, check=True
        )
        given = given.stdout
    if program == "tritern":
        result = run_cli(rest, given, monkeypatch)
        output.write(result.stdout + (result.stderr if result.exit_code else ""))
        return result.exit_code
    if program == "python":
        with contextlib.redirect_stdout(output):
            run_script(rest, monkeypatch)
        return 0
    done = subprocess.run(["bash", "-c", last], input=given, capture_output=True, text=True)
    output.write(done.stdout + done.stderr)
    return done.returncode


def commands(content):
    """The commands of a shell block, continued lines joined."""
    return [
        line for line in content.replace("\\\n", " ").splitlines() if line.strip() and line.lstrip()[0] != "#"
    ]


# ---------------------------------------------------------------- kinds of blocks


class Page:
    """The blocks of a page, examined in order."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.namespace = monkeypatch, {"__name__": "__page__"}
        self.printed = None
        # FBGEMM's first, on every machine
        order = {bits: sorted(cpu.fastest(bits)) for bits in (8, 16)}
        monkeypatch.setattr(cpu, "fastest", order.__getitem__)

    def examine(self, block, following):
        if block.tag in ("text", "json"):
            assert self.printed is not None, "output without a block before it that prints"
            assert same(block.content, self.printed, "numbers vary" in block.comments), self.printed
            self.printed = None
            return
        self.printed = None
        kinds = {"python": self.python, "console": self.console, "bash": self.bash, "": self.indented}
        assert block.tag in kinds, f"unknown tag {block.tag!r}"
        kinds[block.tag](block, following is not None and following.tag in ("text", "json"))

    def python(self, block, shown):
        code = compile("\n" * (block.line - 1) + block.content, "page", "exec")
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                exec(code, self.namespace)
        except Exception as error:
            if not shown:
                raise
            output.write(f"{type(error).__name__}: {error}")
        if shown:
            self.printed = output.getvalue()

    def console(self, block, shown):
        for part in re.split(r"^\$ ", block.content.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            output = io.StringIO()
            run_command(command, self.monkeypatch, output)
            assert same(expected, output.getvalue(), "numbers vary" in block.comments), output.getvalue()

    def bash(self, block, shown):
        not_run = re.search(r"not run: \w+", block.comments)
        if block.content.startswith("cat >"):
            subprocess.run(["bash", "-c", block.content], check=True)
            return
        for command in commands(block.content):
            if not_run:
                check_command(shlex.split(command, comments=True), self.monkeypatch)
            else:
                output = io.StringIO()
                code = run_command(command, self.monkeypatch, output)
                assert code == 0, f"{command}: exit code {code}: {output.getvalue()}"

    def indented(self, block, shown):
        if block.content.startswith(NOT_COMMANDS):
            return
        for command in commands(block.content):
            assert command.startswith(COMMANDS), f"neither a command nor known otherwise: {command}"
            check_command(shlex.split(command, comments=True), self.monkeypatch)
