"""Where data may go: restrictions to models by their labels.

A model has labels: `local` where nothing leaves this machine, and the region and the tags of its entry (see
`Catalogue.labels`). A restriction names labels, one of which a model has to have: `only="local"`, or
`only=["local", "eu"]`. Restrictions of a client, a key, a request and a question hold together, and none of
them lifts another. A model without labels is allowed by none. Leaves out where they are enforced
(`viaticum.agents.workflow.restrictions`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from viaticum.checks import checked_items, shown
from viaticum.errors import InputError, ModelNotAllowed

LOCAL = "local"
SHOWN = 8  # models in a message
Only = str | Iterable[str]
_LABEL = re.compile(r"[a-z0-9][a-z0-9._:/-]*")


def checked_label(name: str, label: Any) -> str:
    """A label in lower case. Raises `InputError` where it is none. name: of the argument or the field."""
    text = label.strip().lower() if isinstance(label, str) else ""
    if not _LABEL.fullmatch(text):
        raise InputError(
            f"{name} has labels such as local, eu or zero-retention, of letters, digits and . _ : / -, got "
            f"{shown(label)}"
        )
    return text


def checked_only(only: Only | None) -> tuple[str, ...]:
    """The labels of one restriction, sorted; a text may have several, with commas. Empty for none.

    Raises:
        InputError: a label is none, or a list is empty: that would allow no model.
    """
    if only is None:
        return ()
    given = only.split(",") if isinstance(only, str) else checked_items("only", only, str, "a label")
    labels = tuple(sorted({checked_label("only", each) for each in given}))
    if not labels:
        raise InputError("only is empty, which allows no model; leave it out, or give labels such as local")
    return labels


@dataclass(frozen=True, slots=True)
class Residency:
    """Restrictions that hold together.

    groups: of each restriction the labels, of which a model has to have one.
    """

    groups: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def of(cls, *restrictions: Only | None) -> Residency:
        """Of several restrictions, None among them where there is none. Raises `InputError`."""
        checked = (checked_only(each) for each in restrictions)
        return cls(tuple(dict.fromkeys(group for group in checked if group)))

    def __bool__(self) -> bool:
        return bool(self.groups)

    def __and__(self, other: Residency) -> Residency:
        return Residency(tuple(dict.fromkeys((*self.groups, *other.groups))))

    def allows(self, labels: Iterable[str]) -> bool:
        """Whether a model with these labels may be used."""
        has = set(labels)
        return all(has.intersection(group) for group in self.groups)

    def refusal(self, models: Mapping[str, Iterable[str]]) -> ModelNotAllowed:
        """The error that names the models that may not be used, and why. models: labels by name."""
        listed = [f"{name} ({', '.join(sorted(labels)) or 'no label'})" for name, labels in models.items()]
        more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        return ModelNotAllowed(
            f"data may go to models labelled {self} alone, which refuses {', '.join(listed[:SHOWN])}{more}; "
            "name another model, or label an entry of the catalogue with region or tags",
            models=models,
            only=self.groups,
        )

    def __str__(self) -> str:
        return " and ".join(" or ".join(group) for group in self.groups)


NO_RESTRICTION = Residency()
ANY_LABEL = frozenset({"*"})  # of a call that sends its data to no model, such as one of a tool
