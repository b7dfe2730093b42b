"""Labels from a table: `path,label`, as training reads it, in place of the folders' names."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from embedkit.errors import DataError
from embedkit.index.sync import name_of

__all__ = ["read_labels"]


def read_labels(table: Path, root: Path) -> dict[bytes, bytes]:
    """What a CSV says of the files below `root`, by name (`name_of`); others are passed over.

    Args:
        table: UTF-8, with a first line that names the columns ``path`` and ``label``; other columns
            are passed over. Relative paths start at the table's own folder.
        root: The folder of the index.

    Raises:
        DataError: It cannot be read, has not these columns, gives one file two labels, or names no
            file below `root`.
    """
    root = Path(os.path.realpath(root))
    labels: dict[bytes, bytes] = {}
    try:
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            missing = {"path", "label"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(
                    f"{table} has no column {' and no column '.join(sorted(missing))}",
                    facts=f"its first line: {', '.join(reader.fieldnames or ['(empty)'])}",
                    hint="begin it with the line: path,label",
                )
            for row in reader:
                if not row["path"] or row["label"] is None:
                    raise DataError(f"{table}, line {reader.line_num}: a path or label is missing")
                name = name_of(table.parent / row["path"], root)
                label = os.fsencode(row["label"])
                if labels.setdefault(name, label) != label:
                    raise DataError(
                        f"{table}, line {reader.line_num}: {row['path']} has another label above"
                    )
    except OSError as error:
        raise DataError(f"{table} cannot be read", facts=error.strerror) from error
    except csv.Error as error:
        raise DataError(f"{table} is no CSV", facts=str(error)) from error
    inside = {name: label for name, label in labels.items() if not name.startswith(b"/")}
    if not inside:
        raise DataError(
            f"{table} names no file of {root}",
            facts=f"{len(labels):,} rows; the first: {os.fsdecode(next(iter(labels), b'none'))}",
            hint="relative paths start at the table's own folder",
        )
    return inside
