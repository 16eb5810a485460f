"""A layout that cannot work, or would be silently wrong, is refused before anything starts."""

import pytest

from vlfoundry.infra.backend.layout import Layout, ModelFacts
from vlfoundry.infra.core.errors import LayoutError

VISION = ModelFacts(name="vision", heads=25, width=3200, mlp_hidden=12800, pads_heads=True)
TEXT = ModelFacts(name="text", heads=32, width=4096, mlp_hidden=11008, key_value_heads=8)


def test_interleaved_two_stages_with_batched_p2p_is_refused():
    with pytest.raises(LayoutError, match=r"wrong gradients silently; set layout\.batch_p2p"):
        Layout(pipeline=2, virtual_pipeline=2, batch_p2p=True).check()


def test_interleaved_two_stages_alone_choose_unbatched_p2p():
    layout = Layout(pipeline=2, virtual_pipeline=2)
    layout.check(VISION)
    assert not layout.batched_p2p
    assert Layout(pipeline=2).batched_p2p


def test_interleaved_four_stages_may_batch():
    Layout(pipeline=4, virtual_pipeline=2, batch_p2p=True).check()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=3), r"text: heads 32 does not divide by tensor 3 \(32 = 3 x 10 \+ 2\)"),
        (Layout(tensor=16), r"key_value_heads 8 does not divide by tensor 16"),
        (Layout(micro_batch_samples=0), r"layout.micro_batch_samples is 0; expected at least 1"),
        (Layout(sequence_parallel=True), r"sequence_parallel needs layout.tensor of at least 2"),
        (Layout(virtual_pipeline=2), r"virtual_pipeline is 2 with layout.pipeline 1"),
        (Layout(data=0), r"layout.data is 0; expected at least 1"),
    ],
)
def test_refused_with_the_arithmetic(layout, message):
    with pytest.raises(LayoutError, match=message):
        layout.check(TEXT)


def test_padded_heads_need_not_divide():
    Layout(tensor=4).check(VISION)


@pytest.mark.parametrize(
    ("layout", "samples", "count"),
    [
        (Layout(), 64, 1),
        (Layout(micro_batch_samples=10), 64, 7),
        (Layout(pipeline=2), 64, 4),
        (Layout(pipeline=2), 3, 3),
        (Layout(pipeline=2, virtual_pipeline=2, micro_batch_samples=10), 64, 8),
    ],
)
def test_micro_batches_fill_a_pipeline(layout, samples, count):
    assert layout.micro_batches(samples) == count


def test_world_size_is_the_product():
    layout = Layout(tensor=2, pipeline=2, data=3)
    layout.check(ranks=12)
    with pytest.raises(LayoutError, match="tensor 2 x pipeline 2 x data 3 = 12 ranks, but 8"):
        layout.check(ranks=8)


def test_config_of_an_interleaved_layout_does_not_batch(run_ranks):
    def flags():
        from vlfoundry.infra.backend import transformer_config

        config = transformer_config(
            Layout(pipeline=2, virtual_pipeline=2),
            num_layers=4,
            hidden_size=8,
            num_attention_heads=2,
        )
        return config.batch_p2p_comm, config.overlap_p2p_comm, config.bias_dropout_fusion

    assert run_ranks(flags, ranks=1) == [(False, True, False)]
