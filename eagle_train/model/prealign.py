"""Pre-alignment: one encoder of a mixture tuned alone against the LLM, through a projector of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from eagle_train.model.recompute import recompute_layers
from eagle_train.model.vlm import PlaceVisual, VisionLanguageModel, insert, packed_losses, visual_tokens
from eagle_train.types import Grid, PackedBatch


class PreAlignment(nn.Module):
    """A vision-language model that sees through one of its encoders alone.

    It shares all modules of the whole model under their names, so that its checkpoints hold everything and the
    tuned encoder is in its place for the next stage; `aligner` is the only module of its own. The encoder's
    features are resampled to as many tokens per tile as the mixture gives, so that rows stay the same.

    Args:
        model: the whole model.
        encoder: name of the encoder.
        make_projector: from `in_channels` and `hidden_size` to a module: (..., in_channels) -> (..., hidden_size).

    Raises:
        ValueError: if the mixture has no such encoder, or its tokens per tile make no square.

    Source: Eagle (arXiv 2408.15998), pre-alignment.
    """

    def __init__(self, model: VisionLanguageModel, encoder: str, make_projector: Callable[..., nn.Module]) -> None:
        super().__init__()
        if encoder not in model.mixture.encoders:
            raise ValueError(
                f"there is no encoder {encoder!r} to align; the mixture has {list(model.mixture.encoders)}"
            )
        tokens = model.mixture.tokens_per_tile
        if math.isqrt(tokens) ** 2 != tokens:
            raise ValueError(
                f"{type(model.mixture).__name__} makes {tokens} tokens per tile, which are no square grid for the "
                f"features of {encoder!r} alone; choose a mixture with a square number of tokens, or leave out the "
                f"stages with align"
            )
        self.mixture = model.mixture
        self.projector = model.projector
        self.llm = model.llm
        self.aligner = make_projector(
            in_channels=model.mixture.encoders[encoder].channels, hidden_size=model.llm.config.hidden_size
        )
        self.encoder = encoder
        self.attention = model.attention
        self.offload = False
        self.place_visual: PlaceVisual | None = None

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32; 0 where there is no label."""
        return packed_losses(self.llm, self.embed(batch), batch, self.attention, offload=self.offload)

    def embed(self, batch: PackedBatch) -> torch.Tensor:
        """Returns embeddings (T, H) with the encoder's tokens in their places."""
        embeddings = self.llm.get_input_embeddings()(batch.input_ids)
        see = partial(self.see, grids=batch.grids)
        tokens = visual_tokens(see, batch.pixels, len(batch.image_positions), batch.part, self.place_visual)
        return insert(embeddings, batch.image_positions, tokens)

    def see(self, pixels: torch.Tensor, grids: Sequence[Grid] = (), *, placeholder: bool = False) -> torch.Tensor:
        """Returns the encoder's visual tokens (N, P, H) of tiles; see `Mixture.forward`."""
        return self.aligner(self.mixture(pixels, grids, placeholder=placeholder, alone=self.encoder))

    def set_activation_checkpointing(self, *, offload: bool = False) -> None:
        """Recomputes activations of the LLM and of the encoder; see `VisionLanguageModel`."""
        self.mixture.set_activation_checkpointing([self.mixture.encoders[self.encoder]])
        recompute_layers(self.llm)
        self.offload = offload
