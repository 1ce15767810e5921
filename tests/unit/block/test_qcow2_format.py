"""qcow2: what is refused and why, what an image names, bits that say how it was left, probing, size."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from block_drives import SECTOR, Result, flush, read, write
from qcow2_trials import Disk, qemu_img, qemu_io, whole

from pyvmm.block import BlockBackend, DriveOptions
from pyvmm.block.formats.qcow2.driver import Qcow2Driver
from pyvmm.block.image_tool import check, convert, create, info, resize
from pyvmm.block.lane import READS, WRITES
from pyvmm.errors import ConfigError

MIB = 1 << 20
Open = Callable[..., BlockBackend]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    create(str(path), "qcow2", 4 * MIB)
    return path


def patched(path: Path, at: int, data: bytes) -> Path:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)
    return path


def refusal(drive: Open, path: Path, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        drive(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("at", "data", "words"),
    [
        (4, struct.pack(">I", 4), "version 4"),
        (20, struct.pack(">I", 8), "clusters of 2^8"),
        (20, struct.pack(">I", 63), "clusters of 2^63"),
        (24, struct.pack(">Q", 1 << 63), "larger than any"),
        (24, struct.pack(">Q", (1 << 63) - 512), "L1 table of 1 entries"),
        (32, struct.pack(">I", 2), "encrypted"),
        (36, struct.pack(">I", 0xFFFFFFFF), "L1 table of 4294967295"),
        (40, struct.pack(">Q", 1 << 62), "L1 table is not where"),
        (40, struct.pack(">Q", 65537), "L1 table is not where"),
        (48, struct.pack(">Q", 0), "refcount table is not where"),
        (56, struct.pack(">I", 0), "refcount table of 0"),
        (60, struct.pack(">I", 1 << 20), "internal snapshots are too many"),
        (72, struct.pack(">Q", 16), "extended L2"),
        (72, struct.pack(">Q", 1 << 40), "the feature 40"),
        (72, struct.pack(">Q", 2), "marked as corrupt"),
        (72, struct.pack(">Q", 4), "external data file"),
        (96, struct.pack(">I", 7), "2^7 bits"),
        (100, struct.pack(">I", 99), "header of 99 bytes"),
        (112, struct.pack(">II", 0xE2792ACA, 1 << 30), "longer than the header"),
        (8, struct.pack(">QI", 60000, 2000), "name of its backing file"),
    ],
)
def test_a_header_that_can_not_be_is_one_sentence(drive: Open, path: Path, at: int, data: bytes, words: str) -> None:
    assert words in refusal(drive, patched(path, at, data))


def test_a_file_cut_short_is_refused(drive: Open, path: Path) -> None:
    for length in (4, 71, 103, 112, 65536, 131072):
        whole_file = path.read_bytes()
        short = path.with_name(f"short{length}")
        short.write_bytes(whole_file[:length])
        assert "qcow2" in refusal(drive, short, format="qcow2")


def test_data_behind_the_files_end_is_an_error_and_no_zeros(path: Path) -> None:
    with Disk(path) as disk:
        assert write(disk, 0, b"x" * SECTOR) == 0
        assert write(disk, 128, b"y" * SECTOR) == 0
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 65536)
    with Disk(path, read_only=True) as disk:
        assert read(disk, 0, 1) == b"x" * SECTOR
        result = Result()
        disk.aio_readv(128, [memoryview(bytearray(SECTOR))], result)
        assert result.wait() < 0


# -- what it names -------------------------------------------------------------------------------------------


def test_backing_files_are_found_beside_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    base = tmp_path / "below" / "base:1.raw"
    base.write_bytes(b"b" * MIB)
    top = tmp_path / "top.qcow2"
    create(str(top), "qcow2", 2 * MIB, backing="below/base:1.raw")
    monkeypatch.chdir("/")
    with Disk(top) as disk:
        assert read(disk, 0, 1) == b"b" * SECTOR
        assert read(disk, 2047, 2) == b"b" * SECTOR + bytes(SECTOR)
        assert write(disk, 1, b"t" * SECTOR) == 0
    assert base.read_bytes() == b"b" * MIB
    assert whole(top, 2 * MIB)[: 3 * SECTOR] == b"b" * SECTOR + b"t" * SECTOR + b"b" * SECTOR


def test_images_that_stand_on_each_other_are_refused(drive: Open, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    create(str(one), "qcow2", MIB)
    create(str(two), "qcow2", MIB, backing="one")
    qemu_img("rebase", "-u", "-b", "./two", "-F", "qcow2", one)
    assert "stands on" in refusal(drive, one)
    qemu_img("rebase", "-u", "-b", "one", "-F", "qcow2", one)
    assert "stands on" in refusal(drive, one)


def test_layers_have_a_limit(drive: Open, tmp_path: Path) -> None:
    create(str(tmp_path / "0"), "qcow2", MIB)
    for n in range(1, 65):
        create(str(tmp_path / str(n)), "qcow2", MIB, backing=str(n - 1), backing_format="qcow2") if n < 65 else None
    drive(tmp_path / "60", read_only=True).close()
    create(str(tmp_path / "65"), "qcow2", MIB)
    qemu_img("rebase", "-u", "-b", "64", "-F", "qcow2", tmp_path / "65")
    assert "more than 64" in refusal(drive, tmp_path / "65")


@pytest.mark.parametrize("name", ["json:{}", "nowhere", "a\nb", "\x1b]0;x"])
def test_a_backing_file_that_can_not_be_opened_is_one_sentence(drive: Open, tmp_path: Path, name: str) -> None:
    top = tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", top, "1M")
    qemu_img("rebase", "-u", "-b", name, "-F", "raw", top)
    assert refusal(drive, top)


def test_no_filter_is_asked_for_by_a_name_in_an_image(drive: Open, tmp_path: Path) -> None:
    top = tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", top, "1M")
    qemu_img("rebase", "-u", "-b", "blkdebug:/etc/hostname:x", "-F", "raw", top)
    assert f"{tmp_path}/blkdebug:/etc/hostname:x does not exist" in refusal(drive, top)


@pytest.mark.parametrize("raw", [False, True])
def test_data_in_a_file_of_its_own(tmp_path: Path, raw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "disk.data"
    create(str(path), "qcow2", MIB, data_file="disk.data", data_file_raw=raw)
    with Disk(path) as disk:
        assert write(disk, 5, b"d" * SECTOR) == 0
        assert flush(disk) == 0
        result = Result()
        disk.aio_write_zeroes(256, 512, result)
        assert result.wait() == 0
        disk.aio_discard(1024, 128, discarded := Result())
        assert discarded.wait() == 0
    assert data.read_bytes()[5 * SECTOR : 6 * SECTOR] == b"d" * SECTOR
    assert data.stat().st_size == MIB
    monkeypatch.chdir(tmp_path)  # where QEMU looks for it
    told = qemu_img("check", path)
    assert "No errors" in told.stdout
    with Disk(path) as disk:
        assert read(disk, 0, 7) == bytes(5 * SECTOR) + b"d" * SECTOR + bytes(SECTOR)
    data.unlink()
    with pytest.raises(ConfigError, match=r"disk\.data does not exist"):
        Disk(path)


# -- how it was left -----------------------------------------------------------------------------------------


def test_a_dirty_image_is_repaired_before_it_is_written(path: Path) -> None:
    """As QEMU leaves one with lazy refcounts, when it is killed: tables without their refcounts."""
    with Disk(path) as disk:
        assert write(disk, 0, b"x" * SECTOR) == 0
    block = int.from_bytes(path.read_bytes()[65536 : 65536 + 8], "big")
    patched(path, block + 5 * 2, b"\0\0")  # the data's count
    patched(path, 72, struct.pack(">Q", 1))
    assert info(str(path), None)["dirty-flag"]
    assert check(str(path), None).errors
    with Disk(path, read_only=True) as disk:
        assert read(disk, 0, 1) == b"x" * SECTOR
    with Disk(path) as disk:
        assert write(disk, 1024, b"y" * SECTOR) == 0
    assert not info(str(path), None)["dirty-flag"]
    assert "No errors" in qemu_img("check", path).stdout
    assert whole(path, 4 * MIB)[:SECTOR] == b"x" * SECTOR


def test_a_snapshots_table_is_no_guests_data(path: Path) -> None:
    with Disk(path) as disk:
        assert write(disk, 0, b"x" * SECTOR) == 0
    qemu_img("snapshot", "-c", "one", path)
    with Disk(path) as disk:
        assert write(disk, 0, b"y" * SECTOR) == 0  # a table of the disk's own, and not of the snapshot's
    image = path.read_bytes()
    snapshots, l1 = (int.from_bytes(image[at : at + 8], "big") for at in (64, 40))
    theirs = int.from_bytes(image[snapshots : snapshots + 8], "big")
    table = int.from_bytes(image[l1 : l1 + 8], "big") & (1 << 56) - 512
    patched(path, table + 8, struct.pack(">Q", 1 << 63 | theirs))
    with Disk(path) as disk:
        assert write(disk, 128, b"z" * SECTOR) < 0
    assert info(str(path), None)["format-specific"]["data"]["corrupt"]
    assert path.read_bytes()[theirs : theirs + 65536] == image[theirs : theirs + 65536]


def test_all_clusters_of_the_snapshot_table_are_the_images_own(tmp_path: Path) -> None:
    path = tmp_path / "small"
    create(str(path), "qcow2", MIB, cluster_bytes=512)
    with Disk(path) as disk:
        assert write(disk, 0, b"x" * SECTOR) == 0
    for n in range(4):
        qemu_img("snapshot", "-c", f"{n}" * 200, path)
    with Disk(path) as disk:
        assert write(disk, 0, b"y" * SECTOR) == 0
    image = path.read_bytes()
    snapshots, l1 = (int.from_bytes(image[at : at + 8], "big") for at in (64, 40))
    table = int.from_bytes(image[l1 : l1 + 8], "big") & (1 << 56) - 512
    patched(path, table + 8, struct.pack(">Q", 1 << 63 | snapshots + 512))
    with Disk(path) as disk:
        assert write(disk, 1, b"z" * SECTOR) < 0
    assert info(str(path), None)["format-specific"]["data"]["corrupt"]
    assert path.read_bytes()[snapshots : snapshots + 1024] == image[snapshots : snapshots + 1024]


@pytest.mark.parametrize("known", [True, False], ids=["in memory", "loaded later"])
def test_a_new_table_is_no_guests_data_either(tmp_path: Path, known: bool) -> None:
    """An old entry leads to a cluster that counts as free, and there a table comes to be."""
    path = tmp_path / "small"
    create(str(path), "qcow2", 4 * MIB, cluster_bytes=4096)  # an L2 table maps 2 MiB
    with Disk(path) as disk:
        assert write(disk, 0, b"x" * 4096) == 0
    image = path.read_bytes()
    l1 = int.from_bytes(image[40:48], "big")
    table = int.from_bytes(image[l1 : l1 + 8], "big") & (1 << 56) - 512
    free = len(image) + 4096  # the first one that is taken is the data's, the next one the table's
    patched(path, len(image) + 4 * 4096 - 1, b"\0")
    patched(path, table + 8, struct.pack(">Q", 1 << 63 | free))
    with Disk(path) as disk:
        if known:
            assert read(disk, 0, 8) == b"x" * 4096
            assert write(disk, 2 * MIB // SECTOR, b"y" * 4096) < 0
        else:
            assert write(disk, 2 * MIB // SECTOR, b"y" * 4096) == 0
            assert flush(disk) == 0
            made = path.read_bytes()[free : free + 4096]
            assert int.from_bytes(made[:8], "big") == 1 << 63 | free - 4096
            assert write(disk, 8, b"z" * 4096) < 0
            assert path.read_bytes()[free : free + 4096] == made
    assert info(str(path), None)["format-specific"]["data"]["corrupt"]


def test_an_image_that_contradicts_itself_is_marked_and_written_no_more(path: Path) -> None:
    with Disk(path) as disk:
        assert write(disk, 0, b"x" * SECTOR) == 0
    with open(path, "rb") as file:
        file.seek(40)
        l1 = int.from_bytes(file.read(8), "big")
        file.seek(l1)
        table = int.from_bytes(file.read(8), "big") & (1 << 56) - 512
    patched(path, table + 8, struct.pack(">Q", 1 << 63 | l1))  # the second cluster's data is the L1 table
    with Disk(path) as disk:
        assert write(disk, 128, b"z" * SECTOR) < 0
        assert write(disk, 0, b"z" * SECTOR) < 0
    assert info(str(path), None)["format-specific"]["data"]["corrupt"]
    with pytest.raises(ConfigError, match="marked as corrupt"):
        Disk(path)
    with open(path, "rb") as file:
        file.seek(l1)
        assert int.from_bytes(file.read(8), "big") & (1 << 56) - 512 == table


def test_leaks_and_wrong_counts_are_found_and_mended(path: Path) -> None:
    with Disk(path) as disk:
        assert write(disk, 0, b"x" * 65536 * 3) == 0
    block = int.from_bytes(path.read_bytes()[65536 : 65536 + 8], "big")
    patched(path, block + 5 * 2, b"\0\5\0\0")
    patched(path, block + 1000 * 2, b"\0\1")
    found = check(str(path), None)
    assert (found.leaks, found.errors) == (2, 1)
    found = check(str(path), None, repair=True)
    assert (found.leaks_repaired, found.errors_repaired) == (2, 1)
    assert check(str(path), None).as_dict()["messages"] == []
    assert "No errors" in qemu_img("check", path).stdout


@pytest.mark.parametrize("entries", [[3], [2, 3, 4], list(range(1, 9)), list(range(1, 64))])
@pytest.mark.parametrize("dirty", [False, True])
def test_new_refcount_blocks_are_not_put_where_data_is(tmp_path: Path, entries: list[int], dirty: bool) -> None:
    """What QEMU leaves with lazy refcounts: data that no block counts yet, also where a block's own place would be."""
    raw, path = tmp_path / "raw", tmp_path / "lazy.qcow2"
    raw.write_bytes(Random(5).randbytes(MIB))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512,lazy_refcounts=on", raw, path)
    data = bytearray(path.read_bytes())
    table = int.from_bytes(data[48:56], "big")
    for entry in entries:
        data[table + 8 * entry : table + 8 * entry + 8] = bytes(8)
    if dirty:
        data[79] |= 1
    path.write_bytes(data)
    if dirty:
        with Disk(path):
            pass
    else:
        found = check(str(path), None, repair=True)
        assert found.errors > 200
        assert found.errors_repaired == found.errors
    qemu_img("check", path)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, path)


def test_what_can_be_mended_is_beside_what_can_not(path: Path) -> None:
    qemu_io(path, "write 0 128k")
    data = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", data, 40)
    (l2,) = struct.unpack_from(">Q", data, l1)
    l2 &= (1 << 56) - 512
    patched(path, l2 + 8, struct.pack(">Q", 1 << 50 | 1 << 63))  # leads nowhere, and its cluster is leaked
    patched(path, 72, struct.pack(">Q", 1))
    found = check(str(path), None, repair=True)
    assert (found.errors, found.errors_repaired, found.leaks, found.leaks_repaired) == (1, 0, 1, 1)
    left = check(str(path), None)
    assert (left.errors, left.leaks) == (1, 0)
    assert path.read_bytes()[72:80] == struct.pack(">Q", 1)


def test_a_longer_refcount_table_is_not_put_where_data_is(tmp_path: Path) -> None:
    """Of an image whose table was cut: all behind what it reaches has no counts, and is there."""
    raw, path = tmp_path / "raw", tmp_path / "cut.qcow2"
    raw.write_bytes(Random(6).randbytes(10 * MIB))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", raw, path)
    assert int.from_bytes(path.read_bytes()[56:60], "big") > 1
    patched(path, 56, struct.pack(">I", 1))
    check(str(path), None, repair=True)
    qemu_img("check", path)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, path)


def test_bitmaps_are_told_to_be_out_of_date(path: Path) -> None:
    qemu_img("bitmap", "--add", path, "b0")
    assert path.read_bytes()[95] == 1
    Disk(path).backend.close()
    assert path.read_bytes()[95] == 0


def test_it_is_in_use_while_it_is_open(path: Path) -> None:
    with Disk(path):
        with pytest.raises(ConfigError, match="in use"):
            Disk(path)
        with pytest.raises(ConfigError, match="in use"):
            check(str(path), None, repair=True)
        assert "lock" in qemu_img("check", path, statuses=(1,)).stderr
        assert info(str(path), None, locking=False)["format"] == "qcow2"
        with pytest.raises(ConfigError, match="in use"):
            create(str(path), "qcow2", MIB)


def test_what_is_written_is_in_the_file_when_the_machine_has_come_to_rest(path: Path) -> None:
    """A snapshot of the machine copies the image's identity then, and another process may take it over."""
    with Disk(path, cache="unsafe") as disk:
        assert write(disk, 0, b"x" * SECTOR) == 0
        disk.drain()
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())
        assert whole(copy, 4 * MIB)[:SECTOR] == b"x" * SECTOR
        disk.give_up()
        qemu_io(path, "write -P 7 65536 512", "write -P 8 2M 512")
        disk.claim()
        assert read(disk, 128, 1) == b"\7" * SECTOR
        assert write(disk, 129, b"y" * SECTOR) == 0
    assert "No errors" in qemu_img("check", path).stdout
    found = whole(path, 4 * MIB)
    assert found[65536 : 65536 + 1024] == b"\7" * 512 + b"y" * 512
    assert found[2 * MIB : 2 * MIB + 512] == b"\x08" * 512


# -- internal snapshots --------------------------------------------------------------------------------------


def test_an_internal_snapshot_is_read_by_name(drive: Open, path: Path) -> None:
    with Disk(path) as disk:
        assert write(disk, 0, b"1" * SECTOR) == 0
    qemu_img("snapshot", "-c", "first", path)
    with Disk(path) as disk:
        assert write(disk, 0, b"2" * SECTOR) == 0
    assert whole(path, 4 * MIB, internal_snapshot="first")[:SECTOR] == b"1" * SECTOR
    assert "has no internal snapshot 'second': it has '1' ('first')" in refusal(
        drive, path, read_only=True, internal_snapshot="second"
    )
    with pytest.raises(ConfigError, match="only read"):
        DriveOptions(path, internal_snapshot="1")
    kept = drive(path, internal_snapshot="1", snapshot=True)
    assert write(kept, 0, b"3" * SECTOR) == 0
    assert read(kept, 0, 1) == b"3" * SECTOR


# -- what was probed as raw ----------------------------------------------------------------------------------


def test_a_guest_makes_no_other_format_of_an_image_that_was_probed_as_raw(drive: Open, image: Path) -> None:
    header = b"QFI\xfb\0\0\0\3".ljust(SECTOR, b"\0")
    probed = drive()
    lane = probed.lane()
    assert lane is not None
    assert lane.kinds == READS | WRITES
    assert lane.writev(0, [header]) < 0
    assert write(probed, 0, header) == -1  # EPERM
    assert write(probed, 0, header[:100].rjust(SECTOR, b"x") + bytes(SECTOR)) == 0
    assert write(probed, 1, header) == 0
    probed.close()
    said = drive(format="raw")
    assert write(said, 0, header) == 0


# -- its size ------------------------------------------------------------------------------------------------


def test_a_disk_grows_while_it_is_open_and_shrinks_when_it_is_not(path: Path) -> None:
    with Disk(path) as disk:
        assert write(disk, 0, b"x" * SECTOR) == 0
        assert disk.resize(10 << 40)
        assert disk.size_bytes == 10 << 40
        assert write(disk, (9 << 40) // SECTOR, b"y" * SECTOR) == 0
    assert "No errors" in qemu_img("check", path).stdout
    with pytest.raises(ConfigError, match="--shrink"):
        resize(str(path), None, MIB)
    assert resize(str(path), None, MIB + 512, shrink=True) == (10 << 40, MIB + 512)
    assert "No errors" in qemu_img("check", path).stdout
    assert whole(path, MIB + 512)[:1024] == b"x" * SECTOR + bytes(512)
    with Disk(path) as disk, pytest.raises(ConfigError, match="can't grow"):
        disk.resize(1 << 62)


def test_a_disk_that_shrinks_leaves_its_snapshots_alone(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create(str(path), "qcow2", MIB, cluster_bytes=512)
    with Disk(path) as disk:
        assert write(disk, 0, bytes(range(256)) * (MIB // 256)) == 0
    qemu_img("snapshot", "-c", "full", path)
    with Disk(path) as disk:
        assert write(disk, 900, b"x" * 40 * SECTOR) == 0
    resize(str(path), None, 100 * SECTOR, shrink=True)
    assert "No errors" in qemu_img("check", path).stdout
    assert whole(path, MIB, internal_snapshot="full") == bytes(range(256)) * (MIB // 256)
    resize(str(path), None, MIB)
    assert whole(path, MIB) == bytes(range(256)) * 200 + bytes(MIB - 51200)
    assert path.stat().st_size < 3 * MIB


@pytest.mark.parametrize(("what", "skip"), [*(("write", n) for n in range(8)), ("flush", 0), ("flush", 2)])
def test_a_smaller_disk_that_fails_keeps_what_stands_before_its_end(tmp_path: Path, what: str, skip: int) -> None:
    path, rules, end = tmp_path / "disk.qcow2", tmp_path / "rules", 77 * SECTOR
    (tmp_path / "below.raw").write_bytes(b"b" * MIB)
    create(str(path), "qcow2", MIB, backing="below.raw", backing_format="raw", cluster_bytes=1024)
    with Disk(path) as disk:
        assert write(disk, 0, b"o" * 60 * SECTOR) == 0
        assert write(disk, 80, b"o" * 900 * SECTOR) == 0
    rules.write_text(f'[inject-error]\niotype = "{what}"\nskip = "{skip}"\nonce = "on"\n')
    with Disk(Path(f"blkdebug:{rules}:{path}")) as disk:
        try:
            disk.resize(end)
        except ConfigError as error:
            assert "can't become smaller" in str(error)
            assert disk.size_bytes == MIB
            disk.resize(end)
        assert disk.size_bytes == end
        assert read(disk, 0, 77) == b"o" * 60 * SECTOR + b"b" * 17 * SECTOR
        disk.resize(MIB)
        assert read(disk, 76, 5) == b"b" * SECTOR + bytes(4 * SECTOR)
    found = check(str(path), None)
    assert found.errors == 0


def test_growing_shows_nothing_of_what_lies_below(tmp_path: Path) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    base.write_bytes(b"b" * 2 * MIB)
    create(str(top), "qcow2", MIB, backing="base", backing_format="raw")
    resize(str(top), None, 2 * MIB)
    assert whole(top, 2 * MIB) == b"b" * MIB + bytes(MIB)


@pytest.mark.parametrize(("what", "skip"), [*(("write", n) for n in range(14)), *(("flush", n) for n in range(4))])
def test_a_growth_that_fails_has_not_been(tmp_path: Path, what: str, skip: int) -> None:
    """Nor is what could not be written taken for written when it is tried again."""
    path, rules, size = tmp_path / "disk.qcow2", tmp_path / "rules", 16 * MIB
    (tmp_path / "below.raw").write_bytes(b"b" * MIB)
    create(str(path), "qcow2", 33 * SECTOR, backing="below.raw", backing_format="raw", cluster_bytes=512)
    rules.write_text(f'[inject-error]\niotype = "{what}"\nskip = "{skip}"\nonce = "on"\n')
    with Disk(Path(f"blkdebug:{rules}:{path}")) as disk:
        with pytest.raises(ConfigError):
            disk.resize(size)
        assert disk.size_bytes == 33 * SECTOR
        assert disk.resize(size)
    assert info(str(path), None)["virtual-size"] == size
    assert whole(path, size) == b"b" * 33 * SECTOR + bytes(size - 33 * SECTOR)
    found = check(str(path), None)
    assert found.errors == 0
    assert not found.leaks or (what, skip) == ("write", 2)  # who knows whether a header that failed is there


def test_a_write_beside_the_end_waits_while_the_disk_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both copy the disk's last cluster: neither may undo what the other has done."""
    below, path = tmp_path / "below.raw", tmp_path / "disk.qcow2"
    below.write_bytes(b"b" * MIB)
    size = 3 * 65536 + 5 * SECTOR
    create(str(path), "qcow2", size, backing=below.name, backing_format="raw")
    result, fill = Result(), Qcow2Driver._co_fill
    with Disk(path) as disk:

        async def interrupted(driver: Qcow2Driver, *words: Any) -> None:
            monkeypatch.undo()
            disk.aio_writev(3 * 128 + 1, [memoryview(b"g" * SECTOR)], result)
            await fill(driver, *words)

        monkeypatch.setattr(Qcow2Driver, "_co_fill", interrupted)
        assert disk.resize(size + 20 * SECTOR)
        assert result.wait() == 0
        assert read(disk, 3 * 128, 25) == b"b" * SECTOR + b"g" * SECTOR + b"b" * 3 * SECTOR + bytes(20 * SECTOR)
    qemu_img("check", path)


@pytest.mark.parametrize("cluster_bytes", [512, 4096])
def test_refcounts_outgrow_their_table(tmp_path: Path, cluster_bytes: int) -> None:
    path = tmp_path / "small"
    create(str(path), "qcow2", 24 * MIB, cluster_bytes=cluster_bytes, refcount_bits=64)
    with Disk(path, cache="unsafe") as disk:
        for at in range(0, 24, 2):
            assert write(disk, at * 2048, bytes([at + 1]) * 2 * MIB) == 0
    assert "No errors" in qemu_img("check", path).stdout
    assert whole(path, 24 * MIB) == b"".join(bytes([at + 1]) * 2 * MIB for at in range(0, 24, 2))


def test_with_o_direct_it_is_the_same(path: Path) -> None:
    try:
        disk = Disk(path, cache="none")
    except ConfigError as error:
        assert "O_DIRECT" in str(error)  # a file system in memory, on an old kernel
        return
    with disk as backend:
        assert write(backend, 3, b"x" * 1024) == 0
        assert read(backend, 2, 4) == bytes(512) + b"x" * 1024 + bytes(512)
    assert "No errors" in qemu_img("check", path).stdout
    assert whole(path, 4 * MIB)[1536:2560] == b"x" * 1024


def test_a_copy_has_the_disk_and_nothing_below_it(tmp_path: Path, path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(b"b" * MIB)
    top, copy = tmp_path / "top", tmp_path / "copy"
    create(str(top), "qcow2", None, backing="base")
    with Disk(top) as disk:
        assert write(disk, 4, b"t" * SECTOR) == 0
    told: list[tuple[int, int]] = []
    convert(DriveOptions(top), str(copy), "qcow2", lambda done, of: told.append((done, of)), zstd=True)
    assert told == [(MIB, MIB)]
    assert "backing-filename" not in info(str(copy), None)
    qemu_img("compare", top, copy)
    convert(DriveOptions(copy), str(tmp_path / "raw"), "raw")
    assert (tmp_path / "raw").read_bytes() == b"b" * 2048 + b"t" * 512 + b"b" * (MIB - 2560)
    with pytest.raises(ConfigError, match="the image that is copied"):
        convert(DriveOptions(copy), str(copy), "raw")
