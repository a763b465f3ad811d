"""Where one local stack lives: its folder, ports, credentials, and the variables that lead to its services."""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configobj import ConfigObj, ConfigObjError

from components.core.audit_keys import AUDIT_KEY, AUDIT_PUBLIC_KEYS
from components.core.errors import PedigreeError
from components.core.layout import Layout
from components.core.signing import PRIVATE_KEY, PUBLIC_KEY
from components.core.storage import write_bytes, write_json
from components.core.user import ADMIN, REVIEWER, TRAINER

DATA_BUCKET, MODELS_BUCKET, AUDIT_BUCKET = "pedigree-data", "pedigree-models", "pedigree-audit"
REGION = "us-east-1"
HOST = "127.0.0.1"
PORTS = {"s3": ("s3", "master", "volume", "filer", "admin"), "mlflow": ("mlflow",), "prefect": ("prefect",)}
# SeaweedFS takes a second port for gRPC, this much above each. Both lie below the range from which Linux takes the
# ports of outgoing connections, so that a remembered port stays free while the stack is down.
GRPC_OFFSET = 10_000
PORT_RANGE = range(15_000, 22_000)
# The analytics of Prefect, DVC, Great Expectations and MLflow are switched off here, and nowhere else.
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}

PASSWORDS = {
    ADMIN: "MLFLOW_TRACKING_PASSWORD", TRAINER: "MLFLOW_TRAINER_PASSWORD", REVIEWER: "MLFLOW_REVIEWER_PASSWORD",
}  # fmt: skip

# What the roles may do on S3; all but reading is refused elsewhere. Only the admin may bypass the lock of an event.
APPEND_ACTIONS = [
    "Read", "List",
    *(f"{action}:{AUDIT_BUCKET}" for action in ("Write", "PutObjectRetention", "GetBucketObjectLockConfiguration")),
]  # fmt: skip
ACTIONS = {
    TRAINER: [
        *APPEND_ACTIONS, f"Write:{DATA_BUCKET}",
        *(f"Write:{MODELS_BUCKET}/{place}" for place in ("mlflow/*", ".doctor-*")),
    ],
    REVIEWER: [*APPEND_ACTIONS, f"Write:{MODELS_BUCKET}/released/*"],
}  # fmt: skip
# To write includes to delete; the audit bucket's own policy refuses that to both roles.
AUDIT_POLICY = {
    "Version": "2012-10-17",
    "Statement": [{
        "Effect": "Deny",
        "Principal": {"AWS": [f"arn:aws:iam::*:user/{role}" for role in ACTIONS]},
        "Action": ["s3:DeleteObject", "s3:DeleteObjectVersion", "s3:BypassGovernanceRetention"],
        "Resource": [f"arn:aws:s3:::{AUDIT_BUCKET}/events/*"],
    }],
}  # fmt: skip


class StackError(PedigreeError):
    """Something about the stack that a user can mend; the message is one line that says how."""


@dataclass
class Site:
    """One stack: `folder` is the real `.pedigree` folder below the checkout `root`."""

    root: Path
    folder: Path
    credentials: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    services: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> pid, created, fingerprint

    @classmethod
    def load(cls, root: Path) -> Site:
        """Read what is remembered of the stack of `root`; a stack that never ran has no ports and no credentials."""
        folder = Layout(root).state.resolve()
        site = cls(folder.parent, folder)  # the worktree of a run links to the checkout's folder, and shares its stack
        try:
            if (folder / "stack.json").exists():
                remembered = json.loads((folder / "stack.json").read_text())
                site.ports, site.services = remembered["ports"], remembered["services"]
            if (folder / "credentials.env").exists():
                lines = (folder / "credentials.env").read_text().splitlines()
                site.credentials = dict(line.split("=", 1) for line in lines if "=" in line)
        except PermissionError as error:
            raise StackError(f"{error.filename} is another user's: work in a checkout of your own") from error
        except (OSError, ValueError, KeyError) as error:
            raise StackError(
                f"the state of the stack in {folder} cannot be read ({error}); mend or delete it"
            ) from error
        return site

    def save(self) -> None:
        """Remember ports and processes."""
        write_json(self.folder / "stack.json", {"ports": self.ports, "services": self.services})

    def log(self, service: str) -> Path:
        """The log file of a service."""
        return self.folder / "logs" / f"{service}.log"

    def url(self, service: str) -> str:
        """The address of a service."""
        return f"http://{HOST}:{self.ports[service]}"

    @property
    def has_roles(self) -> bool:
        """Whether there is a login for each role; stacks of older versions have one for the admin only."""
        return all(name in self.credentials for name in (*PASSWORDS.values(), *map(_access_key, ACTIONS)))

    @property
    def signing_keys(self) -> tuple[Path, Path]:
        """The private key that signs released models, and its public key."""
        return self.folder / "signing-key.pem", self.folder / "signing-key.pub.pem"

    def audit_key(self, role: str) -> Path:
        """The private key with which a role signs audit events; the admin is a reviewer."""
        return self.folder / f"audit-{role if role in ACTIONS else REVIEWER}.pem"

    @property
    def audit_public_keys(self) -> Path:
        """The folder of their public keys."""
        return self.folder / "audit-keys"

    @property
    def s3_identities(self) -> Path:
        """SeaweedFS's file of the identities beside its admin."""
        return self.folder / "s3-identities.json"

    def storage_variables(self, role: str = ADMIN) -> dict[str, str]:
        """The variables that lead to the S3 server alone."""
        return {
            "AWS_ENDPOINT_URL": self.url("s3"),
            "AWS_ACCESS_KEY_ID": self.credentials.get(_access_key(role), ""),
            "AWS_SECRET_ACCESS_KEY": self.credentials.get(_secret_key(role), ""),
            "AWS_DEFAULT_REGION": REGION,
            "PEDIGREE_DATA_BUCKET": DATA_BUCKET,
            "PEDIGREE_MODELS_BUCKET": MODELS_BUCKET,
            "PEDIGREE_AUDIT_BUCKET": AUDIT_BUCKET,
            AUDIT_KEY: str(self.audit_key(role)),
            AUDIT_PUBLIC_KEYS: str(self.audit_public_keys),
        }

    def variables(self, role: str = ADMIN) -> dict[str, str]:
        """Everything that a client of this stack needs in its environment to work in a role."""
        private, public = self.signing_keys
        return {
            **self.storage_variables(role),
            **({} if role == TRAINER else {PRIVATE_KEY: str(private)}),
            PUBLIC_KEY: str(public),
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_TRACKING_USERNAME": role,
            "MLFLOW_TRACKING_PASSWORD": self.credentials.get(PASSWORDS[role], ""),
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            "PREFECT_API_AUTH_STRING": self.credentials["PREFECT_API_AUTH_STRING"],
            "PREFECT_HOME": str(self.folder / "prefect"),
            **QUIET,
        }


def settle(site: Site, running: set[str]) -> list[str]:
    """Make the folder, credentials, ports and the files that carry them, and keep all that is still good.

    Args:
        site: filled in place.
        running: services whose ports are their own and stay as they are.

    Returns:
        A line for each port that another program has taken since the last time.
    """
    try:
        for folder in ("logs", "s3", "prefect"):
            (site.folder / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        site.folder.chmod(0o700)
        _settle_credentials(site)
        audit = [(site.audit_key(role), site.audit_public_keys / f"{role}.pem") for role in ACTIONS]
        for private, public in (site.signing_keys, *audit):
            if not (private.exists() and public.exists()):
                make_signing_key(private, public)
        lines = _settle_ports(site, running)
        _write_client_files(site)
        site.save()
    except OSError as error:
        raise StackError(
            f"cannot write the state of the stack into {site.folder}: {error.strerror or error}"
        ) from error
    return lines


def _access_key(role: str) -> str:
    """The name of a role's S3 access key in `credentials.env`."""
    return f"{role.upper() if role in ACTIONS else 'AWS'}_ACCESS_KEY_ID"


def _secret_key(role: str) -> str:
    return f"{role.upper() if role in ACTIONS else 'AWS'}_SECRET_ACCESS_KEY"


def _settle_credentials(site: Site) -> None:
    """Make every credential that is missing; they never change by themselves."""
    wanted = {
        "AWS_ACCESS_KEY_ID": "PEDIGREE" + secrets.token_hex(6).upper(),
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        **{_access_key(role): role.upper() + secrets.token_hex(6).upper() for role in ACTIONS},
        **{_secret_key(role): secrets.token_hex(20) for role in ACTIONS},
        "MLFLOW_TRACKING_USERNAME": ADMIN,
        **{name: secrets.token_urlsafe(18) for name in PASSWORDS.values()},
        "PREFECT_API_AUTH_STRING": f"admin:{secrets.token_urlsafe(18)}",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "WEED_JWT_SIGNING_KEY": secrets.token_hex(32),
        "WEED_JWT_FILER_SIGNING_KEY": secrets.token_hex(32),
        "WEED_JWT_FILER_SIGNING_READ_KEY": secrets.token_hex(32),
    }
    site.credentials = {key: site.credentials.get(key, new) for key, new in wanted.items()}
    _write_private(site.folder / "credentials.env", "".join(f"{k}={v}\n" for k, v in site.credentials.items()))


def make_signing_key(private: Path, public: Path) -> None:
    """Write an elliptic curve key that only its owner may read, unless it is there, and its public key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if private.exists():
        key = serialization.load_pem_private_key(private.read_bytes(), None)
    else:
        key = ec.generate_private_key(ec.SECP256R1())
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        write_bytes(private, key.private_bytes(encoding, form, serialization.NoEncryption()), mode=0o600)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    write_bytes(public, key.public_key().public_bytes(serialization.Encoding.PEM, form))


def _settle_ports(site: Site, running: set[str]) -> list[str]:
    """Keep each port that is free or ours, and choose another where someone else took it."""
    lines: list[str] = []
    taken = set(site.ports.values())
    for service, names in PORTS.items():
        for name in names:
            old = site.ports.get(name)
            if old is not None and (service in running or is_free(old)):
                continue
            free = (port for port in random.SystemRandom().sample(PORT_RANGE, 500) if port not in taken)
            site.ports[name] = next((port for port in free if is_free(port)), 0)
            if not site.ports[name]:
                raise StackError(f"no free port between {PORT_RANGE.start} and {PORT_RANGE.stop} for {name}: free some")
            taken.add(site.ports[name])
            if old is not None:
                lines.append(f"port {old} of {name} was taken by another program: {name} moves to {site.ports[name]}")
    return lines


def is_free(port: int) -> bool:
    """Whether servers could listen on this port of the loopback interface and on its gRPC sister."""
    for number in (port, port + GRPC_OFFSET):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, number))
            except OSError:
                return False
    return True


def _write_client_files(site: Site) -> None:
    """Write S3's identities, DVC's credentials and remote (where there is a DVC project), and MLflow's settings."""
    keys = site.credentials
    credentials = site.folder / "s3-credentials"
    identities = [
        {
            "name": role,
            "credentials": [{"accessKey": keys[_access_key(role)], "secretKey": keys[_secret_key(role)]}],
            "actions": actions,
        }
        for role, actions in ACTIONS.items()
    ]
    _write_private(site.s3_identities, json.dumps({"identities": identities}))
    access, secret = keys[_access_key(TRAINER)], keys[_secret_key(TRAINER)]
    _write_private(credentials, f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")
    auth = {
        "default_permission": "READ",
        "database_uri": "sqlite:///mlflow-auth.db",  # below the server's folder: in a URI, `?` and `#` end a path
        "admin_username": keys["MLFLOW_TRACKING_USERNAME"],
        "admin_password": keys["MLFLOW_TRACKING_PASSWORD"],
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
        "auth_cache_ttl_seconds": "60",
    }
    lines = [f"{key} = {value}".replace("%", "%%") for key, value in auth.items()]
    _write_private(site.folder / "basic_auth.ini", "\n".join(["[mlflow]", *lines, ""]))
    if Layout(site.root).dvc.is_dir():
        _write_dvc_settings(site, credentials)


def _write_dvc_settings(site: Site, credentials: Path) -> None:
    """Name the storage in DVC's local settings, beside whatever else they hold."""
    file = Layout(site.root).dvc_local_settings
    try:
        local = ConfigObj(os.fspath(file), encoding="utf-8", interpolation=False)  # quotes paths as DVC reads them
    except ConfigObjError as error:
        raise StackError(f"{file} cannot be read ({error}); mend or delete it") from None
    local['remote "storage"'] = {
        "endpointurl": site.url("s3"),
        "credentialpath": str(credentials),
        "region": REGION,
        "verify": "true",  # DVC compares what it pulls with its id
    }
    local.filename = None
    _write_private(file, b"\n".join([*local.write(), b""]).decode())


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, unless it says just that already."""
    if not path.exists() or path.read_text() != text or path.stat().st_mode & 0o077:
        write_bytes(path, text.encode(), mode=0o600)


def without_proxy(environ: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """The variables that keep calls to the loopback interface away from a proxy that `environ` names."""
    if not any(environ.get(name) for proxy in ("http_proxy", "all_proxy") for name in (proxy, proxy.upper())):
        return {}
    hosts = (environ.get("no_proxy") or environ.get("NO_PROXY") or "").split(",")
    value = ",".join(dict.fromkeys([*filter(None, hosts), HOST, "localhost"]))
    return {"no_proxy": value, "NO_PROXY": value}
