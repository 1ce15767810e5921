"""What the tests of stock Linux with a busybox shell on its serial console share."""

from __future__ import annotations

from console import CTRL_A, Console

# On the lab's clock. A boot takes 10 s there where nothing else runs.
BOOT_S = 150.0
ANSWER_S = 90.0
PROMPT = "# "
# A character on the console costs the lab half a millisecond: notices (level 5, "Linux version") and what is worse.
APPEND = "console=ttyS0 panic=-1 loglevel=6"


def suspend_and_wake(console: Console, cpus: int, alarm: bool) -> None:
    """To RAM, woken by the RTC's alarm or by a key: the shell goes on where it was, with all processors."""
    console.send("dmesg -n 7; mount -t sysfs none /sys 2>/dev/null; cat /sys/power/mem_sleep\n")
    console.expect("[deep]", ANSWER_S)
    # An alarm that goes off on the way into the suspend wakes nobody: on a busy machine that way takes seconds.
    set_alarm = "echo +15 > /sys/class/rtc/rtc0/wakealarm; " if alarm else ""
    console.send(f"{set_alarm}echo mem > /sys/power/state; echo woken=$((6 * 7))\n")
    console.expect("ACPI: PM: Preparing to enter system sleep state S3", ANSWER_S)
    if not alarm:
        console.expect(f"CPU {cpus - 1} is now offline", ANSWER_S)
        console.send_until(CTRL_A + "w", "ACPI: PM: Waking up from system sleep state S3", ANSWER_S)
    else:
        console.expect("ACPI: PM: Waking up from system sleep state S3", ANSWER_S)
    console.expect("woken=42", ANSWER_S)
    console.send("echo CPUs=$(nproc)\n")
    console.expect(f"CPUs={cpus}", ANSWER_S)
