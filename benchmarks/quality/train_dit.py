"""Trains the embedded model's text encoder and transformer, together, on a pool of latents.

    python -m fastvid.benchmarks.quality.train_dit --pool runs/pool --out runs/dit --minutes 70

Flow matching: x = (1 - sigma) clean + sigma noise, the target is noise - clean. Every sample draws one *pattern* of
noise levels over its latent frames, so that all verbs work natively: all free; known frames at level 0 (first, last,
both, prefix, suffix, prefix and suffix, random, a held still); independent or rising levels per frame; a known region
around a free box. Text-only samples begin their motion, but at the lower levels, where their place shows through, also
come from mid-stream, as clips that are edited do; so do samples with known frames, where windows start with a body
latent. Some of those are shown an *anchor* too, a still of the same thing at any other time,
as windows far into a video are shown its first frame.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastvid.benchmarks.quality import latent_pool, vocabulary
from fastvid.benchmarks.quality.mixed import mixed_precision
from fastvid.models.common.umt5 import UMT5Config, UMT5Encoder
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.presets import EMBEDDED
from fastvid.models.wan.transformer import WanTransformer
from fastvid.ops import reference

TRANSFORMER = WanTransformerConfig(
    num_attention_heads=4, attention_head_dim=64, text_dim=128, ffn_dim=1024, num_layers=6
)
TEXT = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
SHIFT = 3.0
BEGINNINGS = 0.7  # share of clips that begin their motion; the rest are from mid-stream
SHOWS = 0.85  # the highest level at which a clip shows where its motion is
WINDOW, CONTEXT = EMBEDDED.window, EMBEDDED.overlap  # latent frames that the model makes at once, and is shown
DRIFT = (0.12, 0.06)  # how far known latents are off, at most: all of a channel, each value alone
EDITS = 0.4  # share of batches of clips with twins that are edits
EDITED = (0.2, 0.92)  # their levels
BEFORE = 0.2  # share of batches that lead up to a clip, encoded as such a clip is
ANCHORED = 0.35  # share of batches with one, among those whose clips are longer than what is drawn from them
ANCHOR = -EMBEDDED.anchor  # where it stands, in latent frames from the first of the window
TOKENS = 1536  # tokens in a batch: small batches, many steps


@dataclass
class Sample:
    """One training sample: clean latents [C, T, h, w], their levels [T, h/2, w/2], and a caption.

    Where a level is 0 the latents are known and carry no loss. source: what is noised in place of clean ones, in an
    edit. anchor [C, h, w]: as known as those, far to the left.
    """

    clean: Tensor
    sigma: Tensor
    caption: str
    anchor: Tensor | None = None
    source: Tensor | None = None


class Pool:
    """The shards of a folder, read as they appear."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.shards = folder, set(), {}

    def refresh(self) -> int:
        """Reads new shards; returns the number of clips held."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self.seen:
                self.seen.add(path.name)
                shard = latent_pool.load(path)
                self.shards.setdefault(tuple(shard.latents.shape[2:]), []).append(shard)
        return sum(len(s.captions) for shards in self.shards.values() for s in shards)

    def kinds(self) -> tuple[list[tuple[int, ...]], Tensor]:
        """The latent sizes held, and how many batches of each there should be."""
        kinds = list(self.shards)
        weights = [float(sum(len(s.captions) for s in self.shards[k])) for k in kinds]
        return kinds, torch.tensor(weights)


def random_level(n: int, g: torch.Generator) -> Tensor:
    """n noise levels in (0, 1]: logit-normal and uniform mixed, then shifted as in sampling."""
    u = torch.where(
        torch.rand(n, generator=g) < 0.7, torch.sigmoid(1.1 * torch.randn(n, generator=g)), torch.rand(n, generator=g)
    )
    return (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp(1e-3, 1.0)


def known_frames(frames: int, g: torch.Generator) -> Tensor:
    """Which of the latent frames are known [T]: first, last, both, prefix, suffix, both of those, random; never all."""
    known = torch.zeros(frames, dtype=torch.bool)
    kind = int(torch.randint(10, (), generator=g))
    some = 1 + int(torch.randint(max(1, frames - 1), (), generator=g))
    if kind in (0, 2):
        known[0] = True
    if kind in (1, 2):
        known[-1] = True
    if kind in (3, 6):
        known[: min(some, frames - 1)] = True
    if kind == 4:
        known[max(1, frames - some) :] = True
    if kind == 7:  # a clip's end, a bridge, a clip's start
        known[: min(CONTEXT, some)] = True
        known[max(1, frames - CONTEXT) :] = True
    if kind == 8:  # as much of a clip as the model is shown
        known[: min(CONTEXT, frames - 1)] = True
    if kind == 9:
        known[max(1, frames - CONTEXT) :] = True
    if kind == 5:
        known = torch.rand(frames, generator=g) < 0.4
    if known.all():
        known[int(torch.randint(frames, (), generator=g))] = False
    return known


def levels(frames: int, h: int, w: int, free: bool, g: torch.Generator) -> Tensor:
    """Noise levels [T, h, w] of one sample's tokens; `free` samples mostly have one level and nothing known."""
    r = float(torch.rand((), generator=g))
    one = random_level(1, g).view(1, 1, 1).expand(frames, h, w).clone()
    if frames == 1 or (free and r < 0.75):
        return one
    if r < 0.80:  # independent levels
        return random_level(frames, g).view(-1, 1, 1).expand(frames, h, w).clone()
    if r < 0.86:  # rising levels, as in a staggered table
        return random_level(frames, g).sort().values.view(-1, 1, 1).expand(frames, h, w).clone()
    if r < 0.90 and h > 2 and w > 2:  # known outside a box
        top, left = (int(torch.randint(n // 2, (), generator=g)) for n in (h, w))
        inside = torch.zeros(h, w)
        inside[top : top + (h + 1) // 2 + 1, left : left + (w + 1) // 2 + 1] = 1
        return one * inside
    one[known_frames(frames, g)] = 0
    return one


def window_levels(frames: int, h: int, w: int, g: torch.Generator) -> Tensor:
    """Levels [T, h, w] of a window in a long video: what the one before has made is known; sometimes something else."""
    r = float(torch.rand((), generator=g))
    if r < 0.15:
        return levels(frames, h, w, free=False, g=g)
    one = random_level(1, g).view(1, 1, 1).expand(frames, h, w).clone()
    one[: min(CONTEXT, frames - 1) if r < 0.8 else 1 + int(torch.randint(frames - 1, (), generator=g))] = 0
    return one


def draw_anchored(shard: latent_pool.Shard, frames: int, length: int, g: torch.Generator) -> Sample:
    """A sample from behind the head of a shard's clip, with an anchor."""
    i = int(torch.multinomial(shard.hard, 1, generator=g))
    start = 1 + int(torch.randint(frames - length, (), generator=g))
    clean = shard.latents[i, :, start : start + length].clone()
    sigma = window_levels(length, clean.shape[2] // 2, clean.shape[3] // 2, g)
    return Sample(clean, sigma, shard.captions[i], shard.anchor[i])


def hold_stills(shard: latent_pool.Shard, i: int, start: int, clean: Tensor, sigma: Tensor, g: torch.Generator) -> None:
    """Makes pictures of some frames known, in place: those that stand for a whole group are stills. Mostly nothing else
    is known but, at times, the first frame."""
    length, pictures = sigma.shape[0], []
    for at, still in zip((shard.still_at[i] - start).tolist(), shard.still[i], strict=True):
        if (0 if start else 1) <= at < length and float(torch.rand((), generator=g)) < 0.75:
            pictures.append((at, still))
    if not pictures:
        return
    if float(torch.rand((), generator=g)) < 0.75:
        sigma[:] = random_level(1, g)
        if float(torch.rand((), generator=g)) < 0.6 and start == 0:
            sigma[0] = 0
    for at, still in pictures:
        clean[:, at], sigma[at] = still, 0
    if not (sigma > 0).any():
        sigma[int(torch.randint(length, (), generator=g))] = random_level(1, g)


def draw_edit(shard: latent_pool.Shard, g: torch.Generator) -> Sample:
    """A clip's noise and the caption of its twin, which is what shall come of it: otherwise a model takes what the
    caption does not name for noise, and puts what it does name anywhere."""
    i = int(torch.randint(len(shard.captions), (), generator=g))
    pair = [(shard.latents[i], shard.captions[i]), (shard.twin[i], shard.twin_captions[i])]
    (source, _), (clean, caption) = pair if float(torch.rand((), generator=g)) < 0.5 else pair[::-1]
    level = EDITED[0] + (EDITED[1] - EDITED[0]) * torch.rand(1, generator=g)
    sigma = level.view(1, 1, 1).expand(clean.shape[1], clean.shape[2] // 2, clean.shape[3] // 2)
    return Sample(clean, sigma.clone(), caption, source=source)


def draw_before(shard: latent_pool.Shard, known_from: int, g: torch.Generator) -> Sample:
    """A sample that leads up to a clip whose latents begin there, from nothing or (half of the time) another clip."""
    here = shard.hard * (shard.suffix_at == known_from)
    i = int(torch.multinomial(here, 1, generator=g))
    clean = torch.cat((shard.latents[i, :, :known_from], shard.suffix[i]), dim=1)
    sigma = random_level(1, g).view(1, 1, 1).expand(clean.shape[1], clean.shape[2] // 2, clean.shape[3] // 2).clone()
    sigma[known_from:] = 0
    if float(torch.rand((), generator=g)) < 0.5:
        sigma[: min(CONTEXT, known_from - 1)] = 0
    return Sample(clean, sigma, shard.captions[i])


def draw_sample(shard: latent_pool.Shard, frames: int, length: int, g: torch.Generator) -> Sample:
    """One sample of `length` latent frames from a shard whose clips have `frames`."""
    # Windows in mid-stream are as long as others only in clips that are longer still.
    begins = float(torch.rand((), generator=g)) < (BEGINNINGS if frames <= WINDOW else 0.15)
    i = int(torch.multinomial(shard.hard * (shard.begins == begins), 1, generator=g))
    start = 0 if begins else int(torch.randint(frames - length + 1, (), generator=g))
    clean = shard.latents[i, :, start : start + length].clone()
    shape = (length, clean.shape[2] // 2, clean.shape[3] // 2)
    sigma = levels(*shape, free=begins, g=g)
    if not begins and length > 1 and start == 0 and float(torch.rand((), generator=g)) < 0.4:
        # Above that a clip from mid-stream without known frames would teach that motions begin anywhere.
        sigma = (random_level(1, g) * SHOWS).view(1, 1, 1).expand(shape).clone()
    elif not begins and length > 1 and bool((sigma > 0).all()) and bool((sigma == sigma[0, 0, 0]).all()):
        sigma[0] = 0
    if length > 1 and float(torch.rand((), generator=g)) < 0.2:
        hold_stills(shard, i, start, clean, sigma, g)
    return Sample(clean, sigma, shard.captions[i])


def batch(pool: Pool, g: torch.Generator) -> list[Sample]:
    """Samples of one size and length, about TOKENS tokens in all."""
    kinds, weights = pool.kinds()
    frames, h, w = kinds[int(torch.multinomial(weights, 1, generator=g))]
    r = float(torch.rand((), generator=g))
    most = min(frames, WINDOW)
    shards = pool.shards[frames, h, w]
    if (twins := [shard for shard in shards if shard.twin_captions]) and float(torch.rand((), generator=g)) < EDITS:
        shard = twins[int(torch.randint(len(twins), (), generator=g))]
        return [draw_edit(shard, g) for _ in range(max(3, TOKENS // (frames * h * w // 4)))]
    if float(torch.rand((), generator=g)) < BEFORE:
        shard = shards[int(torch.randint(len(shards), (), generator=g))]
        known_from = int(shard.suffix_at[int(torch.randint(len(shard.captions), (), generator=g))])
        count = max(3, TOKENS // ((known_from + shard.suffix.shape[2]) * h * w // 4))
        return [draw_before(shard, known_from, g) for _ in range(count)]
    anchored = frames > 2 and float(torch.rand((), generator=g)) < ANCHORED
    length = most if r < 0.72 else 1 if r < 0.78 else 1 + int(torch.randint(most, (), generator=g))
    length = min(max(length, 2), frames - 1) if anchored else length
    n = max(3, min(48, TOKENS // ((length + anchored) * h * w // 4)))
    draw = draw_anchored if anchored else draw_sample
    return [draw(shards[int(torch.randint(len(shards), (), generator=g))], frames, length, g) for _ in range(n)]


def rough_caption(caption: str, g: torch.Generator) -> str:
    """The caption as people may type it: dropped (10 %), or with an unknown word or without small words (10 %)."""
    r = float(torch.rand((), generator=g))
    if r < 0.10:
        return ""
    words = caption.split()
    if r < 0.15:
        words.insert(int(torch.randint(len(words), (), generator=g)), "<unk>")
    elif r < 0.20:
        words = [w for w in words if w not in ("a", "background")]
    return " ".join(words)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, **_: object) -> Tensor:
    """reference.attention by plain products: on a CPU the backward of torch's fused one takes 3 to 6 times as long."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


class Trainer(nn.Module):
    """Text encoder and transformer as one module."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = UMT5Encoder(UMT5Config(vocab_size=3 + len(vocabulary.words()), **TEXT))
        ops = SimpleNamespace(**{**vars(reference), "attention": attention})
        self.transformer = WanTransformer(TRANSFORMER, ops)
        self.apply(initialise)
        nn.init.zeros_(self.transformer.proj_out.weight)

    def loss(self, samples: list[Sample], ids: Tensor, mask: Tensor, g: torch.Generator) -> Tensor:
        """Mean squared error of the velocity over the free tokens."""
        clean = torch.stack([s.clean for s in samples])
        sigma = torch.stack([s.sigma for s in samples])
        wide = sigma.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
        noise = torch.randn(clean.shape, generator=g)
        with mixed_precision():
            text = self.text_encoder(ids, mask) * mask[..., None]
            source = clean if samples[0].source is None else torch.stack([s.source for s in samples])
            seen = torch.where(wide > 0, (1 - wide) * source + wide * noise, clean + drift(clean, g))
            times, places = 1000 * sigma.flatten(1), list(range(clean.shape[2]))
            if samples[0].anchor is None:
                out = self.transformer(seen, times, text)
            else:
                anchor = torch.stack([s.anchor for s in samples])[:, :, None]
                shown = torch.cat((anchor + drift(anchor, g), seen), dim=2)
                times = torch.cat((times.new_zeros(len(samples), sigma[0, 0].numel()), times), dim=1)
                out = self.transformer(shown, times, text, rope_offset=[ANCHOR, *places])[:, :, 1:]
        free = (wide > 0).expand_as(clean)
        if samples[0].source is None:
            return (out.float() - (noise - clean)).square()[free].mean()
        # Of clean latents: on the way to another clip velocities grow without limit as the level falls.
        return (seen - wide * out.float() - clean).square()[free].mean()


def drift(clean: Tensor, g: torch.Generator) -> Tensor:
    """What known latents [B, C, T, h, w] are off by in half of all samples. In use they are the model's own, or went
    through the VAE once more; a model that has only seen perfect ones carries every error on from window to window."""
    share = torch.rand(clean.shape[0], 1, 1, 1, 1, generator=g) * (
        torch.rand(clean.shape[0], 1, 1, 1, 1, generator=g) < 0.5
    )
    channel = torch.randn(*clean.shape[:2], 1, 1, 1, generator=g)
    return share * (DRIFT[0] * channel + DRIFT[1] * torch.randn(clean.shape, generator=g))


def initialise(module: nn.Module) -> None:
    """Xavier for the matrices, zeros for the biases, small embeddings."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)


def tokenize(samples: list[Sample], tokenizer: vocabulary.Tokenizer, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, TEXT_LENGTH]."""
    ids = torch.zeros(len(samples), vocabulary.TEXT_LENGTH, dtype=torch.long)
    for row, sample in zip(ids, samples, strict=True):
        tokens = vocabulary.encode(tokenizer, rough_caption(sample.caption, g))
        row[: len(tokens)] = torch.tensor(tokens)
    return ids, (ids != 0).long()


def train(pool: Pool, out: Path, minutes: float, lr: float, seed: int, init: Path | None) -> None:
    """Trains for a time; writes the averaged weights every few minutes and at the end."""
    g = torch.Generator().manual_seed(seed)
    tokenizer = vocabulary.write(out / "tokenizer")
    model, ema = Trainer(), Trainer()
    if init:
        restore(model, init)
    ema.load_state_dict(model.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start, step, seen, written = time.time(), 0, [], time.time()
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        if step % 200 == 0:
            clips = pool.refresh()
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 200) * max(0.01, 0.5 * (1 + math.cos(math.pi * share)))
        samples = batch(pool, g)
        loss = model.loss(samples, *tokenize(samples, tokenizer, g), g)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(0.9985, step / (step + 20)))
        seen.append(loss.item())
        if step % 100 == 0:
            rate = (time.time() - start) / step
            print(f"{step} {share:.3f} loss {sum(seen[-100:]) / 100:.4f} {rate:.2f} s/step {clips} clips", flush=True)
        if time.time() - written > 240:
            write(ema, out)
            written = time.time()
    write(ema, out)


def write(model: Trainer, out: Path) -> None:
    """Writes transformer/ and text_encoder/ in the published layout, weights in fp16."""
    save(model.transformer, out / "transformer" / "diffusion_pytorch_model.safetensors")
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(TRANSFORMER).items()}
    config |= {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.42.1",
        "added_kv_proj_dim": None,
        "image_dim": None,
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }
    (out / "transformer" / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    # transformers computes in the file's type, so what is small stays fp32.
    save(model.text_encoder, out / "text_encoder" / "model.safetensors", torch.float32)
    text = {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": 3 + len(vocabulary.words()),
        **TEXT,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": True,
    }
    (out / "text_encoder" / "config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")


def restore(model: Trainer, folder: Path) -> None:
    """Starts from a checkpoint of the same widths; its vocabulary may be another and its feed-forward layers narrower.

    Words are matched by name. New feed-forward channels begin with no effect.
    """
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    copy_parameters(model.transformer, {k: v.float() for k, v in state.items()})
    state = {k: v.float() for k, v in load_file(folder / "text_encoder" / "model.safetensors").items()}
    theirs = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    rows = [theirs.get(word, theirs["<unk>"]) for word in ("<pad>", "</s>", "<unk>", *vocabulary.words())]
    state["shared.weight"] = state["shared.weight"][rows]
    copy_parameters(model.text_encoder, {k: v for k, v in state.items() if k != "encoder.embed_tokens.weight"})


@torch.no_grad()
def copy_parameters(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Copies every parameter into the leading part of the module's own."""
    for name, own in module.state_dict().items():
        given = state[name]
        if name.endswith("ffn.net.2.weight"):
            own.zero_()
        own[tuple(slice(n) for n in given.shape)] = given


def save(module: nn.Module, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Safetensors of one type, written beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to(dtype).contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, path.with_suffix(".part"), metadata={"format": "pt"})
    path.with_suffix(".part").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="a checkpoint, or an earlier --out, to start from")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pool = Pool(args.pool)
    while not pool.refresh():
        time.sleep(5)
    train(pool, args.out, args.minutes, args.lr, args.seed, args.init)


if __name__ == "__main__":
    main()
