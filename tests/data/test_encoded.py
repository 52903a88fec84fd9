"""Training pairs encoded when asked for: in the scale of the U-Net, finite, and remembered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from blockprune.data.encoded import Encoded, Live, Remembered
from blockprune.data.training_data import Reader, source_of
from blockprune.errors import UserError
from blockprune.model import sampling

KINDS = ("tiny-digits", "sdxl")


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_in_the_scale_of_the_unet(kind: str, models: dict[str, Any]) -> None:
    pipe, reader = models[kind]
    found = Live(pipe, reader).encoded([0, 1], [False, True])
    images = torch.stack([reader.pair(0).image, reader.pair(1).image.flip(-1)])
    with torch.no_grad():
        posterior = pipe.vae.encode(images / 127.5 - 1).latent_dist
    noise = torch.randn_like(posterior.mean)
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    expected = (posterior.mean + posterior.std * noise - shift) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(found.latents(noise), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean, sampling.encode_images(pipe, images), rtol=1e-5, atol=1e-5)


def test_a_vae_with_a_shift_keeps_the_formula(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, reader = models["tiny-digits"]
    shifted = dict(pipe.vae.config) | {"shift_factor": 0.5}
    plain = Live(pipe, reader).encoded([0], [False])
    monkeypatch.setattr(pipe.vae, "_internal_dict", type(pipe.vae.config)(shifted))
    found = Live(pipe, reader).encoded([0], [False])
    torch.testing.assert_close(found.mean, plain.mean - 0.5 * pipe.vae.config.scaling_factor)
    torch.testing.assert_close(found.logvar, plain.logvar)


def test_a_vae_that_overflows_is_an_error(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, reader = models["sdxl"]
    bias = pipe.vae.quant_conv.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, torch.inf))
    with pytest.raises(UserError, match="not finite in float32: use --dtype float32"):
        Live(pipe, reader).encoded([0], [False])


def test_half_precision_of_sdxl_encodes_in_single(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, reader = models["sdxl"]
    monkeypatch.setattr(pipe.vae, "_internal_dict", type(pipe.vae.config)(dict(pipe.vae.config) | {"force_upcast": True}))
    expected = Live(pipe, reader).encoded([0], [False])
    pipe.vae.to(torch.float16)
    real, seen = pipe.vae.encode, list[torch.dtype]()
    monkeypatch.setattr(pipe.vae, "encode", lambda x: seen.append(x.dtype) or real(x))
    try:
        found = Live(pipe, reader).encoded([0], [False])
        assert pipe.vae.dtype == torch.float16 and seen == [torch.float32]
        assert found.mean.dtype == torch.float32
        torch.testing.assert_close(found.mean, expected.mean, atol=0.05, rtol=0.05)
    finally:
        pipe.vae.to(torch.float32)


def test_the_resolution_fits_the_vae(models: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="multiple of 2 pixels: got 15"):
        Live(models["sdxl"][0], Reader(source_of("digits", 15, 3)))


def test_what_was_encoded_is_remembered_while_there_is_room(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    live, asked = Live(*models["sdxl"]), list[int]()
    encode = live.encoded

    def counted(indices: Sequence[int], flips: Sequence[bool]) -> Encoded:
        asked.extend(indices)
        return encode(indices, flips)

    monkeypatch.setattr(live, "encoded", counted)
    row = encode([0], [False])
    remembered = Remembered(live, keep_bytes=2 * row.mem_bytes)
    for _ in range(2):
        again = remembered.encoded([0, 1, 2, 0], [False] * 4)
    assert asked == [0, 1, 2, 2]
    assert torch.equal(again.mean[0], again.mean[3]) and torch.equal(again.mean[:1], row.mean)
    text = again.condition["added_cond_kwargs"]["text_embeds"]
    assert torch.equal(text[:1], row.condition["added_cond_kwargs"]["text_embeds"]) and len(text) == 4
