"""Layout files of made-up samples, so that the real plan can be measured without shards behind it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from lengths import Lengths

from eagle_train.data.catalog import Catalog, Source
from eagle_train.data.index import index_stem
from eagle_train.data.layout import COUNTS, PLANS, SCHEMA, Summary, layout_path, to_metadata
from eagle_train.data.open_catalog import open_catalog
from eagle_train.data.tables import write_table

FINGERPRINT = "bench"


def write_layouts(data: Lengths, folder: Path) -> None:
    """Writes an empty tar and its layout for every shard; sample i of `data` has number i in the catalog."""
    for source in np.unique(data.sources).tolist():
        (folder / f"source-{source:03d}").mkdir(parents=True)
    borders = np.flatnonzero(np.diff(data.shards, prepend=-1, append=data.shards[-1] + 1)).tolist()
    for first, end in pairwise(borders):
        tar = folder / f"source-{data.sources[first]:03d}" / f"{data.shards[first]:06d}.tar"
        tar.touch()
        tokens, tiles, targets = (column[first:end] for column in (data.tokens, data.tiles, data.targets))
        columns = dict.fromkeys(COUNTS, np.zeros(end - first)) | {
            "num_tokens": tokens,
            "num_targets": targets,
            "num_tiles": tiles,
            "num_answers": np.ones(end - first),
        }
        seen = tiles > 0
        plans = pa.StructArray.from_arrays(
            [
                np.ones(seen.sum(), np.int32),
                np.ones(seen.sum(), np.int16),
                tiles[seen].astype(np.int16),
                pa.array(np.zeros(seen.sum(), bool)),
                np.ones(seen.sum(), np.int16),
            ],
            fields=list(PLANS),
        )
        media = pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(seen)]).astype(np.int32), plans)
        nothing = pa.nulls(end - first, pa.string())
        table = pa.Table.from_arrays(
            [
                *(pa.array(columns[name].astype(np.int32)) for name in COUNTS),
                pa.array(tiles.astype(np.int64)),
                media,
                nothing,
                nothing,
            ],
            schema=SCHEMA,
        )
        summary = Summary(
            num_samples=end - first,
            num_usable=end - first,
            num_tokens=int(tokens.sum()),
            num_targets=int(targets.sum()),
            num_tiles=int(tiles.sum()),
        )
        write_table(
            table.replace_schema_metadata(to_metadata(summary)), layout_path(index_stem(tar, None), FINGERPRINT)
        )


def open_layouts(folder: Path) -> Catalog:
    """Returns the catalog of what `write_layouts` wrote."""
    sources = [
        Source(name=here.name, shards=sorted(here.glob("*.tar"))) for here in sorted(folder.iterdir()) if here.is_dir()
    ]
    return open_catalog(sources, FINGERPRINT)
