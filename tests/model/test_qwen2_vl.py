"""Qwen2-VL against transformers' own class, and packed rows against single samples."""

import pytest
import torch
from torch.nn import functional as F

from eagle_train.model.generate import Prompt, generate
from eagle_train.model.memory import GpuKernels
from eagle_train.types import IGNORE_INDEX
from tests.qwen2_vl import IMAGE, VIDEO, logits_of, reference, row, sample, their_inputs, tiny_qwen2_vl
from tests.toys import gradients, weighted_loss

CASES = {
    "text": sample(1, 14),
    "image": sample(2, 3, (IMAGE, (1, 2, 3)), 6),
    "images": sample(3, 2, (IMAGE, (1, 1, 1)), 1, (IMAGE, (1, 3, 2)), (IMAGE, (1, 1, 4)), 7),
    "video": sample(4, 2, (VIDEO, (2, 2, 3)), 5),
    "mixed": sample(5, (IMAGE, (1, 2, 2)), 3, (VIDEO, (2, 1, 3)), (IMAGE, (1, 3, 1)), 6),
    "long video": sample(6, 2, (VIDEO, (7, 2, 2)), 2, (IMAGE, (1, 2, 1)), 5),
}
SAMPLES = [CASES[name] for name in ("mixed", "text", "long video", "images", "video")]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(case):
    model = tiny_qwen2_vl().eval()
    given, batch = their_inputs(model, CASES[case]), row([CASES[case]])
    if case == "long video":  # its own ids overlap behind a video of more steps than rows and columns
        given["position_ids"] = batch.position_ids[:, None]
    theirs = reference(model)(**given, use_cache=False).logits[0]
    assert theirs.std() > 0.5
    torch.testing.assert_close(logits_of(model, batch), theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_of_transformers_differ_for_long_videos_alone():
    theirs = reference(tiny_qwen2_vl()).model
    for case, one in CASES.items():
        given = their_inputs(tiny_qwen2_vl(), one)
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        if not one.grids:
            continue
        ids, _ = theirs.get_rope_index(**{key: given.get(key) for key in keys})
        assert torch.equal(ids[:, 0], row([one]).position_ids[1:]) == (case != "long video"), case


def test_a_packed_row_gives_the_logits_and_gradients_of_its_samples():
    model = tiny_qwen2_vl()
    packed = row(SAMPLES)
    together = logits_of(model, packed).detach()
    for place, one in enumerate(SAMPLES):
        begin, end = packed.cu_seqlens[place], packed.cu_seqlens[place + 1]
        torch.testing.assert_close(together[begin:end], logits_of(model, row([one])).detach(), atol=1e-5, rtol=0)
    weighted_loss(model, [packed]).backward()
    found = gradients(model)
    weighted_loss(model, [row([one]) for one in SAMPLES]).backward()
    alone = gradients(model)
    assert found.keys() == alone.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-5, rtol=0, msg=name)
        assert gradient.abs().max() > 0 or name.endswith("k_proj.bias"), name


def test_gradients_are_those_of_transformers():
    model = tiny_qwen2_vl()
    theirs, one = reference(model), CASES["mixed"]
    weighted_loss(model, [row([one])]).backward()
    logits = theirs(**their_inputs(model, one), use_cache=False).logits[0]
    losses = F.cross_entropy(logits, one.labels, reduction="none", ignore_index=IGNORE_INDEX)
    ((losses * one.loss_weights).sum() / one.loss_weights.sum()).backward()
    for ours, wanted in [
        (model.mixture.encoder.patch_embed, theirs.model.visual.patch_embed.proj),
        (model.projector.layers[2], theirs.model.visual.merger.mlp[2]),
        (model.llm.lm_head, theirs.lm_head),
    ]:
        torch.testing.assert_close(ours.weight.grad, wanted.weight.grad, atol=1e-5, rtol=1e-4)


def test_recomputed_activations_change_nothing():
    plain, saving = tiny_qwen2_vl().train(), tiny_qwen2_vl().train()
    saving.set_activation_checkpointing()
    found = []
    for model in (plain, saving):
        weighted_loss(model, [row(SAMPLES)]).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("samples", [[], [CASES["text"]]], ids=["empty", "text"])
def test_a_row_without_pictures_runs_the_encoder_and_gives_it_zero_gradient(samples):
    model, batch = tiny_qwen2_vl(), row(samples)
    assert batch.position_ids.shape[0] == 4 and batch.grids == ((1, 1, 1),) and batch.num_images == 0
    model(batch).sum().backward()
    found = gradients(model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    vision = [gradient for name, gradient in found.items() if not name.startswith("llm.")]
    assert vision and all((gradient == 0).all() for gradient in vision)


def test_a_frozen_encoder_keeps_no_graph():
    model = tiny_qwen2_vl().train()
    model.mixture.encoder.requires_grad_(False)
    assert not model.mixture(CASES["image"].pixels, CASES["image"].grids).requires_grad
    assert not model.mixture.encoder.training


def test_wrong_numbers_are_refused():
    model, one = tiny_qwen2_vl(), CASES["image"]
    with pytest.raises(ValueError, match=r"have 4 tiles, there are 6"):
        model.mixture(one.pixels, [(1, 2, 2)])
    with pytest.raises(ValueError, match="5 image positions but 6 visual tokens"):
        model.embed(one.input_ids, one.image_positions[:-1], one.pixels, one.grids)


@torch.no_grad()
def test_answers_are_those_of_transformers_whatever_shares_their_batch():
    model = tiny_qwen2_vl().eval()
    asked = [CASES[name] for name in ("images", "text", "long video", "mixed")]
    prompts = [
        Prompt(one.input_ids.tolist(), one.image_positions.tolist(), one.pixels, row([one]).position_ids, one.grids)
        for one in asked
    ]
    told = {"max_new_tokens": 5, "stop_ids": [0], "pad_id": 0}
    together = generate(model, prompts, **told)
    theirs = reference(model)
    for one, prompt, found in zip(asked, prompts, together, strict=True):
        assert generate(model, [prompt], **told) == [found]
        inputs = their_inputs(model, one)
        length, positions = inputs["input_ids"].shape[1], prompt.position_ids
        ids = inputs.pop("input_ids")
        for _ in range(5):  # without a cache, and with our position ids
            grown = torch.cat([positions, positions[:, -1:] + 1 + torch.arange(ids.shape[1] - length)], dim=1)
            logits = theirs(input_ids=ids, position_ids=grown[:, None], use_cache=False, **pixels_of(inputs)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        said = ids[0, length:].tolist()
        assert found == (said[: said.index(0)] if 0 in said else said)


def pixels_of(inputs):
    """Returns the inputs that hold pictures."""
    return {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}


def test_a_model_on_the_meta_device_runs_a_row():
    with torch.device("meta"):
        model = tiny_qwen2_vl()
    batch = row(SAMPLES).to(torch.device("meta"))
    with GpuKernels():
        embeddings = model.embed(batch.input_ids, batch.image_positions, batch.pixels, batch.grids)
    assert embeddings.is_meta and embeddings.shape == (len(batch.input_ids), 32)
