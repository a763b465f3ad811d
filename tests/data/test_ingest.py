import hashlib
import io
import json
import os
import struct
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from components.core.config import ConfigError
from components.core.errors import DatasetError
from components.core.storage import StorageError, s3_client, sha256_dir
from components.core.user import user_name
from components.data import ingest as ingest_module
from components.data import sources
from components.data.ingest import IngestReport, ingest
from components.data.ingest_config import IngestError, IngestRequest
from components.data.manifest import QUARANTINE_SCHEMA, read_collection, read_manifest, read_table
from components.data.provenance import Provenance, read_provenance
from components.data.sample_pool import BOMB_SIDE, _pixel_bomb
from components.data.shards import PIXEL_CEILING, ShardReader, decode_image
from components.lineage.lock_file import folder_id

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def image(seed: int, kind: str = "JPEG", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16 + seed % 5, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def take(root: Path, source: Path | str, **options) -> IngestReport:
    values = {
        "name": "photos",
        "license": "CC0-1.0",
        "pool": root / "pool",
        "evaluation": root / "evaluation",
        "docs_folder": root / "docs",
        "ingested_at": "2026-01-02T03:04:05.678Z",
    }
    report = ingest(IngestRequest.parse(**(values | {"source": str(source)} | options)))
    assert report.seen == report.stored + report.held_out + report.already_present + sum(report.rejected.values())
    return report


def rejections(root: Path, collection: str = "pool") -> dict[str, tuple[str, str | None]]:
    (path,) = (root / collection).rglob("rejected.parquet")
    rows = read_table(path, QUARANTINE_SCHEMA).to_pylist()
    return {row["source_uri"]: (row["reason"], row["image_id"]) for row in rows}


CLASSES = {
    f"{label}/{number}.jpg": image(10 * place + number)
    for place, label in enumerate(("cat", "dog"))
    for number in range(6)
}


def test_a_folder_becomes_a_snapshot(tmp_path: Path) -> None:
    source = write(tmp_path / "in", CLASSES | {".DS_Store": b"x", "cat/._0.jpg": b"x", "cat/Thumbs.db": b"x"})
    report = take(tmp_path, source)
    assert (report.seen, report.stored, report.ignored, report.rejected) == (12, 12, 3, {})
    assert report.bytes_stored == sum(len(data) for data in CLASSES.values())
    assert report.evaluation_snapshot is None
    ids = sorted(sha(data) for data in CLASSES.values())
    snapshot = report.pool_snapshot
    assert read_provenance(snapshot) == Provenance(
        source=str(source), source_version=report.source_version, ingested_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        ingested_by=user_name(),
    )  # fmt: skip
    assert sorted(p.name for p in snapshot.iterdir()) == [
        "00000.tar",
        "manifest.parquet",
        "rejected.parquet",
        "summary.html",
        "validation.json",
    ]
    assert [p.name for p in (tmp_path / "pool").rglob("*")][:1] == ["photos"]
    rows = read_collection(tmp_path / "pool").to_pylist()
    assert [row["image_id"] for row in rows] == ids
    reader = ShardReader(tmp_path / "pool")
    by_id = {sha(data): (name, data) for name, data in CLASSES.items()}
    for row in rows:
        name, data = by_id[row["image_id"]]
        assert reader.read(row["shard"], row["offset"], row["length"]) == data
        assert (row["width"], row["height"]) == decode_image(data).size
        assert row["source_uri"] == name
        assert (row["label"], row["split"], row["format"]) == (name.split("/")[0], None, "JPEG")
        assert (row["source"], row["license"]) == ("photos", "CC0-1.0")
    page = (snapshot / "summary.html").read_text()
    assert "ids_unique" in page
    assert {"of": "snapshot", "name": "ids_unique", "meaning": "no image_id is there twice", "checked": 12,
            "failing": 0, "allowed": 0} in json.loads((snapshot / "validation.json").read_text())  # fmt: skip
    assert '<tr><th scope="row">16 to 31</th><td class="n">12</td>' in page
    assert "http" not in page  # complete in itself


def test_a_second_ingest_stores_nothing_and_a_grown_source_only_what_is_new(tmp_path: Path) -> None:
    source = write(tmp_path / "in", CLASSES)
    first = take(tmp_path, source)
    before = sha256_dir(tmp_path / "pool")
    again = take(tmp_path, source)
    assert (again.stored, again.already_present, again.pool_snapshot) == (0, 12, None)
    assert "nothing new, no snapshot made" in str(again)
    assert sha256_dir(tmp_path / "pool") == before
    write(source, {"bird/0.jpg": image(100), "bird/copy.jpg": CLASSES["cat/0.jpg"], "bird/bad.jpg": b"?"})
    grown = take(tmp_path, source)
    assert (grown.stored, grown.already_present, grown.rejected) == (1, 12, {"exact_copy": 1, "not_an_image": 1})
    assert grown.source_version != first.source_version
    table = read_table(grown.pool_snapshot / "manifest.parquet", read_collection(tmp_path / "pool").schema)
    assert table["image_id"].to_pylist() == [sha(image(100))]
    assert sha256_dir(first.pool_snapshot) == sha256_dir(tmp_path / "pool" / "photos" / first.pool_snapshot.name)
    assert read_collection(tmp_path / "pool").num_rows == 13


def test_the_same_images_are_the_same_data_another_day_in_another_folder(tmp_path: Path) -> None:
    files = CLASSES | {"dog/copy.jpg": CLASSES["cat/3.jpg"], "bad.jpg": b"?", "half.jpg": image(60)[:300]}
    for where, when in (("a", "2026-01-02T03:04:05Z"), ("b/there", "2027-01-02T03:04:05Z")):
        source = write(tmp_path / where / "in", files)
        (source / "gone.jpg").symlink_to(source / "cat/none.jpg")
        take(tmp_path / where, source, ingested_at=when)
    (tmp_path / "c/in").mkdir(parents=True)
    with tarfile.open(tmp_path / "c/in/all.tar", "w") as tar:
        tar.add(tmp_path / "a/in", "all")
    take(tmp_path / "c/1", tmp_path / "c/in/all.tar")
    take(tmp_path / "c/2", tmp_path / "c/in")
    first, there, *tars = (tmp_path / name / "pool/photos" for name in ("a", "b/there", "c/1", "c/2"))
    for one, other in ((first, there), tars):
        (snapshot,), (again,) = ([path for path in folder.iterdir() if path.is_dir()] for folder in (one, other))
        assert snapshot.name == again.name
        assert folder_id(snapshot) == folder_id(again)  # the DVC hash
        for path in snapshot.iterdir():
            assert str(tmp_path).encode() not in path.read_bytes()
            assert b" at 0x" not in path.read_bytes()
    rows = read_table(first / snapshot_of(first) / "rejected.parquet", QUARANTINE_SCHEMA).to_pylist()
    details = {row["source_uri"]: row["detail"] for row in rows}
    assert details["dog/copy.jpg"] == "the same bytes as cat/3.jpg"
    assert details["gone.jpg"] == "a link to cat/none.jpg: No such file or directory"


def snapshot_of(source: Path) -> str:
    (folder,) = (path for path in source.iterdir() if path.is_dir())
    return folder.name


def test_an_ingest_for_one_run_holds_exactly_what_the_source_holds_now(tmp_path: Path) -> None:
    """Snapshots are used again where all that they hold is in the source, else what is needed is stored again."""

    def held(report: IngestReport) -> list[tuple[str, str | None]]:
        tables = [read_manifest(folder / "manifest.parquet") for folder in report.holds]
        return sorted((row["image_id"], row["label"]) for table in tables for row in table.to_pylist())

    def now() -> list[tuple[str, str | None]]:
        return sorted((sha(p.read_bytes()), p.parent.name) for p in source.rglob("*.jpg"))

    source = write(tmp_path / "in", CLASSES)
    first = take(tmp_path, source, one_run=True, holdout=0.3)
    assert held(first) == now()
    assert {path.parents[1].name for path in first.holds} == {"pool", "evaluation"}
    assert all(read_provenance(path).one_run for path in first.holds)
    write(source, {"bird/0.jpg": image(100)})
    grown = take(tmp_path, source, one_run=True, holdout=0.3)
    assert (held(grown), grown.stored + grown.held_out) == (now(), 1)  # what was there is used
    (source / "cat/0.jpg").unlink()
    (source / "dog/0.jpg").rename(source / "cat/00.jpg")  # another label
    changed = take(tmp_path, source, one_run=True, holdout=0.3)
    assert held(changed) == now()
    again = take(tmp_path, source, one_run=True, holdout=0.3)
    assert (again.stored, again.held_out, set(again.holds)) == (0, 0, set(changed.holds))
    assert again.notes[0].startswith("source photos: this run takes exactly these 12 images, and no other run takes")

    stay = take(tmp_path, source, license="CC-BY-4.0")  # what was for one run does not count as present
    assert (stay.stored, stay.already_present, stay.holds) == (12, 0, ())
    assert not read_provenance(stay.pool_snapshot).one_run
    (source / "cat/00.jpg").rename(source / "dog/0.jpg")
    relabeled = take(tmp_path, source, license="CC-BY-4.0")
    assert relabeled.stored == 0
    assert "1 images were there already under another label, which they keep, such as dog/0.jpg (cat, here dog)" in str(
        relabeled.notes
    )


def test_the_same_source_gives_the_same_bytes_with_one_worker_or_two(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "BATCH_ENTRIES", 4)
    source = write(tmp_path / "in", CLASSES | {"dog/bad.jpg": b"?", "dog/copy.jpg": CLASSES["cat/3.jpg"]})
    for run, workers in (("a", 1), ("b", 2)):
        take(tmp_path / run, source, workers=workers, shard_bytes=15_000)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a" / "pool").rglob("*.*"))
    assert sum(path.suffix == ".tar" for path in files) > 1
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    assert sha256_dir(tmp_path / "a" / "pool") == sha256_dir(tmp_path / "b" / "pool")


def test_every_bad_file_is_set_aside_with_its_reason(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "MAX_IMAGE_BYTES", 100_000)
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 120, 240)]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    bad = {
        "animated.gif": (gif.getvalue(), "animated"),
        "bomb.png": (_pixel_bomb(BOMB_SIDE), "too_many_pixels"),
        "copy.jpg": (image(1), "exact_copy"),
        "empty.jpg": (b"", "not_an_image"),
        "half.jpg": (image(2)[:400], "truncated"),
        "huge.jpg": (image(3) + bytes(100_000), "too_large"),
        "page.jpg": (b"<html>", "not_an_image"),
        "photo.heic": (b"\x00\x00\x00\x18ftypheic" + bytes(40), "unsupported_format"),
    }
    source = write(tmp_path / "in", {"a.jpg": image(1), "b.png": image(2, "PNG")} | {k: v[0] for k, v in bad.items()})
    report = take(tmp_path, source)
    assert report.stored == 2
    found = rejections(tmp_path)
    assert {uri: reason for uri, (reason, _) in found.items()} == {k: v[1] for k, v in bad.items()}
    assert found["copy.jpg"][1] == sha(image(1))
    assert found["huge.jpg"][1] is None  # never read
    rows = read_table(report.pool_snapshot / "rejected.parquet", QUARANTINE_SCHEMA).to_pylist()
    details = {Path(row["source_uri"]).name: row["detail"] for row in rows}
    assert details["copy.jpg"] == "the same bytes as a.jpg"
    assert "12000 x 12000" in details["bomb.png"]


def test_what_is_scaled_or_left_out_is_told_with_counts(tmp_path: Path) -> None:
    wide = [np.random.default_rng(n).integers(0, 4096, (16, 16), dtype=np.uint16) for n in range(3)]
    source = tmp_path / "in"
    source.mkdir()
    for number, pixels in enumerate(wide):
        Image.fromarray(pixels).save(source / f"{number}.png")
    Image.fromarray(wide[0] << 4).save(source / "full.tif")
    pages = [Image.new("L", (8, 8), shade) for shade in (1, 2)]
    pages[0].save(source / "pages.tif", save_all=True, append_images=pages[1:])
    report = take(tmp_path, source)
    scaled = "samples of 16 bits of which {} are used: scaled from these to 8 bits: {}, such as {}"
    assert {scaled.format(12, 3, "0.png"), scaled.format(16, 1, "full.tif")} <= set(report.notes)
    assert report.rejected == {"multi_page": 1}


def test_a_limit_above_the_usual_one_needs_memory(tmp_path: Path, monkeypatch) -> None:
    source = write(tmp_path / "in", {"a.jpg": image(0), "bomb.png": _pixel_bomb(BOMB_SIDE)})
    take(tmp_path, source)
    rows = read_table(next((tmp_path / "pool").rglob("rejected.parquet")), QUARANTINE_SCHEMA).to_pylist()
    assert rows[0]["detail"] == (
        "12000 x 12000 (144000000) pixels; at most 50000000 are decoded; `pedigree ingest --max-pixels` raises "
        "that to 1073741824 at most, for 40 bytes of memory a pixel; or make the image smaller, or cut it into tiles"
    )
    monkeypatch.setattr(ingest_module, "DECODED_BYTES", 2**30)
    with pytest.raises(IngestError, match=r"max_pixels 150000000: this machine's memory of .* GiB has no room"):
        take(tmp_path / "more", source, max_pixels=150_000_000)


def test_max_pixels_is_obeyed(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": image(0), "b.jpg": image(4)})  # 20 x 16 and 20 x 20
    assert take(tmp_path, source, max_pixels=350).rejected == {"too_many_pixels": 1}


# Archives


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def test_webdataset_shards_bring_their_labels(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "in" / f"{shard:04d}.tar", "w") as archive:
            for number in range(3):
                seed = 10 * shard + number
                add(archive, f"{seed:03d}.jpg", image(seed))
                add(archive, f"{seed:03d}.cls", f"{number}\n".encode())
                add(archive, f"{seed:03d}.json", b"{}")
    write(tmp_path / "in", {"README.md": b"a data set"})
    report = take(tmp_path, tmp_path / "in")
    assert (report.stored, report.ignored, report.rejected) == (6, 7, {})
    labels = {row["image_id"]: row["label"] for row in read_collection(tmp_path / "pool").to_pylist()}
    assert labels == {sha(image(10 * shard + number)): str(number) for shard in range(2) for number in range(3)}
    uris = read_collection(tmp_path / "pool")["source_uri"].to_pylist()
    assert "0001.tar#012.jpg" in uris


def test_our_own_shards_can_be_ingested_again(tmp_path: Path) -> None:
    report = take(tmp_path / "a", write(tmp_path / "in", CLASSES))
    again = take(tmp_path / "b", report.pool_snapshot / "00000.tar")
    assert again.stored == 12
    assert (again.pool_snapshot / "00000.tar").read_bytes() == (report.pool_snapshot / "00000.tar").read_bytes()


def hostile_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        add(archive, "good.jpg", image(1))
        add(archive, "../../escape.jpg", image(2))
        add(archive, "/etc/absolute.jpg", image(3))
        add(archive, "link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "hard.jpg", type=tarfile.LNKTYPE, linkname="good.jpg")
        add(archive, "device.jpg", type=tarfile.CHRTYPE)
        add(archive, "pipe.jpg", type=tarfile.FIFOTYPE)
        add(archive, "folder", type=tarfile.DIRTYPE)
        add(archive, "late.jpg", image(4))
    claims = tarfile.TarInfo("liar.jpg")
    claims.size = 200 * 1024**2  # in a file of some kilobytes
    end = path.read_bytes().rstrip(b"\0")
    end += bytes(-len(end) % 512)
    path.write_bytes(end + claims.tobuf(tarfile.USTAR_FORMAT) + image(5))


def test_a_hostile_tar_can_only_lose_its_own_members(tmp_path: Path) -> None:
    path = tmp_path / "in.tar"
    hostile_tar(path)
    outside = set(tmp_path.iterdir())
    report = take(tmp_path / "out", path)
    assert set(tmp_path.iterdir()) - outside == {tmp_path / "out"}
    assert set(read_collection(tmp_path / "out" / "pool")["image_id"].to_pylist()) == {sha(image(1)), sha(image(4))}
    found = {uri.partition("#")[2]: reason for uri, (reason, _) in rejections(tmp_path / "out").items()}
    unsafe = ["../../escape.jpg", "/etc/absolute.jpg", "link.jpg", "hard.jpg", "device.jpg", "pipe.jpg"]
    assert {name: found.get(name) for name in unsafe} == dict.fromkeys(unsafe, "unsafe_member")
    assert found["liar.jpg"] == "truncated"
    assert report.stored == 2


def test_a_damaged_tar_keeps_what_stands_before_the_damage(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.tar", "b.tar"):
        with tarfile.open(tmp_path / "in" / name, "w") as archive:
            for number in range(4):
                add(archive, f"{number}.jpg", image(number + 10 * (name == "b.tar")))
    data = bytearray((tmp_path / "in" / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "in" / "a.tar") as archive:
        third = archive.getmembers()[2].offset
    data[third + 148 : third + 156] = b"0000000\0"  # a wrong checksum
    (tmp_path / "in" / "a.tar").write_bytes(data)
    write(tmp_path / "in", {"c.tar": b"no tar at all"})
    with tarfile.open(tmp_path / "in" / "d.tar", "w") as archive:  # tarfile would raise a ValueError
        add(archive, "0.jpg", image(20))
        add(archive, "1.jpg", image(21), pax_headers={"GNU.sparse.map": "here"})
    report = take(tmp_path, tmp_path / "in")
    assert (report.stored, report.rejected) == (7, {"damaged_archive": 3})


def test_names_that_are_no_text_are_written_down_as_far_as_they_are(tmp_path: Path) -> None:
    for folder in (b"caf\xe9", b"bar"):
        place = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + folder))
        write(place, {os.fsdecode(b"\xfc.jpg"): image(len(folder))})
    assert take(tmp_path, tmp_path / "in").stored == 2
    with tarfile.open(tmp_path / "in.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as archive:
        add(archive, "\xfc.jpg", image(5))
    assert take(tmp_path, tmp_path / "in.tar").stored == 1
    rows = {row["source_uri"]: row["label"] for row in read_collection(tmp_path / "pool").to_pylist()}
    folders = {"caf\ufffd/\ufffd.jpg": "caf\ufffd", "bar/\ufffd.jpg": "bar"}
    assert rows == {**folders, "in.tar#\ufffd.jpg": None}


def test_parquet_columns_of_bytes_and_of_hugging_face_structs(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    images = [image(number) for number in range(10)]
    plain = pa.table({"bytes": images[:5], "label": ["cat", "dog", None, "cat", "dog"], "other": [1, 2, 3, 4, 5]})
    pq.write_table(plain, tmp_path / "in" / "plain.parquet", row_group_size=2)
    structs = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(images[5:])] + [
        {"bytes": None, "path": "x"},
        None,
    ]
    table = pa.table({"image": structs, "label": [0, 1, 2, 3, 4, 5, 6]})
    pq.write_table(table, tmp_path / "in" / "structs.parquet")
    report = take(tmp_path, tmp_path / "in", workers=2)
    assert (report.seen, report.stored, report.rejected) == (12, 10, {"not_an_image": 2})
    rows = {row["image_id"]: row for row in read_collection(tmp_path / "pool").to_pylist()}
    expected = ["cat", "dog", None, "cat", "dog", "0", "1", "2", "3", "4"]
    assert [rows[sha(data)]["label"] for data in images] == expected
    assert rows[sha(images[3])]["source_uri"] == "plain.parquet#row=3"
    assert take(tmp_path / "single", tmp_path / "in" / "plain.parquet").stored == 5
    assert list((tmp_path / "pool").glob(".*")) == []  # no spool left


def test_damaged_parquet_pages_lose_only_their_row_group(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"image": [image(n) for n in range(6)]}), path, row_group_size=3, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 60] = bytes(60)
    path.write_bytes(data)
    report = take(tmp_path, path)
    assert (report.stored, report.rejected) == (3, {"damaged_archive": 1})


def test_parquet_that_repeats_a_large_value_is_read_image_by_image(tmp_path: Path) -> None:
    """A dictionary page of 4 MiB that stands for 64 times as much; and a label that is no text."""
    once = pa.array([bytes(2**22)], pa.binary())
    table = pa.table({"image": pa.DictionaryArray.from_arrays(pa.array([0] * 64, pa.int32()), once)})
    pq.write_table(table, tmp_path / "in.parquet", store_schema=False, dictionary_pagesize_limit=2**23)
    del table
    (batch,) = sources.list_source(str(tmp_path / "in.parquet"), tmp_path).batches
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in sources.read_batch(batch)]
    assert len(held) == 64
    assert max(held) < 8 * 2**22
    labels = pa.array([b"cat", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"image": [image(1), image(2)], "label": labels}), tmp_path / "in.parquet")
    assert take(tmp_path, tmp_path / "in.parquet").rejected == {"damaged_archive": 1}


def test_a_row_group_that_is_too_large_is_refused_by_name(tmp_path: Path, monkeypatch) -> None:
    table = pa.table({"image": [image(1), image(2), image(3)]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=2, use_dictionary=False)
    last = pq.ParquetFile(tmp_path / "in.parquet").metadata.row_group(1).total_byte_size
    monkeypatch.setattr(sources, "MAX_ROW_GROUP_BYTES", last)
    report = take(tmp_path, tmp_path / "in.parquet")
    assert (report.stored, report.rejected) == (1, {"too_large": 1})
    assert list(rejections(tmp_path)) == ["in.parquet#row_group=0"]


# Evaluation sets


def test_a_share_is_held_out_by_content_and_stays_held_out(tmp_path: Path) -> None:
    files = {f"{label}/{n}.jpg": image(1000 * place + n) for place, label in enumerate("ab") for n in range(150)}
    source = write(tmp_path / "in", dict(list(files.items())[:200]))
    report = take(tmp_path, source, holdout=0.2)
    assert report.stored + report.held_out == 200
    assert 20 <= report.held_out <= 60  # binomial: 40 expected, 5.7 standard deviation
    pool, evaluation = read_collection(tmp_path / "pool"), read_collection(tmp_path / "evaluation")
    first = set(evaluation["image_id"].to_pylist())
    assert not first & set(pool["image_id"].to_pylist())
    assert set(pool["split"].to_pylist()) == {None}
    splits = evaluation["split"].to_pylist()
    assert 8 <= splits.count("train") <= report.held_out - 8
    assert set(splits) == {"train", "test"}
    assert set(evaluation["label"].to_pylist()) == {"a", "b"}
    write(source, files)
    grown = take(tmp_path, source, holdout=0.2)
    assert (grown.already_present, grown.stored + grown.held_out) == (200, 100)
    # The same images, all at once and from elsewhere, fall on the same sides.
    take(tmp_path / "other", write(tmp_path / "elsewhere", files), holdout=0.2, name="elsewhere")
    for collection in ("pool", "evaluation"):
        ids = [
            set(read_collection(root / collection)["image_id"].to_pylist()) for root in (tmp_path, tmp_path / "other")
        ]
        assert ids[0] == ids[1]


def test_evaluation_folders_have_splits_above_labels(tmp_path: Path) -> None:
    files = {f"{('train', 'test')[number % 2]}/{name}": CLASSES[name] for number, name in enumerate(CLASSES)}
    copy = {"train/cat/copy.jpg": files["test/cat/1.jpg"]}
    report = take(tmp_path, write(tmp_path / "in", files | copy), as_evaluation=True)
    assert (report.stored, report.rejected, report.pool_snapshot) == (12, {"exact_copy": 1}, None)
    rows = read_collection(tmp_path / "evaluation").to_pylist()
    found = {row["image_id"]: (row["split"], row["label"]) for row in rows}
    assert found == {
        sha(data): tuple(name.split("/")[:2]) for name, data in files.items()
    }  # what is in test stays there
    assert not list((tmp_path / "pool").rglob("manifest.parquet"))


def test_copies_keep_the_test_image_and_a_label(tmp_path: Path) -> None:
    files = {
        f"{split}/{name}": data for name, data in CLASSES.items() for split in ("train", "val")[: 1 + ("0" in name)]
    }
    files |= {"0.jpg": CLASSES["cat/3.jpg"], "train/dog/cat.jpg": CLASSES["cat/4.jpg"], "train/None/1.jpg": image(99)}
    report = take(tmp_path, write(tmp_path / "in", files), as_evaluation=True)
    rows = {
        row["image_id"]: (row["split"], row["label"]) for row in read_collection(tmp_path / "evaluation").to_pylist()
    }
    assert rows[sha(CLASSES["dog/0.jpg"])] == ("test", "dog")
    assert rows[sha(CLASSES["cat/3.jpg"])] == ("train", "cat")
    assert rows[sha(image(99))] == ("train", "None")
    assert (report.labels, report.unlabeled) == ({"None": 1, "cat": 6, "dog": 6}, 0)
    notes = "\n".join(report.notes)
    assert "folders taken as splits, not as classes: train as train; val as test" in notes
    assert "1 of 3 classes cannot be evaluated" in notes
    assert "None (1 train, 0 test)" in notes
    kept, copy = "train/cat/4.jpg (kept, cat)", "train/dog/cat.jpg (dog)"
    assert f"1 copies have another label than the image that is kept, for example {kept} and {copy}" in notes


def test_splits_that_the_held_out_images_do_not_have_are_made(tmp_path: Path) -> None:
    files = {f"{('train', 'test')[number == 0]}/{name}": data for number, (name, data) in enumerate(CLASSES.items())}
    report = take(tmp_path, write(tmp_path / "in", files | {"train/cat/n.jpg": image(77)}), holdout=0.6)
    held = read_collection(tmp_path / "evaluation")
    assert report.held_out > 3
    assert set(held["split"].to_pylist()) == {"train", "test"}
    assert set(read_collection(tmp_path / "pool")["split"].to_pylist()) <= {"train", "test", None}
    assert any("go into the pool, where models train on them" in note for note in report.notes)


def test_names_are_one_line_and_no_markup(tmp_path: Path, caplog) -> None:
    names = {"line\nerror: break.jpg": image(1), "[red]x.jpg": b"?", "\x1b[31m.jpg": b"?", "\u2028.jpg": b"?"}
    caplog.set_level("INFO", logger="components")
    source = write(tmp_path / "in\nside", names)
    report = take(tmp_path, source)
    assert report.rejected == {"not_an_image": 3}
    told = [line for line in caplog.messages if not line.startswith("progress: ")]
    assert told == [f"{tmp_path}/in\\nside: {report}", *report.notes]
    assert all(line.isprintable() for line in caplog.messages)
    (source / "line\nerror: break.jpg").unlink()
    with pytest.raises(IngestError) as caught:
        take(tmp_path / "none", source)
    assert str(caught.value).isprintable()


def test_one_folder_alone_is_no_label(tmp_path: Path) -> None:
    take(tmp_path, write(tmp_path / "in", {"only/a.jpg": image(1), "b.jpg": image(2)}))
    assert read_collection(tmp_path / "pool")["label"].to_pylist() == [None, None]


# Errors: one clear line, and nothing written


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "nowhere", "no such file or folder"),
        ({"a.txt": b"text"}, "a.txt", "a file of another kind; give a folder, s3://"),
        ({"a.zip": b"PK"}, "a.zip", "compressed archives are not read: unpack it"),
        ({"sub/.hidden": b""}, ".", "holds no files but 1 hidden ones"),
        (
            {"a.txt": b"text", "b.csv": b"1,2"},
            ".",
            r"no image in 2 files \(not_an_image 2\); for example .*a\.txt: begins with",
        ),
        ({"a.jpg": b"", "b.tar": b""}, ".", r"holds 1 images and 1 archives .* ingest them as two sources"),
        ({"a.parquet": b"PAR1"}, ".", r"no image in 1 files \(damaged_archive 1\)"),
        ({"a.tar": bytes(10240)}, ".", "its archives hold no images"),
    ],
)
def test_sources_without_images_are_refused(tmp_path: Path, files, source: str, message: str) -> None:
    write(tmp_path / "in", files)
    (tmp_path / "in").mkdir(exist_ok=True)
    with pytest.raises(IngestError, match=message) as caught:
        take(tmp_path, tmp_path / "in" / source)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "pool").rglob("*"))


def test_parquet_without_image_bytes_names_what_it_found(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.jpg"], "size": [1]}), tmp_path / "in.parquet")
    with pytest.raises(IngestError, match=r"`image` holds text: .*; found: image \(string\), size \(int64\)"):
        take(tmp_path, tmp_path / "in.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "My Photos"}, "ingest: name: String should match pattern"),
        ({"name": "../escape"}, "ingest: name"),
        ({"license": " "}, "ingest: license: must not be blank"),
        ({"license": None}, "ingest: license"),
        ({"holdout": 1.5}, "ingest: holdout: .*less than 1"),
        ({"holdout": 0.2, "as_evaluation": True}, "holdout is for a pool"),
        ({"max_pixels": 0}, "ingest: max_pixels"),
        ({"max_pixels": PIXEL_CEILING + 1}, "ingest: max_pixels: .*less than or equal to 1073741824"),
        ({"color": "red"}, "ingest: color: unknown key"),
    ],
)
def test_requests_are_checked_before_anything_is_read(tmp_path: Path, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        take(tmp_path, "nowhere", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_license_is_named() -> None:
    with pytest.raises(ConfigError, match="ingest: license: required, but not given"):
        IngestRequest.parse(source="x", name="photos")


def test_a_failed_expectation_leaves_no_snapshot(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ingest_module, "_read_again", lambda finding: b"?" * finding.length)
    with pytest.raises(DatasetError, match=r"bytes_match_id .* 12 of 12 rows"):
        take(tmp_path, write(tmp_path / "in", CLASSES))
    assert [path.name for path in (tmp_path / "pool").rglob("*")] == ["photos"]
    (failing,) = (tmp_path / "docs").rglob("failing-rows.parquet")
    assert pq.ParquetFile(failing).metadata.num_rows == 12


def test_a_file_that_changes_while_it_is_read_stops_the_ingest(tmp_path: Path, monkeypatch) -> None:
    source = write(tmp_path / "in", CLASSES)

    def settle_late(*arguments):
        (source / "cat" / "2.jpg").write_bytes(CLASSES["dog/2.jpg"])
        return settle(*arguments)

    settle = ingest_module._settle
    monkeypatch.setattr(ingest_module, "_settle", settle_late)
    with pytest.raises(IngestError, match=r"cat/2\.jpg: changed while it was read"):
        take(tmp_path, source)
    assert [path.name for path in (tmp_path / "pool").rglob("*")] == ["photos"]


def test_two_ingests_of_one_collection_do_not_run_at_once_and_leftovers_go(tmp_path: Path) -> None:
    source = write(tmp_path / "in", CLASSES)
    pool = tmp_path / "pool"
    with ingest_module.hold_collection(pool), pytest.raises(IngestError, match="another ingest is writing here"):
        take(tmp_path, source)
    killed = {"lock": b"", "new/00000.tar": b"x"}
    write(pool, {f"photos/.0123456789ab.abcd_123/{name}": data for name, data in killed.items()})
    write(pool, {".ingest-killed/batch": b"x", "photos/.gitignore": b"/a\n"})
    take(tmp_path, source)
    assert sorted(p.name for p in pool.rglob(".*")) == [".gitignore"]


def test_a_negative_member_size_does_not_loop_for_ever(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        add(archive, "a.jpg", image(1))
        add(archive, "b.jpg", image(2))
    data = bytearray((tmp_path / "in.tar").read_bytes())
    with tarfile.open(tmp_path / "in.tar") as archive:
        second = archive.getmembers()[1].offset
    data[second + 124 : second + 136] = b"\xff" * 4 + struct.pack(">q", -second - 1024)  # base-256, negative
    data[second + 148 : second + 156] = b" " * 8
    data[second + 148 : second + 156] = b"%06o\0 " % sum(data[second : second + 512])
    (tmp_path / "in.tar").write_bytes(data)
    report = take(tmp_path, tmp_path / "in.tar")
    assert report.stored == 1
    assert sum(report.rejected.values()) >= 1


# S3


@pytest.mark.stack
@pytest.mark.usefixtures("storage")
def test_s3_prefixes_and_archives_give_what_the_folder_gives(tmp_path: Path) -> None:
    client = s3_client()
    client.create_bucket(Bucket="ingest-test")
    files = CLASSES | {"dog/bad.jpg": b"?", "dog/copy.jpg": CLASSES["cat/3.jpg"], "cat/none": image(50)}
    files |= {
        "cat/@eaDir/0.jpg": image(51),
        "dog/._0.jpg": b"\0\5\x16\7",
        "dog/a.jfif": image(52),
        "loose.txt": image(53),
    }
    for name, data in files.items():
        client.put_object(Bucket="ingest-test", Key=f"photos/{name}", Body=data)
    local = take(tmp_path / "local", write(tmp_path / "in", files))
    remote = take(tmp_path / "remote", "s3://ingest-test/photos", workers=2)
    assert remote.rejected == local.rejected == {"exact_copy": 1, "not_an_image": 1}
    assert (remote.ignored, remote.labels, remote.unlabeled) == (2, {"cat": 7, "dog": 7}, 1)
    assert (local.ignored, local.labels, local.unlabeled) == (2, {"cat": 7, "dog": 7}, 1)
    assert (remote.pool_snapshot / "00000.tar").read_bytes() == (local.pool_snapshot / "00000.tar").read_bytes()
    rows = read_collection(tmp_path / "remote" / "pool").to_pylist()
    assert {(row["source_uri"], row["label"]) for row in rows} >= {("cat/1.jpg", "cat")}
    assert take(tmp_path / "remote", "s3://ingest-test/photos/").pool_snapshot is None
    shard = local.pool_snapshot / "00000.tar"
    client.upload_file(str(shard), "ingest-test", "shards/00000.tar")
    for source in ("s3://ingest-test/shards", "s3://ingest-test/shards/00000.tar"):
        assert take(tmp_path / source[-5:], source).stored == 15
    with pytest.raises(IngestError, match="s3://no-such-bucket/x: no such bucket"):
        take(tmp_path / "none", "s3://no-such-bucket/x")
    with pytest.raises(IngestError, match="s3://ingest-test/nothing: no objects there"):
        take(tmp_path / "none", "s3://ingest-test/nothing")
    assert not list((tmp_path / "none" / "pool").rglob("*"))


def test_s3_that_does_not_answer_is_one_clear_line(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("components.core.storage.ATTEMPTS", 1)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"S3 at http://127\.0\.0\.1:9 does not answer: .*; start it with `pedigree up`"
    ) as caught:
        take(tmp_path, "s3://bucket/prefix")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "pool").rglob("*"))


def test_other_schemes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IngestError, match=r"https://example\.org/a\.jpg: expected s3://BUCKET/PREFIX"):
        take(tmp_path, "https://example.org/a.jpg")
