"""`python -m pylora info` and `python -m pylora check`."""

from __future__ import annotations

import argparse
import platform
import sys
from collections import defaultdict
from collections.abc import Collection, Sequence
from importlib import metadata
from itertools import groupby

import torch

import pylora
from pylora import dispatch, selfcheck
from pylora.backends import extension

_PEERS = ("torch", "triton", "numpy", "transformers", "peft", "bitsandbytes", "safetensors")


def info() -> int:
    """Prints versions, devices, compiled archs and the backends of each op; returns 0."""
    print(f"pylora {pylora.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in _PEERS:
        try:
            print(f"  {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"  {name}: not installed")
    module, reason = extension.load()
    if module is None:
        print(f"extension: {reason}")
    else:
        build = module.build_info()
        print(f"extension: {build['compiler']}, stable ABI of torch {build['torch_target']}")
        archs = ", ".join(build["cuda_archs"])
        print(f"  CUDA: {build['cuda_version'] + ': ' + archs if build['cuda'] else 'not built'}")
        print(f"  CPU: {', '.join(module.cpu_features())}")
        print(f"  CPU instruction sets: {', '.join(module.cpu_isas())}; in use: {module.cpu_isa()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA devices: {', '.join(devices) or 'none'}")
    print(f"threads: {torch.get_num_threads()}")
    print("backends, fastest first:")
    for backend in dispatch.candidates():
        reason = dispatch.unavailable(backend)
        print(f"  {backend.name}: {reason or backend.compiled_for()}")
    print("ops:")
    for op in dispatch.BACKENDS["reference"].ops:
        backends = [backend for backend in dispatch.candidates() if op in backend.ops]
        usable = [b.name for b in backends if dispatch.unavailable(b) is None]
        unusable = [b.name for b in backends if dispatch.unavailable(b) is not None]
        note = f" (and {', '.join(unusable)}, which will not run here)" if unusable else ""
        print(f"  {op}: {', '.join(usable)}{note}")
    return 0


def check(
    seed: int,
    only: str | None = None,
    ops: Sequence[str] = (),
    token_counts: Collection[int] | None = None,
) -> int:
    """Prints a table of every backend and op against the reference.

    Each wrong result is printed at once, and the rows of a backend when it is done, so that a check
    that is cut off has said what it found.

    seed            the seed of the random data
    only            the name of the only backend to check
    ops             the only ops to check; all if empty
    token_counts    check only the shapes with one of these numbers of tokens

    Returns 0 if everything is right by the numerics rule, and 1 if not or if the last three leave
    nothing to run.
    """

    def chosen(case: selfcheck.Case) -> bool:
        return not ops or case.op in ops

    columns = f"{'backend':8} {'compiled for':24} {'op':27} {'cases':>5} {'wrong':>5}"
    print(f"{columns}  error allowed and used", flush=True)
    total = failures = 0
    all_outcomes = selfcheck.run(seed, chosen, only, token_counts)
    for (backend, compiled_for), group in groupby(
        all_outcomes, lambda outcome: (outcome.backend, outcome.compiled_for)
    ):
        by_op: dict[str, list[selfcheck.Outcome]] = defaultdict(list)
        for outcome in group:
            by_op[outcome.case.op].append(outcome)
            if outcome.failure is not None:
                print(f"WRONG {backend} {compiled_for} {outcome.case.op}", end=" ")
                print(f"{outcome.case.description}\n      {outcome.failure}", flush=True)
        for op, outcomes in by_op.items():
            wrong = sum(outcome.failure is not None for outcome in outcomes)
            used = max((o.accuracy.used for o in outcomes if o.accuracy is not None), default=0.0)
            name = f"{backend:8} {compiled_for[:24]:24} {op:27}"
            print(f"{name} {len(outcomes):5} {wrong:5}  {used:.0%}", flush=True)
            total, failures = total + len(outcomes), failures + wrong
    for backend_ in dispatch.BACKENDS.values():
        if only in (None, backend_.name) and backend_.unavailable() is not None:
            print(f"not run: {backend_.name}: {backend_.unavailable()}")
    print(f"{total - failures} of {total} right by the numerics rule (seed {seed})")
    is_narrowed = only is not None or bool(ops) or token_counts is not None
    return 1 if failures or (is_narrowed and total == 0) else 0


def _token_counts(text: str) -> tuple[int, ...]:
    """The numbers of "--tokens 128,300".

    Raises ArgumentTypeError for a number that no shape of the check has.
    """
    known = sorted({str(tokens) for tokens, *_ in selfcheck.SHAPES}, key=int)
    for word in text.split(","):
        if word not in known:
            raise argparse.ArgumentTypeError(
                f"{word!r} is no number of tokens of the check; "
                f"it must be one of {', '.join(known)}"
            )
    return tuple(map(int, text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pylora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, compiled archs, backend of each op")
    check_parser = commands.add_parser("check", help="every kernel against the reference")
    check_parser.add_argument("--seed", type=int, default=0, help="seed of the random data")
    names = [name for name in dispatch.BACKENDS if name != "reference"]
    check_parser.add_argument("--backend", choices=names, help="check only this backend")
    ops = list(dispatch.BACKENDS["reference"].ops)
    check_parser.add_argument(
        "--op",
        choices=ops,
        action="append",
        default=[],
        help="check only this op (may be repeated)",
    )
    check_parser.add_argument(
        "--tokens",
        type=_token_counts,
        help="check only the shapes with these numbers of tokens, such as 128,300",
    )
    arguments = parser.parse_args()
    try:
        dispatch.forced_backend()
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if arguments.command == "info":
        return info()
    return check(arguments.seed, arguments.backend, arguments.op, arguments.tokens)


if __name__ == "__main__":
    sys.exit(main())
