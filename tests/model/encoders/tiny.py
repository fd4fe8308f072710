"""One tiny encoder of every kind, with weights from a seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from eagle_train.model.encoders.base import VisionEncoder
from eagle_train.model.encoders.clip_vit import ClipVit
from eagle_train.model.encoders.convnext import ConvNext
from eagle_train.model.encoders.eva02 import Eva02
from eagle_train.model.encoders.intern_vit import InternVit
from eagle_train.model.encoders.pix2struct import Pix2Struct
from eagle_train.model.encoders.sam import Sam
from eagle_train.model.encoders.siglip import Siglip
from eagle_train.model.encoders.timm_vit import TimmVit

TILE = 48
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GREY = {"mean": [0.5] * 3, "std": [0.5] * 3}


def clip(**changes) -> ClipVit:
    return ClipVit(**({"image_size": 32, "patch_size": 8, "intermediate_size": 24} | WIDTHS | changes))


def convnext(**changes) -> ConvNext:
    shape = {"name": "convnext_atto", "image_size": 64, "depths": [1, 1, 2, 1], "dims": [8, 12, 16, 24]}
    return ConvNext(**(shape | changes))


def sam(**changes) -> Sam:
    shape = {"image_size": 48, "patch_size": 8, "intermediate_size": 24, "window_size": 4, "global_layers": [1]}
    return Sam(**(shape | WIDTHS | {"neck_channels": 6, "fold": 2, "pretrained_neck": True} | changes))


def eva02(**changes) -> Eva02:
    shape = {"image_size": 64, "patch_size": 8, "mlp_ratio": 8 / 3, "window_size": 4, "global_layers": [1]}
    return Eva02(**(shape | WIDTHS | {"position_grid": 3, "rotary_grid": 4} | changes))


def pix2struct(**changes) -> Pix2Struct:
    shape = {"image_size": 24, "patch_size": 4, "intermediate_size": 24, "head_dim": 8, "seq_len": 50}
    return Pix2Struct(**(shape | WIDTHS | changes))


def intern_vit(**changes) -> InternVit:
    return InternVit(**({"image_size": 32, "patch_size": 8, "intermediate_size": 24} | WIDTHS | changes))


def siglip(**changes) -> Siglip:
    return Siglip(**({"image_size": 32, "patch_size": 8, "intermediate_size": 24} | WIDTHS | changes))


def timm_vit(name: str, **options) -> Callable[..., TimmVit]:
    shape = {"name": name, "image_size": 32} | GREY
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2} | options
    return lambda **changes: TimmVit(**(shape | {"options": sizes} | changes))


learnt = {"img_size": 32, "dynamic_img_size": True}
TINY: dict[str, Callable[..., VisionEncoder]] = {
    "clip": clip,
    "convnext": convnext,
    "sam": sam,
    "eva02": eva02,
    "pix2struct": pix2struct,
    "siglip": siglip,
    "intern_vit": intern_vit,
    "siglip2": timm_vit("vit_so400m_patch16_siglip_384", **learnt),
    "dinov2": timm_vit("vit_large_patch14_dinov2", **learnt),
    "dinov3": timm_vit("vit_large_patch16_dinov3"),
    "cradio": timm_vit("naflexvit_so400m_patch16_radio_v4", pos_embed_grid_size=(6, 6)),
}


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Returns `module` with every parameter drawn anew, far from zero: none may be ignored unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(drawn + 1 if "norm" in name and name.endswith("weight") else drawn)
    return module


def pixels(num: int = 2, side: int = TILE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, side, side), generator=generator, dtype=torch.uint8)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())
