"""Programs compiled for a device that need not be there, and what can be read from them.

>>> text = '''
... %body (x: (s32[], f32[2])) -> (s32[], f32[2]) {
...   %y = f32[2] fusion(%x), kind=kLoop, calls=%f
...   ROOT %t = (s32[], f32[2]) tuple(%i, %y)
... }
... ENTRY %main (x: f32[2]) -> f32[2] {
...   %z = f32[2] copy(%x)
...   %w = (s32[], f32[2]) while(%z), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
... }
... '''
>>> counted(text, KERNELS)
Counted(number=5, outside=1, loops=1)
"""

import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdjax import kernels
from gdjax.bench import _targets as targets
from gdjax.bench._targets import Device, Target

KERNELS = frozenset(
    """
    all-gather all-gather-start all-reduce all-reduce-start all-to-all cholesky collective-permute
    collective-permute-start concatenate convolution copy copy-start custom-call dot dynamic-slice dynamic-update-slice
    fft fusion gather pad ragged-all-to-all reduce reduce-scatter reduce-window rng-bit-generator scatter
    select-and-scatter sort transpose triangular-solve
    """.split()  # noqa: SIM905
)
"""Operations of a compiled program that are started one by one: kernels, copies and calls of a library."""
COLLECTIVES = frozenset(
    """
    all-gather all-gather-start all-reduce all-reduce-start all-to-all collective-permute collective-permute-start
    ragged-all-to-all reduce-scatter
    """.split()  # noqa: SIM905
)
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
NO_WORK = re.compile(r'custom_call_target="(?:AllocateBuffer|Sharding|ConsumeBuffer|AssumeGatherIndicesInBound)"')
THUNK = re.compile(r"^( *)\d+: (k\w+)", re.MULTILINE)


class Compiled(NamedTuple):
    """What a compiler made of a program for a device.

    Attributes:
        text: the compiled program, as HLO.
        kernels: started by the loop that starts most, or by all of it where it has none. Conditions of loops are not
            counted.
        collectives: among them, what devices send to one another.
        loops: that are not inside another.
        host_loops: loops that the host starts again for every iteration even if `kernels.LOOPS_IN_GRAPHS` lets the
            device do it; None where that cannot be read, 0 on a TPU.
        argument_bytes, result_bytes, temporary_bytes: memory of one device. What is donated is among the arguments.
        total_bytes: all that must be there at once.
        flops, bytes_accessed: by the compiler's count of one pass through every loop, None where it makes none.
        has_float64: whether anything is computed in float64.
        compile_seconds: tracing, lowering and compilation.
    """

    text: str
    kernels: int | None
    collectives: int | None
    loops: int
    host_loops: int | None
    argument_bytes: int
    result_bytes: int
    temporary_bytes: int
    total_bytes: int
    flops: float | None
    bytes_accessed: float | None
    has_float64: bool
    compile_seconds: float


class Counted(NamedTuple):
    """How many operations of some kinds a program starts.

    Attributes:
        number: in all iterations of the loop that starts most; None where it is unknown how often one runs.
        outside: of loops.
        loops: that are not inside another.
    """

    number: int | None
    outside: int
    loops: int


def program_for(
    target: str | Target,
    function: Callable[..., Any],
    *args: Any,
    devices: Sequence[Device] | None = None,
    donate: tuple[int, ...] = (),
) -> Compiled:
    """Compile a function for a device that need not be there, and read what came out.

    Args:
        target: a name of KNOWN, a file, or what `find` returned.
        function: of pytrees of arrays, jittable.
        args: arrays, or `jax.ShapeDtypeStruct`s; only shapes and dtypes are looked at.
        devices: from `targets.devices`; the arguments lie on all of them. Default: one.
        donate: positions of arguments that the results may overwrite.

    Raises:
        ValueError: as `find` and `targets.devices`; what compilation raises it raises.
        ModuleNotFoundError: where the compiler is not installed.
    """
    target = target if isinstance(target, Target) else targets.find(target)
    devices = devices or targets.devices(target)
    mesh = jax.make_mesh((len(devices),), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    everywhere = jax.NamedSharding(mesh, jax.P()) if len(devices) > 1 else jax.sharding.SingleDeviceSharding(devices[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=everywhere), args)
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*shapes)
    program, host_loops = (lowered.compile(), 0) if target.platform == "tpu" else _for_cuda(lowered)
    seconds = time.perf_counter() - start
    text, cost = program.as_text() or "", program.cost_analysis() or {}
    memory: Any = program.memory_analysis()
    started, sent = counted(text, KERNELS), counted(text, COLLECTIVES)
    return Compiled(
        text=text,
        kernels=started.number if started.loops else started.outside,
        collectives=sent.number if started.loops else sent.outside,
        loops=started.loops,
        host_loops=host_loops,
        argument_bytes=memory.argument_size_in_bytes,
        result_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        has_float64="f64[" in text,
        compile_seconds=seconds,
    )


def _for_cuda(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, int | None]:
    """Return the program and its host loops, which are seen in a dump alone.

    Without a device nothing is tried out, and the form that XLA then gives a small product may be none: such a program
    is compiled with the products of a library.
    """
    options: dict[str, Any] = {**kernels.LOOPS_IN_GRAPHS, "xla_dump_hlo_pass_re": "^$"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = lowered.compile(compiler_options=options | {"xla_dump_to": folder + "/first"})
            return program, _host_loops(Path(folder, "first"))
        except jax.errors.JaxRuntimeError as error:
            if "output tile sizes" not in str(error):
                raise
        options |= {"xla_dump_to": folder + "/second", "xla_gpu_enable_triton_gemm": False}
        return lowered.compile(compiler_options=options), _host_loops(Path(folder, "second"))


def counted(text: str, kinds: frozenset[str]) -> Counted:
    """Count the operations of some kinds that a compiled program starts, loops in loops multiplied."""
    computations, entry = _computations(text)

    def within(name: str) -> int | None:
        return _added(started(kind, rest) for kind, rest in computations.get(name, []))

    def started(kind: str, rest: str) -> int | None:
        if kind == "while":
            inside, trips = within(_named("body", rest)), _trips(rest, computations)
            return None if inside is None or trips is None else trips * inside
        if kind == "conditional":
            return max((within(branch) or 0 for branch in _branches(rest)), default=0)
        return within(_named("to_apply", rest)) if kind == "call" else int(kind in kinds)

    loops = [started(kind, rest) for kind, rest in computations.get(entry, []) if kind == "while"]
    outside = sum(kind in kinds for kind, _ in computations.get(entry, []))
    known = [number for number in loops if number is not None]
    return Counted(max(known, default=0) if len(known) == len(loops) else None, outside, len(loops))


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Return {name: [(operation, the rest of its line)]} of a program as HLO, and the name of its entry."""
    computations: dict[str, list[tuple[str, str]]] = {}
    inside, name, entry = False, "", ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            inside, name = True, head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            inside = False
        elif inside and (found := INSTRUCTION.match(line)) and not NO_WORK.search(line):
            computations[name].append((found[1], found[2]))
    return computations, entry


def _trips(rest: str, computations: Mapping[str, list[tuple[str, str]]]) -> int | None:
    """Return how often a loop runs: as XLA says, or the limit that it counts to from 0, as those of jax do."""
    if said := re.search(r'known_trip_count"?:\{"n":"(\d+)"', rest):
        return int(said[1])
    condition = computations.get(_named("condition", rest), [])
    limits = [found[1] for kind, at in condition if kind == "constant" and (found := re.match(r"(\d+)\)", at))]
    counts = any(kind == "compare" and "direction=LT" in at for kind, at in condition)
    return int(limits[0]) if counts and len(limits) == 1 else None


def _added(numbers) -> int | None:
    numbers = list(numbers)
    return None if None in numbers else sum(numbers)


def _named(attribute: str, rest: str) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", rest)
    return found[1] if found else ""


def _branches(rest: str) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return [name.strip().removeprefix("%") for name in listed[1].split(",")]
    return [_named("true_computation", rest), _named("false_computation", rest)]


def _host_loops(folder: Path) -> int | None:
    """Return how many loops of a GPU's program are in no command buffer; thunks are indented by what they are in."""
    dumps = list(folder.glob("*thunk_sequence_after_thunk_passes.txt"))
    if len(dumps) != 1:
        return None
    around: list[tuple[int, str]] = []
    number = 0
    for spaces, kind in THUNK.findall(dumps[0].read_text()):
        while around and around[-1][0] >= len(spaces):
            around.pop()
        number += kind == "kWhile" and all(outer != "kCommandBuffer" for _, outer in around)
        around.append((len(spaces), kind))
    return number
