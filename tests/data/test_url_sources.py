"""What looks at a source at URLs, or makes its indexes, finds what it finds in local shards."""

import json
import shutil

import pytest
import yaml

from eagle_train.data.shards import write_shards
from eagle_train.tools import data as data_tool
from tests.data.range_server import serving
from tests.runs import KINDS, overrides

pytest.importorskip("aiohttp")
NAMES = ("small_text", "small_shapes")


@pytest.fixture
def roots(data, tmp_path):
    """Two data roots with the same recipe: its shards lie in the one, and are at URLs for the other."""
    recipe = yaml.safe_load((data / "small.yaml").read_text())
    recipe |= {"sources": {name: {"repeat": 1.0} for name in NAMES}, "evaluation": []}
    recipe["datasets"] = {name: recipe["datasets"][name] for name in NAMES}
    local, remote = tmp_path / "local", tmp_path / "remote"
    for root in (local, remote):
        root.mkdir()
    with serving() as server:
        for name in NAMES:
            shutil.copytree(data / name, local / name, ignore=shutil.ignore_patterns("*.arrow"))
            server.files |= {f"{name}/{path.name}": path.read_bytes() for path in (local / name).glob("*.tar")}
        (local / "r.yaml").write_text(yaml.safe_dump(recipe))
        for name in NAMES:
            last = len(list((local / name).glob("*.tar"))) - 1
            recipe["datasets"][name]["shards"] = server.url(f"{name}/{name}-{{000000..{last:06d}}}.tar?key=a/b.c")
        (remote / "r.yaml").write_text(yaml.safe_dump(recipe))
        yield local, remote, server


def given(root):
    return [f"recipe={root}/r.yaml", f"data_root={root}"]


def told(capsys, word, root, *more):
    code = data_tool.main([word, *given(root), *more])
    return code, capsys.readouterr().out


def test_indexes_of_urls_are_made_where_a_run_looks_for_them(roots, capsys):
    local, remote, server = roots
    del server.files["small_text/small_text-000000.tar"]
    for _ in range(2):
        code, out = told(capsys, "index", remote)
        assert code == 1 and "small_text/small_text-000000.tar is not there" in out and "key=" not in out
    assert len(list((remote / "index" / "small_shapes").glob("*.index.arrow"))) == 4
    assert len(list((remote / "index" / "small_text").glob("*.index.arrow"))) == 1
    assert not list(local.rglob("*.arrow"))


@pytest.mark.slow
def test_lint_finds_in_urls_what_it_finds_in_files(roots, capsys, monkeypatch, tmp_path):
    local, remote, server = roots
    monkeypatch.chdir(tmp_path)
    found = [told(capsys, "lint", root, "--json") for root in (local, remote)]
    assert found[0] == found[1] and json.loads(found[0][1])["samples"] == 52
    del server.files["small_text/small_text-000000.tar"]
    code, out = told(capsys, "lint", remote, "--json")
    (example,) = json.loads(out)["sources"]["small_text"]["findings"]["missing_shard"]["examples"]
    assert code == 1 and example["key"] == "small_text/small_text-000000" and "key=" not in example["excerpt"]


@pytest.mark.slow
def test_lint_of_an_experiment_reads_as_it_does_and_measures_against_its_rows(
    roots, data, capsys, monkeypatch, tmp_path
):
    local, remote, _ = roots
    monkeypatch.chdir(tmp_path)

    def stage(root, length, *more):
        asked = [f"data_root={root}", *(f"schedule.{name}.recipe={root}/r.yaml" for name in ("pretrain", "sft"))]
        return overrides(data, tmp_path / "run", *asked, f"schedule.sft.max_length={length}", *more)

    settings = f"_target_:eagle_train.data.shard_cache.ShardCache,folder:{tmp_path}/cache,max_bytes:100000000"
    found = []
    for root in (local, remote):
        words = stage(root, 50, f"data.storage.cache={{{settings}}}", "decode=true", "--json")
        assert data_tool.main(["lint", *words]) == 1
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0]["samples"] == 52
    assert len(list((tmp_path / "cache").rglob("*.tar*"))) >= 6
    assert 0 < found[0]["sources"]["small_text"]["findings"]["too_long"]["count"] < 12
    keeps = "data.too_long._target_=eagle_train.data.too_long.KeepTurns"
    assert data_tool.main(["lint", *stage(local, 50, keeps)]) == 0
    assert data_tool.main(["lint", *stage(local, 50), "stage=pretrain"]) == 0, "its rows are longer"


@pytest.mark.slow
def test_stats_of_urls_are_those_of_files(roots, data, capsys):
    local, remote, _ = roots
    arguments = (f"tokenizer={data}/tokenizer", "chat_template=toy", "--json")
    found = [json.loads(told(capsys, "stats", root, *arguments)[1].replace(str(root), "")) for root in (local, remote)]
    assert found[0] == found[1] and found[0]["plans"][0]["num_samples"] == KINDS["text"] + KINDS["shapes"]


@pytest.mark.slow
def test_build_of_a_recipe_indexes_its_urls_and_reads_their_text(roots, capsys):
    local, remote, _ = roots
    text = {
        "_target_": "eagle_train.data.toy.tokenizer.train_tokenizer",
        "vocab_size": 300,
        "special_tokens": ["<pad>", "<|end|>"],
    }
    tokenizers = []
    for root in (local, remote):
        recipe = yaml.safe_load((root / "r.yaml").read_text())
        (root / "r.yaml").write_text(yaml.safe_dump(recipe | {"tokenizer": text}))
        assert data_tool.main(["build", *given(root), "workers=1"]) == 0
        tokenizers.append((root / "small" / "tokenizer" / "tokenizer.json").read_text())
    assert tokenizers[0] == tokenizers[1]
    assert len(list((remote / "index").rglob("*.index.arrow"))) == 6


def test_build_of_a_recipe_makes_the_indexes_that_the_card_asks_for(tmp_path, capsys):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write_shards([(f"{i}", {"messages": turns}, {}) for i in range(3)], tmp_path / "mine")
    card = {"description": "", "licence": "", "origin": "", "shards": "mine/*.tar"}
    card |= {"index_dir": "idx", "media_root": "media"}
    recipe = {"name": "r", "description": "", "sources": {"mine": {"repeat": 1.0}}, "datasets": {"mine": card}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "media").mkdir()
    assert data_tool.main(["build", *given(tmp_path), "workers=1"]) == 0
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    assert [path.parent for path in made] == [tmp_path / "idx"]
    assert data_tool.main(["index", *given(tmp_path)]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}, "it is the one of a run"
