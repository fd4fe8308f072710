"""Rates are totals over totals since the last flush."""

import re
from pathlib import Path

import pytest

from eagle_train.track.throughput import Throughput, peak_memory

STATUS = Path("/proc/self/status")


def test_rates_are_totals_over_totals():
    meter = Throughput()
    meter.update(tokens=900, supervised=90, images=6, capacity=1000, data_wait_seconds=0.5, step_seconds=1.0)
    meter.update(tokens=600, supervised=30, images=0, capacity=1000, data_wait_seconds=0.25, step_seconds=4.0)
    metrics = meter.flush()
    memory = {name: metrics.pop(name) for name in list(metrics) if name.startswith("memory/")}
    assert metrics == {
        "time/tokens_per_second": 300.0,
        "time/supervised_tokens_per_second": 24.0,
        "time/images_per_second": 1.2,
        "time/step_seconds": 2.5,
        "time/data_wait_share": 0.15,
        "data/fill": 0.75,
    }
    assert "memory/peak_rss_gib" in memory


def test_a_step_may_be_told_in_several_calls():
    meter = Throughput()
    for _ in range(2):
        meter.update(tokens=10)
        meter.update(capacity=20, step_seconds=2.0)
    metrics = meter.flush()
    assert (metrics["time/step_seconds"], metrics["data/fill"]) == (2.0, 0.5)


def test_a_flush_begins_anew():
    meter = Throughput()
    meter.update(tokens=1000, capacity=1000, data_wait_seconds=1.0, step_seconds=1.0)
    meter.flush()
    meter.update(tokens=10, step_seconds=1.0)
    metrics = meter.flush()
    assert (metrics["time/tokens_per_second"], metrics["time/data_wait_share"]) == (10.0, 0.0)
    assert "data/fill" not in metrics


def test_a_flush_without_a_step_is_an_error():
    meter = Throughput()
    meter.update(tokens=5)
    with pytest.raises(ValueError, match="0 steps"):
        meter.flush()


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's /proc")
def test_peak_memory_is_the_high_water_mark_in_gib():
    high_water_kib = int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1])
    assert peak_memory()["memory/peak_rss_gib"] == pytest.approx(high_water_kib / 2**20, rel=0.05)


def test_mfu_is_useful_flops_per_rank_over_the_peak_and_hfu_the_executed_ones():
    meter = Throughput(num_ranks=4, peak_tflops=10.0)
    for _ in range(2):
        meter.update(useful_flops=30e12, executed_flops=40e12)
        meter.update(step_seconds=1.5)
    metrics = meter.flush()
    assert metrics["perf/tflops_per_rank"] == 5.0
    assert metrics["perf/mfu"] == 0.5 and metrics["perf/hfu"] == pytest.approx(2 / 3)
    meter.update(tokens=1, step_seconds=1.0)
    assert not any(name.startswith("perf/") for name in meter.flush())


def test_without_a_peak_there_is_speed_but_no_mfu():
    meter = Throughput()
    meter.update(useful_flops=3e12, executed_flops=3e12, step_seconds=1.0)
    assert {name for name in meter.flush() if name.startswith("perf/")} == {"perf/tflops_per_rank"}
    with pytest.raises(ValueError, match="peak_tflops is 0"):
        Throughput(peak_tflops=0.0)
