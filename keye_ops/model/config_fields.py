"""Typed access to the fields of a JSON object, with errors that name the field and the file."""

from __future__ import annotations

from typing import Any


class FieldReader:
    """Typed access to the fields of one JSON object; every failure names the field and the file."""

    def __init__(self, fields: dict[str, Any], where: str) -> None:
        self.fields, self.where = fields, where

    def fail(self, name: str, need: str, got: object) -> None:
        """Raise ValueError for a field with a wrong value."""
        raise ValueError(f"config: {name} must be {need}, got {got!r} in {self.where}")

    def value(self, name: str, default: object = None) -> Any:
        """The raw value; without a default the field is required."""
        value = self.fields.get(name)
        if value is None and default is None:
            raise ValueError(f"config: the field {name} is missing in {self.where}")
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.value(name, default)
        if type(value) is not int or value < 1:
            self.fail(name, "a positive integer", value)
        return value

    def token(self, name: str) -> int:
        """A token id."""
        value = self.value(name, None)
        if type(value) is not int or value < 0:
            self.fail(name, "a token id", value)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.value(name, default)
        if type(value) not in (int, float) or not value > 0:
            self.fail(name, "a positive number", value)
        return float(value)

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self.value(name, default)
        if not isinstance(value, str):
            self.fail(name, "a string", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.value(name, default)
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def table(self, name: str) -> dict[str, Any]:
        """A nested object."""
        value = self.value(name, None)
        if not isinstance(value, dict):
            self.fail(name, "an object", value)
        return value

    def rope(self) -> FieldReader:
        """The rotary settings: `rope_parameters` (newer files) or `rope_scaling`."""
        for name in ("rope_parameters", "rope_scaling"):
            if self.fields.get(name) is not None:
                return FieldReader(self.table(name), f"{self.where}: {name}")
        return FieldReader({}, f"{self.where}: rope_scaling")
