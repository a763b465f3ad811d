"""Sign a released model, and verify it before use: OpenSSF Model Signing with an elliptic curve key.

The signature lies in the model's folder, and covers every other file of it. `model_signing verify key` verifies it too,
with nothing of ours. The library is imported on first use.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from components.core.audit_keys import AuditKeyError, keys_of
from components.core.errors import PedigreeError
from components.core.model_files import NOT_OF_THE_MODEL, SIGNATURE, differing, file_digests
from components.core.text import some_of

# Set by the local stack; a team sets them itself.
PRIVATE_KEY = "PEDIGREE_SIGNING_KEY"  # the reviewer's: a PEM file, or a `pkcs11:` URI of a KMS or a hardware key
PUBLIC_KEY = "PEDIGREE_SIGNING_PUBLIC_KEY"  # everybody's: its public key, a PEM file
PKCS11 = "pkcs11:"
OF_THE_REVIEWER = "the private key of the reviewer"
CURVES = ("secp256r1", "secp384r1", "secp521r1")  # of model-signing


class SignatureError(PedigreeError):
    """A released model cannot be signed, or is not what was signed; the message says what differs and what to do."""


def public_key() -> Path:
    """The file with the public key of those who release models.

    Raises:
        SignatureError: the variable is not set, or there is no such file.
    """
    return _key_file(PUBLIC_KEY, "the public key of those who release models")


def check_keys() -> str:
    """Check that the public key can be used, and that it belongs to the private key, where one is named.

    Returns:
        What was found, in one line.

    Raises:
        SignatureError: there is no public key, a file is not such a key, or the two are not a pair.
    """
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

    path, private = public_key(), os.environ.get(PRIVATE_KEY, "")
    public = _loaded(PUBLIC_KEY, path, load_pem_public_key)
    if not private:
        return f"{path} verifies; nothing is signed here, {PRIVATE_KEY} is not set"
    if private.startswith(PKCS11):
        return f"{path} verifies; {PRIVATE_KEY} is in a device, which is asked when a model is released"
    file = _key_file(PRIVATE_KEY, OF_THE_REVIEWER)
    if _loaded(PRIVATE_KEY, file, lambda data: load_pem_private_key(data, None).public_key()) != public:
        raise SignatureError(f"{PUBLIC_KEY}={path} is not the public key of {PRIVATE_KEY}={file}; name a pair")
    return f"{path} verifies what {file} signs"


def _loaded(variable: str, path: Path, load: Callable[[bytes], Any]) -> Any:
    """Return the public key that a file gives, of a kind that can sign models."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    try:
        key = load(path.read_bytes())
    except Exception as error:  # of the library, for each thing that a file may be
        raise SignatureError(f"{variable}={path}: not a key that can be used: {_said(error)}") from error
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in CURVES:
        kind = key.curve.name if isinstance(key, EllipticCurvePublicKey) else type(key).__name__.strip("_")
        raise SignatureError(f"{variable}={path}: a key of kind {kind}; allowed: elliptic curves {', '.join(CURVES)}")
    return key


def signing_key_id() -> str:
    """Return the id of the public key: the SHA-256 of its DER form, in hex.

    Raises:
        SignatureError: as of `public_key`, or it is no elliptic curve key.
    """
    file = public_key()
    try:
        ids = list(keys_of({file.name: file.read_text(errors="replace")}))
    except (OSError, AuditKeyError) as error:
        raise SignatureError(f"{PUBLIC_KEY}={file}: not a public key: {_said(error)}") from error
    if len(ids) != 1:
        raise SignatureError(f"{PUBLIC_KEY}={file}: holds {len(ids)} public keys, expected one")
    return ids[0]


def sign_folder(folder: Path) -> None:
    """Write the signature of all other files of a model into its folder, and verify it.

    Raises:
        SignatureError: there is no key, it cannot be used, or it is not the one that the public key belongs to.
    """
    from model_signing import signing

    key = os.environ.get(PRIVATE_KEY, "")
    if not key.startswith(PKCS11):
        key = os.fspath(_key_file(PRIVATE_KEY, OF_THE_REVIEWER))
    try:
        config: Any = signing.Config().set_hashing_config(_hashing())  # its types are partial
        if key.startswith(PKCS11):
            config.use_pkcs11_signer(pkcs11_uri=key)
        else:
            config.use_elliptic_key_signer(private_key=key)
        config.sign(folder, folder / SIGNATURE)
    except Exception as error:  # of the library and of the many that it reads keys with
        shown = key.partition("?")[0]  # the rest of a URI may hold a PIN
        raise SignatureError(f"{PRIVATE_KEY}={shown}: cannot sign: {_said(error)}") from error
    verify_folder(folder)


def verify_folder(folder: Path) -> None:
    """Check that every file of a folder is what the holder of the key signed, and that there is no other file.

    Raises:
        SignatureError: it is not signed, by another key, or a file was changed, added or removed; names the files.
    """
    from model_signing import verifying

    key = public_key()
    if not (folder / SIGNATURE).is_file():
        raise SignatureError(f"not signed: it has no {SIGNATURE}; `pedigree promote` signs what it releases")
    try:
        config: Any = verifying.Config()
        config = config.use_elliptic_key_verifier(public_key=key).set_hashing_config(_hashing())
    except (OSError, ValueError) as error:
        raise SignatureError(f"{PUBLIC_KEY}={key}: not a public key: {_said(error)}") from error
    try:
        config.verify(folder, folder / SIGNATURE)
    except Exception as error:  # whatever a forged signature makes the library raise: it has not verified
        said = some_of(_differing(folder), 5) or _said(error)
        raise SignatureError(f"not what the holder of {key} signed, do not use it: {said}") from error


def _differing(folder: Path) -> list[str]:
    """Paths of the files that are not what the signature says, whoever made it."""
    with suppress(ValueError, KeyError, TypeError):
        envelope = json.loads((folder / SIGNATURE).read_bytes())["dsseEnvelope"]
        resources = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
        return differing({file["name"]: file["digest"] for file in resources}, file_digests(folder))
    return []


def _hashing() -> Any:
    from model_signing import hashing

    config: Any = hashing.Config()
    return config.set_ignored_paths(paths=NOT_OF_THE_MODEL, ignore_git_paths=False)


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _key_file(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        raise SignatureError(f"{variable} is not set: name the PEM file with {what}, or run `pedigree up`")
    if not Path(value).is_file():
        raise SignatureError(f"{variable}={value}: no such file; name the PEM file with {what}, or run `pedigree up`")
    return Path(value)
