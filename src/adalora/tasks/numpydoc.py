"""The parameters that numpydoc docstrings describe: what each one is for, and its type if that is one clear class.

Sources are parsed, never imported. Whoever changes what comes out raises docstrings.FORMAT_VERSION.
"""

from __future__ import annotations

import ast
import inspect
import re
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import AdaLoraWarning

MAX_WORDS = 32
MIN_WORDS = 2

_RULE = re.compile(r"-{3,}\s*")
_SECTIONS = {"Parameters", "Other Parameters", "Attributes"}
_RANGE = r"( (in|between|within|from|greater|less|[<>]=?).*)?"
_SIGN = r"((strictly )?(positive|non-?negative) )?"
_TYPES = {
    "int": re.compile(rf"{_SIGN}(int|integer){_RANGE}"),
    "float": re.compile(rf"{_SIGN}float{_RANGE}"),
    "bool": re.compile(r"bool|boolean"),
    "str": re.compile(r"str|string"),
    "array": re.compile(r"([0-9n]-?d )?(numpy\.|np\.)?(nd)?array([-_ ]like)?( of (int|float|bool)s?)?"),
    "dict": re.compile(r"(dict|dictionary)(\(\))?( of .*)?"),
}


def described_parameters(path: Path) -> Iterator[tuple[str, str]]:
    """(description, class) of each usable parameter in one source file, in order."""
    try:
        with tokenize.open(path) as file:
            code = file.read()
        if not re.search(r"(Parameters|Attributes)\n\s*---", code):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their invalid escape sequences are none of the user's business
            tree = ast.parse(code)
    except (OSError, SyntaxError, UnicodeError) as error:
        warnings.warn(f"{path}: left out, this Python cannot read it ({error})", AdaLoraWarning, 2)
        return
    for docstring in _strings(tree):
        for type_text, description in _parameters(docstring):
            label, text = type_label(type_text), _clean(description)
            if label and text:
                yield text, label


def type_label(type_text: str) -> str | None:
    """The class of a numpydoc type (`"int, optional"` gives `"int"`), None unless it names exactly one."""
    text = " ".join(type_text.replace("`", "").split())
    text = re.sub(r"[,;(\s]+(optional|default)\b.*$", "", text)
    text = re.sub(r"(\s*(\bor|\|)\s*|,\s*)None$|^None\s*(or\b|\|)\s*", "", text).strip(" .,")
    if choices := re.fullmatch(r"(?:(?:str|string|one of)(?: in| from)?:? ?)?\{([^{}]*)\}", text):
        return _choices_label(choices[1])
    if re.fullmatch(r"(callable|function)(,? [\w']+ ?\(.*\))?", text):
        return "callable"
    text = text.lower()
    while (shorter := re.sub(r"[\[(][^\[\]()]+[\])]", "()", text)) != text:
        text = shorter
    text = re.sub(r",?\s*(of |with )?shape\s*=?\s*\(\)(,? (or )?\(\))*$|^\(\) ", "", text)
    if re.search(r"[,|{]|\bor\b", text):
        return None
    return next((label for label, pattern in _TYPES.items() if pattern.fullmatch(text)), None)


def _choices_label(choices: str) -> str | None:
    items = [item.strip() for item in choices.split(",")]
    items = [item for item in items if item not in ("", "None")]
    for label, pattern in (("str", r"'[^']*'|\"[^\"]*\""), ("bool", r"True|False"), ("int", r"-?\d+")):
        if items and all(re.fullmatch(pattern, item) for item in items):
            return label
    return None


def _strings(node: ast.AST) -> Iterator[str]:
    """Docstrings, and strings passed to calls that stand alone, as numpy documents its compiled functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr):
            for part in ast.walk(child):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and "---" in part.value:
                    yield part.value
        elif isinstance(child, ast.stmt):  # most of a tree is expressions; passing over them halves the time
            yield from _strings(child)


def _parameters(docstring: str) -> Iterator[tuple[str, list[str]]]:
    """(type, description lines) of each `name : type` entry of the sections that list parameters."""
    lines = inspect.cleandoc(docstring).splitlines()
    heads = [i for i in range(len(lines) - 1) if _RULE.fullmatch(lines[i + 1]) and lines[i].strip()]
    for head, end in zip(heads, [*heads, len(lines)][1:], strict=True):
        if lines[head].strip() not in _SECTIONS:
            continue
        body = lines[head + 2 : end]
        starts = [i for i, line in enumerate(body) if line and not line[0].isspace()]
        for start, stop in zip(starts, [*starts, len(body)][1:], strict=True):
            _, separator, type_text = body[start].partition(" : ")
            if separator:
                yield type_text, body[start + 1 : stop]


def _clean(lines: list[str]) -> str:
    """The first sentence as plain words, markup removed; empty if it is too short or an unfilled template."""
    prose: list[str] = []
    for line in lines:
        if line.lstrip().startswith(".. "):
            break
        prose.append(line)
    text = re.sub(r":[\w:]+:`([^`<]*)[^`]*`", lambda role: role[1].strip(" ~"), " ".join(prose))
    # The first sentence says what the parameter is; the rest costs time and says little more.
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z(])", re.sub(r"[`*]+", "", text).strip(), maxsplit=1)[0]
    words = sentence.split()
    return " ".join(words[:MAX_WORDS]) if len(words) >= MIN_WORDS and "%(" not in text else ""
