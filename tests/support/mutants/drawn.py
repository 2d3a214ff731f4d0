"""Faults drawn from the syntax trees of the modules.

What counts as a place for a fault: expressions that compute.  Docstrings, annotations, imports, decorators, type
aliases and the texts of errors are left alone; the condition that guards a ``raise`` is not.
"""

import ast
import copy
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from tests.support.mutants.mutant import Mutant

BINARY: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div, ast.Mult),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitXor: (ast.BitOr,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
COMPARISON: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
PAIRED_NAMES = (
    ("minimum", "maximum"),
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("any", "all"),
    ("floor", "ceil"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("sum", "mean"),
    ("sin", "cos"),
    ("tril", "triu"),
    ("std", "var"),
    ("logical_and", "logical_or"),
)
RENAMED = {
    **dict(PAIRED_NAMES),
    **{b: a for a, b in PAIRED_NAMES},
    "expm1": "exp",
    "log1p": "log",
    "logsumexp": "amax",
    "cumsum": "cumprod",
}
DROPPED_METHODS = {"clamp", "abs", "neg", "sqrt", "square", "floor", "exp", "log", "log1p", "expm1", "flip"}
TYPE_CHECKS = {"isinstance", "issubclass", "cast"}

AnyNode = TypeVar("AnyNode", bound=ast.AST)
Fault = tuple[ast.expr | ast.stmt, str, str]
"""Whose span is replaced, by what text, the kind of fault."""
Edit = tuple[int, int, str, str]
"""Start and end of a span of the encoded source, the new text, the kind of fault."""


def draw(sources: Mapping[str, str], num_drawn: int, seed: int, taken: Iterable[str] = ()) -> list[Mutant]:
    """Draw distinct mutants, spread over the modules in proportion to their sites.

    Deterministic given the sources and the seed.  ``taken`` are mutated sources that shall not be drawn again.
    Fewer than ``num_drawn`` come back only if there are no more.
    """
    sites = {module: sites_of(source) for module, source in sources.items()}
    seen = {_shape(source) for source in [*sources.values(), *taken]}
    drawn = []
    for module, quota in _quotas({module: len(found) for module, found in sites.items()}, num_drawn).items():
        candidates = _in_drawn_order(module, sources[module], sites[module], seed)
        while quota and (mutant := next(candidates, None)):
            shape = _shape(mutant.mutated)
            if shape is not None and shape not in seen:
                seen.add(shape)
                drawn.append(mutant)
                quota -= 1
    return drawn


def sites_of(source: str) -> list[list[Edit]]:
    """Every place for a fault, in the order of the file, each with its alternatives."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in _nodes(ast.parse(source)):
        edits = []
        for place, new, kind in _faults(node):
            assert place.end_lineno is not None
            assert place.end_col_offset is not None
            start = starts[place.lineno - 1] + place.col_offset
            edits.append((start, starts[place.end_lineno - 1] + place.end_col_offset, new, kind))
        if edits:
            found.append(edits)
    return found


def _in_drawn_order(module: str, source: str, sites: list[list[Edit]], seed: int) -> Iterator[Mutant]:
    """First one alternative of every site, then the others.

    The order is that of hashes of the text, not of a shuffle, so that an edit elsewhere in the file moves nothing.
    """

    def rank(*address: str) -> bytes:
        return hashlib.sha256(repr((seed, module, *address)).encode()).digest()

    first, others = [], []
    for edits in sites:
        mutants = [Mutant(module, source, start, end, new, kind) for start, end, new, kind in edits]
        mutants.sort(key=lambda mutant: rank(mutant.name, mutant.before, mutant.after))
        first.append(mutants[0])
        others.extend(mutants[1:])
    yield from sorted(first, key=lambda mutant: rank("site", mutant.before, mutant.old))
    yield from sorted(others, key=lambda mutant: rank(mutant.name, mutant.before, mutant.after))


def _quotas(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Share ``total`` in proportion to the sizes, whole numbers by the largest remainder."""
    whole = sum(sizes.values())
    exact = {module: total * size / whole for module, size in sizes.items()}
    quotas = {module: math.floor(share) for module, share in exact.items()}
    by_remainder = sorted(exact, key=lambda module: quotas[module] - exact[module])
    for module in by_remainder[: total - sum(quotas.values())]:
        quotas[module] += 1
    return quotas


def _shape(source: str) -> str | None:
    """What two sources share that differ in blanks and brackets alone; None if the source does not parse."""
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:
        return None


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in _children(node):
        yield from _nodes(child)


def _children(node: ast.AST) -> Iterable[ast.AST]:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Raise() | ast.JoinedStr():
            return []
        case ast.FunctionDef(args=args, body=body):
            return [*args.defaults, *(d for d in args.kw_defaults if d is not None), *body]
        case ast.ClassDef(body=body):
            return body
        case ast.AnnAssign(value=value):
            return [value] if value is not None else []
        case ast.Assert(test=test):
            return [test]
        case ast.Module(body=body):
            return [statement for statement in body if not _is_type_alias(statement)]
        case ast.Call(func=ast.Name(id=name), args=[checked, *_]) if name in TYPE_CHECKS:
            return [checked]
        case ast.keyword(arg="dim"):
            return []
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return []
        case _:
            return ast.iter_child_nodes(node)


def _is_type_alias(statement: ast.stmt) -> bool:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name.lstrip("_")[:1].isupper() and not name.isupper()
    return False


def _faults(node: ast.AST) -> Iterator[Fault]:
    """Alternatives at this node: whose span is replaced, by what text, the kind of fault."""
    match node:
        case ast.BinOp() if not any(
            isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right)
        ):
            yield from _binary(node)
        case ast.AugAssign(op=op):
            for other in BINARY.get(type(op), ()):
                yield node, ast.unparse(_with(node, op=other())), "operator changed"
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                for other in COMPARISON[type(op)]:
                    changed = _with(node, ops=[*ops[:place], other(), *ops[place + 1 :]])
                    yield node, _text(changed), "comparison changed"
        case ast.BoolOp(op=op, values=values):
            yield node, _text(_with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())), "and/or changed"
            for place in range(len(values)):
                rest = values[:place] + values[place + 1 :]
                yield node, _text(rest[0] if len(rest) == 1 else _with(node, values=rest)), "condition dropped"
        case ast.UnaryOp(op=op, operand=operand):
            kind = "sign dropped" if isinstance(op, ast.USub) else "negation dropped"
            yield node, _text(operand), kind
        case ast.Constant(value=bool() | int() | float() as value):
            yield from ((node, new, "constant changed") for new in _other_constants(value))
        case ast.Slice():
            yield from ((node, new, "slice shifted") for new in _other_slices(node))
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp | ast.BoolOp):
            yield test, f"(not {_text(test)})", "condition negated"
        case ast.Call():
            yield from _calls(node)
        case ast.keyword(arg="dim", value=value):
            yield value, "1" if ast.unparse(value) == "0" else "0", "dim changed"


def _binary(node: ast.BinOp) -> Iterator[Fault]:
    for other in BINARY.get(type(node.op), ()):
        yield node, _text(_with(node, op=other())), "operator changed"
    if isinstance(node.op, ast.Mult | ast.Div):
        yield node, f"(-{_text(node)})", "sign added"
    is_product = isinstance(node.op, ast.Mult | ast.Div | ast.FloorDiv | ast.MatMult)
    kind = "exponent dropped" if isinstance(node.op, ast.Pow) else "factor dropped" if is_product else "term dropped"
    yield node, _text(node.left), kind
    if isinstance(node.op, ast.Mult | ast.Add | ast.BitAnd | ast.BitOr | ast.BitXor):
        yield node, _text(node.right), kind


def _calls(node: ast.Call) -> Iterator[Fault]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name == "where" and len(node.args) == 3:
        condition, a, b = node.args
        yield node, ast.unparse(_with(node, args=[condition, b, a])), "branches swapped"
    if name in RENAMED:
        func = copy.copy(node.func)
        setattr(func, "attr" if isinstance(func, ast.Attribute) else "id", RENAMED[name])
        yield node, ast.unparse(_with(node, func=func)), "function changed"
    if name in DROPPED_METHODS and isinstance(node.func, ast.Attribute) and not _is_module(node.func.value):
        yield node, _text(node.func.value), "call dropped"
    if name == "clamp":
        flipped = [_with(k, arg={"min": "max", "max": "min"}.get(k.arg or "", k.arg)) for k in node.keywords]
        if flipped:
            yield node, ast.unparse(_with(node, keywords=flipped)), "bound flipped"
    if name == "range":
        stop = min(1, len(node.args) - 1)
        shorter = ast.BinOp(node.args[stop], ast.Sub(), ast.Constant(1))
        yield (
            node,
            ast.unparse(_with(node, args=[*node.args[:stop], shorter, *node.args[stop + 1 :]])),
            "range shortened",
        )


def _other_constants(value: bool | int | float) -> list[str]:
    if isinstance(value, bool):
        return [repr(not value)]
    if isinstance(value, float):
        return [repr(value * 1.01), repr(value * 2)] if value else ["1.0"]
    return {0: ["1"], 1: ["0", "2"]}.get(value, [str(value + 1), str(value - 1)])


def _other_slices(node: ast.Slice) -> Iterator[str]:
    lower, upper = node.lower, node.upper
    if lower is None and upper is None:
        return  # a whole axis: shortening it breaks shapes, which any test sees
    step = f":{ast.unparse(node.step)}" if node.step else ""
    low, high = (ast.unparse(end) if end else "" for end in (lower, upper))
    yield f"{low} + 1:{high}{step}" if low else f"1:{high}{step}"
    yield f"{low}:{high} - 1{step}" if high else f"{low}:-1{step}"


def _with(node: AnyNode, **changed: object) -> AnyNode:
    fields = {name: getattr(node, name) for name in node._fields}
    return type(node)(**(fields | changed))


def _text(node: ast.expr) -> str:
    """The node as text that can stand wherever an expression can."""
    text = ast.unparse(node)
    return text if isinstance(node, ast.Constant | ast.Name | ast.Call | ast.Attribute | ast.Subscript) else f"({text})"


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"torch", "math", "F", "np"}
