"""A planted fault: a replacement in a kernel's source, and how the executor must report it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A text of the source, what to put in its place, and kinds of which one must be reported.

    "wrong numbers" stands for a result that is wrong while nothing is to be reported.
    """

    name: str
    kernel: str
    find: str
    replace: str
    expected: tuple[str, ...]


def faults_of(kernel: str, *faults: tuple[str, str, str, str]) -> list[Fault]:
    """Faults of one kernel: name, what to find, what to put there, kinds of findings."""
    return [
        Fault(name, kernel, find, replace, tuple(expected.split(", ")))
        for name, find, replace, expected in faults
    ]
