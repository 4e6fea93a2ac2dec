"""`anew serve MODEL [MODEL...]`: a page that shows models at work, and OpenAI's APIs.

anew serve runs/demo gpt2
"""

import logging
import socket
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from anew.checkpoint.huggingface import find_model
from anew.cli.parse import parse
from anew.cli.sample import Device, Precision, open_model
from anew.errors import UserError, missing_packages
from anew.tokenizer.chat import is_chat_model

log = logging.getLogger("anew")
OWN_NAMES = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True)
class ServeArgs:
    """Serve models to a browser and to programs. Example: anew serve runs/demo gpt2"""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL ...")]
    """runs, checkpoints, Hugging Face folders or hub names"""
    host: str = "127.0.0.1"
    """address to listen on; the default is reachable from this machine only"""
    port: int = 8000
    """port to listen on; 0: any free port"""
    waiting: int = 8
    """requests that may wait while two are answered; more are refused"""
    device: Device = "auto"
    """where to compute"""
    precision: Precision = "auto"
    """auto: the fastest that is safe"""
    int8: bool = False
    """CPU: weights in 8 bits, which is faster and changes the model a little"""


def run_serve(argv: list[str]) -> None:
    """Serve models: a page that shows them at work, and OpenAI's APIs."""
    args = parse(ServeArgs, argv, "serve")
    if not args.models:
        raise UserError("say which model: anew serve runs/NAME.")
    if args.waiting < 0:
        raise UserError(f"waiting {args.waiting} cannot be negative.")
    if not 0 <= args.port < 65536:
        raise UserError(f"port {args.port} is not from 0 to 65535.")
    try:
        from anew.serve.app import app
        from anew.serve.engine import Engine, Served
    except ImportError as error:
        raise missing_packages("anew serve", "fastapi", "uvicorn") from error
    served = []
    for name in dict.fromkeys(args.models):
        path = find_model(name)
        log.info(f"{name}: {path}")
        model, tokenizer = open_model(path, args.device, args.precision)
        served.append(Served(name, model, tokenizer, is_chat_model(path)))
    hosts = OWN_NAMES if args.host in OWN_NAMES else set()
    _listen(app(Engine(served, args.waiting, args.int8), hosts), args.host, args.port)


def _listen(application: Any, host: str, port: int) -> None:
    """Answer requests until Ctrl-C or SIGTERM; answers that have begun are finished first."""
    import uvicorn

    from anew.serve.connections import (
        CONNECTIONS_BEFORE_REPLACEMENT,
        MAX_HEADER_BYTES,
        BoundedConnection,
    )

    is_ipv6 = ":" in host
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port."
            ) from error
        # Whoever reads the printed address may connect at once.
        listener.listen()
        address = f"[{host}]" if is_ipv6 else host
        print(f"http://{address}:{listener.getsockname()[1]}", flush=True)
        # asyncio warns of each client that leaves while its answer is written.
        logging.getLogger("asyncio").setLevel(logging.ERROR)
        config = uvicorn.Config(
            application,
            log_level="error",
            http=BoundedConnection,
            ws="none",
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            limit_concurrency=2 * CONNECTIONS_BEFORE_REPLACEMENT,
        )
        uvicorn.Server(config).run([listener])
