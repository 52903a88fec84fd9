"""Whether what a search answers still follows captions as its teacher does, which its objective may not see."""

from __future__ import annotations

from collections.abc import Sequence

from blockprune.reports.search_view import SearchView
from blockprune.runs.records import PRESET, Evaluation

MANY = 3


def warning(view: SearchView) -> str:
    """What a user must know about captions before all else, in a line; "" when there is nothing."""
    lines = [_deafness(view), _followed(view)]
    return "; ".join(line for line in lines if line)


def _deafness(view: SearchView) -> str:
    """What hardly hears the prompt any more, by its score with fits beside the designs' by hand: the answer, or what it beat."""
    if chosen := [(e, heard) for e in view.chosen if (heard := view.hearing(e)) is not None]:
        scores = ", ".join(f"{heard.score.value:.2f}" for _, heard in chosen)
        return (
            f"warning: {_whose(view, chosen)} hardly hears the prompt: {chosen[0][1].score.measure} {scores} with linear fits, "
            f"{_designs(view)}"
        )
    if out := view.left_out:
        scores = ", ".join(f"{e.score.value:.2f}" for e in out[:MANY])
        return (
            f"note: {len(out)} better by {view.measure} hardly hear the prompt and are left out ({out[0].score.measure} {scores} "
            f"with linear fits, {_designs(view)}); --allow prompt-deaf takes them"
        )
    return ""


def _designs(view: SearchView) -> str:
    designs = [e for e in view.heard if e.candidate.source == PRESET and e.score.value is not None]
    return "by hand " + ", ".join(f"{e.score.value:.2f}" for e in designs)


def _followed(view: SearchView) -> str:
    """Whether the answer draws what captions say as well as its teacher, nothing retrained."""
    teacher, chosen = view.caption(None), view.chosen
    answer = "the front" if view.is_front else "the best architecture"
    if teacher is None or teacher.value is None:
        return f"note: whether {answer} still follows captions was not measured: give --clip"
    scores = [(e, s) for e in chosen if (s := view.caption(e)) is not None]
    if broken := [(e, s) for e, s in scores if s.value is None]:
        return f"warning: {_whose(view, broken)} draws no images that can be scored: {broken[0][1].error}"
    if lost := [(e, s) for e, s in scores if s.delta_high is not None and s.delta_high < 0]:
        values = ", ".join(f"{s.value:.2f}" for _, s in lost)
        return (
            f"warning: {_whose(view, lost)} follows captions worse than its teacher: CLIP score {values} against "
            f"{teacher.value:.2f} (n = {teacher.n} images, paired, nothing retrained{_fits(view)})"
        )
    if len(scores) < len(chosen) or any(s.delta_high is None for _, s in scores):
        return f"note: {teacher.n} images without paired intervals do not tell whether {answer} still follows captions"
    return ""


def _fits(view: SearchView) -> str:
    fit = view.protocol.get("score_fit")
    return f", {fit} maps fitted for the scores alone" if fit else ""


def _whose(view: SearchView, chosen: Sequence[tuple[Evaluation, object]]) -> str:
    """The best architecture, or those of the front by their labels."""
    return f"of the front, each of {', '.join(e.score.label for e, _ in chosen)}" if view.is_front else "the best architecture"


def caption_title(view: SearchView) -> str:
    """The heading of the CLIP score, with over how many images it is."""
    teacher = view.caption(None)
    return f"clip_score ↑, n = {teacher.n}" if teacher else "clip_score ↑"
