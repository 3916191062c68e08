"""The command line: `gdjax compare`, `advise`, `rules`, `schedule`, `bench`, `problems`; how an experiment is run."""

from gdjax.commands import _arguments, _session
from gdjax.commands.advise import Advise
from gdjax.commands.bench import Bench
from gdjax.commands.compare import Compare
from gdjax.commands.problems import Problems
from gdjax.commands.rules import Rules
from gdjax.commands.schedule import Schedule

COMMANDS = {
    "compare": Compare,
    "advise": Advise,
    "rules": Rules,
    "schedule": Schedule,
    "bench": Bench,
    "problems": Problems,
}


def main() -> None:
    """Run `gdjax`; exit status 0 done, 1 failure, 2 bad input, 130 interrupted."""
    with _session.ended():
        asked = _arguments.parse(
            COMMANDS, prog="gdjax", description="Gradient descent, and how many examples each update should see."
        )
    _session.run(asked, lambda asked: asked.run())


__all__ = ["COMMANDS", "main"]
