"""`flashdelta run`: tensors from a .safetensors file in, results out."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path

import numpy as np

import flashdelta
from flashdelta.cli import device, errors, options, plots, ui
from flashdelta.cli.errors import UsageError

_REQUIRED = ("q", "k", "v")
_OPTIONAL = ("g", "beta", "initial_state", "cu_seqlens", "A_log", "dt_bias")
_FLAGS = {
    "use_qk_l2norm_in_kernel": "normalise q and k per token and head",
    "use_gate_in_kernel": "g is raw: log gate = -exp(A_log) * softplus(g + dt_bias)",
    "use_beta_sigmoid_in_kernel": "beta is a logit",
    "allow_neg_eigval": "beta <- 2 * sigmoid(beta); needs --use-beta-sigmoid-in-kernel",
    "state_v_first": "states are [N, HV, V, K] instead of [N, HV, K, V]",
}

_DESCRIPTION = """Runs the forward pass on tensors of a .safetensors file, taken by name: q, k [B, T, H, K], v [B, T, HV, V] and, where
present, g, beta [B, T, HV], initial_state [N, HV, K, V], cu_seqlens [N + 1], A_log, dt_bias [HV]. Any other name in the file is an error.
Writes o and final_state. The output appears complete or not at all."""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser("run", help="tensors from a .safetensors file in, results out", description=_DESCRIPTION)
    parser.add_argument("input", metavar="IN.safetensors", help="q, k, v and the optional tensors")
    parser.add_argument("--out", required=True, metavar="OUT.safetensors", help="where o and final_state go; replaced if it exists")
    parser.add_argument("--operation", choices=("chunk", "recurrent"), default="chunk", help="chunked prefill (default) or token by token")
    parser.add_argument("--backend", choices=("auto", "cpu", "cuda", "reference"), default="auto", help="reference is the float64 oracle")
    options.add_device(parser)
    parser.add_argument("--scale", type=float, metavar="X", help="factor on q (default: K^-0.5)")
    for flag, text in _FLAGS.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=text)
    parser.add_argument(
        "--context-parallel", choices=("auto", "exact", "off"), default="auto", help="how long sequences are split (default: auto)"
    )
    options.add_cpu(parser)
    return parser


def _read(path: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            names = sorted(file.keys())
            unknown = [name for name in names if name not in _REQUIRED + _OPTIONAL]
            if unknown:
                raise UsageError(f"{path}: unknown tensor {', '.join(unknown)}; it may hold {', '.join(_REQUIRED + _OPTIONAL)}")
            missing = [name for name in _REQUIRED if name not in names]
            if missing:
                raise UsageError(f"{path}: tensor {', '.join(missing)} is missing")
            return {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except (SafetensorError, TypeError, AttributeError) as error:  # the latter two: a dtype that NumPy does not have
        raise UsageError(f"{path}: not a .safetensors file that can be read ({error})") from error


def _write(path: str, tensors: dict[str, np.ndarray]) -> None:
    """Writes beside the destination, then renames: a reader never sees half a file."""
    from safetensors.numpy import save_file

    target = Path(path).resolve()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's file is private; the result is an ordinary file
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _place(args: argparse.Namespace, tensors: dict[str, np.ndarray]) -> device.Cpu | device.Cuda:
    """Where the backend computes; `auto` leaves what the cuda backend does not take to the CPU."""
    needed = {"cuda": "cuda", "cpu": "cpu", "reference": "cpu"}.get(args.backend, args.device)
    if args.device not in ("auto", needed):
        raise UsageError(f"--device {args.device}: --backend {args.backend} computes on {needed}")
    q, v = tensors["q"], tensors["v"]
    taken = q.ndim == v.ndim == 4  # otherwise the library refuses them on any device
    return device.select(needed, device.cuda_refusal(q.dtype, q.shape[-1], v.shape[-1]) if taken else "")


def main(args: argparse.Namespace) -> int:
    plots.check_directory(args.out, "--out")
    if Path(args.out).is_dir():
        raise UsageError(f"--out: {args.out} is a directory")
    if args.scale is not None and not math.isfinite(args.scale):
        raise UsageError(f"--scale: {args.scale} is not finite")
    options.check_instruction_set(args.instruction_set)
    tensors = _read(args.input)
    place = _place(args, tensors)
    call = flashdelta.chunk_gated_delta_rule if args.operation == "chunk" else flashdelta.fused_recurrent_gated_delta_rule
    with errors.library_errors():
        o, final_state = call(
            **{name: place.put(tensors.get(name)) for name in _REQUIRED + _OPTIONAL},
            scale=args.scale,
            output_final_state=True,
            **{flag: getattr(args, flag) for flag in _FLAGS},
            context_parallel=args.context_parallel,
            backend=args.backend,
            num_threads=args.threads,
            instruction_set=args.instruction_set,
        )
    results = {"o": np.ascontiguousarray(place.get(o)), "final_state": np.ascontiguousarray(place.get(final_state))}
    try:
        _write(args.out, results)
    except OSError as error:
        raise UsageError(f"--out: cannot write {args.out}: {error.strerror or error}") from error
    table = ui.table(args.out, "tensor", "dtype", "shape")
    for name, x in results.items():
        table.add_row(name, x.dtype.name, str(list(x.shape)))
    ui.stdout().print(table)
    return errors.OK
