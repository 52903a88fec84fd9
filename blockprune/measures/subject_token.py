"""The word by which prompts name a subject. Needs no torch."""

from __future__ import annotations

import re


def word(token: str) -> re.Pattern[str]:
    """What finds a token as a word of its own, in upper or lower case."""
    return re.compile(rf"(?<!\w){re.escape(token)}(?!\w)", re.IGNORECASE)


def without(token: str, prompt: str) -> str:
    """The prompt without the token."""
    return " ".join(word(token).sub(" ", prompt).split())
