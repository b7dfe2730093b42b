"""The official layouts in miniature, and fetching, checking and unpacking their archives."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from embedkit.data import prepare as prepare_room
from embedkit.data import read_photos
from embedkit.data.prepare import Download, downloads, prepare
from embedkit.data.protocols import protocol_names, read_protocol, write_manifest
from embedkit.errors import DataError, MismatchError, MissingError, UnknownNameError


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def cub(root: Path) -> None:
    images = [
        "001.Albatross/A_1_10.jpg",
        "001.Albatross/A_2_11.jpg",
        "100.Pelican/P_1_12.jpg",
        "101.Finch/F_1_13.jpg",
        "200.Wren/W_1_14.jpg",
    ]
    for image in images:
        write(root / "images" / image)
    write(root / "images/001.Albatross/._A_1_10.jpg")
    write(root / "images.txt", "".join(f"{n} {path}\n" for n, path in enumerate(images, 1)))
    classes = "".join(f"{n} {int(path[:3])}\n" for n, path in enumerate(images, 1))
    write(root / "image_class_labels.txt", classes)


def cars(root: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    kind = [("relative_im_path", "O"), ("bbox_x1", "O"), ("class", "O"), ("test", "O")]
    rows = [(f"car_ims/00000{n}.jpg", 1, c, 0) for n, c in enumerate([1, 98, 99, 196], 1)]
    for row in rows:
        write(root / row[0])
    content = {"annotations": np.array([rows], dtype=kind), "class_names": np.array(["x"], "O")}
    scipy_io.savemat(root / "cars_annos.mat", content)


def cars_by_devkit(root: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    (root / "devkit").mkdir(parents=True)
    for name, folder, classes in (
        ("devkit/cars_train_annos.mat", "cars_train", [1, 196]),
        ("cars_test_annos_withlabels.mat", "cars_test", [98, 99]),
    ):
        rows = [(5, c, f"0000{n}.jpg") for n, c in enumerate(classes, 1)]
        for row in rows:
            write(root / folder / row[2])
        kind = [("bbox_x1", "O"), ("class", "O"), ("fname", "O")]
        scipy_io.savemat(root / name, {"annotations": np.array([rows], dtype=kind)})


def sop(root: Path) -> None:
    for part, rows in (
        ("train", [(1, 1, 1, "bicycle_final/1_0.JPG"), (2, 1, 1, "bicycle_final/1_1.JPG")]),
        ("test", [(3, 11319, 2, "chair_final/2_0.JPG"), (4, 11320, 2, "chair_final/3_0.JPG")]),
    ):
        head = "image_id class_id super_class_id path\n"
        write(root / f"Ebay_{part}.txt", head + "".join(f"{' '.join(map(str, r))}\n" for r in rows))
        for row in rows:
            write(root / row[3])


def inshop(root: Path) -> None:
    rows = [
        ("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "train"),
        ("img/WOMEN/Dresses/id_00000001/01_1_front.jpg", "id_00000001", "query"),
        ("img/WOMEN/Dresses/id_00000001/01_2_side.jpg", "id_00000001", "gallery"),
        ("img/MEN/Denim/id_00000003/01_7_additional.jpg", "id_00000003", "gallery"),
    ]
    lines = "".join(f"{path:<70} {item} {status}\n" for path, item, status in rows)
    write(root / "list_eval_partition.txt", f"4\nimage_name item_id evaluation_status\n{lines}")
    for path, _, _ in rows:
        write(root / path)


def inat(root: Path) -> None:
    for year, numbers in (("train2018", (1, 2, 3)), ("val2018", (4,))):
        images = [{"id": n, "file_name": f"train_val2018/Aves/{n % 2}/{n}.jpg"} for n in numbers]
        annotations = [{"id": n, "image_id": n, "category_id": n % 2} for n in numbers]
        write(root / f"{year}.json", json.dumps({"images": images, "annotations": annotations}))
        for image in images:
            write(root / str(image["file_name"]))
    for part, name in (("train", (1, 3)), ("test", (2, 4))):
        lines = "".join(f"train_val2018/Aves/{n % 2}/{n}.jpg\n" for n in name)
        write(root / f"Inat_dataset_splits/Inaturalist_{part}_set1.txt", lines)


TREES: dict[str, tuple[Callable[[Path], None], str, list[str], list[str]]] = {
    "cub": (
        cub,
        "CUB_200_2011",
        ["train", "train", "train", "test", "test"],
        ["001.Albatross", "001.Albatross", "100.Pelican", "101.Finch", "200.Wren"],
    ),
    "cars": (cars, "cars196", ["train", "train", "test", "test"], ["001", "098", "099", "196"]),
    "sop": (
        sop,
        "Stanford_Online_Products",
        ["train", "train", "test", "test"],
        ["1", "1", "11319", "11320"],
    ),
    "inshop": (
        inshop,
        "inshop",
        ["train", "test", "test", "test"],
        ["id_00000002", "id_00000001", "id_00000001", "id_00000003"],
    ),
    "inat": (inat, "inat2018", ["train", "train", "test", "test"], ["1", "1", "0", "0"]),
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("above", [False, True])
def test_a_miniature_of_the_archive_is_read_as_papers_split_it(
    name: str, above: bool, tmp_path: Path
) -> None:
    build, below, split, labels = TREES[name]
    build(tmp_path / below)
    protocol = read_protocol(name, tmp_path if above else tmp_path / below)
    photos = protocol.photos
    assert list(photos.split) == split
    assert list(photos.labels) == labels
    assert all(path.is_file() for path in photos.files())
    assert not any(path.name.startswith("._") for path in photos.paths)
    assert protocol.ks[0] == 1


def test_the_devkit_of_cars_is_split_by_class_too(tmp_path: Path) -> None:
    cars_by_devkit(tmp_path)
    photos = read_protocol("cars", tmp_path).photos
    assert list(zip(photos.labels, photos.split, strict=True)) == [
        ("001", "train"),
        ("196", "test"),
        ("098", "train"),
        ("099", "test"),
    ]


def test_in_shop_queries_see_the_gallery_only(tmp_path: Path) -> None:
    inshop(tmp_path)
    photos = read_protocol("inshop", tmp_path).photos
    assert photos.is_query == (False, True, False, False)
    assert photos.is_gallery == (False, False, True, True)


def test_wrong_counts_are_said_in_words_and_refused_when_strict(tmp_path: Path) -> None:
    cub(tmp_path)
    said = read_protocol("cub", tmp_path).differences
    assert said[0] == "train: 3 images of 2 classes, the papers have 5,864 of 100"
    assert said[1] == "test: 2 images of 2 classes, the papers have 5,924 of 100"
    with pytest.raises(DataError, match="not the whole of cub") as caught:
        read_protocol("cub", tmp_path, strict=True)
    assert "5,864 of 100" in str(caught.value)


def test_right_counts_are_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cub(tmp_path)
    counts = {"cub": {"train": (3, 2), "test": (2, 2)}}
    monkeypatch.setattr("embedkit.data.protocols._COUNTS", counts)
    assert read_protocol("cub", tmp_path, strict=True).differences == ()


@pytest.mark.parametrize("name", ["cub", "sop", "inshop", "inat", "cars"])
def test_a_folder_of_something_else_is_refused_with_the_way_to_get_it(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=f"no unpacked archive of {name}") as caught:
        read_protocol(name, tmp_path)
    assert f"embedkit data prepare {name}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "text"),
    [
        ("cub", "images.txt", "1\n"),
        ("cub", "images.txt", "1 a/b.jpg\n"),
        ("cub", "image_class_labels.txt", "1 one\n"),
        ("cub", "image_class_labels.txt", "1 1\n"),
        ("sop", "Ebay_test.txt", "head\n1 2 3\n"),
        ("inshop", "list_eval_partition.txt", "1\nhead\nimg/a.jpg id_1 trian\n"),
        ("inat", "train2018.json", "{"),
        ("inat", "train2018.json", '{"images": []}'),
        ("inat", "Inat_dataset_splits/Inaturalist_test_set1.txt", "unheard/of.jpg\n"),
        ("cars", "cars_annos.mat", "no matlab at all" * 20),
    ],
)
def test_damaged_lists_are_one_sentence(name: str, file: str, text: str, tmp_path: Path) -> None:
    TREES[name][0](tmp_path)
    write(tmp_path / file, text)
    with pytest.raises(DataError, match="cannot be read"):
        read_protocol(name, tmp_path)


def test_an_empty_list_names_no_photos(tmp_path: Path) -> None:
    write(tmp_path / "images.txt", "")
    write(tmp_path / "image_class_labels.txt", "\n")
    with pytest.raises(DataError, match="name no photos"):
        read_protocol("cub", tmp_path)


def test_photos_that_are_not_there_are_counted_and_named(tmp_path: Path) -> None:
    sop(tmp_path)
    (tmp_path / "chair_final/2_0.JPG").unlink()
    with pytest.raises(DataError, match="1 of the 4 photos") as caught:
        read_protocol("sop", tmp_path)
    assert "chair_final/2_0.JPG" in str(caught.value)


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/secret.jpg", "a/../../secret.jpg"])
def test_a_list_cannot_lead_outside(path: str, tmp_path: Path) -> None:
    write(tmp_path / "set/Ebay_train.txt", "head\n")
    write(tmp_path / "set/Ebay_test.txt", f"head\n1 1 1 {path}\n")
    write(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match="outside"):
        read_protocol("sop", tmp_path / "set")


def test_folders_and_csv_are_protocols_too(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        write(tmp_path / "photos" / name)
    assert read_protocol("folder", tmp_path / "photos").photos.labels == ("a", "a", "b")
    write(tmp_path / "photos.csv", "path,label\nphotos/a/1.jpg,x\n")
    assert read_protocol("csv", tmp_path / "photos.csv").photos.labels == ("x",)


def test_query_and_gallery_folders_keep_their_sides(tmp_path: Path) -> None:
    for name in ("query/a/1.jpg", "gallery/a/1.jpg", "gallery/b/2.jpg"):
        write(tmp_path / name)
    photos = read_protocol("query-gallery", tmp_path).photos
    assert photos.labels == ("a", "a", "b")
    assert photos.is_query == (True, False, False)
    assert photos.is_gallery == (False, True, True)
    write(tmp_path / "query/loose.jpg")
    with pytest.raises(DataError, match="class folders"):
        read_protocol("query-gallery", tmp_path)
    with pytest.raises(DataError, match="no folder query"):
        read_protocol("query-gallery", tmp_path / "gallery")


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cars'"):
        read_protocol("car", Path())
    with pytest.raises(UnknownNameError):
        downloads("folder")
    assert set(protocol_names()) == {*TREES, "folder", "csv", "query-gallery"}


@pytest.mark.parametrize("name", TREES)
def test_a_manifest_reads_as_the_protocol_does(name: str, tmp_path: Path) -> None:
    build, below, _, _ = TREES[name]
    build(tmp_path / below)
    photos = read_protocol(name, tmp_path).photos
    write_manifest(photos, tmp_path / "manifest.csv")
    again = read_photos(tmp_path / "manifest.csv")
    assert again.files() == photos.files()
    for column in ("labels", "split", "is_query", "is_gallery"):
        assert getattr(again, column) == getattr(photos, column)


# Fetching


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """An address, the files it gives out, and the ranges it was asked for."""
    files: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = files.get(self.path[1:])
            if data is None:
                self.send_error(404)
                return
            wanted = self.headers.get("Range", "")
            asked.append(wanted)
            start = int(wanted[6:-1]) if wanted else 0
            if wanted and start >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            cut = len(data) // 2 if self.path.endswith("breaks.tgz") and not wanted else None
            self.wfile.write(data[start:cut])

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", files, asked
    running.shutdown()
    thread.join()
    running.server_close()


def tar_of(members: dict[str, bytes], *, links: dict[str, str] | None = None) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, data in members.items():
            one = tarfile.TarInfo(name)
            one.size = len(data)
            tar.addfile(one, io.BytesIO(data))
        for name, to in (links or {}).items():
            one = tarfile.TarInfo(name)
            one.type, one.linkname = tarfile.SYMTYPE, to
            tar.addfile(one)
    return target.getvalue()


def cub_members(tmp_path: Path) -> dict[str, bytes]:
    cub(tmp_path / "made/CUB_200_2011")
    root = tmp_path / "made"
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def offer(
    monkeypatch: pytest.MonkeyPatch, url: str, *, md5: str | None = None, size: int | None = None
) -> None:
    (real,) = downloads("cub")
    changed = dataclasses.replace(real, url=url, md5=md5, size=size)
    monkeypatch.setitem(prepare_room._DOWNLOADS, "cub", (changed,))


def test_a_set_is_fetched_checked_unpacked_and_listed(
    server: tuple[str, dict[str, bytes], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, files, asked = server
    files["c.tgz"] = tar_of(cub_members(tmp_path))
    offer(monkeypatch, f"{address}/c.tgz", md5=hashlib.md5(files["c.tgz"]).hexdigest())
    heard: list[tuple[str, int, int | None]] = []
    protocol, manifest = prepare(
        "cub", tmp_path / "cub", progress=lambda *facts: heard.append(facts)
    )
    assert manifest == tmp_path / "cub/manifest.csv"
    assert read_photos(manifest).labels == protocol.photos.labels
    assert heard[0] == ("CUB_200_2011.tgz", len(files["c.tgz"]), len(files["c.tgz"]))
    assert not list((tmp_path / "cub").rglob("._*"))
    files.clear()
    prepare("cub", tmp_path / "cub")  # nothing is fetched twice
    assert asked == [""]


def test_a_download_that_broke_off_goes_on_where_it_was(
    server: tuple[str, dict[str, bytes], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, files, asked = server
    data = files["breaks.tgz"] = tar_of(cub_members(tmp_path))
    offer(monkeypatch, f"{address}/breaks.tgz", md5=hashlib.md5(data).hexdigest())
    with pytest.raises(MissingError, match="cannot be downloaded") as caught:
        prepare("cub", tmp_path / "cub")
    assert caught.value.exit_code == 6
    prepare("cub", tmp_path / "cub")
    assert asked == ["", f"bytes={len(data) // 2}-"]
    assert (tmp_path / "cub/CUB_200_2011.tgz").read_bytes() == data


def test_a_part_longer_than_the_file_is_begun_again(
    server: tuple[str, dict[str, bytes], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, files, asked = server
    files["c.tgz"] = tar_of(cub_members(tmp_path))
    offer(monkeypatch, f"{address}/c.tgz")
    write(tmp_path / "cub/CUB_200_2011.tgz.part", "x" * (len(files["c.tgz"]) + 5))
    prepare("cub", tmp_path / "cub")
    assert asked[-1] == ""


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/c.tgz", "http://no-such-host.invalid/c.tgz"])
def test_offline_the_address_and_the_place_for_the_file_are_named(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, url)
    with pytest.raises(MissingError) as caught:
        prepare("cub", tmp_path / "cub")
    assert url in str(caught.value)
    assert str(tmp_path / "cub/CUB_200_2011.tgz") in str(caught.value)


def test_what_takes_a_browser_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="by hand") as caught:
        prepare("inshop", tmp_path)
    assert "mmlab.ie.cuhk.edu.hk" in str(caught.value)
    assert str(tmp_path / "list_eval_partition.txt") in str(caught.value)


def test_files_put_there_by_hand_are_enough(tmp_path: Path) -> None:
    inshop(tmp_path / "made")
    folder = tmp_path / "inshop"
    folder.mkdir()
    listed = (tmp_path / "made/list_eval_partition.txt").read_text()
    write(folder / "list_eval_partition.txt", listed)
    with zipfile.ZipFile(folder / "img.zip", "w") as archive:
        for path in sorted((tmp_path / "made/img").rglob("*.jpg")):
            archive.write(path, path.relative_to(tmp_path / "made").as_posix())
        archive.writestr("../evil.jpg", "x")
        archive.writestr("__MACOSX/img/._a.jpg", "x")
    protocol, _ = prepare("inshop", folder)
    assert len(protocol.photos) == 4
    assert not (tmp_path / "evil.jpg").exists()
    assert not (folder / "__MACOSX").exists()


@pytest.mark.parametrize("facts", [{"md5": "0" * 32}, {"size": 3}])
def test_another_file_than_promised_is_refused(
    facts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, "http://127.0.0.1:1/c.tgz", **facts)  # type: ignore[arg-type]
    write(tmp_path / "CUB_200_2011.tgz", "not it")
    with pytest.raises(MismatchError, match="not the file it should be"):
        prepare("cub", tmp_path)


def test_only_expected_plain_files_leave_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, "http://127.0.0.1:1/c.tgz")
    members = cub_members(tmp_path)
    hostile = {
        "../evil.jpg": b"x",
        "CUB_200_2011/images/../../../evil.jpg": b"x",
        "/tmp/embedkit-evil.jpg": b"x",
        "CUB_200_2011/run.sh": b"x",
        "CUB_200_2011/images/001.Albatross/._A.jpg": b"x",
        "C:\\evil.jpg": b"x",
    }
    links = {"CUB_200_2011/images/001.Albatross/link.jpg": "/etc/passwd"}
    (tmp_path / "set").mkdir()
    (tmp_path / "set/CUB_200_2011.tgz").write_bytes(tar_of(members | hostile, links=links))
    prepare("cub", tmp_path / "set")
    found = {
        path.relative_to(tmp_path / "set").as_posix()
        for path in (tmp_path / "set").rglob("*")
        if path.is_file() or path.is_symlink()
    }
    expected = {name for name in members if "._" not in name}
    extra = {"CUB_200_2011.tgz", ".CUB_200_2011.tgz.unpacked", "manifest.csv"}
    assert found == expected | extra
    assert not (tmp_path / "evil.jpg").exists()
    assert not Path("/tmp/embedkit-evil.jpg").exists()


@pytest.mark.parametrize(
    ("data", "error"),
    [(b"<html>sign in</html>", DataError), (tar_of({"a": b"x"}), MismatchError)],
    ids=["a page", "another archive"],
)
def test_a_file_that_is_no_such_archive_is_refused(
    data: bytes, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, "http://127.0.0.1:1/c.tgz")
    (tmp_path / "CUB_200_2011.tgz").write_bytes(data)
    with pytest.raises(error):
        prepare("cub", tmp_path)
    assert not (tmp_path / ".CUB_200_2011.tgz.unpacked").exists()


@pytest.mark.parametrize("name", TREES)
def test_every_address_is_official_and_every_hash_a_hash(name: str) -> None:
    for file in downloads(name):
        assert isinstance(file, Download)
        assert file.page.startswith("https://")
        assert file.url is None or file.url.startswith(("https://", "http://"))
        assert file.md5 is None or len(bytes.fromhex(file.md5)) == 16
