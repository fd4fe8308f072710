"""Recipes: the sources of a mix with their repeats, and the facts of each source."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from eagle_train.data.locations import Location, join
from eagle_train.data.shards import MANIFEST, expected_shards
from eagle_train.data.storage import Storage, glob
from eagle_train.resources import resource_dir

SOURCE_KEYS = ("repeat", "weight", "max_bad_share")
"""What a recipe may say about a source."""
RATIO = re.compile(r"[0-9]+/[1-9][0-9]*")
"""A repeat as counts: 57/158 takes 57 of every 158 samples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetCard:
    """One source: what it is, where it comes from, where its shards are.

    Args:
        shards: glob of its tars, relative to the data root, or a URL (`s3://bucket/name/*.tar`).
        num_samples: published number of samples.
        schema: shape of the published records, in words; what may be read is listed in `schemas`.
        select: which records of the recipe's annotation are its own: globs by field, see `split.Selector`; null: all
            that no card before it takes.
        build: what `data build` makes it from: a `_target_` that gives `pieces.Records` for each shard.
        index_dir: where the indexes are, relative to the data root; null: beside the shards; of a URL: in `index/`.
        media_root: folder of the files that records name beside the members of their tars, relative to the data root;
            null: they may name none, so that no shard reads what it likes of this machine.
    """

    name: str
    description: str
    licence: str
    origin: str
    shards: str
    num_samples: int | None = None
    schema: str | None = None
    select: Mapping[str, Sequence[str]] | None = None
    build: Mapping[str, Any] | None = None
    index_dir: str | None = None
    media_root: str | None = None

    def folder(self, data_root: Path) -> Path:
        """Returns the folder of the shards."""
        return (data_root / self.shards).parent

    def find_shards(self, data_root: Path, storage: Storage | None = None) -> list[Location]:
        """Returns the shards that are there, and those that the manifest beside local ones names, sorted."""
        if isinstance(location := join(data_root, self.shards), str):
            return glob(location, storage)
        folder = self.folder(data_root)
        pattern = Path(self.shards).name
        lost = {folder / name for name in expected_shards(folder) if fnmatch(name, pattern)}
        return sorted({*folder.glob(pattern), *lost})

    def is_there(self, data_root: Path) -> bool:
        """Returns whether the source was built, be it without a sample: then it has a manifest, but no shard."""
        return (
            isinstance(join(data_root, self.shards), str)
            or (self.folder(data_root) / MANIFEST).is_file()
            or bool(self.find_shards(data_root))
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A download that `data prepare` turns into the sources of a recipe.

    Args:
        download: what to get, and where to put it.
        annotation: path of its records in the download folder: a JSON list or JSON Lines.
        archives: globs of its image archives there; unpacked images are read as well.
        media_roots: folders that the records' paths may start from, there or in an archive.
    """

    download: str
    annotation: str
    archives: Sequence[str] = ()
    media_roots: Sequence[str] = ("",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A mix of sources.

    Args:
        sources: by name, each with what `SOURCE_KEYS` lists: `repeat`, passes per epoch, as a number or a ratio such as
            57/158, or `weight`, its share of an epoch relative to the others' weights; `max_bad_share`, largest share
            of it that may be bad (null: the run's `data.max_bad_share`).
        weights_over: what weights count: `samples`, `tokens` or `supervised_tokens`; shares are reported in it.
        evaluation: names of held-out sources that `data build` makes too.
        tokenizer: how `data build` trains a tokenizer on the text, for toy recipes.
        published: the download that holds all its sources, for `data prepare`.
    """

    name: str
    description: str
    sources: Mapping[str, Mapping[str, float | Fraction | None]]
    weights_over: str = "samples"
    evaluation: list[str] = field(default_factory=list)
    tokenizer: Mapping[str, Any] | None = None
    published: Published | None = None
    cards: Mapping[str, DatasetCard] = field(default_factory=dict)
    """The cards of all sources and held-out sources."""


def load_recipe(name: str) -> Recipe:
    """Returns a recipe of `data_recipes/`, or the one at a path, with the cards of its sources.

    A card is a file of `datasets/`, or one of many in a file of `collections/` that the recipe names. A recipe outside
    `data_recipes/` may hold its cards itself, under `datasets`; their shards and media roots are then relative to the
    recipe's folder. Under `include` a recipe may name others whose sources, and the collections of their cards, are
    its own too.

    Raises:
        ValueError: for an unknown name, with the nearest known ones, or a bad file.
    """
    folder = resource_dir("data_recipes")
    path = recipe_path(name)
    content = read_recipe(path)
    inline = content.pop("datasets", {})
    if "published" in content:
        content["published"] = make(Published, content["published"], path)
    many: dict[str, DatasetCard] = {}
    for collection in dict.fromkeys(content.pop("collections", ())):
        many |= read_collection(folder / "collections" / f"{collection}.yaml")
    recipe = make(Recipe, content, path)
    content["sources"] = {source: read_source(source, how, path) for source, how in recipe.sources.items()}
    cards = {}
    for source in [*recipe.sources, *recipe.evaluation]:
        card_path = folder / "datasets" / f"{source}.yaml"
        if source in inline:
            beside = {key: inline[source][key] for key in ("shards", "media_root") if inline[source].get(key)}
            beside = {key: str(join(path.parent.resolve(), value)) for key, value in beside.items()}
            cards[source] = make(DatasetCard, {"name": source, **inline[source], **beside}, path)
        elif source in many:
            cards[source] = many[source]
        elif card_path.is_file():
            cards[source] = make(DatasetCard, read_yaml(card_path), card_path)
        else:
            raise ValueError(f"{path}: source {source} has no card {card_path.name} in {card_path.parent}")
    return make(Recipe, {**content, "cards": cards}, path)


def recipe_path(name: str) -> Path:
    """Returns where a recipe is; `name` may be a path to a .yaml file itself.

    Raises:
        ValueError: if there is none, with the nearest known one.
    """
    folder = resource_dir("data_recipes")
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no recipe {name}{hint}; known are {', '.join(known)}, or a path to a .yaml file")
    return path


def read_recipe(path: Path, within: Sequence[Path] = ()) -> dict[str, Any]:
    """Returns the content of a recipe, after the sources and collections of those that it includes, in their order.

    Args:
        within: the recipes that include it, outermost first.

    Raises:
        ValueError: if it includes itself, by way of others too.
    """
    chain = [*within, path.resolve()]
    if chain[-1] in within:
        raise ValueError(f"{path} includes itself: {' -> '.join(p.name for p in chain)}")
    content = read_yaml(path)
    for name in reversed(content.pop("include", [])):
        base = read_recipe(recipe_path(name), chain)
        content["sources"] = {**base["sources"], **content.get("sources", {})}
        content["collections"] = [*base.get("collections", ()), *content.get("collections", ())]
    return content


def read_collection(path: Path) -> dict[str, DatasetCard]:
    """Returns the cards of a file of many: `shared` has what they have in common, `cards` by name what each has.

    `{name}` in `shards` is the card's name.
    """
    content = read_yaml(path)
    cards = {name: {"name": name, **content["shared"], **own} for name, own in content["cards"].items()}
    return {
        name: make(DatasetCard, {**card, "shards": card["shards"].format(name=name)}, path)
        for name, card in cards.items()
    }


def read_source(name: str, how: Any, path: Path) -> dict[str, float | Fraction | None]:
    """Returns what a recipe says about a source, with a ratio as a Fraction.

    Raises:
        ValueError: for a key that is not known, or a value that cannot be.
    """
    if not isinstance(how, Mapping):
        raise ValueError(f"{path}: source {name} is {how!r}; write {name}: {{repeat: 1.0}}")
    if {"repeat", "weight"} <= how.keys():
        raise ValueError(f"{path}: source {name} has a repeat and a weight; give one of them")
    read: dict[str, float | Fraction | None] = {}
    for key, value in how.items():
        if key not in SOURCE_KEYS:
            near = difflib.get_close_matches(str(key), SOURCE_KEYS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(SOURCE_KEYS)
            raise ValueError(f"{path}: source {name} has an unknown key {key!r}{hint} (known: {known})")
        if key == "repeat" and isinstance(value, str) and RATIO.fullmatch(value):
            value = Fraction(value)
        elif value is None and key != "repeat":
            pass
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            ratio = ", or a ratio such as 57/158" if key == "repeat" else ""
            raise ValueError(f"{path}: source {name} has {key}={value!r}; it is a number, 0 or more{ratio}")
        elif key == "max_bad_share" and value > 1:
            raise ValueError(f"{path}: source {name} has {key}={value!r}; it is a share, from 0 to 1")
        read[key] = value
    return read


def read_yaml(path: Path) -> dict:
    """Returns the mapping in a YAML file."""
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a mapping")
    return content


def make(kind: type, content: Mapping, path: Path):
    """Returns `kind(**content)`; a wrong key raises ValueError with the file's name."""
    try:
        return kind(**content)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error
