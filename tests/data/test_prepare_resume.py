"""A preparation that was stopped or killed goes on where it was, to the same bytes."""

import io
import json
import os
import signal
import time
import zipfile

import pytest

from eagle_train.__main__ import main
from eagle_train.data import build_sources
from eagle_train.data.pieces import build_piece
from eagle_train.data.prepare import prepare
from tests.data.test_build import picture
from tests.data.test_prepare import CARDS, everything_in, mixed, record, silent, write_download, write_recipe
from tests.runs import fork


def test_a_run_that_was_stopped_goes_on_with_the_pieces_that_are_not_done(tmp_path, monkeypatch):
    download = write_download(tmp_path / "from", *mixed(), "tar")
    plain, stopped = write_recipe(tmp_path / "plain"), write_recipe(tmp_path / "stopped")
    prepare(plain, download, tmp_path / "plain", progress=silent, samples_per_shard=2)
    built = []

    def build(piece):
        if len(built) == 7:
            raise KeyboardInterrupt
        built.append(piece.shard.name)
        return build_piece(piece)

    monkeypatch.setattr(build_sources, "build_piece", build)
    with pytest.raises(KeyboardInterrupt):
        prepare(stopped, download, tmp_path / "stopped", progress=silent, samples_per_shard=2)
    assert [name for name in CARDS if stopped.cards[name].is_there(tmp_path / "stopped")] == ["docs"]
    first, built[:] = set(built), []
    monkeypatch.setattr(
        build_sources, "build_piece", lambda piece: built.append(piece.shard.name) or build_piece(piece)
    )
    outcomes, _ = prepare(stopped, download, tmp_path / "stopped", progress=silent, samples_per_shard=2)
    assert [outcome.read for outcome in outcomes] == [10, 10, 10]
    assert len(first) == 7 and len(built) == 13 and not first & set(built)
    assert everything_in(tmp_path / "stopped") == everything_in(tmp_path / "plain")


def test_an_archive_that_was_repaired_is_read_again(tmp_path):
    records = [record(i, f"{i}.png") for i in range(4)]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"{i}.png", picture((i, 0, 0)) + bytes(1000))
    whole = file.getvalue()
    at = whole.index(b"2.png") + len("2.png")
    download = tmp_path / "from"
    download.mkdir()
    (download / "a.json").write_text(json.dumps(records))
    (download / "x.zip").write_bytes(whole[:at] + b"\xff" * 20 + whole[at + 20 :])
    recipe = write_recipe(tmp_path / "out", {"all": None}, archives=["*.zip"])
    (outcome,), _ = prepare(recipe, download, tmp_path / "out", progress=silent, samples_per_shard=2)
    assert "(1 unreadable_image)" in outcome.problem
    (download / "x.zip").write_bytes(whole)
    (outcome,), _ = prepare(recipe, download, tmp_path / "out", progress=silent, samples_per_shard=2)
    assert (outcome.problem, outcome.written) == (None, 4)


def test_an_archive_of_the_same_size_is_listed_again(tmp_path):
    names = {"0.png": picture((0, 0, 0)), "1.png": picture((0, 0, 1))}
    swapped = dict(zip(names, reversed(names.values()), strict=True))
    records = [record(0, "0.png"), record(1, "2.png")]
    download = write_download(tmp_path / "from", records, names, "tar")
    recipe = write_recipe(tmp_path / "out", {"all": None})
    (outcome,), _ = prepare(recipe, download, tmp_path / "out", progress=silent)
    assert "(1 missing_media)" in outcome.problem
    write_download(download, records, {"0.png": swapped["0.png"], "2.png": swapped["1.png"]}, "tar")
    (outcome,), _ = prepare(recipe, download, tmp_path / "out", progress=silent)
    assert (outcome.problem, outcome.written) == (None, 2)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    records = [record(i, f"coco/{i}.png") for i in range(400)]
    pictures = {r["image"]: picture((i % 256, i // 256, 0)) for i, r in enumerate(records)}
    download = write_download(tmp_path / "from", records, pictures, "tar")
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    prepare(write_recipe(plain, {"all": None}), download, plain, progress=silent, samples_per_shard=1)
    write_recipe(killed, {"all": None})
    arguments = ["data", "prepare", f"recipe={killed / 'mix.yaml'}", f"from={download}", f"data_root={killed}"]
    process = fork([*arguments, "samples_per_shard=1"])
    reports = killed / ".prepare" / "mix" / "reports" / "all"
    deadline = time.monotonic() + 120
    while len(list(reports.glob("*.json"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    first = {path: path.stat().st_mtime_ns for path in reports.glob("*.json")}
    assert 5 <= len(first) < 400 and not (killed / "all").exists()
    shards = killed / ".prepare" / "mix" / "shards" / "all" / "all"
    kept = {path.stem: (shards / f"all-{path.stem}.tar").stat().st_mtime_ns for path in first}
    assert main([*arguments, "samples_per_shard=1"]) == 0
    assert everything_in(killed / "all") == everything_in(plain / "all")
    assert kept == {stem: (killed / "all" / f"all-{stem}.tar").stat().st_mtime_ns for stem in kept}
