"""A build that was stopped or killed goes on where it was, to the bytes of one that was not, by any workers."""

import json
import os
import signal
import time
from contextlib import suppress

import psutil
import pytest

from eagle_train.__main__ import main
from eagle_train.data import build_sources
from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.build import build_from_annotation, build_from_tars
from eagle_train.data.pieces import build_piece
from eagle_train.data.share_work import claim_path, machine
from tests.data.test_build import contents, everything_in, llava, picture, tar_of, write
from tests.data.test_prepare import silent
from tests.runs import fork, start


@pytest.fixture
def annotation(tmp_path):
    """Records of which one in ten is bad, in an annotation with its images."""
    images = tmp_path / "source" / "images"
    images.mkdir(parents=True)
    for i in range(60):
        (images / f"{i}.PNG").write_bytes(picture((i, 0, 0)))
    return write(tmp_path / "source" / "a.json", [llava(i) if i % 10 else {"id": i} for i in range(60)])


@pytest.fixture
def tars(annotation, tmp_path):
    """The same as two tars."""
    paths = []
    for n in range(2):
        files = {}
        for i in range(30 * n, 30 * n + 30):
            files[f"{i:03d}.png"] = picture((i, 0, 0))
            files[f"{i:03d}.json"] = json.dumps(llava(i, image=f"{i:03d}.png") if i % 10 else {}).encode()
        paths.append(tar_of(tmp_path / f"t{n}.tar", files))
    return paths


def build_annotation(out, annotation, tars, **how):
    return build_from_annotation(out, annotation=annotation, **how)


def build_tars(out, annotation, tars, **how):
    return build_from_tars(out, tars=tars, **how)


HOW = {"samples_per_shard": 7, "max_bad_share": 0.1, "progress": silent}


def renamed(report):
    return (report.read, report.written, list(map(str, report.errors)), [path.name for path in report.shards])


@pytest.mark.slow
@pytest.mark.parametrize("build", [build_annotation, build_tars])
def test_workers_do_not_change_a_byte(annotation, tars, tmp_path, build):
    one = build(tmp_path / "1" / "out", annotation, tars, workers=1, **HOW)
    two = build(tmp_path / "2" / "out", annotation, tars, workers=2, **HOW)
    assert renamed(one) == renamed(two) and (one.read, one.written, len(one.shards)) == (60, 54, 9)
    assert everything_in(tmp_path / "1") == everything_in(tmp_path / "2")


@pytest.mark.parametrize("build", [build_annotation, build_tars])
def test_a_build_that_was_stopped_makes_what_is_missing_and_reports_it_all(
    annotation, tars, tmp_path, build, monkeypatch
):
    plain = build(tmp_path / "plain" / "out", annotation, tars, **HOW)
    built = []

    def stopping(piece):
        if len(built) == 4:
            raise KeyboardInterrupt
        built.append(piece.shard.name)
        return build_piece(piece)

    monkeypatch.setattr(build_sources, "build_piece", stopping)
    stopped = tmp_path / "stopped" / "out"
    with pytest.raises(KeyboardInterrupt):
        build(stopped, annotation, tars, **HOW)
    assert not stopped.exists()
    first, built[:] = set(built), [None] * 5  # never reaches 4
    report = build(stopped, annotation, tars, **HOW)
    assert len(first) == 4 and len(built) == 5 + 5 and not first & set(built)
    assert renamed(report) == renamed(plain) and len(report.errors) == 6
    assert everything_in(tmp_path / "stopped") == everything_in(tmp_path / "plain")


def test_bad_records_of_an_earlier_run_count_in_the_refusal(annotation, tmp_path, monkeypatch):
    how = HOW | {"max_bad_share": 0.09}
    stop_after(monkeypatch, 8)  # of 9 shards, with 5 of 6 bad records
    with pytest.raises(KeyboardInterrupt):
        build_from_annotation(tmp_path / "out", annotation=annotation, **how)
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(TooManyBadSamples, match="6 of 60 samples are bad") as error:
            build_from_annotation(tmp_path / "out", annotation=annotation, **how)
        assert [bad.key for bad in error.value.errors] == [f"{i:08d}" for i in range(0, 60, 10)]
    assert build_from_annotation(tmp_path / "out", annotation=annotation, **HOW).written == 54


def stop_after(monkeypatch, count):
    built = []

    def stopping(piece):
        if len(built) == count:
            raise KeyboardInterrupt
        built.append(piece)
        return build_piece(piece)

    monkeypatch.setattr(build_sources, "build_piece", stopping)


def test_other_inputs_begin_anew(annotation, tmp_path, monkeypatch):
    stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        build_from_annotation(tmp_path / "out", annotation=annotation, **HOW)
    monkeypatch.undo()
    write(annotation, [llava(i, note="another") for i in range(1, 10)])
    report = build_from_annotation(tmp_path / "out", annotation=annotation, **HOW)
    assert (report.read, report.written, len(report.shards)) == (9, 9, 2)
    assert all(record.meta["note"] == "another" for _, record, _ in contents(report.shards))


@pytest.mark.parametrize("kind", ["annotation", "tars"])
def test_an_input_that_was_corrected_in_its_middle_is_read_again(tmp_path, kind):
    records = [{"instruction": "q" * 400, "output": "a" * 400} for _ in range(400)]
    records[200] |= {"output": " "}
    for said in ("1 no_answer", None):
        if kind == "annotation":
            how = {"annotation": write(tmp_path / "a.json", records)}
        else:
            files = {f"{i:03d}.json": json.dumps(each).encode() for i, each in enumerate(records)}
            how = {"tars": [tar_of(tmp_path / "a.tar", files)]}
        size = next(path.stat().st_size for path in tmp_path.iterdir() if path.is_file())
        build = {"annotation": build_from_annotation, "tars": build_from_tars}[kind]
        if said:
            with pytest.raises(TooManyBadSamples, match=said):
                build(tmp_path / "out", **how, max_bad_share=0.0, progress=silent)
            first = size
        else:
            assert size == first and build(tmp_path / "out", **how, max_bad_share=0.0, progress=silent).written == 400
        records[200] |= {"output": "a"}


def test_a_build_waits_for_another_that_builds_the_same(annotation, tmp_path, caplog, monkeypatch):
    claim = claim_path(tmp_path / ".prepare" / "out")
    claim.parent.mkdir()
    claim.write_text(f"{machine()} {os.getppid()} token")  # of a process that lives
    waited = []
    monkeypatch.setattr(time, "sleep", lambda seconds: waited.append(seconds) or claim.unlink())
    assert build_from_annotation(tmp_path / "out", annotation=annotation, **HOW).written == 54
    assert len(waited) == 1 and f"waiting for the process that holds {claim}" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(annotation, tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*\.prepare .*choose a folder that is writable"):
        build_from_annotation(annotation / "out", annotation=annotation, **HOW)  # a file is no folder


def stop_when(process, there, number=signal.SIGKILL):
    """Sends a signal to a process as soon as something is there; returns what it printed, once its workers are gone.

    Ctrl-C goes to its workers as well, as in a terminal; else each ends when it has done what it is at.
    """
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = process.communicate(timeout=120)
    while lives(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return said


def lives(group):
    """Whether a process of a group is alive; one that is dead, and that nobody has asked for, is not."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_was_killed_goes_on_to_the_same_bytes(tmp_path, capsys, number):
    records = [{"caption": f"caption {i}", "image": f"{i % 5}.png"} if i % 100 else {} for i in range(1500)]
    annotation = write(tmp_path / "a.jsonl", records)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(picture((i, 0, 0)))

    def arguments(out, workers):
        return [
            *["data", "build", "name=mine", f"annotation={annotation}", f"out={tmp_path / out}", f"workers={workers}"],
            *["samples_per_shard=3", "max_bad_share=0.02"],
        ]

    assert main(arguments("plain", 1)) == 0
    plain = capsys.readouterr()
    reports = tmp_path / "killed" / ".prepare" / "mine" / "reports" / "mine"
    # Ctrl-C is for all processes of a terminal: an interpreter of its own has its workers beside it.
    process = (start if number == signal.SIGINT else fork)(arguments("killed", 2))
    _, said = stop_when(process, lambda: len(list(reports.glob("*.json"))) >= 3, number)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in said, said
        assert said.endswith("stopped: what is finished is kept, the same command goes on from there\n")
    first = {path.stem: path.stat().st_mtime_ns for path in reports.glob("*.json")}
    assert 3 <= len(first) < 500 and not (tmp_path / "killed" / "mine").exists()
    shards = reports.parents[1] / "shards" / "mine" / "mine"
    kept = {stem: (shards / f"mine-{stem}.tar").stat().st_mtime_ns for stem in first}
    assert main(arguments("killed", 1)) == 0
    again = capsys.readouterr()
    assert everything_in(tmp_path / "killed" / "mine") == everything_in(tmp_path / "plain" / "mine")
    assert kept == {stem: (tmp_path / "killed" / "mine" / f"mine-{stem}.tar").stat().st_mtime_ns for stem in kept}
    assert again.out.replace("/killed/", "/plain/") == plain.out and "bad_record: 15" in plain.out
    named = [line for line in plain.err.splitlines() if ": bad_record: " in line]
    assert len(named) == 15 and named == [line for line in again.err.splitlines() if ": bad_record: " in line]
    assert "writing mine: 1500/1500" in again.err
    assert not (tmp_path / "killed" / ".prepare").exists()


@pytest.mark.slow
def test_a_toy_recipe_that_was_killed_goes_on_to_the_same_bytes_by_any_workers(tmp_path):
    target = "eagle_train.data.toy.build.toy_records"
    kinds = {"text": 2500, "shapes": 40, "bars": 40}
    facts = {"description": "d", "licence": "CC0-1.0", "origin": "here"}
    datasets = {
        kind: facts
        | {"shards": f"{kind}/*.tar", "build": {"_target_": target, "kind": kind, "split": "train", "seed": 0}}
        | {"num_samples": count}
        for kind, count in kinds.items()
    }
    for kind, card in datasets.items():
        card["build"]["num_samples"] = kinds[kind]
    recipe = {"name": "r", "description": "d", "sources": {kind: {"repeat": 1.0} for kind in kinds}}
    arguments = {}
    for out in ("plain", "killed"):
        (tmp_path / out).mkdir()
        (tmp_path / out / "r.yaml").write_text(json.dumps(recipe | {"datasets": datasets}))
        arguments[out] = ["data", "build", f"recipe={tmp_path / out / 'r.yaml'}", f"data_root={tmp_path / out}"]
    assert main([*arguments["plain"], "workers=1"]) == 0
    work = tmp_path / "killed" / ".prepare" / "r"
    stop_when(fork([*arguments["killed"], "workers=2"]), lambda: list((work / "reports").rglob("*.json")))
    assert work.exists()
    assert main([*arguments["killed"], "workers=1"]) == 0
    assert everything_in(tmp_path / "killed") == everything_in(tmp_path / "plain")
    assert len(list((tmp_path / "plain").rglob("*.tar"))) == 3 + 1 + 1
