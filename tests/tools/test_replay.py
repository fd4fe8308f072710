"""`replay`: a step of a real run is made again, to the bit, and what is not as recorded is named."""

import json
import shutil

import pytest

from eagle_train.__main__ import main
from eagle_train.train.app import train
from tests.data.test_bad_samples import BAD, GOOD, add_source, corrupt, png, record
from tests.runs import config, losses, must_run, overrides, rows
from tests.test_resume import run_until

pytestmark = pytest.mark.slow
ANSWERS = ("yes", "no, 7", "red!", "a dog")
BROKEN = "mine/mine-000000/broken"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of 1 + 9 steps, stopped after global step 6 and resumed; one sample is bad when decoded."""
    folder = tmp_path_factory.mktemp("replay")
    # Their answers differ, so that the loss tells which samples it is of.
    good = [(key, record(answer=ANSWERS[k % len(ANSWERS)]), media) for k, (key, _, media) in enumerate(GOOD)]
    samples = [*good, BAD["too_long"], ("broken", record(), {"0.png": corrupt()})]
    more = [*add_source(data, folder, samples), "schedule.sft.num_epochs=null", "schedule.sft.num_steps=9"]
    more += ["data.max_bad_share=0.5", "schedule.sft.rows_per_step=2", "schedule.sft.max_length=128"]
    chosen = config(data, folder / "run", *more, "save_every=3", "keep_last=2")
    with pytest.MonkeyPatch.context() as patch:
        run_until(chosen, 6, patch)
    assert train(chosen)
    assert len(losses(folder / "run")) == 10
    return folder / "run"


def ask(capsys, *arguments, code=0):
    """Returns what `replay --json` answers."""
    assert main(["replay", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_every_step_holds_the_rows_on_record(run, capsys):
    expected = rows(run)
    assert len(expected) == 10
    dropped = []
    for (stage, step), of_step in expected.items():
        number = step + {"pretrain": 1, "sft": 2}[stage]
        found = ask(capsys, number, run)
        assert (found["stage"], found["stage_step"], found["global_step"]) == (stage, step, number)
        assert sorted(row["keys"] for row in found["rows"] if row["keys"]) == of_step
        assert found["equal"] and not found["differences"]
        assert [row["row"] for row in found["rows"]] == sorted(row["row"] for row in found["rows"])
        dropped += [bad["key"] for row in found["rows"] for bad in row["dropped"]]
    assert dropped and set(dropped) == {BROKEN}


@pytest.mark.parametrize("step", [1, 8])  # with the first weights; with a checkpoint in the middle of a stage
def test_the_loss_is_the_recorded_one_to_the_bit(run, capsys, step):
    found = ask(capsys, step, run)
    assert found["loss"]["rebuilt"]["train/loss"] == losses(run)[step - 1]
    assert found["loss"]["rebuilt"] == found["loss"]["recorded"] and len(found["loss"]["recorded"]) > 1
    assert found["loss"]["verdict"].startswith("equal to the bit")


def test_the_first_step_of_a_stage_begins_with_the_weights_of_the_stage_before(data, tmp_path, capsys):
    small = config(data, tmp_path, "schedule.sft.num_steps=1", "schedule.sft.rows_per_step=3")
    assert train(small)
    found = ask(capsys, 4, tmp_path)
    assert (found["stage"], found["stage_step"], len(found["rows"])) == ("sft", 0, 3)
    assert found["loss"]["rebuilt"]["train/loss"] == losses(tmp_path)[3]
    assert "step-00000003" in found["loss"]["weights"]


def test_a_step_without_its_checkpoint_says_which_can_be_checked(run, capsys):
    said = ask(capsys, 9, run)["loss"]
    assert "rebuilt" not in said
    assert "before step 9. Steps whose loss can be checked: 1, 8; this run saves every 3" in said["verdict"]


def test_a_checkpoint_may_be_given_and_must_be_that_of_the_step_before(run, capsys, tmp_path):
    kept = tmp_path / "kept"
    shutil.copytree(run / "checkpoints" / "step-00000007", kept)
    assert ask(capsys, 8, run, "--checkpoint", kept)["loss"]["weights"] == str(kept)
    assert main(["replay", "9", str(run), "--checkpoint", str(kept)]) == 1
    assert "holds the weights after step 7: with it, step 8 can be checked, not 9" in capsys.readouterr().err


def test_rows_are_hashed_the_same_every_time_and_printed_for_reading(run, capsys):
    one, two = ask(capsys, 5, run), ask(capsys, 5, run)
    assert one == two and len({row["sha256"] for row in one["rows"]}) == 2
    assert main(["replay", "5", str(run), "--rank-rows"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("step 5: step 3 of stage sft, counted from 0\n  row ")
    assert all(row["sha256"] in shown and f"    {row['keys'][0]}\n" in shown for row in one["rows"])
    assert "every sample is as it was recorded" in shown


def test_what_changed_since_is_named_and_the_exit_code_says_so(run, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    victim = next(row["keys"][0] for row in ask(capsys, 8, run)["rows"] if row["keys"])
    tar = run.parent / "mine" / "mine-000000.tar"
    whole = tar.read_bytes()
    number = int(victim[-3:])
    image = png(number)
    assert whole.count(image) == 1
    middle = len(image) // 2
    tar.write_bytes(whole.replace(image, image[:middle] + bytes(200) + image[middle + 200 :]))
    try:
        found = ask(capsys, 8, copy, code=1)
        (difference,) = found["differences"]
        assert difference.startswith(f"{victim}: recorded used with ") and "rebuilt dropped as unreadable" in difference
        assert found["loss"]["verdict"].startswith("different")
        tar.unlink()
        gone = ask(capsys, 8, copy, code=1)
        assert sum("rebuilt left out: its shard is not there" in text for text in gone["differences"]) > 1
    finally:
        tar.write_bytes(whole)
    assert ask(capsys, 8, copy)["equal"]


@pytest.mark.parametrize(("step", "said"), [(0, "no step 0 on record"), (11, "pretrain 1 to 1, sft 2 to 10")])
def test_a_step_that_is_not_on_record_is_refused(run, capsys, step, said):
    assert main(["replay", str(step), str(run)]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main(["replay", "1", str(tmp_path)]) == 1
    assert "is no run that has begun to train" in capsys.readouterr().err


def test_a_step_of_two_ranks_is_close_in_one_process(data, tmp_path, capsys):
    must_run(overrides(data, tmp_path, "schedule.sft.rows_per_step=3", "schedule.sft.num_steps=1"), ranks=2)
    found = ask(capsys, 4, tmp_path, "--rank-rows")
    assert [row["rank"] for row in found["rows"]] == sorted(row["rank"] for row in found["rows"])
    assert {row["rank"] for row in found["rows"]} == {0, 1}
    assert found["loss"]["rebuilt"]["train/loss"] == pytest.approx(losses(tmp_path)[3], rel=1e-5)
    assert found["equal"]
