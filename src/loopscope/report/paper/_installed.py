"""Imported before all that draws: without matplotlib nothing here can work, and a user is told what to install."""

from __future__ import annotations

from loopscope._util.hub import require

require("matplotlib", "Drawing paper figures", extra="figures")
