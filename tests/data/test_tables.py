"""Tables are published whole, mapped instead of copied, and known to be damaged."""

import pyarrow as pa
import pytest

from eagle_train.data.tables import DamagedTable, Rows, read_made, read_metadata, read_table, write_table

TABLE = pa.table(
    {
        "key": [f"sample {row}" for row in range(500)],
        "ends": pa.array([list(range(row % 5)) for row in range(500)], pa.list_(pa.int32())),
    }
).replace_schema_metadata({b"version": b"7"})


@pytest.fixture
def path(tmp_path):
    write_table(TABLE, tmp_path / "folder" / "a.arrow")
    return tmp_path / "folder" / "a.arrow"


def test_a_table_comes_back_with_its_metadata(path):
    found = read_table(path)
    assert found.equals(TABLE, check_metadata=True) and read_metadata(path) == {b"version": b"7"}
    assert [found[name].num_chunks for name in found.column_names] == [1, 1]
    assert [file.name for file in path.parent.iterdir()] == ["a.arrow"]


def test_a_mapped_table_takes_no_memory_of_its_own(path):
    write_table(pa.table({"numbers": pa.array(range(1 << 20), pa.int64())}), path)
    before = pa.total_allocated_bytes()
    table = read_table(path)
    assert table.nbytes >= 8 << 20
    assert pa.total_allocated_bytes() - before < 1 << 16
    assert table["numbers"].chunk(0).to_numpy(zero_copy_only=True)[-1] == (1 << 20) - 1


def test_a_reader_keeps_its_table_when_another_is_published(path):
    found = read_table(path)
    write_table(TABLE.slice(0, 3), path)
    assert found.equals(TABLE) and read_table(path).num_rows == 3


def test_a_short_file_is_known_at_every_length(path):
    data = path.read_bytes()
    for length in [*range(64), *range(64, len(data), 61), len(data) - 1]:
        path.write_bytes(data[:length])
        for read in (read_table, read_metadata):
            with pytest.raises(DamagedTable, match=r"a\.arrow is damaged"):
                read(path)


def test_overwritten_bytes_never_take_the_process_down(path):
    data = path.read_bytes()
    outcomes = set()
    for start in range(0, len(data), 37):
        path.write_bytes(data[:start] + b"\xff" * 64 + data[start + 64 :])
        try:
            read_table(path).to_pydict()
            outcomes.add("read")
        except DamagedTable:
            outcomes.add("damaged")
    assert "damaged" in outcomes and outcomes <= {"read", "damaged"}


def test_a_damaged_table_is_made_again(path):
    path.write_bytes(path.read_bytes()[:200])
    calls = []

    def make():
        calls.append(path.exists())
        if not path.exists():
            write_table(TABLE, path)
        return path

    assert read_made(make).equals(TABLE) and calls == [True, False]
    assert read_made(make).equals(TABLE) and len(calls) == 3, "a good one is only read"


def test_a_missing_file_is_no_damaged_one(tmp_path):
    for read in (read_table, read_metadata):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none.arrow")


def test_a_failed_write_leaves_nothing_and_names_the_remedy(path):
    with pytest.raises(ValueError, match="set index_dir to a writable folder"):
        write_table(TABLE, path / "below a file")
    assert [file.name for file in path.parent.iterdir()] == ["a.arrow"]


def test_single_rows_are_those_of_the_whole_table(path):
    part = pa.struct(
        [("name", pa.string()), ("size", pa.int64()), ("sure", pa.bool_()), ("pages", pa.list_(pa.int8()))]
    )
    parts = [
        [{"name": f"{k}", "size": k, "sure": k % 2 == 0, "pages": [k, count]} for k in range(count)]
        for count in (2, 0, 3)
    ]
    columns = {
        "key": pa.array(["a", None, "c"]),
        "count": pa.array([3, None, 5], pa.int32()),
        "seconds": pa.array([0.5, 2.0, 0.0]),
        "parts": pa.array(parts, pa.list_(part)),
    }
    write_table(pa.table(columns), path)
    table = read_table(path)
    assert [Rows(table)[row] for row in range(3)] == table.to_pylist()
    assert [Rows(table.slice(1))[row] for row in range(2)] == table.to_pylist()[1:]
