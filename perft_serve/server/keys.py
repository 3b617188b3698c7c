"""How API keys are written, `KEY`, the operator's, or `TENANT:KEY`, and which adapters a tenant may use: `TENANT=PATTERN`.

In: the texts of the settings. Out: whose each key is, and whether a tenant may name an adapter. What a route asks of a key is
said in `auth.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import translate
from typing import Final

OPERATOR: Final = ""
"""The tenant of requests that come with the operator's key, or on a server without keys."""

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERN = re.compile(r"[A-Za-z0-9._:/@+*?\[\]!-]{1,256}")  # what a name may have, and what a glob may
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


class AdapterAccess:
    """Which adapters each tenant may use: those whose names one of its patterns matches; all, if it has none.

    Patterns are globs (`*`, `?`, `[...]`), case matters, and `*` takes slashes too. The base is everybody's, and the operator
    may use everything.

    Args:
        texts: `TENANT=PATTERN` each, any number for a tenant; `TENANT=` for one that may use the base only.
        tenants: those that have keys.

    Raises:
        ValueError: a text is not of that form, or its tenant has no key.
    """

    def __init__(self, texts: Sequence[str], tenants: Collection[str]) -> None:
        patterns: dict[str, list[str]] = {}
        for text in texts:
            tenant, equals, pattern = text.partition("=")
            if not equals or not _TENANT.fullmatch(tenant):
                raise ValueError(f"adapters of a tenant are written TENANT=PATTERN, not {text!r}")
            if tenant not in tenants:
                raise ValueError(f"{text!r} is for a tenant that has no API key: give it one (TENANT:KEY)")
            if pattern and not _PATTERN.fullmatch(pattern):
                raise ValueError(f"{text!r}: no adapter's name can match {pattern!r}")
            found = patterns.setdefault(tenant, [])
            if pattern:
                found.append(pattern)
        self._allowed = {
            tenant: re.compile("|".join(map(translate, found))) if found else None for tenant, found in patterns.items()
        }

    def is_bound(self, tenant: str) -> bool:
        """Whether there are adapters that a tenant may not use."""
        return tenant in self._allowed

    def allows(self, tenant: str, adapter: str) -> bool:
        """Whether a tenant may use an adapter."""
        if tenant not in self._allowed:
            return True
        allowed = self._allowed[tenant]
        return allowed is not None and allowed.match(adapter) is not None
