"""The published Qwen2-VL experiments have the published numbers of parameters, stages and costs."""

import numpy as np
import pytest

from eagle_train.model.describe import describe
from eagle_train.train.assemble import build_schedule, meta_model
from eagle_train.train.costs import cost_model, forward_flops
from eagle_train.train.optim import freeze
from tests.configs import composed

SIZES = {"qwen2-vl-2b": (2_208_985_600, 34_087_936), "qwen2-vl-7b": (8_291_375_616, 44_575_744)}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones_and_the_encoder_is_frozen(name):
    config = composed(f"+experiment={name}")
    model = meta_model(config)
    total, merger = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.projector.parameters()) == merger
    assert sum(p.numel() for p in model.mixture.parameters()) == 665_271_296 - 34_087_936
    (stage,) = build_schedule(config).values()
    freeze(model, stage.learning_rates)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == total - 631_183_360
    assert (stage.max_length, stage.tiling.max_pixels, stage.degrade.frames.max_frames) == (8192, 50_176, 8)


def test_an_image_costs_its_patches_and_their_pairs():
    config = composed("+experiment=qwen2-vl-2b")
    model = meta_model(config)
    geometry = describe(model.mixture, 28)
    encoder = geometry.encoders["qwen2_vit"]
    linear = 4 * 2 * (32 * 12 * 1280**2 + 1176 * 1280)  # 4 patches, 12 C^2 weights of a block, the patch embedding
    assert encoder.flops == linear and encoder.flops_per_pair == 32 * 4 * 1280 * 4**2
    (stage,) = build_schedule(config).values()
    cost = cost_model(forward_flops(model, geometry), stage)
    frozen = cost.sample_costs(np.array([100]), 600, 600**2) - cost.sample_costs(np.array([100]), 600, 0)
    assert frozen[0] == pytest.approx(600**2 * encoder.flops_per_pair / 1000, rel=1e-3)
