"""`python -m loopscope` is `loopscope`."""

from __future__ import annotations

from loopscope.cli import main

if __name__ == "__main__":
    main()
