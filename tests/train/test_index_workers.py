"""Ranks build missing indexes with the processes that the config gives them, to the same bytes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from eagle_train.data.layout import layout_path
from eagle_train.tools.data_arguments import experiment_rows
from eagle_train.train import stage_data
from eagle_train.train.config import build, load_config
from tests.runs import overrides


@pytest.mark.parametrize(
    ("given", "workers"),
    [
        (["data.num_workers=3"], 3),
        (["data.num_workers=0"], 1),
        (["data.num_workers=3", "data.index_workers=2"], 2),
    ],
)
def test_the_config_says_how_many_processes_build_indexes(data, tmp_path, monkeypatch, given, workers):
    asked = []
    monkeypatch.setattr(stage_data, "ensure_layouts", lambda shards, layout, **how: asked.append(how["workers"]))
    config = load_config(overrides(data, tmp_path, *given))
    stage_data.read_sources([], experiment_rows(overrides(data, tmp_path))[0].layout, build(config["data"]))
    assert asked == [workers]


@pytest.mark.slow
def test_processes_do_not_change_the_layouts(data, tmp_path):
    config = overrides(data, tmp_path)
    rows = experiment_rows(config)[0]
    (source,) = [source for source in rows.sources if source.name == "small_text"]
    made = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers) / "small_text"
        shutil.copytree(data / "small_text", folder, ignore=shutil.ignore_patterns("*.arrow"))
        own = replace(source, shards=[folder / Path(shard).name for shard in source.shards])
        settings = build(load_config([*config, f"data.index_workers={workers}"])["data"])
        stage_data.read_sources([own], rows.layout, settings)
        assert all(layout_path(shard.with_suffix(""), rows.layout.fingerprint).is_file() for shard in own.shards)
        made[workers] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made[1] == made[2] and len(made[1]) >= 2 * 4
