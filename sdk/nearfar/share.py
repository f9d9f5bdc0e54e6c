"""From what a caller says about an upper side to the stepper that uses it.

LLM.open(path, upper="grpcs://host", mode="lossless", rows="hidden", policy=Policy(...))
    -> RemoteUpper, with the fingerprints of the file -> Collaboration
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

from nearfar.cancel import Cancel
from nearfar.collab import Collaboration, OnMeeting, nobody
from nearfar.collab_options import Collab
from nearfar.engine import Engine
from nearfar.errors import MissingExtraError, UsageError, WeightsError
from nearfar.sampling import Sampling
from nearfar.self_test import SelfTest, build_of
from nearfar.upper import Upper
from nearfar.weights import Weights
from nearfar.wire.egress import Policy
from nearfar.wire.fingerprint import model_fp, outliers, parts
from nearfar.wire.golden import check_golden, golden_prompts
from nearfar.wire.messages import ClientHello, CodecId, CodecSpec, Mode
from nearfar.wire.tls import Credentials

if TYPE_CHECKING:
    from nearfar.llm import LLM

ModeName = Literal["lossless", "lossy", "cloud-only"]
RowsName = Literal["hidden", "ids"]
CodecName = Literal["fp16", "int8", "int4"]
TEST_S = 5.0  # without a link the self-test is given up for now
_MODES = {"lossless": Mode.LOSSLESS, "lossy": Mode.LOSSY, "cloud-only": Mode.CLOUD_ONLY}
CODECS = {"fp16": CodecId.FP16, "int8": CodecId.INT8_OS, "int4": CodecId.INT4_OS}


def how_of(weights: Weights, mode: str, rows: str | None, codec: str) -> Collab:
    """The plain choices as one object.  Raises UsageError.

    `rows`: None takes what the file is for: a device half sends hidden rows, a whole model ids.
    """
    for value, allowed, name in ((mode, _MODES, "mode"), (codec, CODECS, "codec")):
        if value not in allowed:
            raise UsageError(f"{name}={value!r}: expected {', '.join(allowed)}")
    if rows not in (None, *get_args(RowsName)):
        raise UsageError(f"rows={rows!r}: expected hidden or ids")
    by_ids = mode == "cloud-only" or (rows or ("hidden" if weights.config.role == "device" else "ids")) == "ids"
    if by_ids:
        return Collab(_MODES[mode], CodecSpec(CodecId.IDS))
    channels = outliers(weights.file, weights.config) if CODECS[codec] != CodecId.FP16 else ()
    return Collab(_MODES[mode], CodecSpec(CODECS[codec], outliers=channels))


def share(
    engine: Engine,
    weights: Weights,
    upper: str | Sequence[str] | Upper,
    how: Collab,
    policy: Policy | None = None,
    credentials: Credentials | None = None,
) -> Collaboration:
    """A stepper over `engine` and whoever answers at `upper`.  Raises UsageError, EgressDenied, MissingExtraError."""
    delta, delta_loose = (_share_of(weights, f"nearfar.calibration.{key}") for key in ("delta", "delta_loose"))
    if not isinstance(upper, (str, Sequence)):
        if policy is not None or credentials is not None:
            raise UsageError("policy and credentials belong to an address; an Upper object has its own")
        on_meeting = _meeting(engine, weights, upper, how, b"")
        return Collaboration(engine, upper, how, delta=delta, delta_loose=delta_loose, on_meeting=on_meeting)
    try:
        from nearfar.upper_remote import RemoteUpper
    except ImportError as error:
        raise MissingExtraError("grpcio", "collab", "an upper side beyond this process") from error
    found = parts(weights)
    ids = (CodecSpec(CodecId.IDS),) if how.backlog == "ids" and not how.by_ids else ()
    hello = ClientHello(model_fp(found), found, (how.codec, *ids))
    remote = RemoteUpper(upper, hello=hello, credentials=credentials, policy=policy)
    on_meeting = _meeting(engine, weights, remote, how, hello.model_fp)
    return Collaboration(engine, remote, how, hello.model_fp, delta, delta_loose, on_meeting)


def _share_of(weights: Weights, key: str) -> float | None:
    """A number of the file, 0..1, where it has it.  Raises WeightsError."""
    value = weights.file.metadata.get(key)
    if value is not None and not (isinstance(value, float) and 0 < value < 1):
        raise WeightsError(f"{key}={str(value)[:40]}: expected a number between 0 and 1")
    return value


def _meeting(engine: Engine, weights: Weights, upper: Upper, how: Collab, fingerprint: bytes) -> OnMeeting:
    """The self-test of a pair of halves.  With ids the upper side may be any model of that tokenizer: none then."""
    golden = golden_prompts(weights.file.metadata, weights.config.n_vocab)
    if how.by_ids or how.self_test == "never" or not golden:
        return nobody
    asking = replace(how, mode=Mode.LOSSLESS, tau=1.0, lost="wait", patience_s=TEST_S, keep_s=0, self_test="never")

    def test(cancel: Cancel | None) -> None:
        asker = Collaboration(engine, upper, asking)
        check_golden(golden, lambda ids: _next_token(asker, ids, cancel))

    def half() -> bytes:
        return b"%s %s %s" % (
            fingerprint or model_fp(parts(weights)),
            repr(how.codec).encode(),
            build_of(engine.lower.name),
        )

    return SelfTest(half, test, is_forgetful=how.self_test == "always")


def _next_token(asker: Collaboration, ids: Sequence[int], cancel: Cancel | None) -> int:
    """Greedily, in an answer of its own."""
    s = asker.new_sequence(Sampling(), use_exits=False)
    s.continue_with(ids)
    try:
        return asker.step(s, cancel=cancel).id
    finally:
        s.finish()


def self_test(llm: LLM) -> int:
    """Have the upper side of `llm` decide behind the prompts that `nearfar split` wrote down; says how many there are.

    Raises MismatchError where another token comes, UsageError where the exits would decide, and what an answer raises.
    """
    if not isinstance(llm.stepper, Collaboration) or llm.stepper.how.mode is Mode.LOSSY:
        raise UsageError("the self-test wants the upper side to decide: expected one, and mode lossless")
    golden = golden_prompts(llm.metadata, llm.tokenizer.n_vocab)
    check_golden(golden, lambda ids: llm.generate(list(ids), max_tokens=1).ids[0])
    return len(golden)
