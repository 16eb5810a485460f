"""One step's gradients in any layout: micro-batches, pipeline stages, and losses over all samples.

What a model and an objective must offer is said in `infra.train.protocols`; a plain function
(model, batch) -> (loss, terms) will do where a rank holds the whole model and takes its whole share
of a batch at once.

A loss that couples samples needs all of them. Where they do not fit through the model at once it
is done in two passes: the first goes forward only and keeps each sample's few numbers (its
embedding), the loss of those is differentiated, and the second pass brings their gradients into
the model. It is exact (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", 2021), and the paper's batch of 164K needs no more memory than one micro-batch.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from vlfoundry.infra.backend import Layout, device_literals, install, plain_calls
from vlfoundry.infra.backend.parallel import Group, SoloGroup
from vlfoundry.infra.core.errors import LayoutError
from vlfoundry.infra.train.mfu import FlopCounter
from vlfoundry.infra.train.protocols import (
    Objective,
    PathObjective,
    PlainObjective,
    Rows,
    has_paths,
)
from vlfoundry.infra.train.telemetry import Stopwatch

Terms = dict[str, float]


class Engine:
    """Takes batches through a model that may be cut over ranks.

    Args:
        model: what this rank holds; its `chunks`, if it has any, are consecutive pieces for the
            interleaved schedule.
        wrapped: the same pieces in Megatron's data-parallel wrappers, or as they are where nothing
            is learnt.
        objective: see the module.
        layout: the one that is initialised.
        watch: told what the time goes into.
    """

    def __init__(
        self,
        model: Any,
        wrapped: Sequence[Any],
        objective: Objective,
        layout: Layout,
        watch: Stopwatch | None = None,
    ) -> None:
        self._watch = watch or Stopwatch()
        self._counter: Any = None
        self._first_pass_flops = 0
        self._chunks = list(getattr(model, "chunks", [model]))
        self._wrapped, self._layout = list(wrapped), layout
        # One of the two; the other is not asked.
        self._plain = None if has_paths(objective) else cast(PlainObjective, objective)
        self._objective = cast(PathObjective, objective)
        self._pipelined = layout.pipeline > 1
        if self._plain and (self._pipelined or layout.micro_batch_samples):
            raise LayoutError(
                "this objective is a plain function, which cannot be cut into micro-batches or "
                "pipeline stages; use pipeline 1 and leave micro_batch_samples out"
            )
        self._is_last = not self._pipelined or _pipeline_rank() == layout.pipeline - 1
        self._random: dict[tuple, Any] = {}
        self._parts = 1

    @property
    def _last_chunk(self) -> Any:
        return self._chunks[-1]

    def gradients(self, batch: Any) -> Terms:
        """Add the gradients of a rank's batch to the model's; terms are means over all ranks.

        The gradients are not yet averaged over data-parallel ranks: `finalise` does that.
        """
        self._forget_tokens()
        if self._plain:
            with self._computing("forward"):
                loss, terms = self._plain(self._chunks[0], batch)
            self._learn(loss)
            return self._agree({"loss": loss.detach(), **terms})
        self._parts = self._layout.micro_batches(self._objective.samples(batch))
        with self._watch.phase("forward"):
            batch = self._objective.prepare(self, batch)
        plans = {path: self._plan(path, batch, self._parts) for path in self._objective.paths}
        if self._objective.coupled:
            terms = self._coupled(batch, plans)
        else:
            terms = self._additive(plans)
        return self._agree(terms)

    def flops(self, batch: Any) -> float:
        """FLOPs of this rank's matrix products in one step; leaves gradients behind.

        The first of two passes is not credited. What recomputing does again is.
        """
        with FlopCounter() as self._counter:
            self.gradients(batch)
        found = self._counter.get_total_flops() - self._first_pass_flops
        self._counter, self._first_pass_flops = None, 0
        return float(found)

    def tokens(self) -> int:
        """Tokens that entered towers in the last step, over all data-parallel ranks."""
        import torch
        import torch.distributed as dist

        # Ranks that share a layer have seen the same tokens.
        own = sum(
            module.tokens_seen * (self._layout.tensor // module.tp_group.size())
            for chunk in self._chunks
            for module in chunk.modules()
            if hasattr(module, "tokens_seen")
        )
        box = torch.tensor(own, dtype=torch.int64, device=install().kind)
        dist.all_reduce(box)
        return int(box) // self._layout.tensor

    def _forget_tokens(self) -> None:
        for chunk in self._chunks:
            for module in chunk.modules():
                if hasattr(module, "tokens_seen"):
                    module.tokens_seen = 0

    @contextlib.contextmanager
    def _computing(self, phase: str) -> Iterator[None]:
        """A phase in which nothing but our models computes."""
        with self._watch.phase(phase), plain_calls():
            yield

    def _learn(self, loss: Any) -> None:
        with self._computing("backward"):
            loss.backward()

    def forward(self, batch: Any) -> Terms:
        """The terms of a batch, without gradients: every shape and most of the memory of a step."""
        import torch

        if self._plain:
            with torch.no_grad():
                loss, terms = self._plain(self._chunks[0], batch)
            return self._agree({"loss": loss, **terms})
        self._parts = self._layout.micro_batches(self._objective.samples(batch))
        with torch.no_grad():
            batch = self._objective.prepare(self, batch)
            outputs: Rows = {}
            for path in self._objective.paths:
                outputs |= self._collect(path, self._plan(path, batch, self._parts))
            terms = {}
            if self._is_last:
                loss, terms = self._objective.loss(self._last_chunk, outputs, batch)
                terms = {"loss": loss, **terms}
        return self._agree(terms)

    def collect(self, path: str, batch: Any) -> Rows:
        """What the objective's `finish` gives at the end of a path, on every pipeline rank.

        Without gradients; an objective asks for it to prepare a batch.
        """
        import torch

        with torch.no_grad():
            found = self._collect(path, self._plan(path, batch, self._parts))
        return _from_last_stage(found) if self._pipelined else found

    def finalise(self, *, everywhere: bool = False) -> None:
        """Average the gradients over the data-parallel ranks, and add what tensor ranks know of
        what they share.

        Args:
            everywhere: leave all of them on every rank, and not only what its part of the
                optimizer will use.
        """
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.process_groups_config import ProcessGroupCollection

        groups = ProcessGroupCollection(
            tp=parallel_state.get_tensor_model_parallel_group(),
            pp=parallel_state.get_pipeline_model_parallel_group(),
            dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        # Megatron's own models share an embedding between the first and the last stage.
        groups.embd = groups.pos_embd = SoloGroup()  # pyrefly: ignore[bad-assignment]
        finalize_model_grads(self._wrapped, pg_collection=groups, force_all_reduce=everywhere)

    # --- losses -----------------------------------------------------------------------------

    def _plan(self, path: str, batch: Any, parts: int) -> Any:
        plan = self._objective.micro_batches(path, batch, parts)
        if self._layout.interleaved and len(plan.batches) % self._layout.pipeline:
            raise LayoutError(
                f"path {path!r} has {len(plan.batches)} micro-batches; the interleaved schedule "
                f"needs a multiple of pipeline {self._layout.pipeline}: choose another "
                "micro_batch_samples or a larger batch"
            )
        return plan

    def _additive(self, plans: dict[str, Any]) -> Rows:
        """Micro-batch by micro-batch; losses and terms add up."""
        ((path, plan),) = plans.items()
        sums: Rows = {}

        def learn(chunk: Any, state: Rows, batch: Any) -> Any:
            outputs = self._objective.finish(path, chunk, state, batch)
            loss, terms = self._objective.loss(chunk, outputs, batch)
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + value
            return loss

        self._backward(path, plan, learn)
        return sums

    def _coupled(self, batch: Any, plans: dict[str, Any]) -> Rows:
        if self._parts == 1 and not self._pipelined:
            outputs: Rows = {}
            with self._computing("forward"):
                for path, plan in plans.items():
                    outputs |= plan.assemble(
                        [self._finish(path, self._run(path, part), part) for part in plan.batches]
                    )
                loss, terms = self._objective.loss(self._last_chunk, outputs, batch)
            self._learn(loss)
            return {"loss": loss.detach(), **terms}
        return self._in_two_passes(batch, plans)

    def _in_two_passes(self, batch: Any, plans: dict[str, Any]) -> Rows:
        import torch

        leaves: dict[str, list[Rows]] = {}
        counted = self._counter.get_total_flops() if self._counter else 0
        with torch.no_grad():
            for path, plan in plans.items():
                leaves[path] = self._forward(path, plan, remember=True)
        if self._counter:
            self._first_pass_flops += self._counter.get_total_flops() - counted
        result: Rows = {}
        if self._is_last:
            outputs: Rows = {}
            for path, plan in plans.items():
                for rows in leaves[path]:
                    for name in [n for n, value in rows.items() if value.is_floating_point()]:
                        rows[name] = rows[name].detach().requires_grad_()
                outputs |= plan.assemble(leaves[path])
            with self._computing("forward"):
                loss, terms = self._objective.loss(self._last_chunk, outputs, batch)
            self._learn(loss)
            result = {"loss": loss.detach(), **terms}
        for path, plan in plans.items():
            ends = iter(leaves[path])

            def learn(
                chunk: Any, state: Rows, part: Any, path: str = path, ends: Any = ends
            ) -> Any:
                outputs, seen = self._objective.finish(path, chunk, state, part), next(ends)
                return sum(
                    (outputs[name] * rows.grad).sum()
                    for name, rows in seen.items()
                    if rows.grad is not None
                )

            self._backward(path, plan, learn, again=True)
        self._random.clear()
        return result

    # --- passes -----------------------------------------------------------------------------

    def _run(self, path: str, part: Any) -> Rows:
        return self._chunks[0].run(path, part)

    def _finish(self, path: str, state: Rows, part: Any) -> Rows:
        return self._objective.finish(path, self._last_chunk, state, part)

    def _collect(self, path: str, plan: Any) -> Rows:
        """The whole batch's rows; on the last stage."""
        rows = self._forward(path, plan)
        return plan.assemble(rows) if self._is_last else {}

    def _forward(self, path: str, plan: Any, *, remember: bool = False) -> list[Rows]:
        """Rows of each micro-batch, on the last stage. `remember` the random states they met."""
        found: list[Rows] = []

        def end(chunk: Any, state: Rows, part: Any) -> None:
            found.append(self._objective.finish(path, chunk, state, part))

        self._schedule(path, plan, end, forward_only=True, remember=remember)
        return found

    def _backward(
        self, path: str, plan: Any, learn: Callable[[Any, Rows, Any], Any], *, again: bool = False
    ) -> None:
        """Forward and backward; `again` with the random states of the first pass."""
        self._schedule(path, plan, learn, forward_only=False, again=again)

    def _schedule(
        self,
        path: str,
        plan: Any,
        end: Callable[[Any, Rows, Any], Any],
        *,
        forward_only: bool,
        remember: bool = False,
        again: bool = False,
    ) -> None:
        """Take all micro-batches through all stages; `end` is called at the last one."""
        counts = dict.fromkeys(range(len(self._chunks)), 0)

        def one(chunk: Any, state: Rows, part: Any) -> Rows:
            place = self._chunks.index(chunk)
            key = (path, place, counts[place])
            counts[place] += 1
            if remember:
                self._random[key] = random_state()
            elif again:
                set_random_state(self._random[key])
            return chunk.run(path, part, state)

        if not self._pipelined:
            for part in plan.batches:
                with self._computing("forward"):
                    loss = end(self._chunks[0], one(self._chunks[0], {}, part), part)
                if not forward_only:
                    self._learn(loss)
            return

        def timed(chunk: Any, state: Rows, part: Any) -> Rows:
            with self._computing("forward"):
                return one(chunk, state, part)

        # What is not forward is backward, and waiting for the stages beside this one.
        with self._watch.phase("communication" if forward_only else "backward"):
            _through_stages(self._wrapped, plan.batches, timed, end, forward_only=forward_only)

    # --- terms ------------------------------------------------------------------------------

    def _agree(self, terms: Rows) -> Terms:
        """Means over the ranks that know them, on every rank."""
        with self._watch.phase("communication"):
            return self._means(terms)

    def _means(self, terms: Rows) -> Terms:
        import torch
        import torch.distributed as dist

        names = list(terms)
        if self._pipelined:
            (names,) = _from_last_stage([names])
        zeros = [0.0] * len(names)
        own = [float(terms[name]) for name in names] if self._is_last else zeros
        values = torch.tensor(own, dtype=torch.float64, device=install().kind)
        dist.all_reduce(values)
        means = (values * self._layout.pipeline / dist.get_world_size()).tolist()
        return dict(zip(names, means, strict=True))


# --- pipeline -----------------------------------------------------------------------------------


@dataclass
class _Feed:
    """Hands every chunk the same micro-batches, each chunk at its own pace."""

    batches: Sequence[Any]
    place: int = field(default=0)

    def __next__(self) -> Any:
        batch = self.batches[self.place]
        self.place += 1
        return batch


def _through_stages(
    wrapped: Sequence[Any],
    batches: Sequence[Any],
    one: Callable[[Any, Rows, Any], Rows],
    end: Callable[[Any, Rows, Any], Any],
    *,
    forward_only: bool,
) -> None:
    """Megatron's 1F1B schedule, or the interleaved one where there are several chunks."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    last = _pipeline_rank() == _pipeline_size() - 1

    def step(feed: _Feed, outer: Any) -> tuple[Any, Callable]:
        chunk, part = getattr(outer, "module", outer), next(feed)
        came = chunk.input_tensor
        state = one(chunk, {} if came is None else unpack(came), part)
        if not (last and outer is wrapped[-1]):
            return pack(state, came, chunk.config.pipeline_dtype), _never
        loss = end(chunk, state, part)
        if loss is None:
            return torch.zeros(()), _as_it_is
        if came is not None:  # a gradient must travel back even if nothing depends on the packet
            loss = loss + came[:0].sum()
        # The schedule divides by the number of micro-batches; ours add up.
        return loss * len(batches), _as_it_is

    feeds: list[Any] = [_Feed(batches) for _ in wrapped]  # a chunk takes what it needs
    with device_literals():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=feeds if len(wrapped) > 1 else feeds[0],
            model=list(wrapped) if len(wrapped) > 1 else wrapped[0],
            num_microbatches=len(batches),
            seq_length=1,  # shapes travel with the tensors; these two are not looked at
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _as_it_is(output: Any) -> tuple[Any, dict]:
    return output, {}


def _never(_output: Any) -> Any:
    raise AssertionError("Megatron asked a stage for a loss that is not the last one")


def pack(state: Rows, came: Any, dtype: Any) -> Any:
    """A stage's tensors as one [N, 1, 1], which is what schedules send: header, then contents.

    The header is JSON of names and shapes behind its length, its bytes taken for numbers of
    `dtype`. Nothing is added to them or multiplied with them, so they stay what they are.

    Args:
        state: tensors of `dtype` by name.
        came: what this stage itself was sent, or None; the result hangs on it in any case, or no
            gradient would travel back and the stage before would wait for it forever.
        dtype: of the numbers.
    """
    import torch

    facts = json.dumps({name: list(tensor.shape) for name, tensor in state.items()}).encode()
    text = len(facts).to_bytes(8, "little") + facts
    text += bytes(-len(text) % 8)
    header = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(install().kind).view(dtype)
    contents = [tensor.reshape(-1) for tensor in state.values()]
    tail = [] if came is None else [came.reshape(-1)[:0]]
    return torch.cat([header, *contents, *tail]).view(-1, 1, 1)


def unpack(packet: Any) -> Rows:
    """The tensors that `pack` put together; gradients go back into the packet."""
    import torch

    flat = packet.view(-1)
    raw = flat.detach()
    size = raw.element_size()
    length = int(raw[: 8 // size].view(torch.int64))
    end = 8 + length + -(8 + length) % 8
    text = bytes(raw[8 // size : end // size].cpu().view(torch.uint8).numpy()[:length])
    shapes: dict[str, list[int]] = json.loads(text)
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = flat.split([end // size, *sizes])[1:]
    return {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}


def _from_last_stage(value: Any) -> Any:
    """What the pipeline's last rank has, on all of them."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    group: Group = parallel_state.get_pipeline_model_parallel_group()
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=group.size() - 1)
    return box[0]


def _pipeline_rank() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_rank()


def _pipeline_size() -> int:
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_world_size()


def random_state() -> Any:
    """PyTorch's (a GPU has one of its own) and Megatron's, to be put back with
    `set_random_state`."""
    import torch
    from megatron.core import tensor_parallel

    gpu = torch.cuda.get_rng_state() if install().kind == "cuda" else None
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    return torch.get_rng_state(), tracker.get_states(), gpu


def set_random_state(state: Any) -> None:
    """Put back what `random_state` gave."""
    import torch
    from megatron.core import tensor_parallel

    torch.set_rng_state(state[0])
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states(state[1])
    if state[2] is not None:
        torch.cuda.set_rng_state(state[2])
