"""Random streams: no two uses of a seed draw the same, and only the registry has offsets."""

import re
from pathlib import Path

import numpy as np
import pytest

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.streams import MEMBER_LIMIT, SEED_LIMIT, Stream, stream_seed
from vlfoundry.infra.data.images.bulk import uniforms

ROOT = Path(__file__).parents[2]
SEEDS = (0, 1, 3, 1_000_003, 20_261_130, SEED_LIMIT - 1)
OFFSET = re.compile(
    r"seed\w*\s*[+^|-]\s*\(?(?:\d|[A-Z]{2}|number)"  # seed + 7, seed + SOME_STREAM, seed + (number
    r"|1 << 3[2-9]|_STREAM\b"
)


def test_no_stream_of_a_seed_is_a_stream_of_another() -> None:
    every = [
        stream_seed(seed, stream, member)
        for seed in SEEDS
        for stream in Stream
        for member in ((0, 1, 7, MEMBER_LIMIT - 1) if stream is Stream.SOURCES else (0,))
    ]
    assert len(set(every)) == len(every)
    assert max(every) < 1 << 64


def test_values_are_distinct_and_no_alias_hides() -> None:
    assert len(Stream) == len(Stream.__members__)
    below = [stream for stream in Stream if stream is not Stream.SOURCES]
    assert max(below) < Stream.SOURCES == MEMBER_LIMIT


def test_streams_draw_other_numbers() -> None:
    places = [(0, index) for index in range(40)]
    drawn = {s: uniforms(stream_seed(11, s), places, 3) for s in Stream}
    for a in Stream:
        assert not any(np.array_equal(drawn[a], drawn[b]) for b in Stream if a is not b)


@pytest.mark.parametrize("seed", [-1, SEED_LIMIT, 1 << 40])
def test_a_seed_that_could_meet_another_stream_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"seed is {seed}, expected 0 to 4294967295"):
        stream_seed(seed, Stream.MASKS)


@pytest.mark.parametrize("room", ["infra", "models", "eval", "stages", "flows"])
def test_no_other_module_adds_an_offset_to_a_seed(room: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / room).rglob("*.py"))
        if path.name != "streams.py"
        for line in path.read_text("utf-8").splitlines()
        if OFFSET.search(line)
    ]
    assert not found
