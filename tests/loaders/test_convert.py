"""`fastvid convert`: there and back bit for bit, pickles opened without running anything, nothing half-written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastvid
from fastvid.cli.commands import main
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import pickles, safetensors, weight_files
from fastvid.loaders.checkpoint import open_checkpoint
from fastvid.loaders.convert import convert
from fastvid.loaders.convert_files import TensorReader, moved, write_weights
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.models.wan.weight_names import DIFFUSERS, ORIGINAL, origins
from fastvid.ops import reference

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaNs too."""
    kind = BITS[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weight_files.find_files(folder) for name, tensor in load_file(file).items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not same(a[name], b[name])] == []


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as diffusers writes it."""
    folder = tmp_path_factory.mktemp("convert") / "published"
    tiny.write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def original(published: Path) -> Path:
    """The same in the original layout."""
    folder = published.parent / "original"
    convert(published, folder, "original", shard_bytes=200_000)
    return folder


@pytest.fixture(scope="module")
def pickled(original: Path) -> Path:
    """The same as it is published: the VAE and the text encoder as pickles."""
    folder = original.parent / "pickled"
    shutil.copytree(original, folder)
    for name in ("Wan2.1_VAE", "models_t5_umt5-xxl-enc-bf16"):
        torch.save(load_file(folder / f"{name}.safetensors"), folder / f"{name}.pth")
        (folder / f"{name}.safetensors").unlink()
    return folder


PARTS = ("transformer", "vae", "text_encoder")


def test_the_original_folder(published: Path, original: Path) -> None:
    files = {path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file()}
    assert {"config.json", "Wan2.1_VAE.safetensors", "models_t5_umt5-xxl-enc-bf16.safetensors"} < files
    assert "google/umt5-xxl/tokenizer.json" in files
    assert "diffusion_pytorch_model.safetensors.index.json" in files, "it is more than one shard"
    config = json.loads((original / "config.json").read_text())
    assert config == {
        **{"_class_name": "WanModel", "model_type": "t2v", "dim": 48, "num_heads": 2, "num_layers": 2, "in_dim": 16},
        **{"out_dim": 16, "ffn_dim": 80, "freq_dim": 256, "eps": 1e-6, "text_len": 512},
    }
    assert "blocks.1.cross_attn.norm_q.weight" in safetensors.read_headers(transformer_files(original))


def transformer_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("diffusion_pytorch_model*.safetensors"))


@pytest.mark.parametrize("source", ["original", "pickled"])
def test_there_and_back(request: Any, published: Path, tmp_path: Path, source: str) -> None:
    convert(request.getfixturevalue(source), tmp_path / "back")
    for part in PARTS:
        assert_same(tensors_of(tmp_path / "back" / part), tensors_of(published / part))
        assert same_config(tmp_path / "back" / part, published / part)
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((published / name).read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back"], "nothing else is left"


def same_config(a: Path, b: Path) -> bool:
    """What the second says, the first says too; it may say more, such as what was null."""
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (a, b))
    return {key: ours.get(key) for key in theirs if theirs[key] is not None} == {
        key: value for key, value in theirs.items() if value is not None
    }


def test_all_layouts_make_the_same_video(published: Path, original: Path) -> None:
    asked = {"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 5, "seed": 1, "num_inference_steps": 1}
    videos = [fastvid.load(folder, device="cpu").generate(**asked) for folder in (published, original)]
    assert (videos[0].frames == videos[1].frames).all() and torch.equal(videos[0].latents, videos[1].latents)


def test_a_pickled_folder_is_not_loaded(pickled: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pickles \(Wan2.1_VAE.pth, models_t5.*fastvid convert"):
        open_checkpoint(pickled)


def test_what_follows_from_the_variant(original: Path, tmp_path: Path) -> None:
    """Published original folders say nothing of the encoders, the scheduler and the pipeline."""
    folder = tmp_path / "bare"
    shutil.copytree(original, folder)
    (folder / "diffusers_extras.json").unlink()
    convert(folder, tmp_path / "made")
    index = json.loads((tmp_path / "made" / "model_index.json").read_text())
    assert (index["_class_name"], index["transformer_2"]) == ("WanPipeline", [None, None])
    assert json.loads((tmp_path / "made/scheduler/scheduler_config.json").read_text())["flow_shift"] == 5.0
    checkpoint = open_checkpoint(tmp_path / "made").check()
    assert checkpoint.part("text_encoder").config == open_checkpoint(original).part("text_encoder").config


def test_two_experts(published: Path, tmp_path: Path) -> None:
    """Wan 2.2: high_noise_model and low_noise_model are transformer and transformer_2."""
    folder = tmp_path / "a14b"
    shutil.copytree(published, folder)
    second = {name: -tensor for name, tensor in tensors_of(folder / "transformer").items()}
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    save_file(second, weight_files.find_files(folder / "transformer_2")[0])
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    (folder / "model_index.json").write_text(json.dumps(index))
    made = convert(folder, tmp_path / "original", "original")
    assert made["parts"].keys() == {"transformer", "transformer_2", "vae", "text_encoder"}
    low = load_file(tmp_path / "original/low_noise_model/diffusion_pytorch_model.safetensors")
    assert same(low["head.modulation"], second["scale_shift_table"])
    (tmp_path / "original" / "diffusers_extras.json").unlink()
    convert(tmp_path / "original", tmp_path / "back")
    for part in ("transformer", "transformer_2"):
        assert_same(tensors_of(tmp_path / "back" / part), tensors_of(folder / part))
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875 and index["transformer_2"] == index["transformer"]
    assert json.loads((tmp_path / "back/scheduler/scheduler_config.json").read_text())["flow_shift"] == 12.0
    shutil.rmtree(tmp_path / "original" / "low_noise_model")
    with pytest.raises(CheckpointError, match="low_noise_model is missing"):
        convert(tmp_path / "original", tmp_path / "again")


# ---------------------------------------------------------------- single files


def wide_transformer() -> dict[str, Tensor]:
    """Original names and one head of 128, which is what a file without a config.json is taken to have."""
    torch.manual_seed(0)
    config = WanTransformerConfig(num_attention_heads=1, num_layers=1, ffn_dim=16, text_dim=8)
    state = WanTransformer(config, reference).state_dict()
    return {name: origin.make(state.__getitem__) for name, origin in origins(state, ORIGINAL).items()}


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [("", ".safetensors"), ("model.diffusion_model.", ".safetensors"), ("diffusion_model.", ".pth")],
)
def test_single_transformers(tmp_path: Path, prefix: str, suffix: str) -> None:
    state = wide_transformer()
    save = save_file if suffix == ".safetensors" else torch.save
    stored = {prefix + name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    save(stored, tmp_path / f"comfy{suffix}")
    made = convert(tmp_path / f"comfy{suffix}", tmp_path / "transformer")
    assert made["parts"] == {"transformer": "wan-t2v-custom"}
    assert made["files"] == ["config.json", "diffusion_pytorch_model.safetensors"]
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert (config["num_attention_heads"], config["attention_head_dim"], config["num_layers"]) == (1, 128, 1)
    convert(tmp_path / "transformer", tmp_path / "back.safetensors", "original")
    assert_same(load_file(tmp_path / "back.safetensors"), {name: t.to(torch.bfloat16) for name, t in state.items()})


def test_single_encoders(published: Path, original: Path, tmp_path: Path) -> None:
    """A VAE and a text encoder as ComfyUI keeps them: original names, or transformers' with the tokenizer inside."""
    convert(original / "Wan2.1_VAE.safetensors", tmp_path / "vae")
    assert_same(tensors_of(tmp_path / "vae"), tensors_of(published / "vae"))
    ours, theirs = (json.loads((folder / "vae" / "config.json").read_text()) for folder in (tmp_path, published))
    assert {key: theirs[key] for key in ours} == ours and "latents_mean" in ours
    text = {**tensors_of(published / "text_encoder"), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    save_file(text, tmp_path / "umt5_xxl_fp16.safetensors")
    made = convert(tmp_path / "umt5_xxl_fp16.safetensors", tmp_path / "text_encoder")
    assert made["files"] == ["config.json", "model.safetensors"]
    assert_same(tensors_of(tmp_path / "text_encoder"), tensors_of(published / "text_encoder"))
    # Put together, they are a model that makes the same.
    folder = tmp_path / "model"
    shutil.copytree(published, folder, ignore=lambda where, names: {"vae", "text_encoder"} & set(names))
    for part in ("vae", "text_encoder"):
        shutil.copytree(tmp_path / part, folder / part)
    for part in PARTS:
        assert open_checkpoint(folder).check().part(part).config == open_checkpoint(published).part(part).config


@pytest.mark.slow
def test_training_checkpoints(tmp_path: Path) -> None:
    """As Self-Forcing's: several state dicts in one file; the averaged one is taken."""
    state = wide_transformer()
    prefix = "model._fsdp_wrapped_module."
    inner = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"generator": {"x": torch.zeros(1)}, "generator_ema": inner, "step": 3}, tmp_path / "dmd.pt")
    convert(tmp_path / "dmd.pt", tmp_path / "dmd.safetensors", "original")
    assert_same(load_file(tmp_path / "dmd.safetensors"), state)


@pytest.mark.slow
def test_pickles_by_relative_paths_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = wide_transformer()
    (tmp_path / "there").mkdir()
    torch.save(state, tmp_path / "there" / "a.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "there" / "a.pth")
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("there/a.pth", "link.pth")):
        convert(name, f"{number}.safetensors", "original")
        assert_same(load_file(f"{number}.safetensors"), state)


@pytest.fixture(scope="module")
def training(published: Path) -> Path:
    """A checkpoint as Self-Forcing, CausVid and LongLive train it: two state dicts of a wrapped original model."""
    state = load_file(weight_files.find_files(published / "transformer")[0])
    plain = {name: origin.make(state.__getitem__) for name, origin in origins(state, ORIGINAL).items()}

    def wrapped(name: str) -> str:
        return "model._fsdp_wrapped_module." + name.replace(".self_attn", "._fsdp_wrapped_module.self_attn")

    ema = {wrapped(name): -tensor for name, tensor in plain.items()}
    file = published.parent / "causal.pt"
    critic = {"x": torch.zeros(1)}
    torch.save({"generator": {f"model.{k}": t for k, t in plain.items()}, "critic": critic, "generator_ema": ema}, file)
    return file


@pytest.mark.parametrize(
    ("base", "key"),
    [
        ("published", None),
        pytest.param("original", None, marks=pytest.mark.slow),
        pytest.param("pickled", "generator", marks=pytest.mark.slow),
    ],
)
def test_a_training_checkpoint_onto_a_base(
    request: Any, published: Path, training: Path, tmp_path: Path, base: str, key: str | None
) -> None:
    made = convert(training, tmp_path / "whole", key=key, base=request.getfixturevalue(base))
    assert made["parts"].keys() == {"transformer", "vae", "text_encoder"}
    sign = -1 if key is None else 1
    truth = tensors_of(published / "transformer")
    assert_same(tensors_of(tmp_path / "whole/transformer"), {name: sign * tensor for name, tensor in truth.items()})
    theirs, ours = open_checkpoint(published), open_checkpoint(tmp_path / "whole").check()
    assert ours.part("transformer").config == theirs.part("transformer").config
    for part in ("vae", "text_encoder"):
        assert_same(tensors_of(tmp_path / "whole" / part), tensors_of(published / part))
    asked = {"prompt": "a red circle", "height": 64, "width": 64, "num_frames": 5, "seed": 1, "num_inference_steps": 1}
    frames = fastvid.load(tmp_path / "whole", device="cpu").generate(**asked).frames
    plain = fastvid.load(published, device="cpu").generate(**asked).frames
    assert (frames == plain).all() == (key == "generator")


@pytest.mark.slow
def test_what_is_wrong_with_training_checkpoints(
    published: Path, training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CheckpointError, match="no weights under 'ema'; it has generator, critic, generator_ema"):
        convert(training, tmp_path / "x", key="ema", base=published)
    with pytest.raises(CheckpointError, match=r"no part of a Wan model"):
        convert(training, tmp_path / "x.safetensors", key="critic")
    with pytest.raises(CheckpointError, match="is of a AutoencoderKLWan; transformer has to be a Wan"):
        convert(published / "vae", tmp_path / "x", base=published)
    with pytest.raises(InvalidRequest, match="base .*vae is no folder of a whole model"):
        convert(training, tmp_path / "x", base=published / "vae")
    with pytest.raises(InvalidRequest, match="needs a folder as destination, not one file"):
        convert(training, tmp_path / "x.safetensors", base=published)
    both = {"model.head.weight": torch.zeros(1), "model._fsdp_wrapped_module.head.weight": torch.zeros(1)}
    torch.save(both, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match="holds model.head.weight twice, once in a wrapper"):
        convert(tmp_path / "both.pt", tmp_path / "x")
    command = [
        "convert",
        str(training),
        str(tmp_path / "cli"),
        "--base",
        str(published),
        "--key",
        "generator",
        "--quiet",
    ]
    assert main(command) == 0
    assert_same(tensors_of(tmp_path / "cli" / "transformer"), tensors_of(published / "transformer"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.pt", "cli"]


@pytest.mark.slow
def test_a_lora_out_of_a_pickle(tmp_path: Path) -> None:
    """LongLive's: {"generator_lora": ...} with peft's names."""
    torch.manual_seed(0)
    stem = "base_model.model.blocks.2.self_attn.q"
    a, b = torch.randn(4, 256) / 16, torch.randn(256, 4) / 16
    names = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    torch.save({"generator_lora": names, "critic_lora": {"x": a}}, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match=r"is a pickle, .*`fastvid convert .*lora.pt .*lora.safetensors`"):
        fastvid.load("embedded", device="cpu", loras=[tmp_path / "lora.pt"])
    with pytest.raises(InvalidRequest, match=r"is a LoRA; a destination that ends in .safetensors is needed"):
        convert(tmp_path / "lora.pt", tmp_path / "x")
    made = convert(tmp_path / "lora.pt", tmp_path / "lora.safetensors")
    assert made["parts"] == {"lora": "wan-lora"}
    assert_same(load_file(tmp_path / "lora.safetensors"), names)
    plain, merged = (
        fastvid.load("embedded", device="cpu", loras=loras)._model.transformer.state_dict()
        for loras in ((), [tmp_path / "lora.safetensors"])
    )
    changed = "blocks.2.attn1.to_q.weight"
    assert {name for name in plain if not torch.equal(plain[name], merged[name])} == {changed}
    torch.testing.assert_close(merged[changed], plain[changed] + b @ a)


KINDS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), KINDS, st.integers(0, 2**31), st.integers(1, 4000))
def test_bytes_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, patch: int, kind: Any, seed: int, shard: int
) -> None:
    """CLIP, whose tensors are split, joined, reshaped and transposed, with random bits in random shards."""
    torch.manual_seed(seed)
    width = rows * columns
    shapes = {
        "visual.cls_embedding": (1, 1, width),
        "visual.pos_embedding": (1, 5, width),
        "visual.head": (width, rows),
        "visual.patch_embedding.weight": (width, 3, patch, patch),
        "visual.transformer.0.attn.to_qkv.weight": (3 * width, width),
        "visual.transformer.0.attn.to_qkv.bias": (3 * width,),
        "visual.transformer.0.mlp.0.bias": (rows,),
    }
    bits = BITS[torch.empty(0, dtype=kind).element_size()]
    low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
    start = {name: torch.randint(low, high, shape, dtype=bits).view(kind) for name, shape in shapes.items()}
    folder = tmp_path_factory.mktemp("bytes")
    save_file(start, folder / "start.safetensors")
    there = rewrite([folder / "start.safetensors"], folder / "there.safetensors", DIFFUSERS, shard)
    projection = next(load_file(file) for file in there if "visual_projection.weight" in load_file(file))
    assert same(projection["visual_projection.weight"], start["visual.head"].T.contiguous())
    back = rewrite(there, folder / "back.safetensors", ORIGINAL, 2**40)
    assert_same(load_file(back[0]), start)
    shutil.rmtree(folder)


def rewrite(files: list[Path], target: Path, to: str, shard: int) -> list[Path]:
    with TensorReader() as tensors:
        entries = tensors.entries(files)
        return write_weights(target, moved(origins(entries, to), tensors, entries, target), shard)


def test_shards(published: Path, tmp_path: Path) -> None:
    convert(published / "transformer", tmp_path / "transformer", shard_bytes=50_000)
    files = weight_files.find_files(tmp_path / "transformer")
    assert len(files) > 3 and files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(published / "transformer").values())
    assert_same(tensors_of(tmp_path / "transformer"), tensors_of(published / "transformer"))


def test_pieces(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is read whole: any size of piece gives the same."""
    state = {name: tensor.flatten()[:40].clone() for name, tensor in tensors_of(published / "text_encoder").items()}
    torch.save(state, tmp_path / "a.pth")
    monkeypatch.setattr(pickles, "CHUNK", 7)
    with TensorReader() as tensors:
        entries = tensors.entries([tmp_path / "a.pth"])
        for name, entry in entries.items():
            data = state[name].numpy().tobytes()
            assert b"".join(tensors.chunks(name, entry, 0, len(data))) == data
            assert b"".join(tensors.chunks(name, entry, 8, 20)) == data[8:20]


# ---------------------------------------------------------------- pickles that are not tensors


class Bomb:
    """Writes a file if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "unpickled")


@pytest.mark.parametrize("how", ["torch", "torch in a dict", "plain"])
def test_a_malicious_pickle_is_refused(tmp_path: Path, how: str) -> None:
    bomb, file = Bomb(tmp_path / "exploded"), tmp_path / "Wan2.1_VAE.pth"
    if how == "plain":
        file.write_bytes(pickle.dumps(bomb))
    else:
        torch.save({"conv1.weight": torch.zeros(1), "x": bomb} if "dict" in how else bomb, file)
    with pytest.raises(
        CheckpointError, match=r"Wan2.1_VAE\.pth (holds more than plain tensors|is not in the zip format)"
    ):
        convert(file, tmp_path / "vae")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Wan2.1_VAE.pth"]


@pytest.mark.slow
def test_other_pickles_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    cases = [
        (lambda: file.write_bytes(b"no torch file"), r"a\.pth is not in the zip format"),
        (lambda: torch.save({"step": 3}, file), r"holds no dict of tensors \(step\); looked for are generator_ema"),
        (lambda: torch.save([torch.zeros(1)], file), r"holds no dict of tensors \(list\)"),
        (lambda: torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, file), r"holds a as torch.complex64"),
        (
            lambda: torch.save({"a": torch.zeros(1)}, file, _use_new_zipfile_serialization=False),
            r"a\.pth is not in the zip format that torch\.save has written since version 1\.6",
        ),
    ]
    for write, message in cases:
        write()
        with pytest.raises(CheckpointError, match=message):
            convert(file, tmp_path / "out")


# ---------------------------------------------------------------- what is wrong


def test_wrong_requests(published: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a.txt").touch()
    cases = [
        (
            (tmp_path / "nowhere", tmp_path / "x"),
            {},
            r"nowhere does not exist; give a folder, or a file \(.safetensors",
        ),
        ((published, tmp_path / "there"), {}, "there exists already; give a new name"),
        ((published, tmp_path / "no" / "x"), {}, "there is no folder"),
        ((published, tmp_path / "x.gguf"), {}, r"x.gguf: .gguf files are not written; the nearest is x.safetensors"),
        ((published, tmp_path / "x", "orignal"), {}, "to='orignal': allowed is diffusers or original; .* original"),
        ((published, tmp_path / "x"), {"shard_bytes": 0}, "a positive number of bytes"),
        ((published, tmp_path / "x.safetensors"), {}, "is a whole model .*, which needs a folder"),
        ((tmp_path / "a.txt", tmp_path / "x"), {}, r"a.txt: .txt file; allowed are .safetensors"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(InvalidRequest, match=message):
            convert(*arguments, **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(InvalidRequest, match=r"needs \d+ bytes, but .* has 5 free"):
        convert(original, tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "there"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "Wan2.1_VAE.safetensors").unlink(), r"lacks Wan2.1_VAE.safetensors \(or .pth\), the vae"),
        (lambda f: shutil.rmtree(f / "google"), "has no tokenizer.json; it comes with the original model"),
        (lambda f: [file.unlink() for file in transformer_files(f)], "lacks diffusion_pytorch_model-00001"),
        (
            lambda f: shutil.copy(f / "Wan2.1_VAE.safetensors", f / "models_t5_umt5-xxl-enc-bf16.safetensors"),
            "is a vae",
        ),
        (lambda f: (f / "config.json").write_text('{"dim": 48, "num_heads": 2, "ffn_dim": 81}'), "ffn_dim=81, but"),
        (lambda f: (f / "config.json").unlink(), "shapes do not show the number of heads"),
    ],
)
def test_broken_folders(original: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(original, folder)
    (folder / "diffusers_extras.json").unlink()
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(folder, tmp_path / "out")
    assert str(folder) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_failure(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr("fastvid.loaders.convert.write_json", fail)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else CheckpointError
    with pytest.raises(expected, match=None if error is KeyboardInterrupt else "out cannot be written: No space left"):
        convert(published / "vae", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(published / "vae"), tmp_path / "vae.safetensors"
    assert main(["convert", source, str(target), "--to", "original", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out) == {
        **{"source": source, "destination": str(target), "layout": "original", "parts": {"vae": "wan2.1-vae"}},
        "files": ["vae.safetensors"],
    }
    assert "vae: wan2.1-vae, " in told.err
    assert main(["convert", source, str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    target.write_bytes(b"broken")
    assert main(["convert", str(target), str(tmp_path / "x"), "--quiet"]) == 1
    assert "not a whole safetensors file" in capsys.readouterr().err
