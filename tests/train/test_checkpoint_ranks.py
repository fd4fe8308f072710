"""A checkpoint of any engine on any number of ranks goes on with any other, as if there had been no interruption."""

import pytest
import torch

from tests.checkpoint_ranks import SAVED
from tests.runs import must_run

pytestmark = pytest.mark.slow

BF16 = ("zero1-bf16", "zero2-bf16", "zero3-bf16")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Folder of what engines did on two ranks, then one, then three, then two again."""
    out = tmp_path_factory.mktemp("ranks")

    def ranks(number, *tasks):
        must_run([str(out), *tasks], ranks=number, module="tests.checkpoint_ranks")

    bf16 = ",".join(BF16)
    ranks(2, f"save:plain,zero2,zero3,{bf16}", "fail:zero3")
    ranks(1, "load:plain,zero2,zero3", "save:plain,zero2,zero3")
    ranks(2, f"load:zero2,zero3,{bf16}")
    ranks(3, "load:zero2,zero3")
    return out


@pytest.fixture(scope="module")
def found(out):
    """The undisturbed run on one rank, and by (writer, its ranks, reader, its ranks), the one that wrote and the next."""
    saved = {ranks: torch.load(out / f"save-{ranks}.pt", weights_only=True) for ranks in (1, 2)}
    runs = {}
    for ranks in (1, 2, 3):
        for (folder, reader), resumed in torch.load(out / f"load-{ranks}.pt", weights_only=True).items():
            writer, _, of_ranks = folder.rpartition("-")
            runs[writer, int(of_ranks), reader, ranks] = (saved[int(of_ranks)][writer], resumed)
    return saved[1]["plain"], runs


def test_the_wanted_roads_were_taken(found):
    roads = set(found[1])
    for road in [
        ("zero3", 2, "zero3", 1),
        ("zero2", 1, "zero2", 2),
        ("zero3", 1, "zero3", 2),
        ("zero3", 2, "zero3", 3),
        ("zero2", 2, "zero2", 3),
        ("zero2", 2, "zero3", 2),
        ("zero3", 2, "zero2", 2),
        ("plain", 1, "zero2", 2),
        ("zero3", 2, "plain", 1),
        *((name, 2, name, 2) for name in BF16),
    ]:
        assert road in roads


def test_resumed_losses_are_those_of_the_undisturbed_run(found):
    plain, runs = found
    for road, (_, resumed) in runs.items():
        if "bf16" not in road[0]:
            assert resumed["losses"] == pytest.approx(plain["losses"][SAVED:], abs=2e-6), road


def test_resumed_weights_are_those_of_the_run_that_wrote_the_checkpoint(found):
    for road, (writer, resumed) in found[1].items():
        assert resumed["losses"] == pytest.approx(writer["losses"][SAVED:], abs=1e-6), road
        for name, weight in writer["weights"].items():
            assert torch.allclose(resumed["weights"][name], weight, atol=1e-6, rtol=0), (road, name)


def test_the_same_engine_on_as_many_ranks_goes_on_to_the_bit(found):
    roads = [road for road in found[1] if road[:2] == road[2:]]
    assert len(roads) == 3 + 2 + len(BF16)
    for road in roads:
        writer, resumed = found[1][road]
        assert resumed["losses"] == writer["losses"][SAVED:], road
        assert all(torch.equal(resumed["weights"][name], weight) for name, weight in writer["weights"].items()), road


def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks_and_the_next_is_whole(out):
    found = torch.load(out / "fail-2.pt", weights_only=True)
    for first, second, third in found["troubles"]:
        assert first is None and third is None
        assert second.startswith("rank 1: ") and "File too large" in second


def test_damage_in_one_rank_s_file_is_seen_by_all(out):
    found = torch.load(out / "fail-2.pt", weights_only=True)
    assert found["steps"] == [["step-00000003", "step-00000001"]] * 2
