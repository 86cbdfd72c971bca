"""The small set, which the tests compare with: each verb once on the embedded model and on a tiny one.

Of its frames every second row and column is kept, so that the files stay small.
"""

from __future__ import annotations

from typing import Any

import golden_inputs as given
from golden_frames import made
from golden_inputs import BLUE, RED
from golden_record import Case, Lab

FEW = {"num_inference_steps": 2, "seed": 3}


def cases() -> dict[str, Case]:
    clip = given.clip(5)
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "generate": ("generate", {"prompt": RED, "size": "70x66", "num_frames": 5}),
        "generate with pictures": (
            "generate",
            {
                "prompt": RED,
                "size": "64x64",
                "num_frames": 5,
                "image": given.picture(0),
                "last_image": given.picture(1),
            },
        ),
        "image": ("image", {"prompt": BLUE, "size": "64x64"}),
        "extend": ("extend", {"prompt": RED, "video": clip, "num_frames": 2, "direction": "both"}),
        "loop": ("loop", {"prompt": RED, "video": clip, "num_frames": 3}),
        "blend": ("blend", {"prompt": RED, "video": clip[:2], "video_2": clip[3:], "num_frames": 3}),
        "edit": ("edit", {"prompt": BLUE, "video": clip, "strength": 1.0}),
        "edit a mask": ("edit", {"prompt": BLUE, "video": clip, "strength": 1.0, "mask": given.still_mask()}),
        "edit a source prompt": ("edit", {"prompt": BLUE, "video": clip, "strength": 1.0, "source_prompt": RED}),
        "edit larger": ("edit", {"prompt": RED, "video": clip, "width": 80, "height": 64}),
        "storyboard": ("storyboard", {"shots": [(RED, 0.2), (BLUE, 0.2)], "size": "64x64"}),
        "draft": ("generate", {"prompt": RED, "size": "128x128", "num_frames": 5, "draft": True}),
        "finalize": ("finalize", {"prompt": RED, "video": clip, "width": 80, "height": 80, "strength": 1.0}),
    }
    return {
        f"{model}/{name}": thinned(made(model, verb, **options, **FEW))
        for model in ("embedded", "t2v")
        for name, (verb, options) in calls.items()
    }


def thinned(case: Case) -> Case:
    def run(lab: Lab) -> Any:
        record = case(lab)
        lab.keep(lab.frames[lab.current][:, ::2, ::2])
        return record

    return run
