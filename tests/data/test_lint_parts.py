"""A lint of many parts holds one of them at a time, and tells the same whatever order they are done in."""

import tracemalloc

import pytest

from eagle_train.data import lint_parts as module
from eagle_train.data.lint import Finding, TextChecks
from eagle_train.data.lint_files import Checks, Chunk, Part, hashed
from eagle_train.data.lint_parts import lint_parts
from eagle_train.data.lint_report import SourceReport

CHECKS = Checks(texts=TextChecks())
SAMPLES = 1000


def look(checks, chunk):
    """Finds something in every tenth sample, and every second one like the one before it."""
    part = Part()
    for number in range(chunk.number, chunk.number + SAMPLES):
        key = f"eagle_sft_llava_665k/eagle_sft_llava_665k-{chunk.number:06d}/{number:08d}"
        findings = [Finding("markup", f"{number}")] if number % 10 == 0 else []
        part.media.add(f"coco/train2017/{number:012d}.jpg")
        part.add(key, findings, sample=hashed(f"{number // 2}"), text=hashed(f"{number}"), ident=hashed(f"i{number}"))
    return part


def report_of(tmp_path, chunks, progress=lambda count: None):
    report = SourceReport(3)
    for part in lint_parts(look, CHECKS, chunks, tmp_path / "kept" / "look", workers=1, progress=progress):
        report.add(part)
    report.finish()
    return report


def test_what_is_kept_of_a_sample_is_a_few_bytes(tmp_path):
    chunks = (Chunk(SAMPLES * number, []) for number in range(10))
    report_of(tmp_path, [Chunk(0, [])])  # imports and caches
    tracemalloc.start()
    counts = []
    report = report_of(tmp_path, chunks, counts.append)
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(counts) == report.num_samples == 10 * SAMPLES
    assert current < 60 * report.num_samples and peak < 150 * report.num_samples
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_in_which_parts_are_done_changes_nothing(tmp_path, monkeypatch, backwards):
    if backwards:
        real = module.run_all
        monkeypatch.setattr(module, "run_all", lambda *given: reversed(list(real(*given))))
    report = report_of(tmp_path, [Chunk(SAMPLES * number, []) for number in range(3)])
    assert {kind: found.count for kind, found in report.kinds.items()} == {"markup": 300, "duplicate_sample": 1500}
    assert [excerpt for _, excerpt in report.kinds["markup"].examples] == ["0", "10", "20"]
    stem = "eagle_sft_llava_665k/eagle_sft_llava_665k-000000"
    assert report.kinds["duplicate_sample"].examples == [
        (f"{stem}/{2 * i + 1:08d}", f"like {stem}/{2 * i:08d}") for i in range(3)
    ]


def test_two_looks_at_the_same_do_not_take_each_others_findings_away(tmp_path):
    kept, chunks = tmp_path / "kept" / "look", [Chunk(SAMPLES * number, []) for number in range(3)]

    def begin():
        return lint_parts(look, CHECKS, chunks, kept, workers=1, progress=lambda count: None)

    alone = list(begin())
    first = begin()
    early = next(first)  # all parts are looked at, and one is read back
    assert list(begin()) == alone
    assert [early, *first] == alone
    assert not kept.parent.exists()


def test_a_look_that_ends_early_beside_another_leaves_only_the_findings_of_that(tmp_path):
    kept, chunks = tmp_path / "kept" / "look", [Chunk(SAMPLES * number, []) for number in range(3)]
    first, second = (lint_parts(look, CHECKS, chunks, kept, workers=1, progress=lambda count: None) for _ in range(2))
    assert next(first) == next(second)
    assert len(list(kept.parent.iterdir())) == 2
    second.close()
    first.close()
    assert list(kept.parent.iterdir()) == [kept] and len(list(kept.glob("*.json"))) == 3
