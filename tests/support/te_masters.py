"""Prints whether Transformer Engine's own optimizer comes back from a checkpoint as it was.

    python -m tests.support.te_masters FOLDER

It makes its state on a CPU (and could not step there).
"""

import dataclasses
import sys

import torch

from tests.support.te_parameters import load_te

load_te()

from megatron.core import dist_checkpointing, optimizer, parallel_state  # noqa: E402
from megatron.core.optimizer import distrib_optimizer  # noqa: E402
from transformer_engine.pytorch.optimizers import FusedAdam  # noqa: E402

import vlfoundry.infra.backend  # noqa: E402
from tests.support.tiny_models import tiny_config  # noqa: E402
from vlfoundry.infra.backend import Layout, device_literals, install  # noqa: E402
from vlfoundry.infra.backend.parallel import parallel  # noqa: E402
from vlfoundry.infra.train import optim  # noqa: E402
from vlfoundry.infra.train.config import TrainConfig  # noqa: E402
from vlfoundry.infra.train.masters import join, split  # noqa: E402
from vlfoundry.infra.train.trainer import wrap  # noqa: E402
from vlfoundry.models.internvl.model import build  # noqa: E402

CONFIG = TrainConfig(steps=2, batch_samples=4, lr=1e-3, moments="bf16", gradients="bf16")


def main(folder: str) -> None:
    install()
    device = dataclasses.replace(install(), layer_spec="te", precision="bf16")
    vlfoundry.infra.backend._installed = device
    optim.find_device = lambda: device
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    torch.cuda.is_available = lambda: True
    with parallel(Layout()), device_literals():
        model = build("vision", tiny_config(), seed=3)
        made = optim.build_optimizer([wrap(model, CONFIG.gradients)], CONFIG)
        adam = optim.parts(made)[0].optimizer
        shards = [shard for group in adam.param_groups for shard in group["params"]]
        masters = [torch.randn(shard.shape) for shard in shards]
        for shard, master in zip(shards, masters, strict=True):
            weight, remainder = split(master)
            shard.data.copy_(weight)
            adam.set_scaled_state(shard, "master_param", remainder)
            adam.set_scaled_state(shard, "exp_avg", master)
        print(sorted({(name, str(x.dtype)) for s in shards for name, x in adam.state[s].items()}))
        dist_checkpointing.save(state_of(model, made, loading=False), folder)
        for shard in shards:
            shard.data.zero_()
            for state in adam.state[shard].values():
                state.zero_()
        state = state_of(model, made, loading=True)
        made.load_state_dict(dist_checkpointing.load(state, folder)["optimizer"])
        for shard, master in zip(shards, masters, strict=True):
            remainder = adam.state[shard]["master_param"]
            assert torch.equal(join(shard.detach(), remainder), master)
            assert torch.equal(adam.state[shard]["exp_avg"], master.bfloat16())
        print("as it was")


def state_of(model, made, *, loading: bool) -> dict:
    """What `infra.train.checkpoint` saves of both."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    whole = model.sharded_state_dict(metadata=metadata)
    moments = made.sharded_state_dict(whole, is_loading=loading, metadata=metadata)
    return {"model": whole, "optimizer": moments}


if __name__ == "__main__":
    main(sys.argv[1])
