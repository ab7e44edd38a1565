"""BM25 over the pages, in Lucene's form, on stemmed English words."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from agentrl.errors import UserError
from environments.search_qa.world import build_world

MAX_QUERY_WORDS = 64
_WORD = re.compile(r"\w+")


class SearchIndex:
    """Finds texts by words. Threads may share it.

    Args:
        texts: what is searched.

    Raises:
        UserError: `bm25s` or `PyStemmer` is not installed.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            import bm25s
            import Stemmer
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed; SearchQA needs: pip install 'agentrl[search]'") from error
        self._stemmer = Stemmer.Stemmer("english")
        self._lock = threading.Lock()  # a stemmer has a cache of its own and is not thread-safe
        self._bm25 = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
        self._bm25.index([self._words(text) for text in texts], show_progress=False)

    def search(self, query: str, top: int) -> list[int]:
        """Returns the numbers of the best texts that share a word with `query`, best first; ties in their own order."""
        words = self._words(query)[:MAX_QUERY_WORDS]
        known = [word for word in words if word in self._bm25.vocab_dict]
        if not known:
            return []
        scores = np.asarray(self._bm25.get_scores(known))
        best = np.argsort(-scores, kind="stable")[:top]
        return [int(number) for number in best if scores[number] > 0]

    def _words(self, text: str) -> list[str]:
        with self._lock:
            return list(self._stemmer.stemWords(_WORD.findall(text.lower())))


@lru_cache(maxsize=4)
def build_index(seed: int, pages: int) -> SearchIndex:
    """Returns the index of a world's pages, titles counted twice, kept for the next call."""
    return SearchIndex([f"{title} {title} {text}" for title, text in build_world(seed, pages).pages.items()])
