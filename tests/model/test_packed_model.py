"""Packed rows give what single samples give: losses, gradients, isolation, placeholder, checkpointing."""

import pytest
import torch

from eagle_train.model.loss import ChunkedCrossEntropy
from eagle_train.types import IGNORE_INDEX
from tests.toys import gradients, grown, tiny_model, tiny_row, tiny_sample, weighted_loss

SAMPLES = [
    tiny_sample(1, tiles=1),
    tiny_sample(2, tiles=0, text=20),
    tiny_sample(3, tiles=2),
    tiny_sample(4, tiles=1, text=7),
]


def test_packed_loss_and_gradients_equal_unpacked():
    model = tiny_model()
    packed = weighted_loss(model, [tiny_row(SAMPLES)])
    packed.backward()
    packed_gradients = gradients(model)
    single = weighted_loss(model, [tiny_row([sample]) for sample in SAMPLES])
    single.backward()
    single_gradients = gradients(model)
    assert torch.allclose(packed, single, atol=1e-5)
    assert packed_gradients.keys() == single_gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in packed_gradients.items():
        assert torch.allclose(gradient, single_gradients[name], atol=1e-5), name
        assert gradient.abs().max() > 0 or "class_embedding" in name or "k_proj.bias" in name, name


def test_each_sample_of_a_row_has_the_losses_it_has_alone():
    model = tiny_model().eval()
    row = tiny_row(SAMPLES)
    losses = model(row)
    for i, sample in enumerate(SAMPLES):
        begin, end = row.cu_seqlens[i], row.cu_seqlens[i + 1]
        alone = model(tiny_row([sample]))
        assert (alone > 0).sum() == (sample.labels != IGNORE_INDEX).sum() > 0
        assert torch.allclose(losses[begin:end], alone, atol=1e-5), f"sample {i} leaks"


@pytest.mark.parametrize("training", [True, False])
def test_a_change_in_one_sample_leaves_the_others_alone(training):
    model = tiny_model().train(training)
    row = tiny_row(SAMPLES)
    first = grown(SAMPLES[0], input_ids=SAMPLES[0].input_ids.flip(0), pixels=255 - SAMPLES[0].pixels)
    changed = tiny_row([first, *SAMPLES[1:]])
    border = row.cu_seqlens[1]
    before, after = model(row), model(changed)
    assert not torch.equal(before[:border], after[:border])
    assert torch.equal(before[border:], after[border:])


def test_a_row_without_images_still_runs_encoders_and_gives_them_zero_gradient():
    model = tiny_model()
    weighted_loss(model, [tiny_row([SAMPLES[1]])]).backward()
    found = gradients(model)
    vision = {n: g for n, g in found.items() if n.startswith(("mixture", "projector"))}
    assert vision.keys() == {n for n, _ in model.named_parameters() if n.startswith(("mixture", "projector"))}
    assert all((g == 0).all() for g in vision.values())


def test_an_empty_row_gives_zero_loss_and_zero_gradient_everywhere():
    model = tiny_model()
    model(tiny_row([])).sum().backward()
    found = gradients(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all((g == 0).all() for g in found.values())


def test_a_wrong_number_of_image_positions_is_refused_with_both_numbers():
    bad = grown(SAMPLES[0], image_positions=SAMPLES[0].image_positions[:-1])
    with pytest.raises(ValueError, match="3 image positions but 4 visual tokens"):
        tiny_model()(tiny_row([bad]))


def test_activation_checkpointing_changes_nothing():
    plain, saving = tiny_model().train(), tiny_model().train()
    saving.set_activation_checkpointing()
    row = tiny_row(SAMPLES)
    results = []
    for model in (plain, saving):
        loss = weighted_loss(model, [row])
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], atol=1e-6), name


def test_chunks_of_the_loss_change_nothing():
    one, many = tiny_model(), tiny_model()
    one.llm.lm_head.token_losses, many.llm.lm_head.token_losses = ChunkedCrossEntropy(1000), ChunkedCrossEntropy(3)
    row = tiny_row(SAMPLES)
    assert torch.allclose(one(row), many(row), atol=1e-6)


def test_frozen_encoders_keep_no_graph():
    model = tiny_model()
    model.mixture.encoders["vit"].requires_grad_(False)
    features = []
    model.mixture.encoders["vit"].register_forward_hook(lambda m, i, out: features.append(out))
    model(tiny_row(SAMPLES)).sum().backward()
    assert not features[0].requires_grad
    assert model.mixture.encoders["convnext"].stem[0].weight.grad is not None


@pytest.mark.parametrize("recompute", [True, False])
def test_an_encoder_may_refuse_recomputation(recompute):
    model = tiny_model()
    vit, convnext = model.mixture.encoders["vit"], model.mixture.encoders["convnext"]
    vit.recompute = recompute
    model.set_activation_checkpointing()
    calls = {"vit": 0, "convnext": 0}

    def count(name):
        def hook(module, inputs, output):
            calls[name] += 1

        return hook

    vit.layers[0].layer_norm1.register_forward_hook(count("vit"))
    convnext.stages[0].blocks[0].conv_dw.register_forward_hook(count("convnext"))
    model(tiny_row(SAMPLES)).sum().backward()
    assert calls == {"vit": 2 if recompute else 1, "convnext": 2}
