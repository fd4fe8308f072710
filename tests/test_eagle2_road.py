"""Eagle 2.5's road at toy size: every kind of media, through growing rows under Automatic Degrade Sampling."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import yaml

from eagle_train.__main__ import main
from eagle_train.data.ledger import USED
from eagle_train.data.ledger_keys import KeyBook
from eagle_train.data.ledger_read import read_ledger
from eagle_train.data.open_catalog import open_catalog
from eagle_train.data.shards import write_shards
from eagle_train.tools.data_arguments import experiment_rows
from eagle_train.track.jsonl import read_metrics
from eagle_train.train.app import train
from eagle_train.train.checkpoint import CheckpointDir
from eagle_train.train.config import load_config
from tests.data.test_bad_samples import corrupt, png
from tests.data.test_video_faults import NOISE, damaged_middle
from tests.data.test_videos import video
from tests.runs import accounts, losses, rows
from tests.test_resume import run_until, weights

# More workers than cores.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This DataLoader will create")]
DATA = os.environ.get("EAGLE_TRAIN_TEST_DATA")
LENGTHS = {"short": 128, "middle": 256, "long": 768}
SMALL = (
    "llm.hidden_size=32",
    "llm.intermediate_size=64",
    "llm.num_hidden_layers=1",
    "llm.num_attention_heads=2",
    "mixture.encoders.siglip.hidden_size=16",
    "mixture.encoders.siglip.intermediate_size=32",
    "mixture.encoders.siglip.num_hidden_layers=1",
    "mixture.encoders.siglip.num_attention_heads=2",
    "schedule.pretrain.num_steps=1",
    *(f"schedule.{stage}.max_length={length}" for stage, length in LENGTHS.items()),
    *(f"schedule.{stage}.num_steps=null" for stage in LENGTHS),
    *(f"schedule.{stage}.num_epochs=1" for stage in LENGTHS),
    *(f"schedule.{stage}.rows_per_step={rows}" for stage, rows in zip(LENGTHS, (4, 2, 1), strict=True)),
    *(f"schedule.{stage}.degrade.frames.fps=2.0" for stage in LENGTHS),
    "data.max_bad_share=0.5",
    "tracker.wandb=null",
    "save_every=2",
)
FILM, LONG_FILM = video(60), video(240)


def sample(key, media, files=()):
    """Returns a sample that asks about all of `media`."""
    content = [*({"type": "media", "index": index} for index in range(len(media))), {"type": "text", "text": "Why?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"Because of {key}."}]
    return key, {"messages": messages, "media": media, "meta": {"type": key.rstrip("0123456789")}}, dict(files)


def image(place):
    return {"kind": "image", "member": f"{place}.png"}


def listed(kind, place, count, **more):
    """Returns a list of pictures as one medium, and their files."""
    files = {f"{place}.{i}.png": png(10 * place + i, (40, 30)) for i in range(count)}
    return {"kind": kind, "members": list(files), **more}, files


def make_samples():
    """Returns samples of every kind, one with a broken image and one with a broken video among them."""
    frames, frame_files = listed("video", 0, 24, fps=2.0)
    pages, page_files = listed("document", 1, 10)
    clip = {"kind": "video", "member": "2.mp4", "start": 1.0, "end": 5.5}
    film = {"kind": "video", "member": "2.mp4"}
    good = []
    for i in range(3):
        pictures = {f"{place}.png": png(100 + 5 * i + place, (64 + 40 * i, 96)) for place in range(5)}
        several = [image(place) for place in range(3)]
        every = [image(3), clip, pages, image(4), frames]
        good += [
            sample(f"image{i}", [image(0)], pictures.items()),
            sample(f"several{i}", several, pictures.items()),
            sample(f"film{i}", [film], {"2.mp4": LONG_FILM if i else FILM}.items()),
            sample(f"clip{i}", [clip], {"2.mp4": FILM}.items()),
            sample(f"frames{i}", [frames], frame_files.items()),
            sample(f"document{i}", [pages], page_files.items()),
            sample(f"every{i}", every, (pictures | frame_files | page_files | {"2.mp4": FILM}).items()),
            sample(f"text{i}", []),
        ]
    return [
        *good,
        sample("torn", [image(0)], {"0.png": corrupt()}.items()),
        sample("damaged", [film], {"2.mp4": damaged_middle(NOISE)}.items()),
    ]


SAMPLES = make_samples()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Returns the recipe of all samples."""
    root = tmp_path_factory.mktemp("road")
    write_shards(SAMPLES, root / "road", samples_per_shard=7)
    card = {"description": "", "licence": "", "origin": "", "shards": "road/*.tar"}
    found = {"name": "road", "description": "", "sources": {"road": {"repeat": 1.0}}, "evaluation": ["road"]}
    (root / "road.yaml").write_text(yaml.safe_dump(found | {"datasets": {"road": card}}))
    return root / "road.yaml"


def overrides(recipe, tokenizer, run, *more):
    """Returns the overrides of a run on a recipe beside its shards."""
    here = [f"schedule.{stage}.recipe={recipe}" for stage in ("pretrain", *LENGTHS)]
    paths = [f"data_root={recipe.parent}", f"tokenizer={tokenizer}", f"run_dir={run}"]
    return ["+experiment=toy-eagle2.5", *paths, *here, *SMALL, *more]


@pytest.fixture(scope="module")
def run(data, recipe, tmp_path_factory):
    """Returns the undisturbed run, made without workers and evaluated on its own samples."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    evaluated = ("evaluation.sources=[road]", "evaluation.num_frames=[1,5]", "evaluation.max_new_tokens=2")
    assert train(load_config(overrides(recipe, data / "tokenizer", run, *evaluated, "data.num_workers=0")))
    return run


def uses(run, stage):
    """Returns what the ledger says of each used sample of a stage, by tar key."""
    table = read_ledger(run / "ledger", stage)
    book = KeyBook(table.shards)
    used = table.records[table.records["status"] == USED]
    found = {book.key(int(use["shard"]), int(use["index"])): use for use in used}
    assert len(found) == len(used)
    return {key.rpartition("/")[2]: use for key, use in found.items()}


def test_longer_rows_have_more_frames_and_tiles_of_the_same_samples(run):
    good = {key for key, *_ in SAMPLES} - {"torn", "damaged"}
    short, middle, long = (uses(run, stage) for stage in LENGTHS)
    assert short.keys() == middle.keys() == long.keys() == good
    for fewer, more in ((short, middle), (middle, long)):
        for key in good:
            assert fewer[key]["num_frames"] <= more[key]["num_frames"], key
            assert fewer[key]["num_tiles"] <= more[key]["num_tiles"], key
            assert fewer[key]["num_targets"] == more[key]["num_targets"] > 0, key
        assert any(fewer[key]["num_frames"] < more[key]["num_frames"] for key in good)
    grown = {key.rstrip("012") for key in good if short[key]["num_tiles"] < long[key]["num_tiles"]}
    assert grown == {"several", "film", "frames", "every"}, "others have all they ask for in short rows already"
    assert [long[key]["num_frames"] for key in ("film1", "clip0", "frames0", "document0")] == [48, 9, 24, 10]
    assert long["every0"]["num_frames"] == 9 + 10 + 24 and long["every0"]["num_tiles"] > 43 + 2
    assert short["text0"]["num_tokens"] == long["text0"]["num_tokens"]


def test_every_sample_takes_the_tokens_that_were_planned(run, recipe, data):
    for planned in experiment_rows(overrides(recipe, data / "tokenizer", run)):
        catalog = open_catalog(planned.sources, planned.layout.fingerprint, max_bad_share=1.0)
        layouts = {catalog.key(*catalog.locate(n)): catalog.layout_of(n) for n in range(len(catalog))}
        layouts = {key.rpartition("/")[2]: layout for key, layout in layouts.items()}
        for key, use in uses(run, planned.name).items():
            layout = layouts[key]
            assert use["num_tokens"] == layout.num_tokens <= planned.layout.max_length
            assert (use["num_targets"], use["num_frames"]) == (layout.num_targets, layout.num_frames)
            assert use["num_tiles"] == sum(plan.num_tiles for plan in layout.media)


def test_broken_files_are_counted_and_the_books_balance(run, capsys):
    for stage in LENGTHS:
        entry = accounts(run)[stage]["road"]
        assert entry["read"] == len(SAMPLES) == entry["used"] + sum(entry["dropped"].values())
        assert entry["dropped"] == {"unreadable_image": 1, "unreadable_video": 1}
    assert main(["trace", "--bad", str(run)]) == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert sorted(key.rpartition("/")[2] for key in listed) == ["damaged", "torn"]


def test_all_kinds_are_evaluated_and_asked_about(run, tmp_path, capsys):
    scores = [record for record in read_metrics(run / "metrics.jsonl") if "eval/dropped" in record]
    assert len(scores) == 1 and scores[0]["eval/dropped"] == 2
    for view, types in {"eval": 8, "eval_shuffled": 4, "eval_frames_1": 4, "eval_frames_5": 4}.items():
        assert sum(name.startswith(f"{view}/exact_match/") for name in scores[0]) == types
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.mp4").write_bytes(FILM)
    files = ["--image", str(tmp_path / "a.png"), "--video", str(tmp_path / "b.mp4")]
    assert main(["chat", str(run), *files, "Why?", "--max-new-tokens", "2"]) == 0
    (tmp_path / "b.mp4").write_bytes(damaged_middle(NOISE))
    assert main(["chat", str(run), *files, "Why?", "--max-new-tokens", "2"]) == 1
    assert "unreadable_video: b.mp4" in capsys.readouterr().err


def test_workers_and_a_stop_in_the_second_stage_change_nothing(run, recipe, data, tmp_path, monkeypatch):
    records = [record for record in read_metrics(run / "metrics.jsonl") if "train/loss" in record]
    steps = Counter(record["stage"] for record in records)
    begin = steps["pretrain"] + steps["short"]
    assert steps["middle"] > 5
    config = load_config(overrides(recipe, data / "tokenizer", tmp_path, "evaluation=none", "data.num_workers=2"))
    run_until(config, begin + 4, monkeypatch)
    latest = int(CheckpointDir(tmp_path / "checkpoints").latest().name.rpartition("-")[2])
    assert begin < latest < begin + 4, "steps of the second stage are kept, and others made again"
    assert train(config)
    assert losses(tmp_path) == losses(run)
    assert rows(tmp_path) == rows(run)
    assert weights(tmp_path) == weights(run)
    assert accounts(tmp_path) == accounts(run)


@pytest.mark.skipif(DATA is None, reason="EAGLE_TRAIN_TEST_DATA names no folder of real files")
def test_real_files_are_used_and_broken_ones_counted(data, tmp_path):
    """Needs `images/` and `videos/` in that folder; broken are `images/broken/*` and `videos/corrupted.mp4`."""
    root = Path(DATA)
    images = [path for path in sorted((root / "images").rglob("*")) if path.is_file()]
    videos = [path for path in sorted((root / "videos").iterdir()) if path.is_file()]
    if not images or not videos:
        pytest.skip(f"no images/ and videos/ in {root}")
    records = [
        {"id": path.name, kind: str(path), "conversations": [
            {"from": "human", "value": f"<{kind}>\nWhat is it?"}, {"from": "gpt", "value": f"It is {path.stem}."}
        ]}
        for kind, paths in (("image", images), ("video", videos)) for path in paths
    ]  # fmt: skip
    (tmp_path / "real.json").write_text(json.dumps(records))
    build = ["data", "build", "name=real", f"annotation={tmp_path}/real.json", f"out={tmp_path}", "workers=1"]
    assert main([*build, "media_root=/"]) == 0
    chosen = overrides(tmp_path / "real.yaml", data / "tokenizer", tmp_path / "run", "evaluation=none")
    assert train(load_config(chosen))
    broken = sum("broken" in path.parts for path in images)
    for stage in LENGTHS:
        entry = accounts(tmp_path / "run")[stage]["real"]
        assert entry["read"] == len(records)
        assert entry["dropped"] == {"unreadable_image": broken, "unreadable_video": 1}
        assert entry["used"] == len(records) - broken - 1
