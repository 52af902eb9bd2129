"""What cannot be seen of a model from outside, in sentences for its user."""

from __future__ import annotations

from loopscope.models.hooks.layout import HookLayout
from loopscope.models.hooks.probe import Facts, Padding
from loopscope.models.subject import PrefixReading

OF_ALL_MODELS = ("Norms: where they stand within a layer.",)
OF_ALL_LOOPS = (
    "Path independence: the model makes its initial state itself, so the loop cannot be begun from another.",
    "Noise floor: the rounding error of a recurrence would need the model's arithmetic in another dtype.",
    "Exit gates: what makes a model answer some tokens from an earlier recurrence.",
)


PREFIX: dict[PrefixReading, str] = {
    "trained": "Direction: the model was trained to read a prompt in both directions (prefix_lm), and does so here; "
    "with prefix='causal' (--prefix causal) no token sees a later one.",
    "causal": "Direction: the model was trained to read a prompt in both directions (prefix_lm), and reads it causally "
    "here; prefix='trained' (--prefix trained) reads it as it was trained.",
}


def no_one_map(facts: Facts) -> str | None:
    """Why the recurrences are not one map of what the first layer receives, so that there is nothing to linearise."""
    if facts.restarts:
        return (
            "every recurrence begins with the same input of its first layer, so that what goes round passes beside it"
        )
    if facts.one_map is False:
        return (
            "entered with the same input of the first layer, two recurrences give different numbers: each is a map of "
            "its own, by the number of the recurrence (an embedding or weights for each), or a part of the state "
            "passes beside that layer"
        )
    return None


def no_padding(padding: Padding, takes_mask: bool) -> str | None:
    """Why the model cannot have prompts of different lengths in one batch; None where it can."""
    if not (takes_mask or padding.causal):
        return "the model takes no attention_mask and is not causal, so its tokens would look at padding"
    return None if padding.effect is None else f"when a prompt is padded, {padding.effect}"


def unobservable(
    layout: HookLayout,
    facts: Facts,
    padding: Padding,
    branches: str | None,
    *,
    settable: bool,
    takes_mask: bool,
    tokens_before: int,
    attention_call: int | None,
) -> list[str]:
    """One sentence for each thing."""
    found = list(OF_ALL_MODELS)
    if tokens_before:
        found.append(
            f"Tokens before the text: the states of the {tokens_before} that the model puts there, and so attention to "
            "them."
        )
    if facts.only_tokens is not None:
        found.append(
            f"Other lengths: the model failed on fewer and on more than {facts.only_tokens} tokens, so prompts must "
            "have that many."
        )
    if facts.vocab_size == facts.width:
        found.append(
            f"Logits: what the model returns is as wide as its states, {facts.width}; if it is a state, readouts and "
            "answers mean nothing, and forward= must return the logits."
        )
    if branches is not None:
        found.append(f"Layers: {branches}.")
    if layout.recurrent:
        found += _of_the_loop(facts, settable)
    found += _of_attention(layout, facts)
    if attention_call is not None and facts.attention_calls > 1:
        found.append(
            f"Attention: layers that compute up to {facts.attention_calls} maps a head are shown by one of them, "
            f"attention_call={attention_call}; what the others look at, and how they are weighed, is not seen."
        )
    if facts.random:
        found.append(
            "Random states: they are drawn for a whole batch at once, so numbers depend on what is in a batch."
        )
    if facts.only_tokens is not None:
        return found  # which leaves nothing to pad
    if not takes_mask and padding.causal and padding.effect is None:
        found.append(
            "Padding: the model takes no attention_mask, and as it is causal, padding behind a prompt changes rounding "
            "alone."
        )
    elif (reason := no_padding(padding, takes_mask)) is not None:
        found.append(f"Padding: {reason}, so prompts of different lengths are run apart.")
    return found


def _of_the_loop(facts: Facts, settable: bool) -> list[str]:
    found = []
    if facts.carries is False:
        found.append(
            "Injection and initial state: the first recurrent layer receives something else than the loop state, and "
            "what was added to it cannot be told apart."
        )
    elif facts.prompt_enters:
        found.append("Injection: the prompt enters within the loop, in a way that cannot be told from outside.")
    elif facts.carries is None:
        found.append(
            "Injection and initial state: only one recurrence can be run, so it is not known what the next would get."
        )
    if not settable:
        found.append(
            f"Other numbers of recurrences than {facts.recurrences}: set_recurrences was not given, "
            "so there is no horizon."
        )
    return [*found, *loop_limits(facts), *OF_ALL_LOOPS]


def loop_limits(facts: Facts) -> list[str]:
    """In what the loop is not one map that is applied again and again, which limits what a study of it means."""
    found = []
    if facts.keeps:
        found.append(
            "Halting: of some tokens the model keeps the state from before a recurrence and throws away what its "
            "layers put out, which is then no state of theirs."
        )
    reason = no_one_map(facts)
    if reason is not None:
        found.append(
            f"Eigenvalues, and what a fixed point is one of: {reason}. A state that stops moving is seen all the same."
        )
    if facts.foresees:
        found.append(
            "Convergence: the loop knows how often it will run, so that runs of different numbers of recurrences are "
            "different computations, and none stands in for another's fixed point."
        )
    return found


def _of_attention(layout: HookLayout, facts: Facts) -> list[str]:
    found = []
    for (stage, layer), calls in facts.unseen.items():
        path = layout.stage(stage)[layer].path
        reason = {
            0: "no attention that is understood was computed in it, where one was expected",
            1: "what was computed in it has other queries or keys than the prompt's tokens"
            + ("" if facts.sink_heads is None else "; of a sink beside them, what goes to it is measured (sink_mass)"),
        }.get(calls, f"{calls} attentions were computed in it, where one was expected (attention_call= shows one)")
        found.append(f"Attention of {stage}.{layer} ({path}): {reason}.")
    layers = len(layout.prelude) + len(layout.recurrent) + len(layout.coda)
    if facts.heads is None and len(facts.unseen) < layers:
        found.append("Heads: the layers have different numbers of them, so that they are not compared head by head.")
    return found
