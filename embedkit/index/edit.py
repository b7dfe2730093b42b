"""Take single files out of an index, and give back the room of what has gone: no model is needed.

`embedkit.index.sync.add_files` is the way in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedkit.errors import UsageError
from embedkit.index.catalog import resolve_path
from embedkit.index.store import Store, store_path, writer_lock
from embedkit.index.sync import known_run, name_of, publish_store, remove_leftovers

__all__ = ["Compacted", "Removed", "compact_index", "remove_files"]


@dataclass(frozen=True)
class Removed:
    """What `remove_files` did; ``pictures + failures == len(files)``.

    Attributes:
        files: Every file that was taken out, in the order of the index.
        pictures: Those that could be found by searching.
        failures: Those that were only remembered as no usable pictures.
        kept_out: Those inside the folder: later syncs leave them out.
        count: Pictures that are left in the index.
    """

    files: list[Path]
    pictures: int
    failures: int
    kept_out: int
    count: int


@dataclass(frozen=True)
class Compacted:
    """What `compact_index` did; ``kept + dropped`` files were remembered before.

    Attributes:
        kept: Files that are still there.
        dropped: Files that were remembered and are gone from the disk.
        count: Pictures in the index.
        store_bytes: Length of the store before and after.
        index_bytes: Length of the catalog before and after; 0 where there was none.
    """

    kept: int
    dropped: list[Path]
    count: int
    store_bytes: tuple[int, int]
    index_bytes: tuple[int, int]


def remove_files(
    index: Path, paths: Sequence[Path], *, label: str | None = None, dry_run: bool = False
) -> Removed:
    """Take files out of an index and keep them out, until `add_files` takes them back.

    The files themselves are not touched, and need not be there any more. What was added from
    elsewhere is forgotten; what lies in the folder is left out by every later sync, by its name:
    new content under the same name stays out too, the same content under another name comes in.

    Args:
        index: A catalog that has its store.
        paths: Files, or folders for all that the index has of them.
        label: Every picture with this label as well.
        dry_run: Tell what would be done and write nothing.

    Raises:
        UsageError: The index has nothing of a path or a label, or nothing would be left in it;
            nothing is changed.
        MismatchError: There is no store, or it is damaged.
        EmbedKitError: Something cannot be written, or another process is writing this index.
    """
    index = Path(os.path.realpath(index))
    root = resolve_path(known_run(index).root, index.parent)
    file = store_path(index)
    if dry_run:
        with Store(file, read_only=True) as store:
            return _leaving(store, index, root, paths, label)[0]
    with writer_lock(index):
        remove_leftovers(index)
        with Store(file) as store:
            removed, names = _leaving(store, index, root, paths, label)
            inside = [name for name in names if not name.startswith(b"/")]
            # Kept out first: killed between the two, the next sync does the rest.
            store.choose(kept_out=inside, neither=names)
            store.forget(names)
            publish_store(store, index)
            return removed


def compact_index(index: Path, *, dry_run: bool = False) -> Compacted:
    """Drop what is remembered of files that are gone, shrink the store, write the catalog again.

    Nothing is embedded, and new files are not looked for: that is `sync_folder`. A damaged catalog
    is made whole again from its store.

    Args:
        index: A catalog that has its store.
        dry_run: Count, and write nothing; the lengths after are those before.

    Raises:
        UsageError: The folder is gone as a whole, or all of its files: is it mounted? Nothing is
            changed.
        MismatchError: There is no store, or it is damaged.
        EmbedKitError: Something cannot be written, or another process is writing this index.

    Cost: one look at each file, and as much free disk as the store and the catalog are long.
    """
    index = Path(os.path.realpath(index))
    root = resolve_path(known_run(index).root, index.parent)
    file = store_path(index)
    before = _length(file), _length(index)
    if dry_run:
        with Store(file, read_only=True) as store:
            names, kept = _gone(store, root)
            leaving = set(names)
            count = sum(usable and name not in leaving for name, _, usable in store.paths())
        return _compacted(root, names, kept, count, before, before)
    with writer_lock(index):
        remove_leftovers(index)
        with Store(file) as store:
            names, kept = _gone(store, root)
            store.choose(neither=(name for name in names if name.startswith(b"/")))
            store.forget(names)
            store.shrink()
            store.set_published("")
            publish_store(store, index)
            count = store.count_usable()
    return _compacted(root, names, kept, count, before, (_length(file), _length(index)))


def _leaving(
    store: Store, index: Path, root: Path, paths: Iterable[Path], label: str | None
) -> tuple[Removed, list[bytes]]:
    """What goes when these paths and this label go; names in the order of the index."""
    files = list(store.paths())
    known = {name for name, _, _ in files} | set(store.added())
    leaving: set[bytes] = set()
    for path in paths:
        found = _below(path, root, known)
        if not found:
            raise UsageError(
                f"{index.name} has nothing of {str(path)!r}",
                facts=f"its folder is {root}",
                hint="name a file or folder as `embedkit search` prints it",
            )
        leaving |= found
    if label is not None:
        found = {name for name, given, _ in files if os.fsdecode(given) == label}
        if not found:
            labels = sorted({os.fsdecode(given) for _, given, _ in files if given})
            shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
            raise UsageError(
                f"{index.name} has nothing with the label {label!r}",
                facts=f"its labels: {shown or 'none'}",
            )
        leaving |= found
    if not leaving:
        raise UsageError("nothing was named to be removed", hint="embedkit index rm INDEX PATHS")
    names = [name for name, _, _ in files if name in leaving]
    names += sorted(leaving.difference(names))  # added, and not looked at yet
    pictures = sum(usable and name in leaving for name, _, usable in files)
    count = sum(usable for _, _, usable in files) - pictures
    if count == 0:
        raise UsageError(
            f"nothing would be left in {index.name}",
            hint=f"delete the index itself: {index} and {store_path(index)}",
        )
    removed = Removed(
        files=[root / os.fsdecode(name) for name in names],
        pictures=pictures,
        failures=len(names) - pictures,
        kept_out=sum(not name.startswith(b"/") for name in names),
        count=count,
    )
    return removed, names


def _below(path: Path, root: Path, known: set[bytes]) -> set[bytes]:
    """The known files that are `path`, or in it where it is a folder."""
    name = name_of(path, root) if path.name not in ("", "..") else b""
    if name in known:
        return {name}
    folder = Path(os.path.realpath(path))
    if folder == root or root.is_relative_to(folder):
        inside = {one for one in known if not one.startswith(b"/")}
    else:
        start = os.fsencode(folder.relative_to(root) if folder.is_relative_to(root) else folder)
        inside = {one for one in known if one.startswith(start + b"/")}
    above = os.fsencode(folder).rstrip(b"/") + b"/"
    return inside | {one for one in known if one.startswith(above)}


def _gone(store: Store, root: Path) -> tuple[list[bytes], int]:
    """Names of the remembered files that are no longer on the disk, and how many are."""
    if not root.is_dir():
        raise UsageError(
            f"the folder {root} is gone",
            facts="everything in the index would be dropped",
            hint="mount it or move it back; or, where it was renamed: "
            "embedkit index FOLDER -o INDEX",
        )
    gone: list[bytes] = []
    kept = 0
    for name, _, _ in store.paths():
        if os.path.lexists(root / os.fsdecode(name)):
            kept += 1
        else:
            gone.append(name)
    if gone and not kept:
        raise UsageError(
            f"of {len(gone):,} files of the index none is in {root}",
            facts="everything in the index would be dropped",
            hint="is it the right folder, and mounted?",
        )
    return gone, kept


def _compacted(
    root: Path,
    names: list[bytes],
    kept: int,
    count: int,
    before: tuple[int, int],
    after: tuple[int, int],
) -> Compacted:
    return Compacted(
        kept=kept,
        dropped=[root / os.fsdecode(name) for name in names],
        count=count,
        store_bytes=(before[0], after[0]),
        index_bytes=(before[1], after[1]),
    )


def _length(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
