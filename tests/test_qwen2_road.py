"""Qwen2-VL's road at toy size: every kind of media at native resolution, from headers to answers and back."""

import json

import pytest
import torch

from eagle_train.__main__ import main
from eagle_train.data.loader import RowDataset, RowTask
from eagle_train.data.open_catalog import open_catalog
from eagle_train.tools.data_arguments import experiment_rows
from eagle_train.track.jsonl import read_metrics
from eagle_train.train.app import train
from eagle_train.train.config import load_config
from tests.data.test_bad_samples import png
from tests.runs import accounts, losses, rows
from tests.test_eagle2_road import FILM, SAMPLES, recipe, uses  # noqa: F401 (a fixture)
from tests.test_resume import run_until, weights

# More workers than cores.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:This DataLoader will create")]
SMALL = (
    "llm.hidden_size=32",
    "llm.intermediate_size=64",
    "llm.num_hidden_layers=1",
    "llm.num_attention_heads=2",
    "llm.num_key_value_heads=2",
    "llm.rope_parameters.mrope_section=[2,3,3]",
    "mixture.encoders.qwen2_vit.hidden_size=16",
    "mixture.encoders.qwen2_vit.num_hidden_layers=1",
    "mixture.encoders.qwen2_vit.num_attention_heads=2",
    "schedule.pretrain.num_steps=1",
    "schedule.sft.max_length=200",
    "schedule.sft.num_steps=null",
    "schedule.sft.num_epochs=1",
    "schedule.sft.rows_per_step=2",
    "degrade.frames.max_frames=24",
    "data.max_bad_share=0.5",
    "data.tiling.max_pixels=16384",
    "tracker.wandb=null",
    "save_every=2",
)
BROKEN = {"torn", "damaged"}


def overrides(recipe, tokenizer, run, *more):  # noqa: F811
    """Returns the overrides of a run on a recipe beside its shards."""
    here = [f"schedule.{stage}.recipe={recipe}" for stage in ("pretrain", "sft")]
    paths = [f"data_root={recipe.parent}", f"tokenizer={tokenizer}", f"run_dir={run}"]
    return ["+experiment=toy-qwen2-vl", *paths, *here, *SMALL, *more]


@pytest.fixture(scope="module")
def run(data, recipe, tmp_path_factory):  # noqa: F811
    """Returns the undisturbed run, made without workers and evaluated on its own samples."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    evaluated = ("evaluation.sources=[road]", "+evaluation.num_frames=[1,5]", "evaluation.max_new_tokens=2")
    assert train(load_config(overrides(recipe, data / "tokenizer", run, *evaluated, "data.num_workers=0")))
    return run


def test_every_sample_takes_the_tokens_that_were_planned(run, recipe, data):  # noqa: F811
    (planned,) = experiment_rows(overrides(recipe, data / "tokenizer", run), "sft")
    catalog = open_catalog(planned.sources, planned.layout.fingerprint, max_bad_share=1.0)
    layouts = {catalog.key(*catalog.locate(n)): catalog.layout_of(n) for n in range(len(catalog))}
    layouts = {key.rpartition("/")[2]: layout for key, layout in layouts.items()}
    found = uses(run, "sft")
    assert found.keys() == {key for key, *_ in SAMPLES} - BROKEN
    for key, use in found.items():
        layout = layouts[key]
        assert use["num_tokens"] == layout.num_tokens <= 200
        assert use["num_tiles"] == layout.num_tiles and use["num_targets"] == layout.num_targets > 0
    assert found["every0"]["num_frames"] < 8 + 10 + 24, "a row has no room for all that its media ask for"
    assert any(plan.frames_per_tile == 2 and plan.num_frames > 2 for plan in layouts["film1"].media)


def test_rows_carry_grids_and_positions_of_their_tiles(run, recipe, data):  # noqa: F811
    (planned,) = experiment_rows(overrides(recipe, data / "tokenizer", run), "sft")
    catalog = open_catalog(planned.sources, planned.layout.fingerprint, max_bad_share=1.0)
    dataset = RowDataset(catalog, planned.layout.encoder)
    keys = [catalog.key(*catalog.locate(n)).rpartition("/")[2] for n in range(len(catalog))]
    chosen = torch.tensor([keys.index(key) for key in ("every1", "text0", "several2")]).numpy()
    row = dataset[RowTask(0, chosen)]
    dataset.close()
    assert row.pixels.shape == (row.num_images, 3, 2, 16, 16) and row.position_ids.shape == (4, len(row.input_ids))
    assert sum(t * h * w for t, h, w in row.grids) == row.num_images == len(row.image_positions)
    lengths = row.cu_seqlens.diff().tolist()
    assert row.position_ids[0].tolist() == [n for length in lengths for n in range(length)]
    text = slice(int(row.cu_seqlens[1]), int(row.cu_seqlens[2]))
    assert (row.position_ids[:, text] == row.position_ids[0, text]).all()
    tokenizer = planned.layout.encoder.tokenizer
    image, video = (tokenizer.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|video_pad|>"))
    assert set(row.input_ids[row.image_positions].tolist()) == {image, video}
    bytes_of_row = sum(v.nbytes for v in (row.input_ids, row.labels, row.position_ids, row.pixels, row.image_positions))
    assert bytes_of_row <= planned.layout.encoder.row_bytes(len(row.input_ids))


def test_broken_files_are_counted_and_the_rest_is_evaluated(run):
    entry = accounts(run)["sft"]["road"]
    assert entry["read"] == len(SAMPLES) == entry["used"] + sum(entry["dropped"].values())
    assert entry["dropped"] == {"unreadable_image": 1, "unreadable_video": 1}
    (scores,) = [record for record in read_metrics(run / "metrics.jsonl") if "eval/dropped" in record]
    assert scores["eval/dropped"] == 2
    for view, types in {"eval": 8, "eval_shuffled": 4, "eval_frames_1": 4, "eval_frames_5": 4}.items():
        assert sum(name.startswith(f"{view}/exact_match/") for name in scores) == types
    gallery = json.loads((run / "gallery" / "gallery.json").read_text())
    several = next(entry for entry in gallery if entry["type"] == "several")
    assert len(several["images"]) == 3, "one picture of each image, not its tiles"


def test_images_and_videos_are_asked_about(run, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.mp4").write_bytes(FILM)
    files = ["--image", str(tmp_path / "a.png"), "--video", str(tmp_path / "b.mp4")]
    assert main(["chat", str(run), *files, "Why?", "--max-new-tokens", "2"]) == 0


def test_tools_tell_of_native_resolution(run, recipe, data, tmp_path, capsys):  # noqa: F811
    here = overrides(recipe, data / "tokenizer", run)
    assert main(["data", "preview", *here, "--rows", "2", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert " px" in page and "video 1" in page and "tiles (" not in page
    assert main(["data", "stats", *here, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stats["plans"][-1]["num_tiles"] > 0
    assert main(["plan", *here, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["encoders"]["qwen2_vit"]["flops_per_pair"] > 0
    used = sum(int(use["num_tiles"]) for use in uses(run, "sft").values())
    assert plan["stages"][1]["data"]["num_tiles"] > used > 1000, "broken files are planned, as their headers are whole"


def test_workers_and_a_stop_change_nothing(run, recipe, data, tmp_path, monkeypatch):  # noqa: F811
    assert len(losses(run)) > 5
    config = load_config(overrides(recipe, data / "tokenizer", tmp_path, "evaluation=none", "data.num_workers=2"))
    run_until(config, 4, monkeypatch)
    assert train(config)
    assert losses(tmp_path) == losses(run)
    assert rows(tmp_path) == rows(run)
    assert weights(tmp_path) == weights(run)
