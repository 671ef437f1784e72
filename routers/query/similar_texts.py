"""Groups of texts whose wording is alike, in memory that grows with the texts and not with their pairs.

Two texts are alike where the cosine of their vectors reaches a threshold: of TF-IDF words and word pairs, of
long texts of samples of word triples (Broder 1997). Only pairs that share a rare feature are compared:
the frequent ones of a vector of length 1 are together shorter than the threshold, so that they alone reach
it with no other vector (prefix filtering, Bayardo et al. 2007). Leaves out which texts are compared
(`viaticum.routers.query.outcome_matrix.near_duplicates`). Needs scikit-learn (extra `local`).
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

SAMPLE = 1_000  # word triples of a text
PAIRS = 2**24  # of texts, that are in memory at a time
BLOCK = 2**16  # pairs of texts that are compared before their groups are joined
ROUNDING = 1e-9
# Scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"([{UNSPACED}]+)|[^\W{UNSPACED}]+")
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xFF51AFD7ED558CCD], dtype=np.uint64)
Array = np.ndarray[Any, Any]


def words_of(text: str) -> list[str]:
    """The words of a text, numbers ignored.

    Of a script without spaces every two characters that follow each other, of a text without words (emojis,
    signs) every character.
    """
    found: list[str] = []
    for match in _WORD.finditer(re.sub(r"\d+", "0", text.lower())):
        run = match[1]
        if run is None or len(run) == 1:
            found.append(match[0])
        else:
            found.extend(map("".join, itertools.pairwise(run)))
    return found or [character for character in text if not character.isspace()]


def group_alike(vectors: Any, labels: Array, numbers: Array, threshold: float) -> Array:
    """Labels [Q] in which texts that are alike, directly or through a chain, have the same one.

    Args:
        vectors: sparse rows of length 1 or 0, without negative numbers [n, F].
        labels: so far [Q].
        numbers: which text each row is of [n].
        threshold: least cosine of texts that are alike.
    """
    rare, rest = _rare_part(vectors, threshold)
    features = vectors.T.tocsr()
    step = max(1, PAIRS // max(1, len(numbers)))
    for start in range(0, len(numbers), step):
        part = (rare[start : start + step] @ features).tocoo()
        row, column = part.row + start, part.col
        candidate = (column > row) & (part.data >= threshold - rest[row] - ROUNDING)
        row, column = row[candidate], column[candidate]
        for begin in range(0, len(row), BLOCK):
            first, second = row[begin : begin + BLOCK], column[begin : begin + BLOCK]
            # What is in one group already need not be compared.
            open_still = labels[numbers[first]] != labels[numbers[second]]
            first, second = first[open_still], second[open_still]
            alike = _cosines(vectors, first, second) >= threshold
            labels = _joined(labels, numbers[first[alike]], numbers[second[alike]])
    return labels


def tf_idf(words: Sequence[Sequence[str]]) -> Any:
    """TF-IDF of words and word pairs, a sparse row of length 1 for each text; None without words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(words):
        return None
    return TfidfVectorizer(analyzer=_words_and_pairs).fit_transform(words).tocsr()


def sample_vectors(texts: Sequence[Sequence[str]]) -> Any:
    """Which word triples are in the sample of each text, as sparse rows of length 1; None without texts."""
    from scipy.sparse import csr_array

    if not texts:
        return None
    hashes = _WordHashes()
    samples = [_sample_triples(words, hashes) for words in texts]
    _, columns = np.unique(np.concatenate(samples), return_inverse=True)
    sizes = np.array([len(sample) for sample in samples])
    values = np.repeat(1 / np.sqrt(sizes), sizes)
    return csr_array((values, columns, np.concatenate(([0], np.cumsum(sizes)))))


def _rare_part(vectors: Any, threshold: float) -> tuple[Any, Array]:
    """The rows without their most frequent features, as many as are shorter than the threshold together.

    Returns the rest, sparse [n, F], and the length of what was left out [n].
    """
    from scipy.sparse import csr_array

    counts = np.bincount(vectors.indices, minlength=vectors.shape[1])
    rows = np.repeat(np.arange(vectors.shape[0]), np.diff(vectors.indptr))
    order = np.lexsort((-counts[vectors.indices], rows))  # the most frequent first within a row
    squares = np.cumsum(vectors.data[order] ** 2)
    before = np.concatenate(([0.0], squares))[vectors.indptr[:-1]]
    dropped = squares - before[rows] < (threshold - ROUNDING) ** 2
    left_out = np.bincount(rows[dropped], vectors.data[order][dropped] ** 2, minlength=vectors.shape[0])
    kept = order[~dropped]
    shape = vectors.shape
    rare = csr_array((vectors.data[kept], (rows[~dropped], vectors.indices[kept])), shape=shape)
    return rare, np.sqrt(left_out)


def _cosines(vectors: Any, first: Array, second: Array) -> Array:
    """Of rows with rows, both of length 1 [n]."""
    step = max(1, PAIRS // 256)
    parts = []
    for start in range(0, len(first), step):
        one, other = vectors[first[start : start + step]], vectors[second[start : start + step]]
        parts.append(np.asarray(one.multiply(other).sum(1)))
    return np.concatenate([each.ravel() for each in parts]) if parts else np.zeros(0)


def _joined(labels: Array, first: Array, second: Array) -> Array:
    """Labels [Q] in which these texts have the same one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(first):
        return labels
    size = int(labels.max()) + 1
    graph = coo_array((np.ones(len(first)), (labels[first], labels[second])), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1])[labels]


def _words_and_pairs(words: Sequence[str]) -> list[str]:
    return [*words, *map(" ".join, itertools.pairwise(words))]


class _WordHashes(dict[str, int]):
    """Hashes of words, the same in every process."""

    def __missing__(self, word: str) -> int:
        self[word] = value = zlib.crc32(word.encode("utf-8", "replace"))
        return value


def _sample_triples(words: Sequence[str], hashes: _WordHashes) -> Array:
    """The smallest hashes of a text's word triples: equal passages give equal samples wherever they are."""
    numbers = np.fromiter(map(hashes.__getitem__, words), dtype=np.uint64, count=len(words))
    triples = (numbers[:-2] * _MIX[0] + numbers[1:-1]) * _MIX[1] + numbers[2:]
    triples ^= triples >> np.uint64(29)
    triples *= _MIX[2]
    return np.unique(triples ^ (triples >> np.uint64(32)))[:SAMPLE]
