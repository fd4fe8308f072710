"""`data build` says what is wrong with its arguments, and takes the tars that the other words take."""

import io
import json
import tarfile

import pytest

from eagle_train.__main__ import main
from eagle_train.data.shards import expected_shards
from eagle_train.types import SampleError


@pytest.fixture
def annotation(tmp_path):
    turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "two"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"conversations": turns}] * 3))
    return path


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"annotation": "{}/absent.json"}, "no file annotation={}/absent.json"),
        ({"annotation": "{}"}, "no file annotation={}"),
        ({"name": "../elsewhere"}, "name=../elsewhere is to be that of one folder in out={}/out"),
        ({"name": ".."}, "name=.. is to be that of one folder"),
        ({"name": ""}, "name= is to be that of one folder"),
        ({"max_bad_share": "1%"}, "max_bad_share=1% is no share, from 0 to 1"),
        ({"max_bad_share": "2"}, "max_bad_share=2 is no share, from 0 to 1"),
        ({"max_bad_share": "nan"}, "max_bad_share=nan is no share, from 0 to 1"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(annotation, tmp_path, capsys, changed, said):
    values = {"name": "own", "annotation": str(annotation), "out": str(tmp_path / "out"), "workers": "1"}
    values |= {key: value.format(tmp_path) for key, value in changed.items()}
    assert main(["data", "build", *(f"{key}={value}" for key, value in values.items())]) == 1
    assert f"error: {said.format(tmp_path)}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [annotation]


def test_tars_of_several_folders_and_other_makers_become_one_source(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        with tarfile.open(tmp_path / "in" / name / "s.tar", "w") as tar:
            link = tarfile.TarInfo("0.json")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
            text = json.dumps({"question": "how many?", "answer": name}).encode()
            member = tarfile.TarInfo("1.json")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    arguments = ["data", "build", "name=own", f"tars={tmp_path}/in/*/s.tar", f"out={tmp_path}/out", "workers=1"]
    assert main(arguments) == 1
    assert "2 of 4 samples are bad (2 bad_record), more than max_bad_share=0.01" in capsys.readouterr().err
    assert main([*arguments, "max_bad_share=0.5"]) == 0
    said = capsys.readouterr()
    assert "read 4 = written 2 + bad 2" in said.out and said.err.count("'0.json' is a symbolic link") == 2
    assert expected_shards(tmp_path / "out" / "own") == {"own-000000.tar": 2}


def test_what_the_index_finds_bad_is_told_and_another_annotation_does_not_take_the_name(annotation, tmp_path, capsys):
    (tmp_path / "empty.jpg").touch()
    record = {"image": "empty.jpg", "conversations": [{"from": "human", "value": "<image>?"}]}
    record["conversations"].append({"from": "gpt", "value": "two"})
    annotation.write_text(json.dumps([*json.loads(annotation.read_text()), record]))
    arguments = ["data", "build", "name=own", f"out={tmp_path}/out", "workers=1"]
    for _ in range(2):
        assert main([*arguments, f"annotation={annotation}"]) == 0
        assert (
            "of 4 samples, 1 cannot be used; `data lint` names them\n  unreadable_image: 1" in capsys.readouterr().out
        )
    recipe = (tmp_path / "out" / "own.yaml").read_text()
    other = annotation.rename(tmp_path / "other.json")
    assert main([*arguments, f"annotation={other}"]) == 1
    assert f"own was built from {annotation}, not from {other}" in capsys.readouterr().err
    assert (tmp_path / "out" / "own.yaml").read_text() == recipe


class Counted:
    """Ten samples of which one may be bad."""

    bad = 3

    def __len__(self):
        return 10

    def read(self):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        for i in range(10):
            yield SampleError(f"{i}", "bad_record", "broken") if i == self.bad else (f"{i}", {"messages": turns}, {})


def counted():
    return [Counted()]


def test_a_source_of_a_recipe_with_a_bad_sample_is_refused_until_it_is_repaired(tmp_path, capsys, monkeypatch):
    card = {"description": "", "licence": "", "origin": ""}
    made = {"build": {"_target_": f"{__name__}.counted"}, "shards": "mine/*.tar"}
    recipe = {"name": "r", "description": "", "sources": {"mine": {"repeat": 1.0}}, "datasets": {"mine": card | made}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    arguments = ["data", "build", f"recipe={tmp_path}/r.yaml", f"data_root={tmp_path}", "workers=1"]
    for _ in range(2):
        assert main(arguments) == 1
        assert "source mine: 1 of 10 samples are bad (1 bad_record)" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    monkeypatch.setattr(Counted, "bad", None)
    assert main(arguments) == 0
    assert expected_shards(tmp_path / "mine") == {"mine-000000.tar": 10}
