"""Arrow IPC files, temporary."""

import uuid
from pathlib import Path

import pyarrow as pa


def write_table(table, path):
    """Writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    aside.replace(path)


def read_table(path):
    """Reads."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def read_metadata(path):
    """Reads metadata."""
    if not Path(path).exists():
        return {}
    return pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata or {}
