"""`python -m eagle_train data WORD ...`: makes data sets and their indexes, and looks at them."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import yaml

from eagle_train.data.budget import TooManyBadSamples
from eagle_train.data.build import build_from_annotation, build_from_tars
from eagle_train.data.build_sources import BuildReport, SourcePlan, build_sources
from eagle_train.data.catalog import Source
from eagle_train.data.index import ensure_index
from eagle_train.data.index_jobs import ensure_all, make_works
from eagle_train.data.indexed_samples import read_sample
from eagle_train.data.recipe import Recipe, load_recipe
from eagle_train.data.recipe_sources import card_source, how_to_get
from eagle_train.data.storage import open_shard
from eagle_train.data.tables import read_made
from eagle_train.data.work_folder import at_work, work_folder
from eagle_train.tools.data_arguments import check_keys, find_tars, parse_values, root_of, share, whole
from eagle_train.tools.data_prepare import list_recipes, prepare_recipe, show_recipe
from eagle_train.track.console import progress
from eagle_train.train.config import build

HELP = """usage: python -m eagle_train data WORD key=value ...

  data list [data_root=data]
      all recipes and their sources: published samples, licence, on disk or not
  data show recipe=NAME [data_root=data]
      what a recipe is made of, and what to download for it
  data prepare recipe=NAME from=FOLDER [data_root=data] [workers=1] [samples_per_shard=1000] [max_bad_share=0.01]
      turns a download as it was published (one JSON list or JSONL, with images in folders, tars, zips, or tars split
      into parts) into the shards of a recipe's sources, and says what is missing. Stopped, it goes on where it was.
      workers: processes; one per core is good. A compressed tar is unpacked first, under data_root/.prepare.
  data build recipe=toy [data_root=data] [workers=N]
      builds every source of a recipe under data_root, and its tokenizer if the recipe trains one
  data build name=NAME annotation=FILE [media_root=DIR] out=DIR [max_bad_share=0.01] [workers=N] ...
      a JSON list or JSONL (LLaVA, ShareGPT messages, typed content, Eagle 2.5, alpaca, questions and answers) with its
      media
  data build name=NAME tars=GLOB [media_root=DIR] out=DIR [max_bad_share=0.01] [workers=N] ...
      WebDataset tars: media with txt, or json of a caption or a conversation; media_root: folder of the files that the
      json names beside the members

The last two take samples_per_shard=1000, and also write DIR/NAME.yaml, a recipe to train on:
schedule.sft.recipe=DIR/NAME.yaml. `build` has as many workers as there are cores, unless it is told otherwise; stopped,
it goes on where it was. A source that is there already is left as it is; delete its folder to build it again.

  data index (recipe=NAME | tars=GLOB | +experiment=NAME) [workers=1] ...
      builds indexes, text lengths and layouts before a run needs them
  data lint (recipe=NAME | tars=GLOB | annotation=FILE media_root=DIR) [decode=true] [workers=1] [--json] ...
      finds what would be left out of a training, and what looks odd; exit code 1 if anything would be left out
  data stats (+experiment=NAME | recipe=NAME tokenizer=FOLDER chat_template=NAME) [max_length=4096,16384] [--json] ...
      lengths, media, shares and a simulated plan, for any tokenizer and length
  data preview +experiment=NAME [--stage sft] [--rows 8] [--out preview.html]
      rows as the model gets them: tokens, images and what is learnt, in one HTML page

`data WORD --help` tells more about these four.
"""

LOOKING = ("index", "lint", "stats", "preview")
"""Words with a module of their own, `data_WORD`; it is imported when it is needed."""

KEYS = {
    "recipe": {"recipe", "data_root", "workers"},
    "annotation": {"name", "annotation", "media_root", "out", "max_bad_share", "samples_per_shard", "workers"},
    "tars": {"name", "tars", "media_root", "out", "max_bad_share", "samples_per_shard", "workers"},
}
STOPPED = 130
"""Exit code after Ctrl-C, as a shell has it: 128 and the number of SIGINT."""
PREPARE_KEYS = {"recipe", "from", "data_root", "workers", "samples_per_shard", "max_bad_share"}


def main(arguments: list[str]) -> int:
    """Runs one word; returns the exit code."""
    try:
        return run_word(arguments)
    except KeyboardInterrupt:
        print("\nstopped: what is finished is kept, the same command goes on from there", file=sys.stderr)
        return STOPPED


def run_word(arguments: list[str]) -> int:
    """Runs one word; returns the exit code."""
    if arguments and arguments[0] in LOOKING:
        return importlib.import_module(f"eagle_train.tools.data_{arguments[0]}").main(arguments[1:])
    words = {"build": build_word, "prepare": prepare_word, "list": list_word, "show": show_word}
    if not arguments or arguments[0] not in words or "--help" in arguments:
        print(HELP)
        return 0 if "--help" in arguments else 2
    return words[arguments[0]](parse_values(arguments[1:]))


def build_word(values: dict[str, str]) -> int:
    """Builds; returns the exit code."""
    kinds = [kind for kind in KEYS if kind in values]
    if len(kinds) != 1:
        raise ValueError(f"give exactly one of recipe=, annotation= and tars=; got {sorted(values)}")
    check_keys(values, KEYS[kinds[0]])
    if kinds[0] == "recipe":
        build_recipe(load_recipe(values["recipe"]), root_of(values), workers_of(values))
        return 0
    check_keys(values, KEYS[kinds[0]], {"name", "out"})
    build_own(values)
    return 0


def prepare_word(values: dict[str, str]) -> int:
    """Prepares a recipe from a download; returns the exit code."""
    check_keys(values, PREPARE_KEYS, {"recipe", "from"})
    return prepare_recipe(
        load_recipe(values["recipe"]),
        Path(values["from"]),
        root_of(values),
        workers=whole(values, "workers", 1),
        samples_per_shard=whole(values, "samples_per_shard", 1000),
        max_bad_share=share(values, "max_bad_share", 0.01),
    )


def list_word(values: dict[str, str]) -> int:
    """Lists the recipes; returns the exit code."""
    check_keys(values, {"data_root"})
    return list_recipes(root_of(values))


def show_word(values: dict[str, str]) -> int:
    """Shows a recipe; returns the exit code."""
    check_keys(values, {"recipe", "data_root"}, {"recipe"})
    return show_recipe(load_recipe(values["recipe"]), root_of(values))


def workers_of(values: dict[str, str]) -> int:
    """Returns the number of processes that build; one per core if nothing is said."""
    return whole(values, "workers", os.cpu_count() or 1)


def build_recipe(recipe: Recipe, data_root: Path, workers: int) -> None:
    """Builds every source of a recipe that is not there yet, the indexes, and the tokenizer.

    Raises:
        ValueError: if a source is missing and cannot be built here; says where to get it.
    """
    build_cards(recipe, data_root, workers)
    built = [name for name, card in recipe.cards.items() if card.find_shards(data_root)]  # others have no sample
    sources = {name: card_source(recipe, name, data_root) for name in built}
    index_all(list(sources.values()), recipe.name, workers)
    if recipe.tokenizer is not None:
        folder = data_root / recipe.name / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            build(
                recipe.tokenizer,
                out=folder,
                texts=recipe_texts([sources[name] for name in recipe.sources if name in sources]),
            )
        print(f"tokenizer: {folder}")
    print(f"recipe {recipe.name}: {len(recipe.cards)} sources under {data_root}")


def build_cards(recipe: Recipe, data_root: Path, workers: int) -> None:
    """Builds the sources of a recipe that are not there, all at the same time.

    Raises:
        ValueError: as `build_recipe`, and for sources with a bad sample, after the others are built.
    """
    missing = [card for card in recipe.cards.values() if not card.is_there(data_root)]
    for card in missing:
        if card.build is None:
            remedy = how_to_get(recipe, card)
            where = card.folder(data_root)
            raise ValueError(f"source {card.name} is not at {where} and cannot be built here: {remedy}")
    if not missing:
        return
    work = work_folder(data_root, recipe.name)
    with at_work(work, {card.name: dict(card.build) for card in recipe.cards.values() if card.build}):
        plans = []
        for card in missing:
            if not card.is_there(data_root):  # another process may have built it meanwhile
                records = build(card.build)
                count = sum(map(len, records))
                plans.append(SourcePlan(name=card.name, out=card.folder(data_root), records=records, num_records=count))
        built = build_sources(plans, work, workers=workers, max_bad_share=0.0, progress=progress)
        shutil.rmtree(work)  # of a refused source too: nothing tells when what makes its samples is repaired
    if refused := [str(result) for result in built.values() if isinstance(result, TooManyBadSamples)]:
        raise ValueError("\n".join(refused))


def index_all(sources: Sequence[Source], name: str, workers: int) -> None:
    """Builds the missing indexes of sources, with progress."""
    works = make_works([sources], laid_out=False)
    with progress(f"indexing {name}", len(works)) as advance:
        ensure_all(works, workers=workers, progress=advance)


def recipe_texts(sources: Sequence[Source]) -> Iterator[str]:
    """Yields all text of sources."""
    for source in sources:
        for shard in source.shards:
            reader = open_shard(shard)
            index = partial(ensure_index, shard, source.index_dir, media_root=source.media_root)
            for row in read_made(index).to_pylist():
                if row["reason"]:
                    continue  # nothing of it can be read
                for message in read_sample(reader, source.name, row).messages:
                    yield from (part for part in message.content if isinstance(part, str))
            reader.close()


def build_own(values: dict[str, str]) -> None:
    """Builds a source from annotations or tars, and writes a recipe that holds just it."""
    name, out = values["name"], Path(values["out"])
    if name in ("", ".", "..") or "/" in name:
        raise ValueError(f"name={name} is to be that of one folder in out={out}; give another folder as out=DIR")
    folder, workers = out / name, workers_of(values)
    origin, path = values.get("annotation", values.get("tars")), out / f"{name}.yaml"
    if any(folder.glob("*.tar")):
        made_of = yaml.safe_load(path.read_text())["datasets"][name]["origin"] if path.exists() else origin
        if made_of != origin:
            raise ValueError(f"{folder} was built from {made_of}, not from {origin}; delete it, or give another name")
        print(f"{folder} is there already; delete it to build it again")
    else:
        print_report(build_source(values, folder, workers))
    shards = sorted(folder.glob("*.tar"))
    index_all([Source(name=name, shards=shards)], name, workers)
    print_unusable(shards)
    card = {
        "description": f"built from {origin}",
        "licence": "that of its source",
        "origin": origin,
        "shards": f"{name}/*.tar",
    }
    recipe = {"name": name, "description": f"{name} alone", "sources": {name: {"repeat": 1.0}}}
    path.write_text(yaml.safe_dump(recipe | {"datasets": {name: card}}, sort_keys=False))
    print(f"recipe: {path}")


def print_unusable(shards: Sequence[Path]) -> None:
    """Prints how many samples of indexed shards cannot be used, by reason; says nothing where all can."""
    tables = [read_made(partial(ensure_index, shard)) for shard in shards]
    reasons = Counter(reason for table in tables for reason in table["reason"].to_pylist() if reason)
    if reasons:
        number = sum(table.num_rows for table in tables)
        print(f"of {number} samples, {reasons.total()} cannot be used; `data lint` names them")
    for reason, count in sorted(reasons.items()):
        print(f"  {reason}: {count}")


def build_source(values: dict[str, str], folder: Path, workers: int) -> BuildReport:
    """Builds the shards of `build_own`."""
    how = {
        "samples_per_shard": whole(values, "samples_per_shard", 1000),
        "max_bad_share": share(values, "max_bad_share", 0.01),
        "workers": workers,
        "progress": progress,
        "media_root": Path(values["media_root"]) if "media_root" in values else None,
    }
    if "annotation" in values:
        return build_from_annotation(folder, annotation=Path(values["annotation"]), **how)
    return build_from_tars(folder, tars=find_tars(values["tars"]), **how)


def print_report(report: BuildReport) -> None:
    """Prints what was read, written and dropped."""
    print(f"read {report.read} = written {report.written} + bad {len(report.errors)}")
    for error in report.errors:
        print(f"  {error}", file=sys.stderr)
    for reason, count in sorted(Counter(error.reason for error in report.errors).items()):
        print(f"  {reason}: {count}")
