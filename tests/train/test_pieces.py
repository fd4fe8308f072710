"""Pieces of tensors written by some ranks, read by others, copied in host memory, and exported one at a time."""

import weakref
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from eagle_train.model.checkpoints.files import read_weights, write_weights
from eagle_train.train.engine import PlainEngine
from eagle_train.train.host_memory import KEPT_FREE, HostCopy, free_bytes, room_for
from eagle_train.train.optim import freeze
from eagle_train.train.pieces import CheckpointWeights, Piece, PieceReader, Whole, write_pieces
from eagle_train.train.schedule import Stage
from eagle_train.train.tensor_file import Entry, hash_of_file, write_tensors
from tests.toys import tiny_model

WHOLE = Whole((4, 25), torch.float32, trained=True)
VALUES = torch.arange(100.0)


def pieces_of_ranks(folder, monkeypatch, cuts=(0, 37, 38, 100)):
    """Writes 0, 1, ..., 99 in pieces, each by a rank of its own."""
    ranks = len(cuts) - 1
    monkeypatch.setattr("eagle_train.dist.world_size", lambda: ranks)
    for rank, (start, end) in enumerate(pairwise(cuts)):
        monkeypatch.setattr("eagle_train.dist.rank", lambda rank=rank: rank)
        write_pieces(folder, [Piece("a.b", "weight", start, VALUES[start:end], WHOLE, 3.0)])


@pytest.mark.parametrize(("start", "count"), [(0, 100), (0, 37), (36, 3), (37, 1), (50, 0), (99, 1)])
def test_any_elements_are_read_whatever_cut_them(tmp_path, monkeypatch, start, count):
    pieces_of_ranks(tmp_path, monkeypatch)
    reader = PieceReader(tmp_path)
    assert torch.equal(reader.read("a.b", "weight", start, count), VALUES[start : start + count])
    assert reader.wholes == {"a.b": WHOLE} and reader.steps == {"a.b": 3.0}


def test_elements_that_nobody_wrote_are_an_error(tmp_path, monkeypatch):
    pieces_of_ranks(tmp_path, monkeypatch, cuts=(0, 40, 90))
    with pytest.raises(ValueError, match=r"lacks elements 90 to 100 of weight of a\.b"):
        PieceReader(tmp_path).read("a.b", "weight")


def test_a_missing_rank_is_an_error(tmp_path, monkeypatch):
    pieces_of_ranks(tmp_path, monkeypatch)
    (tmp_path / "state-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="the state of 2 ranks instead of 3"):
        PieceReader(tmp_path)


def test_masters_are_rounded_to_what_the_model_computed_with(tmp_path):
    values = torch.randn(6)
    write_pieces(tmp_path, [Piece("w", "weight", 0, values, Whole((2, 3), torch.bfloat16, trained=True), 1.0)])
    assert torch.equal(CheckpointWeights(PieceReader(tmp_path))["w"], values.bfloat16().view(2, 3))


def test_files_are_those_of_the_safetensors_library(tmp_path):
    tensors = {
        "half": torch.randn(3).bfloat16(),  # 6 bytes: what follows must be aligned all the same
        "flags": torch.tensor([True, False, True]),
        "wide": torch.randn(2, 2, dtype=torch.float64),
        "nothing": torch.zeros(0, 4),
        "scalar": torch.tensor(7),
        "strided": torch.randn(4, 3).T,
    }
    entries = [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    written = write_tensors(tmp_path / "x.safetensors", entries, {"note": "n"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert written.size == (tmp_path / "x.safetensors").stat().st_size
    assert written.sha256 == hash_of_file(tmp_path / "x.safetensors", chunk=7)


def make(frozen=None):
    model = tiny_model()
    stage = Stage(
        recipe="x",
        learning_rates={"mixture": frozen, "projector": 1e-2, "llm": 1e-2},
        max_length=64,
        rows_per_step=1,
        num_steps=1,
    )
    freeze(model, stage.learning_rates)
    return PlainEngine(model, stage, 1)


def test_what_does_not_fit_the_model_or_the_stage_is_named(tmp_path):
    engine = make()
    engine.save(tmp_path)
    engine.load(tmp_path)
    with pytest.raises(ValueError, match=r"\d+ trained there and frozen here, or the reverse: mixture"):
        make(frozen=None if engine.stage.learning_rates["mixture"] else 1e-2).load(tmp_path)
    other = make()
    other.model.projector = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing in it: projector\.weight.* unknown to the model: projector\.layers"):
        other.load(tmp_path)
    other = make()
    other.model.llm.model.norm.weight = torch.nn.Parameter(torch.ones(3), requires_grad=True)
    with pytest.raises(ValueError, match=r"of another shape: llm\.model\.norm\.weight \(32,\) instead of \(3,\)"):
        other.load(tmp_path)


def test_copies_in_host_memory_are_cut_at_blocks_and_hold_everything(tmp_path):
    tensors = {"a": torch.randn(100), "b": torch.randn(33).bfloat16(), "c": torch.randint(0, 9, (41,))}
    pieces = [Piece(n, "weight", 0, t, Whole((len(t),), t.dtype, trained=False)) for n, t in tensors.items()]
    copy = HostCopy(block=64)
    for _ in range(2):  # the second time, into the same memory
        copies = copy.fill(pieces)
        assert len(copy.blocks) == -(-sum(t.nbytes for t in tensors.values()) // 64) and copy.missing(pieces) == 0
        write_pieces(tmp_path, copies)
        reader = PieceReader(tmp_path)
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name, "weight"), tensor)
            tensor.mul_(2)
    assert copies[0].values.untyped_storage().data_ptr() in {block.data_ptr() for block in copy.blocks}


def test_free_memory_is_that_of_the_container(tmp_path):
    whole = free_bytes(tmp_path)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    limit, used = tmp_path / "sys/fs/cgroup/memory.max", tmp_path / "sys/fs/cgroup/memory.current"
    used.write_text("300\n")
    limit.write_text("1000\n")
    assert free_bytes(tmp_path) == pytest.approx(1000 * (1 - KEPT_FREE) - 300)
    limit.write_text("max\n")
    assert free_bytes(tmp_path) > 0.5 * whole


@pytest.mark.parametrize(
    ("limit", "used", "reclaimable"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_cached_files_that_a_container_can_drop_count_as_free(tmp_path, limit, used, reclaimable):
    cgroup = tmp_path / "sys/fs/cgroup"
    (cgroup / limit).parent.mkdir(parents=True)
    (cgroup / limit).write_text("1000\n")
    (cgroup / used).write_text("980\n")
    assert free_bytes(tmp_path) == pytest.approx(1000 * (1 - KEPT_FREE) - 980)
    (cgroup / limit).with_name("memory.stat").write_text(f"anon 130\nfile 850\n{reclaimable} 800\nslab 0\n")
    assert free_bytes(tmp_path) == pytest.approx(1000 * (1 - KEPT_FREE) - 180)


def test_what_needs_no_memory_has_room_on_a_full_host(monkeypatch):
    monkeypatch.setattr("eagle_train.train.host_memory.free_bytes", lambda: -5.0)
    assert room_for(0) and not room_for(1)


class Counting(CheckpointWeights):
    """Counts the bytes of the tensors that it gave and that are still alive."""

    alive = most = 0

    def __getitem__(self, name):
        tensor = super().__getitem__(name).clone()
        self.alive += tensor.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self.forget, tensor.nbytes)
        return tensor

    def forget(self, nbytes):
        self.alive -= nbytes


def test_export_holds_one_file_of_weights_in_memory(tmp_path):
    engine = make()
    engine.save(tmp_path)
    weights = Counting(PieceReader(tmp_path))
    total = sum(p.nbytes for p in engine.model.parameters())
    shard = total // 6
    write_weights(tmp_path / "out", weights, shard)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    assert 0 < weights.most <= 1.5 * shard < total / 3
    written = read_weights(tmp_path / "out")
    assert all(torch.equal(written[name], p) for name, p in engine.model.named_parameters())
