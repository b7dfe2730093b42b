"""The doctor: each thing that spoils metric learning, planted in photos made here, is found."""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
import os
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from embedkit.data import (
    Checkup,
    FactCache,
    PhotoSet,
    check_photos,
    doctor_facts,
    gather_facts,
    read_photos,
)
from embedkit.data.doctor_csg import complexity, spectral_gradient
from embedkit.data.doctor_facts import PhotoFacts, default_cache
from embedkit.data.doctor_judge import judge
from embedkit.data.doctor_pairs import near_pairs, pack_hashes
from embedkit.errors import EmbedKitError, ImageError, MismatchError
from embedkit.imaging import hash_file


def scene(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A smooth picture, another one for each seed."""
    small = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def save(path: Path, image: Image.Image, quality: int = 92) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=quality)
    return path


def classes(root: Path, count: int = 12, photos: int = 4, start: int = 0) -> Path:
    for label, photo in itertools.product(range(count), range(photos)):
        save(root / f"c{label:02}" / f"{photo}.jpg", scene(start + 100 * label + photo))
    return root


def look(source: Path, near_bits: int = 40) -> Checkup:
    photos = read_photos(source)
    return check_photos(photos, gather_facts(photos.files(), workers=2), near_bits=near_bits)


def codes(checkup: Checkup) -> dict[str, str]:
    return {finding.code: finding.level for finding in checkup.findings}


def names(checkup: Checkup) -> set[tuple[str, str]]:
    paths = checkup.photos.paths
    return {(paths[pair.a].as_posix(), paths[pair.b].as_posix()) for pair in checkup.twins}


# --- the verdict ---------------------------------------------------------------------------------


def test_sound_photos_are_good_and_nothing_is_said_about_them(tmp_path: Path) -> None:
    checkup = look(classes(tmp_path))
    assert checkup.verdict == "good"
    assert checkup.findings == ()
    assert checkup.counts["readable"] == 48
    assert checkup.sizes == {f"c{n:02}": 4 for n in range(12)}


def test_copies_of_one_photo_are_no_class_to_learn_from(tmp_path: Path) -> None:
    for label in ("a", "b", "c"):
        first = save(tmp_path / label / "1.jpg", scene(ord(label)))
        if label != "a":
            shutil.copy(first, tmp_path / label / "2.jpg")
    save(tmp_path / "a" / "2.jpg", scene(7))
    checkup = look(tmp_path)
    assert checkup.verdict == "cannot work"
    (stop,) = [finding for finding in checkup.findings if finding.level == "stop"]
    assert stop.what == "1 class of 3 to train on has two different photos, and at least two must"


def test_one_class_cannot_work(tmp_path: Path) -> None:
    save(tmp_path / "train/a/1.jpg", scene(1))
    save(tmp_path / "train/a/2.jpg", scene(2))
    save(tmp_path / "test/b/1.jpg", scene(3))
    checkup = look(tmp_path)
    assert checkup.verdict == "cannot work"
    assert "one class, 'a'" in checkup.findings[0].what


def test_nothing_readable_and_no_photo_at_all_cannot_work(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.jpg").write_bytes(b"no picture")
    checkup = look(tmp_path)
    assert checkup.verdict == "cannot work"
    assert checkup.to_json()["pixels"] is None
    empty = check_photos(PhotoSet(tmp_path, (), (), ()), [])
    assert empty.verdict == "cannot work"
    assert empty.twins == ()


def test_unreadable_files_are_named_with_their_reason(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "c00" / "broken.jpg").write_bytes(b"")
    checkup = look(tmp_path)
    ((path, error),) = checkup.failures()
    assert (path.as_posix(), error.code) == ("c00/broken.jpg", "empty")
    assert codes(checkup) == {"unreadable": "warn"}
    assert checkup.to_json()["failed"] == [
        {"path": "c00/broken.jpg", "code": "empty", "reason": "the file is empty"}
    ]


def test_small_uneven_and_lone_classes_are_found(tmp_path: Path) -> None:
    classes(tmp_path, count=3, photos=2)
    for photo in range(50):
        save(tmp_path / "large" / f"{photo}.jpg", scene(5000 + photo))
    save(tmp_path / "lone" / "1.jpg", scene(9999))
    checkup = look(tmp_path)
    assert codes(checkup) == {
        "singletons": "warn",
        "few-classes": "warn",
        "few-photos": "warn",
        "imbalance": "note",
    }
    assert checkup.counts["singletons"] == 1
    assert "lone" in next(f.what for f in checkup.findings if f.code == "singletons")


def test_flat_small_long_and_grey_photos_are_counted(tmp_path: Path) -> None:
    classes(tmp_path)
    save(tmp_path / "c00/flat.png", Image.new("RGB", (80, 80), (200, 10, 10)))
    save(tmp_path / "c01/flat.png", Image.new("RGB", (90, 90), (0, 200, 0)))
    save(tmp_path / "c00/small.jpg", scene(90_501, (40, 64)))
    save(tmp_path / "c00/long.jpg", scene(90_502, (400, 100)))
    save(tmp_path / "c00/grey.png", scene(90_503).convert("L"))
    checkup = look(tmp_path)
    counts = checkup.counts
    assert (counts["flat"], counts["small"], counts["long"], counts["grey"]) == (2, 1, 1, 1)
    # Two pictures of one tone are not the same picture.
    assert counts["label_conflicts"] == counts["near_duplicates"] == 0


# --- twins ---------------------------------------------------------------------------------------


def test_a_copy_under_another_label_is_a_likely_label_error(tmp_path: Path) -> None:
    classes(tmp_path)
    shutil.copy(tmp_path / "c00/0.jpg", tmp_path / "c01/copy.jpg")
    checkup = look(tmp_path)
    assert names(checkup) == {("c00/0.jpg", "c01/copy.jpg")}
    assert checkup.twins[0].exact
    assert checkup.twins[0].labels_differ
    assert checkup.counts["label_conflicts"] == 2
    assert checkup.counts["copies"] == 1
    assert codes(checkup)["label-conflict"] == "warn"


def test_a_photo_saved_again_smaller_is_near_and_not_exact(tmp_path: Path) -> None:
    classes(tmp_path)
    again = scene(0).resize((90, 68), Image.Resampling.BICUBIC)
    save(tmp_path / "c00/again.jpg", again, quality=40)
    checkup = look(tmp_path)
    assert names(checkup) == {("c00/0.jpg", "c00/again.jpg")}
    assert not checkup.twins[0].exact
    assert checkup.counts["near_duplicates"] == 2
    assert checkup.counts["copies"] == checkup.counts["label_conflicts"] == 0
    assert codes(checkup) == {"near-duplicates": "note"}


def test_an_upright_copy_of_a_turned_photo_is_the_same(tmp_path: Path) -> None:
    classes(tmp_path)
    turned = scene(0).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned clockwise
    turned.save(tmp_path / "c00/turned.jpg", exif=exif, quality=92)
    assert names(look(tmp_path)) == {("c00/0.jpg", "c00/turned.jpg")}


def test_the_same_picture_in_another_colour_accuses_no_label(tmp_path: Path) -> None:
    classes(tmp_path)
    grey = np.asarray(scene(1234).convert("L"), np.float64)
    for label, tint in (("c00", (1.0, 0.62, 0.62)), ("c01", (0.52, 0.72, 1.0))):
        picture = grey[..., None] * np.array(tint)
        save(tmp_path / label / "shirt.png", Image.fromarray(picture.round().astype(np.uint8)))
    checkup = look(tmp_path)
    assert names(checkup) == {("c00/shirt.png", "c01/shirt.png")}
    assert checkup.twins[0].recoloured
    assert checkup.counts["label_conflicts"] == 0
    assert checkup.verdict == "good"


def test_a_twin_on_the_other_side_of_the_split_is_a_leak(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val", count=2, start=50_000)
    shutil.copy(tmp_path / "train/c05/1.jpg", tmp_path / "val/c00/leak.jpg")
    save(tmp_path / "val/c01/near.jpg", scene(503), quality=50)  # c05/3 of train, saved again
    checkup = look(tmp_path)
    assert checkup.counts["leaked"] == 2
    assert codes(checkup)["leak"] == "warn"
    assert names(checkup) == {
        ("train/c05/1.jpg", "val/c00/leak.jpg"),
        ("train/c05/3.jpg", "val/c01/near.jpg"),
    }
    assert all(pair.splits_differ and pair.labels_differ for pair in checkup.twins)


def test_classes_on_both_sides_are_told_and_val_needs_pairs(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    save(tmp_path / "val/c00/x.jpg", scene(70_001))
    save(tmp_path / "val/new/x.jpg", scene(70_002))
    checkup = look(tmp_path)
    assert codes(checkup) == {"shared-classes": "warn", "val-without-pairs": "warn"}
    assert checkup.counts["shared_classes"] == 1
    all_shared = judge(checkup.counts | {"shared_classes": 1}, {"a": 3}, {"val": {"a": 2}})
    assert {f.code: f.level for f in all_shared}["shared-classes"] == "note"


def test_many_copies_cost_no_pair_each_but_are_all_counted(tmp_path: Path) -> None:
    """One placeholder 3,000 times in each of two classes: 18 million pairs, 1 between nodes."""
    classes(tmp_path / "photos", count=2)
    photos = read_photos(tmp_path / "photos")
    (fact,) = gather_facts([photos.files()[0]])
    many = 3000
    paths = tuple(Path(f"{label}/{n}.jpg") for label in "ab" for n in range(many))
    labels = tuple(str(path.parent) for path in paths)
    checkup = check_photos(
        PhotoSet(tmp_path, paths, labels, ("",) * len(paths)), [fact] * len(paths)
    )
    assert checkup.counts["copies"] == 2 * many - 1
    assert checkup.counts["label_conflicts"] == 2 * many
    assert len(checkup.twins) <= 1500
    assert checkup.twins[0].labels_differ


def test_near_bits_decides_and_is_checked(tmp_path: Path) -> None:
    classes(tmp_path)
    save(tmp_path / "c00/again.jpg", scene(0), quality=20)
    assert look(tmp_path, near_bits=0).counts["near_duplicates"] in (0, 2)
    with pytest.raises(ValueError, match="0 to 96"):
        look(tmp_path, near_bits=97)
    with pytest.raises(ValueError, match="facts"):
        check_photos(read_photos(tmp_path), [])


@pytest.mark.parametrize("count", [0, 1, 2, 33, 300])
@pytest.mark.parametrize("most", [0, 40, 96])
def test_near_pairs_are_those_of_the_double_loop(count: int, most: int) -> None:
    generator = np.random.default_rng(count)
    rows = [generator.integers(0, 2, 256) for _ in range(max(count // 3, 1))]
    while len(rows) < count:
        row = rows[int(generator.integers(len(rows)))].copy()
        row[generator.choice(256, int(generator.integers(0, 60)), replace=False)] ^= 1
        rows.append(row)
    rows = rows[:count]
    expected = {
        (i, j, int((rows[i] != rows[j]).sum()))
        for i, j in itertools.combinations(range(count), 2)
        if (rows[i] != rows[j]).sum() <= most
    }
    hashes = [np.packbits(row).tobytes().hex() for row in rows]
    found = [
        triple
        for block in near_pairs(pack_hashes(hashes), most)
        for triple in zip(*(column.tolist() for column in block), strict=True)
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected


# --- looking, and remembering --------------------------------------------------------------------


def test_a_look_agrees_with_the_picture_itself(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", scene(3, (300, 200)))
    (fact,) = gather_facts([path])
    assert isinstance(fact, PhotoFacts)
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float64).reshape(-1, 3)
    assert fact.content == hash_file(path) == hashlib.blake2b(
        path.read_bytes(), digest_size=16
    ).hexdigest()  # fmt: skip
    assert (fact.width, fact.height) == (300, 200)
    assert fact.mean == pytest.approx(pixels.mean(axis=0), abs=0.5)
    assert fact.std == pytest.approx(pixels.std(axis=0), abs=1.5)
    assert len(bytes.fromhex(fact.phash)) == len(bytes.fromhex(fact.chroma)) == 32


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_decoded_small_still_tells_its_full_size(tmp_path: Path, progressive: bool) -> None:
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x010E] = "x" * 500  # a long segment before the frame
    scene(1, (1601, 1203)).save(path, progressive=progressive, exif=exif)
    (fact,) = gather_facts([path])
    assert isinstance(fact, PhotoFacts)
    assert (fact.width, fact.height) == (1601, 1203)


def test_a_second_check_reads_only_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [save(tmp_path / f"{n}.jpg", scene(n)) for n in range(5)]
    (tmp_path / "broken.jpg").write_bytes(b"x")
    files.append(tmp_path / "broken.jpg")
    with FactCache(tmp_path / "deep" / "cache.sqlite") as cache:
        first = gather_facts(files, cache=cache)
    looked: list[str] = []
    really = doctor_facts._look
    monkeypatch.setattr(
        doctor_facts, "_look", lambda path, how: looked.append(path.name) or really(path, how)
    )
    save(files[2], scene(77))
    os.utime(files[3], ns=(1, 1))
    with FactCache(tmp_path / "deep" / "cache.sqlite") as cache:
        second = gather_facts(files, cache=cache)
    assert sorted(looked) == ["2.jpg", "3.jpg", "broken.jpg"]
    assert [second[n] == first[n] for n in range(5)] == [True, True, False, True, True]
    assert isinstance(second[5], ImageError)


def test_what_was_looked_at_before_a_kill_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_facts, "_AT_ONCE", 2)
    files = [save(tmp_path / f"{n}.jpg", scene(n)) for n in range(6)]

    def killed(done: int, failed: int) -> None:
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    seen: list[int] = []
    with FactCache(tmp_path / "cache") as cache, pytest.raises(KeyboardInterrupt):
        gather_facts(files, cache=cache, progress=killed)
    (kept,) = sqlite3.connect(tmp_path / "cache").execute("SELECT count(*) FROM looks").fetchone()
    assert kept == 4


def test_the_cache_of_another_version_is_begun_anew_and_a_foreign_file_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "x.jpg", scene(0))
    with FactCache(tmp_path / "cache") as cache:
        gather_facts([path], cache=cache)
        size, changed = path.stat().st_size, path.stat().st_mtime_ns
        assert cache.find(path, size, changed) is not None
    monkeypatch.setattr(doctor_facts, "_CACHE_VERSION", 2)
    with FactCache(tmp_path / "cache") as cache:
        assert cache.find(path, size, changed) is None
    (tmp_path / "text").write_text("no database, and long enough not to be taken for one" * 20)
    with pytest.raises(MismatchError, match="no cache"):
        FactCache(tmp_path / "text")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE looks (x)")
    other.commit()
    other.close()
    with pytest.raises(MismatchError, match="another program"):
        FactCache(tmp_path / "other")
    with pytest.raises(EmbedKitError, match="cannot be written"):
        FactCache(tmp_path / "text" / "below" / "a-file")


def test_the_usual_cache_lies_where_the_system_keeps_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/embedkit/check.sqlite")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert default_cache() == Path("/home/x/.cache/embedkit/check.sqlite")
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_cache() == Path("/home/x/Library/Caches/embedkit/check.sqlite")
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert default_cache() == Path("/local/embedkit/check.sqlite")


@pytest.mark.filterwarnings("error")
def test_every_odd_file_has_its_known_outcome(shared_data: Path, tmp_path: Path) -> None:
    with (shared_data / "odd" / "index.csv").open(newline="", encoding="utf-8") as file:
        expected = {row["file"]: row["expected"] for row in csv.DictReader(file)}
    files = [shared_data / "odd" / name for name in expected]
    for path, fact in zip(files, gather_facts(files, workers=2), strict=True):
        outcome = "error" if isinstance(fact, ImageError) else "ok"
        assert expected[path.name] in (outcome, "either"), path.name


def test_real_photos_have_no_false_label_conflict(shared_data: Path) -> None:
    checkup = look(shared_data / "tiny" / "manifest.csv")
    assert checkup.counts["label_conflicts"] == checkup.counts["leaked"] == 0
    assert codes(checkup) == {"few-classes": "warn"}  # six to train on


# --- CSG -----------------------------------------------------------------------------------------


def gradient_by_loops(shares: Sequence[Sequence[float]]) -> float:
    count = len(shares)
    laplacian = np.zeros((count, count))
    for i, j in itertools.permutations(range(count), 2):
        apart = sum(abs(a - b) for a, b in zip(shares[i], shares[j], strict=True))
        both = sum(abs(a + b) for a, b in zip(shares[i], shares[j], strict=True))
        laplacian[i, j] = -(1 - apart / both)
        laplacian[i, i] += 1 - apart / both
    values = sorted(np.linalg.eigvals(laplacian).real)
    total, largest = 0.0, 0.0
    for i in range(count - 1):
        largest = max(largest, (values[i + 1] - values[i]) / (count - i))
        total += largest
    return total


def csg_by_loops(points: npt.NDArray[np.float64], labels: list[int], k: int) -> float:
    """Every point once, neighbours by Euclidean distance on the sphere, as in the paper."""
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    count = max(labels) + 1
    shares = [[0.0] * count for _ in range(count)]
    for i, point in enumerate(points):
        others = sorted(
            (math.dist(point, other), j) for j, other in enumerate(points) if j != i
        )[:k]  # fmt: skip
        volume = 1.0
        for d in range(points.shape[1]):
            volume *= 2 * max(abs(points[j][d] - point[d]) for _, j in others)
        for _, j in others:
            shares[labels[i]][labels[j]] += 1 / k / max(volume, 1e-4)
    return gradient_by_loops([[v / sum(row) for v in row] for row in shares])


def cloud(
    separation: float, per_class: int, seed: int
) -> tuple[npt.NDArray[np.float64], list[int]]:
    generator = np.random.default_rng(seed)
    centres = separation * np.eye(4, 4)
    labels = [label for label in range(4) for _ in range(per_class)]
    points = centres[labels] + generator.normal(0, 0.3, (len(labels), 4))
    return points + np.array([0.01, 0.02, 0.03, 0.04]), labels


def test_the_spectral_gradient_is_the_papers_sum() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(7), 7)
    assert spectral_gradient(shares) == pytest.approx(gradient_by_loops(shares.tolist()))
    assert spectral_gradient(np.eye(5)) == pytest.approx(0, abs=1e-12)
    assert spectral_gradient([[1.0]]) == 0


def test_csg_agrees_with_loops_over_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points, labels = cloud(0.8, 12, 1)
    expected = csg_by_loops(points, labels, 3)

    class Everyone:
        """A generator whose draw from a class is the whole class."""

        def choice(self, rows: npt.NDArray[np.int64], *_: object, **__: object) -> object:
            return rows

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Everyone())
    found = complexity(points, [f"c{label}" for label in labels])
    assert found.csg == pytest.approx(expected, rel=1e-5)
    assert (found.low, found.high) == pytest.approx((found.csg, found.csg))


def test_csg_rises_with_the_overlap_and_its_interval_holds_the_mean() -> None:
    found = []
    for separation in (3.0, 0.7, 0.0):
        points, labels = cloud(separation, 30, 2)
        found.append(complexity(points, [str(label) for label in labels], samples=20))
    assert found[0].csg < 0.05 < found[1].csg < found[2].csg
    assert found[0].own > 0.98 > found[1].own > found[2].own
    assert all(one.low <= one.csg <= one.high for one in found)
    assert found[2].high > found[2].low


def test_the_most_confusable_pair_is_the_one_that_was_mixed() -> None:
    points, labels = cloud(3.0, 20, 3)
    mixed = [1 if label == 0 and n % 2 else label for n, label in enumerate(labels)]
    first = complexity(points, [f"c{label}" for label in mixed]).confusions[0]
    assert {first.a, first.b} == {"c0", "c1"}
    assert first.similarity > 0.2


def test_duplicates_lone_classes_and_a_seed_do_no_harm() -> None:
    points, labels = cloud(1.0, 5, 4)
    rows = np.concatenate([points, points[:7], [[1.0, 0, 0, 0]]])
    text = [str(label) for label in [*labels, *labels[:7]]] + ["lone"]
    first, again = complexity(rows, text, seed=1), complexity(rows, text, seed=1)
    assert first == again
    assert math.isfinite(first.csg)
    assert first.classes == 4
    assert first.to_json()["confusions"][0].keys() >= {"a", "b", "similarity"}
    with pytest.raises(ValueError, match="two classes"):
        complexity(points[:5], ["a"] * 5)
    with pytest.raises(ValueError, match="labels"):
        complexity(points, ["a"])
