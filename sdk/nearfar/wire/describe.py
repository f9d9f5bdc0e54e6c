"""Messages for people who look for a fault (NEARFAR_DEBUG=3): numbers only, never an id or a row."""

from __future__ import annotations

from nearfar.wire.messages import Ask, Close, Commit, Credit, Cut, Down, Err, Ids, Need, Open, Opened, Rows, Up, Verdict


def describe(message: Up | Down) -> str:
    """One line."""
    name = type(message).__name__
    match message:
        case Open():
            return f"{name} {message.mode.name} {message.codec.id.name} at layer {message.row_layer}"
        case Rows(gen, pos0, data):
            return f"{name} gen {gen}, {pos0}..{pos0 + len(data) - 1}, {message.n_bytes} B"
        case Ids(gen, pos0, ids):
            return f"{name} gen {gen}, {pos0}..{pos0 + len(ids) - 1}"
        case Ask(req, gen, pos, verify_from, draft, run):
            return f"{name} {req} gen {gen}, rows {verify_from}..{pos}, {len(draft)} drafts, run {run}"
        case Cut(gen, keep):
            return f"{name} gen {gen}, keep {keep}"
        case Commit(upto):
            return f"{name} upto {upto}"
        case Close(reason, keep_s):
            return f"{name} reason {reason}, keep {keep_s} s"
        case Opened(gen, rows, absorbed):
            return f"{name} gen {gen}, {rows} rows, {absorbed} absorbed"
        case Verdict(req, gen, pos0, n_accept):
            return f"{name} {req} gen {gen}, from {pos0}, {n_accept} accepted, {message.upper_us} us"
        case Need(gen, from_pos, reason):
            return f"{name} gen {gen}, from {from_pos} ({reason})"
        case Credit(n_bytes, retry_after_ms):
            return f"{name} {n_bytes} B, {retry_after_ms} ms"
        case Err(code, text):
            return f"{name} {code.name}: {text}"
        case _:
            return name
