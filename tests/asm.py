"""Assembly for test guests: GNU as and ld, the result kept by the hash of what went in.

``assemble(source, mode)`` puts kvm/common.inc before the source (and makes the other .inc files there
includable), links it at the address where Machine's ``flat`` starts such a guest, and gives bytes and symbols.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
INCLUDES = HERE / "kvm"
CACHE = Path(os.environ.get("PYVMM_CACHE", HERE.parent / ".cache")) / "asm"
CODE_DIRECTIVE = {"real16": ".code16", "protected32": ".code32", "long64": ".code64"}
ADDRESS = {"real16": 0x7C00, "protected32": 0x10_0000, "long64": 0x10_0000}


class Program:
    """``image`` starts at ``address``; ``symbols`` has every label's address."""

    def __init__(self, image: bytes, address: int, symbols: dict[str, int]) -> None:
        self.image = image
        self.address = address
        self.symbols = symbols


def assemble(source: str, mode: str = "long64", address: int | None = None) -> Program:
    """AssertionError with as's or ld's words for what is no assembly."""
    address = ADDRESS[mode] if address is None else address
    text = f'{CODE_DIRECTIVE[mode]}\n.include "common.inc"\n{source}\n'
    key = hashlib.sha256(f"{address:#x}\n{text}".encode())
    for include in sorted(INCLUDES.glob("*.inc")):
        key.update(include.read_bytes())
    kept = CACHE / f"{key.hexdigest()[:32]}.json"
    if not kept.exists():
        build(text, address, kept)
    made = json.loads(kept.read_text())
    return Program(bytes.fromhex(made["image"]), address, made["symbols"])


def build(text: str, address: int, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        obj, elf, image = (str(Path(directory, name)) for name in ("guest.o", "guest.elf", "guest.bin"))
        tool("as", "--64", "-I", str(INCLUDES), "-o", obj, "-", source=text)
        tool("ld", "-melf_x86_64", "-N", "-e0", "--no-warn-rwx-segments", f"-Ttext={address:#x}", "-o", elf, obj)
        tool("objcopy", "-O", "binary", elf, image)
        listed = tool("nm", elf)
        symbols = {name: int(value, 16) for value, _kind, name in (line.split() for line in listed.splitlines())}
        made = json.dumps({"image": Path(image).read_bytes().hex(), "symbols": symbols})
        # Renamed into place: another run of the tests may be making the same.
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(made)
        partial.rename(kept)


def tool(*command: str, source: str = "") -> str:
    ran = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{command[0]}: {ran.stderr}"
    return ran.stdout
