"""ZeRO-3 on two ranks gives what plain torch gives, whichever rank has images."""

import pytest
import torch

from eagle_train.train.load import read_checkpoint_weights
from tests.runs import must_run
from tests.zero_ranks import RATES, plain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Folder of what two ranks did under ZeRO-3."""
    out = tmp_path_factory.mktemp("zero3")
    must_run([str(out)], ranks=2, module="tests.zero_ranks")
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
