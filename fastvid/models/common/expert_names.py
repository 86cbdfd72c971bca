"""Which of a model's two experts (high or low noise) the name of a file means.

    expert      motion_high_noise  HighNoise  hinoise  HIGH-V2_fp16  t2vHighV10  style_low  HIGH/motion  mixLow/t2v
    no expert   highlights  slow_motion  low_vram  t2v-high-quality  high_res_details  low_angle  "high res"/style
    doubtful    high_motion  jump_high  style_HN  high_to_low  HIGH/motion_low_noise

The names of two files that are equal but for their marks (..._H and ..._L, xHigh and xLow) decide for each other: see
`expert_of` and `is_pair`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

NOISE_LEVELS = ("high", "low")  # of transformer and transformer_2
OTHER = {"high": "low", "low": "high"}
NO_MARK, DOUBTFUL, PLAIN, NOISE = range(4)  # strengths of marks: high_motion, style_high, high_noise

_LEVELS = {"high": "high", "hi": "high", "low": "low", "lo": "low"}
_SHORT = {"h": "high", "hn": "high", "l": "low", "ln": "low"}  # never a sure mark by themselves
# Words of a name: camelCase and digits are split, and so is a mark from "noise" and from a task (t2vhigh, I2VLOW).
_GLUED = (
    re.compile(r"(high|low|hi|lo)(noise)", re.IGNORECASE),
    re.compile(r"(noise)(high|low|hi|lo)(?![a-z])", re.IGNORECASE),
    re.compile(r"([a-z]{1,2}2v)(high|low)", re.IGNORECASE),
)
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_]+")
_GLUED_END = re.compile(r".*?(high|low)$")  # stylehigh and stylelow, if both are there
# Words with which high and low mean something else: high_res, LowVram.
_OTHER_SENSE = re.compile(
    r"altitude|angle|back|bar|bit|bitrate|brightness|budget|cam|camera|cfg|compression|contrast|cost|"
    r"count|cut|def|definition|density|depth|detail|detailed|details|dim|dpi|dynamic|effort|end|"
    r"energy|exposure|fantasy|fashion|fidelity|five|fps|frame|framerate|frequency|gain|gear|ground|"
    r"heel|heeled|heels|intensity|iso|jump|key|kick|latency|life|light|lighting|lights|mem|memory|"
    r"neck|pass|pitch|pixel|poly|polygon|power|precision|pressure|priority|profile|quality|ram|range|"
    r"rate|realism|res|resolution|rez|ride|rise|rpm|saturation|school|score|shot|shots|side|sky|"
    r"society|speed|stakes|stance|street|strength|sun|tech|temp|temperature|tide|tone|top|view|"
    r"volume|vram|waist|waisted|wire"
)
# Words that are told of files rather than of pictures: wan22_high_lora, low-rank64.
_TECHNICAL = re.compile(
    r"adapter|alpha|beta|bf|checkpoint|ckpt|comfy|comfyui|copy|diffusers|diffusion|distill|distilled|"
    r"dit|dmd|epoch|epochs|expert|final|fp|gguf|hps|image|iq|kijai|latest|lcm|lightning|lightx|lora|"
    r"kj|loras|merged|model|models|moe|mps|network|new|old|only|pruned|pytorch|rank|resized|rslora|"
    r"safetensors|scaled|seko|self|step|steps|style|test|text|transformer|turbo|ud|unet|ver|version|"
    r"video|wan|weights"
)
# Types of GGUF files, of which Q3_K_L is not low.
_QUANTIZED = re.compile(
    r"(?<![A-Za-z])(I?Q\d)_(K|[01]|NL|XS|XXS|S|M)(?:_(?:XL|[SML]))?(?![A-Za-z])"
)  # Q3_K_L is not low
_INTENSIFIERS = re.compile(r"aim|ankle|extra|fly|flying|jump|kick|knee|mid|sky|so|super|thigh|too|ultra|very|waist")


@dataclass(frozen=True)
class Mark:
    """What a name says. expert: "high", "low", or "" if it says none. sure: whether nothing else can be meant; a name
    that says both is ("", False)."""

    expert: str = ""
    sure: bool = True


def expert_of(path: str | Path, others: Iterable[str | Path] = ()) -> Mark:
    """The expert that a file's name, or the folder it is in, means. others: files that may be its partner, such as
    those beside it; if one is, both are sure."""
    path = Path(path)
    mine = _readings(path)
    if mine and (sides := {side for other in others if (side := _side(mine, _readings(Path(other))))}):
        return Mark(sides.pop()) if len(sides) == 1 else Mark(sure=False)
    inside, around = read_mark(path.name), read_mark(_folder(path))
    around = around if around.sure else Mark()  # a doubtful folder says nothing
    if inside.expert and around.expert and inside.expert != around.expert:
        return Mark(sure=False)
    return around if around.expert and (inside.sure or inside.expert) else inside


def is_pair(path: str | Path, other: str | Path) -> bool:
    """Whether two files are the two experts of one pair: equal names, of which one says high and the other low."""
    return bool(_side(_readings(Path(path)), _readings(Path(other))))


def are_exchanged(high: str | Path, low: str | Path) -> bool:
    """Whether the names of a first and a second expert's files say that it is the other way round."""
    marks = expert_of(high, [low]), expert_of(low, [high])
    return all(mark.sure for mark in marks) and tuple(mark.expert for mark in marks) == ("low", "high")


def read_mark(name: str) -> Mark:
    """What one name says, of a file or a folder or in metadata."""
    words = _words(name)
    marks = {mark for i in range(len(words)) if (mark := _mark_at(words, i))}
    most = max((strength for _, strength in marks), default=NO_MARK)
    experts = {expert for expert, strength in marks if strength == most or most < NOISE}
    if len(experts) == 1:
        return Mark(experts.pop(), most > DOUBTFUL)
    return Mark(sure=not experts)


def _mark_at(words: Sequence[str], i: int) -> tuple[str, int] | None:
    """(expert, strength) of the mark that word number i is."""
    before, word, after, next_one = ("", *map(str.lower, words), "", "")[i : i + 4]
    if word in ("hn", "ln") or (words[i] in ("H", "L") and not after.isdigit()):
        return _SHORT[word], DOUBTFUL
    if word not in _LEVELS:
        return None
    if after == "noise":
        return _LEVELS[word], NOISE
    other_sense = _OTHER_SENSE.fullmatch(after)
    if before == "noise" and not (other_sense and i > 1 and words[i - 2].lower() in _LEVELS):
        return _LEVELS[word], NOISE  # but not in low_noise_high_quality
    if word in ("hi", "lo") or other_sense:
        return None
    if after == "rank" and not next_one.isdigit():
        return None  # a high rank
    stands_out = words[i].isupper() and any(not other.isupper() and other.isalpha() for other in words)
    numbered = len(after) == 1 and next_one.isdigit()  # v2, e8, r64, t2v
    technical = not after or after.isdigit() or numbered or after in NOISE_LEVELS or _TECHNICAL.fullmatch(after)
    return _LEVELS[word], PLAIN if stands_out or (technical and not _INTENSIFIERS.fullmatch(before)) else DOUBTFUL


def _side(mine: dict[str, str], theirs: dict[str, str]) -> str:
    """The expert that a file is beside its partner, by the readings of both; "" if they are no pair."""
    return next((expert for key, expert in mine.items() if theirs.get(key) == OTHER[expert]), "")


def _readings(path: Path) -> dict[str, str]:
    """The name with its marks replaced -> what they say, for both ways to read marks: words, and single letters too."""
    folder = _folder(path)
    made = {}
    for marks in (_LEVELS, _LEVELS | _SHORT):
        inside, around = (_replace(_words(name), marks) for name in (path.name, folder))
        around = around if len(around[1]) == 1 else ("", set())  # a folder for both says nothing
        experts = inside[1] | around[1]
        if len(experts) == 1:
            made[f"{around[0] if around[1] else ''}/{inside[0]}"] = next(iter(experts))
    return made


def _replace(words: Sequence[str], marks: dict[str, str]) -> tuple[str, set[str]]:
    """(the words without what separates them, "#" for each mark; the experts that the marks say)."""
    made, experts = [], set()
    for i, word in enumerate(map(str.lower, words)):
        after = words[i + 1].lower() if i + 1 < len(words) else ""
        glued = _GLUED_END.match(word)
        if word in marks and not _OTHER_SENSE.fullmatch(after):
            experts.add(marks[word])
            made.append("#")
        elif glued and not _OTHER_SENSE.fullmatch(after):
            experts.add(glued[1])
            made.append(word.removesuffix(glued[1]) + "#")
        else:
            made.append(word)
    return "".join(made), experts


def _words(name: str) -> list[str]:
    name = _QUANTIZED.sub(r" \1\2", name.removesuffix(".safetensors").removesuffix(".gguf"))
    for pattern in _GLUED:
        name = pattern.sub(r"\1 \2", name)
    return _WORD.findall(name)


def _folder(path: Path) -> str:
    """The name of the folder of a file; of one in the hub's cache, whose folder is a commit, that of the repository."""
    parent = path.parent
    repository = parent.parent.parent.name
    return repository.split("--")[-1] if parent.parent.name == "snapshots" and "--" in repository else parent.name
