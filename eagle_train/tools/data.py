"""`python -m eagle_train data build|prepare|list|show ...`: makes data sets and their indexes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path

import yaml

from eagle_train.data.build import BuildReport, build_from_annotation, build_from_tars
from eagle_train.data.index import ensure_index, read_sample
from eagle_train.data.recipe import Recipe, how_to_get, load_recipe
from eagle_train.data.storage import open_shard
from eagle_train.data.tables import read_table
from eagle_train.tools.data_prepare import list_recipes, prepare_recipe, show_recipe
from eagle_train.track.console import progress
from eagle_train.train.config import build

HELP = """usage: python -m eagle_train data build|prepare|list|show key=value ...

  data list [data_root=data]
      all recipes and their sources: published samples, licence, on disk or not
  data show recipe=NAME [data_root=data]
      what a recipe is made of, and what to download for it
  data prepare recipe=NAME from=FOLDER [data_root=data] [workers=1] [samples_per_shard=1000] [max_bad_share=0.01]
      turns a download as it was published (one JSON list or JSONL, with images in folders, tars, zips, or tars split
      into parts) into the shards of a recipe's sources, and says what is missing. Stopped, it goes on where it was.
      workers: processes; one per core is good. A compressed tar is unpacked first, under data_root/.prepare.
  data build recipe=toy [data_root=data]
      builds every source of a recipe under data_root, and its tokenizer if the recipe trains one
  data build name=NAME annotation=FILE [media_root=DIR] out=DIR [max_bad_share=0.01]
      a JSON list or JSONL (LLaVA, ShareGPT messages, typed content, Eagle 2.5, alpaca) with its media
  data build name=NAME tars=GLOB out=DIR [max_bad_share=0.01]
      WebDataset tars: images with txt or json

The last two also write DIR/NAME.yaml, a recipe to train on: schedule.sft.recipe=DIR/NAME.yaml
A source that is there already is left as it is; delete its folder to build it again.
"""

KEYS = {
    "recipe": {"recipe", "data_root"},
    "annotation": {"name", "annotation", "media_root", "out", "max_bad_share"},
    "tars": {"name", "tars", "out", "max_bad_share"},
}
PREPARE_KEYS = {"recipe", "from", "data_root", "workers", "samples_per_shard", "max_bad_share"}


def main(arguments: list[str]) -> int:
    """Runs one word; returns the exit code."""
    words = {"build": build_word, "prepare": prepare_word, "list": list_word, "show": show_word}
    if not arguments or arguments[0] not in words or "--help" in arguments:
        print(HELP)
        return 0 if "--help" in arguments else 2
    return words[arguments[0]](dict(argument.partition("=")[::2] for argument in arguments[1:]))


def build_word(values: dict[str, str]) -> int:
    """Builds; returns the exit code."""
    kinds = [kind for kind in KEYS if kind in values]
    if len(kinds) != 1:
        raise ValueError(f"give exactly one of recipe=, annotation= and tars=; got {sorted(values)}")
    check_keys(values, KEYS[kinds[0]])
    if kinds[0] == "recipe":
        build_recipe(load_recipe(values["recipe"]), root_of(values))
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
        workers=int(values.get("workers", 1)),
        samples_per_shard=int(values.get("samples_per_shard", 1000)),
        max_bad_share=float(values.get("max_bad_share", 0.01)),
    )


def list_word(values: dict[str, str]) -> int:
    """Lists the recipes; returns the exit code."""
    check_keys(values, {"data_root"})
    return list_recipes(root_of(values))


def show_word(values: dict[str, str]) -> int:
    """Shows a recipe; returns the exit code."""
    check_keys(values, {"recipe", "data_root"}, {"recipe"})
    return show_recipe(load_recipe(values["recipe"]), root_of(values))


def check_keys(values: dict[str, str], known: set[str], required: Set[str] = frozenset()) -> None:
    """Raises ValueError for a key that is not known, or one that is required and not given."""
    if unknown := set(values) - known:
        raise ValueError(f"unknown {sorted(unknown)}; there are {sorted(known)}")
    if missing := required - set(values):
        raise ValueError(f"{sorted(missing)} must be given, see `data --help`")


def root_of(values: dict[str, str]) -> Path:
    """Returns the folder of all shards."""
    return Path(values.get("data_root", "data"))


def build_recipe(recipe: Recipe, data_root: Path) -> None:
    """Builds every source of a recipe that is not there yet, the indexes, and the tokenizer.

    Raises:
        ValueError: if a source is missing and cannot be built here; says where to get it.
    """
    for card in recipe.cards.values():
        folder = card.folder(data_root)
        if not card.is_there(data_root):
            if card.build is None:
                remedy = how_to_get(recipe, card)
                raise ValueError(f"source {card.name} is not at {folder} and cannot be built here: {remedy}")
            with progress(f"building {card.name}", card.num_samples) as advance:
                build(card.build, out=folder, progress=steps(advance))
        index_all(card.find_shards(data_root), card.name)
    if recipe.tokenizer is not None:
        folder = data_root / recipe.name / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            build(recipe.tokenizer, out=folder, texts=recipe_texts(recipe, data_root))
        print(f"tokenizer: {folder}")
    print(f"recipe {recipe.name}: {len(recipe.cards)} sources under {data_root}")


def steps(advance):
    """Returns a callback that takes the number done so far, over one that takes how many more are done."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        advance(count - done)
        done = count

    return report


def index_all(shards: list[Path], name: str) -> None:
    """Builds the missing indexes of shards, with progress."""
    with progress(f"indexing {name}", len(shards)) as advance:
        for shard in shards:
            ensure_index(shard)
            advance(1)


def recipe_texts(recipe: Recipe, data_root: Path) -> Iterator[str]:
    """Yields all text of a recipe's training sources."""
    for name in recipe.sources:
        for shard in recipe.cards[name].find_shards(data_root):
            reader = open_shard(shard)
            for row in read_table(ensure_index(shard)).to_pylist():
                for message in read_sample(reader, name, row).messages:
                    yield from (part for part in message.content if isinstance(part, str))
            reader.close()


def build_own(values: dict[str, str]) -> None:
    """Builds a source from annotations or tars, and writes a recipe that holds just it."""
    name, out = values["name"], Path(values["out"])
    folder = out / name
    if any(folder.glob("*.tar")):
        print(f"{folder} is there already; delete it to build it again")
    else:
        share = float(values.get("max_bad_share", 0.01))
        with progress(f"building {name}", None) as advance:
            report = build_source(values, folder, share, steps(advance))
        print_report(report)
    index_all(sorted(folder.glob("*.tar")), name)
    card = {
        "description": f"built from {values.get('annotation', values.get('tars'))}",
        "licence": "that of its source",
        "origin": values.get("annotation", values.get("tars")),
        "shards": f"{name}/*.tar",
    }
    recipe = {"name": name, "description": f"{name} alone", "sources": {name: {"repeat": 1.0}}}
    path = out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"datasets": {name: card}}, sort_keys=False))
    print(f"recipe: {path}")


def build_source(values: dict[str, str], folder: Path, max_bad_share: float, report) -> BuildReport:
    """Builds the shards of `build_own`."""
    if "annotation" in values:
        root = Path(values["media_root"]) if "media_root" in values else None
        return build_from_annotation(
            folder,
            annotation=Path(values["annotation"]),
            media_root=root,
            progress=report,
            max_bad_share=max_bad_share,
        )
    pattern = Path(values["tars"])
    tars = sorted(pattern.parent.glob(pattern.name))
    if not tars:
        raise ValueError(f"no file matches tars={values['tars']}")
    return build_from_tars(folder, tars=tars, progress=report, max_bad_share=max_bad_share)


def print_report(report: BuildReport) -> None:
    """Prints what was read, written and dropped."""
    print(f"read {report.read} = written {report.written} + bad {len(report.errors)}")
    for error in report.errors:
        print(f"  {error}", file=sys.stderr)
    for reason, count in sorted(Counter(error.reason for error in report.errors).items()):
        print(f"  {reason}: {count}")
