"""Which checkpoint a run goes on from, and which of them stay."""

from pathlib import Path

import pytest
import torch

from eagle_train import dist
from eagle_train.train.checkpoint import (
    CheckpointDir,
    LostCheckpointsError,
    TrainState,
    read_plan,
    read_state,
    restore_random_states,
    state_files,
    step_of,
)
from eagle_train.train.manifest import problem, problem_of_ranks
from eagle_train.train.retention import Best, Retention
from eagle_train.train.tensor_file import write_bytes

STEPS = (1, 2, 3)


def publish(checkpoints, step):
    """Publishes a checkpoint of two files."""
    aside = checkpoints.begin(step)
    (aside / "part").mkdir()
    contents = {"first": b"x" * 100, "part/second": b"y" * 50}
    files = {name: write_bytes(aside / name, data) for name, data in contents.items()}
    return checkpoints.publish(aside, step, files)


@pytest.fixture
def checkpoints(tmp_path):
    """Three whole checkpoints."""
    checkpoints = CheckpointDir(tmp_path / "checkpoints")
    for step in STEPS:
        publish(checkpoints, step)
    return checkpoints


def flip(path):
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


OLDER = '{"files": {"first": 100}}'
DAMAGES = {
    "truncated": (lambda path: (path / "first").write_bytes(b"x" * 99), "first has 99 bytes instead of 100"),
    "flipped": (lambda path: flip(path / "part/second"), "part/second is damaged: its SHA-256 is "),
    "missing": (lambda path: (path / "first").unlink(), "first is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "no readable manifest"),
    "torn manifest": (lambda path: (path / "manifest.json").write_text('{"files": {"fi'), "no readable manifest"),
    "older manifest": (lambda path: (path / "manifest.json").write_text(OLDER), "no readable manifest of this version"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_kept(checkpoints, damage, caplog):
    assert checkpoints.latest() == checkpoints.path(3)
    harm, said = DAMAGES[damage]
    harm(checkpoints.path(3))
    assert checkpoints.latest() == checkpoints.path(2)
    assert f"skipping incomplete checkpoint {checkpoints.path(3)}: {said}" in caplog.text
    publish(checkpoints, 3)
    checkpoints.prune()
    assert checkpoints.latest() == checkpoints.path(3)
    assert checkpoints.path(3).with_name("step-00000003.damaged").is_dir()


@pytest.mark.parametrize("retention", [Retention(last=2), Retention(last=1, every=10)])
def test_damaged_checkpoints_that_were_passed_over_stay_and_displace_no_new_one(tmp_path, retention, caplog):
    checkpoints = CheckpointDir(tmp_path, Retention(last=5))
    for step in (10, 60, 70, 80):
        publish(checkpoints, step)
    for step in (60, 70, 80):
        flip(checkpoints.path(step) / "first")
    checkpoints = CheckpointDir(tmp_path, retention)
    assert checkpoints.latest() == checkpoints.path(10)
    for step in (15, 20, 25, 60, 65, 80):
        publish(checkpoints, step)
        checkpoints.prune()
        assert checkpoints.latest() == checkpoints.path(step)
    assert "step-00000070 is damaged; it stays, as step-00000070.damaged" in caplog.text
    damaged = {path.name for path in tmp_path.glob("*.*")}
    assert damaged == {f"step-000000{step}.damaged" for step in (60, 70, 80)}
    kept = [10, 20, 60, 80] if retention.every else [65, 80]
    assert [int(path.name[5:]) for path in checkpoints.published()] == kept


def test_a_run_that_gave_up_its_damaged_checkpoints_keeps_what_it_saves_from_then_on(checkpoints):
    for step in STEPS:
        flip(checkpoints.path(step) / "first")
    assert checkpoints.latest(accept_none=True) is None
    publish(checkpoints, 0)
    checkpoints.prune()
    assert checkpoints.latest() == checkpoints.path(0)
    assert sorted(path.name for path in checkpoints.folder.glob("*.*")) == [f"step-{n:08d}.damaged" for n in STEPS]


def test_a_checkpoint_that_could_be_read_after_all_is_damaged_no_more(checkpoints):
    flip(checkpoints.path(3) / "first")
    assert checkpoints.latest() == checkpoints.path(2)
    flip(checkpoints.path(3) / "first")
    assert checkpoints.latest() == checkpoints.path(3)
    publish(checkpoints, 4)
    checkpoints.prune()
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [f"step-{n:08d}" for n in (2, 3, 4)]


@pytest.mark.parametrize("retention", [Retention(last=1), Retention(last=1, every=2), Retention(last=3)])
def test_killed_while_a_step_is_saved_again_a_run_still_has_its_checkpoint(tmp_path, retention):
    checkpoints = CheckpointDir(tmp_path, retention)
    publish(checkpoints, 2)
    checkpoints.path(2).rename(tmp_path / "step-00000002.replaced")  # the kill is before the next rename
    assert checkpoints.latest() == tmp_path / "step-00000002.replaced"
    publish(checkpoints, 3)
    checkpoints.prune()
    steps = [step_of(path) for path in checkpoints.published()]
    assert steps == ([3] if retention == Retention(last=1) else [2, 3])
    publish(checkpoints, 2)
    checkpoints.prune()
    assert checkpoints.path(2) in checkpoints.published() or retention == Retention(last=1)
    assert not list(tmp_path.glob("*.*"))


def test_a_checkpoint_stays_where_its_step_cannot_be_published_again(checkpoints, monkeypatch):
    rename = Path.rename

    def fail(path, target):
        if path.suffix == ".writing":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        publish(checkpoints, 3)
    assert checkpoints.latest() == checkpoints.path(3)


def test_a_whole_checkpoint_whose_step_was_saved_again_is_deleted_and_a_damaged_one_is_not(checkpoints):
    publish(checkpoints, 2)
    (checkpoints.path(3) / "first").unlink()
    publish(checkpoints, 3)
    checkpoints.prune()
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    assert [name for name in names if "." in name] == ["step-00000003.replaced"]
    assert checkpoints.latest() == checkpoints.path(3)


def test_a_flipped_bit_is_seen_by_the_hash_alone(checkpoints):
    flip(checkpoints.path(3) / "first")
    assert problem(checkpoints.path(3)) is None and checkpoints.latest(thorough=False) == checkpoints.path(3)
    assert checkpoints.latest() == checkpoints.path(2)


def test_a_file_that_cannot_be_read_is_damaged_and_ranks_read_every_file_between_them(checkpoints, monkeypatch):
    read = []

    def fail(path):
        read.append(path.name)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("eagle_train.train.manifest.hash_of_file", fail)
        said = problem_of_ranks(checkpoints.path(3), thorough=True)
        assert said.count("cannot be read ([Errno 5] Input/output error)") == 2 and "part/second cannot" in said
        for rank in range(2):
            read.clear()
            patch.setattr(dist, "rank", lambda rank=rank: rank)
            patch.setattr(dist, "world_size", lambda: 2)
            patch.setattr(dist, "broadcast_object", lambda told: None)
            patch.setattr(dist, "gather_objects", lambda told: [told])
            assert problem_of_ranks(checkpoints.path(3), thorough=True)
            assert read == [["first"], ["second"]][rank], "the largest first"
    assert problem_of_ranks(checkpoints.path(3), thorough=True) is None


def test_a_run_never_starts_anew_in_silence_when_all_its_checkpoints_are_damaged(checkpoints):
    flip(checkpoints.path(1) / "first")
    (checkpoints.path(2) / "first").unlink()
    (checkpoints.path(3) / "manifest.json").unlink()
    with pytest.raises(LostCheckpointsError) as caught:
        checkpoints.latest()
    for said in ("step-00000001: first is damaged", "step-00000002: first is missing", "step-00000003: no readable"):
        assert said in str(caught.value)
    assert "accept_lost_checkpoints=true" in str(caught.value)
    assert checkpoints.latest(accept_none=True) is None


def test_what_was_never_published_does_not_count_and_goes_with_the_next_one(checkpoints, caplog):
    (checkpoints.begin(4) / "first").write_bytes(b"half")
    assert checkpoints.latest() == checkpoints.path(3)
    assert "step-00000004.writing: it was never finished" in caplog.text
    publish(checkpoints, 5)
    checkpoints.prune()
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [f"step-{n:08d}" for n in (2, 3, 5)]


def test_pruning_counts_and_deletes_whole_checkpoints_only(tmp_path):
    checkpoints = CheckpointDir(tmp_path, Retention(last=2))
    for step in range(4):
        publish(checkpoints, step)
        if step == 0:
            (checkpoints.path(0) / "first").write_bytes(b"torn")
        checkpoints.prune()
    assert [p.name for p in checkpoints.published()] == ["step-00000000", "step-00000002", "step-00000003"]


def test_the_small_files_of_a_checkpoint_bring_back_state_plan_and_random_numbers(tmp_path, monkeypatch):
    state = TrainState(stage="sft", step=3, cursor={"window": 2}, loss_sums={"a": [1.5, 2.0]}, recent_losses=[0.25])
    torch.manual_seed(3)
    for name, data in state_files(state, "a: 1\n", {"rows": 7}).items():
        (tmp_path / name).write_bytes(data)
    expected = torch.rand(3)
    torch.manual_seed(4)
    restore_random_states(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert read_state(tmp_path) == state and read_plan(tmp_path) == {"rows": 7}
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    monkeypatch.setattr(dist, "rank", lambda: 1)
    assert [*state_files(state, "", {})] == ["rng-00001.safetensors"], "the others are rank 0's to write"
    torch.manual_seed(4)
    restore_random_states(tmp_path)
    found = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(found, torch.rand(3)), "a rank that was not there keeps its own"


def test_every_nth_checkpoint_stays_for_ever():
    steps = range(10, 110, 10)
    assert Retention(last=2, every=40).kept(list(steps)) == {40, 80, 90, 100}


RECORDS = [
    {"step": 9, "train/loss": 1.0},
    {"step": 10, "train/loss": 5.0},  # the last one up to its step counts
    {"step": 20, "train/loss": 2.0},
    {"step": 30, "train/loss": 3.0, "eval/score": 0.5},
    {"step": 40, "train/loss": None},  # not finite
    {"step": 50, "train/loss": 4.0, "eval/score": 0.5},
    {"step": 51, "train/loss": 0.1},  # after the last checkpoint
]


@pytest.mark.parametrize(
    ("best", "kept"),
    [
        (Best(metric="train/loss"), {20}),
        (Best(metric="train/loss", count=2), {20, 30}),
        (Best(metric="train/loss", highest=True), {10}),
        (Best(metric="eval/score", highest=True), {50}),
        (Best(metric="no such"), set()),
    ],
)
def test_the_best_by_a_metric_of_the_log_stay(best, kept):
    assert Retention(last=1, best=best).kept([10, 20, 30, 40, 50], RECORDS) == kept | {50}


def test_pruning_reads_the_log_beside_the_checkpoints(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "train/loss": {abs(n - 2)}}}\n' for n in range(6)))
    checkpoints = CheckpointDir(tmp_path / "checkpoints", Retention(last=1, best=Best(metric="train/loss")))
    for step in range(1, 6):
        publish(checkpoints, step)
        checkpoints.prune()
    assert [p.name for p in checkpoints.published()] == ["step-00000002", "step-00000005"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Retention(last=0), "keep_last is 0"),
        (lambda: Retention(every=0), "keep_every is 0"),
        (lambda: Best(metric="x", count=0), r"keep_best\.count is 0"),
    ],
)
def test_a_retention_that_keeps_nothing_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
