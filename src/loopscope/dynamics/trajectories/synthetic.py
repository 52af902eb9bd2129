"""Trajectories whose truth is known, to calibrate verdicts with.

Every case is a closed formula or a small dynamical system in a random subspace, moved to a random point, with the noise
of a dtype on top. What no method could decide from the states alone is marked so, by a rule on the case's own
parameters, never by what a method says of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from loopscope.dynamics.trajectories.states import rounding_step
from loopscope.dynamics.verdicts import Kind
from loopscope.errors import ConfigError
from loopscope.models.inspection.facts import Dtype

WIDTHS = (16, 64, 256, 1024, 5280)
LENGTHS = (32, 64, 128, 256, 512)

_Path = Float[np.ndarray, "recurrence width"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """One synthetic token."""

    states: Float[np.ndarray, "recurrence width"]
    """As a model that runs in `dtype` would have made them, stored in float32 (or float64)."""
    case: str
    """Name of its entry in `CASES`."""
    truth: frozenset[Kind]
    """The kinds that are right: `fixed point` and `at floor` are both right of noise about a point."""
    decidable: bool
    """False where noise, or too short a time, hides what it is."""
    dtype: Dtype
    parameters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Room:
    """What a case is drawn with."""

    rng: np.random.Generator
    length: int
    width: int
    noise: float
    """Relative step that the noise makes."""

    def time(self) -> Float[np.ndarray, " recurrence"]:
        return np.arange(self.length, dtype=np.float64)

    def directions(self, count: int) -> Float[np.ndarray, "count width"]:
        """Orthonormal, at random."""
        return np.linalg.qr(self.rng.standard_normal((self.width, count)))[0].T

    def log_uniform(self, low: float, high: float) -> float:
        return float(np.exp(self.rng.uniform(math.log(low), math.log(high))))

    def separable(self, path: _Path, rivals: Sequence[Float[np.ndarray, " recurrence"]]) -> bool:
        """No rival shape, moved and stretched at will, comes so near to the path over its second half that the noise
        could hide the difference (a likelihood ratio of less than e^50)."""
        tail = path[self.length // 2 :]
        tail = tail - tail.mean(0)
        least = math.inf
        for rival in rivals:
            shape = rival[self.length // 2 :] - rival[self.length // 2 :].mean()
            shape = shape / np.linalg.norm(shape)
            least = min(least, float((tail**2).sum() - ((shape @ tail) ** 2).sum()))
        return least * self.width / self.noise**2 >= 100.0

    def approaches(self) -> list[Float[np.ndarray, " recurrence"]]:
        """Exponentials that shrink by at least a fifth over the second half: what a slider might be taken for."""
        return [np.exp(-constants * self.time() / self.length) for constants in np.geomspace(0.4, 30.0, 60)]

    def drifts(self) -> list[Float[np.ndarray, " recurrence"]]:
        """Straight and logarithmic: what a slow approach might be taken for."""
        return [self.time(), *(np.log(self.time() + shift) for shift in (1.0, 2.0))]

    def visible(self, motion: float) -> bool:
        """A coherent motion of this size over the second half of the trajectory stands out of the noise."""
        return motion >= _VISIBLE * self.noise


_VISIBLE = 8.0
"""A motion is called visible from this many times the noise on. Rounding makes orbits of its own up to about four times
its size, which no data tell from true ones."""
_PERIODS = 3.0
"""An orbit can be told from other motion when this many periods are in the second half of the trajectory."""

# Displacement from a point of norm 1, the kinds that are right, whether it can be decided, and its parameters.
_Made = tuple[_Path, set[Kind], bool, dict[str, float]]
_FIXED = {kind for kind in Kind if kind.settles}


def _contraction(room: _Room) -> _Made:
    """One real eigenvalue, of either sign."""
    rate = room.rng.uniform(0.1, 0.9) * room.rng.choice([1, 1, 1, -1])
    size = room.log_uniform(0.05, 2.0)
    path = size * (rate ** room.time())[:, None] * room.directions(1)
    return path, set(_FIXED), True, {"rate": float(rate)}


def _many_modes(room: _Room) -> _Made:
    """A random linear map: many eigenvalues, real and complex, up to a spectral radius."""
    modes, rate = int(room.rng.integers(4, 13)), room.rng.uniform(0.5, 0.95)
    matrix = room.rng.standard_normal((modes, modes))
    matrix *= rate / np.abs(np.linalg.eigvals(matrix)).max()
    state = room.rng.standard_normal(modes)
    state *= room.log_uniform(0.05, 1.0) / np.linalg.norm(state)
    path = np.empty((room.length, modes))
    for step in range(room.length):
        path[step] = state
        state = matrix @ state
    return path @ room.directions(modes), set(_FIXED), rate**room.length < 0.1, {"rate": rate}


def _slow_contraction(room: _Room) -> _Made:
    """One real eigenvalue near 1, seen for one to five of its time constants or more."""
    constants = room.log_uniform(1.0, 6.0)
    rate = math.exp(-constants / room.length)
    size = room.log_uniform(0.05, 2.0)
    path = size * (rate ** room.time())[:, None] * room.directions(1)
    moved = size * math.exp(-constants / 2) * (1 - math.exp(-constants / 2))
    decidable = (room.separable(path, room.drifts()) and room.visible(moved)) or moved <= 2 * room.noise
    return path, set(_FIXED), decidable, {"rate": rate}


def _damped_rotation(room: _Room) -> _Made:
    """A complex pair inside the unit circle."""
    period = room.rng.uniform(2.3, max(2.5, min(20.0, room.length / 8)))
    constants = room.log_uniform(1.5, 40.0)
    rate = math.exp(-constants / room.length)
    size = room.log_uniform(0.05, 1.0)
    angle = 2 * math.pi / period * room.time() + room.rng.uniform(0, 2 * math.pi)
    plane = room.directions(2)
    flat = room.rng.uniform(0.3, 1.0)
    path = (
        size
        * (rate ** room.time())[:, None]
        * (np.cos(angle)[:, None] * plane[0] + flat * np.sin(angle)[:, None] * plane[1])
    )
    # It is the loss of amplitude over the second half that tells it from an orbit.
    start = size * math.exp(-constants / 2)
    loss = start * (1 - math.exp(-constants / 2))
    return path, set(_FIXED), loss >= 2 * room.noise or not room.visible(start), {"rate": rate, "period": period}


def _approach(room: _Room, size: float) -> _Path:
    """A transient that is over when the second half begins."""
    rate = math.exp(-room.rng.uniform(16, 60) / room.length)
    return np.asarray(size * (rate ** room.time())[:, None] * room.directions(1))


def _integer_orbit(room: _Room) -> _Made:
    """A cycle through arbitrary points."""
    longest = max(2, int(room.length / (2 * _PERIODS)))
    period = int(room.rng.integers(2, min(13, longest + 1)))
    size = room.log_uniform(0.02, 1.0)
    if room.rng.random() < 0.5:
        cycle = room.rng.standard_normal((period, room.width))
    else:
        cycle = room.rng.standard_normal((period, 2)) @ room.directions(2)
    cycle -= cycle.mean(0)
    if period == 2:
        cycle[1] = -cycle[0]
    cycle *= size / np.sqrt((cycle**2).sum(1).mean())
    path = cycle[np.arange(room.length) % period] + _approach(room, room.rng.choice([0.0, 0.5]))
    return path, {Kind.ORBIT}, room.visible(size), {"period": float(period), "amplitude": size}


def _smooth_orbit(room: _Room) -> _Made:
    """A closed curve with up to four harmonics, of a period that is no whole number."""
    longest = room.length / (2 * _PERIODS)
    period = room.rng.uniform(2.2, max(2.4, min(20.0, longest)))
    harmonics = int(room.rng.integers(1, 5))
    size = room.log_uniform(0.02, 1.0)
    angle = 2 * math.pi / period * room.time() + room.rng.uniform(0, 2 * math.pi)
    directions = room.directions(2 * harmonics)
    path = np.zeros((room.length, room.width))
    for index in range(harmonics):
        share = room.rng.uniform(0.5, 1.0) / (index + 1) ** 1.5
        path += share * np.cos((index + 1) * angle)[:, None] * directions[2 * index]
        path += share * room.rng.uniform(0.3, 1.0) * np.sin((index + 1) * angle)[:, None] * directions[2 * index + 1]
    path *= size / np.sqrt((path**2).sum(1).mean())
    path = path + _approach(room, room.rng.choice([0.0, 0.5]))
    # A harmonic that the recurrences alias to a slow turn looks like a drift, or a second rotation.
    turns = np.arange(1, harmonics + 1) / period
    slowest = np.abs(turns - turns.round()).min() * room.length / 2
    return path, {Kind.ORBIT}, room.visible(size) and bool(slowest >= _PERIODS), {"period": period, "amplitude": size}


def _quasi_periodic(room: _Room) -> _Made:
    """Two or three rotations of comparable size whose periods have no common multiple within the trajectory."""
    count = int(room.rng.integers(2, 4))
    size = room.log_uniform(0.02, 1.0)
    base = room.rng.uniform(2.2, max(2.5, min(9.0, room.length / 10)))
    ratios = (1.0, (1 + math.sqrt(5)) / 2, math.sqrt(2) + 0.9)[:count]
    directions = room.directions(2 * count)
    path = np.zeros((room.length, room.width))
    for index, ratio in enumerate(ratios):
        angle = 2 * math.pi / (base * ratio) * room.time() + room.rng.uniform(0, 2 * math.pi)
        share = room.rng.uniform(0.6, 1.0)
        path += share * (
            np.cos(angle)[:, None] * directions[2 * index] + np.sin(angle)[:, None] * directions[2 * index + 1]
        )
    path *= size / np.sqrt((path**2).sum(1).mean())
    # Of fewer turns, a closed curve with harmonics in the rotations' places says as much.
    enough = room.length / 2 >= 8 * base * max(ratios)
    return path, {Kind.BOUNDED}, enough and room.visible(2 * size), {"period": base}


def _slider(room: _Room) -> _Made:
    """Constant speed, along a line or an arc."""
    travel = room.log_uniform(0.02, 2.0)
    time = room.time() / room.length
    if room.rng.random() < 0.5:
        path = travel * time[:, None] * room.directions(1)
    else:
        angle = min(travel, 1.5) * time
        plane = room.directions(2)
        path = np.sin(angle)[:, None] * plane[0] + (np.cos(angle) - 1)[:, None] * plane[1]
    decidable = room.visible(travel / 2) and room.separable(path, room.approaches())
    path = path + _approach(room, room.rng.choice([0.0, 0.5]))
    return path, {Kind.SLIDER}, decidable, {"speed": travel / room.length}


def _logarithmic_drift(room: _Room) -> _Made:
    """Steps that shrink like 1/t, whose sum has no limit."""
    travel = room.log_uniform(0.1, 2.0)
    path = travel * (np.log1p(room.time()) / math.log(room.length))[:, None] * room.directions(1)
    decidable = room.separable(path, room.approaches()) and room.visible(travel * math.log(2) / math.log(room.length))
    return path, {Kind.SLIDER}, decidable, {"speed": travel * math.log(2) / math.log(room.length)}


def _random_walk(room: _Room) -> _Made:
    """Independent steps: neither bounded nor on its way anywhere. The trajectory alone does not tell its limit."""
    size = room.log_uniform(0.05, 1.0)
    modes = int(room.rng.choice([2, 8, min(room.width, 64)]))
    steps = room.rng.standard_normal((room.length, modes)) / math.sqrt(modes)
    path = size * np.cumsum(steps, axis=0) / math.sqrt(room.length)
    return path @ room.directions(modes), {Kind.UNKNOWN}, False, {"size": size}


def _random_network(room: _Room) -> _Path:
    """`x <- tanh(g W x)` with a gain beyond the edge of chaos."""
    size = int(room.rng.integers(60, 120))
    weights = room.rng.standard_normal((size, size)) * room.rng.uniform(2.5, 4.0) / math.sqrt(size)
    state = room.rng.standard_normal(size)
    path = np.empty((room.length, size))
    for step in range(-100, room.length):
        state = np.tanh(weights @ state)
        if step >= 0:
            path[step] = state
    mixing = room.rng.standard_normal((size, room.width)) / math.sqrt(room.width)
    return path @ mixing


def _logistic_maps(room: _Room) -> _Path:
    """A few independent logistic maps in their chaotic range."""
    count = int(room.rng.integers(1, 6))
    state = room.rng.uniform(0.2, 0.8, count)
    growth = room.rng.uniform(3.9, 4.0, count)
    path = np.empty((room.length, count))
    for step in range(-50, room.length):
        state = growth * state * (1 - state)
        if step >= 0:
            path[step] = state
    return np.asarray(path @ room.directions(count))


def _lorenz(room: _Room) -> _Path:
    """The Lorenz system, sampled coarsely."""
    state = np.array([1.0, 1.0, 20.0]) + room.rng.standard_normal(3)
    inner, interval = 40, room.rng.uniform(0.1, 0.3)
    path = np.empty((room.length, 3))
    for step in range(-100, room.length):
        for _ in range(inner):
            x, y, z = state
            state = state + interval / inner * np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])
        if step >= 0:
            path[step] = state
    return np.asarray(path @ room.directions(3))


def _chaos(room: _Room) -> _Made:
    """One of three chaotic systems."""
    systems: Sequence[Callable[[_Room], _Path]] = (_random_network, _logistic_maps, _lorenz)
    path = systems[int(room.rng.integers(len(systems)))](room)
    path = path - path.mean(0)
    size = room.log_uniform(0.05, 1.0)
    path *= size / np.sqrt((path**2).sum(1).mean())
    # In bfloat16 a small chaotic motion is no larger than rounding that a model amplifies.
    return path, {Kind.BOUNDED}, room.length >= 64 and size >= 60 * room.noise, {"size": size}


def _divergence(room: _Room) -> _Made:
    """An eigenvalue outside the unit circle, real or complex, or a norm that grows in proportion to time."""
    which = room.rng.integers(3)
    if which == 0:
        doublings = room.log_uniform(3.0, 30.0)
        rate = 2 ** (doublings / room.length)
        size = room.log_uniform(0.01, 1.0)
        path = size * (rate ** room.time())[:, None] * room.directions(1)
        return path, {Kind.DIVERGING}, room.visible(size * 2 ** (doublings / 2)), {"rate": rate}
    if which == 1:
        doublings = room.log_uniform(3.0, 15.0)
        rate = 2 ** (doublings / room.length)
        size = room.log_uniform(0.01, 1.0)
        period = room.rng.uniform(2.3, max(2.5, min(12.0, room.length / 10)))
        angle = 2 * math.pi / period * room.time()
        plane = room.directions(2)
        path = np.cos(angle)[:, None] * plane[0] + np.sin(angle)[:, None] * plane[1]
        path *= size * (rate ** room.time())[:, None]
        return path, {Kind.DIVERGING}, room.visible(size * 2 ** (doublings / 2)), {"rate": rate, "period": period}
    travel = room.log_uniform(20.0, 200.0)
    return travel * room.time()[:, None] / room.length * room.directions(1), {Kind.DIVERGING}, True, {"rate": 1.0}


def _noise_only(room: _Room) -> _Made:
    """A point that was reached long ago."""
    return np.zeros((room.length, room.width)), set(_FIXED), True, {}


_LOUD = 0.03
"""Noise of this share of the norm in a coarse dtype is no rest that anybody could tell from small motion."""


def _noisy_mode(room: _Room) -> _Made:
    """A point at which one mode near the unit circle, real or complex, amplifies what is new in each recurrence."""
    rate = room.rng.uniform(0.8, 0.99)
    mode = rate * np.exp(1j * room.rng.choice([0.0, math.pi, room.rng.uniform(0.2, 2.9)]))
    kicks = room.rng.standard_normal((2, room.length + 400)) * room.noise / math.sqrt(2)
    state, path = 0j, np.empty((room.length, 2))
    for step, (one, other) in enumerate(kicks.T, -400):
        state = mode * state + one + 1j * other
        if step >= 0:
            path[step] = state.real, state.imag
    level = room.noise / math.sqrt(1 - rate**2)
    return path @ room.directions(2), set(_FIXED), level <= _LOUD, {"rate": rate}


def _non_normal(room: _Room) -> _Made:
    """A contraction whose eigenvectors nearly coincide, which amplifies noise 3 to 100 times."""
    size, gain, wanted = 6, 0.0, room.log_uniform(3.0, 100.0)
    upper = np.triu(room.rng.standard_normal((size, size)), 1)
    rates = np.diag(room.rng.uniform(0.5, 0.8, size))
    scale = 0.05
    while gain < wanted:
        scale *= 1.1
        matrix = rates + scale * upper
        # Covariance of what noise of variance 1 is amplified to: the sum of the squares of all powers.
        powers = np.stack([np.linalg.matrix_power(matrix, power) for power in range(80)])
        gain = math.sqrt(float((powers**2).sum()) / size)
    state, path = np.zeros(size), np.empty((room.length, size))
    for step in range(-100, room.length):
        state = matrix @ state + room.rng.standard_normal(size) * room.noise / math.sqrt(2 * size)
        if step >= 0:
            path[step] = state
    # Its swings last up to 30 recurrences: a shorter tail may hold no more than one of them.
    return path @ room.directions(size), set(_FIXED), gain * room.noise <= _LOUD and room.length >= 128, {"gain": gain}


def _power_law(room: _Room) -> _Made:
    """An approach like (t + s)^-q, as at the edge of stability."""
    power, shift = room.log_uniform(0.4, 3.0), room.log_uniform(1.0, room.length / 4)
    size = room.log_uniform(0.1, 2.0)
    path = size * ((1 + room.time() / shift) ** -power)[:, None] * room.directions(1)
    moved = float(np.linalg.norm(path[-1] - path[room.length // 2]))
    drifts = [room.time(), *(np.log(room.time() + start) for start in np.geomspace(1.0, 4.0 * room.length, 12))]
    decidable = (room.separable(path, drifts) and room.visible(moved)) or moved <= 2 * room.noise
    return path, set(_FIXED), decidable, {"power": power, "shift": shift}


def _saddle_exit(room: _Room) -> _Made:
    """It came near an unstable point, and leaves it."""
    folds = room.log_uniform(4.0, 20.0)
    rate = math.exp(folds / room.length)
    end = room.log_uniform(0.02, 1.0)
    path = end * (rate ** (room.time() - room.length + 1))[:, None] * room.directions(1) + _approach(room, 0.5)
    # Rounding that a slow mode amplifies would seem to leave as well, if not so far.
    return path, {Kind.DIVERGING}, end * (1 - math.exp(-folds / 2)) >= 60 * room.noise, {"rate": rate}


def _intermittency(room: _Room) -> _Made:
    """The logistic map just below its window of period 3: nearly periodic for long, with bursts."""
    state, growth = room.rng.uniform(0.2, 0.8), 1 + math.sqrt(8) - room.log_uniform(1e-3, 1e-2)
    path = np.empty((room.length, 1))
    for step in range(-200, room.length):
        state = growth * state * (1 - state)
        if step >= 0:
            path[step] = state
    size = room.log_uniform(0.05, 1.0)
    path = size * (path - path.mean()) / path.std() @ room.directions(1)
    return path, {Kind.BOUNDED}, room.length >= 256 and size >= 60 * room.noise, {"size": size}


def _invariant_curve(room: _Room) -> _Made:
    """The closed curve beyond a Neimark-Sacker bifurcation: a rotation whose radius has settled, about no whole
    period."""
    turn = room.rng.uniform(0.35, 2.6)
    state, path = 0.5 + 0j, np.empty((room.length, 2))
    for step in range(-200, room.length):
        state = state * np.exp(1j * (turn + 0.1 * abs(state) ** 2)) * (1.2 - 0.2 * abs(state) ** 2)
        if step >= 0:
            path[step] = state.real, state.imag
    size = room.log_uniform(0.02, 1.0)
    enough = room.length / 2 >= _PERIODS * 2 * math.pi / turn
    return size * path @ room.directions(2), {Kind.ORBIT}, enough and room.visible(size), {"turn": turn}


CASES: dict[str, Callable[[_Room], _Made]] = {
    "contraction": _contraction,
    "many modes": _many_modes,
    "slow contraction": _slow_contraction,
    "damped rotation": _damped_rotation,
    "noise only": _noise_only,
    "orbit, whole period": _integer_orbit,
    "orbit, any period": _smooth_orbit,
    "quasi-periodic": _quasi_periodic,
    "slider": _slider,
    "logarithmic drift": _logarithmic_drift,
    "random walk": _random_walk,
    "chaos": _chaos,
    "divergence": _divergence,
    "noisy mode": _noisy_mode,
    "non-normal": _non_normal,
    "power law": _power_law,
    "saddle exit": _saddle_exit,
    "intermittency": _intermittency,
    "invariant curve": _invariant_curve,
}
"""The default mix: all of them, equally often."""


def make_trajectory(
    case: str, *, seed: int, length: int = 128, width: int = 256, dtype: Dtype = "float32"
) -> Trajectory:
    """One trajectory of a case; the same arguments make the same one.

    The state's norm lies between 1 and 100. Noise is the rounding of `dtype`, or up to eight times as much, white or
    filtered by a mode that a model could have. Raises `ConfigError` for a name that is no case.
    """
    if case not in CASES:
        raise ConfigError(f"Unknown case {case!r}; the cases are {', '.join(CASES)}.")
    rng = np.random.default_rng([seed, list(CASES).index(case), length, width])
    amplified = float(rng.choice([1.0, 1.0, np.exp(rng.uniform(0, math.log(8)))]))
    noise = rounding_step(dtype) * amplified
    room = _Room(rng, length, width, noise)
    path, truth, decidable, parameters = CASES[case](room)
    point = rng.standard_normal(width) * np.exp(0.5 * rng.standard_normal(width))
    states = point / np.linalg.norm(point) + path
    if amplified > 1:
        size = np.linalg.norm(states, axis=1, keepdims=True) / math.sqrt(width)
        states = states + noise / math.sqrt(2) * size * _noise(room)
    states = _rounded(states * room.log_uniform(1.0, 100.0), dtype)
    return Trajectory(
        states=states,
        case=case,
        truth=frozenset(truth),
        decidable=decidable,
        dtype=dtype,
        parameters={**parameters, "noise": noise},
    )


def _noise(room: _Room) -> _Path:
    """Of unit variance, white or coloured by one real or complex mode."""
    white = room.rng.standard_normal((room.length, room.width))
    if room.rng.random() < 0.5:
        return white
    rate, turn = room.rng.uniform(0.0, 0.7), room.rng.uniform(0, math.pi)
    mode, state = rate * np.exp(1j * turn), np.zeros(room.width, dtype=np.complex128)
    coloured = np.empty_like(white)
    for step, kick in enumerate(white):
        state = mode * state + kick
        coloured[step] = state.real
    return np.asarray(coloured / coloured.std())


def _rounded(states: _Path, dtype: Dtype) -> _Path:
    """To the nearest number of the type; float32 unless the type is float64, which needs no rounding."""
    if dtype == "float64":
        return states
    with np.errstate(over="ignore"):
        single = states.astype(np.float32)
        if dtype == "float16":
            return single.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = single.view(np.uint32)
        # To nearest, ties to even, of the upper half.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return rounded.view(np.float32)
    return single


def generate(
    count: int,
    *,
    seed: int = 0,
    cases: Sequence[str] = (),
    lengths: Sequence[int] = LENGTHS,
    widths: Sequence[int] = WIDTHS,
    dtype: Dtype = "float32",
) -> Iterator[Trajectory]:
    """`count` trajectories of the default mix (or of some cases): case after case, of random length and width."""
    names = tuple(cases) or tuple(CASES)
    rng = np.random.default_rng(seed)
    for index in range(count):
        length, width = int(rng.choice(lengths)), int(rng.choice(widths))
        yield make_trajectory(
            names[index % len(names)], seed=seed * 1_000_003 + index, length=length, width=width, dtype=dtype
        )
