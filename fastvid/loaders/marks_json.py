"""ComfyUI's marks of quantized layers: JSON in tensors X.comfy_quant, or in a file's header."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.files import open_regular, reason
from fastvid.loaders.entries import FLOATS, Entry
from fastvid.models.common.config_reader import parse_json
from fastvid.models.wan.weight_names import some

COMFY_QUANT, HEADER = "comfy_quant", "_quantization_metadata"
MAX_MARK = 4096  # bytes; marks have about 60
MAX_VALUES = 200_000  # of a header's
SAMPLES = 16  # layers that are compared with all weights, to find what their names lack
PAIRS = 8  # prefixes that are tried
Mark = Mapping[str, Any]


def read_marks(entries: dict[str, Entry], metadata: Mapping[str, str]) -> dict[str, Mark]:
    """Layer -> its mark. Their tensors are taken out of `entries`. Raises CheckpointError for marks that are broken, or
    have no weight."""
    end = f".{COMFY_QUANT}"
    stored = {name: entries.pop(name) for name in [name for name in entries if name.endswith(end)]}
    marks = {name.removesuffix(end): _parse(text, stored[name].file, name) for name, text in read_texts(stored).items()}
    if lost := [layer for layer in marks if f"{layer}.weight" not in entries]:
        raise CheckpointError(f"{stored[lost[0] + end].file}: {some(lost)} is marked as quantized, but has no weight")
    if HEADER in metadata:
        where = next(iter(entries.values())).file if entries else Path()
        for layer, mark in _placed(_parse_header(metadata[HEADER], where), entries, where).items():
            if _format(marks.setdefault(layer, mark)) != _format(mark):
                raise CheckpointError(f"{where}: {layer:.200} has two marks that differ, in a tensor and in the header")
    return marks


def read_texts(stored: Mapping[str, Entry], most: int = MAX_MARK) -> dict[str, bytes]:
    """Name -> bytes of small tensors. Raises CheckpointError for larger ones."""
    texts = {}
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name, entry in sorted(stored.items(), key=lambda item: item[1].offset):
            size = math.prod(entry.shape)
            if entry.dtype not in ("U8", "I8") or size > most:
                raise CheckpointError(
                    f"{entry.file}: {name:.200} is {entry.dtype} {list(entry.shape)}; "
                    f"at most {most:,} bytes (U8) are read"
                )
            try:
                if entry.file not in opened:
                    opened[entry.file] = stack.enter_context(open_regular(entry.file))
                opened[entry.file].seek(entry.offset)
                texts[name] = opened[entry.file].read(size)
            except OSError as error:
                raise CheckpointError(f"{entry.file} cannot be read: {reason(error)}") from None
    return texts


def joined(texts: Mapping[str, str], more: Mapping[str, str], file: Path) -> dict[str, str]:
    """The texts in the headers of two shards, of which each may have marks of its own layers."""
    made = {**texts, **more}
    if HEADER in texts and HEADER in more and texts[HEADER] != more[HEADER]:
        both = {**_parse_header(texts[HEADER], file), **_parse_header(more[HEADER], file)}
        made[HEADER] = json.dumps({"layers": both})
    return made


def parse_object(text: bytes | str, file: Path, name: str, most: int = 1000) -> dict[str, Any]:
    """A JSON object, perhaps with NUL behind it. Raises CheckpointError."""
    try:
        value = parse_json(text.rstrip(b"\0 ") if isinstance(text, bytes) else text, most)
    except ValueError as error:
        raise CheckpointError(f"{file}: {name:.200} is no JSON: {str(error):.200}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {name:.200} holds a JSON {type(value).__name__}; an object {{...}} is expected")
    return value


def _parse(text: bytes, file: Path, name: str) -> Mark:
    return _check(parse_object(text, file, name), file, name)


def _parse_header(text: str, file: Path) -> dict[str, Mark]:
    layers = parse_object(text, file, HEADER, MAX_VALUES).get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(mark, dict) for mark in layers.values()):
        raise CheckpointError(f"{file}: {HEADER} has no layers with a mark each")
    return {layer: _check(mark, file, f"{HEADER}: {layer:.200}") for layer, mark in layers.items()}


def _check(mark: dict[str, Any], file: Path, name: str) -> Mark:
    """A mark with its parameters on one level."""
    inner = mark.get("params")
    made = {**(inner if isinstance(inner, dict) else {}), **mark}
    if not isinstance(made.get("format"), str):
        raise CheckpointError(
            f"{file}: {name:.200} names no format (as INT8-Fast writes it), so the weights cannot be read; take "
            "ComfyUI's own int8 or fp8 file, or a 16-bit one"
        )
    return made


def _format(mark: Mark) -> tuple[Any, ...]:
    """What weights are read by."""
    turned = bool(mark.get("convrot"))
    return mark["format"], turned, mark.get("convrot_groupsize", 256) if turned else 0


# ---------------------------------------------------------------- marks in the header, whose names may lack a prefix


def _placed(marks: Mapping[str, Mark], entries: Mapping[str, Entry], where: Path) -> dict[str, Mark]:
    """The marks under the names that the layers have in the file."""
    layers = {name.removesuffix(".weight"): entry for name, entry in entries.items() if name.endswith(".weight")}
    made = {layer: mark for layer, mark in marks.items() if layer in layers}
    rest = {layer: mark for layer, mark in marks.items() if layer not in layers}
    if rest:
        found = _renamed(list(rest), [layer for layer in layers if layer not in made])
        made |= {found[layer]: mark for layer, mark in rest.items() if layer in found}
        unmarked = [layer for layer, entry in layers.items() if layer not in made and _stays_unknown(entry)]
        if len(found) < len(rest) and unmarked:
            lost = [layer for layer in rest if layer not in found]
            raise CheckpointError(
                f"{where}: {HEADER} marks {some(lost)}, which are not there, and {some(unmarked)} have no mark; take "
                "another copy"
            )
    return made


def _stays_unknown(entry: Entry) -> bool:
    return entry.source is None and entry.dtype not in FLOATS


def _renamed(wanted: list[str], layers: list[str]) -> dict[str, str]:
    """Layers as marks name them -> as the file does, where one prefix takes the place of another."""
    votes: Counter[tuple[str, str]] = Counter()
    for mark in wanted[:: max(1, len(wanted) // SAMPLES)][:SAMPLES]:
        votes.update(filter(None, (_difference(mark, layer) for layer in layers)))
    there, best = frozenset(layers), dict[str, str]()
    for (old, new), _ in votes.most_common(PAIRS):
        found = {mark: new + mark.removeprefix(old) for mark in wanted if mark.startswith(old)}
        found = {mark: layer for mark, layer in found.items() if layer in there}
        best = found if len(found) > len(best) else best
    return best


def _difference(mark: str, layer: str) -> tuple[str, str] | None:
    """The two prefixes that differ before a common end of whole words; None if there is no such end."""
    ours, theirs = mark.split("."), layer.split(".")
    same = sum(1 for _ in _common(reversed(ours), reversed(theirs)))
    if not same:
        return None
    return "".join(f"{word}." for word in ours[:-same]), "".join(f"{word}." for word in theirs[:-same])


def _common(first: Iterable[str], second: Iterable[str]) -> Iterator[str]:
    for a, b in zip(first, second, strict=False):
        if a != b:
            return
        yield a
