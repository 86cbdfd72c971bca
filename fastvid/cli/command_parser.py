"""The parser of one command: errors instead of exits, unknown flags named with the nearest, and what commands share."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from fastvid.checks import near_name
from fastvid.cli.flags import FLAGS, part, verbs_with
from fastvid.errors import InvalidRequest
from fastvid.requests.aliases import ALIASES

EPILOG = """exit status:
  0 done, 1 failed, 2 bad usage or request, 130 interrupted (no partial output is left)

environment:
  FASTVID_MODEL, FASTVID_DEVICE, FASTVID_DTYPE, FASTVID_BACKEND, FASTVID_ATTENTION are defaults for the flags;
  FASTVID_PROMPT_ENDPOINT, FASTVID_PROMPT_MODEL, FASTVID_PROMPT_KEY are for --expand-prompt;
  FASTVID_LOG (debug, info, warning, error) is the log level, on standard error; --verbose sets info;
  FASTVID_DEBUG=1 shows tracebacks"""


class UsageError(InvalidRequest):
    """The command line is invalid."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of ending the process. Flags cannot be abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def add_output_flags(self, about: str = "", quiet: bool = True) -> None:
        """Adds --quiet, --verbose and --json. about: ends the help of --json, such as " about the video"."""
        if quiet:
            self.add_argument("--quiet", action="store_true", help="show no progress")
        self.add_argument("--verbose", action="store_true", help="log to standard error what is loaded and chosen")
        self.add_argument("--json", action="store_true", help=f"print one JSON object{about}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def check_flags(self, words: list[str]) -> None:
        """Raises UsageError for an unknown flag, naming the nearest one or the verbs that take it. Called before
        argparse, whose own error may be about a missing word instead."""
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in words:
            flag = word.split("=", 1)[0]
            if word == "--":
                return
            if flag.startswith("--") and flag not in known:
                if verbs := verbs_with(flag):
                    command = self.prog.removeprefix("fastvid ")
                    self.error(f"{flag}: {command} does not take it; these do: {', '.join(verbs)}")
                near = near_flag(flag, known)
                self.error(f"unknown flag {flag:.60}" + (f"; the nearest is {near}" if near else ""))


def near_flag(flag: str, known: list[str]) -> str:
    """The flag that an unknown one is meant for: by the argument's name in Python or in other programs, or by a near
    spelling. "" if none is near."""
    name = flag.strip("-").replace("-", "_")
    name = ALIASES.get(name, name)
    if name in FLAGS and FLAGS[name].name in known:
        return FLAGS[name].name
    near = near_name(flag.strip("-"), tuple(word.strip("-") for word in known))
    return f"--{near}" if near else ""


def lora(text: str) -> tuple[str, float] | tuple[str, float, str]:
    """Parses FILE[:SCALE][:high or :low], also the other way round; the scale is 1 by default. The file name may
    contain colons."""
    path, scale, expert = text, "", ""
    while (word := path.rpartition(":"))[0]:
        if not expert and word[2].lower() in ("high", "low"):
            expert = word[2].lower()
        elif not scale and _is_number(word[2]):
            scale = word[2]
        else:
            break
        path = word[0]
    return (path, float(scale or 1), expert) if expert else (path, float(scale or 1))


def _is_number(text: str) -> bool:
    try:
        return bool(text) and isinstance(float(text), float)
    except ValueError:
        return False


def parts_of(flags: argparse.Namespace) -> dict[str, Any] | None:
    """`parts=` of `load`, from --part and the flags of single parts; None without any. Raises UsageError."""
    own = {name: getattr(flags, name) for name in ("transformer", "text_encoder", "vae", "vace")}
    named = [*(flags.part or ()), *((name, value) for name, value in own.items() if value)]
    names = [name for name, _ in named]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"the part {twice[0]} is given twice; leave one out")
    return dict(named) or None


def add_files(parser: Any) -> None:
    parser.add_argument(
        "--part",
        type=part,
        action="append",
        metavar="NAME=PATH",
        help="source of a part of the model: vae, text_encoder, image_encoder, tokenizer, transformer_2, vace, vace_2, "
        "or base (a whole folder, for everything that a single file lacks); may be repeated",
    )
    parser.add_argument(
        "--transformer",
        action="append",
        metavar="FILE",
        help="the transformer's file; twice for two experts, high noise first",
    )
    parser.add_argument("--text-encoder", metavar="FILE", help="the text encoder's file")
    parser.add_argument("--vae", metavar="FILE", help="the VAE's file")
    parser.add_argument(
        "--vace",
        action="append",
        metavar="FILE",
        help="a VACE module, onto a text-to-video model; twice for two experts, high noise first",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="the published model that the weights are, such as wan2.1-i2v-14b-720p, where their names do not tell",
    )
    parser.add_argument(
        "--quantize",
        metavar="NAME",
        help="hold the linear layers of transformers and text encoder in 8 bits: fp8, int8 or none, or for each part, "
        "such as transformer=fp8,text_encoder=int8 (default: as the files are)",
    )
    parser.add_argument(
        "--lora",
        type=lora,
        action="append",
        metavar="FILE:SCALE",
        help="a LoRA to merge into the model: a file, a folder or a hub name (scale 1 if none is given); "
        "FILE:SCALE:high or FILE:SCALE:low for one of two experts, if its name does not say it; may be repeated",
    )
