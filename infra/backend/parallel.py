"""The process group and Megatron's groups inside it, for as long as a block of code runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from vlfoundry.infra.backend import install
from vlfoundry.infra.backend.devices import Device
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.backend.layout import Layout
from vlfoundry.infra.backend.world import Rank, forbid_forks, this_rank

# One rendezvous store a rank, kept for as long as it lives, and how many worlds met there.
_store: Any = None
_worlds = 0
_left_open: list[Any] = []
_layout: Layout | None = None
_fp8: Fp8Config | None = None
_text_peers: Any = None


Group = Any
"""a process group of torch.distributed, or a SoloGroup, which stands for one"""


class SoloGroup:
    """Stands for a process group of one rank where there is nobody to talk to."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def current_layout() -> Layout:
    """The layout that this process has joined; one rank where there is none."""
    return _layout or Layout()


def current_fp8() -> Fp8Config | None:
    """What models that are built now compute in FP8, if anything."""
    return _fp8


def text_peers() -> Any:
    """Ranks of this one's tensor group that hold the same part of a text tower that stands apart,
    and share the texts; a group of one where it does not."""
    return _text_peers or SoloGroup()


@contextlib.contextmanager
def parallel(layout: Layout, *, seed: int = 0, fp8: Fp8Config | None = None) -> Iterator[Layout]:
    """Join the other ranks, cut the world as `layout` says, seed the random states.

    Works in a rank of a launcher, and in a plain process as a world of one; that process can
    start no ranks afterwards.

    Args:
        layout: how.
        seed: of the random states.
        fp8: for the models that are built inside; None: higher precision.

    Raises:
        LayoutError: the layout needs another number of ranks than there are.
    """
    global _layout, _fp8, _text_peers
    device = install()
    import torch.distributed as dist
    from megatron.core import parallel_state

    rank = this_rank()
    if rank is None:
        forbid_forks()
    layout.check(ranks=rank.count if rank else 1)
    if device.kind == "cuda":
        _pick_gpu(rank)
    _join(rank, _backend(device))
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            # Megatron knows one other way to cut some parameters. It is made for experts, which
            # nobody here has; the text tower takes it where it stands apart.
            expert_tensor_parallel_size=layout.text_tensor,
            # Twins of the NCCL groups that only asynchronous checkpoints would use.
            create_gloo_process_groups=False,
        )
        seed_everything(seed)
        _text_peers = _groups_of_text(layout)
        _layout, _fp8 = layout, fp8
        yield layout
    finally:
        _layout = _fp8 = _text_peers = None
        parallel_state.destroy_model_parallel()
        if rank is not None and device.kind == "cpu":
            # Closing them waits for gloo's thread, a quarter of a second altogether. The end of the
            # rank's process closes them too.
            _left_open.extend(dist.distributed_c10d._world.pg_map)
        # Megatron's own teardown forgets its groups but leaves them open; this closes them all.
        dist.destroy_process_group()


def seed_everything(seed: int) -> None:
    """Seed torch's generator (the same on all ranks) and Megatron's named random states."""
    import torch
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _groups_of_text(layout: Layout) -> Any:
    """This rank's group of `text_peers`, or None where there is nobody to share with."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not layout.text_stands_apart:
        return None
    text_tensor = layout.of_text.tensor
    if text_tensor == 1:
        return parallel_state.get_tensor_model_parallel_group()
    mine = None
    for first in range(0, layout.ranks, layout.tensor):  # ranks of a tensor group are neighbours
        for place in range(text_tensor):
            ranks = list(range(first + place, first + layout.tensor, text_tensor))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine = group
    return mine


def _backend(device: Device) -> str:
    if device.kind == "cpu":
        from vlfoundry.infra.backend.cpu import GLOO

        return GLOO
    return device.process_group


def _join(rank: Rank | None, backend: str) -> None:
    import torch.distributed as dist

    # Gloo would look up this machine's name to find an interface; ranks are local here.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if rank is None:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    global _store, _worlds
    if _store is None and rank.address:
        host, port = rank.address
        _store = dist.TCPStore(host, port, is_master=False)
    elif _store is None:
        # In a file: a TCPStore would ask the resolver for the name of 127.0.0.1.
        _store = dist.FileStore(rank.file, rank.count)
    # Names of its own for every world, or the second would find the addresses of the first.
    _worlds += 1
    store = dist.PrefixStore(f"world{_worlds}", _store)
    dist.init_process_group(backend, store=store, rank=rank.index, world_size=rank.count)


def _pick_gpu(rank: Rank | None) -> None:
    import torch

    torch.cuda.set_device((rank.index if rank else 0) % torch.cuda.device_count())
