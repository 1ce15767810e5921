"""QEMU's options on our command line: the same as ours, or one sentence. Meanings: QEMU's manual, "Invocation"."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from pyvmm.cli.options import parse
from pyvmm.cli.qtest import OPTIONS as QTEST_OPTIONS
from pyvmm.cli.run import OPTIONS, configure
from pyvmm.config import mib
from pyvmm.errors import ConfigError


def parsed(line: str) -> dict[str, Any]:
    return parse(OPTIONS, shlex.split(line), verb="run", words="images")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("-hda a.img", "--drive file=a.img,index=0,media=disk"),
        ("-hdb a.img", "--drive file=a.img,index=1,media=disk"),
        ("--hdc a.img", "--drive file=a.img,index=2,media=disk"),
        ("-hdd 'a,b.img'", "--drive file=a,,b.img,index=3,media=disk"),
        ("-cdrom cd.iso", "--cdrom cd.iso"),
        ("-drive file=a.img,if=ide", "--drive file=a.img,if=ide"),
        ("-smp 2", "--cpus 2"),
        ("-smp cpus=2", "--cpus 2"),
        ("-smp 4,sockets=1,cores=2,threads=2", "--cpus 4"),
        ("-smp cores=3,threads=2", "--cpus 6"),
        ("-smp 2,maxcpus=2", "--cpus 2"),
        ("--smp=2", "--cpus 2"),
        ("--cpus cores=2", "--cpus 2"),
        ("-m 512", "--memory 512"),
        ("-m 2G", "--memory 2048"),
        ("-m size=1G", "--memory 1024"),
        ("--memory=size=1G", "--memory 1024"),
        ("-bios b.bin", "--firmware b.bin"),
        ("-nographic x.img", "x.img"),
        ("-snapshot x.img", "--snapshot x.img"),
        ("-serial mon:stdio", "--serial stdio"),
        ("-serial stdio", "--serial stdio"),
        ("-serial null", "--serial none"),
        ("-serial file:log,old", "--serial file:log,old"),
        ("-serial file:mon:x", "--serial file:mon:x"),
        ("-debugcon mon:stdio", "--debugcon stdio"),
        ("-debugcon file:x -global isa-debugcon.iobase=0x402", "--debugcon file:x"),
        ("-global virtio-pci.disable-legacy=on", "--virtio-disable-legacy on"),
        ("-global virtio-pci.disable-modern=on", "--virtio-disable-modern on"),
        ("-accel kvm", ""),
        ("-accel kvm:tcg", ""),
        ("-accel kvm,kernel-irqchip=off", "--irqchip off"),
        ("-enable-kvm", ""),
        ("-cpu host", "--cpu host"),
        ("-cpu max,-avx", "--cpu max,-avx"),
        ("-no-reboot", "--no-reboot"),
        ("-action reboot=shutdown", "--no-reboot"),
        ("-kernel k -initrd i -append 'a b=c'", "--kernel k --initrd i --append 'a b=c'"),
        ("-append -hda -kernel k", "--append=-hda --kernel k"),
        ("-M pc", "--machine pc"),
        ("-machine microvm", "--machine microvm"),
        ("-machine pc,accel=kvm,usb=off,kernel_irqchip=on", "--machine pc --irqchip kernel"),
        ("-machine type=pc", "--machine pc"),
        ("-machine accel=kvm", ""),
        ("-M microvm,acpi=on", "--machine microvm"),
        ("-monitor none -display none -parallel none", ""),
        ("-net none -nic none", "--net none --net none"),
        ("-nic tap,ifname=t0,script=no,model=virtio-net-pci,mac=2:0:0:0:0:1", "--net tap=t0,mac=2:0:0:0:0:1"),
        ("-nic stream,addr.type=unix,addr.path=/a,server=on", "--net unix=/a,server=on"),
        ("-vga none", "--vga none"),
        ("-boot d", "--boot d"),
        ("-boot order=dc,menu=on", "--boot order=dc,menu=on"),
        ("-device isa-debug-exit", "--debug-exit 0x501"),
        ("-device isa-debug-exit,iobase=0xf4,iosize=0x4", "--debug-exit 0xf4"),
        ("-device pc-testdev -vnc none -nodefaults", "--testdev"),
        ("-device pvpanic -device pvpanic,ioport=0x505", "--pvpanic --pvpanic"),
        ("-rtc base=utc,clock=host", ""),
        ("-s -S", "--gdb 1234 --wait-gdb"),
        ("-gdb tcp::1234", "--gdb 1234"),
        ("-gdb unix:/a,server=on,wait=off", "--gdb /a"),
        ("-name x", "--name x"),
        ("-name guest=x,debug-threads=on", "--name x"),
        ("-fw_cfg name=opt/a,file=f", "--fw-cfg opt/a=f"),
        ("-qmp unix:/a,server=on,wait=off", "--qmp /a"),
        ("-qmp unix:/a,server,nowait -qmp /b", "--qmp /a --qmp /b"),
        ("-fw_cfg opt/a,file=f=g", "--fw-cfg opt/a=f=g"),
    ],
)
def test_what_means_the_same(theirs: str, ours: str) -> None:
    assert parsed(theirs) == parsed(ours)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-hda", "needs a value"),
        ("-smp", "needs a value"),
        ("-smp two", "give numbers"),
        ("-smp cpus=two", "give numbers"),
        ("-smp 2,maxcpus=4", "not there yet"),
        ("-smp 3,cores=2,threads=1", "make 2 vCPUs, not 3"),
        ("-smp 2,books=1", "books is not there yet"),
        ("-m 512M,slots=2,maxmem=1G", "not there yet"),
        ("-m 1K", "is no SIZE"),
        ("-serial tcp::4444,server", "use stdio, none, pty or file:PATH"),
        ("-serial chardev:c0", "use stdio, none, pty or file:PATH"),
        ("-serial mon:vc", "use stdio, none, pty or file:PATH"),
        ("-serial file:", "use stdio, none, pty or file:PATH"),
        ("-serial stdio -serial pty", "a second serial port is not there yet"),
        ("-debugcon unix:x", "use stdio, none, pty or file:PATH"),
        ("-accel tcg", "by KVM only"),
        ("-accel qtest", "use `pyvmm qtest`"),
        ("-M pc,accel=tcg", "by KVM only"),
        ("-M pc,usb=on", "usb=on is not there yet"),
        ("-accel kvm,kernel-irqchip=split", "use --irqchip kernel or off"),
        ("-accel kvm,dirty-ring-size=4096", "not there yet"),
        ("-display gtk", "a display is not there yet"),
        ("--net user", "use --net passt"),
        ("-nic user,hostfwd=tcp::8080-:80", "use --net passt,forward=8080:80"),
        ("-nic bridge,br=b", "--net tap=NAME,bridge=BRIDGE"),
        ("-nic l2tpv3,src=x", "use tap=NAME, passt, unix=PATH or none"),
        ("-nic tap,ifname=t0,vhost=on", "vhost=on is not there yet"),
        ("-netdev user,id=n", "use --net"),
        ("-device virtio-net-pci,netdev=n", "use --net"),
        ("-monitor stdio", "the monitor is not there yet"),
        ("--qmp stdio", "give the path of a Unix socket"),
        ("-qmp unix:x", "give the path of a Unix socket"),
        ("-qmp tcp:localhost:4444,server=on,wait=off", "give the path of a Unix socket"),
        ("-trace virtio_*", "`--trace FILE`, with two dashes"),
        ("-trace enable=x,file=y", "QEMU's trace events are not there"),
        ("-qmp-pretty stdio", "QMP of that kind is not there yet"),
        ("-D log", "--exit-stats"),
        ("-d int", "--exit-stats"),
        ("-L /usr/share", "use --firmware FILE"),
        ("-pflash x", "use --firmware FILE"),
        ("-blockdev x", "use --drive"),
        ("-device ide-hd,drive=d", "use --drive"),
        ("-device virtio-blk-pci,drive=d", "if=virtio"),
        ("-device virtio-serial-pci", "use --console"),
        ("-device virtconsole,chardev=c", "use --console"),
        ("-device virtserialport,chardev=c,name=org.qemu.guest_agent.0", "with name=NAME for a port"),
        ("-device virtio-balloon-pci,deflate-on-oom=on", "use --balloon 0"),
        ("-device virtio-rng-pci", "use --rng"),
        ("-device virtio-gpu-pci", "not there yet"),
        ("-device", "needs a value"),
        ("-device isa-debugcon,chardev=c", "use --debugcon"),
        ("-global PIIX4_PM.disable_s3=1", "not there yet"),
        ("-rtc base=localtime", "base=localtime is not there yet"),
        ("-fw_cfg name=opt/a,string=x", "file=FILE"),
        ("-action panic=none", "not there yet"),
        ("-daemonize", "`&`"),
        ("-name x,process=qemu", "process=qemu is not there yet"),
        ("-fda x", "a floppy drive is not there yet"),
        ("-readconfig x", "use --config FILE"),
        ("-qtest unix:x", "pyvmm qtest --connect"),
    ],
)
def test_what_has_none_is_told_in_one_sentence(line: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(line)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "meant"),
    [("--kernal", "--kernel"), ("--mem", "--memory"), ("--drives", "--drive"), ("--exitstats", "--exit-stats"),
     ("--inird", "--initrd"), ("-cdorm", "--cdrom"), ("--hugepages", "--huge-pages"), ("--frimware", "--firmware")],
)  # fmt: skip
def test_a_slip_of_the_finger(word: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"no option {word}: did you mean {meant}\?"):
        parsed(f"{word} x")


@pytest.mark.parametrize("word", ["--foo", "-x", "--xyz=1", "-zzz", "--ram", "--c", "-cp"])
def test_no_guess_where_nothing_is_near(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(f"{word} x")
    assert "did you mean" not in str(caught.value)
    assert "`pyvmm run --help` lists them" in str(caught.value)


@pytest.mark.parametrize("verb", ["demo", "doctor"])
def test_a_verb_without_a_board_points_to_its_own_help(verb: str) -> None:
    from pyvmm.cli import demo, doctor

    options = {"demo": demo.OPTIONS, "doctor": doctor.OPTIONS}[verb]
    for word in ("--kernel", "--foo", "-hda", "disk.img"):
        with pytest.raises(ConfigError) as caught:
            parse(options, [word, "x"], verb=verb)
        assert f"pyvmm {verb}" in str(caught.value)
        assert f"`pyvmm {verb} --help`" in str(caught.value)
        assert "pyvmm run" not in str(caught.value)


def test_the_board_of_qtest_takes_them_too() -> None:
    line = ["-machine", "pc", "-hda", "a.img", "-m", "64", "-snapshot", "-display", "none"]
    given = parse(QTEST_OPTIONS, line, verb="qtest", words="images")
    assert given == {
        "machine": "pc", "drives": ["file=a.img,index=0,media=disk"], "memory_mib": 64, "snapshot": True
    }  # fmt: skip


def test_snapshot_is_for_every_drive() -> None:
    given = parsed("-snapshot a.img -drive file=b.img,cache=none,index=1 -cdrom c.iso")
    config = configure(given)
    assert [(str(drive.file), drive.snapshot) for drive in config.drives] == [  # type: ignore[union-attr]
        ("b.img", True), ("a.img", True), ("c.iso", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size_mib"), [("256", 256), ("1M", 1), ("2g", 2048), ("1.5G", 1536), ("1T", 1 << 20), ("4096K", 4)]
)
def test_sizes(text: str, size_mib: int) -> None:
    assert mib(text) == size_mib


@pytest.mark.parametrize("text", ["", "G", "x", "1.5", "1.3M", "1K", "-1M", "nanM", "infG", "1X"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        mib(text)
