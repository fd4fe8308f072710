"""ZeRO-3 on two ranks gives what plain torch gives, whichever rank has images; and what engines cost and keep."""

import pytest
import torch

from eagle_train.train.load import read_checkpoint_weights
from tests.engine_facts import BF16, COSTS, ENGINES
from tests.runs import must_run
from tests.toys import tiny_model
from tests.zero_ranks import RATES, plain

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Folder of what two ranks did under ZeRO-3."""
    out = tmp_path_factory.mktemp("zero3")
    must_run([str(out)], ranks=2, module="tests.zero_ranks", timeout=500)
    return out


@pytest.fixture(scope="module")
def results(out):
    return torch.load(out / "results.pt", weights_only=True)


@pytest.mark.parametrize("case", RATES)
def test_rows_without_images_on_either_rank_match_plain_torch(results, case):
    norms, weights = plain(case)
    assert results[case]["norms"] == pytest.approx(norms, rel=1e-4)
    assert results[case]["weights"].keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.allclose(results[case]["weights"][name], weight, atol=1e-4), name


@pytest.mark.parametrize("case", [*RATES, "bf16"])
def test_a_resumed_engine_repeats_the_rest_to_the_bit(results, case):
    assert results[case]["resumed"] == results[case]["norms"]
    for name, weight in results[case]["weights"].items():
        assert torch.equal(results[case]["resumed_weights"][name], weight), name


@pytest.mark.parametrize("case", [*RATES, "bf16"])
def test_a_closed_engine_leaves_a_whole_model_of_plain_torch(results, case):
    assert results[case]["left_behind"] == [] and results[case]["containers"] == ["dict"]
    first, second = results[case]["loss_of_both"]
    assert first == second > 0


@pytest.mark.parametrize("case", [*RATES, "bf16"])
def test_merged_shards_are_the_weights_that_were_trained(out, results, case):
    weights = read_checkpoint_weights(out / case / "end")
    expected = results[case]["weights"]
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert weight.dtype == (torch.bfloat16 if case == "bf16" else torch.float32)
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stage", COSTS)
def test_a_frozen_module_costs_no_gradient_no_optimizer_state_and_no_graph(results, engine, stage):
    found = results["facts"]["costs"][f"{engine} {stage}"]
    encoders = ["vit", "convnext"]
    idle = {"projector": ["mixture", *encoders], "llm": ["mixture", "projector", *encoders], "vit": ["convnext"]}[stage]
    assert {part: found["kept"][part] for part in idle} == dict.fromkeys(idle, 0)
    assert found["kept"][stage] > 0  # what is trained does keep something: the hooks see it
    assert found["touched"] == []
    model = tiny_model()
    module = model.mixture.encoders.vit if stage == "vit" else getattr(model, stage)
    trained = sum(p.numel() for p in module.parameters())
    copies = 2 if engine == "plain" else 1  # every rank has all states, or its share
    assert found["moments"] == copies * trained


@pytest.mark.parametrize("way", BF16)
def test_masters_are_float32_move_below_bfloat16_and_reach_the_next_stage(results, way):
    found = results["facts"]["masters"][way]
    assert found["dtypes"] == ["torch.float32"] and found["weights"] == ["torch.bfloat16"]
    assert found["moved"] > 10_000 and found["largest"] < 2e-6  # bfloat16 resolves 4e-6 at 1e-3
    assert found["unmoved_weights"] > 0.2
    assert found["carried"] and found["beyond_bf16"] > 1000


def test_weights_stay_sharded_from_stage_to_stage(results):
    assert results["facts"]["shards"] == {"whole": 3072, "part": 1536, "seen": 0}


@pytest.mark.parametrize("engine", ENGINES)
def test_one_bit_of_a_frozen_weight_on_one_rank_refutes_the_freeze_table(results, engine):
    assert "1 frozen but changed" in results["facts"]["refuted"][engine]
    assert "llm.model.norm.weight" in results["facts"]["refuted"][engine]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_an_engine_that_is_collected_late_takes_nothing_from_the_next(results, engine):
    assert results["facts"]["lost"][engine] == ""
