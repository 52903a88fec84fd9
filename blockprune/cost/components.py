"""The parts of a text-to-image pipeline on the meta device: what each costs, checked by other counters, or with random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from blockprune.cost import crosscheck, latency
from blockprune.errors import UserError
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.config_schema import Config
from blockprune.model.count import count
from blockprune.model.families import family_of
from blockprune.model.graph import Cost
from blockprune.model.pretrained import Configs

TEXT_MODELS = {c.__name__: c for c in (CLIPTextModel, CLIPTextModelWithProjection)}
_TILE = 1_000_003  # prime, so that rows of a weight do not repeat in step


@dataclass(frozen=True)
class Part:
    """A module and the keyword arguments of one call."""

    module: nn.Module
    kwargs: Mapping[str, Any]

    def run(self) -> Any:
        return self.module(**self.kwargs)

    def count(self) -> dict[str, Cost]:
        """The cost of one call by module path; the module is on the meta device."""
        with surgery.built(type(self.module).__name__):
            return count(self.module, self.run)


def unet_inputs(
    config: Config,
    latent: tuple[int, int],
    n_tokens: int,
    batch_size: int = 1,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Zeros of the right shapes as keyword arguments for a U-Net's forward."""
    sample = torch.zeros(batch_size, config["in_channels"], *latent, device=device, dtype=dtype)
    return {"sample": sample, "timestep": torch.ones((), device=device)} | family_of(config).blank(
        config, batch_size, n_tokens, sample
    )


def unet_part(configs: Configs, arch: Architecture, latent: tuple[int, int]) -> Part:
    """One step of the pruned U-Net, batch 1, on the meta device."""
    return Part(surgery.skeleton(configs.unet, arch), unet_inputs(configs.unet, latent, configs.n_tokens))


def other_parts(
    configs: Configs, latent: tuple[int, int], device: str | torch.device = "meta", dtype: torch.dtype = torch.float32
) -> dict[str, Part]:
    """The text encoders and the VAE decoder (without `post_quant_conv`), one prompt and one image.

    On the meta device for counting; elsewhere with the libraries' random weights, for timing.
    """
    with surgery.built("text encoders and VAE"), torch.device(device):
        parts = {name: _text_part(name, config) for name, config in configs.text.items()}
        decoder = AutoencoderKL.from_config(configs.vae).decoder
        sample = torch.zeros(1, configs.vae["latent_channels"], *latent, dtype=dtype)
    parts |= {"vae_decoder": Part(decoder, {"sample": sample})}
    for part in parts.values():
        part.module.eval().requires_grad_(False).to(dtype)
    return parts


def encoder_part(
    configs: Configs, latent: tuple[int, int], device: str | torch.device = "meta", dtype: torch.dtype = torch.float32
) -> Part:
    """The VAE's encoder and one image, as `other_parts` has the decoder. UserError for a configuration that describes none."""
    with surgery.built("the VAE"), torch.device(device):
        encoder = AutoencoderKL.from_config(configs.vae).encoder
        sample = torch.zeros(1, configs.vae["in_channels"], *(side * configs.vae_factor for side in latent), dtype=dtype)
    return Part(encoder.eval().requires_grad_(False).to(dtype), {"sample": sample})


def _text_part(name: str, config: Config) -> Part:
    kind = (config.get("architectures") or ["?"])[0]
    if kind not in TEXT_MODELS:
        raise UserError(f"{name} is a {kind}, whose cost is not known here: give a model with {' or '.join(TEXT_MODELS)}")
    module = TEXT_MODELS[kind](CLIPTextConfig(**config))
    return Part(module, {"input_ids": torch.zeros(1, module.config.max_position_embeddings, dtype=torch.long)})


def pipeline_costs(configs: Configs, latent: tuple[int, int]) -> dict[str, Cost]:
    """The cost of everything but the U-Net for one image: each text encoder for one prompt, the VAE decoder."""
    return {name: part.count()[""] for name, part in other_parts(configs, latent).items()}


def outside_params(configs: Configs) -> int:
    """Parameters of a pipeline outside its denoising network, as the papers count them: text encoders and VAE decoder."""
    return sum(p.numel() for part in other_parts(configs, configs.latent()).values() for p in part.module.parameters())


class Chain(nn.Module):
    """Calls of parts in succession, each as often as it says, as one module without arguments."""

    def __init__(self, calls: Sequence[tuple[Part, int]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self) -> None:
        for part, times in self.calls:
            for _ in range(times):
                part.run()


def time_components(
    configs: Configs, unets: Mapping[str, tuple[nn.Module, Architecture]], latent: tuple[int, int], steps: int, n: int
) -> dict[str, dict[str, latency.Timing]]:
    """Measured latencies by line of `table.component_costs` and by label, all labels in turn; nothing is a sum of others, and all
    but the first are also ratios to it.

    `unets` are U-Nets with what is masked of them, all on one device in one precision.
    """
    first, _ = next(iter(unets.values()))
    some = next(p for p in first.parameters() if p.is_floating_point())
    others = other_parts(configs, latent, some.device, some.dtype)
    inputs = unet_inputs(configs.unet, latent, configs.n_tokens, 1, some.device, some.dtype)
    text = [(part, 1) for name, part in others.items() if name != "vae_decoder"]
    found: dict[str, dict[str, latency.Timing]] = {}
    for name in (*(k for k in others if k != "vae_decoder"), "unet", "unet_steps", "vae_decoder", "pipeline"):
        models: dict[str, latency.Model] = {}
        for label, (unet, arch) in unets.items():
            step, decoder = Part(unet, inputs), others["vae_decoder"]
            calls = {"unet": [(step, 1)], "unet_steps": [(step, steps)], "pipeline": [*text, (step, steps), (decoder, 1)]}
            chain = Chain(calls[name] if name in calls else [(others[name], 1)])
            models[label] = partial(_masked, unet, arch, chain)
        timings = latency.measure(models, {}, n, 1, some.device, memory=())
        teacher, *students = timings
        over = {label: latency.ratio(timings[teacher], timings[label]) for label in students}
        found[name] = {label: replace(timing, over=over.get(label)) for label, timing in timings.items()}
    return found


def time_students(
    configs: Configs,
    students: Mapping[str, Architecture],
    latent: tuple[int, int],
    steps: int,
    n: int,
    device: str | torch.device,
    dtype: torch.dtype,
) -> dict[str, dict[str, latency.Timing]]:
    """`time_components` of the teacher and of every student that lacks something, as masks on one U-Net of random weights."""
    unet = random_unet(configs.unet, Architecture(), device, dtype)
    masks = {"teacher": Architecture()} | {label: arch for label, arch in students.items() if arch}
    return time_components(configs, {label: (unet, arch) for label, arch in masks.items()}, latent, steps, n)


def time_step(
    configs: Configs,
    student: Architecture,
    latent: tuple[int, int],
    batch_size: int,
    n: int,
    device: str | torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """One step of teacher and student in turn, random weights: the timings of both, and their ratio paired by round."""
    inputs = unet_inputs(configs.unet, latent, configs.n_tokens, batch_size, device, dtype)
    unet = random_unet(configs.unet, Architecture(), device, dtype)
    models = {label: partial(surgery.removed, unet, arch) for label, arch in (("teacher", Architecture()), ("student", student))}
    timings = latency.measure(models, inputs, n=n, device=device)
    value, low, high = latency.ratio(timings["teacher"], timings["student"])
    return {label: t.to_json() for label, t in timings.items()} | {"ratio": {"value": value, "low": low, "high": high}}


@contextmanager
def _masked(unet: Any, arch: Architecture, chain: Chain) -> Iterator[Chain]:
    with surgery.removed(unet, arch):
        yield chain


def verify(configs: Configs, arch: Architecture, latent: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Multiply-adds by thop and by fvcore of each part of the pipeline, where they agree with ours; UserError where not.

    fvcore runs every part once on the CPU.
    """

    def parts() -> dict[str, Part]:
        return {"unet": unet_part(configs, arch, latent)} | other_parts(configs, latent)

    costs = {name: part.count() for name, part in parts().items()}
    thop = {name: crosscheck.check_thop(p.module, p.kwargs, costs[name]) for name, p in parts().items()}
    fvcore = {}
    for name, part in parts().items():
        kwargs = recursively_apply(lambda t: torch.zeros(t.shape, dtype=t.dtype), part.kwargs)
        fvcore[name] = crosscheck.check_fvcore(crosscheck.hollow(part.module), kwargs, costs[name])
    return {name: {"thop": thop[name], "fvcore": fvcore[name]} for name in costs}


def random_unet(
    config: Config,
    arch: Architecture,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> UNet2DConditionModel:
    """A pruned U-Net with random weights that keep activations finite: for timing, not for images.

    A few seconds for SD v1 on one core: every weight is cut from one block of normal noise, scaled by 1/sqrt(fan-in).
    """
    unet = surgery.skeleton(config, arch)
    noise = torch.randn(_TILE, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    weights = {name: _random(name, p.shape, noise) for name, p in unet.state_dict().items()}
    unet.load_state_dict(weights, assign=True)
    return unet.requires_grad_(False)


def _random(name: str, shape: torch.Size, noise: Tensor) -> Tensor:
    if len(shape) < 2:
        return noise.new_full(shape, 1.0 if name.endswith("weight") else 0.0)
    flat = noise.new_empty(shape.numel())
    for piece in flat.split(_TILE):
        torch.mul(noise[: piece.numel()], 1 / math.sqrt(shape[1:].numel()), out=piece)
    return flat.view(shape)
