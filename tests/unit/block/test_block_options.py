"""DriveOptions: QEMU's spelling, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.block import DriveOptions
from pyvmm.errors import ConfigError


def test_defaults() -> None:
    options = DriveOptions("x.img")
    assert (options.file, options.format, options.media, options.interface) == ("x.img", None, "disk", None)
    assert (options.cache, options.aio, options.rerror, options.werror) == ("writeback", "threads", "report", "enospc")
    assert not options.read_only
    assert options.locking
    assert options.index is None
    assert DriveOptions("x.iso", media="cdrom").read_only
    assert DriveOptions(Path("x.img")).file == "x.img"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("file=x.img", {"file": "x.img"}),
        ("file=a,,b=c.img,if=ide,index=1", {"file": "a,b=c.img", "index": 1, "interface": "ide"}),
        ("file=,,,,x,media=cdrom", {"file": ",,x", "media": "cdrom"}),
        ("media=cdrom", {"file": None, "media": "cdrom"}),
        ("file=,media=cdrom", {"file": None}),
        ("file=x,cache=none,aio=io_uring,discard=ignore", {"cache": "none", "aio": "io_uring", "discard": "ignore"}),
        ("file=x,discard=on", {"discard": "unmap"}),
        ("file=x,discard=off,detect-zeroes=on", {"discard": "ignore", "detect_zeroes": "on"}),
        ("file=x,werror=stop,rerror=ignore", {"werror": "stop", "rerror": "ignore"}),
        ("file=x,read-only=on", {"read_only": True}),
        ("file=x,readonly=off", {"read_only": False}),
        ("file=x,file.locking=off", {"locking": False}),
        ("file=x,locking=auto", {"locking": True}),
        ("file=x,force-share=on", {"locking": False}),
        ("file=x,offset=32256,size=10M", {"offset": 32256, "size": 10 << 20}),
        ("file=x,bus=1,unit=1", {"bus": 1, "unit": 1}),
        ("file=x,id=root,serial=QM1,model=My disk", {"id": "root", "serial": "QM1", "model": "My disk"}),
        ("file=x,throttling.bps-total=1000000", {"throttle_bps": 1000000}),
        (
            "file=x,throttling.iops-read=10,throttling.iops-read-max=50,throttling.iops-write=1k",
            {"throttle_iops_read": 10, "throttle_iops_read_max": 50, "throttle_iops_write": 1024},
        ),
        ("file=x,bps=5,bps_max=7,iops_rd=3", {"throttle_bps": 5, "throttle_bps_max": 7, "throttle_iops_read": 3}),
    ],
)
def test_parse(text: str, values: dict[str, object]) -> None:
    options = DriveOptions.parse(text)
    assert {name: getattr(options, name) for name in values} == values


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a disk without an image: give file="),
        ("index=1", "a disk without an image"),
        ("x.img", "drive option 'x.img' has no value: write x.img=VALUE"),
        ("file=x,cahce=none", "no option 'cahce': did you mean cache?"),
        ("file=x,frobnicate=1", "no option 'frobnicate': see DriveOptions"),
        ("file=x,cache=fast", "cache='fast': use writeback, none, writethrough, directsync or unsafe"),
        ("file=x,aio=native", "aio='native': use threads or io_uring"),
        ("file=x,logical-block-size=1000", "give a power of two from 512 to 32768"),
        ("file=x,logical-block-size=64k", "give a power of two from 512 to 32768"),
        ("file=x,logical-block-size=4k,physical-block-size=512", "physical_block_size=512 is below logical_block_size"),
        ("file=x,num-queues=0", "from 1 to 64"),
        ("file=x,if=scsi", "interface='scsi': use ide or virtio"),
        ("file=x,format=vmdk", "format='vmdk': use raw or qcow2"),
        ("file=x,rerror=enospc", "rerror='enospc': use report, ignore or stop"),
        ("file=x,werror=maybe", "werror='maybe': use enospc, report, ignore or stop"),
        ("file=x,index=one", "index=one: give a number"),
        ("file=x,size=k", "size=k: give a number"),
        ("file=x,size=0", "size=0: give bytes"),
        ("file=x,size=-5", "size=-5: give bytes"),
        ("file=x,offset=-1", "offset=-1: give bytes from the image's beginning"),
        ("file=x,read-only=maybe", "read-only=maybe: use on or off"),
        ("file=x,readonly=auto", "readonly=auto: use on or off"),
        ("file=x,index=1,unit=0", "index beside bus or unit"),
        ("file=x,model=Plätte", "use printable ASCII"),
        ("file=x,throttling.bps-total=5,throttling.bps-read=3", "throttle_bps and throttle_bps_read: give the total"),
        ("file=x,throttling.bps-total-max=5", "throttle_bps_max=5 without throttle_bps"),
        ("file=x,throttling.bps-total=5,throttling.bps-total-max=3", "throttle_bps_max=3 is below throttle_bps=5"),
        ("file=x,throttling.iops-total=-1", "throttle_iops=-1: give a whole number"),
    ],
)
def test_every_mistake_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DriveOptions.parse(text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"cashe": "none"}, "did you mean cache?"),
        ({"read_only": "yes"}, "read_only='yes': give True or False"),
        ({"locking": 2}, "locking=2: give True or False"),
        ({"index": True}, "index=True: give a whole number"),
        ({"offset": 1.5}, "offset=1.5: give bytes"),
        ({"throttle_bps": "1M"}, "throttle_bps='1M': give a whole number"),
        ({"file": 7}, "file=7: give a path"),
        ({"file": ""}, "file='': give the path"),
        ({"serial": b"x"}, "serial=b'x': use printable"),
    ],
)
def test_python_values_are_checked(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DriveOptions(**{"file": "x", **values})  # type: ignore[arg-type]
    assert sentence in str(caught.value)
