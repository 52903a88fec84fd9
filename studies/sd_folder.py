"""A full-size Stable Diffusion folder with random weights, for everything about size and speed that needs no trained ones.

    python studies/sd_folder.py sd-v1-4 /tmp/sd-random     # under a minute, 4.3 GB of disk; also sd-v2-1-base, sd-v2-1

The folder loads with `diffusers.StableDiffusionPipeline.from_pretrained`; its tokenizer spells byte by byte.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from blockprune.cost.components import outside_params, random_unet
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture
from blockprune.model.trace import trace


def byte_tokenizer(n_tokens: int) -> CLIPTokenizer:
    """A tokenizer without merges: two tokens of its own and two for each byte, inside a word and at its end."""
    letters = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=n_tokens)


def write_random_pipeline(model: str, folder: Path, seed: int = 0) -> int:
    """Writes `model`'s architecture with random weights, float32; returns the bytes of its weights."""
    configs = pretrained.configs(model)
    torch.manual_seed(seed)
    scheduler = getattr(diffusers, configs.scheduler["_class_name"]).from_config(configs.scheduler)
    text = {k: v for k, v in configs.text["text_encoder"].items() if k not in ("architectures", "torch_dtype")}
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(configs.vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=byte_tokenizer(configs.n_tokens),
        unet=random_unet(configs.unet, Architecture(), seed=seed),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an alias with one text encoder: sd-v1-4, sd-v1-5, sd-v2-1-base, sd-v2-1")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print what would be written")
    args = parser.parse_args()
    if args.dry_run:
        configs = pretrained.configs(args.model)
        print(f"{trace(configs.unet).total.params + outside_params(configs):,} random weights, without the VAE's encoder")
        return
    n_bytes = write_random_pipeline(args.model, args.folder)
    print(f"{args.folder}: {n_bytes / 2**30:.2f} GiB of random weights")


if __name__ == "__main__":
    main()
