"""Private means that no packet leaves: a capture of everything that a process's network namespace sends."""

from __future__ import annotations

import sys

import pytest

from nearfar.chaos.netns import UPPER, Capture, joined, why_not
from nearfar.chaos.profiles import Profile

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

SCRIPT = """
import sys
from nearfar.errors import EgressDenied, UpperError
from nearfar.upper_remote import RemoteUpper
from nearfar.wire.egress import Policy
from nearfar.wire.messages import ClientHello, CodecId, CodecSpec, Mode, Open

url, local_only = sys.argv[1], sys.argv[2] == "local"
try:
    upper = RemoteUpper(
        url, hello=ClientHello(b"f" * 32, {}, ()), policy=Policy(local_only=local_only), insecure=True
    )
    upper.open(Open(b"s" * 16, 0, Mode.LOSSY, CodecSpec(CodecId.IDS), 0))
except EgressDenied:
    sys.exit(12)
except UpperError:
    sys.exit(11)
"""


@pytest.mark.parametrize("host", [UPPER, "cloud.example"])
def test_no_packet_leaves_under_local_only_and_the_capture_would_see_one(host: str) -> None:
    with joined(Profile("fast", 1e9, 0)) as link:
        capture = Capture(link.device)

        def run(policy: str) -> int:
            command = [sys.executable, "-c", SCRIPT, f"grpc://{host}:9090", policy]
            return link.device.start(command).wait(timeout=60)

        assert run("local") == 12
        assert capture.packets() == []
        assert run("open") == 11  # nobody listens there
        sent = capture.packets()
        assert any(packet.is_outgoing for packet in sent)
        capture.close()
