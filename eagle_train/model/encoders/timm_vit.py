"""Vision transformers of timm: SigLIP 2, DINOv2, DINOv3, C-RADIO and their like, one YAML each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.naflexvit import NaFlexVit

from eagle_train.model.encoders.base import Resize, VisionEncoder, antialiased, init_from_fan_in
from eagle_train.model.geometry import whole_grid


class TimmVit(VisionEncoder):
    """Patch features of a timm vision transformer: no pooling, no classifier.

    Class and register tokens take part in attention where the model has them, and are dropped at the end.

    Args:
        name: timm model name, for example `vit_large_patch14_dinov2`.
        image_size: side of the input in pixels.
        options: further arguments of the timm model: what differs from the named one. A model with learnt
            positions of one size needs `img_size` and `dynamic_img_size: true`.
        mean, std: the model's own; they have no default, since families differ.
        resize, recompute, pretrained: see `VisionEncoder`.
        fan_in_init: see `init_from_fan_in`.

    Raises:
        GeometryError: if the patches do not fill the image.
    """

    def __init__(
        self,
        *,
        name: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        options: Mapping[str, Any] | None = None,
        resize: Resize = antialiased,
        recompute: bool = True,
        pretrained: str | None = None,
        fan_in_init: bool = False,
    ) -> None:
        vit = timm.create_model(name, pretrained=False, num_classes=0, global_pool="", **(options or {}))
        patches = vit.embeds if isinstance(vit, NaFlexVit) else vit.patch_embed
        patch_size = patches.patch_size[0]
        super().__init__(
            input_size=image_size,
            grid=whole_grid(image_size, patch_size, name=name),
            channels=vit.num_features,
            placeholder_size=patch_size,
            mean=mean,
            std=std,
            resize=resize,
            recompute=recompute,
            pretrained=pretrained,
        )
        self.patch_size = patch_size
        self.vit = vit
        if fan_in_init:
            init_from_fan_in(self)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images."""
        tokens = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
        grid = images.shape[-1] // self.patch_size
        return tokens.transpose(1, 2).unflatten(2, (grid, grid))

    def set_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass."""
        self.vit.set_grad_checkpointing()

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a timm checkpoint; positions of another size are resampled (bicubic, antialiased)."""
        tensors = self.known({f"vit.{name}": tensor for name, tensor in state.items()})
        name = "vit.pos_embed"
        if name in tensors and tensors[name].shape != self.vit.pos_embed.shape:
            prefix = self.vit.pos_embed.shape[1] - self.grid**2
            tensors[name] = resample_abs_pos_embed(tensors[name], [self.grid, self.grid], num_prefix_tokens=prefix)
        return tensors
