"""All systems on all links: they take turns prompt by prompt, so that a busy spell of the machine hits all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from nearfar.bench.collab.energy import Meter
from nearfar.bench.collab.measure import Answer, System, ask
from nearfar.bench.collab.paced import Rate
from nearfar.bench.collab.prompts import prompts
from nearfar.bench.collab.routing import routing
from nearfar.bench.collab.summary import Figures, add_relative_cost, summary
from nearfar.bench.collab.systems import Files, Serving, oracle, serving, systems
from nearfar.chaos.profiles import Profile
from nearfar.chaos.proxy import running
from nearfar.errors import UsageError
from nearfar.sampling import Sampling
from nearfar.wire.messages import CodecId, CodecSpec

NAMES = (
    "device only",
    "cloud-only",
    "resend",
    "split",
    "lossy .8",
    "lossy .9",
    "lossy ids .8",
    "drafts ids",
    "lossless int8",
    "lossless fp16",
    "lossless ids",
)
ROUTED_AT = ("lossy .8", "lossy .9", "lossless int8", "lossless ids")  # whose cost a router may spend


def names_of(text: str | None) -> tuple[str, ...]:
    """Of `--systems`; cloud-only, which others are compared with, always runs.  Raises UsageError."""
    if text is None:
        return NAMES
    wanted = [name.strip() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in NAMES]:
        raise UsageError(f"--systems {unknown[0]!r}: expected some of {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in wanted or name == "cloud-only")


def compare(
    files: Files,
    rows_at: int,
    n_layers: int,
    links: Sequence[Profile],
    kinds: Sequence[str],
    wanted: Sequence[str],
    *,
    n_answers: int,
    max_tokens: int,
    device_rate: Rate | None,
    upper_rate: Rate | None,
    meter: Meter,
    dollars_per_hour: float | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """A row for each link, kind of prompt and system: its name, what `summary` says, and its cost beside cloud-only's.

    `rows_at`: the first layer of the upper half; `meter`: of energy; `dollars_per_hour`: of the upper machine, None
    where nobody says.
    """
    rows: list[dict[str, Any]] = []
    codecs = [CodecSpec(i) for i in (CodecId.FP16, CodecId.INT8_OS, CodecId.IDS)]
    right = _oracles(files, codecs, kinds, n_answers, max_tokens)
    with ExitStack() as stack:
        of_rows = stack.enter_context(serving(files.upper, upper_rate))
        of_ids = stack.enter_context(serving(files.full, upper_rate))
        for link in links:
            with ExitStack() as wires:
                ports = [wires.enter_context(running(("127.0.0.1", p), link, seed)) for p in (of_rows, of_ids)]
                urls = [f"grpc://{address[0]}:{address[1]}" for address in (p.address for p in ports)]
                every = systems(files, Serving(*urls), device_rate, rows_at, n_layers)
                chosen = [system for system in every if system.name in wanted]
                for kind in kinds:
                    if progress is not None:
                        progress(f"{link.name}, {kind}: {len(chosen)} systems, {n_answers} answers each")
                    runs = _take_turns(chosen, kind, n_answers, max_tokens, meter)
                    found = _figures(runs, chosen, right, kind, dollars_per_hour)
                    new = [{"link": link.name, "prompts": kind, "system": name, **facts} for name, facts in found]
                    add_relative_cost(new)
                    rows += new
    return rows


def _figures(
    runs: dict[str, list[Answer]],
    chosen: Sequence[System],
    right: dict[tuple[CodecId, str], list[Answer]],
    kind: str,
    dollars_per_hour: float | None,
) -> Iterator[tuple[str, Figures]]:
    """Of each system, then of a router at the cost of some of them."""
    full = right[CodecId.IDS, kind]
    for system in chosen:
        yield system.name, summary(runs[system.name], right[system.codec.id, kind], full, dollars_per_hour)
    if "device only" in runs:
        for name in ROUTED_AT:
            if name in runs:
                figures = routing(runs["device only"], runs["cloud-only"], runs[name], full, dollars_per_hour)
                yield f"routing ({name})", figures


def _take_turns(
    chosen: Sequence[System], kind: str, n_answers: int, max_tokens: int, meter: Meter
) -> dict[str, list[Answer]]:
    """The answers of each system by its name, behind one that does not count."""
    runs: dict[str, list[Answer]] = {system.name: [] for system in chosen}
    with ExitStack() as stack:
        opened = {system.name: stack.enter_context(system.open()) for system in chosen}
        *asked, warm_up = prompts(kind, n_answers + 1)
        for system in chosen:  # connections, the self-test of two builds that meet first, the pace of both sides
            ask(opened[system.name], system, warm_up, max_tokens, Sampling(), meter)
        for prompt in asked:
            for system in chosen:
                runs[system.name].append(ask(opened[system.name], system, prompt, max_tokens, Sampling(), meter))
    return runs


def _oracles(
    files: Files, codecs: Iterable[CodecSpec], kinds: Sequence[str], n_answers: int, max_tokens: int
) -> dict[tuple[CodecId, str], list[Answer]]:
    """What each answer should be, by codec and kind of prompt."""
    found = {}
    for codec in codecs:
        with oracle(files, codec) as llm:
            for kind in kinds:
                texts = [llm.generate(p, max_tokens=max_tokens, exits=False).ids for p in prompts(kind, n_answers)]
                found[codec.id, kind] = [Answer(ids, [0.0] * len(ids)) for ids in texts]
    return found
