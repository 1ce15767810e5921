"""``pyvmm image``: tell of disk images, make, copy, check and resize them. The work is block/image_tool.py's."""

from __future__ import annotations

import sys

from pyvmm.block import image_tool
from pyvmm.block.options import DriveOptions, count
from pyvmm.cli.options import Option, parse, usage
from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

HELP = Option("--help -h", "", "this")
FORMAT = Option("--format -f", "FORMAT", "raw or qcow2; without it as the image begins")
JSON = Option("--json", "", "as JSON, with qemu-img's names")
PROGRESS = Option("--progress -p", "", "say how far it is, on standard error")
NEW = (
    Option("--cluster-size", "SIZE", "bytes a cluster of qcow2, 512 to 2M (default 64k)", count),
    Option("--compat", "VERSION", "0.10 for qcow2 of version 2, else 1.1"),
    Option("--refcount-bits", "N", "bits a refcount (default 16)", int),
    Option("--zstd", "", "clusters that others compress are zstd's, not zlib's"),
    Option("--lazy-refcounts", "", "QEMU may postpone refcounts"),
    Option("--preallocation", "WHAT", "off, or metadata, falloc or full: what is there from the start"),
    Option("--data-file", "PATH", "keep the data in a file of its own, beside the image"),
    Option("--data-file-raw", "", "which is a raw image at any moment"),
)

TITLE = """\
usage: pyvmm image VERB [OPTIONS] IMAGE...

  info IMAGE             what it is: format, sizes, backing file, internal snapshots
  create IMAGE [SIZE]    a new one; with --backing the size may be left out
  convert IMAGE TO       a copy of the disk in it, in another format, standing on nothing
  check IMAGE            whether a qcow2 image agrees with itself
  resize IMAGE SIZE      another size for the disk; +SIZE: so much more

SIZE in bytes, or with k, M, G or T. `pyvmm image VERB --help` lists what a verb takes. docs/images.md has examples.
"""


def image(args: list[str]) -> int:
    verb = args[0] if args else "--help"
    if verb in ("--help", "-h", "help"):
        print(TITLE, end="")
        return 0 if args else 2
    if verb not in VERBS:
        raise ConfigError(f"there is no pyvmm image {verb}: use {', '.join(VERBS)}")
    options, words, work = VERBS[verb]
    # An option that stands behind the image's name is one too.
    given = parse([*options, HELP], named(args[1:], [*options, HELP]), verb=f"image {verb}")
    if given.get("help"):
        print(usage(f"usage: pyvmm image {verb} [OPTIONS] {words}", [*options, HELP]), end="")
        return 0
    return work(given, given.get("word", []), f"pyvmm image {verb} {words}")


def named(args: list[str], options: list[Option]) -> list[str]:
    """Words that are no options, as options: what is left to ``parse`` has names only."""
    takes = {name: bool(option.metavar) for option in options for name in option.names}
    found: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            found += [f"{WORD}={each}" for each in rest]
            break
        if word.startswith("-") and len(word) > 1:
            found.append(word)
            if takes.get(word) and rest:
                found.append(rest.pop(0))
        else:
            found.append(f"{WORD}={word}")
    return found


WORD = "--word"
WORDS = Option(WORD, "WORD", "what is no option", many=True)


def wanted(words: list[str], least: int, most: int, line: str) -> list[str | None]:
    if not least <= len(words) <= most:
        raise ConfigError(f"give {line}, not {len(words)} words" if words else f"give {line}")
    return [*words, *[None] * (most - len(words))]


def size_of(text: str) -> int:
    try:
        return count(text)
    except ValueError as error:
        raise ConfigError(f"the size {text}: {error}") from None


def bar(given: dict[str, Any]) -> Callable[[int, int], object] | None:
    """Percents on standard error, a line that is written over."""
    if not given.get("progress"):
        return None
    said = [-1]

    def progress(done: int, of: int) -> None:
        percent = done * 100 // of if of else 100
        if percent != said[0]:
            said[0] = percent
            print(f"\r{percent:3d}%", end="\n" if done >= of else "", file=sys.stderr, flush=True)

    return progress


def as_json(found: object) -> None:
    import json

    print(json.dumps(found, indent=4))


# -- verbs ---------------------------------------------------------------------------------------------------


def info(given: dict[str, Any], words: list[str], line: str) -> int:
    (path,) = wanted(words, 1, 1, line)
    assert path is not None
    found = image_tool.info(path, given.get("format"), locking=not given.get("force_share"))
    if given.get("json"):
        as_json(found)
        return 0
    special = found.pop("format-specific", {}).get("data", {})
    snapshots = found.pop("snapshots", [])
    for name, value in (found | special).items():
        if value is not False:
            shown = f"{value} ({human(value)})" if name.endswith("-size") and isinstance(value, int) else value
            print(f"{name.replace('-', ' '):<24}{printable(str(shown))}")
    for one in snapshots:
        print(f"{'internal snapshot':<24}{printable(one['id'])}: {printable(one['name'])}")
    return 0


def printable(text: str) -> str:
    """Names out of an image: nothing of them is a terminal's command."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.encode(errors="replace").decode())


def human(size: int) -> str:
    value, unit = float(size), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if value < 1024 or unit == "EiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def features(given: dict[str, Any], format: str) -> dict[str, Any]:
    """NewImage's words."""
    found: dict[str, Any] = {
        "cluster_bytes": given.get("cluster_size"),
        "refcount_bits": given.get("refcount_bits"),
        "preallocation": given.get("preallocation"),
        "data_file": given.get("data_file"),
        "zstd": given.get("zstd"),
        "lazy_refcounts": given.get("lazy_refcounts"),
        "data_file_raw": given.get("data_file_raw"),
    }
    compat = given.get("compat")
    if compat is not None:
        found["version"] = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}.get(compat, 0)
    return {name: value for name, value in found.items() if value is not None}


def create(given: dict[str, Any], words: list[str], line: str) -> int:
    path, size = wanted(words, 1, 2, line)
    assert path is not None
    format = given.get("format", "qcow2")
    if size is None and "backing" not in given:
        raise ConfigError(f"{path}: give its size, or --backing with a file that it is to stand on")
    made = image_tool.create(
        path,
        format,
        None if size is None else size_of(size),
        backing=given.get("backing"),
        backing_format=given.get("backing_format"),
        **features(given, format),
    )
    print(f"{path}: {format}, a disk of {made} bytes ({human(made)})")
    return 0


def convert(given: dict[str, Any], words: list[str], line: str) -> int:
    old, new = wanted(words, 2, 2, line)
    assert new is not None
    source = DriveOptions(
        old, format=given.get("format"), read_only=True, internal_snapshot=given.get("internal_snapshot")
    )
    format = given.get("to", "qcow2")
    image_tool.convert(source, new, format, bar(given), **features(given, format))
    return 0


def check(given: dict[str, Any], words: list[str], line: str) -> int:
    (path,) = wanted(words, 1, 1, line)
    assert path is not None
    found = image_tool.check(path, given.get("format"), repair=bool(given.get("repair")), progress=bar(given))
    if given.get("json"):
        as_json({"filename": path, "format": "qcow2", **found.as_dict()})
    else:
        for each in found.told:
            print(each)
        left = found.errors - found.errors_repaired, found.leaks - found.leaks_repaired
        print(f"{path}: {found.errors} errors, {found.leaks} leaked clusters"
              + (f"; {left[0]} and {left[1]} are left" if given.get("repair") else ""))  # fmt: skip
        print(f"{found.allocated} of {found.total} clusters are there, {found.compressed} of them compressed")
    # As qemu-img check: 2 for errors, 3 for leaks alone.
    if found.errors > found.errors_repaired:
        return 2
    return 3 if found.leaks > found.leaks_repaired else 0


def resize(given: dict[str, Any], words: list[str], line: str) -> int:
    path, text = wanted(words, 2, 2, line)
    assert path is not None
    assert text is not None
    size = size_of(text.lstrip("+"))
    if text.startswith("+"):
        size += int(image_tool.info(path, given.get("format"))["virtual-size"])
    before, now = image_tool.resize(path, given.get("format"), size, shrink=bool(given.get("shrink")))
    print(f"{path}: {before} bytes before, {now} bytes ({human(now)}) now")
    return 0


SNAPSHOT = Option("--internal-snapshot", "ID", "the disk of a snapshot inside of it, by ID or name")
VERBS: dict[str, tuple[tuple[Option, ...], str, Callable[[dict[str, Any], list[str], str], int]]] = {
    "info": (
        (FORMAT, JSON, Option("--force-share -U", "", "also while somebody uses it"), WORDS), "IMAGE", info),
    "create": (
        (
            Option("--format -f", "FORMAT", "raw or qcow2 (default qcow2)"),
            Option("--backing -b", "IMAGE", "what it stands on: its path, as seen from where the new image is"),
            Option("--backing-format -F", "FORMAT", "of that one; without it as it begins, and written down"),
            *NEW,
            WORDS,
        ),
        "IMAGE [SIZE]", create),
    "convert": (
        (FORMAT, Option("--to -O", "FORMAT", "raw or qcow2 (default qcow2)"), SNAPSHOT, PROGRESS, *NEW, WORDS),
        "IMAGE TO", convert),
    "check": (
        (FORMAT, JSON, PROGRESS, Option("--repair -r", "", "make refcounts what the tables say"), WORDS),
        "IMAGE", check),
    "resize": ((FORMAT, Option("--shrink", "", "it may become smaller"), WORDS), "IMAGE SIZE", resize),
}  # fmt: skip
