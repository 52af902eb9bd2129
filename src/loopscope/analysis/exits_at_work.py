"""An exit rule at work in generation: its signals, computed while tokens go around."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from loopscope._util.shapes import States, TokenValues
from loopscope.answers.stopping import StoppingRule
from loopscope.errors import ConfigError
from loopscope.measures.functions import acceleration, distances, residual_norm, widen
from loopscope.measures.readout import TokenDistribution
from loopscope.models.native.exit import exit_cumulated, exit_distribution
from loopscope.models.subject import SubjectInfo


class RuleAtWork:
    """Which tokens a rule stops, of what a study would know of them: the same functions of the same states, kept in the
    same precision, make the variables from which the rule's signals follow."""

    def __init__(self, rule: StoppingRule, info: SubjectInfo, recurrences: int) -> None:
        """Raises `ConfigError` for a rule that is open or can never fire, and for one that goes by an exit gate that
        the model does not have."""
        rule.check_can_fire(recurrences)
        self._rule = rule
        self._wanted = {name for signal in rule.signals for name in signal.variables}
        self.decodes = any(signal.decodes for signal in rule.signals)
        self.attends = "token_attention_change" in self._wanted
        if "token_exit_cumulated" in self._wanted and info.exit_threshold is None:
            raise ConfigError(f"{info.name} has no exit gate, which the exit rule {rule} goes by.")
        self._stored = torch.float64 if info.dtype == "float64" else torch.float32
        self._known: dict[str, list[NDArray[np.generic]]] = {}
        self._states: list[Tensor] = []
        """The initial one, and those after each recurrence; the last three."""
        self._gates: list[Tensor] = []
        self._prediction: TokenDistribution | None = None
        self._maps: Sequence[Tensor] = ()

    def begin(self, state: States) -> None:
        self._known = {name: [] for name in self._wanted}
        self._states, self._gates, self._prediction, self._maps = [state[:, 0]], [], None, ()

    def after(
        self,
        state: States,
        gate: TokenValues | None,
        logits: Float[Tensor, "row vocabulary"] | None,
        maps: Sequence[Float[Tensor, "row head key"]],
    ) -> Bool[Tensor, " row"]:
        found = self._of_states(state[:, 0]) | self._of_prediction(logits) | self._of_maps(maps) | self._of_gate(gate)
        for name in self._wanted:
            values = found[name]
            kept = values if name in ("token_top1", "token_exit_cumulated") else values.to(self._stored)
            self._known[name].append(kept.cpu().numpy())
        stops = torch.from_numpy(self._rule.fires({name: np.stack(each) for name, each in self._known.items()})[-1])
        self._keep(~stops)
        return stops

    def _of_states(self, state: Tensor) -> dict[str, Tensor]:
        before, wide = self._states[-1], state.double()
        norm = residual_norm(wide)
        step, turned = distances(wide, norm, before, residual_norm(before.double()))
        found = {
            "token_successive_difference": step,
            "token_relative_step": step / norm,
            "token_cosine_distance_to_previous": turned,
            "token_residual_norm": norm,
            "token_acceleration": torch.full_like(norm, torch.nan),
        }
        if len(self._states) > 1:
            found["token_acceleration"] = acceleration(state, before, self._states[-2])
        self._states = [*self._states[-1:], state]
        return found

    def _of_prediction(self, logits: Tensor | None) -> dict[str, Tensor]:
        if logits is None:
            return {}
        made, before = TokenDistribution.of(logits), self._prediction
        top1, margin, probability = made.top
        self._prediction = made
        return {
            "token_kl_to_previous": torch.full_like(margin, torch.nan) if before is None else before.divergence(made),
            "token_entropy": made.entropy,
            "token_margin": margin,
            "token_top1_probability": probability,
            "token_top1": top1,
        }

    def _of_maps(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Root mean square over layers and heads of how far a token's row has moved."""
        if not maps:
            return {}
        before, self._maps = self._maps, maps
        if not before:
            return {"token_attention_change": torch.full((len(maps[0]),), torch.nan)}
        home = maps[0].device
        moved = [
            (now - then).double().square().sum(-1).mean(-1).to(home) for now, then in zip(maps, before, strict=True)
        ]
        return {"token_attention_change": torch.stack(moved).mean(0).sqrt()}

    def _of_gate(self, gate: Tensor | None) -> dict[str, Tensor]:
        if gate is None:
            return {}
        self._gates.append(gate)
        # The last of a distribution takes all that is left: one more is put behind, and left out.
        cumulated = exit_cumulated(exit_distribution([*self._gates, gate])[..., :-1])
        return {"token_exit_cumulated": widen(cumulated)[:, 0, -1]}

    def _keep(self, going: Bool[Tensor, " row"]) -> None:
        """Only what is known of the tokens that go on."""
        if bool(going.all()):
            return
        rows = going.numpy()
        self._known = {name: [each[rows] for each in values] for name, values in self._known.items()}
        self._states = [each[going] for each in self._states]
        self._gates = [each[going] for each in self._gates]
        self._maps = [each[going] for each in self._maps]
        made = self._prediction
        if made is not None:
            self._prediction = TokenDistribution(made.scores[going], made.normalizer[going])
