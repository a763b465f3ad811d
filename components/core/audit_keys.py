"""Sign audit events and verify their signatures: elliptic curve keys in PEM files.

`openssl dgst -sha256 -verify PUBLIC_KEY -signature SIGNATURE` verifies one too, over the text of the event's hash. The
library is imported on first use.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.core.errors import PedigreeError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

# Set by the local stack; a team sets them itself.
AUDIT_KEY = "PEDIGREE_AUDIT_KEY"  # of whoever writes events: a PEM file
AUDIT_PUBLIC_KEYS = "PEDIGREE_AUDIT_PUBLIC_KEYS"  # whose events a reader trusts: a PEM file, or a folder of them
_PUBLIC = re.compile(r"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)


class AuditKeyError(PedigreeError):
    """A key cannot be used; the message names the variable and the file."""


@dataclass(frozen=True)
class PublicKey:
    """A key whose events are trusted; `name` is that of its file, such as `reviewer` of `reviewer.pem`."""

    name: str
    pem: str
    key: EllipticCurvePublicKey

    def verifies(self, text: str, signature: str) -> bool:
        """Return whether the base64 text is this key's signature of a text."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            self.key.verify(base64.b64decode(signature, validate=True), text.encode(), ec.ECDSA(hashes.SHA256()))
        except (InvalidSignature, ValueError):
            return False
        return True


@dataclass(frozen=True)
class Signer:
    """The private key of this process, and the id of its public key."""

    id: str
    key: EllipticCurvePrivateKey

    def sign(self, text: str) -> str:
        """Return the signature of a text as base64."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return base64.b64encode(self.key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))).decode()


def own_signer() -> Signer | None:
    """Return the key that PEDIGREE_AUDIT_KEY names; None if the variable is not set.

    Raises:
        AuditKeyError: the file cannot be read, or holds no elliptic curve key.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not (value := os.environ.get(AUDIT_KEY)):
        return None
    try:
        key = load_pem_private_key(Path(value).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise _unusable(AUDIT_KEY, value, error) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise AuditKeyError(f"{AUDIT_KEY}={value}: not an elliptic curve key; `pedigree up` makes one")
    return Signer(key_id(key.public_key()), key)


def trusted_keys() -> dict[str, PublicKey]:
    """Return the keys that PEDIGREE_AUDIT_PUBLIC_KEYS names, by id.

    Raises:
        AuditKeyError: the variable is not set, or names no usable key.
    """
    value = os.environ.get(AUDIT_PUBLIC_KEYS)
    if not value:
        raise AuditKeyError(
            f"{AUDIT_PUBLIC_KEYS} is not set: name the PEM file, or the folder of PEM files, with the public keys of "
            "those who write audit events, or run `pedigree up`"
        )
    place, found = Path(value), dict[str, str]()
    try:
        for file in sorted(place.glob("*.pem")) if place.is_dir() else [place]:
            name = file.name.partition(".")[0]
            found[name] = found.get(name, "") + file.read_text(errors="replace")
    except OSError as error:
        raise _unusable(AUDIT_PUBLIC_KEYS, value, error) from error
    if not (keys := keys_of(found)):
        raise AuditKeyError(f"{AUDIT_PUBLIC_KEYS}={value}: holds no public key; name a PEM file or a folder of them")
    return keys


def keys_of(pems: Mapping[str, str]) -> dict[str, PublicKey]:
    """Return public keys by id, from PEM texts by name; a text may hold several keys.

    Raises:
        AuditKeyError: one is no elliptic curve key.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    found: dict[str, PublicKey] = {}
    for name, text in pems.items():
        for pem in _PUBLIC.findall(text):
            try:
                key = load_pem_public_key(pem.encode())
            except ValueError as error:
                raise _unusable(AUDIT_PUBLIC_KEYS, name, error) from error
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise AuditKeyError(f"public key {name}: not an elliptic curve key")
            found[key_id(key)] = PublicKey(name, pem, key)
    return found


def key_id(key: EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of a public key's DER form, in hex."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _unusable(variable: str, value: str, error: Exception) -> AuditKeyError:
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return AuditKeyError(f"{variable}={value}: cannot be used ({said}); name a PEM file, or run `pedigree up`")
