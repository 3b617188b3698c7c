"""How API keys are written: `KEY`, the operator's, or `TENANT:KEY`.

In: the texts of the settings. Out: whose each key is. What a route asks of a key is said in `auth.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

OPERATOR: Final = ""
"""The tenant of requests that come with the operator's key, or on a server without keys."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-+\--~]{8,512}")  # printable ASCII but for space and comma


def parse_keys(texts: Sequence[str]) -> Mapping[str, str]:
    """Key to tenant, of keys written `KEY` or `TENANT:KEY`.

    Raises:
        ValueError: one of them is not of that form, or two tenants have the same. What the key is, is not said.
    """
    tenants: dict[str, str] = {}
    for number, text in enumerate(texts, start=1):
        tenant, colon, key = text.partition(":")
        if not colon:
            tenant, key = OPERATOR, text
        elif not _TENANT.fullmatch(tenant):
            raise ValueError(
                f"API key {number}: before the colon stands a tenant's name, of at most 64 letters, digits, '.', '_' and '-'"
            )
        if not _KEY.fullmatch(key):
            raise ValueError(f"API key {number} must be 8 to 512 printable ASCII characters without spaces and commas")
        if tenants.setdefault(key, tenant) != tenant:
            raise ValueError(f"API key {number} was given to another tenant already")
    return tenants
