"""The model card of an exported student: Markdown with YAML front matter, filled only from what is known."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture

COMPONENTS = {"attn1": "self-attention", "attn2": "cross-attention", "ff": "feed-forward"}
PARTS = {"resnets": "ResNet", "attentions": "attention", "downsamplers": "downsampler", "upsamplers": "upsampler"}
FITTED = {"linear": "A fitted linear map", "channel": "A fitted scale and shift per channel"}
STAGES = {"down_blocks": "down stage", "up_blocks": "up stage", "mid_block": "mid stage"}
ENTRIES = {
    **{"teacher": "teacher", "data": "training data", "steps": "training steps"},
    **{"personalised": "personalised from", "trained": "trained, all weights", "instance_prompt": "instance prompt"},
}
USED = {"title", "license", "base_model", "costs", "scores"}


def model_card(arch: Architecture, pipeline: str, why_not_stock: str, card: Mapping[str, Any]) -> str:
    """The README of a student that `pipeline` (a diffusers class) loads; entries that `card` lacks are left out.

    `card` may hold title, license, base_model; teacher, data, steps and other plain values, of a personalised model `trained`, the
    names of the parts that learnt, and the subject; costs: {"teacher": .., "student": ..} as `Cost.to_json`; scores: {name: value},
    {name: {measure: value}} or a list of such rows. UserError for another form of these two.
    """
    name = card.get("teacher", "diffusion model")
    title = _text(card.get("title") or (f"A pruned {name}" if arch else name))
    lines = [*_front_matter(arch, card), "", f"# {title}", ""]
    lines += [_intro(arch, card), "", *_usage(pipeline, why_not_stock), "", "## Removed blocks", ""]
    lines += [f"- {words}" for words in in_words(arch)] or ["None."]
    plain = [(ENTRIES.get(k, k), card[k]) for k in (*ENTRIES, *card) if k in card and k not in USED]
    if rows := {name: value for name, value in plain if value is not None}:
        lines += ["", "## How it was made", "", *_table(["", ""], rows.items())]
    for heading, body in (("Costs", _costs(card.get("costs"))), ("Scores", _scores(card.get("scores")))):
        if body:
            lines += ["", f"## {heading}", "", *body]
    return "\n".join(lines) + "\n"


def _front_matter(arch: Architecture, card: Mapping[str, Any]) -> list[str]:
    given = {key: card[key] for key in ("license", "base_model") if card.get(key)}
    fixed = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", *(["pruned"] if arch else []), "blockprune"],
    }
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in (given | fixed).items()), "---"]


def _intro(arch: Architecture, card: Mapping[str, Any]) -> str:
    teacher = f"The U-Net of {_text(card['teacher'])}" if card.get("teacher") else "The U-Net of its teacher"
    lacks = f"without {len(arch)} of its blocks" if arch else "with all of its blocks"
    others = f"every part of the pipeline but {_text(card['trained'])}" if "trained" in card else "every other part of the pipeline"
    subject = f", taught the subject {_text(card['subject'])}" if "subject" in card else ""
    return f"{teacher} {lacks}{subject}; {others} is the teacher's. Architecture `{arch.key}`."


def _usage(pipeline: str, why_not_stock: str) -> list[str]:
    module, loader = ("diffusers", f"{pipeline}.from_pretrained") if not why_not_stock else ("blockprune", "load_pipeline")
    name = loader.partition(".")[0]
    code = ["```python", f"from {module} import {name}", "", f'pipe = {loader}("FOLDER")', "```"]
    reason = ["", f"Plain diffusers has no configuration for it ({_text(why_not_stock)})."] if why_not_stock else []
    return [*code, *reason, "", "`pruning/architecture.json` says what is removed, `pruning/block_map.json` where the rest is."]


def in_words(arch: Architecture) -> list[str]:
    """One line a stage: what is removed of it, by name and in words; one more for what is fitted in place of blocks."""
    names = sorted(arch, key=lambda name: [(not p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")])
    lines = [f"`{stage}`: {_stage_in_words(stage, list(inside))}" for stage, inside in groupby(names, _stage_of)]
    for kind, what in FITTED.items():
        if fitted := [f"`{name}`" for name in arch if (name, kind) in arch.fits]:
            lines.append(f"{what} stands in for {'each of ' if len(fitted) > 1 else ''}{', '.join(fitted)}")
    return lines


def _stage_of(name: str) -> str:
    return ".".join(name.split(".")[: 1 if name.startswith("mid") else 2])


def _stage_in_words(stage: str, names: Sequence[str]) -> str:
    path, _, index = stage.partition(".")
    title = f"{STAGES.get(path, path)} {index}".strip()
    if stage in names:
        return f"the whole {title}"
    inside = [name.removeprefix(stage + ".").split(".") for name in names]
    words = [f"{PARTS.get(p[0], p[0])} {p[1]}" for p in inside if len(p) == 2]
    deep = sorted((p for p in inside if len(p) > 2), key=_attention_and_part)
    deep = sorted((p for p in inside if len(p) > 2), key=_attention_and_part)
    for (attention, part), layers in groupby(deep, _attention_and_part):
        what = f"{COMPONENTS[part]} of " if part else ""
        words.append(f"{what}transformer layers {_runs(sorted(int(p[3]) for p in layers))} of attention {attention}")
    return f"{', '.join(words)} of the {title}"


def _attention_and_part(parts: Sequence[str]) -> tuple[str, str]:
    """Of "attentions.1.transformer_blocks.0.ff": the attention's number, and the component, "" for a whole layer."""
    return parts[1], parts[4] if len(parts) > 4 else ""


def _runs(numbers: Sequence[int]) -> str:
    """Such as "1, 4-9"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _costs(costs: Any) -> list[str]:
    if costs is None:
        return []
    form = '{"teacher": {"params": .., "macs": {..}}, "student": ..}'
    if not isinstance(costs, Mapping) or not all(isinstance(c, Mapping) for c in costs.values()):
        raise UserError(f"the card's costs are like {form}: got {json.dumps(costs)[:100]}")
    of = {name: {"U-Net parameters": c.get("params"), **_macs(c.get("macs"))} for name, c in costs.items()}
    rows = dict.fromkeys(row for c in of.values() for row in c)
    return list(_table(["", *of], ([row, *(c.get(row) for c in of.values())] for row in rows)))


def _macs(macs: Any) -> dict[str, Any]:
    if isinstance(macs, Mapping):
        return {f"MACs of a U-Net step ({convention})": n for convention, n in macs.items()}
    return {} if macs is None else {"MACs of a U-Net step": macs}


def _scores(scores: Any) -> list[str]:
    if scores is None:
        return []
    if isinstance(scores, Mapping):
        scores = [{"": name, **(v if isinstance(v, Mapping) else {"score": v})} for name, v in scores.items()]
    if not isinstance(scores, list) or not all(isinstance(row, Mapping) for row in scores):
        raise UserError(
            f"the card's scores are like {{name: {{measure: value}}}} or a list of rows: got {json.dumps(scores)[:100]}"
        )
    columns = list(dict.fromkeys(key for row in scores for key in row))
    return list(_table(columns, ([row.get(c) for c in columns] for row in scores))) if scores else []


def _table(columns: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(map(_text, columns))} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(_text(cell) for cell in row)} |"


def _text(value: Any) -> str:
    """A value on one line, with nothing that Markdown or HTML would interpret; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool | int):
        return f"{value:,}" if not isinstance(value, bool) else str(value).lower()
    text = f"{value:.6g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|`*\[\]])", r"\\\1", line)
