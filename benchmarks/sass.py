"""Reads the machine code of a CUDA object file (SASS): instructions, loops, and the order of products and waits."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# What is counted -> the names of its instructions.
CLASSES = {
    "products": r"[HIQ]GMMA",
    "exponentials": r"MUFU\.EX2",
    "other functions": r"MUFU\.(?!EX2)",
    "shared loads": r"LDSM?(?=\.|$)",
    "shared stores": r"STSM?(?=\.|$)",
    "global loads": r"LDG",
    "global stores": r"STG",
    "bulk copies": r"UTMA|UBLKCP",
    "local memory": r"LDL|STL",
    "waits for products": r"WARPGROUP\.DEPBAR",
    "waits for barriers": r"SYNCS\.PHASECHK|BAR\.SYNC",
    "moves": r"U?MOV(?=\.|$)|IMAD\.MOV|CS2R|R2UR",
    "floats": r"F(?:ADD|MUL|FMA|MNMX|SEL|SETP)|HFMA2|HADD2|HMUL2",
    "conversions": r"F2F|F2I|I2F|F2FP|I2FP",
    "integers": r"U?(?:IMAD(?!\.MOV)|IADD|LEA|LOP3|SHF|ISETP|IABS|IMNMX|SEL(?=\.|$)|PRMT)|VI",
}
ORDERED = {"products": CLASSES["products"], "exponentials": CLASSES["exponentials"], "wait": r"WARPGROUP\.DEPBAR"}


class Instruction(NamedTuple):
    at: int
    predicate: str  # such as @!P0, or nothing
    name: str
    rest: str  # operands

    def is_a(self, pattern: str) -> bool:
        return re.match(pattern, self.name) is not None


Code = list[Instruction]


def disassembler() -> Path | None:
    """cuobjdump: of PATH, of the CUDA toolkit, or the one that Triton carries."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found:
        return Path(found)
    spec = find_spec("triton")
    carried = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return carried if carried and carried.exists() else None


def functions(target: Path, arch: str = "90a") -> dict[str, Code]:
    """Mangled name of a kernel -> its instructions. Raises RuntimeError where there is no cuobjdump."""
    tool = disassembler()
    if tool is None:
        raise RuntimeError("there is no cuobjdump: put it on PATH, or install Triton, which carries one")
    command = [tool, "-sass", "-arch", f"sm_{arch}", target]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {part.splitlines()[0].strip(): parse(part) for part in told.split("Function : ")[1:]}


def parse(text: str) -> Code:
    """The instructions of a listing, in the order of their addresses."""
    found = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", text)
    return [Instruction(int(one[1], 16), (one[2] or "").strip(), one[3], one[4].strip()) for one in found]


def count(code: Iterable[Instruction]) -> dict[str, int]:
    """How many of each class, those that are not 0, and of all."""
    names = [one.name for one in code]
    found = {label: sum(re.match(pattern, name) is not None for name in names) for label, pattern in CLASSES.items()}
    return {label: number for label, number in found.items() if number} | {"all": len(names)}


def registers(code: Iterable[Instruction]) -> int:
    """One more than the highest number of a register of a thread that is named."""
    return 1 + max((int(number) for one in code for number in re.findall(r"\bR(\d+)\b", one.rest)), default=-1)


def chain(code: Iterable[Instruction], pattern: str) -> int:
    """The most instructions of a kind of which each needs the one before it, without others between them."""
    depth: dict[str, int] = {}
    longest = 0
    for one in code:
        named = re.findall(r"\bR\d+\b", one.rest)
        needed = max((depth.get(name, 0) for name in named[1:]), default=0)
        for made in named[:1]:
            depth[made] = 1 + needed if one.is_a(pattern) else 0
            longest = max(longest, depth[made])
    return longest


def order(code: Iterable[Instruction]) -> list[str]:
    """Products, exponentials and waits for products in their order, neighbors of one kind counted together, such as
    8 products, wait 1, 66 exponentials, wait 0. `wait 1` leaves the last group of products running."""
    made: list[tuple[str, int]] = []
    for one in code:
        label = next((label for label, pattern in ORDERED.items() if one.is_a(pattern)), "")
        if label == "wait":
            made.append((f"wait {int(one.rest.split(',')[-1], 0)}", 0))
        elif label and made and made[-1][0] == label:
            made[-1] = (label, made[-1][1] + 1)
        elif label:
            made.append((label, 1))
    return [f"{number} {label}" if number else label for label, number in made]


# Loops


def blocks(code: Code) -> list[Code]:
    """Basic blocks: only the first instruction is a target of branches, only the last one branches."""
    targets = {target for one in code for target in _targets(one)}
    made: list[Code] = []
    for before, one in zip([None, *code], code, strict=False):
        if before is None or one.at in targets or _targets(before) or _ends(before):
            made.append([])
        made[-1].append(one)
    return made


def loops(pieces: Sequence[Code]) -> list[list[int]]:
    """The natural loops: the numbers of their basic blocks, in an order in which an iteration can run them."""
    after = _successors(pieces)
    ranks = _ranks(after)
    above = _dominators(after, ranks)
    before: dict[int, list[int]] = {number: [] for number in ranks}
    for number in ranks:
        for following in after[number]:
            before[following].append(number)
    bodies: dict[int, set[int]] = {}
    for number in ranks:
        for head in after[number]:
            if head not in above[number]:
                continue  # not the end of a loop
            body, waiting = bodies.setdefault(head, {head}), [number]
            while waiting:
                here = waiting.pop()
                if here not in body:
                    body.add(here)
                    waiting += before[here]
    return [sorted(body, key=ranks.__getitem__) for body in bodies.values()]


def reached(code: Code, start: int) -> Code:
    """What can run after the instruction at place `start`, subroutines too."""
    places, seen, waiting = {one.at: place for place, one in enumerate(code)}, set(), [start]
    while waiting:
        place = waiting.pop()
        if place in seen or place == len(code):
            continue
        seen.add(place)
        one = code[place]
        called = [int(one.rest.split("0x")[-1], 16)] if one.is_a("CALL") else []
        waiting += [places[target] for target in (*_targets(one), *called)]
        waiting += [] if _ends(one) else [place + 1]
    return [code[place] for place in sorted(seen)]


def hottest(code: Code) -> Code:
    """The loop in which the kernel spends its time, judged by its code: of the innermost loops with products, or else
    those that read or write memory, the one with the most of them. All of the code if there is none."""
    pieces = blocks(code)
    found = loops(pieces)
    for pattern in (CLASSES["products"], "LDG|STG|LDS|STS"):
        weights = [sum(one.is_a(pattern) for number in body for one in pieces[number]) for body in found]
        inner = [
            (weight, body)
            for weight, body in zip(weights, found, strict=True)
            if weight and not any(w and set(other) < set(body) for w, other in zip(weights, found, strict=True))
        ]
        if inner:
            body = max(inner, key=lambda one: one[0])[1]
            return [one for number in body for one in pieces[number]]
    return code


def _targets(one: Instruction) -> list[int]:
    """Where a branch goes. Calls return, and BSYNC goes on behind itself."""
    if not one.is_a(r"BRA(?=\.|$)"):
        return []
    return [int(one.rest.split("0x")[-1].split()[0].rstrip(","), 16)]


def _ends(one: Instruction) -> bool:
    """Whether the next instruction in memory never runs after this one."""
    return not one.predicate and (one.is_a("EXIT|RET|BRX|JMX") or (one.name == "BRA" and one.rest.startswith("0x")))


def _successors(pieces: Sequence[Code]) -> list[list[int]]:
    number_of = {piece[0].at: number for number, piece in enumerate(pieces)}
    made = []
    for number, piece in enumerate(pieces):
        follows = [number + 1] if number + 1 < len(pieces) and not _ends(piece[-1]) else []
        made.append([*follows, *(number_of[target] for target in _targets(piece[-1]))])
    return made


def _ranks(after: Sequence[Sequence[int]]) -> dict[int, int]:
    """Each reachable block -> its place in reverse postorder."""
    finished: list[int] = []
    seen, stack = {0}, [(0, iter(after[0]))]
    while stack:
        number, left = stack[-1]
        following = next((one for one in left if one not in seen), None)
        if following is None:
            finished.append(number)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(after[following])))
    return {number: rank for rank, number in enumerate(reversed(finished))}


def _dominators(after: Sequence[Sequence[int]], ranks: dict[int, int]) -> dict[int, set[int]]:
    """Each block -> the blocks on all paths to it, itself included."""
    above = {number: {number} if number == 0 else set(ranks) for number in ranks}
    changed = True
    while changed:
        changed = False
        met: dict[int, set[int]] = {}
        for number in ranks:  # in their order
            for following in after[number]:
                met[following] = met[following] & above[number] if following in met else set(above[number])
        for number in ranks:
            now = {number} | met.get(number, set()) if number else {0}
            if now != above[number]:
                above[number], changed = now, True
    return above
