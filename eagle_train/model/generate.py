"""Greedy answers of a vision-language model, batched, by transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.types import Grid


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is asked."""

    input_ids: list[int]
    image_positions: list[int]
    pixels: torch.Tensor
    """(N, 3, S, S) or (N, 3, D, S, S) uint8; N may be 0."""
    position_ids: torch.Tensor
    """(T,) or (4, T) int64, see `PackedBatch`."""
    grids: tuple[Grid, ...] = ()
    """Of native-resolution pictures."""


@dataclass(frozen=True, slots=True)
class Access:
    """How the ranks get at the weights of a model that they generate with.

    Args:
        gather: modules -> a context in which their weights are whole on this rank; all ranks enter it together.
        together: weights are sharded, the LLM's gathered layer by layer by all ranks together: each must call
            `generate` equally often, and goes on until the longest answer of any rank is complete.
    """

    gather: Callable[[Iterable[nn.Module]], AbstractContextManager] = lambda modules: nullcontext()
    together: bool = False


WHOLE = Access()
"""Every rank has all weights, and goes its own way."""


@torch.no_grad()  # not inference mode: weights that are gathered in it could not be trained any more
def generate(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    streamer=None,
    access: Access = WHOLE,
) -> list[list[int]]:
    """Returns the new token ids of each prompt, without the stop token.

    Prompts are padded on the left, so that all end together. A prompt ends with text, so that what is said goes on by
    one position in every row of its position ids.

    Args:
        streamer: transformers streamer that gets the tokens of a single prompt as they come.
        access: to the weights.
    """
    device = next(model.parameters()).device
    # All at once: ranks have unlike numbers of prompts with images, so they cannot gather these at every call.
    with access.gather([model.mixture, model.projector, model.llm.get_input_embeddings()]):
        embeddings = [embed_prompt(model, prompt, device) for prompt in prompts]
    longest = max(map(len, embeddings))
    batch = embeddings[0].new_zeros(len(prompts), longest, embeddings[0].shape[1])
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    positions = mask.new_zeros(*prompts[0].position_ids.shape[:-1], len(prompts), longest)  # (B, T) or (4, B, T)
    for row, (embedding, prompt) in enumerate(zip(embeddings, prompts, strict=True)):
        batch[row, longest - len(embedding) :] = embedding
        mask[row, longest - len(embedding) :] = 1
        positions[..., row, longest - len(embedding) :] = prompt.position_ids
    ids = model.llm.generate(
        inputs_embeds=batch,
        attention_mask=mask,
        position_ids=positions,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        streamer=streamer,
        synced_gpus=access.together,
    )
    return [until_stop(row, stop_ids) for row in ids.tolist()]


def embed_prompt(model: VisionLanguageModel, prompt: Prompt, device: torch.device) -> torch.Tensor:
    """Returns the embeddings (T, H) of one prompt."""
    ids = torch.tensor(prompt.input_ids, device=device)
    if len(prompt.pixels) == 0:
        return model.llm.get_input_embeddings()(ids)
    positions = torch.tensor(prompt.image_positions, device=device)
    return model.embed(ids, positions, prompt.pixels.to(device), prompt.grids)


def until_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """Returns the ids before the first stop token."""
    ends = [place for place, index in enumerate(ids) if index in stop_ids]
    return ids[: ends[0]] if ends else ids
