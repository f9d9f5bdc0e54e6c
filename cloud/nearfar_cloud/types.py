"""What flows through the core: requests, their state, the plan of a step.  Imports no torch.

A sequence has `n_known` positions and has computed some of them; a step runs a part of the gap.  There is no flag for
prefill or decode: a prompt is a wide gap, a next token a gap of one, the check of j drafts a gap of 1 + j, a resumed
sequence a gap over what it had computed before.

    known      |  prompt ids ............. | generated |      drafts lie behind, they are not known
    computed   |  layers [0, L) done ...... >
                              a Work runs [start, start + n) through layers [first, last)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import UsageError
from nearfar.sampling import Sampling
from nearfar_cloud.outside import Outside, Question, RowPieces, RowStore

Array = NDArray[np.float32]
Finish = Literal["stop", "length", "abort", "error"]


class LayerRange(NamedTuple):
    """Layers [first, last)."""

    first: int
    last: int

    @property
    def n(self) -> int:
        return self.last - self.first


class Status(Enum):
    """Where the memory of a sequence is, never which phase it is in."""

    WAITING = auto()  # holds no blocks
    RUNNING = auto()  # its computed positions lie in blocks
    SWAPPED = auto()  # they lie in a tier
    DONE = auto()


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request is promised, and whose it is.  Seconds; None: no limit."""

    ttft_s: float | None = None  # to the first token
    tbt_s: float | None = None  # between tokens
    deadline_s: float | None = None  # to the end, from arrival
    priority: int = 0  # higher goes first
    tenant: str = ""  # of the key that the request came with, never of its body


@dataclass(frozen=True, slots=True)
class Request:
    """One text to continue: `ids` of its beginning.

    `outside`: all positions come from outside (`Engine.append`, or with this request), and nothing runs until somebody
    asks (`Engine.ask`); it never ends by itself.  They are ids, or `rows` that enter above the first layer, at `entry`.
    Raises UsageError for what no engine can serve.
    """

    ids: tuple[int, ...] = ()
    rows: RowStore | None = None
    entry: int = 0
    outside: bool = False
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    n_logprobs: int = 0  # the likeliest tokens whose log-probabilities are told with each token
    pooled: bool = False  # the mean of the last rows of all positions is told too (embeddings)
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self) -> None:
        if (self.entry and not self.outside) or (self.ids if self.entry else self.rows is not None):
            raise UsageError("a request has either ids, or rows from outside and the layer they enter at")
        if not self.ids and not self.outside:
            raise UsageError("an empty prompt: expected at least one position")
        if self.entry and self.sampling.repetition_penalty != 1:
            raise UsageError("a repetition penalty needs the ids of the text: rows come without them")
        if self.outside and (self.n_logprobs or self.pooled):
            raise UsageError("an outside sequence tells no log-probabilities and no mean of its rows")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens={self.max_tokens}: expected 1 or more")
        if not 0 <= self.n_logprobs <= 20:
            raise UsageError(f"n_logprobs={self.n_logprobs}: expected 0..20")
        if self.pooled and self.max_tokens != 1:
            raise UsageError("pooled: expected max_tokens=1")


class Facts(NamedTuple):
    """How a sequence was served."""

    queue_s: float  # from arrival to its first memory, or to its end without any
    cached: int
    drafted: int
    accepted: int
    preempted: int


@dataclass(slots=True)
class Stage:
    """Layers of a sequence and how many positions they have computed."""

    layers: LayerRange
    computed: int = 0


@dataclass(slots=True)
class Seq:
    """All state of a request; owned by the thread of the engine, read by policies.

    `stages` lead from `entry` to the last layer: one stage, unless a plan cut the model.  Computed never rises along
    the list; rows that the lower stages have run and the upper ones have not are parked in the executor.
    """

    id: int
    req: Request
    arrival: float  # of an outside sequence: when what it is asked now was asked
    n_layers: int
    ids: list[int]  # prompt and decided tokens; all that came from outside
    outside: Outside | None = None
    stages: list[Stage] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)  # what may follow the known positions
    blocks: list[int] = field(default_factory=list)
    n_published: int = 0  # leading blocks that the prefix cache knows
    status: Status = Status.WAITING
    n_out: int = 0  # tokens decided
    n_begun: int = 0  # leading positions of the prompt that layers have run at least once
    n_cached: int = 0  # positions that the prefix cache had at the last admission
    n_preempted: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    admitted: float | None = None  # when it first got memory
    first_token: float | None = None
    last_token: float | None = None
    hook: LogitsHook | None = None

    @classmethod
    def new(cls, id_: int, req: Request, n_layers: int, arrival: float) -> Seq:
        s = cls(id_, req, arrival, n_layers, list(req.ids))
        if req.outside:
            s.outside = Outside()
            if req.entry:
                s.outside.rows = RowPieces(*(() if req.rows is None else (req.rows,)))
        s.reset()
        return s

    @property
    def n_positions(self) -> int:
        """Positions that are there."""
        return len(self.text)

    @property
    def text(self) -> list[int] | RowPieces:
        """What the positions are: ids, or rows."""
        return self.ids if self.outside is None or self.outside.rows is None else self.outside.rows

    @property
    def question(self) -> Question | None:
        """What an outside sequence is asked now."""
        return None if self.outside is None else self.outside.question

    @property
    def is_idle(self) -> bool:
        """Whether it does nothing until somebody asks."""
        return self.outside is not None and self.outside.question is None

    @property
    def n_early(self) -> int:
        """Positions that may run though nobody asks: each once, whatever becomes of it.

        The newest one waits: most questions are about it, and then it would have to run again for its logits.
        """
        o = self.outside
        if o is None or o.question is not None or self.n_parked or self.status is Status.SWAPPED:
            return 0
        end = min(o.early_end, self.n_positions - 1)
        return max(0, end - self.computed) if self.computed >= self.n_begun else 0

    @property
    def n_known(self) -> int:
        """Positions whose input is decided; of an outside sequence those of them that somebody asks about."""
        if self.outside is None:
            return len(self.ids)
        n_known = self.outside.n_known
        return self.computed if n_known is None else n_known

    @property
    def n_prompt(self) -> int:
        """Positions that came from outside; of an outside sequence those of them that somebody has asked about."""
        return len(self.req.ids) if self.outside is None else max(self.n_begun, self.n_known + len(self.drafts))

    @property
    def computed(self) -> int:
        """Positions that all layers have run."""
        return self.stages[-1].computed

    @property
    def reached(self) -> int:
        """Positions that any layer has run: what its blocks have to hold."""
        return self.stages[0].computed

    @property
    def n_parked(self) -> int:
        """Rows that some layers have run and others have not: they take memory, too."""
        return self.reached - self.computed

    @property
    def n_reserved(self) -> int:
        """Positions that the sequence may come to: what it needs to finish."""
        if self.outside is None:
            return self.n_known + self.req.max_tokens - self.n_out
        question = self.question
        return self.n_known + len(self.drafts) + (0 if question is None else question.run - 1)

    def facts(self, now: float) -> Facts:
        """So far."""
        admitted = now if self.admitted is None else self.admitted
        return Facts(admitted - self.arrival, self.n_cached, self.n_drafted, self.n_accepted, self.n_preempted)

    def reset(self) -> None:
        """Nothing is computed."""
        self.stages = [Stage(LayerRange(self.req.entry, self.n_layers))]

    def truncate(self, n: int) -> None:
        """Only the first `n` positions count as computed."""
        if self.reached <= n:
            return
        for stage in self.stages:
            stage.computed = min(stage.computed, n)
        self._join()

    def gap(self) -> Work | None:
        """The rows that could run next: of the uppermost stage that has rows waiting; None if nothing is to do."""
        n_known, found = self.n_known, None
        ready = n_known + len(self.drafts)
        for stage in self.stages:
            if stage.computed < ready:
                found = stage, ready
            ready = stage.computed
        if found is None or found[0].computed >= n_known:
            return None  # drafts alone tell nothing
        stage, ready = found
        decides = ready >= n_known and stage.layers.last == self.n_layers
        sample = ready - n_known + 1 if decides else 0
        return Work(self.id, stage.computed, ready - stage.computed, stage.layers, sample)

    def advance(self, work: Work) -> None:
        """`work` has been run; stages are cut where it began and ended inside one."""
        if len(self.stages) == 1 and self.stages[0].layers == work.layers:  # nothing to cut or to join
            assert self.stages[0].computed == work.start, (self, work)
            self.stages[0].computed += work.n
            return
        for at in work.layers:
            for i, stage in enumerate(self.stages):
                first, last = stage.layers
                if first < at < last:
                    upper = Stage(LayerRange(at, last), stage.computed)
                    self.stages[i : i + 1] = [Stage(LayerRange(first, at), stage.computed), upper]
                    break
        for stage in self.stages:
            if work.layers.first <= stage.layers.first and stage.layers.last <= work.layers.last:
                assert stage.computed == work.start, (self, work)
                stage.computed = work.start + work.n
        self._join()

    def begin(self, work: Work) -> int:
        """`work` has been run; how many rows of the prompt nothing had run before."""
        begun, n_prompt = self.n_begun, self.n_prompt
        if begun == n_prompt:
            return 0
        self.n_begun = max(begun, min(work.end, n_prompt))
        return max(0, self.n_begun - max(begun, work.start))

    def _join(self) -> None:
        """Neighbours with equally many positions are one stage."""
        joined = [self.stages[0]]
        for stage in self.stages[1:]:
            if stage.computed == joined[-1].computed:
                joined[-1] = Stage(LayerRange(joined[-1].layers.first, stage.layers.last), stage.computed)
            else:
                joined.append(stage)
        self.stages = joined


class Work(NamedTuple):
    """Run positions [start, start + n) of a sequence through some layers; the last `sample` rows decide tokens."""

    seq: int
    start: int
    n: int
    layers: LayerRange
    sample: int

    @property
    def end(self) -> int:
        return self.start + self.n

    def rows(self, n_layers: int) -> int:
        """As rows through all layers, rounded up: what it takes of a step's budget."""
        first, last = self.layers
        return -(-self.n * (last - first) // n_layers)

    def narrowed(self, s: Seq, n: int | None = None, last_layer: int | None = None) -> Work:
        """At most `n` rows, up to layer `last_layer`: what a policy may make of it."""
        layers = LayerRange(self.layers.first, min(last_layer or self.layers.last, self.layers.last))
        return self._replace(n=self.n if n is None else min(n, self.n), layers=layers).with_sample(s)

    def with_sample(self, s: Seq) -> Work:
        """With the rows that decide: those from the last known position on, if they reach the last layer."""
        whole = self.layers.last == s.n_layers and self.end >= s.n_known
        return self._replace(sample=self.end - s.n_known + 1 if whole else 0)


class Admit(NamedTuple):
    """Give a waiting sequence memory: `cached` leading blocks come from the prefix cache, none of them is computed."""

    seq: int
    cached: tuple[int, ...] = ()


class Preempt(NamedTuple):
    """Take the memory of a running sequence; what it had is computed again, or copied to a tier and back."""

    seq: int
    how: Literal["recompute", "swap"]


class SwapIn(NamedTuple):
    """Copy a swapped sequence back."""

    seq: int


KVOp = Admit | Preempt | SwapIn


class StepPlan(NamedTuple):
    """The whole language between policies and the engine: memory first, in order, then one pass."""

    works: tuple[Work, ...] = ()
    kv_ops: tuple[KVOp, ...] = ()


class Served(NamedTuple):
    """What became of one work of a step: policies learn from it."""

    seq: Seq  # as it is after the step
    work: Work
    n_prompt: int  # rows of its prompt that no step had run before
    n_decided: int  # tokens told
    n_accepted: int  # drafts that held


class Logprobs(NamedTuple):
    """Of one token: its own log-probability, and the likeliest tokens with theirs; before temperature and filters."""

    own: float
    top: tuple[tuple[int, float], ...]


class Answer(NamedTuple):
    """To a question (`Engine.ask`): the first `n_accept` ids of the output are drafts, from position `pos0` on."""

    req: int
    pos0: int
    n_accept: int
    margin: float  # between the two largest logits of the row that decided the last id
    microseconds: int  # of the steps that ran a part of it
    hidden: Array | None = None  # f32 [D]: that row, as the last layer left it


class Early(NamedTuple):
    """Positions of an outside sequence have been run before anybody asked: `n` more, now all below `upto`."""

    n: int
    upto: int
    n_cuts: int  # that the sequence had seen then: what has been cut since may be gone


class Output(NamedTuple):
    """What a step decided for one sequence; the last one of a sequence has `finish` and `facts`."""

    seq: int
    ids: tuple[int, ...]
    finish: Finish | None = None
    logprobs: tuple[Logprobs, ...] = ()
    error: str = ""
    facts: Facts | None = None
    pooled: Array | None = None  # f32 [D]
    answer: Answer | None = None  # of an outside sequence
    early: Early | None = None  # likewise; then it is no answer


class LogitsHook(Protocol):
    """Changes the logits of a sequence before a token is chosen; follows what was decided."""

    def apply(self, logits: Array) -> Array: ...
    def accept(self, token: int) -> None: ...
    def rollback(self, n: int) -> None: ...


class Proposer(Protocol):
    """Guesses what comes next.  A wrong guess costs a row, never a token."""

    def propose(self, ids: Sequence[int], n: int) -> list[int]: ...
