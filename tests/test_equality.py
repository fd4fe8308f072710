"""The same run in float32 gives the same losses on every engine and any number of ranks, within 1e-6."""

import pytest
import torch

from tests.equality_ranks import STAGES, WAYS, run
from tests.runs import must_run

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def expected():
    """Plain torch on one rank."""
    return run("plain")


# Every way on two ranks; on other numbers those that differ most, to save time. All have been compared once.
FEW = ["plain", "zero2", "zero3", "zero3 all on host, recomputed"]


@pytest.mark.parametrize(("ranks", "ways"), [(1, FEW), (2, list(WAYS)), (3, FEW), (4, FEW)])
def test_losses_gradients_and_weights_are_those_of_plain_torch_on_one_rank(expected, tmp_path, ranks, ways):
    must_run([str(tmp_path), *ways], ranks=ranks, module="tests.equality_ranks", timeout=500)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert list(results) == ways
    assert len(expected["losses"]) == sum(stage.num_steps for stage in STAGES.values())
    assert min(expected["losses"]) > 4  # losses of the usual size
    assert expected["proofs"][0] == "72 frozen tensors unchanged, 4 trained ones with finite gradients"
    for way, found in results.items():
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6), way
        # Adam and clipping hide a wrong scale of the gradient from the losses.
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5), way
        for name, weight in expected["weights"].items():
            assert torch.allclose(found["weights"][name], weight, atol=1e-5), (way, name)
        assert found["proofs"] == expected["proofs"], way
