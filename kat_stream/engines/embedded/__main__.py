"""`python -m kat_stream.engines.embedded --model-path DIR --port P`: one engine as a process of its own.

Owns the process: it serves until SIGINT or SIGTERM, then ends its requests with an error and leaves with status 0.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from kat_stream.engines.embedded import start_engine
from kat_stream.engines.embedded.kv import DENSE_POOLS
from kat_stream.engines.embedded.runner import DTYPES


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kat_stream.engines.embedded", description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True, help="Hugging Face directory with safetensors")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one, which is printed")
    parser.add_argument("--served-model-name", default="policy")
    slots = f"slots of keys and values; rows for decoding take the memory of up to {DENSE_POOLS} times as many"
    parser.add_argument("--max-total-tokens", type=int, default=65536, help=slots)
    parser.add_argument("--max-running-requests", type=int, default=128)
    parser.add_argument("--weight-version", default="default")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of weights, keys and values")
    parser.add_argument("--enable-return-routed-experts", action="store_true", help="record the routing of experts")
    return parser.parse_args()


async def _serve(args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await start_engine(
        args.model_path, host=args.host, port=args.port, model_name=args.served_model_name,
        max_total_tokens=args.max_total_tokens, max_running=args.max_running_requests,
        weight_version=args.weight_version, threads=args.threads,
        dtype=args.dtype, record_routing=args.enable_return_routed_experts,
    )  # fmt: skip
    sys.stdout.write(f"engine: {args.served_model_name} at {server.url}\n")
    sys.stdout.flush()
    await stop.wait()
    await server.close()


if __name__ == "__main__":
    asyncio.run(_serve(_arguments()))
