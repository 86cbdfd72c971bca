"""The command line: from words to calls."""

from fastvid.cli.commands import main

__all__ = ["main"]
