"""Whether an exported folder computes what the checkpoint does: the same logits, to the bit, for a sample."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from eagle_train.data.encode import Encoder
from eagle_train.data.probe import probe_image
from eagle_train.model.generate import Prompt, embed_prompt
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.evaluate import make_prompt
from eagle_train.train.host_memory import free_bytes
from eagle_train.types import Media, Message


def sample_prompt(encoder: Encoder) -> Prompt:
    """Returns a question about an image of noise, laid out as the encoder lays out any."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    width, height, orientation = probe_image(file.getvalue())
    media = [Media(kind="image", member="noise.png", width=width, height=height, orientation=orientation)]
    messages = [Message(role="user", content=(0, "What does the image show?"))]
    plans, _ = encoder.plan_media(media)
    tiles = encoder.new_tiles(plans)
    encoder.decode_all("noise", media, plans, [file.getvalue()], tiles)
    return make_prompt(encoder, messages, media, plans, tiles)


@torch.inference_mode()
def logits(model: VisionLanguageModel, prompt: Prompt) -> torch.Tensor:
    """Returns the logits of a prompt, (T, V), on the CPU."""
    embeddings = embed_prompt(model, prompt, next(model.parameters()).device)
    return model.llm(inputs_embeds=embeddings[None], use_cache=False).logits[0]


@torch.no_grad()
def check_logits(
    model: VisionLanguageModel,
    encoder: Encoder,
    first: Mapping[str, torch.Tensor],
    second: Mapping[str, torch.Tensor],
    where: Path,
) -> None:
    """Raises ValueError unless two sets of weights give the same logits.

    Args:
        model: that they are put into, one after the other; every weight must come from them.
        encoder: of the sample.
        first, second: weights by name; of tied ones, one name is enough.
        where: the second are, for the message.
    """
    prompt, found = sample_prompt(encoder), []
    own = model.state_dict(keep_vars=True)
    for weights in (first, second):
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # so that nothing is left of the other
        for name in weights:
            own[name].copy_(weights[name])
        found.append(logits(model, prompt))
    if not found[0].isfinite().all():
        raise ValueError("the checkpoint gives logits that are not finite, so its export cannot be checked")
    if not torch.equal(*found):
        raise ValueError(
            f"{where} gives other logits than the checkpoint: they differ by up to "
            f"{float((found[0] - found[1]).abs().max()):.3g}; do not use it"
        )


def fits_memory(model: nn.Module) -> bool:
    """Returns whether a model on the meta device would fit into host memory, with room for its activations."""
    return 1.2 * sum(parameter.nbytes for parameter in model.parameters()) < free_bytes()
