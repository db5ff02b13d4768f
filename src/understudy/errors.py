"""Every error a user can meet.

UnderstudyError
├── UserError           something the user can put right; printed without a traceback, exit code 2
│   ├── ConfigError     understudy.toml is missing, malformed or contradicts itself (all faults at once)
│   ├── InputError      a flag, a file or a record that we were given cannot be used
│   ├── AddressError    a port or address is in use, cannot be bound or does not answer
│   ├── EndpointError   a model's endpoint is out of reach or refused the request
│   ├── StoreError      the store or the segment log cannot be opened or written
│   ├── ModelError      weights, tokenizer or plan cannot be used
│   └── MissingExtraError an optional dependency is not installed
└── EvidenceError       a certificate differs from its evidence; exit code 1, with the differences

A message gives the value, what was expected and what to type next. What is not in this tree is a bug and
keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class UnderstudyError(Exception):
    """The root: everything Understudy raises on purpose."""

    exit_code = 1


class UserError(UnderstudyError):
    """Something the user can put right.

    ``value`` is what was met, ``expected`` what would have been right, ``next_step`` what to type or change.
    """

    exit_code = 2

    def __init__(self, value: str, *, expected: str = "", next_step: str = "") -> None:
        super().__init__(value)
        self.value = value
        self.expected = expected
        self.next_step = next_step

    def __str__(self) -> str:
        parts = [self.value]
        if self.expected:
            parts.append(f"  expected: {self.expected}")
        if self.next_step:
            parts.append(f"  next:     {self.next_step}")
        return "\n".join(parts)


class ConfigError(UserError):
    """understudy.toml cannot be used; ``faults`` holds one line for each fault."""

    def __init__(self, path: str, faults: Sequence[str]) -> None:
        count = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
        super().__init__("\n".join([f"{path}: {count}", *(f"  {fault}" for fault in faults)]))
        self.path = path
        self.faults = tuple(faults)


class InputError(UserError):
    """A flag, a file or a record that we were given cannot be used."""


class AddressError(UserError):
    """A port or address is in use, cannot be bound or does not answer."""


class EndpointError(UserError):
    """A model's endpoint is out of reach (``status`` is None) or answered with an error status."""

    def __init__(
        self, value: str, *, status: int | None = None, expected: str = "", next_step: str = ""
    ) -> None:
        super().__init__(value, expected=expected, next_step=next_step)
        self.status = status


class StoreError(UserError):
    """The store or the segment log cannot be opened or written."""


class ModelError(UserError):
    """Weights, a tokenizer or a pruning plan cannot be used."""


class MissingExtraError(UserError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"the package {package!r} is not installed",
            expected=f"the extra {extra!r}",
            next_step=f"pip install 'understudy[{extra}]'",
        )


class EvidenceError(UnderstudyError):
    """A certificate differs from its evidence; ``differences`` holds one line for each."""

    def __init__(self, path: str, differences: Sequence[str]) -> None:
        lines = [
            f"{path}: {len(differences)} difference(s) from the evidence",
            *(f"  {d}" for d in differences),
        ]
        super().__init__("\n".join(lines))
        self.differences = tuple(differences)
