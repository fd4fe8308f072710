"""`python -m eagle_train data prepare|list|show ...`: downloads become shards; what there is and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from eagle_train.data.locations import join, shown
from eagle_train.data.prepare import Outcome, prepare
from eagle_train.data.recipe import DatasetCard, Recipe, load_recipe
from eagle_train.data.shards import expected_shards
from eagle_train.resources import resource_dir
from eagle_train.tools.stdout import stdout
from eagle_train.track.console import progress


def prepare_recipe(
    recipe: Recipe, folder: Path, data_root: Path, *, workers: int, samples_per_shard: int, max_bad_share: float
) -> int:
    """Prepares the sources of a recipe that the download in `folder` holds; returns the exit code.

    Prints a table of the sources, and for what is missing what to download and where to put it.
    """
    outcomes, defects = prepare(
        recipe,
        folder,
        data_root,
        progress=progress,
        workers=workers,
        samples_per_shard=samples_per_shard,
        max_bad_share=max_bad_share,
    )
    console = stdout()
    console.print(outcome_table(recipe, outcomes, data_root))
    for defect in defects:
        print(f"{folder}: {defect}")
    print_errors(outcomes)
    missing = [outcome for outcome in outcomes if outcome.problem]
    if missing:
        print(f"{len(missing)} of {len(recipe.sources)} sources are not there. {recipe.published.download}")
        print(f"Put it in {folder} and run this again: what is done stays.")
        return 1
    print(f"recipe {recipe.name}: {len(recipe.sources)} sources under {data_root}")
    return 0


def outcome_table(recipe: Recipe, outcomes: Sequence[Outcome], data_root: Path) -> Table:
    """Returns a table of a recipe's sources: what was published, what was found and what became of it."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    table = Table(title=recipe.name)
    table.add_column("source", no_wrap=True)
    for title in ("published", "records", "images found"):
        table.add_column(title, justify="right")
    table.add_column("state")
    for name in recipe.sources:
        card, outcome = recipe.cards[name], by_name.get(name)
        if outcome is None:
            table.add_row(name, number(card.num_samples), "", "", state(card, data_root))
            continue
        images = "" if outcome.images is None else "{} of {}".format(*outcome.images)
        text = f"read {outcome.read:,} = written {outcome.written:,} + bad {len(outcome.errors):,}"
        if outcome.problem:
            text = "not there"
        elif outcome.found == 0 and card.num_samples:
            text = "empty: no record is as its card says"
        table.add_row(name, number(card.num_samples), number(outcome.found), images, text)
    return table


def print_errors(outcomes: Sequence[Outcome]) -> None:
    """Prints why sources are not there, and why records of the others are left out."""
    for problem in dict.fromkeys(outcome.problem for outcome in outcomes if outcome.problem):
        print(f"{', '.join(outcome.name for outcome in outcomes if outcome.problem == problem)}: {problem}")
    for outcome in outcomes:
        if outcome.errors and not outcome.problem:
            reasons = Counter(error.reason for error in outcome.errors)
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            print(f"{outcome.name}: {counts}; the first: {outcome.errors[0]}")


def list_recipes(data_root: Path) -> int:
    """Prints all recipes with their sources; returns the exit code."""
    console = stdout()
    for path in sorted(resource_dir("data_recipes").glob("*.yaml")):
        recipe = load_recipe(path.stem)
        table = Table(title=recipe.name, title_justify="left")
        table.add_column("source", no_wrap=True)
        table.add_column("published", justify="right")
        table.add_column("licence", no_wrap=True, max_width=20)
        table.add_column(f"in {data_root}", overflow="fold")
        for card in (recipe.cards[name] for name in recipe.sources):
            table.add_row(card.name, number(card.num_samples), escape(card.licence), state(card, data_root))
        console.print(table)
    return 0


def show_recipe(recipe: Recipe, data_root: Path) -> int:
    """Prints everything about a recipe; returns the exit code."""
    print(f"{recipe.name}: {recipe.description}")
    if recipe.published:
        print(f"\n{recipe.published.download}")
        print(f"Then: python -m eagle_train data prepare recipe={recipe.name} from=FOLDER")
    for name, how in recipe.sources.items():
        card = recipe.cards[name]
        key = "weight" if how.get("weight") is not None else "repeat"
        print(f"\n{name} ({key} {float(how.get(key, 1.0)):.4g}): {card.description}")
        where = shown(join(data_root, card.shards))
        print(f"  {number(card.num_samples)} samples published; {state(card, data_root)}: {where}")
        print(f"  licence: {card.licence}\n  origin: {card.origin}")
        if card.schema:
            print(f"  schema: {card.schema}")
        for field, globs in (card.select or {}).items():
            print(f"  {field}: {', '.join(glob or 'none' for glob in globs)}")
    return 0


def state(card: DatasetCard, data_root: Path) -> str:
    """Returns whether a source is on disk, with its samples."""
    if isinstance(join(data_root, card.shards), str):
        return "at URLs"
    if not card.is_there(data_root):
        return "not there"
    return f"there: {sum(expected_shards(card.folder(data_root)).values()):,} samples"


def number(count: int | None) -> str:
    """Returns a count for reading; empty if it is not known."""
    return "" if count is None else f"{count:,}"
