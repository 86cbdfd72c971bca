"""How much memory decoding with a VAE takes beside its weights, and in how many stripes of rows it fits.

`decode_bytes` counts what is alive at the worst moment of a chunk: the feature cache, exactly; the frames; and the
activations of the widest stage, for the rows of one stripe and those that its layers hold for the next one. What an
allocator keeps beyond that is not in it.
"""

from __future__ import annotations

from fastvid.errors import OutOfMemory
from fastvid.models.wan.config import VAEConfig, WanVAEConfig

# Rows that a residual block leaves to the next stripe: of each convolution's input 5, with Winograd's tiles of 4 rows,
# and of the residual 8.
HELD, TILE = 18, 4


def stages(config: VAEConfig) -> list[tuple[int, int, int, int]]:
    """Of the decoder, top down: scale in space, frames a latent frame, channels in and inside.

    Every stage but the last ends with an upsampler; the middle is not among them.
    """
    mults, time = config.dim_mult[::-1], config.temperal_downsample[::-1]
    dims = [config.decoder_base_dim * m for m in (mults[0], *mults)]
    halved = isinstance(config, WanVAEConfig)
    found, frames = [], 1
    for i, (c_in, c_out) in enumerate(zip(dims[:-1], dims[1:], strict=True)):
        found.append((2**i, frames, c_in // 2 if halved and i else c_in, c_out))
        frames *= 2 if i < len(time) and time[i] else 1
    return found


def cache_bytes(config: VAEConfig, height: int, width: int, itemsize: int = 4) -> int:
    """Bytes of the decoder's feature cache for frames of height x width: the last two input frames of every layer that
    looks back in time."""
    pixels = height * width // config.spatial_scale**2
    top = config.decoder_base_dim * config.dim_mult[-1]
    values = pixels * (config.z_dim + 4 * top)
    for i, (scale, _, c_in, c_out) in enumerate(stages(config)):
        area = pixels * scale**2
        values += area * (c_in + c_out * (2 * config.num_res_blocks + 1))
        values += area * c_out * (i < len(config.temperal_downsample) and config.temperal_downsample[::-1][i])
    last = config.decoder_base_dim * config.dim_mult[0]
    values += pixels * 4 ** (len(config.dim_mult) - 1) * last
    return 2 * values * itemsize


def decode_bytes(
    config: VAEConfig, height: int, width: int, frames: int = 1, stripes: int = 1, itemsize: int = 4
) -> int:
    """Peak bytes, beside the weights, of decoding the next `frames` latent frames of a stream at once.

    height and width are those of the pixels. Counts one cache: decode with reuse_cache; without it, or at the start of
    a stream, where there is none yet to begin with, one more cache or none.
    """
    activations = max(
        _block(stage, config, height, width, frames, stripes) + _held(stage, config, width, frames, stripes)
        for stage in stages(config)
    )
    made = 3 * config.temporal_scale * frames * height * width
    return cache_bytes(config, height, width, itemsize) + (activations + 2 * made) * itemsize


def choose_stripes(
    config: VAEConfig, height: int, width: int, free_bytes: int, frames: int = 1, itemsize: int = 4
) -> int:
    """The fewest stripes with which decode_bytes is at most free_bytes.

    Raises:
        OutOfMemory: it does not fit in any number of stripes.
    """
    most = height // config.spatial_scale
    needs = {n: decode_bytes(config, height, width, frames, n, itemsize) for n in range(1, most + 1)}
    for n, need in needs.items():
        if need <= free_bytes:
            return n
    best = min(needs, key=needs.get)
    raise OutOfMemory(
        f"decoding {width}x{height} takes {needs[best] / 2**30:.1f} GiB beside the weights, in {best} stripes, and "
        f"{free_bytes / 2**30:.1f} GiB are free; the cache alone takes "
        f"{cache_bytes(config, height, width, itemsize) / 2**30:.1f} GiB: ask for a smaller size"
    )


def _block(
    stage: tuple[int, int, int, int], config: VAEConfig, height: int, width: int, frames: int, stripes: int
) -> int:
    """Values alive in a stage's widest residual block: its input, what its first convolution makes, and the new past of
    the second; in stripes also a copy of each of both with the rows held, and of the residual."""
    scale, times, c_in, c_out = stage
    whole = height * scale // config.spatial_scale
    rows = whole if stripes == 1 else min(whole, -(-whole // stripes) + _ahead(config, scale))
    pixels = rows * width * scale // config.spatial_scale
    copies = 2 if stripes > 1 else 1
    alive = frames * times * (c_in + c_out) * copies + 2 * c_out
    return pixels * (alive + (frames * times * c_out if stripes > 1 else 0))


def _ahead(config: VAEConfig, scale: int) -> int:
    """Rows that a stage's input is ahead of the result: a tile for every 3x3x3 convolution, one for the others."""
    rows, at = 1, 2 ** (len(config.dim_mult) - 1)
    while True:
        rows += TILE * 2 * (config.num_res_blocks + 1)
        if at == scale:
            return rows
        rows, at = -(-rows // 2) + 1, at // 2


def _held(stage: tuple[int, int, int, int], config: VAEConfig, width: int, frames: int, stripes: int) -> int:
    """Values that a stage's blocks hold from one stripe to the next."""
    scale, times, _, c_out = stage
    blocks = config.num_res_blocks + 1
    return (stripes > 1) * blocks * HELD * frames * times * c_out * width * scale // config.spatial_scale
