"""Losses of knowledge distillation: tensors in, scalar out; every mean in float32."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


def task_loss(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of (N, ...) predictions; with `weights` (N,) the mean of the weighted errors of the samples."""
    if weights is None:
        return functional.mse_loss(predicted.float(), target.float())
    errors = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return (errors * weights).mean()


def output_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error against the teacher's output (arXiv 2305.15798, eq. 2)."""
    return functional.mse_loss(student.float(), teacher.float())


def feature_losses(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], normalise: bool = False) -> dict[str, Tensor]:
    """The mean squared error at each tap (arXiv 2305.15798, eq. 3); `normalise` divides by the teacher's mean square there."""
    losses = {}
    for name, mine in student.items():
        theirs = teacher[name].float()
        loss = functional.mse_loss(mine.float(), theirs)
        losses[name] = loss / theirs.square().mean().clamp(min=1e-12) if normalise else loss
    return losses


def min_snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """(N,) weights min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for velocity (arXiv 2303.09556, section 3.4)."""
    alphas = alphas_cumprod.to(timesteps.device)[timesteps].double()
    snr = alphas / (1 - alphas)
    scale = snr + 1 if prediction_type == "v_prediction" else snr
    return (torch.clamp(snr, max=gamma) / scale).float()
