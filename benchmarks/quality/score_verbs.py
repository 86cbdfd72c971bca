"""Scores every verb by what its videos show.

    python -m fastvid.benchmarks.quality.score_verbs --cases 40 --jobs 2 --out benchmarks/results/embedded-verbs.json
    python -m fastvid.benchmarks.quality.score_verbs --verb loop --cases 4 --sheets /tmp/sheets    # and pictures

How cases are chosen and what is measured: `fastvid.benchmarks.quality.verb_cases`. A row of the result holds the share
of cases in which each thing is right, and numbers (medians, and the worst): seams as a share of what is allowed (a seam
is right up to 1.5), pictures as dB under what the VAE alone makes of them
(those behind the first come out as they are, far above it; `changes_beside` then says how they fit in: the change into
and out of them as a share of what is allowed of seams).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastvid
from fastvid.benchmarks.quality.clips import random_scene
from fastvid.benchmarks.quality.measure import cover, measure, same_motion, traced
from fastvid.benchmarks.quality.verb_cases import (
    PATH,
    SEAM,
    SIDE,
    Case,
    another,
    case,
    changed_word,
    changes,
    drawn,
    holds,
    kind,
    loop_lengths,
    named_kind,
    path_error,
    psnr,
    seam,
    single,
    still_db,
)

ADDED = 16  # frames: a second
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
MOTION_PAIRS = (
    ("moving right", "moving left"),
    ("moving right", "standing still"),
    ("moving up", "spinning"),
    ("moving left", "moving down"),
    ("standing still", "spinning"),
    ("growing", "shrinking"),
)


@dataclass(frozen=True)
class Scored:
    """One case: what is right, numbers, and the frames for a sheet."""

    right: dict[str, bool]
    numbers: dict[str, float] = field(default_factory=dict)
    frames: np.ndarray | None = None


@dataclass(frozen=True)
class Scorer:
    """Runs cases of verbs on a pipeline."""

    pipe: fastvid.Pipeline
    seed: int
    seconds: float = 60.0  # of the long video

    # ------------------------------------------------------------ from pictures

    def _pictured(self, number: int, places: tuple[int, ...]) -> Scored:
        """Pictures at these frames of a clip that is drawn."""
        scene = random_scene(torch.Generator().manual_seed(self.seed + number))
        truth = drawn(scene, 17)
        given: dict[str, Any] = {}
        if 0 in places:
            given["image"] = truth[0]
        if 16 in places:
            given["last_image"] = truth[16]
        if inner := [p for p in places if p not in (0, 16)]:
            given["keyframes"] = {p: truth[p] for p in inner}
        made = self.pipe.generate(scene.caption, seed=self.seed + number, width=SIDE, height=SIDE, **given).frames
        under = [still_db(self.pipe, truth[p], p == 0) - psnr(made[p], truth[p]) for p in places]
        right = holds(scene, made, truth) | {"pictures": max(under) <= 1}
        steps, allowed = changes(made), max(float(np.percentile(changes(truth), 95)), 1.0)
        beside = [steps[step] / allowed for p in places for step in (p - 1, p) if p and step < len(steps)]
        numbers = {"under_vae_db": max(under)} | ({"changes_beside": float(max(beside))} if beside else {})
        return Scored(right, numbers, made)

    def image_first(self, number: int) -> Scored:
        return self._pictured(number, (0,))

    def image_last(self, number: int) -> Scored:
        return self._pictured(number, (16,))

    def image_both(self, number: int) -> Scored:
        return self._pictured(number, (0, 16))

    def keyframes(self, number: int) -> Scored:
        return self._pictured(number, (0, 8, 16))

    def image(self, number: int) -> Scored:
        scene = random_scene(torch.Generator().manual_seed(self.seed + number))
        made = self.pipe.image(scene.caption, seed=self.seed + number).frames
        found = holds(scene, made, made)
        return Scored({name: found[name] for name in ("colour", "background", "shape")}, {}, made)

    # ------------------------------------------------------------ around clips

    def _extended(self, number: int, before: int, after: int, direction: str) -> Scored:
        at = case(self.pipe, number, self.seed, before, after)
        made = self.pipe.extend(at.clip, at.scene.caption, num_frames=ADDED, direction=direction, seed=at.seed).frames
        stop = before + len(at.clip)
        right = {"frames": len(made) == stop + after, "kept": np.array_equal(made[before:stop], at.clip)}
        seams, sides = [], []
        if before:
            seams.append(seam(self.pipe, made, before, at.clip, 0))
            sides.append(holds(at.scene, made[:before], None if at.truth is None else at.truth[:before]))
        if after:
            seams.append(seam(self.pipe, made, stop, at.clip, len(at.clip) - 1))
            sides.append(holds(at.scene, made[stop:], None if at.truth is None else at.truth[stop:]))
        right |= {name: all(side[name] for side in sides) for name in sides[0]}
        numbers = {"seam_ratio": max(seams), "motion_of_sides": float(np.mean([side["motion"] for side in sides]))}
        if at.truth is not None:
            numbers["path_error"] = path_error(traced(made), traced(at.truth))
        return Scored(right | {"seam": max(seams) <= SEAM}, numbers, made)

    def extend_after(self, number: int) -> Scored:
        return self._extended(number, 0, ADDED, "after")

    def extend_before(self, number: int) -> Scored:
        return self._extended(number, ADDED, 0, "before")

    def extend_both(self, number: int) -> Scored:
        return self._extended(number, ADDED, ADDED, "both")

    def extend_before_long(self, number: int) -> Scored:
        """More in front of a clip than a window holds; the seams between windows count too."""
        scene = random_scene(torch.Generator().manual_seed(self.seed + number), mid_stream=number % 2 == 1)
        truth = drawn(scene, 48 + 17)
        clip = truth[48:]
        made = self.pipe.extend(clip, scene.caption, num_frames=48, direction="before", seed=self.seed + number).frames
        at = seam(self.pipe, made, 48, clip, 0)
        steps = changes(made[:49])
        jump = float(steps.max() / max(np.percentile(changes(clip), 95), np.median(steps), 1.0))
        right = holds(scene, made[:48], truth[:48]) | {"kept": np.array_equal(made[48:], clip), "seam": at <= SEAM}
        return Scored(right, {"seam_ratio": at, "largest_jump": jump}, made)

    def loop(self, number: int) -> Scored:
        scene = random_scene(torch.Generator().manual_seed(self.seed + number), mid_stream=number % 2 == 1)
        frames, bridge = loop_lengths(scene)
        truth = drawn(scene, frames + bridge)
        at = Case(scene, self.seed + number, truth, truth[:frames])
        made = self.pipe.loop(at.clip, scene.caption, num_frames=bridge, seed=at.seed).frames
        return self._bridged(at, made, frames, at.clip, np.concatenate((made, made[:1])))

    def blend(self, number: int) -> Scored:
        scene = random_scene(torch.Generator().manual_seed(self.seed + number), mid_stream=number % 2 == 1)
        bridge = 8 + number % 9
        truth = drawn(scene, 17 + bridge + 17)
        at, b = Case(scene, self.seed + number, truth, truth[:17]), truth[17 + bridge :]
        made = self.pipe.blend(at.clip, b, scene.caption, num_frames=bridge, seed=at.seed).frames
        scored = self._bridged(at, made, 17, b, made[: 17 + bridge + 1])
        return replace(scored, right=scored.right | {"kept_b": np.array_equal(made[17 + bridge :], b)})

    def _bridged(self, at: Case, made: np.ndarray, start: int, b: np.ndarray, joined: np.ndarray) -> Scored:
        """joined: what was made, as far as the first frame behind the bridge."""
        stop = len(joined) - 1
        seams = [
            seam(self.pipe, joined, start, at.clip, len(at.clip) - 1),
            seam(self.pipe, joined, stop, b, 0),
        ]
        inside = float(changes(joined[start:stop]).max()) / max(float(np.percentile(changes(at.clip), 95)), 1.0)
        right = holds(at.scene, joined[start:stop], at.truth[start:stop]) | {
            "frames": len(made) == len(at.truth),
            "kept": np.array_equal(made[:start], at.clip),
            "seam": max(seams) <= SEAM,
        }
        error = path_error(traced(made), traced(at.truth))
        return Scored(right, {"seam_ratio": max(seams), "inside": inside, "path_error": error}, made)

    # ------------------------------------------------------------ edits

    def _edited(self, number: int, kinds: tuple[str, ...] = ("colour", "shape", "colour", "background")):
        at = case(self.pipe, number, self.seed)
        return at, another(at.scene, number, kinds)

    def _judge(self, at: Case, new: Any, made: np.ndarray) -> Scored:
        word, shown, before = changed_word(at.scene, new), measure(made), traced(at.clip)
        error = path_error(shown, before)
        others = [t for t in ("colour", "background") if t != word]
        right = {
            "changed": getattr(shown, word) == getattr(new, word),
            "path": error <= PATH,
            "rest": all(getattr(shown, t) == getattr(new, t) for t in others),
        }
        return Scored(right, {"path_error": error}, made)

    def edit_flow(self, number: int) -> Scored:
        at, new = self._edited(number)
        made = self.pipe.edit(at.clip, new.caption, source_prompt=at.scene.caption, seed=at.seed).frames
        return self._judge(at, new, made)

    def edit_strength(self, number: int) -> Scored:
        """At all strengths: right at some of them; `curve` has what is right at each."""
        at, new = self._edited(number)
        found = [
            self._judge(at, new, self.pipe.edit(at.clip, new.caption, strength=s, seed=at.seed).frames)
            for s in STRENGTHS
        ]
        numbers = {}
        for s, one in zip(STRENGTHS, found, strict=True):
            numbers |= {f"changed_{s:g}": float(one.right["changed"]), f"path_{s:g}": float(one.right["path"])}
        right = {
            "changed": any(one.right["changed"] for one in found),
            "both": any(one.right["changed"] and one.right["path"] for one in found),
        }
        return Scored(right, numbers, np.concatenate([one.frames[[0, 8, 16]] for one in found]))

    def edit_mask(self, number: int) -> Scored:
        at, new = self._edited(number, ("colour", "shape", "colour"))
        mask = np.stack([_box(frame) for frame in at.clip])
        made = self.pipe.edit(at.clip, new.caption, mask=mask, seed=at.seed).frames
        scored = self._judge(at, new, made)
        kept = np.array_equal(made[~mask], at.clip[~mask])
        return replace(scored, right=scored.right | {"kept": kept})

    def outpaint(self, number: int) -> Scored:
        at = case(self.pipe, number, self.seed)
        made = self.pipe.edit(at.clip, at.scene.caption, width=96, height=64, seed=at.seed).frames
        kept = np.array_equal(made[:, :, 16:80], at.clip)
        right = holds(at.scene, made, None)
        wide = kind(made, at.scene.shape) == kind(np.pad(at.clip, ((0, 0), (0, 0), (16, 16), (0, 0)), "edge"), "")
        right |= {"kept": kept, "motion": right["motion"] or wide, "one_thing": all(map(single, made[::4]))}
        edge = np.abs(np.diff(made.astype(int), axis=2)).mean((0, 1, 3))
        return Scored(right, {"edge": float(edge[[15, 79]].max() / max(np.percentile(edge[16:79], 95), 1.0))}, made)

    # ------------------------------------------------------------ longer ones

    def storyboard(self, number: int) -> Scored:
        scene = random_scene(torch.Generator().manual_seed(self.seed + number))
        first, second = (replace(scene, motion=m) for m in MOTION_PAIRS[number % len(MOTION_PAIRS)])
        video = self.pipe.storyboard([(first.caption, 1.0), (second.caption, 1.0)], seed=self.seed + number)
        shots = [holds(s, video.frames[i * 16 : i * 16 + 16], None) for i, s in enumerate((first, second))]
        steps = changes(video.frames)
        jump = float(steps[15] / max(np.percentile(np.delete(steps, 15), 95), 1.0))
        right = {name: all(shot[name] for shot in shots) for name in shots[0]} | {"seam": jump <= SEAM}
        numbers = {"seam_ratio": jump, "motion_of_shots": float(np.mean([shot["motion"] for shot in shots]))}
        return Scored(right | {"frames": len(video.frames) == 32}, numbers, video.frames)

    def draft(self, number: int) -> Scored:
        scene = random_scene(torch.Generator().manual_seed(self.seed + number))
        made = self.pipe.generate(scene.caption, seed=self.seed + number, width=96, height=96, draft=True)
        final = self.pipe.finalize(made)
        right = {f"draft_{name}": ok for name, ok in holds(scene, made.frames, None).items()}
        right |= holds(scene, final.frames, None) | {"size": final.frames.shape == (17, 96, 96, 3)}
        error = path_error(traced(made.frames), traced(final.frames))
        return Scored(right | {"path": error <= PATH}, {"path_error": error}, final.frames)

    def generate(self, number: int) -> Scored:
        scene = random_scene(torch.Generator().manual_seed(self.seed + number))
        made = self.pipe.generate(scene.caption, seed=self.seed + number).frames
        right = holds(scene, made, None)
        right["motion"] = same_motion(scene.shape, scene.motion, measure(made).motion)
        return Scored(right, {}, made)

    def long(self, number: int) -> Scored:
        """One thing for `seconds` at 160x96: in every second of that colour and, in most, of one shape."""
        scene = random_scene(torch.Generator().manual_seed(self.seed + number))
        made = self.pipe.generate(
            scene.caption, seed=self.seed + number, seconds=self.seconds, width=160, height=96
        ).frames
        parts = [made[i : i + 16] for i in range(0, len(made) - 15, 16)]
        shown = [measure(part) for part in parts]
        steps = changes(made)
        jump = float(steps.max() / max(np.percentile(steps, 95), 1.0))
        right = {
            "colour": all(one.colour == scene.colour for one in shown),
            "background": all(one.background == scene.background for one in shown),
            "shape": np.mean([one.shape == shown[0].shape for one in shown]) >= 0.8,
            "motion": np.mean([kind(part, scene.shape) == named_kind(scene) for part in parts]) >= 0.8,
            "one_thing": all(map(single, made[::16])),
            "frames": len(made) == round(self.seconds * 16),
        }
        right["kept"] = right["colour"] and right["shape"] and right["one_thing"]
        return Scored(right, {"largest_jump": jump}, made[:: max(1, len(made) // 48)])

    def size(self, number: int) -> Scored:
        """A full-size clip comes out as exactly that, of few steps, since it is about its size."""
        made = self.pipe.generate(
            "a red circle moving right on a white background",
            width=1920,
            height=1080,
            num_frames=2,
            guidance_scale=1.0,
            num_inference_steps=1,
            seed=number,
        )
        return Scored({"size": made.frames.shape == (2, 1080, 1920, 3)})


def _box(frame: np.ndarray, margin: int = 4) -> np.ndarray:
    """A box around the thing in a frame, as a user draws it: bool [H, W]."""
    _, _, mask = cover(frame)
    box = np.zeros(mask.shape, bool)
    y, x = np.nonzero(mask > 0.5)
    if len(y):
        box[max(0, y.min() - margin) : y.max() + margin + 1, max(0, x.min() - margin) : x.max() + margin + 1] = True
    return box


VERBS: dict[str, Callable[[Scorer, int], Scored]] = {
    name: getattr(Scorer, name)
    for name in (
        *("generate", "image_first", "image_last", "image_both", "keyframes", "image"),
        *("extend_after", "extend_before", "extend_both", "extend_before_long", "loop", "blend"),
        *("edit_flow", "edit_strength", "edit_mask", "outpaint", "storyboard", "draft", "long", "size"),
    )
}
ONCE = {"size": 1, "long": 10}  # at most so many cases: they take long


def summary(scored: Sequence[Scored]) -> dict[str, Any]:
    """Shares of what is right, medians and extremes of numbers."""
    row: dict[str, Any] = {"cases": len(scored)}
    for name in scored[0].right:
        row[name] = float(np.mean([one.right[name] for one in scored]))
    for name in dict.fromkeys(name for one in scored for name in one.numbers):
        values = [one.numbers[name] for one in scored if name in one.numbers]
        if name.startswith(("changed_", "path_", "motion_of_")) and name != "path_error":
            row[name] = float(np.mean(values))
        else:
            row[name] = {"median": float(np.median(values)), "worst": float(np.max(values))}
    return row


def sheet(scored: Sequence[Scored], path: Path) -> None:
    """A picture of the frames: one case a row."""
    rows = [np.concatenate(list(one.frames), axis=1) for one in scored if one.frames is not None]
    if not rows:
        return
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 2), (0, width - row.shape[1]), (0, 0)), constant_values=90) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    fastvid.Video(np.concatenate(rows)[None], 1, 0).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--verb", nargs="*", choices=VERBS, default=list(VERBS))
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the long video")
    parser.add_argument("--carries", choices=("latents", "reencode"), help="between windows; default: as the recipe")
    parser.add_argument("--window", type=int, help="columns at once")
    parser.add_argument("--overlap", type=int, help="columns of one window that the next is shown")
    parser.add_argument("--context", type=int, help="columns of a clip that the model is shown")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=50_000)
    parser.add_argument("--sheets", type=Path, help="a folder for pictures of the frames")
    parser.add_argument("--out", "--json", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="processes that run cases beside each other, a thread each")
    args = parser.parse_args()
    recipe, named = opened(args)._model.preset, ("window", "overlap", "context", "carries", "anchor")
    named += ("guidance_scale", "known_guidance_scale")
    settings = {"seed": args.seed, "torch": torch.__version__, **{name: getattr(recipe, name) for name in named}}
    rows: dict[str, Any] = {"settings": settings}
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), initializer=_begin, initargs=(args,)) as pool:
        counts = {verb: min(args.cases, ONCE.get(verb, args.cases)) for verb in args.verb}
        coming = {verb: [pool.submit(_case, verb, n) for n in range(count)] for verb, count in counts.items()}
        for verb, cases in coming.items():
            scored, seconds = zip(*(case.result() for case in cases), strict=True)
            rows[verb] = summary(scored) | {"seconds": round(sum(seconds), 1)}
            print(verb, json.dumps(rows[verb]), flush=True)
            if args.sheets:
                sheet(scored, args.sheets / f"{verb}.png")
            if args.out:  # after every verb: a long run that is cut off has its results
                args.out.write_text(json.dumps(rows, indent=2) + "\n")


_SCORER: list[Scorer] = []  # of this process, which runs cases and nothing else


def _begin(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads if args.jobs == 1 else 1)
    _SCORER.append(Scorer(opened(args), args.seed, args.seconds))


def _case(verb: str, number: int) -> tuple[Scored, float]:
    """A case, and the seconds it took."""
    start = time.time()
    return VERBS[verb](_SCORER[0], number), time.time() - start


def opened(args: argparse.Namespace) -> fastvid.Pipeline:
    return with_recipe(fastvid.load(args.model, device="cpu"), args)


def with_recipe(pipe: fastvid.Pipeline, args: argparse.Namespace) -> fastvid.Pipeline:
    """The pipeline with other windows."""
    changed = {name: value for name in ("window", "overlap", "context") if (value := getattr(args, name)) is not None}
    if args.carries:
        changed["carries"] = args.carries == "latents"
    if not changed:
        return pipe
    return type(pipe)(replace(pipe._model, preset=replace(pipe._model.preset, **changed)))


if __name__ == "__main__":
    main()
