"""Building toy shards: complete or not at all, the same bytes every time, as the data recipes say."""

import importlib
import inspect
import json
import tarfile
from pathlib import Path

import pytest
import yaml

from eagle_train.data.toy.build import build_toy
from eagle_train.data.toy.samples import question_types, toy_sample

RECIPES = Path(__file__).parents[3] / "data_recipes"
TOY_DATASETS = sorted((RECIPES / "datasets").glob("toy_*.yaml"))


def test_shards_hold_the_samples(tmp_path):
    counts = []
    (path,) = build_toy(tmp_path / "a", kind="shapes", split="train", num_samples=3, seed=5, progress=counts.append)
    assert path.parent == tmp_path / "a" and counts == [1, 2, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    with tarfile.open(path) as tar:
        content = {info.name: tar.extractfile(info).read() for info in tar}
    assert len(content) == 6
    for index in range(3):
        key, record, media = toy_sample("shapes", "train", index, 5)
        assert json.loads(content[f"{key}.json"]) == record
        assert content[f"{key}.0.png"] == media["0.png"]


def test_equal_arguments_give_equal_bytes(tmp_path):
    for folder in ("one", "two"):
        build_toy(tmp_path / folder / "toy", kind="video", split="train", num_samples=4, seed=0)
    one, two = (next((tmp_path / folder).rglob("*.tar")).read_bytes() for folder in ("one", "two"))
    assert one == two and len(one) > 4000


def test_an_interrupted_build_leaves_no_shards_and_can_be_repeated(tmp_path):
    def stop(count):
        if count == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_toy(tmp_path / "a", kind="text", split="train", num_samples=3, seed=0, progress=stop)
    assert not (tmp_path / "a").exists()
    (path,) = build_toy(tmp_path / "a", kind="text", split="train", num_samples=3, seed=0)
    assert path.exists() and [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; delete it"):
        build_toy(tmp_path, kind="text", split="train", num_samples=3, seed=0)
    assert (tmp_path / "notes").read_text() == "mine"


def target_of(spec):
    module, _, name = spec["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", TOY_DATASETS, ids=lambda path: path.stem)
def test_dataset_files_bind_to_the_builder_and_name_what_it_makes(path, tmp_path):
    spec = yaml.safe_load(path.read_text())
    assert set(spec) == {"name", "description", "licence", "origin", "num_samples", "shards", "build"}
    assert spec["name"] == path.stem
    arguments = {key: value for key, value in spec["build"].items() if key != "_target_"}
    inspect.signature(target_of(spec["build"])).bind(tmp_path, **arguments)
    assert arguments["num_samples"] == spec["num_samples"]
    small = target_of(spec["build"])(tmp_path / Path(spec["shards"]).parent, **{**arguments, "num_samples": 2})
    assert small == sorted(tmp_path.glob(spec["shards"])) and len(small) == 1


def test_recipes_name_data_sets_that_exist_and_are_mostly_simple():
    sizes = {path.stem: yaml.safe_load(path.read_text())["num_samples"] for path in TOY_DATASETS}
    toy = yaml.safe_load((RECIPES / "toy.yaml").read_text())
    pretrain = yaml.safe_load((RECIPES / "toy-pretrain.yaml").read_text())
    named = set(toy["sources"]) | set(toy["evaluation"])
    assert named == {name for name in sizes if not name.startswith("toy_long_")}
    assert not set(toy["sources"]) & set(toy["evaluation"])
    assert set(pretrain["sources"]) == {"toy_captions"}
    seen = {name: sizes[name] * how["repeat"] for name, how in toy["sources"].items()}
    simple = sum(seen[f"toy_{kind}"] for kind in ("shapes", "bars", "captions"))
    assert 20_000 < sum(seen.values()) < 30_000 and simple / sum(seen.values()) > 0.9
    assert sizes["toy_heldout"] % len(question_types("all")) == 0
    arguments = {key: value for key, value in toy["tokenizer"].items() if key != "_target_"}
    inspect.signature(target_of(toy["tokenizer"])).bind([], Path("out"), **arguments)
