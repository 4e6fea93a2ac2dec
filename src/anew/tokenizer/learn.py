"""A vocabulary of one's own: byte-level BPE learnt from text, in GPT-2's format, for other languages and other kinds of text.

    anew prepare my_texts/ --tokenizer train:8000 --out data/mine
    tokenizer = learn(documents, 8000)

The learning is the `tokenizers` library's (pip install -e '.[vocabulary]'); using what it learnt takes no more than anew itself. Equal text
gives equal merges: ties between pairs are broken by their ids.
"""

import json
from collections.abc import Iterable, Iterator

from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer, pieces

TEXT_BYTES = 100_000_000  # a vocabulary of tens of thousands of words does not change much behind the first 100 MB


def learn(documents: Iterable[bytes], n_vocab: int) -> Tokenizer:
    """A tokenizer of exactly `n_vocab` ids, end of text among them, from the first TEXT_BYTES of `documents`."""
    try:
        from tokenizers import Tokenizer as Learner
        from tokenizers import models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError(
            "learning a vocabulary needs the tokenizers package: pip install -e '.[vocabulary]'."
        ) from error
    learner = Learner(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    learner.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    learner.train_from_iterator(_texts(documents), trainer)
    tokenizer = Tokenizer.of_words(
        (left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]
    )
    if tokenizer.n_vocab != n_vocab:
        raise UserError(
            f"this text has words for a vocabulary of {tokenizer.n_vocab:,}, not of {n_vocab:,}; use train:{tokenizer.n_vocab}."
        )
    return tokenizer


def _texts(documents: Iterable[bytes]) -> Iterator[str]:
    left = TEXT_BYTES
    for document in documents:
        for piece in pieces(document):
            yield piece.decode("utf-8", errors="replace")
            left -= len(piece)
            if left <= 0:
                return
