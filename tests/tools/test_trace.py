"""`trace`: every sample of a real run is found again, with what became of it."""

import json

import pytest

from eagle_train.__main__ import main
from eagle_train.data.quarantine import read_quarantine
from eagle_train.data.shards import write_shards
from eagle_train.train.app import train
from tests.data.test_bad_samples import BAD, GOOD, corrupt, record
from tests.runs import config, rows
from tests.test_resume import run_until

pytestmark = pytest.mark.slow

BROKEN = "mine/mine-000000/broken"


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of two stages, stopped after global step 6 and resumed from 5; one sample is bad when decoded."""
    folder = tmp_path_factory.mktemp("trace")
    samples = [*GOOD, BAD["too_long"], ("broken", record(), {"0.png": corrupt()})]
    write_shards(samples, folder / "mine")
    card = {"description": "", "licence": "", "origin": "", "shards": "mine/*.tar"}
    sources = {"mine": {"repeat": 1.0, "max_bad_share": 0.5}}
    recipe = {"name": "mine", "description": "", "sources": sources, "datasets": {"mine": card}}
    (folder / "mine.yaml").write_text(json.dumps(recipe))
    chosen = config(data, folder / "run", f"schedule.sft.recipe={folder / 'mine.yaml'}", "schedule.sft.rows_per_step=1")
    with pytest.MonkeyPatch.context() as patch:
        run_until(chosen, 6, patch)
    assert train(chosen)
    return folder / "run"


def ask(capsys, *arguments):
    """Returns what `trace --json` answers."""
    assert main(["trace", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_use_of_every_sample_is_traced_to_its_step_and_row(run, capsys):
    expected = rows(run)
    assert {stage for stage, _ in expected} == {"pretrain", "sft"}
    for (stage, step), of_step in expected.items():
        uses = [use for use in ask(capsys, "--step", step, "--stage", stage, run) if not use["superseded"]]
        found = {}
        for use in uses:
            assert use["global_step"] == step + 1 + {"pretrain": 0, "sft": 3}[stage]
            if use["outcome"] == "used":
                assert use["num_tokens"] > use["num_targets"] > 0
                found.setdefault(use["row"], []).append(use["key"])
        assert sorted(found.values()) == of_step
    key = expected["sft", 5][0][0]
    uses = ask(capsys, key, run)["uses"]
    assert {(use["stage"], use["step"]) for use in uses if not use["superseded"]} == {
        step for step, of_step in expected.items() if any(key in row for row in of_step)
    }


def test_steps_that_a_resume_repeated_are_shown_as_superseded(run, capsys):
    uses = ask(capsys, "--step", 2, "--stage", "sft", run)
    assert {use["attempt"] for use in uses if use["superseded"]} == {0}
    assert {use["attempt"] for use in uses if not use["superseded"]} == {1}
    by_attempt = [[u["key"] for u in uses if u["attempt"] == attempt] for attempt in (0, 1)]
    assert by_attempt[0] == by_attempt[1], "the resumed run repeats the rows"
    assert main(["trace", uses[0]["key"], str(run)]) == 0
    shown = capsys.readouterr().out
    assert "attempt 0, superseded by a later attempt: used" in shown and "attempt 1: used" in shown


def test_a_bad_sample_tells_its_reason_and_a_good_one_what_it_gave(run, capsys):
    assert main(["trace", "broken", str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(BROKEN) and "pretrain: not among its samples" in shown
    assert ": dropped, unreadable_image: 0.png: " in shown and "global step" in shown
    assert main(["trace", "mine/mine-000000/good003", str(run)]) == 0
    shown = capsys.readouterr().out
    assert ": used, " in shown and "1 tile\n" in shown and "of them with loss" in shown


def test_frames_and_tiles_of_a_video_are_told(run, capsys):
    videos = ask(capsys, "small_video/*", run)["matches"]
    uses = [use for key in videos for use in ask(capsys, key, run)["uses"]]
    assert uses and all(use["num_frames"] == use["num_tiles"] > 0 for use in uses)
    stills = [use for use in ask(capsys, "--global-step", 5, run) if use["outcome"] == "used"]
    assert stills and all(use["num_frames"] == 0 and use["num_tiles"] == 1 for use in stills)


def test_a_sample_that_the_plan_left_out_is_in_no_step(run, capsys):
    assert main(["trace", "bad-length", str(run)]) == 0
    assert "sft: in no step so far" in capsys.readouterr().out


def test_parts_and_patterns_list_what_matches(run, capsys):
    assert ask(capsys, "good00?", run)["matches"] == [f"mine/mine-000000/good{i:03d}" for i in range(10)]
    assert main(["trace", "mine/*/good*", str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("20 samples match") and "  mine/mine-000000/good019\n" in shown
    assert ask(capsys, "mine-000000/good004", run)["key"] == "mine/mine-000000/good004"
    assert main(["trace", "small_*", str(run)]) == 0
    assert "... and 40 more" in capsys.readouterr().out  # of 90


@pytest.mark.parametrize("wrong", ["mine/mine-000000/gud003", "gud003"])
def test_an_unknown_key_names_near_ones(run, capsys, wrong):
    assert main(["trace", wrong, str(run)]) == 1
    assert "near it: " in (said := capsys.readouterr().err) and "mine/mine-000000/good003" in said


def test_the_bad_ones_are_a_quarantine_list(run, capsys, tmp_path):
    assert main(["trace", "--bad", str(run)]) == 0
    listed = capsys.readouterr().out
    assert "unreadable_image: 0.png" in listed
    (tmp_path / "list.txt").write_text(listed)
    assert read_quarantine(tmp_path / "list.txt") == {BROKEN}
    assert main(["trace", "--bad", "--keys", str(run)]) == 0
    assert capsys.readouterr().out == f"{BROKEN}\n"
    (bad,) = ask(capsys, "--bad", run)
    assert bad["key"] == BROKEN and bad["reason"] == "unreadable_image" and bad["times"] >= 1


def test_a_step_is_shown_row_by_row(run, capsys):
    assert main(["trace", "--step", "0", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "pretrain step 0 (global step 1)\n  row 0, rank 0, attempt 0\n" in shown
    assert "sft step 0 (global step 4)\n  row 0, rank 0, attempt 0\n" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "99"], "no sample is on record for step 99; steps: pretrain 0 to 2 (global 1 to 3), sft 0 to 5"),
        (["--global-step", "0"], "no sample is on record for step 0"),
        (["--step", "0", "--stage", "absent"], "no ledger of stage 'absent'; there are pretrain, sft"),
    ],
)
def test_what_is_not_there_is_said(run, capsys, arguments, said):
    assert main(["trace", *arguments, str(run)]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_without_a_ledger_and_wrong_words_are_refused(tmp_path, capsys):
    assert main(["trace", "key", str(tmp_path)]) == 1
    assert "holds no ledger; give the run_dir" in capsys.readouterr().err
    for arguments in (["key"], ["--bad", "key", "run"], ["--bad", "--step", "1", "run"], ["--keys", "key", "run"]):
        with pytest.raises(SystemExit, match="2"):
            main(["trace", *arguments])
        assert "give KEY and RUN" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["trace", "--bad", "--keys", "--json", "run"])
    assert "--keys and --json are two ways to print" in capsys.readouterr().err


def test_samples_of_a_shard_whose_index_is_gone_are_numbered(run, capsys, caplog):
    (index,) = (run.parent / "mine").glob("*.index.*")
    kept = index.read_bytes()
    index.unlink()
    try:
        keys = {use["key"] for use in ask(capsys, "--step", 5, "--stage", "sft", run)}
    finally:
        index.write_bytes(kept)
    assert keys and all(key.startswith("mine/mine-000000/sample ") for key in keys)
    assert "are numbered, not named" in caplog.text
