"""The state of KVM's own interrupt controllers and timer, as plain data and back.

Linux Documentation/virt/kvm/api.rst, KVM_GET_IRQCHIP and KVM_GET_PIT2. The local APICs are the vCPUs'. Levels of the
lines are not in it: devices drive theirs, and that before this goes into KVM, so that what has been delivered of an
edge is not delivered once more. The counters of the PIT begin a new period: KVM sets no other.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.kvm.vm import Vm

PIC_MASTER, PIC_SLAVE, IOAPIC = 0, 1, 2
CHIPS = {"pic_master": PIC_MASTER, "pic_slave": PIC_SLAVE, "ioapic": IOAPIC}
CHIP_ID = slice(0, 4)  # of struct kvm_irqchip
COUNT_LOAD_TIMES = (16, 40, 64)  # of struct kvm_pit_state2: host times, of 8 bytes each


# Counts of 65536, no mode (0xff), the gates of counters 0 and 1 high: as KVM makes it.
PIT_AT_POWER_ON = b"".join(
    (0x10000).to_bytes(4, "little") + bytes(9) + b"\xff\x00" + bytes((gate,)) + bytes(8) for gate in (1, 1, 0)
) + bytes(40)


def save(vm: Vm, pit: bytes = PIT_AT_POWER_ON) -> dict[str, Any]:
    """``pit`` is struct kvm_pit_state2."""
    timeless = bytearray(pit)
    for at in COUNT_LOAD_TIMES:
        timeless[at : at + 8] = bytes(8)  # means nothing elsewhere, and KVM does not look at it
    return {**{name: vm.get_irqchip(chip) for name, chip in CHIPS.items()}, "pit": bytes(timeless)}


def checked(state: object, known: dict[str, Any]) -> dict[str, bytes]:
    """StateError where that is not of the kind that ``save`` gives here."""
    from pyvmm.errors import StateError
    from pyvmm.state import check_names, value_of

    check_names(state, list(known))
    assert isinstance(state, dict)
    taken: dict[str, bytes] = {name: value_of(("bytes", len(known[name])), state[name], name) for name in known}
    for name in CHIPS:
        if taken[name][CHIP_ID] != known[name][CHIP_ID]:
            raise StateError(f"{name} is the state of another chip")
    return taken


def put(vm: Vm, state: dict[str, bytes]) -> None:
    """All but the PIT, which need not be there yet."""
    for name in CHIPS:
        vm.set_irqchip(state[name])
