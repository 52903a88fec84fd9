"""What to run next: draw with the recommended student, or distil it, or what a search answers. For a shell, to be copied."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from blockprune.model.defaults import BUILT_IN, defaults_of
from blockprune.reports.models import Model
from blockprune.reports.report_data import ReportData

ANY_PROMPT = "a photo"


def next_command(data: ReportData, take: Model | None, searches: Sequence[str]) -> str:
    """With a trained student one that draws an image; else one that distils `take`, or for None what the first of these searches
    answers; "" where neither lies in a folder that is known, or the teacher has no name."""
    if not data.teacher:
        return ""
    if take is not None and take.updates != 0:
        return _to_draw(take)
    if take is not None and take.design:
        return _to_distil(data, take.design, Path("runs", f"distill-{take.design}"))
    ended = [name for name in (searches if take is None else data.searches) if name in data.folders and data.searches[name].ranked]
    for name in ended:
        view, folder = data.searches[name], data.folders[name]
        if not view.is_front and (take is None or take.arch == view.best.candidate.arch):
            return _to_distil(data, str(folder / "best.json"), folder.with_name(f"distill-{folder.name}"))
    return ""


def _to_draw(model: Model) -> str:
    if not model.folder:
        return ""
    prompt = min((prompt for view in model.views.values() for prompt in view.prompts), key=len, default=ANY_PROMPT)
    drawn = f"bp.load_pipeline({json.dumps(model.folder)})({json.dumps(prompt)}).images[0]"
    return shlex.join(["python", "-c", f'import blockprune as bp; {drawn}.save("image.png")'])


def _to_distil(data: ReportData, arch: str, out: Path) -> str:
    """FOLDER stands for captioned images where the teacher has none of its own."""
    of_teacher = [] if data.teacher in BUILT_IN else ["--teacher", data.teacher]
    captioned = [] if defaults_of(data.teacher).get("data") else ["--data", "FOLDER"]
    return shlex.join(["blockprune", "distill", "--arch", arch, *of_teacher, *captioned, "--ema", "--out", str(out)])
