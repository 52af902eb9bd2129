"""Which layers of a module are watched, how they are found, and the order in which a forward pass has to call them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loopscope._util.sites import Site, Stage
from loopscope.errors import ConfigError
from loopscope.models.hooks.calls import is_pretrained

Layers = str | nn.Module | Sequence[str | nn.Module]
"""A dotted path or a module, or several of them. A list of layers stands for its layers."""


@dataclass(frozen=True, slots=True)
class HookedLayer:
    """A layer and where it lies in the model."""

    path: str
    module: nn.Module


@dataclass(frozen=True, slots=True)
class HookLayout:
    """The layers that are watched, in the order of their calls; a layer may be called more than once."""

    prelude: tuple[HookedLayer, ...]
    recurrent: tuple[HookedLayer, ...]
    """The calls of one recurrence."""
    coda: tuple[HookedLayer, ...]
    loop_end: HookedLayer | None = None
    """Called at each recurrence's end; its output is what is carried on. None: the last layer's output is."""
    other_states: tuple[int, ...] = ()
    """Places among the recurrent ones of layers that end a further state which goes around."""

    def __post_init__(self) -> None:
        if not self.prelude and not self.recurrent:
            raise ConfigError("There is no layer to watch; name at least a prelude or a recurrent block.")
        if self.loop_end is not None and not self.recurrent:
            raise ConfigError(f"loop_end={self.loop_end.path!r} means nothing without recurrent layers.")

    @property
    def modules(self) -> list[nn.Module]:
        """The layers' modules, each once."""
        return list(dict.fromkeys(layer.module for layer in (*self.prelude, *self.recurrent, *self.coda)))

    def stage(self, stage: Stage) -> tuple[HookedLayer, ...]:
        return {"prelude": self.prelude, "recurrent": self.recurrent, "coda": self.coda}[stage]


class Cursor:
    """Follows the calls of one forward pass. Raises `ConfigError` for a call that the layout does not announce."""

    def __init__(self, layout: HookLayout, recurrences: int | None) -> None:
        self._layout = layout
        self._asked = recurrences
        self.done = {"prelude": 0, "recurrent": 0, "coda": 0}
        """Calls so far; of the recurrent layers, those in this recurrence."""
        self.recurrences = 0
        """Recurrences that are over."""

    def enter(self, module: nn.Module) -> Site:
        """The visit that begins with this call."""
        expected = list(self._expected())
        for site, layer in expected:
            if layer.module is module:
                return site
        raise ConfigError(
            f"The model called {self._path(module)} where {self._names(expected)} was expected, after "
            f"{self._so_far()}; {self._advice(expected, module)}"
        )

    def leave(self, site: Site) -> bool:
        """The visit is over. Whether it was the recurrence's last."""
        self.done[site.stage] += 1
        if site.stage != "recurrent" or self.done["recurrent"] < len(self._layout.recurrent):
            return False
        self.done["recurrent"] = 0
        self.recurrences += 1
        return True

    def finish(self) -> None:
        """The forward pass is over."""
        expected = list(self._expected())
        # An unknown number of recurrences may be the number there was.
        if any(site.stage != "recurrent" or site.layer or not self._may_end() for site, _ in expected):
            raise ConfigError(
                f"The forward pass ended after {self._so_far()}, where {self._names(expected)} was expected; "
                f"{self._advice(expected, None)}"
            )

    def _may_end(self) -> bool:
        return self._asked is None and self.recurrences > 0 and not self._layout.coda

    def _expected(self) -> Iterator[tuple[Site, HookedLayer]]:
        """What may be called next: one layer, or none, or two where the number of recurrences is not known."""
        layout, done = self._layout, self.done
        if done["prelude"] < len(layout.prelude):
            yield self._next("prelude")
            return
        if layout.recurrent and done["coda"] == 0:
            if done["recurrent"] or self._asked is None or self.recurrences < self._asked:
                yield self._next("recurrent")
            if done["recurrent"] or self.recurrences < (1 if self._asked is None else self._asked):
                return
        if done["coda"] < len(layout.coda):
            yield self._next("coda")

    def _next(self, stage: Stage) -> tuple[Site, HookedLayer]:
        index = self.done[stage]
        recurrence = self.recurrences + 1 if stage == "recurrent" else 0
        return Site(stage, index, recurrence), self._layout.stage(stage)[index]

    def _advice(self, expected: Sequence[tuple[Site, HookedLayer]], called: nn.Module | None) -> str:
        recurrent = self._layout.recurrent
        between = self.recurrences > 0 and self.done["recurrent"] == 0 and self.done["coda"] == 0
        too_many = called is not None and bool(recurrent) and called is recurrent[0].module
        too_few = any(site.stage == "recurrent" for site, _ in expected)
        if between and self._asked is not None and too_many != too_few:
            return (
                f"{self._asked} recurrences were to be run: set_recurrences must set their number, and it must be the "
                "same whatever the tokens are (set the tolerance or threshold of a model that stops by itself so that "
                "it does not)."
            )
        if called is None:
            return "name only layers that it calls, in the order of the calls."
        return "give the layers in the order in which the forward pass calls them."

    def _names(self, expected: Sequence[tuple[Site, HookedLayer]]) -> str:
        return " or ".join(f"{layer.path} ({site.label})" for site, layer in expected) or "no further layer"

    def _path(self, module: nn.Module) -> str:
        layout = self._layout
        return next(
            layer.path for layer in (*layout.prelude, *layout.recurrent, *layout.coda) if layer.module is module
        )

    def _so_far(self) -> str:
        done = self.done
        return (
            f"{done['prelude']} prelude visits, {self.recurrences} recurrences and {done['recurrent']} visits of the "
            f"next, and {done['coda']} coda visits"
        )


def find_layers(model: nn.Module, given: Layers | None, argument: str) -> tuple[HookedLayer, ...]:
    """The layers that a path, a module or a list of either stands for. Raises `ConfigError` for what is not there."""
    if given is None:
        return ()
    single = isinstance(given, str | nn.Module)
    found: list[HookedLayer] = []
    for entry in [given] if single else given:  # type: ignore[union-attr]
        layer = find_module(model, entry, argument)  # type: ignore[arg-type]
        if isinstance(layer.module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            found += [HookedLayer(f"{layer.path}.{name}", child) for name, child in layer.module.named_children()]
        else:
            found.append(layer)
    if not found:
        raise ConfigError(f"{argument}={given!r} holds no layer; leave it out.")
    return tuple(found)


def find_module(model: nn.Module, given: str | nn.Module, argument: str) -> HookedLayer:
    """One module of the model. Raises `ConfigError` for one that is not there."""
    if isinstance(given, nn.Module):
        for path, module in model.named_modules():
            if module is given:
                return HookedLayer(path, module)
        raise ConfigError(f"{argument} was given a {type(given).__name__} that is no part of the model.")
    reached = model
    for part in given.split("."):
        children = dict(reached.named_children())
        if part not in children:
            there = ", ".join(list(children)[:8]) or "no modules"
            raise ConfigError(
                f"{argument}={given!r} leads nowhere: {type(reached).__name__} has no module {part!r}, but {there}."
            )
        reached = children[part]
    return HookedLayer(given, reached)


def two_stacks(model: nn.Module) -> HookLayout | None:
    """Of HRM-Text; None for any other model. A recurrence is one high cycle: the L stack, L_cycles times, then the H
    stack.

    Two states go around, z_H and z_L. The loop state is z_H, which the head reads at the end; z_L is whole after the
    last cycle of the L stack.
    """
    config: Any = getattr(model, "config", None)
    if not (is_pretrained(model) and hasattr(config, "H_cycles") and hasattr(config, "L_cycles")):
        return None
    prefix = getattr(model, "base_model_prefix", "")  # of the model under its head, where it has one
    base = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    low, high = (
        find_layers(model, f"{base}{name}.layers", "the layout of a two-stack model")
        for name in ("L_module", "H_module")
    )
    end = find_module(model, f"{base}H_module", "the layout of a two-stack model")
    cycles = low * config.L_cycles
    return HookLayout(prelude=(), recurrent=cycles + high, coda=(), loop_end=end, other_states=(len(cycles) - 1,))


def decoder_layers(model: Any) -> tuple[HookedLayer, ...]:
    """Of a model of transformers that cannot be run: the one list that has as many layers as the configuration says,
    all of one shape: modules with children. Raises `ConfigError` where there is no such list."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all(any(layer.children()) for layer in module)
    }
    # The experts of a mixture may be as many as the layers that hold them.
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists if other != path)]
    if len(outermost) != 1:
        found = f"lists {', '.join(outermost)}" if outermost else "no list"
        raise ConfigError(
            f"{type(model).__name__} has {found} of the {count} layers that its configuration names; say which layers "
            "to watch, as in loopscope.hook(model, prelude='model.layers')."
        )
    return find_layers(model, outermost[0], "prelude")
