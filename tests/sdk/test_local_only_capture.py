"""With `local_only` not one packet leaves: a device in a network namespace of its own, and everything that it sends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra [collab])")

from nearfar.chaos.netns import UPPER, Capture, Packet, PacketLink, joined, why_not
from nearfar.chaos.profiles import Profile
from nearfar.halves import split
from nearfar.weights import Weights
from tests.tiny import write_tiny

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

SOON = 120.0  # seconds after which a test gives up

# The policy refuses before anything is sent; a device that may answers alone.
DEVICE = """
import sys
from nearfar.errors import NearfarError
from nearfar.llm import LLM
from nearfar.wire.egress import Policy
path, url, local_only = sys.argv[1], sys.argv[2], sys.argv[3] == "local_only"
try:
    with LLM.open(path, upper=url, rows="hidden", policy=Policy(local_only=local_only)) as llm:
        llm.generate("the inn", max_tokens=2)
except NearfarError as error:
    print(type(error).__name__)
with LLM.open(path) as llm:
    print(len(llm.generate("the inn", max_tokens=4).ids))
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    path = write_tiny(folder / "m.gguf", "llama", "F32", exits=(1, 2), n_ctx=64)
    with Weights.open(path) as whole:
        return split(whole, 2, folder).device


@pytest.fixture
def link() -> Iterator[PacketLink]:
    with joined(Profile("fast", 1e10, 0)) as link:
        yield link


def sent(link: PacketLink, device: Path, url: str, policy: str) -> tuple[list[str], list[Packet]]:
    """What a device says and what its namespace sends meanwhile, on any interface."""
    with closing(Capture(link.device)) as capture:
        command = [sys.executable, "-c", DEVICE, str(device), url, policy]
        process = link.device.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=SOON)
        assert process.returncode == 0, err
        return out.split(), [packet for packet in capture.packets() if packet.is_outgoing]


@pytest.mark.parametrize("url", [f"grpcs://{UPPER}:9090", "grpcs://upper.example:9090", "grpc://127.0.0.1:9090"])
def test_a_device_that_may_send_nothing_sends_not_one_packet(link: PacketLink, device: Path, url: str) -> None:
    assert sent(link, device, url, "local_only") == (["EgressDenied", "4"], [])


def test_the_same_device_without_that_policy_knocks_at_the_upper_side(link: PacketLink, device: Path) -> None:
    said, packets = sent(link, device, f"grpcs://{UPPER}:9090", "anything")
    assert said == ["UpperError", "4"]
    assert {packet.to for packet in packets if packet.interface == "link"} == {UPPER}
