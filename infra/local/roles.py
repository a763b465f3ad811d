"""Users of the local MLflow and what they may write: the trainer candidates, the reviewer released models.

Everybody reads everything. Whoever creates a registered model or an experiment may manage it. So a trainer may manage
the candidates that its runs create, and what it creates under a released name is taken from it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from components.core.references import CANDIDATES
from components.core.user import REVIEWER, TRAINER

MODEL, EXPERIMENT, ALL = "registered_model", "experiment", "*"
USERS = "/api/2.0/mlflow/users"
PERMISSIONS = "/api/3.0/mlflow/users/permissions"
Ask = Callable[..., Any]  # (path, method, body) -> the answer of MLflow to its admin


def settle_roles(ask: Ask, passwords: Mapping[str, str]) -> None:
    """Make the users that are missing, and give and take permissions until they are those of the roles."""
    there = {user["username"] for user in ask(f"{USERS}/list")["users"]}
    for name in passwords.keys() - there:
        ask(f"{USERS}/create", "POST", {"username": name, "password": passwords[name]})
    candidates = {(MODEL, name): "EDIT" for name in _models(ask) if name.endswith(CANDIDATES)}
    _grant(ask, TRAINER, {(EXPERIMENT, ALL): "MANAGE", **candidates})
    _grant(ask, REVIEWER, {(MODEL, ALL): "EDIT"})


def _models(ask: Ask) -> list[str]:
    found: list[str] = []
    token = ""
    while True:
        page = ask(f"/api/2.0/mlflow/registered-models/search?max_results=1000&page_token={quote(token)}")
        found += [model["name"] for model in page.get("registered_models", [])]
        token = page.get("next_page_token", "")
        if not token:
            return found


def _grant(ask: Ask, user: str, wanted: Mapping[tuple[str, str], str]) -> None:
    rows = ask(f"{PERMISSIONS}/list?username={user}")["permissions"]
    held = {(row["resource_type"], row["resource_pattern"]) for row in rows}
    for kind, pattern in wanted.keys() - held:
        grant = {"username": user, "resource_type": kind, "resource_id": pattern}
        ask(f"{PERMISSIONS}/grant", "POST", {**grant, "permission": wanted[kind, pattern]})
    for kind, pattern in held - wanted.keys():
        if user == TRAINER and kind == MODEL and not pattern.endswith(CANDIDATES):
            ask(f"{PERMISSIONS}/revoke", "POST", {"username": user, "resource_type": kind, "resource_id": pattern})
