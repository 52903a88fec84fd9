"""A command from a request: its options are the request's fields, its values a request that is checked already."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from blockprune.cli.checks import number
from blockprune.decode import Object, read_toml
from blockprune.model.defaults import BUILT_IN, defaults_of
from blockprune.request import Option, Request, bounds, flag, kind, several

Run = Callable[..., None]
OUTPUT = "Output"
# the groups of options in the order in which help shows them; others come before the last two
GROUPS = ("Model", "Student", "Subject", "What to remove", "Measures", "Sampling", "Budget", "Search", "Recovery")
LAST_GROUPS = ("Scale", OUTPUT)
CONFIG_FILE = Annotated[
    Path | None,
    typer.Option(
        help="a .toml file with fields of the request; options win, and --no-NAME turns a flag off", rich_help_panel=OUTPUT
    ),
]


def command(request: type[Request], run: Run, doc: str, *examples: str) -> Callable[..., None]:
    """A typer command that calls `run(request, **others)`; `others` are the parameters of `run` after its first.

    An option that is not given takes its value from `--config FILE.toml`, whose keys are the request's field names, then the
    request's own default.
    """
    others = list(inspect.signature(run, eval_str=True).parameters.values())[1:]

    def call(config: Path | None = None, **given: Any) -> None:
        extra = {p.name: given.pop(p.name) for p in others}
        values = _of_file(config) | {name: value for name, value in given.items() if value is not None}
        typed = {name: _typed(request, name, value) for name, value in values.items()}
        run(request.from_mapping(typed, f"{str(config)!r}" if config else "the command"), **extra)

    parameters = [_parameter(request, name, about) for name, about in request.options().items()]
    config = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=CONFIG_FILE)
    rest = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in others), config]
    signature = sorted([*parameters, *rest], key=_place)
    call.request = request  # type: ignore[attr-defined]
    call.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in signature}
    call.__doc__ = with_examples(doc, *examples)
    return call


def with_examples(doc: str, *examples: str) -> str:
    """The help text of a command, its examples a line each."""
    return "\n\n".join([inspect.cleandoc(doc), "Examples:", *(f"$ {example}" for example in examples)])


def _place(parameter: inspect.Parameter) -> int:
    """Where help shows an option: by its group."""
    group = next((info.rich_help_panel for info in get_args(parameter.annotation) if hasattr(info, "rich_help_panel")), None)
    if group in LAST_GROUPS:
        return len(GROUPS) + 1 + LAST_GROUPS.index(group)
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)


def _parameter(request: type[Request], name: str, about: Option) -> inspect.Parameter:
    """An option that is None unless it is given; its help shows the default of the request, or the model's."""
    hint = list[str] if several(request, name) else kind(request, name)
    if about.argument:
        argument = typer.Argument(metavar=about.argument, help=about.help)
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[hint, argument])
    spelled = [flag(name, about)] if hint is not bool else [f"{flag(name, about)}/--no-{flag(name, about)[2:]}"]
    text = about.help + (f": {', '.join(about.choices)}" if about.choices else "")
    if shown := _default(request, name, about):
        text += f" [default: {shown}]"
    metavar = f"<{kind(request, name).__name__}{',…' if about.commas else ''}>" if hint is not bool else None
    text = text.replace("[", r"\[")  # which would be markup
    option = typer.Option(*spelled, help=text, metavar=metavar, show_default=False, rich_help_panel=about.group)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint | None, option])


def _default(request: type[Request], name: str, about: Option) -> str:
    """What an option is where it is left out, in words; "" where its help says so."""
    if about.from_model:
        own = {model: value for model in BUILT_IN if (value := defaults_of(model).get(name)) is not None}
        return "; ".join(["the model's own", *(f"{model}: {value}" for model, value in own.items())])
    default = request.__dataclass_fields__[name].default
    if default is None or default is False:
        return ""
    return "on" if default is True else ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _typed(request: type[Request], name: str, value: Any) -> Any:
    """The value of a field with several entries as a tuple of its type: texts are taken apart at commas and read as numbers."""
    about = request.options().get(name)
    if about is None or not several(request, name):
        return value
    entries = list(value) if isinstance(value, list) else [value]
    if about.commas:
        entries = [part for e in entries for part in ([p.strip() for p in e.split(",")] if isinstance(e, str) else [e])]
    within = bounds(request, name)
    return tuple(e if within is None or not isinstance(e, str) else number(flag(name, about), e, within) for e in entries)


def _of_file(path: Path | None) -> dict[str, Any]:
    return {} if path is None else read_toml(path, Object, f"the --config {str(path)!r}", "give a .toml file")
