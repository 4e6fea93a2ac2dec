"""Learn a byte-level BPE vocabulary from text, for other languages and other kinds of text.

    anew prepare my_texts/ --tokenizer train:8000 --out data/mine
    tokenizer = learn(documents, 8000)

The package `tokenizers` does the learning (pip install tokenizers); using a learned
vocabulary does not need it. The result is in GPT-2's format. Equal text gives equal merges, because
ties between pairs are broken by their ids.
"""

import json
from collections.abc import Iterable, Iterator

from anew.errors import UserError, missing_packages
from anew.tokenizer.bpe import Tokenizer, pieces

# More text hardly changes a vocabulary of tens of thousands of words.
TEXT_BYTES = 100_000_000


def learn(documents: Iterable[bytes], n_vocab: int) -> Tokenizer:
    """Return a tokenizer of `n_vocab` ids, including end of text, learned from `documents`.

    Only the first TEXT_BYTES are used. Raises UserError if the text has too few different words.
    """
    try:
        from tokenizers import Tokenizer as Learner
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError as error:
        raise missing_packages("learning a vocabulary", "tokenizers") from error
    learner = Learner(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    learner.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1,  # without end of text
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(_texts(documents), trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    tokenizer = Tokenizer.of_words((left, right) for left, right in merges)
    if tokenizer.n_vocab != n_vocab:
        raise UserError(
            f"this text is enough for a vocabulary of {tokenizer.n_vocab:,}, not of {n_vocab:,}; "
            f"use train:{tokenizer.n_vocab}."
        )
    return tokenizer


def _texts(documents: Iterable[bytes]) -> Iterator[str]:
    """Yield the first TEXT_BYTES of `documents` as text, in pieces."""
    n_bytes = 0
    for document in documents:
        for piece in pieces(document):
            yield piece.decode("utf-8", errors="replace")
            n_bytes += len(piece)
            if n_bytes >= TEXT_BYTES:
                return
