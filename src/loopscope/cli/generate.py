"""The commands that generate texts and choose exit rules. Heavy imports are inside, as in `commands`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from loopscope._util.ranges import Count, Range, Seed, check_ranges
from loopscope.cli.parsing import options


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Let a model continue a prompt; with an exit rule, tokens really stop their recurrences early.

    Shows the text and, with an exit rule, what it saved and how the text differs from the full run's.
    """

    model: tyro.conf.Positional[str]
    """A shipped model such as demo:injected, a checkpoint folder, or a model of the Hugging Face hub such as
    organisation/model."""
    prompt: tyro.conf.Positional[str]
    """The text to continue."""
    recurrences: Count | None = None
    """Recurrences of a full run; default: the number in the rule's file, or else the trained number."""
    exit: str | None = None
    """Stop a token once this rule fires: such as 'step <= 0.03 & top1 >= 2', or a file from `loopscope exits`."""
    max_new_tokens: Count = 64
    """The most tokens to generate."""
    cache: Literal["per-recurrence", "last", "none"] | None = None
    """Which keys and values of earlier tokens are kept: those of every recurrence (exact), only those of the last one
    (as Ouro shares them), or none, so that each token is a pass over the whole text. Default: per-recurrence, or none
    for a hooked model."""
    compare: bool = True
    """With exits or a shared cache, also generate the full run's text for comparison."""
    seed: Seed = 0
    """Seed of random initial states."""
    system_prompt: Path | None = None
    """As in analyze."""
    chat: bool = False
    """Make the prompt the user's turn of a chat, written by the model's chat template."""
    intervene: tuple[str, ...] = ()
    """Change the model's computation, as in analyze. Repeat for several."""
    dtype: str = "float32"
    """float32, float64, bfloat16, float16, stored or auto."""
    device: str = "auto"
    """A torch device."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hugging Face hub."""
    json: bool = False
    """Print JSON, for programs."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")

    def run(self) -> None:
        from json import dumps

        from loopscope.analysis.generating import generate
        from loopscope.cli.console import say
        from loopscope.models.loading import load

        model = load(self.model, revision=self.revision, dtype=self.dtype, device=self.device)
        others = ("model", "prompt", "dtype", "device", "revision", "json")
        found = generate(model, self.prompt, **options(self, *others))
        if self.json:
            print(dumps(found.to_dict(), ensure_ascii=False))
            return
        print(found.text if found.text is not None else " ".join(map(str, found.tokens)))
        for sentence in found.sentences():
            say(sentence)


@dataclass(frozen=True, kw_only=True)
class ExitRules:
    """Choose thresholds of exit rules on half of a study's prompts, and judge them on the other half.

    Without --rule, shows a table of all rules with one signal. With --rule and --out, writes the rule with its
    thresholds to a JSON file for generate.
    """

    study: tyro.conf.Positional[Path]
    """The --out folder of an analysis."""
    rule: str | None = None
    """Conditions on signals, such as 'step & top1 >= 2' (all of them) or 'kl | margin' (any); docs/method.md lists
    the signals. A threshold that is left out is chosen."""
    loss: Annotated[float, Range(0)] = 0.01
    """The most by which the mean loss may exceed the full run's, in nats per token."""
    changed: Annotated[float, Range(0, below=1)] = 0.05
    """The largest share of most probable next tokens that may change."""
    patience: Count = 1
    """Recurrences in a row at which the rule has to hold."""
    least: Count = 1
    """The first recurrence after which a token may stop."""
    out: Path | None = None
    """File to write."""
    json: bool = False
    """Print JSON, for programs."""

    def __post_init__(self) -> None:
        check_ranges(self, "--")

    def run(self) -> None:
        from json import dumps

        from loopscope.answers.calibration import calibrate_exit, rule_sentence, rule_table, rules_of_one_signal
        from loopscope.cli.console import say, say_path, say_table
        from loopscope.errors import ConfigError
        from loopscope.study import Study

        if self.rule is None and self.out is not None:
            raise ConfigError("--out writes one rule; name it with --rule.")
        study = Study.load(self.study)
        if self.rule is None:
            rules = rules_of_one_signal(
                study, loss=self.loss, changed=self.changed, patience=self.patience, least=self.least
            )
            if self.json:
                print(dumps({key: None if each is None else each.to_dict() for key, each in rules.items()}))
            else:
                say_table(rule_table(rules))
            return
        found = calibrate_exit(
            study, self.rule, loss=self.loss, changed=self.changed, patience=self.patience, least=self.least
        )
        if self.out is not None:
            found.save(self.out)
        if self.json:
            print(dumps(found.to_dict()))
            return
        say(rule_sentence(found))
        if self.out is not None:
            say_path("rule", self.out)
