"""What a checkpoint is, known before any weight is read: its parts, and what is missing or wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastvid.errors import CheckpointError
from fastvid.files import links_out
from fastvid.models.preset import Preset
from fastvid.models.registry import EXPERTS, Config, kind_of
from fastvid.models.wan import weight_names
from fastvid.ops.quantized import Spec

SIBLINGS_KEYS = ("inject_sample_info",)


@dataclass(frozen=True)
class Part:
    """One module of a checkpoint. config is None where no module can be made of it; problems say why. stated: what its
    config.json says, or would say in diffusers' layout; None if that can't be read."""

    name: str
    config: Config | None
    stated: Mapping[str, Any] | None = None
    files: tuple[Path, ...] = ()
    parameters: int = 0
    dtypes: tuple[str, ...] = ()
    bytes: int = 0
    problems: tuple[str, ...] = ()
    origins: Mapping[str, weight_names.Origin] | None = field(
        default=None, repr=False
    )  # where files name weights otherwise
    quantized: Mapping[str, Spec] = field(default_factory=dict, repr=False)  # by the module's names of weights


@dataclass(frozen=True)
class Checkpoint:
    """A model: a folder, or the file of its transformer. recipe and text_length are None where what they follow from
    could not be read.

    pipeline: the class that model_index.json names. alternatives: other variants with the very same shapes.
    """

    folder: Path
    pipeline: str
    parts: tuple[Part, ...]
    preset: Preset | None
    alternatives: tuple[str, ...]
    text_length: int | None
    problems: tuple[str, ...]
    tokenizer: Path = Path()

    def part(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    @property
    def configs(self) -> dict[str, Any]:
        return {part.name: part.config for part in self.parts}

    @property
    def quantized(self) -> dict[str, Mapping[str, Spec]]:
        """Of each part the weights that stay quantized."""
        return {part.name: part.quantized for part in self.parts if part.quantized}

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of its transformers, the one for high noise first."""
        return tuple(part.name for part in self.parts if part.name in EXPERTS)

    def check(self) -> Checkpoint:
        """Itself if nothing is missing or wrong; CheckpointError with all of its problems otherwise."""
        if self.problems:
            raise CheckpointError(
                f"{self.folder} cannot be loaded:\n" + "\n".join(f"- {text}" for text in self.problems)
            )
        return self

    def require_preset(self) -> Preset:
        """The preset of a checkpoint that passed `check`."""
        assert self.preset is not None, "check() comes first"
        return self.preset

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        parts = {part.name: _describe(part, self.folder) for part in self.parts}
        recipe = asdict(self.preset) if self.preset else None
        rest: dict[str, Any] = {"text_length": self.text_length, "tokenizer": _short(self.tokenizer, self.folder)}
        rest |= {"problems": list(self.problems)}
        if links := self.links:
            rest["links"] = {_short(file, self.folder): str(real) for file, real in links.items()}
        named = {"recipe": recipe, "alternatives": list(self.alternatives)}
        return {"folder": str(self.folder), "pipeline": self.pipeline, **named, "parts": parts, **rest}

    @property
    def links(self) -> dict[Path, Path]:
        """The files that links lead out of the model's folder, with their real places."""
        read = {file for part in self.parts for file in part.files} | {self.tokenizer} - {Path()}
        for folder in {self.folder, self.tokenizer} - {Path()}:
            read |= {*folder.glob("*.json"), *folder.glob("*/*.json"), *folder.glob("*.model")}
        return links_out(self.folder, sorted(read))


def flat_config(config: Config) -> dict[str, Any]:
    """A config as its file has it: VACE's transformer without a level of its own, and Wan's without what only siblings
    have."""
    values = asdict(config)
    values = values.pop("transformer", {}) | values
    return {key: value for key, value in values.items() if value or key not in SIBLINGS_KEYS}


def quantized_layers(part: Part) -> list[dict[str, Any]]:
    """How many of a part's weights stay quantized, by format, and how products with them are computed: in 8 bits, or
    exactly with the dequantized weight."""
    kinds = Counter((spec.format, spec.rotation, spec.eight_bit) for spec in part.quantized.values())
    return [
        {"format": name, "weights": count, "products": "8-bit" if eight else "exact"}
        | ({"rotated": rotation} if rotation else {})
        for (name, rotation, eight), count in kinds.most_common()
    ]


def quantized_text(part: Part) -> str:
    """The same in words."""
    return "; ".join(
        f"{one['weights']} weights in {'rotated ' * ('rotated' in one)}{one['format']}, {one['products']} products"
        for one in quantized_layers(part)
    )


def _short(file: Path, folder: Path) -> str:
    """A path as it is shown: within the model's folder from there on; nothing for one that is missing."""
    if file == Path():
        return ""
    return str(file.relative_to(folder)) if file != folder and file.is_relative_to(folder) else str(file)


def _describe(part: Part, folder: Path) -> dict[str, Any]:
    files = [_short(file, folder) for file in part.files]
    config = flat_config(part.config) if part.config else part.stated and dict(part.stated)
    kind = {"class": (part.stated or {}).get("_class_name", kind_of(part.name).class_name), "config": config}
    size = {"parameters": part.parameters, "dtypes": list(part.dtypes), "bytes": part.bytes}
    size |= {"quantized": layers} if (layers := quantized_layers(part)) else {}
    size |= {"bits_per_weight": round(8 * part.bytes / part.parameters, 2)} if part.parameters else {}
    return {**kind, **size, "files": files, "problems": list(part.problems)}
