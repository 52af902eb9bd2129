"""How a module is called, and where its logits are in what it returns."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from loopscope._util.shapes import Logits, TokenIds
from loopscope.errors import ConfigError
from loopscope.models.subject import Batch

Forward = Callable[..., Tensor]
"""`forward(model, input_ids, mask, **extra) -> logits`; the mask is True for tokens, (batch, token)."""


Form = Literal["batch first", "token first", "flat", "streams"]
"""How states lie in a model's tensors: (batch, token, width), (token, batch, width), (batch * token, width), or (batch,
token, stream, width), whose streams are taken side by side."""


def outputs_of(output: Any) -> Sequence[Any]:
    """What a layer returns, one after the other: a tensor, a tuple, a mapping or a dataclass; what is in those within
    it comes last."""
    parts = _parts(output)
    if parts is None:
        return (output,)
    return [*parts, *(inner for part in parts for inner in _parts(part) or ())]


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
    """A layer's arguments in the order of its parameters, in whatever order a caller names them, and then what is in
    those that are tuples, mappings and dataclasses."""
    return outputs_of([*args, *(kwargs[name] for name in _in_order(module, kwargs))])


def _in_order(module: nn.Module, kwargs: Mapping[str, Any]) -> list[str]:
    """The names of arguments in the order of the parameters, and of others behind them."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except ValueError:  # a scripted module has none to be read
        names = []
    return [*(name for name in names if name in kwargs), *(name for name in kwargs if name not in names)]


def _parts(value: Any) -> list[Any] | None:
    """What is in a container."""
    if isinstance(value, Mapping):
        return list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return list(value) if isinstance(value, tuple | list) else None


def with_other(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], old: Tensor, earlier: int, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments, as `arguments_of` orders them, with another tensor where the old one is, but for `earlier`
    places where it is too: the same tensor may be given twice."""
    names = _in_order(module, kwargs)

    def itself(value: Any) -> Any:
        return new if value is old else value

    def within(value: Any) -> Any:
        """A container with the other tensor in the first place where the old one is; anything else as it is."""
        place = next((place for place, each in enumerate(_parts(value) or ()) if each is old), None)
        if place is None:
            return value
        if isinstance(value, Mapping):
            changed: Any = copy.copy(value)
            changed.update({list(value)[place]: new})
            return changed
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(value, **{dataclasses.fields(value)[place].name: new})
        entries = [*value[:place], new, *value[place + 1 :]]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)

    for change in (itself, within):
        places: list[tuple[int | str, Any]] = [*enumerate(args), *((name, kwargs[name]) for name in names)]
        for place, value in places:
            changed = change(value)
            if changed is value:
                continue
            if earlier:
                earlier -= 1
            elif isinstance(place, int):
                return (*args[:place], changed, *args[place + 1 :]), kwargs
            else:
                return args, kwargs | {place: changed}
    raise AssertionError("what was found among the arguments is there")


def twins_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Modules whose weights are all those of another one of their type, with the first of these: layers that share
    weights are a loop that is written out."""
    first: dict[tuple[type, tuple[int, ...]], tuple[str, nn.Module]] = {}
    found: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        weights = tuple(id(weight) for weight in module.parameters())
        there, twin = first.setdefault((type(module), weights), (path, module))
        if weights and twin is not module and not path.startswith(f"{there}."):
            found[module] = twin
    return found


def is_pretrained(model: nn.Module) -> bool:
    """Whether this is a model of the transformers package, nothing of which is imported to find out: each of its models
    has imported this module."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def is_prefix_model(model: nn.Module) -> bool:
    """Whether a model of transformers was trained to read a prompt in both directions, as HRM-Text was: it then takes
    `token_type_ids`, which are 1 in that block, and reads causally without them."""
    if not is_pretrained(model):
        return False
    config: Any = model.config
    return getattr(config, "prefix_lm", False) is True and "token_type_ids" in _parameters(model)


class ModelCall:
    """Calls a model on a batch.

    Token ids come first. `attention_mask` is given where the model takes one and a prompt is padded, and
    `use_cache=False` to models of transformers. A `forward` of one's own is given everything, always.
    """

    def __init__(
        self, model: nn.Module, forward: Forward | None = None, *, prefix: bool = False, tokens_before: int = 0
    ) -> None:
        """With `prefix`, a prompt is given as a block that is read in both directions (see `is_prefix_model`). The
        model's states have `tokens_before` tokens more than the prompt, in front of it."""
        self.model = model
        self.twins = twins_of(model)
        self.form: Form = "batch first"
        self.skips: dict[nn.Module, int] = {}
        """How many tensors of states a layer is given before its own."""
        self.tokens_before = tokens_before
        self.prefix = prefix
        self._forward = forward
        self.is_given = forward is not None
        """The caller says how the model is called."""
        self._pretrained = is_pretrained(model)
        parameters: Mapping[str, inspect.Parameter] = {}
        if forward is None:
            parameters = _parameters(model)
        mask = parameters.get("attention_mask")
        self.takes_mask = forward is not None or mask is not None
        """Whether padding can be hidden from the model."""
        self._needs_mask = mask is not None and mask.default is inspect.Parameter.empty
        takes_rest = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        # A wrapper of such a model passes on what it does not know, and shows the model's configuration as its own.
        has_cache = self._pretrained or hasattr(getattr(model, "config", None), "use_cache")
        self._takes_use_cache = has_cache and ("use_cache" in parameters or takes_rest)

    def as_states(self, value: Any, batch: int, tokens: int) -> Tensor | None:
        """(batch, token, width) of a tensor of states in the model's own form; None for what is none."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return None
        match self.form:
            case "flat":
                return value.view(batch, tokens, -1) if value.shape[:-1] == (batch * tokens,) else None
            case "streams":
                return value.flatten(2) if value.ndim == 4 else None
            case "token first":
                return value.transpose(0, 1) if value.ndim == 3 else None
        return value if value.ndim == 3 else None

    def in_its_form(self, states: Tensor, like: Tensor) -> Tensor:
        """The reverse of `as_states`, of the same form as another tensor of the model."""
        match self.form:
            case "flat":
                return states.flatten(0, 1)
            case "streams":
                return states.reshape(like.shape)
            case "token first":
                return states.transpose(0, 1)
        return states

    def __call__(self, batch: Batch, extra: Mapping[str, Any]) -> Logits:
        """Raises `ConfigError` for an answer that holds no logits."""
        if self._forward is not None:
            answer: Any = self._forward(self.model, batch.input_ids, batch.mask, **extra)
        else:
            arguments = dict(extra)
            if self.takes_mask and (self._needs_mask or not bool(batch.mask.all())):
                # Models of transformers document ones and zeros, and some add them up.
                arguments["attention_mask"] = batch.mask.long() if self._pretrained else batch.mask
            if self.prefix:
                arguments["token_type_ids"] = batch.mask.long()
            if self._takes_use_cache:
                arguments["use_cache"] = False
            answer = self.model(batch.input_ids, **arguments)
        return _logits(answer, batch.input_ids)


FORMS: tuple[Form, ...] = get_args(Form)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(model.forward).parameters
    except ValueError:
        raise ConfigError(
            f"{type(model).__name__} does not say what its forward takes, as a scripted module does not; give the "
            "module before it was scripted, or forward=."
        ) from None


def _logits(answer: Any, input_ids: TokenIds) -> Logits:
    found = answer
    if isinstance(answer, Mapping) and "logits" in answer:
        found = answer["logits"]
    elif hasattr(answer, "logits"):
        found = answer.logits
    elif isinstance(answer, tuple | list) and answer:
        found = answer[0]
    if isinstance(answer, tuple | list) and isinstance(found, Tensor):
        alike = sum(isinstance(each, Tensor) and each.shape == found.shape for each in answer)
        if alike > 1 and found.ndim == 3:
            raise ConfigError(
                f"The model returned {alike} tensors of shape {tuple(found.shape)}, as if it answered more than once; "
                "give forward=, which returns the logits of the last."
            )
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"The model returned a {type(answer).__name__} without logits; give a model with a head, or "
            "forward=, which returns the logits."
        )
    if found.ndim != 3 or found.shape[:2] != input_ids.shape or not found.is_floating_point():
        raise ConfigError(
            f"The model returned {found.dtype} of shape {tuple(found.shape)} for {tuple(input_ids.shape)} tokens, "
            "where logits are (batch, token, vocabulary); give forward=, which returns them."
        )
    return found.detach().to(input_ids.device)
