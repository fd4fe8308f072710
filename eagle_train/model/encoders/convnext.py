"""ConvNeXt trunks, from timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import timm
import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import nn

from eagle_train.model.encoders.base import Resize, VisionEncoder, antialiased, init_from_fan_in
from eagle_train.model.geometry import whole_grid


class ConvNext(VisionEncoder):
    """A timm ConvNeXt used as a feature map: no pooling, no final norm, no classifier.

    Args:
        name: timm model name, for example `convnext_xxlarge`.
        image_size: side of the input in pixels.
        depths, dims: blocks and channels per stage, where they differ from the named model's.
        stage: whose output is used, counted from 0; later stages are not kept. Its stride is
            4 * 2**stage.
        layer_scale: initial value of the blocks' layer scale; None keeps timm's 1e-6, under which an untrained
            block passes almost nothing on.
        mean, std, resize, recompute, pretrained: see `VisionEncoder`.
        fan_in_init: see `init_from_fan_in`.

    Raises:
        GeometryError: if the stride does not divide the image.
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
        mean: Sequence[float] = OPENAI_CLIP_MEAN,
        std: Sequence[float] = OPENAI_CLIP_STD,
        resize: Resize = antialiased,
        recompute: bool = True,
        pretrained: str | None = None,
        fan_in_init: bool = False,
    ) -> None:
        given = {"depths": depths, "dims": dims, "ls_init_value": layer_scale}
        shape = {key: value for key, value in given.items() if value is not None}
        trunk = timm.create_model(name, pretrained=False, num_classes=0, **shape)
        stride = 4 * 2**stage
        super().__init__(
            input_size=image_size,
            grid=whole_grid(image_size, stride, name="ConvNext"),
            channels=trunk.feature_info[stage]["num_chs"],
            placeholder_size=stride,
            mean=mean,
            std=std,
            resize=resize,
            recompute=recompute,
            pretrained=pretrained,
            not_built=unused_parts(trunk, stage),
        )
        self.stem = trunk.stem
        self.stages = nn.Sequential(*trunk.stages[: stage + 1])
        if fan_in_init:
            init_from_fan_in(self)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images."""
        return self.stages(self.stem(images))

    def set_activation_checkpointing(self) -> None:
        """Recomputes each block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = True

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a timm checkpoint without its head and later stages; the names are the same."""
        return self.known(state)


def unused_parts(trunk: nn.Module, stage: int) -> dict[str, int]:
    """Returns the numbers of parameters of a timm ConvNeXt that features of a stage never use, by part.

    They are the later stages and the head: a norm that only pooled features would see, and the classifier.
    """
    later = sum(p.numel() for block in trunk.stages[stage + 1 :] for p in block.parameters())
    channels, classes = trunk.num_features, trunk.pretrained_cfg["num_classes"]
    parts = {"stages": later, "head": 2 * channels + classes * (channels + 1)}
    return {part: count for part, count in parts.items() if count}
