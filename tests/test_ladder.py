"""A run whose loss goes wrong: the step is skipped, the run goes back and leaves samples out, or it stops."""

import pytest

from eagle_train.track.jsonl import read_metrics
from eagle_train.train.anomalies import NonFiniteLossError, read_anomalies
from eagle_train.train.app import train
from eagle_train.train.preemption import PreemptionFlag
from tests.runs import accounts, config, losses, rows
from tests.test_resume import run_until

ROW = ("engine._target_=tests.poisoned.plain", "schedule.sft.rows_per_step=2", "+engine.row=6")  # step 3 of sft


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory):
    """A run that is left alone."""
    run = tmp_path_factory.mktemp("calm")
    assert train(config(data, run, "schedule.sft.rows_per_step=2"))
    return run


def once(calm):
    """Returns a sample that a run that is left alone sees once, and in which step of the stage sft."""
    places = {}
    for (stage, step), of_step in rows(calm).items():
        for key in (key for row in of_step for key in row):
            places.setdefault(key, []).append((stage, step))
    return next((key, at[0][1]) for key, at in places.items() if len(at) == 1 and at[0] > ("sft", 2))


@pytest.mark.slow
def test_a_step_is_skipped_and_a_resumed_run_skips_it_too(data, tmp_path, monkeypatch):
    settings = (*ROW, "anomalies.skips=1")
    assert train(config(data, tmp_path / "whole", *settings))
    (anomaly,) = read_anomalies(tmp_path / "whole")
    assert (anomaly.stage, anomaly.step, anomaly.kind, anomaly.action) == ("sft", 3, "loss", "skip") and anomaly.keys
    by_step = {r["step"]: r for r in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "stage_step" in r}
    assert "train/anomaly" in by_step[7] and "train/loss" not in by_step[7] and len(by_step) == 9
    run_until(config(data, tmp_path / "cut", *settings), 8, monkeypatch)
    assert train(config(data, tmp_path / "cut", *settings))
    again = {r["step"]: r.get("train/loss") for r in read_metrics(tmp_path / "cut" / "metrics.jsonl")}
    assert again == {r["step"]: r.get("train/loss") for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")}


@pytest.mark.slow
def test_the_first_step_of_a_run_may_be_skipped_too(data, tmp_path):
    settings = ("engine._target_=tests.poisoned.plain", "+engine.row=0", "anomalies.skips=2", "prove_freeze=true")
    assert train(config(data, tmp_path, *settings))
    found = [(anomaly.stage, anomaly.step, anomaly.action) for anomaly in read_anomalies(tmp_path)]
    assert found == [("pretrain", 0, "skip"), ("sft", 0, "skip")]


@pytest.mark.slow
def test_losses_between_a_record_and_a_stop_are_in_the_next_record(data, tmp_path, monkeypatch):
    settings = ("log_every=4", "save_every=100")
    assert train(config(data, tmp_path / "whole", *settings))
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(PreemptionFlag, "asked", lambda self: calls.append(self) or len(calls) == 6)
        assert not train(config(data, tmp_path / "cut", *settings))
    assert train(config(data, tmp_path / "cut", *settings))
    records = [
        {r["step"]: r["train/loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in r}
        for name in ("whole", "cut")
    ]
    assert records[0] == records[1] and len(records[0]) < 9


@pytest.mark.slow
def test_the_default_stops_with_the_samples_and_without_the_cause_the_run_goes_on(data, calm, tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"step 3 of stage sft: the loss is nan; the run stops.*is saved"):
        train(config(data, tmp_path / "run", *ROW))
    assert [a.action for a in read_anomalies(tmp_path / "run")] == ["stop"]
    assert train(config(data, tmp_path / "run", "schedule.sft.rows_per_step=2"))
    assert losses(tmp_path / "run") == losses(calm) and rows(tmp_path / "run") == rows(calm)


@pytest.mark.slow
@pytest.mark.parametrize("quarantine", [True, False])
def test_a_run_goes_back_and_comes_to_its_end_without_what_was_wrong(data, calm, tmp_path, quarantine):
    poisoned, step = once(calm)
    settings = ("engine._target_=tests.poisoned.plain", f"+engine.key={poisoned}", "schedule.sft.rows_per_step=2")
    ladder = ("anomalies.rollbacks=1", f"anomalies.quarantine={quarantine}".lower(), "data.max_bad_share=0")
    assert train(config(data, tmp_path / "run", *settings, *ladder))
    found = read_anomalies(tmp_path / "run")
    assert [(a.step, a.action, a.keys) for a in found] == [(step, "rollback", (poisoned,))]
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "stage_step" in r]
    assert [r["step"] for r in records] == list(range(1, 10))
    own, undisturbed = rows(tmp_path / "run"), rows(calm)
    left_out = [sorted(k for k in row if k != poisoned or not quarantine) for row in undisturbed["sft", step]]
    assert sorted(map(sorted, own["sft", step])) == sorted(row for row in left_out if row)
    assert ("train/loss" in records[3 + step]) == quarantine  # otherwise the step is passed over
    entries = [entry for sources in accounts(tmp_path / "run").values() for entry in sources.values()]
    assert all(entry["read"] == entry["used"] + sum(entry["dropped"].values()) for entry in entries)
    assert sum(entry["dropped"].get("quarantined", 0) for entry in entries) == int(quarantine)


@pytest.mark.slow
def test_a_run_that_goes_wrong_again_after_its_returns_stops(data, tmp_path):
    settings = (*ROW, "anomalies.rollbacks=1", "anomalies.quarantine=true")
    with pytest.raises(NonFiniteLossError, match=r"the run stops"):  # its row is empty then, and NaN all the same
        train(config(data, tmp_path / "run", *settings, "engine.row=7", "data.max_bad_share=1"))
    assert [a.action for a in read_anomalies(tmp_path / "run")] == ["rollback", "stop"]
