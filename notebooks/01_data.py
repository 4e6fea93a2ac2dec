# %% [markdown]
# # 1. Data: from text to batches
#
# A language model reads numbers. This lesson follows a sentence on its way: bytes, merges of bytes (BPE), shards on the disk, and batches
# whose order depends on nothing but a seed and a step. What is claimed is checked by an `assert`, here and in the project's tests.

# %%
import tempfile
from collections import Counter
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
# 1. Encode the same sentence in English and in another language. How many tokens does each take, and why does that matter?
# 2. `anew prepare my.txt --tokenizer train:1000` learns a vocabulary. Compare its tokens with GPT-2's on your text.
# 3. Write `permute` with `numpy.random.permutation`. What would a run of 10 billion tokens then have to keep in memory?
