"""Which sources of a recipe are there, and what makes those that are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from eagle_train.data.catalog import Source
from eagle_train.data.locations import Location, join, shown, stem
from eagle_train.data.recipe import DatasetCard, Recipe


def recipe_sources(recipe: Recipe, data_root: Path) -> list[Source]:
    """Returns the sources of a recipe whose shards lie under `data_root`, less those that were built and have none.

    Raises:
        ValueError: for all sources that were not built, with what builds or says how to get them, or if none has a
            sample; as `check_names`.
    """
    sources, missing = [], defaultdict(list)
    for name, how in recipe.sources.items():
        card = recipe.cards[name]
        if card.find_shards(data_root):
            sources.append(card_source(recipe, name, data_root, **how))
        elif isinstance(join(data_root, card.shards), str) or not card.is_there(data_root):
            missing[how_to_get(recipe, card)].append(card)
    if missing:
        raise ValueError("\n".join(not_there(cards, data_root, remedy) for remedy, cards in missing.items()))
    if not sources:
        raise ValueError(f"no source of recipe {recipe.name} under {data_root} has a sample; build it again")
    return sources


def card_source(recipe: Recipe, name: str, data_root: Path, **how: float | Fraction | None) -> Source:
    """Returns one source of a recipe, see `recipe_sources`.

    Args:
        how: what the recipe says of it, see `SOURCE_KEYS`.
    """
    card = recipe.cards[name]
    shards = card.find_shards(data_root)
    if not shards:
        raise ValueError(not_there([card], data_root, how_to_get(recipe, card)))
    check_names(name, shards)
    index_dir = data_root / card.index_dir if card.index_dir else None
    if index_dir is None and isinstance(shards[0], str):
        index_dir = data_root / "index" / name
    media_root = data_root / card.media_root if card.media_root else None
    return Source(name=name, shards=shards, index_dir=index_dir, media_root=media_root, **how)


def check_names(source: str, shards: Sequence[Location]) -> None:
    """Raises ValueError if two shards of a source have one name, of which the keys of their samples are made."""
    firsts: dict[str, Location] = {}
    for shard in shards:
        first = firsts.setdefault(stem(shard), shard)
        if first is not shard:
            raise ValueError(
                f"source {source}: {len(shards)} shards, of which {shown(first)} and {shown(shard)} have one name, so "
                f"that their samples have the same keys; give each folder a card of its own, or each file another name"
            )


def not_there(cards: Sequence[DatasetCard], data_root: Path, remedy: str) -> str:
    """Returns the message for sources that have no shards."""
    names = ", ".join(card.name for card in cards)
    more = f" and {len(cards) - 1} other places" if len(cards) > 1 else ""
    return f"source{'s' * bool(more)} {names}: no shard at {shown(join(data_root, cards[0].shards))}{more}; {remedy}"


def how_to_get(recipe: Recipe, card: DatasetCard) -> str:
    """Returns what makes a source of a recipe, or where it comes from."""
    if card.build:
        return f"run `python -m eagle_train data build recipe={recipe.name}`"
    if recipe.published and card.name in recipe.sources:
        return f"run `python -m eagle_train data prepare recipe={recipe.name} from=FOLDER`"
    return card.origin
