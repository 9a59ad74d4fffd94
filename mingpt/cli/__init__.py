"""The command line, ``mingpt ...``: each command is a few calls into the package.

A command's results go to standard output, everything else to standard error. Under torchrun all processes run the
command; the main one prints. ``cli`` is the group of all commands, which the other four modules add to it.
"""

from mingpt.cli import answers, experiments, lists, sharing
from mingpt.cli.group import cli, main

__all__ = ["answers", "cli", "experiments", "lists", "main", "sharing"]
