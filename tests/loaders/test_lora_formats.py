"""Every kind of change that LoRA files hold, merged, against its formula in fp64, alone and together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fastvid.errors import CheckpointError, FastvidWarning
from fastvid.loaders.lora import Lora, merge, read_lora
from fastvid.loaders.lora_fit import check
from fastvid.loaders.lora_names import is_lora_weight

OUT, IN, RANK, KERNEL = 12, 8, 2, (1, 2, 2)
SHAPES = {
    "blocks.0.attn1.to_q.weight": (OUT, IN),
    "blocks.0.attn1.to_q.bias": (OUT,),
    "blocks.0.norm2.weight": (IN,),
    "blocks.0.norm2.bias": (IN,),
    "patch_embedding.weight": (OUT, 4, *KERNEL),
}
LINEAR, CONV = "blocks.0.attn1.to_q", "patch_embedding"
Tensors = dict[str, Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape)))


def written(path: Path, *parts: tuple[str, Tensors], name: str = "lycoris_{}", **header: str) -> Lora:
    """A file with these tensors by module, read."""
    flat = {
        f"{name.format(module.replace('.', '_') if '_{' in name else module)}.{role}": tensor.contiguous()
        for module, tensors in parts
        for role, tensor in tensors.items()
    }
    save_file(flat, path, header or None)
    (lora,) = read_lora(path, 0.7)
    check([lora], SHAPES)
    return lora


def low_rank(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("or,ri->oi", a.double(), b.double())


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """[a, c] and [b, d, ...]: element [a b, c d] is w1[a, c] w2[b, d]."""
    made = torch.einsum("ac,bd...->abcd...", w1.double(), w2.double())
    return made.reshape(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:])


def tucker(middle: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """up [rank, out], down [rank, in]."""
    made = torch.zeros(up.shape[1], down.shape[1], *middle.shape[2:], dtype=torch.float64)
    for m in range(middle.shape[0]):
        for n in range(middle.shape[1]):
            made += torch.einsum("o,i,xyz->oixyz", up[m].double(), down[n].double(), middle[m, n].double())
    return made


def cases() -> dict[str, tuple[str, Tensors, Tensor]]:
    """Name -> (module, tensors by role, the change that they stand for in fp64)."""
    alpha = torch.tensor(3.0)
    a, b = drawn(OUT, RANK, seed=1), drawn(RANK, IN, seed=2)
    c, d = drawn(OUT, RANK, seed=3), drawn(RANK, IN, seed=4)
    w1, w2 = drawn(3, 2, seed=5), drawn(4, 4, seed=6)
    w1_a, w1_b, w2_a, w2_b = drawn(3, RANK), drawn(RANK, 2), drawn(4, RANK, seed=7), drawn(RANK, 4, seed=8)
    t, t2 = drawn(RANK, RANK, *KERNEL, seed=9), drawn(RANK, RANK, *KERNEL, seed=10)
    up, down, up2, down2 = drawn(RANK, OUT), drawn(RANK, 4, seed=11), drawn(RANK, OUT, seed=12), drawn(RANK, 4, seed=13)
    whole = drawn(3, 2, *KERNEL, seed=14)
    ones = (1, 1, 1)
    made: dict[str, tuple[str, Tensors, Tensor]] = {
        "lora": (LINEAR, {"lora_up.weight": a, "lora_down.weight": b, "alpha": alpha}, 1.5 * low_rank(a, b)),
        "loha": (
            LINEAR,
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": alpha},
            1.5 * low_rank(a, b) * low_rank(c, d),
        ),
        "loha-without-alpha": (
            LINEAR,
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d},
            low_rank(a, b) * low_rank(c, d),
        ),
        "lokr-whole": (LINEAR, {"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha}, kronecker(w1, w2)),
        "lokr-one": (
            LINEAR,
            {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": alpha},
            1.5 * kronecker(w1, low_rank(w2_a, w2_b)),
        ),
        "lokr-other": (
            LINEAR,
            {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2": w2, "alpha": alpha},
            1.5 * kronecker(low_rank(w1_a, w1_b), w2),
        ),
        "lokr-both": (
            LINEAR,
            {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b, "alpha": alpha},
            1.5 * kronecker(low_rank(w1_a, w1_b), low_rank(w2_a, w2_b)),
        ),
        "norm": ("blocks.0.norm2", {"w_norm": drawn(IN), "b_norm": drawn(IN, seed=1)}, drawn(IN).double()),
        "full": (LINEAR, {"diff": drawn(OUT, IN), "diff_b": drawn(OUT)}, drawn(OUT, IN).double()),
        "conv-tucker": (
            CONV,
            {
                "lora_up.weight": up.T.reshape(OUT, RANK, *ones),
                "lora_mid.weight": t,
                "lora_down.weight": down.reshape(RANK, 4, *ones),
                "alpha": alpha,
            },
            1.5 * tucker(t, up, down),
        ),
        "conv-loha-tucker": (
            CONV,
            {
                **{"hada_t1": t, "hada_w1_a": up, "hada_w1_b": down},
                **{"hada_t2": t2, "hada_w2_a": up2, "hada_w2_b": down2, "alpha": alpha},
            },
            1.5 * tucker(t, up, down) * tucker(t2, up2, down2),
        ),
        "conv-lokr": (CONV, {"lokr_w1": drawn(4, 2), "lokr_w2": whole}, kronecker(drawn(4, 2), whole)),
        "conv-lokr-tucker": (
            CONV,
            {
                **{"lokr_w1": drawn(4, 2), "lokr_t2": t, "lokr_w2_a": drawn(RANK, 3), "lokr_w2_b": drawn(RANK, 2)},
                "alpha": alpha,
            },
            1.5 * kronecker(drawn(4, 2), tucker(t, drawn(RANK, 3), drawn(RANK, 2))),
        ),
    }
    return made


CASES = cases()


def test_pickles_of_every_kind_are_converted() -> None:
    for module, tensors, _ in CASES.values():
        assert all(is_lora_weight(f"{module}.{role}") for role in tensors)
    assert not is_lora_weight(f"{LINEAR}.weight") and not is_lora_weight("vae.alpha_net.weight")


def close(got: Tensor, exact: Tensor) -> None:
    assert got.dtype == torch.float32
    assert (got.double() - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", ["lycoris_{}", "transformer.{}", "lora_unet__{}"])
def test_each_kind(tmp_path: Path, kind: str, name: str) -> None:
    module, tensors, change = CASES[kind]
    lora = written(tmp_path / "a.safetensors", (module, tensors), name=name)
    base = drawn(*SHAPES[f"{module}.weight"], seed=99)
    close(merge(f"{module}.weight", base, [lora]), base.double() + 0.7 * change)
    for role, of in (("b_norm", "bias"), ("diff_b", "bias")):
        if role in tensors:
            base = drawn(*tensors[role].shape, seed=98)
            close(merge(f"{module}.{of}", base, [lora]), base.double() + 0.7 * tensors[role].double())


def test_kinds_together(tmp_path: Path) -> None:
    for module in (LINEAR, CONV):
        chosen = {kind: case for kind, case in CASES.items() if case[0] == module}
        loras = [written(tmp_path / f"{kind}.safetensors", case[:2]) for kind, case in chosen.items()]
        base = drawn(*SHAPES[f"{module}.weight"], seed=97)
        exact = base.double() + 0.7 * sum(case[2] for case in chosen.values())
        close(merge(f"{module}.weight", base, loras), exact)
        close(merge(f"{module}.weight", base, loras[::-1]), exact)


def test_tucker_is_three_convolutions(tmp_path: Path) -> None:
    tensors = CASES["conv-tucker"][1]
    lora = written(tmp_path / "a.safetensors", (CONV, tensors))
    x, conv = drawn(1, 4, 2, 4, 4).double(), torch.nn.functional.conv3d
    delta = merge(f"{CONV}.weight", torch.zeros(SHAPES[f"{CONV}.weight"]), [lora]).double()
    up, mid, down = (tensors[f"lora_{part}.weight"].double() for part in ("up", "mid", "down"))
    torch.testing.assert_close(conv(x, delta), 0.7 * 1.5 * conv(conv(conv(x, down), mid), up), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- DoRA


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """The rows (axis 0) or columns (axis 1) of weight + change, with the lengths that magnitude says."""
    total = weight.double() + change
    made = total.clone()
    for i in range(total.shape[axis]):
        row = total.select(axis, i)
        made.select(axis, i).copy_(row * (magnitude.flatten()[i].double() / row.square().sum().sqrt()))
    return made


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr-one", "conv-tucker", "conv-lokr"])
def test_dora_as_kohya_and_lycoris_write_it(tmp_path: Path, kind: str, axis: int) -> None:
    module, tensors, change = CASES[kind]
    base = drawn(*SHAPES[f"{module}.weight"], seed=96)
    lengths = 1 + drawn(base.shape[axis]).abs()
    shape = [base.shape[i] if i == axis else 1 for i in range(base.ndim)]
    lora = written(tmp_path / "a.safetensors", (module, {**tensors, "dora_scale": lengths.reshape(shape)}))
    whole = decomposed(base, change, lengths, axis)
    close(merge(f"{module}.weight", base, [lora]), base.double() + 0.7 * (whole - base.double()))


@pytest.mark.parametrize(
    "role", ["lora_magnitude_vector", "lora_magnitude_vector.style", "lora_magnitude_vector.weight"]
)
def test_dora_as_peft_writes_it(tmp_path: Path, role: str) -> None:
    a, b, bias = drawn(OUT, RANK), drawn(RANK, IN, seed=1), drawn(OUT, seed=2)
    lengths, base = 1 + drawn(OUT, seed=3).abs(), drawn(OUT, IN, seed=95)
    adapter = ".style" if "style" in role else ""
    tensors = {f"lora_B{adapter}.weight": a, f"lora_A{adapter}.weight": b, role: lengths}
    tensors[f"lora_B{adapter}.bias"] = bias
    told = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 3, "transformer.use_dora": True})
    lora = written(tmp_path / "a.safetensors", (LINEAR, tensors), name="transformer.{}", lora_adapter_metadata=told)
    close(merge(f"{LINEAR}.weight", base, [lora]), decomposed(base, 0.7 * 1.5 * low_rank(a, b), lengths, 0))
    got = merge(f"{LINEAR}.bias", torch.zeros(OUT), [lora])
    torch.testing.assert_close(got.double(), 0.7 * 1.5 * bias.double(), rtol=1e-6, atol=1e-6)


def test_doras_are_each_of_the_base(tmp_path: Path) -> None:
    """Two of them do not build on each other: their order does not matter."""
    base, loras, exact = drawn(OUT, IN, seed=94), [], drawn(OUT, IN, seed=94).double()
    for kind in ("lora", "loha"):
        _, tensors, change = CASES[kind]
        lengths = 1 + drawn(OUT, seed=len(kind)).abs()
        loras.append(written(tmp_path / f"{kind}.safetensors", (LINEAR, {**tensors, "dora_scale": lengths[:, None]})))
        exact += 0.7 * (decomposed(base, change, lengths, 0) - base.double())
    close(merge(f"{LINEAR}.weight", base, loras), exact)
    close(merge(f"{LINEAR}.weight", base, loras[::-1]), exact)


def test_lengths_of_neither_side_do_not_fit(tmp_path: Path) -> None:
    tensors = CASES["lora"][1]
    with pytest.raises(CheckpointError, match="wrong shapes"):
        written(tmp_path / "a.safetensors", (LINEAR, {**tensors, "dora_scale": torch.ones(5, 1)}))


# ---------------------------------------------------------------- what peft says


@pytest.mark.parametrize(
    ("told", "factor"),
    [
        ({"r": 2, "lora_alpha": 6}, 3.0),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(2)),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {r"attn\d\..*": 2}}, 3.0),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {r"^blocks\.(0|7)\..*to_[qk]$": 5, "to_q": 1}}, 2.5),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"to_q": 1, r".*": 5}}, 0.5),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"o_q": 1, r"^attn1\.to_q": 5}}, 3.0),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {r"self_attn\.q": 4}}, 2.0),
    ],
)
def test_alpha_as_peft_says_it(tmp_path: Path, told: dict[str, Any], factor: float) -> None:
    tensors = {"lora_B.weight": drawn(OUT, RANK), "lora_A.weight": drawn(RANK, IN)}
    name = "base_model.model.blocks.0.self_attn.q" if "self" in str(told) else f"base_model.model.{LINEAR}"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **told}))
    save_file({f"{name}.{role}": tensor for role, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (lora,) = read_lora(tmp_path)
    assert lora.terms[f"{LINEAR}.weight"][0].factor == pytest.approx(factor)


@pytest.mark.parametrize("kind", ["LOKR", "LOHA"])
def test_other_kinds_that_peft_writes(tmp_path: Path, kind: str) -> None:
    module, tensors, change = CASES[{"LOKR": "lokr-whole", "LOHA": "loha"}[kind]]
    tensors = {role: tensor for role, tensor in tensors.items() if role != "alpha"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 2, "alpha": 5}))
    save_file({f"base_model.model.{module}.{k}": t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (lora,) = read_lora(tmp_path)
    exact = change * (2.5 if kind == "LOKR" else 2.5 / 1.5)
    got = merge(f"{module}.weight", torch.zeros(OUT, IN), [lora])
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


WRONG = [
    ({"r": 4}, "say rank 4 for .*attn1.to_q, its weights 2"),
    ({"r": 2, "lora_alpha": "many"}, "lora_alpha of .* is 'many'; a number is expected"),
    ({"r": 0}, "r of .* is 0; a positive number"),
    ({"r": 2, "alpha_pattern": {"to_q": None}, "lora_alpha": None}, None),
    ({"r": 2, "alpha_pattern": ["to_q"]}, "alpha_pattern is a list; patterns and numbers"),
    ({"r": 2, "alpha_pattern": {"(to_q": 3}}, r"alpha_pattern: '\(to_q' is no regular expression"),
    ({"r": 2, "alpha_pattern": {r"(?=x*)to_q": 3}}, "of a kind that is not supported"),
    ({"r": 2, "peft_type": "BOFT"}, "adapter of type 'BOFT'; supported are LORA, LOHA, LOKR"),
    ({"r": 2, "init_lora_weights": "pissa_niter_16"}, "changes the model's own weights too"),
    ({"r": 2, "use_dora": True}, "lacks lora_magnitude_vector, although"),
    ({"r": 2, "layer_replication": [[0, 4]]}, "layer_replication is not supported"),
]


@pytest.mark.parametrize(("told", "message"), WRONG)
def test_settings_that_cannot_be_followed(tmp_path: Path, told: dict[str, Any], message: str | None) -> None:
    tensors = {f"{LINEAR}.lora_B.weight": drawn(OUT, RANK), f"{LINEAR}.lora_A.weight": drawn(RANK, IN)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(told)})
    if message is None:
        assert read_lora(tmp_path)[0].terms[f"{LINEAR}.weight"][0].factor == 1.0
        return
    with pytest.raises(CheckpointError, match=message) as said:
        read_lora(tmp_path)
    assert "a.safetensors" in str(said.value)


def test_what_is_said_and_not_done_is_warned_of(tmp_path: Path) -> None:
    tensors = {f"{LINEAR}.lora_B.weight": drawn(OUT, RANK), f"{LINEAR}.lora_A.weight": drawn(RANK, IN)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.warns(FastvidWarning, match="no adapter_config.json beside it"):
        read_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "fan_in_fan_out": True}))
    with pytest.warns(FastvidWarning, match="fan_in_fan_out"):
        read_lora(tmp_path)
    save_file({**tensors, f"{LINEAR}.alpha": torch.tensor(0.0)}, tmp_path / "zero.safetensors")
    with pytest.warns(FastvidWarning, match=r"zero.safetensors: alpha is 0 for blocks.0.attn1.to_q"):
        read_lora(tmp_path / "zero.safetensors")


# ---------------------------------------------------------------- values that are no numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["lora_up.weight", "lora_down.weight", "alpha"])
def test_values_that_are_no_numbers(tmp_path: Path, value: float, role: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in CASES["lora"][1].items()}
    tensors[role].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=rf"a.safetensors has NaN or infinite values in .*{role}"):
        written(tmp_path / "a.safetensors", (LINEAR, tensors))


def test_a_merge_that_overflows(tmp_path: Path) -> None:
    big = torch.full((OUT, IN), 2e5)
    lora = written(tmp_path / "huge.safetensors", (LINEAR, {"diff": big}))
    base = torch.ones(OUT, IN, dtype=torch.bfloat16)
    assert merge(f"{LINEAR}.weight", base, [lora], torch.bfloat16).isfinite().all()
    with pytest.raises(CheckpointError, match=r"huge.safetensors: blocks.0.attn1.to_q.weight .* not finite in float16"):
        merge(f"{LINEAR}.weight", base, [lora], torch.float16)
    wide = {"lora_up.weight": torch.full((OUT, RANK), 1e30), "lora_down.weight": torch.full((RANK, IN), 1e30)}
    lora = written(tmp_path / "wide.safetensors", (LINEAR, wide))
    with pytest.raises(CheckpointError, match=r"wide.safetensors: .* not finite in float32"):
        merge(f"{LINEAR}.weight", base, [lora])


SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 4, IN, OUT]), max_size=5)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(CASES)), st.integers(0, 6), SIZES, st.booleans())
def test_any_shape_merges_or_is_refused(tmp_path: Path, kind: str, which: int, shape: list[int], dropped: bool) -> None:
    """One tensor of a right file has another shape, or is not there."""
    module, tensors, _ = CASES[kind]
    role = [*tensors, "dora_scale", "lora_magnitude_vector"][which % (len(tensors) + 2)]
    changed = {**tensors, role: torch.ones(shape)}
    changed = {name: tensor for name, tensor in changed.items() if name != role or not dropped}
    try:
        lora = written(tmp_path / "a.safetensors", (module, changed), name="transformer.{}")
    except CheckpointError as error:
        assert "a.safetensors" in str(error)
        return
    for name in lora.terms:
        assert merge(name, torch.ones(SHAPES[name]), [lora]).isfinite().all()
