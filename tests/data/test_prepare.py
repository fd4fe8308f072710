"""A download becomes shards: every record of the annotation is in one source, written or named."""

import json
from contextlib import contextmanager

import pytest
import yaml

from eagle_train.__main__ import main
from eagle_train.data.prepare import prepare
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.schemas import parse_members
from eagle_train.data.shards import scan_shard
from eagle_train.data.split import Selector, image_of
from eagle_train.data.storage import open_shard
from tests.data.test_archives import tar_bytes, write_parts
from tests.data.test_build import picture

CARDS = {
    "docs": {"image": ["*/docvqa*/*"]},
    "scenes": {"image": ["*/coco/*"]},
    "text": {"image": [""]},
    "other": None,
}


@contextmanager
def silent(description, total):
    yield lambda count: None


def record(i, image=None):
    start = "<image>\n" if image else ""
    turns = [{"from": "human", "value": f"{start}Q{i}"}, {"from": "gpt", "value": f"A{i}"}]
    return {"id": i, "conversations": turns} | ({"image": image} if image else {})


def mixed(count=40):
    """Records of all four sources by turns, and the pictures they name."""
    names = ["docvqa/{}.png", "coco/train/{}.png", "-", "odd/{}.png"]
    records = [record(i, None if (name := names[i % 4]) == "-" else name.format(i)) for i in range(count)]
    return records, {r["image"]: picture((i, 0, 0)) for i, r in enumerate(records) if "image" in r}


def write_download(folder, records, pictures, layout, lines=False):
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    (folder / ("a.jsonl" if lines else "a.json")).write_text(text)
    if layout == "tar":
        (folder / "images.tar").write_bytes(tar_bytes(pictures, prefix="images/"))
    elif layout == "parts":
        write_parts(folder, "images.tar.part_", tar_bytes(pictures), 5, letters=True)
    else:
        for name, data in pictures.items():
            path = folder / layout / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def write_recipe(folder, cards=CARDS, annotation="a.json", **published):
    facts = {"description": "d", "licence": "CC0-1.0", "origin": "here", "num_samples": 10}
    datasets = {name: facts | {"shards": f"{name}/*.tar", "select": select} for name, select in cards.items()}
    published = {
        "download": "Get a.json and images.tar.",
        "annotation": annotation,
        "archives": ["*.tar*"],
        "media_roots": ["", "images"],
    } | published
    content = {
        "name": "mix",
        "description": "d",
        "sources": {name: {"repeat": 1.0} for name in cards},
        "published": published,
        "datasets": datasets,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mix.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_recipe(str(path))


def samples(recipe, root, name):
    """Key, id and media bytes of a source's samples."""
    found = []
    for shard in recipe.cards[name].find_shards(root):
        reader = open_shard(shard)
        for key, members in scan_shard(shard):
            data = {member.name: reader.read(member) for member in members}
            parsed = parse_members(data, key=key)
            found.append((key, parsed.meta["id"], [data[ref.ref] for ref in parsed.media]))
        reader.close()
    return found


def everything_in(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("layout", ["", "images", "tar", "parts"])
@pytest.mark.parametrize("lines", [False, True])
def test_every_record_is_in_the_source_of_its_folder(tmp_path, layout, lines):
    records, pictures = mixed()
    download = write_download(tmp_path / "from", records, pictures, layout, lines)
    recipe = write_recipe(tmp_path / "out", annotation="a.jsonl" if lines else "a.json")
    outcomes, defects = prepare(recipe, download, tmp_path / "out", progress=silent, samples_per_shard=4)
    assert not defects and [outcome.name for outcome in outcomes] == list(CARDS)
    assert all((o.found, o.read, o.written, o.errors, o.problem) == (10, 10, 10, (), None) for o in outcomes)
    for place, name in enumerate(CARDS):
        images = [[] if name == "text" else [pictures[records[i]["image"]]] for i in range(place, 40, 4)]
        expected = [(f"{i:08d}", i, image) for i, image in zip(range(place, 40, 4), images, strict=True)]
        assert samples(recipe, tmp_path / "out", name) == expected
    assert [len(source.shards) for source in recipe_sources(recipe, tmp_path / "out")] == [3, 3, 3, 3]
    assert not (tmp_path / "out" / ".prepare" / "mix").exists()


def test_a_prepared_source_is_left_as_it_is(tmp_path):
    download = write_download(tmp_path / "from", *mixed(), "tar")
    recipe = write_recipe(tmp_path / "out")
    prepare(recipe, download, tmp_path / "out", progress=silent)
    before = everything_in(tmp_path / "out")
    (download / "a.json").write_text("broken")
    assert prepare(recipe, download, tmp_path / "out", progress=silent) == ([], [])
    assert everything_in(tmp_path / "out") == before


@pytest.mark.slow
def test_workers_do_not_change_a_byte(tmp_path):
    download = write_download(tmp_path / "from", *mixed(), "parts")
    for workers in (1, 2):
        out = tmp_path / str(workers)
        prepare(write_recipe(out), download, out, progress=silent, workers=workers, samples_per_shard=3)
    assert everything_in(tmp_path / "1") == everything_in(tmp_path / "2")


def test_what_is_not_on_disk_is_said_and_the_rest_is_prepared(tmp_path):
    records, pictures = mixed()
    here = {name: data for name, data in pictures.items() if not name.startswith("coco")}
    download = write_download(tmp_path / "from", records, here, "tar")
    recipe = write_recipe(tmp_path / "out")
    outcomes, _ = prepare(recipe, download, tmp_path / "out", progress=silent, samples_per_shard=4)
    problems = {outcome.name: outcome.problem for outcome in outcomes if outcome.problem}
    assert list(problems) == ["scenes"] and "coco/train/ (10 records)" in problems["scenes"]
    assert next(o for o in outcomes if o.name == "scenes").images == (0, 3)
    with pytest.raises(ValueError, match=r"source scenes: no shard.*data prepare recipe=mix"):
        recipe_sources(recipe, tmp_path / "out")
    write_download(download, records, pictures, "tar")
    outcomes, _ = prepare(recipe, download, tmp_path / "out", progress=silent, samples_per_shard=4)
    assert [(o.name, o.written, o.problem) for o in outcomes] == [("scenes", 10, None)]
    assert len(recipe_sources(recipe, tmp_path / "out")) == 4


def test_a_download_without_its_annotation_is_said_for_every_source(tmp_path):
    outcomes, defects = prepare(write_recipe(tmp_path), tmp_path, tmp_path, progress=silent)
    assert [outcome.problem for outcome in outcomes] == [f"{tmp_path / 'a.json'} is not there"] * 4 and not defects


def test_records_of_no_source_stop_everything_and_are_counted_by_folder(tmp_path):
    download = write_download(tmp_path / "from", *mixed(), "tar")
    recipe = write_recipe(tmp_path / "out", {name: CARDS[name] for name in ("docs", "scenes")})
    with pytest.raises(ValueError, match=r"20 records of .*a\.json belong to no source: 10 in no image, 10 in odd;"):
        prepare(recipe, download, tmp_path / "out", progress=silent)
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_source_without_records_is_there_and_empty(tmp_path):
    records, pictures = mixed()
    download = write_download(
        tmp_path / "from", [r for r in records if "odd" not in r.get("image", "")], pictures, "tar"
    )
    recipe = write_recipe(tmp_path / "out")
    outcomes, _ = prepare(recipe, download, tmp_path / "out", progress=silent)
    assert (outcomes[-1].name, outcomes[-1].found, outcomes[-1].problem) == ("other", 0, None)
    assert [source.name for source in recipe_sources(recipe, tmp_path / "out")] == ["docs", "scenes", "text"]
    assert prepare(recipe, download, tmp_path / "out", progress=silent) == ([], [])


def test_bad_records_are_counted_and_named_within_the_share(tmp_path):
    records, pictures = mixed()
    del pictures["coco/train/5.png"]
    records[9]["conversations"] = []
    download = write_download(tmp_path / "from", records, pictures, "tar")
    recipe = write_recipe(tmp_path / "out")
    outcomes, _ = prepare(recipe, download, tmp_path / "out", progress=silent, samples_per_shard=3)
    bad = {outcome.name: outcome.problem for outcome in outcomes if outcome.problem}
    assert list(bad) == ["scenes"] and "of 10 samples are bad" in bad["scenes"] and "00000005" in bad["scenes"]
    outcomes, _ = prepare(recipe, download, tmp_path / "out", progress=silent, samples_per_shard=3, max_bad_share=0.2)
    (scenes,) = outcomes
    assert (scenes.read, scenes.written) == (10, 8)
    assert [(e.key, e.reason) for e in scenes.errors] == [("00000005", "missing_media"), ("00000009", "no_answer")]
    report = json.loads((tmp_path / "out" / "scenes" / "prepared.json").read_text())
    assert report["read"] == report["written"] + len(report["errors"]) == 10


def test_too_many_bad_records_are_refused_again_when_nothing_is_left_to_build(tmp_path):
    records = [record(i) | ({"conversations": []} if i == 1 else {}) for i in range(10)]
    download = write_download(tmp_path / "from", records, {}, "")
    recipe = write_recipe(tmp_path / "out", {"text": None})
    for _ in range(2):
        (outcome,), _ = prepare(recipe, download, tmp_path / "out", progress=silent)
        assert "1 of 10" in outcome.problem and not recipe.cards["text"].is_there(tmp_path / "out")


def test_every_line_that_is_no_json_is_a_bad_record(tmp_path):
    folder = tmp_path / "from"
    folder.mkdir()
    lines = [json.dumps(record(i)).encode() for i in range(9)]
    (folder / "a.jsonl").write_bytes(b"\n".join([*lines[:5], b'{"id": 1, "conver', *lines[5:]]))
    recipe = write_recipe(tmp_path / "out", {"text": {"image": [""]}}, annotation="a.jsonl")
    (outcome,), _ = prepare(recipe, folder, tmp_path / "out", progress=silent, max_bad_share=0.1)
    assert (outcome.read, outcome.written) == (10, 9)
    assert [(error.key, error.reason) for error in outcome.errors] == [("00000005", "bad_record")]


@pytest.mark.parametrize("empty", ["", "None", "none", "nan", None, float("nan")])
def test_cambrian_records_without_image_are_text(tmp_path, empty):
    turns = [{"from": "system", "value": "Be brief."}, *record(0)["conversations"]]
    records = [{"id": 0, "image": empty, "conversations": turns, "source": "x.json"}]
    download = write_download(tmp_path / "from", records, {}, "", lines=True)
    recipe = write_recipe(tmp_path / "out", annotation="a.jsonl")
    prepare(recipe, download, tmp_path / "out", progress=silent)
    assert samples(recipe, tmp_path / "out", "text") == [("00000000", 0, [])]
    (shard,) = recipe.cards["text"].find_shards(tmp_path / "out")
    reader = open_shard(shard)
    ((_, members),) = scan_shard(shard)
    parsed = parse_members({m.name: reader.read(m) for m in members}, key="k")
    assert [m.role for m in parsed.messages] == ["system", "user", "assistant"]
    assert parsed.messages[0].content == ("Be brief.",)
    reader.close()


@pytest.mark.parametrize(
    ("record", "source"),
    [
        ({"image": "COCO/train/1.jpg"}, "scenes"),
        ({"image": "./images/coco/1.jpg"}, "scenes"),
        ({"image": ["docvqa_v2/1.jpg", "coco/1.jpg"]}, "docs"),
        ({"images": ["coco/1.jpg"]}, "scenes"),
        ({"image": "cocoa/1.jpg"}, "other"),
        ({"image": "coco.jpg"}, "other"),
        ({"image": []}, "text"),
        ({}, "text"),
        ("no record", "text"),
    ],
)
def test_the_first_card_that_matches_takes_a_record(record, source):
    assert Selector(CARDS).source_of(record) == source


def test_cards_may_select_by_any_field():
    selector = Selector({"lvis": {"source": ["lvis_*.json"], "image": ["*/coco/*"]}})
    assert selector.source_of({"source": "LVIS_220k.json", "image": "coco/1.jpg"}) == "lvis"
    assert selector.source_of({"source": "lvis_220k.json"}) is None
    assert selector.source_of({"image": "coco/1.jpg"}) is None
    assert image_of({"image": "./a//b.jpg"}) == "a/b.jpg"


@pytest.mark.parametrize("path", ["../../secret.png", "http://127.0.0.1:9/y.png", "a\0b.png"])
def test_paths_that_lead_out_are_refused(tmp_path, path):
    (tmp_path / "secret.png").write_bytes(picture((1, 2, 3)))
    records = [record(0, "here.png"), record(1, path)]
    download = write_download(tmp_path / "x" / "from", records, {"here.png": picture((0, 0, 0))}, "")
    recipe = write_recipe(tmp_path / "out", {"all": None})
    (outcome,), _ = prepare(recipe, download, tmp_path / "out", progress=silent, max_bad_share=0.5)
    assert outcome.written == 1 and outcome.errors[0].reason in ("bad_record", "missing_media")


def test_a_changed_annotation_is_split_again(tmp_path):
    records, pictures = mixed()
    few = {name: data for name, data in pictures.items() if not name.startswith("coco")}
    download = write_download(tmp_path / "from", records, few, "")
    recipe = write_recipe(tmp_path / "out")
    prepare(recipe, download, tmp_path / "out", progress=silent)
    write_download(download, records[:20], pictures, "")
    (scenes,), _ = prepare(recipe, download, tmp_path / "out", progress=silent)
    assert (scenes.name, scenes.found, scenes.written) == ("scenes", 5, 5)


def test_the_command_says_what_is_missing_and_where_it_belongs(tmp_path, capsys):
    records, pictures = mixed()
    here = {name: data for name, data in pictures.items() if not name.startswith("coco")}
    download = write_download(tmp_path / "from", records, here, "tar")
    write_recipe(tmp_path / "out")
    arguments = ["data", "prepare", f"recipe={tmp_path / 'out' / 'mix.yaml'}", f"from={download}"]
    assert main([*arguments, f"data_root={tmp_path / 'out'}"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 sources are not there. Get a.json and images.tar. Put it in" in shown and "read 10 =" in shown


def test_the_command_refuses_unknown_words(capsys):
    assert main(["data", "prepare", "recipe=toy"]) == 1
    assert "['from'] must be given" in capsys.readouterr().err
    assert main(["data", "prepare", "recipe=toy", "from=x", "worker=2"]) == 1
    assert "unknown ['worker']" in capsys.readouterr().err
    assert main(["data", "prepare", "recipe=toy", "from=x"]) == 1
    assert "names no download" in capsys.readouterr().err
