"""The data of a stage: its sources' indexes, its catalog and its plan, and what ties a run to them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from eagle_train import dist
from eagle_train.data.build_layouts import ensure_layouts
from eagle_train.data.catalog import Catalog, Source
from eagle_train.data.encode import Encoder
from eagle_train.data.index import index_path
from eagle_train.data.layout import LAYOUT_VERSION, Layout
from eagle_train.data.lengths import TextLayout
from eagle_train.data.media_fields import SIZE_FIELDS
from eagle_train.data.media_text import MediaText
from eagle_train.data.mixing import asked_shares, repeats
from eagle_train.data.open_catalog import open_catalog
from eagle_train.data.plan import PLAN_VERSION, PlanConfig, PlanTotals, count_rows
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.tables import read_table
from eagle_train.data.tiling import Tiling
from eagle_train.data.too_long import TooLong
from eagle_train.track.console import progress
from eagle_train.train.assemble import DataSettings
from eagle_train.train.config import build
from eagle_train.train.costs import ForwardFlops, cost_model
from eagle_train.train.preemption import Preempted
from eagle_train.train.run_folder import replace_text
from eagle_train.train.schedule import Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StageData:
    """A stage's samples and plan."""

    encoder: Encoder
    catalog: Catalog
    plan: PlanConfig
    num_steps: int
    totals: PlanTotals | None
    """Of all rows, where the number of epochs made it necessary to count them."""
    asked: Mapping[str, float]
    """Each source's share of an epoch, as its repeat or weight asks."""
    measure: str
    """What the shares are of."""
    settings: DataSettings
    """How its samples are read."""
    identity: Mapping[str, Any]
    """All that the rows depend on, in words and numbers."""


def build_stage_data(
    config: Mapping[str, Any],
    stage: Stage,
    encoder: Encoder,
    flops: ForwardFlops,
    cache: Path | None = None,
    *,
    any_share: bool = False,
    stop: Callable[[], bool] | None = None,
) -> StageData:
    """Returns the samples and the plan of a stage; ranks share the building of what is missing on disk.

    Args:
        encoder: of the run; a stage may have another template, tiling and policy for frames and tiles.
        cache: folder that keeps the totals of plans; None: they are counted.
        any_share: whether any share of samples may be bad or too long, as for a look at the data.
        stop: see `read_sources`.
    """
    settings = build(config["data"])
    recipe = load_recipe(stage.recipe)
    sources = recipe_sources(recipe, Path(config["data_root"]))
    if any_share:
        settings = replace(settings, max_bad_share=1.0, max_too_long_share=1.0)
        sources = [replace(source, max_bad_share=None) for source in sources]
    encoder = of_stage(encoder, stage)
    layout = make_layout(encoder, stage.max_length, settings.too_long)
    catalog = read_sources(sources, layout, settings, stop)
    note_sizes(sources, encoder.tiling)
    summaries = catalog.source_summaries()
    passes = repeats(sources, summaries, recipe.weights_over)
    plan = PlanConfig(
        max_length=stage.max_length,
        rows_per_step=stage.rows_per_step,
        window_rows=settings.window_rows,
        repeats=tuple(passes),
        num_epochs=stage.num_epochs,
        cost=cost_model(flops, stage),
        seed=stage.seed,
    )
    identity = {
        "data": catalog.identity(),
        "mix": {source.name: str(repeat) for source, repeat in zip(sources, passes, strict=True)},
        "layout": describe_layout(layout),
        "plan": {"version": PLAN_VERSION}
        | {name: value for name, value in asdict(plan).items() if name not in ("repeats", "num_epochs")},
    }
    totals = None if stage.num_epochs is None else plan_totals(catalog, plan, identity, cache)
    num_steps = stage.num_steps if totals is None else -(-totals.rows // stage.rows_per_step)
    shares = asked_shares(passes, summaries, recipe.weights_over)
    return StageData(
        encoder=encoder,
        catalog=catalog,
        plan=plan,
        num_steps=num_steps,
        totals=totals,
        asked={source.name: share for source, share in zip(sources, shares, strict=True)},
        measure=recipe.weights_over,
        settings=settings,
        identity=identity,
    )


def plan_totals(catalog: Catalog, plan: PlanConfig, identity: Mapping[str, Any], cache: Path | None) -> PlanTotals:
    """Returns the totals of all epochs of a plan, from the cache if it has been counted before."""
    path = cache and cache / f"plan-{fingerprint([identity, plan.num_epochs])}.json"
    if path and path.is_file():
        return PlanTotals(**json.loads(path.read_text()))
    with progress("counting rows", None) as advance:
        totals = count_rows(catalog, plan, advance)
    if path and dist.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(asdict(totals)))
    return totals


def read_sources(
    sources: Sequence[Source], layout: Layout, settings: DataSettings, stop: Callable[[], bool] | None = None
) -> Catalog:
    """Returns the catalog of `sources`; the ranks first build together what is missing on disk.

    Args:
        stop: returns whether this rank is asked to end; asked while something is missing.

    Raises:
        Preempted: on all ranks, if one of them was asked to end before all was there; what is built stays.
    """
    asked = False

    def stopping() -> bool:
        nonlocal asked
        asked = asked or (stop is not None and stop())
        return asked

    shards = [(shard, s.index_dir, s.name, s.media_root) for s in sources for shard in s.shards]
    with progress("reading indexes", len(shards)) as advance:
        lost = ensure_layouts(
            shards, layout, rank=dist.rank(), world_size=dist.world_size(), workers=index_workers(settings),
            progress=advance, storage=settings.storage, stop=stopping,
        )  # fmt: skip
    if stop is not None and dist.all_reduce_sum([float(asked)])[0]:  # of ranks that still had something to build
        raise Preempted
    quarantine = settings.quarantine and Path(settings.quarantine)
    return open_catalog(
        sources,
        layout.fingerprint,
        quarantine=quarantine or None,
        max_bad_share=settings.max_bad_share,
        max_too_long_share=settings.max_too_long_share,
        lost=lost,
    )


def note_sizes(sources: Sequence[Source], tiling: Tiling) -> None:
    """Tells of sources whose records ask for sizes in pixels, if the run's tiles do not follow them.

    The first shard that is there speaks for its source: what records ask for is the habit of whoever wrote them.
    """
    if tiling.tile_depth or dist.rank():
        return
    for source in sources:
        paths = (index_path(shard, source.index_dir) for shard in source.shards)
        if (path := next(filter(Path.is_file, paths), None)) is None:
            continue
        media = read_table(path)["media"].combine_chunks().flatten()
        if asked := [name for name in SIZE_FIELDS if pc.max(media.field(name)).as_py()]:
            log.warning(
                "records of source %s ask for %s: this model cuts tiles, which do not follow sizes in pixels",
                source.name,
                ", ".join(asked),
            )


def index_workers(settings: DataSettings) -> int:
    """Returns the number of processes of this rank that build indexes."""
    return max(1, settings.num_workers) if settings.index_workers is None else settings.index_workers


def of_stage(encoder: Encoder, stage: Stage) -> Encoder:
    """Returns `encoder` with what a stage has of its own: template, tiling, policy for frames and tiles."""
    return replace(
        encoder,
        template=stage.chat_template or encoder.template,
        tiling=stage.tiling or encoder.tiling,
        degrade=stage.degrade or encoder.degrade,
    )


def make_layout(encoder: Encoder, max_length: int, too_long: TooLong) -> Layout:
    """Returns the layout of samples under `encoder` in rows of `max_length` tokens."""
    layout = Layout(
        encoder=encoder,
        max_length=max_length,
        too_long=too_long,
        text=TextLayout(
            template=encoder.template,
            tokenizer=encoder.tokenizer,
            # Text lengths do not depend on what is laid out with media.
            fingerprint=fingerprint([tokenizer_hash(encoder), asdict(replace(encoder.template, media=MediaText()))]),
        ),
        fingerprint="",
    )
    return replace(layout, fingerprint=fingerprint(describe_layout(layout)))


def describe_layout(layout: Layout) -> dict[str, Any]:
    """Returns all that a layout depends on."""
    encoder = layout.encoder
    return {
        "version": LAYOUT_VERSION,
        "tokenizer": tokenizer_hash(encoder),
        "chat_template": asdict(encoder.template),
        "tiling": describe(encoder.tiling),
        "images": repr(encoder.images),
        "videos": repr(encoder.videos),
        "degrade": describe(encoder.degrade),
        "tile_size": encoder.tile_size,
        "tokens_per_tile": encoder.tokens_per_tile,
        "max_length": layout.max_length,
        "too_long": describe(layout.too_long),
    }


def describe(part: Any) -> list:
    """Returns class and attributes of a small object."""
    return [type(part).__name__, vars(part)]


def tokenizer_hash(encoder: Encoder) -> str:
    """Returns a short hash of a tokenizer, without the truncation and padding that its file may ask for.

    Any call that asks for neither switches them off, as all of ours do, so a hash with them would depend on what was
    called before.
    """
    encoder.tokenizer.backend_tokenizer.no_truncation()
    encoder.tokenizer.backend_tokenizer.no_padding()
    return hashlib.sha256(encoder.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def fingerprint(value: Any) -> str:
    """Returns a short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
