"""CLIP-like vision transformers, from transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import resample_abs_pos_embed
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from eagle_train.model.encoders.base import Resize, antialiased, below, init_from_fan_in
from eagle_train.model.encoders.staged import StagedEncoder
from eagle_train.model.geometry import whole_grid
from eagle_train.model.recompute import recompute_layers

POSITIONS = "embeddings.position_embedding.weight"


class ClipVit(StagedEncoder):
    """`transformers.CLIPVisionModel` without its class token and final norm.

    The class token is dropped before the first norm, so it takes no part in attention, and all layers are
    used: what the released Eagle models do.

    Args:
        image_size, patch_size: pixels.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the transformer.
        mean, std, resize, recompute, pretrained: see `VisionEncoder`.
        fan_in_init: see `init_from_fan_in`; positions then start as large as half a patch.

    Raises:
        GeometryError: if the patches do not fill the image.

    Source: NVlabs/Eagle, `hr_clip_encoder.py` (facts only).
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
        mean: Sequence[float] = OPENAI_CLIP_MEAN,
        std: Sequence[float] = OPENAI_CLIP_STD,
        resize: Resize = antialiased,
        recompute: bool = True,
        pretrained: str | None = None,
        fan_in_init: bool = False,
    ) -> None:
        super().__init__(
            input_size=image_size,
            grid=whole_grid(image_size, patch_size, name="ClipVit"),
            channels=hidden_size,
            placeholder_size=patch_size,
            mean=mean,
            std=std,
            resize=resize,
            recompute=recompute,
            pretrained=pretrained,
            not_built={"post_layernorm": 2 * hidden_size},
        )
        config = CLIPVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
        )
        self.patch_size = patch_size
        self.vit = CLIPVisionModel(config)
        del self.vit.post_layernorm  # the norm of the pooled class token, which is not used
        if fan_in_init:
            init_from_fan_in(self)
            nn.init.normal_(self.vit.embeddings.position_embedding.weight, std=0.5)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The transformer's layers."""
        return self.vit.encoder.layers

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the first layer's input (N, C, G, G) of normalized images."""
        smaller = images.shape[-1] != self.input_size  # a placeholder
        tokens = self.vit.embeddings(images, interpolate_pos_encoding=smaller)[:, 1:]
        grid = images.shape[-1] // self.patch_size
        return self.vit.pre_layrnorm(tokens).transpose(1, 2).unflatten(2, (grid, grid))

    def advance(self, features: torch.Tensor, layers: Sequence[nn.Module]) -> torch.Tensor:
        """Returns features (N, C, G, G) after `layers`."""
        tokens = features.flatten(2).transpose(1, 2)
        for layer in layers:
            tokens = layer(tokens, attention_mask=None)
        return tokens.transpose(1, 2).unflatten(2, features.shape[2:])

    def set_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass."""
        recompute_layers(self.vit)

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a CLIP checkpoint; positions are resampled to this grid (bicubic, antialiased)."""
        tensors = below(state, "vision_model.", landmark="pre_layrnorm.weight")
        if POSITIONS in tensors:
            tensors[POSITIONS] = resample_abs_pos_embed(tensors[POSITIONS][None], [self.grid, self.grid])[0]
        return self.known({f"vit.{name}": tensor for name, tensor in tensors.items()})
