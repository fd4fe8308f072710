"""Construction without values: what is settled is what the initializers wrote down."""

from pathlib import Path

import pytest
import torch
from torch import nn

from eagle_train.train.deferred import DeferredInit
from eagle_train.train.load import load_weights
from eagle_train.train.placement import Construction, WholeWeights
from tests.toys import tiny_model

HERE = WholeWeights(torch.device("cpu"), torch.float32)


def settled(build, order=1, min_elements=0):
    torch.manual_seed(0)
    with DeferredInit(min_elements) as deferred:
        module = build()
    for tensor in list(module.parameters())[::order]:
        deferred.settle(tensor)
    return module.state_dict()


def some_layers():
    """Initializers of every kind that encoders and LLMs use."""
    layers = nn.ModuleList([nn.Linear(40, 50), nn.Embedding(9, 8, padding_idx=2), nn.Conv2d(3, 6, 5), nn.LayerNorm(7)])
    nn.init.trunc_normal_(layers[0].weight, std=0.5, a=-1, b=1)
    nn.init.xavier_uniform_(layers[2].weight)
    with torch.no_grad():
        layers[0].weight[3].fill_(2.0)
    return layers


def test_values_do_not_depend_on_the_order_in_which_they_are_settled():
    forth, back = settled(some_layers), settled(some_layers, order=-1)
    for name, value in forth.items():
        assert torch.equal(value, back[name]), name


def test_values_are_those_that_the_initializers_give():
    found = settled(some_layers)
    torch.manual_seed(0)
    plain = some_layers().state_dict()
    assert (found["0.weight"][3] == 2.0).all() and found["0.weight"][:3].abs().max() <= 1.0
    assert found["0.weight"][4:].std() == pytest.approx(float(plain["0.weight"][4:].std()), rel=0.1)
    assert (found["1.weight"][2] == 0).all() and found["1.weight"].std() > 0.5
    assert found["2.weight"].abs().max() == pytest.approx(float(plain["2.weight"].abs().max()), rel=0.05)
    assert torch.equal(found["3.weight"], torch.ones(7)) and torch.equal(found["3.bias"], torch.zeros(7))
    assert found["0.bias"].abs().max() <= 40**-0.5 + 1e-6


def test_small_tensors_are_made_at_once_as_without_it():
    found = settled(some_layers, min_elements=1 << 20)
    torch.manual_seed(0)
    for name, value in some_layers().state_dict().items():
        assert torch.equal(found[name], value), name


def test_what_reads_a_deferred_tensor_finds_its_values():
    with DeferredInit(0):
        layer = nn.Linear(30, 20)
        copies = [
            layer.weight.detach().clone(),
            torch.cat([layer.weight, layer.weight])[:20].detach(),
            layer.weight + 0,
        ]
    assert layer.weight.std() > 0.05
    assert all(torch.equal(copy, layer.weight) for copy in copies)


def test_deferred_tensors_take_no_memory():
    def own_mib():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    before = own_mib()
    with DeferredInit() as deferred:
        layer = nn.Linear(8192, 4096, bias=False)  # 128 MiB
    assert own_mib() - before < 8
    deferred.settle(layer.weight)
    assert own_mib() - before > 120


def test_a_construction_draws_nothing_for_what_is_loaded_and_ties_stay():
    expected = tiny_model(1).state_dict()
    construction = Construction(tiny_model, HERE, min_elements=0)
    load_weights(construction.model, expected, put=construction.put)
    assert not {id(p) for p in construction.model.parameters()} - construction.placed
    for name, value in construction.finish().state_dict().items():
        assert torch.equal(value, expected[name]), name

    def tied():
        first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        second.weight = first.weight
        return nn.Sequential(first, second)

    model = Construction(tied, HERE, min_elements=0).finish()
    assert model[0].weight is model[1].weight and model[0].weight.std() > 0.1


def test_a_model_for_a_checkpoint_starts_from_zeros():
    model = Construction(tiny_model, HERE, min_elements=0).finish(initial=False)
    assert all((parameter == 0).all() for parameter in model.parameters())


def test_whole_weights_change_dtype_but_buffers_do_not():
    placement = WholeWeights(torch.device("cpu"), torch.bfloat16)
    model = Construction(tiny_model, placement, min_elements=0).finish()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.llm.model.rotary_emb.inv_freq.dtype == torch.float32
