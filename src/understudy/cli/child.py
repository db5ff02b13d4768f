"""The program as a child of another of our commands: it ends when that one is gone, however it ended.

`understudy.child.running` starts it. It ignores what the command does; a parent that is killed cannot say
goodbye, so the child reads a pipe whose other end only the parent holds.
"""

from __future__ import annotations

from understudy.child import end_with_parent
from understudy.cli.main import run

if __name__ == "__main__":
    end_with_parent()
    run()
