"""Byte-stable tables: the same content is always the same file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa


def write_table(path: str | Path, table: "pa.Table | Mapping[str, Any]") -> None:
    """Write a Parquet file with fixed writer options; a mapping is made into a table first."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(table, Mapping):
        table = pa.table(dict(table))
    partial = path.with_name(path.name + ".partial")
    pq.write_table(
        table,
        partial,
        compression="zstd",
        compression_level=3,
        version="2.6",
        row_group_size=65536,
    )
    partial.replace(path)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> "pa.Table":
    """Read a Parquet file. Raises DataError if it is missing, unreadable or lacks a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; run the stage that makes it, or check the path")
    try:
        schema = pq.read_schema(path)
        missing = [name for name in columns or () if name not in schema.names]
        if missing:
            raise DataError(
                f"{path}: column {missing[0]!r} is missing; it has {', '.join(schema.names)}"
            )
        return pq.read_table(path, columns=list(columns) if columns is not None else None)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error
