"""PTX text -> kernels: parameters, registers, shared variables, and instructions; scopes of inline assembly are gone.

Registers, immediate numbers, special registers and addresses of variables all become slots of one table, so that an
instruction finds each operand by a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16}
WIDTHS |= {f"{kind}{bits}": bits for kind in "busf" for bits in (32, 64)} | {"f16x2": 32, "bf16x2": 32, "b128": 128}


@dataclass(frozen=True)
class Param:
    """offset: in the block of parameters; size in bytes; array: given as memory, such as a struct or a tensor map."""

    offset: int
    size: int
    array: bool


@dataclass(frozen=True)
class Memory:
    """[slot + offset], with what else stands in the brackets: coordinates of a tensor map."""

    slot: int
    offset: int
    more: tuple[object, ...] = ()


@dataclass(frozen=True)
class Not:
    """A predicate that is negated."""

    slot: int


@dataclass(frozen=True)
class Instruction:
    """guard: slot of the predicate, and whether it is negated. operands: slots, tuples of them, `Memory`, `Not`,
    (slot, slot) of `a|p`, None of `_`."""

    opcode: tuple[str, ...]
    operands: tuple[object, ...]
    guard: tuple[int, bool] | None
    text: str


@dataclass
class Kernel:
    """widths: bits of each slot. constants, special, symbols (of shared memory): slots that are no registers."""

    name: str
    params: dict[str, Param] = field(default_factory=dict)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)  # of the branch at an index
    widths: list[int] = field(default_factory=list)
    constants: dict[int, int] = field(default_factory=dict)
    special: dict[int, str] = field(default_factory=dict)
    symbols: dict[int, str] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> alignment, bytes; 0 bytes: dynamic
    decoded: list[Callable[..., None]] | None = None  # what decode.py makes of the code


def kernels_of(text: str) -> list[str]:
    """Names of the kernels of a module."""
    return re.findall(r"\.entry\s+([\w$]+)", text)


def parse(text: str, name: str) -> Kernel:
    """The kernel of a module whose name contains `name`; there has to be exactly one."""
    found = [entry for entry in kernels_of(text) if name in entry]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels have {name!r} in their names")
    text = re.sub(r"//[^\n]*", "", text)
    start = re.search(rf"\.entry\s+{re.escape(found[0])}\b", text).start()
    opening = _body(text, start)
    body = text[opening + 1 : _closing(text, opening)]
    kernel = Kernel(found[0])
    _header(kernel, text[start:opening])
    for declared in re.finditer(r"^\s*(?:\.\w+\s+)*\.shared[^;]*;", text[:start], re.MULTILINE):
        _shared(kernel, declared[0])
    _Parser(kernel).run(body)
    return kernel


def _body(text: str, start: int) -> int:
    """Where the kernel's brace opens: behind the list of its parameters."""
    return text.index("{", text.index(")", start))


def _closing(text: str, opening: int) -> int:
    depth = 0
    for brace in re.compile("[{}]").finditer(text, opening):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return brace.start()
    raise ValueError("a kernel does not end")


def _header(kernel: Kernel, text: str) -> None:
    offset = 0
    listed = text[text.index("(") + 1 : text.rindex(")")]
    for entry in filter(None, (part.strip() for part in listed.split(","))):
        found = re.match(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s[^,]*?)?([\w$]+)(?:\[(\d+)\])?$", entry)
        if found is None:
            raise ValueError(f"not understood: {entry}")
        unit = WIDTHS[found[2]] // 8
        size, align = unit * int(found[4] or 1), int(found[1] or unit)
        offset = -(-offset // align) * align
        kernel.params[found[3]] = Param(offset, size, found[4] is not None)
        offset += size
    for directive in re.finditer(r"^\s*\.(\w+)\s*([\d, ]*)$", text[text.rindex(")") :], re.MULTILINE):
        kernel.directives[directive[1]] = tuple(int(number) for number in re.findall(r"\d+", directive[2]))


def _shared(kernel: Kernel, text: str) -> None:
    found = re.search(r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;", text)
    count = 1 if found[4] is None else int(found[4] or 0)
    unit = WIDTHS[found[2]] // 8
    kernel.shared[found[3]] = int(found[1] or unit), count * unit


class _Parser:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.known: dict[object, int] = {}
        self.scopes: list[dict[str, int | str]] = [{}]
        self.labels: list[dict[str, int]] = [{}]
        self.branches: list[tuple[int, str, list[dict[str, int]]]] = []

    def run(self, body: str) -> None:
        for statement in _statements(body):
            if statement == "{":
                self.scopes.append({})
                self.labels.append({})
            elif statement == "}":
                self.scopes.pop()
                self.labels.pop()
            elif statement.endswith(":"):
                self.labels[-1][statement[:-1]] = len(self.kernel.code)
            elif statement.startswith(".reg"):
                self.declare(statement)
            elif ".shared" in statement.split("[")[0] and statement.startswith("."):
                _shared(self.kernel, statement + ";")
            elif not statement.startswith("."):
                self.instruction(statement)
        for index, label, scopes in self.branches:
            self.kernel.targets[index] = next(scope[label] for scope in reversed(scopes) if label in scope)

    def declare(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement, re.DOTALL).groups()
        for name in (part.strip() for part in names.split(",")):
            many = re.fullmatch(r"(.+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.scopes[-1][one] = self.slot(WIDTHS[kind])

    def slot(self, width: int) -> int:
        self.kernel.widths.append(width)
        return len(self.kernel.widths) - 1

    def instruction(self, statement: str) -> None:
        guard = None
        found = re.match(r"@(!?)(\S+)\s+(.*)$", statement, re.DOTALL)
        if found:
            guard, statement = (self.register(found[2]), bool(found[1])), found[3]
        opcode, _, rest = statement.partition(" ") if " " in statement else (statement, "", "")
        parts = tuple(opcode.split("."))
        if parts[0] == "bra":
            self.branches.append((len(self.kernel.code), rest.strip(), list(self.labels)))
            operands: tuple[object, ...] = ()
        else:
            width = _width(parts)
            operands = tuple(self.operand(part, width) for part in _split(rest))
        self.kernel.code.append(Instruction(parts, operands, guard, statement))

    def register(self, name: str) -> int:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise KeyError(name)

    def operand(self, text: str, width: int) -> object:
        if text[0] == "{":
            return tuple(self.operand(part, width) for part in _split(text[1:-1]))
        if text[0] == "[":
            return self.memory(text[1:-1])
        if text[0] == "!":
            return Not(self.register(text[1:]))
        if "|" in text:
            return tuple(self.operand(part.strip(), width) for part in text.split("|"))
        return None if text == "_" else self.value(text, width)

    def memory(self, text: str) -> Memory:
        first, *more = _split(text)
        base, _, offset = (part.strip() for part in first.partition("+"))
        if not re.fullmatch(r"[\d.]+", base) and "-" in base:
            base, minus, offset = (part.strip() for part in base.partition("-"))
            offset = minus + offset
        return Memory(self.value(base, 64), int(offset or 0), tuple(self.operand(part, 32) for part in more))

    def value(self, text: str, width: int) -> int:
        """A slot, the same for the same number."""
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        number = self.kernel.params[text].offset if text in self.kernel.params else _number(text, width)
        if number is not None:
            table, entry = self.kernel.constants, number
        else:
            table, entry = (self.kernel.special if text[0] == "%" else self.kernel.symbols), text
        key = entry, width
        if key not in self.known:
            self.known[key] = self.slot(width)
            table[self.known[key]] = entry
        return self.known[key]


def _statements(body: str) -> list[str]:
    """Instructions, declarations, labels and the braces of scopes; braces of operands stay where they are."""
    made = []
    for part in re.split(r";", body):
        part = " ".join(part.split())
        while part:
            found = re.match(
                r"([{}])\s*|([\w$]+:)\s*|(\.loc\s[\d ]+(?:, function_name \S+ inlined_at \S+ [\d ]+)?)", part
            )
            if found is None:
                break
            made += [found[1] or found[2]] if found[1] or found[2] else []
            part = part[found.end() :].strip()
        if part:
            made.append(part)
    return made


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in (*parts, text[start:].strip()) if part]


def _width(opcode: tuple[str, ...]) -> int:
    """Of immediate operands: that of the type, which is the last one named, or the source's of a conversion."""
    if opcode[0] == "shfl" or opcode[1:2] == ("wide",) or opcode[0] in ("setmaxnreg", "bar", "barrier"):
        return 32
    return next((WIDTHS[part] for part in reversed(opcode) if part in WIDTHS), 32)


def _number(text: str, width: int) -> int | None:
    """Bits of an immediate."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    found = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text)
    if found is None:
        return None
    number = int(found[2], 0 if found[2][:2] in ("0x", "0X") else 10) * (-1 if found[1] else 1)
    return number & ((1 << width) - 1)
