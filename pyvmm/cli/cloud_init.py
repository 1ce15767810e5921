"""``pyvmm run --cloud-init user=me,ssh-key=...``: the seed by which cloud-init makes a user in a cloud image.

cloud-init's data source NoCloud: a file system whose label is CIDATA with user-data, meta-data and network-config. They
are YAML, of which JSON is a part. The seed is an ISO image in memory: it goes with this process.
"""

from __future__ import annotations

import io
import os

from pyvmm.errors import ConfigError
from pyvmm.options import split_commas

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.block.options import DriveOptions

WORDS = ("user", "ssh-key", "password", "hostname")
METAVAR = "user=NAME[,ssh-key=KEY|FILE][,password=WORD][,hostname=NAME]"
LABEL = "CIDATA"
KEY_KINDS = ("ssh-", "ecdsa-", "sk-")


def parse_words(text: str) -> dict[str, list[str]]:
    """{word: its values}; only ssh-key may come more than once. ConfigError."""
    found: dict[str, list[str]] = {}
    for item in split_commas(text):
        name, equals, value = item.partition("=")
        if name not in WORDS or not equals or not value or not value.isprintable():
            raise ConfigError(f"--cloud-init {item!r}: give {METAVAR}")
        if name in found and name != "ssh-key":
            raise ConfigError(f"--cloud-init: {name} is given twice")
        found.setdefault(name, []).append(value)
    if "user" not in found:
        raise ConfigError("--cloud-init makes a user: give user=NAME, and ssh-key= or password= to log in by")
    if "ssh-key" not in found and "password" not in found:
        raise ConfigError(f"--cloud-init user={found['user'][0]}: nobody could log in: give ssh-key= or password= too")
    return found


def key_text(value: str) -> str:
    """A public key: itself, or that of a file. ConfigError."""
    if value.startswith(KEY_KINDS) and " " in value:
        return value
    path = os.path.expanduser(value)
    try:
        with open(path) as file:
            text = file.read(65536).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--cloud-init ssh-key={value}: it is no key, and no file of one: {error}") from None
    if not text.startswith(KEY_KINDS):
        raise ConfigError(f"--cloud-init ssh-key={value}: that is no public key: give the file whose name ends in .pub")
    return text


def seed_files(text: str) -> dict[str, str]:
    """user-data, meta-data and network-config for the words of the option. ConfigError."""
    import json
    from hashlib import sha256

    words = parse_words(text)
    name = words["user"][0]
    hostname = words.get("hostname", ["pyvmm"])[0]
    user: dict[str, Any] = {"name": name, "shell": "/bin/bash", "sudo": "ALL=(ALL) NOPASSWD:ALL"}
    data: dict[str, Any] = {"users": [user], "hostname": hostname, "ssh_pwauth": "password" in words}
    if "ssh-key" in words:
        user["ssh_authorized_keys"] = [key_text(value) for value in words["ssh-key"]]
    if "password" in words:
        user["lock_passwd"] = False
        user["plain_text_passwd"] = words["password"][0]
        data["chpasswd"] = {"expire": False}
    user_data = "#cloud-config\n" + json.dumps(data) + "\n"
    # Of the same words the same instance: cloud-init does its work once for each.
    instance = "pyvmm-" + sha256(user_data.encode()).hexdigest()[:16]
    network = {"version": 2, "ethernets": {"all": {"match": {"name": "e*"}, "dhcp4": True, "optional": True}}}
    return {
        "user-data": user_data,
        "meta-data": json.dumps({"instance-id": instance, "local-hostname": hostname}) + "\n",
        "network-config": json.dumps(network) + "\n",
    }


def seed_image(files: dict[str, str]) -> bytes:
    """An ISO 9660 image of them, with names as they are by Rock Ridge and Joliet. ConfigError without pycdlib."""
    try:
        from pycdlib import PyCdlib
    except ImportError:
        raise ConfigError(
            "--cloud-init makes an ISO image by pycdlib: pip install 'pyvmm-kvm[cloud]', or make one yourself"
            f" (label {LABEL}) and give it as a drive"
        ) from None
    iso = PyCdlib()
    iso.new(interchange_level=3, vol_ident=LABEL, joliet=3, rock_ridge="1.09")
    for number, (name, text) in enumerate(files.items()):
        data = text.encode()
        iso.add_fp(io.BytesIO(data), len(data), f"/SEED{number}.;1", rr_name=name, joliet_path=f"/{name}")
    out = io.BytesIO()
    iso.write_fp(out)
    iso.close()
    return out.getvalue()


def seed_drive(text: str) -> DriveOptions:
    """A read-only drive with the seed. Its memory is this process's to the end. ConfigError."""
    from pyvmm.block.options import DriveOptions

    image = seed_image(seed_files(text))
    fd = os.memfd_create("cloud-init")
    with open(fd, "wb", closefd=False) as file:
        file.write(image)
    return DriveOptions(f"/proc/self/fd/{fd}", format="raw", interface="virtio", read_only=True, id="cloud-init")
