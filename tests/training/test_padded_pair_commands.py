"""A pair of 97 and 112 rows of logits over one tokenizer, through the commands that learn its router."""

from __future__ import annotations

from pathlib import Path

import pytest
from padded_pair import SMALL_ROWS, TEMPLATE, write_padded_pair
from token_pairs import write_questions
from typer.testing import CliRunner

from viaticum.cli import app
from viaticum.training.label_journal import Journal

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("small_template", [TEMPLATE, "S:" + TEMPLATE], ids=["one prompt", "two prompts"])
def test_its_router_is_labelled_trained_and_calibrated(small_template: str, tmp_path: Path) -> None:
    file, ids = write_padded_pair(tmp_path, small_template=small_template)
    questions = write_questions(tmp_path / "questions.jsonl", 8)
    labels, router = tmp_path / "labels", tmp_path / "router"
    common = ["--catalogue", str(file)]
    label = ["label", str(questions), "--pair", "padded", "--out", str(labels), *common]
    label += ["--strategy", "direct", "--sentence-cap", "20"]
    for command in (
        label,
        label,  # what is labelled already stays
        ["train", str(labels), "--out", str(router)],
        ["calibrate", str(router), str(questions), "--share", "0.3", *common],
    ):
        result = CliRunner().invoke(app, ["tokens", *command])
        assert result.exit_code == 0, result.output
    journal = Journal(labels / "journal.jsonl")
    journal.close()
    records = [*journal.responses.values(), *journal.continuations.values()]
    tokens = {token for record in records for token in record.tokens}
    assert len(journal.responses) == 8
    assert journal.continuations
    assert tokens <= ids
    assert max(tokens) < SMALL_ROWS
