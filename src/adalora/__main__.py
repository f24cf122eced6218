"""`adalora` and `python -m adalora`. In a core install without the command line, one line says what to add."""

import sys


def main() -> None:
    """Entry point of the console script."""
    try:
        from .cli import run_app
    except ModuleNotFoundError as error:
        sys.stderr.write(f'adalora: the command line needs {error.name!r}: pip install "adalora[hf]"\n')
        sys.exit(2)
    sys.exit(run_app())


if __name__ == "__main__":
    main()
