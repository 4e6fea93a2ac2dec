"""Rebuild `merges.bin`, the table of GPT-2's 50,000 merges that this package carries.

    python src/anew/tokenizer/gpt2_bpe/rebuild.py        # downloads openai-whisper's source with pip, writes merges.bin, 200,000 bytes

The source distribution of `openai-whisper` (MIT, LICENSE beside this file) holds GPT-2's vocabulary as `gpt2.tiktoken`: one line a token,
its bytes in base64 and its id. Each token above 255 was made by joining two earlier ones; replaying byte-pair encoding on its bytes
with only the ids below its own leaves exactly those two. They are stored as two little-endian uint16 a merge, in order.
tests/unit/tokenizer/test_bpe.py proves that the table gives OpenAI's own `vocab.bpe` and `encoder.json`, byte for byte.
"""

import base64
import itertools
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

PACKAGE = "openai-whisper==20250625"
MEMBER = "whisper/assets/gpt2.tiktoken"


def download() -> str:
    """The text of `gpt2.tiktoken`, read from the source distribution without unpacking it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary=:all:",
            "--no-build-isolation",
        ]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            name = next(n for n in archive.getnames() if n.endswith(MEMBER))
            member = archive.extractfile(name)
            assert member is not None
            return member.read().decode("ascii")


def merges(ranks: dict[bytes, int]) -> np.ndarray:
    """(50000, 2) ids of the two tokens that each merge joins."""
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if rank < 256:
            continue
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            i = min(range(len(joined)), key=joined.__getitem__)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        pairs.append([ranks[parts[0]], ranks[parts[1]]])
    return np.array(pairs, dtype="<u2")


if __name__ == "__main__":
    lines = (line.split() for line in download().splitlines() if line)
    table = merges({base64.b64decode(token): int(rank) for token, rank in lines})
    (Path(__file__).parent / "merges.bin").write_bytes(table.tobytes())
    print(f"wrote {len(table):,} merges")
