"""Runs statements and commands in a process that lacks every optional dependency: `python -m tests.package.blocked`.

Reads a JSON list of cases from stdin: a list of words is a command line, a string is a Python statement. Prints a JSON
list of [exit code, stdout, stderr], one for each case. An error that leaves a statement counts as exit code 1 with
its text.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec

from weightline.errors import WeightlineError
from weightline.extras import MODULES

BLOCKED = frozenset(module for modules in MODULES.values() for module in modules)


class Blocker(MetaPathFinder):
    """Finds none of the optional dependencies, as if they were not installed."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None


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
    sys.meta_path.insert(0, Blocker())
    print(json.dumps([run_case(case) for case in json.load(sys.stdin)]))
