"""Read a TensorFlow checkpoint (`model.ckpt.index` and its data files) without TensorFlow, every checksum checked.

    tensors = read(Path("models/124M/model.ckpt"))          # {"model/wte": array (50257, 768), ...}

The format: the index is a sorted string table (LevelDB's: blocks of prefix-compressed keys, a footer that points to the block of blocks)
whose values are protocol buffers that say where in which data file a tensor lies. Only whole float tensors, as OpenAI released them.
Sources: tensorflow/core/util/tensor_bundle, tensorflow/core/protobuf/tensor_bundle.proto, google/leveldb doc/table_format.md.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anew.errors import UserError

MAGIC = 0xDB4775248B80FB57
DTYPES = {1: "<f4", 14: "bf16", 19: "<f2"}  # tensorflow/core/framework/types.proto
LANES = 4096


class _BadError(ValueError):
    pass


def read(prefix: Path) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint by its TensorFlow name. A damaged or foreign file is a UserError."""
    index = prefix.with_name(prefix.name + ".index")
    try:
        return dict(_tensors(prefix, index.read_bytes()))
    except (OSError, ValueError, IndexError, KeyError, struct.error) as error:
        raise UserError(
            f"the TensorFlow checkpoint {index} cannot be read ({error or type(error).__name__})."
        ) from error


def _tensors(prefix: Path, index: bytes) -> Iterator[tuple[str, np.ndarray]]:
    if len(index) < 48 or struct.unpack("<Q", index[-8:])[0] != MAGIC:
        raise _BadError("it is no table of tensors")
    footer = _varints(index[-48:-8], 4)
    shards: dict[int, np.ndarray] = {}
    n_shards = 0
    for _, handle in _block(index, footer[2], footer[3]):
        offset, size = _varints(handle, 2)
        for key, value in _block(index, offset, size):
            fields = dict(_message(value))
            if key == b"":
                n_shards = int(fields.get(1, 1))
                continue
            shard = int(fields.get(3, 0))
            if shard not in shards:
                path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{n_shards:05d}")
                shards[shard] = np.memmap(
                    path, np.uint8, mode="c"
                )  # writable in memory only, so that tensors may be made of it
            yield key.decode(), _tensor(key.decode(), fields, shards[shard])


def _tensor(name: str, fields: dict[int, Any], data: np.ndarray) -> np.ndarray:
    dtype = DTYPES.get(fields.get(1, 0))
    if dtype is None or 7 in fields:
        raise _BadError(f"{name} is not a whole float tensor")
    shape: list[int] = []
    for field, dimension in _message(fields.get(2, b"")):
        if field == 2:
            shape.append(dict(_message(dimension)).get(1, 0))
    offset, size = int(fields.get(4, 0)), int(fields.get(5, 0))
    content = data[offset : offset + size]
    width = 4 if dtype == "<f4" else 2
    if len(content) != size or size != width * int(np.prod(shape, dtype=np.int64)):
        raise _BadError(f"{name} is cut short")
    if _masked(crc32c(content)) != fields.get(6):
        raise _BadError(f"{name} is damaged: its checksum differs")
    if dtype == "bf16":
        return (content.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return content.view(dtype).astype(np.float32, copy=False).reshape(shape)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varints(data: bytes, count: int) -> list[int]:
    values, at = [], 0
    for _ in range(count):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _message(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: (number, value)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        value: Any
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif kind == 5:
            value, at = struct.unpack("<I", data[at : at + 4])[0], at + 4
        else:
            raise _BadError("an entry has an unknown kind of field")
        yield tag >> 3, value


def _block(index: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block: each key is given as what it shares with the one before and the rest."""
    block, trailer = index[offset : offset + size], index[offset + size : offset + size + 5]
    if trailer[0] != 0:
        raise _BadError("its index is compressed, which TensorFlow's checkpoints are not")
    if _masked(crc32c(block + trailer[:1])) != struct.unpack("<I", trailer[1:])[0]:
        raise _BadError("its index is damaged: a checksum differs")
    end = len(block) - 4 * (
        struct.unpack("<I", block[-4:])[0] + 1
    )  # the restart points behind the entries
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + rest]
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _table() -> np.ndarray:
    table: np.ndarray = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(
            table & 1, np.uint32(0x82F63B78), np.uint32(0)
        )  # Castagnoli's polynomial, reflected
    return table


TABLE = _table()


def crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C of `data`, on 4,096 stretches of it at once, which are then joined: a CRC is linear over GF(2).

    32 more lanes carry one bit each through as many zero bytes: what a register becomes while the next stretch is read.
    """
    length = len(data) // LANES
    lanes = (
        np.frombuffer(data[: length * LANES], np.uint8).reshape(LANES, length).T
        if length
        else np.empty((0, LANES), np.uint8)
    )
    state = np.concatenate(
        [np.zeros(LANES, np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)]
    )
    column = np.zeros(LANES + 32, np.uint32)
    for row in np.ascontiguousarray(lanes):
        column[:LANES] = row
        state = TABLE[(state ^ column) & 255] ^ (state >> 8)
    images = state[LANES:].tolist()
    register = 0xFFFFFFFF
    for lane in state[:LANES].tolist() if length else ():
        moved = 0
        for bit in range(32):
            if register >> bit & 1:
                moved ^= images[bit]
        register = moved ^ lane
    for byte in bytes(data[length * LANES :]):
        register = int(TABLE[(register ^ byte) & 255]) ^ (register >> 8)
    return register ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
    """A CRC as it is stored beside data that may itself hold CRCs."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
