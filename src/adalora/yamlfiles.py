"""YAML as people write it by hand: stricter than PyYAML's own rules, and read with suspicion."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_MOST_VALUES, _DEEPEST = 100_000, 50  # with every alias written out, which a few lines can make millions
_BOOLEAN = "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, only true and false are booleans, and no key occurs twice.

    PyYAML's own rules want a dot and a signed exponent, make False of `no`, and let the last key win.
    """

    # A copy: the rules are shared by all of PyYAML's loaders.
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {
        first: [(tag, rule) for tag, rule in rules if tag != _BOOLEAN]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth, self._sizes = 0, dict[int, int]()

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested in more than {_DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not alias:
            children = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in parts)
        # A node without a size is not complete: an alias within what it stands for.
        if self._sizes.get(id(node), _MOST_VALUES) >= _MOST_VALUES:
            told = f"an alias of itself, or, by aliases, more than {_MOST_VALUES} values"
            raise yaml.composer.ComposerError(None, None, told, mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} occurs twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around strings that `_Loader` would take for numbers."""


_Loader.add_implicit_resolver(_BOOLEAN, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
    )


def load_yaml(text: str) -> Any:
    """Plain values by the rules of a recipe: 1e-3 is a number. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    # Of a number or a date that is none PyYAML raises what Python does.
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"a value cannot be read ({error})") from error


def dump_yaml(values: Any) -> str:
    """Text that `load_yaml` reads to equal values, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
