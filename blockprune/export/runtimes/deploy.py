"""A pipeline's components in a runtime's format: written, loaded there, and compared with PyTorch before anyone relies on them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockprune.errors import UserError
from blockprune.export.runtimes.components import Component, Inputs, components
from blockprune.export.runtimes.formats import Format, Runner, format_of, in_words, program_of
from blockprune.model.compare import distance
from blockprune.model.model import Model
from blockprune.progress import Listener, Silent
from blockprune.runs.atomic import writing_folder

# how far a runtime's output may be from PyTorch's in float32, relative to its size: of other kernels, of weights in 10 or 7 bits
ALLOWED = {"float32": 1e-4, "float16": 3e-2, "int8": 0.3}
ABOUT = "export.json"


@dataclass(frozen=True)
class Exported:
    """A component in a runtime's format: its file, the bytes of all its files, and its distance from PyTorch (relative, the largest
    over outputs) on what the model draws and on random inputs of other shapes."""

    name: str
    file: str
    n_bytes: int
    real: float
    random: float


def deploy(
    model: Model, name: str, folder: Path, precision: str = "float32", every: bool = False, progress: Listener | None = None
) -> Iterator[Exported]:
    """Writes `folder` with a folder for each component; nothing is left of it when one of them fails.

    `progress` None says nothing of each component's steps.

    UserError for a runtime that is not installed, for a component that the format cannot say, and for one that computes something
    else there.
    """
    form = format_of(name, precision)
    done: list[Exported] = []
    with writing_folder(folder) as part:
        for component in components(model, every):
            done.append(_exported(component, form, part / component.name, precision, progress or Silent()))
            yield done[-1]
        about = {"format": 1, "model": Path(model.name).name, "runtime": form.name, "precision": precision}
        rows = [asdict(e) for e in done]
        text = json.dumps({**about, "allowed": ALLOWED[precision], "components": rows}, indent=1) + "\n"
        (part / ABOUT).write_text(text, encoding="utf-8")
        if every:
            _save_rest(model, part)


def _exported(component: Component, form: Format, folder: Path, precision: str, progress: Listener) -> Exported:
    writing, loading, comparing = (f"{component.name}: {step}" for step in ("write", "load", "compare"))
    progress.say(f"{component.name}: writing it as {form.name}, then loading it there and comparing it with PyTorch")
    progress.plan(dict.fromkeys((writing, loading, comparing), 1), "steps", component.name)
    folder.mkdir(parents=True)
    path = folder / form.file
    trials = [component.example, *others(component)]
    expected = [component.run(inputs) for inputs in trials]
    with in_words(form, component.name):
        form.write(program_of(_in(component, precision, form)), component, path, precision)
        progress.tick(writing, 1)
        runner = form.load(path)
        progress.tick(loading, 1)
        errors = [apart(runner, inputs, outputs) for inputs, outputs in zip(trials, expected, strict=True)]
        progress.tick(comparing, 1)
    if not max(errors) <= ALLOWED[precision]:
        raise UserError(
            f"the {component.name} computes something else in {form.runtime}: {max(errors):.2g} of its output's size apart, where "
            f"{ALLOWED[precision]:g} is allowed in {precision}; choose another format or precision"
        )
    config = getattr(component.network, "config", None)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(_plain(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    n_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.name != "config.json")
    return Exported(component.name, f"{component.name}/{form.file}", n_bytes, errors[0], max(errors[1:]))


def _in(component: Component, precision: str, form: Format) -> Component:
    """The component with its weights in half precision, where the format does not see to that itself."""
    if precision != "float16" or form.name == "openvino":
        return component
    module = copy.deepcopy(component.module).half()
    return replace(component, module=module)


def others(component: Component) -> Iterator[Inputs]:
    """Random inputs of other shapes: one row, and three of another spatial size."""
    for rows, more in ((1, 0), (3, 1)):
        draw = torch.Generator().manual_seed(rows)
        yield {name: _like(t, rows, more if name in component.spatial else 0, draw) for name, t in component.example.items()}


def _like(t: Tensor, rows: int, more: int, draw: torch.Generator) -> Tensor:
    height = [t.shape[2] * (1 + more)] if t.ndim == 4 else []
    shape = (rows, t.shape[1], *height, t.shape[3]) if t.ndim == 4 else (rows, *t.shape[1:])
    if not t.is_floating_point():
        return torch.randint(0, int(t.max()) + 1, shape, generator=draw)
    return torch.rand(shape, generator=draw) * t.max() if t.ndim == 1 else torch.randn(shape, generator=draw) * t.std()


def apart(runner: Runner, inputs: Inputs, expected: list[Tensor]) -> float:
    """The largest relative distance of what a runtime gives from what is expected."""
    return max(distance(ours, theirs) for ours, theirs in zip(runner(inputs), expected, strict=True))


def _plain(config: Any) -> dict[str, Any]:
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    public = {k: v for k, v in values.items() if not k.startswith("_") or k == "_class_name"}
    return json.loads(json.dumps(public, default=str))


def _save_rest(model: Model, folder: Path) -> None:
    """What a pipeline needs besides: its scheduler, its tokenizers, and the list of its parts."""
    for name, part in model.pipe.components.items():
        if name.startswith(("tokenizer", "scheduler")) and part is not None:
            part.save_pretrained(folder / name)
    model.pipe.save_config(folder)
