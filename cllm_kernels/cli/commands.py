"""What the commands of ``cllm`` and ``cllm-train`` share: how they end on bad input, and what options are checked for
before any work is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import typer
from typer.core import TyperGroup

DTYPES = ("float32", "bfloat16", "float16")
_UsageError = typer.BadParameter.__base__  # of click, or of the copy of click that newer versions of typer hold


class Commands(TyperGroup):
    """Commands that end with one line on stderr and exit code 2 where an option is refused, or where what they call
    raises one of the package's errors for bad input."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # typer ends quietly
        except _UsageError as error:
            fail(error.format_message())
        except (ImportError, NotImplementedError, OSError, ValueError) as error:
            fail(str(error))


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends a command with one line on stderr."""
    typer.echo(f"{typer.style('error:', fg='red')} {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


# What follows are callbacks of options.


def one_of(*allowed: str) -> Callable[[str], str]:
    """An option with these values."""

    def check(value: str) -> str:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r}; allowed are {', '.join(allowed[:-1])} and {allowed[-1]}")
        return value

    return check


def utf8(value: str) -> str:
    """Text, which is UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"the text must be UTF-8; what stands at character {error.start} is not") from None
    return value


def available_device(value: str) -> str:
    """The CPU, or the accelerator that this machine and this torch have."""
    there = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        there += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if value not in there:
        raise typer.BadParameter(f"{value!r}; this machine and this torch have {', '.join(there)}")
    return value


def output_file(path: Path | None) -> Path | None:
    """A file to write, in a folder that is there."""
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {path.parent} to write {path.name} to")
    return file_in_new_folder(path)


def file_in_new_folder(path: Path | None) -> Path | None:
    """A file to write, in a folder that is made where it is missing."""
    if path is None:
        return None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; it must be a file")
    output_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise typer.BadParameter(f"{path} may not be written")
    return path


def output_folder(path: Path) -> Path:
    """A folder to write to, which is made where it is missing."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise typer.BadParameter(f"{there} is a file; it must be a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"the folder {there} may not be written to")
    return path


def apart(output: Path | None, *others: Path | None) -> None:
    """Raises ValueError where a file to write is one that is read, or another one to write."""
    for other in others:
        if output is not None and other is not None and output.resolve() == other.resolve():
            raise ValueError(f"{output} would be written over {other}; name another file")
