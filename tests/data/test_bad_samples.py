"""Every bad sample is a `SampleError` with key and reason, counted, and the books balance."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.catalog import Source
from eagle_train.data.index import ensure_index, index_path
from eagle_train.data.loader import RowDataset, RowTask
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.row_buffers import row_bytes
from eagle_train.data.shards import scan_shard, write_shards
from eagle_train.data.step_loader import StepLoader
from eagle_train.data.stream import steps
from eagle_train.tools.plan import make_plan
from eagle_train.train.app import train
from tests.catalogs import plan_config, read_catalog
from tests.data.loads import tiny_encoder
from tests.runs import KINDS, accounts, config, losses


def png(seed=0, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def record(answer="yes", images=1, shown=1, question="what is it?"):
    content = [{"type": "media", "index": i} for i in range(shown)] + [{"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    media = [{"kind": "image", "member": f"{i}.png"} for i in range(images)]
    return {"messages": turns, "media": media, "meta": {}}


def corrupt(seed=0):
    """A PNG whose header and end are whole and whose pixels are not: bad only when decoded."""
    data = png(seed, (200, 200))
    middle = len(data) // 2
    return data[:middle] + bytes(200) + data[middle + 200 :]


GOOD = [(f"good{i:03d}", record(), {"0.png": png(i)}) for i in range(20)]
BAD = {
    "unreadable_image": ("bad-header", record(), {"0.png": b"not an image"}),
    "missing_media": ("bad-member", record(), {}),
    "no_answer": ("bad-answer", record(answer=None), {"0.png": png(90)}),
    "placeholder_mismatch": ("bad-count", record(images=2, shown=1), {"0.png": png(91), "1.png": png(93)}),
    "too_long": ("bad-length", record(answer="very long " * 400), {"0.png": png(92)}),
    "bad_record": ("bad-role", {"messages": [{"role": "robot", "content": []}], "media": []}, {}),
}


@pytest.fixture
def encoder(data):
    return tiny_encoder(data)


def catalog(folder, samples, encoder, share=1.0):
    return read_catalog([Source(name="s", shards=write_shards(samples, folder / "s"))], encoder, 256, share=share)


def load(found, encoder, **changes):
    """Returns the steps of one epoch, with their rows."""
    config = plan_config(found, max_length=256, rows_per_step=1, **changes)
    loader = StepLoader(
        dataset=RowDataset(found, encoder),
        steps=steps(found, config),
        rank=0,
        world_size=1,
        micro_batches=1,
        num_workers=0,
    )
    return list(loader)


@pytest.mark.parametrize("reason", sorted(BAD))
def test_a_bad_sample_is_counted_with_its_key_and_reason(reason, tmp_path, encoder):
    found = catalog(tmp_path, [*GOOD, BAD[reason]], encoder)
    assert found.dropped() == {"s": {reason: 1}}
    ((number, error),) = found.errors()
    assert error.reason == reason and error.key == f"s/s-000000/{BAD[reason][0]}" == found.key(0, number)
    assert sum(len(row) for step, _ in load(found, encoder) for row in step.rows) == len(GOOD)


@pytest.mark.parametrize("reason", sorted(BAD.keys() - {"too_long"}))
def test_more_than_the_share_stops_with_the_list(reason, tmp_path, encoder):
    with pytest.raises(TooManyBadSamples, match="1 of 21 samples are bad") as stopped:
        catalog(tmp_path, [*GOOD, BAD[reason]], encoder, share=0.01)
    assert BAD[reason][0] in str(stopped.value) and reason in str(stopped.value)


def test_planned_lengths_are_encoded_lengths(encoder, data):
    sources = recipe_sources(load_recipe(str(data / "small.yaml")), data)
    found = read_catalog(sources, encoder, 512)
    dataset = RowDataset(found, encoder)
    seen = {source.name: 0 for source in sources}
    for number in range(len(found)):
        shard, row = found.locate(number)
        sizes = found.sizes(shard)
        layout = sizes.layout(row)
        sample = dataset.encode(number, layout, encoder.new_tiles(layout.media))
        assert len(sample.input_ids) == sizes.num_tokens[row] > 0
        assert len(sample.pixels) == sizes.num_tiles[row]
        assert (sample.loss_weights > 0).sum() == sizes.num_targets[row]
        seen[sample.source] += 1
    dataset.close()
    assert seen == {f"small_{kind}": count for kind, count in KINDS.items()}


def test_an_image_broken_behind_its_header_leaves_its_row_and_is_counted(tmp_path, encoder):
    found = catalog(tmp_path, [*GOOD, ("broken", record(), {"0.png": corrupt()})], encoder)
    assert not list(found.errors())
    loaded = load(found, encoder)
    assert sorted(key for _, (row,) in loaded for key in row.keys) == [f"s/s-000000/{key}" for key, _, _ in GOOD]
    assert [row.row for _, (row,) in loaded] == [step.first_row for step, _ in loaded] == list(range(len(loaded)))
    for step, (row,) in loaded:
        assert [use.index for use in row.uses] == step.rows[0].tolist()
        assert [use.num_tokens for use in row.uses if use.error is None] == row.cu_seqlens.diff().tolist()
        assert sum(use.num_tiles for use in row.uses) == row.num_images
    (error,) = [error for _, (row,) in loaded for _, error in row.errors]
    assert error.reason == "unreadable_image" and error.key == "s/s-000000/broken"


@pytest.mark.parametrize(("workers", "slot_bytes"), [(0, 0), (2, 0), (2, row_bytes(256, 4, 16)), (2, 1000)])
def test_a_bad_sample_gives_its_place_in_the_row_to_the_next(tmp_path, encoder, workers, slot_bytes):
    bad = {"0.png": corrupt(), "1.png": png(94), "2.png": corrupt(1)}
    images = {f"{k}.png": png(50 + k) for k in range(3)}
    samples = [GOOD[0], ("broken", record(), {"0.png": corrupt()}), ("three", record(images=3, shown=3), images)]
    samples += [("text", record(images=0, shown=0), {}), ("half", record(images=3, shown=3), bad)]
    pages = record(shown=1) | {"media": [{"kind": "document", "members": list(bad)}]}
    samples += [("pages", pages, {"0.png": png(95), "1.png": png(96), "2.png": corrupt(2)}), GOOD[1]]
    found = catalog(tmp_path / "all", samples, encoder)
    good = [number for number, (key, _, _) in enumerate(samples) if key not in ("broken", "half", "pages")]
    kept = catalog(tmp_path / "good", [samples[number] for number in good], encoder)
    wanted = RowDataset(kept, encoder)[RowTask(0, np.arange(len(good)))]
    nothing = np.array([1, 4, 5])  # no tile is left
    step = replace(
        next(steps(found, plan_config(found, max_length=256, rows_per_step=1))),
        rows=(np.arange(len(samples)), nothing),
        costs=np.array([2, 1]),
    )
    loader = StepLoader(
        dataset=RowDataset(found, encoder),
        steps=[step],
        rank=0,
        world_size=1,
        micro_batches=2,
        num_workers=workers,
        row_bytes=slot_bytes,
    )
    ((_, rows),) = loader
    row, empty = sorted(rows, key=lambda row: row.row)
    assert row.num_images == len(row.pixels) == 5 and len(row.keys) == 4 and len(row.errors) == 3
    for name in ("input_ids", "labels", "loss_weights", "position_ids", "cu_seqlens", "image_positions", "pixels"):
        assert torch.equal(getattr(row, name), getattr(wanted, name)), name
    assert [key.rpartition("/")[2] for key in row.keys] == ["good000", "three", "text", "good001"]
    assert empty.num_images == 0 and empty.pixels.shape == (1, 3, 16, 16) and not empty.pixels.any()
    assert empty.keys == () and len(empty.errors) == 3


def add_source(data, tmp_path, samples):
    """Returns the overrides of a run on one source of `samples`."""
    write_shards(samples, tmp_path / "mine")
    card = {"description": "", "licence": "", "origin": "", "shards": "mine/*.tar"}
    recipe = {"name": "mine", "description": "", "sources": {"mine": {"repeat": 1.0}}, "datasets": {"mine": card}}
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    return [
        f"schedule.sft.recipe={tmp_path / 'mine.yaml'}",
        "schedule.sft.num_steps=null",
        "schedule.sft.num_epochs=2",
        "schedule.pretrain.num_steps=1",
    ]


@pytest.mark.slow
def test_a_run_accounts_for_every_sample(data, tmp_path):
    samples = [*GOOD, BAD["no_answer"], BAD["too_long"], ("broken", record(), {"0.png": corrupt()})]
    more = add_source(data, tmp_path, samples)
    assert train(config(data, tmp_path / "run", *more, "data.max_bad_share=0.5"))
    entry = accounts(tmp_path / "run")["sft"]["mine"]
    assert entry["used"] == 2 * len(GOOD)
    assert entry["dropped"] == {"no_answer": 1, "too_long": 1, "unreadable_image": 2}  # decoded in both epochs
    assert entry["read"] == entry["used"] + sum(entry["dropped"].values())


@pytest.mark.slow
def test_a_run_accounts_for_what_is_cut_off(data, tmp_path):
    question, answer = (
        {"role": role, "content": [{"type": "text", "text": "hm " * 60}]} for role in ("user", "assistant")
    )
    long = ("long", {"messages": [question, answer] * 4, "media": [], "meta": {}}, {})
    more = [*add_source(data, tmp_path, [*GOOD, long]), "data.too_long._target_=eagle_train.data.too_long.KeepTurns"]
    chosen = config(data, tmp_path / "run", *more)
    assert train(chosen)
    entry = accounts(tmp_path / "run")["sft"]["mine"]
    assert entry["used"] == entry["read"] == 2 * (len(GOOD) + 1) and not entry["dropped"]
    cut = entry["shortened"]
    assert cut["samples"] == 1 and cut["turns"] in (2, 4, 6) and cut["tokens"] > 0
    assert make_plan(chosen, 1)["stages"][-1]["data"]["shortened"] == {"mine": cut}


@pytest.mark.slow
def test_a_run_stops_when_too_much_turns_out_bad_while_decoding(data, tmp_path):
    more = add_source(data, tmp_path, [*GOOD, ("broken", record(), {"0.png": corrupt()})])
    with pytest.raises(TooManyBadSamples, match="mine/mine-000000/broken: unreadable_image"):
        train(config(data, tmp_path / "run", *more))
    steps = len(losses(tmp_path / "run"))
    assert train(config(data, tmp_path / "run", *more, "data.max_bad_share=0.05"))
    assert len(losses(tmp_path / "run")) > steps


def test_a_shard_lost_since_the_build_counts_all_its_samples(tmp_path, encoder):
    shards = write_shards(GOOD, tmp_path / "s", samples_per_shard=5)
    shards[1].unlink()
    source = Source(name="s", shards=shards)
    found = read_catalog([source], encoder, 256, share=0.5)
    assert found.dropped() == {"s": {"missing_shard": 5}}
    assert sum(len(row) for step, _ in load(found, encoder) for row in step.rows) == 15
    with pytest.raises(TooManyBadSamples, match=r"5 of 20 samples are bad \(5 missing_shard"):
        read_catalog([source], encoder, 256, share=0.01)


def test_a_shard_lost_while_training_is_counted(tmp_path, encoder):
    found = catalog(tmp_path, GOOD, encoder)
    found.shards[0].location.unlink()
    row = RowDataset(found, encoder)[RowTask(7, np.arange(3))]
    assert row.keys == () and {error.reason for _, error in row.errors} == {"missing_shard"}
    assert row.row == 7 and [(use.index, use.error.reason) for use in row.uses] == [
        (index, "missing_shard") for index in range(3)
    ]


def test_a_missing_shard_says_what_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"no shard at .*toy/captions.*data build recipe=toy-pretrain"):
        recipe_sources(load_recipe("toy-pretrain"), tmp_path)


def test_all_that_is_missing_is_said_at_once(tmp_path):
    recipe = load_recipe("toy")
    missing = list(recipe.sources)
    assert len(missing) > 1
    with pytest.raises(ValueError) as error:
        recipe_sources(recipe, tmp_path)
    assert str(error.value).startswith(f"sources {', '.join(missing)}: no shard at {tmp_path}")
    assert f"and {len(missing) - 1} other places; run `python -m eagle_train data build" in str(error.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean toy-pretrain"):
        load_recipe("toy-pretrian")


def test_the_index_is_made_again_when_the_shard_changed(tmp_path):
    (shard,) = write_shards(GOOD[:2], tmp_path / "s")
    first = ensure_index(shard).stat().st_mtime_ns
    assert ensure_index(shard).stat().st_mtime_ns == first
    write_shards(GOOD, tmp_path / "s")
    ensure_index(shard)
    assert index_path(shard, None).stat().st_mtime_ns != first


def test_one_index_dir_serves_shards_of_equal_names(tmp_path):
    paths = {index_path(tmp_path / name / "00000.tar", tmp_path / "index") for name in ("a", "b")}
    assert len(paths) == 2


def test_an_unwritable_folder_says_index_dir(tmp_path):
    (shard,) = write_shards(GOOD[:2], tmp_path / "s")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="set index_dir to a writable folder"):
        ensure_index(shard, blocked / "x")
    assert ensure_index(shard, tmp_path / "elsewhere").parent == tmp_path / "elsewhere"


def test_a_torn_tar_is_refused(tmp_path):
    (shard,) = write_shards(GOOD, tmp_path / "s")
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match="not a whole tar"):
        list(scan_shard(shard))
