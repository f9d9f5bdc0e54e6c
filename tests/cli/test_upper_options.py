"""What the options of an upper side make of `Collab`."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from nearfar.cli.verbs import add_upper_options, upper_of
from nearfar.collab_options import Collab
from nearfar.wire.messages import CodecId, CodecSpec, Mode
from tests.tiny import write_tiny


def how(tmp_path: Path, *options: str) -> Collab:
    parser = argparse.ArgumentParser()
    add_upper_options(parser)
    args = parser.parse_args(["--upper", "grpc://127.0.0.1:9090", *options])
    args.model = str(write_tiny(tmp_path / "m.gguf", "llama", "F32"))
    made = upper_of(args)["collab"]
    assert isinstance(made, Collab)
    return made


def test_without_options_the_two_share_an_answer_as_by_default(tmp_path: Path) -> None:
    assert how(tmp_path) == Collab(Mode.LOSSLESS, CodecSpec(CodecId.IDS))


def test_every_option_of_an_upper_side_reaches_the_loop(tmp_path: Path) -> None:
    options = "--mode lossy --tau .7 --decay 4 --audit .2 --lost finish --backlog ids --self-test always"
    expected = Collab(
        Mode.LOSSY, CodecSpec(CodecId.IDS), 0.7, decay=4.0, audit=0.2, lost="finish", backlog="ids", self_test="always"
    )
    assert how(tmp_path, *options.split()) == expected


@pytest.mark.parametrize("wrong", ["--audit 2", "--decay -1", "--self-test twice"])
def test_an_option_that_makes_no_sense_is_refused(
    tmp_path: Path, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        how(tmp_path, *wrong.split())
    assert wrong.split()[0] in capsys.readouterr().err
