"""What a recipe's sources may be."""

import pytest
import yaml

from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.tools import data as data_tool


def recipe_of(folder, *shards):
    """A recipe of sources with these shards, named a, b and so on."""
    facts = {"description": "", "licence": "", "origin": "ask its makers"}
    datasets = {name: facts | {"shards": where} for name, where in zip("abc", shards, strict=False)}
    recipe = {"name": "r", "description": "", "sources": {name: {"repeat": 1.0} for name in datasets}}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe | {"datasets": datasets}))
    return load_recipe(str(folder / "r.yaml"))


def test_shards_of_one_name_in_several_folders_are_no_source(tmp_path):
    recipe = recipe_of(tmp_path, "https://me:secret@h/part-{0..3}/{00000..00002}.tar?key=s")
    with pytest.raises(ValueError) as error:
        recipe_sources(recipe, tmp_path)
    said = str(error.value)
    assert "source a: 12 shards" in said and "https://h/part-0/00000.tar and https://h/part-1/00000.tar" in said
    assert "a card of its own" in said and "secret" not in said and "key=" not in said
    folders = [f"https://h/part-{number}/{{00000..00002}}.tar" for number in range(3)]
    assert [len(source.shards) for source in recipe_sources(recipe_of(tmp_path, *folders), tmp_path)] == [3, 3, 3]


def test_a_pattern_of_urls_that_names_no_shard_is_said(tmp_path):
    recipe = recipe_of(tmp_path, "https://h/0.tar", "memory://nothing/here/*.tar")
    with pytest.raises(ValueError, match=r"source b: no shard at memory://nothing/here/\*\.tar; ask its makers"):
        recipe_sources(recipe, tmp_path)


def test_a_source_at_urls_is_shown_as_such(tmp_path, capsys):
    recipe_of(tmp_path, "https://h/0.tar?key=s")
    assert data_tool.main(["show", f"recipe={tmp_path}/r.yaml", f"data_root={tmp_path}"]) == 0
    assert "samples published; at URLs: https://h/0.tar\n" in capsys.readouterr().out
