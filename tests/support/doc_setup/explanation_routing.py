"""A router that was fitted on a table, its models, and outcomes of some questions."""

import os
from pathlib import Path

import doc_machine
import numpy as np
from synthetic_outcomes import SKILLS, outcomes

from viaticum.outcomes import write_outcomes

_ENTRY = 'kind = "scripted"\ndescription = "d"\ncontext_length = 4096\ninput_price = 1\noutput_price = 1\n'
_file = Path(os.environ["XDG_CONFIG_HOME"]) / "viaticum" / "catalogue.toml"
_names = sorted({pair.model for pair in SKILLS})
_file.write_text(
    _file.read_text() + "".join(f'[models.{name}]\n{_ENTRY}text = "The answer is 7."\n' for name in _names)
)
write_outcomes(Path("known.parquet"), outcomes(240))

rng = np.random.default_rng(0)
embeddings = rng.normal(size=(40, 8))
embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
correct, cost = np.full((2, 40, 3), np.nan)
correct[:8], cost[:8] = rng.integers(0, 2, (8, 3)), 0.001
prices = np.array([0.001, 0.002, 0.004])
doc_machine.sh("viaticum router fit known.parquet --out my-router")
