"""CSVs of photos with numbers, of triplets and without labels; held out by what hangs together."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedkit.data import PhotoSet, Triplet, hold_out_groups, read_photos
from embedkit.errors import DataError


@pytest.fixture
def write(tmp_path: Path) -> object:
    """Writes a CSV beside six empty photos."""
    for name in "abcdef":
        (tmp_path / f"{name}.jpg").touch()

    def csv(*lines: str) -> Path:
        path = tmp_path / "photos.csv"
        path.write_text("\n".join(lines) + "\n")
        return path

    return csv


def test_numbers_are_read_in_the_order_of_their_columns(write) -> None:  # type: ignore[no-untyped-def]
    photos = read_photos(write("target_1,path,target_0", "2,a.jpg,1e1", "-0.5,b.jpg,3"))
    assert photos.targets == ((10.0, 2.0), (3.0, -0.5))
    assert photos.labels == ("", "")
    assert not photos.labelled
    photos = read_photos(write("path,label,target", "a.jpg,x,1", "b.jpg,y,2"))
    assert photos.targets == ((1.0,), (2.0,))
    assert photos.labelled
    assert photos.subset([1]).targets == ((2.0,),)
    eleven = [f"target_{place}" for place in range(11)]
    photos = read_photos(
        write(",".join(["path", *eleven]), "a.jpg," + ",".join("0123456789X"[:10]) + ",10")
    )
    assert photos.targets == (tuple(map(float, range(11))),)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["path,target", "a.jpg,", "b.jpg,1"], "target is no finite number in 1 lines.*line 2"),
        (["path,target", "a.jpg,nan"], "no finite number"),
        (["path,target", "a.jpg,inf"], "no finite number"),
        (["path,target", "a.jpg,12g"], "no finite number"),
        (["path,target_1", "a.jpg,1"], "not counted from 0 up"),
        (["path,target,target_0", "a.jpg,1,1"], "not counted from 0 up"),
        (["label,target", "a,1"], "has no column path"),
        (["path,weight", "a.jpg,1"], "has no column label"),
        (["image_a,image_b", "a.jpg,b.jpg"], "has no column image_c"),
        (["image_a,image_b,image_c", "a.jpg,b.jpg,a.jpg"], "three different photos"),
        (["image_a,image_b,image_c", "a.jpg,b.jpg,"], "three different photos"),
        (["image_a,image_b,image_c,odd", "a.jpg,b.jpg,c.jpg,d"], "odd is none of"),
        (["image_a,image_b,image_c,margin", "a.jpg,b.jpg,c.jpg,-1"], "margin is no number"),
        (["image_a,image_b,image_c", "a.jpg,b.jpg,x.jpg"], "(?s)1 of the 3 files.*line 2: x.jpg"),
        (
            ["image_a,image_b,image_c,split", "a.jpg,b.jpg,c.jpg,train", "a.jpg,d.jpg,e.jpg,val"],
            "a photo of one split is in a triplet of another",
        ),
    ],
)
def test_what_does_not_fit_is_named(write, lines: list[str], says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=f"(?s){says}"):
        read_photos(write(*lines))


def test_triplets_become_photos_in_order_of_mention_and_judgements(write) -> None:  # type: ignore[no-untyped-def]
    photos = read_photos(
        write(
            "image_a,image_b,image_c,odd,margin,split",
            "c.jpg,a.jpg,b.jpg,a,0.1,train",
            "./a.jpg,b.jpg,c.jpg,,,train",
            "d.jpg,e.jpg,f.jpg,image_b,,val",
        )
    )
    assert [path.name for path in photos.paths] == [f"{name}.jpg" for name in "cabdef"]
    assert photos.split == ("train",) * 3 + ("val",) * 3
    assert photos.triplets == (
        Triplet(1, 2, 0, 0.1),
        Triplet(1, 2, 0, None),
        Triplet(3, 5, 4, None),
    )
    # What names a photo that is left out is left out, and the places are those of the rest.
    assert photos.subset([5, 4, 3, 0]).triplets == (Triplet(2, 0, 1, None),)
    other = PhotoSet(photos.root, photos.paths, photos.labels, photos.split)
    assert photos.manifest_hash() != other.manifest_hash()


def test_without_labels_a_flat_folder_will_do_when_none_are_asked_for(
    write,
    tmp_path: Path,  # type: ignore[no-untyped-def]
) -> None:
    photos = read_photos(tmp_path, labels=False)
    assert len(photos) == 6
    assert set(photos.labels) == {""}
    with pytest.raises(DataError, match="have no labels"):
        read_photos(tmp_path)
    assert len(read_photos(write("path", "a.jpg", "b.jpg"), labels=False)) == 2


def _photos(count: int, split: tuple[str, ...] | None = None) -> PhotoSet:
    paths = tuple(Path(f"{row:02}.jpg") for row in range(count))
    return PhotoSet(Path("/x"), paths, ("",) * count, split or ("",) * count)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_groups_are_held_out_whole_and_up_to_their_share(seed: int, share: float) -> None:
    groups = [row // 3 for row in range(30)]
    held = hold_out_groups(_photos(30), groups, share=share, seed=seed)
    sides = [
        {group for group, name in zip(groups, held.split, strict=True) if name == split}
        for split in ("train", "val")
    ]
    assert not sides[0] & sides[1]
    assert held.split.count("val") == max(3, share * 30 // 3 * 3)
    assert held.split == hold_out_groups(_photos(30), groups, share=share, seed=seed).split


def test_marked_photos_keep_their_mark_and_one_group_is_refused() -> None:
    split = ("test", "test", "", "", "", "")
    held = hold_out_groups(_photos(6, split), list("aabbcc"), share=0.5)
    assert held.split[:2] == ("test", "test")
    assert sorted(held.split[2:]) == ["train", "train", "val", "val"]
    with pytest.raises(DataError, match="hang together"):
        hold_out_groups(_photos(6, split), list("xxaaaa"))
    with pytest.raises(ValueError, match="share"):
        hold_out_groups(_photos(6), list("abcdef"), share=1.0)
