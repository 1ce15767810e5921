"""So many inputs out of a seeded generator, for targets that take bytes and for those that take Choices. A failure says
which input it was.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Protocol

from fuzz.guest import BytesChoices, Choices

SIZES = (8, 40, 120)


def run(one_input: Callable[[bytes], object], cases: int, seed: int) -> None:
    source = random.Random(seed)
    for n in range(cases):
        data = source.randbytes(source.choice(SIZES))
        try:
            one_input(data)
        except BaseException as error:
            error.add_note(f"input {n} of seed {seed}: {data.hex()}")
            raise


def main(one_input: Callable[[bytes], object], about: str | None) -> int:
    parser = arguments(about, cases=20_000)
    parser.add_argument("--input", default=None, help="one only, in hexadecimal digits")
    args = parser.parse_args()
    if args.input is not None:
        one_input(bytes.fromhex(args.input))
        return 0
    began = time.monotonic()
    run(one_input, args.cases, args.seed)
    print(f"{args.cases} inputs of seed {args.seed} in {time.monotonic() - began:.0f} s")
    return 0


class Target(Protocol):
    """One device and its driver, for one input after the other."""

    def __call__(self, choices: Choices) -> None: ...

    def close(self) -> None: ...


def run_choices(target: Target, cases: int, seed: int, about: object) -> None:
    """``about`` says which target it is. It is closed afterwards."""
    try:
        for n in range(cases):
            try:
                target(Choices(seed * 1_000_003 + n))
            except BaseException as error:
                error.add_note(f"input {n} of seed {seed}, {about}")
                raise
    finally:
        target.close()


def one_input(target: Target, data: bytes) -> None:
    """For atheris."""
    target(BytesChoices(data))


def arguments(about: str | None, *, cases: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=cases)
    parser.add_argument("--seed", type=int, default=1)
    return parser
