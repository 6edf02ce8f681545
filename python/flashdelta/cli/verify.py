"""`flashdelta verify`: random calls against the float64 oracle for a given time."""

from __future__ import annotations

import argparse
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import flashdelta
from flashdelta.cli import cases, contract, device, errors, options, terms, ui
from flashdelta.cli.cases import Case
from flashdelta.cli.oracle import widen

if TYPE_CHECKING:
    from rich.console import Console

_DESCRIPTION = """Runs random calls, biased towards edges (lengths 0, 1, 63, 64, 65, odd widths, grouped heads, packed sequences with
gaps, strided inputs, gates of 0 and -inf, beta of 0, 1 and 2, zero and repeated keys, forced segments), forward, backward and token by
token, and compares every output with the float64 oracle. On a GPU: forward and token by token, at the widths and dtypes that it takes,
each call twice for the same bits. A failure prints its seed; --replay SEED runs exactly that call."""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("verify", help="random shapes against the oracle for a given time", description=_DESCRIPTION)
    parser.add_argument("--seconds", type=options.positive, default=60.0, metavar="X", help="how long (default: 60)")
    parser.add_argument("--cases", type=options.integer(1), metavar="N", help="stop after N cases")
    options.add_seed(parser, None, "of the first case, the next ones count up (default: drawn anew, and printed)")
    parser.add_argument(
        "--replay", type=options.integer(0, 2**63 - 1), metavar="SEED", help="run the one case of SEED and show all its errors"
    )
    parser.add_argument("--max-failures", type=options.integer(1), default=5, metavar="N", help="stop after N failing cases (default: 5)")
    options.add_device(parser)
    parser.add_argument(
        "--instruction-set",
        choices=options.INSTRUCTION_SETS,
        help="CPU: run every case with this one (default: each case draws one that this machine runs)",
    )
    return parser


@dataclass
class Outcome:
    """What one case gave: errors per output, and what is wrong beyond them."""

    case: Case
    errors: list[contract.Error] = field(default_factory=list)
    by_terms: list[str] = field(default_factory=list)  # outputs held to the size of their terms
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults and all(error.ok for error in self.errors)


def _given(gradients: flashdelta.ChunkBackward) -> dict[str, Any]:
    return {name: x for name, x in gradients._asdict().items() if x is not None}


def _operate(case: Case, tensors: dict[str, Any], do: Any, dht: Any, execution: dict[str, Any]) -> dict[str, Any]:
    """All outputs of a case by name. `execution` holds the backend and how it is to run."""
    if case.operation == "recurrent":
        o, final_state = flashdelta.fused_recurrent_gated_delta_rule(**tensors, **case.flags, **execution, output_final_state=True)
        return {"o": o, "final_state": final_state}
    execution = {**execution, "checkpoint_chunks": case.checkpoint_chunks}
    saved = bool(case.notes.get("saved"))
    forward = flashdelta.chunk_gated_delta_rule_fwd(
        **tensors, **case.flags, **execution, output_h=case.backward or saved, output_g_cumsum=saved, output_A=saved
    )
    outputs = {"o": forward.o, "final_state": forward.final_state}
    if not case.backward:
        return outputs
    gradients = flashdelta.chunk_gated_delta_rule_bwd(
        **tensors, do=do, dht=dht, h=forward.h, g_cumsum=forward.g_cumsum, A=forward.A, **case.flags, **execution
    )
    return {**outputs, **_given(gradients)}


def _exact(case: Case) -> dict[str, np.ndarray]:
    """The oracle's outputs, from float64 copies of the rounded inputs."""
    tensors = {name: widen(x) for name, x in case.tensors.items()}
    do, dht = widen(case.do), widen(case.dht)
    execution = {"backend": "reference", "num_threads": 0}
    if case.operation == "recurrent":
        return _operate(case, tensors, do, dht, execution)
    o, final_state = flashdelta.chunk_gated_delta_rule(**tensors, **case.flags, **execution, output_final_state=True)
    outputs = {"o": o, "final_state": final_state}
    if not case.backward:
        return outputs
    gradients = flashdelta.chunk_gated_delta_rule_bwd(**tensors, do=do, dht=dht, **case.flags, **execution)
    return {**outputs, **_given(gradients)}


def _padding_faults(case: Case, got: dict[str, np.ndarray]) -> Iterator[str]:
    """Tokens of no sequence must have zero rows."""
    for name in ("o", "dq", "dk", "dv", "dg", "dbeta"):
        if name in got and np.any(np.asarray(got[name], np.float64)[:, ~case.covered] != 0.0):
            yield f"{name}: rows of tokens that belong to no sequence are not zero"


def run(case: Case, place: device.Cpu | device.Cuda, instruction_set: str) -> Outcome:
    """Runs `case` on `place` and holds every output to the contract."""
    outcome = Outcome(case)
    execution = {**case.execution, "backend": place.backend, "instruction_set": instruction_set}
    kept = {name: x.tobytes() for name, x in case.tensors.items() if x is not None}
    try:
        placed = {name: place.put(x) for name, x in case.tensors.items()}
        outputs = _operate(case, placed, place.put(case.do), place.put(case.dht), execution)
        again = _operate(case, placed, None, None, execution) if not case.backward else {}
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        outcome.faults.append(f"{type(error).__name__}: {error}")
        return outcome
    got = {name: place.get(x) for name, x in outputs.items()}
    outcome.faults.extend(
        f"{name}: other bits in a second run" for name, x in again.items() if place.get(x).tobytes() != got[name].tobytes()
    )
    inputs = {name: place.get(x) for name, x in placed.items()}
    if any(x.tobytes() != kept[name] for name, x in inputs.items() if x is not None):
        outcome.faults.append("an input was changed")
    exact = _exact(case)
    if set(got) != set(exact):
        outcome.faults.append(f"outputs are {sorted(got)}; the oracle gives {sorted(exact)}")
        return outcome
    outcome.faults.extend(_padding_faults(case, got))
    dtype = case.tensors["q"].dtype
    norms: terms.Norms | None = None
    for name in got:
        error = contract.error(name, got[name], exact[name], dtype)
        if not error.ok and not np.isnan(error.value):
            norms = terms.norms(case) if norms is None else norms
            error = contract.error(name, got[name], exact[name], dtype, norms.by_token[name], norms.by_chunk[name])
            outcome.by_terms.append(name)
        outcome.errors.append(error)
    return outcome


def _instruction_set(args: argparse.Namespace, case: Case, place: device.Cpu | device.Cuda) -> str:
    """The case's own draw among the sets of this machine: another machine replays it with --instruction-set."""
    if args.instruction_set is not None:
        return args.instruction_set
    usable = options.instruction_sets_here()
    if place.backend != "cpu" or not usable:
        return "best"
    return usable[int(np.random.default_rng([case.seed, 1]).integers(len(usable)))]


def _print_outcome(console: Console, outcome: Outcome, instruction_set: str) -> None:
    console.print(f"seed {outcome.case.seed}, instruction set {instruction_set}: {outcome.case.describe()}", soft_wrap=True)
    for fault in outcome.faults:
        console.print(f"  FAULT {fault}", soft_wrap=True)
    for error in outcome.errors:
        rule = ", against the size of its terms" if error.name in outcome.by_terms else ""
        console.print(f"  {error.name}: error {error.value:.2e}, bound {error.bound:.1e}{rule}: {'ok' if error.ok else 'OUTSIDE'}")


def _replay_command(args: argparse.Namespace, outcome: Outcome, instruction_set: str, place: device.Cpu | device.Cuda) -> str:
    extra = f" --instruction-set {instruction_set}" if place.backend == "cpu" else ""
    return f"flashdelta verify --device {place.backend} --replay {outcome.case.seed}{extra}"


@dataclass
class _Summary:
    """Counts, and the worst error of every (dtype, output)."""

    operations: Counter = field(default_factory=Counter)
    outputs: Counter = field(default_factory=Counter)
    by_terms: Counter = field(default_factory=Counter)
    worst: dict[tuple[str, str], tuple[contract.Error, int]] = field(default_factory=dict)
    failures: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.operations[outcome.case.operation] += 1
        dtype = cases.NAMES[outcome.case.tensors["q"].dtype]
        for error in outcome.errors:
            key = (dtype, error.name)
            self.outputs[key] += 1
            self.by_terms[key] += error.name in outcome.by_terms
            if key not in self.worst or not error.used <= self.worst[key][0].used:
                self.worst[key] = (error, outcome.case.seed)
        if not outcome.ok:
            self.failures.append(outcome)

    def print(self, console: Console) -> None:
        table = ui.table("worst error per output", "dtype", "output", "seed", "checked", "by terms", "error", "bound", "share", numbers=6)
        for (dtype, name), (error, seed) in sorted(self.worst.items()):
            counts = (str(self.outputs[dtype, name]), str(self.by_terms[dtype, name]))
            table.add_row(dtype, name, str(seed), *counts, f"{error.value:.2e}", f"{error.bound:.1e}", f"{100 * error.used:.0f} %")
        console.print(table)
        counts = ", ".join(f"{n} {operation}" for operation, n in sorted(self.operations.items()))
        console.print(f"{self.operations.total()} cases ({counts}), {sum(self.outputs.values())} outputs, {len(self.failures)} failing")


def _replay(args: argparse.Namespace, place: device.Cpu | device.Cuda, console: Console) -> int:
    case = cases.make(args.replay, place.backend)
    instruction_set = _instruction_set(args, case, place)
    outcome = run(case, place, instruction_set)
    _print_outcome(console, outcome, instruction_set)
    return errors.OK if outcome.ok else errors.FAILED


def main(args: argparse.Namespace) -> int:
    options.check_instruction_set(args.instruction_set or "best")
    place = device.select(args.device)
    console = ui.stdout()
    if args.replay is not None:
        return _replay(args, place, console)
    first = secrets.randbits(32) if args.seed is None else args.seed
    console.print(f"device {place.backend}, cases from seed {first}, for {ui.seconds(args.seconds)}")
    summary = _Summary()
    start = time.monotonic()
    with ui.progress("cases, seconds", args.seconds) as advance:
        shown = 0.0
        for seed in range(first, first + (args.cases or 1 << 60)):
            case = cases.make(seed, place.backend)
            instruction_set = _instruction_set(args, case, place)
            outcome = run(case, place, instruction_set)
            summary.add(outcome)
            if not outcome.ok:
                _print_outcome(console, outcome, instruction_set)
                console.print(f"  again: {_replay_command(args, outcome, instruction_set, place)}")
            spent = time.monotonic() - start
            advance(spent - shown)
            shown = spent
            if spent >= args.seconds or len(summary.failures) >= args.max_failures:
                break
    summary.print(console)
    return errors.FAILED if summary.failures else errors.OK
