"""Prints, as constraints for pip, the oldest release of each dependency that pyproject.toml allows.

    python infra/lowest_constraints.py pyproject.toml > lowest.txt

What these releases depend on in turn stays free: pip takes the newest of it, as on a user's machine.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

#: The engine of an environment of its own, which chooses its own torch.
_SEPARATE_EXTRAS = {"vllm"}


def lowest_constraints(pyproject: str) -> list[str]:
    """Returns one `name==version` for each dependency with a lower bound, the core's and those of the extras."""
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    texts = [
        *project["dependencies"],
        *(text for name in extras if name not in _SEPARATE_EXTRAS for text in extras[name]),
    ]
    found = {}
    for requirement in map(Requirement, texts):
        for bound in requirement.specifier:
            if bound.operator == ">=":
                found[requirement.name] = f"{requirement.name}=={bound.version}"
    return sorted(found.values())


if __name__ == "__main__":
    print("\n".join(lowest_constraints(Path(sys.argv[1]).read_text())))
