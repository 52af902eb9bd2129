"""How good the eigenvalues of one recurrence are, and how well they predict the rate at which a state settles.

    python benchmarks/stability.py
    python benchmarks/stability.py --products 60
    python benchmarks/stability.py --cost questions.jsonl

Random looped models of 4 layers on 12 tokens: three norm placements, several weight scales, injection added, or by one
random matrix, or with a gain on the state of its own, which sets how fast they settle; two widths, float64 and float32.
For each the states run 160 recurrences; the eigenvalues there are compared with those of the whole Jacobian blocks in
float64, and the rates that they predict with those that the steps of the last recurrences show. Models that do not
settle are counted and take no part. A pair counts as one in the separation of the leading eigenvalue from the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from loopscope import load
from loopscope.dynamics.eigenvalues.krylov import ExactProducts
from loopscope.dynamics.eigenvalues.leading import eigenvalues_near
from loopscope.dynamics.eigenvalues.mixing import mix_with_others_frozen
from loopscope.dynamics.eigenvalues.native import NativeRecurrence
from loopscope.dynamics.eigenvalues.of_model import leading_eigenvalues
from loopscope.dynamics.eigenvalues.recurrence import LastStep
from loopscope.dynamics.eigenvalues.result import Stability
from loopscope.dynamics.observed_rate import observed_rate
from loopscope.dynamics.prediction import damped, spectral_radius
from loopscope.measures.stability import study_eigenvalues
from loopscope.models.architecture import Architecture, Injection, LoopNorm, NormPlacement
from loopscope.models.native.subject import NativeSubject
from loopscope.models.native.transformer import LoopedTransformer
from loopscope.models.subject import Batch

TOKENS, RECURRENCES = 12, 160
PLACEMENTS: tuple[tuple[NormPlacement, LoopNorm], ...] = (
    ("pre", "none"),
    ("residual", "none"),
    ("branch-in-out", "recurrence"),
)
GAINS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Spectral radii of the injection's matrix on the state, where it is not drawn like the others."""
SCALES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08)
"""Standard deviations of the weights at width 128; larger in a narrower model, so that matrices weigh the same."""
SEPARATED = 0.95
SETTLED = 1e-5


@dataclass
class Tokens:
    """What was found for the tokens of one model."""

    separated: np.ndarray
    error: np.ndarray
    """Of the leading eigenvalue against that of the whole matrix, relative."""
    estimate: np.ndarray
    """The error that the eigenvalue comes with, relative."""
    damped: np.ndarray
    """Of the spectral radius after damping by one half, absolute."""
    predicted: np.ndarray
    observed: np.ndarray


@dataclass(frozen=True)
class Recipe:
    """What a random model is made from."""

    placement: NormPlacement
    loop_norm: LoopNorm
    injection: Injection
    std: float
    gain: float | None = None


def recipes() -> list[Recipe]:
    found = []
    for placement, loop_norm in PLACEMENTS:
        found += [Recipe(placement, loop_norm, "linear", std) for std in SCALES]
        found += [Recipe(placement, loop_norm, "add", std) for std in SCALES]
        found += [Recipe(placement, loop_norm, "linear", std, gain) for std in (0.02, 0.05) for gain in GAINS]
    return found


def make(width: int, recipe: Recipe, seed: int) -> NativeSubject:
    architecture = Architecture(
        vocab_size=64,
        width=width,
        heads=4,
        kv_heads=4,
        head_dim=width // 4,
        mlp_width=3 * width,
        prelude=1,
        recurrent=4,
        coda=0,
        recurrences=4,
        norm_placement=recipe.placement,
        loop_norm=recipe.loop_norm,
        injection=recipe.injection,
        state_init="normal",
    )
    model = LoopedTransformer(architecture).initialize(seed, recipe.std * (128 / width) ** 0.5)
    if recipe.gain is not None:
        set_gain(model, recipe.gain, seed)
    return NativeSubject(model.to(torch.float64).eval().requires_grad_(False))


@torch.no_grad()
def set_gain(model: LoopedTransformer, gain: float, seed: int) -> None:
    """An injection `u = gain A s + B e` with A and B random of spectral radius about 1, and embeddings of size 1."""
    assert model.injection is not None
    width = model.architecture.width
    both = torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(1000 + seed)) / width**0.5
    both[:, :width] *= gain
    model.injection.weight.copy_(both)
    model.embedding.weight.div_(model.embedding.weight.std())


def in_float32(subject: NativeSubject) -> NativeSubject:
    model = LoopedTransformer(subject.model.architecture)
    model.load_state_dict(subject.model.state_dict())
    return NativeSubject(model.eval().requires_grad_(False))


def whole_spectra(subject: NativeSubject, batch: Batch, point: np.ndarray) -> np.ndarray:
    """Eigenvalues of the Jacobian block of every token, (token, width), by decreasing modulus, in float64."""
    run = subject.start(batch, recurrences=1)
    alone = run.recurrence_map(recurrence=RECURRENCES + 1, mix=mix_with_others_frozen)
    products = ExactProducts(lambda states: alone(states[None])[0], torch.from_numpy(point[0]).double())
    columns = [products(unit.expand(TOKENS, -1)) for unit in torch.eye(point.shape[-1], dtype=torch.float64)]
    spectra = torch.linalg.eigvals(torch.stack(columns, dim=-1))
    ordered: np.ndarray = spectra.gather(-1, spectra.abs().argsort(dim=-1, descending=True)).numpy()
    return ordered


def trajectory(subject: NativeSubject, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the steps and of the states, (token, recurrence)."""
    run = subject.start(batch, recurrences=RECURRENCES)
    states: list[Tensor] = [run.state]
    for _ in range(RECURRENCES):
        run.advance()
        states.append(run.state)
    whole = torch.stack(states)[:, 0].double()
    return (
        (whole[1:] - whole[:-1]).norm(dim=-1).T.numpy(),
        whole[1:].norm(dim=-1).T.numpy(),
    )


def examine(subject: NativeSubject, exact: NativeSubject, batch: Batch, products: int) -> Tokens | None:
    """None where the states do not settle."""
    found: Stability = leading_eigenvalues(subject, batch, recurrences=RECURRENCES, products=products, search=0)
    if not found.relative_step.max() < SETTLED:
        return None
    spectra = whole_spectra(exact, batch, found.point)
    lead = spectra[:, 0]
    is_pair = np.abs(lead.imag) > 1e-9 * np.abs(lead)
    second = np.where(is_pair, np.abs(spectra[:, 2]), np.abs(spectra[:, 1]))
    leading = found.eigenvalues[0, :, 0]
    away = np.minimum(np.abs(leading - lead), np.abs(leading - lead.conj()))
    steps, sizes = trajectory(subject, batch)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Tokens(
            separated=second <= SEPARATED * np.abs(lead),
            error=away / np.abs(lead),
            estimate=found.errors[0, :, 0] / np.abs(lead),
            damped=np.abs(spectral_radius(damped(found.eigenvalues[0], 0.5)) - spectral_radius(damped(spectra, 0.5))),
            predicted=found.predicted_rate[0],
            observed=observed_rate(steps, sizes=sizes, dtype=subject.info.dtype).rate,
        )


def summary(name: str, parts: list[Tokens]) -> None:
    def all_of(field: str) -> np.ndarray:
        return np.concatenate([getattr(part, field) for part in parts])

    error, estimate = all_of("error"), all_of("estimate")
    apart = error[all_of("separated")]
    known = np.isfinite(error)
    predicted, observed = all_of("predicted"), all_of("observed")
    seen = np.isfinite(observed)
    difference = np.abs(predicted - observed)[seen]
    print(f"{name}: {len(parts)} models, {len(error)} tokens")
    print(
        f"  eigenvalue, {len(apart)} tokens whose leading one stands 5 % above the next: relative error median "
        f"{np.median(apart):.0e}, within 1e-4 in {np.mean(apart <= 1e-4):.1%}, at most {apart.max():.0e}"
    )
    print(f"  eigenvalue, all tokens: within its estimated error in {np.mean((error <= estimate)[known]):.1%}")
    shifted = all_of("damped")
    print(
        f"  spectral radius if the loop is damped by 0.5: error median {np.median(shifted):.0e}, 99 % "
        f"{np.quantile(shifted, 0.99):.0e}, at most {shifted.max():.0e}"
    )
    print(
        f"  rate, {seen.sum()} tokens that show one, {predicted[seen].min():.2f} to {predicted[seen].max():.2f}: "
        f"difference median {np.median(difference):.4f}, 90 % {np.quantile(difference, 0.9):.4f}, correlation "
        f"{np.corrcoef(predicted[seen], observed[seen])[0, 1]:.4f}"
    )


def wide() -> NativeSubject:
    """(2, 4, 2) of width 1024; its states do not settle."""
    architecture = Architecture(
        vocab_size=1024,
        width=1024,
        heads=8,
        kv_heads=8,
        head_dim=128,
        mlp_width=3072,
        prelude=2,
        recurrent=4,
        coda=2,
        recurrences=8,
        injection="linear",
        state_init="normal",
    )
    return NativeSubject(LoopedTransformer(architecture).initialize(0).eval().requires_grad_(False))


def costs(questions: Path) -> None:
    """Eigenvalues as a study takes them, over a bare run of 2H recurrences, in processor time."""
    texts = [json.loads(line)["question"] for line in questions.read_text().splitlines()[:8]]
    random = torch.randint(1024, (2, 128), generator=torch.Generator().manual_seed(0)).tolist()
    for name, horizon, search in (
        ("demo:injected", 64, 200),
        ("demo:uninjected", 64, 200),
        ("demo:uninjected", 64, 0),
        ("width 1024", 32, 200),
        ("width 1024", 32, 0),
    ):
        subject = wide() if name == "width 1024" else load(name, device="cpu")
        assert isinstance(subject, NativeSubject)
        tokenizer = subject.tokenizer
        batch = Batch.of(random if tokenizer is None else [tokenizer.encode(text).ids for text in texts])
        settings = study_eigenvalues(horizon, 40, 1, search, 0)
        run = subject.start(batch, recurrences=2 * horizon)
        last_step = LastStep(run.state, subject.model.dtype)
        bare = 0.0
        for _ in range(2 * horizon):
            started = time.process_time()
            run.advance()
            bare += time.process_time() - started
            last_step.follow(run.state)
        near = NativeRecurrence(run, batch.mask, 2 * horizon, last_step=last_step.steps)
        started = time.process_time()
        found = eigenvalues_near(near, batch, settings)
        taken = time.process_time() - started
        print(
            f"{name}, search {search}: {taken / bare:.2f} of a bare run of {2 * horizon} recurrences, "
            f"{np.nanmean(found.products_made):.1f} products a token, points of {found.searched.sum()} "
            f"of {len(found.searched)} prompts found by search"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, default=40)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cost", type=Path, help="only what they cost, with GSM8K questions from this .jsonl file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.cost:
        costs(arguments.cost)
        return
    ids = torch.randint(64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    for width in arguments.widths:
        parts: dict[str, list[Tokens]] = {"float64": [], "float32": []}
        unsettled: Counter[str] = Counter()
        for recipe, seed in itertools.product(recipes(), range(arguments.seeds)):
            exact = make(width, recipe, seed)
            for subject in (exact, in_float32(exact)):
                tokens = examine(subject, exact, batch, arguments.products)
                if tokens is None:
                    unsettled[f"{recipe.placement}, {recipe.injection}"] += 1
                else:
                    parts[subject.info.dtype].append(tokens)
        for dtype, found in parts.items():
            summary(f"width {width}, {dtype}, {arguments.products} products", found)
        print(f"  do not settle: {', '.join(f'{count} {name}' for name, count in unsettled.items())}")


if __name__ == "__main__":
    main()
