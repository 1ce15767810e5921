"""A few inputs for the targets whose bytes are a snapshot's, or come from the other side of a migration."""

from __future__ import annotations

from fuzz import migration, snapshot
from fuzz.cases import run

CASES = 60


def test_snapshots() -> None:
    run(snapshot.Target(kvm=False).one_input, CASES, seed=1)


def test_migrations() -> None:
    run(migration.Target().one_input, CASES, seed=1)


def test_why_it_is_refused_was_not_one_line() -> None:
    found = "4062f57fa78299c0e8e12770c00aa39d36d8f5116284a8a77d85323357ebb34bcf082559f3901a35"
    migration.Target().one_input(bytes.fromhex(found))
