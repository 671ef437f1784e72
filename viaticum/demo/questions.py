"""What ships with the demo: its questions, those that its router learned from, and that router."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from viaticum.questions import Question, read_questions

PAIR = "qwen2.5-coder-r-stitch"  # of the catalogue: its members are the small and the large model
# With the shipped router: a right answer is worth a tenth of a cent. Chosen by the training questions, five
# fifths of them left out in turn.
ROUTER_POLICY = "weighted:1000"
TOPIC = "topic"  # column of the questions' files: arithmetic, program, fact or choice


def shipped(name: str) -> Path:
    """A file or folder of this package, whether it is there or not."""
    return Path(str(resources.files(__package__) / name))


def demo_questions() -> list[Question]:
    """The 24 questions, six of each kind in turn. None of them is among `training_questions`."""
    return read_questions(shipped("questions.jsonl"))


def training_questions() -> list[Question]:
    """The questions of the same four kinds on which the shipped router was fitted."""
    return read_questions(shipped("training.jsonl"))


def router_folder() -> Path | None:
    """The router that knows the four kinds of questions; None where this version ships none."""
    folder = shipped("router")
    return folder if (folder / "router.json").is_file() else None


def waves(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """The questions in groups of `size`, the last one perhaps smaller."""
    return [list(questions[start : start + size]) for start in range(0, len(questions), size)]
