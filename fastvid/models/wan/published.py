"""Where the models that are known by name are published, and under which licence, as their pages and repositories say.

`variants.PUBLISHED` has the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

APACHE, BY_NC_SA, UNCLEAR = "Apache-2.0", "CC-BY-NC-SA-4.0", "see its page"
SKYWORK = "Skywork"  # a community licence with terms of its own


@dataclass(frozen=True)
class Published:
    """hub: a repository on the Hugging Face hub. checkpoint: the training checkpoint (a pickle) in it that has to be
    converted; base: the repository that supplies its other parts. pickled: whether encoders or VAE are pickles, so that
    all of it has to be converted."""

    hub: str
    licence: str
    checkpoint: str = ""
    base: str = ""
    pickled: bool = False

    @property
    def converted(self) -> bool:
        """Whether it has to be converted."""
        return bool(self.checkpoint) or self.pickled

    @property
    def how(self) -> str:
        """The commands that make a folder of what has to be converted."""
        folder = self.hub.rpartition("/")[2]
        if self.pickled:  # its name stays in the new folder's, where it tells what the weights are
            return f"`hf download {self.hub} --local-dir {folder}`, `fastvid convert {folder} {folder}-Diffusers`"
        return (
            f"`hf download {self.hub} {self.checkpoint} --local-dir {folder}`, `fastvid download {self.base}`, which "
            f"prints a folder, and `fastvid convert {folder}/{self.checkpoint} NEW-FOLDER --base THAT-FOLDER`"
        )


_SMALL, _FIVE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
FUN = {  # VideoX-Fun's, in the original layout
    "wan2.1-fun-inp-1.3b": "Wan2.1-Fun-V1.1-1.3B-InP",
    "wan2.1-fun-inp-14b": "Wan2.1-Fun-V1.1-14B-InP",
    "wan2.1-fun-control-1.3b": "Wan2.1-Fun-1.3B-Control",
    "wan2.1-fun-control-14b": "Wan2.1-Fun-14B-Control",
    "wan2.1-fun-v1.1-control-1.3b": "Wan2.1-Fun-V1.1-1.3B-Control",
    "wan2.1-fun-v1.1-control-14b": "Wan2.1-Fun-V1.1-14B-Control",
    "wan2.2-fun-inp-a14b": "Wan2.2-Fun-A14B-InP",
    "wan2.2-fun-inp-5b": "Wan2.2-Fun-5B-InP",
    "wan2.2-fun-control-a14b": "Wan2.2-Fun-A14B-Control",
    "wan2.2-fun-control-5b": "Wan2.2-Fun-5B-Control",
    "wan2.2-vace-fun-a14b": "Wan2.2-VACE-Fun-A14B",
}
PLACES: Mapping[str, Published] = {
    **{name: Published(f"alibaba-pai/{repo}", APACHE, pickled=True) for name, repo in FUN.items()},
    "wan2.1-t2v-1.3b": Published(_SMALL, APACHE),
    "wan2.1-t2v-14b": Published("Wan-AI/Wan2.1-T2V-14B-Diffusers", APACHE),
    "wan2.1-i2v-14b-480p": Published("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", APACHE),
    "wan2.1-i2v-14b-720p": Published("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", APACHE),
    "wan2.1-flf2v-14b": Published("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", APACHE),
    "wan2.1-vace-1.3b": Published("Wan-AI/Wan2.1-VACE-1.3B-diffusers", APACHE),
    "wan2.1-vace-14b": Published("Wan-AI/Wan2.1-VACE-14B-diffusers", APACHE),
    "wan2.2-t2v-a14b": Published("Wan-AI/Wan2.2-T2V-A14B-Diffusers", APACHE),
    "wan2.2-i2v-a14b": Published("Wan-AI/Wan2.2-I2V-A14B-Diffusers", APACHE),
    "wan2.2-ti2v-5b": Published(_FIVE, APACHE),
    "wan2.2-animate-14b": Published("Wan-AI/Wan2.2-Animate-14B-Diffusers", APACHE),
    "fastwan2.1-t2v-1.3b": Published("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", APACHE),
    "fastwan2.1-t2v-14b": Published("FastVideo/FastWan2.1-T2V-14B-Diffusers", APACHE),
    "fastwan2.2-ti2v-5b": Published("FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", UNCLEAR),
    "self-forcing-1.3b": Published("wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers", UNCLEAR),
    "causal-forcing-1.3b": Published("zhuhz22/Causal-Forcing", APACHE, "chunkwise/causal_forcing.pt", _SMALL),
    "causal-forcing-framewise-1.3b": Published("zhuhz22/Causal-Forcing", APACHE, "framewise/causal_forcing.pt", _SMALL),
    "causvid-1.3b": Published("tianweiy/CausVid", BY_NC_SA, "autoregressive_checkpoint/model.pt", _SMALL),
    "longlive-1.3b": Published("Efficient-Large-Model/LongLive-1.3B", UNCLEAR, "models/longlive_base.pt", _SMALL),
    "longlive2-5b": Published("Efficient-Large-Model/LongLive-2.0-5B", UNCLEAR, "model_bf16.pt", _FIVE),
    "skyreels-v2-df-1.3b-540p": Published("Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers", SKYWORK),
    "skyreels-v2-df-14b-540p": Published("Skywork/SkyReels-V2-DF-14B-540P-Diffusers", SKYWORK),
    "skyreels-v2-df-14b-720p": Published("Skywork/SkyReels-V2-DF-14B-720P-Diffusers", SKYWORK),
    "skyreels-v2-t2v-14b-540p": Published("Skywork/SkyReels-V2-T2V-14B-540P-Diffusers", SKYWORK),
    "skyreels-v2-t2v-14b-720p": Published("Skywork/SkyReels-V2-T2V-14B-720P-Diffusers", SKYWORK),
    "skyreels-v2-i2v-1.3b-540p": Published("Skywork/SkyReels-V2-I2V-1.3B-540P-Diffusers", SKYWORK),
    "skyreels-v2-i2v-14b-540p": Published("Skywork/SkyReels-V2-I2V-14B-540P-Diffusers", SKYWORK),
    "skyreels-v2-i2v-14b-720p": Published("Skywork/SkyReels-V2-I2V-14B-720P-Diffusers", SKYWORK),
}
