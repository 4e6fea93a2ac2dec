"""Read OpenAI's original release of GPT-2, a TensorFlow checkpoint, without TensorFlow.

    config = read_config(Path("models/124M"))
    tensors = read_tensors(Path("models/124M"))             # {"transformer.wte.weight": ..., ...}
    arrays = read_arrays(Path("models/124M/model.ckpt"))    # {"model/wte": array (50257, 768), ...}

The release is a folder with `hparams.json` and a TensorFlow checkpoint, which is an index
(`model.ckpt.index`) and data files. The index is a sorted table in LevelDB's format: blocks of
prefix-compressed keys, and a footer that points to a block that lists the blocks. Its values are
protocol buffers that say where in which data file a tensor lies. Every checksum is verified. Only
whole tensors in fp32 are supported, which is what OpenAI released.

Sources: tensorflow/core/util/tensor_bundle, tensorflow/core/protobuf/tensor_bundle.proto,
google/leveldb doc/table_format.md.
"""

import functools
import io
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from anew.config.schema import GPTConfig
from anew.errors import UserError
from anew.utils.files import parse_json

# Substitutions that turn OpenAI's name of a parameter into ours, applied in order:
# model/h0/attn/c_attn/w -> transformer.h.0.attn.c_attn.weight, model/wte -> transformer.wte.weight.
RENAMING = [
    (r"^(model/)?", "transformer/"),
    (r"/h(\d+)/", r"/h/\1/"),
    (r"^(transformer/\w+)$", r"\1/w"),  # wte and wpe
    (r"/[wg]$", "/weight"),
    (r"/b$", "/bias"),
    (r"/", "."),
]
# Our name of a size -> the name in hparams.json.
HPARAMS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "n_positions": "n_ctx",
    "vocab_size": "n_vocab",
}

TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
# Numbers of the fields of BundleHeaderProto, BundleEntryProto, TensorShapeProto and its dimensions.
N_SHARDS = 1
DTYPE, SHAPE, SHARD, OFFSET, SIZE, CHECKSUM, SLICES = range(1, 8)
DIMENSION = 2
LENGTH = 1
DT_FLOAT = 1  # TensorFlow's number of fp32 (tensorflow/core/framework/types.proto)


def is_release(path: Path) -> bool:
    """Return whether `path` is a folder in the format of OpenAI's release."""
    return (path / "hparams.json").is_file()


def read_config(path: Path) -> GPTConfig:
    """Return the sizes of the model in the release folder `path`."""
    try:
        hparams = parse_json(path / "hparams.json")
        sizes = {ours: int(hparams[theirs]) for ours, theirs in HPARAMS.items()}
        return GPTConfig(**sizes)  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}/hparams.json does not describe a GPT-2 ({error!r}).") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the release folder `path` under our names; matrices are (in, out)."""
    tensors = {}
    for name, array in read_arrays(path / "model.ckpt").items():
        # Matrices are stored as convolutions of width 1: (1, in, out).
        matrix = array.squeeze(0) if array.ndim == 3 else array
        tensors[_our_name(name)] = torch.from_numpy(matrix)
    return tensors


def _our_name(name: str) -> str:
    for pattern, replacement in RENAMING:
        name = re.sub(pattern, replacement, name)
    return name


def read_arrays(prefix: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a TensorFlow checkpoint, as fp32, under its TensorFlow name.

    Raises UserError if the checkpoint is damaged or in another format.
    """
    index = prefix.with_name(prefix.name + ".index")
    try:
        entries = dict(_read_table(index.read_bytes()))
        header = dict(_read_message(entries.pop(b"")))
        n_shards = header.get(N_SHARDS, 1)

        @functools.cache
        def shard(number: int) -> np.ndarray:
            path = prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{n_shards:05d}")
            # Copy-on-write, because torch.from_numpy warns about arrays that are not writable.
            return np.memmap(path, np.uint8, mode="c")

        arrays = {}
        for key, value in entries.items():
            name = key.decode()
            entry = dict(_read_message(value))
            arrays[name] = _read_array(name, entry, shard(entry.get(SHARD, 0)))
        return arrays
    except (OSError, ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
        raise UserError(f"the TensorFlow checkpoint {index} cannot be read ({error}).") from error


def _read_array(name: str, entry: dict[int, Any], shard: np.ndarray) -> np.ndarray:
    """Return the tensor that an entry of the index describes, as fp32."""
    if entry.get(DTYPE) != DT_FLOAT or SLICES in entry:
        raise ValueError(f"{name} is not a whole tensor in fp32")
    shape = [
        dict(_read_message(dimension)).get(LENGTH, 0)
        for field, dimension in _read_message(entry.get(SHAPE, b""))
        if field == DIMENSION
    ]
    offset = entry.get(OFFSET, 0)
    size = entry.get(SIZE, 0)
    content = shard[offset : offset + size]
    if len(content) != size or size != 4 * np.prod(shape, dtype=np.int64):
        raise ValueError(f"{name} is truncated")
    if _masked_crc(content) != entry.get(CHECKSUM):
        raise ValueError(f"{name} is damaged: its checksum differs")
    return content.view("<f4").reshape(shape)


# --- LevelDB's table and protocol buffers ---------------------------------------------------------


def _read_table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table, in order."""
    footer = table[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != TABLE_MAGIC:
        raise ValueError("it is not a table of tensors")
    stream = io.BytesIO(footer)
    _read_handle(stream)  # the meta index, which TensorFlow does not use
    for _, handle in _read_block(table, *_read_handle(stream)):
        yield from _read_block(table, *_read_handle(io.BytesIO(handle)))


def _read_handle(stream: BinaryIO) -> tuple[int, int]:
    """Return the offset and the size of a block."""
    return _read_varint(stream), _read_varint(stream)


def _read_block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of one block.

    After the block come one byte for the compression and the checksum of both. A block is a list of
    entries, offsets of some entries ("restart points", not needed here) and their number. Each key
    is stored as the number of bytes that it shares with the key before, and the other bytes.
    """
    end = offset + size
    block = table[offset:end]
    compression, checksum = struct.unpack("<BI", table[end : end + 5])
    if compression != 0:
        raise ValueError("its index is compressed, which TensorFlow's checkpoints are not")
    if _masked_crc(block + bytes([compression])) != checksum:
        raise ValueError("its index is damaged: a checksum differs")
    n_restarts = struct.unpack("<I", block[-4:])[0]
    end_of_entries = len(block) - 4 * (n_restarts + 1)
    stream = io.BytesIO(block)
    key = b""
    while stream.tell() < end_of_entries:
        n_shared = _read_varint(stream)
        n_other = _read_varint(stream)
        n_value = _read_varint(stream)
        key = key[:n_shared] + stream.read(n_other)
        yield key, stream.read(n_value)


def _read_message(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each field of a protocol buffer."""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        tag = _read_varint(stream)
        wire_type = tag & 7
        value: int | bytes
        if wire_type == 0:
            value = _read_varint(stream)
        elif wire_type == 2:
            value = stream.read(_read_varint(stream))
        elif wire_type == 5:
            value = struct.unpack("<I", stream.read(4))[0]
        else:
            raise ValueError("an entry has a field of an unknown type")
        yield tag >> 3, value


def _read_varint(stream: BinaryIO) -> int:
    """Read an integer: seven bits a byte, lowest first; the highest bit is 0 in the last byte."""
    value = 0
    shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value


# --- Checksums ------------------------------------------------------------------------------------


def _masked_crc(data: bytes | np.ndarray) -> int:
    """Return the CRC-32C of `data` as TensorFlow stores it: rotated and with a constant added.

    Stored data may contain CRCs itself, and the CRC of data with its own CRC is a weak checksum.
    """
    from crc32c import crc32c

    crc = crc32c(bytes(data))
    rotated = (crc >> 15) | (crc << 17)
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF
