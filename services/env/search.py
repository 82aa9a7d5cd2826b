"""Search over passages: BM25 with tantivy, or nearest vectors of any encoder. Independent of environments.

Both indexes may be used from many threads at once: tantivy releases the interpreter lock during a search, and so does
the matrix product of the dense index.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mulligan.common.files import move, move_folder, temporary_file
from mulligan.common.plugins import UnusablePlugin
from mulligan.env.base import own_settings
from mulligan.env.encoders import ENCODERS

if TYPE_CHECKING:
    import numpy as np
    import tantivy

_MAX_TERMS = 64  # distinct words of a query that are searched
_MAX_QUERY = 2_000  # characters of a query that are read
_MAX_WORD = 40  # characters; longer words are not indexed
_TIES = 16  # extra passages fetched, so that ties at the end are ordered by number
_WRITER_BYTES = 128 * 2**20
_FORMAT = "1"  # of the index on disk
_BATCH = 256  # passages encoded at a time


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage; `number` is its position in the corpus."""

    number: int
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Hit:
    passage: Passage
    score: float


class Index(Protocol):
    def search(self, query: str, limit: int) -> Sequence[Hit]:
        """The best passages, best first; ties in the order of the corpus. Any text is a valid query."""


class TextEncoder(Protocol):
    """Encodes text as vectors of length 1. Their inner product is the similarity."""

    def encode(self, texts: Sequence[str], *, query: bool) -> np.ndarray:
        """Returns float32 of shape (texts, dimensions). Queries and passages may be encoded differently.
        Thread-safe."""


class Bm25:
    """BM25 over titles and texts, English stemming.  https://github.com/quickwit-oss/tantivy"""

    def __init__(self, index: tantivy.Index, analyzer: tantivy.TextAnalyzer) -> None:
        self._schema = index.schema
        self._searcher = index.searcher()
        self._analyzer = analyzer

    @classmethod
    def build(cls, passages: Iterable[tuple[str, str]], folder: Path | None = None) -> Bm25:
        """Builds an index of (title, text) pairs, in `folder` or in memory."""
        import tantivy

        analyzer = _analyzer()
        schema = tantivy.SchemaBuilder()
        schema.add_text_field("words", tokenizer_name="passage", index_option="freq")
        schema.add_bytes_field("title", stored=True)
        schema.add_bytes_field("text", stored=True)
        schema.add_unsigned_field("number", stored=True)
        index = tantivy.Index(schema.build(), path=None if folder is None else str(folder))
        index.register_tokenizer("passage", analyzer)
        writer = index.writer(_WRITER_BYTES, 1)
        try:
            for number, (title, text) in enumerate(passages):
                stored = {"title": title.encode(), "text": text.encode(), "number": number}
                writer.add_document(tantivy.Document(words=f"{title}\n{text}", **stored))
            writer.commit()
        finally:
            writer.wait_merging_threads()  # also ends its threads, which would go on writing
        index.reload()
        return cls(index, analyzer)

    @classmethod
    def open(cls, folder: Path) -> Bm25:
        import tantivy

        index = tantivy.Index.open(str(folder))
        analyzer = _analyzer()
        index.register_tokenizer("passage", analyzer)
        return cls(index, analyzer)

    def search(self, query: str, limit: int) -> Sequence[Hit]:
        import tantivy

        readable = query[:_MAX_QUERY].encode("utf-8", "replace").decode()
        terms = dict.fromkeys(self._analyzer.analyze(readable))
        wanted = [
            (tantivy.Occur.Should, tantivy.Query.term_query(self._schema, "words", term, "freq"))
            for term in islice(terms, _MAX_TERMS)
        ]
        if not wanted:
            return []
        found = self._searcher.search(tantivy.Query.boolean_query(wanted), limit + _TIES, count=False).hits
        least = found[limit - 1][0] if len(found) >= limit else 0.0
        hits = [self._hit(float(score), address) for score, address in found if score >= least]
        hits.sort(key=lambda hit: (-hit.score, hit.passage.number))
        return hits[:limit]

    def _hit(self, score: float, address: tantivy.DocAddress) -> Hit:
        stored: dict[str, Any] = self._searcher.doc(address).to_dict()
        title, text = (bytes(stored[field][0]).decode() for field in ("title", "text"))
        return Hit(Passage(stored["number"][0], title, text), score)


class Dense:
    """Exact nearest-neighbour search: a query is compared with all vectors."""

    def __init__(self, passages: Sequence[Passage], vectors: np.ndarray, encoder: TextEncoder) -> None:
        self._passages = passages
        self._vectors = vectors
        self._encoder = encoder

    @classmethod
    def build(cls, passages: Iterable[tuple[str, str]], encoder: TextEncoder, place: Path | None = None) -> Dense:
        """Encodes the passages. `place` is a file of vectors, which is read if it exists and written if not."""
        import numpy as np

        kept = [Passage(number, title, text) for number, (title, text) in enumerate(passages)]
        if place is not None and place.is_file():
            return cls(kept, np.load(place, mmap_mode="r", allow_pickle=False), encoder)
        texts = [f"{passage.title}\n{passage.text}" for passage in kept]
        batches = [encoder.encode(texts[at : at + _BATCH], query=False) for at in range(0, len(texts), _BATCH)]
        vectors = np.concatenate(batches) if batches else np.zeros((0, 1), np.float32)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            with temporary_file(place.parent) as temporary:
                with temporary.open("wb") as file:
                    np.save(file, vectors, allow_pickle=False)
                move(temporary, place)
        return cls(kept, vectors, encoder)

    def search(self, query: str, limit: int) -> Sequence[Hit]:
        import numpy as np

        if not self._passages or not query.strip():
            return []
        readable = query[:_MAX_QUERY].encode("utf-8", "replace").decode()
        scores = self._vectors @ self._encoder.encode([readable], query=True)[0]
        best = np.argsort(-scores, kind="stable")[:limit]
        return [Hit(self._passages[number], float(scores[number])) for number in best.tolist()]


def kept_bm25(passages: Iterable[tuple[str, str]], folder: Path, content: str) -> Bm25:
    """Opens the index `folder/bm25-FINGERPRINT`, and builds it on first use. The index appears there complete or not at
    all, so servers may share the folder, and a killed one leaves no partial index."""
    place = folder / f"bm25-{_digest(version('tantivy'), content)}"
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=folder))
        try:
            Bm25.build(passages, making)
            move_folder(making, place)
        except OSError:
            if not place.is_dir():  # else: another server built it first
                raise
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return Bm25.open(place)


def kept_dense(
    passages: Iterable[tuple[str, str]], folder: Path, content: str, encoder: TextEncoder, described: str
) -> Dense:
    """As `kept_bm25`, for vectors. `described` distinguishes encoders."""
    return Dense.build(passages, encoder, folder / f"dense-{_digest(described, content)}.npy")


def load_encoder(name: str, settings: Mapping[str, object]) -> TextEncoder:
    """Makes an encoder. `name` is a built-in encoder, an installed one, or a module.

    Raises ValueError, which names the problem, and MissingExtra if its packages are not installed.
    """
    try:
        plugin = ENCODERS.find(name)
    except UnusablePlugin as error:
        raise ValueError(f"encoder: {error}") from error
    made: TextEncoder = plugin.create(own_settings(plugin, settings))
    return made


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join((_FORMAT, *parts)).encode()).hexdigest()[:16]


def _analyzer() -> tantivy.TextAnalyzer:
    import tantivy

    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    filters = (tantivy.Filter.remove_long(_MAX_WORD), tantivy.Filter.lowercase(), tantivy.Filter.stemmer("english"))
    for one in filters:
        builder = builder.filter(one)
    return builder.build()
