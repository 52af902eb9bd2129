"""Settings of the jobs: one dataclass each, the same object for Python, the command line and the manifest.

This module imports neither torch nor numpy, so that `loopscope --help` answers at once. The docstring of a field is
its help text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from loopscope._util.ranges import Count, Processes, Range, check_ranges
from loopscope.dynamics.trajectories.settings import DisplacementSettings
from loopscope.errors import ConfigError
from loopscope.models.inspection.facts import DtypeName, dtype_name
from loopscope.models.interventions.kinds import Intervention
from loopscope.models.interventions.parsing import parse_interventions

EngineName = Literal["serial", "processes", "ray"]
HorizonMethod = Literal["auto", "second-pass", "keep"]
Part = Literal[
    "path-independence",
    "cycle-similarity",
    "trajectories",
    "readout",
    "noise-floor",
    "twin",
    "heads",
    "support",
    "maps",
    "stages",
    "neurons",
    "behaviour",
    "stability",
]

JudgedLayers = Literal["all", "last"]
Preset = Literal["quick", "standard", "full"]

_OPTIONS: dict[Part, tuple[str, ...]] = {
    "path-independence": ("other_starts",),
    "cycle-similarity": ("cycle_recurrences",),
    "trajectories": ("track", "components"),
    "readout": ("readout", "answer", "exit_recurrences"),
    "heads": ("head_stable",),
    "support": ("support_every", "cycle_recurrences"),
    "behaviour": ("judged_layers",),
    "stability": ("eigenvalue_products", "eigenvalue_every", "eigenvalue_search", "hooked_eigenvalues"),
    "maps": ("map_prompts", "map_recurrences", "map_tokens", "map_limit"),
    "neurons": ("neuron_limit",),
}
"""Settings that mean nothing where a part is left out, or where all are that have them."""


def left_out(options: Mapping[str, Any]) -> dict[str, Part]:
    """Of settings by name, those that mean nothing beside `skip`, each with its part: not what they are by default, nor
    none or 0."""
    usual = {field.name: field.default for field in dataclasses.fields(AnalyzeSettings)}
    measured = {option for part, of in _OPTIONS.items() if part not in options.get("skip", ()) for option in of}
    return {
        option: part
        for part in options.get("skip", ())
        for option in _OPTIONS.get(part, ())
        if option not in measured and options.get(option) and options[option] != usual[option]
    }


def without_left_out(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, but for those that `left_out` finds."""
    meaningless = left_out(options)
    return {name: value for name, value in options.items() if name not in meaningless}


def parts_except(*kept: Part) -> tuple[Part, ...]:
    """All parts of an analysis but those: what to skip."""
    return tuple(part for part in get_args(Part) if part not in kept)


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Which prompts."""

    prompts: str | None = None
    """A file (.txt with one prompt per line, or .jsonl with --field), or the name of a preset such as word-problems."""
    field: str | None = None
    """Field of a .jsonl file that holds the prompt, as text or as a list of token ids."""
    text: tuple[str, ...] = ()
    """Prompts given on the command line, instead of --prompts."""
    whole_file: bool = False
    """Take a text file as one prompt."""
    chunk: Count | None = None
    """Take a text file as running text, and cut it into prompts of that many tokens each."""
    limit: int | None = None
    """Use at most that many prompts: the first ones, or a random subset with --sample-seed."""
    sample_seed: Annotated[int, Range()] | None = None
    """Draw the --limit prompts at random; the same seed draws the same prompts everywhere."""
    system_prompt: Path | None = None
    """A text file that is put before every prompt, or the name of a shipped one: persona (long), maths (short), or
    padding (as many padding tokens as persona has); with --chat, the system's turn."""
    chat: bool = False
    """Make each prompt the user's turn of a chat, written by the model's chat template."""
    truncate: int | None = None
    """Keep only that many tokens of each prompt, the first ones."""
    generate: Count | None = None
    """Let the model continue each prompt by up to that many tokens, greedily and with its trained number of
    recurrences, and analyse each prompt together with its continuation."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How far the model is run, and in which form."""

    recurrences: Count = 64
    """How many recurrences to measure."""
    horizon: Annotated[int, Range(2, why="so that there is a step into it")] = 128
    """Recurrences after which the state stands in for the fixed point; twice as many are run, to check it."""
    stop_at_rest: Annotated[int, Range(0)] = 0
    """End the run to twice the horizon once every token of a batch has been at rest at its noise floor for that many
    recurrences beyond the horizon, 16 or more. With 32, what drifts by less than a fortieth of the noise floor in a
    recurrence, or grows by less than a fortieth, is then overlooked. 0 never ends it."""
    horizon_method: HorizonMethod = "auto"
    """How to get distances to the horizon: run the batch again (second-pass), or keep all its states (keep). The
    numbers are the same. auto keeps the states while they fit into --keep-limit."""
    intervene: tuple[str, ...] = ()
    """Change the model's computation: mlp:STAGE.LAYER[@RECURRENCES]=FACTOR, attention:... likewise, inject[@T]=frozen,
    damp=ETA, start=zeros|prelude|seed:N|scale:FACTOR, token:INDEX@T=zeros|noise|token:INDEX. Examples: mlp:prelude.1=0,
    attention:recurrent.*@4-=0.5; see docs/interventions.md."""
    dtype: DtypeName | Literal["auto", "stored"] = "float32"
    """Dtype that the model runs in. Measures use float32, or float64 if the model does. auto takes float64 for models
    of less than 50 million parameters on a CPU, where it shows nine more digits settle and an analysis takes less than
    twice as long, and float32 for others. stored takes the dtype of the checkpoint's weights."""
    prefix: Literal["trained", "causal"] = "trained"
    """How a model that was trained to read its prompt in both directions, such as HRM-Text, reads it: in both
    directions (trained), or with no token seeing a later one (causal). No effect on other models."""
    seed: Annotated[int, Range()] = 0
    """Seed of random initial states. A prompt's state depends only on the seed and the prompt's tokens, except in a
    hooked model that draws its own."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face hub."""
    ignore_config: tuple[str, ...] = ()
    """Ignore a field of config.json that loopscope does not know, if you know that it does not change what the model
    computes. Repeat for several."""


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Where the model is run, and how much at once."""

    device: str = "auto"
    """A torch device; auto takes a GPU if there is one."""
    device_map: str | None = None
    """Where to put the layers of a model that does not fit on the device: auto (other GPUs, memory, disk), or places by
    layers such as prelude=cuda:0,recurrent.0-3=cuda:1,coda=disk; see docs/models.md. The numbers are those of one
    device."""
    batch_size: Count | Literal["auto"] = "auto"
    """Prompts that are saved and run together; fewer run at once where memory is short. auto takes as many as fit
    (--memory-limit), on a GPU at most 64, and on a CPU at most 8, fewer of long prompts or of a wide model:
    more are no faster there."""
    memory_limit: Annotated[int, Range(0)] | None = None
    """MiB that a batch may take beside the model, in each worker; default: half of the free memory."""
    keep_limit: Annotated[int, Range(0)] | None = None
    """MiB of states that auto may keep; default: an eighth of the free memory of the model's device, shared by all
    workers."""
    threads: Processes | None = None
    """CPU threads, of each worker if there are several; default: torch's choice, or a worker's share of the CPUs."""
    engine: EngineName = "serial"
    """Where batches of prompts are run: in this process (serial), in worker processes of this machine (processes), or
    on a Ray cluster (ray). Each worker loads the model. See docs/engines.md."""
    workers: Processes | None = None
    """Number of workers; default: one for each CPU."""
    address: str = "auto"
    """Address of the Ray cluster: the one of this machine (auto), or HOST:PORT."""


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """What is measured."""

    other_starts: Annotated[int, Range(1, 1024)] = 1
    """Number of other initial states from which the measured recurrences are run too, to see whether all end in one
    place; each costs --recurrences more."""
    cycle_recurrences: Count = 8
    """Recurrences in the cycle similarity; memory grows with it."""
    track: tuple[str, ...] = ("0:-1", "1:-1", "2:-1")
    """Tokens whose trajectories are projected on principal components, as PROMPT:TOKEN, counted from 0, or from the end
    if negative."""
    components: Annotated[int, Range(1, 1024)] = 3
    """Principal components to keep."""
    readout: tuple[Count, ...] = ()
    """Numbers of recurrences after which the state is decoded for the loss; default: powers of two, the trained number
    and the last."""
    answer: tuple[str, ...] = ()
    """Texts such as ' 42'; for each of their tokens, rank and log-probability as the next token are read out too."""
    exit_recurrences: Annotated[int, Range(0)] | None = None
    """Recurrences of a full run, of which an exit rule might save some. The state is decoded after each of them, in
    addition to --readout. Default: the trained number; 0 leaves exit rules out."""
    head_stable: Annotated[float, Range(above=0, infinite=True)] = 0.01
    """A head is stable from the recurrence after which its map's rows change by no more than this, as the root mean
    square of their Euclidean distances (two rows with nothing in common are 1 to 1.4 apart)."""
    support_every: Annotated[int, Range(0, 10**6)] = 0
    """Measure the support of attention, the keys that a row looks at, on every n-th row of a prompt from its
    seventeenth on; also the similarity of keys between recurrences, what one shared cache would change, and the linear
    CKA of every two visits. 0 leaves these out."""
    judged_layers: JudgedLayers = "all"
    """Recurrent layers at which tokens are judged (fixed point, orbit, slider ...): all, or the last. Until then 32
    numbers are kept for each judged state, of which a layer has up to 1.75 times --horizon."""
    eigenvalue_products: Annotated[int, Range(1, 10**4)] = 40
    """The most products with the Jacobian of one recurrence to find a token's leading eigenvalues; each costs about a
    recurrence. Fewer are made if the first eigenvalue is known to a thousandth earlier."""
    eigenvalue_every: Annotated[int, Range(0)] = 1
    """Take the eigenvalues of every n-th token of a prompt, counted from its last; 0 takes only the last. What a token
    does depends on all tokens before it, so with numbers other than 1 nothing is predicted."""
    eigenvalue_search: Annotated[int, Range(0, 10**6)] = 200
    """Recurrences of a prompt that may be spent on finding its fixed point, if its state still moves after twice
    --horizon; 0 takes the state as it is."""
    hooked_eigenvalues: bool = False
    """Take eigenvalues of a hooked model too. Each product then needs as many copies of a prompt as it has tokens."""
    map_prompts: tuple[Annotated[int, Range(0, why="since prompts count from 0")], ...] = (0,)
    """Prompts whose attention maps are kept, counted from 0; every head of every layer."""
    map_recurrences: tuple[Count, ...] = ()
    """Numbers of recurrences whose maps are kept; default: the first four, powers of two, the trained number and the
    last."""
    map_tokens: Count = 64
    """Keep the maps of that many tokens of a longer prompt, the first ones: with more, an entry is smaller than a pixel
    of a figure."""
    map_limit: Count = 8
    """MiB that all these maps together may take, at one byte per entry; fewer tokens are kept if they would not fit.
    With 8 a report is at most about twice as large as one without maps."""
    neuron_limit: Annotated[float, Range(0, infinite=True)] = 1.0
    """Count prediction and suppression neurons if that takes at most this many tera floating-point operations. 1 covers
    small models; 100 take minutes on a GPU."""
    skip: tuple[Part, ...] = ()
    """Parts to leave out."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeSettings(MeasureSettings, MachineSettings, RunSettings, PromptSettings):
    """What to run, on which prompts, and how far. Its base classes are the groups of `loopscope analyze --help`."""

    def __post_init__(self) -> None:
        # As they are written again, so that 0 and 0.0 make the same study.
        object.__setattr__(self, "intervene", tuple(str(each) for each in parse_interventions(self.intervene)))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        check_ranges(self, "--")
        for option, part in left_out(vars(self)).items():
            raise ConfigError(
                f"--{option.replace('_', '-')} is about {part}, which --skip leaves out; leave one of them out."
            )
        if "" in self.answer:
            raise ConfigError("--answer takes texts, of which none may be empty.")
        if self.chunk is not None:
            for name in ("system_prompt", "chat", "truncate", "generate"):
                if getattr(self, name):
                    raise ConfigError(
                        f"--chunk cuts a text into prompts of one length, which --{name.replace('_', '-')} would "
                        "change; leave one of them out."
                    )
        least = DisplacementSettings().least_recurrences
        if 0 < self.stop_at_rest < least:
            raise ConfigError(
                f"--stop-at-rest takes 0 for never, or at least {least} recurrences: fewer are not judged, got "
                f"{self.stop_at_rest}."
            )
        check_engine(self.engine, self.workers, self.address)
        for entry in self.track:
            _parse_tracked(entry)

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> AnalyzeSettings:
        """Settings by cost. `changes` override them; `skip` leaves more out.

        `quick` is convergence, readout, and verdicts of the last layer with their noise floor; `standard` is the
        defaults; `full` adds what the defaults leave out because of its cost. Raises `ConfigError` for another name,
        and for a change of something that the preset leaves out.
        """
        if name not in _PRESETS:
            raise ConfigError(f"There is no preset {name!r}; the presets are {', '.join(_PRESETS)}.")
        chosen = _PRESETS[name]
        skip: tuple[Part, ...] = chosen.get("skip", ())
        for part in skip:
            for option in _OPTIONS.get(part, ()):
                if option in changes:
                    raise ConfigError(
                        f"--{option.replace('_', '-')} is about {part}, which --preset {name} leaves out; give another "
                        "preset, or leave the option out."
                    )
        more = tuple(part for part in changes.get("skip", ()) if part not in skip)
        chosen = without_left_out({**chosen, "skip": skip + more})
        return cls(**{**chosen, **changes, "skip": skip + more})

    @property
    def interventions(self) -> tuple[Intervention, ...]:
        """The entries of `intervene`, read."""
        return parse_interventions(self.intervene)

    @property
    def tracked(self) -> tuple[tuple[int, int], ...]:
        """(prompt, token) of each tracked token."""
        return tuple(_parse_tracked(entry) for entry in self.track)


_PRESETS: dict[Preset, dict[str, Any]] = {
    "quick": {"skip": parts_except("readout", "behaviour", "noise-floor", "twin"), "judged_layers": "last"},
    "standard": {},
    "full": {
        "hooked_eigenvalues": True,
        "neuron_limit": math.inf,
        "map_tokens": 256,
        "map_limit": 64,
        "support_every": 8,
    },
}


def check_engine(engine: EngineName, workers: int | None, address: str) -> None:
    """Raises `ConfigError` for a setting that another engine would need."""
    if workers is not None and engine == "serial":
        raise ConfigError("--workers needs --engine processes or --engine ray: serial is this process alone.")
    if address != "auto" and engine != "ray":
        raise ConfigError("--address names a Ray cluster; add --engine ray.")


def _parse_tracked(entry: str) -> tuple[int, int]:
    prompt, colon, token = entry.partition(":")
    try:
        if not colon or int(prompt) < 0:
            raise ValueError
        return int(prompt), int(token)
    except ValueError:
        raise ConfigError(f"--track takes PROMPT:TOKEN such as 0:-1, got {entry!r}.") from None
