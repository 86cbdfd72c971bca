"""Puts trained parts together as a checkpoint in the published diffusers layout, with its model card.

python -m fastvid.benchmarks.quality.assemble --vae runs/vae/vae --dit runs/dit --out fastvid/embedded \\
    --scores a.json --verbs b.json
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fastvid.benchmarks.quality.clips import BACKGROUNDS, COLOURS, MOTIONS, SHAPES
from fastvid.models.wan.presets import EMBEDDED

LIMIT = 32_000_000  # bytes that the package may grow by

INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.1",
    "boundary_ratio": None,
    "expand_timesteps": True,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.42.1",
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "timestep_spacing": "linspace",
    "use_flow_sigmas": True,
}

CARD = """# The embedded model

A small text-to-video model of the Wan architecture in the published diffusers layout, trained on clips that
`benchmarks/quality/` draws, from an earlier and smaller checkpoint of the same kind (its VAE widened to twice the
channels). It ships with fastvid so that every part of the program does its real job on any machine, and so that what
a change does to the video can be measured: the truth of a caption can be read off the frames.

Prompts: "a {{colour}} {{shape}} {{motion}} on a {{background}} background".

| | words |
| --- | --- |
| colour | {colours} |
| shape | {shapes} |
| motion | {motions} |
| background | {backgrounds} |

A thing that moves crosses {speed:.0%} of the frame in a second and turns at the border. Other words are unknown to it.

| part | configuration | parameters |
| --- | --- | --- |
{parts}

Weights are stored in fp16, those of the text encoder in fp32.

Defaults: 64x64, 17 frames, 16 fps, 20 UniPC steps, flow shift 3, guidance 3 ({known:g} in edits and where frames are
known), text length 16, per-token timesteps. Trained on sizes from 64x64 to 160x96, 17, 33 and 49 frames and shorter,
stills, with known frames (first, last, both, prefix, suffix, prefix and suffix, random, held stills; in half of the
samples a little off), independent and rising noise levels per frame, a known region around a free box, windows that
begin in mid-stream with a still of the same thing far before them, clips to lead up to, another thing's noise to make
the caption's of, and dropped captions.

## Scores

Measured on decoded frames by `python -m fastvid.benchmarks.quality.score`, random captions over all words, captions as
above, default options but for the size or length named. {vae_line}

| setting | captions | background | colour | shape | motion |
| --- | --- | --- | --- | --- | --- |
{scores}

Verbs, measured by `python -m fastvid.benchmarks.quality.score_verbs`: in how many cases each thing is right. Seams: at
most 1.5 times the largest of what the clip changes anyhow, the VAE's error there and one level; beside it the median.
Path: the centroid stays within 10 % of the frame. Shown: what an edit's prompt says; of `long`, a minute at 160x96, one
thing of one colour and shape throughout.

{verbs}

Known faults: {faults}
"""
VERB_COLUMNS = {
    "colour": ("colour",),
    "background": ("background",),
    "motion": ("motion",),
    "shown": ("changed",),
    "path": ("path", "both"),
    "frames kept": ("kept",),
    "pictures": ("pictures",),
    "seams": ("seam",),
}


def describe(folder: Path) -> str:
    """The card's rows of parts."""
    rows = []
    for part, keys in {
        "transformer": ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "text_dim"),
        "vae": ("base_dim", "z_dim", "num_res_blocks"),
        "text_encoder": ("num_layers", "d_model", "num_heads", "d_ff", "vocab_size"),
    }.items():
        config = json.loads((folder / part / "config.json").read_text())
        with safe_open(next((folder / part).glob("*.safetensors")), "pt") as file:
            count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118 (a file is no dict)
        settings = ", ".join(f"{key} {config[key]}" for key in keys)
        rows.append(f"| `{part}` | {config.get('_class_name') or config['architectures'][0]}: {settings} | {count:,} |")
    return "\n".join(rows)


def verb_table(rows: dict[str, Any]) -> str:
    """What fastvid.benchmarks.quality.score_verbs wrote, as a table."""
    lines = [f"| verb | cases | {' | '.join(VERB_COLUMNS)} | median seam |", f"|{' --- |' * (len(VERB_COLUMNS) + 3)}"]
    for verb, row in rows.items():
        if verb == "long":  # which knows no frames that are kept, but one thing of one colour and shape that is
            row = {name: value for name, value in row.items() if name != "kept"} | {"changed": row["kept"]}
        if verb not in ("settings", "size"):
            found = [next((row[name] for name in names if name in row), None) for names in VERB_COLUMNS.values()]
            shares = ["" if share is None else f"{share:.1%}".replace(".0%", "%") for share in found]
            seam = f"{row['seam_ratio']['median']:.2f}" if "seam_ratio" in row else ""
            lines.append(f"| {verb} | {row['cases']} | {' | '.join(shares)} | {seam} |")
    return "\n".join(lines)


def write_card(folder: Path, scores: dict[str, Any], verbs: dict[str, Any], faults: str) -> None:
    """README.md beside the weights: what the model is and how well it does."""
    from fastvid.benchmarks.quality.clips import SPEED

    rows = [
        f"| {name} | {row['captions']} | "
        + " | ".join(f"{row[t]:.1%}" for t in ("background", "colour", "shape", "motion"))
        for name, row in scores.items()
        if isinstance(row, dict) and "captions" in row
    ]
    vae = scores["vae"]
    text = CARD.format(
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
        motions=", ".join(MOTIONS),
        backgrounds=", ".join(BACKGROUNDS),
        speed=SPEED,
        known=EMBEDDED.known_guidance_scale,
        parts=describe(folder),
        vae_line=f"VAE, {vae['clips']} clips: {vae['mean_db']:.1f} dB mean, {vae['worst_db']:.1f} dB worst.",
        scores="\n".join(row + " |" for row in rows),
        verbs=verb_table(verbs),
        faults=faults,
    )
    (folder / "README.md").write_text(text)


def assemble(vae: Path, dit: Path, out: Path) -> None:
    """Copies the parts and writes what holds them together. Raises SystemExit if it is over the limit."""
    out.mkdir(parents=True, exist_ok=True)
    for source, name in ((vae, "vae"), *((dit / n, n) for n in ("transformer", "text_encoder", "tokenizer"))):
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(source, out / name)
    for path in out.rglob("*.safetensors"):
        path.chmod(0o644)
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise SystemExit(f"over the limit of {LIMIT / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--dit", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scores", type=Path, help="what fastvid.benchmarks.quality.score wrote; makes the model card")
    parser.add_argument("--verbs", type=Path, help="what fastvid.benchmarks.quality.score_verbs wrote, for the card")
    parser.add_argument("--faults", default="see the scores.")
    args = parser.parse_args()
    assemble(args.vae, args.dit, args.out)
    if args.scores:
        verbs = json.loads(args.verbs.read_text()) if args.verbs else {}
        write_card(args.out, json.loads(args.scores.read_text()), verbs, args.faults)


if __name__ == "__main__":
    main()
