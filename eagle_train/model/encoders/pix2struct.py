"""Pix2Struct's image encoder, from transformers, with its pre-processing on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import Pix2StructVisionConfig, Pix2StructVisionModel

from eagle_train.model.encoders.base import Resize, VisionEncoder, antialiased, below, init_from_fan_in
from eagle_train.model.geometry import whole_grid
from eagle_train.model.recompute import recompute_layers


class Pix2Struct(VisionEncoder):
    """`transformers.Pix2StructVisionModel` on square images.

    Each image is standardized by its own mean and deviation, before it is resized, and cut into patches that
    carry their row and column. Of a square tile, the library's processor with 2048 patches at most makes
    45x45 patches of 16 px: `image_size` 720. There is no padding, so there is no attention mask.

    Args:
        image_size, patch_size: pixels.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, head_dim: of the transformer.
        seq_len: entries of the tables of row and of column embeddings.
        resize, recompute, pretrained: see `VisionEncoder`.
        fan_in_init: see `init_from_fan_in`; rows and columns then start as large as half a patch.

    Raises:
        GeometryError: if the patches do not fill the image.
        ValueError: if there are more rows than the tables have entries for.

    Source: Pix2Struct (arXiv 2210.03347); NVlabs/Eagle, `pix2struct_encoder.py` (facts only).
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
        head_dim: int,
        seq_len: int,
        resize: Resize = antialiased,
        recompute: bool = True,
        pretrained: str | None = None,
        fan_in_init: bool = False,
    ) -> None:
        grid = whole_grid(image_size, patch_size, name="Pix2Struct")
        if grid >= seq_len:
            raise ValueError(
                f"Pix2Struct: {grid} rows of {patch_size} px patches need seq_len > {grid}, not {seq_len}; "
                f"raise seq_len or lower image_size to {(seq_len - 1) * patch_size}"
            )
        super().__init__(
            input_size=image_size,
            grid=grid,
            channels=hidden_size,
            placeholder_size=patch_size,
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
            resize=resize,
            recompute=recompute,
            pretrained=pretrained,
        )
        config = Pix2StructVisionConfig(
            patch_embed_hidden_size=3 * patch_size**2,
            hidden_size=hidden_size,
            d_ff=intermediate_size,
            d_kv=head_dim,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            seq_len=seq_len,
            initializer_range=0.02,  # the library's 1e-10 only suits weights that are loaded
        )
        self.patch_size = patch_size
        self.vit = Pix2StructVisionModel(config)
        if fan_in_init:
            init_from_fan_in(self)
            with torch.no_grad():  # these products of queries and keys are not divided by sqrt(head_dim)
                for layer in self.vit.encoder.layer:
                    layer.attention.query.weight.mul_(head_dim**-0.5)
            nn.init.normal_(self.vit.embeddings.row_embedder.weight, std=0.35)
            nn.init.normal_(self.vit.embeddings.column_embedder.weight, std=0.35)

    def normalize(self, pixels: torch.Tensor, size: int) -> torch.Tensor:
        """Returns images (N, 3, size, size), in the encoder's dtype, standardized by themselves and then resized.

        A deviation counts as no less than one grey level over the square root of the number of values.
        """
        images = pixels.float()
        deviation, mean = torch.std_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
        images = (images - mean) / deviation.clamp(min=images[0].numel() ** -0.5)
        if images.shape[-1] != size:
            images = self.resize(images, size)
        return images.to(next(self.parameters()).dtype)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features (N, C, G, G) of standardized images."""
        patch, embeddings = self.patch_size, self.vit.embeddings
        grid = images.shape[-1] // patch
        # (N, 3, G p, G p) -> (N, G, G, p p 3)
        patches = images.unflatten(3, (grid, patch)).unflatten(2, (grid, patch))
        tokens = embeddings.patch_projection(patches.permute(0, 2, 4, 3, 5, 1).flatten(3))
        ids = torch.arange(1, grid + 1, device=images.device)  # 0 is for padding
        tokens = tokens + embeddings.row_embedder(ids)[:, None] + embeddings.column_embedder(ids)
        tokens = self.vit.layernorm(self.vit.encoder(tokens.flatten(1, 2)).last_hidden_state)
        return tokens.transpose(1, 2).unflatten(2, (grid, grid))

    def set_activation_checkpointing(self) -> None:
        """Recomputes each layer in the backward pass."""
        recompute_layers(self.vit)

    def adapt(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the tensors of a Pix2Struct checkpoint's encoder."""
        tensors = below(state, "encoder.", landmark="layernorm.weight")
        return self.known({f"vit.{name}": tensor for name, tensor in tensors.items()})
