"""Evaluation where training runs: on its device, over the ranks of the launcher profile.

Rank 0 runs the suites. The others hold the same models and wait for their share of what a model is
asked: whole batches, so that the numbers are those of one rank, bit by bit. Every rank has a whole
model, whatever `tensor` and `pipeline` say: answers are written token by token, which no schedule
of a pipeline does, so all ranks of a profile are data parallel here.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlfoundry.eval.context import Model

PATIENCE = datetime.timedelta(days=30)
"""for which the others wait while rank 0 computes what needs no model"""
ROUND = 4
"""batches that each rank gets at once: what is under way stays small"""

type Work = Callable[[Team], Any]
type Batches = Sequence[tuple[Any, ...]]
"""arguments of calls of one method"""


def run_team(work: Work) -> Any:
    """`work(team)` on rank 0 of the launcher's ranks, the others helping; returns what it returned.

    Raises:
        UserError: as raised by `work`, or by a rank that could not do its share.
        ConfigError: there is no such launcher profile.
    """
    from vlfoundry.infra.launch.launchers import launcher
    from vlfoundry.infra.launch.profile import local_profile

    profile = local_profile()
    return launcher(profile.launcher).run(
        _be_rank, work, ranks=profile.ranks, threads=profile.threads
    )[0]


def _be_rank(work: Work) -> Any:
    from vlfoundry.infra.backend import Layout
    from vlfoundry.infra.backend.parallel import parallel
    from vlfoundry.infra.backend.world import this_rank

    rank = this_rank()
    assert rank is not None
    with parallel(Layout(data=rank.count)):
        team = Team(rank.index, rank.count)
        if rank.index:
            return team.help()
        found = work(team)
        team.close()  # not after a failure: then the others wait for something else, and are ended
        return found


class Team:
    """The ranks that evaluate together, seen from one of them."""

    def __init__(self, rank: int, ranks: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._model: Model | None = None
        self._group: Any = None
        if ranks > 1:
            import torch.distributed as dist

            self._group = dist.new_group(backend=_backend(), timeout=PATIENCE)

    def load(self, folder: Path, *, untrained_seed: int | None = None) -> Shared:
        """The model of a folder on every rank; it takes the place of the one before."""
        self._tell("load", [(folder, untrained_seed)] * self._ranks)
        return Shared(self._load(folder, untrained_seed), self)

    def ask(self, method: str, batches: Batches) -> list[Any]:
        """What the model's method answers to each batch, in order; rank r takes each r-th."""
        assert self._model is not None
        call = getattr(self._model, method)
        if self._ranks == 1:
            return [call(*batch) for batch in batches]
        found: list[Any] = []
        for first in range(0, len(batches), ROUND * self._ranks):
            part = batches[first : first + ROUND * self._ranks]
            shares = [part[rank :: self._ranks] for rank in range(self._ranks)]
            mine = self._tell(method, shares)
            found += self._gathered([call(*batch) for batch in mine], len(part))
        return found

    def help(self) -> None:
        """Do this rank's share of whatever rank 0 is asked, until it has done."""
        while True:
            method, share = self._told()
            if method == "close":
                return
            if method == "load":
                self._load(*share)
            else:
                self._gathered([getattr(self._model, method)(*batch) for batch in share], 0)

    def close(self) -> None:
        """Let the others go."""
        self._tell("close", [()] * self._ranks)

    def _load(self, folder: Path, untrained_seed: int | None) -> Model:
        from vlfoundry.models.internvl.predict import load_model

        self._model = None  # two at once may not fit
        self._model = load_model(folder, untrained_seed=untrained_seed)
        return self._model

    def _tell(self, method: str, shares: Sequence[Any]) -> Any:
        if self._ranks == 1:
            return shares[0]
        return self._scattered([(method, share) for share in shares])[1]

    def _told(self) -> tuple[str, Any]:
        return self._scattered(None)

    def _scattered(self, shares: list[Any] | None) -> Any:
        import torch.distributed as dist

        box: list[Any] = [None]
        dist.scatter_object_list(box, shares, src=0, group=self._group)
        return box[0]

    def _gathered(self, mine: list[Any], count: int) -> list[Any]:
        """On rank 0 the answers of all ranks, in the order of the batches."""
        import torch.distributed as dist

        boxes: list[Any] | None = [None] * self._ranks if self._rank == 0 else None
        dist.gather_object(mine, boxes, dst=0, group=self._group)
        if boxes is None:
            return []
        return [boxes[i % self._ranks][i // self._ranks] for i in range(count)]


class Shared:
    """A model that every rank of a team holds; what it is asked in batches, all answer."""

    def __init__(self, model: Model, team: Team) -> None:
        self.kind, self.capabilities = model.kind, model.capabilities
        self.embed_images, self.embed_texts = model.embed_images, model.embed_texts
        self.image_features, self.generate = model.image_features, model.generate
        self.match = model.match
        self._team = team

    def in_batches(self, method: str, batches: Batches) -> list[Any]:
        """What the method answers to each batch of arguments."""
        return self._team.ask(method, batches)


def _backend() -> str:
    """Of the group that hands Python objects about: between CPUs, on any machine."""
    from vlfoundry.infra.backend import install

    if install().kind == "cuda":
        return "gloo"
    from vlfoundry.infra.backend.cpu import GLOO

    return GLOO
