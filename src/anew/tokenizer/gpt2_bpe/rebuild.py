"""Rebuild `merges.bin`, the 50,000 merges of GPT-2's tokenizer, 200,000 bytes.

    python src/anew/tokenizer/gpt2_bpe/rebuild.py       # downloads openai-whisper's source with pip

The source distribution of `openai-whisper` (MIT, LICENSE beside this file) contains GPT-2's
vocabulary as `gpt2.tiktoken`, which has one line a token: its bytes in base64 and its id. Each
token above 255 was made by joining two earlier tokens. To find them, this script encodes the bytes
of the token with the tokens of lower ids only, which leaves exactly these two. They are stored as
two little-endian uint16 a merge, in order. tests/unit/tokenizer/test_bpe.py proves that the table
gives OpenAI's `vocab.bpe` and `encoder.json`, byte for byte.
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
PIP_FLAGS = ["--no-deps", "--no-binary=:all:", "--no-build-isolation"]


def download() -> str:
    """Return the text of `gpt2.tiktoken`, read from the source distribution."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", *PIP_FLAGS]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        source_distribution = next(Path(folder).glob("*.tar.gz"))
        with tarfile.open(source_distribution) as archive:
            name = next(name for name in archive.getnames() if name.endswith(MEMBER))
            member = archive.extractfile(name)
            assert member is not None
            return member.read().decode("ascii")


def find_merges(ids: dict[bytes, int]) -> np.ndarray:
    """Return the ids of the two tokens that each merge joins, uint16 (50000, 2)."""
    merges = []
    for token, token_id in sorted(ids.items(), key=lambda item: item[1]):
        if token_id < 256:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            # Join the pair with the lowest id, as encoding does; pairs that are no token come last.
            joined = [ids.get(left + right, token_id) for left, right in itertools.pairwise(parts)]
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        left, right = parts
        merges.append([ids[left], ids[right]])
    return np.array(merges, dtype="<u2")


def main() -> None:
    """Write merges.bin beside this file."""
    ids = {}
    for line in download().splitlines():
        if line:
            token, token_id = line.split()
            ids[base64.b64decode(token)] = int(token_id)
    merges = find_merges(ids)
    Path(__file__).with_name("merges.bin").write_bytes(merges.tobytes())
    print(f"wrote {len(merges):,} merges")


if __name__ == "__main__":
    main()
