"""Full-text search as in the original: BM25 in Lucene's form (k1 = 0.9, b = 0.4) over Porter-stemmed English.

Left out of Lucene: its rounding of document lengths to one byte, and the finer points of Unicode word breaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from agentrl.errors import UserError
from environments.webshop.goods import listed

K1, B = 0.9, 0.4

_WORD = re.compile(r"[^\W_]+(?:['’.][^\W_]+)*")
_STOP = frozenset(
    listed(
        "a, an, and, are, as, at, be, but, by, for, if, in, into, is, it, no, not, of, on, or, such, "
        "that, the, their, then, there, these, they, this, to, was, will, with"
    )
)
"""Lucene's English stop-words."""


def _libraries() -> tuple[Any, Any]:
    try:
        import bm25s
        import Stemmer
    except ModuleNotFoundError as error:
        raise UserError(
            f"WebShop's search needs bm25s and PyStemmer ({error}): pip install 'agentrl[webshop]'"
        ) from error
    return bm25s, Stemmer


def _terms(text: str) -> list[str]:
    """Returns the words of `text` before stemming: lower case, possessive 's cut off."""
    return [word.removesuffix("'s").removesuffix("’s") for word in _WORD.findall(text.lower())]


class SearchIndex:
    """An inverted index with precomputed scores. Make one with `build` or `load`."""

    def __init__(self, bm25: Any, vocabulary: dict[str, int], stemmer: Any) -> None:
        self._bm25, self._vocabulary, self._stemmer = bm25, vocabulary, stemmer

    @classmethod
    def build(cls, texts: Iterable[str]) -> SearchIndex:
        """Indexes `texts`; a hit is the position of a text.

        Raises:
            UserError: the libraries are not installed.
        """
        bm25s, stemming = _libraries()
        stemmer = stemming.Stemmer("porter", 0)  # 0: our own cache below is faster than the stemmer's
        vocabulary: dict[str, int] = {}
        known: dict[str, int | None] = dict.fromkeys(_STOP)
        rows = []
        for text in texts:
            row = []
            for term in _terms(text):
                if (number := known.get(term, -1)) == -1:
                    number = known[term] = vocabulary.setdefault(stemmer.stemWord(term), len(vocabulary))
                if number is not None:
                    row.append(number)
            rows.append(row)
        if not vocabulary:
            vocabulary[""] = 0  # an index needs a term; no query has this one
            rows = [[0] for _ in rows]
        bm25 = bm25s.BM25(k1=K1, b=B, method="lucene", backend="numpy")
        tokens = bm25s.tokenization.Tokenized(ids=rows, vocab=vocabulary)
        bm25.index(tokens, create_empty_token=False, show_progress=False)
        return cls(bm25, vocabulary, stemmer)

    def save(self, folder: str | Path) -> None:
        """Writes the index into `folder`, for `load`."""
        self._bm25.vocab_dict = self._vocabulary
        self._bm25.save(str(folder), show_progress=False)

    @classmethod
    def load(cls, folder: str | Path) -> SearchIndex:
        """Opens a saved index; its arrays stay on disk and are memory-mapped.

        Raises:
            UserError: the libraries are not installed.
        """
        bm25s, stemming = _libraries()
        bm25 = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)
        return cls(bm25, bm25.vocab_dict, stemming.Stemmer("porter", 0))

    def search(self, query: str, k: int = 50) -> list[int]:
        """Returns at most `k` texts that share a word with `query`, best first, equal ones in their order."""
        terms = [term for term in _terms(query) if term not in _STOP]
        ids = [number for term in terms if (number := self._vocabulary.get(self._stemmer.stemWord(term))) is not None]
        if not ids:
            return []
        scores = self._bm25.get_scores_from_ids(ids)
        hits = np.flatnonzero(scores > 0)
        if len(hits) > k:
            least = np.partition(scores[hits], len(hits) - k)[len(hits) - k]
            hits = hits[scores[hits] >= least]
        return [int(hit) for hit in hits[np.argsort(-scores[hits], kind="stable")][:k]]
