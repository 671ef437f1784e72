"""What the wording of a question says before anything was measured: how easy it is, near what was learned.

A ridge regression on the embedding, of how much more often a question is answered rightly than the models'
mean, learned on MMLU-Pro. On other kinds of questions it says next to nothing (docs/log.md), so it is asked
of none: a question has to list six or more options, as those of MMLU-Pro do and hardly any others, and be as
near to the learned ones as nine of ten of them are to the others. `prior_questions.npz` holds the weights and
the centres of clusters; no question is in it. Leaves out what follows for a model
(`viaticum.routers.query.prior`).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from viaticum.errors import InputError, MissingExtra, WeightsError

ENCODER = "all-minilm-l6-v2"  # the encoder that it was learned with
BENCHMARK = "mmlu-pro"  # the kind of questions that it was learned on
OPTIONS = 6  # lettered options that a question of that kind lists at least
Array = np.ndarray[Any, Any]
_OPTION = re.compile(r"^\s*\(?([A-Z])[).:]\s", re.MULTILINE)
_log = logging.getLogger(__name__)


class QuestionView:
    """How easy questions are, where their wording says it.

    Args:
        encode: texts to embeddings of length 1 [N, D]; by default the encoder of the catalogue, which is
            loaded for the first question of the kind that was learned.
        path: the file; by default that of the package.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Any] | None = None, path: str | Path | None = None
    ) -> None:
        packaged = resources.files("viaticum.routers.query") / "prior_questions.npz"
        source = packaged if path is None else Path(path)
        with source.open("rb") as file, np.load(file) as arrays:
            values = {name: arrays[name].astype(np.float64) for name in arrays.files}
        self.weights: Array = values["weights"]
        self.constant, self.near, self.slope = (float(values[name]) for name in ("constant", "near", "slope"))
        self.centres = values["centres"] / np.linalg.norm(values["centres"], axis=1, keepdims=True)
        self._encode, self._lock = encode, threading.Lock()
        self._is_available = True

    def shift(self, text: str) -> float | None:
        """Log-odds by which the question is easier than the usual one of its kind; None: nothing is known."""
        if not self._is_available or len(set(_OPTION.findall(text))) < OPTIONS:
            return None
        try:
            embedding = np.asarray(self._encoder()([text])[0], dtype=np.float64)
            if embedding.shape != self.weights.shape:
                raise InputError(
                    f"the encoder gives {embedding.size} numbers, not the {self.weights.size} of {ENCODER}"
                )
        except (MissingExtra, WeightsError, InputError) as error:
            _log.info("the prior takes all questions as alike: %s", error)
            self._is_available = False
            return None
        if (self.centres @ embedding).max() < self.near:
            return None
        return self.slope * float(self.weights @ embedding + self.constant)

    def _encoder(self) -> Callable[[Sequence[str]], Any]:
        with self._lock:
            if self._encode is None:
                try:
                    from viaticum.routers.query.encoder import Encoder
                except ImportError as error:
                    raise MissingExtra(error.name or "torch", "local") from None
                self._encode = Encoder()
            return self._encode
