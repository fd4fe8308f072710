"""What the words of `data` are given: key=value arguments, sources by recipe or by glob, or those of an experiment."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eagle_train.data.balance import CostModel
from eagle_train.data.catalog import Source
from eagle_train.data.encode import Encoder
from eagle_train.data.layout import Layout
from eagle_train.data.locations import name_folders
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.storage import Storage
from eagle_train.data.tokenizer.added import add_special_tokens
from eagle_train.data.too_long import KeepTurns
from eagle_train.model.describe import describe
from eagle_train.train.assemble import build_encoder, build_schedule, load_tokenizer, trained_meta_model
from eagle_train.train.config import build, load_choice, load_config
from eagle_train.train.costs import cost_model, forward_flops
from eagle_train.train.schedule import Stage
from eagle_train.train.stage_data import make_layout, of_stage

TOKEN_COST = CostModel(per_token=1e3)
"""Where there is no model, a row costs its tokens."""
TOKENS_PER_TILE = 256
ROWS_PER_STEP = 64


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Sources and how rows are made of them: a stage of an experiment, or what a few keys say.

    Args:
        name: of the stage or the recipe.
        sources: with their repeats or weights.
        measure: what weights count.
        layout: how samples are laid out in rows.
        rows_per_step: global batch.
        window_rows: rows packed together.
        num_steps, num_epochs: of the stage, one of them.
        cost: of samples.
        seed: of the plan.
        quarantine: list of samples to leave out.
        storage: how shards are read; None: as by default.
        has_model: whether costs are FLOPs of a model; else they are tokens.
    """

    name: str
    sources: Sequence[Source]
    measure: str
    layout: Layout
    rows_per_step: int
    window_rows: int
    num_steps: int | None
    num_epochs: int | None
    cost: CostModel
    seed: int
    quarantine: Path | None
    has_model: bool
    storage: Storage | None = None


def parse_values(arguments: Sequence[str]) -> dict[str, str]:
    """Returns key=value arguments by key.

    Raises:
        ValueError: for an argument without `=`, or a key given twice.
    """
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key in values:
            raise ValueError(f"{argument!r} " + ("is given twice" if equals else "is no argument; write key=value"))
        values[key] = value
    return values


def check_keys(values: Mapping[str, str], known: Set[str], required: Set[str] = frozenset()) -> None:
    """Raises ValueError for a key that is not known, or one that is required and not given."""
    if unknown := set(values) - known:
        raise ValueError(f"unknown {sorted(unknown)}; there are {sorted(known)}")
    if missing := required - set(values):
        raise ValueError(f"{sorted(missing)} must be given, see `data --help`")


def root_of(values: Mapping[str, str]) -> Path:
    """Returns the folder of all shards."""
    return Path(values.get("data_root", "data"))


def whole(values: Mapping[str, str], key: str, default: int) -> int:
    """Returns a whole number, at least 1.

    Raises:
        ValueError: if it is none.
    """
    text = values.get(key, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{key}={text} is no whole number from 1 on")
    return int(text)


def share(values: Mapping[str, str], key: str, default: float) -> float:
    """Returns a share, from 0 to 1.

    Raises:
        ValueError: if it is none.
    """
    text = values.get(key, str(default))
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"{key}={text} is no share, from 0 to 1")
    return value


def yes(values: Mapping[str, str], key: str) -> bool:
    """Returns a switch that is `true` or `false`, by default off."""
    if (text := values.get(key, "false")) not in ("true", "false"):
        raise ValueError(f"{key}={text}; it is true or false")
    return text == "true"


def find_sources(values: Mapping[str, str]) -> list[Source]:
    """Returns the sources of `recipe=`, or the tars of `tars=`, one source per folder.

    Their indexes are in `index_dir=`, and files that their records name in `media_root=`, where these are given.

    Raises:
        ValueError: unless exactly one of both is given and something is found.
    """
    if ("recipe" in values) == ("tars" in values):
        raise ValueError(f"give recipe=NAME or tars=GLOB, one of them; got {sorted(values)}")
    if "recipe" in values:
        sources = recipe_sources(load_recipe(values["recipe"]), root_of(values))
    else:
        shards: dict[Path, list[Path]] = {}
        for path in find_tars(values["tars"]):
            shards.setdefault(path.parent, []).append(path)
        names = name_folders(list(shards))
        sources = [Source(name=names[folder], shards=paths) for folder, paths in shards.items()]
    given = {key: Path(values[key]) for key in ("index_dir", "media_root") if key in values}
    return [replace(source, **given) for source in sources]


def find_tars(text: str) -> list[Path]:
    """Returns the files that a glob names, in order; its folders may have wildcards too.

    Raises:
        ValueError: if there is none.
    """
    pattern = Path(text)
    found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    if not found:
        raise ValueError(f"no file matches tars={pattern}")
    return found


def is_experiment(arguments: Sequence[str]) -> bool:
    """Returns whether arguments are the overrides of an experiment."""
    return any(argument.lstrip("+").startswith("experiment=") for argument in arguments)


def split_own(arguments: Sequence[str], own: Collection[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the overrides of an experiment, and by key the arguments that are the word's own."""
    mine = [argument for argument in arguments if argument.partition("=")[0] in own]
    return [argument for argument in arguments if argument not in mine], parse_values(mine)


def experiment_rows(
    overrides: Sequence[str], stage: str | None = None, lengths: Sequence[int] = (), rows_per_step: int | None = None
) -> list[Rows]:
    """Returns the rows of an experiment's stages.

    Args:
        overrides: with +experiment=NAME.
        stage: name of the only one to take.
        lengths: tokens of a row to try instead of the stage's.
        rows_per_step: global batch instead of the stage's.

    Raises:
        ValueError: for an unknown stage.
    """
    config = load_config(overrides)
    model = trained_meta_model(config)
    flops = forward_flops(model, describe(model.mixture, config["data"]["tile_size"]))
    encoder = build_encoder(config, model.mixture.tokens_per_tile, model.llm.config.vocab_size)
    found = []
    for name, known in pick_stages(build_schedule(config), stage).items():
        for length in lengths or [known.max_length]:
            changed = change_stage(known, max_length=length, rows_per_step=rows_per_step)
            found.append(stage_rows(config, name, changed, encoder, cost_model(flops, changed)))
    return found


def pick_stages(schedule: Mapping[str, Stage], stage: str | None) -> dict[str, Stage]:
    """Returns all stages, or the one named `stage`.

    Raises:
        ValueError: if there is no such stage.
    """
    if stage is not None and stage not in schedule:
        raise ValueError(f"no stage {stage!r}; there are {', '.join(schedule)}")
    return {name: known for name, known in schedule.items() if stage in (None, name)}


def change_stage(stage: Stage, *, max_length: int, rows_per_step: int | None) -> Stage:
    """Returns a stage with other rows; a batch that is given in tokens stays so, unless rows are asked for."""
    if rows_per_step is None and stage.tokens_per_step is not None:
        return replace(stage, max_length=max_length, rows_per_step=None)
    rows = rows_per_step or stage.rows_per_step
    return replace(stage, max_length=max_length, rows_per_step=rows, tokens_per_step=None)


def stage_rows(config: Mapping[str, Any], name: str, stage: Stage, encoder: Encoder, cost: CostModel) -> Rows:
    """Returns the rows of one stage."""
    settings = build(config["data"])
    recipe = load_recipe(stage.recipe)
    return Rows(
        name=name,
        sources=recipe_sources(recipe, Path(config["data_root"])),
        measure=recipe.weights_over,
        layout=make_layout(of_stage(encoder, stage), stage.max_length, settings.too_long),
        rows_per_step=stage.rows_per_step,
        window_rows=settings.window_rows,
        num_steps=stage.num_steps,
        num_epochs=stage.num_epochs,
        cost=cost,
        seed=stage.seed,
        quarantine=Path(settings.quarantine) if settings.quarantine else None,
        has_model=True,
        storage=settings.storage,
    )


def plain_encoder(values: Mapping[str, str]) -> Encoder:
    """Returns an encoder of `tokenizer=` and `chat_template=`; the rest is `data/default` and `degrade/none`.

    Special tokens of the template that the tokenizer lacks are one token each, as a run has them by its `new_tokens`.
    """
    check_given = {"tokenizer", "chat_template"} - values.keys()
    if check_given:
        raise ValueError(f"{sorted(check_given)} must be given to count tokens; or give +experiment=NAME")
    data = build(load_choice("data", "default"))
    template = build(load_choice("chat_template", values["chat_template"]))
    tokenizer = load_tokenizer(values["tokenizer"])
    if missing := template.missing_tokens(tokenizer):
        print(
            f"the tokenizer at {values['tokenizer']!r} does not have {', '.join(missing)} of the chat template; each "
            f"is counted as one token, as in a run that lists it in new_tokens",
            file=sys.stderr,
        )
        add_special_tokens(tokenizer, missing)
    return Encoder(
        template=template,
        tokenizer=tokenizer,
        images=data.images,
        videos=data.videos,
        tiling=data.tiling,
        degrade=build(load_choice("degrade", "none")),
        tile_size=data.tile_size,
        tokens_per_tile=whole(values, "tokens_per_tile", TOKENS_PER_TILE),
        loss_weight=data.loss_weight,
    )


def plain_rows(values: Mapping[str, str], lengths: Sequence[int]) -> list[Rows]:
    """Returns the rows of sources that no experiment says anything about, one entry per length."""
    sources, encoder = find_sources(values), plain_encoder(values)
    data = build(load_choice("data", "default"))
    if (policy := values.get("too_long", "drop")) not in ("drop", "keep_turns"):
        raise ValueError(f"too_long={policy}; it is drop or keep_turns")
    return [
        Rows(
            name=values.get("recipe") or sources[0].name,
            sources=sources,
            measure=load_recipe(values["recipe"]).weights_over if "recipe" in values else "samples",
            layout=make_layout(encoder, length, KeepTurns() if policy == "keep_turns" else data.too_long),
            rows_per_step=whole(values, "rows_per_step", ROWS_PER_STEP),
            window_rows=data.window_rows,
            num_steps=None,
            num_epochs=1,
            cost=TOKEN_COST,
            seed=0,
            quarantine=None,
            has_model=False,
        )
        for length in lengths
    ]
