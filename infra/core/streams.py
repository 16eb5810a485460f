"""The registry of random streams: who draws, and what keeps one use from following another.

Everything random is a function of (seed, where it is needed). Two uses of one seed would draw the
same numbers at the same places, so each adds an offset of its own, and only this module has any.
Offsets are multiples of 2^32 and seeds are below that, so that no stream of one seed is a stream of
another.
"""

from enum import IntEnum

from vlfoundry.infra.core.errors import ConfigError

SEED_LIMIT = 1 << 32
"""seeds are 0 to this, not included"""
MEMBER_LIMIT = 1 << 16
"""largest number of members of a family of streams"""


class Stream(IntEnum):
    """What is drawn; the value is the offset in units of `SEED_LIMIT`.

    Another value changes what a run draws for that use, and so its results: take a free number for
    a new stream, and leave the others alone.
    """

    ORDER = 0
    """augmentation, orders of samples, questions of the evaluation"""
    MASKS = 1
    """which patches stage 1 keeps"""
    SCENES = 2
    """questions of stage 3"""
    DROP_PATH = 3
    """which branches of the vision tower are dropped"""
    CONVERSATIONS = 4
    """which questions the text model learns from"""
    CAPTIONS = 5
    """which captions a picture brings"""
    UNTRAINED = 6
    """weights of the twin that has learnt nothing"""
    REFERENCE = 7
    """scenes among which the reference without learning looks for the nearest"""
    MIXTURE = 8
    """which source comes next"""
    RESUMED = 9
    """dropout of a run that is resumed on another number of ranks"""
    NEGATIVES = 10
    """which wrong captions stage 2 matches"""
    CHAT = 32
    """what is drawn for a conversation of a file: frames of a video"""
    SOURCES = MEMBER_LIMIT
    """orders of the sources of a mixture: a family, one stream for each source"""


def check_seed(seed: int) -> None:
    """Raises ConfigError if a seed is none of 0 to 2^32 - 1, and could meet another stream."""
    if not 0 <= seed < SEED_LIMIT:
        raise ConfigError(f"seed is {seed}, expected 0 to {SEED_LIMIT - 1}")


def stream_seed(seed: int, stream: Stream, member: int = 0) -> int:
    """The seed of one use of a run's seed.

    Args:
        seed: the run's.
        stream: the use.
        member: of a stream that is a family.

    Raises:
        ConfigError: as `check_seed`.
    """
    check_seed(seed)
    assert 0 <= member < (MEMBER_LIMIT if stream is Stream.SOURCES else 1), (stream, member)
    return seed + (stream + member) * SEED_LIMIT
