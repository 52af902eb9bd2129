"""One optimizer step: how many recurrences it runs, its learning rate, the penalties, and the update."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

from loopscope._util.shapes import States, TokenIds
from loopscope.dynamics.eigenvalues.krylov import transposed_products
from loopscope.dynamics.eigenvalues.mixing import mix_with_others_frozen
from loopscope.errors import NonFiniteError
from loopscope.experiments.training.config import OptimizerConfig, PenaltyConfig, RecurrenceConfig, TrainConfig
from loopscope.experiments.training.data import Scored, Tokens
from loopscope.models.native.transformer import LoopedTransformer, Sequence
from loopscope.models.visits import LoopState, Observer

# Separate streams of random numbers under one seed; the values only have to differ.
_RECURRENCES = 1
_STATES = 2
_DIRECTIONS = 3


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over all parameters; norms and biases (one dimension) and embeddings are not decayed.

    The learning rate is set at every step from the schedule.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = list(model.parameters())
    decayed = [entry for entry in parameters if entry.ndim >= 2 and id(entry) not in embeddings]
    kept = [entry for entry in parameters if entry.ndim < 2 or id(entry) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps)


class LastStates(Observer):
    """Keeps the last two states of a loop, with their gradients."""

    def __init__(self) -> None:
        self.before: States | None = None
        self.last: States | None = None

    def loop_state(self, loop_state: LoopState) -> None:
        self.before, self.last = self.last, loop_state.state


def penalty(
    model: LoopedTransformer, input_ids: TokenIds, states: LastStates, config: PenaltyConfig, seed: int
) -> Tensor:
    """The weighted sum of what the configuration asks for, a scalar with a gradient; `seed` is that of the direction
    in which the derivative is followed."""
    total = torch.zeros((), device=model.device)
    # After a single recurrence there is a step too, but from the initial state, which need not be near.
    if config.last_step and states.before is not None and states.last is not None:
        before, last = states.before, states.last
        relative = (last - before).square().sum(-1) / last.square().sum(-1)
        total = total + config.last_step * relative.mean()
    if config.eigenvalue and states.last is not None:
        factors = stretching(model, model.encode(input_ids), states.last, config.eigenvalue_products, seed)
        total = total + config.eigenvalue * (factors - config.eigenvalue_target).relu().square().mean()
    return total


def stretching(model: LoopedTransformer, sequence: Sequence, state: States, products: int, seed: int) -> Tensor:
    """By how much the last of some power iterations stretches each token's vector, (batch, token), with gradients to
    the weights.

    The derivative is that of one recurrence by the token's own state alone, at the state as it is: no gradient flows
    through where it stands, nor through the iterations before the last. It converges to the spectral radius of the
    token's Jacobian where one real eigenvalue leads.
    """
    point = state.detach().requires_grad_()
    still = dataclasses.replace(sequence, context=dataclasses.replace(sequence.context, mix=mix_with_others_frozen))
    image = model.recur(point, still, 1)
    pulled, cotangent = transposed_products(image, point)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(point.shape, generator=generator).to(point)
    tiny = torch.finfo(point.dtype).tiny
    for remaining in reversed(range(products)):
        vectors = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=tiny)
        (vectors,) = torch.autograd.grad(pulled, cotangent, vectors, retain_graph=True, create_graph=remaining == 0)
    factors: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return factors


def sample_recurrences(config: RecurrenceConfig, mean: int, seed: int, step: int) -> int:
    """Number of recurrences of one step, at least 1.

    The Poisson-lognormal is the one that Huginn was trained with (Geiping et al., arXiv 2502.05171):
    `tau ~ Normal(log(mean) - sigma^2 / 2, sigma)`, `r ~ Poisson(exp(tau)) + 1`. So r - 1 has the given mean. A sample
    above `cap` becomes `cap`.
    """
    if config.distribution == "constant":
        return mean
    generator = np.random.default_rng([seed, _RECURRENCES, step])
    rate = math.exp(generator.normal(math.log(mean) - 0.5 * config.sigma**2, config.sigma))
    number = int(generator.poisson(rate)) + 1
    return number if config.cap is None else min(number, config.cap)


def state_seed(seed: int, step: int) -> int:
    """Seed of the initial states of one step, a number below 2**32."""
    return int(np.random.default_rng([seed, _STATES, step]).integers(2**32))


def direction_seed(seed: int, step: int) -> int:
    """Seed of the directions in which a step's derivative is followed, a number below 2**32."""
    return int(np.random.default_rng([seed, _DIRECTIONS, step]).integers(2**32))


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of one step, counted from 0.

    A linear rise that reaches the peak at step `warmup_steps - 1` (no step is wasted on a rate of 0), then the decay,
    which reaches `final_lr_fraction` of the peak at the last step.
    """
    if step < config.warmup_steps:
        return config.peak_lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.peak_lr
    way = steps - 1 - config.warmup_steps
    progress = (step - config.warmup_steps) / way if way > 0 else 1.0
    height = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1.0 - progress
    return config.peak_lr * (config.final_lr_fraction + (1.0 - config.final_lr_fraction) * height)


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    loss: float
    """Mean next-token loss before the update, nats."""
    penalty: float
    """What was added to it, weights included."""
    lr: float
    grad_norm: float
    """Euclidean norm of all gradients before clipping."""
    recurrences: int


def take_step(
    model: LoopedTransformer,
    optimizer: AdamW,
    batch: Tokens,
    config: TrainConfig,
    step: int,
    counted: Scored | None = None,
) -> StepReport:
    """Update the model on a batch of windows, (batch, context + 1). `step` counts from 0; `counted`, (batch, context),
    says which predicted tokens count, all unless given.

    Raises `NonFiniteError`, before the update, when loss or gradients are no longer numbers.
    """
    tokens = torch.from_numpy(batch).to(model.device)
    recurrences = sample_recurrences(config.recurrences, config.architecture.recurrences, config.seed, step)
    penalised = config.penalties != PenaltyConfig()
    states = LastStates()
    logits = model(
        tokens[:, :-1],
        recurrences=recurrences,
        seed=state_seed(config.seed, step),
        backprop_last=config.recurrences.backprop_last,
        observers=(states,) if penalised else (),
    )
    targets = tokens[:, 1:]
    if counted is None:
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    else:
        places = torch.from_numpy(counted).to(model.device)
        loss = functional.cross_entropy(logits[places], targets[places])
    added = torch.zeros_like(loss)
    if penalised:
        added = penalty(model, tokens[:, :-1], states, config.penalties, direction_seed(config.seed, step))
    optimizer.zero_grad(set_to_none=True)
    (loss + added).backward()
    grad_norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm))
    value = float(loss.detach())
    if not (math.isfinite(value + float(added.detach())) and math.isfinite(grad_norm)):
        raise NonFiniteError(
            f"Training diverged at step {step + 1}: the loss is {value} and the gradient norm {grad_norm}; "
            "choose a lower optimizer.peak_lr or a longer warm-up, and another output folder."
        )
    lr = learning_rate(step, config.steps, config.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return StepReport(loss=value, penalty=float(added.detach()), lr=lr, grad_norm=grad_norm, recurrences=recurrences)
