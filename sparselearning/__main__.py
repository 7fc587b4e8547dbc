"""What is installed, and what can be run.

python -m sparselearning --version
"""

from collections.abc import Sequence

from sparselearning import __version__
from sparselearning.process import arguments
from sparselearning.process.script import run_script

COMMANDS = (
    "commands: python -m sparselearning.report (tables and pictures of runs), python -m sparselearning.analyze (what "
    "a run's tickets have in common), python -m sparselearning.export (files to deploy), python -m "
    "sparselearning.predict (classes of images)"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the version, or the list of commands."""
    parser = arguments.Parser("Sparse training with masks, cheap tickets, and their superposition.", epilog=COMMANDS)
    parser.prog = "python -m sparselearning"
    parser.add_argument("--version", action="version", version=f"sparselearning {__version__}")
    parser.parse_args(argv)
    parser.print_help()


if __name__ == "__main__":
    run_script(main)
