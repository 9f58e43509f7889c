"""A dataset's identity is everything that determines its content. It is hashed, and two identities are compared key by key."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Identity = Mapping[str, Any]

_MOST_LINES = 20  # a corpus may have thousands of files


def fingerprint(identity: Identity) -> str:
    """SHA-256 (hex) of the identity's canonical JSON: keys sorted, no spaces, so the order of keys does not matter."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with its own checksum, under `checksum`, so that a flipped bit in a small JSON file is detected."""
    return {**record, "checksum": fingerprint(record)}


def require_seal(record: dict[str, Any]) -> None:
    """Remove the checksum from a record after checking it. Records of earlier versions have none.

    Raises:
        ValueError: it does not match the rest of the record.
    """
    checksum = record.pop("checksum", None)
    if checksum is not None and checksum != fingerprint(record):
        raise ValueError("its checksum does not match its content: it was damaged, or changed by hand")


def differences(stored: Identity, asked: Identity) -> list[str]:
    """A line for each key that differs between two identities, with dots in nested keys: `top_k: stored 10, asked for 32`."""
    left, right = _flat(stored), _flat(asked)
    missing = "nothing"
    lines = [
        f"{key}: stored {left.get(key, missing)}, asked for {right.get(key, missing)}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key, missing) != right.get(key, missing)
    ]
    return lines if len(lines) <= _MOST_LINES else [*lines[:_MOST_LINES], f"… and {len(lines) - _MOST_LINES} more"]


def _flat(identity: Identity, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in identity.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value, ensure_ascii=False)
    return flat
