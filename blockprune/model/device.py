"""Where a model runs."""

from __future__ import annotations

import torch

from blockprune.errors import UserError, first_line


def device_of(text: str | None) -> torch.device:
    """The device of that name, cuda where there is one when None; UserError when it is not there."""
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        why = first_line(err)
        raise UserError(f"cannot use the device {text!r} ({why}): give cpu, or a GPU that torch sees") from None
    if device.type == "meta":
        raise UserError("cannot use the device 'meta', which computes nothing: give cpu or cuda")
    return device
