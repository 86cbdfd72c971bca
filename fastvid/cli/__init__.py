"""The command line."""

from fastvid.cli.commands import main

__all__ = ["main"]
