"""What the makers publish of their GPUs: to plan for one that is not here, and to compare layouts of several.

From data sheets and white papers (NVIDIA's of Ampere, Hopper, Ada and Blackwell; AMD's of CDNA 3). Nothing of it is
measured here, and no card reaches it: who uses it says what share is assumed. GeForce cards add products up in fp32 at
half of the speed that they are advertised with, which is twice that of their fp32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastvid.checks import guarded, nearest_name, refuse


@dataclass(frozen=True)
class Card:
    """memory: GiB. bf16: TFLOP/s of dense products in 16 bits that are summed in fp32. fp32: TFLOP/s outside of the
    matrix units. bandwidth: GB/s of memory."""

    name: str
    memory: int
    bf16: float
    fp32: float
    bandwidth: int

    @property
    def memory_bytes(self) -> int:
        return self.memory * 2**30

    @property
    def int8(self) -> float:
        """TOP/s of dense products of int8. GeForce cards are slowed in 16 bits (see above), but not in these."""
        return self.bf16 * (4 if re.match(r"RTX [345]0", self.name) else 2)

    @property
    def fp8(self) -> float:
        """TFLOP/s of dense products of 8-bit floats that are summed in fp32; of bf16 where they are multiplied as such:
        before sm_89, and on AMD's GPUs."""
        return self.bf16 * (1 if re.match(r"RTX 30|RTX A|A100|MI300", self.name) else 2)


CARDS = (
    Card("RTX 3060", 12, 25.5, 12.7, 360),
    Card("RTX 3070", 8, 40.6, 20.3, 448),
    Card("RTX 3080", 10, 59.5, 29.8, 760),
    Card("RTX 3090", 24, 71.2, 35.6, 936),
    Card("RTX 3090 Ti", 24, 80.0, 40.0, 1008),
    Card("RTX 4060 Ti 8GB", 8, 44.1, 22.1, 288),
    Card("RTX 4060 Ti 16GB", 16, 44.1, 22.1, 288),
    Card("RTX 4070", 12, 58.3, 29.1, 504),
    Card("RTX 4070 Ti", 12, 80.2, 40.1, 504),
    Card("RTX 4070 Ti SUPER", 16, 88.2, 44.1, 672),
    Card("RTX 4080", 16, 97.5, 48.7, 717),
    Card("RTX 4080 SUPER", 16, 104.4, 52.2, 736),
    Card("RTX 4090", 24, 165.2, 82.6, 1008),
    Card("RTX 5070", 12, 61.7, 30.9, 672),
    Card("RTX 5070 Ti", 16, 87.9, 43.9, 896),
    Card("RTX 5080", 16, 112.6, 56.3, 960),
    Card("RTX 5090", 32, 209.5, 104.8, 1792),
    Card("RTX A6000", 48, 154.8, 38.7, 768),
    Card("RTX 6000 Ada", 48, 364.2, 91.1, 960),
    Card("L4", 24, 121.0, 30.3, 300),
    Card("L40S", 48, 362.1, 91.6, 864),
    Card("A100", 80, 312.0, 19.5, 2039),
    Card("A100 40GB", 40, 312.0, 19.5, 1555),
    Card("H100", 80, 989.4, 66.9, 3350),
    Card("H100 PCIe", 80, 756.0, 51.2, 2000),
    Card("H200", 141, 989.4, 66.9, 4800),
    Card("B200", 180, 2250.0, 75.0, 8000),
    Card("MI300X", 192, 1307.4, 163.4, 5300),
)
MAKERS = ("nvidia", "geforce", "amd", "instinct")
_ALLOWED = "a GPU by name, such as 'RTX 4090' or 'H100'"


@guarded(_ALLOWED)
def check_card(name: str, value: Any) -> Card:
    """The card that is meant: "RTX 4090", "rtx4090", "4090" or "NVIDIA GeForce RTX 4090". Raises InvalidRequest."""
    if not isinstance(value, str):
        refuse(name, value, _ALLOWED)
    plain = str.__str__(value)
    cards = {_short(card.name): card for card in CARDS}
    cards |= {short.removeprefix("rtx"): card for short, card in cards.items()}
    if _short(plain) not in cards:
        near = {card.name.lower(): card.name for card in CARDS}
        refuse(name, value, _ALLOWED, near[nearest_name(plain, near)])
    return cards[_short(plain)]


def _short(name: str) -> str:
    words = re.findall(r"[a-z0-9]+", name[:60].lower())
    return "".join(word for word in words if word not in MAKERS)


def card_named(device: str) -> Card | None:
    """The card that torch calls `device` ("NVIDIA A100-SXM4-80GB"): of those all of whose words are in it, the one with
    the most. Words of memory may be missing."""
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    fits = [card for card in CARDS if {one for one in _words(card) if not one.endswith("gb")} <= words]
    return max(fits, key=lambda card: len(_words(card) & words), default=None)


def _words(card: Card) -> set[str]:
    return set(card.name.lower().split())
