"""How a personalisation runs: the subject's images and those of its class, training, scores, and what is saved."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers import DiffusionPipeline
from torch import nn

from blockprune.data.encoded import Live, Remembered
from blockprune.data.training_data import PromptedFolder, Reader
from blockprune.errors import UserError
from blockprune.export.save import save_pipeline
from blockprune.export.stock_config import who_loads
from blockprune.measures.score import Score
from blockprune.model import pretrained
from blockprune.model.model import Model
from blockprune.model.pretrained import TEXT
from blockprune.model.surgery import architecture_of
from blockprune.progress import Listener, Silent
from blockprune.runs import open_run
from blockprune.runs.atomic import writing_folder
from blockprune.runs.directory import Run
from blockprune.runs.memory import MemoryRun
from blockprune.runs.provenance import made_with
from blockprune.stages import loading
from blockprune.stages.outline import outlined, say_how_long
from blockprune.stages.personalise.class_images import ClassImages, class_prompts
from blockprune.stages.personalise.dreambooth import DreamBooth, Learner
from blockprune.stages.personalise.lora import add_lora, check_peft, save_lora, unloadable
from blockprune.stages.personalise.request import ALPHA, TEXT_ALPHA, PersonaliseRequest
from blockprune.stages.personalise.work import counted
from blockprune.stages.plan import N_PICTURES
from blockprune.stages.train.checkpoints import Snapshot
from blockprune.stages.train.launch import accelerated, launched
from blockprune.stages.train.recorded import Recorded, check_tracker
from blockprune.stages.train.samples import Sampler, samples_of
from blockprune.stages.train.trainer import Optimiser, Settings
from blockprune.stages.train.validation import Validation

SCORES = ("dino", "clip_i", "clip_t")
Samplers = tuple[Sampler, Sampler | None]  # of the subject's images, and of its class where prior preservation is asked for


@dataclass(frozen=True)
class Personalised:
    """A model that has learnt a subject: its run and its pipeline. `learnt` are the trained parts by name, with adapters where
    `rank` is that of a LoRA. In processes that only helped `leads` is False."""

    run: Run | MemoryRun
    model: Model
    learnt: Mapping[str, nn.Module]
    rank: int | None
    leads: bool

    def export(self, folder: Path) -> str:
        """Writes folder/lora, or the whole pipeline to folder/pipeline, unless it is there; returns where and what loads it."""
        if self.rank is not None:
            target = folder / "lora"
            if not target.exists():
                with writing_folder(target) as part, pretrained.silence():
                    save_lora(self.model, self.learnt, part)
            refused = unloadable() if len(self.learnt) > 1 else ""
            loads = f"the text encoder's part is refused for now: {refused}" if refused else "pipe.load_lora_weights loads it"
            return f"the LoRA is in {target}; {loads}"
        target = folder / "pipeline"
        if target.exists():
            return f"the pipeline is in {target} already"
        return f"the pipeline is in {target}; {who_loads(save_pipeline(self.model.pipe, target, self._card()))}"

    def _card(self) -> dict[str, Any]:
        """What a model card says of the subject and how it was learnt."""
        about, model = self.run.about, self.run.about["model"]
        return {
            "personalised": Path(model).name if os.path.exists(model) else model,
            "trained": " and ".join(self.learnt),
            "subject": about["asked"]["token"],
            "instance_prompt": about["instance_prompt"],
            "updates": about["asked"]["max_train_steps"],
        }


def personalise(
    given: Model | None, request: PersonaliseRequest, out: Path | None, progress: Listener, prompts: Sequence[str] = ()
) -> Personalised:
    """Trains from the newest sound checkpoint in `out` on; `out` None keeps all in memory.

    `prompts` are drawn and scored at the end; the request's, or the subject's own, where there are none. `given` is the model where
    it is loaded already; it stays as it was. Every process of `accelerate launch` calls this; only the main one writes.
    """
    check_tracker(request.report_to, out)
    if request.rank is not None:
        check_peft()
    loading.subject_images(request.instance_data_dir or "")
    device = request.device if given is None or launched() else str(given.device)
    with accelerated(device, request.mixed_precision, request.gradient_accumulation_steps, request.report_to, out) as accelerator:
        place = accelerator.device
        model = loading.any_model(request.model, request.resolution, place) if given is None else _own(given, place)
        request = request.filled(model.defaults)
        check_token(model.pipe, request.token, request.instance_prompt or "")
        prompts = prompts or _prompts(model, request)
        leads = accelerator.is_main_process
        told = progress if leads else Silent()
        validation = Validation(model, request.drawing(), SCORES, prompts, partial(told.tick, "validation"))
        validation.check()
        with model.undisturbed():
            if leads and request.with_prior_preservation:
                _draw_class_images(model, request, accelerator, told)
            accelerator.wait_for_everyone()
            samplers = samplers_of(model, request)
            with open_run(out if leads else None, "personalise", *_about(model, request, samplers, prompts, accelerator)) as run:
                accelerator.wait_for_everyone()
                recorded = Recorded(request, request.max_train_steps, accelerator, run, out, told)
                if leads and not run.rows():
                    say_how_long(counted(request, outlined(model)), model, told)
                learnt = _trained(model, request, samplers, recorded, validation)
    return Personalised(run, _as_given(model, given), learnt, request.rank, leads)


def check_token(pipe: DiffusionPipeline, token: str, prompt: str) -> None:
    """Raises UserError where a tokenizer makes nothing of a token, or cuts it off the prompt."""
    for name in ("tokenizer", "tokenizer_2"):
        if (tokenizer := getattr(pipe, name, None)) is None:
            continue
        ids = [i for i in tokenizer(token, add_special_tokens=False).input_ids if i not in tokenizer.all_special_ids]
        if not ids:
            raise UserError(f"the model's {name} splits the token {token!r} to nothing that it knows: give another --token")
        whole = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
        if not any(whole[i : i + len(ids)] == ids for i in range(len(whole))):
            raise UserError(
                f"the token {token!r} is cut off {prompt[:60]!r}, of which the model reads {tokenizer.model_max_length} tokens: "
                "shorten --instance-prompt"
            )


def _own(model: Model, device: torch.device) -> Model:
    """The model in float32 on the device, with parts of its own, which training changes."""
    pipe = copy.copy(model.pipe)
    for name, part in model.pipe.components.items():
        if isinstance(part, nn.Module):
            setattr(pipe, name, copy.deepcopy(part).to(device).float())
    return replace(model, pipe=pipe)


def _as_given(model: Model, given: Model | None) -> Model:
    """The trained model on the device and in the precision of the one that was given."""
    for part in model.pipe.components.values() if given is not None else ():
        if isinstance(part, nn.Module) and given is not None:
            with pretrained.silence():
                part.to(given.device, given.dtype)
    return model


def _prompts(model: Model, request: PersonaliseRequest) -> Sequence[str]:
    """The prompts that are asked for, else the subject's own."""
    if request.validation_prompts is None:
        return [request.instance_prompt or ""]
    return loading.prompts_of(request.validation_prompts, model)


def _draw_class_images(model: Model, request: PersonaliseRequest, accelerator: Accelerator, progress: Listener) -> None:
    """Draws what the folder of class images lacks, with the teacher where one is named."""
    images = ClassImages(Path(request.class_data_dir or ""), class_prompts(request), request.num_class_images)
    drawer = model if request.teacher is None else loading.any_model(request.teacher, request.resolution, accelerator.device)
    if request.teacher is None and images.missing():
        progress.say(f"{request.model} itself draws the class images: give --teacher for another model to draw them")
    filled = request.filled(drawer.defaults)
    n_steps, cfg_scale, scheduler = filled.denoising_steps, filled.cfg_scale, filled.scheduler or ""
    n_steps, cfg_scale = n_steps or drawer.defaults["steps"], drawer.defaults["cfg_scale"] if cfg_scale is None else cfg_scale
    images.draw(drawer, n_steps, cfg_scale, scheduler, request.sample_batch_size, progress)


def samplers_of(model: Model, request: PersonaliseRequest) -> Samplers:
    """UserError for an image that is not square."""
    height, width = model.pixels
    if height != width:
        raise UserError(f"training needs a square resolution: got {height}x{width}")

    def sampler(folder: str | None, prompts: Sequence[str], n: int | None, seed: int) -> Sampler:
        reader = Reader(PromptedFolder(Path(folder or ""), prompts, height, n))
        return samples_of(model, Remembered(Live(model.pipe, reader)), seed, request.random_flip)

    instance = sampler(request.instance_data_dir, [request.instance_prompt or ""], None, request.seed)
    if not request.with_prior_preservation:
        return instance, None
    return instance, sampler(request.class_data_dir, class_prompts(request), request.num_class_images, request.seed + 1)


def _about(
    model: Model, request: PersonaliseRequest, samplers: Samplers, prompts: Sequence[str], accelerator: Accelerator
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be the same for a run to go on, and what a reader of it needs besides."""
    asked = {
        **request.compared(),
        "learning_rate": request.rate,
        "identity": model.identity,
        "images": [sampler.data.identity for sampler in samplers if sampler is not None],
        "latent": list(model.latent),
        "batch": request.train_batch_size * request.gradient_accumulation_steps * accelerator.num_processes,
    }
    return asked, {
        "made_with": made_with(accelerator.device),
        "instance_prompt": request.instance_prompt,
        "class_prompt": request.class_prompt,
        "model": request.model,
        "teacher": request.teacher,
        "pictured_prompts": [prompts[i % len(prompts)] for i in range(min(N_PICTURES, request.n_images or 1))],
    }


def parts_of(model: Model, request: PersonaliseRequest) -> dict[str, nn.Module]:
    """The parts of the pipeline that learn, ready to: whole, or by adapters."""
    texts = [name for name in TEXT if getattr(model.pipe, name, None) is not None] if request.train_text_encoder else []
    parts: dict[str, nn.Module] = {name: getattr(model.pipe, name) for name in (model.family.network, *texts)}
    for i, (name, module) in enumerate(parts.items()):
        if request.rank is None:
            module.requires_grad_(True)
            continue
        given, each = (request.lora_text_encoder_alpha, TEXT_ALPHA) if name in TEXT else (request.lora_alpha, ALPHA)
        add_lora(module, request.rank, given or each * request.rank, request.seed + i)
    return parts


def _trained(
    model: Model, request: PersonaliseRequest, samplers: Samplers, recorded: Recorded, validation: Validation
) -> dict[str, nn.Module]:
    """The parts that learnt, for inference, after all updates; scores and costs are in the run."""
    parts, start, n_steps = parts_of(model, request), recorded.start(), recorded.n_steps
    recorded.announce_validations(validation.plan.protocol.n_images, start.step if start else 0)
    trainer = trainer_of(model, request, parts, samplers, recorded.accelerator, start)
    look = partial(_looked, validation, model, parts)
    recorded.train(trainer, n_steps, partial(recorded.validate, look))
    ended = any(row["kind"] == "cost" and row["score"]["measure"] == "train_memory" for row in recorded.run.rows())
    if not ended and recorded.accelerator.is_main_process:
        recorded.run.keep(lambda row: row["kind"] != "cost")
        recorded.validate_last(look)
        seconds = sum(row["seconds"] for row in recorded.run.rows() if row["kind"] == "train")
        for name, value in {"train_time": seconds, "train_memory": trainer.mem_bytes()}.items():
            score = Score(architecture_of(model.network).key, request.model, name, value, n_steps, request.seed)
            recorded.run.append({"kind": "cost", "step": n_steps, "score": score.to_json()})
    recorded.accelerator.end_training()
    for module in parts.values():
        module.eval().requires_grad_(False)
    return parts


def trainer_of(
    model: Model,
    request: PersonaliseRequest,
    parts: Mapping[str, nn.Module],
    samplers: Samplers,
    accelerator: Accelerator,
    start: Snapshot | None,
) -> DreamBooth:
    network: Any = model.network
    if request.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if accelerator.distributed_type != DistributedType.FSDP:
        network.to(memory_format=torch.channels_last)
    for module in parts.values():
        module.train()
    prompts = ([request.instance_prompt or ""], class_prompts(request)) if request.train_text_encoder else ()
    settings = Settings(request.train_batch_size, request.gradient_accumulation_steps, request.seed)
    weight, optimiser = request.prior_loss_weight, Optimiser(request.rate)
    return DreamBooth(accelerator, Learner(model, parts), *samplers, weight, prompts, optimiser, settings, start)


def _looked(validation: Validation, model: Model, parts: Mapping[str, nn.Module], label: str) -> Any:
    """Images and scores of the model as it is."""
    for module in parts.values():
        module.eval()
    try:
        return validation.look(model.network, architecture_of(model.network), label)
    finally:
        for module in parts.values():
            module.train()
