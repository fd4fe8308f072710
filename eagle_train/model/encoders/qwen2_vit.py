"""Qwen2-VL's vision transformer: pictures of any size as they are, packed over all pictures of a row.

Shape letters: N tiles, D frames of a tile, S its side (pixels), P patches, A heads, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eagle_train.model.attention.backend import AttentionBackend, Segments
from eagle_train.model.attention.segments import SegmentAttention
from eagle_train.model.encoders.base import VisionEncoder, below, init_from_fan_in, per_channel
from eagle_train.types import Grid

ROTARY_THETA = 10_000.0


class Qwen2Vit(VisionEncoder):
    """Patches of pictures of native resolution, each of which attends to those of its own picture or step in time.

    A tile of D frames and S x S pixels is a square of `merge` x `merge` patches; the channels of the patches of a
    tile stand side by side, as the merger behind it takes them, so that a tile gives one feature. There is no norm
    after the last block: the merger begins with it.

    Args:
        patch_size: pixels; S is `merge` times that.
        frames: D.
        merge: side, in patches, of a tile.
        hidden_size, num_hidden_layers, num_attention_heads: of the transformer.
        mlp_ratio: channels of the MLP over those of the transformer.
        attention: over the patches of all pictures; None: picture by picture.
        mean, std, recompute, pretrained: see `VisionEncoder`.
        fan_in_init: see `init_from_fan_in`.

    Raises:
        ValueError: if a head's channels do not divide by 4: half of them turn by rows, half by columns, in pairs.

    Source: Qwen2-VL (arXiv 2409.12191); transformers, `Qwen2VisionTransformerPretrainedModel`.
    """

    def __init__(
        self,
        *,
        patch_size: int = 14,
        frames: int = 2,
        merge: int = 2,
        hidden_size: int = 1280,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        attention: AttentionBackend | None = None,
        mean: Sequence[float] = OPENAI_CLIP_MEAN,
        std: Sequence[float] = OPENAI_CLIP_STD,
        recompute: bool = True,
        pretrained: str | None = None,
        fan_in_init: bool = False,
    ) -> None:
        super().__init__(
            input_size=patch_size * merge,
            grid=1,
            channels=hidden_size * merge**2,
            placeholder_size=patch_size * merge,
            mean=mean,
            std=std,
            recompute=recompute,
            pretrained=pretrained,
        )
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"{num_attention_heads} heads of {hidden_size} channels: each needs a multiple of 4 for its 2-D rotary "
                f"positions; make hidden_size a multiple of {4 * num_attention_heads}"
            )
        self.patch_size = patch_size
        self.frames = frames
        self.merge = merge
        self.head_dim = hidden_size // num_attention_heads
        self.attention = attention or SegmentAttention()
        self.checkpointing = False
        self.patch_embed = PatchEmbedding(3, hidden_size, (frames, patch_size, patch_size), bias=False)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_attention_heads, int(hidden_size * mlp_ratio)) for _ in range(num_hidden_layers)
        )
        if fan_in_init:
            init_from_fan_in(self)

    def forward(self, pixels: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Returns features (N, channels), in the encoder's dtype, of tiles (N, 3, D, S, S) uint8.

        Args:
            grids: of the pictures, in the order of their tiles.

        Raises:
            ValueError: if tiles and grids disagree in number.
        """
        if (planned := sum(steps * rows * cols for steps, rows, cols in grids)) != len(pixels):
            raise ValueError(f"the grids {list(grids)} have {planned} tiles, there are {len(pixels)}")
        return self.encode(self.normalize(pixels, self.input_size), grids)

    def normalize(self, pixels: torch.Tensor, size: int) -> torch.Tensor:
        """Returns patches (4 N, 3, D, s, s) of tiles (N, 3, D, S, S) uint8, tile by tile and row-major in each."""
        del size
        mean, std = (per_channel(values, pixels) for values in (self.mean, self.std))
        images = ((pixels.float() / 255.0 - mean) / std).to(self.patch_embed.weight.dtype)
        side = (self.merge, self.patch_size)
        patches = images.unflatten(4, side).unflatten(3, side)  # (N, 3, D, a, s, b, s)
        return patches.permute(0, 3, 5, 1, 2, 4, 6).flatten(0, 2)

    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Returns features (N, channels) of normalized patches (4 N, 3, D, s, s)."""
        lengths = [rows * cols * self.merge**2 for steps, rows, cols in grids for _ in range(steps)]
        segments = Segments.of(lengths, patches.device)
        turns = self.rotary(grids, patches.device)
        features = self.patch_embed(patches)
        for block in self.blocks:
            if self.checkpointing and self.training:
                features = checkpoint(block, features, turns, segments, self.attention, use_reentrant=False)
            else:
                features = block(features, turns, segments, self.attention)
        return features.view(-1, self.channels)

    def rotary(self, grids: Sequence[Grid], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines (P, 1, C / A) float32 by which queries and keys turn: first by rows, then columns.

        They are made anew for every batch: no part of the weights, never rounded to bfloat16.
        """
        positions_P2 = torch.cat([patch_positions(grid, self.merge) for grid in grids]).to(device, non_blocking=True)
        quarter = torch.arange(0, self.head_dim // 2, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / (ROTARY_THETA ** (quarter / (self.head_dim // 2)))
        angles = (positions_P2[..., None].float() * frequencies).flatten(1)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def set_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass."""
        self.checkpointing = True

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a Qwen2-VL checkpoint's vision transformer, without those of its merger."""
        tensors = below(state, "visual.", landmark="patch_embed.proj.weight")
        return self.known({name.replace("patch_embed.proj", "patch_embed"): t for name, t in tensors.items()})


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel covers its input once: a linear layer, which is faster; weights keep their shape."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Returns (P, C) of patches (P, 3, D, s, s)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1))


class Block(nn.Module):
    """A transformer block with norms before attention and MLP.

    Args:
        hidden_size, num_heads: C and A.
        mlp_size: channels of the MLP.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(hidden_size, 3 * hidden_size), "proj": nn.Linear(hidden_size, hidden_size)}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(hidden_size, mlp_size), "fc2": nn.Linear(mlp_size, hidden_size)})

    def forward(
        self,
        features: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        """Returns features (P, C) of features (P, C).

        Args:
            turns: see `Qwen2Vit.rotary`.
            segments: patches that attend to each other, in order.
        """
        query, key, value = self.attn["qkv"](self.norm1(features)).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        query, key = turned(query, *turns), turned(key, *turns)
        seen = attention(query, key, value, segments, scale=query.shape[-1] ** -0.5, causal=False)
        features = features + self.attn["proj"](seen.flatten(1))
        hidden = self.mlp["fc1"](self.norm2(features))
        return features + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))  # GELU as OpenAI's CLIP has it


def turned(x_PAC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns queries or keys turned by their position, computed in float32."""
    x = x_PAC.float()
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x_PAC.dtype)


def patch_positions(grid: Grid, merge: int) -> torch.Tensor:
    """Returns (P, 2) int64: row and column of every patch of a picture, tile by tile, row-major in each tile.

    With merge 2, the first tile's are (0, 0), (0, 1), (1, 0), (1, 1), the next one's (0, 2), (0, 3), (1, 2), (1, 3).
    """
    steps, rows, cols = grid
    row, col = torch.meshgrid(torch.arange(rows * merge), torch.arange(cols * merge), indexing="ij")
    places = torch.stack([row, col], dim=-1).unflatten(1, (cols, merge)).unflatten(0, (rows, merge))
    return places.transpose(1, 2).reshape(-1, 2).repeat(steps, 1)
