"""The command ``mingpt`` itself, and how each command ends."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from typing import Any, NoReturn

import click

from mingpt import distributed
from mingpt.cli.options import import_tasks
from mingpt.cli.output import echo, is_main
from mingpt.trainer import DivergedError

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
_IMPORT_HELP = "A file with further tasks."

_IMPORT = click.Option(  # eager, so that the other options know the tasks
    ["--import"], multiple=True, is_eager=True, expose_value=False, callback=import_tasks, help=_IMPORT_HELP
)


class _Group(click.Group):
    """Gives each of its commands the option ``--import``."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.params.append(_IMPORT)
        super().add_command(cmd, name)


@click.group(cls=_Group, no_args_is_help=False, context_settings=_SETTINGS)
@click.version_option(package_name="mingpt-prefix-tuning", prog_name="mingpt")
def cli() -> None:
    """Prefix-tuning of a small transformer on synthetic tasks.

    \b
    mingpt reproduce                      the whole experiment, in minutes
    mingpt prefix SortAscending+Add1      train one more prefix
    mingpt generate --task Add1 "1 2 3 4 5 6 7 8 9 10"

    On several processes, with two dashes so that torchrun leaves the options alone:

    \b
    torchrun --nproc-per-node 2 -m mingpt -- reproduce --run FOLDER
    """


def main() -> None:
    """Run the command line.

    A mistake gives one line and exit code 2, a training that diverges 1, a signal to stop 128 and its number.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def stop(number: int, frame: object) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
        logging.basicConfig(format="%(message)s", level=logging.INFO if is_main() else logging.WARNING)
        sys.exit(cli(standalone_mode=False, prog_name="mingpt"))
    except (click.Abort, KeyboardInterrupt):
        _stop(received[0] if received else signal.SIGINT)
    except DivergedError as error:
        echo(f"error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (click.ClickException, ImportError, ValueError, OSError, distributed.OtherProcessError) as error:
        if received:  # native code that a signal's exception went through has made another one of it
            _stop(received[0])
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        text = re.sub(r"^\[Errno \d+\] ", "", text)
        if isinstance(error, ImportError) and error.name in ("transformers", "peft"):
            text += "; pip install 'mingpt-prefix-tuning[hf]'"
        if isinstance(error, click.UsageError) and error.ctx:
            text += f" (see {error.ctx.command_path} --help)"
        echo(f"error: {' '.join(text.splitlines())}", err=True)  # on the main process, also for another one's error
        sys.exit(2)
    except RuntimeError as error:
        if not re.search("gloo|NCCL", str(error)):
            raise
        echo(f"error: contact with another process is lost: {str(error).splitlines()[0]}", err=True)
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int) -> NoReturn:
    """Say that a signal has ended the command, and how to go on."""
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}.get(signal.Signals(number), "hung up")
    echo(f"{word}; what was saved is kept, and the same command goes on from it", err=True)
    sys.exit(128 + number)
