"""How often a device's drafts hold, and what that is worth on a link, for several ways to draft; without a network.

python bench/collab_acceptance.py
python bench/collab_acceptance.py --temperatures 0 --answers 6 --rtt 120

The whole model (the oracle of answers that travel as ids) continues the prompts of `nearfar bench collab`; then each
drafter says, at every position of that text, what it would have drafted.  `holds` is the share that equals the
oracle's token, drawn with the same noise: the `a` of pace.expected_tokens.  It is not the bench's column "accepted",
which also counts as refused whatever was drafted behind a wrong draft while its verdict was under way.

`asks` and `s` are of the loop of collab.py at stated rates (those of the bench), with three rules of when to ask: at
every draft that is not sure; when the drafts that nobody has looked at are likely wrong, as lossless mode does
(`loop`); or only when the window is full.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from line import machine
from nearfar.bench.collab.paced import Rate
from nearfar.bench.collab.prompts import prompts
from nearfar.cli.verbs import SHIPPED, model_path
from nearfar.collab import WORTH
from nearfar.config import ExitConfig
from nearfar.engine import Engine
from nearfar.exit import DRAFT, confidence, max_softmax
from nearfar.llm import LLM
from nearfar.lower import Lower
from nearfar.pace import Pace, expected_tokens
from nearfar.sampling import Sampling, sample
from nearfar_cloud.scheduling.propose import NGram

Rows = NDArray[np.float32]

DEVICE, UPPER = Rate(30, 0.3), Rate(37, 0.4)  # of `nearfar bench collab`
IN_FLIGHT = 2  # of Collab
RULES = {"unsure": 1.0, "loop": WORTH, "full": 0.0}  # least probability that drafts hold with which drafting goes on
TAUS = (0.97, DRAFT, 0.8)  # above which a lower exit's confidence ends a draft
LOOKUP = 1.0  # confidence of a draft that was looked up: text that repeats


@dataclass(frozen=True, slots=True)
class Text:
    """One answer of the whole model, T tokens, and its rows at the inputs of layers, each [T, D]."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    rows: dict[int, Rows]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Drafts:
    """Of one text: which drafts hold, bool [T], which the device is sure of, bool [T], and how sure, f64 [T].

    `early`, bool [T]: which stopped at the lower exit; None: none did.
    """

    holds: NDArray[np.bool_]
    sure: NDArray[np.bool_]
    conf: NDArray[np.float64]
    early: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """Seconds: a draft, what one that stops early saves, and from an ask to its verdict.

    The last takes `reply_s` and `row_s` for each draft in it.
    """

    draft_s: float
    reply_s: float
    row_s: float
    saved_s: float = 0.0


Drafter = Callable[[Text], Drafts]


def texts(llm: LLM, kind: str, n: int, sampling: Sampling, max_tokens: int) -> list[Text]:
    """What full depth says behind the prompts, each with a seed of its own."""
    assert isinstance(llm.stepper, Engine)
    lower, found = llm.stepper.lower, []
    for i, prompt in enumerate(prompts(kind, n)):
        one = Sampling(sampling.temperature, seed=sampling.seed + i)
        ids, done = llm._ids(prompt), llm.generate(prompt, max_tokens=max_tokens, exits=False, sampling=one)
        found.append(Text(tuple(ids), tuple(done.ids), rows_of(lower, [*ids, *done.ids], len(ids)), one))
    return found


def rows_of(lower: Lower, ids: Sequence[int], n_prompt: int) -> dict[int, Rows]:
    """The rows behind each layer, of the positions whose next token belongs to the answer."""
    x = np.asarray(ids[:-1], np.int32)
    h, kv, rows = lower.embed(x), lower.new_kv(len(x)), {}
    for layer in range(lower.config.n_layers):
        h = lower.forward(h, kv, layer, layer + 1)
        rows[layer + 1] = h[n_prompt - 1 :]
    return rows


def by_head(lower: Lower, layer: int, head: str) -> Drafter:
    """The head `head` on the rows behind `layer`; an exit is sure above its threshold."""
    e = next((e for e in lower.config.exits if head == f"exit.{e.layer}"), None)
    tau = 0.8 if e is None or e.tau == 1 else e.tau

    def drafts(text: Text) -> Drafts:
        logits = lower.logits(np.ascontiguousarray(text.rows[layer]), head)
        said = np.array([pick(z, text, i) for i, z in enumerate(logits)])
        conf = np.array([_conf(z, e) for z in logits])
        return Drafts(said == np.array(text.ids), conf > tau, conf)

    return drafts


def _conf(logits: Rows, e: ExitConfig | None) -> float:
    return max_softmax(logits) if e is None else confidence(logits, e)


def pick(logits: Rows, text: Text, i: int) -> int:
    """The token at position `i` of the answer, with the noise of that position."""
    return sample(logits, text.sampling, position=len(text.prompt) + i)


def by_lookup(text: Text) -> Drafts:
    """What followed the same ids earlier in prompt and answer; where nothing repeats, no draft, which holds nothing."""
    found = [NGram().propose((*text.prompt, *text.ids[:i]), 1) for i in range(len(text.ids))]
    holds = np.array([f == [t] for f, t in zip(found, text.ids, strict=True)])
    sure = np.array([bool(f) for f in found])
    return Drafts(holds, sure, sure.astype(np.float64))


def lower_exit_first(low: Drafter, high: Drafter, tau: float) -> Drafter:
    """`low`'s draft where its confidence is above `tau`, `high`'s elsewhere: as greedy lossless mode does."""

    def drafts(text: Text) -> Drafts:
        a, b = low(text), high(text)
        early = a.conf > tau
        return Drafts(
            *(np.where(early, x, y) for x, y in ((a.holds, b.holds), (a.sure, b.sure), (a.conf, b.conf))), early
        )

    return drafts


def looked_up_where_unsure(other: Drafter) -> Drafter:
    """`other`, and where it is not sure the text so far, if it repeats."""

    def drafts(text: Text) -> Drafts:
        a, b = other(text), by_lookup(text)
        use = ~a.sure & b.sure
        return Drafts(np.where(use, b.holds, a.holds), a.sure, a.conf)

    return drafts


class Way(NamedTuple):
    """How drafts are made, the share of the layers that one costs, and the share that one which stops early saves."""

    share: float
    drafts: Drafter
    saved: float = 0.0


def ways(lower: Lower, k: int) -> dict[str, Way]:
    """Those that are compared, by name; the device has `k` layers."""
    c = lower.config
    at = {e.layer: Way(e.layer / c.n_layers, by_head(lower, e.layer, f"exit.{e.layer}")) for e in c.exits}
    found = {f"exit {layer}": way for layer, way in at.items()}
    for layer in range(k + 1, c.n_layers):
        if layer not in at:
            found[f"layer {layer}, the final head"] = Way(layer / c.n_layers, by_head(lower, layer, "final"))
    cut = at.get(k) or Way(k / c.n_layers, by_head(lower, k, "final"))
    for e in c.exits:
        if e.layer < k and e.isotonic_x:
            for tau in TAUS:
                first = lower_exit_first(at[e.layer].drafts, cut.drafts, tau)
                found[f"exit {e.layer} above {tau:g}, or {k}"] = Way(cut.share, first, cut.share - at[e.layer].share)
    found["text so far"] = Way(0.0, by_lookup)
    found[f"exit {k}, unsure: text so far"] = Way(cut.share, looked_up_where_unsure(cut.drafts))
    return found


# ---------------------------------------------------------------- the loop of collab.py, with a clock of its own


@dataclass(slots=True)
class Spent:
    """What one answer took."""

    asks: int = 0
    seconds: float = 0.0
    drafted: int = 0
    dropped: int = 0


def play(d: Drafts, link: Link, window: int, worth: float) -> Spent:
    """One answer: draft, ask, and drop what stands behind a wrong draft.  `worth`: as in collab.py.

    0 .. final .. asked .. drafted .. T      final: nobody changes it; asked: a verdict is under way
    """
    n_tokens, spent = len(d.holds), Spent()
    final = asked = drafted = 0
    is_behind = False
    hope, under_way = 1.0, list[tuple[float, int, int]]()  # (when the verdict is there, first draft, one behind)
    while final < n_tokens:
        if under_way and under_way[0][0] <= spent.seconds:
            _, first, end = under_way.pop(0)
            wrong = next((i for i in range(first, min(end + 1, n_tokens)) if not d.holds[i]), n_tokens)
            if wrong < min(end, drafted) or wrong == end < drafted:  # the verdict's own token is that of `end`
                spent.dropped += drafted - wrong
                under_way, hope = [], 1.0
                asked = drafted = wrong + 1
            final = min(wrong, end) + 1
            asked, drafted = max(asked, final), max(drafted, final)
            continue
        n, may_draft = drafted - asked, drafted < n_tokens and drafted - final < IN_FLIGHT * window
        due = n >= window or not may_draft or hope < worth
        if len(under_way) < IN_FLIGHT and due and (n or not under_way):
            if is_behind:  # the layers that the last draft left out
                spent.seconds, is_behind = spent.seconds + link.saved_s, False
            there = spent.seconds + link.reply_s + n * link.row_s
            under_way.append((max(there, under_way[-1][0] if under_way else 0.0), asked, drafted))
            asked, hope, spent.asks = drafted, 1.0, spent.asks + 1
        elif may_draft:
            is_behind = d.early is not None and bool(d.early[drafted])
            spent.seconds += link.draft_s - is_behind * link.saved_s
            hope *= 1.0 if d.sure[drafted] else float(d.conf[drafted])
            drafted, spent.drafted = drafted + 1, spent.drafted + 1
        else:
            spent.seconds = under_way[0][0]
    return spent


def paced_window(accepted: float, link: Link) -> int:
    """The window that pace.py settles on."""
    return Pace(accepted, link.draft_s, link.reply_s).window()


def row(name: str, drafts: Sequence[Drafts], link: Link) -> dict[str, Any]:
    """What one way to draft comes to over some texts."""
    n_tokens = sum(len(d.holds) for d in drafts)
    accepted = float(np.concatenate([d.holds for d in drafts]).mean())
    early = float(np.concatenate([np.zeros(0) if d.early is None else d.early for d in drafts]).sum()) / n_tokens
    n = paced_window(accepted, replace(link, draft_s=link.draft_s - early * link.saved_s))
    facts: dict[str, Any] = {"drafts": name, "holds": accepted, "window": n}
    facts["sure"] = float(np.concatenate([d.sure for d in drafts]).mean())
    facts["expected_asks"] = 1 / expected_tokens(accepted, n)
    for rule, worth in RULES.items():
        played = [play(d, link, n, worth) for d in drafts]
        facts[f"asks_{rule}"] = sum(p.asks for p in played) / n_tokens
        facts[f"s_{rule}"] = sum(p.seconds for p in played) / len(played)
        facts[f"accepted_{rule}"] = 1 - sum(p.dropped for p in played) / max(1, sum(p.drafted for p in played))
    return facts


def show(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts), flush=True)
        return
    cells = "holds {holds:.3f}  sure {sure:.2f}  window {window:2d} (expected asks {expected_asks:.2f})"
    for rule in RULES:
        cells += f"  | {rule}: asks {{asks_{rule}:.2f}}  {{s_{rule}:.2f}} s  accepted {{accepted_{rule}:.2f}}"
    print("{prompts:4} T={temperature:g} {drafts:24} ".format_map(facts) + cells.format_map(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED, help="a whole GGUF file with exits (default: the shipped model)")
    parser.add_argument("--at", type=int, help="cut before this layer (default: the last exit)")
    parser.add_argument("--prompts", default="home,text", metavar="KINDS")
    parser.add_argument("--temperatures", default="0,1", metavar="T,T")
    parser.add_argument("--answers", type=int, default=8, help="of each kind and temperature (default 8)")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most (default 48)")
    parser.add_argument("--rtt", type=float, default=50.0, metavar="MS", help="of the link (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    args = parser.parse_args()
    started = time.perf_counter()
    with LLM.open(Path(model_path(args.model)), threads=1) as llm:
        assert isinstance(llm.stepper, Engine)
        lower, c = llm.stepper.lower, llm.config
        k = args.at or c.exits[-1].layer
        above = (c.n_layers - k) / c.n_layers  # the share of the layers that rows pass beyond the cut
        for kind in args.prompts.split(","):
            for t in map(float, args.temperatures.split(",")):
                found = texts(llm, kind, args.answers, Sampling(t, seed=args.seed), args.tokens)
                n_tokens = sum(len(text.ids) for text in found)
                alone = args.rtt / 1000 + sum((UPPER.step_ms + UPPER.row_ms) * len(x.ids) / 1000 for x in found) / len(
                    found
                )
                for name, way in ways(lower, k).items():
                    reply = (args.rtt + above * (UPPER.step_ms + UPPER.row_ms)) / 1000
                    whole_s = (DEVICE.step_ms + DEVICE.row_ms) / 1000
                    link = Link(way.share * whole_s, reply, above * UPPER.row_ms / 1000, way.saved * whole_s)
                    facts = {"prompts": kind, "temperature": t, "tokens": n_tokens, "cloud_only_s": alone}
                    show(facts | row(name, [way.drafts(text) for text in found], link), as_json=args.json)
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
