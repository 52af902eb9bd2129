"""What a study keeps of the states that it judges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loopscope import judge
from loopscope.dynamics.trajectories.displacement import same_limit
from loopscope.dynamics.trajectories.synthetic import generate
from loopscope.measures.tails import DIMENSIONS, KeptTails
from loopscope.models.visits import Visit


def image(states: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
    """Of trajectories (token, recurrence, width) as those of one prompt."""
    tails = KeptTails(torch.ones(1, len(states), dtype=torch.bool), states.shape[2], [0], [span])
    for recurrence in range(states.shape[1]):
        tails.visit(Visit("recurrent", 0, recurrence + 1, states[None, :, recurrence], None))
    return tails.trajectories(0, span)


@pytest.mark.parametrize("width", [64, 1024])
def test_the_image_is_judged_as_the_states_are(width: int) -> None:
    found = list(generate(60, seed=11, lengths=(128,), widths=(width,)))
    states = torch.from_numpy(np.stack([each.states for each in found])).float()
    whole, kept = (
        judge(each, "float32", first_recurrence=65, check_order=False)
        for each in (states[:, 64:], image(states, (64, 128)))
    )
    for truth, one, other in zip(found, whole, kept, strict=True):
        if truth.decidable:
            assert same_limit(one.kind, other.kind)
            assert other.level == pytest.approx(one.level, rel=0.25)


def test_a_state_that_does_not_move_does_not_move_in_the_image() -> None:
    states = torch.randn(3, 1, 200, generator=torch.Generator().manual_seed(0)).expand(3, 20, 200)
    kept = image(states, (4, 20))
    assert kept.shape == (3, 16, DIMENSIONS)
    assert bool((kept == kept[:, :1]).all())
    torch.testing.assert_close(kept[:, 0].norm(dim=-1), states[:, 0].norm(dim=-1).double())


def test_who_comes_to_rest_is_not_moved_by_what_was_rounded_away() -> None:
    states = torch.randn(3, 20, 200, generator=torch.Generator().manual_seed(4)).cumsum(1)
    kept = image(torch.cat((states, states[:, -1:].expand(3, 12, 200)), dim=1), (0, 32))
    assert bool((kept[:, 20:] == kept[:, 19:20]).all())
    assert bool((kept[:, 1:20] != kept[:, :19]).any(-1).all())


def test_motion_by_one_rounding_beside_a_large_state_keeps_its_size() -> None:
    generator = torch.Generator().manual_seed(1)
    rest = torch.randn(5, 1, 512, generator=generator)
    states = torch.nextafter(rest, rest + (torch.rand(5, 40, 512, generator=generator) < 0.5) - 0.5)
    steps = states.double().diff(dim=1).norm(dim=-1).square().mean(1)
    kept = image(states, (0, 40)).diff(dim=1).norm(dim=-1).square().mean(1)
    torch.testing.assert_close(kept, steps, rtol=1e-2, atol=0)


def test_an_orbit_still_closes_after_many_turns() -> None:
    turn = torch.randn(1, 4, 96, generator=torch.Generator().manual_seed(2)) + 3
    kept = image(turn.repeat(1, 64, 1), (0, 256))
    assert float((kept[:, -4:] - kept[:, :4]).norm() / kept[:, :4].diff(dim=1).norm()) < 1e-4


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 15), (torch.float64, 31)])
def test_every_state_is_right_to_a_part_of_the_step_into_it(dtype: torch.dtype, bits: int) -> None:
    # As narrow as the image, which leaves such states as they are but for one factor: walks that shrink by 12 orders.
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(6, 300, DIMENSIONS, generator=generator, dtype=dtype) * 0.91 ** torch.arange(300)[:, None]
    states = steps.flip(1).cumsum(1).flip(1).double()
    way, kept = states[:, 1:] - states[:, :1], image(states.to(dtype), (0, 300)).diff(dim=1).cumsum(1)
    factor = (kept[:, -1:].norm(dim=-1) / way[:, -1:].norm(dim=-1))[..., None]  # where least is rounded away
    torch.testing.assert_close(factor, torch.ones_like(factor), rtol=2.0**-bits, atol=0)
    size = states.diff(dim=1).abs().amax(-1)
    away = (kept / factor - way).abs().amax(-1)
    assert bool((away <= 2.0**-bits * size + 4 * torch.finfo(dtype).eps * size.cumsum(1)).all())
