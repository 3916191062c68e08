"""How long do the same updates take elsewhere?

Question    MLP 64-128-10 and 784-512-512-10, plain SGD in float32 at B = 1, 32 and N = 1024: how long does
            `descent.run` take beside PyTorch's eager loop, scikit-learn's MLPClassifier and NumPy, each from the same
            weights over the same batches, ending with the same parameters? And a convolutional network and a
            transformer of 16 and 128 tokens at B = 1, 32 and 256, beside PyTorch, eager and by `torch.compile`? How
            long do the gradient norms of 256 examples take by `ghost` beside `torch.func`? How much of a large matrix
            product's speed is used?
Prediction  At B = 1 the small network is trained at least 20 times faster than by PyTorch and scikit-learn, 5 times
            faster than by NumPy; gdjax is nowhere slower; norms by ghost take at most a tenth; the large network uses
            at least 60 % of the product's speed at B = 32 and N.
Cost        8 minutes on two CPU cores, 2 without PyTorch. PyTorch is raced where it is installed, and left out
            elsewhere.
"""

import importlib
import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdjax import batching, bench, descent, ghost, gradients, problems, report, timing
from gdjax.commands import experiment
from gdjax.problem import Problem
from gdjax.problems import datasets, models

SIZES = {"small": (64, 128, 10), "large": (784, 512, 512, 10)}
UPDATES = {("small", 1): 1000, ("small", 32): 400, ("small", 1024): 40}
UPDATES |= {("large", 1): 100, ("large", 32): 50, ("large", 1024): 4}
# No more of the CNN at B = 1: after 500 updates, weights that began 1e-6 apart are 2e-2 apart, in PyTorch as here (a
# ReLU that flips); in float64 the two end 1e-15 apart.
NETWORK_UPDATES = {("cnn", 1): 150, ("cnn", 32): 60, ("cnn", 256): 12}
NETWORK_UPDATES |= {("transformer-16", 1): 200, ("transformer-16", 32): 40, ("transformer-16", 256): 8}
NETWORK_UPDATES |= {("transformer-128", 1): 100, ("transformer-128", 32): 8}
NORMS_OF = 256
torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
RATE, TOLERANCE = 0.01, 1e-4
AIMS = {"PyTorch": 20.0, "scikit-learn": 20.0, "NumPy": 5.0}
COMPILED = "PyTorch, compiled"
NORMS_AIM, CEILING_AIM = 10.0, 0.6
SECONDS, REST = 4.0, 0.1  # for each side; before each run, as threads of OpenBLAS and OpenMP spin on for a while

Leaves = list[np.ndarray]
Side = Callable[[], Leaves]
"""Make all updates from the first weights and return the last: of each layer the weight [in, out], then the bias;
of the networks the leaves as `jax.tree.leaves` orders them."""


def by_gdjax(problem: Problem, params, batches, leaves: Callable = lambda params: leaves_of(params)) -> Side:
    method = descent.method(gradients.mean(problem.loss), optax.sgd(RATE))

    def run(params, data, batches):
        return descent.run(method, method.init(params), data, batches, lambda *_: (), every=len(batches))[0].params

    program = timing.compiled(run, params, problem.train, batches)
    return lambda: leaves(jax.block_until_ready(program(params, problem.train, batches)))


def by_numpy(problem: Problem, params, batches) -> Side:
    start, (x, labels), order = leaves_of(params), map(np.asarray, problem.train), np.asarray(batches)

    def run():
        w, b = [leaf.copy() for leaf in start[::2]], [leaf.copy() for leaf in start[1::2]]
        for indices in order:
            inputs = [x[indices]]
            for i in range(len(w) - 1):
                inputs.append(np.maximum(inputs[-1] @ w[i] + b[i], 0))
            logits = inputs[-1] @ w[-1] + b[-1]
            g = np.exp(logits - logits.max(1, keepdims=True))
            g /= g.sum(1, keepdims=True)
            g[np.arange(len(g)), labels[indices]] -= 1
            g /= np.float32(len(g))
            for i in reversed(range(len(w))):
                above = (g @ w[i].T) * (inputs[i] > 0) if i else g
                w[i] -= np.float32(RATE) * (inputs[i].T @ g)
                b[i] -= np.float32(RATE) * g.sum(0)
                g = above
        return [leaf for pair in zip(w, b, strict=True) for leaf in pair]

    return run


def by_sklearn(problem: Problem, params, batches) -> Side:
    """One `partial_fit` over the stream in its order: the fastest way that scikit-learn offers."""
    from sklearn.neural_network import MLPClassifier

    start, (x, labels), order = leaves_of(params), map(np.asarray, problem.train), np.asarray(batches)
    net = MLPClassifier(
        tuple(len(bias) for bias in start[1:-1:2]), solver="sgd", learning_rate_init=RATE, batch_size=order.shape[1],
        alpha=0.0, momentum=0.0, nesterovs_momentum=False, shuffle=False,
    )  # fmt: skip
    x, labels = x[order.reshape(-1)], labels[order.reshape(-1)]
    net.partial_fit(x[: order.shape[1]], labels[: order.shape[1]], classes=np.arange(10))

    def run():
        for mine, first in zip((*net.coefs_, *net.intercepts_), (*start[::2], *start[1::2]), strict=True):
            mine[...] = first
        net.partial_fit(x, labels)
        return [leaf for pair in zip(net.coefs_, net.intercepts_, strict=True) for leaf in pair]

    return run


def torch_net(params):

    layers = []
    for weight, bias in zip(leaves_of(params)[::2], leaves_of(params)[1::2], strict=True):
        layers += [torch.nn.Linear(*weight.shape), torch.nn.ReLU()]
        layers[-2].weight.data, layers[-2].bias.data = torch.tensor(weight.T.copy()), torch.tensor(bias)
    return torch.nn.Sequential(*layers[:-1])


def by_torch(problem: Problem, params, batches) -> Side:

    x, labels = (torch.tensor(np.asarray(leaf)) for leaf in problem.train)
    labels, order = labels.long(), torch.tensor(np.asarray(batches)).long()

    def run():
        net = torch_net(params)
        optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
        for indices in order:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[indices]), labels[indices]).backward()
            optimizer.step()
        found = [leaf.detach().numpy() for leaf in net.parameters()]
        return [leaf.T if leaf.ndim == 2 else leaf for leaf in found]

    return run


def norms_by_ghost(problem: Problem, params, batch) -> Side:
    def norms(params, batch):
        return sum(jax.tree.leaves(ghost.sq_norms(problem.loss)(params, batch)[2]))

    program = timing.compiled(norms, params, batch)
    return lambda: [np.asarray(program(params, batch))]


def norms_by_torch(problem: Problem, params, batch) -> Side:

    net = torch_net(params)
    weights = {name: leaf.detach() for name, leaf in net.named_parameters()}
    x, labels = (torch.tensor(np.asarray(leaf)) for leaf in batch)

    def loss(weights, x, label):
        logits = torch.func.functional_call(net, weights, (x[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    gradients_of_all = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def run():
        grads = gradients_of_all(weights, x, labels.long())
        return [torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).numpy()]

    return run


def raced(
    sides: dict[str, Side], named: dict[str, Any], *, seconds: float, relative: bool = False
) -> list[dict[str, Any]]:
    """Check that all sides agree with the first, and return a row for each: its seconds, and its time over the first's.

    Raises:
        ValueError: where a side ends elsewhere.
    """
    expected, rows = next(iter(sides.values()))(), []
    for name, side in sides.items():
        pairs = zip(side(), expected, strict=True)
        differences = [float((np.abs(a - b) / (np.abs(b) if relative else 1)).max()) for a, b in pairs]
        rows.append(named | {"side": name, "difference": max(differences)})
        if not max(differences) <= TOLERANCE:
            raise ValueError(f"{named}: {name} ends {max(differences):.1e} from gdjax, more than {TOLERANCE}")
    turns = timing.measured_in_turn(
        list(sides.values()), [[()]] * len(sides), budget=seconds, rest=min(REST, seconds / 10)
    )
    for row, times in zip(rows, turns, strict=True):
        row |= {"seconds": timing.spread(times)._asdict(), "over_gdjax": timing.ratio(times, turns[0])._asdict()}
    return rows


def flops_of(sizes, batch_size) -> int:
    """Return the operations of the products of an update: three for each weight but the first, which needs two."""
    weights = [a * b for a, b in itertools.pairwise(sizes)]
    return batch_size * (6 * sum(weights) - 2 * weights[0])


def race(model: str, batch_size: int, num_updates: int, key, peaks, seconds: float) -> list[dict[str, Any]]:
    problem = bench.mlp(*SIZES[model])
    init_key, stream_key = jax.random.split(key)
    params = problem.init(init_key)
    stream = batching.reshuffled(stream_key, problem.num_examples, length=num_updates * batch_size)
    ways = {"gdjax": by_gdjax, "NumPy": by_numpy, "scikit-learn": by_sklearn}
    if torch:
        ways["PyTorch"] = by_torch
    sides = {name: way(problem, params, batching.batches(stream, batch_size)) for name, way in ways.items()}
    named = {"race": "updates", "model": model, "batch_size": batch_size, "num_updates": num_updates}
    rows = raced(sides, named, seconds=seconds)
    rate = flops_of(SIZES[model], batch_size) * num_updates / rows[0]["seconds"]["median"]
    rows[0]["fraction_of_product"] = rate / peaks.flops_per_second
    return rows


def network(model: str) -> tuple[Problem, Any]:
    """Return a problem of 1024 random examples, and its model in PyTorch or None."""
    baselines: Any = importlib.import_module("experiments.baselines.torch_models") if torch else None
    if model == "cnn":
        problem = bench.MODELS[model]()
        return problem, baselines and baselines.cnn(problem.train[0].shape[1:])
    shape = bench.MODELS["cnn"]().num_examples, int(model.split("-")[1]) + 1
    tokens = jax.random.randint(jax.random.key(0), shape, 0, datasets.NUM_SHAKESPEARE_CHARACTERS)
    reader = models.transformer(num_tokens=datasets.NUM_SHAKESPEARE_CHARACTERS)
    problem = problems.language_model(
        reader, datasets.Split(tokens, None), num_tokens=datasets.NUM_SHAKESPEARE_CHARACTERS
    )
    return problem, baselines and baselines.transformer()


def race_network(model: str, batch_size: int, num_updates: int, key, seconds: float, with_compiled: bool) -> list[dict]:
    problem, net = network(model)
    init_key, stream_key = jax.random.split(key)
    params, data = problem.init(init_key), problem.train
    stream = batching.reshuffled(stream_key, problem.num_examples, length=num_updates * batch_size)
    batches = batching.batches(stream, batch_size)
    sides = {"gdjax": by_gdjax(problem, params, batches, leaves=lambda tree: [*map(np.asarray, jax.tree.leaves(tree))])}
    if net:
        train = importlib.import_module("experiments.baselines.torch_models").trained
        sides["PyTorch"] = train(net, params, data, batches, rate=RATE)
        if with_compiled:
            sides[COMPILED] = train(net, params, data, batches, rate=RATE, compiled=True)
            try:
                sides[COMPILED]()
            except Exception as error:  # whatever PyTorch's compiler says, the others are raced without it
                print(f"{model}, B = {batch_size}: torch.compile fails: {str(error).splitlines()[0]}")
                del sides[COMPILED]
    named = {"race": "updates", "model": model, "batch_size": batch_size, "num_updates": num_updates}
    return raced(sides, named, seconds=seconds)


def race_norms(model: str, num_examples: int, key, seconds: float) -> list[dict[str, Any]]:
    problem = bench.mlp(*SIZES[model])
    params, batch = problem.init(key), jax.tree.map(lambda x: jnp.asarray(x[:num_examples]), problem.train)
    sides = {"gdjax": norms_by_ghost(problem, params, batch), "PyTorch": norms_by_torch(problem, params, batch)}
    return raced(sides, {"race": "norms", "model": model, "batch_size": num_examples}, seconds=seconds, relative=True)


def main(options: experiment.Options) -> experiment.Result:
    warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")  # of batches larger than what is fitted
    races = dict.fromkeys(list(UPDATES)[:2], 4) if options.smoke else UPDATES
    key, peaks = jax.random.key(options.seed), timing.peaks(product_size=64 if options.smoke else None)
    rows, seconds = [], 0.01 if options.smoke else SECONDS
    setting: dict[str, Any] = {"race": "setting", "torch": None, "cpu_count": os.cpu_count()}
    if torch is None:
        print("PyTorch is not installed: left out (pip install torch)")
    else:
        setting |= {"torch": torch.__version__, "torch_num_threads": torch.get_num_threads()}
    for (model, batch_size), num_updates in races.items():
        rows += race(model, batch_size, num_updates, key, peaks, seconds)
    networks = {("cnn", 1): 4, ("transformer-16", 1): 2} if options.smoke else NETWORK_UPDATES
    for (model, batch_size), num_updates in networks.items():
        rows += race_network(model, batch_size, num_updates, key, seconds, with_compiled=not options.smoke)
    for model in list(SIZES)[: 1 if options.smoke else None] if torch else ():
        rows += race_norms(model, NORMS_OF, key, seconds)
    verdict = judged(rows)
    return experiment.Result([*rows, setting | {"peaks": peaks._asdict()}], verdict, figure(rows, verdict))


def judged(rows: list[dict]) -> str:
    def ratios(race: str) -> dict[tuple, float]:
        mine = [row for row in rows if row["race"] == race and row["side"] != "gdjax"]
        return {(row["model"], row["batch_size"], row["side"]): row["over_gdjax"]["median"] for row in mine}

    updates, norms = ratios("updates"), ratios("norms")
    first = {side: ratio for (model, size, side), ratio in updates.items() if (model, size) == ("small", 1)}
    slower = [
        f"{side} ({model}, B = {size}: {1 / ratio:.2f})" for (model, size, side), ratio in updates.items() if ratio < 1
    ]
    large = [row for row in rows if row["side"] == "gdjax" and row["race"] == "updates" and row["model"] == "large"]
    used = {row["batch_size"]: row["fraction_of_product"] for row in large if row["batch_size"] > 1}
    checks = {
        "many times faster at B = 1": all(ratio >= AIMS[side] for side, ratio in first.items()),
        "nowhere slower": not slower,
        "norms": min(norms.values(), default=NORMS_AIM) >= NORMS_AIM,
        "60 % of a product's speed": min(used.values(), default=1.0) >= CEILING_AIM,
    }
    numbers = [
        "Small, B = 1: " + ", ".join(f"{ratio:.0f} times as fast as {side}" for side, ratio in first.items()),
        *(["slower than " + ", ".join(slower)] if slower else []),
        *(f"norms, {model}: {ratio:.1f} times as fast as torch.func" for (model, *_), ratio in norms.items()),
        *(f"large, B = {size}: {share:.0%} of a product's speed" for size, share in used.items()),
    ]
    return experiment.verdict(checks, "; ".join(numbers) + ".")


def figure(rows: list[dict], title: str):
    drawn, axes = report.panels(2, title=title, width=6.5, height=max(4.2, 0.26 * len(rows)))
    for axis, race, name in zip(axes, ("updates", "norms"), ("updates", "gradient norms of examples"), strict=True):
        mine = [row for row in rows if row["race"] == race and row["side"] != "gdjax"]
        spreads = {f"{row['model']}, B = {row['batch_size']}: {row['side']}": row["over_gdjax"] for row in mine}
        report.bars(axis, spreads, [report.COLOURS[[*AIMS, COMPILED].index(row["side"])] for row in mine])
        axis.axvline(1, color="black", linewidth=1)
        axis.set(xscale="log", xlabel="time over that of gdjax, with 95% intervals", title=name)
    return drawn


def leaves_of(params) -> Leaves:
    return [np.asarray(layer[name]) for layer in params for name in ("weight", "bias")]


if __name__ == "__main__":
    experiment.run(main)
