"""Toy data sets are what the data recipes say, shard by shard."""

import importlib
import inspect
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from eagle_train.data.toy.build import toy_records
from eagle_train.data.toy.samples import question_types, toy_sample

RECIPES = Path(__file__).parents[3] / "data_recipes"
TOY_DATASETS = sorted((RECIPES / "datasets").glob("toy_*.yaml"))


def test_shards_hold_the_samples_in_order():
    records = toy_records(kind="text", split="train", num_samples=2500, seed=5)
    assert list(map(len, records)) == [1000, 1000, 500] and all(pickle.loads(pickle.dumps(r)) == r for r in records)
    small = replace(records[1], stop=1003)
    assert list(small.read()) == [toy_sample("text", "train", index, 5) for index in (1000, 1001, 1002)]


def target_of(spec):
    module, _, name = spec["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", TOY_DATASETS, ids=lambda path: path.stem)
def test_dataset_files_bind_to_the_builder_and_name_what_it_makes(path):
    spec = yaml.safe_load(path.read_text())
    assert set(spec) == {"name", "description", "licence", "origin", "num_samples", "shards", "build"}
    assert spec["name"] == path.stem
    arguments = {key: value for key, value in spec["build"].items() if key != "_target_"}
    records = target_of(spec["build"])(**arguments)
    assert sum(map(len, records)) == arguments["num_samples"] == spec["num_samples"]
    key, _, _ = next(records[0].read())
    assert key == f"{arguments['kind']}-{arguments['split']}-000000"


def test_recipes_name_data_sets_that_exist_and_are_mostly_simple():
    sizes = {path.stem: yaml.safe_load(path.read_text())["num_samples"] for path in TOY_DATASETS}
    toy = yaml.safe_load((RECIPES / "toy.yaml").read_text())
    pretrain = yaml.safe_load((RECIPES / "toy-pretrain.yaml").read_text())
    recipes = [yaml.safe_load(path.read_text()) for path in RECIPES.glob("toy*.yaml")]
    named = {name for recipe in recipes for name in [*recipe["sources"], *recipe.get("evaluation", ())]}
    assert named == set(sizes), "every set is there, and none is left over"
    assert not set(toy["sources"]) & set(toy["evaluation"])
    assert set(pretrain["sources"]) == {"toy_captions"}
    seen = {name: sizes[name] * how["repeat"] for name, how in toy["sources"].items()}
    simple = sum(seen[f"toy_{kind}"] for kind in ("shapes", "bars", "captions"))
    assert 20_000 < sum(seen.values()) < 30_000 and simple / sum(seen.values()) > 0.9
    assert sizes["toy_heldout"] % len(question_types("all")) == 0
    arguments = {key: value for key, value in toy["tokenizer"].items() if key != "_target_"}
    inspect.signature(target_of(toy["tokenizer"])).bind([], Path("out"), **arguments)
