"""Kill merges at every step of theirs, and finish them: a process of its own, since it forks.

    python -m tests.index.merge_kills FOLDER

FOLDER holds the shards ``shard*.faiss``. Prints what each death left, in order, or ends with a
traceback where the same merge, run again, does not give what an uninterrupted one gives.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss

from embedkit.index import file, merge
from embedkit.index.store import Store
from embedkit.index.sync import known_run

_OUT = "all.faiss"
# Whatever changes what is on the disk.
_STEPS: tuple[tuple[Any, str], ...] = (
    (Store, "set_run"),
    (Store, "want"),
    (Store, "put"),
    (Store, "choose"),
    (Store, "give_labels"),
    (Store, "set_published"),
    (Path, "replace"),
    (Path, "unlink"),
    (merge, "sync_folder"),
    (file, "sync_folder"),
    (file, "_check_written"),
)


def merged(at: Path) -> merge.Merged:
    return merge.merge_indexes(at / _OUT, sorted(at.glob("shard*.faiss")))


def dies_at(step: int, at: Path) -> bool:
    """Whether a merge had a step of this number, and was killed ahead of it."""
    child = os.fork()
    if child == 0:
        left = itertools.count(step, -1)
        for owner, name in _STEPS:
            setattr(owner, name, _deadly(getattr(owner, name), left))
        merged(at)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"step {step}: ended with {code}"
    return code != 0


def _deadly(real: Callable[..., Any], left: itertools.count[int]) -> Callable[..., Any]:
    def step(*values: Any, **named: Any) -> Any:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*values, **named)

    return step


def state(at: Path) -> str:
    """What of the merge is on the disk."""
    names = {path.name for path in at.iterdir() if path.name.startswith(_OUT)}
    whole = {_OUT: "catalog", f"{_OUT}.store": "store"}
    parts = [what for name, what in whole.items() if name in names]
    parts += ["leftovers"] if any(".tmp." in name for name in names) else []
    return " ".join(parts)


def finished(at: Path) -> merge.Merged | None:
    """What the same merge says, run again; None where all of it had been done."""
    run = known_run(at / _OUT) if (at / _OUT).exists() else None
    if run and run.published == file.manifest_digest(at / _OUT):
        return None
    return merged(at)


def main(start: Path) -> None:
    faiss.omp_set_num_threads(1)  # threads do not outlive a fork
    place = start.with_name(f"{start.name}-at")
    shutil.copytree(start, place)
    report = merged(place)
    catalog = (place / _OUT).read_bytes()
    names = sorted(path.name for path in place.iterdir())
    shutil.rmtree(place)
    left = []
    for step in itertools.count():
        shutil.copytree(start, place)
        died = dies_at(step, place)
        left.append(state(place))
        if died and step % 2:
            dies_at(step % 7, place)  # what finishes it is killed as well
        assert finished(place) in (report, None), f"step {step}: another report"
        (place / f"{_OUT}.lock").unlink(missing_ok=True)  # of one that was killed at its very end
        assert (place / _OUT).read_bytes() == catalog, f"step {step}: another catalog"
        assert sorted(path.name for path in place.iterdir()) == names, f"step {step}: left over"
        shutil.rmtree(place)
        if not died:
            break
    print(json.dumps(left))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
