"""ConvNeXt trunks, from timm."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from eagle_train.model.encoders.base import VisionEncoder, init_from_fan_in


class ConvNext(VisionEncoder):
    """A timm ConvNeXt used as a feature map: no pooling, no final norm, no classifier.

    Args:
        name: timm model name, for example `convnext_xxlarge`.
        image_size: side of the input in pixels.
        depths, dims: blocks and channels per stage, where they differ from the named model's.
        stage: whose output is used, counted from 0; later stages are never built. Its stride is
            4 * 2**stage.
        layer_scale: initial value of the blocks' layer scale; None keeps timm's 1e-6, under which an untrained
            block passes almost nothing on.
        fan_in_init: see `init_from_fan_in`.
    """

    def __init__(
        self,
        *,
        name: str,
        image_size: int,
        depths: Sequence[int] | None = None,
        dims: Sequence[int] | None = None,
        stage: int = 3,
        layer_scale: float | None = None,
        fan_in_init: bool = False,
        mean: Sequence[float] = OPENAI_CLIP_MEAN,
        std: Sequence[float] = OPENAI_CLIP_STD,
    ) -> None:
        given = {"depths": depths, "dims": dims, "ls_init_value": layer_scale}
        shape = {key: value for key, value in given.items() if value is not None}
        trunk = timm.create_model(name, pretrained=False, num_classes=0, **shape)
        stride = 4 * 2**stage
        grid = image_size // stride
        channels = trunk.feature_info[stage]["num_chs"]
        super().__init__(
            input_size=image_size, grid=grid, channels=channels, placeholder_size=stride, mean=mean, std=std
        )
        # The head holds a norm that only pooled features would use.
        self.stem = trunk.stem
        self.stages = torch.nn.Sequential(*trunk.stages[: stage + 1])
        if fan_in_init:
            init_from_fan_in(self)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images."""
        return self.stages(self.stem(images))

    def set_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = True
