"""Writes what bench_quantized.py's step needs: random weights of Wan 2.1 1.3B in bf16 and as a Q8_0 GGUF file.

    python benchmarks/quantized_models.py FOLDER [--kind Q8_0]

Needs diffusers, transformers and gguf, and 5 GiB. What a GGUF file of ComfyUI-GGUF keeps in 16 or 32 bits is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastvid.models.wan.weight_names import ORIGINAL, origins

EMBEDDED = Path(__file__).parents[1] / "fastvid" / "embedded"
PLAIN = ("modulation", "patch_embedding.", "text_embedding.", "time_projection.", "time_embedding.", "head.")
INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.1",
    "boundary_ratio": None,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def main() -> None:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", default="Q8_0", help="a type that the package gguf can write")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"d_model": 4096, "d_ff": 64, "d_kv": 64, "num_heads": 1, "num_layers": 1, "vocab_size": 33}
    text = UMT5Config(**sizes, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1)
    shape = {"num_attention_heads": 12, "attention_head_dim": 128, "text_dim": 4096, "ffn_dim": 8960, "num_layers": 30}
    torch.set_default_dtype(torch.bfloat16)
    transformer = WanTransformer3DModel(**shape)
    torch.set_default_dtype(torch.float32)
    vae, base = AutoencoderKLWan(), args.folder / "bf16"
    transformer.save_pretrained(base / "transformer", max_shard_size="20GB")
    vae.save_pretrained(base / "vae")
    UMT5EncoderModel(text).bfloat16().save_pretrained(base / "text_encoder")
    shutil.copytree(EMBEDDED / "tokenizer", base / "tokenizer", dirs_exist_ok=True)
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    ).save_pretrained(base / "scheduler")
    (base / "model_index.json").write_text(json.dumps(INDEX))
    save_file({name: one.contiguous() for name, one in original(vae).items()}, args.folder / "Wan2.1_VAE.safetensors")
    write_gguf(args.folder / f"wan-1.3b-{args.kind}.gguf", original(transformer), args.kind)


def original(module: nn.Module) -> dict[str, Tensor]:
    """A module's weights under the names of Wan's repository."""
    state = module.state_dict()
    return {name: origin.make(state.__getitem__) for name, origin in origins(list(state), ORIGINAL).items()}


def write_gguf(path: Path, tensors: dict[str, Tensor], kind: str) -> None:
    import gguf

    types: Any = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in tensors.items():
        values, plain = tensor.float().numpy(), any(part in name for part in PLAIN)
        if tensor.ndim == 2 and not plain:
            writer.add_tensor(name, gguf.quants.quantize(values, types[kind]), raw_dtype=types[kind])
        elif tensor.ndim in (2, 3, 4) and "modulation" not in name and tensor.numel() > 1024:
            writer.add_tensor(name, values.astype(np.float16), raw_dtype=types.F16)
        else:
            writer.add_tensor(name, values, raw_dtype=types.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
