"""Reports from a synthetic scan of a small U-Net: with failed rows, missing measures, and markup in prompts."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import kendalltau

from blockprune.cli.console import print_ranking
from blockprune.errors import UserError
from blockprune.measures.measure import MEASURES
from blockprune.measures.score import TEACHER, Score
from blockprune.model.architecture import Architecture
from blockprune.progress import Bars, make_console
from blockprune.reports.canvas import loss_scale, png
from blockprune.reports.figures import figures
from blockprune.reports.image_grid import scan_labels
from blockprune.reports.table import escaped, number, to_csv
from blockprune.reports.text import agreement, scan_markdown, to_json, won_back
from blockprune.reports.unet import Svg
from blockprune.reports.view import ScanView, rank_correlation, ranked, ranking, short


def failed_label(view: ScanView) -> str:
    return list(view.archs)[3]


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_two_cheap_measures_are_held_side_by_side(make: Callable[..., ScanView]) -> None:
    view = make(measures=("eps_mse", "fid", "clip_score"))
    assert agreement(view) == ""
    reversed_ = [replace(s, measure="guided_mse", value=-s.value) for s in view.scores if s.measure == "eps_mse" and s.value]
    text = agreement(replace(view, scores=[*view.scores, *reversed_]))
    taus = [tau.tau for dear in ("fid", "clip_score") if (tau := rank_correlation(view, "eps_mse", dear))]
    assert min(taus) > 0.8
    for name, sign in {"eps_mse": 1, "guided_mse": -1}.items():
        assert f"`{name}` {sign * taus[0]:.2f} with FID and {sign * taus[1]:.2f} with CLIP score" in text


def test_ranking_puts_the_teacher_first_then_least_loss_then_failures(make: Callable[..., ScanView]) -> None:
    view = make()
    rows = ranking(replace(view, scores=tuple(reversed(view.scores))))
    assert [r["label"] for r in rows] == [TEACHER, *(n for n in view.removals if n != failed_label(view)), failed_label(view)]
    assert [r["rank"] for r in rows] == [0, *range(1, len(rows) - 1), None]
    assert rows[-1]["error"] == "eps_mse: the U-Net's output is not finite; fid, clip_score: the images are not <finite>"
    assert rows[-1]["eps_mse"] is None
    cost = view.graph.cost(view.archs[failed_label(view)])
    assert rows[-1]["latency_ratio"] == pytest.approx(cost.params / view.graph.total.params)


def test_what_was_not_reached_yet_comes_before_what_failed(make: Callable[..., ScanView]) -> None:
    view = make()
    last = view.removals[-1]
    rows = ranking(replace(view, scores=[s for s in view.scores if s.label != last]))
    assert [(r["label"], r["rank"], bool(r["error"])) for r in rows[-2:]] == [(last, None, False), (failed_label(view), None, True)]


def test_ranking_prices_by_the_graph(make: Callable[..., ScanView]) -> None:
    view = make()
    for row in ranking(view):
        cost = view.graph.cost(view.archs[row["label"]])
        assert row["params"] == cost.params
        assert row["params"] + row["params_saved"] == view.graph.total.params
        assert row["macs_thop"] + row["macs_saved_thop"] == view.graph.total.thop


def test_higher_is_better_reverses_the_order(make: Callable[..., ScanView]) -> None:
    by_score, by_error = make(measures=("clip_score",)), make(measures=("eps_mse",))
    assert by_score.main_measure == "clip_score"
    scored = {n: v for n in by_score.removals if (v := by_score.value(n, "clip_score")) is not None}
    assert ranked(by_score) == sorted(scored, key=lambda n: -scored[n])
    assert ranked(by_error) == [n for n in by_error.removals if n != failed_label(by_error)]


def test_nan_counts_as_failed(make: Callable[..., ScanView]) -> None:
    view = make()
    label = view.removals[0]
    bad = Score(view.archs[label].key, label, "eps_mse", math.nan, 64, 0)
    row = next(r for r in ranking(replace(view, scores=[*view.scores, bad])) if r["label"] == label)
    assert (row["rank"], row["eps_mse"], row["error"]) == (None, None, "eps_mse: the value is nan")
    assert "NaN" not in to_json(replace(view, scores=[*view.scores, bad]))


def test_rows_of_another_scan_are_an_error(make: Callable[..., ScanView]) -> None:
    view = make()
    with pytest.raises(UserError, match="elsewhere"):
        replace(view, scores=[Score("0", "elsewhere", "fid", 1.0, 1, 0)])
    with pytest.raises(UserError, match="full"):
        replace(view, archs={"mid_block": Architecture(frozenset({"mid_block"}))}, scores=[])


@pytest.mark.parametrize("second", ["fid", "clip_score"])
def test_rank_correlation_is_kendalls_tau_b(make: Callable[..., ScanView], second: str) -> None:
    view, rng = make(), np.random.default_rng(1)
    values = {n: (float(a), float(b)) for n, a, b in zip(view.removals, *rng.integers(0, 9, (2, len(view.removals))), strict=True)}
    scores = [Score("k", n, m, v, 8, 0) for n, pair in values.items() for m, v in zip(("eps_mse", second), pair, strict=True)]
    sign = 1 if second == "fid" else -1
    tau = rank_correlation(replace(view, scores=scores), "eps_mse", second)
    assert tau is not None
    assert tau.n == len(view.removals)
    assert tau.tau == pytest.approx(sign * kendalltau(*zip(*values.values(), strict=True)).statistic)


def test_rank_correlation_needs_three_and_a_difference(make: Callable[..., ScanView]) -> None:
    view = make()
    few = [s for s in view.scores if s.label in view.removals[:2]]
    flat = [replace(s, value=1.0) for s in view.scores]
    assert rank_correlation(replace(view, scores=few), "eps_mse", "fid") is None
    assert rank_correlation(replace(view, scores=flat), "eps_mse", "fid") is None
    assert rank_correlation(make(measures=("fid",)), "eps_mse", "fid") is None


def test_csv_and_json_say_what_the_ranking_says(make: Callable[..., ScanView]) -> None:
    view = make()
    rows, data = list(csv.DictReader(io.StringIO(to_csv(ranking(view))))), json.loads(to_json(view))
    assert [r["label"] for r in rows] == [r["label"] for r in data["ranking"]] == [r["label"] for r in ranking(view)]
    assert [float(r["fid"] or "nan") for r in rows[:-1]] == [r["fid"] for r in data["ranking"][:-1]]
    assert rows[-1]["fid"] == ""
    assert data["protocol"]["machine"] == {"cpu": "2 cores"}
    assert data["measures"]["clip_score"].items() >= {"unit": "cosine", "direction": "up", "title": "CLIP score"}.items()
    assert data["rank_correlation"]["kendall_tau"] > 0.8


def test_markdown_says_what_is_free_and_what_is_ruinous(make: Callable[..., ScanView]) -> None:
    view = make()
    scores = {(s.label, s.measure): s for s in view.scores if s.delta_low is not None and s.label != TEACHER}
    worsened = {
        "fid": [label for (label, m), s in scores.items() if m == "fid" and (s.delta_low or 0) > 0],
        "clip_score": [label for (label, m), s in scores.items() if m == "clip_score" and (s.delta_high or 0) < 0],
    }
    told = [n for n in view.removals if (n, "fid") in scores]
    free = [n for n in told if n not in {*worsened["fid"], *worsened["clip_score"]}]
    ruinous = [
        n
        for n in told
        if scores[n, "fid"].value >= 10 * view.value(TEACHER, "fid")
        or scores[n, "clip_score"].value <= view.value(TEACHER, "clip_score") / 2
    ]
    assert 0 < len(ruinous) < len(told)
    assert 0 < len(free) < 9
    text = scan_markdown(view, ["unet.svg", "grid.png"])
    both = len({*worsened["fid"], *worsened["clip_score"]})
    counts = f"FID for {len(worsened['fid'])} and CLIP score for {len(worsened['clip_score'])}"
    assert f"a removal worsens {counts}, and at least one of these for {both} of {len(told)}." in text
    assert f"Nearly free, worse beyond noise in none of FID and CLIP score: {', '.join(f'`{n}`' for n in free)}." in text
    shown = ", ".join(f"`{n}`" for n in list(reversed(ruinous))[:8])
    assert f"Ruinous, FID at least ten times the teacher's or CLIP score at most half of the teacher's: {shown}" in text
    assert "Left out: `eps_mse`" in text
    assert "Kendall τ = " in text
    assert "(unet.svg)" in text
    assert "(grid.png)" in text
    assert "Not measured: `eps_mse`, `fid`, `clip_score` for 1 of" in text
    assert "biased upwards at small n" in text
    assert "cpu: 2 cores" in text


def test_what_loses_captions_is_not_nearly_free(make: Callable[..., ScanView]) -> None:
    """A removal may leave FID as it was and lose the caption: every measure has a say, and each is named."""
    view = make(measures=("eps_mse", "fid", "kid", "is", "clip_score"))
    free = re.findall(
        r"Nearly free, worse beyond noise in none of FID, KID, CLIP score and Inception Score: (.*?)\. Left", scan_markdown(view)
    )
    first, *_ = free[0].replace("`", "").split(", ")
    bad = [
        replace(s, value=0.2, delta=-0.4, delta_low=-0.45, delta_high=-0.35) if (s.label, s.measure) == (first, "clip_score") else s
        for s in view.scores
    ]
    text = scan_markdown(replace(view, scores=bad))
    (line,) = (line for line in text.splitlines() if "Nearly free" in line)
    assert f"`{first}`" not in line.partition("Nearly free")[2]
    only_fid = [s for s in bad if s.measure == "fid"]
    assert f"`{first}`" in scan_markdown(replace(view, scores=only_fid)).partition("in none of FID: ")[2].partition(".\n")[0]


def test_without_paired_differences_nothing_is_called_free(make: Callable[..., ScanView]) -> None:
    view = make()
    text = scan_markdown(replace(view, scores=[replace(s, delta_low=None, delta_high=None) for s in view.scores]))
    assert "Nearly free" not in text
    assert "no removal has paired differences of FID and CLIP score" in text


@pytest.mark.parametrize("measures", [("eps_mse",), ("fid",), ("clip_score",), ("latency",), ()])
def test_missing_measures_are_said_to_be_missing(make: Callable[..., ScanView], measures: tuple[str, ...]) -> None:
    view = make(measures=measures)
    view = replace(view, protocol={**view.protocol, "measures": ["eps_mse", "fid", "clip_score", "latency"]}, images={})
    text = scan_markdown(view)
    absent = [f"`{m}`" for m in ("eps_mse", "fid", "clip_score", "latency_ratio") if m.removesuffix("_ratio") not in measures]
    assert f"{', '.join(absent)} for all of" in text
    assert "Rank correlation between `eps_mse` and FID: not available" in text
    assert len(to_csv(ranking(view)).splitlines()) == len(view.archs) + 1
    drawn = [name for name, _ in figures(view)]
    assert drawn == (["unet.svg", "tradeoff.svg", "sensitivity.svg"] if set(measures) - {"latency"} else ["unet.svg"])


def test_what_comes_from_outside_is_escaped(make: Callable[..., ScanView]) -> None:
    assert escaped("a|b\n<i> *x* `y` $z$ [l](u)") == r"a\|b &lt;i&gt; \*x\* \`y\` \$z\$ \[l\](u)"
    text = scan_markdown(make())
    assert r"tiny\|model" in text
    assert "not &lt;finite&gt;" in text
    assert "<finite>" not in text


def test_short_names() -> None:
    assert [
        short(n) for n in ("down_blocks.1.resnets.0", "up_blocks.0.pair.2", "mid_block", "up_blocks.3", "bk-sdm-base", "full")
    ] == [
        "down 1 R0",
        "up 0 pair 2",
        "mid",
        "up 3",
        "bk-sdm-base",
        "teacher",
    ]
    assert short("mid_block.attentions.0.transformer_blocks.4") == "mid A0 T4"


def test_every_figure_is_a_sane_picture(make: Callable[..., ScanView]) -> None:
    view = make()
    drawn = dict(figures(view, Architecture(frozenset({"mid_block"}))))
    assert list(drawn) == ["unet.svg", "tradeoff.svg", "sensitivity.svg", "grid.png", "correlation.svg"]
    for name, figure in drawn.items():
        if isinstance(figure, Svg):  # as `test_unet.py` and `test_plot.py` look at
            continue
        picture = pixels(png(figure))
        assert all(500 <= side <= 4000 for side in picture.shape[:2]), name
        assert len(np.unique(picture @ np.array([65536, 256, 1]))) > 50, name
        assert 0.01 < (picture < 250).any(axis=2).mean() < 0.9, name


def test_colours_run_from_light_to_dark_towards_worse() -> None:
    for measure, order in (("fid", [1.0, 5.0, 90.0]), ("clip_score", [0.3, 0.2, 0.1])):
        light = [sum(loss_scale(order, measure).to_rgba(np.array([v]))[0][:3]) for v in order]
        assert light[0] > light[1] > light[2]


def test_the_grid_spreads_over_the_ranking(make: Callable[..., ScanView]) -> None:
    view = make()
    rows, order = scan_labels(view), ranked(view)
    assert len(rows) == 12
    assert rows[0] == TEACHER
    assert (rows[1], rows[-1]) == (order[0], order[-1])
    assert rows[1:] == [n for n in order if n in rows]


def printed(console: Console, act: Callable[[Console], None]) -> str:
    with console.capture() as capture:
        act(console)
    return capture.get()


def test_the_printed_ranking_takes_labels_literally(make: Callable[..., ScanView]) -> None:
    view = make()
    odd = Architecture(frozenset({"mid_block"}))
    archs = {**view.archs, "[red]mine[/red]": odd}
    view = replace(view, archs=archs, scores=[*view.scores, Score(odd.key, "[red]mine[/red]", "eps_mse", 0.5, 8, 0, 0.4, 0.6)])
    text = printed(Console(width=200), lambda c: print_ranking(view, c))
    assert "[red]mine[/red]" in text
    assert "0.500 [0.400, 0.600]" in text
    assert f"{failed_label(view)}: eps_mse: the U-Net's output is not finite; fid, clip_score: the images are not <finite>" in text
    assert "Kendall τ" in text
    narrow = printed(Console(width=80), lambda c: print_ranking(view, c))
    assert max(map(len, narrow.splitlines())) <= 80 or "Kendall" in max(narrow.splitlines(), key=len)


def test_a_scan_says_what_fits_win_back(make: Callable[..., ScanView]) -> None:
    view = make(measures=("eps_mse",))
    assert not list(won_back(view))
    labels = view.removals[5:8]
    archs, scores = dict(view.archs), list(view.scores)
    for label, factor in zip(labels, (0.5, 0.25, 3.0), strict=True):
        fitted = view.graph.fitted(view.archs[label], "linear")
        archs[f"{label}~linear"] = fitted
        scores.append(Score(fitted.key, f"{label}~linear", "eps_mse", factor * (view.value(label, "eps_mse") or 0), 8, 0))
    (sentence,) = won_back(replace(view, archs=archs, scores=scores))
    middle = number(view.value(labels[1], "eps_mse"))
    begins = "With a `linear` fit in its place `eps_mse` is better in 2 of 3 removals"
    assert sentence.startswith(f"{begins}; the median goes from {middle} to ")


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_printed_ranking_names_every_removal_and_what_it_leaves_out(make: Callable[..., ScanView], width: int) -> None:
    view = make()
    text = printed(Console(width=width), lambda c: print_ranking(view, c))
    assert all(re.search(rf"^ +[\d-]+ +{re.escape(label)} ", text, re.MULTILINE) for label in view.archs)
    lost = [m for m in view.measures if MEASURES[m].of_quality and not re.search(rf"^ +# .* {m} ", text, re.MULTILINE)]
    left_out = " ".join(text.partition("no room at")[2].split())
    assert all(m in left_out for m in lost) and (left_out or width > 80)
    assert "…" not in text


def test_progress_without_a_terminal_is_a_line_per_step() -> None:
    now = iter(range(100))

    def work(console: Console) -> None:
        with Bars(console, clock=lambda: float(next(now))) as progress:
            progress.plan({"eps_mse": 4, "[b]full[/b]": 2, "mid_block": 2})
            progress.tick("eps_mse", 2)
            progress.tick("eps_mse", 2)
            progress.tick("[b]full[/b]", 1)
            progress.say("failed: [i]NaN[/i]\n!")
            progress.tick("mid_block", 2)

    lines = printed(Console(width=40, force_terminal=False), work).splitlines()
    assert lines == [
        "[1/3] eps_mse: 4 images, 2 images/s, 0:00:00 left, then 4 images",
        "failed: [i]NaN[/i] !",
        "[3/3] mid_block: 2 images, 2 images/s, 0:00:00 left",
    ]


def test_progress_on_a_terminal_is_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")

    def work(console: Console) -> None:
        with Bars(console) as progress:
            progress.plan({"full": 2, "[b]mid": 4})
            progress.tick("full", 2)
            progress.tick("[b]mid", 2)

    text = printed(Console(width=120, force_terminal=True), work)
    assert "[b]mid" in text
    assert "2/4 images" in text


def test_bars_know_the_time_left_of_slow_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    now = [0.0]

    def work(console: Console) -> None:
        with Bars(console, clock=lambda: now[0]) as progress:
            progress.plan({"search": 40}, "architectures")
            for _ in range(4):
                now[0] += 60
                progress.tick("search", 1)

    text = printed(Console(width=120, force_terminal=True), work)
    assert "4/40 architectures" in text
    assert "0:36:00" in text


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch, make: Callable[..., ScanView]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[31m" in printed(make_console(), lambda c: print_ranking(make(), c))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in printed(make_console(), lambda c: print_ranking(make(), c))
