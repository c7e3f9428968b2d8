"""Runs a notebook's cells as Jupyter does: in one namespace, below an event loop that runs."""

import ast
import asyncio
import json


def run_cells(path):
    """The value that each code cell ends with, by the cell's id; None for one without any."""

    async def run():
        # Jupyter's kernel calls cells from within its event loop, where asyncio.run is an error.
        return {cell_id: run_cell(source, names) for cell_id, source in code_cells(path).items()}

    names = {"__name__": "__main__"}
    return asyncio.run(run())


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


def run_cell(source, names):
    """Run a cell; return the value of its last line, where that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return (
        None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    )
