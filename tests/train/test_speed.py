"""A real run tells its MFU and what it means, where its time went over a kill and a resume, and profiles a window."""

import json

import pytest

from eagle_train.track.jsonl import read_metrics
from eagle_train.track.timeline import read_timeline
from eagle_train.train.app import checked, train
from eagle_train.train.speed import stage_flops
from tests.runs import config
from tests.test_resume import run_until

STEPS = 9


def test_weights_below_adapters_have_no_products_for_gradients(data, tmp_path):
    """As in a run without adapters that trains nothing of these modules, but for the adapters' own."""
    made = config(data, tmp_path, "lora=internvl2", "lora.llm.rank=1")
    frozen, whole = (config(data, tmp_path, *more) for more in (["schedule.sft.learning_rates.llm=null"], []))
    found = [per_token(one) for one in (frozen, made, whole)]
    assert found[0] < found[1] < 0.8 * found[2]


def per_token(made):
    """Returns the useful FLOPs of a token in the second stage."""
    schedule, meta = checked(made)
    return stage_flops(made, meta, schedule["sft"]).useful.per_token


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.profiler")
def test_a_run_with_a_kill_accounts_for_its_flops_and_its_seconds(data, tmp_path, monkeypatch, caplog):
    window = ("profiler=window", "profiler.start_step=7", "profiler.num_steps=2")
    settings = config(data, tmp_path, "peak_tflops=0.1", *window)
    run_until(settings, 6, monkeypatch)  # saved at 5
    before = read_timeline(tmp_path / "goodput.jsonl").totals()
    assert before["lost"] == 0 < before["training"]
    assert train(settings)

    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record in records:
        assert 0 < record["perf/mfu"] <= record["perf/hfu"] and 0 < record["perf/goodput"] < 1
        assert record["perf/mfu"] == pytest.approx(record["perf/tflops_per_rank"] / 0.1)
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert speed["convention"].startswith("2 FLOPs per multiply-add") and speed["peak_tflops"] == 0.1
    assert list(speed["flops"]) == ["pretrain", "sft"] and speed["convention"] in caplog.text
    # The projector's stage has no gradients of weights in the LLM.
    assert speed["flops"]["pretrain"]["useful"]["per_token"] < speed["flops"]["sft"]["useful"]["per_token"]

    timeline = read_timeline(tmp_path / "goodput.jsonl")
    found = timeline.totals()
    assert len(timeline.starts) == 2
    assert sum(found.values()) == pytest.approx(timeline.end - timeline.begin, abs=1e-6)
    assert all(found[name] > 0 for name in ("startup", "data", "resume", "training", "data_wait", "checkpoint", "lost"))
    assert timeline.starts[0]["lost"] == found["lost"] and found["other"] > 0  # the profiler's own time
    assert "goodput" in caplog.text and "steps done again" in caplog.text
    assert {path.suffix for path in (tmp_path / "profile").iterdir()} == {".gz", ".txt"}
    assert any(path.name.startswith("steps-8-9-") for path in (tmp_path / "profile").iterdir())
