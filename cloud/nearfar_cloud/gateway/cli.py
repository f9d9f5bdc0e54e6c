"""`nearfar cloud serve`.  torch and the web server are imported when the verb runs, never before."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nearfar import env
from nearfar.arguments import whole
from nearfar.errors import FileError, MissingExtraError, UsageError
from nearfar.machine import cpu_name

if TYPE_CHECKING:
    from nearfar_cloud.gateway.endpoint import Endpoint
    from nearfar_cloud.gateway.served import Served

PORT, COLLAB_PORT = 8080, 9090
MAX_REGION = 64  # characters, as the protocol has it
T = TypeVar("T")


def add_serve(verbs: Any) -> None:
    """Add `serve` to the subparsers of `nearfar cloud`."""
    parser = verbs.add_parser(
        "serve",
        help="answer the OpenAI routes with a model, and devices that ask for its upper layers",
        description="Answer the OpenAI routes (chat, completions, responses, embeddings, models) with a model, and\n"
        "devices that ask for its upper layers. Tokens never depend on who else is being served. SIGTERM or Ctrl-C:\n"
        "nothing new is taken, what is under way is finished. Prompts are never logged.",
        epilog="examples:\n"
        "  nearfar cloud serve nano\n"
        "  nearfar cloud serve nano --collab-port 9090\n"
        "  nearfar cloud serve model.gguf --port 9000 --weights bf16\n"
        "  nearfar cloud serve folder/ --host 0.0.0.0 --key-file keys.json --tls-cert cert.pem --tls-key key.pem",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="nano, the path of a GGUF file, or a folder from Hugging Face")
    parser.add_argument("--name", help="what clients call the model (default: the file's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine alone)")
    parser.add_argument("--port", type=whole(0, 65535), default=PORT, help="0: any free one (default: %(default)s)")
    parser.add_argument("--key-file", metavar="FILE", help="keys and their limits; a must with other machines")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key, PEM")
    parser.add_argument(
        "--collab-port",
        type=whole(0, 65535),
        nargs="?",
        const=COLLAB_PORT,
        metavar="PORT",
        help=f"let devices ask (PORT: {COLLAB_PORT} unless given; 0: any free one); upper layers alone always do",
    )
    parser.add_argument("--collab-host", default="127.0.0.1", help="address for devices (default: this machine alone)")
    parser.add_argument("--client-ca", metavar="FILE", help="only devices with a certificate that this one signed, PEM")
    parser.add_argument("--region", default="", metavar="NAME", help="where this server is, for devices that mind")
    parser.add_argument(
        "--max-sessions", type=whole(1, 1 << 20), default=256, metavar="N", help="answers of devices (default: 256)"
    )
    parser.add_argument(
        "--session-memory", type=whole(1, 1 << 20), default=1024, metavar="MIB", help="their rows (default: 1024)"
    )
    parser.add_argument(
        "--session-keep", type=whole(1, 86_400), default=60, metavar="S", help="of a device that is away (default: 60)"
    )
    parser.add_argument(
        "--eager-absorb",
        action="store_true",
        help="run rows of devices before they ask, where steps have room: sooner answers, some work in vain",
    )
    parser.add_argument(
        "--weights",
        choices=("file", "bf16", "w8", "q8_0", "q4_0", "fp32"),
        help="as the GGUF file has them (default where the extension is built), a folder's rounded, or in torch",
    )
    parser.add_argument(
        "--kv",
        choices=("auto", "int8"),
        default="auto",
        help="keys and values: as the weights have them, or int8 (half the memory, other tokens; default: %(default)s)",
    )
    parser.add_argument(
        "--kv-memory", type=whole(1, 1 << 20), default=512, metavar="MIB", help="keys and values (default: 512)"
    )
    parser.add_argument(
        "--hidden-share",
        type=_share,
        metavar="LAYER,PERCENT",
        help="of that memory for rows of devices that enter at LAYER or above, which need none below (default: none)",
    )
    parser.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="compute everything anew, also what an earlier answer began with",
    )
    parser.add_argument(
        "--max-queued", type=whole(1, 1 << 20), default=1024, metavar="N", help="sequences at a time (default: 1024)"
    )
    parser.add_argument(
        "--grace", type=whole(0, 86_400), default=30, metavar="S", help="to finish what is under way (default: 30)"
    )
    parser.add_argument(
        "--keep",
        type=whole(0, 86_400),
        default=60,
        metavar="S",
        help="streams, for who lost the connection (default: 60)",
    )
    parser.add_argument("--threads", type=whole(1, 256), metavar="N", help="threads of the engine, or of all together")
    parser.add_argument(
        "--at-least",
        type=_pace,
        metavar="STEP,ROW",
        help="milliseconds that a step of n rows through all layers takes at least, STEP + n ROW: a slower machine",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, 256),
        metavar="N",
        help="engines, each in a process of its own (default: one in this)",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="the workers are actors of Ray, there or (without ADDRESS) of one started here",
    )
    parser.add_argument(
        "--learned", metavar="FILE", help="what steps cost: read at the start if it is there, written at the end"
    )
    parser.add_argument("--json", action="store_true", help="tell where it listens as a line of JSON")
    parser.set_defaults(run=run_serve)


def _pace(text: str) -> tuple[float, float]:
    """STEP,ROW in milliseconds -> seconds."""
    step, _, row = text.partition(",")
    try:
        pace = float(step) / 1000, float(row) / 1000
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two numbers, STEP,ROW in milliseconds") from None
    if not all(0 <= p < 100 for p in pace):
        raise argparse.ArgumentTypeError(f"{text}: expected 0 up to 100000 milliseconds")
    return pace


def _share(text: str) -> tuple[int, int]:
    """LAYER,PERCENT."""
    layer, _, percent = text.partition(",")
    try:
        share = int(layer), int(percent)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two whole numbers, LAYER,PERCENT") from None
    if share[0] < 1 or not 1 <= share[1] <= 99:
        raise argparse.ArgumentTypeError(f"{text}: expected a layer above 0, and 1..99 percent")
    return share


def run_serve(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    for package in ("torch", "fastapi", "uvicorn", "prometheus_client", *(("msgspec",) if args.workers else ())):
        if find_spec(package) is None:
            raise MissingExtraError(package, "cloud", "nearfar cloud serve")
    if args.ray is not None and not args.workers:
        raise UsageError("--ray places workers: --workers says how many")
    if args.workers and args.at_least is not None:
        raise UsageError("--at-least slows one engine down; with --workers there are several")
    if args.workers and args.learned is not None:
        raise UsageError("--learned keeps what one engine learns; with --workers there are several")
    if args.workers and args.hidden_share is not None:
        raise UsageError("--hidden-share is for rows of devices, who ask one engine: leave --workers out")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UsageError("--tls-cert and --tls-key: expected both or none")
    # Threads that wait at a barrier sleep instead of spinning; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from nearfar_cloud.gateway import server

    certificate = private_key = None
    if args.tls_cert is not None:
        certificate, private_key = Path(args.tls_cert), Path(args.tls_key)
        server.check_certificate(certificate, private_key)
    endpoint = None if args.collab_port is None else _endpoint(args, args.collab_port, certificate, private_key)
    with server.bind(args.host, args.port) as sock:
        local = server.is_loopback(sock)
        if not local and args.key_file is None:
            raise UsageError(f"--host {args.host} lets other machines in: --key-file has to say who may ask")
        if not local and certificate is None:
            print("nearfar: without --tls-cert the keys travel in the clear", file=sys.stderr)
        return _serve(args, sock, local, certificate, private_key, endpoint)


def _endpoint(args: argparse.Namespace, port: int, certificate: Path | None, private_key: Path | None) -> Endpoint:
    """Where devices may ask.  Raises UsageError for what would let in anybody, or cannot be had."""
    from nearfar_cloud.gateway import server
    from nearfar_cloud.gateway.endpoint import Endpoint

    if len(args.region) > MAX_REGION or not args.region.isprintable():
        raise UsageError(f"--region {args.region[:80]!r}: expected at most {MAX_REGION} characters, like eu-west")
    if find_spec("grpc") is None:
        raise MissingExtraError("grpcio", "cloud", "nearfar cloud serve --collab-port")
    if args.workers:
        raise UsageError("devices ask one engine: --collab-port and --workers do not go together")
    if args.client_ca is not None:
        if certificate is None:
            raise UsageError("--client-ca asks devices for certificates: --tls-cert has to give the server one, too")
        server.check_authority(Path(args.client_ca))
    with server.bind(args.collab_host, port, "--collab-host and --collab-port") as sock:
        if not server.is_loopback(sock):
            if certificate is None:
                raise UsageError(f"--collab-host {args.collab_host} lets other machines in: --tls-cert is a must")
            if args.key_file is None and args.client_ca is None:
                raise UsageError(
                    f"--collab-host {args.collab_host} lets other machines in: --key-file or --client-ca has to say "
                    "which devices may ask"
                )
    client_ca = None if args.client_ca is None else Path(args.client_ca)
    return Endpoint(args.collab_host, port, certificate, private_key, client_ca, args.region)


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator[Served]:
    """The model, in this process or in others, which end at the end."""
    import torch

    from nearfar_cloud.executors.paced import slow_down
    from nearfar_cloud.gateway.served import describe, open_served

    threads, kv_bytes = args.threads or env.threads(), args.kv_memory << 20
    if args.workers is None:
        if threads:
            torch.set_num_threads(threads)
        served = open_served(
            args.model,
            name=args.name,
            form=args.weights,
            kv=args.kv,
            kv_bytes=kv_bytes,
            prefix_cache=args.prefix_cache,
            hidden_share=args.hidden_share,
        )
        if args.at_least is not None:
            slow_down(served.engine, *args.at_least)
        yield served
        return

    from nearfar_cloud.gateway.workers import open_fleet

    described = describe(args.model, args.name, args.weights)
    if described.tokenizer is None:
        raise UsageError(f"{args.model} has upper layers alone, for devices, who ask one engine: leave --workers out")
    options = {"form": args.weights, "kv": args.kv, "kv_bytes": kv_bytes, "prefix_cache": args.prefix_cache}
    options |= {"threads": threads, "ray": args.ray}
    with open_fleet(args.model, args.workers, **options) as fleet:
        yield described.served_by(fleet)


@contextmanager
def _learning(served: Served, path: Path | None) -> Iterator[None]:
    """What steps cost comes from a file and goes there at the end; None: nothing is kept."""
    if path is None:
        yield
        return
    import torch

    from nearfar_cloud.engine import Engine

    assert isinstance(served.engine, Engine)  # or the option was refused
    cost, of = served.engine.cost, {"model": served.engine.facts.fingerprint, "machine": cpu_name()}
    of["threads"] = str(torch.get_num_threads())
    if path.exists() and not _from_file(path, lambda: cost.load(path, of)):
        print(f"nearfar: {path} is of another model or machine and will be written anew", file=sys.stderr)
    yield
    _from_file(path, lambda: cost.save(path, of))


def _serve(
    args: argparse.Namespace,
    sock: Any,
    local: bool,
    certificate: Path | None,
    private_key: Path | None,
    endpoint: Endpoint | None,
) -> int:
    from nearfar_cloud.gateway import server
    from nearfar_cloud.gateway.app import Gateway
    from nearfar_cloud.gateway.endpoint import Budget
    from nearfar_cloud.gateway.limits import Keys

    keys = None if args.key_file is None else Keys.read(args.key_file)
    host, port = sock.getsockname()[:2]
    url = f"{'https' if certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{port}/v1"
    with _opened(args) as served, _learning(served, None if args.learned is None else Path(args.learned)):
        if endpoint is None and served.tokenizer is None:  # nobody else can ask upper layers
            endpoint = _endpoint(args, COLLAB_PORT, certificate, private_key)
        budget = Budget(
            args.max_sessions, args.session_memory << 20, idle_s=args.session_keep, eager_absorb=args.eager_absorb
        )
        gateway = Gateway(
            served, keys=keys, max_queued=args.max_queued, kept_s=args.keep, endpoint=endpoint, budget=budget
        )

        def started() -> None:
            facts = {"url": url, "model": served.name, "context": served.n_ctx, "blocks": served.engine.n_blocks}
            said = [] if served.tokenizer is None else [f"{served.name} answers at {url}"]
            if gateway.collab is not None:
                facts["collab"] = gateway.collab.url
                said.append(f"devices ask {served.name} at {gateway.collab.url}")
            print(json.dumps(facts) if args.json else f"{', '.join(said)}; Ctrl-C stops", flush=True)

        return server.serve(
            server.Server(
                gateway,
                local=local,
                grace_s=args.grace,
                certificate=certificate,
                private_key=private_key,
                on_started=started,
            ),
            sock,
        )


def _from_file(path: Path, call: Callable[[], T]) -> T:
    """Raises FileError where the system says OSError."""
    try:
        return call()
    except OSError as error:
        raise FileError(
            f"{path}: {error.strerror or error}; --learned names a file that can be read and written"
        ) from None
