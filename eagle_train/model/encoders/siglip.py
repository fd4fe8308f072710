"""SigLIP vision transformers, from transformers: SigLIP, the towers of PaliGemma, and SigLIP 2 of fixed resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from eagle_train.model.encoders.base import Resize, VisionEncoder, antialiased, init_from_fan_in
from eagle_train.model.geometry import whole_grid
from eagle_train.model.recompute import recompute_layers

STEM = "embeddings.patch_embedding.weight"
POSITIONS = "embeddings.position_embedding.weight"


class Siglip(VisionEncoder):
    """`transformers.SiglipVisionModel` without its pooling head: the features of one hidden state.

    Attention is torch's `scaled_dot_product_attention`, which takes the fastest exact kernel of the device. There is
    no class token.

    Args:
        image_size, patch_size: pixels.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the published transformer.
        select_layer: -1: the features after all layers and the final norm. Any other value is a place in the list
            of hidden states, as transformers counts them: 0 is the first layer's input, `num_hidden_layers` the last
            layer's output, negative ones count from the end, and there is no norm. Layers above are not built.
        mean, std, resize, recompute, pretrained: see `VisionEncoder`.
        fan_in_init: see `init_from_fan_in`; positions then start as large as half a patch.

    Raises:
        GeometryError: if the patches do not fill the image.
        ValueError: if `select_layer` is not the output of a layer.

    Source: SigLIP (arXiv 2303.15343); NVlabs/Eagle, `modeling_eagle2_5_vl.py` (facts only).
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
        select_layer: int = -1,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        resize: Resize = antialiased,
        recompute: bool = True,
        pretrained: str | None = None,
        fan_in_init: bool = False,
    ) -> None:
        if select_layer == 0 or abs(select_layer) > num_hidden_layers:
            raise ValueError(
                f"Siglip: select_layer {select_layer} is not the output of one of {num_hidden_layers} layers; it is "
                f"-{num_hidden_layers} to -1, or 1 to {num_hidden_layers}"
            )
        depth = num_hidden_layers if select_layer == -1 else select_layer % (num_hidden_layers + 1)
        config = SiglipVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=depth,
            num_attention_heads=num_attention_heads,
            vision_use_head=False,
        )
        grid = whole_grid(image_size, patch_size, name="Siglip")
        vit = SiglipVisionModel(config)
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
            not_built=unused_parts(vit, num_hidden_layers, normed=select_layer == -1),
        )
        self.patch_size = patch_size
        self.vit = vit
        if select_layer != -1:
            self.vit.post_layernorm = nn.Identity()
        if fan_in_init:
            init_from_fan_in(self)
            nn.init.normal_(self.vit.embeddings.position_embedding.weight, std=0.5)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of normalized images."""
        smaller = images.shape[-1] != self.input_size  # a placeholder
        tokens = self.vit(images, interpolate_pos_encoding=smaller).last_hidden_state
        grid = images.shape[-1] // self.patch_size
        return tokens.transpose(1, 2).unflatten(2, (grid, grid))

    def set_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass."""
        recompute_layers(self.vit)

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a SigLIP checkpoint; positions are resampled to this grid (bicubic, antialiased).

        The vision model is found behind whatever prefix it has: none, `vision_model.`, PaliGemma's
        `vision_tower.vision_model.`, Eagle 2's `vision_model.vision_model.`. The pooling head may be absent.

        Raises:
            ValueError: if the checkpoint holds no such model, or several.
        """
        prefixes = [name.removesuffix(STEM) for name in state if name.endswith(STEM)]
        if len(prefixes) != 1:
            raise ValueError(f"a SigLIP checkpoint has one {STEM!r}, this one has {len(prefixes)}: {prefixes}")
        prefix = prefixes[0]
        tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if POSITIONS in tensors:
            size = [self.grid, self.grid]
            tensors[POSITIONS] = resample_abs_pos_embed(tensors[POSITIONS][None], size, num_prefix_tokens=0)[0]
        return self.known({f"vit.{name}": tensor for name, tensor in tensors.items()})


def unused_parts(vit: SiglipVisionModel, num_layers: int, *, normed: bool) -> dict[str, int]:
    """Returns the numbers of parameters of a published SigLIP that are not built or not used, by part.

    They are the layers above the ones of `vit`, the final norm unless `normed`, and the pooling head: a probe,
    attention, a norm and an MLP of the layers' shape.

    Args:
        num_layers: of the published model.
    """
    layer = vit.encoder.layers[0]
    of_layer = sum(parameter.numel() for parameter in layer.parameters())
    channels = vit.config.hidden_size
    parts = {
        "encoder.layers": (num_layers - len(vit.encoder.layers)) * of_layer,
        "post_layernorm": 0 if normed else 2 * channels,
        "head": of_layer - 2 * channels + channels,  # one norm less than a layer, and the probe
    }
    return {part: count for part, count in parts.items() if count}
