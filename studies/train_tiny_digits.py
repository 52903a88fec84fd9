"""Train tiny-digits, the built-in model.

Question: how small a text-to-image latent diffusion pipeline, with the block structure of Stable Diffusion v1, still
needs all of its blocks? The task is made to need them: see `blockprune.data.digits`.

    python studies/train_tiny_digits.py --out runs/tiny-digits --model blockprune/assets/models/tiny-digits

About fifty minutes on one CPU core; run again, it goes on where it stopped. The scorer, the detector and the reference
come from `train_tiny_judges.py`. Expected: `reports/tiny-digits-quality.md`.

The shipped weights are not one run of this script. Of their 4,700 U-Net steps the first 1,000 drew timesteps evenly and
trained the text encoder along, the next 500 weighted noise as now, and from step 1,800 the middle head helped: before it no
caption was drawn (0.09 of the digits read), 900 steps later 0.90 were. But then `up_blocks.1` alone read the captions, and
the whole inner U-Net could go at no loss. From step 3,000 most captions were heard in the inner stages alone, from step 3,600
on all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from loop import Loop, batch_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from blockprune.data.digits import EMPTY, VOCABULARY, DigitScenes

N_SCENES = 24_000
MAX_TOKENS = 24
WIDTH = 64
HEARING = ("mid_block", "down_blocks.2")  # the stages whose cross-attentions hear the caption
HEARD = (0.1, 0.5, 0.4)  # shares of training samples whose caption is heard nowhere, in the first of these, in both


class Scenes:
    """The training scenes in memory: images (N, 3, 32, 32) uint8, captions, labels (N, 6) int64."""

    def __init__(self, split: str, seed: int, size: int, part: tuple[int, int] = (0, 1)) -> None:
        images, captions, labels = zip(*DigitScenes(split, seed, size, part), strict=True)
        self.captions: list[str] = list(captions)
        self.images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.tensor([[*row.digits, row.slant, row.weight] for row in labels])


def make_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer with one token per caption word; any other text falls back to its bytes.

    Every word is merged letter by letter from its start. A word that holds the first two letters of another comes
    first, for merges apply in order.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    tokens, merges = symbols + [symbol + "</w>" for symbol in symbols], []
    before = {word: {other for other in VOCABULARY if word[:2] in other[1:]} for word in VOCABULARY}
    for word in TopologicalSorter(before).static_order():
        letters = [*word[:-1], word[-1] + "</w>"]
        for end in range(1, len(letters)):
            pair = ("".join(letters[:end]), letters[end])
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    for word in VOCABULARY:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:  # => (N, MAX_TOKENS) int64
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """Return SD v1's U-Net with 16-32-64-64 channels instead of 320-640-1280-1280.

    Captions are heard in HEARING alone; the cross-attentions farther out have an output matrix of zeros that is not trained.
    Heard everywhere, captions are read by `up_blocks.1`, and whatever lies inside it is never needed.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(16, 32, 64, 64),
        time_embedding_dim=128,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=(1, 2, 4, 4),
    )
    for name, value in unet.named_parameters():
        if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
            value.data *= 2  # cross-attention that starts nearly uniform takes long to tell one word from another
        if name.endswith("attn2.to_out.0.weight") and not name.startswith(HEARING):
            value.data.zero_()
            value.requires_grad_(False)
    return unet


def make_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="trailing"
    )


def to_signed(images: Tensor) -> Tensor:  # uint8 => float32 in [-1, 1]
    return images.float() / 127.5 - 1


def train_vae(out: Path, scenes: Scenes, n_steps: int) -> None:
    """Write out/vae: the trained autoencoder, its latents centred, its scaling factor measured."""
    vae = make_vae()

    def loss_of(generator: torch.Generator) -> Tensor:
        images = to_signed(scenes.images[batch_of(len(scenes.images), generator, 32)])
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images) + 2e-3 * kl

    averaged = cast(AutoencoderKL, Loop(vae, out / "vae-run", n_steps, 3e-3, 0.99).run(loss_of, dict, 250).eval())
    centre_latents(averaged, scenes.images[:2000])
    averaged.save_pretrained(out / "vae")


@torch.no_grad()
def centre_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold the latents' channel means into the 1x1 convolutions around them, and set the scaling factor.

    A last training timestep is not pure noise, so that latents with a mean would start sampling off-centre.
    """
    latents = vae.encode(to_signed(images)).latent_dist.mean
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=round(1 / (latents - mean[:, None, None]).std().item(), 5))


class SceneReader(nn.Module):
    """Six learnt queries that attend to caption tokens (N, L, C): contents of four cells, slant, weight (N, 6, 11)."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(6, WIDTH) * WIDTH**-0.5)
        self.key, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EMPTY + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.head(F.scaled_dot_product_attention(queries, self.key(tokens), tokens))


def train_text(out: Path, scenes: Scenes, n_steps: int) -> None:
    """Write out/text_encoder and out/tokenizer: an encoder that knows which digit goes with which place.

    As in Stable Diffusion, the U-Net finds a text encoder that can read, and does not change it.
    """
    tokenizer = make_tokenizer()
    tokens = tokenize(tokenizer, scenes.captions)
    encoder, reader = make_text_encoder(tokenizer), SceneReader()

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = batch_of(len(tokens), generator, 128)
        words = encoder(tokens[chosen])[0]
        read = reader(words + 0.3 * torch.randn(words.shape, generator=generator))
        return F.cross_entropy(read.flatten(0, 1), scenes.labels[chosen].flatten())

    Loop(nn.ModuleList([encoder, reader]), out / "text-run", n_steps, 2e-3, 0.99).run(loss_of, dict, 250)
    tokenizer.save_pretrained(out / "tokenizer")
    encoder.save_pretrained(out / "text_encoder")


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return posterior means (N, 4, 16, 16) float32, times the scaling factor."""
    parts = [vae.encode(to_signed(chunk)).latent_dist.mean for chunk in images.split(256)]
    return torch.cat(parts) * vae.config.scaling_factor


@torch.no_grad()
def encode_texts(encoder: CLIPTextModel, tokens: Tensor) -> Tensor:  # (N, L) int64 => (N, L, C) float32
    return torch.cat([encoder(chunk)[0] for chunk in tokens.split(512)])


class Hearing:
    """How far out the caption of each sample is heard; for the others' cross-attentions it is `silence` (L, C).

    `level` (N,) is 0: nowhere, 1: in the mid stage alone, 2: in `down_blocks.2` too, as outside training.
    """

    def __init__(self, unet: nn.Module, silence: Tensor) -> None:
        self.level: Tensor | None = None
        for least, stage in enumerate(HEARING, 1):
            for name, module in unet.get_submodule(stage).named_modules():
                if name.endswith("attn2"):
                    module.register_forward_pre_hook(self._mute(least, silence), with_kwargs=True)

    def _mute(self, least: int, silence: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.level is None:
                return None
            heard = (self.level >= least)[:, None, None]
            return args, kwargs | {"encoder_hidden_states": torch.where(heard, kwargs["encoder_hidden_states"], silence)}

        return hook


def train_unet(out: Path, scenes: Scenes, n_steps: int) -> None:
    """Write the state of out/unet-run: the U-Net, epsilon prediction.

    What goes where is decided in the noise, and there the plain loss hardly sees it. So timesteps are drawn in
    proportion to themselves, and weighted as velocity prediction is (1/alpha-bar, at most 12), times min-SNR-5. The
    middle of the U-Net has one pixel per cell; a head that is thrown away afterwards has it name the cell's content,
    without which cross-attention takes very long to find out that captions speak of places.
    """
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(out / "vae").eval()
    latents = encode_latents(vae, scenes.images)
    reader = CLIPTextModel.from_pretrained(out / "text_encoder").eval()
    texts = encode_texts(reader, tokenize(tokenizer, scenes.captions))
    unconditional = encode_texts(reader, tokenize(tokenizer, [""]))[0]
    signal = make_scheduler().alphas_cumprod
    unet, middle = make_unet(), nn.Conv2d(WIDTH, EMPTY + 1, 1)
    loop = Loop(nn.ModuleDict({"unet": unet, "middle": middle}), out / "unet-run", n_steps, 2e-3, 0.998)
    hearing = Hearing(unet, unconditional)
    middles: list[Tensor] = []
    unet.mid_block.register_forward_hook(lambda module, args, output: middles.append(output))

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = batch_of(len(latents), generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        t = (len(signal) * torch.rand(len(chosen), generator=generator).sqrt()).long()
        level = signal[t].view(-1, 1, 1, 1)
        hearing.level = torch.multinomial(torch.tensor(HEARD), len(chosen), replacement=True, generator=generator)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        predicted = unet(noisy, t, texts[chosen], return_dict=False)[0]
        weight = (1 / level).clamp(max=12) * (5 * (1 - level) / level).clamp(max=1) / 4
        named = F.cross_entropy(middle(middles.pop()).flatten(2), scenes.labels[chosen, :4])
        return (weight * (predicted - noise) ** 2).mean() + 0.03 * named

    loop.run(loss_of, lambda: look(make_pipeline(loop.ema.get_submodule("unet"), reader, vae, tokenizer), loop), 300)


def make_pipeline(
    unet: nn.Module, text_encoder: CLIPTextModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet.eval(), scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def look(pipeline: StableDiffusionPipeline, loop: Loop) -> dict[str, float]:
    """Write a sheet of samples and return how many captioned cells a reader reads in them."""
    from quality_tiny_digits import generate, reading_rates, sheet, train_reader

    scenes = Scenes("held-out", 7, 64)
    images = generate(pipeline, scenes.captions, n_steps=12, guidance_scale=3.0)
    sheet(images, scenes.captions).save(loop.directory / f"samples-{loop.step:05d}.png")
    return reading_rates(train_reader(2000), images, scenes.labels[:, :4].numpy())


def assemble(out: Path, model: Path) -> None:
    """Write the pipeline folder: the averaged weights of out/unet-run, rounded to float16."""
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(out / "vae")
    text_encoder = CLIPTextModel.from_pretrained(out / "text_encoder")
    unet = make_unet()
    weights = torch.load(out / "unet-run" / "state.pt", weights_only=True)["ema"]
    unet.load_state_dict({name.removeprefix("unet."): value for name, value in weights.items() if name.startswith("unet.")})
    make_pipeline(unet, text_encoder, vae, tokenizer).save_pretrained(model)
    for part in ("unet", "vae", "text_encoder"):
        round_weights(model / part)


def round_weights(directory: Path) -> None:
    """Round the safetensors of a directory to float16; its config goes on saying float32, which it loads as."""
    for path in directory.glob("*.safetensors"):
        weights = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
        save_file(weights, path, metadata={"format": "pt"})


STAGES = {"vae": (train_vae, 1000), "text": (train_text, 800), "unet": (train_unet, 3300)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="write the pipeline folder there at the end")
    parser.add_argument("--stage", choices=list(STAGES), help="default: all, in order")
    parser.add_argument("--steps", type=int, help="default: the stage's own number")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained")
    args = parser.parse_args()
    names = [args.stage] if args.stage else list(STAGES)
    if args.dry_run:
        print(", ".join(f"{name}: {args.steps or STAGES[name][1]} steps" for name in names), f"on {N_SCENES} scenes")
        return
    scenes = Scenes("train", 1, N_SCENES)
    for name in names:
        stage, n_steps = STAGES[name]
        torch.manual_seed(0)
        stage(args.out, scenes, args.steps or n_steps)
    if args.model:
        assemble(args.out, args.model)


if __name__ == "__main__":
    main()
