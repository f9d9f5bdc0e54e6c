"""An upper side beyond the network: the same tokens as without one, whatever happens to the link."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nearfar.lower import Lower, open_lower
from nearfar.upper_remote import RemoteUpper
from nearfar.weights import Weights
from nearfar.wire.messages import ClientHello, CodecSpec
from tests.sdk.small_device import BY_IDS, BY_ROWS, Device, opening, oracle
from tests.sdk.wire_server import MODEL_FP, Door, WireServer
from tests.tiny import write_tiny

HELLO = ClientHello(MODEL_FP, {"upper": b"u" * 32}, (BY_ROWS, BY_IDS))
N = 24


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    path = tmp_path_factory.mktemp("remote") / "m.gguf"
    return open_lower(Weights.open(write_tiny(path, n_ctx=512, seed=3)), "numpy")


@pytest.fixture
def server(lower: Lower) -> Iterator[WireServer]:
    with WireServer(Door(lower)) as running:
        yield running


@pytest.fixture(scope="module", params=[BY_IDS, BY_ROWS], ids=["ids", "rows"])
def codec(request: pytest.FixtureRequest) -> CodecSpec:
    return request.param


def test_an_answer_over_the_network_is_the_answer_without_one(
    lower: Lower, server: WireServer, codec: CodecSpec
) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    truth = oracle(lower, codec, N)
    device = Device(upper.open(opening(codec)), lower, codec, truth)
    assert device.answer(N) == truth
    upper.close()
