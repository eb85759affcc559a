"""The command line: `lowrank-geo pretrain`, `plan`, `inspect`, `generate`, `finetune`, `analyze`."""

import sys


def main() -> None:
    """Run the command in sys.argv; exits 2 after one sentence if it cannot be done."""
    try:
        from lowrank_geo.cli.app import app
    except ModuleNotFoundError as error:
        print(
            f"error: lowrank-geo needs the package {error.name}, got none; "
            "pip install 'lowrank-geo[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="lowrank-geo")
