"""Settings of the jobs: one dataclass each, the same object for Python, the command line and the manifest.

This module imports neither torch nor numpy, so that `loopscope --help` answers at once. The docstring of a field is
its help text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from loopscope._util.ranges import Count, Processes, Range, check_ranges
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
    "cycle-similarity": ("cycle_recurrences",),
    "trajectories": ("track", "components"),
    "readout": ("readout", "answer", "exit_recurrences"),
    "heads": ("head_stable",),
    "support": ("support_every",),
    "behaviour": ("judged_layers",),
    "stability": ("eigenvalue_products", "eigenvalue_every", "eigenvalue_search", "hooked_eigenvalues"),
    "maps": ("map_prompts", "map_recurrences", "map_tokens", "map_limit"),
    "neurons": ("neuron_limit",),
}
"""Settings that mean nothing where a part is left out."""


def parts_except(*kept: Part) -> tuple[Part, ...]:
    """All parts of an analysis but those: what to skip."""
    return tuple(part for part in get_args(Part) if part not in kept)


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Which prompts."""

    prompts: str | None = None
    """A file (.txt: a prompt a line; .jsonl: with --field), or the name of a preset such as word-problems."""
    field: str | None = None
    """Field of a .jsonl file that holds the prompt, as text or as a list of token ids."""
    text: tuple[str, ...] = ()
    """Prompts given right here, instead of --prompts."""
    whole_file: bool = False
    """Take a text file as one prompt."""
    chunk: Count | None = None
    """Take a text file as running text, and cut it into prompts of that many tokens each."""
    limit: int | None = None
    """Use that many prompts: the first ones, or a random subset with --sample-seed."""
    sample_seed: Annotated[int, Range()] | None = None
    """Draw the --limit prompts at random; the same seed draws the same prompts everywhere."""
    system_prompt: Path | None = None
    """A text file that is put before every prompt, or the name of a shipped one: persona (long), maths (short), or
    padding (as many padding tokens as persona has); with --chat, the system's turn."""
    chat: bool = False
    """Make each prompt the user's turn of a chat, written by the model's chat template."""
    truncate: int | None = None
    """Keep only the first tokens of each prompt, that many of them."""
    generate: Count | None = None
    """Let the model go on with each prompt by up to that many tokens, greedily after its trained number of recurrences,
    and analyse prompts with what it wrote."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How far the model is run, and as what."""

    recurrences: Count = 64
    """How many recurrences to measure."""
    horizon: Annotated[int, Range(2, why="so that there is a step into it")] = 128
    """Recurrences after which the state stands in for the fixed point; twice as many are run, to check it."""
    horizon_method: HorizonMethod = "auto"
    """How distances to the horizon are had: run again (second-pass), or keep all states of a batch (keep). The
    numbers are the same. auto keeps them while they fit into --keep-limit."""
    intervene: tuple[str, ...] = ()
    """Change the model's computation: mlp:STAGE.LAYER[@RECURRENCES]=FACTOR, attention:... likewise, inject[@T]=frozen,
    damp=ETA, start=zeros|prelude|seed:N|scale:FACTOR, token:INDEX@T=zeros|noise|token:INDEX. Such as mlp:prelude.1=0
    or attention:recurrent.*@4-=0.5; see docs/interventions.md."""
    dtype: DtypeName | Literal["auto", "stored"] = "float32"
    """What the model runs in. Measures are taken in float32, or float64 where that is the model's. auto takes float64,
    which sees nine more digits settle, for models of less than 50 million parameters on a CPU, where an analysis then
    takes less than twice as long, and float32 for others. stored takes what the checkpoint's weights are stored in."""
    prefix: Literal["trained", "causal"] = "trained"
    """How a model reads its prompt that was trained to read one in both directions, as HRM-Text was: so (trained), or
    as a text in which no token sees a later one (causal). Nothing to other models."""
    seed: Annotated[int, Range()] = 0
    """Seed of random initial states; a prompt's state depends on it and on the prompt's tokens alone, but in a hooked
    model that draws its own."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face hub."""
    ignore_config: tuple[str, ...] = ()
    """A field of config.json that loopscope does not know, to be passed over where you know that it does not change
    what the model computes. Again for several."""


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """On what it is run, and how much at once."""

    device: str = "auto"
    """A torch device; auto takes a GPU where there is one."""
    device_map: str | None = None
    """Where layers go of a model that the device has no room for: auto (other GPUs, memory, disk), or places by layers
    such as prelude=cuda:0,recurrent.0-3=cuda:1,coda=disk; see docs/models.md. Numbers are those of one device."""
    batch_size: Count | Literal["auto"] = "auto"
    """Prompts that are saved, and run, together; fewer are run at once where memory is short. auto takes as many
    as there is room for (--memory-limit), at most 8 on a CPU, where more are no faster, and 64 on a GPU."""
    memory_limit: Annotated[int, Range(0)] | None = None
    """MiB that what runs at once may take beside the model, in each worker; half of what is free unless given."""
    keep_limit: Annotated[int, Range(0)] | None = None
    """MiB of states that auto may keep; if not given, a sixteenth of what is free on the model's device, shared by all
    workers."""
    threads: Processes | None = None
    """CPU threads; torch's choice unless given. Of each worker, where there are several: its share of the CPUs unless
    given."""
    engine: EngineName = "serial"
    """Where batches of prompts are run: in this process (serial), in worker processes of this machine (processes), or
    on a Ray cluster (ray). Each worker loads the model. See docs/engines.md."""
    workers: Processes | None = None
    """How many work side by side; one for each CPU unless given."""
    address: str = "auto"
    """Of the Ray cluster: the one of this machine (auto), or HOST:PORT."""


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """What is measured."""

    other_starts: Annotated[int, Range(1, 1024)] = 1
    """Other initial states from which the measured recurrences are run too, to see whether all end in one place; each
    takes --recurrences more."""
    cycle_recurrences: Count = 8
    """Recurrences in the cycle similarity; memory grows with it."""
    track: tuple[str, ...] = ("0:-1", "1:-1", "2:-1")
    """Tokens whose trajectories are projected on principal components, as PROMPT:TOKEN, counted from 0 or, negative,
    from the end."""
    components: Annotated[int, Range(1, 1024)] = 3
    """Principal components to keep."""
    readout: tuple[Count, ...] = ()
    """Numbers of recurrences after which the state is decoded for the loss; powers of two and the trained number unless
    given."""
    answer: tuple[str, ...] = ()
    """Texts, such as ' 42', for each of whose tokens rank and log-probability as the next token are read out too."""
    exit_recurrences: Annotated[int, Range(0)] | None = None
    """Recurrences of a full run, of which an exit rule might save some: the state is decoded after each of them,
    besides --readout. The trained number unless given; 0 leaves exit rules out."""
    head_stable: Annotated[float, Range(above=0, infinite=True)] = 0.01
    """A head is stable from the recurrence after which its map's rows change by no more than this, as the root mean
    square of their Euclidean distances (two rows with nothing in common are 1 to 1.4 apart)."""
    support_every: Annotated[int, Range(0, 10**6)] = 0
    """Follow the support of attention, the keys that a row looks at, on every n-th row of a prompt from its seventeenth
    on, with the similarity of keys between recurrences and the linear CKA of every two visits; 0 leaves that out."""
    judged_layers: JudgedLayers = "all"
    """Recurrent layers whose tokens' limits are judged (fixed point, orbit, slider ...): all, or the last. Of the
    states that are judged, up to 1.75 times --horizon of them a layer, 32 numbers each are kept until they are."""
    eigenvalue_products: Annotated[int, Range(1, 10**4)] = 40
    """Products with the Jacobian of one recurrence, at most, from which a token's leading eigenvalues are found; each
    takes about a recurrence, and fewer are made where the first eigenvalue is known to a thousandth."""
    eigenvalue_every: Annotated[int, Range(0)] = 1
    """Take eigenvalues of every n-th token of a prompt, counted from its last; 0 takes those of the last alone. What a
    token does follows from all before it, so that with other numbers than 1 nothing is predicted."""
    eigenvalue_search: Annotated[int, Range(0, 10**6)] = 200
    """Recurrences that may be spent on finding the fixed point of prompts whose state still moves after twice
    --horizon; 0 takes the state as it is."""
    hooked_eigenvalues: bool = False
    """Take eigenvalues of a hooked model too. Each product then takes as many copies of a prompt as it has tokens."""
    map_prompts: tuple[Annotated[int, Range(0, why="since prompts count from 0")], ...] = (0,)
    """Prompts whose attention maps are kept, counted from 0; every head of every layer."""
    map_recurrences: tuple[Count, ...] = ()
    """Numbers of recurrences whose maps are kept; the first four, powers of two, the trained number and the last unless
    given."""
    map_tokens: Count = 64
    """Of a longer prompt, that many tokens from the start keep their maps: with more, a pixel of a figure is less than
    an entry."""
    map_limit: Count = 8
    """MiB that all these maps together may take, a byte an entry; fewer tokens are kept where they would not fit. With
    8 a report is at most about twice as large as one without."""
    neuron_limit: Annotated[float, Range(0, infinite=True)] = 1.0
    """Prediction and suppression neurons are counted if that takes at most this many tera floating-point operations:
    for small models; minutes on a GPU where it is a hundred."""
    skip: tuple[Part, ...] = ()
    """Parts to leave out."""


@dataclass(frozen=True, kw_only=True)
class AnalyzeSettings(MeasureSettings, MachineSettings, RunSettings, PromptSettings):
    """What to run, on which prompts, and how far. Its parts are the groups of `loopscope analyze --help`."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")
        if self.chunk is not None:
            for name in ("system_prompt", "chat", "truncate", "generate"):
                if getattr(self, name):
                    raise ConfigError(
                        f"--chunk cuts a text into prompts of one length, which --{name.replace('_', '-')} would "
                        "change; leave one of them out."
                    )
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise ConfigError(f"--batch-size takes a number or auto, got {self.batch_size!r}.")
        check_engine(self.engine, self.workers, self.address)
        for entry in self.track:
            _parse_tracked(entry)
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        # As they are written again, so that 0 and 0.0 make the same study.
        canonical = tuple(str(each) for each in self.interventions)
        object.__setattr__(self, "intervene", canonical)

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> AnalyzeSettings:
        """Settings by what they cost, and changes of them, which win; `skip` leaves more out.

        `quick` is convergence, readout, and verdicts of the last layer with the noise floor that they rest on;
        `standard` the defaults; `full` everything that those leave out for its cost. Raises `ConfigError` for another
        name, and for a change of something that the preset leaves out.
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
