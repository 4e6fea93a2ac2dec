# %% [markdown]
# # 1. Data: from text to batches
#
# A language model reads numbers. This lesson follows a sentence on its way: bytes, merges of bytes (BPE), shards on the disk, and batches
# whose order depends on nothing but a seed and a step. What is claimed is checked by an `assert`, here and in the project's tests.

# %%
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import anew
from anew.bench import timing as bench
from anew.data import prepare, sources
from anew.data.dataloader import DataLoader
from anew.data.shuffle import permute

text = "\n".join(
    path.read_text(encoding="utf-8") for path in bench.standard_library_files()[:60]
)  # Python's own source: real text, on every machine
print(f"{len(text):,} characters of real text")

# %% [markdown]
# ## Byte pairs, by hand
#
# GPT-2's tokenizer starts from bytes and joins the pair that stands first in its list of merges, until no listed pair is left. Fifteen
# lines do it. (The text is first cut into words, so that no token crosses a space; the word keeps the space before it.)

# %%
tokenizer = anew.Tokenizer.named("gpt2")
rank = {pair: i for i, pair in enumerate(tokenizer.merges)}
first_id = {token: i for i, token in enumerate(tokenizer.tokens[:256])}


def by_hand(word: bytes) -> list[int]:
    ids = [first_id[bytes([b])] for b in word]
    while len(ids) > 1:
        best = min(pairwise(ids), key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            return ids
        joined, i = [], 0
        while i < len(ids):
            if tuple(ids[i : i + 2]) == best:
                joined.append(256 + rank[best])
                i += 2
            else:
                joined.append(ids[i])
                i += 1
        ids = joined
    return ids


for word in ("hello", " tokenization", " antidisestablishmentarianism", " naïve", " 1789"):
    assert by_hand(word.encode()) == tokenizer.encode(word), word
    print(f"{word!r:32}", [tokenizer.decode([i]) for i in by_hand(word.encode())])

# %% [markdown]
# Common words are one token, rare ones several; a byte is always possible, so nothing is ever unknown. And nothing is lost:

# %%
ids = tokenizer.encode(text)
assert tokenizer.decode(ids) == text
counts = np.array(sorted(Counter(ids).values(), reverse=True))
print(
    f"{len(ids):,} tokens, {len(text) / len(ids):.2f} characters each; {len(counts):,} of {tokenizer.n_vocab:,} ids occur"
)
plt.figure(figsize=(6, 3))
plt.loglog(np.arange(1, len(counts) + 1), counts)
plt.xlabel("rank of the token")
plt.ylabel("how often it occurs")
plt.title("A few tokens make up most of a text (Zipf)")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Shards
#
# `anew prepare` writes tokens as 16-bit numbers, documents in shuffled order with `<|endoftext|>` before each, and holds whole documents out for
# validation. A document goes to validation by its hash, so a text that occurs twice is never on both sides.

# %%
folder = Path(tempfile.mkdtemp())
(folder / "texts").mkdir()
for path in bench.standard_library_files()[:60]:
    (folder / "texts" / f"{path.stem}.txt").write_text(
        path.read_text(encoding="utf-8"), encoding="utf-8"
    )
data = prepare.prepare_data(
    sources.find(str(folder / "texts")), prepare.Settings("gpt2"), folder / "tokens"
)
for split, shards in data.splits.items():
    print(split, [(shard.path.name, f"{shard.n_tokens:,} tokens") for shard in shards])
first = data.splits["train"][0].tokens
assert first.dtype == np.uint16
assert first[0] == tokenizer.end_of_text

# %% [markdown]
# ## Batches without a shuffle buffer
#
# Which windows step 1,000 sees must not depend on how training came there: after a crash, or with another number of GPUs, it has to see the
# same ones. So the order is computed, not stored: a keyed bijection of the window numbers, evaluated where it is needed.

# %%
n = 10
shuffled = permute(np.arange(n), n, key=(1337, 0))
print("epoch 0:", shuffled, "  epoch 1:", permute(np.arange(n), n, key=(1337, 1)))
assert sorted(shuffled) == list(range(n))  # each window once an epoch
assert (
    permute(np.array([7]), n, key=(1337, 0))[0] == shuffled[7]
)  # any place can be asked for alone

batches = DataLoader(data.splits["train"], seq_len=64, seed=1337)
straight = batches.rows(first=0, count=12)
again = np.concatenate(
    [batches.rows(8, 4), batches.rows(0, 8)]
)  # a run that was resumed at step 2, and looked back
assert (np.concatenate([straight[8:], straight[:8]]) == again).all()
x, y = straight[:, :-1], straight[:, 1:]
assert (x[:, 1:] == y[:, :-1]).all()  # the target of each token is the next one
print("inputs ", repr(tokenizer.decode(x[0, :12].tolist())))
print("targets", repr(tokenizer.decode(y[0, :12].tolist())))

# %% [markdown]
# ## Exercises
#
# Write your answer into the cell below a question and run it. The cell behind it says whether the answer is right, and what is wrong with it
# if it is not. A solution is folded below each.
#
# **Exercise 1.** A shard has `n` tokens. How many training sequences of `T` tokens can be cut from it, one behind the other, if each position needs the token that comes next?


# %%
def n_sequences(n: int, T: int) -> int | None:
    return None  # your answer


# %%
def check_1(n_sequences: Callable[[int, int], int | None]) -> str:
    if n_sequences(100, 10) is None:
        return "not answered yet"
    if n_sequences(100, 10) == 10:
        return "wrong: the last position of the tenth sequence has no next token"
    if n_sequences(110, 10) == 10 and n_sequences(101, 10) == 9:
        return "wrong: neighbours share a token; the target of the last is the input of the next"
    cases = {(100, 10): 9, (101, 10): 10, (110, 10): 10, (11, 10): 1, (10, 10): 0}
    for (n, T), expected in cases.items():
        if n_sequences(n, T) != expected:
            return f"wrong: {n} tokens give {expected} sequences of {T}, not {n_sequences(n, T)}"
    return "right: one token more than the sequences is needed, and only one"


print(check_1(n_sequences))

# %% [markdown]
# <details><summary>Solution 1</summary>
#
# ```python
# def n_sequences(n: int, T: int) -> int:
#     return (n - 1) // T
# ```
#
# Inputs are the tokens 0 to n - 2, targets the tokens 1 to n - 1.
#
# </details>

# %% [markdown]
# **Exercise 2.** Write a function that says whether a document belongs to the tenth that is held out. It may depend on nothing but the document, so that the split is the
# same in every process and order.


# %%
def is_held_out(document: bytes) -> bool | None:
    return None  # your answer


# %%
def check_2(is_held_out: Callable[[bytes], bool | None]) -> str:
    if is_held_out(b"a document") is None:
        return "not answered yet"
    documents = [f"document {number}".encode() for number in range(5000)]
    first = [bool(is_held_out(document)) for document in documents]
    again = [bool(is_held_out(document)) for document in reversed(documents)]
    if first != again[::-1]:
        return "wrong: the same document is once held out and once not"
    code = getattr(is_held_out, "__code__", None)
    if code is not None and "hash" in code.co_names:
        return "wrong: Python's hash of bytes is another one in each process; use hashlib"
    share = sum(first) / len(documents)
    if not 0.08 < share < 0.12:
        return f"wrong: {share:.1%} of 5,000 documents are held out, not a tenth"
    return f"right: {share:.1%} of 5,000 documents, the same ones everywhere"


print(check_2(is_held_out))

# %% [markdown]
# <details><summary>Solution 2</summary>
#
# ```python
# def is_held_out(document: bytes) -> bool:
#     from hashlib import blake2b
#
#     number = int.from_bytes(blake2b(document, digest_size=8).digest(), "little")
#     return number < 2**64 // 10
# ```
#
# </details>

# %% [markdown]
# ## To explore
#
# 1. Encode the same sentence in English and in another language. How many tokens does each take, and why does that matter?
# 2. `anew prepare my.txt --tokenizer train:1000` learns a vocabulary. Compare its tokens with GPT-2's on your text.
# 3. Write `permute` with `numpy.random.permutation`. What would a run of 10 billion tokens then have to keep in memory?
