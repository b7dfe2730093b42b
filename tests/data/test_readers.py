"""Labelled photos from folders and CSVs, and the sentences for what is neither."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from embedkit.data import PhotoSet, read_photos, resolve_source
from embedkit.errors import DataError


def lay_out(root: Path, *names: str) -> Path:
    """Empty files: readers never look inside."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write_csv(root: Path, text: str | bytes, *names: str) -> Path:
    lay_out(root, *names)
    path = root / "photos.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def listed(photos: PhotoSet) -> list[tuple[str, str, str]]:
    paths = [path.as_posix() for path in photos.paths]
    return list(zip(paths, photos.labels, photos.split, strict=True))


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_per_class_names_the_labels_in_order_of_names(tmp_path: Path) -> None:
    lay_out(tmp_path, "mug/b.JPG", "mug/a.png", "lamp/x/deep.webp", "lamp/notes.txt", "readme.md")
    photos = read_photos(tmp_path)
    assert listed(photos) == [
        ("lamp/x/deep.webp", "lamp", ""),
        ("mug/a.png", "mug", ""),
        ("mug/b.JPG", "mug", ""),
    ]
    assert photos.root == tmp_path
    assert photos.classes() == ("lamp", "mug")
    assert all(file.is_file() for file in photos.files())


def test_the_paths_open_from_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path / "p", "a/1.jpg", "b/1.jpg")
    monkeypatch.chdir(tmp_path)
    photos = read_photos(Path("p"))
    monkeypatch.chdir("/")
    assert all(file.is_file() for file in photos.files())


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    lay_out(tmp_path, "a/1.jpg", "a/._1.jpg", "b/1.jpg", ".thumbnails/1.jpg", "b/.old/2.jpg")
    assert [path for path, _, _ in listed(read_photos(tmp_path))] == ["a/1.jpg", "b/1.jpg"]


def test_a_dangling_link_is_read_so_that_it_can_be_reported(tmp_path: Path) -> None:
    lay_out(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "a/2.jpg").symlink_to(tmp_path / "gone.jpg")
    assert len(read_photos(tmp_path)) == 3


def test_a_name_that_is_no_utf8_is_kept_and_hashed(tmp_path: Path) -> None:
    lay_out(tmp_path, "b/1.jpg")
    lay_out(tmp_path, os.fsdecode(b"caf\xe9/1.jpg"))
    photos = read_photos(tmp_path)
    assert os.fsencode(photos.labels[1]) == b"caf\xe9"
    assert len(photos.manifest_hash()) == 64


@pytest.mark.parametrize("val", ["val", "valid", "Validation", "VAL"])
def test_split_folders_are_told_by_their_names(tmp_path: Path, val: str) -> None:
    lay_out(tmp_path, "train/a/1.jpg", f"{val}/b/1.jpg", "test/c/1.jpg", "notes/readme.txt")
    assert set(listed(read_photos(tmp_path))) == {
        ("train/a/1.jpg", "a", "train"),
        (f"{val}/b/1.jpg", "b", "val"),
        ("test/c/1.jpg", "c", "test"),
    }


def test_a_train_folder_alone_is_a_split_folder(tmp_path: Path) -> None:
    lay_out(tmp_path, "train/a/1.jpg", "train/b/1.jpg")
    assert listed(read_photos(tmp_path))[0] == ("train/a/1.jpg", "a", "train")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    lay_out(tmp_path, "train/1.jpg", "plane/1.jpg", "car/1.jpg")
    assert set(read_photos(tmp_path).labels) == {"train", "plane", "car"}


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ([], "no photos"),
        (["notes.txt"], "no photos"),
        (["1.jpg", "2.jpg"], "have no labels"),
        (["1.jpg", "a/1.jpg"], "lie in no class folder"),
        (["train/1.jpg", "val/1.jpg"], "lie in no class folder"),
        (["train/a/1.jpg", "train/1.jpg"], "lie in no class folder"),
    ],
)
def test_photos_without_labels_are_shown_the_expected_tree(
    tmp_path: Path, names: list[str], what: str
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        read_photos(lay_out(tmp_path, *names))
    assert "photos/blue-mug/1.jpg" in str(caught.value)
    assert "path,label" in str(caught.value)


def test_stray_photos_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    lay_out(tmp_path, "a/1.jpg", *(f"{number}.jpg" for number in range(7)))
    with pytest.raises(DataError, match=r"7 of them: 0.jpg, .*4.jpg and 2 more"):
        read_photos(tmp_path)


def test_split_folders_beside_others_are_not_guessed_at(tmp_path: Path) -> None:
    lay_out(tmp_path, "train/a/1.jpg", "test/b/1.jpg", "backup/c/1.jpg")
    with pytest.raises(DataError, match="test, train beside backup"):
        read_photos(tmp_path)


def test_one_folder_of_class_folders_is_named_instead(tmp_path: Path) -> None:
    lay_out(tmp_path, "photos/a/1.jpg", "photos/b/1.jpg")
    with pytest.raises(DataError, match="only one folder") as caught:
        read_photos(tmp_path)
    assert caught.value.hint == f"name that folder: {tmp_path / 'photos'}"


def test_what_is_neither_folder_nor_csv_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder or CSV"):
        read_photos(tmp_path / "absent")
    with pytest.raises(DataError, match="neither a folder nor a CSV"):
        read_photos(lay_out(tmp_path, "1.jpg") / "1.jpg")


# --- CSV -----------------------------------------------------------------------------------------


def test_a_csv_gives_labels_in_its_own_order(tmp_path: Path) -> None:
    path = write_csv(tmp_path, "path,label\nb.jpg,mug\na/1.jpg,lamp\n", "b.jpg", "a/1.jpg")
    photos = read_photos(path)
    assert listed(photos) == [("b.jpg", "mug", ""), ("a/1.jpg", "lamp", "")]
    assert (photos.root, photos.category, photos.is_query) == (tmp_path, None, None)


def test_a_csv_may_carry_every_column_in_any_order_and_more(tmp_path: Path) -> None:
    header = "label, PATH ,is_query,weight,split,group,is_gallery,category"
    rows = "mug,1.jpg,1,5,Train,ann,,cup\nmug,2.jpg,no,5,validation,,TRUE,cup\nlamp,3.jpg,,,,,0,\n"
    photos = read_photos(write_csv(tmp_path, f"{header}\n{rows}", "1.jpg", "2.jpg", "3.jpg"))
    assert photos == PhotoSet(
        root=tmp_path,
        paths=(Path("1.jpg"), Path("2.jpg"), Path("3.jpg")),
        labels=("mug", "mug", "lamp"),
        split=("train", "val", ""),
        category=("cup", "cup", ""),
        group=("ann", "", ""),
        is_query=(True, False, False),
        is_gallery=(False, True, False),
    )


def test_a_csv_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    text = '\ufeffpath,label\r\n"a, b.jpg","say ""mug"""\r\n\r\n,\r\n   \r\n"x.jpg",lamp'
    photos = read_photos(write_csv(tmp_path, text, "a, b.jpg", "x.jpg"))
    assert listed(photos) == [("a, b.jpg", 'say "mug"', ""), ("x.jpg", "lamp", "")]


def test_absolute_paths_and_paths_upward_stay_as_they_are(tmp_path: Path) -> None:
    lay_out(tmp_path, "up.jpg", "far.jpg")
    inside = tmp_path / "lists"
    inside.mkdir()
    photos = read_photos(write_csv(inside, f"path,label\n../up.jpg,a\n{tmp_path}/far.jpg,b\n"))
    assert [file.resolve() for file in photos.files()] == [
        tmp_path / "up.jpg",
        tmp_path / "far.jpg",
    ]


def test_files_that_are_not_there_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    rows = "".join(f"{number}.jpg,a\n" for number in range(8))
    with pytest.raises(DataError, match="7 of the 8 files") as caught:
        read_photos(write_csv(tmp_path, f"path,label\n{rows}", "0.jpg"))
    assert caught.value.facts is not None
    assert caught.value.facts.splitlines() == [
        *(f"line {number + 2}: {number}.jpg" for number in range(1, 6)),
        "and 2 more",
    ]
    assert str(tmp_path) in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no column path and no column label"),
        ("path,label\n", "lists no photos"),
        ("path,name\n1.jpg,a\n", "no column label"),
        ("path;label\n1.jpg;a\n", "columns are parted by commas"),
        ("path,label,label\n1.jpg,a,b\n", "two columns label"),
        ("path,label\n1.jpg,a,b\n", "line 2 .* does not fit its header"),
        ("path,label\n1.jpg\n", "line 2 .* does not fit its header"),
        ("path,label\n,a\n", "the path is empty in 1 lines"),
        ("path,label\n1.jpg,  \n", "the label is empty in 1 lines"),
        ("path,label\n1.jpg,a\n./1.jpg,b\n", "listed before in 1 lines .*\nline 3"),
        ("path,label,split\n1.jpg,a,dev\n", "split is none of train, val.*\nline 2"),
        ("path,label,is_query\n1.jpg,a,maybe\n", "is_query is none of 1, true, yes.*\nline 2"),
        ('path,label\n"1.jpg,a\n', "not a CSV that can be read"),
        (b"path,label\n1.jpg,caf\xe9\n", "not UTF-8 text\nbyte 0xe9 in line 2"),
        ("path,label\n1.jpg,a\n".encode("utf-16"), "not UTF-8 text"),
        ("path,label\n1\0.jpg,a\n", "1 of the 1 files"),
        (f"path,label\n{'x' * 200_000},a\n", "not a CSV that can be read"),
    ],
)
def test_a_damaged_csv_is_explained(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_photos(write_csv(tmp_path, text, "1.jpg"))


def test_the_shared_photos_are_read_as_their_manifest_says(shared_data: Path) -> None:
    photos = read_photos(shared_data / "tiny/manifest.csv")
    assert (len(photos), len(photos.classes())) == (144, 12)
    classes = {name: set() for name in ("train", "test")}  # type: dict[str, set[str]]
    for label, split in zip(photos.labels, photos.split, strict=True):
        classes[split].add(label)
    assert not classes["train"] & classes["test"]


# --- the set -------------------------------------------------------------------------------------


def small_set() -> PhotoSet:
    return PhotoSet(
        root=Path("/photos"),
        paths=(Path("1"), Path("2"), Path("3")),
        labels=("a", "b", "a"),
        split=("train", "", "val"),
        group=("x", "y", "z"),
        is_query=(True, False, True),
    )


def test_a_subset_takes_every_column_along() -> None:
    chosen = small_set().subset(np.array([2, 0]))
    assert (chosen.paths, chosen.labels) == ((Path("3"), Path("1")), ("a", "a"))
    assert (chosen.split, chosen.group) == (("val", "train"), ("z", "x"))
    assert (chosen.is_query, chosen.category) == ((True, True), None)
    assert len(small_set().subset([])) == 0


def test_the_manifest_hash_changes_with_the_data_and_not_with_its_place() -> None:
    photos = small_set()
    moved = PhotoSet(Path("/elsewhere"), *list(vars(photos).values())[1:])
    assert photos.manifest_hash() == moved.manifest_hash()
    others = [
        photos.subset([0, 1]),
        photos.subset([1, 0, 2]),
        PhotoSet(photos.root, photos.paths, ("a", "b", "b"), photos.split),
        PhotoSet(photos.root, photos.paths, photos.labels, photos.split),
        PhotoSet(photos.root, photos.paths, photos.labels, photos.split, category=photos.group),
    ]
    hashes = {photos.manifest_hash(), *(other.manifest_hash() for other in others)}
    assert len(hashes) == 6


def test_columns_of_another_length_and_unknown_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="1 paths and 2 of labels"):
        PhotoSet(Path(), (Path("1"),), ("a", "b"), ("",))
    with pytest.raises(ValueError, match="split must be"):
        PhotoSet(Path(), (Path("1"),), ("a",), ("dev",))


# --- where photos are kept -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["data/train/a/1.jpg"], "data/train"),
        (["data/train/a/1.jpg", "data/a/1.jpg"], "data/train"),
        (["data/train/a/1.jpg", "data/val/b/1.jpg"], "data"),
        (["data/a/1.jpg"], "data"),
        (["data/notes.txt", "a/1.jpg"], "."),
        ([], "."),
    ],
)
def test_the_usual_places_are_tried_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], expected: str
) -> None:
    monkeypatch.chdir(lay_out(tmp_path, *names))
    assert resolve_source(None) == Path(expected)


def test_a_named_source_is_taken_as_it_is() -> None:
    assert resolve_source(Path("anywhere")) == Path("anywhere")
