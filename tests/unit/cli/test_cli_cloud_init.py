"""--cloud-init: the seed that cloud-init's NoCloud finds, and what is no seed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pycdlib import PyCdlib

from pyvmm.cli import main
from pyvmm.cli.cloud_init import seed_drive, seed_files, seed_image
from pyvmm.cli.run import configure
from pyvmm.errors import ConfigError

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA me@here"


def cloud_config(text: str) -> dict[str, object]:
    begin, _, rest = text.partition("\n")
    assert begin == "#cloud-config"
    found = json.loads(rest)
    assert isinstance(found, dict)
    return found


def test_what_the_seed_says(tmp_path: Path) -> None:
    key = tmp_path / "id.pub"
    key.write_text(KEY + "\n")
    files = seed_files(f"user=me,ssh-key={key},ssh-key={KEY} too,password=a: b,,#,hostname=box")
    data = cloud_config(files["user-data"])
    assert data["users"] == [
        {
            "name": "me", "shell": "/bin/bash", "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "ssh_authorized_keys": [KEY, f"{KEY} too"], "lock_passwd": False, "plain_text_passwd": "a: b,#",
        }
    ]  # fmt: skip
    assert data["ssh_pwauth"] is True
    meta = json.loads(files["meta-data"])
    assert meta["local-hostname"] == "box" and meta["instance-id"].startswith("pyvmm-")
    assert json.loads(files["network-config"])["version"] == 2


def test_the_same_words_are_the_same_instance() -> None:
    one, same, other = (seed_files(f"user=me,password={word}")["meta-data"] for word in ("a", "a", "b"))
    assert one == same != other


def test_the_image_has_the_label_and_the_names(tmp_path: Path) -> None:
    image = seed_image(seed_files("user=me,password=x"))
    iso = PyCdlib()
    iso.open_fp(io.BytesIO(image))
    assert iso.pvd.volume_identifier.decode().strip() == "CIDATA"
    names = ("meta-data", "network-config", "user-data")
    for place in ("joliet_path", "rr_path"):
        for name in names:
            out = io.BytesIO()
            iso.get_file_from_iso_fp(out, **{place: f"/{name}"})
            assert out.getvalue().decode() == seed_files("user=me,password=x")[name]
    iso.close()
    blkid = tmp_path / "seed.iso"
    blkid.write_bytes(image)
    told = subprocess.run(["/sbin/blkid", "-p", "-o", "export", blkid], capture_output=True, text=True).stdout
    assert "LABEL=CIDATA" in told and "TYPE=iso9660" in told


def test_it_is_a_drive_that_nobody_writes() -> None:
    given: dict[str, object] = {"kernel": "vmlinuz", "images": ["disk.img"], "cloud_init": "user=me,password=x"}
    config = configure(given)
    drives = config.drives
    assert drives[0].file == "disk.img"
    seed = drives[-1]
    assert seed.read_only and seed.interface == "virtio" and seed.id == "cloud-init"
    assert Path(str(seed.file)).read_bytes()[32768 + 1 : 32768 + 6] == b"CD001"
    assert seed_drive("user=me,password=x").format == "raw"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "give user=NAME"),
        ("user=me", "nobody could log in"),
        ("password=x", "give user=NAME"),
        ("user=me,pass=x", "'pass=x': give user=NAME"),
        ("user=me,user=you,password=x", "given twice"),
        ("user=me,ssh-key=/nowhere/id.pub", "no file of one"),
        ("user=me,ssh-key=/etc/hostname", "no public key"),
        ("user=m\ne,password=x", "give user=NAME"),
    ],
)
def test_what_is_no_seed(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        seed_files(words)


def test_without_pycdlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycdlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'pyvmm-kvm\[cloud\]'"):
        seed_drive("user=me,password=x")


def test_it_is_for_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--cloud-init", "user=me,password=x", "--print-config", "disk.img"]) == 2
    assert "leave it or --print-config out" in capsys.readouterr().err
