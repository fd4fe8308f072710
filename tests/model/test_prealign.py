"""Pre-alignment: one encoder sees alone, everything keeps its name."""

import pytest
import torch

from eagle_train.model.prealign import PreAlignment
from eagle_train.model.projector import MlpProjector
from eagle_train.train.optim import freeze
from eagle_train.train.schedule import Stage
from tests.toys import GRID, gradients, tiny_model, tiny_row, tiny_sample, weighted_loss

RATES = {"mixture": None, "mixture.encoders.vit": 1e-3, "projector": None, "llm": None, "aligner": 1e-3}
ROW = tiny_row([tiny_sample(0, tiles=2), tiny_sample(1, tiles=0), tiny_sample(2, tiles=1)])
TRAINED = ("mixture.encoders.vit.", "aligner.")


def aligned(encoder="vit", **changes):
    model = tiny_model()
    for name, value in changes.items():
        setattr(model.mixture, name, value)
    torch.manual_seed(1)
    return model, PreAlignment(model, encoder, MlpProjector)


def test_it_holds_the_whole_model_under_its_names_and_an_aligner():
    whole, model = aligned()
    states = whole.state_dict(), model.state_dict()
    assert states[0].keys() == {name for name in states[1] if not name.startswith("aligner.")}
    assert all(value.data_ptr() == states[1][name].data_ptr() for name, value in states[0].items())
    assert model.aligner.layers[0].in_features == whole.mixture.encoders["vit"].channels


def test_only_the_encoder_and_the_aligner_have_gradients_also_without_images():
    _, model = aligned()
    freeze(model, RATES)
    expected = {name for name, _ in model.named_parameters() if name.startswith(TRAINED)}
    assert len(expected) > 10
    for row, some in ((ROW, True), (tiny_row([tiny_sample(3, tiles=0)]), False)):
        weighted_loss(model, [row]).backward()
        found = gradients(model)
        assert found.keys() == expected
        assert any(bool(gradient.any()) for gradient in found.values()) == some


@pytest.mark.parametrize(("encoder", "other"), [("vit", "convnext"), ("convnext", "vit")])
def test_the_loss_depends_on_that_encoder_alone(encoder, other):
    whole, model = aligned(encoder)
    model.eval()
    before = model(ROW)
    with torch.no_grad():
        for module in (whole.mixture.encoders[other], whole.projector):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
    assert torch.equal(model(ROW), before)
    with torch.no_grad():
        for parameter in whole.mixture.encoders[encoder].parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not torch.equal(model(ROW), before)


def test_rows_stay_the_same_whatever_the_grid_of_the_encoder():
    whole, model = aligned("convnext")
    assert whole.mixture.encoders["convnext"].grid != GRID, "the test needs an encoder that is resampled"
    assert model(ROW).shape == ROW.input_ids.shape


def test_micro_batches_of_tiles_change_nothing():
    _, model = aligned()
    _, pieces = aligned(micro_batch=1)
    assert torch.allclose(model(ROW), pieces(ROW), atol=1e-5)


def test_an_unknown_encoder_and_a_number_of_tokens_that_is_no_square_are_refused():
    with pytest.raises(ValueError, match=r"no encoder 'sam' to align; the mixture has \['vit', 'convnext'\]"):
        aligned("sam")
    with pytest.raises(ValueError, match="ChannelConcat makes 6 tokens per tile, which are no square"):
        aligned(tokens_per_tile=6)


@pytest.mark.parametrize("name", ["projector", "mixture", "mixture.encoders.convnext", "mixture.encoders.vit2"])
def test_a_stage_that_would_train_what_it_does_not_run_is_refused(name):
    with pytest.raises(ValueError, match=rf"align=vit runs .* alone; set \['{name}'\] to null"):
        Stage(recipe="x", learning_rates=RATES | {name: 1e-3}, max_length=8, rows_per_step=1, num_steps=1, align="vit")
