"""The house rules that can be read off the source: imports point one way, files say what they are for, the environment
is read in one place. Imports inside functions, and names given to importlib.import_module, count like any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A unit is a module or folder right under fastvid/; what each may import beside itself and the standard library.
# cli -> pipeline -> {timeline, engine, plan, models, media, doctor} -> {sampling, layers} -> ops -> {kernels, _C}
BASE = {"errors", "limits"}
OPS = BASE | {"ops"}
PARTS = OPS | {"layers", "sampling", "distributed", "precision"}
MODELS = PARTS | {"models", "offload", "weights"}
MIDDLE = MODELS | {"env", "requests", "timeline"}
SURFACE = MIDDLE | {"bench", "convert", "doctor", "engine", "events", "loading", "media", "plan", "video", "__init__"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "env": set(),
    "precision": set(),
    "limits": {"errors"},
    "requests": BASE,
    "distributed": {"errors"},
    "parallel": {"distributed", "errors"},
    "kernels": set(),
    "ops": BASE | {"kernels", "_C"},
    "layers": OPS | {"distributed"},
    "sampling": OPS,
    "weights": BASE,
    "offload": {"errors"},
    "models": PARTS | {"offload", "weights"},
    "media": BASE | {"env", "requests"},
    "clips": OPS | {"media"},
    "timeline": BASE | {"requests"},
    "engine": MIDDLE - {"models", "weights"},
    "plan": MIDDLE,
    "events": {"plan"},
    "hub": {"errors"},
    "graphs": {"errors"},
    "loading": MIDDLE | {"graphs", "hub", "parallel", "plan", "scaling"},
    "convert": MODELS,
    "video": BASE | {"events", "media", "requests"},
    "progress": BASE | {"env", "events", "requests"},
    "doctor": MIDDLE | {"media", "__init__"},
    "bench": BASE,
    "pieces": SURFACE,
    "given": SURFACE | {"clips"},
    "control": SURFACE | {"given", "source"},
    "tables": MIDDLE - {"models", "weights"} | {"engine"},
    "spool": set(),
    "switching": set(),
    "conditions": SURFACE | {"control", "given", "source"},
    "seams": {"timeline"},
    "source": SURFACE | {"given"},
    "rollouts": SURFACE | {"tables"},
    "windows": SURFACE | {"conditions", "rollouts", "tables"},
    "queueing": {"errors"},
    "asynchronous": {"events", "queueing"},
    "decoding": SURFACE | {"queueing"},
    "checkpoints": SURFACE | {"parallel"},
    "session": SURFACE
    | {"checkpoints", "conditions", "decoding", "given", "queueing", "rollouts", "seams", "source"}
    | {"spool", "switching", "windows"},
    "inputs": SURFACE | {"clips", "control", "given"},
    "verbs": SURFACE | {"conditions"},
    "rates": MIDDLE | {"doctor"},
    "estimate": MIDDLE | {"rates", "scaling"},
    "pool": SURFACE | {"parallel", "wire", "workers"},
    "scaling": MODELS | {"parallel"},
    "planning": SURFACE
    | {"conditions", "decoding", "estimate", "parallel", "plan_memory", "rates", "scaling"}
    | {"windows"},
    "prompts": BASE | {"env", "requests"},
    "preparing": SURFACE | {"control", "inputs", "parallel", "planning", "rates", "session", "verbs"},
    "pipeline": SURFACE
    | {"asynchronous", "checkpoints", "pieces", "preparing", "prompts", "queueing", "rates", "session", "switching"},
    "wire": {"errors", "events", "plan", "video"},
    "worker": SURFACE | {"parallel", "pipeline", "wire"},
    "workers": {"errors", "wire"},
    "peers": {"distributed", "errors", "wire", "worker", "workers"},
    "remote": SURFACE | {"checkpoints", "parallel", "peers", "pipeline", "prompts", "queueing", "switching", "workers"},
    "opening": SURFACE | {"parallel", "pipeline", "queueing", "remote"},
    "cli": SURFACE | {"checkpoints", "inputs", "opening", "progress"},
    "__init__": {"clips", "errors", "events", "opening", "pipeline", "pool", "requests", "video"},
    "__main__": {"cli"},
}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all of fastvid and of kernels/ under the name it is imported by."""
    files = {("fastvid", *path.relative_to(ROOT / "fastvid").parts): path for path in (ROOT / "fastvid").rglob("*.py")}
    files |= {("fastvid", "kernels", path.name): path for path in (ROOT / "kernels").glob("*.py")}
    return {".".join(parts).removesuffix(".py").removesuffix(".__init__"): path for parts, path in files.items()}


MODULES = modules()


def unit_of(module: str) -> str:
    """`fastvid.ops.rgb` -> `ops`, `fastvid.media.metadata` -> `media` (a part of it), `fastvid` -> `__init__`."""
    name = module.split(".")[1] if "." in module else "__init__"
    return name.split("_")[0] or name  # `_C` and `__init__` are whole


def imported(module: str, tree: ast.AST, is_package: bool = False) -> Iterator[str]:
    """Every module of fastvid that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = from_import(module, node, is_package)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            continue
        yield from (name for name in names if name == "fastvid" or str(name).startswith("fastvid."))


def from_import(module: str, node: ast.ImportFrom, is_package: bool) -> list[str]:
    """`from fastvid.ops import dispatch as ops, load` -> fastvid.ops.dispatch and fastvid: a submodule counts as itself."""
    base = node.module or ""
    if node.level:
        parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
        base = ".".join([*parents, *filter(None, [node.module])])
    submodules = {*MODULES, "fastvid._C"}
    return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in submodules else base for alias in node.names]


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    unit = unit_of(module)
    units = {unit_of(name) for name in imported(module, ast.parse(source), is_package)}
    return [f"{module} imports {other}" for other in sorted(units - ALLOWED[unit] - {unit})]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    assert unit_of(module) in ALLOWED, f"say in ALLOWED what {unit_of(module)} may import"
    path = MODULES[module]
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("fastvid.models.wan.transformer", "from fastvid.kernels import rgb", "kernels"),
        ("fastvid.models.wan.transformer", "def f():\n    import fastvid.kernels.rgb", "kernels"),
        ("fastvid.models.wan.transformer", "import importlib\nimportlib.import_module('fastvid._C')", "_C"),
        ("fastvid.models.wan.transformer", "from ..kernels import rgb", "kernels"),
        (
            "fastvid.models.wan.transformer",
            "from fastvid.sampling import loop as engine as e, ops",
            "engine" if "fastvid.sampling.loop" in MODULES else "__init__",
        ),
        ("fastvid.sampling.solvers", "from fastvid.models.wan import transformer as wan", "models"),
        ("fastvid.requests.request", "from fastvid.ops.dispatch import bind", "ops"),
        ("fastvid.ops.rgb", "import fastvid.pipeline.pipeline", "pipeline"),
        ("fastvid.kernels.rgb", "from fastvid.errors import Error", "errors"),
        ("fastvid.sampling.loop", "from . import cli", "cli" if "fastvid.cli.main" in MODULES else "__init__"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, found: str) -> None:
    assert violations(module, source) == [f"{module} imports {found}"]


def test_the_rule_has_no_way_back() -> None:
    """No two units may import each other: `ALLOWED` itself has no cycle (fastvid's own names are lazy, so left out)."""
    below = {unit: others - {"__init__"} for unit, others in ALLOWED.items() if unit != "__init__"}
    while below:
        leaves = {unit for unit, others in below.items() if not others & set(below)}
        assert leaves, f"a cycle among {sorted(below)}"
        below = {unit: others for unit, others in below.items() if unit not in leaves}


FILES = [*MODULES.values(), ROOT / "setup.py"]
FILES += [path for folder in ("tests", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def variables(source: str) -> set[str]:
    """FASTVID_ names that stand as strings of their own: what a program looks up, unlike a mention in a message."""
    constants = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {text for text in constants if isinstance(text, str) and re.fullmatch(r"FASTVID_\w*", text)}


def test_the_environment_is_read_in_one_place() -> None:
    readers = {path.relative_to(ROOT).as_posix() for path in MODULES.values() if variables(path.read_text())}
    assert readers <= {"fastvid/env.py"}
    assert variables("import os\nos.environ.get('FASTVID_X')") == {"FASTVID_X"}


def test_there_are_a_dozen_variables_at_most() -> None:
    from dataclasses import fields

    from fastvid import env

    assert len(fields(env.Settings)) + len(env.BUILD_TIME) <= 12
    assert variables((ROOT / "setup.py").read_text()) == set(env.BUILD_TIME)
    mentioned = set(re.findall(r"FASTVID_[A-Z_]+", env.__doc__))
    assert mentioned == {env.PREFIX + field.name.upper() for field in fields(env.Settings)} | set(env.BUILD_TIME)


@pytest.mark.parametrize("module", [name for name in MODULES if unit_of(name) not in ("cli", "progress")])
def test_a_library_prints_nothing(module: str) -> None:
    calls = (node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Call))
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
