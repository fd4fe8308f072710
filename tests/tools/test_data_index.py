"""`data index` builds what a run would build, once, and goes on past a shard that it cannot read."""

import shutil

import pytest

from eagle_train.data.index import index_stem
from eagle_train.data.layout import ensure_layout, layout_path
from eagle_train.tools import data as data_tool
from eagle_train.tools.data_arguments import experiment_rows
from tests.runs import overrides


@pytest.fixture
def folder(data, tmp_path):
    """A copy of two sources' shards, without an index."""
    for kind in ("small_text", "small_shapes"):
        shutil.copytree(data / kind, tmp_path / kind, ignore=shutil.ignore_patterns("*.arrow"))
    return tmp_path


def test_indexes_are_built_once_and_told_by_source(folder, capsys):
    arguments = ["index", f"tars={folder}/*/*.tar"]
    assert data_tool.main(arguments) == 0
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.index.arrow")}
    assert len(files) == 6
    first = capsys.readouterr().out
    assert cells(first, "small_text")[:4] == ["2", "2", "12", "0"]  # shards, made, samples, bad
    assert cells(first, "small_shapes")[:4] == ["4", "4", "40", "0"]
    assert data_tool.main(arguments) == 0
    assert cells(capsys.readouterr().out, "all")[:4] == ["6", "0", "52", "0"]
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*.index.arrow")}


def test_text_lengths_are_built_where_a_tokenizer_is_given(folder, data, tmp_path):
    out = tmp_path / "indexes"
    arguments = ["index", f"tars={folder}/small_text/*.tar", f"index_dir={out}", f"tokenizer={data}/tokenizer"]
    assert data_tool.main([*arguments, "chat_template=toy"]) == 0
    assert len(list(out.glob("*.index.arrow"))) == len(list(out.glob("*.text-*.arrow"))) == 2
    assert not list(folder.rglob("small_text/*.arrow"))
    with pytest.raises(ValueError, match="chat_template"):
        data_tool.main(arguments)


@pytest.mark.slow
def test_the_layouts_of_an_experiment_are_those_its_run_looks_for(data, tmp_path, capsys):
    given = overrides(data, tmp_path, "schedule.sft.max_length=350")
    rows = {each.name: each for each in experiment_rows(given)}
    source = rows["sft"].sources[0]
    paths = [layout_path(index_stem(source.shards[0], None), each.layout.fingerprint) for each in rows.values()]
    for path in paths:
        path.unlink(missing_ok=True)
    assert data_tool.main(["index", *given, "stage=sft"]) == 0
    assert [path.exists() for path in paths] == [False, True]
    assert data_tool.main(["index", *given]) == 0
    made = paths[0].stat().st_mtime_ns
    assert ensure_layout(source.shards[0], None, source.name, rows["pretrain"].layout) == paths[0]
    assert paths[0].stat().st_mtime_ns == made
    assert cells(capsys.readouterr().out, "all")[2] == "90"  # both stages use the same samples


def test_a_damaged_shard_is_named_and_the_others_are_indexed(folder, capsys):
    broken = folder / "small_text" / "small_text-000000.tar"
    broken.write_bytes(b"no tar at all" * 100)
    code = data_tool.main(["index", f"tars={folder}/*/*.tar"])
    out = capsys.readouterr().out
    assert cells(out, "small_shapes")[:3] == ["4", "4", "40"]
    assert code == 0 and "bad in small_text: 10 missing_shard" in out


def test_help_and_wrong_keys_tell_what_there_is(folder, capsys):
    with pytest.raises(SystemExit) as done:
        data_tool.main(["index", "--help"])
    assert done.value.code == 0 and "index_dir=DIR" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"unknown .*tar.*there are .*tars"):
        data_tool.main(["index", "tar=x"])
    with pytest.raises(ValueError, match="no file matches"):
        data_tool.main(["index", f"tars={folder}/none*.tar"])


def cells(text, name):
    """Returns the cells of a line of the printed table."""
    line = next(line for line in text.splitlines() if f" {name} " in line)
    return [cell.strip() for cell in line.replace("┃", "│").split("│")][2:]
