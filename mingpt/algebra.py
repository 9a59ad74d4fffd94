"""What all tasks share, on rows of integers or on text: they are values with names, and compose with ``+``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np

from mingpt.utils import nearest, parse_value


class AnyTask:
    """A function from what a family of tasks is posed on to the same: ``Task`` on rows, ``TextTask`` on text.

    Tasks are values: two of the same class and parameters are equal, hashable, and ``Task.parse(str(task)) == task``.
    The parameters are the arguments of the class's ``__init__``, each kept as an attribute of the same name.
    """

    _classes: ClassVar[dict[tuple[type[AnyTask], str], type[AnyTask]]] = {}  # by family and name, what parse knows
    _family: ClassVar[type[AnyTask]]  # the class of all tasks that this one composes with
    _composite: ClassVar[type[Any]]  # of the family: what ``+`` makes

    def __init_subclass__(cls) -> None:
        if AnyTask in cls.__bases__:
            cls._family = cls
        elif "_composite" in cls.__dict__:  # made with "+", not by name
            cls._family._composite = cls
        elif not cls.__name__.startswith("_"):
            key = cls._family, cls.__name__
            AnyTask._classes.pop(key, None)
            AnyTask._classes[key] = cls  # of several classes of one name, the newest

    @cached_property
    def tasks(self) -> tuple[Self, ...]:
        """The simple tasks that this one consists of, in order."""
        return (self,)

    def __add__(self, other: AnyTask) -> Any:
        """First this task, then the other: ``(f + g)(x) == g(f(x))``."""
        if not isinstance(other, AnyTask):
            return NotImplemented
        return _compose((*self.tasks, *other.tasks))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a task of this family from its name: ``"SortAscending"``, ``"AddN(3)"`` or ``"SortAscending+Add1"``.

        Raises:
            ValueError: for a name that is no task, with the known ones, arguments that are no literals or that the
                task does not take, or a composition that is not defined.
        """
        try:
            node: ast.expr = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError):
            node = ast.Name(text)
        parts = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts.append(node.right)
            node = node.left
        tasks = [cls._make(part, text) for part in [node, *reversed(parts)]]
        return tasks[0] if len(tasks) == 1 else _compose(tasks)

    @classmethod
    def _make(cls, node: ast.expr, text: str) -> Self:
        """The simple task that a part of the name ``text`` stands for: ``Add1`` or ``AddN(3)``."""
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name, classes = ast.unparse(call.func), cls.classes()
        if name not in classes:
            known = f"the tasks are {', '.join(classes)}"
            unknown = f"unknown task {name!r}{nearest(name, classes)} in {text!r}; {known}"
            raise ValueError(f"{unknown}; import the file that defines it (--import on the command line)")
        try:
            named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
            return classes[name](*map(ast.literal_eval, call.args), **named)
        except (TypeError, ValueError) as error:
            expected = f"{name}{inspect.signature(classes[name])} with literals such as 3 or 'x'"
            reason = str(error).split(" on line")[0]
            raise ValueError(f"{ast.unparse(call)!r} in {text!r} is no task; write {expected}: {reason}") from error

    @classmethod
    def classes(cls) -> dict[str, type[Self]]:
        """The simple tasks of this family by name."""
        return {name: each for (_, name), each in AnyTask._classes.items() if issubclass(each, cls)}

    def __str__(self) -> str:
        return self._name

    @cached_property
    def _name(self) -> str:
        return "+".join(repr(task).removesuffix("()") for task in self.tasks)

    def __repr__(self) -> str:
        """The call that makes this task.

        Raises:
            TypeError: if an argument is not kept as an attribute, or ``Task.parse`` could not read it back.
        """
        if self.tasks[0] is not self:
            return " + ".join(map(repr, self.tasks))
        name, arguments = type(self).__name__, []
        for argument, parameter in inspect.signature(type(self)).parameters.items():
            if not hasattr(self, argument):
                raise TypeError(f"{name}.__init__ takes {argument} and must keep it: self.{argument} = {argument}")
            value = getattr(self, argument)
            value = repr(value.item() if isinstance(value, np.generic) else value)
            if repr(parse_value(value)) != value:
                raise TypeError(f"{name} has {argument} = {value}; use numbers, text, or lists and tuples of them")
            arguments.append(f"{argument}={value}" if parameter.kind is parameter.KEYWORD_ONLY else value)
        return f"{name}({', '.join(arguments)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AnyTask):
            return False
        return str(self) == str(other) and [type(task) for task in self.tasks] == [type(task) for task in other.tasks]

    def __hash__(self) -> int:
        return hash(str(self))


def _compose(tasks: Sequence[AnyTask]) -> Any:
    """Tasks in a row, of one family."""
    for task in tasks:
        if task._family is not tasks[0]._family:
            families = f"one is a {tasks[0]._family.__name__}, the other a {task._family.__name__}"
            raise ValueError(f"{tasks[0]} and {task} do not compose: {families}")
    return tasks[0]._family._composite(*tasks)
