"""`anew serve MODEL [MODEL...]`: a page on this machine to watch models write, and OpenAI's completions API for other programs."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from anew.checkpoint import huggingface as weights
from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer
from anew.utils import device as runtime

log = logging.getLogger("anew")
OWN_NAMES = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True)
class ServeArgs:
    """Serve models to a browser and to programs. Example: anew serve runs/demo gpt2"""

    models: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(help="runs, checkpoints, Hugging Face folders or hub names"),
    ]
    host: Annotated[
        str,
        tyro.conf.arg(help="address to listen on; only this machine unless it is said, as 0.0.0.0"),
    ] = "127.0.0.1"
    port: Annotated[int, tyro.conf.arg(help="port to listen on; 0: any that is free")] = 8000
    waiting: Annotated[
        int, tyro.conf.arg(help="requests that may wait while one is answered; more are refused")
    ] = 8
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps", "xpu"], tyro.conf.arg(help="where to compute")
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        tyro.conf.arg(help="auto: the fastest that is safe"),
    ] = "auto"
    int8: Annotated[
        bool, tyro.conf.arg(help="CPU: weights in 8 bits; faster, and changes the model a little")
    ] = False


def run_serve(argv: list[str]) -> None:
    """Serve models: a page to watch them write, and OpenAI's completions API."""
    a = tyro.cli(ServeArgs, args=argv, prog="anew serve")
    if not a.models:
        raise UserError("say which model: anew serve runs/NAME.")
    if not 0 <= a.port < 65536 or a.waiting < 0:
        raise UserError(
            f"port {a.port} is not from 0 to 65535."
            if a.waiting >= 0
            else f"waiting {a.waiting} cannot be negative."
        )
    try:
        from anew.serve.app import app
        from anew.serve.engine import Engine
    except ImportError as error:
        raise UserError(f"serving needs {error.name}; pip install -e '.[serve]'.") from error
    device = runtime.pick_device(a.device)
    precision, _ = runtime.pick_precision(a.precision, device)
    torch.set_float32_matmul_precision(runtime.MATMUL[precision])
    served = [_load(name, device, runtime.DTYPES[precision]) for name in dict.fromkeys(a.models)]
    hosts = OWN_NAMES if a.host in OWN_NAMES else set()
    _listen(app(Engine(served, a.waiting, a.int8), hosts), a.host, a.port)


def _load(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    from anew.serve.engine import Served

    path = weights.find(name)
    model = weights.load_model(path, device, dtype).eval()
    log.info(f"{name}: {path}")
    return Served(name, model, Tokenizer.of_model(Path(path), model.config.vocab_size))


def _listen(application: Any, host: str, port: int) -> None:
    """Until Ctrl-C or SIGTERM, which let the answers under way end."""
    import socket

    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port."
            ) from error
        address = f"[{host}]" if ":" in host else host
        listener.listen()  # whoever reads the address may come at once
        print(f"http://{address}:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=5, h11_max_incomplete_event_size=64 * 1024,
                                limit_concurrency=200)  # fmt: skip
        uvicorn.Server(config).run([listener])
