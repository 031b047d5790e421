"""Tasks: rows, prompts, and the text a tiny model learns its trade from."""

from d1lit.tasks.code import CodeSource
from d1lit.tasks.countdown import CountdownSource
from d1lit.tasks.demonstrations import read_demonstrations
from d1lit.tasks.gsm8k import Gsm8kSource
from d1lit.tasks.math500 import Math500Source
from d1lit.tasks.mixture import AnyTask, MixedTask
from d1lit.tasks.prompting import (
    Template,
    builtin_templates,
    encode_prompts,
    graded_text,
    load_template,
    parse_template,
    prompt_protocol,
    render,
)
from d1lit.tasks.reading import Row, read_rows
from d1lit.tasks.source import METHOD_CHARACTER, Source, Split
from d1lit.tasks.sudoku import SudokuSource
from d1lit.tasks.task import Overlap, Task

__all__ = [
    "METHOD_CHARACTER",
    "AnyTask",
    "CodeSource",
    "CountdownSource",
    "Gsm8kSource",
    "Math500Source",
    "MixedTask",
    "Overlap",
    "Row",
    "Source",
    "Split",
    "SudokuSource",
    "Task",
    "Template",
    "builtin_templates",
    "encode_prompts",
    "graded_text",
    "load_template",
    "parse_template",
    "prompt_protocol",
    "read_demonstrations",
    "read_rows",
    "render",
]
