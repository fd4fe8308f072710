"""What a user does, through the command line: build, look, train, resume, export, ask, report."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from eagle_train.__main__ import main
from eagle_train.data.index import index_path
from eagle_train.train.checkpoint import CheckpointDir
from eagle_train.train.load import export_run, load_model
from eagle_train.train.pieces import PieceReader
from tests.runs import losses, overrides, run_ranks
from tests.toys import tiny_row

MOMENTS = ("exp_avg", "exp_avg_sq")
EVALUATED = ("evaluation=toy", "evaluation.sources=[small_all]", "evaluation.gallery_per_type=1")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished small run, made by the command itself, W&B offline."""
    run = tmp_path_factory.mktemp("runs") / "small"
    wandb = "{_target_: eagle_train.track.wandb_tracker.WandbTracker, _partial_: true, project: test, mode: offline}"
    assert main([*overrides(data, run, *EVALUATED), f"tracker.wandb={wandb}"]) == 0
    return run


def test_the_run_leaves_everything_a_user_expects(run):
    assert len(losses(run)) == 9
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for prefix in ("eval", "eval_grey", "eval_chance"):
        assert 0.0 <= last[f"{prefix}/exact_match/simple"] <= 1.0
        assert f"{prefix}/exact_match/ink_colour" in last and f"{prefix}/exact_match/video" in last
    assert json.loads((run / "mixture.json").read_text()).keys() == {"pretrain", "sft"}
    for entries in json.loads((run / "accounting.json").read_text()).values():
        for entry in entries.values():
            assert entry["read"] == entry["used"] + sum(entry["dropped"].values())
    assert list((run / "wandb").glob("offline-run-*"))
    gallery = json.loads((run / "gallery/gallery.json").read_text())
    assert gallery and all((run / "gallery" / name).is_file() for entry in gallery for name in entry["images"])
    assert len(CheckpointDir(run / "checkpoints").published()) == 3


def test_export_is_all_that_chat_needs(run, data, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "export")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "export")
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "export", moved)
    names = {path.name for path in moved.iterdir()}
    assert {"model.safetensors", "config.yaml", "tokenizer.json"} <= names
    ours, encoder = load_model(run)
    theirs, other = load_model(moved)
    assert encoder.template == other.template and encoder.tile_size == other.tile_size
    row = tiny_row([])
    assert all(torch.equal(p, theirs.state_dict()[n]) for n, p in ours.state_dict().items())
    assert torch.equal(ours(row), theirs(row))
    image = next((run / "gallery").glob("*.png"))
    assert main(["chat", str(moved), "--image", str(image), "What colour is it?", "--max-new-tokens", "4"]) == 0
    assert main(["chat", str(run), "Say yes.", "--max-new-tokens", "4"]) == 0


@pytest.mark.slow
def test_tied_embeddings_are_exported_once_and_come_back(data, tmp_path):
    short = ("schedule.pretrain.num_steps=1", "schedule.sft.num_steps=1")
    assert main(overrides(data, tmp_path / "run", "llm.tie_word_embeddings=true", *short)) == 0
    export = export_run(tmp_path / "run", tmp_path / "export")
    model, _ = load_model(export)
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    trained, _ = load_model(tmp_path / "run")
    assert torch.equal(model.llm.lm_head.weight, trained.llm.lm_head.weight)


def test_chat_takes_several_turns(run, tmp_path, capsys, monkeypatch):
    lines = iter(["first?\n", "second?\n", "\n"])
    monkeypatch.setattr("sys.stdin", type("Typed", (), {"readline": lambda self: next(lines)})())
    assert main(["chat", str(run), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().err.count("> ") == 3


def test_report_is_one_file(run, capsys):
    assert main(["report", str(run)]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="data:image' in page
    assert "small_shapes" in page and "ink_colour" in page


def test_plan_json_tells_parameters_steps_and_memory(data, tmp_path, capsys):
    assert main(["plan", *overrides(data, tmp_path), "--json", "--ranks", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["experiment"] == "toy" and [stage["name"] for stage in plan["stages"]] == ["pretrain", "sft"]
    for stage in plan["stages"]:
        parameters = stage["parameters"]
        assert parameters["total"] == sum(m["total"] for m in parameters["modules"].values())
        assert parameters["trainable"] == sum(m["trainable"] for m in parameters["modules"].values())
        assert stage["data"]["num_steps"] == {"pretrain": 3, "sft": 6}[stage["name"]]
        assert 0.5 < stage["data"]["fill"] <= 1.0
    assert set(plan["stages"][0]["parameters"]["modules"]) >= {"mixture.encoders.vit", "projector", "llm"}
    first, second = plan["stages"]
    assert first["parameters"]["trainable"] == first["parameters"]["modules"]["projector"]["total"]
    assert second["parameters"]["trainable"] == second["parameters"]["total"]
    assert plan["tokens_per_tile"] == 16 and plan["vision_flops_per_tile"] > 0
    assert not tmp_path.joinpath("checkpoints").exists()


def test_planned_memory_is_the_real_memory(data, tmp_path, run, capsys):
    main(["plan", *overrides(data, tmp_path), "--json"])
    memory = json.loads(capsys.readouterr().out)["stages"][1]["memory_bytes_per_rank"]
    state = PieceReader(CheckpointDir(run / "checkpoints").latest())
    parts = {
        kind: [state.read(n, kind) for n in state.wholes if kind in state.kinds[n]] for kind in ("weight", *MOMENTS)
    }
    assert memory["parameters"] == sum(tensor.nbytes for tensor in parts["weight"])
    assert memory["optimizer"] == sum(tensor.nbytes for kind in MOMENTS for tensor in parts[kind])


def test_plan_prints_tables(data, tmp_path, capsys):
    assert main(["plan", *overrides(data, tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "what is trained" in shown and "memory per rank" in shown and "steps" in shown


@pytest.mark.slow
def test_plan_without_data_says_what_is_missing(tmp_path, capsys):
    assert main(["plan", "+experiment=toy", f"data_root={tmp_path}", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["stages"][0]["data"]["missing_sources"] == ["toy_captions"]
    assert plan["stages"][0]["data"]["remedy"] == "data build recipe=toy-pretrain"


@pytest.mark.slow
def test_data_build_makes_a_recipe_to_train_on(data, tmp_path, capsys):
    from tests.data.test_bad_samples import png

    (tmp_path / "images").mkdir()
    records = []
    for i in range(6):
        (tmp_path / f"images/{i}.png").write_bytes(png(i))
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"number {i}"}]
        records.append({"id": i, "image": f"images/{i}.png", "conversations": turns})
    (tmp_path / "mine.json").write_text(json.dumps(records))
    arguments = ["data", "build", "name=mine", f"annotation={tmp_path / 'mine.json'}", f"out={tmp_path / 'out'}"]
    assert main(arguments) == 0
    assert "read 6 = written 6 + bad 0" in capsys.readouterr().out
    (shard,) = (tmp_path / "out/mine").glob("*.tar")
    assert index_path(shard, None).is_file()
    assert main(arguments) == 0, "a second build leaves the first alone"
    assert "is there already" in capsys.readouterr().out
    recipe = f"schedule.sft.recipe={tmp_path / 'out/mine.yaml'}"
    short = ("schedule.pretrain.num_steps=1", "schedule.sft.num_steps=1")
    assert main(overrides(data, tmp_path / "run", recipe, *short)) == 0
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "usage: python -m eagle_train"),
        ([], 2, "usage: python -m eagle_train"),
        (["train", "--help"], 0, "experiments: eagle-x4-13b"),
        (["data", "--help"], 0, "data build recipe=toy"),
        (["+experiment=tooy"], 1, "did you mean 'toy'"),
        (["trian", "+experiment=toy"], 2, "words: train"),
        (["data", "build", "name=x"], 1, "exactly one of recipe="),
        (["data", "build", "recipe=toy", "foo=1"], 1, "unknown ['foo']"),
        (["data", "build", "tars=x"], 1, "['name', 'out'] must be given"),
        (["chat", "/nowhere", "hello"], 1, "neither a run nor an export"),
        (["export", "/nowhere"], 1, "neither a run nor an export"),
    ],
)
def test_the_command_line_explains_itself(arguments, code, said, capsys):
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err


def test_cfg_prints_the_composed_config(capsys):
    assert main(["+experiment=toy", "--cfg", "seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_a_tokenizer_too_large_for_the_llm_is_refused_with_both_numbers(data, tmp_path, capsys):
    assert main([*overrides(data, tmp_path), "llm.vocab_size=300"]) == 1
    message = capsys.readouterr().err
    assert "tokens, the LLM 300 embeddings" in message and "llm.vocab_size=" in message


@pytest.mark.slow
def test_an_error_ends_the_process_with_code_1(data, tmp_path):
    ((code, output),) = run_ranks([*overrides(data, tmp_path), "schedule.sft.recipe=absent"])
    assert code == 1 and "no recipe absent" in output and "Traceback" not in output
