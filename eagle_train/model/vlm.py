"""The vision-language model: mixture of encoders, projector, causal LLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from eagle_train.model.attention.backend import AttentionBackend
from eagle_train.model.attention.packed import packed_hidden
from eagle_train.model.attention.segments import SegmentAttention
from eagle_train.model.loss import LossHead, TokenLosses, target_places
from eagle_train.model.mixtures.base import Mixture
from eagle_train.model.recompute import recompute_layers, saved_on_host
from eagle_train.model.token_mlp import pass_over_unwanted
from eagle_train.types import Grid, PackedBatch, RowPart

PlaceVisual = Callable[[torch.Tensor, RowPart], torch.Tensor]
"""Visual tokens (M', H) of this rank's tiles -> those (M, H) that stand in this rank's part of the row."""


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
        pass_over_unwanted(llm)
        self.attention = attention or SegmentAttention()
        self.offload = False
        self.place_visual: PlaceVisual | None = None
        """Where ranks share rows, what hands their visual tokens round."""

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the loss of every token, (T,) float32; 0 where there is no label."""
        embeddings = self.embed(batch.input_ids, batch.image_positions, batch.pixels, batch.grids, batch.part)
        return packed_losses(self.llm, embeddings, batch, self.attention, offload=self.offload)

    def embed(
        self,
        input_ids: torch.Tensor,
        image_positions: torch.Tensor,
        pixels: torch.Tensor,
        grids: Sequence[Grid] = (),
        part: RowPart | None = None,
    ) -> torch.Tensor:
        """Returns embeddings (T, H) with the visual tokens in their places.

        Args:
            input_ids: (T,) int64.
            image_positions: (M,) int64, one per visual token; M may be 0 although there is a (placeholder)
                tile, whose features then enter nowhere.
            pixels: (N, 3, S, S) or (N, 3, D, S, S) uint8, N >= 1.
            grids: of native-resolution pictures.
            part: of a row that ranks share; the tiles need not be those of the positions then.

        Raises:
            ValueError: if the positions and the visual tokens disagree in number.
        """
        embeddings = self.llm.get_input_embeddings()(input_ids)
        see = partial(self.see, grids=grids)
        tokens = visual_tokens(see, pixels, len(image_positions), part, self.place_visual)
        return insert(embeddings, image_positions, tokens)

    def see(self, pixels: torch.Tensor, grids: Sequence[Grid] = (), *, placeholder: bool = False) -> torch.Tensor:
        """Returns the visual tokens (N, P, H) of tiles; see `Mixture.forward`."""
        return self.projector(self.mixture(pixels, grids, placeholder=placeholder))

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
    places = target_places(batch.labels, batch.num_targets)
    wanted = places if len(places) else places.new_zeros(1)  # one at least, so that every weight has its gradient
    with saved_on_host(embeddings.device) if offload else nullcontext():
        hidden = packed_hidden(llm.model, embeddings, batch, attention, wanted)
    return llm.get_output_embeddings()(hidden, batch.labels, places)


def visual_tokens(
    see: Callable[..., torch.Tensor],
    pixels: torch.Tensor,
    num_positions: int,
    part: RowPart | None,
    place_visual: PlaceVisual | None,
) -> torch.Tensor:
    """Returns the visual tokens (M, H) that stand in this rank's row, or its part of one.

    Args:
        see: tiles (N, 3, S, S) uint8 -> (N, P, H); called once, also where there are none but the `placeholder`: every
            parameter gets its gradient, of zeros then.
        num_positions: M.
        part, place_visual: of a row that ranks share, and what hands their tokens round.
    """
    num_made = num_positions if part is None else part.num_made
    tokens = (see(pixels) if num_made else see(pixels, placeholder=True)[:, :0]).flatten(0, 1)
    return tokens if part is None else place_visual(tokens, part)


def insert(embeddings: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Returns embeddings (T, H) with visual tokens (M, H) at `positions` (M,).

    Raises:
        ValueError: if the positions and the visual tokens disagree in number.
    """
    if len(positions) != len(tokens):
        raise ValueError(f"{len(positions)} image positions but {len(tokens)} visual tokens")
    return embeddings.index_copy(0, positions, tokens.to(embeddings.dtype))
