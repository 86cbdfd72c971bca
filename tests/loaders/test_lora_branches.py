"""LoRAs beside the weights: the result is that of W + change in fp64, for every kind of change, on plain and quantized
weights, in each of three layers that are one product; nothing is left behind, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvid.device import cuda_graphs
from fastvid.errors import CheckpointError, FastvidWarning
from fastvid.layers.branches import Dense, Kronecker, LowRank
from fastvid.layers.linear import linear, linear_gelu_tanh
from fastvid.layers.quantized import QuantizedLinear, install
from fastvid.loaders.lora import Lora, merge
from fastvid.loaders.lora_branches import Builder, make_operator
from fastvid.loaders.lora_fit import is_quantized, of_quantized
from fastvid.loaders.lora_terms import Decomposed, Hadamard, Pair, Term, Whole
from fastvid.loaders.lora_terms import Kronecker as LoKr
from fastvid.models.wan.config import WanTransformerConfig
from fastvid.models.wan.transformer import WanTransformer
from fastvid.ops import formats_rows, reference
from fastvid.ops.quantized import Spec, rotate

CONFIG = WanTransformerConfig(2, 32, text_dim=24, freq_dim=16, ffn_dim=96, num_layers=2)
DIM = 64
LAYERS = (
    "blocks.0.attn1.to_q",
    "blocks.0.attn1.to_v",
    "blocks.1.attn2.to_out.0",
    "blocks.1.ffn.net.0.proj",
    "condition_embedder.time_proj",
)
CPU = torch.device("cpu")
ROTATED = "int8, rotated"


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape))) * 0.3


def pair(n: int, k: int, rank: int = 3, seed: int = 0) -> Pair:
    return Pair(drawn(n, rank, seed=seed), drawn(rank, k, seed=seed + 1), 0.7)


def tucker(n: int, k: int) -> Pair:
    return Pair(drawn(n, 3, 1, 1), drawn(4, k, 1, 1), 0.7, drawn(3, 4, 1, 1))


def loha(n: int, k: int, rank: int) -> Hadamard:
    return Hadamard(pair(n, k, rank), pair(n, k, rank, 5), 0.7)


def dora(axis: int, inside: bool, change: Any, n: int, k: int) -> Decomposed:
    lengths = drawn(n, seed=3).abs() + 1 if axis == 0 else drawn(1, k, seed=3).abs() + 1
    return Decomposed(change, lengths, inside)


KINDS: dict[str, tuple[type, Callable[[int, int], Term]]] = {
    "pair": (LowRank, pair),
    "tucker": (LowRank, tucker),
    "loha": (LowRank, partial(loha, rank=2)),
    "loha-dense": (Dense, partial(loha, rank=12)),
    "lokr": (Kronecker, lambda n, k: LoKr(Whole(drawn(4, 8)), Whole(drawn(n // 4, k // 8)), 0.7)),
    "lokr-pairs": (Kronecker, lambda n, k: LoKr(pair(n // 2, 2), pair(2, k // 2), 0.7)),
    "whole": (Dense, lambda n, k: Whole(drawn(n, k), 0.7)),
    "dora-rows": (LowRank, lambda n, k: dora(0, False, pair(n, k), n, k)),
    "dora-rows-peft": (LowRank, lambda n, k: dora(0, True, pair(n, k), n, k)),
    "dora-columns": (LowRank, lambda n, k: dora(1, False, pair(n, k), n, k)),
    "dora-lokr": (Kronecker, lambda n, k: dora(0, True, LoKr(Whole(drawn(4, 8)), Whole(drawn(n // 4, k // 8))), n, k)),
}


def model(dtype: torch.dtype = torch.float32) -> WanTransformer:
    torch.manual_seed(0)
    module = WanTransformer(CONFIG).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "bias" in name or "table" in name:
            parameter.normal_()
    return module.to(dtype)


def quantized(format: str, dtype: torch.dtype = torch.float32) -> WanTransformer:
    """The model with every linear layer quantized; of queries, keys and values only the queries."""
    plain = model()
    state = plain.state_dict()
    with torch.device("meta"):
        made = WanTransformer(CONFIG).eval()
    names = [f"{name}.weight" for name, one in plain.named_modules() if isinstance(one, torch.nn.Linear)]
    names = [*names, *(f"blocks.{i}.attn1.to_q.weight" for i in range(2))]
    rotation, format = (16, formats_rows.INT8) if format == ROTATED else (0, format)
    names = [name for name in names if state[name].shape[1] % 32 == 0]
    specs = {name: Spec.of(format, tuple(state[name].shape), rotation=rotation) for name in names}
    install(made, specs, reference, lambda name: dtype)
    for name, tensor in state.items():
        if is_quantized(made, name):
            layer = cast(QuantizedLinear, made.get_submodule(name.rpartition(".")[0]))
            stored = rotate(tensor, rotation) if rotation else tensor
            layer.fill(q8_0(stored) if format == "q8_0" else formats_rows.quantize_weight(stored, format), CPU)
        else:
            made.load_state_dict({name: tensor.to(dtype)}, strict=False, assign=True)
    return made.requires_grad_(False)


def q8_0(weight: Tensor) -> dict[str, Tensor]:
    """Blocks of a scale and 32 whole numbers."""
    blocks = weight.view(-1, 32)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks / scale).round().to(torch.int8)
    return {"codes": torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 1).view(len(weight), -1)}


def weight_of(module: WanTransformer, name: str) -> Tensor:
    """fp64, of a quantized one what its codes say."""
    if is_quantized(module, f"{name}.weight"):
        return cast(Any, module.get_submodule(name)).weight.dequantize(torch.float32).double()
    return module.state_dict()[f"{name}.weight"].double()


def bias_of(module: WanTransformer, name: str) -> Tensor:
    return module.state_dict()[f"{name}.bias"].double()


def lora_of(module: WanTransformer, kind: str, scale: float, layers: tuple[str, ...] = LAYERS) -> Lora:
    shapes = {name: weight_of(module, name).shape for name in layers}
    terms = {f"{name}.weight": (KINDS[kind][1](*shape),) for name, shape in shapes.items()}
    return Lora(Path(f"{kind}.safetensors"), scale, terms)


def results(module: WanTransformer, x: Tensor) -> dict[str, Tensor]:
    """What each layer makes of x, by the way in which the model calls it."""
    made = {}
    for name in LAYERS:
        if "attn1" in name:
            attention = module.blocks[0].attn1
            whole = linear(reference, cast(Any, attention).to_qkv, x).chunk(3, -1)
            made[name] = whole["qkv".index(name[-1])]
        elif "net.0" in name:
            made[name] = linear_gelu_tanh(reference, module.get_submodule(name), x)
        else:
            made[name] = module.get_submodule(name)(x)
    made["untouched key"] = linear(reference, cast(Any, module.blocks[0]).attn1.to_qkv, x).chunk(3, -1)[1]
    return made


def wanted(module: WanTransformer, x: Tensor, loras: list[Lora]) -> dict[str, Tensor]:
    """The same of W + change, in fp64."""
    made = {}
    for name in (*LAYERS, "blocks.0.attn1.to_k"):
        weight = merge(f"{name}.weight", weight_of(module, name), loras)
        assert weight.dtype == torch.float64
        y = F.linear(x.double(), weight, bias_of(module, name))
        made[name if name in LAYERS else "untouched key"] = F.gelu(y, approximate="tanh") if "net.0" in name else y
    return made


def error(made: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return max(float((made[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["plain", formats_rows.INT8, formats_rows.E4M3, ROTATED, "q8_0"])
def test_every_kind_is_the_formula(kind: str, format: str, recwarn: Any) -> None:
    module = model() if format == "plain" else quantized(format)
    lora, x = lora_of(module, kind, 0.8), drawn(2, 5, DIM, seed=9)
    term = lora.terms[f"{LAYERS[2]}.weight"][0]
    plain = term.change if isinstance(term, Decomposed) else term
    assert type(make_operator(plain, torch.float32, (DIM, DIM))) is KINDS[kind][0]
    before, exact = results(module, x), wanted(module, x, [lora])
    with Builder().build(module, [lora]).attached(module, CPU):
        inside = results(module, x)
    assert error(before, exact) > 0.02, "the change is large enough to be seen"
    assert error(inside, exact) < 1e-5
    after = results(module, x)
    assert all(torch.equal(before[name], after[name]) for name in before), "nothing is left behind"
    assert torch.equal(before["untouched key"], inside["untouched key"])


def test_sums_over_loras_in_half_precision() -> None:
    """In bf16 no further from fp64 than three times what rounding the merged weights is."""
    for module in (model(torch.bfloat16), quantized(formats_rows.E4M3, torch.bfloat16)):
        kinds = ("pair", "lokr", "dora-rows", "dora-columns")
        loras = [lora_of(module, kind, scale) for kind, scale in zip(kinds, (0.8, -0.5, 0.7, 0.4), strict=True)]
        x = drawn(2, 5, DIM, seed=9).bfloat16()
        exact = wanted(module, x, loras)
        merged = {}
        for name in (*LAYERS, "blocks.0.attn1.to_k"):
            weight = merge(f"{name}.weight", weight_of(module, name), loras).bfloat16()
            y = F.linear(x, weight, bias_of(module, name).bfloat16())
            y = F.gelu(y, approximate="tanh") if "net.0" in name else y
            merged[name if name in LAYERS else "untouched key"] = y
        with Builder().build(module, loras).attached(module, CPU):
            inside = results(module, x)
        assert inside[LAYERS[0]].dtype == torch.bfloat16
        assert error(inside, exact) < 3 * error(merged, exact) < 0.02


@pytest.mark.parametrize("format", ["plain", formats_rows.INT8])
def test_the_whole_model_and_its_small_weights(format: str) -> None:
    """Biases, norms, tables, the convolution and the head's product, which no branch is beside."""
    module = model() if format == "plain" else quantized(format)
    names = ("blocks.0.attn1.to_q.bias", "blocks.0.attn1.to_k.bias", "blocks.1.norm2.weight", "scale_shift_table")
    names = (*names, "blocks.1.attn1.norm_q.weight", "patch_embedding.weight", "proj_out.bias")
    state = module.state_dict()
    terms: dict[str, tuple[Term, ...]] = {name: (Whole(drawn(*state[name].shape)),) for name in names}
    shape = tuple(weight_of(module, "proj_out").shape)
    terms |= {"proj_out.weight": (pair(*shape), Whole(drawn(*shape, seed=5)))}
    loras = [replace(lora_of(module, "pair", 0.9), terms=terms), lora_of(module, "dora-rows", 0.9)]
    latents, text = drawn(1, 16, 2, 4, 6, seed=1), drawn(1, 7, 24, seed=2)

    def run(one: WanTransformer) -> Tensor:
        return one(latents, torch.tensor([400.0]), text)

    merged = model()
    for name in merged.state_dict():
        stem, _, kind = name.rpartition(".")
        base = weight_of(module, stem) if kind == "weight" and is_quantized(module, name) else state[name].double()
        merged.load_state_dict({name: merge(name, base, loras)}, strict=False)
    before, branches = run(module), Builder().build(module, loras)
    with branches.attached(module, CPU):
        inside = run(module)
    exact = run(merged)
    assert (before - exact).norm() > 0.05 * exact.norm()
    assert (inside - exact).norm() < 1e-5 * exact.norm()
    assert torch.equal(run(module), before)
    with pytest.raises(ZeroDivisionError), branches.attached(module, CPU):
        raise ZeroDivisionError
    assert torch.equal(run(module), before)


def test_only_changes_of_quantized_weights_are_kept_at_load() -> None:
    module = quantized(formats_rows.INT8)
    lora = lora_of(module, "pair", 1.0, ("blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.ffn.net.2"))
    (kept,) = of_quantized([lora], [module])
    (merged,) = of_quantized([lora], [module], wanted=False)
    assert set(kept.terms) == {"blocks.0.attn1.to_q.weight", "blocks.0.ffn.net.2.weight"}
    assert set(merged.terms) == {"blocks.0.attn1.to_k.weight"}
    assert of_quantized([lora], [model()]) == ()


def test_matrices_are_warned_of_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastvid.loaders.lora_branches.LARGE", 1)
    module, builder = model(), Builder()
    lora = lora_of(module, "whole", 1.0)
    with pytest.warns(FastvidWarning, match=r"lora whole.safetensors: \d+ MiB of its changes are whole matrices"):
        first = builder.build(module, [lora])
    with pytest.warns(FastvidWarning):
        second = builder.build(module, [replace(lora, scale=0.5)])
    name = LAYERS[2]
    mine, other = (cast(Any, one.layers[name].pieces[0]) for one in (first, second))
    assert mine.operator is other.operator and (mine.scale, other.scale) == (0.7, 0.35)
    assert first.nbytes == sum(4 * weight_of(module, name).numel() for name in LAYERS)


def test_values_that_half_precision_does_not_have() -> None:
    module = model(torch.float16)
    term = Pair(torch.full((DIM, 2), 1e5), drawn(2, DIM))
    lora = Lora(Path("a.safetensors"), 1.0, {f"{LAYERS[2]}.weight": (term,)})
    with pytest.raises(CheckpointError, match=r"a.safetensors: its values of blocks.1.* are not finite in float16; .*"):
        Builder().build(module, [lora])


def test_graphs_are_of_one_set_of_branches() -> None:
    """A call is replayed with the branches that it was recorded with."""

    class Recording:
        def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
            made = call()
            return lambda: None, made  # as a graph: whatever the branches are by then

        def alone(self) -> Any:
            return torch.no_grad()

        def release(self) -> None:
            pass

    module, x = model(), drawn(1, 16, 2, 4, 6, seed=1)
    cast(Any, module).run = graphs = cuda_graphs.Graphs(cast(Any, Recording()))
    sets = [Builder().build(module, [lora_of(module, "pair", scale)]) for scale in (1.0, -1.0)]
    context = module.prepare_context(drawn(1, 7, 24, seed=2))
    run = partial(module, x, torch.tensor([400.0]), context)
    made: dict[int, list[Tensor]] = {0: [], 1: [], 2: []}
    for _ in range(3):
        made[2].append(run())
        for number, branches in enumerate(sets):
            with branches.attached(module, CPU):
                made[number].append(run())
    assert len(graphs) == 3
    for same in made.values():
        torch.testing.assert_close(same[1:], [same[0]] * 2, rtol=1e-5, atol=1e-6)
    assert not torch.equal(made[0][0], made[1][0]) and not torch.equal(made[0][0], made[2][0])
