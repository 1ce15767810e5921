"""Load a kernel of any kind and say in what state the first processor enters it."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.x86 import image, layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from typing_extensions import Buffer

    from pyvmm.guest_memory import GuestMemory
    from pyvmm.x86.cpu_state import BootState


def load(
    memory: GuestMemory,
    kernel: Buffer,
    *,
    name: str = "kernel",
    initrd: Buffer | Sequence[tuple[Buffer, str]] | None = None,
    module_names: Sequence[str] = (),
    append: str = "",
    acpi_rsdp: int = 0,
    flat_address: int | None = None,
    flat_mode: str = "real16",
    clean: bool = False,
) -> BootState:
    """Put ``kernel`` (bytes, or an mmap of the file: it is copied once) into guest memory.

    The kind is told by the image: a bzImage, an ELF with a PVH note, a multiboot v1 kernel; ``flat_address`` says that
    it is a flat binary to be started there in ``flat_mode`` (real16, protected32, long64). ``name`` is for messages and
    is a multiboot kernel's first word. ``initrd`` is one image, or a list of (image, command line) where the protocol
    has modules; ``module_names`` are the first words of multiboot modules' command lines. ``acpi_rsdp`` is the root
    pointer's address, 0 for none. ``clean`` says that the memory is known to be zero.

    ConfigError, in one sentence with the remedy, for everything that can be wrong with the images or the memory.
    """
    modules = _modules(initrd)
    view = image.as_bytes_view(kernel)
    try:
        return _load(
            memory, view, name, modules, module_names, append, acpi_rsdp, flat_address, flat_mode, clean
        )
    except ConfigError as error:
        # Without the traceback: it would keep its frames, and with them views of mapped files that the caller closes.
        raise error.with_traceback(None) from None
    finally:
        view.release()


def _load(
    memory: GuestMemory,
    view: memoryview,
    name: str,
    modules: Sequence[tuple[Buffer, str]],
    module_names: Sequence[str],
    append: str,
    acpi_rsdp: int,
    flat_address: int | None,
    flat_mode: str,
    clean: bool,
) -> BootState:
    if flat_address is not None:
        from pyvmm.x86.flat import load as load_flat

        if modules or append:
            raise ConfigError(
                f"{name} is a flat binary and takes no initrd and no command line: leave them out"
            )
        return load_flat(memory, view, address=flat_address, mode=flat_mode, name=name)
    image.require_ram(memory, 0, layout.MIB, name)

    from pyvmm.x86 import bzimage

    if bzimage.is_bzimage(view):
        return bzimage.load(memory, view, name=name, modules=modules, append=append, acpi_rsdp=acpi_rsdp)
    return _load_other(memory, view, name, modules, module_names, append, acpi_rsdp, clean)


def _load_other(
    memory: GuestMemory,
    view: memoryview,
    name: str,
    modules: Sequence[tuple[Buffer, str]],
    module_names: Sequence[str],
    append: str,
    acpi_rsdp: int,
    clean: bool,
) -> BootState:
    """ELF and multiboot. A multiboot header wins over a PVH note, as in QEMU; but it must be ELF32."""
    from pyvmm.x86 import elf, multiboot, pvh

    header = multiboot.find_header(view)
    parsed = elf.Elf(view, name) if view[:4] == elf.MAGIC else None
    by_address = header is not None and header.flags & multiboot.ADDRESS_FIELDS
    if parsed is not None and not by_address and parsed.bits == 64 and parsed.pvh_entry() is not None:
        header = None
    if header is not None and (parsed is not None or by_address):
        return multiboot.load(
            memory,
            view,
            header,
            name=name,
            modules=modules,
            module_names=module_names,
            append=append,
            clean=clean,
        )
    if parsed is not None:
        return pvh.load(memory, parsed, modules=modules, append=append, acpi_rsdp=acpi_rsdp, clean=clean)
    if not view.nbytes:
        raise ConfigError(f"{name} is empty: give a kernel image")
    raise ConfigError(
        f"{name} is no kernel pyvmm knows (bzImage, ELF with a PVH note, multiboot v1): "
        "give one of these, or say that it is a flat binary and at which address it starts"
    )


def _modules(initrd: Buffer | Sequence[tuple[Buffer, str]] | None) -> Sequence[tuple[Buffer, str]]:
    if initrd is None:
        return ()
    if isinstance(initrd, (list, tuple)):
        return initrd
    one: Any = initrd  # no list: a Buffer
    return ((one, ""),)
