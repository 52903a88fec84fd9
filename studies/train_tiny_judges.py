"""Train what judges tiny-digits: a CLIP-like scorer, an image feature detector, and the detector's reference.

Question: how well do an image and a caption go together, and how far is a set of images from real ones, when no
downloaded CLIP or Inception may be had?

    python studies/train_tiny_judges.py --out runs/tiny-digits --model blockprune/assets/models/tiny-digits

About fifteen minutes on two CPU cores; run again, it goes on where it stopped. Both are trained on scenes of the
training digits. Expected: nine cells in ten of held-out scenes named right by the detector, and the right one of two
captions that differ in one cell picked by the scorer in nine scenes of ten.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from loop import Loop, batch_of
from torch import Tensor
from train_tiny_digits import (
    MAX_TOKENS,
    N_SCENES,
    WIDTH,
    Scenes,
    make_tokenizer,
    round_weights,
    tokenize,
)
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from blockprune.data.digits import EMPTY, SCENE_PX, DigitScenes, Labels, caption

DETECTOR_STEPS, SCORER_STEPS = 3000, 2800
N_REFERENCE = 2000
REFERENCE_SEED = 11
PROMPT_SEED = 13
HEADS = (*[EMPTY + 1] * 4, 3, 3)
GREY = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIDE = {"height": SCENE_PX, "width": SCENE_PX}


def normalised(images: Tensor) -> Tensor:  # NCHW uint8 => float32 in [-1, 1], as both image processors do
    return images.float() / 127.5 - 1


def make_detector() -> ResNetForImageClassification:
    """Return a ResNet of 64 pooled features whose 50 logits are 4 cells x 11 contents, 3 slants, 3 weights."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16,
            hidden_sizes=[32, 64, 64],
            depths=[1, 1, 1],
            layer_type="basic",
            num_labels=sum(HEADS),
            head_sizes=list(HEADS),
        )
    )


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy of the logits (N, 50) of a scene under its labels (N, 6)."""
    cells, slant, weight = logits.split([4 * (EMPTY + 1), 3, 3], 1)
    loss = 4 * F.cross_entropy(cells.reshape(-1, EMPTY + 1), labels[:, :4].flatten())
    return loss + F.cross_entropy(slant, labels[:, 4]) + F.cross_entropy(weight, labels[:, 5])


@torch.no_grad()
def label_rates(detector: ResNetForImageClassification, scenes: Scenes) -> dict[str, float]:
    cells, slant, weight = detector(normalised(scenes.images)).logits.split([4 * (EMPTY + 1), 3, 3], 1)
    right = cells.reshape(-1, 4, EMPTY + 1).argmax(2) == scenes.labels[:, :4]
    return {
        "cells_named": right.float().mean().item(),
        "slants_named": (slant.argmax(1) == scenes.labels[:, 4]).float().mean().item(),
        "weights_named": (weight.argmax(1) == scenes.labels[:, 5]).float().mean().item(),
    }


def train_detector(out: Path, scenes: Scenes, held_out: Scenes, n_steps: int) -> None:
    detector = make_detector()

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = batch_of(len(scenes.images), generator)
        return label_loss(detector(normalised(scenes.images[chosen])).logits, scenes.labels[chosen])

    def watch() -> dict[str, float]:
        rates = label_rates(detector.eval(), held_out)
        detector.train()
        return rates

    Loop(detector, out / "detector-run", n_steps, 3e-3, 0.99).run(loss_of, watch, 500)
    detector.save_pretrained(out / "detector")
    ViTImageProcessor(size=SIDE, **GREY).save_pretrained(out / "detector")


def make_scorer(tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = {
        "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "projection_dim": WIDTH,
    }  # fmt: skip
    text = tower | {
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {"num_hidden_layers": 2, "image_size": SCENE_PX, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def nearly(labels: Labels, rng: np.random.Generator) -> Labels:
    """Return labels that differ in the content of one cell, in slant or in weight."""
    digits, slant, weight = list(labels.digits), labels.slant, labels.weight
    change = rng.integers(8)
    if change == 0:
        slant = (slant + int(rng.integers(1, 3))) % 3
    elif change == 1:
        weight = (weight + int(rng.integers(1, 3))) % 3
    else:
        cell = rng.integers(4)
        others_empty = digits.count(EMPTY) - (digits[cell] == EMPTY) == 3
        digits[cell] = int(rng.choice([d for d in range(EMPTY + 1 - others_empty) if d != digits[cell]]))
    return Labels(tuple(int(digit) for digit in digits), int(slant), int(weight))  # type: ignore[arg-type]


def near_captions(scenes: Scenes, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    rows = [Labels(tuple(row[:4]), row[4], row[5]) for row in scenes.labels.tolist()]
    return [caption(nearly(row, rng)) for row in rows]


def embed(scorer: CLIPModel, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    output = scorer(input_ids=tokens, pixel_values=normalised(images))
    return output.image_embeds, output.text_embeds


def train_scorer(out: Path, scenes: Scenes, held_out: Scenes, n_steps: int) -> None:
    tokenizer = make_tokenizer()
    tokens = tokenize(tokenizer, scenes.captions)
    near = torch.stack([tokenize(tokenizer, near_captions(scenes, seed)) for seed in range(4)])
    pair = [tokenize(tokenizer, texts) for texts in (held_out.captions, near_captions(held_out, 99))]
    scorer = make_scorer(tokenizer)
    scorer.text_model.load_state_dict(CLIPTextModel.from_pretrained(out / "text_encoder").state_dict())

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = batch_of(len(tokens), generator)
        wrong = near[int(torch.randint(len(near), (1,), generator=generator)), chosen]
        image, text = embed(scorer, scenes.images[chosen], torch.cat([tokens[chosen], wrong]))
        logits = scorer.logit_scale.clamp(max=4.6).exp() * image @ text.T
        target = torch.arange(len(chosen))
        return F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(chosen)].T, target)

    @torch.no_grad()
    def watch() -> dict[str, float]:
        image, text = embed(scorer, held_out.images, torch.cat(pair))
        right, wrong = (image * text.view(2, len(image), -1)).sum(2)
        return {"right_cosine": right.mean().item(), "picks_right": (right > wrong).float().mean().item()}

    averaged = cast(CLIPModel, Loop(scorer, out / "scorer-run", n_steps, 1.5e-3, 0.995).run(loss_of, watch, 500))
    processor = CLIPImageProcessor(size={"shortest_edge": SCENE_PX}, crop_size=SIDE, **GREY)
    averaged.save_pretrained(out / "scorer")
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(out / "scorer")
    processor.save_pretrained(out / "scorer")


def assemble(out: Path, model: Path) -> None:
    """Copy scorer and detector to `model`, rounded to float16, and write reference.npz and prompts.txt."""
    for name in ("scorer", "detector"):
        shutil.copytree(out / name, model / name, dirs_exist_ok=True)
        round_weights(model / name)
    detector = AutoModel.from_pretrained(model / "detector").eval()
    images = Scenes("held-out", REFERENCE_SEED, N_REFERENCE).images
    with torch.no_grad():
        parts = [detector(normalised(chunk)).pooler_output.flatten(1) for chunk in images.split(250)]
    features = torch.cat(parts).numpy()
    exact = features.astype(np.float64)
    np.savez_compressed(
        model / "reference.npz",
        mu=exact.mean(axis=0),
        sigma=np.cov(exact, rowvar=False),
        n=np.int64(len(exact)),
        features=features.astype(np.float16),
    )
    captions = [text for _, text, _ in DigitScenes("held-out", PROMPT_SEED, 512)]
    (model / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained")
    args = parser.parse_args()
    if args.dry_run:
        print(f"detector: {DETECTOR_STEPS} steps, scorer: {SCORER_STEPS} steps on {N_SCENES} scenes")
        return
    scenes, held_out = Scenes("train", 1, N_SCENES), Scenes("held-out", 5, 1000)
    torch.manual_seed(0)
    train_detector(args.out, scenes, held_out, DETECTOR_STEPS)
    torch.manual_seed(0)
    train_scorer(args.out, scenes, held_out, SCORER_STEPS)
    assemble(args.out, args.model)


if __name__ == "__main__":
    main()
