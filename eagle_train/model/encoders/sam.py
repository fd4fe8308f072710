"""SAM's image encoder, from transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import resample_abs_pos_embed_nhwc
from torch import nn
from torch.nn import functional as F
from transformers import SamVisionConfig, SamVisionModel

from eagle_train.model.encoders.base import Resize, VisionEncoder, antialiased, below, init_from_fan_in
from eagle_train.model.geometry import whole_grid
from eagle_train.model.recompute import recompute_layers


class Sam(VisionEncoder):
    """`transformers.SamVisionModel` with the first half of its neck, whose pixels are folded into channels.

    The neck ends after its 1x1 convolution and norm; each square of `fold` x `fold` tokens then becomes one
    token of `fold**2` times the channels: 64x64x256 becomes 32x32x1024.

    Args:
        image_size, patch_size: pixels.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the transformer.
        window_size: side in tokens of the windows that all layers but `global_layers` attend within.
        neck_channels: of the neck.
        fold: side of the squares of tokens that become one.
        pretrained_neck: whether the neck starts from the pretrained one, which has the same shape, or anew
            as in the released Eagle models.
        mean, std, resize, recompute, pretrained: see `VisionEncoder`. The statistics are CLIP's, the ones
            that the released Eagle weights saw; SAM itself was trained with ImageNet's.
        fan_in_init: see `init_from_fan_in`; positions then start as large as half a patch.

    Raises:
        GeometryError: if the patches do not fill the image, or not in whole squares of `fold`.

    Source: NVlabs/Eagle, `sam_encoder.py` (facts only).
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
        window_size: int,
        global_layers: Sequence[int],
        neck_channels: int,
        fold: int,
        pretrained_neck: bool,
        mean: Sequence[float] = OPENAI_CLIP_MEAN,
        std: Sequence[float] = OPENAI_CLIP_STD,
        resize: Resize = antialiased,
        recompute: bool = True,
        pretrained: str | None = None,
        fan_in_init: bool = False,
    ) -> None:
        super().__init__(
            input_size=image_size,
            grid=whole_grid(image_size, patch_size, name="Sam", multiple=fold) // fold,
            channels=neck_channels * fold**2,
            placeholder_size=patch_size * fold,
            mean=mean,
            std=std,
            resize=resize,
            recompute=recompute,
            pretrained=pretrained,
            fresh=() if pretrained_neck else ("sam.neck.",),
        )
        config = SamVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            mlp_dim=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            window_size=window_size,
            global_attn_indexes=list(global_layers),
            output_channels=neck_channels,
            initializer_range=0.02,  # the library's 1e-10 only suits weights that are loaded
        )
        self.fold = fold
        self.sam = SamVisionModel(config).vision_encoder
        del self.sam.neck.conv2, self.sam.neck.layer_norm2
        if fan_in_init:
            init_from_fan_in(self)
            nn.init.normal_(self.sam.pos_embed, std=0.5)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images."""
        tokens_NHWC = self.sam.patch_embed.projection(images).permute(0, 2, 3, 1)
        # The positions of a placeholder are resampled, those of a whole image are taken as they are.
        tokens_NHWC = tokens_NHWC + resample_abs_pos_embed_nhwc(self.sam.pos_embed, list(tokens_NHWC.shape[1:3]))
        for layer in self.sam.layers:
            tokens_NHWC = layer(tokens_NHWC)
        neck = self.sam.neck
        return F.pixel_unshuffle(neck.layer_norm1(neck.conv1(tokens_NHWC.permute(0, 3, 1, 2))), self.fold)

    def set_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass."""
        recompute_layers(self.sam)

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a SAM checkpoint, with positions resampled to this grid.

        Absolute positions are resampled bicubically with antialiasing, relative ones linearly.
        """
        tensors = self.known(
            {f"sam.{name}": t for name, t in below(state, "vision_encoder.", landmark="pos_embed").items()}
        )
        own = self.state_dict()
        for name, tensor in tensors.items():
            if name == "sam.pos_embed":
                tensors[name] = resample_abs_pos_embed_nhwc(tensor, list(own[name].shape[1:3]))
            elif "rel_pos" in name and len(tensor) != len(own[name]):
                table = F.interpolate(tensor.float().T[None], size=len(own[name]), mode="linear")[0].T
                tensors[name] = table.to(tensor.dtype)
        return tensors
