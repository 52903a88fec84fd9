"""A denoising network that a runtime computes, in the place of the one in PyTorch: for images, and for its latency."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from blockprune.cost import latency
from blockprune.cost.components import random_unet, unet_inputs
from blockprune.data.encoded import flat
from blockprune.errors import UserError
from blockprune.export.runtimes import COMPILED, RUNTIMES, TORCH
from blockprune.export.runtimes.components import ROWS, Component, Denoiser
from blockprune.export.runtimes.formats import FORMATS, Runner, check_compiler, format_of, in_words, program_of
from blockprune.model.architecture import Architecture
from blockprune.model.pretrained import Configs
from blockprune.runs.atomic import writing_folder
from blockprune.runs.lock import lock

OTHERS = {form.runtime: form.name for form in FORMATS.values()}


class RuntimeUNet(nn.Module):
    """A U-Net that a runtime computes: `unet` lends its configuration, and takes no part."""

    def __init__(self, unet: UNet2DConditionModel, runner: Runner) -> None:
        super().__init__()
        self.config, self.runner = unet.config, runner
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, return_dict: bool = False, **more: Any
    ) -> tuple[Tensor]:
        timesteps = torch.as_tensor(timestep, dtype=torch.float32).expand(len(sample))
        condition = {"encoder_hidden_states": encoder_hidden_states, **{k: v for k, v in more.items() if v is not None}}
        named = {path.rpartition("/")[2]: t for path, t in flat(condition)}
        (output,) = self.runner({"sample": sample, "timestep": timesteps, **named})
        return (output,)


def check_runtime(name: str) -> None:
    """Raises UserError for a runtime that is unknown or not installed, with pip's line."""
    if name not in RUNTIMES:
        raise UserError(f"unknown runtime {name!r}: choose from {', '.join(RUNTIMES)}")
    if name == COMPILED:
        check_compiler(name)
    elif name in OTHERS:
        format_of(OTHERS[name])


def in_runtime(unet: UNet2DConditionModel, runtime: str, latent: tuple[int, int], n_tokens: int, folder: Path) -> nn.Module:
    """The U-Net as a runtime computes it, in float32 on the CPU; written to `folder` first, unless it is there.

    UserError for a runtime that is unknown or not installed, and for a network that it cannot say.
    """
    check_runtime(runtime)
    if runtime == TORCH:
        return unet
    if runtime == COMPILED:
        return torch.compile(unet)  # type: ignore[return-value]
    form = format_of(OTHERS[runtime])
    folder.parent.mkdir(parents=True, exist_ok=True)
    fd = lock(folder.parent)  # several processes may want it at once
    try:
        if not (folder / form.file).is_file():
            with writing_folder(folder) as part, in_words(form, "unet"):
                component = zeros(unet, latent, n_tokens)
                form.write(program_of(component), component, part / form.file, "float32")
    finally:
        if fd is not None:
            os.close(fd)
    return RuntimeUNet(unet, form.load(folder / form.file))


def zeros(unet: UNet2DConditionModel, latent: tuple[int, int], n_tokens: int) -> Component:
    """The network on zeros of the right shapes."""
    inputs = unet_inputs(unet.config, latent, n_tokens, ROWS, "cpu")
    sample, timestep = inputs.pop("sample"), inputs.pop("timestep").expand(ROWS).clone()
    paths = dict(flat(inputs))
    example = {"sample": sample, "timestep": timestep, **{path.rpartition("/")[2]: t for path, t in paths.items()}}
    return Component("unet", Denoiser(unet, list(paths)), unet, example, ("out_sample",), frozenset({"sample"}))


def time_runtimes(
    configs: Configs, student: Architecture, latent: tuple[int, int], batch_size: int, runtimes: Sequence[str], n: int
) -> dict[str, dict[str, Any]]:
    """Runtime => the timings of a step of teacher and student with random weights, and their ratio; all measured in turn.

    On the CPU in float32. Each runtime holds its own copy of the weights of both, but for the two of PyTorch, which share them.
    UserError for a runtime that is not installed, or that cannot run the network.
    """
    for name in runtimes:
        check_runtime(name)
    inputs = unet_inputs(configs.unet, latent, configs.n_tokens, batch_size, "cpu")
    archs = {"teacher": Architecture(), "student": student}
    with TemporaryDirectory(prefix="blockprune-") as folder:
        networks = {}
        for who, arch in archs.items():
            unet = random_unet(configs.unet, arch)
            for name in runtimes:
                networks[name, who] = in_runtime(unet, name, latent, configs.n_tokens, Path(folder, name, who))
        del unet
        models = {f"{name} {who}": partial(_as_it_is, networks[name, who]) for name in runtimes for who in archs}
        timings = latency.measure(models, inputs, n=n, memory=())
    return {name: _compared(timings, name) for name in runtimes}


def _as_it_is(network: nn.Module) -> AbstractContextManager[nn.Module]:
    return nullcontext(network)


def _compared(timings: Mapping[str, latency.Timing], runtime: str) -> dict[str, Any]:
    teacher, student = timings[f"{runtime} teacher"], timings[f"{runtime} student"]
    value, low, high = latency.ratio(teacher, student)
    return {
        "teacher": teacher.to_json(),
        "student": student.to_json(),
        "ratio": {"value": value, "low": low, "high": high},
    }
