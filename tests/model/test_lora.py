"""Adapters begin as nothing, merge into the weights exactly, and are read by peft."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from eagle_train.model.lora import Lora, MergedWeights, is_adapter, write_adapter
from eagle_train.train.config import build, load_config
from eagle_train.train.optim import freeze, freeze_table
from tests.toys import gradients, tiny_model, tiny_row, tiny_sample, weighted_loss

ADAPTERS = {
    "llm": Lora(rank=4, alpha=8, dropout=0.0, targets=["self_attn.q_proj", "down_proj"]),
    "mixture.encoders.vit": Lora(rank=2, alpha=1, dropout=0.0, targets=["q_proj", "fc1"]),
}
ROW = tiny_row([tiny_sample(1, tiles=1), tiny_sample(2, tiles=0), tiny_sample(3, tiles=2)])


def adapted(*, trained: bool):
    """Returns a model with adapters, random where they are `trained`."""
    model = tiny_model()
    torch.manual_seed(1)
    for name, lora in ADAPTERS.items():
        lora.add_to(name, model.get_submodule(name))
    if trained:
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_adapters_change_nothing_at_first():
    assert torch.equal(adapted(trained=False)(ROW), tiny_model()(ROW))


def test_merged_weights_give_the_losses_of_adapters():
    model, merged = adapted(trained=True).eval(), tiny_model().eval()
    before = merged(ROW)
    merged.load_state_dict(dict(MergedWeights(model.state_dict(), ADAPTERS)))
    torch.testing.assert_close(merged(ROW), model(ROW), atol=1e-5, rtol=1e-5)
    assert (before - merged(ROW)).abs().max() > 0.1


def test_merged_weights_are_those_that_peft_merges():
    model = adapted(trained=True)
    found = dict(MergedWeights(model.state_dict(), ADAPTERS))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    assert len(layers) == 2 * 2 + 2  # two layers of the LLM, one of the encoder
    for name, layer in layers.items():
        layer.merge()
        torch.testing.assert_close(found[f"{name}.weight"], layer.base_layer.weight, atol=1e-6, rtol=1e-6)


def test_weights_are_merged_in_float32_and_keep_their_dtype():
    weights = adapted(trained=True).bfloat16().state_dict()
    found = dict(MergedWeights(weights, ADAPTERS))
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    layer = "llm.model.layers.0.mlp.down_proj"
    exact = weights[f"{layer}.base_layer.weight"].float() + 2.0 * (
        weights[f"{layer}.lora_B.default.weight"].float() @ weights[f"{layer}.lora_A.default.weight"].float()
    )
    assert torch.equal(found[f"{layer}.weight"], exact.bfloat16())


def test_weights_without_adapters_are_left_as_they_are():
    weights = tiny_model().state_dict()
    found = dict(MergedWeights(weights, {}))
    assert found.keys() == weights.keys() and all(found[name] is weights[name] for name in weights)


def test_only_adapters_of_an_adapted_module_are_trained():
    model = adapted(trained=True)
    rates = {"mixture": 1e-3, "projector": 1e-3, "llm": 2e-3}
    freeze(model, rates, ADAPTERS)
    weighted_loss(model, [ROW]).backward()
    expected = {name for name, _ in model.named_parameters() if is_adapter(name)}
    expected |= {n for n, _ in model.named_parameters() if n.startswith(("projector", "mixture.encoders.convnext"))}
    expected |= {n for n, _ in model.named_parameters() if n.startswith("mixture.") and "encoders" not in n}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected
    found = gradients(model)
    assert found.keys() == expected and all(found[name].any() for name in expected if is_adapter(name))


def test_a_rate_of_weights_below_adapters_is_refused():
    rates = {"mixture": None, "projector": 1e-3, "llm": 2e-3, "llm.model.norm": 1e-5}
    with pytest.raises(ValueError, match=r"gives \['llm.model.norm'\] a rate, and lora freezes what they match"):
        freeze(adapted(trained=False), rates, ADAPTERS)
    freeze(adapted(trained=False), rates | {"llm.model.norm": None}, ADAPTERS)


def test_the_freeze_table_shows_adapters():
    model = adapted(trained=False)
    rates = {"mixture": None, "projector": 1e-3, "llm": 2e-3}
    rows = {row.module: row for row in freeze_table(model, rates, ADAPTERS)}
    assert rows["llm"].trainable == 0 and rows["llm"].learning_rate is None
    shapes = (32 + 32, 48 + 32)  # inputs and outputs of q_proj and down_proj
    assert rows["llm (lora)"].trainable == rows["llm (lora)"].total == 2 * 4 * sum(shapes)
    assert rows["llm (lora)"].learning_rate == 2e-3
    assert rows["mixture.encoders.vit (lora)"].trainable == 0  # its learning rate is null
    assert sum(row.total for row in rows.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing` is deprecated")
def test_peft_reads_the_adapter_folder(tmp_path):
    model = adapted(trained=True)
    write_adapter(tmp_path / "adapter", "llm", ADAPTERS["llm"], model.state_dict(), "some/llm")

    def llm(weights):
        made = type(model.llm)(model.llm.config)
        made.load_state_dict({n.removeprefix("llm."): t for n, t in weights.items() if n.startswith("llm.")})
        return made.eval()

    ids = torch.randint(0, 64, (1, 9))
    plain = llm(tiny_model().state_dict())
    before = plain(ids).logits
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    merged = llm(dict(MergedWeights(model.state_dict(), ADAPTERS)))
    torch.testing.assert_close(theirs(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
    assert (theirs(ids).logits - before).abs().max() > 0.1
    assert theirs.peft_config["default"].base_model_name_or_path == "some/llm"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "query"], r"no layer of llm is called 'query'; its linear layers are \['down_proj', .*'q_proj'"),
        (["lm_head"], "llm.lm_head is no linear layer; leave 'lm_head' out of lora.llm.targets"),
        (["input_layernorm"], "is no linear layer"),
    ],
)
def test_a_target_that_cannot_have_an_adapter_is_refused(targets, said):
    with pytest.raises(ValueError, match=said):
        Lora(rank=2, alpha=2, dropout=0.0, targets=targets).add_to("llm", tiny_model().llm)


@pytest.mark.parametrize(
    ("name", "rank", "alpha", "dropout", "layers"), [("internvl2", 16, 32, 0.05, 7), ("qwen", 64, 128, 0.05, 4)]
)
def test_published_adapters(name, rank, alpha, dropout, layers):
    found = build(load_config(["+experiment=toy", f"lora={name}"])["lora"])
    assert list(found) == ["llm"]
    lora = found["llm"]
    assert (lora.rank, lora.alpha, lora.dropout, len(lora.targets)) == (rank, alpha, dropout, layers)
    model = tiny_model()
    lora.add_to("llm", model.llm)
    assert sum(is_adapter(n) for n, _ in model.named_parameters()) == 2 * layers * model.llm.config.num_hidden_layers
