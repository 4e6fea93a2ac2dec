"""Decoding at the speed of memory: weights are packed once instead of cast at every layer and token.

    decoder = pack(model, rows=1)                   # None in fp32, where packing would change nothing
    logits = decoder.step(ids, cache)               # (B,) ids behind what the cache holds -> (B, 50257)

Weights are kept in fp32 and cast where they are used: in training that costs little, in decoding it is most of the work. Several rows go
through torch with a copy of the matrices in the activations' dtype. One row on a CPU goes through kernels/decode.cpp, compiled at
first use (two seconds) and kept in the cache folder: torch pays some microseconds for each of 200 operations, and a token of GPT-2
needs no more than its 248 MB of bf16 read once.

With `int8` that one row's matrices are stored in 8 bits with a scale for every 32 values, as in llama.cpp's q8_0. That halves what is
read and changes the model a little, so it has to be asked for.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anew.config.schema import rounded_up
from anew.model.attention import as_added
from anew.model.gpt import GPT, Block
from anew.model.kv_cache import Cache
from anew.utils.files import atomic_file, cache_folder

log = logging.getLogger("anew")

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
GROUP = 32  # values that share a scale, as in decode.cpp


class _Matrix(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("ln_1_weight", ctypes.c_void_p), ("ln_1_bias", ctypes.c_void_p), ("attention", _Matrix), ("projection", _Matrix),
        ("ln_2_weight", ctypes.c_void_p), ("ln_2_bias", ctypes.c_void_p), ("wide", _Matrix), ("narrow", _Matrix),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "heads", "width", "capacity", "vocabulary")),
        ("epsilon", ctypes.c_float), ("layer", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("wte", "wpe", "ln_f_weight", "ln_f_bias")), ("head", _Matrix),
    ]  # fmt: skip


class Packed(GPT):
    """A model with a copy of its matrices in the dtype that it computes in; the tables that ids are looked up in are shared."""

    def __init__(self, model: GPT) -> None:
        with torch.device("meta"):
            super().__init__(model.config, model.compute_dtype, seed=None)
        for name, p in model.named_parameters():
            module, _, kind = name.rpartition(".")
            table = module.endswith(("wte", "wpe"))
            value = p.detach() if table else p.detach().to(model.compute_dtype)
            setattr(self.get_submodule(module), kind, nn.Parameter(value, requires_grad=False))
        self.matrix = model.transformer.wte.weight.detach()[: model.config.vocab_size].to(
            model.compute_dtype
        )
        self.eval()

    def head(self, hidden: Tensor) -> Tensor:
        """(..., C) -> logits (..., 50257)."""
        return F.linear(hidden, self.matrix)

    def step(self, ids: list[int], cache: Cache) -> Tensor:
        """Logits (B, 50257) after one more id a row; the cache is one token longer."""
        return self.head(
            self.hidden(torch.tensor(ids, device=cache.lengths.device)[:, None], cache)[:, -1]
        )


@dataclass(frozen=True)
class Recording:
    """A recorded step: what is written into `ids` (B, 1) and `lengths` (B,) before it is played, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    lengths: Tensor
    logits: Tensor  # (B, 50257)
    top: tuple[Tensor, Tensor] | None  # logits and ids of the likeliest tokens, each (B, top_k)


class Graphed(Packed):
    """A packed model on an NVIDIA GPU, where a step of 200 small kernels is recorded once and played back for each token.

    What is recorded has fixed shapes and addresses: attention over the next multiple of 128 slots of a cache of its own, of which each row
    sees its own tokens. The cache of a text is copied into it at the text's first step, so recordings serve one text after the other.
    There is a recording for each number of rows, of slots and of likeliest tokens. All use the same cache, so fewer rows need no cache
    of their own.
    """

    SLOTS = 128
    TOP_SIZES = (0, 1, 64)  # the likeliest token at temperature 0; the usual top_k is 40 or 50

    def __init__(self, model: GPT) -> None:
        super().__init__(model)
        self.own: Cache | None = None  # for as many rows and slots as any text has needed
        self.text: weakref.ref[Cache] | None = None  # the cache that was copied last
        self.recordings: dict[
            tuple[int, int, int], Recording
        ] = {}  # by rows, slots, and how many of the likeliest tokens are found

    def step(self, ids: list[int], cache: Cache) -> Tensor:
        """Logits (B, 50257), until the next step, after one more id a row; the cache is one token longer."""
        return self.step_and_top(ids, cache, 0)[0]

    def step_and_top(
        self, ids: list[int], cache: Cache, top_k: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """As `step`, with logits and ids of the `top_k` likeliest tokens, each (B, top_k); None if that is 0 or more than are recorded."""
        recorded = next((size for size in self.TOP_SIZES if size >= top_k), 0)
        with torch.cuda.device(cache.lengths.device):
            own, rows = self._copied(cache), len(ids)
            slots = min(own.keys.size(3), rounded_up(cache.used + 1, self.SLOTS))
            key = rows, slots, recorded
            if key not in self.recordings:
                self.recordings[key] = self._record(slots, rows, recorded, own)
            recording = self.recordings[key]
            recording.ids.copy_(torch.tensor(ids)[:, None])
            recording.lengths.copy_(cache.lengths)
            recording.graph.replay()
        cache.lengths, cache.used = cache.lengths + 1, cache.used + 1
        top = recording.top
        return recording.logits, None if top is None else (top[0][:, :top_k], top[1][:, :top_k])

    def fixed(self, ids: Tensor, lengths: Tensor, slots: int, cache: Cache) -> Tensor:
        """One step over `slots` slots of the cache's tensors: ids (B, 1), lengths (B,) -> logits (B, 50257). Moves no counter."""
        rows = len(ids)
        view = SlotCache(
            cache.keys[:, :rows], cache.values[:, :rows], lengths, used=slots - 1, ragged=True
        )
        return self.head(self.hidden(ids, view)[:, -1])

    def _copied(self, cache: Cache) -> Cache:
        """The cache whose addresses are recorded, with what `cache` holds in its first rows."""
        rows, capacity = cache.keys.size(1), rounded_up(cache.keys.size(3), self.SLOTS)
        if self.text is None or self.text() is not cache:
            self._give_back()
        own = self.own
        if own is None or own.keys.size(1) < rows or own.keys.size(3) < cache.keys.size(3):
            if own is not None:  # what was large enough for an earlier text stays large enough
                rows, capacity = max(rows, own.keys.size(1)), max(capacity, own.keys.size(3))
            self.recordings.clear()
            own = self.own = Cache.empty(self, rows, min(capacity, self.config.n_positions))
            self.text = None
        if self.text is None or self.text() is not cache:
            _copy_slots(cache, own, len(cache.lengths), cache.used)
            self.text = weakref.ref(cache)
        return own

    def _give_back(self) -> None:
        """Copy the slots of the text that was decoded last into its own cache: it may go on after another text."""
        text = self.text() if self.text is not None else None
        if text is not None and self.own is not None:
            _copy_slots(self.own, text, len(text.lengths), text.used)

    def _record(self, slots: int, rows: int, top_k: int, own: Cache) -> Recording:
        ids = torch.zeros(rows, 1, dtype=torch.long, device=own.lengths.device)
        lengths = torch.full(
            (rows,), slots - 1, device=own.lengths.device
        )  # the trial below writes into slots that are not read
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # once for real: libraries allocate what may not be allocated while recording
            self.fixed(ids, lengths, slots, own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # other threads may use the GPU meanwhile
            logits = self.fixed(ids, lengths, slots, own)
            top = logits.topk(top_k) if top_k else None
        return Recording(
            graph, ids, lengths, logits, None if top is None else (top.values, top.indices)
        )


def _copy_slots(source: Cache, target: Cache, rows: int, used: int) -> None:
    """Copy the first `used` slots of the first `rows` rows, in every layer."""
    target.keys[:, :rows, :, :used] = source.keys[:, :rows, :, :used]
    target.values[:, :rows, :, :used] = source.values[:, :rows, :, :used]


class SlotCache(Cache):
    """A cache whose mask is the one that attention kernels add to the scores: made once a step instead of once a layer."""

    def mask(self, T: int) -> Tensor | None:
        """As Cache.mask: (B, 1, T, used + T), zero where a token may look and minus infinity elsewhere."""
        visible = super().mask(T)
        return None if visible is None else as_added(visible, self.keys.dtype)


class Rows:
    """Several rows on a CPU in bf16: matrix products by oneDNN, weights in its own order, and the kernel for what lies between them."""

    def __init__(self, model: GPT, library: ctypes.CDLL) -> None:
        self.library, self.config = library, model.config
        t = model.transformer
        self.tables = t.wte.weight.detach(), t.wpe.weight.detach()
        self.norms, self.products = (
            list[tuple[Tensor, Tensor]](),
            list[tuple[Tensor, Tensor | None]](),
        )
        for block in cast(Iterable[Block], t.h):
            self.norms += [
                (norm.weight.detach().float(), norm.bias.detach().float())
                for norm in (block.ln_1, block.ln_2)
            ]
            for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                self.products.append(
                    (_reordered(linear.weight.detach().t()), linear.bias.detach().bfloat16())
                )
        self.norms.append((t.ln_f.weight.detach().float(), t.ln_f.bias.detach().float()))
        self.products.append((_reordered(t.wte.weight.detach()[: self.config.vocab_size]), None))

    def step(self, ids: list[int], cache: Cache) -> Tensor:
        """Logits (B, 50257) after one more id a row; the cache is one token longer."""
        wte, wpe = self.tables
        x = wte[ids].float() + wpe[cache.lengths].float()  # (B, C)
        norms, products = iter(self.norms), iter(self.products)
        normed = self._norm(x, None, *next(norms))
        for keys, values in zip(cache.keys, cache.values, strict=True):
            qkv = _product(normed, *next(products))
            mixed = torch.empty_like(normed)
            pointers = (
                ctypes.c_void_p(tensor.data_ptr())
                for tensor in (qkv, keys, values, cache.lengths, mixed)
            )
            sizes = (
                ctypes.c_int64(n)
                for n in (len(x), self.config.n_head, self.config.head_dim, keys.size(2))
            )
            self.library.anew_attend(*pointers, *sizes, ctypes.c_int(torch.get_num_threads()))
            normed = self._norm(x, _product(mixed, *next(products)), *next(norms))
            wide = _product(normed, *next(products), "gelu", [], "tanh")
            normed = self._norm(x, _product(wide, *next(products)), *next(norms))
        cache.lengths = cache.lengths + 1
        cache.used += 1
        return _product(normed, *next(products))

    def _norm(self, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """x += added, and its layer norm in bf16."""
        out = torch.empty(x.shape, dtype=torch.bfloat16)
        x_, added_, weight_, bias_, out_ = (
            ctypes.c_void_p(t.data_ptr() if t is not None else None)
            for t in (x, added, weight, bias, out)
        )
        epsilon, rows, width = (
            ctypes.c_float(self.config.layer_norm_epsilon),
            ctypes.c_int64(x.size(0)),
            ctypes.c_int64(x.size(1)),
        )
        self.library.anew_norm(
            x_,
            added_,
            weight_,
            bias_,
            epsilon,
            out_,
            rows,
            width,
            ctypes.c_int(torch.get_num_threads()),
        )
        return out


def _reordered(weight: Tensor) -> Tensor:
    """(out, in) in the order in which oneDNN multiplies: torch would bring it into that order for every token."""
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(
        weight.bfloat16().contiguous(), 16
    )  # 16: rows to expect
    return reordered


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    after: str = "none",
    scalars: Iterable[Any] = (),
    kind: str = "",
) -> Tensor:
    """x W^T + bias, and a function of it."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, after, list(scalars), kind
    )
    return product


class Kernel:
    """Weights as the kernel reads them, for one row."""

    def __init__(self, model: GPT, library: ctypes.CDLL, int8: bool) -> None:
        self.library, self.int8, self.kept = (
            library,
            int8,
            list[Tensor](),
        )  # tensors whose memory the structures point to
        t, c = model.transformer, model.config
        layers = (_Layer * c.n_layer)()
        for layer, block in zip(layers, cast(Iterable[Block], t.h), strict=True):
            a, m = block.attn, block.mlp
            layer.ln_1_weight, layer.ln_1_bias = (
                self._keep(block.ln_1.weight),
                self._keep(block.ln_1.bias),
            )
            layer.ln_2_weight, layer.ln_2_bias = (
                self._keep(block.ln_2.weight),
                self._keep(block.ln_2.bias),
            )
            layer.attention, layer.projection = (
                self._matrix(linear.weight.t(), linear.bias) for linear in (a.c_attn, a.c_proj)
            )
            layer.wide, layer.narrow = (
                self._matrix(linear.weight.t(), linear.bias) for linear in (m.c_fc, m.c_proj)
            )
        self.layers, self.vocab_size, self.width = layers, c.vocab_size, c.n_embd
        tables = (self._keep(p) for p in (t.wte.weight, t.wpe.weight, t.ln_f.weight, t.ln_f.bias))
        head = self._matrix(t.wte.weight[: c.vocab_size], None)
        self.model = _Model(
            c.n_layer,
            c.n_head,
            c.n_embd,
            0,
            c.vocab_size,
            c.layer_norm_epsilon,
            layers,
            *tables,
            head,
        )

    def step(self, ids: list[int], cache: Cache) -> Tensor:
        """Logits (1, 50257) after one more id; the cache is one token longer."""
        logits, scratch = torch.empty(1, self.vocab_size), torch.empty(9 * self.width)
        self.model.capacity = cache.keys.size(3)
        pointers = (
            ctypes.c_void_p(t.data_ptr()) for t in (cache.keys, cache.values, scratch, logits)
        )
        where = ctypes.c_int64(ids[0]), ctypes.c_int64(cache.used)
        self.library.anew_decode(
            ctypes.byref(self.model), *where, *pointers, ctypes.c_int(torch.get_num_threads())
        )
        cache.lengths = cache.lengths + 1
        cache.used += 1
        return logits

    def _keep(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().float().contiguous())
        return self.kept[-1].data_ptr()

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> _Matrix:
        """A (out, in) matrix in bf16 or int8."""
        weight, scales = weight.detach().float(), None
        if self.int8:
            values, scale = quantised(weight)
            values = (values.short() + 128).to(torch.uint8)
            self.kept += [values, scale]
            scales = scale.data_ptr()
        else:
            values = weight.to(torch.bfloat16).contiguous()
            self.kept.append(values)
        return _Matrix(values.data_ptr(), scales, None if bias is None else self._keep(bias))


Decoder = Packed | Rows | Kernel
_PACKED: WeakKeyDictionary[GPT, tuple[Any, dict[Any, Decoder]]] = (
    WeakKeyDictionary()
)  # as long as the model is there and unchanged


def pack(model: GPT, rows: int, int8: bool = False) -> Decoder | None:
    """What decodes `rows` sequences at once from this model; None where the weights are computed with as they are.

    A model in training is one of these: its weights change before the next text, and its device has no room for a second copy.
    """
    if model.training:
        return None
    on_cpu = (
        model.transformer.wte.weight.device.type == "cpu" and model.compute_dtype == torch.bfloat16
    )
    library = _library() if on_cpu else None
    if int8 and (library is None or rows > 1 or model.config.n_embd % GROUP):
        log.warning(
            "int8 weights are for one text at a time on a CPU in bf16, with a C++ compiler and a width that 32 divides; going on without"
        )
        int8 = False
    if model.compute_dtype == torch.float32:
        return None
    if library is None or (rows > 1 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        kind: type = Graphed if model.transformer.wte.weight.device.type == "cuda" else Packed
    else:
        kind = Rows if rows > 1 else Kernel
    state = tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
    held = _PACKED.get(model)
    if held is None or held[0] != state:
        held = _PACKED[model] = (state, {})
    if (kind, int8) not in held[1]:
        held[1][kind, int8] = _decoder(kind, model, library, int8)
    return held[1][kind, int8]


def _decoder(kind: type, model: GPT, library: ctypes.CDLL | None, int8: bool) -> Decoder:
    if issubclass(kind, Packed) or library is None:
        return kind(model)
    return Rows(model, library) if kind is Rows else Kernel(model, library, int8)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) fp32 -> int8 (out, in) and scales (out, in / 32): the largest of 32 values becomes 127."""
    groups = weight.reshape(weight.size(0), -1, GROUP)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    values = (groups / scales.clamp(min=1e-30)).round().to(torch.int8)
    return values.reshape(weight.shape).contiguous(), scales.squeeze(-1).contiguous()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None, with a line that says so, where it cannot be had."""
    compiler = (
        shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    )
    if compiler is None or platform.system() != "Linux":
        return None
    kind = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").split("flags", 1)[-1].split("\n", 1)[0]
    )  # -march=native is of one kind of CPU
    name = hashlib.sha256(SOURCE.read_bytes() + repr((FLAGS, compiler, kind)).encode()).hexdigest()[
        :16
    ]
    path = cache_folder() / "kernels" / f"decode-{name}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                subprocess.run(
                    [compiler, *FLAGS, str(SOURCE), "-o", str(temporary)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
        library: Any = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", "") or str(error)
        log.info(
            f"decoding with torch, since the kernel could not be compiled: {why.strip().splitlines()[-1][:200]}"
        )
        return None
    library.anew_decode.restype = library.anew_attend.restype = library.anew_norm.restype = None
    return library
