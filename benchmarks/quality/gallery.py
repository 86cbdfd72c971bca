"""The README's picture of all verbs: one verb a row, eight frames of each, with fixed seeds.

    python -m fastvid.benchmarks.quality.gallery --out docs/gallery.png

Frames that were given, and come out as they are, have a line above them. The rows' order is that of ROWS; the README
says what they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import fastvid
from fastvid.benchmarks.quality.clips import Scene
from fastvid.benchmarks.quality.verb_cases import drawn

SHOWN = 8  # frames a row
RED = Scene("red", "circle", "moving right", "white", across=0.5)
CYAN = Scene("cyan", "circle", "moving up", "navy", across=0.5)
LATER = Scene("red", "circle", "moving right", "white", across=0.5, phase=29 / 16)
STILL = Scene("green", "square", "standing still", "white", along=0.5)
Row = tuple[np.ndarray, Sequence[int]]  # frames, those of them that were given


def _generate(pipe: fastvid.Pipeline) -> Row:
    return pipe.generate("a blue circle growing on a beige background", seed=1).frames, range(0)


def _image(pipe: fastvid.Pipeline) -> Row:
    words = ("a green square", "a red circle", "a yellow circle", "a blue square")
    made = [
        pipe.image(f"{words[i % 4]} standing still on a {('black', 'white')[i // 4]} background", seed=i).frames
        for i in range(8)
    ]
    return np.concatenate(made), range(0)


def _first_last(pipe: fastvid.Pipeline) -> Row:
    clip = drawn(RED, 17)
    return pipe.generate(RED.caption, image=clip[0], last_image=clip[16], seed=1).frames, range(0)


def _extend(pipe: fastvid.Pipeline) -> Row:
    clip = drawn(CYAN, 17)
    made = pipe.extend(clip, CYAN.caption, num_frames=12, direction="both", seed=1).frames
    return made, range(12, 29)


def _loop(pipe: fastvid.Pipeline) -> Row:
    clip = drawn(STILL, 17)
    return pipe.loop(clip, STILL.caption, num_frames=12, seed=1).frames, range(17)


def _blend(pipe: fastvid.Pipeline) -> Row:
    made = pipe.blend(drawn(RED, 17), drawn(LATER, 17), RED.caption, num_frames=12, seed=1).frames
    return made, (*range(17), *range(29, 46))


def _edit(pipe: fastvid.Pipeline) -> Row:
    clip = drawn(RED, 17)
    wanted = RED.caption.replace("red", "green")
    return pipe.edit(clip, wanted, source_prompt=RED.caption, seed=1).frames, range(0)


def _inpaint(pipe: fastvid.Pipeline) -> Row:
    mask = np.zeros((64, 64), bool)
    mask[16:52, 12:52] = True
    return pipe.edit(
        drawn(STILL, 17), "a purple circle standing still on a white background", mask=mask, strength=1.0, seed=1
    ).frames, range(0)


def _outpaint(pipe: fastvid.Pipeline) -> Row:
    clip = drawn(CYAN, 17)
    return pipe.edit(clip, CYAN.caption, width=96, height=64, strength=1.0, seed=1).frames, range(0)


def _storyboard(pipe: fastvid.Pipeline) -> Row:
    shots = [(f"a blue circle moving {way} on a white background", 1.0) for way in ("right", "down")]
    return pipe.storyboard(shots, seed=1).frames, range(0)


def _finalize(pipe: fastvid.Pipeline) -> Row:
    draft = pipe.generate("a yellow circle moving down on a navy background", size="96x96", draft=True, seed=1)
    return pipe.finalize(draft).frames, range(0)


def _long(pipe: fastvid.Pipeline) -> Row:
    return pipe.generate("a red circle moving right on a white background", seconds=8, seed=1).frames, range(0)


ROWS: dict[str, Callable[[fastvid.Pipeline], Row]] = {
    "generate": _generate,
    "image": _image,
    "generate, first and last picture": _first_last,
    "extend, both": _extend,
    "loop": _loop,
    "blend": _blend,
    "edit, source_prompt": _edit,
    "edit, mask": _inpaint,
    "edit, larger frame": _outpaint,
    "storyboard": _storyboard,
    "draft, then finalize": _finalize,
    "generate, 8 seconds": _long,
}


def strip(frames: np.ndarray, given: Sequence[int]) -> np.ndarray:
    """Evenly spaced frames side by side [100, 8 * 98, 3], with a line above those that were given."""
    cells = []
    for number in np.linspace(0, len(frames) - 1, SHOWN).round().astype(int):
        height, width = frames.shape[1:3]
        cell = np.full((100, 98, 3), 255, np.uint8)
        top, left = 4 + (96 - height) // 2, 1 + (96 - width) // 2
        cell[top - 1 : top + height + 1, left - 1 : left + width + 1] = 200  # a frame around it
        cell[top : top + height, left : left + width] = frames[number]
        if number in given:
            cell[top - 4 : top - 2, left : left + width] = 30
        cells.append(cell)
    return np.concatenate(cells, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--out", type=Path, default=Path("docs/gallery.png"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = fastvid.load(args.model, device="cpu")
    rows = []
    for name, make in ROWS.items():
        rows.append(strip(*make(pipe)))
        print(name, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fastvid.Video(np.concatenate(rows)[None], 1, 0).save(args.out)


if __name__ == "__main__":
    main()
