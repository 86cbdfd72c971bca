"""What peft says of an adapter beside its weights: alpha for each module, rank-stabilized scaling, and what it needs
that a merge cannot give. From the header (written by diffusers) or from adapter_config.json (written by peft).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvid import notices
from fastvid.errors import CheckpointError
from fastvid.loaders.name_patterns import NamePatterns
from fastvid.models.common.config_reader import parse_json, read_json

HEADER_KEY = "lora_adapter_metadata"  # under which diffusers stores it
FILE = "adapter_config.json"
PREFIXES = ("transformer.", "transformer_2.")  # in front of the header's keys
PATTERNS = ("alpha_pattern", "rank_pattern")
KINDS = ("LORA", "LOHA", "LOKR")
# These change the base weights too, which are not in the file.
REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNSUPPORTED = (
    "use_qalora",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)


@dataclass(frozen=True)
class Settings:
    """peft's settings of one transformer's adapter. values: as stored; empty if nothing is said. patterns: of PATTERNS,
    parsed."""

    path: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    patterns: Mapping[str, NamePatterns] = field(default_factory=dict)

    @property
    def decomposes(self) -> bool:
        """Whether it is a DoRA."""
        return bool(self.values.get("use_dora"))

    def factor(self, names: Sequence[str], rank: int | None) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank) (arXiv 2312.03732); 1 if nothing is said. names: those of
        the module. rank: of its tensors; None if they have none. Raises CheckpointError."""
        if not self.values:
            return 1.0
        told = self._number("r", "rank_pattern", names, rank)
        if rank is not None and told != rank:
            raise CheckpointError(f"{self.path}: peft's settings say rank {told:g} for {names[0]}, its weights {rank}")
        alpha = self._number("lora_alpha" if "lora_alpha" in self.values else "alpha", "alpha_pattern", names, told)
        if told is None or alpha is None:
            return 1.0
        return alpha / (math.sqrt(told) if self.values.get("use_rslora") else told)

    def _number(self, key: str, patterns: str, names: Sequence[str], default: float | None) -> float | None:
        """A value that the first matching pattern gives, or the key; `default` if neither is there."""
        try:
            pattern = self.patterns[patterns].first(names)
        except ValueError as error:
            raise CheckpointError(f"{self.path} has patterns that cannot be used, {patterns}: {error}") from None
        value = self.values.get(key, default) if pattern is None else self.values[patterns][pattern]
        if value is None:
            return default
        positive = key == "r"
        number = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= 1e9  # no NaN
        if not number or (positive and value <= 0):
            wanted = "a positive number" if positive else "a number"
            raise CheckpointError(f"{self.path}: {pattern or key} of {names[0]} is {value!r:.40}; {wanted} is expected")
        return float(value)


def read_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Settings]:
    """The settings for the weights of a file. Keys: "" and "high" of the first or only transformer, "low" of the
    second. Raises CheckpointError for broken ones, and for adapters that cannot be merged."""
    if HEADER_KEY in metadata:
        values = _parse(path, metadata[HEADER_KEY])
        first, second = (_below(values, prefix) for prefix in PREFIXES)
        plain = {key: value for key, value in values.items() if not key.startswith(PREFIXES)}
        split = (first or plain, second)
    elif (beside := path.with_name(FILE)).is_file() and _belongs(path):
        settings = _check(path, read_json(beside))
        return dict.fromkeys(("", "high", "low"), settings)
    else:
        if path.name.startswith("adapter_model"):
            notices.warn(f"{path} has no {FILE} beside it, which says its alpha; alpha = rank is taken, a factor of 1")
        return dict.fromkeys(("", "high", "low"), Settings(path))
    high, low = (_check(path, values) for values in split)
    return {"": high, "high": high, "low": low}


def _belongs(path: Path) -> bool:
    """Whether adapter_config.json in a file's folder is told of this file."""
    return (
        path.name.startswith("adapter_model") or sum(file.suffix == path.suffix for file in path.parent.iterdir()) == 1
    )


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} has broken {HEADER_KEY} in its header: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} has broken {HEADER_KEY} in its header: an object is expected")
    return values


def _below(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _check(path: Path, values: dict[str, Any]) -> Settings:
    kind = values.get("peft_type", KINDS[0])
    if kind not in KINDS:
        raise CheckpointError(f"{path} is a peft adapter of type {kind!r:.40}; supported are {', '.join(KINDS)}")
    init = str(values.get("init_lora_weights")).lower()
    if init.startswith(REWRITING):
        raise CheckpointError(
            f"{path} was made with init_lora_weights={init!r:.40}, which changes the model's own weights too; save it "
            "as a plain LoRA (peft: path_initial_model_for_weight_conversion)"
        )
    if used := [key for key in UNSUPPORTED if values.get(key)]:
        raise CheckpointError(f"{path}: peft's {', '.join(used)} is not supported; only plain adapters are")
    patterns = {key: _patterns(path, key, values.get(key) or {}) for key in PATTERNS}
    if values.get("fan_in_fan_out"):
        notices.warn(f"{path} says fan_in_fan_out, which no layer of the model has; it is ignored, as in peft")
    return Settings(path, values, patterns)


def _patterns(path: Path, key: str, table: Any) -> NamePatterns:
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: {key} is a {type(table).__name__}; patterns and numbers are expected")
    try:
        return NamePatterns(table)
    except ValueError as error:
        raise CheckpointError(f"{path} has patterns that cannot be used, {key}: {error}") from None
