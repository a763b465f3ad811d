"""A signature covers every file of a model; the library's own program verifies it too."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from components.core.model_files import META_FILE, SIGNATURE, ModelFilesError, check_harmless, file_digests
from components.core.signing import PRIVATE_KEY, PUBLIC_KEY, SignatureError, check_keys, sign_folder, verify_folder
from tests.keys import key_variables

FILES = {
    "MLmodel": b"flavors: {}",
    "pyfunc_model.py": b"class Model: ...",
    "artifacts/weights/model.safetensors": bytes(range(256)) * 9,
    "artifacts/card.md": b"# card",
}


def flip(folder: Path) -> None:
    path = folder / "artifacts/weights/model.safetensors"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


TAMPERED = {
    "a changed byte": (flip, r"artifacts/weights/model\.safetensors"),
    "foreign code": (lambda f: (f / "pyfunc_model.py").open("a").write("import os"), r"pyfunc_model\.py"),
    "a file more": (lambda f: (f / "code.py").write_text("import os"), r"code\.py"),
    "a file less": (lambda f: (f / "artifacts/card.md").unlink(), r"artifacts/card\.md"),
    "a file of git": (lambda f: (f / ".gitignore").write_text("*"), r"\.gitignore"),
    "a link": (lambda f: (f / "link").symlink_to("MLmodel"), r"link"),
    "no signature": (lambda f: (f / SIGNATURE).unlink(), r"not signed: it has no model\.sig"),
    "half a signature": (lambda f: os.truncate(f / SIGNATURE, 300), r"do not use it"),
    "an empty signature": (lambda f: (f / SIGNATURE).write_text("{}"), r"do not use it"),
}


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch) -> dict[str, str]:
    variables = key_variables(tmp_path / "keys")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def folder(tmp_path, keys) -> Path:
    folder = tmp_path / "model"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    sign_folder(folder)
    return folder


def by_the_library(folder: Path, keys: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / SIGNATURE), "--public_key", keys[PUBLIC_KEY]]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_signed_folder_verifies_wherever_it_lies(folder, tmp_path, keys):
    assert set(file_digests(folder)) == set(FILES)
    moved = tmp_path / "of another name"
    shutil.copytree(folder, moved)
    (moved / META_FILE).write_text("name: x")  # as MLflow's download leaves it
    verify_folder(moved)
    assert stat.S_IMODE(Path(keys[PRIVATE_KEY]).stat().st_mode) == 0o600


@pytest.mark.parametrize("what", TAMPERED)
def test_whatever_is_changed_is_named_in_one_line(folder, keys, what):
    tamper, named = TAMPERED[what]
    tamper(folder)
    with pytest.raises(SignatureError, match=named) as caught:
        verify_folder(folder)
    assert "\n" not in str(caught.value)


def test_the_librarys_program_sees_a_changed_byte_too(folder, keys):
    assert by_the_library(folder, keys).returncode == 0
    flip(folder)
    refused = by_the_library(folder, keys)
    assert refused.returncode == 1
    assert "Hash mismatch for 'artifacts/weights/model.safetensors'" in refused.stdout + refused.stderr


def test_another_key_verifies_nothing(folder, tmp_path, monkeypatch):
    for name, value in key_variables(tmp_path / "others").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SignatureError, match="do not use it"):
        verify_folder(folder)


def test_a_key_pair_is_made_once_and_its_public_half_again(keys):
    private, public = Path(keys[PRIVATE_KEY]), Path(keys[PUBLIC_KEY])
    before = private.read_bytes(), public.read_bytes()
    public.unlink()
    assert key_variables(private.parent) == keys
    assert (private.read_bytes(), public.read_bytes()) == before


@pytest.mark.parametrize("variable", [PRIVATE_KEY, PUBLIC_KEY])
def test_a_missing_or_wrong_key_is_one_line(folder, keys, tmp_path, monkeypatch, variable):
    other = key_variables(tmp_path / "others")[variable]
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no key")
    for value, said in (
        ("", f"{variable} is not set"),
        ("/none.pem", f"{variable}=/none.pem: no such file"),
        (str(wrong), f"{variable}={wrong}: "),
        (other, "do not use it"),  # a public key that does not belong to the private one
    ):
        monkeypatch.setenv(variable, value)
        with pytest.raises(SignatureError, match=said) as caught:
            sign_folder(folder)
        assert "\n" not in str(caught.value)


def test_keys_are_checked_without_signing(keys, tmp_path, monkeypatch):
    private, public = keys[PRIVATE_KEY], keys[PUBLIC_KEY]
    assert check_keys() == f"{public} verifies what {private} signs"
    monkeypatch.setenv(PRIVATE_KEY, "pkcs11:token=x?pin-value=1234")
    assert "in a device" in check_keys()
    assert "1234" not in check_keys()
    monkeypatch.delenv(PRIVATE_KEY)
    assert "nothing is signed here" in check_keys()

    others, wrong, of_bitcoin = key_variables(tmp_path / "others"), tmp_path / "wrong.pem", tmp_path / "k1.pem"
    wrong.write_text("no key")
    form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    of_bitcoin.write_bytes(ec.generate_private_key(ec.SECP256K1()).private_bytes(*form))
    for variable, value, said in (
        (PRIVATE_KEY, others[PRIVATE_KEY], f"{PUBLIC_KEY}={public} is not the public key of {PRIVATE_KEY}="),
        (PRIVATE_KEY, "/none.pem", f"{PRIVATE_KEY}=/none.pem: no such file"),
        (PRIVATE_KEY, str(of_bitcoin), "a key of kind secp256k1; allowed: elliptic curves secp256r1, "),
        (PUBLIC_KEY, str(wrong), f"{PUBLIC_KEY}={wrong}: not a key that can be used: "),
        (PUBLIC_KEY, "", f"{PUBLIC_KEY} is not set"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            with pytest.raises(SignatureError, match=re.escape(said)) as caught:
                check_keys()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x80\x04\x95\x10", "a pickle"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
        (b"\x1f\x8b\x08", "a compressed file"),
    ],
)
def test_a_file_that_could_run_code_is_named(folder, data, what):
    (folder / "python_model.pkl").write_bytes(data)
    with pytest.raises(ModelFilesError, match=rf"^python_model\.pkl is {what}"):
        check_harmless(folder)


def test_a_safetensors_file_may_begin_as_a_pickle_does(folder):
    (folder / "artifacts/weights/model.safetensors").write_bytes(b"\x80\x02" + bytes(6))  # a header of 640 bytes
    check_harmless(folder)
