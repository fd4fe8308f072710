"""A checkpoint of any engine on any number of ranks goes on with any other, as if there had been no interruption."""

import pytest
import torch

from tests.checkpoint_ranks import SAVED
from tests.runs import must_run

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROADS = {
    1: ("zero3-2>plain", "zero3-2>zero3", "zero2-2>zero2"),
    2: (
        "zero2-2>zero2",
        "zero3-2>zero3",
        "zero1-bf16-2>zero1-bf16",
        "zero3-bf16-2>zero3-bf16",
        "zero2-2>zero3",
        "zero3-2>zero2",
        "plain-2>zero2",
        "zero2-1>zero2",
        "zero3-1>zero3",
        "plain-1>zero3",
    ),
    3: ("zero3-2>zero3", "zero2-2>zero2"),
}
"""By the number of ranks that go on: who wrote, on how many, and who goes on."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Folder of what engines did on two ranks, then one, then three, then two again."""
    out = tmp_path_factory.mktemp("ranks")

    def ranks(number, *tasks):
        must_run([str(out), *tasks], ranks=number, module="tests.checkpoint_ranks")

    ranks(2, "save:plain,zero2,zero3,zero1-bf16,zero3-bf16", "fail:zero3")
    ranks(1, f"load:{','.join(ROADS[1])}", "save:plain,zero2,zero3")
    ranks(2, f"load:{','.join(ROADS[2])}")
    ranks(3, f"load:{','.join(ROADS[3])}")
    return out


@pytest.fixture(scope="module")
def found(out):
    """By (number of ranks, road), the undisturbed run that wrote the checkpoint, and the one that went on."""
    saved = {ranks: torch.load(out / f"save-{ranks}.pt", weights_only=True) for ranks in (1, 2)}
    resumed = {ranks: torch.load(out / f"load-{ranks}.pt", weights_only=True) for ranks in ROADS}
    runs = {}
    for ranks, roads in ROADS.items():
        for road in roads:
            writer, _, of_ranks = road.partition(">")[0].rpartition("-")
            runs[ranks, road] = (saved[int(of_ranks)][writer], resumed[ranks][road])
    return runs


def test_a_run_on_other_ranks_or_another_engine_goes_on_as_the_undisturbed_one(found):
    for road, (undisturbed, resumed) in found.items():
        assert resumed["losses"] == pytest.approx(undisturbed["losses"][SAVED:], abs=1e-6), road
        for name, weight in undisturbed["weights"].items():
            assert torch.allclose(resumed["weights"][name], weight, atol=1e-6, rtol=0), (road, name)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero1-bf16", "zero3-bf16"])
def test_the_same_engine_on_as_many_ranks_goes_on_to_the_bit(found, engine):
    undisturbed, resumed = found[2, f"{engine}-2>{engine}"]
    assert resumed["losses"] == undisturbed["losses"][SAVED:]
    assert all(torch.equal(resumed["weights"][name], weight) for name, weight in undisturbed["weights"].items())


def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks_and_the_next_is_whole(out):
    found = torch.load(out / "fail-2.pt", weights_only=True)
    for first, second, third in found["troubles"]:
        assert first is None and third is None
        assert second.startswith("rank 1: ") and "File too large" in second


def test_damage_in_one_rank_s_file_is_seen_by_all(out):
    found = torch.load(out / "fail-2.pt", weights_only=True)
    assert found["steps"] == [["step-00000003", "step-00000001"]] * 2
