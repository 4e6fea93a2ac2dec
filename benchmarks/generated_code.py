"""Counts the bytes that a compiled training pass moves on an H200, without an H200.

    .venv/bin/python benchmarks/generated_code.py gpt2-124m --micro-batch 64
    python benchmarks/generated_code.py gpt2-124m --micro-batch 64 --kernels 12   # largest kernels
    python benchmarks/generated_code.py gpt2-124m --code generated                # generated code

The model's loss is traced with fake tensors, which have shapes but no values. The forward and the
backward graph are moved to a fake CUDA device, and Inductor generates its kernels for compute
capability 9.0. Nothing is run, so the figures do not depend on this machine. They do depend on the
versions of torch and Triton, which are printed.

Matrix products and attention are library calls; they are counted in operations. The fused kernels
between them, and this project's own, are counted in bytes read and written, each tensor once a
kernel. The last lines say what a pass needs at least, at the H200's measured ceilings, and what it
would take at rates that such kernels usually reach.
"""

import argparse
import collections
import copy
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree

# Seen on an H200 (a product of 8192 x 8192 in bf16; a copy), and shares of them that are usual.
PEAK_TFLOPS, PEAK_BYTES = 790e12, 4.3e12
USUAL_PRODUCTS = 660e12  # products with an inner dimension of 768 to 3072: 620 to 700
USUAL_ATTENTION = {"forward": 300e12, "backward": 230e12}
USUAL_BANDWIDTH = 0.85  # of PEAK_BYTES, in fused pointwise and reduction kernels
USUAL_LOSS_BANDWIDTH = 0.75  # of PEAK_BYTES, in the loss kernel, which reads each row twice
OPTIMIZER_BYTES = 40  # a parameter: clipping reads and writes the gradient, AdamW all four tensors
BETWEEN_STEPS = 2e-3  # seconds from the end of one step to the first kernel of the next


class H200:
    """What torch reports of the device."""

    name = "NVIDIA H200"
    major, minor = 9, 0
    multi_processor_count = 132
    regs_per_multiprocessor = 65536
    max_threads_per_multi_processor = 2048
    max_threads_per_block = 1024
    warp_size = 32
    total_memory = 143 * 10**9
    shared_memory_per_block = 49152
    shared_memory_per_block_optin = 232448
    shared_memory_per_multiprocessor = 233472
    L2_cache_size = 50 << 20
    gcnArchName = ""


class H200Driver:
    """What Triton asks of its driver while code is generated."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_stream(self, device: int = 0) -> int:
        return device


def pretend_h200() -> None:
    """Make torch, Inductor and Triton believe in an H200.

    For a process that generates code and does nothing else.
    """
    import torch._inductor.config as inductor
    import torch.utils._triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import reinplace
    from triton.runtime import driver

    def constant(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    for name, value in {
        "get_device_properties": H200, "current_device": 0, "device_count": 1, "is_available": True,
        "get_compute_capability": 90, "is_triton_capable": True, "get_raw_stream": 0,
    }.items():  # fmt: skip
        setattr(CudaInterface, name, staticmethod(constant(value)))
    CudaInterface.Worker.get_device_properties = staticmethod(constant(H200))  # type: ignore[assignment]
    CudaInterface.Worker.current_device = staticmethod(constant(0))  # type: ignore[method-assign]
    for name, value in {
        "get_device_properties": H200,
        "current_device": 0,
        "device_count": 1,
        "synchronize": None,
        "init": None,
        "get_device_capability": (9, 0),
        "is_initialized": False,
        "_lazy_init": None,
        "is_bf16_supported": True,
        "get_device_name": H200.name,
        "set_rng_state": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }.items():
        setattr(torch.cuda, name, constant(value))
    torch.version.cuda = "13.0"
    inductor.compile_threads = 1
    inductor.force_disable_caches = True
    torch.utils._triton.has_triton = constant(True)  # type: ignore[assignment]
    torch.utils._triton.triton_hash_with_backend = constant("none")  # type: ignore[assignment]
    reinplace._inplace_generalized_scatter = lambda tensor, _source, _views: tensor
    torch.Tensor.__invert__ = lambda tensor: torch.bitwise_not(
        tensor
    )  # ~ itself asks for the device's library
    driver.set_active(H200Driver())


@dataclass
class Generated:
    """What Inductor made of one graph."""

    code: str
    kernels: list[tuple[str, str, float]]  # (name, kind: fused, ours or library; bytes)
    saved: float = 0.0  # bytes of the forward graph's outputs beside the loss
    calls: dict[str, int] = field(default_factory=dict)

    def bytes_of(self, kind: str) -> float:
        return sum(size for _, k, size in self.kernels if k == kind)

    def count_of(self, kind: str) -> int:
        return sum(k == kind for _, k, _ in self.kernels)


class CodeGenerator:
    """Gives AOTAutograd's graphs to Inductor as if they ran on a GPU, and keeps what comes out."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = torch.device("cuda", 0)
        self.found: dict[str, Generated] = {}

    def compile(self, name: str, graph: Any, inputs: list[Tensor]) -> Any:
        """A compiler for `aot_function`: generates code for a copy of `graph`, and returns the
        graph itself.
        """
        from torch._functorch.aot_autograd import make_boxed_func
        from torch._inductor import compile_fx
        from torch._inductor.debug import DebugContext
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V

        moved = copy.deepcopy(graph)
        self._move(moved)
        compile_fx.view_to_reshape(moved)
        with torch.no_grad(), V.set_fake_mode(self.mode):
            compile_fx._recursive_post_grad_passes(moved, is_inference=False)
            fakes = [self._on_device(tensor) for tensor in inputs]
            lowering = GraphLowering(moved, example_inputs=fakes, is_backward=name == "backward")
            with (
                V.set_graph_handler(lowering),
                V.set_extern_kernel_nodes([]),
                V.set_debug_handler(DebugContext()),
            ):
                lowering.run(*fakes)
                code, _ = lowering.codegen()
                _, nodes, _ = lowering.count_bytes()
        kernels = [_kernel_of(node, 4.0 * quarter_bytes) for node, quarter_bytes in nodes]
        text = code.value if hasattr(code, "value") else str(code)
        targets = collections.Counter(
            str(node.target) for node in graph.graph.nodes if node.op == "call_function"
        )
        self.found[name] = Generated(text, kernels, _bytes_of_outputs(graph), dict(targets))
        return make_boxed_func(graph.forward)

    def partition(self, graph: Any, inputs: Any, **named: Any) -> Any:
        """The partition into forward and backward that `torch.compile` makes."""
        from torch._functorch.partitioners import min_cut_rematerialization_partition
        from torch._inductor import compile_fx
        from torch._inductor.virtualized import V

        with V.set_fake_mode(self.mode):
            compile_fx._recursive_joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **named)

    def _on_device(self, value: Any) -> Any:
        from torch._subclasses.fake_tensor import FakeTensor
        from torch.utils._python_dispatch import _disable_current_modes

        if not isinstance(value, FakeTensor) or value.device.type != "cpu":
            return value
        with _disable_current_modes():
            shape = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device="meta"
            )
        return FakeTensor(self.mode, shape, self.device)

    def _move(self, graph: Any) -> None:
        def device(value: Any) -> Any:
            return self.device if isinstance(value, torch.device) and value.type == "cpu" else value

        for node in graph.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(self._on_device, node.meta["val"])
            node.args = pytree.tree_map(device, node.args)
            node.kwargs = {key: device(value) for key, value in node.kwargs.items()}
        graph.recompile()


def _kernel_of(node: Any, size: float) -> tuple[str, str, float]:
    """Name, kind and bytes of one node of Inductor's schedule."""
    if "Extern" not in type(node).__name__:
        names = sorted(
            {
                str(origin.target).removeprefix("aten.")
                for n in node.get_nodes()
                for origin in n.node.get_origins()
            }
        )
        return (
            "fused " + ", ".join(name.removesuffix(".default") for name in names)[:70],
            "fused",
            size,
        )
    op = str(
        getattr(node.node, "op_overload", None)
        or getattr(node.node, "python_kernel_name", None)
        or type(node.node).__name__
    )
    return op, "ours" if "anew" in op else "library", size


def _bytes_of_outputs(graph: Any) -> float:
    """Bytes of what a graph returns and did not receive."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    values = [
        node.meta["val"]
        for node in output.args[0]
        if hasattr(node, "meta") and node.op != "placeholder"
    ]
    return float(sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor)))


@contextmanager
def gpu_paths(attention: str) -> Iterator[None]:
    """Make the model take the paths that it takes on a GPU, though its tensors are the CPU's."""
    import importlib

    import anew.model.gpt
    import anew.model.loss

    importlib.import_module("anew.model.kernels.cross_entropy")

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        if attention == "flash":
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[0]

    anew.model.loss.has_kernel = torch.compiler.assume_constant_result(lambda _: True)
    anew.model.gpt.is_on_gpu = lambda _: True
    anew.model.gpt.attend = attend
    is_compiling = torch.compiler.is_compiling
    torch.compiler.is_compiling = lambda: True
    yield
    torch.compiler.is_compiling = is_compiling


def generate(config: Any, micro_batch: int, attention: str) -> dict[str, Generated]:
    """The forward and the backward code of `micro_batch` sequences of a recipe."""
    from torch._functorch.aot_autograd import aot_function
    from torch._inductor.decomposition import select_decomp_table

    from anew import GPT

    generator = CodeGenerator()
    with gpu_paths(attention), generator.mode:
        model = GPT(config.model, torch.bfloat16, seed=None)
        ids = torch.zeros(micro_batch, config.data.seq_len, dtype=torch.int64)

        def loss_of(parameters: dict[str, Tensor], ids: Tensor, targets: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (ids, targets))

        compiled = aot_function(
            loss_of,
            fw_compiler=functools.partial(generator.compile, "forward"),
            bw_compiler=functools.partial(generator.compile, "backward"),
            partition_fn=generator.partition,
            decompositions=select_decomp_table(),
        )
        compiled(dict(model.named_parameters()), ids, ids).backward()
    return generator.found


def report(config: Any, micro_batch: int, found: dict[str, Generated]) -> dict[str, Any]:
    """Print the table; returns its figures."""
    from anew.model.flops import count_parameters, flops_per_token

    tokens = micro_batch * config.data.seq_len
    attention = (
        12 * config.model.n_layer * config.model.n_embd * (config.data.seq_len + 1) / 2 * tokens
    )
    products = flops_per_token(config.model, config.data.seq_len) * tokens - attention
    print(
        f"{config.recipe}, {micro_batch} x {config.data.seq_len} tokens, H200, torch "
        f"{torch.__version__}, Triton {triton.__version__}\n"
    )
    print(f"{'':<30}{'kernels':>8}{'GB':>8}")
    for name, graph in found.items():
        print(
            f"{name + ', fused by Inductor':<30}{graph.count_of('fused'):>8}"
            f"{graph.bytes_of('fused') / 1e9:>8.1f}"
        )
        if graph.count_of("ours"):
            print(
                f"{name + ', own kernels':<30}{graph.count_of('ours'):>8}"
                f"{graph.bytes_of('ours') / 1e9:>8.1f}"
            )
        print(f"{name + ', library calls':<30}{graph.count_of('library'):>8}")
    fused = sum(graph.bytes_of("fused") for graph in found.values())
    own = sum(
        size
        for graph in found.values()
        for name, kind, size in graph.kernels
        if kind == "ours" and "cross_entropy" not in name
    )
    loss = 2.0 * tokens * config.model.padded_vocab_size * 2  # read once and written once
    optimizer = OPTIMIZER_BYTES * count_parameters(config.model)
    print(f"\nbetween the products          {(fused + own) / 1e9:.1f} GB")
    print(f"the loss kernel               {loss / 1e9:.1f} GB")
    print(f"saved for the backward pass   {found['forward'].saved / 1e9:.1f} GB")
    least = (products + attention) / PEAK_TFLOPS + (fused + own + loss + optimizer) / PEAK_BYTES
    parts = {
        "matrix products": products / USUAL_PRODUCTS,
        "attention": attention / 3 / USUAL_ATTENTION["forward"]
        + 2 * attention / 3 * 1.25 / USUAL_ATTENTION["backward"],
        "between the products": (fused + own) / (USUAL_BANDWIDTH * PEAK_BYTES),
        "loss kernel": loss / (USUAL_LOSS_BANDWIDTH * PEAK_BYTES),
        "clipping and AdamW": optimizer / (USUAL_BANDWIDTH * PEAK_BYTES),
        "between the steps": BETWEEN_STEPS,
    }
    print("\nexpected, at the rates that such kernels usually reach:")
    for name, seconds in parts.items():
        print(f"  {name:<22}{1e3 * seconds:>8.1f} ms")
    usual = sum(parts.values())
    print(f"  {'a step of one pass':<22}{1e3 * usual:>8.1f} ms   {tokens / usual:,.0f} tokens/s")
    print(f"  {'at the ceilings':<22}{1e3 * least:>8.1f} ms   {tokens / least:,.0f} tokens/s")
    return {
        "recipe": config.recipe,
        "micro_batch": micro_batch,
        "fused_gb": fused / 1e9,
        "own_gb": own / 1e9,
        "loss_gb": loss / 1e9,
        "saved_gb": found["forward"].saved / 1e9,
        "kernels": sum(len(graph.kernels) for graph in found.values()),
        "expected_tokens_per_second": tokens / usual,
        "ceiling_tokens_per_second": tokens / least,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="gpt2-124m")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument(
        "--layers",
        type=int,
        default=0,
        help="another number of layers than the recipe's, to be faster",
    )
    parser.add_argument("--attention", choices=["cudnn", "flash"], default="cudnn")
    parser.add_argument(
        "--kernels",
        type=int,
        default=0,
        help="also list this many kinds of fused kernels, the most bytes first",
    )
    parser.add_argument("--code", type=Path, help="write the generated code into this folder")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logging.getLogger("torch").setLevel(logging.ERROR)
    import anew

    config = anew.recipe(arguments.recipe)
    if arguments.layers:
        config = config.override(n_layer=arguments.layers)
    pretend_h200()
    found = generate(config, arguments.micro_batch, arguments.attention)
    figures = report(config, arguments.micro_batch, found)
    for name, graph in found.items() if arguments.kernels else ():
        grouped: dict[tuple[str, int], int] = collections.Counter(
            (kernel, round(size / 1e6)) for kernel, kind, size in graph.kernels if kind != "library"
        )
        print(f"\n{name}: number x MB, and what is in the kernel")
        for (kernel, size), count in sorted(
            grouped.items(), key=lambda item: -item[0][1] * item[1]
        )[: arguments.kernels]:
            print(f"  {count:>3} x {size:>5}  {kernel}")
    if arguments.code:
        arguments.code.mkdir(parents=True, exist_ok=True)
        for name, graph in found.items():
            (arguments.code / f"{name}.py").write_text(graph.code, encoding="utf-8")
    if arguments.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
