"""What a stage is asked for, as a value: every field with its type, default, help line and bounds, written once.

The command line's options are made from these fields, a notebook passes them as keywords, a run directory stores them, and a
resumed run compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

import msgspec

from blockprune.errors import UserError

KEY = "option"
SHOWN = 60
LONGEST_NAME = 200  # characters of what becomes the name of a file or of a database's entry


@dataclass(frozen=True)
class Bounds:
    """The numbers that a field takes, from `least` to `most`; without `least` itself where that is `excluded`."""

    least: float
    most: float
    whole: bool = True
    excluded: bool = False

    def __str__(self) -> str:
        return f"give one from {self.least} to {self.most}"

    def check(self, spelled: str, value: float, text: str = "") -> None:
        """Raises UserError for a number out of bounds; `text` is how the user wrote it."""
        text = shown(text or str(value), "")
        if not math.isfinite(value):
            raise UserError(f"{spelled} must be a finite number: got {text}; {self}")
        if value < self.least or (self.excluded and value == self.least):
            raise UserError(f"{spelled} must be {'above' if self.excluded else 'at least'} {self.least}: got {text}; {self}")
        if value > self.most:
            raise UserError(f"{spelled} must be at most {self.most}: got {text}; {self}")


@dataclass(frozen=True)
class Option:
    """What is known of a field besides its type and default.

    `least` and `most` bound a number (`above` excludes its own value), `longest` the characters of a text, `choices` a text, or
    each text of a list, which the command line takes apart at `commas`. A field `from_model` that is None, or has no entry, takes
    the model's own default. Fields that are not `compared` change speed, place or pictures, but no number. An `argument` is what
    help calls a field that stands on the command line without a flag; it must be given.
    """

    help: str
    group: str
    name: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    longest: int | None = None
    from_model: bool = False
    commas: bool = False
    compared: bool = True
    argument: str = ""


def option(default: Any, help: str, group: str, **more: Any) -> Any:
    """A field of a request; `more` are fields of `Option`."""
    return field(default=default, metadata={KEY: Option(help, group, **more)})


@dataclass(frozen=True)
class Request:
    """Base of what the stages are asked for. Raises UserError for a value that no run could have."""

    def __post_init__(self) -> None:
        for name, about in self.options().items():
            object.__setattr__(self, name, _checked(type(self), name, about, getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Raises UserError where fields contradict one another."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """What is known of each field, in order."""
        return {f.name: f.metadata[KEY] for f in fields(cls)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> Self:
        """The request with these fields; `source` is what a message calls the place where they stand."""
        if unknown := values.keys() - cls.options().keys():
            raise UserError(f"{source} has unknown fields {', '.join(sorted(unknown))}: choose from {', '.join(cls.options())}")
        return cls(**values)

    def filled(self, defaults: Mapping[str, Any]) -> Self:
        """The request with the model's own `defaults` where it leaves them to the model."""
        open_ones = (n for n, about in self.options().items() if about.from_model and getattr(self, n) in (None, ()))
        return replace(self, **{name: defaults[name] for name in open_ones if name in defaults})

    def to_json(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def compared(self) -> dict[str, Any]:
        """The fields that must be the same for a run to go on."""
        about = self.options()
        return {name: value for name, value in self.to_json().items() if about[name].compared}


_HINTS: dict[type[Request], dict[str, Any]] = {}


def hints(request: type[Request]) -> dict[str, Any]:
    """The types of a request's fields, worked out once."""
    if request not in _HINTS:
        _HINTS[request] = get_type_hints(request)
    return _HINTS[request]


def several(request: type[Request], name: str) -> bool:
    """True for a field that has several entries."""
    return get_origin(hints(request)[name]) is tuple


def kind(request: type[Request], name: str) -> Any:
    """The type of a field's values, of each entry where it has several."""
    hint = hints(request)[name]
    of_value = next(k for k in get_args(hint) if k is not NoneType) if isinstance(hint, UnionType) else hint
    return get_args(of_value)[0] if get_origin(of_value) is tuple else of_value


def bounds(request: type[Request], name: str) -> Bounds | None:
    """The numbers that a field takes; None for a field of another type. Each field of numbers says its least and its most."""
    about, of_value = request.options()[name], kind(request, name)
    if of_value not in (int, float):
        return None
    least = about.least if about.above is None else about.above
    assert least is not None and about.most is not None, f"{request.__name__}.{name} has no bounds"
    return Bounds(least, about.most, of_value is int, about.above is not None)


def flag(name: str, about: Option) -> str:
    """How the command line spells a field."""
    return name.upper() if about.argument else "--" + (about.name or name).replace("_", "-")


def _checked(request: type[Request], name: str, about: Option, value: Any) -> Any:
    spelled, hint = flag(name, about), hints(request)[name]
    if several(request, name) and not isinstance(value, list | tuple):
        value = (value,)
    try:
        value = msgspec.convert(value, hint, strict=True)
    except msgspec.ValidationError as err:
        raise UserError(f"{spelled}: {str(err)[0].lower()}{str(err)[1:]}, not {value!r}"[:300]) from None
    within = bounds(request, name)
    for one in value if isinstance(value, tuple) else () if value is None else (value,):
        if within is not None:
            within.check(spelled, one)
        elif isinstance(one, str):
            check_text(spelled, one, about)
    return value


def check_text(spelled: str, text: str, about: Option | None = None) -> None:
    """Raises UserError for a text that is nothing, or that the field does not take."""
    if not text.strip():
        raise UserError(f"{spelled} is empty: leave it out, or give it a value")
    if "\0" in text:
        raise UserError(f"{spelled} holds a zero byte, which no name does: got {shown(text)}; leave it out")
    if about is not None and about.longest is not None and len(text) > about.longest:
        raise UserError(f"{spelled} must be at most {about.longest} characters: got {len(text)}; shorten it")
    if about is not None and about.choices and text not in about.choices:
        raise UserError(f"unknown {spelled} {shown(text)}: choose from {', '.join(about.choices)}")


def shown(text: str, quote: str = "'") -> str:
    """The text for a message, cut where it is long."""
    return f"{quote}{text if len(text) <= SHOWN else text[: SHOWN - 1] + '…'}{quote}"
