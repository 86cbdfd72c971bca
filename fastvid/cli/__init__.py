"""The command line: from words to calls."""

from fastvid.cli.main import main

__all__ = ["main"]
