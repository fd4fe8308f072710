"""A new run starts from exactly the weights it names; what is not there is an error, never a guess."""

import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from eagle_train.model.checkpoints.files import write_weights
from eagle_train.model.embeddings import Vocabulary
from eagle_train.model.encoders.sam import Sam
from eagle_train.model.llm import build_llm
from eagle_train.train.config import build, load_config
from eagle_train.train.pretrained import load_start, start_table
from tests.toys import VOCAB, tiny_model

PRETRAINED = ("mixture.encoders.vit", "mixture.encoders.convnext", "projector", "llm")


def start_from(model, init_from):
    """Loads the weights that a run begins with whose tokenizer has a token for every row of its model."""
    return load_start(model, init_from, Vocabulary(num_tokens=model.llm.config.vocab_size))


def library_files(folder, seed=1):
    """Writes every part of a tiny model as its library publishes it; returns the model and the sources."""
    theirs = tiny_model(seed)
    vit, convnext = theirs.mixture.encoders["vit"], theirs.mixture.encoders["convnext"]
    clip = {f"vision_model.{name.removeprefix('vit.')}": t for name, t in vit.state_dict().items()}
    (folder / "clip").mkdir(parents=True)
    save_file(clip | {"text_model.final_layer_norm.bias": torch.zeros(3)}, folder / "clip/model.safetensors")
    torch.save({"model": convnext.state_dict() | {"head.fc.bias": torch.zeros(9)}}, folder / "convnext.pth")
    projector = {f"model.mm_projector.{name.removeprefix('layers.')}": t for name, t in projector_state(theirs)}
    torch.save(projector, folder / "mm_projector.bin")
    theirs.llm.save_pretrained(folder / "llm", max_shard_size="20KB")
    assert (folder / "llm/model.safetensors.index.json").is_file()
    sources = ("clip", "convnext.pth", "mm_projector.bin", "llm")
    return theirs, {part: str(folder / name) for part, name in zip(PRETRAINED, sources, strict=True)}


def projector_state(model):
    return model.projector.state_dict().items()


def model_from(sources, seed=0):
    """Returns a tiny model that names its sources, not loaded yet."""
    model = tiny_model(seed)
    for name, encoder in model.mixture.encoders.items():
        encoder.pretrained = sources.get(f"mixture.encoders.{name}")
    model.projector.pretrained = sources.get("projector")
    model.llm.config.name_or_path = sources.get("llm", "")
    return model


def by_component(starts):
    return {start.component: start for start in starts}


@pytest.mark.slow
def test_every_part_loads_from_its_own_files(tmp_path):
    theirs, sources = library_files(tmp_path)
    ours = model_from(sources)
    starts = by_component(start_from(ours, None))
    for part in PRETRAINED:
        expected = theirs.get_submodule(part).state_dict()
        found = ours.get_submodule(part).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), part
        assert starts[part].loaded == len(expected) and starts[part].fresh == ()
        assert starts[part].source == sources[part]
    assert starts["mixture.encoders.vit"].unused == starts["mixture.encoders.convnext"].unused == 1
    assert starts["mixture"].fresh == tuple(f"norms.{n}.{k}" for n in ("vit", "convnext") for k in ("weight", "bias"))


def test_the_table_names_source_counts_and_what_is_new(tmp_path):
    _, sources = library_files(tmp_path)
    starts = start_from(model_from({"llm": sources["llm"]}), None)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(start_table(starts))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capture.get().splitlines() if "│" in line]
    rows = {line[0]: line[1:] for line in lines}
    assert rows["llm"] == [sources["llm"], str(starts[-1].loaded), "0", ""]
    assert rows["projector"] == ["random", "0", "0", "all 4"]


def test_parts_without_a_source_keep_their_random_weights():
    ours, untouched = model_from({}), tiny_model()
    starts = start_from(ours, None)
    assert {start.source for start in starts} == {None} and all(start.fresh for start in starts)
    assert all(torch.equal(t, untouched.state_dict()[name]) for name, t in ours.state_dict().items())


def test_sams_new_neck_is_listed_as_new(tmp_path):
    shape = load_config(["+experiment=toy", "+encoder@mixture.encoders.sam=toy_sam"])["mixture"]["encoders"]["sam"]
    torch.manual_seed(9)
    theirs = build(shape)
    assert isinstance(theirs, Sam)
    state = {f"vision_encoder.{name.removeprefix('sam.')}": t for name, t in theirs.state_dict().items()}
    write_weights(tmp_path / "sam", {name: t.clone() for name, t in state.items()})
    for pretrained_neck, fresh in ((False, ["conv1.weight", "layer_norm1.bias", "layer_norm1.weight"]), (True, [])):
        model = tiny_model()
        sam = build(shape | {"pretrained": str(tmp_path / "sam"), "pretrained_neck": pretrained_neck})
        model.mixture.encoders["vit"] = sam
        start = by_component(start_from(model, None))["mixture.encoders.vit"]
        assert sorted(start.fresh) == [f"sam.neck.{name}" for name in fresh]
        assert torch.equal(sam.sam.neck.conv1.weight, theirs.sam.neck.conv1.weight) == pretrained_neck


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def grown_llm(tmp_path, **fields):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2} | fields
    theirs = build_llm(model_type="llama", vocab_size=VOCAB, **shape)
    theirs.save_pretrained(tmp_path / "llm")
    model = tiny_model()
    model.llm = build_llm(model_type="llama", vocab_size=VOCAB + 3, pretrained=str(tmp_path / "llm"), **shape)
    return theirs, model


@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_start_as_the_mean_of_the_others(tmp_path, tied):
    theirs, model = grown_llm(tmp_path, tie_word_embeddings=tied)
    start = by_component(start_from(model, None))["llm"]
    for ours, source in (
        (model.llm.model.embed_tokens.weight, theirs.model.embed_tokens.weight),
        (model.llm.lm_head.weight, theirs.lm_head.weight),
    ):
        assert torch.equal(ours[:VOCAB], source)
        torch.testing.assert_close(ours[VOCAB:], source.mean(0).expand(3, -1))
    assert f"model.embed_tokens.weight: 3 rows added to {VOCAB}; new rows start as the mean" in start.note
    assert ("lm_head.weight" in start.note) != tied


@pytest.mark.parametrize("order", [("model.", "lm_head"), ("lm_head", "model.")])
def test_a_head_of_its_own_is_not_tied_silently(tmp_path, order):
    """Whichever table came last in the files would have been the embeddings."""
    theirs, _ = grown_llm(tmp_path, tie_word_embeddings=False)
    (tmp_path / "llm/model.safetensors").unlink()
    state = {name: t.clone() for start in order for name, t in theirs.state_dict().items() if name.startswith(start)}
    torch.save(state, tmp_path / "llm/pytorch_model.bin")
    fields = theirs.config.to_dict() | {"tie_word_embeddings": True}
    model = tiny_model(**{name: fields[name] for name in SHAPE}, tie_word_embeddings=True)
    model.llm.config.name_or_path = str(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"lm_head.weight of its own, .*; set llm.tie_word_embeddings=false"):
        start_from(model, None)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    torch.save(state, tmp_path / "llm/pytorch_model.bin")
    assert start_from(model, None)[-1].loaded == len(state) - 1
    assert torch.equal(model.llm.lm_head.weight, theirs.model.embed_tokens.weight)


def test_a_table_is_cut_only_where_no_token_has_a_row(tmp_path):
    theirs, model = grown_llm(tmp_path)
    model.llm = build_llm(
        model_type="llama",
        vocab_size=VOCAB - 1,
        pretrained=str(tmp_path / "llm"),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(ValueError, match=f"the tokenizer has {VOCAB} tokens, the LLM {VOCAB - 1} rows"):
        load_start(model, None, Vocabulary(num_tokens=VOCAB))
    start = by_component(load_start(model, None, Vocabulary(num_tokens=VOCAB - 1)))["llm"]
    assert torch.equal(model.llm.model.embed_tokens.weight, theirs.model.embed_tokens.weight[:-1])
    assert f"1 of {VOCAB} rows dropped, which no token has" in start.note


@pytest.mark.parametrize("part", PRETRAINED)
def test_a_missing_tensor_is_an_error_for_every_part(tmp_path, part):
    _, sources = library_files(tmp_path)
    path = tmp_path / sources[part]
    if path.suffix:
        content = torch.load(path, weights_only=True)
        state = content.get("model", content)
        gone = sorted(name for name in state if not name.startswith("head"))[0]
        torch.save({name: t for name, t in state.items() if name != gone}, path)
    else:
        file = next(path.glob("*.safetensors"))
        state = load_file(file)
        gone = sorted(name for name in state if not name.startswith("text"))[0]
        save_file({name: t.clone() for name, t in state.items() if name != gone}, file)
    with pytest.raises(ValueError, match="(1 missing: .*" + gone.split(".")[-2] + "|not there: " + gone + ")") as error:
        start_from(model_from({part: sources[part]}), None)
    assert str(error.value).startswith(part) and f"{part}.pretrained=null" in str(error.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("lmsys/vicuna-7b-v1.5", "neither the local cache nor the hub gave weights"),
        ("Yuxin-CV/EVA-02/eva02/det/some.pth", "neither the local cache nor the hub gave weights"),
        ("/nowhere/vicuna", "there is no such file or folder"),
        ("./vicuna", "there is no such file or folder"),
        ("vicuna", "there is no such file or folder"),
        ("not a/hub id", "it is no hub id"),
    ],
)
@pytest.mark.parametrize("part", ["llm", "mixture.encoders.vit"])
def test_a_source_that_cannot_be_had_names_the_overrides(source, said, part):
    with pytest.raises(ValueError, match=said) as error:
        start_from(model_from({part: source}), None)
    assert str(error.value).startswith(f"{part}: cannot load '{source}'")
    assert f"set {part}.pretrained=FOLDER (local weights) or {part}.pretrained=null" in str(error.value)


def test_hub_ids_are_read_from_the_local_cache(tmp_path, monkeypatch):
    theirs, sources = library_files(tmp_path / "files")
    for repository, content in (("someone--llm", sources["llm"]), ("someone--vision", tmp_path / "files")):
        repo = tmp_path / f"hub/models--{repository}"
        shutil.copytree(content, repo / "snapshots/abc")
        (repo / "refs").mkdir()
        (repo / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    ours = model_from({"llm": "someone/llm", "mixture.encoders.vit": "someone/vision/clip/model.safetensors"})
    starts = by_component(start_from(ours, None))
    assert starts["llm"].source == "someone/llm" and starts["mixture.encoders.vit"].loaded > 0
    for part in ("llm", "mixture.encoders.vit"):
        expected = theirs.get_submodule(part).state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in ours.get_submodule(part).state_dict().items())
    next((tmp_path / "hub/models--someone--llm/snapshots/abc").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="llm: cannot load 'someone/llm'"):
        start_from(model_from({"llm": "someone/llm"}), None)


def test_sources_are_overridden_on_the_command_line():
    here = ["llm.pretrained=/path", "mixture.encoders.clip.pretrained=null", "projector.pretrained=/p.bin"]
    changed = load_config(["+experiment=eagle-x5-7b", *here])
    assert changed["llm"]["pretrained"] == "/path" and changed["projector"]["pretrained"] == "/p.bin"
    assert changed["mixture"]["encoders"]["clip"]["pretrained"] is None
    assert changed["mixture"]["encoders"]["det"]["pretrained"].startswith("Yuxin-CV/EVA-02/")
    assert changed["init_from"] is None
