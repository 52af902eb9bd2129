"""What `loopscope inspect` prints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import rich.table
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from loopscope._util.table import Table
from loopscope.analysis.memory import Foreseen
from loopscope.cli.console import own_names, say_table
from loopscope.models.inspection.facts import Inspection, MemoryEstimate, RunSize, TokenizerFacts

_NAMES = 15
"""Characters of the first column, so that the values of all sections begin in one."""


def say_json(found: Sequence[Inspection], foreseen: Sequence[Foreseen | None]) -> None:
    """One as an object, several as a list."""
    entries = [
        inspection.to_dict() | {"analysis": None if analysis is None else dataclasses.asdict(analysis)}
        for inspection, analysis in zip(found, foreseen, strict=True)
    ]
    print(json.dumps(entries if len(entries) > 1 else entries[0], indent=2, ensure_ascii=False))


def say_inspections(found: Sequence[Inspection]) -> None:
    """A column a model, a row for each thing that any of them has: what a paper's table of models says."""
    columns = [dict(_side_by_side(inspection)) for inspection in found]
    rows = [(name, *(column.get(name, "–") for column in columns)) for name in dict.fromkeys(chain(*columns))]
    say_table(Table(columns=("", *own_names([Path(inspection.name) for inspection in found])), rows=rows))


def say_inspection(inspection: Inspection, foreseen: Foreseen | None) -> None:
    """Sections of names and values, for people."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(inspection.name)}[/bold]", soft_wrap=True)
    for title, rows in _sections(inspection, foreseen):
        table = rich.table.Table.grid(padding=(0, 2))
        table.add_column(width=_NAMES, style="dim")
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, escape(value))
        if title:
            console.print(f"\n[bold]{escape(title)}[/bold]")
        console.print(Padding(table, (0, 0, 0, 1), expand=False))
    console.print("\n[bold]What loopscope cannot see in this model[/bold]")
    for spot in inspection.unobservable or ("Nothing: every state, attention map and loop state is there.",):
        console.print(Padding(escape(spot), (0, 0, 0, 1), expand=False))


def _sections(inspection: Inspection, foreseen: Foreseen | None) -> list[tuple[str, list[tuple[str, str]]]]:
    sections = [("", _identity(inspection)), ("Layers", _layers(inspection)), ("Weights", _weights(inspection))]
    settings = [*_sizes(inspection), *inspection.settings.items()]
    sections.append(("Inside", settings))
    sections.append(("Tokenizer", _tokenizer(inspection.tokenizer)))
    if inspection.memory is not None:
        rows = [*_memory(inspection, inspection.memory), *_analysis(foreseen, inspection.memory.run)]
        sections.append((_memory_title(inspection.memory), rows))
    return sections


def _side_by_side(inspection: Inspection) -> list[tuple[str, str]]:
    """Without what depends on the size of a run."""
    tokenizer = _tokenizer(inspection.tokenizer)
    trained = inspection.trained_recurrences
    loop = [] if trained is None else [("recurrences", f"{trained}"), ("realised depth", f"{inspection.trained_depth}")]
    settings = dict(inspection.settings)
    first = ("norms", "loop norm", "injection", "initial state")
    return [
        ("family", f"{inspection.family}, {inspection.runs}"),
        ("layout", inspection.layout),
        *loop,
        *((name, settings.pop(name)) for name in first if name in settings),
        *((name, value) for name, value in tokenizer if name == "BOS"),
        ("parameters", f"{inspection.parameters.total:,}"),
        *_sizes(inspection),
        *settings.items(),
        *([("layers lie on", inspection.placement)] if inspection.placement is not None else []),
    ]


def _identity(inspection: Inspection) -> list[tuple[str, str]]:
    rows = [
        ("family", f"{inspection.family}, run {inspection.runs}"),
        ("recognised by", inspection.recognised_by),
    ]
    return rows + ([("revision", inspection.revision)] if inspection.revision else [])


def _layers(inspection: Inspection) -> list[tuple[str, str]]:
    rows = [("layout", inspection.layout), ("unique layers", f"{inspection.unique_layers}")]
    trained = inspection.trained_recurrences
    if trained is None:
        return rows
    depth = f"{inspection.trained_depth} layer visits"
    if inspection.memory is not None:
        asked = inspection.memory.run.recurrences
        depth += f", and {inspection.depth(asked)} with {asked} recurrences"
    return [*rows, ("recurrences", f"{trained} in training"), ("realised depth", depth)]


def _weights(inspection: Inspection) -> list[tuple[str, str]]:
    counts = inspection.parameters
    parts = {
        "embedding": counts.embedding,
        "unembedding": counts.unembedding,
        "prelude": counts.prelude,
        "recurrent": counts.recurrent,
        "coda": counts.coda,
        "rest": counts.rest,
    }
    shares = ", ".join(f"{name} {number:,}" for name, number in parts.items() if number)
    stored = ", ".join(f"{dtype} {size(nbytes)}" for dtype, nbytes in inspection.stored.items())
    files = inspection.files
    return [
        ("parameters", f"{counts.total:,}"),
        ("of these", shares),
        ("stored as", f"{stored}, in {files[0] if len(files) == 1 else f'{len(files)} files'}"),
    ]


def _sizes(inspection: Inspection) -> list[tuple[str, str]]:
    numbers = {
        "width": inspection.width,
        "heads": inspection.heads,
        "key-value heads": inspection.kv_heads,
        "head width": inspection.head_dim,
        "MLP width": inspection.mlp_width,
        "vocabulary": inspection.vocab_size,
        "positions": None if "positions" in inspection.settings else inspection.max_positions,
    }
    return [(name, f"{number:,}") for name, number in numbers.items() if number is not None]


def _tokenizer(facts: TokenizerFacts | None) -> list[tuple[str, str]]:
    if facts is None:
        return [("tokenizer", "none in the folder; prompts are lists of token ids")]
    around = [*facts.before, "text", *facts.after]
    return [
        ("tokens", f"{facts.tokens:,}"),
        ("BOS", facts.before[0] if facts.before else "none: a text begins with its own first token"),
        ("a text becomes", " ".join(around)),
        ("chat template", "there, used with --chat" if facts.chat_template else "none"),
        *(("note", note) for note in facts.notes),
    ]


def _memory_title(memory: MemoryEstimate) -> str:
    run = memory.run
    return f"Memory for {run.batch_size} prompts of {run.tokens:,} tokens in {run.dtype}"


def _memory(inspection: Inspection, memory: MemoryEstimate) -> list[tuple[str, str]]:
    loops = f" of {memory.run.recurrences} recurrences" if inspection.trained_recurrences is not None else ""
    about = "; an estimate, see docs/models.md" if inspection.runs == "natively" else "; a rough estimate"
    longest = inspection.max_positions
    too_long = longest is not None and memory.run.tokens > longest
    return [
        *([("note", f"the model has {longest:,} positions, so prompts must be shorter")] if too_long else []),
        ("weights", size(memory.weights)),
        *([("layers lie on", inspection.placement)] if inspection.placement is not None else []),
        ("one forward", f"about {size(memory.activations)} more{about}"),
        ("all states", f"{size(memory.kept_states)}{loops}, if they are kept (capture)"),
        ("one map", f"{size(memory.attention_map)}, all heads of one visit, only while it is looked at"),
    ]


def _analysis(foreseen: Foreseen | None, run: RunSize) -> list[tuple[str, str]]:
    if foreseen is None:
        return [("an analysis", "known once the model is loaded: analyze says what it needs before it runs")]
    kept = f", of which {size(foreseen.kept_states)} are states that are kept" if foreseen.kept_states else ""
    saved = ", ".join(f"{option} {size(less)}" for option, less in list(foreseen.saved.items())[:4])
    return [
        ("an analysis", f"about {size(foreseen.needed)} beside the weights, horizon {run.horizon}{kept}"),
        *([("saves of that", saved)] if saved else []),
    ]


def size(nbytes: int) -> str:
    """Bytes for people: 15.6 GB, 240 kB."""
    number, units = float(nbytes), ["B", "kB", "MB", "GB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}" if number < 1000 else f"{number:,.0f} {units[0]}"
