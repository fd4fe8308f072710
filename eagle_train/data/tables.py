"""Tables on disk that all ranks and workers of a node share: Arrow files, read by mapping them into memory.

They are uncompressed, so that a mapped table takes no memory of its own and no time to open; the page cache holds it
once. A table is written aside and published by rename: whoever finds it finds it whole, unless the disk damaged it.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa


class DamagedTable(ValueError):
    """A file that is no whole table; the remedy is to make it again."""


def write_table(table: pa.Table, path: Path) -> None:
    """Writes a table that appears when it is whole, and is on the disk then.

    Raises:
        ValueError: if the folder is not writable; the remedy is `index_dir`.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                with pa.ipc.new_file(file, table.schema) as writer:
                    # One batch: a column is one array then, and is used without being copied.
                    writer.write_table(table.combine_chunks())
                file.flush()
                os.fsync(file.fileno())  # or a rename may outlive a power cut that the content does not
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error}); set index_dir to a writable folder") from error


def read_table(path: Path) -> pa.Table:
    """Returns the table of a file, mapped into memory and shared with all who map it.

    Raises:
        FileNotFoundError: if there is none.
        DamagedTable: if it is cut short or overwritten. Wrong numbers in a file of the right form are not noticed.
    """
    with _reporting(path), _open(path) as reader:
        table = reader.read_all()
        table.validate(full=True)  # a list that ends outside its column would take the process down
        return table


def read_made(make: Callable[[], Path]) -> pa.Table:
    """Returns the table that `make` makes unless it is there; made again if it turns out to be damaged."""
    path = make()
    try:
        return read_table(path)
    except DamagedTable:
        path.unlink(missing_ok=True)
        return read_table(make())


class Rows:
    """The rows of a table as `to_pylist` gives them, one at a time and in a third of the time of a slice.

    Args:
        table: without nulls inside of lists and structs.
    """

    def __init__(self, table: pa.Table) -> None:
        batches = table.combine_chunks().to_batches()
        self._columns = {name: _getter(batches[0][name]) for name in table.column_names} if batches else {}

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: get(row) for name, get in self._columns.items()}


def _getter(array: pa.Array) -> Callable[[int], Any]:
    """Returns what gives single values of a column; what is looked up for every value is looked up here."""
    kind = array.type
    if pa.types.is_list(kind) and not array.null_count:
        offsets, get = array.offsets.to_numpy(), _getter(array.values)
        return lambda row: [get(place) for place in range(offsets[row], offsets[row + 1])]
    if pa.types.is_struct(kind) and not array.null_count:
        parts = [(part.name, _getter(array.field(place))) for place, part in enumerate(kind)]
        return lambda row: {name: get(row) for name, get in parts}
    if (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and not array.null_count:
        return array.to_numpy().item
    return lambda row: array[row].as_py()


def read_metadata(path: Path) -> dict[bytes, bytes]:
    """Returns what `replace_schema_metadata` put into a table; only the end of its file is read.

    Raises:
        FileNotFoundError, DamagedTable: as `read_table`.
    """
    with _reporting(path), _open(path) as reader:
        return dict(reader.schema.metadata or {})


def _open(path: Path) -> pa.RecordBatchFileReader:
    """Returns the opened file."""
    if path.stat().st_size == 0:  # cannot be mapped
        raise pa.ArrowInvalid("the file is empty")
    return pa.ipc.open_file(pa.memory_map(str(path)))


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Turns what Arrow raises on damaged bytes into `DamagedTable`."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system
        raise DamagedTable(f"{path} is damaged ({error}); delete it, it is made again") from error
