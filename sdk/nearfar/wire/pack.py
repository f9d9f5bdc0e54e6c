"""Messages to bytes: protobuf, as nearfar.proto says.  `unpack.py` is the way back and holds every check.

A number that has no place in its field is a bug or an option that nobody can mean: WireError.
"""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import Message

from nearfar.errors import WireError
from nearfar.sampling import Sampling
from nearfar.wire import nearfar_pb2 as pb
from nearfar.wire.messages import (
    Ask,
    ClientHello,
    Close,
    CodecSpec,
    Commit,
    Credit,
    Cut,
    Down,
    Err,
    Ids,
    Limits,
    Load,
    Need,
    Open,
    Opened,
    Ping,
    Pong,
    Rows,
    ServerHello,
    Up,
    Verdict,
)
from nearfar.wire.unpack import MAX_TEXT


def pack_up(seq: int, message: Up) -> bytes:
    """The `seq`-th message of a device on its stream."""
    return _serialized(message, lambda: _up(seq, message))


def pack_down(ack_seq: int, message: Down | None) -> bytes:
    """An answer that also says how much was taken in; None: nothing else."""
    return _serialized(message, lambda: _down(ack_seq, message))


def pack_client_hello(m: ClientHello) -> bytes:
    return _serialized(
        m,
        lambda: pb.ClientHello(
            proto=m.proto,
            model_fp=m.model_fp,
            parts=m.parts,
            codecs=[_codec(spec) for spec in m.codecs],
            sdk=m.sdk,
            region=m.region,
        ),
    )


def pack_server_hello(m: ServerHello) -> bytes:
    return _serialized(
        m,
        lambda: pb.ServerHello(
            proto=m.proto,
            match=m.match,
            model_fp=m.model_fp,
            why=_text(m.why),
            codec=None if m.codec is None else _codec(m.codec),
            epoch=m.epoch,
            limits=_limits(m.limits),
            region=m.region,
        ),
    )


def pack_load(m: Load) -> bytes:
    return _serialized(m, lambda: pb.Load(queue_ms=m.queue_ms, kv_free_bytes=m.kv_free_bytes, draining=m.draining))


def _serialized(message: object, build: Callable[[], Message]) -> bytes:
    try:
        data: bytes = build().SerializeToString()
    except (ValueError, TypeError) as error:
        raise WireError(f"a {type(message).__name__} that does not fit its fields: {error}") from None
    return data


def _up(seq: int, message: Up) -> pb.Up:
    match message:
        case Open():
            return pb.Up(seq=seq, open=_open(message))
        case Rows(gen, pos0, data, crc32):
            return pb.Up(seq=seq, rows=pb.Rows(gen=gen, pos0=pos0, n=len(data), data=b"".join(data), crc32=crc32))
        case Ids(gen, pos0, ids):
            return pb.Up(seq=seq, ids=pb.Ids(gen=gen, pos0=pos0, id=ids))
        case Ask():
            return pb.Up(seq=seq, ask=_ask(message))
        case Cut(gen, keep):
            return pb.Up(seq=seq, cut=pb.Cut(gen=gen, keep=keep))
        case Commit(upto):
            return pb.Up(seq=seq, commit=pb.Commit(upto=upto))
        case Ping(n):
            return pb.Up(seq=seq, ping=n)
        case Close(reason, keep_s):
            return pb.Up(seq=seq, close=pb.Close(reason=reason, keep_s=keep_s))


def _down(ack: int, message: Down | None) -> pb.Down:
    match message:
        case None:
            return pb.Down(ack_seq=ack)
        case Opened():
            return pb.Down(ack_seq=ack, opened=_opened(message))
        case Verdict():
            return pb.Down(ack_seq=ack, verdict=_verdict(message))
        case Need(gen, from_pos, reason):
            return pb.Down(ack_seq=ack, need=pb.Need(gen=gen, from_pos=from_pos, reason=_text(reason)))
        case Credit(n_bytes, retry_after_ms):
            return pb.Down(ack_seq=ack, credit=pb.Credit(bytes=n_bytes, retry_after_ms=retry_after_ms))
        case Err(code, text, retryable, retry_after_ms):
            err = pb.Err(code=code.name, text=_text(text), retryable=retryable, retry_after_ms=retry_after_ms)
            return pb.Down(ack_seq=ack, err=err)
        case Pong(n):
            return pb.Down(ack_seq=ack, pong=n)


def _text(text: str) -> str:
    """As much of a sentence as the other side reads: what an engine says of its fault may be long."""
    return text.encode("utf-8", "replace")[:MAX_TEXT].decode("utf-8", "ignore")


def _limits(x: Limits) -> pb.Limits:
    return pb.Limits(
        max_context=x.max_context,
        max_sessions=x.max_sessions,
        idle_ttl_s=x.idle_ttl_s,
        max_run=x.max_run,
        credit_bytes=x.credit_bytes,
    )


def _codec(spec: CodecSpec) -> pb.CodecSpec:
    return pb.CodecSpec(id=spec.id.name, group=spec.group, outlier=spec.outliers)


def _sampling(s: Sampling) -> pb.Sampling:
    return pb.Sampling(
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        seed=s.seed,
        repetition_penalty=s.repetition_penalty,
        repetition_window=s.repetition_window,
    )


def _open(m: Open) -> pb.Open:
    return pb.Open(
        session=m.session,
        gen=m.gen,
        mode=m.mode.name,
        codec=_codec(m.codec),
        row_layer=m.row_layer,
        sampling=_sampling(m.sampling),
        resume_token=m.resume_token,
        want_hidden=m.want_hidden,
        stop_id=m.stop_ids,
        version=m.version,
    )


def _ask(m: Ask) -> pb.Ask:
    return pb.Ask(
        req=m.req,
        gen=m.gen,
        pos=m.pos,
        verify_from=m.verify_from,
        draft=m.draft,
        run=m.run,
        deadline_ms=m.deadline_ms,
    )


def _opened(m: Opened) -> pb.Opened:
    return pb.Opened(
        gen=m.gen,
        rows=m.rows,
        absorbed=m.absorbed,
        epoch=m.epoch,
        resume_token=m.resume_token,
        settings_hash=m.settings_hash,
    )


def _verdict(m: Verdict) -> pb.Verdict:
    return pb.Verdict(
        req=m.req,
        gen=m.gen,
        pos0=m.pos0,
        n_accept=m.n_accept,
        id=m.ids,
        margin=m.margin,
        state_hash=m.state_hash,
        upper_us=m.upper_us,
        hidden=m.hidden,
    )
