"""Fitted stand-ins: exact where a block is linear, better with more samples, each on what reaches it in the student."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from blockprune.errors import UserError
from blockprune.export.pipeline import load_student, save_student
from blockprune.export.stock_config import expressible
from blockprune.model import fit as fitting
from blockprune.model import surgery
from blockprune.model.architecture import FITS, Architecture
from blockprune.model.compare import distance, same_outputs
from blockprune.model.count import count
from blockprune.model.families import family_of
from blockprune.model.fit import Batch, DiagonalMoments, Fitter, Moments, enough
from blockprune.model.graph import BlockGraph
from blockprune.model.presets import fitting as presets_of
from blockprune.model.trace import trace

GRAPHS = {kind: trace(tiny.config(kind)) for kind in tiny.KINDS}
LINEAR_BLOCKS = {
    "sd1": (
        "mid_block",
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
        "up_blocks.2.attentions.0",
        "up_blocks.1.attentions.0.transformer_blocks.0.ff",
    ),
    "sdxl": (
        "mid_block",
        "up_blocks.0.resnets.0",
        "down_blocks.1.attentions.0.transformer_blocks.1",
        "down_blocks.1.attentions.0.transformer_blocks.1.attn2",
    ),
}


def batches(kind: str, n: int, size: int | tuple[int, int] = 8, seed: int = 1, at_a_time: int = 10**6) -> list[Batch]:
    given = tiny.inputs(kind, batch=n, size=size, seed=seed)
    sample, timestep = given.pop("sample"), given.pop("timestep")
    whole = [(sample[i : i + at_a_time], timestep[i : i + at_a_time], rows(given, i, at_a_time)) for i in range(0, n, at_a_time)]
    return whole


def rows(condition: dict[str, Any], start: int, n: int) -> dict[str, Any]:
    return {k: rows(v, start, n) if isinstance(v, dict) else v[start : start + n] for k, v in condition.items()}


def run(unet: UNet2DConditionModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return unet(batch[0], batch[1], **batch[2], return_dict=False)[0]


def off(unet: UNet2DConditionModel, arch: Architecture, weights: Any, batch: Batch) -> float:
    """How far the student with these fitted weights is from its teacher."""
    full = run(unet, batch)
    with surgery.removed(unet, arch, weights):
        return distance(run(unet, batch), full)


def many(graph: BlockGraph) -> Architecture:
    """The preset that removes most."""
    return max(presets_of(graph).values(), key=len)


def make_linear(unet: UNet2DConditionModel, name: str, kind: str) -> None:
    """Makes a block the map of a stand-in with random weights."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        stand_in = surgery.stand_in(unet, name, kind)
        assert stand_in.fit is not None
        for p in stand_in.fit.parameters():
            p.add_(torch.randn_like(p) / 4)
    unet.get_submodule(name).register_forward_hook(lambda module, args, kwargs, out: stand_in(*args, **kwargs), with_kwargs=True)


@pytest.mark.parametrize("size", [8, pytest.param((16, 8), marks=pytest.mark.slow)], ids=["square", "oblong"])
@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(f, name, marks=[pytest.mark.slow] * (f == "sdxl")) for f, names in LINEAR_BLOCKS.items() for name in names],
)
def test_a_block_that_is_linear_is_fitted_exactly(family: str, name: str, kind: str, size: int | tuple[int, int]) -> None:
    unet, graph, given = tiny.unet(family), GRAPHS[family], batches(family, 48, size)
    make_linear(unet, name, kind)
    arch = Architecture({f"{name}~{kind}"})
    (found,) = Fitter(unet, graph, given).fits(graph.check(arch))
    assert found.plain > 1e-3 and found.error < 1e-7
    assert off(unet, arch.plain, None, given[0]) > 1e-4
    assert off(unet, arch, found.weights, batches(family, 3, size, seed=9)[0]) < 1e-4


def test_the_residual_is_orthogonal_to_what_was_fitted_on() -> None:
    draw = torch.Generator().manual_seed(0)
    x, r = (torch.randn(300, c, generator=draw, dtype=torch.float64) + 2 for c in (5, 3))
    moments = Moments()
    moments.add(x[:100], r[:100])
    moments.add(x[100:], r[100:])
    ((_, w, b),) = moments.solutions([0.0])
    left = r - x @ w.T - b
    assert left.mean(0).abs().max() < 1e-12 and (x.T @ left).abs().max() < 1e-9
    torch.testing.assert_close(moments.error(w, b), float(left.square().sum(1).mean()))
    by_channel = DiagonalMoments()
    by_channel.add(x[:, :3], r)
    ((_, w, b),) = by_channel.solutions([0.0])
    left = r - x[:, :3] * w - b
    assert left.mean(0).abs().max() < 1e-12 and (x[:, :3] * left).sum(0).abs().max() < 1e-9
    torch.testing.assert_close(by_channel.error(w, b), float(left.square().sum(1).mean()))


def test_a_ridge_is_the_minimum_of_its_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    x, r = (torch.randn(40, c, generator=draw, dtype=torch.float64) for c in (6, 2))
    moments = Moments()
    moments.add(x, r)
    ((_, w, b),) = moments.solutions([0.3])
    scale = 0.3 * x.var(0, correction=0).mean()

    def loss(w: Tensor, b: Tensor) -> Tensor:
        return (r - x @ w.T - b).square().sum(1).mean() + scale * w.square().sum()

    w.requires_grad_(), b.requires_grad_()
    loss(w, b).backward()
    assert w.grad is not None and w.grad.abs().max() < 1e-12 and b.grad is not None and b.grad.abs().max() < 1e-12


def test_a_direction_that_never_varies_is_left_alone() -> None:
    moments = Moments()
    x = torch.randn(50, 3)
    x[:, 1] = 4.0
    moments.add(x, torch.randn(50, 2))
    ((_, w, _),) = moments.solutions([0.0])
    assert torch.isfinite(w).all() and w[:, 1].abs().max() < 1e-6


@pytest.mark.parametrize("kind", tiny.FIRST_KIND)
def test_a_fit_beats_nothing_and_more_samples_do_not_hurt(kind: str) -> None:
    """On noise that no fit has seen; 5 % are allowed for chance."""
    unet, graph, unseen = tiny.unet(kind), GRAPHS[kind], batches(kind, 64, seed=77)[0]
    arch = graph.fitted(many(graph), "linear")
    errors = [off(unet, arch, Fitter(unet, graph, batches(kind, n))(arch), unseen) for n in (16, 64, 256)]
    assert errors[0] < off(unet, arch.plain, None, unseen)
    assert errors[1] < 1.05 * errors[0] and errors[2] < 1.05 * errors[1]


@pytest.mark.parametrize("kind", tiny.FIRST_KIND)
def test_one_batch_in_one_pass_fits_as_many_batches_do(kind: str) -> None:
    unet, graph = tiny.unet(kind), GRAPHS[kind]
    arch = graph.fitted(many(graph), "linear")
    whole, cut = (Fitter(unet, graph, batches(kind, 32, at_a_time=n)) for n in (32, 8))
    for one, other in zip(whole.fits(arch), cut.fits(arch), strict=True):
        assert (one.name, one.n) == (other.name, other.n)  # two ridges may be equally good within rounding
        assert one.error == pytest.approx(other.error, rel=1e-3)
    weights = whole(arch), cut(arch)
    assert weights[0].keys() == weights[1].keys()
    unseen = batches(kind, 4, seed=5)[0]
    with surgery.removed(unet, arch, weights[0]):
        first = run(unet, unseen)
    with surgery.removed(unet, arch, weights[1]):
        assert distance(run(unet, unseen), first) < 1e-3


def test_later_blocks_are_fitted_on_what_the_student_lets_through() -> None:
    """Fitted alone, on the teacher's activations, a block is worse in the student."""
    unet, graph, unseen = tiny.unet("sd1"), GRAPHS["sd1"], batches("sd1", 32, seed=8)[0]
    fitter = Fitter(unet, graph, batches("sd1", 128))
    arch = graph.fitted(presets_of(graph)["bk-sdm-base"], "linear")
    alone = {k: t for name in arch for k, t in fitter(Architecture({f"{name}~linear"})).items()}
    assert off(unet, arch, fitter(arch), unseen) < off(unet, arch, alone, unseen)


def test_what_architectures_share_is_fitted_once_and_the_teacher_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, graph = tiny.unet("sd1"), GRAPHS["sd1"]
    passes, solved = [], []
    unet.conv_in.register_forward_hook(lambda *args: passes.append(1))  # masked passes replay it
    solve = fitting._Problem.solve
    monkeypatch.setattr(fitting._Problem, "solve", lambda self, module: (solved.append(self.name), solve(self, module)))
    fitter = Fitter(unet, graph, batches("sd1", 8))
    first, second = "down_blocks.1.resnets.1~linear", "up_blocks.1.resnets.1~channel"
    one, both = Architecture({first}), Architecture({first, second})
    fits = fitter.fits(one), fitter.fits(both), fitter.fits(both)
    assert fits[1][0] is fits[0][0] and fits[2][1] is fits[1][1]
    assert solved == [first.partition("~")[0], second.partition("~")[0]]
    other = Architecture({first, "mid_block", second})  # another student reaches the second
    assert fitter.fits(other)[1] is not fits[1][1]
    assert len(passes) == 1


def test_nothing_of_the_teacher_changes() -> None:
    unet, graph = tiny.unet("sd1").train(), GRAPHS["sd1"]
    state = {k: t.clone() for k, t in unet.state_dict().items()}
    before = list(map(id, unet.modules()))
    Fitter(unet, graph, batches("sd1", 8))(graph.fitted(presets_of(graph)["bk-sdm-tiny"], "linear"))
    assert list(map(id, unet.modules())) == before and unet.training
    assert all(torch.equal(t, state[k]) for k, t in unet.state_dict().items())
    assert all(not module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("most", [64, 1024])
def test_samples_are_doubled_while_the_held_out_error_falls(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MOST", most)
    unet, graph, asked = tiny.unet("sd1"), GRAPHS["sd1"], list[int]()
    arch = graph.fitted(presets_of(graph)["bk-sdm-small"], "linear")

    def fitter(n: int) -> Fitter:
        asked.append(n)
        return Fitter(unet, graph, batches("sd1", n))

    chosen, said = enough(fitter, arch)
    errors = [sum(fit.error for fit in Fitter(unet, graph, batches("sd1", n)).fits(arch)) for n in asked]
    assert asked == [64 * 2**i for i in range(len(asked))] and asked[-1] <= most
    assert all(b < 0.98 * a for a, b in pairwise(errors[:-1]))  # each but the last doubling was worth it
    assert asked[-1] * 2 > most or errors[-1] >= 0.98 * errors[-2]
    assert f"fitted {len(arch.fits)} stand-ins on {asked[-1]} samples" in said
    assert chosen(arch).keys() == Fitter(unet, graph, batches("sd1", 4))(arch).keys()


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4 samples: got 2"):
        Fitter(tiny.unet("sd1"), GRAPHS["sd1"], batches("sd1", 2))(Architecture({"mid_block~linear"}))


@pytest.mark.parametrize(("kind", "every"), [("sd1", 12), *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in tiny.KINDS)])
@pytest.mark.parametrize("fit", [pytest.param("channel", marks=pytest.mark.slow), "linear"])
def test_costs_are_exact(kind: str, every: int, fit: str) -> None:
    graph, config = GRAPHS[kind], tiny.config(kind)
    sample = torch.empty(1, 4, 8, 8, device="meta")
    condition = family_of(config).blank(config, 1, 77, sample)
    deep = {label: arch for unit in ("layer", "component") for label, arch in list(graph.units(unit).items())[:4]}
    archs = {**graph.units("block"), **deep, **presets_of(graph)}
    if graph.innermost:
        archs |= {"innermost": Architecture(graph.innermost), "without mid": Architecture(graph.innermost | {"mid_block"})}
    for label, arch in list(archs.items())[::every]:
        fitted = graph.check(graph.fitted(arch, fit))
        student = surgery.skeleton(config, fitted)
        assert surgery.architecture_of(student) == fitted and fitted.fits, label
        run = count(student, lambda s=student: s(sample, torch.ones((), device="meta"), **condition))
        assert run[""] == graph.cost(fitted), label


@pytest.mark.parametrize("kind", tiny.FIRST_KIND)
@pytest.mark.parametrize("fit", FITS)
def test_until_it_is_fitted_it_does_what_the_plain_one_does(kind: str, fit: str) -> None:
    unet, graph, batch = tiny.unet(kind), GRAPHS[kind], batches(kind, 2)[0]
    for arch in presets_of(graph).values():
        with surgery.removed(unet, arch):
            plain = run(unet, batch)
        with surgery.removed(unet, graph.fitted(arch, fit)):
            assert same_outputs(run(unet, batch), plain, unet)


@pytest.mark.parametrize("fit", [pytest.param("channel", marks=pytest.mark.slow), "linear"])
def test_a_fitted_student_is_saved_and_loaded_strictly(fit: str, tmp_path: Path) -> None:
    unet, graph, batch = tiny.unet("sd1"), GRAPHS["sd1"], batches("sd1", 8)[0]
    arch = graph.fitted(presets_of(graph)["bk-sdm-small"], fit)
    student = surgery.prune(unet, arch, Fitter(unet, graph, [batch])(arch))
    own = {key for key in student.state_dict() if key not in unet.state_dict()}
    assert own and all(".fit." in key for key in own)
    save_student(student, arch, tmp_path)
    again = load_student(tmp_path)
    assert surgery.architecture_of(again) == arch
    assert same_outputs(run(again, batch), run(student, batch), student)
    assert "a fitted map stands in for" in str(expressible(unet.config, arch))
    data = json.loads((tmp_path / "architecture.json").read_text())
    (tmp_path / "architecture.json").write_text(json.dumps(data | {"removed": list(arch)}))
    with pytest.raises(UserError, match=r"tensors beyond its architecture, .*\.fit\."):
        load_student(tmp_path)


def test_weights_of_another_architecture_are_refused() -> None:
    unet = tiny.unet("sd1")
    weights = Fitter(unet, GRAPHS["sd1"], batches("sd1", 8))(Architecture({"mid_block~linear"}))
    with pytest.raises(UserError, match="fit it again"):
        surgery.removed(unet, Architecture({"mid_block~channel"}), weights)


def test_fitted_weights_train() -> None:
    student = surgery.prune(
        tiny.unet("sd1").requires_grad_(True), Architecture({"mid_block~linear", "up_blocks.1.resnets.1~channel"})
    )
    batch = batches("sd1", 2)[0]
    student.train()(batch[0], batch[1], **batch[2], return_dict=False)[0].square().mean().backward()
    for name in ("mid_block", "up_blocks.1.resnets.1"):
        module = student.get_submodule(name)
        assert isinstance(module, nn.Module) and all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
