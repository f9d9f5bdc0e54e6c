from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_NONE: _ClassVar[Codec]
    FP16: _ClassVar[Codec]
    INT8_OS: _ClassVar[Codec]
    INT4_OS: _ClassVar[Codec]
    IDS: _ClassVar[Codec]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_NONE: _ClassVar[Mode]
    LOSSY: _ClassVar[Mode]
    LOSSLESS: _ClassVar[Mode]
    CLOUD_ONLY: _ClassVar[Mode]

class Code(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODE_NONE: _ClassVar[Code]
    MISMATCH: _ClassVar[Code]
    DENIED: _ClassVar[Code]
    QUOTA: _ClassVar[Code]
    OVERLOADED: _ClassVar[Code]
    DIVERGED: _ClassVar[Code]
    BAD_FRAME: _ClassVar[Code]
    INTERNAL: _ClassVar[Code]
CODEC_NONE: Codec
FP16: Codec
INT8_OS: Codec
INT4_OS: Codec
IDS: Codec
MODE_NONE: Mode
LOSSY: Mode
LOSSLESS: Mode
CLOUD_ONLY: Mode
CODE_NONE: Code
MISMATCH: Code
DENIED: Code
QUOTA: Code
OVERLOADED: Code
DIVERGED: Code
BAD_FRAME: Code
INTERNAL: Code

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CodecSpec(_message.Message):
    __slots__ = ("id", "group", "outlier")
    ID_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    OUTLIER_FIELD_NUMBER: _ClassVar[int]
    id: Codec
    group: int
    outlier: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[_Union[Codec, str]] = ..., group: _Optional[int] = ..., outlier: _Optional[_Iterable[int]] = ...) -> None: ...

class ClientHello(_message.Message):
    __slots__ = ("proto", "model_fp", "parts", "codecs", "sdk", "region")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    PROTO_FIELD_NUMBER: _ClassVar[int]
    MODEL_FP_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    SDK_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    proto: _containers.RepeatedScalarFieldContainer[int]
    model_fp: bytes
    parts: _containers.ScalarMap[str, bytes]
    codecs: _containers.RepeatedCompositeFieldContainer[CodecSpec]
    sdk: str
    region: str
    def __init__(self, proto: _Optional[_Iterable[int]] = ..., model_fp: _Optional[bytes] = ..., parts: _Optional[_Mapping[str, bytes]] = ..., codecs: _Optional[_Iterable[_Union[CodecSpec, _Mapping]]] = ..., sdk: _Optional[str] = ..., region: _Optional[str] = ...) -> None: ...

class ServerHello(_message.Message):
    __slots__ = ("proto", "match", "model_fp", "why", "codec", "epoch", "limits", "region")
    PROTO_FIELD_NUMBER: _ClassVar[int]
    MATCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FP_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    proto: int
    match: bool
    model_fp: bytes
    why: str
    codec: CodecSpec
    epoch: int
    limits: Limits
    region: str
    def __init__(self, proto: _Optional[int] = ..., match: _Optional[bool] = ..., model_fp: _Optional[bytes] = ..., why: _Optional[str] = ..., codec: _Optional[_Union[CodecSpec, _Mapping]] = ..., epoch: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., region: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_context", "max_sessions", "idle_ttl_s", "max_run", "credit_bytes")
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    IDLE_TTL_S_FIELD_NUMBER: _ClassVar[int]
    MAX_RUN_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_context: int
    max_sessions: int
    idle_ttl_s: int
    max_run: int
    credit_bytes: int
    def __init__(self, max_context: _Optional[int] = ..., max_sessions: _Optional[int] = ..., idle_ttl_s: _Optional[int] = ..., max_run: _Optional[int] = ..., credit_bytes: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("queue_ms", "kv_free_bytes", "draining")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    KV_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    kv_free_bytes: int
    draining: bool
    def __init__(self, queue_ms: _Optional[float] = ..., kv_free_bytes: _Optional[int] = ..., draining: _Optional[bool] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "repetition_window")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_WINDOW_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    repetition_window: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., repetition_window: _Optional[int] = ...) -> None: ...

class Up(_message.Message):
    __slots__ = ("seq", "open", "rows", "ids", "ask", "cut", "commit", "ping", "close")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    ASK_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    open: Open
    rows: Rows
    ids: Ids
    ask: Ask
    cut: Cut
    commit: Commit
    ping: int
    close: Close
    def __init__(self, seq: _Optional[int] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ..., ids: _Optional[_Union[Ids, _Mapping]] = ..., ask: _Optional[_Union[Ask, _Mapping]] = ..., cut: _Optional[_Union[Cut, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., ping: _Optional[int] = ..., close: _Optional[_Union[Close, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("session", "gen", "mode", "codec", "row_layer", "sampling", "resume_token", "want_hidden", "stop_id", "version")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    GEN_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ROW_LAYER_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WANT_HIDDEN_FIELD_NUMBER: _ClassVar[int]
    STOP_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    gen: int
    mode: Mode
    codec: CodecSpec
    row_layer: int
    sampling: Sampling
    resume_token: bytes
    want_hidden: bool
    stop_id: _containers.RepeatedScalarFieldContainer[int]
    version: int
    def __init__(self, session: _Optional[bytes] = ..., gen: _Optional[int] = ..., mode: _Optional[_Union[Mode, str]] = ..., codec: _Optional[_Union[CodecSpec, _Mapping]] = ..., row_layer: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., resume_token: _Optional[bytes] = ..., want_hidden: _Optional[bool] = ..., stop_id: _Optional[_Iterable[int]] = ..., version: _Optional[int] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("gen", "pos0", "n", "data", "crc32")
    GEN_FIELD_NUMBER: _ClassVar[int]
    POS0_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    gen: int
    pos0: int
    n: int
    data: bytes
    crc32: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, gen: _Optional[int] = ..., pos0: _Optional[int] = ..., n: _Optional[int] = ..., data: _Optional[bytes] = ..., crc32: _Optional[_Iterable[int]] = ...) -> None: ...

class Ids(_message.Message):
    __slots__ = ("gen", "pos0", "id")
    GEN_FIELD_NUMBER: _ClassVar[int]
    POS0_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    gen: int
    pos0: int
    id: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, gen: _Optional[int] = ..., pos0: _Optional[int] = ..., id: _Optional[_Iterable[int]] = ...) -> None: ...

class Ask(_message.Message):
    __slots__ = ("req", "gen", "pos", "verify_from", "draft", "run", "deadline_ms")
    REQ_FIELD_NUMBER: _ClassVar[int]
    GEN_FIELD_NUMBER: _ClassVar[int]
    POS_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FROM_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    req: int
    gen: int
    pos: int
    verify_from: int
    draft: _containers.RepeatedScalarFieldContainer[int]
    run: int
    deadline_ms: int
    def __init__(self, req: _Optional[int] = ..., gen: _Optional[int] = ..., pos: _Optional[int] = ..., verify_from: _Optional[int] = ..., draft: _Optional[_Iterable[int]] = ..., run: _Optional[int] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class Cut(_message.Message):
    __slots__ = ("gen", "keep")
    GEN_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    gen: int
    keep: int
    def __init__(self, gen: _Optional[int] = ..., keep: _Optional[int] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("upto",)
    UPTO_FIELD_NUMBER: _ClassVar[int]
    upto: int
    def __init__(self, upto: _Optional[int] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("reason", "keep_s")
    REASON_FIELD_NUMBER: _ClassVar[int]
    KEEP_S_FIELD_NUMBER: _ClassVar[int]
    reason: int
    keep_s: int
    def __init__(self, reason: _Optional[int] = ..., keep_s: _Optional[int] = ...) -> None: ...

class Down(_message.Message):
    __slots__ = ("ack_seq", "opened", "verdict", "need", "credit", "err", "pong")
    ACK_SEQ_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    NEED_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    ERR_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    ack_seq: int
    opened: Opened
    verdict: Verdict
    need: Need
    credit: Credit
    err: Err
    pong: int
    def __init__(self, ack_seq: _Optional[int] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ..., need: _Optional[_Union[Need, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., err: _Optional[_Union[Err, _Mapping]] = ..., pong: _Optional[int] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("gen", "rows", "absorbed", "epoch", "resume_token", "settings_hash")
    GEN_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ABSORBED_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_HASH_FIELD_NUMBER: _ClassVar[int]
    gen: int
    rows: int
    absorbed: int
    epoch: int
    resume_token: bytes
    settings_hash: bytes
    def __init__(self, gen: _Optional[int] = ..., rows: _Optional[int] = ..., absorbed: _Optional[int] = ..., epoch: _Optional[int] = ..., resume_token: _Optional[bytes] = ..., settings_hash: _Optional[bytes] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("req", "gen", "pos0", "n_accept", "id", "margin", "state_hash", "upper_us", "hidden")
    REQ_FIELD_NUMBER: _ClassVar[int]
    GEN_FIELD_NUMBER: _ClassVar[int]
    POS0_FIELD_NUMBER: _ClassVar[int]
    N_ACCEPT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    STATE_HASH_FIELD_NUMBER: _ClassVar[int]
    UPPER_US_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    req: int
    gen: int
    pos0: int
    n_accept: int
    id: _containers.RepeatedScalarFieldContainer[int]
    margin: float
    state_hash: bytes
    upper_us: int
    hidden: bytes
    def __init__(self, req: _Optional[int] = ..., gen: _Optional[int] = ..., pos0: _Optional[int] = ..., n_accept: _Optional[int] = ..., id: _Optional[_Iterable[int]] = ..., margin: _Optional[float] = ..., state_hash: _Optional[bytes] = ..., upper_us: _Optional[int] = ..., hidden: _Optional[bytes] = ...) -> None: ...

class Need(_message.Message):
    __slots__ = ("gen", "from_pos", "reason")
    GEN_FIELD_NUMBER: _ClassVar[int]
    FROM_POS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    gen: int
    from_pos: int
    reason: str
    def __init__(self, gen: _Optional[int] = ..., from_pos: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Credit(_message.Message):
    __slots__ = ("bytes", "retry_after_ms")
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    retry_after_ms: int
    def __init__(self, bytes: _Optional[int] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Err(_message.Message):
    __slots__ = ("code", "retryable", "retry_after_ms", "text")
    CODE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    code: Code
    retryable: bool
    retry_after_ms: int
    text: str
    def __init__(self, code: _Optional[_Union[Code, str]] = ..., retryable: _Optional[bool] = ..., retry_after_ms: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...
