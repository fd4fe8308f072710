"""Temporary."""

from dataclasses import fields

import pyarrow as pa

from eagle_train.data.answers import AnswerEnd
from eagle_train.data.index import ensure_index, identity_metadata, index_stem, is_of, read_record
from eagle_train.data.shard_reader import Member
from eagle_train.data.storage import open_shard
from eagle_train.data.tables import read_table, write_table

LENGTHS = tuple(field.name for field in fields(AnswerEnd))


def ensure_lengths(shard, index_dir, fingerprint, answer_ends):
    """Temporary."""
    index_file = ensure_index(shard, index_dir)
    stem = index_stem(shard, index_dir)
    path = stem.with_name(f"{stem.name}.text-{fingerprint}.arrow")
    if is_of(path, shard):
        return path
    index = read_table(index_file)
    reader = open_shard(shard)
    lengths = [[] for _ in range(index.num_rows)]
    for ends, row in zip(lengths, index.to_pylist(), strict=True):
        if row["reason"] is None:
            members = [Member(**member) for member in row["members"]]
            ends += answer_ends(read_record(reader, row["key"], members).messages)
    reader.close()
    columns = {name: [[getattr(end, name) for end in ends] for ends in lengths] for name in LENGTHS}
    table = pa.table({name: pa.array(column, pa.list_(pa.int32())) for name, column in columns.items()})
    write_table(table.replace_schema_metadata(identity_metadata(shard)), path)
    return path
