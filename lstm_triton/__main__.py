"""python -m lstm_triton tune | explain | doctor"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from .commands import doctor, tune
from .explain import explain_call
from .kernels.config import PRECISIONS
from .planning.cudnn import Call
from .planning.device import KNOWN, gpu_here
from .planning.precision import resolve_precision
from .planning.problem import ELEMENT_SIZE
from .planning.route import BACKENDS, kernel_device


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m lstm_triton", description="An LSTM for PyTorch in Triton.")
    commands = main.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="print an environment report fit for a bug report")
    tune.add_arguments(commands.add_parser("tune", help="measure every admissible config and write a table"))
    _add_explain(commands.add_parser("explain", help="say which path a call takes, with which plan, and why"))
    return main


def _add_explain(command: argparse.ArgumentParser) -> None:
    def size(text: str) -> int:
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
        return int(text)

    command.add_argument("--input-size", type=size, required=True)
    command.add_argument("--hidden-size", type=size, required=True)
    command.add_argument("--num-layers", type=size, default=1)
    command.add_argument("--bidirectional", action="store_true")
    command.add_argument("--proj-size", type=int, default=0)
    command.add_argument("--batch", type=size, default=32)
    command.add_argument("--seq-len", type=size, default=100)
    command.add_argument("--dtype", choices=sorted(ELEMENT_SIZE), default="float32")
    command.add_argument(
        "--precision", choices=PRECISIONS, help="of float32 products (default: as torch.backends says)"
    )
    command.add_argument("--backend", choices=BACKENDS, default="auto")
    command.add_argument("--packed", action="store_true", help="the input is a PackedSequence")
    command.add_argument(
        "--gpu",
        choices=sorted(KNOWN),
        help="a GPU that need not be here: " + ", ".join(f"{arch} ({device.name})" for arch, device in KNOWN.items()),
    )


def explain(options: argparse.Namespace) -> str:
    device = KNOWN[options.gpu] if options.gpu else kernel_device(gpu_here() or torch.device("cpu"))
    call = Call(
        options.input_size,
        options.hidden_size,
        options.batch,
        options.num_layers,
        2 if options.bidirectional else 1,
        options.dtype,
        options.proj_size,
        options.packed,
    )
    precision = resolve_precision(options.precision or "")
    return str(explain_call(call, device, options.backend, precision, options.seq_len))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "doctor":
            print(doctor.report())
        elif options.command == "explain":
            print(explain(options))
        else:
            return tune.run(options)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"lstm_triton {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
