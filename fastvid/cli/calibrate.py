"""`fastvid calibrate`: from its flags to `pipe.calibrate`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastvid.cli import arguments
from fastvid.cli.command_parser import UsageError
from fastvid.cli.flags import FLAGS
from fastvid.cli.progress import Progress


def run(flags: argparse.Namespace) -> None:
    """Measures, and says where the result is."""
    if flags.measured is None:
        raise UsageError("say what to measure: --cache (see fastvid calibrate --help)")
    options: dict[str, Any] = {name: one for name in FLAGS if (one := getattr(flags, name, None)) is not None}
    options |= {} if flags.prompt is None else {"prompts": [flags.prompt]}
    options |= {} if flags.output is None else {"output": flags.output}
    model, progress = arguments.model_of(flags, {}), Progress(quiet=flags.quiet)
    try:
        progress.say(f"loading {model}")
        from fastvid import api

        with api.load(model, **arguments.load_arguments(flags, {})) as pipe:
            progress.say("measuring")
            result = pipe.calibrate(flags.measured, **options)
    finally:
        progress.close()
    if flags.json:
        print(json.dumps(result))
    else:
        progress.say(f"{result['file']}: {result['steps']} steps of {result['prompts']} videos")
