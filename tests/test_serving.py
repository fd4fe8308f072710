"""A model that is too large for one rank answers all the same, and as plain torch does."""

import pytest
import torch

from eagle_train.train.zero.serving import units_of
from tests import serving_ranks
from tests.runs import run_ranks


def test_the_parts_of_an_llm_that_are_gathered_are_all_of_it_and_do_not_overlap():
    llm = serving_ranks.make().llm
    units = units_of(llm)
    parts = [parameter for unit in units for parameter in unit.parameters()]
    assert {id(parameter) for parameter in parts} == {id(parameter) for parameter in llm.parameters()}
    assert len(parts) == len(set(parts)) and len(units) == serving_ranks.LAYERS + 3


@pytest.mark.slow
def test_sharded_weights_give_plain_torchs_answers_and_no_rank_ever_holds_the_model(tmp_path):
    for code, output in run_ranks([str(tmp_path)], ranks=2, module="tests.serving_ranks"):
        assert code == 0, output[-3000:]
    model = serving_ranks.make()
    batches = range(len(serving_ranks.BATCHES))
    expected = [[serving_ranks.said(model, batch, rank) for batch in batches] for rank in range(2)]
    lengths = {len(text.split()) for of_rank in expected for of_batch in of_rank for text in of_batch}
    assert len(lengths) > 1  # so that a rank that is done goes on with the other
    total = sum(parameter.numel() for parameter in model.parameters())
    largest = max(sum(p.numel() for p in layer.parameters()) for layer in model.llm.model.layers)
    seen = [model.mixture, model.projector, model.llm.get_input_embeddings()]
    before = sum(parameter.numel() for module in seen for parameter in module.parameters())
    assert max(largest, before) < total / 3
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["answers"] == expected[rank] and found["answers"][-1] == ([] if rank else expected[0][-1])
        assert found["held"] == max(largest, before) and found["left"] == 0
