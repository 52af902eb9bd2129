"""Layers with more than one map a head, as LoopCoder-V2's second loop has them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import loopscope
from loopscope.errors import ConfigError
from loopscope.models.hooks.hooked import HookedSubject

IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]
WINDOW = 3


class Layer(nn.Module):
    """The first loop attends to itself. The next mix, by a gate for each head, what they see among the keys of the
    first loop with what they see among their own in a window."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.gate = nn.Linear(16, 48, bias=False), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, kept: list[tuple[Tensor, Tensor]], window: Tensor) -> Tensor:
        normed = functional.rms_norm(x, x.shape[-1:])
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(normed).chunk(3, -1))
        first = not kept
        kept.append((key, value))
        mixed = functional.scaled_dot_product_attention(query, *kept[0], is_causal=True)
        if not first:
            near = functional.scaled_dot_product_attention(query, key, value, attn_mask=window)
            gate = self.gate(x).sigmoid().transpose(1, 2)[..., None]
            mixed = gate * mixed + (1 - gate) * near
        put_out: Tensor = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return put_out


class ParallelLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.head, self.loops = nn.Embedding(20, 16), nn.RMSNorm(16), nn.Linear(16, 20), 2
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1])
        behind = place[:, None] - place
        window = (behind >= 0) & (behind < WINDOW)
        embedded = hidden = self.embedding(tokens)
        kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        for loop in range(self.loops):
            hidden = 0.707 * embedded + 0.053 * self.norm(hidden) if loop else hidden
            for layer, of_layer in zip(self.layers, kept, strict=True):
                hidden = layer(hidden, of_layer, window)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


@pytest.fixture(scope="module")
def model() -> ParallelLoop:
    return ParallelLoop().eval()


def test_its_loop_is_found_and_no_map_is_guessed(model: ParallelLoop) -> None:
    subject = loopscope.hook(model)
    assert (subject.info.prelude, subject.info.recurrent, subject.info.coda) == (0, 2, 0)
    assert "loops sets how often" in str(subject.found)
    assert sum("2 attentions were computed in it, where one was expected" in each for each in subject.unobservable) == 2
    trace = loopscope.capture(subject, IDS, recurrences=2)
    assert torch.equal(trace.logits, model(torch.tensor(IDS)))
    with pytest.raises(KeyError):
        loopscope.capture(subject, IDS, attention=True).attention("recurrent", 0, 2)


def test_recurrences_that_look_at_the_first_are_no_one_map(model: ParallelLoop) -> None:
    subject = loopscope.hook(model)
    assert subject.no_one_map is not None
    with pytest.raises(ConfigError, match="No eigenvalues can be taken"):
        loopscope.leading_eigenvalues(subject, IDS, recurrences=2)


@pytest.mark.parametrize("shown", [0, 1, -1])
def test_which_map_is_shown_is_a_choice_that_is_said(model: ParallelLoop, shown: int) -> None:
    subject = loopscope.hook(model, attention_call=shown)
    assert isinstance(subject, HookedSubject)
    said = f"up to 2 maps a head are shown by one of them, attention_call={shown}; what the others look at"
    assert any(said in sentence for sentence in subject.unobservable)
    trace = loopscope.capture(subject, IDS, recurrences=2, attention=True)
    first, second = (trace.attention("recurrent", 0, loop) for loop in (1, 2))
    in_window = torch.ones(8, 8).tril().triu(1 - WINDOW).bool()
    assert bool(first[..., ~in_window].sum() > 0)
    assert bool((second[..., ~in_window] == 0).all()) == (shown != 0)
    torch.testing.assert_close(second.sum(-1), torch.ones(1, 2, 8))
    received = trace.injected(2)
    query, key, _ = (
        part.unflatten(-1, (2, 8)).transpose(1, 2)
        for part in model.layers[0].get_submodule("qkv")(functional.rms_norm(received, (16,))).chunk(3, -1)
    )
    if shown != 0:
        scores = (query @ key.mT / 8**0.5).masked_fill(~in_window, float("-inf"))
        torch.testing.assert_close(second, scores.softmax(-1).detach())
