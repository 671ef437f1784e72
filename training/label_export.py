"""Export of labelled tokens as one Parquet table, a row a token. Training reads the folder itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from viaticum.files import atomic_file
from viaticum.records import pyarrow_parquet
from viaticum.routers.token.label_stats import KINDS
from viaticum.routers.token.labels import LabelledTokens

ROWS_PER_GROUP = 65_536


def write_table(labels: str | Path, path: str | Path) -> int:
    """Write the table, whole or not at all, and return its number of rows.

    Columns: question, place (index of the token in the large model's text), token (the id that the small
    model would write), entropy (normalised), nats, and one for each verifier with identical, neutral,
    divergent or unknown.

    Args:
        labels: a folder of labels.
        path: the file to write.

    Raises:
        InputError, DataError: as `LabelledTokens.load`.
        MissingExtra: pyarrow is not installed.
    """
    parquet = pyarrow_parquet()
    import pyarrow as pa

    tokens = LabelledTokens.load(labels)
    verifiers: list[str] = list(tokens.manifest["verifiers"])
    kinds = {number: name for name, number in KINDS.items()}
    columns: dict[str, Any] = {
        "question": [tokens.questions[owner] for owner in tokens.owner.tolist()],
        "place": tokens.place.tolist(),
        "token": tokens.token_ids[tokens.token].tolist(),
        "entropy": tokens.entropy.tolist(),
        "nats": (tokens.entropy * math.log(tokens.manifest["vocabulary"])).tolist(),
    }
    for name in verifiers:
        judged = tokens if name == verifiers[0] else LabelledTokens.load(labels, name)
        columns[name] = [kinds[label] for label in judged.labels.tolist()]
    with atomic_file(path) as scratch:
        parquet.write_table(pa.table(columns), scratch, compression="zstd", row_group_size=ROWS_PER_GROUP)
    return len(tokens)
