"""QEMU's options, for fingers that know them: ours in their place, or one sentence. Imported when one is met.

Meanings are those of QEMU's manual ("Invocation"). Both spellings count, -option and --option.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

# They ask for what is so here anyway, and are dropped.
NOTHING = {"nographic", "enable-kvm", "nodefaults", "no-user-config", "no-hpet"}
# Flags that are several words here.
FLAGS = {"s": ("--gdb", "1234"), "S": ("--wait-gdb",)}
# Things that are not there: "none" asks for nothing, and any other value is refused.
ABSENT = {
    "display": "a display",
    "vnc": "a display",
    "monitor": "the monitor",
    "parallel": "a parallel port",
    "audiodev": "sound",
    "audio": "sound",
}
# Refused, with what to do instead.
NET_INSTEAD = "use --net, which is the card and what it is joined to: --net tap=NAME, passt or unix=PATH"
INSTEAD = {
    **dict.fromkeys(("netdev", "netdev_add"), NET_INSTEAD),
    **dict.fromkeys(("virtfs", "fsdev"), "use --share tag=NAME,path=FOLDER: the guest mounts it by virtiofs, not 9p"),
    "blockdev": "use --drive file=...",
    "pflash": "use --firmware FILE; flash that keeps what is written to it is not there yet",
    "L": "use --firmware FILE",
    "option-rom": "leave it out: pyvmm brings its own for --kernel with firmware",
    "loadvm": "use --restore FILE: a snapshot is a file of its own here, no part of an image",
    "readconfig": "use --config FILE, in TOML or JSON",
    "mem-path": "use --huge-pages 2M or 1G",
    "mem-prealloc": "use --huge-pages 2M or 1G",
    "D": "leave it out: there is no log of that kind; --exit-stats tells what exits cost",
    "d": "leave it out: there is no log of that kind; --exit-stats tells what exits cost",
    "daemonize": "start it with `&`, or by systemd-run, and give --serial none, pty or file:PATH",
    "pidfile": "start it with `&`: the shell's $! is its pid",
    "qtest": "use `pyvmm qtest --connect PATH`",
    "version": "use `pyvmm --version`",
}
# Options of QEMU's with one dash that are something else than ours of that name.
OTHERS = {
    "trace": "QEMU's trace events are not there: `--trace FILE`, with two dashes, writes what it does into FILE",
}
NOT_YET = {
    **dict.fromkeys(("qmp-pretty", "mon"), "QMP of that kind is"),
    **dict.fromkeys(("fda", "fdb"), "a floppy drive is"),
    **dict.fromkeys(("usb", "usbdevice"), "USB is"),
    **dict.fromkeys(("sdl", "curses", "spice", "full-screen"), "a display is"),
    "chardev": "a chardev by name is",
    "object": "an object by name is",
    "set": "setting a device's properties is",
    "numa": "NUMA is",
    "smbios": "an SMBIOS table of one's own is",
    "acpitable": "an ACPI table of one's own is",
    "no-acpi": "a machine without ACPI is",
    "no-shutdown": "staying after the guest's end is",
    "tpmdev": "a TPM is",
    "sd": "an SD card is",
    "sandbox": "the sandbox is",
    "icount": "counting instructions is",
    "watchdog-action": "a watchdog is",
    "watchdog": "a watchdog is",
    "overcommit": "locking memory is",
    "soundhw": "sound is",
    "msg": "setting the form of messages is",
    "dtb": "a device tree is",
    "runas": "changing the user is",
    "chroot": "changing the root is",
    "plugin": "a plugin is",
}
DRIVES = {"hda": 0, "hdb": 1, "hdc": 2, "hdd": 3}
# Properties of -machine that say what is so, or ask for nothing, with the values for which that holds.
HARMLESS = {
    **dict.fromkeys(("usb", "vmport", "hpet", "smm", "graphics", "sata", "nvdimm", "hmat"), "off"),
    **dict.fromkeys(("acpi", "pic", "pit", "isa-serial", "i8042", "dump-guest-core", "mem-merge"), "on"),
}
CONSOLES = ("none", "stdio", "pty")
ISA_DEBUG_EXIT_PORT = "0x501"  # where QEMU has it unless iobase= says otherwise


def rewrite(word: str, rest: Sequence[str], known: Collection[str], verb: str) -> list[str]:
    """``word``, which is no option of ours, and the words after it, in our words. ConfigError where there are none."""
    name, equals, attached = word.lstrip("-").partition("=")
    if not word.startswith("--"):
        name, equals, attached = word[1:], "", ""
    ours = "--" + name.replace("_", "-")
    if name in OTHERS and not word.startswith("--"):
        raise ConfigError(f"{word}: {OTHERS[name]}")
    if ours in known and ours != word.partition("=")[0]:
        return [ours + equals + attached, *rest]
    if name in NOTHING:
        return list(rest)
    if name in FLAGS:
        return [*FLAGS[name], *rest]
    taken = equals or name in NOT_YET or name in INSTEAD
    if not taken and name in (*TRANSLATED, *DRIVES, *ABSENT) and not rest:
        raise ConfigError(f"{word} needs a value")
    value, rest = (attached, rest) if taken else ((rest[0] if rest else ""), rest[1:])
    if name in TRANSLATED:
        return [*TRANSLATED[name](value), *rest]
    if name in DRIVES:
        return ["--drive", f"file={value.replace(',', ',,')},index={DRIVES[name]},media=disk", *rest]
    if name in ABSENT and value == "none":
        return list(rest)
    raise ConfigError(refusal(word.partition("=")[0], name, value, known, verb))


def refusal(word: str, name: str, value: str, known: Collection[str], verb: str) -> str:
    if name in ABSENT:
        console = ", the guest's serial console is on this terminal" if ABSENT[name] == "a display" else ""
        return f"{word} {value}: {ABSENT[name]} is not there yet: leave it out{console}"
    if name in NOT_YET:
        return f"{word}: {NOT_YET[name]} not there yet: leave it out"
    if name in INSTEAD:
        return f"{word}: {INSTEAD[name]}"
    near = nearest(name, known)
    if near:
        return f"there is no option {word}: did you mean {near}?"
    return f"there is no option {word}: `pyvmm {verb} --help` lists them"


def nearest(name: str, known: Collection[str]) -> str:
    """The option that a slip of the finger, or a word cut short, makes of ``name``; "" where that is a guess."""
    import difflib

    long = [option.removeprefix("--") for option in known if option.startswith("--")]
    begins = [option for option in long if len(name) >= 3 and option.startswith(name)]
    if len(begins) == 1:
        return f"--{begins[0]}"
    close = difflib.get_close_matches(name, long, 1, 0.8) if len(name) >= 3 else []
    return f"--{close[0]}" if close else ""


def split(text: str, first: str) -> dict[str, str]:
    """'a,b=c' as {first: 'a', 'b': 'c'}; a flag without a value is on."""
    from pyvmm.options import split_commas

    values: dict[str, str] = {}
    for n, item in enumerate(split_commas(text)):
        key, equals, value = item.partition("=")
        if equals:
            values[key] = value
        elif n == 0:
            values[first] = item
        else:
            values[item] = "on"
    return values


# -- QEMU's words for the values of options that we have -----------------------------------------------------


def value_words(option: str, text: str) -> list[str] | None:
    """``option text`` in our words; None where they are ours already."""
    meanings = {
        "--machine": machine,
        "--memory": memory,
        "--cpus": cpus,
        "--serial": lambda text: console("--serial", text),
        "--debugcon": lambda text: console("--debugcon", text),
        "--fw-cfg": fw_cfg,
        "--net": net,
        "--qmp": qmp,
        "--name": name,
    }
    words = meanings[option](text) if option in meanings else None
    return None if words == [option, text] else words


def machine(text: str) -> list[str]:
    values = split(text, "type")
    kind = values.pop("type", None)
    words = [] if kind is None else ["--machine", kind]
    for key, value in values.items():
        if key == "accel":
            words += accel(value)
        elif key.replace("_", "-") == "kernel-irqchip":
            words += irqchip(value)
        elif HARMLESS.get(key) != value:
            raise ConfigError(f"--machine {key}={value} is not there yet: leave it out")
    return words


def accel(text: str) -> list[str]:
    if text == "qtest":
        raise ConfigError("accel qtest: use `pyvmm qtest`, which is that, and leave it out")
    values = split(text, "accel")
    if "kvm" not in values.pop("accel", "kvm").split(":"):
        raise ConfigError(f"accel {text}: pyvmm runs guests by KVM only: give kvm, or leave it out")
    words: list[str] = []
    for key, value in values.items():
        if key.replace("_", "-") != "kernel-irqchip":
            raise ConfigError(f"accel kvm,{key}={value}: that is not there yet: leave it out")
        words += irqchip(value)
    return words


def irqchip(value: str) -> list[str]:
    if value not in ("on", "off"):
        raise ConfigError(f"kernel-irqchip={value} is not there yet: use --irqchip kernel or off")
    return ["--irqchip", "kernel" if value == "on" else "off"]


def memory(text: str) -> list[str]:
    values = split(text, "size")
    if set(values) - {"size"}:
        raise ConfigError(f"--memory {text}: memory that is added later is not there yet: give the size alone")
    return ["--memory", values.get("size", "")]


def cpus(text: str) -> list[str]:
    values = split(text, "cpus")
    parts = [values.pop(name, None) for name in ("sockets", "dies", "clusters", "cores", "threads")]
    try:
        product = 1
        for part in parts:
            product *= int(part or "1")
        count = int(values.pop("cpus", str(product)))
        most = int(values.pop("maxcpus", str(count)))
    except ValueError:
        raise ConfigError(f"--cpus {text}: give numbers") from None
    if values:
        raise ConfigError(f"--cpus {text}: {next(iter(values))} is not there yet: leave it out")
    if most != count:
        raise ConfigError(f"--cpus {text}: vCPUs that are added later are not there yet: leave maxcpus out")
    if any(parts) and product != count:
        raise ConfigError(f"--cpus {text}: sockets, cores and threads make {product} vCPUs, not {count}")
    return ["--cpus", str(count)]


def qmp(text: str) -> list[str]:
    """QEMU's -qmp unix:PATH,server=on,wait=off, which ours is."""
    if not text.startswith(("unix:", "tcp:", "stdio", "chardev:", "vc", "pipe:")):
        return ["--qmp", text]
    values = split(text, "path")
    path = values.pop("path", "")
    words = [f"{key}={value}" for key, value in values.items()]
    if not path.startswith("unix:") or set(words) - {"server=on", "wait=off", "nowait=on"} or "server=on" not in words:
        raise ConfigError(f"--qmp {text} is not there yet: give the path of a Unix socket that is to be made")
    return ["--qmp", path.removeprefix("unix:")]


def name(text: str) -> list[str]:
    """QEMU's -name [guest=]NAME,debug-threads=on: threads have their names anyway."""
    values = split(text, "guest")
    guest = values.pop("guest", "")
    values.pop("debug-threads", None)
    for key, value in values.items():
        raise ConfigError(f"--name {key}={value} is not there yet: leave it out")
    return ["--name", guest]


def console(option: str, text: str) -> list[str]:
    """QEMU's -serial: what can follow it that is ours, too."""
    plain = text.removeprefix("mon:")
    if plain == "null":
        plain = "none"
    if plain not in CONSOLES and not (plain.startswith("file:") and len(plain) > len("file:")):
        raise ConfigError(f"{option} {text} is not there yet: use stdio, none, pty or file:PATH")
    return [option, plain]


def fw_cfg(text: str) -> list[str]:
    """[name=]NAME,file=FILE. Ours, NAME=FILE, has no comma before its last part."""
    name, comma, source = text.rpartition(",")
    if comma and source.startswith("string="):
        raise ConfigError(f"--fw-cfg {text}: text on the command line is not there yet: put it into a file, file=FILE")
    if comma and source.startswith("file="):
        return ["--fw-cfg", f"{name.removeprefix('name=')}={source.removeprefix('file=')}"]
    return ["--fw-cfg", text]


NOT_THERE = {
    "user": "QEMU's own network is not there: use --net passt",
    "bridge": "there is no helper for that: use --net tap=NAME,bridge=BRIDGE as root, or a tap that is there",
    "nic": "a card says itself what it is joined to: use --net tap=NAME, passt or unix=PATH, with mac=...",
}
# Of a tap or a card, what is so anyway; and what has another name here.
NET_SO_ANYWAY = {"script": ("no",), "downscript": ("no",), "vhost": ("off",), "vnet_hdr": ("on",), "id": None}
NET_OURS = {"mac": "mac", "macaddr": "mac", "queues": "queues", "mtu": "mtu", "server": "server"}


def net(text: str) -> list[str]:
    """-nic's and -net's: which of QEMU's networks are ours too."""
    from pyvmm.net.options import KINDS, WITH_VALUE

    first, equals, _ = text.split(",", 1)[0].partition("=")
    if first == "none" or (first in KINDS and bool(equals) == (first in WITH_VALUE)):
        return ["--net", text]
    values = split(text, "type")
    kind = values.pop("type", "")
    if kind in NOT_THERE:
        raise ConfigError(f"--net {text}: {NOT_THERE[kind]}{forwards(values) if kind == 'user' else ''}")
    if kind == "tap" and "fd" in values:
        words = ["fd=" + values.pop("fd")]
    elif kind == "tap" and "ifname" in values:
        words = ["tap=" + values.pop("ifname")]
    elif kind == "stream" and values.pop("addr.type", "") == "unix":
        words = ["unix=" + values.pop("addr.path", "")]
    else:
        raise ConfigError(f"--net {text}: that is not there yet: use tap=NAME, passt, unix=PATH or none")
    for key, value in values.items():
        if key == "model" and value.startswith("virtio"):
            continue
        if key in NET_OURS:
            words.append(f"{NET_OURS[key]}={value}")
        elif key not in NET_SO_ANYWAY or value not in (NET_SO_ANYWAY[key] or (value,)):
            raise ConfigError(f"--net {text}: {key}={value} is not there yet: leave it out")
    return ["--net", ",".join(word.replace(",", ",,") for word in words)]


def forwards(values: Mapping[str, str]) -> str:
    """-nic user,hostfwd=tcp::8080-:80 in passt's words."""
    import re

    found = re.fullmatch(r"(tcp|udp)?:([^:]*):(\d+)-[^:]*:(\d+)", values.get("hostfwd", ""))
    if found is None:
        return ""
    protocol, address, host, guest = found.groups()
    before = ("udp:" if protocol == "udp" else "") + (f"{address}/" if address else "")
    return f",forward={before}{host}:{guest}"


# -- options that are called otherwise here ------------------------------------------------------------------


def device(text: str) -> list[str]:
    values = split(text, "driver")
    name = values.pop("driver", "")
    if name in ("help", "?"):
        return ["--help", "device"]
    if name == "isa-debug-exit" and values.pop("iosize", "4") in ("4", "0x4", "0x04"):
        port = values.pop("iobase", ISA_DEBUG_EXIT_PORT)
        if not values:
            return ["--debug-exit", port]
    if name == "pvpanic" and values in ({}, {"ioport": "0x505"}, {"ioport": "1285"}):
        return ["--pvpanic"]
    if name == "pc-testdev" and not values:
        return ["--testdev"]
    if name.startswith("ide-"):
        raise ConfigError(f"-device {name}: use --drive file=...,if=ide with what it is to have: model=, serial=, ...")
    if name.startswith("virtio-net-"):
        raise ConfigError(f"-device {name}: {NET_INSTEAD}")
    if name.startswith("virtio-blk"):
        raise ConfigError(f"-device {name}: use --drive file=...,if=virtio with what it is to have: num-queues=, ...")
    if name.startswith("virtio-serial") or name in ("virtconsole", "virtserialport"):
        raise ConfigError(f"-device {name}: use --console stdio, pty or file:PATH, with name=NAME for a port")
    if name.startswith("virtio-balloon"):
        raise ConfigError(f"-device {name}: use --balloon 0 with what it is to have: deflate-on-oom=, ...")
    if name.startswith("virtio-rng"):
        raise ConfigError(f"-device {name}: use --rng")
    if name.startswith("vhost-vsock"):
        raise ConfigError(f"-device {name}: use --vsock cid=N,path=PATH, which joins the guest's ports to Unix sockets")
    if name == "isa-debugcon":
        raise ConfigError(f"-device {name}: use --debugcon stdio, pty or file:PATH; it is at port 0x402")
    raise ConfigError(f"-device {text}: that is not there yet: `pyvmm run --help device` tells what there is")


def global_property(text: str) -> list[str]:
    key, _, value = text.partition("=")
    if key == "isa-debugcon.iobase" and value in ("0x402", "1026"):
        return []
    if key in ("virtio-pci.disable-legacy", "virtio-pci.disable-modern"):
        return [f"--{key.replace('.', '-').replace('-pci', '')}", value]
    raise ConfigError(f"-global {text}: setting a device's properties is not there yet: leave it out")


def rtc(text: str) -> list[str]:
    so_anyway = {"base": "utc", "clock": "host", "driftfix": "none"}
    for key, value in split(text, "base").items():
        if so_anyway.get(key) != value:
            raise ConfigError(f"-rtc {key}={value} is not there yet: the clock shows the host's time in UTC")
    return []


def action(text: str) -> list[str]:
    words: list[str] = []
    for key, value in split(text, "").items():
        if (key, value) == ("reboot", "shutdown"):
            words.append("--no-reboot")
        elif (key, value) not in (("reboot", "reset"), ("shutdown", "poweroff")):
            raise ConfigError(f"-action {key}={value} is not there yet: leave it out")
    return words


def firmware(text: str) -> list[str]:
    return ["--firmware", text]


TRANSLATED: Mapping[str, Callable[[str], list[str]]] = {
    "smp": lambda text: cpus(text) if not text.isdigit() else ["--cpus", text],
    "bios": firmware,
    "accel": accel,
    "device": device,
    "nic": lambda text: net(text),
    "global": global_property,
    "rtc": rtc,
    "action": action,
}
