"""`data stats` tells what a plan of the same rows holds, for any length, with and without an experiment."""

import json
import re
import shutil

import pytest

from eagle_train.tools import data as data_tool
from eagle_train.tools.plan import make_plan
from eagle_train.train.config import load_config
from tests.runs import overrides


def stats(capsys, *arguments):
    assert data_tool.main(["stats", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_it_agrees_with_the_plan_of_the_run(data, tmp_path, capsys):
    given = overrides(data, tmp_path)
    told = stats(capsys, *given, "ranks=1")
    planned = make_plan(load_config(given), ranks=1)["stages"]
    assert [plan["name"] for plan in told["plans"]] == ["pretrain", "sft"]
    for plan, stage in zip(told["plans"], planned, strict=True):
        for name in ("num_rows", "num_steps", "num_samples", "num_tokens", "num_tiles", "fill"):
            assert plan[name] == stage["data"][name], name
        assert {name: facts["asked_share"] for name, facts in plan["sources"].items()} == stage["data"]["asked_shares"]
        assert plan["rank_cost_max_over_mean"]["worst"] == 1 and plan["costs_in"] == "FLOPs"
    everything = told["samples"]["pretrain, sft"]["all"]
    assert everything["tokens"]["count"] == 90 and everything["videos"]["sum"] == 6
    by_source = [each["tokens"]["sum"] for name, each in told["samples"]["pretrain, sft"].items() if name != "all"]
    assert everything["tokens"]["sum"] == sum(by_source)


def test_any_tokenizer_and_lengths_are_compared_without_an_experiment(data, capsys):
    told = stats(
        capsys,
        f"recipe={data}/small.yaml",
        f"data_root={data}",
        f"tokenizer={data}/tokenizer",
        "chat_template=toy",
        "max_length=60,1024",
        "tokens_per_tile=16",
        "rows_per_step=2",
        "too_long=keep_turns",
    )
    short, long = told["plans"]
    assert (short["max_length"], long["max_length"], long["num_samples"]) == (60, 1024, 90)
    assert long["num_tokens"] == told["samples"][f"{data}/small.yaml"]["all"]["tokens"]["sum"]
    assert long["costs_in"] == "tokens" and long["step_cost"]["mean"] > 0
    assert short["num_tokens"] < long["num_tokens"]
    lost = sum(source["shortened"]["tokens"] for source in short["sources"].values())
    dropped = {reason for source in short["sources"].values() for reason in source["dropped"]}
    assert lost > 0 and dropped <= {"too_long"}
    for plan in told["plans"]:
        for name in ("asked_share", "share_of_samples", "share_of_tokens", "share_of_supervised_tokens"):
            assert sum(source[name] for source in plan["sources"].values()) == pytest.approx(1)


def test_the_page_holds_the_numbers_and_loads_nothing(data, tmp_path, capsys):
    page = tmp_path / "stats.html"
    told = stats(capsys, *overrides(data, tmp_path), "max_length=256,384", "--html", str(page))
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "<script" not in text
    assert len(told["plans"]) == 4
    for plan in told["plans"]:
        assert f"{plan['fill']:.2%}" in text and all(source in text for source in plan["sources"])


def test_bad_samples_are_counted_and_stop_nothing(data, tmp_path, capsys):
    shutil.copytree(data / "small_text", tmp_path / "t", ignore=shutil.ignore_patterns("*.arrow", "*.json"))
    tar = tmp_path / "t" / "small_text-000001.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"assistant"', b'"assistent"', 1))
    told = stats(capsys, f"tars={tmp_path}/t/*.tar", f"tokenizer={data}/tokenizer", "chat_template=toy")
    (source,) = told["plans"][0]["sources"].values()
    assert source["samples"] == 12 and source["dropped"] == {"bad_record": 1} and source["times_seen"] == 1


@pytest.mark.slow
def test_it_reads_well_without_json(data, tmp_path, capsys):
    assert data_tool.main(["stats", *overrides(data, tmp_path), "stage=sft", "ranks=3"]) == 0
    out = capsys.readouterr().out
    assert "sft, rows of 384 tokens, 1 per step" in out and "█" in out and "small_video" in out
    assert "1 rows do not go evenly to 3 ranks" in out
    assert "p99" in out and "…" not in out, "a number is cut short"
    with pytest.raises(ValueError, match="no stage 'x'"):
        data_tool.main(["stats", *overrides(data, tmp_path), "stage=x"])


@pytest.mark.slow
def test_frames_and_tiles_are_those_that_each_length_of_rows_has_room_for(data, tmp_path, capsys):
    own = ["degrade=ads", "degrade.frames={fps: 4.0, min_frames: 2, max_frames: 64}", "stage=sft"]
    own += ["data.tiling._target_=eagle_train.data.tile_grids.ImageAreaPreservation", "+data.tiling.tile_size=32"]
    told = stats(capsys, *overrides(data, tmp_path, *own), "max_length=70,110,4096")
    assert list(told["samples"]) == ["sft, 70 tokens", "sft, 110 tokens", "sft, 4,096 tokens"]
    short, middle, long = (groups["all"] for groups in told["samples"].values())
    for what in ("image_tiles", "video_frames"):
        assert short[what]["sum"] < long[what]["sum"] and middle[what]["sum"] <= long[what]["sum"], what
    assert middle["degraded"]["sum"] > 0 and long["degraded"]["sum"] == 0
    assert long["degraded"]["count"] == 90 and long["video_frames"]["count"] == 6
    sources = [plan["sources"].values() for plan in told["plans"]]
    dropped = [sum(source["dropped"].get("too_long", 0) for source in each) for each in sources]
    assert dropped[0] > dropped[1] >= dropped[2] == 0, "those that do not fit with the fewest"


def test_tokens_that_a_tokenizer_lacks_are_said_and_count_as_one(data, capsys):
    """Without that each would be cut to letters, and all lengths be wrong in silence."""
    chosen = [f"recipe={data}/small.yaml", f"data_root={data}", f"tokenizer={data}/tokenizer", "chat_template=chatml"]
    assert data_tool.main(["stats", *chosen, "--json"]) == 0
    said = capsys.readouterr()
    assert "does not have <|im_start|>, <|im_end|> of the chat template; each is counted as one token" in said.err
    told = json.loads(said.out.splitlines()[-1])["samples"][f"{data}/small.yaml"]["all"]
    assert data_tool.main(["stats", *chosen[:3], "chat_template=toy", "--json"]) == 0
    said = capsys.readouterr()
    toy = json.loads(said.out.splitlines()[-1])["samples"][f"{data}/small.yaml"]["all"]
    assert "does not have" not in said.err
    # A question and its answer have the same tokens around them but for a role's name and two line ends, each a few.
    assert 0 < told["text_tokens"]["min"] - toy["text_tokens"]["min"] < 40


def test_where_all_is_too_long_the_message_says_so(data):
    chosen = [f"recipe={data}/small.yaml", f"data_root={data}", f"tokenizer={data}/tokenizer", "chat_template=toy"]
    with pytest.raises(ValueError, match=r"0 usable of \d+ samples, repeat .*, \d+ too_long.* raise max_length"):
        data_tool.main(["stats", *chosen, "max_length=3"])


def test_folders_of_one_name_are_sources_of_their_own(data, tmp_path, capsys):
    for place, kind in (("a/train", "small_text"), ("b/train", "small_shapes"), ("c", "small_text")):
        shutil.copytree(data / kind, tmp_path / place, ignore=shutil.ignore_patterns("*.arrow"))
    given = [f"tars={tmp_path}/**/*.tar", f"tokenizer={data}/tokenizer", "chat_template=toy"]
    told = stats(capsys, *given)
    (plan,), (measured,) = told["plans"], told["samples"].values()
    assert {name: facts["samples"] for name, facts in plan["sources"].items()} == {
        "a/train": 12,
        "b/train": 40,
        "c": 12,
    }
    assert {name: each["tokens"]["count"] for name, each in measured.items()} == {
        "a/train": 12,
        "b/train": 40,
        "c": 12,
        "all": 64,
    }
    for number, path in enumerate(sorted(tmp_path.rglob("*.tar"))):  # equal names of files too
        path.rename(path.with_name(f"shard-{number % 2}.tar"))
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(
        ValueError, match=r"a/train/.* and .*b/train/.* would both have the index .*an index_dir of its own"
    ):
        stats(capsys, *given, f"index_dir={tmp_path}/idx")
