"""The command line: one thin file a command, nothing heavy imported to list or to explain."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from convince.errors import Mistake, nearest

COMMANDS = {
    "train": "Train a classifier on your data and write a report.",
    "compare": "Try parts against a baseline on your data, with honest statistics.",
    "models": "List the networks: what they cost and what they reach.",
    "search": "Look for a network on your data within a budget.",
    "evaluate": "Score a run on data.",
    "predict": "Answer for files with a run.",
    "explain": "Show where a run looks.",
    "probe": "Measure something about a run.",
    "attack": "Look for small changes that fool a run.",
    "compress": "Make a run smaller.",
    "parts": "List the parts.",
    "show": "Tell all about a part.",
    "check": "Run the conformance checks on a part, also your own.",
    "prove": "Run a paper's claim and store the evidence.",
    "doctor": "Say what this machine can do.",
}


class Commands(click.Group):
    """Loads a command's file only when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"convince.cli.{name}").command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            raise click.UsageError(f"no command is named {args[0]!r}{nearest(args[0], list(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from convince import __version__

        click.echo(f"convince {__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def convince() -> None:
    """Deep classification in which every published method is a part you switch on by name.

    Without DATA, commands use the embedded digits: try `convince train`.
    """


def main() -> None:
    """Run the command line. Exit codes: 0 done, 2 the person's mistake, 1 ours."""
    as_json = "--json" in sys.argv
    try:
        code = convince.main(prog_name="convince", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        _fail(error.format_message(), as_json)
    except Mistake as error:
        _fail(str(error), as_json)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _fail(message: str, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": message}))
    click.echo(f"convince: {message}", err=True)
    sys.exit(2)


def json_option(command: Callable) -> Callable:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")(command)


def parts_option(command: Callable) -> Callable:
    def found(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> None:
        from convince.parts import add_path

        for path in value:
            add_path(path)

    return click.option(
        "--parts", "own", multiple=True, metavar="PATH", expose_value=False, callback=found, is_eager=True, help="Parts of your own: a file or folder."
    )(command)


def trust_option(command: Callable) -> Callable:
    return click.option("--trust", is_flag=True, help="Allow the run's own copied parts (code) to run.")(command)


def emit(value: Any, as_json: bool, text: str) -> None:
    """Print the JSON object, or the text for a person."""
    click.echo(json.dumps(value, ensure_ascii=False, default=str) if as_json else text)


def free_folder(out: str | None, stem: str) -> Path:
    """``out``, which must not exist, or the next free ``runs/STEM-N``."""
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise Mistake(f"--out {out}: exists already; choose another name, or go on with --resume {out}")
        return folder
    number = 1
    while (folder := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return folder
