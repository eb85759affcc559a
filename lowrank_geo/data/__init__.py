"""Text to token batches: corpora, tokenizers, resumable sampling."""

from lowrank_geo.data.batches import Batches, Tokens, encode_corpus, windows
from lowrank_geo.data.corpus import Corpus, load_corpus
from lowrank_geo.data.tokenizers import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BPETokenizer",
    "Batches",
    "ByteTokenizer",
    "Corpus",
    "Tokenizer",
    "Tokens",
    "encode_corpus",
    "load_corpus",
    "load_tokenizer",
    "windows",
]
