"""A nightly job: sync the index, look up a list of photos, write a CSV, say how it went.

    python examples/04_batch_job.py --catalog FOLDER --index catalog.faiss --model MODEL.onnx
                                    --queries LIST.txt --out hits.csv

LIST.txt has a photo a line. The CSV has a row for each, in the same order: its best hit, or why it
could not be read. It is written whole or not at all. A night that is interrupted is made good by
the next one: run it again, and only new and changed photos are embedded.

Exit code, for cron: 0 all done; 3 done, some photos skipped and named; anything else is embedkit's
own code (5: the index is of another model, 6: something is not installed, ...) and the CSV of the
night before still stands.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DONE, SKIPPED = 0, 3
COLUMNS = ("query", "verdict", "score", "label", "path", "problem")


def main() -> None:
    """Sync, search, write; leave with the worst of the two exit codes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("catalog", "index", "model", "queries", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    model, index = str(options.model), str(options.index)

    synced, report = embedkit(["index", str(options.catalog), "-o", index, "--model", model])
    print(
        f"index: {report['found']} found, {report['embedded']} embedded, "
        f"{report['unchanged']} unchanged, {report['moved']} moved, {report['failed']} failed"
    )
    queries = [Path(line) for line in options.queries.read_text(encoding="utf-8").splitlines()]
    searched, answer = embedkit(
        ["search", "-", "--index", index, "--model", model, "-k", "1"],
        "\n".join(map(str, queries)),
    )
    rows = table(queries, answer)
    write(options.out, rows)
    print(f"search: {len(rows)} asked, {len(answer['failed'])} unreadable; {options.out}")
    for skipped in [*report["failures"], *answer["failed"]]:
        print(f"skipped: {skipped['path']}: {skipped['reason']}", file=sys.stderr)
    sys.exit(max(synced, searched))


def embedkit(arguments: list[str], stdin: str = "") -> tuple[int, dict[str, Any]]:
    """Exit code and JSON document of a command; one that failed ends the job with its code.

    What it has to say about a failure goes to our stderr as it is.
    """
    done = subprocess.run(
        [sys.executable, "-m", "embedkit.cli.main", *arguments, "--json", "--quiet"],
        input=stdin,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (DONE, SKIPPED):
        sys.exit(done.returncode)
    return done.returncode, json.loads(done.stdout)


def table(queries: list[Path], answer: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each query, whatever became of it."""
    hits = {result["queries"][0]: result["hits"][0] for result in answer["results"]}
    problems = {failed["path"]: failed["reason"] for failed in answer["failed"]}
    return [
        {"query": name, "problem": problems.get(name, ""), **hits.get(name, {})}
        for name in map(str, queries)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


if __name__ == "__main__":
    main()
