"""An Eagle 2.5 whose SigLIP takes pixels with ImageNet's statistics sees what the trained one sees."""

import json

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from eagle_train.__main__ import main
from eagle_train.model.checkpoints.files import read_weights, same
from eagle_train.model.checkpoints.statistics import IMAGENET, Statistics, renormalized
from eagle_train.train.export_eagle2 import export_released
from eagle_train.train.load import load_model
from tests.eagle1_layout import random_weights
from tests.eagle2_layout import ALONE, CASES, imported, write_release

HALF = Statistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
STEM = f"{ALONE}embeddings.patch_embedding."


def normalized(pixels, statistics):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (statistics.mean, statistics.std))
    return (pixels / 255 - mean) / std


@pytest.fixture
def release(data, tmp_path):
    """A release of float32 weights, in which nothing is rounded to bfloat16, and its import."""
    config, shapes, _ = CASES["untied-with-pooling"]
    weights = {name: tensor.float() * 4 for name, tensor in random_weights(shapes).items()}
    folder = write_release(tmp_path / "r", config, weights, data)
    imported(folder, tmp_path / "ours")
    return folder


def test_a_first_layer_gives_the_same_of_other_statistics():
    torch.manual_seed(0)
    weight, bias, pixels = torch.randn(8, 3, 4, 4), torch.randn(8), torch.randint(0, 256, (2, 3, 8, 8)).float()
    moved = renormalized(weight, bias, before=HALF, after=IMAGENET)
    wanted = torch.nn.functional.conv2d(normalized(pixels, HALF), weight, bias, stride=4)
    found = torch.nn.functional.conv2d(normalized(pixels, IMAGENET), *moved, stride=4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    back = renormalized(*moved, before=IMAGENET, after=HALF)
    torch.testing.assert_close(back, (weight, bias), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_exported_tower_sees_the_same_of_imagenets_pixels(release, tmp_path):
    assert export_released(tmp_path / "ours", tmp_path / "back", imagenet_pixels=True) == []
    weights, theirs = read_weights(tmp_path / "back"), read_weights(release)
    assert {name for name in theirs if not same(weights[name], theirs[name])} == {f"{STEM}weight", f"{STEM}bias"}
    config = json.loads((tmp_path / "back/config.json").read_text())
    siglip = SiglipVisionModel(SiglipVisionConfig.from_dict(config["vision_config"])).eval()
    siglip.load_state_dict({name.removeprefix(ALONE): t for name, t in weights.items() if name.startswith(ALONE)})
    model, _ = load_model(tmp_path / "ours")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    wanted = model.mixture.encoders["siglip"](pixels).flatten(2).transpose(1, 2)  # (N, T, C)
    found = siglip(normalized(pixels.float(), IMAGENET)).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert (siglip(normalized(pixels.float(), HALF)).last_hidden_state - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_the_processor_names_the_statistics_and_an_import_reads_them(release, tmp_path):
    export_released(tmp_path / "ours", tmp_path / "back", imagenet_pixels=True)
    preprocessor = json.loads((tmp_path / "back/preprocessor_config.json").read_text())
    assert (preprocessor["image_mean"], preprocessor["image_std"]) == (list(IMAGENET.mean), list(IMAGENET.std))
    imported(tmp_path / "back", tmp_path / "again")
    (ours, _), (again, _) = load_model(tmp_path / "ours"), load_model(tmp_path / "again")
    assert again.mixture.encoders["siglip"].mean == IMAGENET.mean
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(again.mixture(pixels), ours.mixture(pixels), rtol=0, atol=1e-5)
    assert export_released(tmp_path / "again", tmp_path / "twice", imagenet_pixels=True) == []
    one, two = read_weights(tmp_path / "back"), read_weights(tmp_path / "twice")
    assert all(same(two[name], tensor) for name, tensor in one.items()), "it takes these pixels already"


def test_several_towers_are_refused(data, tmp_path):
    config, shapes, _ = CASES["several-towers"]
    imported(write_release(tmp_path / "r", config, random_weights(shapes), data), tmp_path / "ours")
    with pytest.raises(ValueError, match="vLLM has no class for several towers"):
        export_released(tmp_path / "ours", tmp_path / "back", imagenet_pixels=True)


def test_the_command_takes_it_for_this_layout_alone(release, tmp_path, capsys):
    asked = ["export", str(tmp_path / "ours"), "--imagenet-pixels", "--out", str(tmp_path / "back")]
    with pytest.raises(SystemExit):
        main(asked)
    assert "--imagenet-pixels is for --layout eagle2" in capsys.readouterr().err
    assert main([*asked, "--layout", "eagle2"]) == 0
    assert json.loads((tmp_path / "back/preprocessor_config.json").read_text())["image_mean"] == list(IMAGENET.mean)
