"""EVA-02 as the backbone of a detector: windowed and global blocks of timm's EVA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import build_rotary_pos_embed
from timm.models.eva import Eva
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eagle_train.model.encoders.base import Resize, VisionEncoder, antialiased, below, init_from_fan_in
from eagle_train.model.geometry import whole_grid

# What EVA-02 backbones fix of timm's EVA; absolute and rotary positions are made outside of it.
FAMILY = {
    "qkv_fused": False,
    "swiglu_mlp": True,
    "scale_mlp": True,
    "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    "class_token": False,
    "use_abs_pos_emb": False,
    "use_post_transformer_norm": False,
    "num_classes": 0,
    "global_pool": "",
}

# From the names of the published checkpoint to timm's.
RENAMED = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.w3": "mlp.fc2",
    "mlp.ffn_ln": "mlp.norm",
}


class Eva02(VisionEncoder):
    """Blocks of `timm.models.eva.Eva`, most of which attend within windows; no class token, no final norm.

    Every block turns queries and keys by their position (rotary embedding, interleaved pairs). Positions are
    counted so that a window, or for global blocks the whole grid, spans `rotary_grid` steps. The tables are
    made anew in float32 for every batch: they are no part of the weights and are never rounded to bfloat16.

    Args:
        image_size, patch_size: pixels.
        hidden_size, num_hidden_layers, num_attention_heads: of the transformer.
        mlp_ratio: the gated MLP has `int(mlp_ratio * hidden_size)` channels.
        window_size: side in tokens of the windows that all blocks but `global_layers` attend within.
        position_grid: side of the learnt absolute positions, resampled to the image's grid at every use.
        rotary_grid: side of the grid that the rotary positions were pretrained on.
        mean, std, resize, recompute, pretrained: see `VisionEncoder`. The statistics are CLIP's, the ones
            that the released Eagle weights saw.
        fan_in_init: see `init_from_fan_in`; positions then start as large as half a patch.

    Raises:
        GeometryError: if the windows do not fill the image.

    Source: EVA-02 (arXiv 2303.11331); NVlabs/Eagle, `vision_models/eva_vit.py` (facts only).
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        mlp_ratio: float,
        num_hidden_layers: int,
        num_attention_heads: int,
        window_size: int,
        global_layers: Sequence[int],
        position_grid: int,
        rotary_grid: int,
        mean: Sequence[float] = OPENAI_CLIP_MEAN,
        std: Sequence[float] = OPENAI_CLIP_STD,
        resize: Resize = antialiased,
        recompute: bool = True,
        pretrained: str | None = None,
        fan_in_init: bool = False,
    ) -> None:
        super().__init__(
            input_size=image_size,
            grid=whole_grid(image_size, patch_size, name="Eva02", multiple=window_size),
            channels=hidden_size,
            placeholder_size=patch_size,
            mean=mean,
            std=std,
            resize=resize,
            recompute=recompute,
            pretrained=pretrained,
        )
        trunk = Eva(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=hidden_size,
            depth=num_hidden_layers,
            num_heads=num_attention_heads,
            mlp_ratio=mlp_ratio,
            **FAMILY,
        )
        self.window_size = window_size
        self.global_layers = frozenset(global_layers)
        self.rotary_grid = rotary_grid
        self.head_dim = hidden_size // num_attention_heads
        self.checkpointing = False
        self.patch_embed = trunk.patch_embed
        # The first row is that of the class token of pretraining: kept, so that checkpoints fit.
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + position_grid**2, hidden_size))
        self.blocks = trunk.blocks
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if fan_in_init:
            init_from_fan_in(self)
            nn.init.normal_(self.pos_embed, std=0.5)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images."""
        features = self.patch_embed.proj(images)
        grid = features.shape[-1]
        window = min(self.window_size, grid)  # a placeholder is smaller than a window
        tokens_NGGC = (features + self.positions(grid)).permute(0, 2, 3, 1)
        tables = {side: self.rotary_table(side, images.device) for side in (grid, window)}
        for index, block in enumerate(self.blocks):
            side = grid if index in self.global_layers else window
            pieces = to_windows(tokens_NGGC, side)
            tokens_NGGC = from_windows(self.run_block(block, pieces, tables[side]), grid, side)
        return tokens_NGGC.permute(0, 3, 1, 2)

    def run_block(self, block: nn.Module, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Returns `block` of tokens (B, T, C), recomputed in the backward pass if so asked."""
        if self.checkpointing and self.training:
            return checkpoint(block, tokens, table, use_reentrant=False)
        return block(tokens, table)

    def positions(self, grid: int) -> torch.Tensor:
        """Returns the absolute positions (1, C, grid, grid), resampled bicubically in float32."""
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(table.float(), size=(grid, grid), mode="bicubic", align_corners=False)
        return resized.to(self.pos_embed.dtype)

    def rotary_table(self, side: int, device: torch.device) -> torch.Tensor:
        """Returns sines beside cosines, (side * side, 2 * head_dim) float32."""
        sin_and_cos = build_rotary_pos_embed(
            [side, side],
            dim=self.head_dim,
            in_pixels=False,
            ref_feat_shape=[self.rotary_grid, self.rotary_grid],
            device=device,
        )
        return torch.cat(sin_and_cos, dim=-1)

    def set_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass."""
        self.checkpointing = True

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a ViTDet checkpoint's backbone without its rotary tables."""
        tensors = {}
        for name, tensor in below(state, "backbone.net.", landmark="pos_embed").items():
            for theirs, timms in RENAMED.items():
                name = name.replace(theirs, timms)
            tensors[name] = tensor
        return self.known(tensors)


def to_windows(tokens_NGGC: torch.Tensor, side: int) -> torch.Tensor:
    """Returns windows (N * windows, side * side, C), row by row, of a grid that they fill."""
    num, grid, _, channels = tokens_NGGC.shape
    rows = tokens_NGGC.reshape(num, grid // side, side, grid // side, side, channels)
    return rows.transpose(2, 3).reshape(-1, side * side, channels)


def from_windows(windows: torch.Tensor, grid: int, side: int) -> torch.Tensor:
    """Returns the grid (N, G, G, C) of what `to_windows` cut."""
    count = grid // side
    rows = windows.reshape(-1, count, count, side, side, windows.shape[-1])
    return rows.transpose(2, 3).reshape(-1, grid, grid, windows.shape[-1])
