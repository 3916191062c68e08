"""List the experiments, run all of them, or write the gallery or the ledger.

`python -m experiments` prints names and questions; `python -m experiments all [--smoke ...]` runs every one, each in a
process of its own; `python -m experiments gallery` writes experiments/README.md from the committed results, and
`python -m experiments ledger` experiments/LEDGER.md: published claims beside what came out here.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from experiments.__ledger__ import ledger

FOLDER = Path(__file__).parent


def experiments() -> dict[str, str]:
    """Return {name: docstring} of every experiment."""
    paths = [path for path in sorted(FOLDER.glob("*.py")) if not path.name.startswith("__")]
    return {path.stem: ast.get_docstring(ast.parse(path.read_text())) or "" for path in paths}


def run_all(arguments: list[str]) -> int:
    """Run every experiment with these arguments; return how many failed."""
    failed = []
    for name in experiments():
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"experiments.{name}", *arguments]).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all of them ran")
    return len(failed)


def gallery() -> str:
    """Return the page: for every experiment with a committed result its question, and answer, figure and command.

    `results/NAME` holds a run at the default size, `results/NAME-full` one with --full.
    """
    parts = [
        "# What the experiments found",
        "Every answer is the verdict in the `result.json` beside its figure, computed from the numbers there; a "
        "prediction that failed is reported as it failed. `python -m experiments gallery` writes this page.",
    ]
    for name, text in experiments().items():
        question = re.sub(r"\s+", " ", text.split("\n\n")[0])
        section = [f"## [{name}]({name}.py)\n\n**{question}**"]
        for folder, option in ((name, ""), (f"{name}-full", " --full")):
            result = FOLDER / "results" / folder / "result.json"
            if result.exists():
                answer = json.loads(result.read_text())["verdict"]
                figure = f"![{question}](results/{folder}/figure.png)"
                section.append(f"{answer}\n\n{figure}\n\n```sh\npython -m experiments.{name}{option}\n```")
        parts += section if len(section) > 1 else []
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Do what the command line says."""
    match sys.argv[1:]:
        case []:
            for name, text in experiments().items():
                print(f"{name:<20}  {text.splitlines()[0]}")
        case ["all", *arguments]:
            sys.exit(1 if run_all(arguments) else 0)
        case ["gallery"]:
            (FOLDER / "README.md").write_text(gallery())
        case ["ledger"]:
            (FOLDER / "LEDGER.md").write_text(ledger())
        case ["-h" | "--help"]:
            print(__doc__)
        case [other, *_]:
            one = f"python -m experiments.{other if other in experiments() else 'NAME'}"
            known = "'all', 'gallery' or 'ledger'"
            print(f"experiments: {other!r} is not {known}; one experiment is {one}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
