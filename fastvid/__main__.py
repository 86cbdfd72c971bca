"""`fastvid` and `python -m fastvid`: the command line, in a process of its own."""

from __future__ import annotations

import os
import sys

from fastvid import env


def main() -> int:
    """Prepares the process, before torch is imported, and runs the command."""
    _open_standard_streams()
    os.environ.update(env.thread_variables())
    from fastvid.cli.commands import main as run

    return run()


def _open_standard_streams() -> None:
    """Opens the null device for those that the caller has closed, or a video file would get their number, and with it
    what is meant for the terminal."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - stays open


if __name__ == "__main__":
    sys.exit(main())
