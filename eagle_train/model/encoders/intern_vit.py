"""InternViT, the vision transformer of InternVL: fused queries, keys and values, layer scale, no final norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, resample_abs_pos_embed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from eagle_train.model.encoders.base import Resize, VisionEncoder, antialiased, below, init_from_fan_in
from eagle_train.model.geometry import whole_grid

POSITIONS = "embeddings.position_embedding"


class InternVit(VisionEncoder):
    """InternViT: the patches' features after the last layer.

    A class token takes part in attention and is then dropped. Modules are named as in the released checkpoints.

    Args:
        image_size, patch_size: pixels.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the transformer.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether queries and keys are normalized, over all heads together (InternViT-6B).
        norm_eps: epsilon of the layer norms.
        layer_scale: factor that every channel of a layer's two branches starts with; it is learnt.
        drop_path: share of tiles for which the last layer's branches are left out in training; it grows in equal
            steps from 0 in the first layer. A frozen encoder leaves out nothing.
        mean, std, resize, recompute, pretrained: see `VisionEncoder`.
        fan_in_init: see `init_from_fan_in`; positions then start as large as half a patch.

    Raises:
        GeometryError: if the patches do not fill the image.

    Source: InternVL 1.5 (arXiv 2404.16821); OpenGVLab/InternVL, `modeling_intern_vit.py` (facts only).
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        layer_scale: float = 1.0,
        drop_path: float = 0.0,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        resize: Resize = antialiased,
        recompute: bool = True,
        pretrained: str | None = None,
        fan_in_init: bool = False,
    ) -> None:
        grid = whole_grid(image_size, patch_size, name="InternVit")
        super().__init__(
            input_size=image_size,
            grid=grid,
            channels=hidden_size,
            placeholder_size=patch_size,
            mean=mean,
            std=std,
            resize=resize,
            recompute=recompute,
            pretrained=pretrained,
        )
        rates = torch.linspace(0, drop_path, num_hidden_layers, device="cpu").tolist()
        layers = [
            Layer(
                hidden_size=hidden_size,
                intermediate_size=intermediate_size,
                num_heads=num_attention_heads,
                qkv_bias=qkv_bias,
                qk_norm=qk_norm,
                norm_eps=norm_eps,
                layer_scale=layer_scale,
                drop_path=rate,
            )
            for rate in rates
        ]
        self.embeddings = Embeddings(hidden_size, patch_size, grid)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.checkpointing = False
        if fan_in_init:
            init_from_fan_in(self)
            nn.init.normal_(self.embeddings.position_embedding, std=0.5)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer's layers."""
        return self.encoder["layers"]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images."""
        tokens, grid = self.embeddings(images)
        for layer in self.layers:
            recomputed = self.checkpointing and self.training
            tokens = checkpoint(layer, tokens, use_reentrant=False) if recomputed else layer(tokens)
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))

    def set_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass."""
        self.checkpointing = True

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of an InternViT, alone or in an InternVL; positions are resampled to this grid.

        They are resampled bicubically and antialiased, once; a placeholder's are at every use.
        """
        tensors = below(state, "vision_model.", landmark="embeddings.class_embedding")
        if POSITIONS in tensors:
            tensors[POSITIONS] = resample_abs_pos_embed(tensors[POSITIONS], [self.grid, self.grid])
        return self.known(tensors)


class Embeddings(nn.Module):
    """A class token and patches, with their positions.

    Args:
        channels: C.
        patch_size: pixels.
        grid: side, in patches, of the image that the positions are for.
    """

    def __init__(self, channels: int, patch_size: int, grid: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(1, 1, channels))
        self.patch_embedding = nn.Conv2d(3, channels, patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + grid**2, channels))
        self.grid = grid

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Returns tokens (N, 1 + G * G, C) of normalized images, the class token first, and G."""
        patches = self.patch_embedding(images)
        side = patches.shape[-1]
        tokens = patches.flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(tokens), -1, -1)
        return torch.cat([first, tokens], dim=1) + self.positions(side).to(tokens.dtype), side

    def positions(self, side: int) -> torch.Tensor:
        """Returns the positions (1, 1 + side * side, C), resampled bicubically in float32."""
        if side == self.grid:
            return self.position_embedding
        first, table = self.position_embedding.split([1, self.grid**2], dim=1)
        squares = table.float().transpose(1, 2).unflatten(2, (self.grid, self.grid))
        resized = F.interpolate(squares, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([first, resized.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


class Layer(nn.Module):
    """Attention and an MLP, each normalized before, scaled by channel and sometimes left out; see `InternVit`."""

    def __init__(
        self,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        qkv_bias: bool,
        qk_norm: bool,
        norm_eps: float,
        layer_scale: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, norm_eps=norm_eps)
        self.mlp = Mlp(hidden_size, intermediate_size)
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.ls1 = nn.Parameter(torch.full((hidden_size,), layer_scale))
        self.ls2 = nn.Parameter(torch.full((hidden_size,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns tokens (N, T, C) after the layer."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)) * self.ls1)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)) * self.ls2)


class Attention(nn.Module):
    """Attention of all tokens of a tile to each other, by torch's `scaled_dot_product_attention`; see `InternVit`."""

    def __init__(self, channels: int, num_heads: int, *, qkv_bias: bool, qk_norm: bool, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.q_norm = nn.RMSNorm(channels, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(channels, eps=norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns (N, T, C) of tokens (N, T, C)."""
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        heads = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear.

    Args:
        channels, intermediate_size: of its ends and of its middle.
    """

    def __init__(self, channels: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns (..., C) of tokens (..., C)."""
        return self.fc2(F.gelu(self.fc1(tokens)))
