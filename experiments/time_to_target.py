"""Which batch size reaches the target first on this device: is the advice right?

Question    Digits, a multilayer perceptron, SGD, training loss 0.05: does the time predicted for every batch size agree
            with the time measured, and is the batch size advised the fastest of those that were run?
Prediction  Every measured number of updates lies in its 90 % interval or no more than one does not; the batch size that
            was predicted to be fastest takes at most 1.3 times as long as the fastest run.
Cost        60 s on two CPU cores.
"""

import numpy as np

from gdjax import advise, problems
from gdjax.commands import experiment

TARGET = "loss<=0.05"


def main(options: experiment.Options) -> experiment.Result:
    problem = problems.digits_mlp()
    found = advise.batch_size(
        problem,
        "loss<=0.3" if options.smoke else TARGET,
        sizes=[8, 64] if options.smoke else None,
        seconds=60 if options.smoke else 120,
        seed=options.seed,
    )
    run = [choice for choice in found.choices if choice.verified is not None]
    outside = [choice.batch_size for choice in run if not choice.inside]
    guess = min(run, key=lambda choice: choice.seconds[1])
    regret = guess.measured_seconds / min(choice.measured_seconds for choice in run)
    beyond = f" (B = {', '.join(map(str, outside))})" if outside else ""
    verdict = experiment.verdict(
        {"intervals hold all but one": len(outside) <= 1, "the advised is nearly the fastest": regret <= 1.3},
        f"Of {len(run)} batch sizes run, {len(outside)} lay outside their interval{beyond}; B = {guess.batch_size}, "
        f"predicted to be fastest, took {regret:.2f} times the fastest. {found.sentence()}",
    )
    rows = [choice.summary() | {"ratio": np.divide(choice.measured_updates, choice.updates[1])} for choice in run]
    rows.append({key: value for key, value in found.summary().items() if key != "choices"})
    return experiment.Result(rows, verdict, advise.advice(found, verdict))


if __name__ == "__main__":
    experiment.run(main)
