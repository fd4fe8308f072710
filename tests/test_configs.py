"""Every config composes, and every `_target_` accepts exactly the keys it is given."""

import inspect
from pathlib import Path

import pytest
import yaml

from eagle_train.data.recipe import load_recipe
from eagle_train.resources import resource_dir
from eagle_train.tools.train import main
from eagle_train.train.assemble import build_schedule, check_stages, meta_model
from eagle_train.train.config import (
    ConfigError,
    build,
    constructor,
    load_choice,
    load_config,
    options,
    to_yaml,
    without_effect,
)
from eagle_train.train.optim import freeze, freeze_table
from tests.configs import composed

CONFIGS = resource_dir("configs")
RECIPES = resource_dir("data_recipes")
OPTIONS = [
    pytest.param(option, marks=pytest.mark.slow if option.startswith("experiment/") else ())  # of many compositions
    for option in sorted(str(p.relative_to(CONFIGS).with_suffix("")) for p in CONFIGS.glob("*/*.yaml"))
]
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
GIVEN = {  # by the code that finishes a partial
    "PlainEngine": ("model", "stage", "micro_batches", "placement"),
    "ZeroEngine": ("model", "stage", "micro_batches", "placement"),
    "MlpProjector": ("in_channels", "hidden_size"),
    "PatchMerger": ("in_channels", "hidden_size"),
    "WandbTracker": ("run_dir", "name", "run_id", "config"),
    "train_tokenizer": ("texts", "out"),
    "Profiler": ("folder",),
}


def targets(node):
    """Yields every mapping under `node` that names a `_target_`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for child in node.values():
            yield from targets(child)
    elif isinstance(node, list):
        for child in node:
            yield from targets(child)


def check_binding(node):
    target = constructor(node)
    arguments = {k: v for k, v in node.items() if k not in HYDRA_KEYS}
    arguments |= dict.fromkeys(GIVEN.get(target.__name__, ()))
    inspect.signature(target).bind(**arguments)


def with_option(option):
    """Returns overrides that compose a run with an option of a group."""
    group, name = option.split("/")
    if group == "experiment":
        return [f"+experiment={name}"]
    if group == "encoder":
        return ["+experiment=toy", f"+encoder@mixture.encoders.extra={name}"]
    if group == "preset":
        return ["+experiment=eagle-x5-13b", f"preset={name}"]
    if group == "stage":
        encoder = ["schedule.sft.align=vit"] if name == "prealign" else []
        return ["+experiment=toy", f"stage@schedule.sft={name}", *encoder]
    return ["+experiment=toy", f"{group}={name}"]


def described(option):
    """Returns an option by itself where that can be, as it takes a small part of the time of a whole config."""
    group, name = option.split("/")
    refers_to_others = "${" in (CONFIGS / f"{option}.yaml").read_text().replace("${.", "")
    if group in ("experiment", "preset", "mixture") or name == "none" or refers_to_others:
        return composed(*with_option(option))
    return load_choice(group, name)


@pytest.mark.parametrize("option", OPTIONS)
def test_keys_match_signature(option):
    found = list(targets(described(option)))
    assert found
    for node in found:
        check_binding(node)


@pytest.mark.slow
@pytest.mark.parametrize("name", options("experiment"))
def test_experiment_builds_on_the_meta_device(name):
    config = composed(f"+experiment={name}")
    model = meta_model(config)
    total = sum(p.numel() for p in model.parameters())
    for stage in build_schedule(config).values():
        freeze(model, stage.learning_rates)
        rows = freeze_table(model, stage.learning_rates)
        assert sum(row.total for row in rows) == total
        assert sum(row.trainable for row in rows) == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
        load_recipe(stage.recipe)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_recipe_loads_and_what_it_builds_binds(path):
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    for card in recipe.cards.values():
        for node in targets(card.build):
            check_binding(node)
    for node in targets(recipe.tokenizer):
        check_binding(node)


@pytest.mark.parametrize("path", sorted((RECIPES / "datasets").glob("*.yaml")), ids=lambda p: p.stem)
def test_dataset_card_names_itself_and_its_licence(path):
    card = yaml.safe_load(path.read_text())
    assert card["name"] == path.stem
    assert card["licence"] and card["origin"] and card["shards"]


def test_mixture_keeps_config_order():
    assert list(meta_model(load_config(["+experiment=toy"])).mixture.encoders) == ["vit", "convnext"]


def test_groups_are_those_of_the_root_config():
    groups = {p.name for p in CONFIGS.iterdir() if p.is_dir()}
    defaults = yaml.safe_load((CONFIGS / "train.yaml").read_text())["defaults"]
    composed = {next(iter(entry)) for entry in defaults if isinstance(entry, dict)}
    assert groups == composed | {"encoder", "stage", "experiment", "preset"}


def test_config_survives_a_round_trip_through_yaml():
    config = load_config(["+experiment=toy"])
    assert yaml.safe_load(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["+experiment=tooy"], "did you mean 'toy'"),
        (["+experiment=toy", "schedule.sft.num_stepss=4"], "did you mean 'schedule.sft.num_steps'"),
        (["+experiment=toy", "run_dri=x"], "did you mean 'run_dir'"),
        (["+experiment=toy", "max_lenght=3"], "did you mean 'schedule.sft.max_length'"),
        (["+experiment=toy", "llm=vicunna"], "no llm 'vicunna'"),
        (["+experiment=toy", "run_dir"], "write key=value"),
        (["+experiment=toy", "encoder=toy_vit"], "Did you mean to override one of encoder@mixture.encoders.convnext,"),
        (["+experiment=toy", "encoder@mixture.encoders.vitt=toy_vit"], "encoder@mixture.encoders.vit? To append"),
        (["+experiment=toy", "stage=full"], "one of stage@schedule.pretrain, stage@schedule.sft?"),
        (["+experiment=toy", "preset=better"], "No match in the defaults list. To append"),
        (["+experiment=toy", "+lora=qwen"], "write it without the +"),
        (["+experiment=toy", "+run_dir=x"], "Or add a second + to add or override"),
        (["+experiment=toy", "projector.slope=2"], "an argument that it leaves out is given as +key=value"),
        (
            ["+experiment=toy", "schedule.sft.learning_rates={llm: 1, llm.lm_head: 2}"],
            "use +schedule.sft",
        ),
        ([], "+experiment=NAME (known: "),
    ],
)
def test_a_wrong_override_names_the_nearest_right_one(overrides, said):
    with pytest.raises(ConfigError) as error:
        load_config(overrides)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "idle"),
    [
        (["+experiment=eagle2.5-8b", "degrade=release", "log_every=1"], ["degrade=release"]),
        (["+experiment=qwen2-vl-2b", "data.tiling.max_pixels=784"], ["data.tiling.max_pixels=784"]),
        (["+experiment=qwen2-vl-2b", "schedule.finetune.tiling.max_pixels=784", "chat_template=qwen2_vl_ids"], []),
        (["+experiment=eagle-x5-7b", "chat_template=llama3"], []),  # stage 2 follows it
    ],
)
def test_a_value_that_every_stage_has_of_its_own_is_known_to_be_without_effect(overrides, idle):
    assert without_effect(overrides, composed(*overrides)) == idle


def test_a_run_says_which_overrides_do_not_reach_training(caplog):
    assert main(["+experiment=qwen2-vl-2b", "degrade.frames.max_frames=3", "--cfg"]) == 0
    assert "degrade.frames.max_frames=3 does not reach training" in caplog.text


def test_a_wrong_argument_names_the_constructor():
    config = load_config(["+experiment=toy", "+projector.deptth=3"])
    with pytest.raises(ConfigError, match=r"MlpProjector.*deptth"):
        build(config["projector"], in_channels=4, hidden_size=4)


def test_a_misspelt_field_of_the_llm_is_refused():
    config = load_config(["+experiment=toy", "+llm.hiden_size=3"])
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        build(config["llm"])


@pytest.mark.parametrize("override", ["+log_evry=5", "+data.num_worker=8"])
def test_an_added_key_that_nobody_reads_is_refused(override):
    with pytest.raises(ConfigError, match=r"log_evry|num_worker"):
        build(load_config(["+experiment=toy", override])["data"])


@pytest.mark.slow
def test_a_fault_in_a_later_stage_is_found_at_the_start(tmp_path):
    def check(*overrides):
        config = load_config(["+experiment=toy", f"data_root={tmp_path}", *overrides])
        check_stages(config, meta_model(config), build_schedule(config))

    with pytest.raises(ValueError, match="there is no encoder 'convnext' to align"):
        check("schedule=prealign_toy", "~mixture.encoders.convnext")
    with pytest.raises(ValueError, match=r"learning_rates names \['lllm'\], which match nothing"):
        check("+schedule.sft.learning_rates.lllm=1")
    with pytest.raises(ValueError, match=r"asks for mine, which recipe toy of the last stage .* set evaluation=none"):
        check("evaluation.sources=[mine,toy_heldout]")
    with pytest.raises(ValueError, match=r"\nsource toy_heldout: no shard at .*recipe=toy`$"):
        check()
    with pytest.raises(ValueError, match=r"source toy_captions: no shard at .*toy-pretrain`\nsources .*recipe=toy`"):
        check()


def test_resources_exist():
    assert Path(CONFIGS / "train.yaml").is_file()
