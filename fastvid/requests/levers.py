"""The levers of a request: options that do less work for nearly the same video. All are off unless they are asked for;
`quality` sets several at once, and a lever that is given beside it overrides that one.

A lever with settings of its own is written NAME or NAME:setting=value,setting=value, such as
"first_block:threshold=0.1,warmup=4", or given as a mapping with "name" and the settings. `parse` reads either; recipes
record the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastvid import checks
from fastvid.checks import Check, guarded, number, one_of, refuse, text, whole

QUALITIES = ("exact", "balanced", "fast")
Kinds = Mapping[str, Mapping[str, Check]]
"""The names that a lever knows: each with the checks of its settings."""


def _file(name: str, value: Any) -> str:
    """A file's name that can be written in a lever's text."""
    place = checks.path(name, str(value) if isinstance(value, int | float) else value)
    return refuse(name, place, "a name without commas") if "," in place else place


_threshold, _steps = number(0.0, 100.0), whole(0, checks.MAX_STEPS)
_reuse = {"threshold": _threshold, "warmup": _steps, "longest": _steps}
CACHES: Kinds = {
    "off": {},
    "target": {"speedup": number(1.0, 10.0)},
    "first_block": _reuse,
    "taylorseer": {"order": whole(0, 2), "every": whole(1, 100), "warmup": _steps},
    "easycache": _reuse,
    "magcache": {**_reuse, "file": _file, "digest": text},
}
"""Step caches (`fastvid.engine.step_methods`). threshold: of the change that is let through; warmup: steps at the start
that run all blocks; longest: steps in a row that do not; every: how often they run; order: of the polynomial. file, and
digest: of the calibration (`fastvid calibrate --cache`)."""

_share = number(0.0, 1.0)
ATTENTIONS: Kinds = {
    "dense": {},
    "sparse": {
        "keep": number(0.01, 1.0),
        "dense_steps": _share,
        "dense_layers": whole(0, 1000),
    },
}
"""What self-attention looks at (`fastvid.engine.sparsity`). keep: the share of pairs of tiles; dense_steps: the share
of the steps, from the first on, that are dense; dense_layers: how many first layers are dense in all steps."""

OFF: Mapping[str, Any] = {
    "cache": "off",
    "guidance_interval": (0.0, 1.0),
    "guidance_every": 1,
    "guidance_batch": False,
    "progressive": 0.0,
    "attention": "dense",
}
"""Every lever, and the value that switches it off."""

ALSO: tuple[str, ...] = ("num_inference_steps", "solver")
"""Other arguments that `quality` may set."""

QUALITY: Mapping[str, Mapping[str, Any]] = {
    "balanced": {"cache": "target:speedup=1.5"},
    "fast": {"cache": "target:speedup=2", "guidance_every": 2},
}
"""What `quality` stands for in models without measurements of their own: levers that stayed near exact in the embedded
model (benchmarks/results/levers.json)."""


@dataclass(frozen=True)
class Lever:
    """A lever's name and settings, as checked."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = ",".join(f"{key}={_plain(value)}" for key, value in self.settings.items())
        return f"{self.name}:{settings}" if settings else self.name


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(argument: str, value: Any, kinds: Kinds) -> Lever:
    """A lever from its text or a mapping. Raises InvalidRequest, which names the nearest valid one."""
    given = dict(_entries(argument, value))
    name = one_of(kinds)(argument, given.pop("name"))
    settings = {}
    for key, one in given.items():
        allowed = kinds[name]
        if key not in allowed:
            known = ", ".join(allowed) or "none"
            refuse(f"{argument}: {name}", key, f"settings of it: {known}", checks.near_name(str(key), allowed) or None)
        settings[key] = allowed[key](f"{argument}: {key}", one)
    return Lever(name, settings)


def _entries(argument: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        entries = list(checks.entries(argument, value, "a mapping with a name and settings", 20))
        if "name" not in dict(entries):
            refuse(argument, value, "a mapping with a name")
        return entries
    name, _, rest = text(argument, value).partition(":")
    pairs = [one.partition("=") for one in rest.split(",") if one.strip()]
    for key, equals, _ in pairs:
        if not equals:
            refuse(argument, value, f"NAME:setting=value; {key!r:.40} has no value")
    return [("name", name.strip()), *((key.strip(), _number_of(one.strip())) for key, _, one in pairs)]


def _number_of(value: str) -> Any:
    """A setting's text as a number, if it is one."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def check_lever(kinds: Kinds, allowed: str) -> Callable[[str, Any], str]:
    """A check that returns a lever's text."""

    @guarded(allowed)
    def check(name: str, value: Any) -> str:
        return str(parse(name, value, kinds))

    return check


_cache = check_lever(CACHES, f"a speed-up such as 1.5, or one of {', '.join(CACHES)}")
_target = number(1.0, 10.0)
check_attention = check_lever(ATTENTIONS, f"one of {', '.join(ATTENTIONS)}")


@guarded("a speed-up such as 1.5, or the name of a step cache")
def check_cache(name: str, value: Any) -> str:
    """A step cache's text; a number is the speed-up that is wanted."""
    if isinstance(value, str):
        value = _number_of(value.strip())
    if isinstance(value, str | Mapping):
        return _cache(name, value)
    return str(Lever("target", {"speedup": _target(name, value)}))


@guarded("two noise levels, low and high, such as (0.2, 0.9)")
def check_interval(name: str, value: Any) -> tuple[float, float]:
    low, high = checks.items(name, value, "two noise levels, low and high", 2, least=2)
    pair = _share(f"{name}: low", low), _share(f"{name}: high", high)
    return pair if pair[0] < pair[1] else refuse(name, value, "low below high", tuple(sorted(pair)))


def fill(request: Any, preset: Any) -> dict[str, Any]:
    """The levers of a request, and what else `quality` sets; None where a lever is off. preset: the model's."""
    chosen = {} if request.quality in (None, "exact") else tables(preset)[request.quality]
    values = {}
    for name in OFF:
        given = getattr(request, name)
        value = chosen.get(name) if given is None else given
        values[name] = None if value == OFF[name] else value
    return values | {name: chosen[name] for name in ALSO if name in chosen and _is_free(request, name)}


def _is_free(request: Any, name: str) -> bool:
    """Whether `quality` decides this argument: nothing that was asked for sets it."""
    others = ("sigmas", "draft", "preset") if name == "num_inference_steps" else ("source_prompt", "preset")
    return all(getattr(request, one) in (None, False) for one in (name, *others))


def tables(preset: Any) -> dict[str, dict[str, Any]]:
    """What `quality` stands for in a model, beside exact. preset: the model's."""
    chosen = getattr(preset, "qualities", None) or QUALITY
    return {name: dict(values) for name, values in chosen.items()}


def recorded(request: Any) -> dict[str, Any]:
    """The levers as a recipe records them: those that are off are named only beside `quality`, which else sets them."""
    values = {name: getattr(request, name) for name in OFF}
    return {name: OFF[name] if value is None and request.quality else value for name, value in values.items()}


def small_steps(request: Any, steps: int) -> int:
    """How many of a window's steps are made at half the size; at least one, and never all."""
    return 0 if not request.progressive else min(max(1, round(request.progressive * steps)), steps - 1)
