"""A tiny Qwen2-VL of ours and transformers' own with the same weights, and rows for both."""

from __future__ import annotations

import numpy as np
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from eagle_train.data.collate import pack
from eagle_train.data.positions import multimodal_rotary
from eagle_train.model.attention.packed import packed_hidden
from eagle_train.model.checkpoints.qwen2_vl import ENCODER, to_released
from eagle_train.model.encoders.qwen2_vit import Qwen2Vit
from eagle_train.model.loss import ChunkedCrossEntropy
from eagle_train.model.mixtures.native_resolution import NativeResolution
from eagle_train.model.projector import PatchMerger
from eagle_train.model.qwen2_vl_llm import build_qwen2_vl_llm
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.types import IGNORE_INDEX, EncodedSample, PackedBatch

PATCH, SIDE = 4, 8
VOCAB, IMAGE, VIDEO, START, END = 99, 90, 91, 92, 93
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
Picture = tuple[int, int, int]


def tiny_qwen2_vl(seed: int = 0) -> VisionLanguageModel:
    """Returns a model of some thousand parameters, none of them zero."""
    torch.manual_seed(seed)
    vit = Qwen2Vit(patch_size=PATCH, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    mixture = NativeResolution(encoders={ENCODER: vit})
    llm = build_qwen2_vl_llm(**TEXT)
    model = VisionLanguageModel(
        mixture=mixture, projector=PatchMerger(mixture.channels, 32), llm=llm, loss=ChunkedCrossEntropy(7)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def reference(model: VisionLanguageModel) -> Qwen2VLForConditionalGeneration:
    """Returns transformers' model with the weights of ours."""
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    theirs = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT, vision_config=VISION, **ids))
    weights = {to_released(name): tensor for name, tensor in model.state_dict().items()}
    theirs.load_state_dict({in_memory(name): tensor for name, tensor in weights.items()})
    return theirs.train(model.training)


def in_memory(name: str) -> str:
    """Returns the name that transformers 5 has in memory for one of its files."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def sample(seed: int, *parts: int | tuple[int, Picture]) -> EncodedSample:
    """Returns a sample of texts, each so many tokens, and pictures, each the id of its tokens and its grid of tiles."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    places, grids = [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(1, IMAGE, (part,), generator=generator).tolist()
            continue
        token, grid = part
        count = int(np.prod(grid))
        places += range(len(ids) + 1, len(ids) + 1 + count)
        ids += [START, *[token] * count, END]
        grids.append(grid)
    input_ids = torch.tensor(ids)
    supervised = torch.zeros(len(ids), dtype=torch.bool)
    supervised[-4:-1] = True
    return EncodedSample(
        key=f"s/{seed}",
        source="s",
        input_ids=input_ids,
        labels=torch.where(supervised, input_ids.roll(-1), IGNORE_INDEX),
        loss_weights=supervised.float() * (1 + seed % 3),
        image_positions=torch.tensor(places, dtype=torch.int64),
        pixels=torch.randint(0, 256, (len(places), 3, 2, SIDE, SIDE), generator=generator, dtype=torch.uint8),
        grids=tuple(grids),
    )


def row(samples: list[EncodedSample]) -> PackedBatch:
    """Returns samples as a row."""
    return pack(samples, [], filler_id=0, tile_size=SIDE, tile_depth=2, positions=multimodal_rotary)


def their_inputs(model: VisionLanguageModel, one: EncodedSample) -> dict[str, torch.Tensor]:
    """Returns what transformers' model is given for a sample, position ids left to it."""
    kinds = one.input_ids[one.image_positions]
    patches = model.mixture.encoder.normalize(one.pixels, SIDE).flatten(1).unflatten(0, (-1, 4))
    given = {"input_ids": one.input_ids[None], "mm_token_type_ids": torch.zeros_like(one.input_ids)[None]}
    tokens = [IMAGE if first == IMAGE else VIDEO for first in kinds[firsts(one.grids)].tolist()] if one.grids else []
    for number, (token, pixels, grids) in enumerate(
        [(IMAGE, "pixel_values", "image_grid_thw"), (VIDEO, "pixel_values_videos", "video_grid_thw")], 1
    ):
        if token in tokens:
            mine = [grid for grid, kind in zip(one.grids, tokens, strict=True) if kind == token]
            given[grids] = torch.tensor([[t, 2 * h, 2 * w] for t, h, w in mine])
            given[pixels] = patches[kinds == token].flatten(0, 1)
            given["mm_token_type_ids"] += number * (given["input_ids"] == token)
    return given


def firsts(grids: tuple[Picture, ...]) -> list[int]:
    """Returns the first tile of each picture."""
    return np.cumsum([0, *(int(np.prod(grid)) for grid in grids)])[:-1].tolist()


def logits_of(model, batch):
    """Returns the logits (T, V) of all tokens of a row, also of those without a label."""
    embeddings = model.embed(batch.input_ids, batch.image_positions, batch.pixels, batch.grids)
    return model.llm.lm_head(packed_hidden(model.llm.model, embeddings, batch, model.attention))
