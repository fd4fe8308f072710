"""What is told about a mixture before it runs is what it then does; what cannot be is refused with a way out."""

import random
import shlex

import pytest
import torch

from eagle_train.model.describe import describe
from eagle_train.model.encoders.clip_vit import ClipVit
from eagle_train.model.encoders.convnext import ConvNext
from eagle_train.model.geometry import GeometryError, leading_encoder, whole_grid
from eagle_train.model.mixtures.channel_concat import ChannelConcat
from eagle_train.model.mixtures.deformable_attention import DeformableAttention
from eagle_train.model.mixtures.mixture_adapter import MixtureAdapter
from eagle_train.model.mixtures.sequence_append import SequenceAppend
from eagle_train.train.assemble import build_model, meta_model
from eagle_train.train.config import ConfigError, build, load_config
from tests.configs import composed

MIXTURES = ["toy", "toy_eagle2", "toy_move", "toy_sequence_append", "toy_mixture_adapter", "toy_deformable_attention"]


@pytest.mark.parametrize(
    ("image_size", "patch_size", "multiple", "nearest"),
    [(440, 14, 1, (434, 448)), (3, 14, 1, (14,)), (0, 14, 1, (14,)), (-5, 14, 1, (14,)), (1000, 16, 4, (1024, 960))],
)
def test_a_size_of_no_whole_patches_is_refused_with_the_nearest_that_are(image_size, patch_size, multiple, nearest):
    with pytest.raises(GeometryError, match="clip") as error:
        whole_grid(image_size, patch_size, name="clip", multiple=multiple)
    assert error.value.nearest == nearest
    for size in nearest:
        assert whole_grid(size, patch_size, name="clip", multiple=multiple) * patch_size == size


def test_eagle_takes_the_grid_of_convnext_with_sam_and_without():
    x5 = {"clip": (336, 24), "convnext": (1024, 32), "sam": (1024, 32), "p2s": (720, 45), "det": (1024, 64)}
    x4 = {name: sizes for name, sizes in x5.items() if name != "sam"}
    assert leading_encoder(x5) == leading_encoder(x4) == "convnext"
    assert leading_encoder(dict(reversed(x4.items()))) == "convnext"


def random_encoders(draw):
    """Returns two to four encoders of random kind and size; the first is a ClipVit of two layers."""
    encoders = {}
    for number in range(draw.randint(2, 4)):
        if number == 0 or draw.random() < 0.5:
            patch = draw.choice([4, 7, 8])
            encoders[f"vit{number}"] = ClipVit(
                image_size=patch * draw.randint(1, 6),
                patch_size=patch,
                hidden_size=draw.choice([8, 16]),
                intermediate_size=8,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        else:
            stage = draw.randint(0, 3)
            encoders[f"convnext{number}"] = ConvNext(
                name="convnext_atto",
                image_size=4 * 2**stage * draw.randint(1, 5),
                depths=[1, 1, 1, 1],
                dims=[draw.choice([4, 8])] * 4,
                stage=stage,
            )
    return encoders


def random_mixture(kind, draw):
    encoders = random_encoders(draw)
    common = {"encoders": encoders, "layer_norm": draw.random() < 0.5, "micro_batch": draw.choice([None, 1, 2])}
    if kind is ChannelConcat:
        grid = draw.choice([None, 1, 3, 5])
        fold = {} if grid is None else {name: draw.choice([1, 2, 3]) for name in encoders}
        return kind(grid=grid, fold=fold, **common)
    if kind is SequenceAppend:
        chosen = {name: draw.randint(1, 5) for name in encoders if draw.random() < 0.5}
        return kind(grids=chosen, channels=draw.choice([None, 12]), **common)
    if kind is MixtureAdapter:
        return kind(base="vit0", stages=draw.choice([1, 2]), **common)
    return kind(base=draw.choice(list(encoders)), heads=draw.choice([1, 2, 4]), points=draw.randint(1, 3), **common)


@pytest.mark.parametrize("kind", [ChannelConcat, SequenceAppend, MixtureAdapter, DeformableAttention])
@pytest.mark.parametrize("seed", range(8))
def test_told_geometry_is_that_of_the_output(kind, seed):
    with torch.device("meta"):
        told = describe(random_mixture(kind, random.Random(seed)), tile_size=40)
    mixture = random_mixture(kind, random.Random(seed))
    seen = {}
    for name, encoder in mixture.encoders.items():
        encoder.register_forward_hook(lambda module, inputs, out, name=name: seen.update({name: out.shape[1:]}))
    features = mixture(torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8))
    assert features.shape == (2, told.tokens_per_tile, told.channels)
    assert list(told.encoders) == list(mixture.encoders)
    for name, facts in told.encoders.items():
        if name in seen:  # an adapter's base is run stage by stage
            assert seen[name] == (facts.channels, facts.grid, facts.grid)
        assert facts.flops > 0
        assert facts.resampling == ("none" if facts.grid == facts.fused_grid else facts.resampling)
        assert (facts.resampling == "up") == (facts.grid < facts.fused_grid)
    assert len(seen) >= len(mixture.encoders) - (kind is MixtureAdapter)
    assert told.fusion_flops >= 0


def repaired(error):
    """Returns the overrides that an error proposes."""
    return shlex.split(str(error).partition("the nearest that is possible: ")[2])


def test_every_reason_is_told_at_once_and_the_proposal_is_possible():
    overrides = [
        "+experiment=toy",
        "mixture.encoders.vit.image_size=50",
        "mixture.encoders.convnext.image_size=70",
        "mixture.grid=35",
        "schedule.pretrain.max_length=1000",
    ]
    with pytest.raises(ConfigError) as error:
        meta_model(load_config(overrides))
    for said in (
        "mixture.encoders.vit: ClipVit: 50 px",
        "mixture.encoders.convnext: ConvNext: 70 px",
        "schedule.pretrain: an image takes 1225 tokens, a row has 1000",
        "schedule.sft: an image takes 1225 tokens, a row has 1024",
    ):
        assert said in str(error.value)
    proposal = repaired(error.value)
    assert proposal == [
        "mixture.encoders.vit.image_size=48",
        "mixture.encoders.convnext.image_size=64",
        "mixture.grid=31",
    ]
    assert meta_model(load_config(overrides + proposal)).mixture.tokens_per_tile == 31 * 31


@pytest.mark.slow
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_too_long_for_a_row_is_refused_with_the_longest_that_fits(mixture):
    overrides = ["+experiment=toy", f"mixture={mixture}", "schedule.pretrain.max_length=12"]
    with pytest.raises(ConfigError, match=r"schedule\.pretrain: an image takes (16|32) tokens, a row has 12") as error:
        meta_model(load_config(overrides))
    tokens = meta_model(load_config(overrides + repaired(error.value))).mixture.tokens_per_tile
    assert 8 <= tokens < 12


@pytest.mark.slow
def test_sizes_of_a_mixture_are_repaired_too():
    overrides = ["+experiment=toy", "mixture=toy_mixture_adapter", "mixture.stages=5"]
    with pytest.raises(ConfigError, match="the 2 layers of base 'vit' do not make 5 stages") as error:
        meta_model(load_config(overrides))
    assert repaired(error.value) == ["mixture.stages=2"]
    overrides = ["+experiment=toy", "mixture=toy_deformable_attention", "mixture.heads=3"]
    with pytest.raises(ConfigError, match="3 heads do not divide 64 channels") as error:
        meta_model(load_config(overrides))
    assert repaired(error.value) == ["mixture.heads=2"]


def test_what_no_size_repairs_is_told_without_a_proposal():
    overrides = ["+experiment=toy", "mixture=toy_mixture_adapter", "mixture.base=convnext"]
    with pytest.raises(ConfigError, match=r"convnext.*cannot be fed between its layers") as error:
        meta_model(load_config(overrides))
    assert not repaired(error.value)
    with pytest.raises(ConfigError, match="one of two or more encoders"):
        meta_model(load_config([*overrides, "mixture.base=clip"]))


def test_a_key_that_the_config_lacks_is_proposed_with_a_plus():
    config = composed("+experiment=toy", "mixture=toy_deformable_attention")
    del config["mixture"]["heads"]
    config["mixture"]["encoders"]["vit"]["hidden_size"] = 68  # the default of 8 heads does not divide it
    with pytest.raises(ConfigError, match=r"8 heads do not divide 68 channels") as error:
        meta_model(config)
    assert repaired(error.value) == ["+mixture.heads=4"]


def test_the_check_draws_no_random_numbers():
    config = composed("+experiment=toy")
    torch.manual_seed(3)
    alone = build(config["mixture"])
    torch.manual_seed(3)
    checked = build_model(config).mixture
    for (name, a), b in zip(alone.state_dict().items(), checked.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_an_export_without_stages_is_checked_too():
    config = composed("+experiment=toy")
    del config["schedule"]
    assert meta_model(config).mixture.tokens_per_tile == 16
    config["mixture"]["encoders"]["vit"]["image_size"] = 50
    with pytest.raises(ConfigError, match="50 px"):
        meta_model(config)
