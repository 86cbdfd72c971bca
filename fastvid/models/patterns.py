"""What a model can do with frames that are known: how they reach it, and whether it was trained for that.

native: through what it was trained with (timestep 0 for known tokens, mask and latent channels, a KV cache, a control
branch). reimposed: the model knows nothing of them; the known latents are put back at the current noise level before
every call. experimental: through the model's own way, but outside of what it was trained on. refused: not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

NATIVE, REIMPOSED, EXPERIMENTAL, REFUSED = "native", "reimposed", "experimental", "refused"


@dataclass(frozen=True)
class Patterns:
    """One of the four words for each way in which a video may be known in part.

    first: its first frame. prefix, suffix: frames at its start or end. both_ends. keyframe: a frame in between.
    spatial_mask: a region of every frame. staggered: noise levels that differ between frames that are still free.
    """

    first: str
    prefix: str
    suffix: str
    both_ends: str
    keyframe: str
    spatial_mask: str
    staggered: str


def _all(word: str) -> Patterns:
    return Patterns(word, word, word, word, word, word, word)


# Known frames, known regions and rising levels are all part of its training.
EVERYTHING = _all(NATIVE)
TEXT_ONLY = replace(_all(REIMPOSED), staggered=EXPERIMENTAL)
# The input is made for any frame, the training was on these alone.
FIRST_FRAME = replace(_all(EXPERIMENTAL), first=NATIVE)
# The same by mask channels, which say of whole frames whether they are known.
PICTURE = replace(FIRST_FRAME, spatial_mask=REFUSED, staggered=REFUSED)
TWO_PICTURES = replace(_all(EXPERIMENTAL), both_ends=NATIVE, spatial_mask=REFUSED, staggered=REFUSED)
CONTROL = replace(_all(NATIVE), staggered=EXPERIMENTAL)
# What comes later is not seen, and a model of few steps knows no levels but its own. A picture is a block of one frame,
# and training began with whole blocks.
CAUSAL = replace(_all(REFUSED), first=EXPERIMENTAL, prefix=NATIVE, spatial_mask=REIMPOSED)
FEW_STEPS = replace(_all(REIMPOSED), staggered=REFUSED)


def one_level(patterns: Patterns) -> Patterns:
    """The same for a model of two experts: which of them runs follows from the one level of all free frames."""
    return replace(patterns, staggered=REFUSED)
