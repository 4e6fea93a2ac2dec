"""Decoders: faster ways to read one more token of each row than the model itself.

    decoder = decoder_for(model, rows=1)    # None if the model itself is to be used
    logits = decoder.step(ids, cache)       # (B,) ids after the cached ones -> (B, 50257)

A model keeps its weights in fp32 and casts them where they are used. In training that costs little;
in decoding it is most of the work. A decoder casts them once. In fp32, what a decoder gains is in
the products of matrices with few rows.

| model                        | decoder                                                          |
|------------------------------|------------------------------------------------------------------|
| in training, or with hooks   | none: `torch_step` with the model itself                         |
| CPU, bf16 or fp32, one row   | `CpuDecoder`: the whole step is one call of decode.cpp           |
| CPU, bf16 or fp32, more rows | `CpuBatchDecoder`: matrix products by oneDNN, rest by decode.cpp |
| NVIDIA GPU, bf16 or fp16     | `CudaGraphDecoder`: PyTorch, recorded as a CUDA graph            |
| other in fp32                | none                                                             |
| other                        | `TorchDecoder`: PyTorch                                          |

`CpuDecoder` and `CpuBatchDecoder` need Linux and a C++ compiler. In bf16, `CpuBatchDecoder` also
needs a CPU with bf16 instructions; in fp32, it needs memory for a second copy of the weights.
"""

import ctypes
import logging
import weakref
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anew.config.schema import rounded_up
from anew.inference.cpu_decoder import (
    CACHE_DTYPES,
    GROUP,
    CpuBatchDecoder,
    CpuDecoder,
    load_library,
)
from anew.inference.sampling import Likeliest
from anew.model.attention import additive_mask
from anew.model.flops import count_parameters
from anew.model.gpt import GPT, MLP, Attention, Block, LayerNorm, Linear, Transformer
from anew.model.kv_cache import Cache
from anew.utils.memory import available_memory

log = logging.getLogger("anew")

MODULES = (
    GPT,
    Transformer,
    Block,
    Attention,
    MLP,
    Linear,
    LayerNorm,
    nn.Embedding,
    nn.ModuleList,
)


def torch_step(model: GPT, ids: list[int], cache: Cache) -> Tensor:
    """Read one more id of each row; return logits (B, 50257). The cache is one token longer."""
    new_ids = torch.tensor(ids, device=cache.lengths.device)[:, None]  # (B, 1)
    hidden = model.hidden(new_ids, cache)  # (B, 1, C)
    return model.head(hidden[:, -1])


class TorchDecoder(GPT):
    """A model with a copy of its matrices in the dtype that it computes in.

    The two tables that ids and positions are looked up in are shared with the model.
    """

    def __init__(self, model: GPT) -> None:
        with torch.device("meta"):
            super().__init__(model.config, model.compute_dtype, seed=None)
        for name, parameter in model.named_parameters():
            module, _, kind = name.rpartition(".")
            value = parameter.detach()
            if not module.endswith(("wte", "wpe")):
                value = value.to(model.compute_dtype)
            setattr(self.get_submodule(module), kind, nn.Parameter(value, requires_grad=False))
        table = model.transformer.wte.weight.detach()
        self.head_matrix = table[: model.config.vocab_size].to(model.compute_dtype)  # (50257, C)
        self.eval()

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits: (..., C) -> (..., 50257)."""
        return F.linear(hidden, self.head_matrix)

    def step(self, ids: list[int], cache: Cache) -> Tensor:
        """Read one more id of each row; return logits (B, 50257). The cache is one token longer."""
        return torch_step(self, ids, cache)


@dataclass(frozen=True)
class Recording:
    """A recorded step: replaying it reads `ids` and `lengths` and writes the other tensors."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor  # (B, 1)
    lengths: Tensor  # (B,)
    logits: Tensor  # (B, 50257)
    likeliest: Likeliest | None


class CudaGraphDecoder(TorchDecoder):
    """A packed model on an NVIDIA GPU; a step of 200 small kernels is recorded once and replayed.

    A recording has fixed shapes and addresses. It attends to the next multiple of 128 slots of a
    cache that the decoder owns, in which each row sees its own tokens. The cache of a text is
    copied into it at the first step of the text, so the recordings serve one text after the other.

    There is a recording for each number of rows, of slots and of likeliest tokens. All use the same
    cache, so that fewer rows need no cache of their own.
    """

    SLOTS = 128
    TOP_SIZES = (0, 1, 64)  # temperature 0 needs the likeliest token; the usual top_k is 40 or 50

    def __init__(self, model: GPT) -> None:
        super().__init__(model)
        self.own: Cache | None = None  # large enough for any text so far
        self.text: weakref.ref[Cache] | None = None  # the cache that was copied last
        self.recordings: dict[tuple[int, int, int], Recording] = {}  # by rows, slots, top size

    def step(self, ids: list[int], cache: Cache) -> Tensor:
        """Read one more id of each row; return logits (B, 50257), valid until the next step."""
        logits, _ = self.step_and_top(ids, cache, top_k=0)
        return logits

    def step_and_top(
        self,
        ids: list[int],
        cache: Cache,
        top_k: int,
    ) -> tuple[Tensor, Likeliest | None]:
        """Read one more id of each row; return logits (B, 50257) and the `top_k` likeliest tokens.

        There are no likeliest tokens if `top_k` is 0 or more than the largest recorded number. Both
        results are valid until the next step. The cache is one token longer.
        """
        top_size = next((size for size in self.TOP_SIZES if size >= top_k), 0)
        with torch.cuda.device(cache.lengths.device):
            own = self._copied(cache)
            rows = len(ids)
            capacity = own.keys.size(3)
            slots = min(rounded_up(cache.used + 1, self.SLOTS), capacity)
            key = (rows, slots, top_size)
            if key not in self.recordings:
                self.recordings[key] = self._record(slots, rows, top_size, own)
            recording = self.recordings[key]
            recording.ids.copy_(torch.tensor(ids)[:, None])
            recording.lengths.copy_(cache.lengths)
            recording.graph.replay()
        cache.advance(1)
        likeliest = recording.likeliest
        if likeliest is not None:
            likeliest = Likeliest(
                logits=likeliest.logits[:, :top_k],
                ids=likeliest.ids[:, :top_k],
            )
        return recording.logits, likeliest

    def fixed_shape_step(
        self,
        ids: Tensor,
        lengths: Tensor,
        slots: int,
        cache: Cache,
    ) -> Tensor:
        """Compute a step over `slots` slots: ids (B, 1), lengths (B,) -> logits (B, 50257).

        Keys and values are written into the tensors of `cache`; its counters stay as they are.
        """
        rows = len(ids)
        view = SlotCache(
            keys=cache.keys[:, :rows],
            values=cache.values[:, :rows],
            lengths=lengths,
            used=slots - 1,
            ragged=True,
        )
        hidden = self.hidden(ids, view)  # (B, 1, C)
        return self.head(hidden[:, -1])

    def _copied(self, cache: Cache) -> Cache:
        """Return the decoder's cache with the content of `cache` in its first rows."""
        if self.own is not None and self._last_text() is cache:
            return self.own
        self._give_back()
        own = self._with_room_for(cache)
        _copy_slots(cache, own, len(cache.lengths), cache.used)
        self.text = weakref.ref(cache)
        return own

    def _last_text(self) -> Cache | None:
        return None if self.text is None else self.text()

    def _give_back(self) -> None:
        """Copy the last text into its own cache, since it may continue after another text."""
        text = self._last_text()
        if text is not None and self.own is not None:
            _copy_slots(self.own, text, len(text.lengths), text.used)

    def _with_room_for(self, cache: Cache) -> Cache:
        """Return the decoder's cache; if it is too small, replace it and drop the recordings."""
        _, rows, _, capacity, _ = cache.keys.shape
        if self.own is not None:
            _, own_rows, _, own_capacity, _ = self.own.keys.shape
            if own_rows >= rows and own_capacity >= capacity:
                return self.own
            # What was large enough for an earlier text stays large enough.
            rows = max(rows, own_rows)
            capacity = max(capacity, own_capacity)
        capacity = min(rounded_up(capacity, self.SLOTS), self.config.n_positions)
        self.recordings.clear()
        self.own = Cache.empty(self, rows, capacity)
        return self.own

    def _record(self, slots: int, rows: int, top_k: int, own: Cache) -> Recording:
        device = own.lengths.device
        ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        # With these lengths the steps below write into the last slot, which holds no token yet.
        lengths = torch.full((rows,), slots - 1, device=device)
        # The first step is not recorded: libraries allocate memory that recording does not allow.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.fixed_shape_step(ids, lengths, slots, own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may use the GPU while this one records.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self.fixed_shape_step(ids, lengths, slots, own)
            likeliest = Likeliest(*logits.topk(top_k)) if top_k else None
        return Recording(graph, ids, lengths, logits, likeliest)


def _copy_slots(source: Cache, target: Cache, rows: int, used: int) -> None:
    """Copy the first `used` slots of the first `rows` rows, in every layer."""
    everything = slice(None)
    filled = (
        everything,
        slice(rows),
        everything,
        slice(used),
    )  # of (layers, B, heads, slots, size)
    target.keys[filled] = source.keys[filled]
    target.values[filled] = source.values[filled]


class SlotCache(Cache):
    """A cache whose mask is in the form that attention kernels add to the scores.

    So it is made once a step instead of once a layer.
    """

    def mask(self, T: int) -> Tensor | None:
        """Return (B, 1, T, used + T): zero where a token may look, minus infinity elsewhere."""
        visible = super().mask(T)
        return None if visible is None else additive_mask(visible, self.keys.dtype)


Decoder = TorchDecoder | CpuBatchDecoder | CpuDecoder
WeightState = list[tuple[int, int]]  # address and version of each parameter


@dataclass(frozen=True)
class _Decoders:
    """The decoders of a model, and the state of the weights they were made from."""

    state: WeightState
    # By dtype of activations, use of the kernel for one row, and int8.
    made: dict[tuple[torch.dtype, bool, bool], Decoder] = field(default_factory=dict)


# A decoder is kept as long as its model exists and its weights are unchanged.
_DECODERS: WeakKeyDictionary[GPT, _Decoders] = WeakKeyDictionary()


def decoder_for(model: GPT, rows: int, int8: bool = False) -> Decoder | None:
    """Return what decodes `rows` sequences at once; None if the model itself is to be used.

    A model in training has no decoder: its weights change before the next text, and its device has
    no room for a second copy. Nor has a model with hooks or other modules, since a decoder would
    leave them out. A new decoder is made when weights have changed, unless they were changed
    through `.data` or in inference mode, which leaves no trace.

    `int8` stores the matrices in 8 bits (see `CpuDecoder`); where that does not work, a warning is
    logged and the decoder is the one without `int8`.
    """
    dtype = model.compute_dtype
    if model.training or not _runs_as_written(model):
        _DECODERS.pop(model, None)
        return None
    is_on_cpu = model.transformer.wte.weight.device.type == "cpu"
    library = load_library() if is_on_cpu and dtype in CACHE_DTYPES else None
    one_row_kernel = library is not None and rows == 1
    if int8 and not (one_row_kernel and model.config.n_embd % GROUP == 0):
        log.warning(
            "int8 weights are for one text at a time on a CPU, in bf16 or fp32, and need Linux, a "
            f"C++ compiler and a width divisible by {GROUP}; decoding continues without them"
        )
        return decoder_for(model, rows)
    state = _weight_state(model)
    decoders = _DECODERS.get(model)
    if decoders is None or decoders.state != state:
        decoders = _DECODERS[model] = _Decoders(state)
    key = (dtype, one_row_kernel, int8)
    decoder = decoders.made.get(key) or _build_decoder(model, rows, int8, library)
    if decoder is not None:
        decoders.made[key] = decoder
    return decoder


def _runs_as_written(model: GPT) -> bool:
    """Return whether all modules are those of a GPT, without hooks."""
    return all(
        type(module) in MODULES and not module._forward_hooks and not module._forward_pre_hooks
        for module in model.modules()
    )


def _weight_state(model: GPT) -> WeightState:
    """Return a value that differs after a change of any weight."""
    state = []
    for parameter in model.parameters():
        # Tensors that were made in inference mode have no version counter.
        version = 0 if parameter.is_inference() else parameter._version
        state.append((parameter.data_ptr(), version))
    return state


def _build_decoder(
    model: GPT,
    rows: int,
    int8: bool,
    library: ctypes.CDLL | None,
) -> Decoder | None:
    if library is not None and rows == 1:
        return CpuDecoder(model, library, int8)
    if library is not None and _suits_onednn(model):
        return CpuBatchDecoder(model, library)
    if model.compute_dtype == torch.float32:
        return None  # a copy would have the same weights
    if model.transformer.wte.weight.device.type == "cuda":
        return CudaGraphDecoder(model)
    return TorchDecoder(model)


def _suits_onednn(model: GPT) -> bool:
    """Return whether oneDNN multiplies in the model's dtype, and its copy of the weights fits."""
    if not torch.backends.mkldnn.is_available():
        return False
    if model.compute_dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    copy_bytes = 4 * count_parameters(model.config)
    return 2 * copy_bytes < available_memory()
