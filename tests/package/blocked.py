"""Runs statements and commands in a process without optional dependencies: `python -m tests.package.blocked [EXTRA]`.

It has those of the named extra, and lacks all others. Reads a JSON list of cases from stdin: a list of words is a
command line, a string is a Python statement. Prints a JSON list of [exit code, stdout, stderr], one for each case. An
error that leaves a statement counts as exit code 1 with its text.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

from weightline.errors import WeightlineError
from weightline.extras import MODULES

#: The extras' modules, and peft, which comes with [train].
OPTIONAL = frozenset(module for modules in MODULES.values() for module in modules) | {"peft"}


class Blocker:
    """A finder that does not find some modules, as if they were not installed, and is the finder `inner` otherwise."""

    def __init__(self, inner: Any, blocked: frozenset[str]) -> None:
        self._inner, self._blocked = inner, blocked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self._blocked:
            return None
        found: ModuleSpec | None = self._inner.find_spec(fullname, path, target)
        return found


def run_case(case: str | list[str]) -> tuple[int, str, str]:
    """Returns the exit code and what was printed."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if isinstance(case, str):
                exec(case, {})
            else:
                from weightline.cli.main import main

                sys.argv = ["weightline", *case]
                main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=err)
        except (WeightlineError, ImportError) as error:
            code = 1
            print(f"{type(error).__name__}: {error}", file=err)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    lacking = OPTIONAL.difference(*(MODULES[extra] for extra in sys.argv[1:]))
    sys.meta_path[:] = [Blocker(finder, lacking) for finder in sys.meta_path]
    print(json.dumps([run_case(case) for case in json.load(sys.stdin)]))
