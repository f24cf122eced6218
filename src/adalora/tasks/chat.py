"""Rows of instruction data → texts in parts that are learned or not → tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError
from ..sections import InstructionsData
from .data import require_texts
from .foreign import one_line

IGNORED = -100  # label of a token without loss

Part = tuple[str, bool]  # text, whether the model learns to write it
Message = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One text: labels are the ids, or IGNORED where nothing is learned."""

    ids: list[int]
    labels: list[int]
    merged: bool = False  # a token would have reached over a boundary of parts

    @property
    def learned(self) -> int:
        """Tokens with a loss; none of them is the first, which nothing predicts."""
        return sum(label != IGNORED for label in self.labels)

    def cut(self, length: int) -> Encoded:
        """Its first `length` tokens."""
        return dataclasses.replace(self, ids=self.ids[:length], labels=self.labels[:length])


class ChatFormat:
    """How rows become text: by a chat template or, for pairs where there is none, plainly.

    The plain form is prompt, blank line, input and blank line if there is an input, completion, end token; in
    front stands the begin token if the tokenizer uses one.
    """

    def __init__(self, data: InstructionsData, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """Raises ConfigError where `data` asks for a template and there is none. `name` is the model's, for errors."""
        self.data, self.tokenizer = data, tokenizer
        if data.chat_template is not None:
            if data.kind == "text":
                raise ConfigError("data.chat_template does nothing where data.kind is text; leave it out.")
            tokenizer.chat_template = _read_template(data.chat_template)
        self.templated = data.kind != "text" and tokenizer.chat_template is not None
        if data.kind == "messages" and not self.templated:
            raise ConfigError(
                f"data.kind is messages, but the tokenizer of {name!r} has no chat template. Give one with "
                "data.chat_template, a Jinja template or the file of one, or use a model that was trained on chats."
            )
        if not self.templated and tokenizer.eos_token is None:
            raise ConfigError(
                f"the tokenizer of {name!r} has no end token, so the model could not learn where a text ends. Set "
                "eos_token in its tokenizer_config.json."
            )
        first = tokenizer("a").input_ids[:1]
        self.begin: str = tokenizer.bos_token if tokenizer.bos_token and first == [tokenizer.bos_token_id] else ""

    def check(self, split: str, rows: Dataset) -> None:
        """Raise DataError for the first row of a split that cannot be rendered."""
        where, data = f"data.{split}", self.data
        if data.kind == "messages":
            for index, row in enumerate(rows):
                self.parts(row, f"{where}, row {index}")
        elif data.kind == "pairs":
            require_texts(rows, [data.prompt, data.completion], where)
        else:
            require_texts(rows, [data.text], where)

    def parts(self, row: Mapping[str, Any], where: str) -> list[Part]:
        """The text of a row in parts. Raises DataError that begins with `where`."""
        if self.data.kind == "text":
            return [(self.begin + str(row[self.data.text]) + str(self.tokenizer.eos_token), True)]
        if self.templated:
            parts = self._turns(self._messages(row, where), where)
        else:
            end = str(self.tokenizer.eos_token)
            parts = [(self._plain(row), False), (str(row[self.data.completion]) + end, True)]
        return parts if self.data.completion_only else [("".join(text for text, _ in parts), True)]

    def prompt(self, row: Mapping[str, Any], where: str) -> str:
        """What the model goes on from. An answer at the end of the messages is left out. Raises DataError."""
        data = self.data
        key = data.text if data.kind == "text" else data.prompt
        if data.messages not in row or data.kind != "messages":
            if not isinstance(row.get(key), str):
                named = f"{data.messages!r} or {key!r}" if data.kind == "messages" else repr(key)
                raise DataError(f"{where}: there is no text in {named}; the keys are {', '.join(row)}.")
            if data.kind == "text":
                return self.begin + str(row[key])
        if not self.templated:
            return self._plain(row)
        messages = self._messages(row, where)
        return self._render(messages[:-1] if messages[-1]["role"] == "assistant" else messages, where, True)

    def reference(self, row: Mapping[str, Any]) -> str:
        """The answer that a row holds; of messages, the last one."""
        if self.data.kind != "messages":
            return str(row[self.data.completion])
        return str(next(m["content"] for m in reversed(row[self.data.messages]) if m["role"] == "assistant"))

    def encode(self, parts: Sequence[Part]) -> Encoded:
        """Tokens of the whole text if every boundary of parts falls between two of them, else of each part.

        Either way a prompt has the very tokens that stand before generation.
        """
        whole, ends, text = self.tokens("".join(text for text, _ in parts)), [0], ""
        for part, _ in parts:
            text += part
            prefix = self.tokens(text)
            if whole[: len(prefix)] != prefix:
                return self._encode_apart(parts)
            ends.append(len(prefix))
        labels: list[int] = []
        for (_, learn), start, end in zip(parts, ends, ends[1:], strict=False):
            labels += whole[start:end] if learn else [IGNORED] * (end - start)
        return Encoded(whole, [IGNORED, *labels[1:]])

    def tokens(self, text: str) -> list[int]:
        """Ids of a rendered text; special tokens are in the text."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the end token, and what the template puts behind an answer if it is special."""
        stops = {self.tokenizer.eos_token_id} - {None}
        if self.templated:
            chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            behind = self._render(chat, "a chat of two turns", False).rpartition("b")[2]
            special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
            stops |= {token for token in self.tokens(behind)[:1] if token in special}
        return sorted(stops)

    def _encode_apart(self, parts: Sequence[Part]) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        for text, learn in parts:
            own = self.tokens(text)
            ids += own
            labels += own if learn else [IGNORED] * len(own)
        return Encoded(ids, [IGNORED, *labels[1:]], merged=True)

    def _plain(self, row: Mapping[str, Any]) -> str:
        return self.begin + "".join(text + "\n\n" for text in self._question(row))

    def _question(self, row: Mapping[str, Any]) -> list[str]:
        given = row.get(self.data.input) if self.data.input else None
        return [str(row[self.data.prompt]), *([str(given)] if given else [])]

    def _messages(self, row: Mapping[str, Any], where: str) -> list[Message]:
        data = self.data
        if data.kind == "pairs" or data.messages not in row:
            answer = row.get(data.completion)
            question = {"role": "user", "content": "\n\n".join(self._question(row))}
            return [question, *([{"role": "assistant", "content": str(answer)}] if answer is not None else [])]
        messages = row[data.messages]
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good or not messages:
            raise DataError(
                f"{where}: column {data.messages!r} must hold a list of messages, each with texts role and content; "
                f"it holds {messages!r:.80}."
            )
        # `datasets` gives every message all keys that any has.
        return [{key: value for key, value in message.items() if value is not None} for message in messages]

    def _turns(self, messages: list[Message], where: str) -> list[Part]:
        """Each answer is learned; what stands before it is not, the template's opening of the answer included."""
        parts: list[Part] = []
        text = ""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers or answers[0] == 0:
            what = "begins with an answer" if answers else "holds no message of the role assistant"
            raise DataError(f"{where}: the chat {what}, so that there is nothing to learn. Remove this row.")
        for index in answers:
            before = self._render(messages[:index], where, True)
            whole = self._render(messages[: index + 1], where, False)
            if not (before.startswith(text) and whole.startswith(before)):
                raise DataError(
                    f"{where}: the chat template writes what stands before answer {answers.index(index) + 1} "
                    "differently once the chat goes on, so that no boundary between prompt and answer is exact. Give "
                    "chats of one answer, another data.chat_template, or data.completion_only=false."
                )
            parts += [(before[len(text) :], False), (whole[len(before) :], True)]
            text = whole
        return parts

    def _render(self, messages: Iterable[Message], where: str, opens: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens))
        except Exception as error:  # a template is a program, which raises what it likes
            raise DataError(f"{where}: the chat template cannot be applied: {one_line(error)}") from error


def packed(texts: Iterable[Encoded], length: int) -> list[dict[str, Any]]:
    """Rows of at most `length` tokens from whole texts in their order; positions start anew with each text."""
    blocks: list[dict[str, Any]] = []
    for text in texts:
        if not blocks or blocks[-1]["length"] + len(text.ids) > length:
            blocks.append({"input_ids": [], "labels": [], "position_ids": [], "length": 0})
        block = blocks[-1]
        block["input_ids"] += text.ids
        block["labels"] += text.labels
        block["position_ids"] += range(len(text.ids))
        block["length"] += len(text.ids)
    return blocks


def blocks(texts: Iterable[Encoded], length: int) -> list[Encoded]:
    """All texts behind one another, cut every `length` tokens; the last block is what is left."""
    stream = [token for text in texts for token in text.ids]
    pieces = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [Encoded(piece, [IGNORED, *piece[1:]]) for piece in pieces]


def _read_template(given: str) -> str:
    if "{%" in given or "{{" in given:
        return given
    path = Path(given)
    if not path.is_file():
        raise ConfigError(f"data.chat_template is {given!r}, which is neither a Jinja template nor a file.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template is {given!r}, which cannot be read: {one_line(error)}") from error
