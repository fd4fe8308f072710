"""Whole runs that start from the weights they name, and go on without them."""

import shutil
from contextlib import ExitStack

import pytest
import torch

from eagle_train.__main__ import main
from eagle_train.model.llm import build_llm
from eagle_train.train.app import start, train
from eagle_train.train.assemble import load_tokenizer
from eagle_train.train.config import ConfigError, load_config
from eagle_train.train.heartbeat import Heart
from eagle_train.train.load import export_run, load_model
from tests.runs import config, losses, must_run, overrides

pytestmark = pytest.mark.slow


def begin(config):
    """Returns the run that a config begins or goes on with."""
    with ExitStack() as stack:
        return start(config, None, Heart(), stack)


def grown_run(data, folder, tied):
    """Returns a small LLM with two rows of padding, and the command of a short run that gives it three new tokens."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    known = len(load_tokenizer(str(data / "tokenizer")))
    theirs = build_llm(model_type="llama", vocab_size=known + 2, tie_word_embeddings=tied, **shape)
    theirs.save_pretrained(folder / "llm")
    changes = [f"+llm.pretrained={folder / 'llm'}", f"llm.tie_word_embeddings={tied}", f"llm.vocab_size={known + 4}"]
    short = ["schedule.pretrain.num_steps=1", "schedule.sft.num_steps=1"]
    return theirs, overrides(data, folder / "run", *changes, "new_tokens=[NEW_0,NEW_1,NEW_2]", *short)


@pytest.mark.parametrize("tied", [False, True])
def test_a_runs_new_tokens_start_as_the_mean_of_the_others(data, tmp_path, tied):
    theirs, command = grown_run(data, tmp_path, tied)
    run = begin(load_config(command))
    run.trackers.close()
    known = run.encoder.tokenizer.convert_tokens_to_ids("NEW_0")
    assert run.encoder.tokenizer.convert_tokens_to_ids("NEW_2") == known + 2 == theirs.config.vocab_size
    for ours, source in (
        (run.model.llm.model.embed_tokens.weight, theirs.model.embed_tokens.weight),
        (run.model.llm.lm_head.weight, theirs.lm_head.weight),
    ):
        assert torch.equal(ours[:known], source[:known])
        torch.testing.assert_close(ours[known:], source[:known].mean(0).expand(4, -1))
    assert (run.model.llm.lm_head.weight is run.model.llm.model.embed_tokens.weight) == tied
    with pytest.raises(ConfigError, match=rf"{known + 3} tokens, the LLM {known + 2} .*llm.vocab_size={known + 3}"):
        begin(load_config([*command, f"llm.vocab_size={known + 2}"]))


def test_new_tokens_are_kept_on_resume_and_in_the_export(data, tmp_path):
    _, command = grown_run(data, tmp_path, tied=True)
    assert main(command) == 0
    shutil.rmtree(tmp_path / "llm")
    assert main([*command, "schedule.sft.num_steps=2"]) == 0, "a resumed run asks for no pretrained weights"
    _, encoder = load_model(export_run(tmp_path / "run", tmp_path / "export"))
    known = len(load_tokenizer(str(data / "tokenizer")))
    assert encoder.tokenizer.convert_tokens_to_ids("NEW_2") == known + 2


@pytest.fixture(scope="module")
def export(data, tmp_path_factory):
    """An export of a short run."""
    folder = tmp_path_factory.mktemp("first")
    assert train(config(data, folder / "run", "schedule.pretrain.num_steps=1", "schedule.sft.num_steps=1", "seed=5"))
    return export_run(folder / "run", folder / "export")


def test_a_run_starts_from_another_models_weights_and_resumes_without_them(data, export, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(export, source)
    run = begin(config(data, tmp_path / "run", f"init_from={source}"))
    run.trackers.close()
    expected, _ = load_model(source)
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in run.model.state_dict().items())
    command = overrides(data, tmp_path / "run", f"init_from={source}", "schedule.pretrain.num_steps=1")
    assert main([*command, "schedule.sft.num_steps=1"]) == 0
    shutil.rmtree(source)
    assert main([*command, "schedule.sft.num_steps=2"]) == 0
    assert len(losses(tmp_path / "run")) == 3


def test_weights_load_before_zero_3_shards_them(data, export, tmp_path):
    sources = ["+llm.pretrained=" + str(export / "llm"), "schedule.sft.num_steps=1", "schedule.pretrain.num_steps=1"]
    model, _ = load_model(export)
    model.llm.save_pretrained(export / "llm")
    assert main(overrides(data, tmp_path / "plain", *sources)) == 0
    must_run(overrides(data, tmp_path / "sharded", *sources, "engine=zero3", "engine.bf16=false"), ranks=2)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert main(overrides(data, tmp_path / "random", *sources[1:])) == 0
    assert losses(tmp_path / "random")[0] != pytest.approx(losses(tmp_path / "plain")[0], rel=1e-3)


def test_init_from_refuses_another_order_of_encoders(data, export, tmp_path):
    changed = config(data, tmp_path / "run", f"init_from={export}")
    encoders = changed["mixture"]["encoders"]
    changed["mixture"]["encoders"] = dict(reversed(encoders.items()))
    with pytest.raises(ValueError, match=r"\['vit', 'convnext'\], this model \['convnext', 'vit'\]; order counts"):
        begin(changed)


def test_init_from_refuses_other_ids_for_its_tokens(data, tmp_path, caplog):
    """The same tokens in another order would take each other's rows."""
    known = len(load_tokenizer(str(data / "tokenizer")))
    short = [f"llm.vocab_size={known + 3}", "schedule.pretrain.num_steps=1", "schedule.sft.num_steps=1"]
    shutil.copytree(data / "tokenizer", tmp_path / "tokenizer")
    first = ["new_tokens=[NEW_0,NEW_1]", f"tokenizer={tmp_path / 'tokenizer'}"]
    assert train(config(data, tmp_path / "first", *short, *first))
    again = [*short, f"init_from={tmp_path / 'first'}"]
    with pytest.raises(ValueError, match=rf"for 2 tokens: 'NEW_0' is {known} there and {known + 1} here"):
        begin(config(data, tmp_path / "run", *again, "new_tokens=[NEW_1,NEW_0]"))
    begin(config(data, tmp_path / "run", *again, "new_tokens=[NEW_0,NEW_1,NEW_2]")).trackers.close()
    shutil.rmtree(tmp_path / "tokenizer")
    begin(config(data, tmp_path / "other", *again, "new_tokens=[NEW_1,NEW_0]")).trackers.close()
    assert "its tokens are not compared with the run's" in caplog.text


def test_a_missing_source_stops_the_command_before_anything_is_written(data, tmp_path, capsys):
    assert main([*overrides(data, tmp_path / "run"), "+llm.pretrained=/nowhere/vicuna"]) == 1
    assert "llm.pretrained=FOLDER" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
