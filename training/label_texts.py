"""The texts around the differences of a labelled folder, for verifiers and the rows of `labels.jsonl`.

Leaves out who judges them (`training.verifiers`) and the folder's files (`training.label_folder`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, cast

from viaticum.training.label_folder import LabelFolder
from viaticum.training.label_journal import DifferenceKey
from viaticum.training.sentences import divergence_span
from viaticum.training.verifiers import Difference
from viaticum.types import FinishReason


class LabelTexts:
    """Decodes the texts of a folder. tokenizer: the pair's."""

    def __init__(self, folder: LabelFolder, tokenizer: Any) -> None:
        self.folder, self._tokenizer = folder, tokenizer

    def difference(self, key: DifferenceKey) -> Difference:
        """Return both texts around the token that differs."""
        question, position = key
        response, continuation = (
            self.folder.journal.responses[question],
            self.folder.journal.continuations[key],
        )
        ours = response.tokens
        theirs = (*ours[:position], continuation.token, *continuation.tokens)
        original, other = self._decode(ours), self._decode(theirs)
        start = len(self._decode(ours[:position]).rstrip("\ufffd"))
        # Characters of the two tokens that differ.
        ours_length, theirs_length = (
            max(0, len(self._decode(tokens[: position + 1])) - start) for tokens in (ours, theirs)
        )
        return Difference(
            response.query,
            divergence_span(original, other, start, (ours_length, theirs_length)),
            original,
            other if continuation.complete else None,
            cast(FinishReason, continuation.finish if continuation.complete else "stop"),
        )

    def _decode(self, tokens: Iterable[int]) -> str:
        ends = self.folder.manifest["stop_ids"]
        return str(self._tokenizer.decode([token for token in tokens if token not in ends]))

    def row(self, key: DifferenceKey, verifiers: Sequence[str]) -> dict[str, Any]:
        """Return a row of `labels.jsonl`, with the verdicts of these verifiers."""
        question, position = key
        token, entropy = self.folder.differences[key]
        target = self.folder.journal.responses[question].tokens[position]
        row: dict[str, Any] = {
            "question": question,
            "place": position,
            "target": target,
            "token": token,
            "target_text": self._decode([target]),
            "token_text": self._decode([token]),
            "entropy": round(entropy, 6),
            "nats": round(nats(entropy, self.folder.manifest["vocabulary"]), 4),
        }
        if key in self.folder.journal.continuations:
            difference = self.difference(key)
            row |= {
                **asdict(difference.span),
                "other_text": difference.other,
                "other_finish": self.folder.journal.continuations[key].finish,
            }
        verdicts = self.folder.journal.verdicts
        row["verdicts"] = {name: verdicts[name][key] for name in verifiers if key in verdicts.get(name, {})}
        return row


def nats(entropy: float, vocabulary: int) -> float:
    """Return a normalised entropy in nats. vocabulary: its number of tokens."""
    return entropy * math.log(vocabulary)
