"""Distillation: every loss term against a plain computation, gradients, exact resuming, several processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.model.families import Condition
from blockprune.model.presets import preset
from blockprune.model.trace import trace
from blockprune.stages.train import losses
from blockprune.stages.train.checkpoints import MANIFEST, read_snapshot, write_snapshot
from blockprune.stages.train.distill import Distiller, student_of
from blockprune.stages.train.recipe import RECIPES, Phase, Recipe, read_recipe
from blockprune.stages.train.samples import Sampler
from blockprune.stages.train.taps import Tap, stage_taps, taps_of
from blockprune.stages.train.trainer import Settings

GRAPH = trace(tiny.config("sd1"))
SHAPE = (4, 8, 8)


class Fixed:
    """Twelve pairs of noise with random conditions."""

    identity = "fixed"

    def __len__(self) -> int:
        return 12

    def latents(self, indices: Sequence[int], flips: Sequence[bool], noise: Tensor) -> tuple[Tensor, Condition]:
        def row(i: int, *shape: int) -> Tensor:
            return torch.randn(*shape, generator=torch.Generator().manual_seed(i))

        clean = torch.stack([row(i, *SHAPE).flip(-1) if f else row(i, *SHAPE) for i, f in zip(indices, flips, strict=True)])
        return clean + 0.1 * noise, {"encoder_hidden_states": torch.stack([row(i, tiny.N_TOKENS, 8) for i in indices])}


def sampler(prediction: str = "epsilon", **kwargs: Any) -> Sampler:
    blank = {"encoder_hidden_states": torch.zeros(1, tiny.N_TOKENS, 8)}
    return Sampler(Fixed(), DDPMScheduler(prediction_type=prediction), blank, 0, SHAPE, **kwargs)


def distiller(
    arch: Architecture, recipe: Recipe, settings: Settings | None = None, teacher: UNet2DConditionModel | None = None, **kwargs: Any
) -> Distiller:
    teacher = teacher or tiny.unet("sd1")
    student = student_of(teacher, arch, recipe.initialise, 0)
    settings = settings or Settings(2)
    prediction = kwargs.pop("prediction", "epsilon")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=settings.accumulation)
    return Distiller(accelerator, teacher, student, trace(teacher.config), arch, sampler(prediction), recipe, settings, **kwargs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["bk-sdm-base", "bk-sdm-tiny"])
def test_every_term_equals_a_plain_computation(prediction: str, name: str) -> None:
    arch = preset(name)
    run = distiller(arch, Recipe(), prediction=prediction)
    taught = run.teacher_output(range(3))
    batch, got = taught.batch, run.losses(taught)
    outputs: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}
    hooks, predicted = [], {}
    for who, unet in (("teacher", run.teacher), ("student", run.bare)):
        modules = dict(unet.named_modules())
        for tap in run.taps:
            place = getattr(tap, who)

            def keep(module: Any, args: Any, out: Any, who: str = who, place: str = place) -> None:
                outputs[who][place] = out[0] if isinstance(out, tuple) else out

            hooks.append(modules[place].register_forward_hook(keep))
        predicted[who] = unet(batch.noisy, batch.timesteps, **batch.condition).sample
    alpha = DDPMScheduler().alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noise = batch.target if prediction == "epsilon" else alpha.sqrt() * batch.target + (1 - alpha).sqrt() * batch.noisy
    clean = (batch.noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    target = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    assert got["task"].item() == pytest.approx(((predicted["student"] - target) ** 2).mean().item(), rel=1e-4)
    assert got["output"].item() == pytest.approx(((predicted["student"] - predicted["teacher"]) ** 2).mean().item(), rel=1e-5)
    features = [((outputs["student"][t.student] - outputs["teacher"][t.teacher]) ** 2).mean().item() for t in run.taps]
    assert got["feature"].item() == pytest.approx(sum(features), rel=1e-5)
    assert run.total(got).item() == pytest.approx(sum(got[k].item() for k in ("task", "output", "feature")), rel=1e-5)


def test_published_taps() -> None:
    names = [f"down_blocks.{i}" for i in range(4)] + [f"up_blocks.{i}" for i in range(4)]
    for name in ("bk-sdm-base", "bk-sdm-small"):
        assert stage_taps(GRAPH, preset(name)) == [Tap(n, n) for n in names]
    inner = Tap("down_blocks.2.attentions.1.proj_out", "down_blocks.2.attentions.0.proj_out")
    others = [Tap(n, n) for n in names if n not in ("down_blocks.2", "down_blocks.3", "up_blocks.0")]
    assert sorted(stage_taps(GRAPH, preset("bk-sdm-tiny")), key=lambda t: t.student) == sorted(
        [*others, inner], key=lambda t: t.student
    )


def test_a_stage_of_which_little_or_nothing_is_left() -> None:
    tiny_ = preset("bk-sdm-tiny")
    stage = "down_blocks.2"
    resnet = tiny_ | Architecture(frozenset({f"{stage}.attentions.0"}))
    assert Tap(f"{stage}.resnets.1", f"{stage}.resnets.0") in stage_taps(GRAPH, resnet)
    nothing = resnet | Architecture(frozenset({f"{stage}.resnets.0"}))
    assert not [tap for tap in stage_taps(GRAPH, nothing) if tap.student.startswith(stage)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("taps", ["stages", "layers"])
def test_every_feature_term_has_a_gradient(checkpointing: bool, taps: str) -> None:
    run = distiller(
        preset("bk-sdm-small"), Recipe(taps=taps, self_attention=True), Settings(1, gradient_checkpointing=checkpointing)
    )
    with torch.no_grad():  # else the features before the first removed block are the teacher's own, and have no gradient
        for p in run.bare.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    terms = run.losses(run.teacher_output(range(1)))
    names = [name for name in terms if name.startswith("feature/")]
    assert len(names) == len(run.taps) > 8
    for name in names:
        grads = torch.autograd.grad(terms[name], list(run.bare.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads), name


def test_an_unpruned_student_has_no_kd_loss() -> None:
    run = distiller(Architecture(), Recipe(taps="layers"))
    run.bare.eval()
    terms = run.losses(run.teacher_output(range(2)))
    assert terms["output"].item() == 0
    assert terms["feature"].item() == 0


def test_normalised_taps_divide_by_the_teachers_power() -> None:
    a, b = torch.randn(2, 3), 10 * torch.randn(2, 3)
    (plain,), (scaled,) = (losses.feature_losses({"x": a}, {"x": b}, n).values() for n in (False, True))
    assert scaled.item() == pytest.approx((plain / (b**2).mean()).item())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr(prediction: str) -> None:
    alphas = DDPMScheduler().alphas_cumprod
    t = torch.tensor([0, 500, 999])
    snr = (alphas[t] / (1 - alphas[t])).double()
    expected = [min(s, 5.0) / (s + (prediction == "v_prediction")) for s in snr.tolist()]
    assert losses.min_snr_weights(alphas, t, 5.0, prediction).tolist() == pytest.approx(expected, rel=1e-5)
    weighted = losses.task_loss(torch.ones(2, 4), torch.zeros(2, 4), torch.tensor([1.0, 3.0]))
    assert weighted.item() == 2.0


def test_the_teacher_stays_and_the_students_loss_falls() -> None:
    run = distiller(preset("bk-sdm-small"), Recipe(learning_rate=2e-3), Settings(4))
    before = {k: v.clone() for k, v in run.teacher.state_dict().items()}
    rows = [state.losses for state in run.run(40)]
    assert all(torch.equal(v, before[k]) for k, v in run.teacher.state_dict().items())
    first, last = (sum(r["loss"] for r in part) for part in (rows[:10], rows[-10:]))
    assert last < 0.8 * first


def test_samples_are_functions_of_seed_and_index() -> None:
    one, two = sampler(flip=True), sampler(flip=True)
    a = one.batch(range(6), torch.device("cpu"))
    parts = [two.batch(range(i, i + 2), torch.device("cpu")) for i in (4, 2, 0)][::-1]
    torch.testing.assert_close(a.noisy, torch.cat([p.noisy for p in parts]))
    assert torch.equal(a.timesteps, torch.cat([p.timesteps for p in parts]))
    assert sorted(one.index(g) for g in range(12)) == list(range(12))
    assert [one.index(g) for g in range(12)] != [one.index(g) for g in range(12, 24)]
    assert not torch.equal(a.noisy, replace(one, seed=1).batch(range(6), torch.device("cpu")).noisy)


def test_dropped_captions_become_blank() -> None:
    batch = sampler(caption_dropout=1.0).batch([0, 1], torch.device("cpu"))
    assert batch.condition["encoder_hidden_states"].abs().sum() == 0
    some = sampler(caption_dropout=0.5).batch(range(40), torch.device("cpu")).condition["encoder_hidden_states"]
    assert 8 < (some.abs().sum((1, 2)) == 0).sum() < 32


def test_random_initialisation_differs_from_the_teacher() -> None:
    teacher = tiny.unet("sd1")
    first, second = (student_of(teacher, preset("bk-sdm-base"), "random", 5).state_dict() for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert not torch.equal(first["conv_in.weight"], teacher.state_dict()["conv_in.weight"])


@pytest.mark.parametrize(
    "settings",
    [Settings(2, ema=True), pytest.param(Settings(1, accumulation=2), marks=pytest.mark.slow)],
    ids=["ema", "accumulation"],
)
def test_a_resumed_run_is_the_undisturbed_one(settings: Settings, tmp_path: Path) -> None:
    arch, recipe = preset("bk-sdm-small"), Recipe(learning_rate=1e-3)
    whole = distiller(arch, recipe, settings)
    rows = [s.losses for s in whole.run(6)]
    first = distiller(arch, recipe, settings)
    begun = [s.losses for s in first.run(3)]
    write_snapshot(tmp_path, 3, first.parts())
    snapshot, wrong = read_snapshot(tmp_path)
    assert snapshot is not None
    assert not wrong
    second = distiller(arch, recipe, settings, start=snapshot)
    assert begun + [s.losses for s in second.run(6)] == rows
    again = second.parts()
    for name, tensors in whole.parts().items():
        assert all(torch.equal(t, again[name][k]) for k, t in tensors.items()), name


def test_a_resumed_run_has_its_tensors_in_the_layout_that_they_had(tmp_path: Path) -> None:
    """Kernels choose how to round by layout and alignment, so a run could not go on as it was with others."""
    arch, recipe, settings = preset("bk-sdm-small"), Recipe(), Settings(2, ema=True)
    first = distiller(arch, recipe, settings)
    assert len(list(first.run(1))) == 1
    write_snapshot(tmp_path, 1, first.parts())
    second = distiller(arch, recipe, settings, start=read_snapshot(tmp_path)[0])

    def layouts(run: Distiller) -> dict[str, list[tuple[tuple[int, ...], int]]]:
        states = [t for p in run.bare.parameters() for t in run.optimizer.state[p].values() if t.ndim]
        assert run.ema is not None
        tensors = {"weights": list(run.bare.parameters()), "optimizer": states, "ema": run.ema.shadow_params}
        return {name: [(t.stride(), t.data_ptr() % 64) for t in parts] for name, parts in tensors.items()}

    assert layouts(second) == layouts(first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "arch", "compiler"),
    [
        (tiny.small_unet, Architecture(frozenset({"mid_block"})), "eager"),
        (tiny.unet, preset("bk-sdm-small"), "aot_eager"),
    ],
    ids=["small", "whole"],
)
def test_compiled_models_train_as_the_plain_ones(make: Callable[[str], Any], arch: Architecture, compiler: str) -> None:
    recipe = Recipe(learning_rate=1e-3)
    plain, compiled = (distiller(arch, recipe, Settings(2, compiler=name), make("sd1")) for name in ("", compiler))
    for expected, got in zip(plain.run(3), compiled.run(3), strict=True):
        assert got.losses.keys() == expected.losses.keys()
        assert got.losses == pytest.approx(dict(expected.losses), rel=1e-4)
    assert compiled.parts()["student"].keys() == plain.parts()["student"].keys()


def test_ema_moves_and_is_the_students() -> None:
    run = distiller(preset("bk-sdm-small"), Recipe(learning_rate=1e-2), Settings(2, ema=True))
    before = {k: v.clone() for k, v in run.parts()["ema"].items()}
    list(run.run(3))
    after = run.parts()["ema"]
    assert set(after) - {"optimization_step"} == {n for n, _ in run.bare.named_parameters()}
    assert any(not torch.equal(v, before[k]) for k, v in after.items())
    student = run.parts()["student"]
    assert any(not torch.equal(v, student[k]) for k, v in after.items() if k in student)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    run = distiller(preset("bk-sdm-small"), Recipe())
    with torch.no_grad():
        next(run.bare.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        list(run.run(1))


def test_taps_that_do_not_exist_or_match_fail_at_the_start() -> None:
    with pytest.raises(UserError, match=r"no module 'down_blocks\.9' to tap"):
        distiller(preset("bk-sdm-small"), Recipe(taps=("down_blocks.9",)))
    with pytest.raises(UserError, match="'mid_block' is removed in the student"):
        distiller(preset("bk-sdm-small"), Recipe(taps=("mid_block",)))
    inner = preset("bk-sdm-tiny")
    with pytest.raises(UserError, match=r"the tap 'down_blocks.2' of the teacher has the shape"):
        distiller(inner, Recipe(taps=("down_blocks.2",)))
    assert taps_of(GRAPH, inner, "layers")


def test_torn_checkpoints_fall_back_and_say_so(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_snapshot(tmp_path, step, {"student": {"a": torch.full((3,), float(step))}}, limit=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-000000{i}" for i in (2, 3, 4)]
    file = tmp_path / "step-0000004" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (tmp_path / "step-0000003" / MANIFEST).unlink()
    found, wrong = read_snapshot(tmp_path)
    assert found is not None
    assert found.step == 2
    assert found.parts["student"]["a"].tolist() == [2, 2, 2]
    assert len(wrong) == 2
    assert "step-0000004" in wrong[0]
    assert read_snapshot(tmp_path / "none") == (None, [])


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from accelerate import Accelerator, DistributedType
from stages.train import test_distill as t
from blockprune.model.presets import preset
from blockprune.stages.train.checkpoints import Snapshot
world, sharded = int(sys.argv[1]), sys.argv[2] == "sharded"

def shard(self, model, *others):
    from torch.distributed.fsdp import fully_shard
    for name, module in model.named_modules():
        if name.endswith(("resnets.0", "attentions.0")):
            fully_shard(module)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    return model, optimizer

if sharded:  # accelerate shards on accelerators alone; this is what it does there
    Accelerator.prepare = shard
    Accelerator.distributed_type = DistributedType.FSDP
    Accelerator.clip_grad_norm_ = lambda self, parameters, most: torch.nn.utils.clip_grad_norm_(parameters, most)
def made(**kwargs):
    return t.distiller(preset("bk-sdm-small"), t.Recipe(learning_rate=1e-3), t.Settings(4 // world, ema=True), **kwargs)
run = made()
assert run.accelerator.num_processes == world
rows = [s.losses for s in run.run(2)]
again = made(start=Snapshot(2, run.parts(), None))
rows += [s.losses for s in again.run(4)]
rows.append({{name: w.double().sum().item() for name, w in again.weights(averaged=True).items()}})
if run.accelerator.is_main_process:
    print("ROWS" + json.dumps(rows))
"""


@pytest.mark.slow
def test_two_processes_whole_or_sharded_have_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[2])))
    rows = []
    for world, form in ((1, "whole"), (2, "whole"), (2, "sharded")):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [sys.executable, *launch, str(script), str(world), form]
        out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert out.returncode == 0, out.stderr[-2000:]
        rows.append(json.loads(next(line for line in out.stdout.splitlines() if line.startswith("ROWS"))[4:]))
    for one, two, sharded in zip(*rows, strict=True):
        assert sharded == pytest.approx(one, rel=1e-4, abs=1e-5)
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert len(rows[0]) == 4 + 1
    assert any(name.startswith("feature/") for name in rows[0][3])


def test_the_recipes_that_come_along() -> None:
    bk, segmind = read_recipe("bk-sdm"), read_recipe("segmind")
    assert bk == Recipe()
    assert (segmind.taps, segmind.output, segmind.feature, segmind.learning_rate) == ("layers", 0.5, 0.5, 1e-5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("outputs = 1.0", "unknown key 'outputs'"),
        ("output = 'much'", "output: expected float, got str"),
        ("output = -1", "output must not be negative"),
        ("taps = 'blocks'", "taps must be stages, layers or a list"),
        ("task = 0\noutput = 0\nfeature = 0", "all losses have weight 0"),
        ("[[phases]]\nsteps = 0", "steps: expected int >= 1"),
        ("[[phases]]\nepochs = 3", "unknown key 'epochs'"),
        ("task = ", "cannot read the recipe"),
        ("initialise = 'zero'", "initialise must be teacher or random"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_recipe(str(tmp_path / "mine.toml"))


def test_a_recipe_with_phases(tmp_path: Path) -> None:
    own = (RECIPES / "bk-sdm.toml").read_text() + '\n[[phases]]\nsteps = 5\narch = "bk-sdm-base"\n[[phases]]\nteacher = "other"\n'
    (tmp_path / "mine.toml").write_text(own)
    assert read_recipe(str(tmp_path / "mine.toml")).phases == (Phase(5, None, "bk-sdm-base"), Phase(None, "other", None))
    with pytest.raises(UserError, match="no recipe 'nowhere'"):
        read_recipe("nowhere")
