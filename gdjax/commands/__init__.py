"""The command line: `gdjax compare`, `advise`, `rules`, `schedule`, `bench`, `problems`; how an experiment is run."""

import sys

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
START = """Gradient descent, and how many examples each update should see. Begin with:

  gdjax compare                        one example, 32 and all of them: 1 min
  gdjax advise --target 'loss<=0.05'   the batch size that is there first
  gdjax problems                       what is built in, for --problem

and then with a model of your own, --problem my_module:problem. There are
rules, schedule and bench as well; gdjax COMMAND --help explains each."""


def main() -> None:
    """Run `gdjax`; exit status 0 done, 1 failure, 2 bad input, 130 interrupted."""
    with _session.ended():
        if len(sys.argv) == 1:
            print(START)
            return
        asked = _arguments.parse(
            COMMANDS, prog="gdjax", description="Gradient descent, and how many examples each update should see."
        )
    _session.run(asked, lambda asked: asked.run())


__all__ = ["COMMANDS", "main"]
