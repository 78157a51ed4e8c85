"""Parts: what a card says, how cards are found without importing anything, how a part is made.

A part is one file. Its card is a literal, so :func:`find` reads the text of the card alone:
no part is imported to be listed, a missing optional package hides nothing, and a file that
cannot be read is listed as :class:`Broken` instead of vanishing.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convince.errors import Mistake, nearest

KINDS = (
    "backbone",
    "layer",
    "loss",
    "optimizer",
    "augmentation",
    "technique",
    "explainer",
    "attack",
    "certifier",
    "compressor",
    "probe",
    "predictor",
    "recipe",
    "study",
    "search",
)
PACKAGE = Path(__file__).resolve().parent
NOT_ROOMS = {"cli", "data", "fit", "report", "claims", "evidence", "checks", "comparison", "models", "__pycache__"}


@dataclass(frozen=True)
class Card:
    """What a part says about itself. Only literals, arithmetic on numbers and ``inf`` are allowed.

    ``strength`` names the argument that switches the part off and ``off`` the value that does;
    ``claims`` are the slots it owns, ``mutes`` the slots or kinds it silences, ``expects`` what
    the run must have (``images``, ``labels``, ``logits``, and ``network``: the one of --model answers); ``tiny`` are arguments for tests
    (a fit of at most 0.15 s on one core); ``idle`` are parameters that rightly get no gradient.

    Of networks: ``variants`` are named sizes and their options; ``small`` those for pictures of 28 to 64 pixels. ``published``
    says of a size ``{"size": pixels, "classes": k, "parameters": n, "macs": n}`` as the paper or its released code has it, and
    ``"why"`` where ours differs by more than 1 %. ``optimizer`` trains the network where a person names none. A card with ``of``
    is data alone: further sizes of another part's network.

    Of layers: ``host`` is a network that the checks put it into (None: a small ResNet); ``swaps`` are the types whose
    parameters it replaces; ``unchanged`` says that a network computes what it did when the layer is put in.
    """

    part: str
    kind: str
    title: str
    paper: str | None = None
    year: int | None = None
    url: str | None = None
    departs: tuple[str, ...] = ()
    strength: str | None = None
    off: Any = None
    tiny: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    claims: tuple[str, ...] = ()
    mutes: tuple[str, ...] = ()
    expects: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("classify",)
    when: str = "during"
    gradient: str = "exact"
    idle: tuple[str, ...] = ()
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    small: tuple[str, ...] = ()
    published: dict[str, dict[str, Any]] = field(default_factory=dict)
    optimizer: str | None = None
    of: str | None = None
    host: str | None = None
    swaps: tuple[str, ...] = ()
    unchanged: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Mistake(f"kind={self.kind!r} is not a kind{nearest(self.kind, KINDS)} Kinds: {', '.join(KINDS)}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.part):
            raise Mistake(f"part={self.part!r}: a part's name is lower-case letters, digits and hyphens")
        for name in ("departs", "needs", "claims", "mutes", "expects", "accepts", "tasks", "idle", "small", "swaps"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(word, str) for word in value):
                raise Mistake(f"{name}={value!r}: must be a tuple of strings; a single one is written ('...',)")
        if self.when not in ("during", "after"):
            raise Mistake(f"when={self.when!r}: must be 'during' or 'after' training")
        if self.gradient not in ("exact", "surrogate"):
            raise Mistake(f"gradient={self.gradient!r}: must be 'exact' or 'surrogate'")
        if self.strength is None and self.off is not None:
            raise Mistake("off is given without strength: name the argument that switches the part off")
        names = {self.part, *self.variants}
        for name in (*self.small, *self.published):
            if name not in names:
                raise Mistake(f"{name!r} is no size of this part{nearest(name, sorted(names))} Sizes: {', '.join(sorted(names))}")
        for name, row in self.published.items():
            extra = row.keys() - {"size", "classes", "parameters", "macs", "why"}
            if extra or not {"size", "classes"} <= row.keys() or not row.keys() & {"parameters", "macs"}:
                raise Mistake(f"published[{name!r}]={row!r}: needs size, classes, and parameters or macs; may have why; nothing else")
        if self.of is not None and (self.kind != "backbone" or not self.variants):
            raise Mistake(f"of={self.of!r}: only a backbone's card can stand for sizes of another, and it names at least one in variants")


@dataclass(frozen=True)
class Part:
    """A card and the file it stands in. Importing the file waits until :meth:`load`."""

    card: Card
    path: Path
    line: int

    @property
    def name(self) -> str:
        return self.card.part

    @property
    def room(self) -> str:
        """The folder, with hyphens: ``data-quality``; ``own`` outside the package."""
        if not self.path.is_relative_to(PACKAGE):
            return "own"
        return "/".join(self.path.relative_to(PACKAGE).parts[:-1]).replace("_", "-")

    @property
    def own(self) -> bool:
        """True for a person's own file, which a run copies with its hash."""
        return not self.path.is_relative_to(PACKAGE)

    def module(self) -> Any:
        """The imported file; of a card that is data alone, the file of the part it is ``of``. A missing package becomes a sentence."""
        if self.card.of is not None:
            return get(self.card.of).module()
        try:
            if not self.own:
                return importlib.import_module("convince." + ".".join(self.path.relative_to(PACKAGE).with_suffix("").parts))
            return _import_file(self.path)
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] in {need.split("[")[0].replace("-", "_") for need in self.card.needs}:
                raise Mistake(f"{self.name}: needs the package {error.name!r}; pip install {' '.join(self.card.needs)}") from error
            raise

    def load(self) -> Any:
        """The part's object: the class or function in its file that is named like the part."""
        if self.card.of is not None:
            return get(self.card.of).load()
        module = self.module()
        wanted = plain(self.name)
        own = {name: value for name, value in vars(module).items() if plain(name) == wanted and getattr(value, "__module__", None) == module.__name__}
        for kind in (inspect.isclass, inspect.isfunction):  # a class and a function may share the part's name
            for value in own.values():
                if kind(value):
                    return value
        raise Mistake(
            f"{self.path}: defines nothing named like its part {self.name!r}; name its class {''.join(word.capitalize() for word in self.name.split('-'))}"
        )

    def options(self) -> dict[str, inspect.Parameter]:
        """The options of this part: its object's arguments; for a layer those of ``install`` after the network."""
        layer = self.card.kind == "layer"
        found = dict(inspect.signature(self.module().install if layer else self.load()).parameters)
        if layer:
            found.pop(next(iter(found)))
        return {name: p for name, p in found.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


@dataclass(frozen=True)
class Broken:
    """A file that looks like a part and cannot be read; listed with the reason, never left out."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def plain(name: str) -> str:
    """Letters and digits only, lower case: ``gb-cnn``, ``GBCNN`` and ``gb_cnn`` are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


# -- reading cards ---------------------------------------------------------------------------------

_START = re.compile(r"^CARD(?:\s*:\s*Card)?\s*=\s*(?=Card\()", re.MULTILINE)
_OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}


def literal(node: ast.expr) -> Any:
    """Evaluate literals, ``+ - * / **`` on numbers, and ``inf``; anything else is a SyntaxError."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id="inf"):
            return math.inf
        case ast.Tuple(elts=items):
            return tuple(literal(item) for item in items)
        case ast.List(elts=items):
            return [literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {literal(k): literal(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = literal(operand)
            if isinstance(value, (int, float)):
                return -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = literal(left), literal(right)
            if isinstance(a, str) and isinstance(b, str) and isinstance(op, ast.Add):
                return a + b
            if isinstance(a, (int, float)) and isinstance(b, (int, float)):
                if isinstance(op, ast.Pow) and abs(b) > 64:
                    raise SyntaxError("an exponent above 64", ("", node.lineno, 0, ""))
                return _OPERATORS[type(op)](a, b)
    raise SyntaxError(f"{ast.unparse(node)!r} is not a literal", ("", node.lineno, 0, ""))


def read(path: Path) -> Part | Broken | None:
    """The card in ``path``: a :class:`Part`, why it cannot be read, or None where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Broken(path, 1, f"cannot be read: {error}")
    start = _START.search(text)
    if start is None:
        if re.search(r"^CARD\b", text, re.MULTILINE):
            line = text[: text.index("CARD")].count("\n") + 1
            return Broken(path, line, "CARD must be written CARD = Card(...)")
        return None
    line = text.count("\n", 0, start.start()) + 1
    newline = text.find("\n", start.end())
    first = text[start.end() : newline if newline >= 0 else None]
    end = text.find("\n)", start.end())
    body = first if first.rstrip().endswith(")") else text[start.end() : end + 2] if end >= 0 else text[start.end() :]
    try:
        call = ast.parse(body, mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(word.arg is None for word in call.keywords):
            raise SyntaxError("every field of a card is named", ("", 1, 0, ""))
        return Part(Card(**{word.arg: literal(word.value) for word in call.keywords if word.arg}), path, line)
    except SyntaxError as error:
        return Broken(path, line + (error.lineno or 1) - 1, f"card cannot be read: {error.msg}")
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = str(error).replace("Card.__init__() ", "")
        return Broken(path, line, f"card is wrong: {reason}")


_own: list[Path] = []


def add_path(path: str | Path) -> None:
    """Look for parts in a file or folder of a person's own as well (``--parts PATH``)."""
    path = Path(path).expanduser().resolve()
    if not path.exists():
        raise Mistake(f"--parts {path}: no such file or folder")
    if path not in _own:
        _own.append(path)
        find.cache_clear()
        if (in_timm := sys.modules.get("convince.backbones.in_timm")) is not None:
            in_timm.watch()


def _files() -> Iterator[Path]:
    for room in sorted(os.scandir(PACKAGE), key=lambda entry: entry.name):
        if room.is_dir() and room.name not in NOT_ROOMS:
            for folder, inner, names in os.walk(room.path):
                inner[:] = sorted(name for name in inner if name != "__pycache__")
                yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py") and name[0] != "_")
    own = list(_own) + [Path(p) for p in os.environ.get("CONVINCE_PARTS", "").split(os.pathsep) if p]
    for path in own:
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]
    from importlib.metadata import entry_points

    for point in entry_points(group="convince.parts"):
        spec = importlib.util.find_spec(point.value.split(":")[0])
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            yield from sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]


@functools.cache
def find() -> tuple[Part | Broken, ...]:
    """Every part of the package, of ``--parts`` paths and of ``convince.parts`` entry points."""
    found: dict[str, Part] = {}
    rows: list[Part | Broken] = []
    for path in _files():
        row = read(path)
        if isinstance(row, Part):
            if row.name in found and found[row.name].path != row.path:
                row = Broken(path, row.line, f"part {row.name!r} stands in {found[row.name].path} already")
            elif row.name in found:
                continue
            else:
                found[row.name] = row
        if row is not None:
            rows.append(row)
    return tuple(rows)


def get(name: str) -> Part:
    """The part of this name (``_`` and case do not matter), or a Mistake with the nearest one."""
    known = [row for row in find() if isinstance(row, Part)]
    for row in known:
        if plain(row.name) == plain(name):
            return row
    for broken in find():
        if isinstance(broken, Broken) and plain(broken.path.stem) == plain(name):
            raise Mistake(f"part {name!r} is broken: {broken}")
    names = [row.name for row in known]
    raise Mistake(f"no part is named {name!r}{nearest(name.lower(), names)} 'convince parts' lists all {len(names)}")


def make(name: str, /, **options: Any) -> Any:
    """Make the part ``name``: ``make("cutmix", p=0.5)``. A wrong option names the nearest one."""
    part = get(name)
    check_options(part, options)
    return part.load()(**options)


def check_options(part: Part, options: dict[str, Any]) -> None:
    """Refuse an option that the part does not have, naming those it has."""
    known = part.options()
    for key in options:
        if key not in known:
            have = ", ".join(known) or "none"
            raise Mistake(f"{part.name}: no option {key!r}{nearest(key, list(known))} Options: {have}")


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """``"poly1:epsilon=1,reduction=sum"`` -> ``("poly1", {"epsilon": 1, "reduction": "sum"})``."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in _split(rest):
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise Mistake(f"{text!r}: write options as name:key=value,key=value; {item!r} has no '='")
        options[key.strip()] = _value(value.strip())
    return name.strip(), options


def spell(name: str, options: dict[str, Any]) -> str:
    """The text that :func:`parse` reads back to the same name and options."""
    return name + (":" + ",".join(f"{k}={_write(v)}" for k, v in options.items()) if options else "")


def _write(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        inner = ",".join(repr(v) if isinstance(v, str) else _write(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    plain_text = isinstance(value, str) and _value(value) == value and not set(value) & set(",\"'()[]{}") and value == value.strip()
    return value if plain_text else repr(value)


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return literal(ast.parse(text, mode="eval").body)
    except (SyntaxError, ArithmeticError, ValueError):
        return text


def _split(text: str) -> Iterator[str]:
    """Split at commas that stand in no bracket and no quotes."""
    depth, start, quote = 0, 0, ""
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:at]
            start = at + 1
    if text[start:].strip():
        yield text[start:]


def _import_file(path: Path) -> Any:
    name = f"convince_own_{plain(str(path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise Mistake(f"{path}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
