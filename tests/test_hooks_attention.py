"""Attention maps of models that hand none out: those that the model used, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import loopscope
from foreign_models import HEADS, PATHS, ForeignLoop
from loopscope.models.contract.check import check_subject
from loopscope.models.hooks.attention import AttentionWatch
from loopscope.models.subject import Batch
from loopscope.models.visits import AttentionView

BATCH = Batch.of([[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]])


def test_eager_attention_and_sdpa_give_the_same_maps() -> None:
    eager, fused = (loopscope.hook(ForeignLoop(eager=value).eval(), **PATHS) for value in (True, False))
    traces = [
        loopscope.capture(subject, BATCH.input_ids, attention_mask=BATCH.mask, attention=True)
        for subject in (eager, fused)
    ]
    for site in traces[0].visits:
        torch.testing.assert_close(traces[0].attention(*site), traces[1].attention(*site), rtol=1e-5, atol=1e-6)
        sums = traces[1].attention(*site).sum(-1)
        torch.testing.assert_close(sums, BATCH.mask[:, None].float().expand_as(sums))
    assert eager.info.heads == fused.info.heads == HEADS


def seen(batch: int, tokens: int, mask: Tensor | None, call: Any) -> AttentionView | None:
    watch = AttentionWatch(batch, tokens, mask)
    with watch:
        call()
    return watch.collect()[0]


@given(data=st.data())
def test_the_map_times_the_values_is_what_sdpa_returned(data: st.DataObject) -> None:
    """For every way to call it: the weights are told from the output by values that are the unit vectors."""
    draw = data.draw
    batch, groups, repeats, tokens, dim = (draw(st.integers(1, most)) for most in (3, 2, 3, 7, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    query = torch.randn(batch, groups * repeats, tokens, dim, generator=generator)
    key = torch.randn(batch, groups, tokens, dim, generator=generator)
    value = torch.eye(tokens).expand(batch, groups, tokens, tokens)
    arguments: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.3])), "enable_gqa": repeats > 1}
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    shape = draw(st.sampled_from([(tokens, tokens), (batch, 1, tokens, tokens), (1, 1, 1, tokens)]))
    if kind == "causal":
        arguments["is_causal"] = True
    elif kind == "bool":
        mask = torch.rand(shape, generator=generator) < 0.6
        mask[..., 0] = True
        arguments["attn_mask"] = mask
    elif kind == "float":
        arguments["attn_mask"] = torch.randn(shape, generator=generator)
    returned: list[Tensor] = []

    def call() -> None:
        returned.append(functional.scaled_dot_product_attention(query, key, value, **arguments))

    view = seen(batch, tokens, None, call)
    assert view is not None
    torch.testing.assert_close(view.probabilities(), returned[0], rtol=1e-5, atol=1e-6)
    if tokens > 1:
        torch.testing.assert_close(view.rows(1, tokens), returned[0][:, :, 1:], rtol=1e-5, atol=1e-6)


def test_one_token_whose_grouped_heads_stand_in_the_place_of_queries() -> None:
    """As transformers calls it where a text is one token long."""
    query, key = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 1, 8)
    view = seen(2, 1, None, lambda: functional.scaled_dot_product_attention(query, key, key))
    assert view is not None
    assert torch.equal(view.probabilities(), torch.ones(2, 12, 1, 1))


@pytest.mark.parametrize(
    "call",
    [
        lambda: None,
        lambda: functional.softmax(torch.randn(2, 3, 5, 6), dim=-1),
        lambda: functional.softmax(torch.randn(2, 3, 5, 5), dim=-2),
        lambda: functional.softmax(torch.randn(1, 3, 5, 5), dim=-1),
        lambda: functional.softmax(torch.randn(2, 5, 5), dim=-1),
        lambda: [functional.softmax(torch.randn(2, 3, 5, 5), dim=-1) for _ in range(2)],
        lambda: functional.scaled_dot_product_attention(*torch.randn(3, 6, 5, 4)),
        lambda: functional.scaled_dot_product_attention(torch.randn(2, 3, 5, 4), *torch.randn(2, 2, 3, 7, 4)),
        lambda: [functional.scaled_dot_product_attention(*torch.randn(3, 2, 3, 5, 4)) for _ in range(2)],
    ],
    ids=["nothing", "sinks", "queries", "batch", "3-D", "two maps", "no batch", "other keys", "two calls"],
)
def test_what_is_not_plainly_the_attention_of_the_tokens_is_not_taken_for_it(call: Any) -> None:
    assert seen(2, 5, None, call) is None


@pytest.mark.parametrize("place", [0, 5])
def test_what_goes_to_a_sink_is_seen_wherever_it_stands(place: int) -> None:
    scores = torch.randn(2, 3, 5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
    scores = torch.cat((scores[..., :place], torch.randn(2, 3, 1, 1).expand(2, 3, 5, 1), scores[..., place:]), -1)
    watch = AttentionWatch(2, 5, None)
    with watch:
        maps = scores.softmax(-1)
    view, sink, calls = watch.collect()
    assert (view, calls) == (None, 1)
    assert sink is not None
    assert torch.equal(sink, maps[..., place])
    looking_ahead = AttentionWatch(2, 5, None)
    with looking_ahead:
        torch.randn(2, 3, 5, 6).softmax(-1)
    assert looking_ahead.collect() == (None, None, 1)  # no column is plainly the sink


class Unusual(ForeignLoop):
    """Its first layer attends twice and its second not at all."""

    class Twice(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
            twice: Tensor = self.block(self.block(x, allowed), allowed)
            return twice

    class Never(nn.Module):
        def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
            return x.cumsum(1)

    def __init__(self) -> None:
        super().__init__()
        self.enter[0] = self.Twice(self.enter[0])
        self.enter[1] = self.Never()


class OfTorch(nn.Module):
    """Two passes through a layer as torch has it, which computes attention in one call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 12), nn.Linear(12, 20)
        self.layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            x = self.layer(x, src_key_padding_mask=~attention_mask)
        logits: Tensor = self.head(x)
        return logits


def test_the_attention_of_torchs_own_layers_is_seen() -> None:
    model = OfTorch().eval()
    subject = loopscope.hook(model, recurrent="layer")
    assert subject.info.injection == "none"
    check_subject(subject, causal=False, other_recurrences=())
    trace = loopscope.capture(subject, BATCH.input_ids, attention_mask=BATCH.mask, attention=True)
    x = trace.injected(1)
    _, maps = model.layer.self_attn(x, x, x, ~BATCH.mask, average_attn_weights=False)
    rows = BATCH.mask[:, None, :, None].expand_as(maps)
    torch.testing.assert_close(trace.attention("recurrent", 0, 1)[rows], maps[rows])
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_that_cannot_be_seen_is_none_and_said() -> None:
    subject = loopscope.hook(Unusual().eval(), **PATHS)
    trace = loopscope.capture(subject, BATCH.input_ids, attention=True)
    assert trace.attention("recurrent", 1, 3).shape == (3, HEADS, 5, 5)
    for layer in (0, 1):
        with pytest.raises(KeyError, match=f"attention of layer {layer} in the prelude of Unusual cannot be seen"):
            trace.attention("prelude", layer)
    said = [sentence for sentence in subject.unobservable if sentence.startswith("Attention")]
    assert said == [
        "Attention of prelude.0 (enter.0): 2 attentions were computed in it, where one was expected (attention_call= "
        "shows one).",
        "Attention of prelude.1 (enter.1): no attention that is understood was computed in it, where one was expected.",
    ]
