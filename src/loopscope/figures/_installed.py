"""Imported before all that draws: without matplotlib nothing here can work, and a user is told what to install."""

from loopscope._extras import require

require("matplotlib", "Drawing paper figures", extra="figures")
