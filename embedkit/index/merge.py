"""Shards made by the same model become one catalog, with one store, and no picture twice."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from embedkit.atomic import sync_folder
from embedkit.errors import DataError, EmbedKitError, MismatchError, UsageError
from embedkit.index.catalog import described, portable_path, resolve_path
from embedkit.index.choose import Building, Wanted
from embedkit.index.learned import check_kind
from embedkit.index.several import check_type
from embedkit.index.store import Choices, Item, Run, Store, store_path, writer_lock
from embedkit.index.sync import (
    folder_label,
    is_walked,
    known_run,
    publish_store,
    remove_leftovers,
)
from embedkit.runtime.contract import ModelContract

__all__ = ["Merged", "merge_indexes"]

_BLOCK = 4096


@dataclass(frozen=True)
class Merged:
    """What `merge_indexes` did; ``sum(parts) == count + duplicates`` and the same for failures.

    Attributes:
        parts: Pictures in each shard, in the order they were named.
        count: Pictures in the merged catalog.
        duplicates: Pictures left out because an earlier shard has the same file.
        differing: Of the duplicates those whose content differed: one shard was older.
        failures: Files remembered as no usable pictures.
        root: The folder of the merged catalog: that of the shards, or the one they share.
    """

    parts: list[int]
    count: int
    duplicates: int
    differing: int
    failures: int
    root: Path


def merge_indexes(
    out: Path,
    indexes: Sequence[Path],
    *,
    wanted: Wanted | None = None,
    dry_run: bool = False,
    building: Building | None = None,
) -> Merged:
    """Make one index of several, which stay as they are.

    The shards' stores are put together, so the merged index can be synced, edited and verified like
    any other, and nothing is embedded. Shards of one folder keep it; otherwise the root is the
    folder that all of theirs share, and the labels stay what they were. Of a file that several
    shards have, a vector counts more than a failure, and then the shard named first, which also
    says what kind of index it is to be, where `wanted` does not.

    Killed or failed on the way, the same call finishes: what was put together is published, or,
    where a shard or `wanted` is another now, put together anew.

    Args:
        out: The new catalog; must not be there, but for an unfinished one of these shards.
        indexes: At least one catalog with its store.
        wanted: The type of index, recall and memory; ``Wanted("ivf-disk")`` for more pictures than
            memory holds.
        dry_run: Count and write nothing.
        building: Called as the stores are put together and the index is built.

    Raises:
        UsageError: `out` is there already, a shard is named twice, the model's vectors cannot be
            in an index of that type, or it does not fit the memory; nothing is left.
        MismatchError: Shards of different models; a shard without its store, or a damaged one.
        DataError: The shards hold no usable picture.
        EmbedKitError: Something cannot be written, or another process is writing one of them.

    Cost: one pass over the stores, which are copied; then as `build_index`. Memory: a block of one
    shard and what the user said of it, then as `build_index`: of ivf-disk the rows it is trained
    from, however many the shards are.
    """
    out = Path(os.path.realpath(out))
    shards = [Path(os.path.realpath(index)) for index in indexes]
    if not shards:
        raise UsageError("nothing was named to be merged", hint="embedkit index merge OUT INDEX...")
    twice = next((one for at, one in enumerate(shards) if one in shards[:at]), None)
    if twice is not None:
        raise UsageError(f"{twice} was named twice")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}")
    kind = wanted or Wanted()
    with ExitStack() as open_:
        if not dry_run:
            open_.enter_context(writer_lock(out))
            remove_leftovers(out)
        begun = _begun(out)
        if begun and _is_still(begun, shards, kind, out.parent):
            return _finished(out, begun, building=building, dry_run=dry_run)
        runs = [known_run(shard) for shard in shards]
        for shard, run in zip(shards[1:], runs[1:], strict=True):
            if run.fingerprint != runs[0].fingerprint:
                raise _different(shards[0], runs[0], shard, run)
        contract = ModelContract.loads(runs[0].contract)
        check_type(contract, kind)
        check_kind(kind.type, contract)
        names = _names(shards, out.parent)
        if out.exists() or begun is None or [*begun.shards] != names:
            _check_free(out, begun)
        roots = [resolve_path(run.root, at.parent) for at, run in zip(shards, runs, strict=True)]
        root = roots[0] if len(set(roots)) == 1 else Path(os.path.commonpath(roots))
        parts = list(zip(shards, roots, strict=True))
        if dry_run:
            with Store(None) as merged:
                return _fill(merged, parts, root, keep=False, building=building)
        # Under this name it counts as a leftover until it is whole.
        unfinished = out.with_name(f"{out.name}.tmp.{os.getpid()}.store")
        try:
            with Store(unfinished) as merged:
                merged.set_run(_run(runs[0], shards[0].parent, root, out.parent))
                with Store(store_path(shards[0]), read_only=True) as first:
                    merged.want(kind.over(Wanted.loads(first.wanted())).dumps())
                report = _fill(merged, parts, root, keep=True, building=building)
                begun = _Begun(
                    shards=dict(zip(names, (run.published for run in runs), strict=True)),
                    wanted=kind.dumps(),
                    parts=report.parts,
                    duplicates=report.duplicates,
                    differing=report.differing,
                )
                merged.set_published(json.dumps(begun._asdict()))
            _remove(store_path(out))
            unfinished.replace(store_path(out))
            sync_folder(out.parent)
        except OSError as error:
            raise EmbedKitError(f"{store_path(out)} cannot be written", facts=str(error)) from error
        finally:
            _remove(unfinished)
        return _finished(out, begun, building=building, dry_run=False)


class _Begun(NamedTuple):
    """What an unfinished merge is of; its store says it as JSON in place of what was published.

    Attributes:
        shards: Their names, and what each had published.
        wanted: `Wanted` as text, as it was asked for.
        parts: And the other counts, as in `Merged`.
    """

    shards: dict[str, str]
    wanted: str
    parts: list[int]
    duplicates: int
    differing: int


def _begun(out: Path) -> _Begun | None:
    """What an unfinished merge into `out` was of; None where there is none."""
    if not store_path(out).exists():
        return None
    try:
        with Store(store_path(out), read_only=True) as store:
            run = store.run()
        return _Begun(**json.loads(run.published)) if run and run.merging else None
    except (MismatchError, ValueError, TypeError):
        return None  # no store of ours, or a damaged one: not to be touched


def _is_still(begun: _Begun, shards: list[Path], kind: Wanted, here: Path) -> bool:
    """Whether this merge was begun, and its shards are what they were, or gone since."""
    if [*begun.shards] != _names(shards, here) or begun.wanted != kind.dumps():
        return False
    return all(
        was and was == known_run(shard).published
        for shard, was in zip(shards, begun.shards.values(), strict=True)
        if store_path(shard).exists()
    )


def _finished(out: Path, begun: _Begun, *, building: Building | None, dry_run: bool) -> Merged:
    """Publish what was put together, and say what that was."""
    with Store(store_path(out), read_only=dry_run) as merged:
        run = merged.run()
        assert run is not None, "a merge says first whose it is"
        report = Merged(
            parts=begun.parts,
            count=merged.count_usable(),
            duplicates=begun.duplicates,
            differing=begun.differing,
            failures=merged.count_failed(),
            root=resolve_path(run.root, out.parent),
        )
        try:
            if not dry_run:
                publish_store(merged, out, building)
        except UsageError:
            # It cannot be of the kind that was asked for: that is to be asked otherwise, and not to
            # be finished.
            merged.close()
            _remove(store_path(out))
            raise
    return report


def _names(shards: list[Path], here: Path) -> list[str]:
    """The shards as a file in `here` remembers them."""
    return [os.fsdecode(portable_path(shard, here)) for shard in shards]


def _fill(
    merged: Store,
    shards: list[tuple[Path, Path]],
    root: Path,
    *,
    keep: bool,
    building: Building | None,
) -> Merged:
    """Take in every shard, one at a time; without `keep` only what has to be counted."""
    parts: list[int] = []
    duplicates = differing = 0
    for number, (shard, own) in enumerate(shards):
        parts.append(0)
        if building:
            building("merging", number, len(shards))
        for block in _blocks(shard, own, root):
            parts[-1] += sum(item.vector is not None for item in block)
            new: list[Item] = []
            for item in block:
                there = merged.known(item.path)
                if there is None or (there.vector is None and item.vector is not None):
                    new.append(item if keep else item._replace(vector=item.vector and b"."))
                elif item.vector is not None:
                    duplicates += 1
                    differing += there.hash != item.hash
            merged.put(new)
            merged.give_labels(
                {item.path: item.label for item in new if item.label != folder_label(item.path)}
            )
    if building:
        building("merging", len(shards), len(shards))
    for shard, own in shards:
        with Store(store_path(shard), read_only=True) as store:
            _take_choices(merged, store.choices(), own, root)
    count = merged.count_usable()
    if count == 0:
        raise DataError("there is no usable picture in these indexes")
    return Merged(parts, count, duplicates, differing, merged.count_failed(), root)


def _blocks(shard: Path, own: Path, root: Path) -> Iterator[list[Item]]:
    """What a shard remembers, under the names of the whole."""
    with Store(store_path(shard), read_only=True) as store:
        items = (item._replace(path=_moved(item.path, own, root)) for item in store.items())
        while block := list(islice(items, _BLOCK)):
            yield block


def _take_choices(merged: Store, choices: Choices, own: Path, root: Path) -> None:
    """What the user said of a shard, where it still means something in the whole."""
    added = [_moved(name, own, root) for name in choices.added]
    kept_out = [_moved(name, own, root) for name in choices.kept_out]
    merged.choose(
        added=(name for name in added if not is_walked(name)),
        kept_out=(name for name in kept_out if merged.known(name) is None),
    )
    merged.give_labels({_moved(n, own, root): label for n, label in choices.labels.items()})


def _moved(name: bytes, own: Path, root: Path) -> bytes:
    """A shard's name for a file, as the merged index calls it."""
    if own == root and not name.startswith(b"/"):
        return name
    full = os.path.join(os.fsencode(own), name)  # noqa: PTH118 - bytes
    start = os.fsencode(root).rstrip(b"/") + b"/"
    return full[len(start) :] if full.startswith(start) else full


def _run(run: Run, was: Path, root: Path, here: Path) -> Run:
    """The first shard's run, as a file in `here` remembers it."""
    model = portable_path(resolve_path(run.model, was), here) if run.model else None
    return replace(run, root=portable_path(root, here), model=model, published="")


def _remove(store: Path) -> None:
    """A store, and what SQLite may have left beside it."""
    for end in ("", "-wal", "-shm"):
        store.with_name(store.name + end).unlink(missing_ok=True)


def _check_free(out: Path, begun: _Begun | None) -> None:
    verb = f"compact {shlex.quote(str(out))}"
    if begun:
        shards = [str(resolve_path(os.fsencode(name), out.parent)) for name in begun.shards]
        verb = f"merge {shlex.join([str(out), *shards])}"
    for file in (out, store_path(out)):
        if file.exists():
            raise UsageError(
                f"{file} is there already",
                hint="choose another name for the merged index"
                + ("" if file == out else f",\nor finish it: embedkit index {verb}"),
            )


def _different(one: Path, own: Run, other: Path, its: Run) -> MismatchError:
    folder = shlex.quote(str(resolve_path(its.root, other.parent)))
    return MismatchError(
        f"{one.name} and {other.name} were made by different models",
        facts=f"{one.name}: {described(own.fingerprint, json.loads(own.contract))}\n"
        f"{other.name}: {described(its.fingerprint, json.loads(its.contract))}",
        hint="embed one of them again: "
        f"embedkit index {folder} -o {shlex.quote(str(other))} --rebuild --model FILE",
    )
