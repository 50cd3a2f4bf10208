"""Comparisons and prompts from files: every complaint names the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple, TypeAlias

from nlhf.schedules import is_number


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


Prompt: TypeAlias = str | tuple[Message, ...]
"""What comes before a response: a string, which is a user's first turn, or a conversation of any other shape."""


class Comparison(NamedTuple):
    """Response `a` beats `b` on the prompt with probability `p_a`: 1 if it was chosen once, between if judged often."""

    prompt: Prompt
    a: str
    b: str
    p_a: float


Source: TypeAlias = str | PathLike[str] | Iterable[Mapping[str, Any]]
"""A .jsonl, .jsonl.gz or .parquet file, a folder of `Dataset.save_to_disk`, or rows (a `datasets.Dataset`, a list)."""


def read_comparisons(data: Source) -> list[Comparison]:
    """Judged pairs of responses.

    A row is TRL's `prompt, chosen, rejected` (p_a = 1) or `prompt, response_a, response_b, p_a`, whose p_a is the
    probability that a beats b. Other columns are ignored. Texts are strings (standard) or lists of messages
    {role, content} (conversational); a response is then one message of the assistant. Where `prompt` is missing, or is
    a string beside conversations, it is what `chosen` and `rejected` begin with in common, as in TRL. A conversation of
    one user message becomes the string, so that both formats give one `Prompt`.

    Args:
        data: see `Source`.

    Raises ValueError naming file, line (from 1; a row of a table from 0) and what is wrong; FileNotFoundError.

    >>> turn = {"role": "user", "content": "Is water wet?"}
    >>> yes, no = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
    >>> read_comparisons([{"chosen": [turn, yes], "rejected": [turn, no]}])
    [Comparison(prompt='Is water wet?', a='Yes.', b='No.', p_a=1.0)]

    Source: https://huggingface.co/docs/trl/dataset_formats (preference type).
    """
    return _all(data, _comparison)


def read_prompts(data: Source) -> list[Prompt]:
    """The column `prompt`: strings, or conversations that the assistant is to answer.

    >>> read_prompts([{"prompt": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi!"}]}])
    [(Message(role='system', content='Rhyme.'), Message(role='user', content='Hi!'))]

    Args and errors: as `read_comparisons`.
    """
    return _all(data, _only_prompt)


def _all(data: Source, parse: Any) -> list[Any]:
    found = [parse(row, where) for where, row in _rows(data)]
    if not found:
        raise ValueError(f"{data if isinstance(data, str | PathLike) else 'data'}: expected at least one row, got none")
    return found


def _rows(data: Source) -> Iterator[tuple[str, Any]]:
    if not isinstance(data, str | PathLike):
        yield from _table(data, "data")
        return
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(path)
        return
    if not (path.is_dir() or path.suffix == ".parquet"):
        raise ValueError(f"{path}: expected a .jsonl, .jsonl.gz or .parquet file, or a folder of Dataset.save_to_disk")
    try:
        import datasets
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; tables need: pip install 'nlhf[llm]'") from None
    try:
        table = datasets.load_from_disk(str(path)) if path.is_dir() else parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from None
    yield from _table(table, str(path))


def _table(table: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(table, Mapping):  # a DatasetDict
        raise ValueError(f"{name}: holds the splits {', '.join(table)}, give one of them")
    yield from ((f"{name}, row {i}", row) for i, row in enumerate(table))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            for line, text in enumerate(file, 1):
                where = f"{path}, line {line}"
                if text.strip():
                    yield where, _parsed(text, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a gzip file ({error})") from None


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # of JSON, or of its encoding
        raise ValueError(f"{where}: not JSON ({error})") from None


def _comparison(row: Any, where: str) -> Comparison:
    columns = _columns(row, where)
    soft = {"prompt", "response_a", "response_b", "p_a"} <= columns
    if soft == ({"chosen", "rejected"} <= columns):
        raise ValueError(f"{where}: expected the columns [prompt,] chosen, rejected or else prompt, response_a, "
                         f"response_b, p_a, got {', '.join(row)}")  # fmt: skip
    if soft:
        prompt, first, second, p = (row[name] for name in ("prompt", "response_a", "response_b", "p_a"))
        names = "response_a", "response_b"
        if not is_number(p) or not 0 <= p <= 1:
            raise ValueError(f"{where}: p_a must be a probability in [0, 1], got {short(p)}")
    else:
        names, p = ("chosen", "rejected"), 1.0
        prompt, first, second = _split(row, where)
    prompt = _prompt(prompt, where)
    a, b = _response(first, names[0], where), _response(second, names[1], where)
    if a == b and p != 0.5:
        raise ValueError(f"{where}: {names[0]} and {names[1]} must differ, a response ties with itself, got {short(a)}")
    return Comparison(prompt, a, b, float(p))


def _only_prompt(row: Any, where: str) -> Prompt:
    if "prompt" not in _columns(row, where):
        raise ValueError(f"{where}: expected the column prompt, got {', '.join(row)}")
    return _prompt(row["prompt"], where)


def _columns(row: Any, where: str) -> set[str]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object with named columns, got {short(row)}")
    return set(row)


def _split(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """prompt, chosen, rejected of a row in TRL's format."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not (isinstance(chosen, str) and isinstance(rejected, str)) and not (
        isinstance(chosen, list) and isinstance(rejected, list)
    ):
        raise ValueError(f"{where}: chosen and rejected must be two strings or two lists of messages, "
                         f"got {short(chosen)} and {short(rejected)}")  # fmt: skip
    if "prompt" in row and (isinstance(chosen, str) or not isinstance(row["prompt"], str)):
        return row["prompt"], chosen, rejected
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if isinstance(chosen, str) and chosen[:shared].endswith(" "):
        shared -= 1  # the space belongs to the responses
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: prompt must be a string or a list of at least one message, got {short(value)}")
    messages = tuple(_message(message, "prompt", where) for message in value)
    if messages[-1].role == "assistant":
        raise ValueError(
            f"{where}: prompt must end before the assistant speaks, its last message is {short(value[-1])}"
        )
    return messages[0].content if [m.role for m in messages] == ["user"] else messages


def _response(value: Any, name: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) != 1:
        raise ValueError(f"{where}: {name} must be a string or one message after the prompt, got {short(value)}")
    message = _message(value[0], name, where)
    if message.role != "assistant":
        raise ValueError(f"{where}: {name} must be a message of the assistant, got one of {message.role!r}")
    return message.content


def _message(value: Any, name: str, where: str) -> Message:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, Mapping) else (None, None)
    if not (isinstance(role, str) and isinstance(content, str)):
        raise ValueError(f"{where}: a message of {name} must be {{role, content}}, two strings, got {short(value)}")
    return Message(role, content)
