"""Prints the lines of each file beside its budget: python -m benchmarks.loc, or `make loc`."""

import sys
from pathlib import Path

import swav  # noqa: F401 (counts the modules that it imports)

ROOT = Path(__file__).parents[1]
BUDGETS = {"swav.py": 270, "deepclusterv2.py": 280, "selav2.py": 290, "deepcluster.py": 285, "sela.py": 330,
           "odc.py": 340, "common/sinkhorn.py": 130, "README.md": 200}
OTHERS, BEHIND_SWAV, ALL = 320, 2500, 7400  # a file of common; what `import swav` brings; scripts and common


def lines(path):
    return len(path.read_text().splitlines())


def main():
    files = sorted([*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")])
    brought = [Path(module.__file__) for name, module in sys.modules.items() if name.startswith("common")]
    rows = [(str(path.relative_to(ROOT)), lines(path)) for path in [*files, ROOT / "README.md"]]
    rows = [(name, count, BUDGETS.get(name, OTHERS if "/" in name else None)) for name, count in rows]
    rows.append(("behind `import swav`", sum(map(lines, brought)), BEHIND_SWAV))
    rows.append(("*.py and common/", sum(map(lines, files)), ALL))
    rows.append(("tests/*.py", sum(map(lines, (ROOT / "tests").glob("*.py"))), None))
    for name, count, budget in rows:
        over = f"{count - budget} over" if budget and count > budget else ""
        print(f"{name:32}{count:6}{budget or '':>8}  {over}".rstrip())


if __name__ == "__main__":
    main()
