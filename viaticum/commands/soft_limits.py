"""The options of soft limits, which several commands share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from viaticum.commands.options import with_options
from viaticum.errors import InputError

if TYPE_CHECKING:
    from viaticum.agents.workflow.soft_limits import SoftLimits

WEBHOOK_SECRET = "VIATICUM_WEBHOOK_SECRET"
OPTIONS: dict[str, Any] = {
    "shares": Annotated[
        list[float] | None,
        typer.Option(
            "--soft-limit",
            help="Share of a budget, such as 0.8, at which the log and --webhook are told; may be repeated. "
            "[default with --webhook: 0.5, 0.8, 0.95]",
        ),
    ],
    "webhook": Annotated[
        str | None,
        typer.Option(
            "--webhook",
            help="Where soft limits are posted, signed with the base64 secret in VIATICUM_WEBHOOK_SECRET.",
            metavar="URL",
        ),
    ],
}


def soft_limits_of(shares: list[float] | None, webhook: str | None) -> SoftLimits | None:
    """The setting from the values of these options. Raises `InputError` without the secret of a webhook."""
    from viaticum.agents.workflow.soft_limits import SHARES, SoftLimits
    from viaticum.agents.workflow.webhooks import Webhook

    if not shares and webhook is None:
        return None
    if webhook is None:
        return SoftLimits(shares or SHARES)
    secret = os.environ.get(WEBHOOK_SECRET)
    if not secret:
        raise InputError(f"--webhook needs {WEBHOOK_SECRET}; make one with `openssl rand -base64 32`")
    return SoftLimits(shares or SHARES, webhook=Webhook(webhook, secret))


with_soft_limit_options = with_options("soft_limits", OPTIONS, soft_limits_of)
