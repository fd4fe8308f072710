"""A model in the released layout of Eagle 2 and 2.5, with all files that serve it in vLLM and transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagle_train.data.encode import Encoder
from eagle_train.data.jinja import to_jinja
from eagle_train.data.tile_grids import ImageAreaPreservation, TileGrid
from eagle_train.data.tokenizer.added import write_tokenizer
from eagle_train.model.checkpoints import eagle2_config, eagle2_files
from eagle_train.model.checkpoints.eagle2 import CONVNEXT, POOLING_HEAD, SIGLIP, Layout, to_released
from eagle_train.model.checkpoints.eagle2_files import IMAGE_END, IMAGE_START, IMAGE_TOKEN, PLACEHOLDER
from eagle_train.model.checkpoints.files import write_weights
from eagle_train.model.checkpoints.statistics import IMAGENET, Statistics, renormalized
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import build_encoder, meta_model
from eagle_train.train.load import check_empty, read_config, read_model_weights
from eagle_train.train.released import CONFIG, GENERATION, PREPROCESSOR, Carried, copy_code, read_carried, write_json
from eagle_train.train.released_eagle2 import LAYOUT, own_weights, released_layout, with_untouched

PATCH_EMBEDDING = f"mixture.encoders.{SIGLIP.name}.vit.embeddings.patch_embedding"
"""Our name of SigLIP's first layer."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model to write, as far as its files tell of it."""

    model: VisionLanguageModel
    """On the meta device."""
    known: Layout
    encoder: Encoder
    carried: Carried
    dtype: torch.dtype
    statistics: Statistics
    """Of the pixels that the written SigLIP is for."""


def export_released(path: Path, out: Path, *, pooling_head: bool = False, imagenet_pixels: bool = False) -> list[str]:
    """Writes a run or export in the released layout; returns what the original code cannot reproduce of it.

    Weights that the model has no use for are those of the release that it, or its `init_from`, was imported from.

    Args:
        pooling_head: also write SigLIP's pooling head, untrained, if there was none: the original class builds it.
        imagenet_pixels: write a SigLIP for pixels normalized by ImageNet's statistics, as vLLM gives them to this
            family whatever the files say. Its features stay the same, to rounding in the weights' dtype.

    Raises:
        ValueError: if `out` is not empty, or the layout has no place for the model, or for `imagenet_pixels` with
            several towers, which vLLM does not have.
    """
    check_empty(out)
    config = read_config(path)
    model, carried = meta_model(config), read_carried(path, config)
    known = released_layout(model, carried.read_json(CONFIG), **old_names(carried))
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    check_tokens(encoder)
    ours = own_weights(read_model_weights(path), tied=known.tied)
    siglip = model.mixture.encoders[SIGLIP.name]
    statistics = Statistics(mean=siglip.mean, std=siglip.std)
    if imagenet_pixels:
        ours, statistics = for_imagenet(ours, statistics, known), IMAGENET
    written = with_untouched(
        {to_released(name, known): tensor for name, tensor in ours.items()}, carried.weights, known
    )
    exported = Exported(
        model=model,
        known=known,
        encoder=encoder,
        carried=carried,
        dtype=ours["llm.model.embed_tokens.weight"].dtype,
        statistics=statistics,
    )
    if pooling_head:
        written = added_head(exported) | written
    write_weights(out, written)
    write_tokenizer(config["tokenizer"], config["new_tokens"], out)
    write_files(exported, out, pooling_head=any(key.startswith(head_prefix(known)) for key in written))
    return list(differences(exported))


def old_names(carried: Carried) -> dict[str, bool]:
    """Returns which of several names the release had that a model comes from."""
    return {"old_layer_scale": False} | carried.read_json(LAYOUT)


def check_tokens(encoder: Encoder) -> None:
    """Raises ValueError unless the strings around and in the places of visual tokens are those of the layout."""
    template = encoder.template
    strings = (template.media.prefix, template.image_token, template.media.suffix)
    if strings != (IMAGE_START, IMAGE_TOKEN, IMAGE_END):
        raise ValueError(
            f"the released layout writes an image as {IMAGE_START}{IMAGE_TOKEN}...{IMAGE_END}; the chat template "
            f"has the prefix, image_token and suffix {strings}; choose chat_template=eagle2"
        )
    if missing := [text for text in strings if text not in encoder.tokenizer.get_vocab()]:
        raise ValueError(f"the tokenizer lacks {missing}, which the released layout needs; list them in new_tokens")


def for_imagenet(weights: dict[str, torch.Tensor], before: Statistics, known: Layout) -> dict[str, torch.Tensor]:
    """Returns weights whose SigLIP takes pixels with ImageNet's statistics; it has taken those of `before`."""
    if len(known.towers) > 1:
        raise ValueError("imagenet_pixels is for SigLIP alone; vLLM has no class for several towers")
    names = [f"{PATCH_EMBEDDING}.{part}" for part in ("weight", "bias")]
    changed = renormalized(*(weights[name] for name in names), before=before, after=IMAGENET)
    return weights | dict(zip(names, changed, strict=True))


def head_prefix(known: Layout) -> str:
    """Returns how the released names of SigLIP's pooling head begin."""
    return next(prefix for prefix, tower in known.towers.items() if tower is SIGLIP) + POOLING_HEAD


def added_head(exported: Exported) -> dict[str, torch.Tensor]:
    """Returns an untrained pooling head of SigLIP by released name."""
    siglip, prefix = exported.model.mixture.encoders[SIGLIP.name].vit.config, head_prefix(exported.known)
    return {prefix + name: tensor for name, tensor in eagle2_files.pooling_head(siglip, exported.dtype).items()}


def write_files(exported: Exported, out: Path, *, pooling_head: bool) -> None:
    """Writes everything but weights and tokenizer."""
    carried, encoder = exported.carried, exported.encoder
    config = describe(exported, pooling_head=pooling_head)
    write_json(out / CONFIG, config)
    tokenizer = encoder.tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    generation = eagle2_files.generation_config(encoder.template.stop_ids(tokenizer), ids)
    write_json(out / GENERATION, carried.read_json(GENERATION) | generation)
    jinja = to_jinja(encoder.template, PLACEHOLDER)
    (out / "chat_template.jinja").write_text(jinja)
    if config["model_type"] == eagle2_config.NEW:  # the older generation has no processor
        for name, ours in processor_files(exported).items():
            write_json(out / name, eagle2_files.merged(carried.read_json(name), ours))
    copy_code(carried, out)


def processor_files(exported: Exported) -> dict[str, dict[str, Any]]:
    """Returns the configs of the processor by file name."""
    tokens = exported.model.mixture.tokens_per_tile
    preprocessor = eagle2_files.preprocessor_config(
        tile_size=exported.encoder.tile_size,
        mean=exported.statistics.mean,
        std=exported.statistics.std,
        tiles=tiles_of(exported.encoder),
        tokens_per_tile=tokens,
    )
    return {
        PREPROCESSOR: preprocessor,
        "processor_config.json": eagle2_files.processor_config(tokens),
    }


def describe(exported: Exported, *, pooling_head: bool) -> dict[str, Any]:
    """Returns the `config.json` of a model."""
    mixture, encoder = exported.model.mixture, exported.encoder
    convnext = mixture.encoders[CONVNEXT.name].input_size if CONVNEXT.name in mixture.encoders else None
    return eagle2_files.write_config(
        llm=exported.model.llm.config.to_dict(),
        towers=[CONVNEXT if t.name == CONVNEXT.name else SIGLIP for t in exported.known.towers.values()],
        siglip=mixture.encoders[SIGLIP.name].vit.config.to_dict(),
        convnext_size=convnext,
        projector_layers=sum(isinstance(layer, nn.Linear) for layer in exported.model.projector.layers),
        fold=mixture.folds[SIGLIP.name],
        tiles=tiles_of(encoder),
        image_token_id=encoder.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pooling_head=pooling_head,
        dtype=str(exported.dtype).removeprefix("torch."),
        original=exported.carried.read_json(CONFIG),
    )


def tiles_of(encoder: Encoder) -> tuple[int, int, bool]:
    """Returns the fewest and most tiles of an image, and whether there is a thumbnail."""
    tiling = encoder.tiling
    if isinstance(tiling, TileGrid):
        return tiling.min_tiles, tiling.max_tiles, tiling.thumbnail
    return 1, 1, False


def differences(exported: Exported):
    """Yields in what a model differs from what the original code does with its files."""
    encoder, encoders = exported.encoder, exported.model.mixture.encoders
    siglip = encoders[SIGLIP.name]
    if not isinstance(encoder.tiling, ImageAreaPreservation):
        yield f"images are cut by ImageAreaPreservation there, by {type(encoder.tiling).__name__} here"
    if encoder.tile_size != siglip.input_size:
        yield f"tiles have the {siglip.input_size} px of SigLIP there, {encoder.tile_size} px here"
    old = len(encoders) > 1 or exported.carried.read_json(CONFIG).get("model_type") == eagle2_config.OLD
    if old and set(siglip.mean + siglip.std) != {0.5}:  # the newer generation has a processor, which reads them
        yield f"mean and std are 0.5 there, {siglip.mean} and {siglip.std} here"
