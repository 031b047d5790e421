"""Evaluate: `python evaluate.py run=outputs/RUN`; `--help` lists the choices."""

import sys

from d1lit.app.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:]))
