"""Decoders for CPUs. They call decode.cpp, which is compiled at the first use.

    library = load_library()                        # None without Linux and a C++ compiler
    logits = CpuDecoder(model, library, int8=False).step([id], cache)           # (1, 50257)

Compiling takes two seconds, and the library is kept in the cache folder. All that a token of GPT-2
124M needs is to read its weights once: 498 MB in fp32, 248 MB in bf16, 140 MB in 8 bits. PyTorch
calls 200 operations instead, each of which costs some microseconds, and in fp32 its products of a
matrix and a single row need up to twice the time of the reading (docs/log.md, 25).
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from anew.model.gpt import GPT, Block, LayerNorm, Linear
from anew.model.kv_cache import Cache
from anew.utils.files import atomic_file, cache_folder

log = logging.getLogger("anew")

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
BF16, INT8, FP32, FP32_COLUMNS = range(4)  # `Storage` of decode.cpp
GROUP = 32  # values that share a scale, as in decode.cpp
CACHE_DTYPES = (torch.bfloat16, torch.float32)  # that `CpuDecoder` can read
ROWS_EXPECTED = 16  # oneDNN orders weights for about this many rows
CPU_FIELDS = ("flags", "Features", "CPU part")  # of /proc/cpuinfo, on x86 and on ARM

POINTER, INT64 = ctypes.c_void_p, ctypes.c_int64


class _Norm(ctypes.Structure):
    """`Norm` of decode.cpp."""

    _fields_ = [("weight", POINTER), ("bias", POINTER)]


class _Matrix(ctypes.Structure):
    """`Matrix` of decode.cpp."""

    _fields_ = [("storage", INT64), ("values", POINTER), ("scales", POINTER), ("bias", POINTER)]


class _Layer(ctypes.Structure):
    """`Layer` of decode.cpp."""

    _fields_ = [
        ("ln_1", _Norm),
        ("c_attn", _Matrix),
        ("attn_c_proj", _Matrix),
        ("ln_2", _Norm),
        ("c_fc", _Matrix),
        ("mlp_c_proj", _Matrix),
    ]


class _Model(ctypes.Structure):
    """`Model` of decode.cpp."""

    _fields_ = [
        ("layers", INT64),
        ("heads", INT64),
        ("width", INT64),
        ("vocabulary", INT64),
        ("epsilon", ctypes.c_float),
        ("layer", ctypes.POINTER(_Layer)),
        ("wte", POINTER),
        ("wpe", POINTER),
        ("ln_f", _Norm),
        ("head", _Matrix),
    ]


# The parameters of the functions of decode.cpp.
SIGNATURES = {
    "anew_decode": (
        ctypes.POINTER(_Model),
        *[INT64] * 3,
        *[POINTER] * 2,
        ctypes.c_bool,
        *[POINTER] * 2,
        ctypes.c_int,
    ),
    "anew_attend": (*[POINTER] * 5, ctypes.c_bool, *[INT64] * 4, ctypes.c_int),
    "anew_norm": (
        *[POINTER] * 4,
        ctypes.c_float,
        POINTER,
        ctypes.c_bool,
        *[INT64] * 2,
        ctypes.c_int,
    ),
}


class CpuDecoder:
    """Decode one row: a step is one call of decode.cpp.

    The matrices are those of the model in fp32, and copies of them in bf16. With `int8` they are
    stored in 8 bits with a scale for every 32 values, as in llama.cpp's q8_0. int8 needs about half
    the bytes of bf16 and changes the model a little, so the user has to ask for it.
    """

    def __init__(self, model: GPT, library: ctypes.CDLL, int8: bool) -> None:
        self.library = library
        self.int8 = int8
        self.is_fp32 = model.compute_dtype == torch.float32
        self.kept: list[Tensor] = []  # the tensors whose memory the structures point to
        config, transformer = model.config, model.transformer
        self.width = config.n_embd
        self.vocab_size = config.vocab_size
        blocks = cast(Iterable[Block], transformer.h)
        self.layers = (_Layer * config.n_layer)(*map(self._layer, blocks))
        self.model = _Model(
            layers=config.n_layer,
            heads=config.n_head,
            width=config.n_embd,
            vocabulary=config.vocab_size,
            epsilon=config.layer_norm_epsilon,
            layer=self.layers,
            wte=self._keep(transformer.wte.weight),
            wpe=self._keep(transformer.wpe.weight),
            ln_f=self._norm(transformer.ln_f),
            head=self._matrix(transformer.wte.weight[: config.vocab_size]),
        )

    def step(self, ids: list[int], cache: Cache) -> Tensor:
        """Read one more id; return logits (1, 50257). The cache is one token longer."""
        logits = torch.empty(1, self.vocab_size)
        scratch = torch.empty(9 * self.width)
        assert cache.keys.dtype in CACHE_DTYPES
        self.library.anew_decode(
            ctypes.byref(self.model),
            ids[0],
            cache.used,
            cache.keys.size(3),
            cache.keys.data_ptr(),  # (layers, 1, heads, capacity, head_dim)
            cache.values.data_ptr(),
            cache.keys.dtype == torch.float32,
            scratch.data_ptr(),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        cache.advance(1)
        return logits

    def _layer(self, block: Block) -> _Layer:
        return _Layer(
            ln_1=self._norm(block.ln_1),
            c_attn=self._linear(block.attn.c_attn),
            attn_c_proj=self._linear(block.attn.c_proj),
            ln_2=self._norm(block.ln_2),
            c_fc=self._linear(block.mlp.c_fc),
            mlp_c_proj=self._linear(block.mlp.c_proj),
        )

    def _norm(self, norm: LayerNorm) -> _Norm:
        return _Norm(weight=self._keep(norm.weight), bias=self._keep(norm.bias))

    def _linear(self, linear: Linear) -> _Matrix:
        bias = self._keep(linear.bias)
        if self.is_fp32 and not self.int8:
            return _Matrix(FP32_COLUMNS, values=self._keep(linear.weight), bias=bias)
        return self._matrix(linear.weight.t(), bias)

    def _matrix(self, weight: Tensor, bias: int | None = None) -> _Matrix:
        """Return a matrix (out, in) with a pointer to its bias."""
        weight = weight.detach().float()
        if self.int8:
            signed, scales = quantize(weight)
            values = (signed.short() + 128).to(torch.uint8)  # CPUs multiply unsigned by signed
            self.kept += [values, scales]
            return _Matrix(INT8, values=values.data_ptr(), scales=scales.data_ptr(), bias=bias)
        if self.is_fp32:
            return _Matrix(FP32, values=self._keep(weight), bias=bias)
        values = weight.to(torch.bfloat16).contiguous()
        self.kept.append(values)
        return _Matrix(BF16, values=values.data_ptr(), bias=bias)

    def _keep(self, tensor: Tensor) -> int:
        """Keep a tensor in fp32, and return a pointer to it."""
        self.kept.append(tensor.detach().float().contiguous())
        return self.kept[-1].data_ptr()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 values (out, in) and fp32 scales (out, in / 32) of an fp32 matrix (out, in).

    The largest absolute value of 32 neighbours becomes 127.
    """
    groups = weight.reshape(weight.size(0), -1, GROUP)  # (out, in / 32, 32)
    scales = groups.abs().amax(-1, keepdim=True) / 127  # (out, in / 32, 1)
    values = (groups / scales.clamp(min=1e-30)).round().to(torch.int8)
    return values.reshape(weight.shape).contiguous(), scales.squeeze(-1).contiguous()


WeightAndBias = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _BatchLayer:
    """The weights of one block, in the forms that `CpuBatchDecoder` uses."""

    ln_1: WeightAndBias  # (C,) in fp32
    c_attn: WeightAndBias  # a matrix in oneDNN's order and (out,), in the decoder's dtype
    attn_c_proj: WeightAndBias
    ln_2: WeightAndBias
    c_fc: WeightAndBias
    mlp_c_proj: WeightAndBias


class CpuBatchDecoder:
    """Decode several rows in bf16 or fp32: oneDNN multiplies matrices, decode.cpp does the rest.

    The decoder has a copy of the weights in oneDNN's own order. With plain matrices a step takes
    about twice as long (docs/log.md, 8 and 25).
    """

    def __init__(self, model: GPT, library: ctypes.CDLL) -> None:
        self.library = library
        self.config = model.config
        self.dtype = model.compute_dtype
        transformer = model.transformer
        self.wte = transformer.wte.weight.detach()
        self.wpe = transformer.wpe.weight.detach()
        self.layers = [
            _BatchLayer(
                ln_1=_norm_weights(block.ln_1),
                c_attn=self._linear_weights(block.attn.c_attn),
                attn_c_proj=self._linear_weights(block.attn.c_proj),
                ln_2=_norm_weights(block.ln_2),
                c_fc=self._linear_weights(block.mlp.c_fc),
                mlp_c_proj=self._linear_weights(block.mlp.c_proj),
            )
            for block in cast(Iterable[Block], transformer.h)
        ]
        self.ln_f = _norm_weights(transformer.ln_f)
        self.head = self._reordered(self.wte[: self.config.vocab_size])

    def step(self, ids: list[int], cache: Cache) -> Tensor:
        """Read one more id of each row; return logits (B, 50257). The cache is one token longer."""
        assert cache.keys.dtype == self.dtype
        x = self.wte[ids].float() + self.wpe[cache.lengths].float()  # (B, C)
        added: Tensor | None = None  # what the previous layer adds to x, (B, C)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            normed = self._add_and_norm(x, added, *layer.ln_1)  # (B, C)
            qkv = _product(normed, *layer.c_attn)  # (B, 3 C)
            mixed = self._attend(qkv, keys, values, cache.lengths)  # (B, C)
            added = _product(mixed, *layer.attn_c_proj)
            normed = self._add_and_norm(x, added, *layer.ln_2)
            wide = _product(normed, *layer.c_fc, activation="gelu")  # (B, 4 C)
            added = _product(wide, *layer.mlp_c_proj)
        normed = self._add_and_norm(x, added, *self.ln_f)
        cache.advance(1)
        return _product(normed, self.head, None)

    def _attend(self, qkv: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Store new keys and values, and attend to all: (B, 3 C) -> (B, C).

        `keys` and `values` are one layer of the cache, (B, heads, capacity, head_dim).
        """
        rows, heads, capacity, head_dim = keys.shape
        mixed = torch.empty(rows, heads * head_dim, dtype=self.dtype)
        self.library.anew_attend(
            qkv.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            lengths.data_ptr(),
            mixed.data_ptr(),
            self.dtype == torch.float32,
            rows,
            heads,
            head_dim,
            capacity,
            torch.get_num_threads(),
        )
        return mixed

    def _add_and_norm(
        self, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Add to x (B, C) in place, and return its layer norm."""
        normed = torch.empty(x.shape, dtype=self.dtype)
        self.library.anew_norm(
            x.data_ptr(),
            None if added is None else added.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            self.config.layer_norm_epsilon,
            normed.data_ptr(),
            self.dtype == torch.float32,
            *x.shape,
            torch.get_num_threads(),
        )
        return normed

    def _linear_weights(self, linear: Linear) -> WeightAndBias:
        weight = self._reordered(linear.weight.detach().t())
        return weight, linear.bias.detach().to(self.dtype)

    def _reordered(self, weight: Tensor) -> Tensor:
        """Return a matrix (out, in) in the order in which oneDNN multiplies.

        Otherwise PyTorch would bring it into that order for every token.
        """
        matrix = weight.to(self.dtype).contiguous()
        reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS_EXPECTED)
        return reordered


def _norm_weights(norm: LayerNorm) -> WeightAndBias:
    return norm.weight.detach().float(), norm.bias.detach().float()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Return activation(x W^T + bias): (B, in) -> (B, out)."""
    approximation = "tanh" if activation == "gelu" else ""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, activation, [], approximation
    )
    return product


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """Return decode.cpp as a library; None without Linux and a C++ compiler.

    If compiling fails, the reason is logged and None is returned.
    """
    wanted = os.environ.get("CXX", "")
    compiler = shutil.which(wanted) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or platform.system() != "Linux":
        return None
    try:
        path = _library_path(compiler)
        if not path.exists():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        last_line = reason.strip().splitlines()[-1][:200]
        log.info(f"decoding with torch, since the kernel could not be compiled: {last_line}")
        return None
    for name, parameters in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = parameters
        function.restype = None
    return library


def _library_path(compiler: str) -> Path:
    """Return a path that depends on the source, the compiler and the CPU (-march=native)."""
    cpu_info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = sorted({line for line in cpu_info if line.startswith(CPU_FIELDS)})
    ingredients = SOURCE.read_bytes() + repr((FLAGS, compiler, platform.machine(), cpu)).encode()
    name = hashlib.sha256(ingredients).hexdigest()[:16]
    return cache_folder() / "kernels" / f"decode-{name}.so"


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, shared=True) as temporary:
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(temporary)]
        subprocess.run(command, check=True, capture_output=True, text=True)
