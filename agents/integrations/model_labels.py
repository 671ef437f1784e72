"""Where the data of LangChain's chat models goes, and the refusal of those that a restriction does not allow.

`ChatViaticum` says it itself. Nobody can tell it of other chat models, whose address may be anything: their
labels are given beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from langchain_core.language_models import BaseChatModel

from viaticum.agents.integrations.chat_model import ChatViaticum
from viaticum.checks import checked_items, checked_type
from viaticum.residency import Only, Residency, checked_label


class ChatModelGuard:
    """Refuses chat models by their labels.

    Args:
        only: labels, one of which a model has to have; None allows all.
        labels: of chat models other than `ChatViaticum`, by the name they are known by.

    Raises:
        InputError: a label is none.
    """

    def __init__(self, only: Only | None, labels: Mapping[str, Iterable[str]] | None) -> None:
        given = checked_type("labels", labels or {}, Mapping, "a dict of labels by the name of a model")
        self.residency = Residency.of(only)
        self._labels = {
            name: frozenset(checked_label("labels", each) for each in _items(name, its))
            for name, its in given.items()
        }

    def labels(self, name: str, model: BaseChatModel) -> frozenset[str]:
        own = model.labels() if isinstance(model, ChatViaticum) else frozenset[str]()
        return own | self._labels.get(name, frozenset())

    def allows(self, name: str, model: BaseChatModel) -> bool:
        return not self.residency or self.residency.allows(self.labels(name, model))

    def check(self, name: str, model: BaseChatModel) -> None:
        """Raises `ModelNotAllowed` for a model that may not be called."""
        self.check_some({name: model})

    def check_some(self, models: Mapping[str, BaseChatModel]) -> None:
        """Raises `ModelNotAllowed` where none of these models may be called."""
        if not any(self.allows(name, model) for name, model in models.items()):
            raise self.residency.refusal({name: self.labels(name, model) for name, model in models.items()})


def _items(name: str, labels: Any) -> tuple[str, ...]:
    return checked_items(f"labels[{name!r}]", labels, str, "a label")
