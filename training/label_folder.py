"""The folder of a labelling run: manifest, lock, journal, feature shards and the finished rows.

The manifest says what the labels were made from; a run with other weights, prompts or settings is refused.
Leaves out how texts, features and verdicts are made (`training.token_labels`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from viaticum.errors import InputError
from viaticum.files import atomic_write, run_lock, write_jsonl
from viaticum.questions import Question
from viaticum.training.label_journal import DifferenceKey, Journal
from viaticum.training.provenance import check_identity, versions

if TYPE_CHECKING:
    from viaticum.routers.token.labels import Shard
    from viaticum.training.continuations import StageStats


class LabelFolder:
    """A folder of labels that one run writes to; a context manager that holds its lock.

    Args:
        path: the folder, which exists.
        identity: what labels depend on; it becomes the manifest of a new folder.

    Raises:
        InputError: the folder was made from something else, or another run holds it.
        DataError: the manifest or the journal is damaged.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest: dict[str, Any] = self._open_manifest(identity)
        self.journal = Journal(path / "journal.jsonl")
        self._exit = ExitStack()

    def __enter__(self) -> LabelFolder:
        busy = f"another run is labelling into {self.path}; wait for it, or use another folder"
        self._exit.enter_context(run_lock(self.path / ".lock", busy=busy))
        self._exit.callback(self.journal.close)
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    # --- manifest -------------------------------------------------------------------------------------------

    def _open_manifest(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        from viaticum.routers.token.labels import MANIFEST, read_manifest

        if not (self.path / MANIFEST).exists():
            return self._write_manifest({**identity, "verifiers": [], "versions": versions()})
        stored = read_manifest(self.path)
        check_identity(self.path, stored, identity, origin="was labelled", verb="label")
        return stored

    def update_manifest(self, **facts: Any) -> None:
        """Add facts to the manifest, on the disk at once."""
        if any(self.manifest.get(name) != value for name, value in facts.items()):
            self.manifest = self._write_manifest({**self.manifest, **facts, "versions": versions()})

    def add_stats(self, stage: str, stats: StageStats) -> None:
        """Add what a stage computed to the manifest. A stage that is killed is not counted."""
        from viaticum.training.continuations import StageStats

        known: dict[str, Any] = self.manifest.get("work", {})
        self.update_manifest(work={**known, stage: asdict(StageStats(**known.get(stage, {})) + stats)})

    def _write_manifest(self, manifest: dict[str, Any]) -> dict[str, Any]:
        from viaticum.routers.token.labels import MANIFEST

        atomic_write(self.path / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        return manifest

    # --- content --------------------------------------------------------------------------------------------

    def check_questions(self, questions: Iterable[Question]) -> None:
        """Raise `InputError` where the folder has another question under the same id."""
        for question in questions:
            known = self.journal.responses.get(question.id)
            if known is not None and known.question != question.query.text:
                raise InputError(
                    f"{self.path} has another question with the id {question.id!r}; give ids, or label into "
                    "a new folder"
                )

    def shards(self) -> Iterator[Shard]:
        """Load the feature shards one by one, in their order."""
        from viaticum.routers.token.labels import Shard, shard_paths

        for path in shard_paths(self.path):
            yield Shard.load(path)

    def next_shard_path(self) -> Path:
        from viaticum.routers.token.labels import shard_paths

        last = shard_paths(self.path)[-1:]
        number = int(last[0].stem.rpartition("-")[2]) + 1 if last else 0
        return self.path / f"features-{number:05d}.safetensors"

    @cached_property
    def differences(self) -> dict[DifferenceKey, tuple[int, float]]:
        """Where the tokens of the two models differ: the small one's token id and its normalised entropy."""
        found: dict[DifferenceKey, tuple[int, float]] = {}
        for shard in self.shards():
            rows = shard.differs.nonzero().flatten()
            columns = (shard.owner, shard.place, shard.known[shard.token], shard.entropy)
            for owner, position, token, entropy in zip(
                *(each[rows].tolist() for each in columns), strict=True
            ):
                if shard.questions[owner] in self.journal.responses:
                    found[shard.questions[owner], position] = (token, entropy)
        return found

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the rows of labels, whole or not at all."""
        from viaticum.routers.token.labels import ROWS

        write_jsonl(self.path / ROWS, rows)
