"""LoRA files of every style: what is read equals diffusers' own converters, what is merged equals the formula in fp64,
what is removed leaves the very same bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import fastvid
from fastvid.cli import command_parser
from fastvid.cli.commands import main
from fastvid.errors import CheckpointError, InvalidRequest
from fastvid.loaders import lora as reader
from fastvid.loaders.lora import Lora, changed_weights, merge
from fastvid.loaders.lora_fit import check
from fastvid.loaders.lora_terms import Pair
from fastvid.models.wan.weight_names import ORIGINAL, rules

DIM, FFN, BLOCKS, RANK = 8, 12, 2, 3
# Linear layers that LoRAs are trained on, in diffusers' names: module -> shape
MODULES = {
    f"blocks.{i}.{name}": shape
    for i in range(BLOCKS)
    for name, shape in {
        **{f"attn{n}.{x}": (DIM, DIM) for n in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0")},
        "ffn.net.0.proj": (FFN, DIM),
        "ffn.net.2": (DIM, FFN),
    }.items()
}
SHAPES = {
    **{f"{module}.weight": shape for module, shape in MODULES.items()},
    **{f"{module}.bias": shape[:1] for module, shape in MODULES.items()},
    **{f"blocks.{i}.scale_shift_table": (1, 6, DIM) for i in range(BLOCKS)},
    **{f"blocks.{i}.{n}.weight": (DIM,) for i in range(BLOCKS) for n in ("norm2", "attn1.norm_q", "attn2.norm_k")},
    **{f"blocks.{i}.norm2.bias": (DIM,) for i in range(BLOCKS)},
    **{"scale_shift_table": (1, 2, DIM), "proj_out.weight": (16, DIM), "proj_out.bias": (16,)},
    **{"patch_embedding.weight": (DIM, 4, 1, 2, 2), "condition_embedder.time_proj.weight": (6 * DIM, DIM)},
}
ORIGINALS = {module: rules("transformer").module(module, ORIGINAL) for module in MODULES}


def pairs(seed: int = 0, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, B)."""
    torch.manual_seed(seed)
    return {module: (torch.randn(rank, n), torch.randn(m, rank)) for module, (m, n) in MODULES.items()}


def read_lora(path: Path, scale: Any = 1.0) -> Lora:
    (read,) = reader.read_lora(path, scale)
    return read


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def styled(style: str, alpha: float | None) -> dict[str, Tensor]:
    """The same LoRA as each tool writes it."""
    made = {}
    for module, (a, b) in pairs().items():
        stem = {
            "diffusers": f"transformer.{module}",
            "peft": f"base_model.model.{module}",
            "bare": ORIGINALS[module],
            "comfy": f"diffusion_model.{ORIGINALS[module]}",
            "comfy-down": f"diffusion_model.{ORIGINALS[module]}",
            "kohya": "lora_unet_" + ORIGINALS[module].replace(".", "_"),
            "kohya-diffusers": "lora_unet_" + module.replace(".", "_"),
        }[style]
        names = {"comfy-down": ("lora_down.weight", "lora_up.weight"), "bare": ("lora_A", "lora_B")}
        names |= {"peft": ("lora_A.default.weight", "lora_B.default.weight")}
        names |= dict.fromkeys(("kohya", "kohya-diffusers"), names["comfy-down"])
        down, up = names.get(style, ("lora_A.weight", "lora_B.weight"))
        made |= {f"{stem}.{down}": a, f"{stem}.{up}": b}
        if alpha is not None:
            made[f"{stem}.alpha"] = torch.tensor(alpha)
    return made


STYLES = ["diffusers", "peft", "bare", "comfy", "comfy-down", "kohya", "kohya-diffusers"]


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_merged_is_the_formula(tmp_path: Path, style: str, alpha: float | None, kind: torch.dtype) -> None:
    lora = read_lora(write(tmp_path / "a.safetensors", styled(style, alpha)), 0.8)
    check([lora], SHAPES)
    assert changed_weights([lora]) == {f"{module}.weight" for module in MODULES} and lora.ranks == (RANK,)
    factor = 0.8 * (1.0 if alpha is None else alpha / RANK)
    for module, (a, b) in pairs().items():
        base = torch.randn(MODULES[module]).to(kind)
        exact = base.double() + factor * (b.double() @ a.double())
        merged = merge(f"{module}.weight", base, [lora])
        assert merged.dtype == torch.float32
        assert (merged - exact).norm() <= 1e-6 * exact.norm()
        # Rounded once, to what is loaded: as near as that type allows.
        rounded = merged.to(torch.bfloat16).double() - exact
        assert rounded.norm() <= 1.01 * (exact.to(torch.bfloat16).double() - exact).norm()


@pytest.mark.parametrize(
    ("style", "name"),
    [
        ("comfy", "_convert_non_diffusers_wan_lora_to_diffusers"),
        ("comfy-down", "_convert_non_diffusers_wan_lora_to_diffusers"),
        ("kohya", "_convert_musubi_wan_lora_to_diffusers"),
    ],
)
def test_what_is_read_is_what_diffusers_reads(tmp_path: Path, style: str, name: str) -> None:
    from diffusers.loaders import lora_conversion_utils as reference

    lora = read_lora(write(tmp_path / "a.safetensors", styled(style, 2.0)))
    theirs = getattr(reference, name)(styled(style, 2.0))  # which changes some tensors in place
    assert {f"transformer.{module}.lora_{x}.weight" for module in MODULES for x in "AB"} == theirs.keys()
    for module, shape in MODULES.items():
        a, b = (theirs[f"transformer.{module}.lora_{x}.weight"] for x in "AB")
        merged = merge(f"{module}.weight", torch.zeros(shape), [lora])
        torch.testing.assert_close(merged, b @ a, rtol=1e-5, atol=1e-6)


def test_terms_that_are_stored_whole(tmp_path: Path) -> None:
    """lightx2v's distilled models: differences of weights, biases, norms and modulations beside the pairs."""
    torch.manual_seed(0)
    stored = {
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "diffusion_model.blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
        "diffusion_model.blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "diffusion_model.blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "diffusion_model.blocks.1.diff_m": "blocks.1.scale_shift_table",
        "diffusion_model.blocks.0.modulation.diff": "blocks.0.scale_shift_table",
        "diffusion_model.head.diff_m": "scale_shift_table",
        "diffusion_model.head.head.diff": "proj_out.weight",
        "diffusion_model.head.head.diff_b": "proj_out.bias",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    }
    tensors = {name: torch.randn(SHAPES[target]) for name, target in stored.items()}
    tensors |= styled("comfy-down", 1.5)
    lora = read_lora(write(tmp_path / "a.safetensors", tensors), -0.5)
    check([lora], SHAPES)
    for name, target in stored.items():
        base = torch.randn(SHAPES[target])
        exact = base.double() - 0.5 * tensors[name].double()
        assert torch.equal(merge(target, base, [lora]), exact.float()), (name, "alpha does not scale these")


def test_convolutions_and_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "transformer.patch_embedding.lora_A.weight": torch.randn(2, 4, 1, 2, 2),
        "transformer.patch_embedding.lora_B.weight": torch.randn(DIM, 2, 1, 1, 1),
        "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.randn(2, DIM),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.randn(DIM, 2),
        "transformer.blocks.0.attn1.to_q.lora_B.bias": torch.randn(DIM),
    }
    lora = read_lora(write(tmp_path / "a.safetensors", tensors))
    check([lora], SHAPES)
    a, b = (tensors[f"transformer.patch_embedding.lora_{x}.weight"] for x in "AB")
    x = torch.randn(1, 4, 1, 4, 4)
    conv = torch.nn.functional.conv3d
    merged = merge("patch_embedding.weight", torch.zeros(SHAPES["patch_embedding.weight"]), [lora])
    torch.testing.assert_close(conv(x, merged, stride=(1, 2, 2)), conv(conv(x, a, stride=(1, 2, 2)), b))
    bias = merge("blocks.0.attn1.to_q.bias", torch.zeros(DIM), [lora])
    assert torch.equal(bias, tensors["transformer.blocks.0.attn1.to_q.lora_B.bias"])


@pytest.mark.parametrize(
    ("told", "factor"),
    [
        ({"r": RANK, "lora_alpha": 6}, 6 / RANK),
        ({"r": RANK, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(RANK)),
        ({"r": RANK, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 1.5, "to_x": 9}}, {"attn1.to_q": 0.5}),
    ],
)
@pytest.mark.parametrize("where", ["header", "beside"])
def test_alpha_as_peft_tells_it(tmp_path: Path, told: dict[str, Any], factor: Any, where: str) -> None:
    tensors = styled("diffusers" if where == "header" else "peft", None)
    if where == "header":
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in told.items()})}
        path = write(tmp_path / "pytorch_lora_weights.safetensors", tensors, metadata)
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(told))
        path = write(tmp_path / "adapter_model.safetensors", tensors)
    lora = read_lora(path)
    for module in MODULES:
        expected = factor if not isinstance(factor, dict) else factor.get(module.split(".", 2)[2], 6 / RANK)
        assert lora.terms[f"{module}.weight"][0].factor == pytest.approx(expected), module


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 7), st.floats(-2, 2)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_many_at_once(files: list[tuple[int, float]], rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    base, loras = torch.randn(rows, columns), []
    exact = base.double()
    for rank, scale in files:
        up, down = torch.randn(rows, rank), torch.randn(rank, columns)
        loras.append(Lora(Path("x"), scale, {"w": (Pair(up, down, 0.5),)}))
        exact = exact + 0.5 * scale * (up.double() @ down.double())
    kept = base.clone()
    merged = merge("w", base, loras)
    assert (merged - exact).abs().max() <= 2e-6 * (1 + sum(abs(s) * r for r, s in files)) * 10
    assert torch.equal(base, kept), "the base is left as it was"
    assert merge("other", base, loras) is base


# ---------------------------------------------------------------- loading


def embedded_lora(path: Path, seed: int = 0) -> dict[str, Tensor]:
    """One that fits the model of the package: 256 wide."""
    torch.manual_seed(seed)
    stem = "diffusion_model.blocks.2.self_attn.q"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(4, 256) / 16,
        f"{stem}.lora_up.weight": torch.randn(256, 4),
        f"{stem}.alpha": torch.tensor(2.0),
        "diffusion_model.blocks.1.diff_m": torch.randn(1, 6, 256),
    }
    write(path, tensors)
    return tensors


def state(pipe: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe._model.transformer.state_dict().items()}


def test_loaded_changed_and_removed(tmp_path: Path) -> None:
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    tensors = embedded_lora(first)
    embedded_lora(second, 1)
    plain = fastvid.load("embedded", device="cpu", dtype="bfloat16")
    base = state(plain)
    pipe = fastvid.load("embedded", device="cpu", dtype="bfloat16", loras=[(str(first), 0.8)])
    merged = state(pipe)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"blocks.2.attn1.to_q.weight", "blocks.1.scale_shift_table"}
    assert {name: t.dtype for name, t in merged.items()} == {name: t.dtype for name, t in base.items()}
    stem = "diffusion_model.blocks.2.self_attn.q"
    full = fastvid.load("embedded", device="cpu", dtype="float32")._model.transformer.state_dict()
    exact = full["blocks.2.attn1.to_q.weight"].double() + 0.8 * 2 / 4 * (
        tensors[f"{stem}.lora_up.weight"].double() @ tensors[f"{stem}.lora_down.weight"].double()
    )
    error = (merged["blocks.2.attn1.to_q.weight"].double() - exact).norm()
    assert error <= 1.01 * (exact.bfloat16().double() - exact).norm()
    assert pipe.describe()["loras"] == [[str(first), 0.8]]

    pipe.set_loras([(second, 1.0), first])
    both = state(pipe)
    whole = fastvid.load("embedded", device="cpu", dtype="bfloat16", loras=[(second, 1.0), first])
    assert all(torch.equal(both[name], tensor) for name, tensor in state(whole).items())
    with pytest.raises(CheckpointError, match="missing.safetensors cannot be read"):
        pipe.set_loras([tmp_path / "missing.safetensors"])
    assert all(torch.equal(both[name], tensor) for name, tensor in state(pipe).items()), "nothing has changed"
    pipe.set_loras()
    after = state(pipe)
    assert all(after[name].view(torch.uint8).equal(base[name].view(torch.uint8)) for name in base)
    assert pipe.describe()["loras"] == []


def test_loras_that_overflow_change_nothing(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    embedded_lora(good)
    tensors = embedded_lora(bad, 1)
    write(bad, {name: tensor * 1e4 if "lora" in name else tensor for name, tensor in tensors.items()})
    pipe = fastvid.load("embedded", device="cpu", dtype="float16", loras=[good])
    before = state(pipe)
    with pytest.raises(CheckpointError, match="bad.safetensors: .* not finite in float16"):
        pipe.set_loras([bad])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(pipe).items())
    assert pipe.describe()["loras"] == [[str(good), 1.0]]


def test_a_video_is_made_again_with_its_loras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.safetensors"
    embedded_lora(file)
    made = ["a red circle", "--num-frames", "1", "--steps", "1", "--seed", "3", "--quiet", "--device", "cpu"]
    assert main(["generate", *made, "-o", str(tmp_path / "a.mp4"), "--lora", f"{file}:0.5", "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["settings"]["loras"] == [[str(file), 0.5]]
    again = ["generate", "--recipe", str(tmp_path / "a.mp4"), "-o", str(tmp_path / "b.mp4"), "--quiet", "--json"]
    assert main([*again, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == recipe


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "one.safetensors", write(tmp_path / "b.safetensors", styled("comfy", None))
    embedded_lora(file)
    assert main(["inspect", "embedded", "--lora", f"{file}:0.5", "--lora", str(other), "--json"]) == 0
    fits, not_fits = json.loads(capsys.readouterr().out)["loras"]
    assert fits == {"file": str(file), "scale": 0.5, "ranks": [4], "parameters": 2, "problems": []}
    assert "wrong shapes: blocks.0.attn1.to_k.weight [8, 8] for [256, 256]" in not_fits["problems"][0]


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("C:\\a.safetensors", ("C:\\a.safetensors", 1.0)),
        ("C:\\a.safetensors:-1", ("C:\\a.safetensors", -1.0)),
        (":1", (":1", 1.0)),
        ("a.safetensors:high", ("a.safetensors", 1.0, "high")),
        ("a.safetensors:0.5:low", ("a.safetensors", 0.5, "low")),
        ("C:\\a.safetensors:low", ("C:\\a.safetensors", 1.0, "low")),
        ("low", ("low", 1.0)),
        ("a:middle", ("a:middle", 1.0)),
        ("a:HIGH", ("a", 1.0, "high")),
        ("a:high:0.5", ("a", 0.5, "high")),
        ("a:high:low", ("a:high", 1.0, "low")),
        ("a:1:2", ("a:1", 2.0)),
        ("org/name:0.5:low", ("org/name", 0.5, "low")),
    ],
)
def test_the_flag(text: str, pair: tuple[Any, ...]) -> None:
    assert command_parser.lora(text) == pair


# ---------------------------------------------------------------- what is wrong


def test_what_matches_nothing_is_listed(tmp_path: Path) -> None:
    a, b = torch.zeros(2, DIM), torch.zeros(DIM, 2)
    tensors = {f"diffusion_model.blocks.{i}.cross_attn.k_img.lora_A.weight": a for i in range(12)}
    tensors |= {f"diffusion_model.blocks.{i}.cross_attn.k_img.lora_B.weight": b for i in range(12)}
    tensors |= {"lora_te_text_model.lora_down.weight": a, "lora_te_text_model.lora_up.weight": b}
    lora = read_lora(write(tmp_path / "a.safetensors", {name: t.clone() for name, t in tensors.items()}))
    message = r"a\.safetensors does not fit .*match 13 of 13: blocks.0.attn2.add_k_proj.weight.*and 3 more; .*Wan 2.1"
    with pytest.raises(CheckpointError, match=message):
        check([lora], SHAPES)


LAYER = "diffusion_model.blocks.0.self_attn.q"
WRONG = [
    ({f"{LAYER}.lora_A.weight": (2, 8)}, r"blocks.0.attn1.to_q needs lora_B .*; only down is there"),
    ({f"{LAYER}.alpha": ()}, "only alpha is there"),
    ({f"{LAYER}.lora_B.bias": (8,)}, "only up_bias is there"),
    (
        {f"{LAYER}.lora_A.weight": (2, 8), f"{LAYER}.lora_B.weight": (8, 3)},
        r"blocks.0.attn1.to_q has shapes \[8, 3\], \[2, 8\], which do not multiply",
    ),
    (
        {f"{LAYER}.lora_A.weight": (2, 8), f"{LAYER}.lora_B.weight": (8, 2), f"{LAYER}.alpha": (2,)},
        r"alpha of blocks.0.attn1.to_q is \[2\]",
    ),
    ({f"{LAYER}.lora_A.weight": (0, 8), f"{LAYER}.lora_B.weight": (8, 0)}, r"\[8, 0\], \[0, 8\]; .* rank 1 or more"),
    ({f"{LAYER}.dora_scale": (8,)}, "needs lora_A .*; only dora_scale is there"),
    ({f"{LAYER}.hada_w1_a": (8, 2)}, "blocks.0.attn1.to_q needs hada_w1_b; only hada_w1_a is there"),
    ({f"{LAYER}.lokr_w1": (2, 2)}, "blocks.0.attn1.to_q needs lokr_w2_a; only lokr_w1 is there"),
    ({f"{LAYER}.lokr_w1": (2, 2), f"{LAYER}.lokr_w2": (4,)}, r"shapes \[2, 2\] and \[4\]; two matrices"),
    ({f"{LAYER}.lokr_w1": (2, 2), f"{LAYER}.lora_A.weight": (2, 8)}, "changes of several kinds: down, lokr_w1"),
    ({f"{LAYER}.oft_blocks": (8,)}, r"oft_blocks \(OFT is not supported\)"),
    ({f"{LAYER}.a1.weight": (8, 2)}, r"\(GLoRA is not supported\)"),
    ({f"{LAYER}.lora_A.{x}.weight": (2, 8) for x in "ab"}, r"several adapters \(a, b\); save each"),
    ({f"{LAYER}.diff": (8, 8), f"{LAYER}.w_norm": (8,)}, "the same weights twice, under different names: .*w_norm"),
    ({f"{LAYER}.weight": (8, 8)}, r"no part of a LoRA: .*self_attn.q.weight$"),
    ({}, "holds no LoRA weights"),
]


@pytest.mark.parametrize(("shapes", "message"), WRONG, ids=range(len(WRONG)))
def test_files_that_are_no_lora(tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    path = write(tmp_path / "a.safetensors", {name: torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_lora(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    (tmp_path / "b.safetensors").write_bytes(b"x" * 20)
    write(tmp_path / "c.safetensors", {f"{LAYER}.diff": torch.zeros(2, dtype=torch.int8)})
    for name, message in {"a.pt": "is a pickle", "b.safetensors": "not a whole", "c.safetensors": "I8 tensors"}.items():
        with pytest.raises(CheckpointError, match=message):
            read_lora(tmp_path / name)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 101, True, "1"])
def test_wrong_scales(tmp_path: Path, scale: Any) -> None:
    path = write(tmp_path / "a.safetensors", styled("comfy", None))
    with pytest.raises(InvalidRequest, match=r"loras\[0\] scale.*-100 to 100"):
        fastvid.load("embedded", device="cpu", loras=[(path, scale)])


def test_an_expert_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "one.safetensors"
    embedded_lora(file)
    with pytest.raises(InvalidRequest, match=r"one.safetensors is for the high noise expert, but .* one transformer"):
        fastvid.load("embedded", device="cpu", loras=[(file, 1.0, "high")])
    pipe = fastvid.load("embedded", device="cpu")
    with pytest.raises(InvalidRequest, match="leave out 'low'"):
        pipe.set_loras([(file, 1.0, "low")])
    with pytest.raises(InvalidRequest, match="expert is 'hihg'; allowed is high or low; the nearest is high"):
        pipe.set_loras([(file, 1.0, "hihg")])
    assert main(["inspect", "embedded", "--lora", f"{file}:high", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["loras"]
    assert told["expert"] == "high" and "one transformer for all levels" in told["problems"][0]


@pytest.mark.parametrize("loras", [[3], [("a",)], [("a", 1.0, 2)], [("", 1.0)], [None]])
def test_wrong_lists(loras: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"loras.*\(file, scale\)|loras.*file or folder|loras.*one string"):
        fastvid.load("embedded", device="cpu", loras=loras)
