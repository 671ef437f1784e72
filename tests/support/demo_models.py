"""The demo's models by other weights: a tiny real pair, or scripted ones that take their time."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

from token_pairs import write_pair

from viaticum.catalogue import Catalogue
from viaticum.demo.questions import TOPIC, training_questions
from viaticum.types import Outcome

SMALL, LARGE, PAIR = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-coder-r-stitch"
ENCODER, DIMENSIONS = "all-minilm-l6-v2", 384


def write_tiny_demo(folder: Path) -> Path:
    """A catalogue in which the default pair and the encoder have tiny weights; their prices stay."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    write_pair(folder)
    texts = " ".join(each.query.text.lower() for each in training_questions())
    words = [word for word, _ in Counter(re.findall(r"[a-z]+", texts)).most_common(DIMENSIONS)]
    SentenceTransformer(modules=[BoW(words)], device="cpu").save(str(folder / "encoder"))
    (folder / "encoder" / "config.json").write_text("{}")  # by which the catalogue knows a folder of weights
    lines = []
    for name, weights in ((SMALL, "small"), (LARGE, "large"), (ENCODER, "encoder")):
        lines.append(
            f'[[models."{name}".sources]]\ntype = "path"\npath = "{folder / weights}"\n'
            if name == ENCODER
            else f'[models."{name}"]\ncontext_length = 8192\n'
            f'[[models."{name}".sources]]\ntype = "path"\npath = "{folder / weights}"\n'
        )
    lines.append(f'[models."{PAIR}"]\ntau = 0.75\n')
    # A learned policy is of the shipped pair's weights, and refuses others.
    lines.append('[models."r-stitch+"]\nrouter = "r-stitch"\ntau = 0.75\n')
    return write_catalogue(folder, lines)


# The best pair of each kind in made-up outcomes.
BEST = {
    "arithmetic": (LARGE, "cot"),
    "program": (LARGE, "pot"),
    "fact": (PAIR, "direct"),
    "choice": (SMALL, "direct"),
}


WAYS = [
    *((model, strategy) for model in (SMALL, LARGE) for strategy in ("direct", "cot", "pot")),
    (PAIR, "direct"),
]


def write_demo_router(folder: Path, catalogue: Path) -> Path:
    """A router fitted on made-up outcomes of the training questions, with the encoder of a catalogue."""
    from viaticum.routers.query.encoder import Encoder
    from viaticum.routers.query.fit import fit
    from viaticum.routers.query.outcome_matrix import OutcomeMatrix

    draw, rows = random.Random(0), []
    for question in training_questions():
        for pair in WAYS:
            right = draw.random() < (0.98 if BEST[str(question.columns[TOPIC])] == pair else 0.05)
            factor = (1 if pair[1] == "direct" else 20) * (1 if pair[0] == SMALL else 2)
            rows.append(
                Outcome(
                    dataset=str(question.columns[TOPIC]),
                    question_id=question.id,
                    question=question.query.text,
                    model=pair[0],
                    strategy=pair[1],
                    answer="1" if right else "0",
                    correct=right,
                    input_tokens=100,
                    output_tokens=50,
                    cost_nanousd=draw.randint(50, 90) * factor,
                    seconds=0.1 * factor,
                    finish_reason="stop",
                )
            )
    encoder = Encoder(ENCODER, catalogue=Catalogue.load(catalogue), cache=None)
    fit(OutcomeMatrix.from_outcomes(rows), encoder).save(folder)
    return folder


def write_scripted_demo(folder: Path, pause: float) -> Path:
    """A catalogue with two scripted models, which wait `pause` seconds before each word."""
    return write_catalogue(
        folder,
        [
            f'[models.{name}]\ndescription = "scripted"\nkind = "scripted"\ncontext_length = 8192\n'
            f'input_price = 0.1\noutput_price = {price}\ntext = "The answer is 4."\npause = {pause}\n'
            for name, price in (("slow-small", 0.1), ("slow-large", 0.4))
        ],
    )


def write_catalogue(folder: Path, lines: list[str]) -> Path:
    file = folder / "demo.toml"
    file.write_text("\n".join(lines))
    return file
