"""CLIP-like vision transformers, from transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from eagle_train.model.encoders.base import VisionEncoder, init_from_fan_in
from eagle_train.model.recompute import recompute_layers

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipVit(VisionEncoder):
    """`transformers.CLIPVisionModel` without its class token and final norm.

    The class token is dropped before the first norm, so it takes no part in attention, and all layers are
    used: what the released Eagle models do.

    Args:
        image_size, patch_size: pixels.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the transformer.
        fan_in_init: see `init_from_fan_in`; positions then start as large as half a patch.

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
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        fan_in_init: bool = False,
    ) -> None:
        grid = image_size // patch_size
        super().__init__(
            input_size=image_size, grid=grid, channels=hidden_size, placeholder_size=patch_size, mean=mean, std=std
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
        del self.vit.post_layernorm  # belongs to the pooled class token, which is not used
        if fan_in_init:
            init_from_fan_in(self)
            nn.init.normal_(self.vit.embeddings.position_embedding.weight, std=0.5)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images."""
        smaller = images.shape[-1] != self.input_size  # a placeholder
        tokens = self.vit.embeddings(images, interpolate_pos_encoding=smaller)[:, 1:]
        tokens = self.vit.encoder(inputs_embeds=self.vit.pre_layrnorm(tokens)).last_hidden_state
        grid = images.shape[-1] // self.patch_size
        return tokens.transpose(1, 2).unflatten(2, (grid, grid))

    def set_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass."""
        recompute_layers(self.vit)
