"""By which interfaces drivers find the virtio devices of a machine: legacy, modern, or either (virtio 1.2, 1.3.1).

QEMU's words and defaults. disable-modern is off. disable-legacy=auto is off on a bus of conventional PCI, as a pc has
it, so that a device there is transitional; it is on behind a port of PCI Express, of which there are none here. (QEMU:
hw/virtio/virtio-pci.c, virtio_pci_realize.) What has no transitional id (4.1.2.1) is modern always.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from pyvmm.spec import Spec


def interfaces(spec: Spec, asked: Any) -> tuple[bool, bool]:
    """(legacy, modern): which of them a device on conventional PCI has. ``asked``: its own options, or None."""
    legacy_off, modern_off = spec.virtio_disable_legacy, spec.virtio_disable_modern
    if asked is not None:
        legacy_off, modern_off = asked.disable_legacy or legacy_off, asked.disable_modern or modern_off
    return legacy_off != "on", modern_off != "on"


def check(spec: Spec) -> None:
    """ConfigError where a device would have neither, or the machine has no PCI. Nothing has been opened yet."""
    devices = list(devices_of(spec))
    usual = (spec.virtio_disable_legacy, spec.virtio_disable_modern) == ("auto", "off")
    if spec.machine == "microvm":
        if not usual or any(one is not None and (one.disable_legacy or one.disable_modern) for _, one in devices):
            raise ConfigError(
                "disable-legacy and disable-modern are for virtio on PCI, and a microvm's devices are on virtio-mmio:"
                " leave them out, or give machine=pc"
            )
        return
    for name, asked in devices:
        if interfaces(spec, asked) == (False, False):
            raise ConfigError(
                f"{name} has disable-legacy=on and disable-modern=on: no driver could find it, leave one of them out"
            )
    only_modern = [name for name, there in (("vsock", spec.vsock), ("a share", spec.shares)) if there]
    if only_modern and spec.virtio_disable_modern == "on":
        raise ConfigError(
            f"{only_modern[0]} has no legacy interface, and the machine has virtio_disable_modern=on: give"
            " disable-modern=on to the devices that are to have it"
        )


def devices_of(spec: Spec) -> Iterator[tuple[str, Any]]:
    """(its name, its options or None) of each that may be transitional."""
    for drive in spec.drives:
        if drive.interface == "virtio":
            yield f"drive {drive.name}", drive
    for net in spec.nets:
        yield f"network card {net.name}", net
    if spec.balloon is not None:
        yield "the balloon", spec.balloon
    if spec.rng:
        yield "the entropy device", None
    if spec.consoles:
        yield "the virtio console", None
