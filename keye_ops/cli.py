"""The ``keye-ops`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from keye_ops import bench_command, demo, generate_command, info, parity
from keye_ops._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors of input are one line on stderr and exit status 1.

    Only weights that do not fit their config.json take more: a line for every key.
    """
    parser = argparse.ArgumentParser(
        prog="keye-ops", description="Kernels for native-resolution vision-language models."
    )
    parser.add_argument("--version", action="version", version=f"keye-ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {"demo": demo, "info": info, "bench": bench_command, "parity": parity}
    for name, module in modules.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    generate_command.add_commands(commands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        # PyTorch adds advice and native stack frames below the line that tells what is wrong.
        message = str(error).split("\n")[0] if isinstance(error, RuntimeError) else str(error)
        print(f"keye-ops {arguments.command}: {message}", file=sys.stderr)
        return 1
