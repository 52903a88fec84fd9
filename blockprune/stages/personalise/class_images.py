"""Images of a subject's class, by which a model keeps what it knew: drawn once, by the teacher, and kept in a folder."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blockprune.data import captions
from blockprune.data.image_files import IMAGE_SUFFIXES
from blockprune.decode import Object, read_json
from blockprune.errors import UserError
from blockprune.model.families import take
from blockprune.model.model import Model
from blockprune.model.sampling import Protocol, check_schedule
from blockprune.progress import Listener
from blockprune.runs.atomic import writing
from blockprune.stages.personalise.request import PersonaliseRequest

DRAWN = re.compile(r"class-([0-9]{6,})\.png")
ABOUT = "class_images.json"


@dataclass(frozen=True)
class ClassImages:
    """`n` images in a folder, under one prompt or under several in turn. Number i has the i-th prompt and seed i, whatever else is
    drawn or there already."""

    folder: Path
    prompts: Sequence[str]
    n: int

    def missing(self) -> list[int]:
        """The numbers of those that must be drawn, beside the images that a user has put there.

        UserError for such images where there are several prompts, of which they would not say theirs.
        """
        there = [p for p in self.folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES] if self.folder.is_dir() else []
        files = [p.name for p in there if not p.name.startswith(".")]  # of one in the making, which a kill has left
        drawn = {int(match[1]) for name in files if (match := DRAWN.fullmatch(name))}
        if len(files) > len(drawn) and len(self.prompts) > 1:
            raise UserError(
                f"{str(self.folder)!r} holds images that were not drawn here, and which of several class prompts is theirs is not "
                "known: give one --class-prompt, or another --class-data-dir"
            )
        return sorted({*range(self.n - len(files) + len(drawn))} - drawn)

    def draw(self, model: Model, n_steps: int, cfg_scale: float, scheduler: str, size: int, progress: Listener) -> None:
        """Draws what is missing, in the blocks of `size` in which all would be drawn: arithmetic may round by the size of a batch.

        UserError when the folder holds images that were drawn otherwise. Raises NotFinite.
        """
        protocol = Protocol(self.n, n_steps, cfg_scale, 0, model.latent, scheduler)
        self._sign(model, protocol)
        if not (missing := self.missing()):
            return
        check_schedule(model.pipe, protocol)
        progress.plan({"class images": len(missing)})
        condition, blank = model.encode(self.prompts)
        for start in sorted({i // size * size for i in missing}):
            block = range(start, min(start + size, self.n))
            images = model.images(protocol, take(condition, [i % len(self.prompts) for i in block]), blank, block)
            wanted = [i for i in block if i in missing]
            for i in wanted:
                _write(self.folder / f"class-{i:06d}.png", images[i - start].permute(1, 2, 0).numpy())
            progress.tick("class images", len(wanted))

    def _sign(self, model: Model, protocol: Protocol) -> None:
        """Says in the folder how its images are drawn, or checks that it says the same."""
        how: dict[str, Any] = {"model": model.identity, "prompts": list(self.prompts), "steps": protocol.n_steps}
        how |= {"cfg_scale": protocol.cfg_scale, "scheduler": protocol.scheduler, "latent": list(protocol.latent)}
        file = self.folder / ABOUT
        if not file.is_file():
            with writing(file) as part:
                part.write_text(json.dumps(how, indent=1) + "\n", encoding="utf-8")
            return
        held = read_json(file, Object, "delete it and the images of its folder")
        if changed := [name for name in how if held.get(name) != how[name]]:
            first = changed[0]
            raise UserError(
                f"the images in {str(self.folder)!r} were drawn otherwise ({first} is {held.get(first)!r} there, {how[first]!r} "
                "asked): choose another --class-data-dir"
            )


def class_prompts(request: PersonaliseRequest) -> list[str]:
    """The prompts of class images in turn: one, or those of a file."""
    text = request.class_prompt or ""
    return captions.read_prompts(text) if Path(text).suffix in (".txt", ".csv", ".jsonl") else [text]


def _write(file: Path, pixels: NDArray[np.uint8]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    with writing(file) as part:
        part.write_bytes(buffer.getvalue())
