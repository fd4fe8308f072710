"""The vision-language model: mixture of encoders, projector, causal LLM."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_train.model.attention.backend import AttentionBackend
from eagle_train.model.attention.packed import packed_hidden
from eagle_train.model.attention.segments import SegmentAttention
from eagle_train.model.loss import LossHead, TokenLosses
from eagle_train.model.mixtures.base import Mixture
from eagle_train.model.recompute import recompute_layers, saved_on_host
from eagle_train.types import Grid, PackedBatch


class VisionLanguageModel(nn.Module):
    """Consumes a `PackedBatch`, changes no length, returns the loss of every token.

    Args:
        mixture: tiles -> features (N, P, C), P tokens per tile.
        projector: features -> embeddings (N, P, H).
        llm: a transformers causal LM of hidden size H.
        loss: how the head computes the losses of tokens.
        attention: of the LLM over packed rows; None: segment by segment.
    """

    def __init__(
        self,
        *,
        mixture: Mixture,
        projector: nn.Module,
        llm: PreTrainedModel,
        loss: TokenLosses,
        attention: AttentionBackend | None = None,
    ) -> None:
        super().__init__()
        self.mixture = mixture
        self.projector = projector
        self.llm = llm
        llm.set_output_embeddings(LossHead(llm.get_output_embeddings(), loss))
        self.attention = attention or SegmentAttention()
        self.offload = False

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32; 0 where there is no label."""
        embeddings = self.embed(batch.input_ids, batch.image_positions, batch.pixels, batch.grids)
        return packed_losses(self.llm, embeddings, batch, self.attention, offload=self.offload)

    def embed(
        self,
        input_ids: torch.Tensor,
        image_positions: torch.Tensor,
        pixels: torch.Tensor,
        grids: Sequence[Grid] = (),
    ) -> torch.Tensor:
        """Returns embeddings (T, H) with the visual tokens in their places.

        Args:
            input_ids: (T,) int64.
            image_positions: (M,) int64, one per visual token; M may be 0 although there is a (placeholder)
                tile, whose features then enter with weight zero.
            pixels: (N, 3, S, S) or (N, 3, D, S, S) uint8, N >= 1.
            grids: of native-resolution pictures.

        Raises:
            ValueError: if the positions and the visual tokens disagree in number.
        """
        embeddings = self.llm.get_input_embeddings()(input_ids)
        if len(image_positions) == 0:
            return embeddings + 0.0 * self.projector(self.mixture(pixels, grids, placeholder=True)).sum().to(
                embeddings.dtype
            )
        return insert(embeddings, image_positions, self.projector(self.mixture(pixels, grids)))

    def set_activation_checkpointing(self, *, offload: bool = False) -> None:
        """Recomputes activations of the LLM and of the mixture in the backward pass.

        Args:
            offload: what is kept of the LLM, its layers' inputs, waits in host memory.
        """
        self.mixture.set_activation_checkpointing(self.mixture.encoders.values())
        recompute_layers(self.llm)
        self.offload = offload


def packed_losses(
    llm: PreTrainedModel,
    embeddings: torch.Tensor,
    batch: PackedBatch,
    attention: AttentionBackend,
    *,
    offload: bool = False,
) -> torch.Tensor:
    """Returns the loss of every token of a packed row, (T,) float32; 0 where there is no label.

    Args:
        embeddings: (T, H).
        attention: of the LLM's layers.
        offload: what autograd keeps of the LLM's layers waits in host memory.
    """
    with saved_on_host(embeddings.device) if offload else nullcontext():
        hidden = packed_hidden(llm.model, embeddings, batch, attention)
    return llm.get_output_embeddings()(hidden, batch.labels)


def insert(embeddings: torch.Tensor, positions: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Returns embeddings (T, H) with visual tokens (N, P, H) at `positions` (M,).

    Raises:
        ValueError: if the positions and the visual tokens disagree in number.
    """
    tokens = features.flatten(0, 1).to(embeddings.dtype)
    if len(positions) != len(tokens):
        raise ValueError(f"{len(positions)} image positions but {len(tokens)} visual tokens")
    return embeddings.index_copy(0, positions, tokens)
