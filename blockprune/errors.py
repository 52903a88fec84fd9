"""The one exception of this package for mistakes a user can mend, and what a message never shows."""

from __future__ import annotations

import re

_SECRETS = (
    (re.compile(r"""[^\s'"`(,;]*:[^\s'"`]*@[^\s'"`),;]*"""), "(hidden: it may hold a password)"),
    (re.compile(r"""\b(pass\w*|pwd|secret|token|api_?key)=[^\s'"`&,;)]*""", re.IGNORECASE), r"\1=(hidden)"),
)


class UserError(Exception):
    """One line: the rule, the offending value, what to do. The command line prints it and exits with code 2."""


def redacted(text: str) -> str:
    """The text without anything like a name with a password (`user:password@host`) or `password=…`."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text
